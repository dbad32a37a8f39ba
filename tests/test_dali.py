"""What is particular to the DALI back end; the rest is in the contract and pixel tests."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import weakref
from collections import deque
from contextlib import closing
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("nvidia.dali")

from nvidia.dali import types

from pipelines import environment
from pipelines.backends.dali import graph
from pipelines.backends.dali.feed import Fed, Feed, with_paths
from pipelines.backends.dali.finish import BufferPool
from pipelines.backends.dali.graph import decoder_options
from pipelines.backends.dali.loader import (
    MAX_KEPT,
    DaliLoader,
    build,
    check_one_dali,
    empty_pipeline,
    keep_until_consumed,
    outputs,
    unreadable,
)
from pipelines.datasets.images import whole_files
from pipelines.datasets.split import Split, read_split
from pipelines.errors import UserError
from pipelines.loader import WHOLE_IMAGES, DaliSettings, LoaderSpec, Stage
from pipelines.sampling import BatchSampler
from pipelines.workers import hidden_main

SMALL = (Stage(epochs=1, image_size=24, batch_size=5),)
STAGES = (
    Stage(epochs=1, image_size=32, batch_size=32),
    Stage(epochs=1, image_size=48, batch_size=64, min_scale=0.1),
)


def test_one_stream_serves_sizes_batch_sizes_and_scales(cifar10: Path) -> None:
    """No rebuild: the stream that the first batch opened gives all that follow."""
    spec = LoaderSpec(split=read_split(cifar10, "train"), stages=STAGES, training=True)
    loader = DaliLoader(spec)
    streams = set()
    for _ in range(3):
        for _ in loader:
            streams.add(id(loader.stream))
    loader.close()
    assert len(streams) == 1


def test_settings_change_no_batch(cifar10: Path) -> None:
    spec = LoaderSpec(split=read_split(cifar10, "train"), stages=STAGES, training=True)
    deep = replace(spec, num_threads=3, dali=DaliSettings(prefetch=5, hw_decoder_load=0.3))
    loaders = DaliLoader(spec), DaliLoader(deep)
    for (images, labels), (others, other_labels) in zip(*loaders, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, other_labels)
    for loader in loaders:
        loader.close()


def gpu_spec(**fields: Any) -> LoaderSpec:
    """Of a loader on a GPU, which need not be there."""
    split = Split(whole_files(["a"]), [0], ("a",), shapes=np.array([[9, 9]], np.int32))
    return LoaderSpec(
        **{"split": split, "stages": STAGES, "training": True, "device": "cuda:0"} | fields
    )


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_settings_reach_the_decoder(device: str) -> None:
    settings = DaliSettings(hw_decoder_load=0.25, width_hint=4000, height_hint=3000)
    spec = gpu_spec(device=device, dali=settings)
    options = decoder_options(spec, windows=True)
    hints = (options.get("preallocate_width_hint"), options.get("preallocate_height_hint"))
    given = (options["device"], options.get("hw_decoder_load"), *hints)
    on_gpu = ("mixed", 0.25, 4000, 3000)
    assert given == (on_gpu if device != "cpu" else ("cpu", None, None, None))
    plain = decoder_options(replace(spec, dali=DaliSettings()), windows=True)
    assert "preallocate_width_hint" not in plain
    assert plain.get("hw_decoder_load") == (0.65 if device != "cpu" else None)


@pytest.mark.parametrize(
    "package, windows",
    [
        (("nvidia-nvjpeg-cu12", "12.4.0.76"), False),
        (("nvidia-nvjpeg", "13.1.9.1"), False),
        (("nvidia-nvjpeg", "13.2.3.58"), True),
        (("none", "14"), False),
    ],
)
def test_windows_are_upsampled_as_on_a_cpu_where_nvjpeg_can(
    package: tuple[str, str], windows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name != package[0]:
            raise PackageNotFoundError(name)
        return package[1]

    monkeypatch.setattr(environment, "version", version)
    spec = gpu_spec()
    assert decoder_options(spec, windows=False)["jpeg_fancy_upsampling"] is True
    assert decoder_options(spec, windows=True).get("jpeg_fancy_upsampling", False) == windows


@pytest.mark.parametrize("whole", [False, True])
def test_windows_are_cut_out_of_whole_images_where_that_is_asked_for(
    whole: bool, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph of a GPU, run on a CPU by its decoder: the same pixels either way."""
    monkeypatch.setenv(WHOLE_IMAGES, "1" if whole else "0")
    decoders: list[str] = []

    def options(spec: LoaderSpec, windows: bool) -> dict[str, Any]:
        decoders.append("windows" if windows else "whole images")
        return {"device": "cpu", "output_type": types.RGB, "adjust_orientation": False}

    monkeypatch.setattr(graph, "decoder_options", options)
    split = read_split(photographs, "train").take(np.arange(0, 400, 80))
    stages = (Stage(epochs=1, image_size=64, batch_size=5),)
    spec = gpu_spec(split=split, stages=stages)
    feed = Feed(spec, with_paths(BatchSampler(spec).batches(0, 0)), finish=False)
    pipeline = empty_pipeline(replace(spec, device="cpu"))
    with pipeline:
        inputs = feed.nodes()
        pipeline.set_outputs(graph.decoded_graph(spec, graph.encoded_files(inputs, False), inputs))
    (images,) = pipeline.run()
    fed = feed.in_flight[0]
    assert decoders == ["whole images" if whole else "windows"]
    assert fed.start is not None and fed.extent is not None
    for index, file in enumerate(fed.batch.files):
        (top, left), (high, wide) = fed.start[index], fed.extent[index]
        pixels = np.asarray(Image.open(file.path).convert("RGB"))[top : top + high]
        difference = np.asarray(images[index]).astype(int) - pixels[:, left : left + wide]
        assert np.abs(difference).mean() < 1


