"""EXIF orientation: read by one rule, and applied alike by every back end."""

from __future__ import annotations

import struct
import zlib
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastimagenet
from fastimagenet.recipes import RECIPES
from pipelines.backends import make_loader
from pipelines.datasets.checks import check_file
from pipelines.datasets.copies import read_copy
from pipelines.datasets.given import given_images
from pipelines.datasets.images import ImageFile
from pipelines.datasets.pixels import exif_orientation
from pipelines.datasets.split import Split, read_headers, read_split
from pipelines.errors import Damage
from pipelines.loader import LoaderSpec, Stage
from pipelines.prepare.resize import shrink
from tests.commands import SMALL, output_of, train
from tests.odd_files import encode

T = Image.Transpose
STORED = (
    *(None, T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM),
    *(T.TRANSPOSE, T.ROTATE_90, T.TRANSVERSE, T.ROTATE_270),
)
"""What a camera does that writes the orientations 1 to 8, by the pictures in the EXIF standard."""
FORMATS: dict[str, dict[str, Any]] = {
    "jpg": {"file_format": "JPEG", "quality": 95, "subsampling": "4:4:4"},
    "png": {"file_format": "PNG"},
    "tif": {"file_format": "TIFF"},
    "webp": {"file_format": "WEBP", "lossless": True},
}


def blocks(seed: int) -> Image.Image:
    """96 x 64 pixels in blocks of 8 x 8, which JPEG keeps alike in every orientation."""
    colours = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
    return Image.fromarray(colours.repeat(8, 0).repeat(8, 1))


def stored(image: Image.Image, orientation: int) -> Image.Image:
    how = STORED[orientation - 1]
    return image if how is None else image.transpose(how)


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def write(folder: Path, turned: bool) -> None:
    """Eight images in each format: upright ones, or as cameras with eight orientations do."""
    for suffix, options in FORMATS.items():
        for orientation in range(1, 9):
            for seed in count(orientation, 8):
                image, exif = blocks(seed), exif_of(orientation)
                data = encode(stored(image, orientation), exif=exif, **options)
                if suffix != "webp" or data[34] % 2 == 0:  # of an odd length DALI reads none
                    break
            path = folder / "train" / suffix / f"{orientation}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data if turned else encode(image, **options))
    (folder / "val").symlink_to("train")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same images: turned, and upright."""
    root = tmp_path_factory.mktemp("orientations")
    for name in ("turned", "upright"):
        write(root / name, turned=name == "turned")
    return root / "turned", root / "upright"


def test_an_image_is_stored_as_pillow_reads_it(folders: tuple[Path, Path]) -> None:
    """The files of these tests say what they should: by another implementation."""
    from PIL import ImageOps

    for path in sorted((folders[0] / "train").rglob("*.*")):
        with Image.open(path) as image:
            pixels = ImageOps.exif_transpose(image).convert("RGB")
        with Image.open(folders[1] / path.relative_to(folders[0])) as image:
            assert np.array_equal(np.asarray(pixels), np.asarray(image.convert("RGB"))), path


CASES: dict[str, dict[str, Any]] = {
    "crops": {"training": True},
    "reflect_pad": {"training": True, "reflect_pad": 4},
    "validation": {"training": False},
    "rect": {"training": False, "rect": True},
}


def first_batch(backend: str, split: Split, fields: dict[str, Any], upright: bool = True) -> Tensor:
    """All images of the split in a batch of 48 px, or of 32 px and one aspect ratio."""
    stage = Stage(epochs=1, image_size=32, batch_size=len(split), rect="rect" in fields)
    fields = {name: value for name, value in fields.items() if name != "rect"}
    spec = LoaderSpec(split=split, stages=(stage,), upright=upright, num_threads=0, **fields)
    if backend != "gpu":
        spec = replace(spec, num_threads=2 if backend == "dali" else 0)
        with closing(make_loader(backend, spec)) as loader:
            return next(iter(loader))[0].clone()
    from pipelines.backends.dali.feed import Feed, with_paths
    from pipelines.backends.dali.loader import build
    from pipelines.sampling import BatchSampler

    spec = replace(spec, num_threads=2)
    feed = Feed(spec, with_paths(BatchSampler(spec).batches(0, 0)), finish=True)
    decoded, _ = build(spec, feed, packed=False).run()
    return torch.from_dlpack(decoded.as_tensor()).clone()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["dali", "gpu", "torchvision", "memory"])
def test_eight_orientations_are_one_image(
    backend: str, case: str, folders: tuple[Path, Path]
) -> None:
    """Bit for bit the batch of the upright images; "gpu": the graph for one, run on a CPU."""
    if backend in ("dali", "gpu"):
        pytest.importorskip("nvidia.dali")
    if (backend, case) == ("memory", "rect"):
        pytest.skip("memory keeps squares")
    turned, upright = (read_split(folder, "train") for folder in folders)
    expected = first_batch(backend, upright, CASES[case])
    assert torch.equal(first_batch(backend, turned, CASES[case]), expected)
    if case in ("crops", "rect"):
        off = first_batch(backend, turned, CASES[case], upright=False)
        assert off.shape != expected.shape or not torch.equal(off, expected)
        assert torch.equal(first_batch(backend, upright, CASES[case], upright=False), expected)


def test_copies_and_shards_keep_the_orientation(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The index of each knows it, and a loader turns copies as it turns originals."""
    turned = read_split(folders[0], "train")
    assert turned.orientations is not None
    assert turned.orientations.tolist() == 4 * list(range(1, 9)) and turned.num_turned == 28
    assert turned.take(np.array([3, 11])).num_turned == 2
    given = given_images([str(folders[0] / "train"), str(folders[0] / "none.jpg")])
    assert given.orientations is not None and given.orientations.tolist() == 4 * list(range(1, 9))
    assert len(given.left_out) == 1

    data, shards = tmp_path / "data", tmp_path / "shards"
    data.mkdir()
    for name in ("train", "val"):
        (data / name).symlink_to(folders[0] / name)
    output_of("pipelines.prepare", "resize", data, data, "--short-side", 48)
    output_of("pipelines.prepare", "shard", folders[0], shards, "--seed", 1)
    copies = read_copy(data, "48", read_split(data, "train"))
    assert copies.orientations is not None and copies.shapes is not None
    assert copies.orientations.tolist() == turned.orientations.tolist()
    assert set(map(tuple, copies.shapes_of(np.arange(32), upright=True).tolist())) == {(48, 72)}
    packed = read_split(shards, "train")
    assert packed.orientations is not None
    names = [Path(file.name).stem for file in packed.files]
    assert packed.orientations.tolist() == [int(name[0]) for name in names]

    upright = [Image.open(file.path).convert("RGB") for file in read_split(folders[1], "val").files]
    images = first_batch("torchvision", copies, {"training": False, "resize_ratio": 1.0})
    for image, picture in zip(images, upright, strict=True):
        small = np.asarray(picture.resize((48, 32), T_LANCZOS).crop((8, 0, 40, 32)), np.float32)
        pixels = image.permute(1, 2, 0).numpy() * STD + MEAN
        assert np.abs(pixels * 255 - small).mean() < 12, "60 and more where it is not turned"


