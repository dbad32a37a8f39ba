"""Which images validate where no folders say it: a share of each class, or a table's column."""

from __future__ import annotations

import hashlib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets.images import Listing
from pipelines.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """How images that are not in train/ and val/ are divided. Raises UserError naming the flag."""

    val_fraction: float | None = None
    """Share of the images of each class that validate."""
    labels: Path | None = None
    """A CSV file that names images and their classes."""

    def __post_init__(self) -> None:
        fraction = self.val_fraction
        if fraction is not None and not 0 < fraction < 1:
            raise UserError(f"--val-fraction must be above 0 and below 1, not {fraction:g}")

    @property
    def given(self) -> bool:
        """Whether it says anything: else the folders do."""
        return self.val_fraction is not None or self.labels is not None

    def flags(self) -> str:
        """Write the flags that ask for it, with a blank before each."""
        words = [] if self.val_fraction is None else ["--val-fraction", f"{self.val_fraction:g}"]
        words += [] if self.labels is None else ["--labels", str(self.labels)]
        return "".join(f" {shlex.quote(word)}" for word in words)

    def to_plain(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        labels = None if self.labels is None else os.path.abspath(self.labels)
        return {"val_fraction": self.val_fraction, "labels": labels}


def stem(name: bytes) -> bytes:
    """Return what an image has in common with its copies: its path without the suffix."""
    return os.path.splitext(name)[0]


def place_of(name: bytes) -> int:
    """Hash a path without its suffix to 0 .. 2^64 - 1: the same anywhere, also of a copy."""
    return int.from_bytes(hashlib.sha256(stem(name)).digest()[:8], "big")


def validating(listing: Listing, folder: str, fraction: float) -> tuple[NDArray[np.bool_], str]:
    """Find the images that validate, (N,) bool, and a note where a class had too few for that.

    An image validates if the hash of its path below `folder` is in the lowest `fraction`, whatever
    other images there are: new ones move none of the old. A class all of whose images are on one
    side gives its next one to the other. Raises UserError for a class of one image.
    """
    names = listing.images.names_below(folder)
    places = np.fromiter(map(place_of, names), np.uint64, len(names))
    result = places < np.uint64(min(int(fraction * 2**64), 2**64 - 1))
    labels = listing.labels
    number = np.bincount(labels, minlength=len(listing.classes))
    chosen = np.bincount(labels[result], minlength=len(listing.classes))
    single = np.flatnonzero(number == 1)
    if len(single):
        raise UserError(
            f"--val-fraction: class {listing.classes[single[0]]} has one image in {folder}: it "
            "takes two or more, one to train on and one to validate"
        )
    one_sided = np.flatnonzero((number > 0) & ((chosen == 0) | (chosen == number)))
    for label in one_sided.tolist():
        members = np.flatnonzero(labels == label)
        low = not chosen[label]
        at = members[places[members].argmin() if low else places[members].argmax()]
        result[at] = low
    if not len(one_sided):
        return result, ""
    classes = "1 class has" if len(one_sided) == 1 else f"{len(one_sided):,} classes have"
    return result, (
        f"note: --val-fraction {fraction:g}: {classes} too few images for both sides and give one "
        f"to the other, the first {listing.classes[one_sided[0]]}; more images may take it back"
    )
