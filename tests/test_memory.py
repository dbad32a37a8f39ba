"""The in-memory back end against the torchvision one, torch's functions and Pillow, on files."""

from __future__ import annotations

import multiprocessing
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from pipelines.augment.crops import (
    PIECE,
    reflect_crop,
    resized_crop,
    take_pixels,
    take_rows,
    window_crop,
)
from pipelines.backends import make_loader, memory
from pipelines.backends.memory import MemoryLoader
from pipelines.datasets.images import whole_files
from pipelines.datasets.split import Split, read_split
from pipelines.errors import UserError
from pipelines.loader import LoaderSpec, Stage
from pipelines.sampling import BatchSampler
from pipelines.workers import in_processes

STAGES = (
    Stage(epochs=1, image_size=32, batch_size=30, min_scale=0.5),
    Stage(epochs=1, image_size=24, batch_size=20, min_scale=0.2),
    Stage(epochs=1, image_size=32, batch_size=30, min_scale=0.25),
)
PIXELS = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
"""Normalisation that leaves pixels in 0..255."""


@pytest.fixture(scope="module")
def mixed(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Split:
    """70 parts of real photographs of 70 shapes, high and wide, below and above 32 pixels."""
    folder = tmp_path_factory.mktemp("mixed")
    paths = []
    for index, file in enumerate(read_split(photographs, "train").files[:70]):
        paths.append(str(folder / f"{index:02}.png"))
        with Image.open(file.path) as image:
            small = image.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
        small.crop((0, 0, 24 + index % 13 * 3, 60 - index % 11 * 4)).save(paths[-1])
    return Split(whole_files(paths), list(range(70)), tuple(map(str, range(70))))


@pytest.fixture(params=["cifar10", "digits", "mixed"])
def split(request: pytest.FixtureRequest) -> Split:
    """Up to 200 images, each a class of its own."""
    value = request.getfixturevalue(request.param)
    if isinstance(value, Split):
        return value
    files = read_split(value, "train").files[::2][:200]
    return Split(files, list(range(len(files))), tuple(map(str, range(len(files)))))


def spec_of(split: Split, **fields: Any) -> LoaderSpec:
    return LoaderSpec(**({"split": split, "stages": STAGES, "training": True} | fields))


def batches(backend: str, spec: LoaderSpec) -> list[tuple[Tensor, Tensor]]:
    """Those of three epochs."""
    loader = make_loader(backend, spec)
    read = [batch for _ in range(3) for batch in loader]
    loader.close()
    return read


@pytest.mark.parametrize(
    "fields",
    [{"reflect_pad": 4}, {"reflect_pad": 7, "mirror": False}, {"training": False}],
    ids=["reflect-pad", "reflect-pad-7", "validation"],
)
@pytest.mark.parametrize("shard", [0, 1])
def test_pixels_are_those_of_torchvision(split: Split, fields: dict[str, Any], shard: int) -> None:
    """Bit by bit, over sizes that change and come back, with mean and std, on both shards."""
    ours, theirs = (
        batches(
            backend,
            spec_of(split, shard_id=shard, num_shards=2, num_threads=number, seed=5, **fields),
        )
        for backend, number in (("memory", 2), ("torchvision", 0))
    )
    assert len(ours) == len(theirs)
    for (images, labels), (expected, expected_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(labels, expected_labels)
        assert torch.equal(images, expected)


@pytest.mark.parametrize("split", ["cifar10", "digits"], indirect=True)
def test_random_crops_of_images_of_one_shape_are_those_of_torchvision(split: Split) -> None:
    """Up to torchvision's rounding, which happens twice: of the rows and of the columns."""
    ours, theirs = (
        batches(backend, spec_of(split, num_threads=number, seed=5, **PIXELS))
        for backend, number in (("memory", 2), ("torchvision", 0))
    )
    for (images, labels), (expected, expected_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(labels, expected_labels)
        difference = (images - expected).abs()
        assert difference.max() < 1.5 and difference.mean() < 0.4


def test_random_crops_of_other_images_are_the_same_crops(mixed: Split) -> None:
    """Resized twice, so smoother: measured a mean difference of 1.9 of 255."""
    ours, theirs = (
        torch.cat([images for images, _ in batches(backend, spec)[2:5]])
        for backend, spec in (
            ("memory", spec_of(mixed, seed=5, **PIXELS)),
            ("torchvision", spec_of(mixed, seed=5, num_threads=0, **PIXELS)),
        )
    )
    difference = (ours - theirs).abs().mean(dim=(1, 2, 3))
    assert difference.mean() < 3
    for wrong in (theirs.flip(3), theirs.flip(2), theirs.roll(1, 3), theirs.roll(1, 2)):
        assert ((ours - wrong).abs().mean(dim=(1, 2, 3)) > 1.3 * difference).all()


@pytest.mark.parametrize("fields", [{"reflect_pad": 4}, {}], ids=["squares", "shapes and squares"])
def test_processes_read_what_one_does(
    cifar10: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fields: dict[str, Any]
) -> None:
    """The same images at the same indices; a file that cannot be decoded is named by them, too."""
    split = read_split(cifar10, "val")
    expected = batches("memory", spec_of(split, num_threads=2, **fields))
    monkeypatch.setattr(memory, "MANY", len(split))
    for ours, theirs in zip(
        batches("memory", spec_of(split, num_threads=2, **fields)), expected, strict=True
    ):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert not multiprocessing.active_children()
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    files = [*split.files, *whole_files([str(tmp_path / "bad.jpg")])]
    broken = Split(files, [0] * len(files), ("a",))
    with pytest.raises(UserError, match=r"bad\.jpg cannot be decoded .*--skip-list"):
        make_loader("memory", spec_of(broken, num_threads=2, **fields))


def test_processes_find_torchvision_imported_and_keep_to_one_core() -> None:
    asked = [
        "'torchvision.transforms.v2' in __import__('sys').modules",
        "__import__('torch').get_num_threads() == 1",
    ]
    assert list(in_processes(eval, asked, 1)) == [True, True]


def test_the_augmentation_is_pad_crop_and_flip(cifar10: Path) -> None:
    """Each image of a batch by hand: Pillow, torch's own padding, the drawn offset, the flip."""
    split = read_split(cifar10, "train")
    stages = (Stage(epochs=1, image_size=32, batch_size=100),)
    spec = spec_of(split, stages=stages, reflect_pad=4, seed=3, **PIXELS)
    (images, _), *_ = batches("memory", spec)
    batch = BatchSampler(spec).batch(0, 0)
    assert batch.crops is not None
    for row, file in enumerate(batch.files):
        pixels = torch.from_numpy(np.array(Image.open(file.path).convert("RGB"))).permute(2, 0, 1)
        padded = pad(pixels.float(), (4, 4, 4, 4), mode="reflect")
        top, left = (int(value * 9) for value in batch.crops.offset[row].tolist())
        expected = padded[:, top : top + 32, left : left + 32]
        expected = expected.flip(2) if batch.crops.mirror[row] else expected
        assert torch.allclose(images[row], expected, atol=1e-4)


def test_windows_are_the_same_by_numpy_and_by_torch() -> None:
    """By rows on the CPU, by pixels as on a GPU, and as DALI's batches are cropped."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 23, 23, 3), dtype=torch.uint8, generator=generator)
    index, top, left, mirror = (
        torch.randint(0, high, (50,), generator=generator) for high in (20, 8, 8, 2)
    )
    got = window_crop(images, index, top, left, mirror, 16)
    windows = images.unfold(1, 16, 1).unfold(2, 16, 1).permute(0, 1, 2, 4, 5, 3)
    by_pixels = take_pixels(windows, index, top, left, mirror)
    assert torch.equal(got, take_rows(windows, index, top, left, mirror))
    assert torch.equal(got, by_pixels) and got.is_contiguous() and by_pixels.is_contiguous()
    for row in range(50):
        y, x = int(top[row]), int(left[row])
        expected = images[index[row], y : y + 16, x : x + 16]
        assert torch.equal(got[row], expected.flip(1) if mirror[row] else expected)


def test_reflect_crop_pads_as_torch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((30, 3, 12, 12), generator=generator)
    images = images.to(memory_format=torch.channels_last)
    offset = torch.rand((30, 2), generator=generator)
    mirror = torch.randint(0, 2, (30,), generator=generator)
    got = reflect_crop(images, offset, mirror, 5)
    assert got.is_contiguous(memory_format=torch.channels_last)
    padded = pad(images, (5, 5, 5, 5), mode="reflect")
    for row in range(30):
        top, left = (int(value * 11) for value in offset[row].tolist())
        expected = padded[row, :, top : top + 12, left : left + 12]
        assert torch.equal(got[row], expected.flip(2) if mirror[row] else expected)


@pytest.mark.parametrize("size", [8, 33, 90])
def test_resized_crops_are_torchs_interpolation(size: int) -> None:
    """Smaller and larger, mirrored or not, in more than one piece; torch in floats, by image."""
    generator = torch.Generator().manual_seed(0)
    count, side = 75, 100
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
    assert count > PIECE // images[0].numel() > count / 2, "two pieces"
    index = torch.randperm(count, generator=generator)
    high, wide = torch.randint(5, side + 1, (2, count), generator=generator)
    top, left = (
        (side + 1 - part) * torch.rand(count, generator=generator) for part in (high, wide)
    )
    box = [part.floor() for part in (top, left, high.float(), wide.float())]
    mirror = torch.randint(0, 2, (count,), generator=generator)
    got = resized_crop(images, index, tuple(box), mirror, size)
    for row in range(count):
        y, x, h, w = (int(part[row]) for part in box)
        crop = images[index[row], y : y + h, x : x + w].permute(2, 0, 1)[None].float()
        expected = interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
        expected = expected.flip(2) if mirror[row] else expected
        assert torch.allclose(got[row].permute(2, 0, 1), expected, atol=1e-2)


def test_a_crop_narrower_than_a_pixel_is_that_pixel() -> None:
    """As of an image so long that its square has less than a pixel for a crop."""
    column = torch.arange(6.0).to(torch.uint8)[None, None, :, None]
    images = column.expand(1, 6, 6, 3).contiguous()
    box = tuple(torch.tensor([value]) for value in (0.0, 3.2, 6.0, 0.3))
    got = resized_crop(images, torch.tensor([0]), box, torch.tensor([0]), 8)
    assert torch.allclose(got, torch.full((1, 8, 8, 3), 3.0))


def test_what_is_cached(cifar10: Path, mixed: Split) -> None:
    """The shard's part, no larger than the files' own, once for sizes that need the same."""
    split = read_split(cifar10, "train")
    loader = MemoryLoader(spec_of(split))
    kept = loader.images["", 32]
    assert kept is loader.images["", 24] and kept.shape == (500, 32, 32, 3)
    assert np.array_equal(kept[7].numpy(), np.array(Image.open(split.files[7].path).convert("RGB")))
    loader.close()
    assert MemoryLoader(spec_of(mixed)).images["", 32].shape == (70, 60, 60, 3)
    small = (Stage(epochs=1, image_size=16, batch_size=20, min_scale=0.25),)
    assert MemoryLoader(spec_of(mixed, stages=small)).images["", 16].shape == (70, 32, 32, 3)
    share = MemoryLoader(spec_of(split, training=False, shard_id=1, num_shards=3))
    assert {len(images) for images in share.images.values()} == {167}


def test_the_cache_is_kept_until_the_loader_is_closed(cifar10: Path) -> None:
    loader = MemoryLoader(spec_of(read_split(cifar10, "train"), reflect_pad=4))
    kept = loader.images["", 32]
    first = next(iter(loader))
    loader.load_state_dict({"epoch": 0, "step": 0})
    assert torch.equal(next(iter(loader))[0], first[0]) and loader.images["", 32] is kept
    loader.close()
    assert not loader.images
    loader.load_state_dict({"epoch": 0, "step": 0})
    assert torch.equal(next(iter(loader))[0], first[0]), "read anew"
    loader.close()


def test_main_memory_has_but_a_part_of_what_another_device_keeps(cifar10: Path) -> None:
    """Filled piece by piece: the processes of all GPUs share the main memory of their node."""
    stages = (Stage(epochs=1, image_size=64, batch_size=30), STAGES[0])
    spec = spec_of(read_split(cifar10, "train"), stages=stages, reflect_pad=4, device="meta")
    tracemalloc.start()
    try:
        loader = MemoryLoader(spec)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert {images.device.type for images in loader.images.values()} == {"meta"}
    assert peak < sum(images.nbytes for images in loader.images.values()) / 2


@pytest.mark.parametrize("fields", [{"reflect_pad": 4}, {"training": False}])
def test_too_many_pixels_are_found_before_a_file_is_read(fields: dict[str, Any]) -> None:
    split = Split(whole_files(["gone.jpg"]) * 1000, [0] * 1000, ("a",))
    stages = (Stage(epochs=1, image_size=10**6, batch_size=10),)
    with pytest.raises(UserError) as caught:
        make_loader("memory", spec_of(split, stages=stages, **fields))
    text = str(caught.value)
    assert (
        text.startswith("--backend memory needs 3241")
        and "GiB for 1000 images, and cpu has" in text
    )
    assert "--backend dali" in text and "image_size" in text and "\n" not in text


@pytest.mark.parametrize("fields", [{}, {"reflect_pad": 4}])
@pytest.mark.parametrize("damage", ["empty", "truncated"])
def test_a_bad_file_is_named_and_no_thread_is_left(
    fields: dict[str, Any], damage: str, mixed: Split, tmp_path: Path
) -> None:
    bad = tmp_path / "bad one.png"
    data = Path(mixed.files[0].path).read_bytes()
    bad.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    split = Split([*mixed.files, *whole_files([str(bad)])], [0] * 71, ("a",))
    before = threading.active_count()
    with pytest.raises(UserError, match=r"bad one\.png cannot be decoded .*--skip-list"):
        make_loader("memory", spec_of(split, **fields))
    assert threading.active_count() == before