T_LANCZOS = Image.Resampling.LANCZOS
MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))


def tag(
    value: int, kind: int = 3, values: int = 1, order: str = "<", number: int = 0x0112
) -> bytes:
    """EXIF of one tag, of the kind SHORT (3), LONG (4) or another."""
    data = struct.pack(order + {1: "B3x", 3: "H2x", 4: "I"}[kind], value)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return head + struct.pack(f"{order}HHHI", 1, number, kind, values) + data + bytes(4)


EXIFS = {
    "six": (tag(6), 6),
    "six of big ends": (tag(6, order=">"), 6),
    "six as LONG": (tag(6, kind=4, order=">"), 6),
    "zero": (tag(0), 1),
    "nine": (tag(9), 1),
    "a byte": (tag(6, kind=1), 1),
    "two numbers": (tag(6, values=2), 1),
    "another tag": (tag(6, number=0x0113), 1),
    "cut off": (tag(6)[:19], 1),
    "no entries": (tag(6)[:9], 1),
    "only its order": (b"II*\0", 1),
    "another order": (b"IX*\0" + tag(6)[4:], 1),
    "entries elsewhere": (tag(6)[:4] + struct.pack("<I", 2**32 - 1) + tag(6)[8:], 1),
    "nothing": (b"", 1),
}
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def odd_files(image: Image.Image) -> dict[str, tuple[bytes, int]]:
    """By name, files with metadata of every kind, and the orientation that counts."""
    jpeg, png = encode(image, "JPEG", quality=95, subsampling="4:4:4"), encode(image, "PNG")
    end = png.index(b"IEND") - 4
    found = {}
    for index, (exif, orientation) in enumerate(EXIFS.values()):
        parts = segment(0xE1, b"Exif\0\0" + exif)
        found[f"{index}.jpg"] = jpeg[:20] + parts + jpeg[20:], orientation
        chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif
        chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
        found[f"{index}.png"] = png[:33] + chunk + png[33:], orientation
        found[f"behind-{index}.png"] = png[:end] + chunk + png[end:], orientation
        if exif:
            found[f"{index}.webp"] = encode(image, "WEBP", quality=95, exif=exif), orientation
    long = bytes(5000)  # more than is read at a time
    six = segment(0xE1, b"Exif\0\0" + tag(6)[:8]) + segment(0xE1, b"Exif\0\0" + tag(6)[8:])
    found["in-two.jpg"] = jpeg[:2] + segment(0xED, long) + six + jpeg[2:], 6
    found["xmp.jpg"] = encode(image, "JPEG", quality=95, xmp=XMP), 1
    found["xmp.tif"] = encode(image, "TIFF", tiffinfo={700: XMP}), 1
    found["both.tif"] = encode(image, "TIFF", tiffinfo={700: XMP, 0x0112: 3}), 3
    found["zero.tif"] = encode(image, "TIFF", tiffinfo={0x0112: 0}), 1
    found["nine.tif"] = encode(image, "TIFF", tiffinfo={0x0112: 9}), 1
    return found


