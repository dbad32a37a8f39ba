"""The pixels of the back ends on real photographs, against Pillow, torchvision and torch."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from pipelines.backends import make_loader
from pipelines.datasets.checks import check_file
from pipelines.datasets.images import ImageFile, whole_files
from pipelines.datasets.known import IMAGENET_MEAN, IMAGENET_STD
from pipelines.datasets.split import Split, read_split
from pipelines.errors import Damage
from pipelines.loader import LoaderSpec, Stage
from pipelines.prepare.resize import shrink
from tests.odd_files import encode, png

BACKENDS = ["dali", "torchvision", "memory"]


def first_batch(backend: str, split: Split, count: int, image_size: int, **fields: Any) -> Tensor:
    """The first images as pixels (count, 3, image_size, image_size) in 0..255."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    stages = (Stage(epochs=1, image_size=image_size, batch_size=count),)
    number = 2 if backend == "dali" else 0
    loader = make_loader(
        backend, LoaderSpec(split=split, stages=stages, num_threads=number, **fields)
    )
    images = next(iter(loader))[0].clone()
    loader.close()
    mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
    return 255 * (images * std + mean)


def some(photographs: Path, count: int) -> Split:
    """`count` of the photographs, from all over the list."""
    split = read_split(photographs, "val")
    chosen = range(0, len(split), len(split) // count)
    return split.take(np.array(chosen))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("image_size", [128, 224])
def test_validation_is_pillows_resize_and_centre_crop(
    backend: str, image_size: int, photographs: Path
) -> None:
    """torchvision's transforms on Pillow images, as most published accuracies were measured.

    Measured on 500 photographs: dali differs from torchvision's tensors by a mean of .002 of 255,
    at most 2.
    """
    split = some(photographs, 20)
    transform = v2.Compose([v2.Resize(round(image_size * 256 / 224)), v2.CenterCrop(image_size)])
    images = first_batch(backend, split, 20, image_size, training=False)
    for (path, *_), image in zip(split.files, images, strict=False):
        expected = np.asarray(transform(Image.open(path).convert("RGB")), dtype=np.float32)
        difference = (image - torch.from_numpy(expected).permute(2, 0, 1)).abs()
        assert difference.mean() < 0.5 and difference.max() < 3, path


@pytest.mark.parametrize("fields", [{}, {"reflect_pad": 4}], ids=["random-crop", "reflect-pad"])
def test_training_batches_are_the_same_in_both_back_ends(
    fields: dict[str, Any], photographs: Path
) -> None:
    """Same images, same crops, same flips; measured .03 of 255."""
    split = some(photographs, 20)
    fast, reference = (
        first_batch(backend, split, 20, 224, training=True, seed=3, **fields)
        for backend in ("dali", "torchvision")
    )
    assert (fast - reference).abs().mean(dim=(1, 2, 3)).max() < 0.5
    # A crop, a flip or an image that were another one would differ by far more.
    assert (fast - reference.flip(3)).abs().mean(dim=(1, 2, 3)).min() > 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_reflect_pad_is_torchs(backend: str, cifar10: Path) -> None:
    """Each batch image is one of the 2 x 81 crops of its padded original, to the pixel."""
    split = read_split(cifar10, "train")
    split = Split(split.files, list(range(len(split))), split.classes)
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    spec = LoaderSpec(
        split=split,
        stages=(Stage(epochs=1, image_size=32, batch_size=200),),
        training=True,
        reflect_pad=4,
        num_threads=1 if backend == "dali" else 0,
        mean=(0.0, 0.0, 0.0),
        std=(1 / 255, 1 / 255, 1 / 255),
    )
    loader = make_loader(backend, spec)
    images, labels = next(iter(loader))
    images, labels = images.clone(), labels.tolist()
    loader.close()
    drawn = []
    for image, index in zip(images, labels, strict=True):
        pixels = np.array(Image.open(split.files[index].path).convert("RGB"))
        padded = torch.nn.functional.pad(
            torch.from_numpy(pixels).permute(2, 0, 1).float(), (4, 4, 4, 4), mode="reflect"
        )
        windows = padded.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 9, 9, 32, 32)
        sides = torch.stack([image, image.flip(2)])[:, :, None, None]
        equal = torch.isclose(sides, windows, atol=1e-3).all(dim=(1, 4, 5))
        drawn.append(equal.nonzero()[0].tolist())
    flips, tops, lefts = zip(*drawn, strict=True)
    assert set(tops) == set(lefts) == set(range(9))
    assert 0.35 < sum(flips) / len(flips) < 0.65


