"""The embedded data set: 1,797 real handwritten digits as an image folder."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.errors import UserError
from pipelines.files import cache_folder, writing_to_cache

VERSION = 1
VAL_EVERY = 5
"""Every fifth image of each class, as scikit-learn orders them, is for validation."""


def digits_folder() -> Path:
    """Write the digits of scikit-learn as 8x8 greyscale PNGs, train/0..9 and val/0..9, once.

    1,438 images for training, 359 for validation, both with all classes in equal shares. Made on
    first use in the user's cache; two processes at once are fine.
    """
    cache = cache_folder()
    folder = cache / f"digits-{VERSION}"
    if folder.is_dir():
        return folder
    with writing_to_cache():
        make_digits(cache, folder)
    return folder


def make_digits(cache: Path, folder: Path) -> None:
    """Write the digits to a folder in the cache, whole or not at all."""
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=cache))
    try:
        write_digits(temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_digits(folder: Path) -> None:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "training without --data takes the digits of scikit-learn: pip install scikit-learn"
        ) from error
    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    counts = [0] * 10
    for index, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        split = "val" if counts[label] % VAL_EVERY == VAL_EVERY // 2 else "train"
        counts[label] += 1
        path = folder / split / str(label) / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