def test_a_gpu_that_decodes_no_windows_is_told_what_to_set(few: Split) -> None:
    spec = gpu_spec(split=few)
    feed = Feed(spec, with_paths(BatchSampler(replace(spec, stages=SMALL)).batches(0, 0)), True)
    feed()
    error = RuntimeError(
        "Critical error in pipeline:\nError in MIXED operator "
        "`nvidia.dali.fn.decoders.image_slice`,\nencountered:\n\nINTERNAL_ERROR\n at sample 3"
    )
    told = unreadable(feed, error)
    assert isinstance(told, UserError) and "\n" not in str(told)
    assert "on this GPU (INTERNAL_ERROR at sample 3)" in str(told)
    assert f"{WHOLE_IMAGES}=1" in str(told) and "--backend torchvision" in str(told)
    other = RuntimeError("CUDA error: an illegal memory access was encountered:")
    assert unreadable(feed, other) is other


def test_two_dali_packages_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia_dali_cuda120", "nvidia_dali_cuda130"):
        folder = tmp_path / f"{name}-2.4.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 2.4.0\n"
        )
    check_one_dali()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(UserError, match="cuda120 and nvidia-dali-cuda130 are both installed"):
        check_one_dali()


@pytest.mark.parametrize("fields", [{}, {"reflect_pad": 4}, {"training": False}])
def test_the_graph_for_a_gpu_gives_what_torch_gives_on_a_cpu(
    fields: dict[str, Any], photographs: Path
) -> None:
    """DALI's own resizing, which no loader uses on a CPU: run there, near enough to torch's."""
    stages = (Stage(epochs=1, image_size=96, batch_size=20),)
    split = read_split(photographs, "train").take(np.arange(0, 400, 20))
    spec = LoaderSpec(**{"split": split, "stages": stages, "training": True} | fields)
    feed = Feed(spec, with_paths(BatchSampler(spec).batches(0, 0)), finish=True)
    decoded, labels = build(spec, feed, packed=False).run()
    images = torch.from_dlpack(decoded.as_tensor()).permute(0, 3, 1, 2)
    loader = DaliLoader(spec)
    if spec.reflect_pad:
        crops = feed.in_flight.popleft().batch.crops
        assert crops is not None
        images = loader.reflect_crop(images, crops)
    expected, expected_labels = next(iter(loader))
    loader.close()
    assert torch.equal(torch.from_dlpack(labels.as_tensor()), expected_labels)
    assert (images - expected).abs().mean() * 255 * 0.226 < 0.5


def test_a_buffer_is_reused_once_no_tensor_refers_to_it() -> None:
    buffers = BufferPool()
    first = buffers.take((4, 8, 8, 3))
    address, part = first.data_ptr(), first.permute(0, 3, 1, 2)[2:]
    del first
    second = buffers.take((4, 8, 8, 3))
    assert second.data_ptr() != address, "part is a view of it"
    del part
    assert buffers.take((4, 8, 8, 3)).data_ptr() == address
    assert buffers.take((4, 9, 9, 3)).shape == (4, 9, 9, 3)


READINGS: list[dict[str, Any]] = [{}, {"reflect_pad": 2}, {"training": False}]


@pytest.fixture
def few(cifar10: Path, tmp_path: Path) -> Split:
    """12 images under names of many lengths, with their shapes, 32 x 32 pixels."""
    folder = tmp_path / "data" / "train" / "a class"
    folder.mkdir(parents=True)
    source = read_split(cifar10, "train")
    for index, file in enumerate(source.files[:12]):
        shutil.copy(file.path, folder / ("\N{SNOWMAN}" * index + f"{index}.jpg"))
    split = read_split(tmp_path / "data", "train")
    assert split.shapes is not None and split.shapes.tolist() == 12 * [[32, 32]]
    return split


def read_all(split: Split, **fields: Any) -> list[Tensor]:
    """All images of two epochs, in batches of 5."""
    spec = LoaderSpec(**{"split": split, "stages": SMALL, "training": True} | fields)
    with closing(DaliLoader(spec)) as loader:
        return [images.clone() for _ in range(2) for images, _ in loader]


