"""Read `dataset.json` of an image folder, which says where its images are from."""

from __future__ import annotations

from pathlib import Path

from pipelines.errors import UserError
from pipelines.files import Row, read_object

NAME = "dataset.json"


def read_manifest(root: Path) -> Row:
    """Read `root/dataset.json`; empty without the file. Raises UserError if it is damaged."""
    if not (root / NAME).exists():
        return {}
    try:
        return read_object(root / NAME)
    except UserError as error:
        raise UserError(f"{error}: remove it") from None


def known_facts(root: Path) -> Row:
    """Read the same of a folder that is only read: empty, too, where the file is not ours."""
    try:
        return read_manifest(root)
    except UserError:
        return {}