def test_one_rule_says_what_an_orientation_is() -> None:
    for name, (exif, orientation) in EXIFS.items():
        assert exif_orientation(exif) == exif_orientation(b"Exif\0\0" + exif) == orientation, name
    assert exif_orientation(tag(6) + bytes(10**6)) == 6


@pytest.mark.parametrize("backend", ["dali", "torchvision", "memory"])
@pytest.mark.parametrize("indexed", [True, False])
def test_odd_metadata_mean_the_same_to_all(
    backend: str, indexed: bool, photographs: Path, tmp_path: Path
) -> None:
    """Validation at the image's own size, against the pixels of a photograph turned by Pillow."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    if (backend, indexed) == ("torchvision", False):
        pytest.skip("it reads no index")
    with Image.open(read_split(photographs, "val").files[0].path) as opened:
        photograph = opened.convert("RGB").resize((32, 32))
    files = odd_files(photograph)
    (tmp_path / "val" / "a").mkdir(parents=True)
    for name, (data, _) in files.items():
        (tmp_path / "val" / "a" / name).write_bytes(data)
    split = read_split(tmp_path, "val", check_files=indexed)
    names = [Path(file.path).name for file in split.files]
    assert sorted(names) == sorted(files)
    _, orientations = split.headers_of(np.arange(len(split)))
    expected = {name: orientation for name, (_, orientation) in files.items()}
    assert dict(zip(names, orientations.tolist(), strict=True)) == expected
    fields = {"training": False, "resize_ratio": 1.0}
    for name, image in zip(names, first_batch(backend, split, fields), strict=True):
        undone = {6: 8, 8: 6}.get(expected[name], expected[name])
        pixels = np.asarray(stored(photograph, undone), np.float32)
        found = 255 * (image.permute(1, 2, 0).numpy() * STD + MEAN)
        assert np.abs(found - pixels).mean() < 8, name


def test_metadata_that_dali_does_not_find_are_refused(tmp_path: Path) -> None:
    """Behind a part of odd length it ends with an error, in training, on an image of Pillow's."""
    grey = Image.linear_gradient("L").resize((64, 48))
    image = Image.merge("RGB", (grey, grey.rotate(180), grey))
    data = encode(image, "WEBP", lossless=True, exif=exif_of(6))
    assert data[34] % 2, "an odd length"
    file = ImageFile(str(tmp_path / "odd.webp"))
    Path(file.path).write_bytes(data)
    with pytest.raises(Damage, match=r"is a WebP that not every .* \(EXIF behind .*, VP8L\)"):
        check_file(file)
    for fine in (data[:20] + b"\0" + data[21:], encode(image, "WEBP", exif=exif_of(6))):
        Path(file.path).write_bytes(fine)
        check_file(file)
        read_headers([file])


def test_a_copy_gets_no_orientation_of_xmp(tmp_path: Path) -> None:
    """Its original is not turned by it."""
    for name, (data, orientation) in odd_files(blocks(1)).items():
        (tmp_path / name).write_bytes(data)
        (copy,) = shrink(tmp_path / name, (32,), 90)
        (tmp_path / "copy.jpg").write_bytes(copy.content)
        header = check_file(ImageFile(str(tmp_path / "copy.jpg")))
        assert header.orientation == orientation, name
        assert (header.width, header.height) == (48, 32), "as it is stored"


def test_the_classifier_turns_what_its_recipe_does(
    folders: tuple[Path, Path], finished: Path
) -> None:
    plain = fastimagenet.load(finished)
    upright = replace(plain, recipe=replace(plain.recipe, upright=True))
    turned, straight = (
        sorted(str(path) for path in (folder / "train").rglob("*.*")) for folder in folders
    )
    expected = plain.predict(straight)
    assert upright.predict(turned) == upright.predict(straight) == expected
    assert upright.predict(map(Image.open, turned)) == expected
    assert plain.predict(turned) != expected


def test_parity_compares_upright_images(folders: tuple[Path, Path]) -> None:
    pytest.importorskip("nvidia.dali")
    from pipelines.parity.compare import compare, spec_of

    spec = replace(spec_of(read_split(folders[0], "train"), True, 32, "cpu", 2), upright=True)
    assert compare(spec, folders[0], lambda done: None).mean < 0.25


def test_a_line_says_how_many_images_lie_on_their_side(folders: tuple[Path, Path]) -> None:
    flags = ("--data", folders[0], *SMALL, "--dry-run", "--set", "phases.*.batch_size=8")
    _, err = train(*flags)
    assert err.splitlines() == [
        "note: 56 of 64 images have an EXIF orientation, which is not applied: --set upright=true "
        "turns them upright"
    ]
    for fine in ((*flags, "--set", "upright=true"), ("--data", folders[1], *flags[2:])):
        assert "EXIF" not in train(*fine)[1]


def test_photographs_are_turned_upright() -> None:
    named = {name: fastimagenet.recipe(name) for name in RECIPES}
    assert {name for name, each in named.items() if each.upright} == {"photos", "photos-scratch"}
