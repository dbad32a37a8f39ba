"""What the worker processes of `benchmarks.prepare_rates` do, part by part of the files."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from pipelines.errors import UserError
from pipelines.prepare.examine import examine_all
from pipelines.prepare.resize import copy_images

QUALITY = 90
"""What `prepare resize` takes by default."""
Part = tuple[int, list[str]]
"""How often all files were read before, and the names of some, relative to the folder."""


def decode(root: Path, part: Part) -> int:
    """Pillow alone; returns the number of images, as the other jobs do."""
    for name in part[1]:
        try:
            with Image.open(root / name) as image:
                image.load()
        except Exception as error:
            raise UserError(f"--data: {root / name} cannot be decoded: {error}") from None
    return len(part[1])


def scan(root: Path, part: Part) -> int:
    """`prepare scan --decode`, as if it had not seen the files before."""
    return len(examine_all(root, True, part[1]))


def resize(root: Path, output: Path, short_sides: tuple[int, ...], part: Part) -> int:
    """`prepare resize`, each time to another folder of `output`."""
    scratch = output / "scratch"
    return len(copy_images(root, output / str(part[0]), short_sides, QUALITY, scratch, part[1]))