@pytest.mark.parametrize("fields", READINGS)
def test_headers_are_read_where_the_index_has_no_shapes(fields: dict[str, Any], few: Split) -> None:
    known, unknown = read_all(few, **fields), read_all(replace(few, shapes=None), **fields)
    assert len(known) == len(unknown) >= 4 and all(map(torch.equal, known, unknown))


@pytest.mark.parametrize("fields", READINGS)
@pytest.mark.parametrize("shape", [(20, 31), (200, 100)])
def test_an_image_of_another_shape_than_the_indexed_one_is_named(
    shape: tuple[int, int], fields: dict[str, Any], few: Split
) -> None:
    """It would be cut at the wrong place; a window beyond its edges crashes DALI's decoder."""
    path = few.files[7].path
    Image.new("RGB", shape).save(path)
    with pytest.raises(UserError) as caught:
        read_all(few, **fields)
    wide, high = shape
    assert str(caught.value).startswith(f"{path} is {wide} x {high} pixels and was 32 x 32 when")
    assert str(caught.value).endswith(f"touch '{Path(path).parent}' and start again")


def test_a_gpus_batches_are_ordered_by_torchs_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of its device. Without one, DALI would have the host wait for each batch."""
    ran: list[tuple[Any, ...]] = []

    class Ran:
        def run(self, *stream: Any) -> tuple[str, str]:
            ran.append(stream)
            return "images", "labels"

    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: f"stream {len(ran)} of {of}")
    for device in ("cuda:1", "cpu"):
        feed = SimpleNamespace(spec=SimpleNamespace(device=device), in_flight=deque("ab"))
        batches = outputs(cast("Any", Ran()), cast("Feed", feed))
        assert [next(batches) for _ in "ab"] == [(("images", "labels"), of) for of in "ab"]
    assert ran == [("stream 0 of cuda:1",), ("stream 1 of cuda:1",), (), ()]


def read_damaged(root: Path) -> None:
    """Read images of which one is cut off after some bytes, in all ways that a back end has."""
    split = read_split(root, "train").take(np.arange(0, 500, 25))
    broken = Path(split.files[7].path)
    whole = broken.read_bytes()
    stages = (Stage(epochs=1, image_size=16, batch_size=10),)
    for length in (20, 200, 300, 500, len(whole) - 100):
        broken.write_bytes(whole[:length])
        ways: tuple[dict[str, Any], ...] = ({}, {"reflect_pad": 2}, {"training": False})
        for fields in ways:
            spec = LoaderSpec(**{"split": split, "stages": stages, "training": True} | fields)
            with closing(DaliLoader(spec)) as loader:
                with pytest.raises(UserError) as error:
                    list(loader)
                assert str(broken) in str(error.value), length


def test_a_damaged_file_is_named_and_never_ends_the_process(cifar10: Path, tmp_path: Path) -> None:
    """In a process of its own: DALI's decoders crash on some damaged headers."""
    data = tmp_path / "data"
    shutil.copytree(cifar10, data)
    process = multiprocessing.get_context("forkserver").Process(target=read_damaged, args=(data,))
    with hidden_main():
        process.start()
    process.join()
    assert process.exitcode == 0


def test_a_batch_on_a_gpu_is_given_back_after_the_work_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fake stream of the second GPU that does nothing until it is waited for."""
    log: list[str] = []

    class Event:
        def __init__(self, number: int) -> None:
            self.number, self.over = number, False

        def query(self) -> bool:
            return self.over

        def synchronize(self) -> None:
            self.over = True
            log.append(f"work {self.number} is over")

    class Stream:
        events: ClassVar[list[Event]] = []

        def record_event(self) -> Event:
            self.events.append(Event(len(self.events)))
            return self.events[-1]

        def synchronize(self) -> None:
            log.append("all is over")

    class Decoded:
        def __init__(self, number: int) -> None:
            self.number = number

        def as_tensor(self) -> Tensor:
            memory = np.zeros((2, 4, 4, 3), np.float32)
            weakref.finalize(memory, log.append, f"memory {self.number} is given back")
            return torch.from_numpy(memory)

    second = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "current_stream", {second: Stream()}.__getitem__)

    class Labels:
        def as_tensor(self) -> Tensor:
            return torch.zeros(2)

    fed = cast("Fed", SimpleNamespace(batch=None))
    decoded = (((Decoded(number), Labels()), fed) for number in range(99))
    batches = keep_until_consumed(decoded, second)
    for _ in range(MAX_KEPT + 3):
        next(batches)
    assert log == [
        *("work 0 is over", "memory 0 is given back"),
        *("work 1 is over", "memory 1 is given back"),
    ]
    for event in Stream.events[:5]:
        event.over = True
    next(batches)
    assert log[4:] == [
        f"{what} {number} is {end}"
        for number in (2, 3, 4)
        for what, end in (("work", "over"), ("memory", "given back"))
    ]
    batches.close()
    assert log[10] == "all is over" and len(log) == 11 + MAX_KEPT + 4 - 5
