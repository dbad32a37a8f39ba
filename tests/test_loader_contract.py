"""What `pipelines.loader.Loader` promises, checked for every back end on real files."""

from __future__ import annotations

import io
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines.backends import make_loader
from pipelines.backends.prefetch import copied
from pipelines.backends.torchvision import TorchvisionLoader
from pipelines.datasets.images import whole_files
from pipelines.datasets.known import IMAGENET_MEAN, IMAGENET_STD
from pipelines.datasets.split import Split, read_split
from pipelines.errors import UserError
from pipelines.loader import Loader, LoaderSpec, Stage, Transforms
from pipelines.prepare.__main__ import main as prepare

COUNT = 37
NOTHING = Transforms()
EVERYTHING = Transforms(
    auto_augment="trivial", color_jitter=0.4, random_erasing=0.5, mixup=0.2, cutmix=1.0
)
Make = Callable[..., Loader]
TWO_SIZES = (
    Stage(epochs=2, image_size=16, batch_size=5, min_scale=0.5),
    Stage(epochs=1, image_size=24, batch_size=5, min_scale=0.2),
    Stage(epochs=1, image_size=16, batch_size=8, min_scale=0.2),
)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """37 real JPEGs of different shapes, each a class of its own."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    paths = []
    for index in range(COUNT):
        shape = (20 + index % 5, 30 - index % 7, 3)
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8))
        paths.append(str(folder / f"{index:02}.jpg"))
        coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC).save(paths[-1], quality=95)
    return Split(whole_files(paths), list(range(COUNT)), tuple(map(str, range(COUNT))))


@pytest.fixture(scope="module")
def sharded(split: Split, tmp_path_factory: pytest.TempPathFactory) -> Split:
    """The same images in shards, which are in another order; here sorted again."""
    root = tmp_path_factory.mktemp("sharded")
    for label, file in enumerate(split.files):
        folder = root / "folders" / "train" / f"{label:02}"
        folder.mkdir(parents=True)
        # Cameras append to JPEGs; here it makes them fill several shards.
        (folder / "image.jpg").write_bytes(file.read() + bytes(100_000))
    flags = ["shard", str(root / "folders"), str(root / "shards"), "--shard-size", "1"]
    assert prepare([*flags, "--workers", "1"]) == 0
    packed = read_split(root / "shards", "train")
    assert packed.in_shards and len({file.path for file in packed.files}) >= 3
    assert list(packed.labels) != sorted(packed.labels)
    return packed.take(np.argsort(packed.labels))


BACKENDS = ["dali", "torchvision", "memory", "synthetic"]
ON_SHARDS = ["dali on shards", "torchvision on shards", "memory on shards"]


@pytest.fixture(params=BACKENDS)
def make(request: pytest.FixtureRequest, split: Split) -> Iterator[Make]:
    """Makes loaders of one back end, closed after the test."""
    yield from makers(request.param, split)


@pytest.fixture(params=[*BACKENDS, *ON_SHARDS])
def make_any(request: pytest.FixtureRequest, split: Split, sharded: Split) -> Iterator[Make]:
    """The same, also of images in shards: for what depends on how images are read."""
    yield from makers(request.param, sharded if " on " in request.param else split)


def makers(name: str, source: Split) -> Iterator[Make]:
    loaders: list[Loader] = []
    backend = name.partition(" ")[0]

    def make(**fields: Any) -> Loader:
        if backend == "dali":
            pytest.importorskip("nvidia.dali")
        fields = {"stages": TWO_SIZES, "training": True, "split": source} | fields
        # The torchvision back end reads in this process here; its workers have a test below.
        fields.setdefault("num_threads", 1 if backend == "dali" else 0)
        spec = LoaderSpec(**fields)
        loader = make_loader(backend, spec)
        loaders.append(loader)
        return loader

    yield make
    for loader in loaders:
        loader.close()


def one_stage(batch_size: int, image_size: int = 16) -> tuple[Stage, ...]:
    return (Stage(epochs=1, image_size=image_size, batch_size=batch_size),)


def labels(batches: list[tuple[Tensor, Tensor]]) -> list[int]:
    return [label for _, part in batches for label in part.tolist()]


def same(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
        for one, two in zip(left, right, strict=True)
    )


def test_batches_are_normalised_channels_last_images_and_long_labels(make_any: Make) -> None:
    loader = make_any(training=False, stages=one_stage(5, 24))
    batches = list(loader)
    assert [len(images) for images, _ in batches] == [5] * 7 + [2]
    for images, part in batches:
        assert images.shape[1:] == (3, 24, 24) and images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert part.shape == (len(images),) and part.dtype == torch.int64
    assert labels(batches) == list(range(COUNT))
    pixels = torch.cat([images for images, _ in batches])
    assert pixels.abs().max() < 6 and 0.5 < pixels.std() < 2, "normalised"


def test_training_shards_together_read_each_image_at_most_once(make_any: Make) -> None:
    """`test_order` has all combinations of shards and batch sizes."""
    for num_shards, batch_size in ((1, 5), (3, 4), (8, 4)):
        stages = one_stage(batch_size)
        loaders = [
            make_any(stages=stages, shard_id=shard, num_shards=num_shards)
            for shard in range(num_shards)
        ]
        orders = []
        for _ in range(2):
            parts = [list(loader) for loader in loaders]
            assert {len(part) for part in parts} == {COUNT // (num_shards * batch_size)}
            read = [label for part in parts for label in labels(part)]
            assert len(set(read)) == len(read) > COUNT - num_shards * batch_size
            orders.append(read)
        assert orders[0] != orders[1] and orders[0] != sorted(orders[0])
        for loader in loaders:
            loader.close()


def test_validation_reads_each_image_once_at_every_world_size(make: Make, split: Split) -> None:
    """`test_order` has all combinations of shards and batch sizes."""
    few = Split(split.files[:5], split.labels[:5], split.classes)
    for part, num_shards in [(split, 1), (split, 3), (few, 8)]:
        read = []
        for shard in range(num_shards):
            loader = make(
                training=False,
                split=part,
                stages=one_stage(3),
                shard_id=shard,
                num_shards=num_shards,
            )
            steps = len(loader)
            batches = list(loader)
            assert len(batches) == steps
            read += labels(batches)
            loader.close()
        assert read == list(range(len(part)))


def test_the_seed_decides_the_order(make: Make) -> None:
    first, second, other = (list(make(seed=seed)) for seed in (1, 1, 2))
    assert same(first, second)
    assert labels(first) != labels(other)


def test_size_and_batch_size_change_at_the_epoch_boundary(make: Make) -> None:
    loader = make()
    seen = []
    for epoch in range(5):
        assert loader.epoch == epoch
        steps = len(loader)
        shapes = [tuple(images.shape) for images, _ in loader]
        assert len(shapes) == steps and len(set(shapes)) == 1
        seen.append((steps, *shapes[0]))
    assert seen[:3] == [(7, 5, 3, 16, 16), (7, 5, 3, 16, 16), (7, 5, 3, 24, 24)]
    assert seen[3:] == [(4, 8, 3, 16, 16)] * 2, "the last stage goes on"


def test_a_pass_that_was_broken_off_goes_on(make: Make) -> None:
    whole, broken = make(), make()
    expected = list(whole)
    got = []
    for batch in broken:
        got.append(batch)
        if len(got) == 3:
            break
    assert broken.epoch == 0
    got += list(broken)
    assert broken.epoch == 1
    assert same(got, expected)


@pytest.mark.parametrize("passes, batches", [(0, 0), (0, 3), (1, 7), (2, 0), (2, 5), (3, 1)])
def test_a_resumed_run_is_bit_equal(make: Make, passes: int, batches: int) -> None:
    """Stopped in the middle and at both ends of epochs, before and after each kind of change."""
    loader, resumed = make(), make()
    for _ in range(passes):
        list(loader)
    for step, _ in enumerate(loader if batches else (), start=1):
        if step == batches:
            break
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.epoch == loader.epoch
    while loader.epoch < 4:
        assert same(list(resumed), list(loader))
        assert resumed.epoch == loader.epoch


@pytest.mark.parametrize("passes, batches", [(0, 3), (1, 7), (2, 5)])
def test_a_resumed_run_is_augmented_alike(make: Make, passes: int, batches: int) -> None:
    loader, resumed = make(**vars(EVERYTHING)), make(**vars(EVERYTHING))
    for _ in range(passes):
        list(loader)
    for step, _ in enumerate(loader, start=1):
        if step == batches:
            break
    resumed.load_state_dict(loader.state_dict())
    while loader.epoch < 4:
        assert same(list(resumed), list(loader))


def test_alternating_flips_show_both_sides_also_after_a_resume(
    make: Make, request: pytest.FixtureRequest
) -> None:
    """No crop fits here, and all are the centre: only the flips are left."""
    if "synthetic" in request.node.name:
        pytest.skip("it has no images to flip")
    whole = Stage(epochs=1, image_size=20, batch_size=6, min_scale=1.0)
    fields = {"stages": (whole,), "aspect_ratio": (0.5, 0.5), "alternating_flip": True}
    loader, resumed = make(**fields), make(**fields)
    seen: list[dict[int, Tensor]] = []
    for epoch in range(3):
        batches = []
        for batch in loader:
            batches.append(batch)
            if epoch == 1 and len(batches) == 4:
                break
        if epoch == 1:
            resumed.load_state_dict(loader.state_dict())
            rest = list(resumed)
            assert same(list(loader), rest)
            batches += rest
        seen.append({k: image for images, part in batches
                     for k, image in zip(part.tolist(), images, strict=True)})  # fmt: skip
    first, second, third = seen
    assert len(first.keys() & second.keys()) > 20
    for label in first.keys() & second.keys():
        torch.testing.assert_close(second[label], first[label].flip(-1), rtol=0, atol=0.04)
    for label in first.keys() & third.keys():
        assert torch.equal(third[label], first[label])


def test_augmented_batches_have_probabilities_for_labels(make: Make) -> None:
    plain, augmented = list(make()), list(make(**vars(EVERYTHING)))
    for (images, own), (changed, mixed) in zip(plain, augmented, strict=True):
        assert changed.shape == images.shape and changed.dtype == images.dtype
        assert changed.is_contiguous(memory_format=torch.channels_last)
        assert not torch.equal(changed, images) and changed.isfinite().all()
        assert mixed.shape == (len(own), COUNT) and mixed.dtype == torch.float32
        assert torch.allclose(mixed.sum(1), torch.ones(len(own)))
        chosen = torch.nn.functional.one_hot(own, COUNT).bool()
        assert not mixed[~(chosen | chosen.roll(1, 0))].any(), "of the own and the partner's class"


def test_augmentation_that_is_off_changes_no_bit(make: Make) -> None:
    loader = make(**vars(Transforms(rand_augment=(3, 30))))
    read = list(loader)
    raw = loader.open(0, 0)  # type: ignore[attr-defined]
    assert same(read, [next(raw) for _ in read])
    raw.close()


def test_validation_is_not_augmented(make: Make) -> None:
    assert same(*(list(make(training=False, **vars(a))) for a in (EVERYTHING, NOTHING)))


@pytest.mark.parametrize("training", [True, False])
def test_torchvisions_workers_send_a_quarter_of_the_bytes(split: Split, training: bool) -> None:
    """They are normalised on the loader's device, exactly as they were in the workers."""
    fields = {"stages": TWO_SIZES, "training": training, "num_threads": 0}
    loader = TorchvisionLoader(LoaderSpec(split=split, **fields))
    mean, std = (255 * torch.tensor(value) for value in (IMAGENET_MEAN, IMAGENET_STD))
    for (images, labels), (pixels, others) in zip(loader, loader.read(0, 0), strict=False):
        assert pixels.dtype == torch.uint8 and 4 * pixels.nbytes == images.nbytes
        assert torch.equal((pixels - mean) / std, images.permute(0, 2, 3, 1))
        assert torch.equal(labels, others)
    loader.close()