def files_of_every_kind(photograph: Image.Image) -> dict[str, tuple[bytes, Image.Image, float]]:
    """By name: a file of each mode that is read, the 64 x 64 pixels it means, and the tolerance.

    1 of 255 is what Pillow and DALI differ by where 16 bits a channel, inks or a TIFF's palette are
    rounded to 8 bits of red, green and blue.
    """
    grey, clear = photograph.convert("L"), photograph.convert("RGBA")
    clear.putalpha(grey)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees; not applied
    shades = {"1": photograph.convert("1"), "L": grey, "LA": clear.convert("LA")}
    colours = {"P": photograph.convert("P"), "RGB": photograph, "RGBA": clear}
    kept: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
        "png": ("PNG", {}, ("1", "L", "LA", "P", "RGB", "RGBA")),
        "clear.png": ("PNG", {"transparency": 3}, ("L", "P")),
        "exif.png": ("PNG", {"exif": exif}, ("RGB",)),
        "tif": ("TIFF", {}, ("L", "P", "RGB", "RGBA", "CMYK")),
        "exif.tif": ("TIFF", {"exif": exif}, ("L", "RGB")),
        "lzw.tif": ("TIFF", {"compression": "tiff_lzw"}, ("1", "L", "P", "RGB", "RGBA")),
        "bmp": ("BMP", {}, ("1", "L", "P", "RGB", "RGBA")),
        "pnm": ("PPM", {}, ("1", "L", "RGB")),
        "webp": ("WEBP", {}, ("RGB", "RGBA")),
        "exif.webp": ("WEBP", {"exif": exif}, ("RGB",)),
        "jpg": ("JPEG", {}, ("L", "RGB", "CMYK")),
        "exif.jpg": ("JPEG", {"exif": exif}, ("L", "RGB")),
        "jp2": ("JPEG2000", {}, ("L", "RGB", "RGBA")),
    }
    modes = {**shades, **colours, "CMYK": photograph.convert("CMYK")}
    found = {}
    for suffix, (file_format, options, names) in kept.items():
        for mode in names:
            data = encode(modes[mode], file_format, **options)
            with Image.open(io.BytesIO(data)) as image:
                pixels = image.convert("RGB")
            if suffix == "exif.tif":  # which Pillow turns upright by itself
                pixels = pixels.transpose(Image.Transpose.ROTATE_90)
            rounded = mode == "CMYK" or (mode == "P" and file_format == "TIFF")
            found[f"{mode}.{suffix}"] = data, pixels, float(rounded)
    inks = encode(modes["CMYK"], "JPEG")
    marker = inks.index(b"Adobe")
    ycck = inks[: marker + 11] + b"\2" + inks[marker + 12 :]
    with Image.open(io.BytesIO(ycck)) as image:
        found["ycck.jpg"] = ycck, image.convert("RGB"), 1.0
    for name, data, pixels in deep_greys(grey):
        found[name] = data, pixels, 0.0
    samples = np.asarray(photograph).astype(np.uint16) * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    found["deep.png"] = png(64, 64, 16, 2, rows), photograph, 1.0
    found["deep.ppm"] = b"P6 64 64 65535\n" + samples.astype(">u2").tobytes(), photograph, 1.0
    return found


