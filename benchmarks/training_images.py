"""The training images of commands that measure and have no flags for bad files."""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines.datasets.split import Split, left_out_note, read_split


def training_images(root: Path) -> Split:
    """Those that can be read; one line on standard error says what is left out."""
    split = read_split(root, "train", on_bad_image="skip")
    if split.left_out:
        print(left_out_note(split), file=sys.stderr)
    return split