def test_copies_to_a_gpu_wait_on_its_streams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for streams and for tensors log what is asked of them, in order."""
    log: list[str] = []

    class Stream:
        def __init__(self, device: str, name: str = "side") -> None:
            self.name = name

        def __enter__(self) -> None:
            log.append(f"on {self.name}")

        def __exit__(self, *_: object) -> None:
            log.append(f"off {self.name}")

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Part:
        def to(self, device: str, non_blocking: bool) -> Part:
            assert device == "gpu" and non_blocking
            log.append("copy")
            return self

        def record_stream(self, stream: Stream) -> None:
            log.append(f"kept for {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device, "current"))
    batch: Any = (Part(), Part())
    device: Any = "gpu"
    assert next(copied([batch], device)) == batch
    copies = ["on side", "copy", "copy", "off side"]
    assert log == [*copies, "current waits for side", *(2 * ["kept for current"])]


def test_a_loader_that_has_read_can_go_back(make: Make) -> None:
    loader = make()
    start = loader.state_dict()
    first = list(loader)
    list(loader)
    loader.load_state_dict(start)
    assert same(list(loader), first)


def test_closing_twice_is_fine_and_ends_threads(make_any: Make) -> None:
    before = len(os.listdir("/proc/self/task"))
    kept = []
    for _ in range(3):
        loader = make_any(num_threads=1)
        for batch in loader:
            kept.append((batch[0], batch[0].clone()))
            break
        loader.close()
        loader.close()
    assert all(torch.equal(images, copy) for images, copy in kept), "batches outlive the loader"
    assert len(os.listdir("/proc/self/task")) <= before + 2, "each loader leaves no thread"


def test_a_batch_larger_than_the_split_is_the_users_mistake(make: Make) -> None:
    with pytest.raises(
        UserError, match=r"batch_size 19 on each of 2 processes .* 37 .* at most 18"
    ):
        make(stages=one_stage(19), num_shards=2)


@pytest.mark.parametrize(
    "backend, number", [("dali", 1), ("torchvision", 0), ("torchvision", 2), ("memory", 2)]
)
@pytest.mark.parametrize("damage", ["truncated", "empty", "junk", "gone"])
def test_a_bad_file_is_named(
    backend: str, number: int, damage: str, split: Split, tmp_path: Path
) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    bad = tmp_path / "bad one.jpg"
    data = Path(split.files[0].path).read_bytes()
    damaged = {"truncated": data[: len(data) // 2], "empty": b"", "junk": data[:3] + bytes(300)}
    if damage in damaged:
        bad.write_bytes(damaged[damage])
    broken = Split([*split.files[:20], *whole_files([str(bad)])], [0] * 21, ("a",))
    spec = LoaderSpec(split=broken, stages=one_stage(4), training=False, num_threads=number)
    with pytest.raises(UserError) as caught, closing(make_loader(backend, spec)) as loader:
        list(loader)
    remedy = "the index of the files is old" if damage == "gone" else "--skip-list"
    assert str(bad) in str(caught.value) and remedy in str(caught.value)
    assert "\n" not in str(caught.value)


def test_worker_processes_change_nothing_and_end(split: Split) -> None:
    """Neither the batches nor the caller's random numbers depend on the torchvision workers."""
    here, there = (
        make_loader(
            "torchvision",
            LoaderSpec(split=split, stages=TWO_SIZES, training=True, num_threads=number),
        )
        for number in (0, 2)
    )
    random_state = torch.get_rng_state()
    for _ in range(4):
        assert same(list(there), list(here))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert len(multiprocessing.active_children()) == 2
    there.close()
    here.close()
    assert not multiprocessing.active_children()


def test_back_ends_are_named(split: Split) -> None:
    spec = LoaderSpec(split=split, stages=one_stage(2), training=False)
    with pytest.raises(UserError, match=r"'ffcv' is unknown: one of auto, dali"):
        make_loader("ffcv", spec)
    make_loader("auto", spec).close()
