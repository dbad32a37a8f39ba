"""Rectangular validation: shapes by hand, exact counts at any number of shards, both back ends."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.backends import make_loader
from pipelines.datasets.images import whole_files
from pipelines.datasets.split import Split, read_split
from pipelines.errors import UserError
from pipelines.loader import LoaderSpec, Stage
from pipelines.sampling import BatchSampler, crop_shape
from tests.commands import evaluate, train

SIZES = [(48, 64), (64, 48), (50, 50), (33, 90), (90, 33), (40, 300), (60, 80), (61, 59), (70, 40)]
COUNT = 37


@pytest.fixture(scope="module")
def split(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Real photographs, made small in many shapes, each a class of its own."""
    folder = tmp_path_factory.mktemp("shapes")
    paths, shapes = [], []
    for index, file in enumerate(read_split(photographs, "val").files[:COUNT]):
        width, height = SIZES[index % len(SIZES)]
        paths.append(str(folder / f"{index}.png"))
        with Image.open(file.path) as image:
            image.convert("RGB").resize((width, height + index)).save(paths[-1])
        shapes.append((height + index, width))
    labels = list(range(COUNT))
    classes = tuple(map(str, labels))
    return Split(whole_files(paths), labels, classes, shapes=np.array(shapes, np.int32))


@pytest.mark.parametrize(
    "shapes, expected",
    [
        ([(300, 400)], (128, 168)),  # 128 * 4 / 3 = 170.7
        ([(400, 300)], (168, 128)),
        ([(100, 100), (101, 101)], (128, 128)),
        ([(100, 110)], (128, 136)),  # 140.8
        ([(100, 2000)], (128, 384)),  # no more than three to one
        ([(100, 100), (100, 300)], (128, 144)),  # the square one has 146 pixels
        ([(300, 100), (100, 100), (100, 100)], (144, 128)),  # mean .78, but squares among them
    ],
)
def test_the_shape_of_a_batch(shapes: list[tuple[int, int]], expected: tuple[int, int]) -> None:
    assert crop_shape(np.array(shapes), 128, 146) == expected


def spec_of(split: Split, rect: bool = True, batch_size: int = 5, **fields: int) -> LoaderSpec:
    stages = (Stage(epochs=1, image_size=32, batch_size=batch_size, rect=rect),)
    return LoaderSpec(
        split=split, stages=stages, training=False, mean=(0, 0, 0), std=(1 / 255,) * 3, **fields
    )


@pytest.mark.parametrize("num_shards", [1, 2, 3, 8, 11])
def test_every_image_once_in_the_same_batches_at_any_number_of_shards(
    split: Split, num_shards: int
) -> None:
    def batches(count: int) -> list[tuple[list[int], tuple[int, int]]]:
        found = []
        for shard in range(count):
            spec = spec_of(split, shard_id=shard, num_shards=count)
            order = BatchSampler(spec)
            parts = [order.batch(0, step) for step in range(spec.steps_at(0))]
            found += [(part.indices.tolist(), part.shape) for part in parts]
        return found

    alone = batches(1)
    assert sorted(index for indices, _ in alone for index in indices) == list(range(COUNT))
    assert batches(num_shards) == alone
    ratios = [w / h for h, w in split.shapes[[i for part, _ in alone for i in part]]]
    assert ratios == sorted(ratios)
    assert len({shape for _, shape in alone}) > 3


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_the_pixels_are_pillows_resize_and_centre_crop(split: Split, backend: str) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    spec = spec_of(split, num_threads=1 if backend == "dali" else 0)
    with closing(make_loader(backend, spec)) as loader:
        batches = list(loader)
    assert len(batches) == len(loader) == 8
    for images, labels in batches:
        high, wide = images.shape[2:]
        assert min(high, wide) == 32 and max(high, wide) % 8 == 0
        for image, label in zip(images, labels.tolist(), strict=True):
            with Image.open(split.files[label].path) as file:
                width, height = file.size
                short = min(width, height)
                size = (int(37 * width / short), int(37 * height / short))
                resized = file.resize(size, Image.Resampling.BILINEAR)
            left, top = round((size[0] - wide) / 2), round((size[1] - high) / 2)
            expected = np.array(resized.crop((left, top, left + wide, top + high)))
            difference = (image.permute(1, 2, 0) - torch.from_numpy(expected).float()).abs()
            assert difference.mean() < 0.3 and difference.max() <= 2