def deep_greys(grey: Image.Image) -> Iterator[tuple[str, bytes, Image.Image]]:
    """16 bits a pixel in each format that has them, and the 8 bits that are nearest."""
    noise = np.random.default_rng(0).integers(-100, 100, (64, 64))
    values = (np.asarray(grey).astype(np.int64) * 257 + noise).clip(0, 65535).astype(np.uint16)
    deep = Image.fromarray(values)
    pixels = Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    for name, file_format in (("png", "PNG"), ("tif", "TIFF"), ("pgm", "PPM"), ("jp2", "JPEG2000")):
        yield f"I;16.{name}", encode(deep, file_format), pixels


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_pixels_from_every_back_end(
    backend: str, photographs: Path, tmp_path: Path
) -> None:
    """Every format and mode that is read, against what the file means; and none is refused."""
    photograph = Image.open(read_split(photographs, "val").files[0].path).convert("RGB")
    kinds = files_of_every_kind(photograph.resize((64, 64)))
    for name, (data, _, _) in kinds.items():
        (tmp_path / name).write_bytes(data)
        check_file(ImageFile(str(tmp_path / name)), pixels=True)
    paths = [str(tmp_path / name) for name in kinds]
    split = Split(whole_files(paths), [0] * len(paths), ("a",))
    images = first_batch(backend, split, len(paths), 64, training=False, resize_ratio=1.0)
    for (name, (_, pixels, tolerance)), image in zip(kinds.items(), images, strict=True):
        expected = np.asarray(pixels, dtype=np.float32)
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() < tolerance + 0.01, name


def test_what_back_ends_read_as_other_pixels_is_refused(tmp_path: Path) -> None:
    """DALI's pixels would be negatives, noise, black, or other colours than Pillow's."""
    grey = Image.linear_gradient("L").resize((64, 64))
    colours = Image.merge("RGB", (grey, grey.rotate(90), grey.rotate(180)))
    inks = encode(colours.convert("CMYK"), "JPEG")
    marker = inks.index(b"\xff\xee")
    without_adobe = inks[:marker] + inks[marker + 16 :]
    values = np.asarray(grey).astype(np.uint16) * 16
    refused = {
        "is a CMYK JPEG without Adobe's marker": [without_adobe],
        "not every back end reads alike (white is": [
            b"P5 64 64 4095\n" + values.astype(">u2").tobytes(),
            b"P5 # 255\n64 64\n100\n" + np.asarray(grey).tobytes(),
            b"P6 64 64 1\n" + bytes(3 * 64 * 64),
        ],
        "is a TIFF that not every back end reads alike": [
            *(
                encode(colours.convert(mode), "TIFF")
                for mode in ("1", "LA", "PA", "F", "I", "YCbCr")
            ),
            encode(Image.fromarray(values), "TIFF", tiffinfo={262: 0}),
        ],
        "is a JPEG 2000 that not every back end reads alike": [
            encode(colours.convert(mode), "JPEG2000") for mode in ("LA", "CMYK", "YCbCr")
        ],
    }
    for words, contents in refused.items():
        for content in contents:
            (tmp_path / "file").write_bytes(content)
            with pytest.raises(Damage, match=re.escape(words)):
                check_file(ImageFile(str(tmp_path / "file")))


def test_copies_of_deep_greys_are_no_whiter(photographs: Path, tmp_path: Path) -> None:
    """`prepare resize` made them pure white; JPEG moves each pixel by a few of 255."""
    photograph = Image.open(read_split(photographs, "val").files[0].path).convert("L")
    for name, data, pixels in deep_greys(photograph.resize((64, 64))):
        (tmp_path / name).write_bytes(data)
        (copy,) = shrink(tmp_path / name, (64,), 95)
        with Image.open(io.BytesIO(copy.content)) as image:
            difference = np.abs(np.asarray(image, np.float32) - np.asarray(pixels, np.float32))
        assert difference.mean() < 3, name
