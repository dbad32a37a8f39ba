"""What makes a file unfit for training, in one exception and a few bounds."""

from __future__ import annotations

FORMATS = "JPEG, PNG, BMP, TIFF, WebP, PNM or JPEG 2000"
"""What both DALI and Pillow decode."""

MAX_PIXELS = 178_956_970
"""Width times height: Pillow refuses more, twice its MAX_IMAGE_PIXELS, as decompression bombs."""
MAX_RATIO = 2000
"""Long side / short side. Validation enlarges the short side: at 288 px, an image of 20,000 x 10
takes 1.4 GB in either back end, and one of 65,000 x 1 would take 21."""


class Damage(Exception):
    """A file that would stop a back end; `text` goes on after the path."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind = kind
        self.text = text

    def __str__(self) -> str:
        return self.text


def check_size(width: int, height: int) -> None:
    """Raise Damage for an image without pixels, or with too many once it is decoded or enlarged."""
    if width < 1 or height < 1:
        raise Damage("corrupt", f"cannot be decoded (its header says {width} x {height} pixels)")
    if width * height > MAX_PIXELS:
        raise Damage("too-large", f"has {width:,} x {height:,} pixels, more than {MAX_PIXELS:,}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise Damage("too-thin", f"has {width} x {height} pixels, thinner than 1 : {MAX_RATIO}")