def test_squares_and_rectangles_follow_one_another(split: Split) -> None:
    spec = spec_of(split, num_threads=0)
    stages = (*spec_of(split, rect=False).stages, *spec.stages)
    with closing(make_loader("torchvision", LoaderSpec(**vars(spec) | {"stages": stages}))) as both:
        squares, rectangles = list(both), list(both)
    assert {tuple(images.shape[2:]) for images, _ in squares} == {(32, 32)}
    assert len({tuple(images.shape[2:]) for images, _ in rectangles}) > 3


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
@pytest.mark.parametrize("order", [(False, True), (False, True, False)])
def test_a_shard_without_a_rectangle_reads_its_squares(
    split: Split, backend: str, order: tuple[bool, ...]
) -> None:
    """One batch of rectangles for two shards: the first one has none of it."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    few = split.take(np.arange(4))
    counts, seen = [], []
    for shard in range(2):
        spec = spec_of(few, shard_id=shard, num_shards=2, num_threads=int(backend == "dali"))
        stages = tuple(replace(spec.stages[0], rect=rect) for rect in order)
        with closing(make_loader(backend, replace(spec, stages=stages))) as loader:
            passes = [list(loader) for _ in stages]
        counts.append([len(each) for each in passes])
        seen.append([sorted(np.concatenate([b[1] for b in each or [(0, [])]])) for each in passes])
    assert counts == [[1, 0, 1][: len(order)], [1] * len(order)]
    everything = [seen[0][index] + seen[1][index] for index in range(len(order))]
    assert [sorted(each) for each in everything] == [[0, 1, 2, 3]] * len(order)


@pytest.mark.parametrize(("num_images", "num_shards", "rect"), [(2, 3, False), (37, 11, True)])
def test_any_share_may_be_empty(split: Split, num_images: int, num_shards: int, rect: bool) -> None:
    """Three shards of two images, eleven of eight batches: each image once, each pass ends."""
    few = split.take(np.arange(num_images))
    found = []
    for shard in range(num_shards):
        spec = spec_of(few, rect, shard_id=shard, num_shards=num_shards, num_threads=0)
        with closing(make_loader("synthetic" if rect else "memory", spec)) as loader:
            found += [label for _ in range(2) for _, labels in loader for label in labels.tolist()]
    assert sorted(found) == sorted([*range(num_images)] * 2)


def test_memory_keeps_squares_only(split: Split) -> None:
    with pytest.raises(UserError, match="--backend memory keeps squares"):
        make_loader("memory", spec_of(split))


@pytest.mark.slow
def test_both_figures_side_by_side_at_any_world_size(split: Split, tmp_path: Path) -> None:
    for index, file in enumerate(split.files):
        for part in ("train", "val"):
            folder = tmp_path / "data" / part / "ab"[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index}.png").symlink_to(file.path)
    data = ("--data", tmp_path / "data", "--device", "cpu")
    run = tmp_path / "run"
    settings = ("--set", "phases.1.rect=true", "--set", "phases.1.batch_size=6")
    train(*data, "--recipe", "tests/small.toml", "--epochs", 1, "--output", run, *settings)
    summary = json.loads((run / "summary.json").read_text())
    last = run / "checkpoints" / "last.pt"
    for processes in ((), ("--nproc-per-node", 2)):
        out, _ = evaluate(last, *data, *processes, "--rect", "--json")
        result = json.loads(out.splitlines()[-1])
        assert (result["rect_top1"], result["top1"]) == (summary["top1"], summary["square_top1"])
        assert result["images"] == COUNT
