"""What a user would pick instead of our loaders: a plain DataLoader, one on tensors, SPDL.

All give what `pipelines.loader` promises of a training batch, but for its order: images
(B, 3, S, S) float32, normalised, and labels; they draw with replacement and never end. FFCV is not
among them: it reads only files of its own format, and its package does not install from PyPI by pip
alone.
"""

from __future__ import annotations

import io
import multiprocessing
import random
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, features
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from pipelines.backends import make_loader
from pipelines.datasets.known import IMAGENET_MEAN, IMAGENET_STD
from pipelines.datasets.split import Split
from pipelines.errors import UserError
from pipelines.loader import LoaderSpec, Stage
from pipelines.workers import leave_signals_to_parent, preload_torchvision

MIN_SCALE = 0.25
"""Smallest share of an image's area that a crop keeps."""
LOW_RATIO, HIGH_RATIO = 3 / 4, 4 / 3
"""Of a crop's width to its height, as torchvision's RandomResizedCrop and our loaders have it."""
ENDLESS = 10**9


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every loader is asked for."""

    split: Split
    image_size: int
    batch_size: int
    threads: int
    """Decoding threads, or worker processes."""
    reflect_pad: int = 0
    """When > 0: the whole image, padded by this many pixels and cropped back."""

    @property
    def spec(self) -> LoaderSpec:
        """What our loaders are asked for."""
        stage = Stage(
            epochs=1, image_size=self.image_size, batch_size=self.batch_size, min_scale=MIN_SCALE
        )
        return LoaderSpec(
            split=self.split,
            stages=(stage,),
            training=True,
            num_threads=self.threads,
            reflect_pad=self.reflect_pad,
        )


def ours(backend: str, task: Task) -> Generator[Any]:
    """Read by one of our back ends, epoch after epoch. Raises UserError where it cannot be had."""
    with closing(make_loader(backend, task.spec)) as loader:
        while True:
            yield from loader


class TransformedImages(Dataset[tuple[Tensor, int]]):
    """What a user writes: open, transform, return."""

    def __init__(
        self, split: Split, decode: Callable[[bytes], Any], transform: Callable[[Any], Tensor]
    ) -> None:
        self.split = split
        self.decode = decode
        self.transform = transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.decode(self.split.files[index].read())
        return self.transform(image), int(self.split.labels[index])


def dataloader(task: Task) -> Generator[Any]:
    """Read by a DataLoader as most people write it: Pillow decodes, torchvision transforms."""
    return transformed(task, transforms, by_pillow, transforms.ToTensor())


def dataloader_v2(task: Task) -> Generator[Any]:
    """Read as torchvision's documentation advises: tensors from `decode_image` on, v2."""
    return transformed(task, v2, by_torchvision, v2.ToDtype(torch.float32, scale=True))


def transformed(
    task: Task, library: Any, decode: Callable[[bytes], Any], to_float: Callable[[Any], Tensor]
) -> Generator[Any]:
    """Read by a DataLoader with the transforms of `library`, torchvision's first or second API."""
    size = task.image_size
    steps = [library.RandomResizedCrop(size, scale=(MIN_SCALE, 1.0), antialias=True)]
    if task.reflect_pad:
        crop = library.RandomCrop(size, task.reflect_pad, padding_mode="reflect")
        steps = [library.Resize((size, size), antialias=True), crop]
    steps += [library.RandomHorizontalFlip(), to_float]
    steps += [library.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    images = TransformedImages(task.split, decode, library.Compose(steps))
    return from_workers(images, len(images), task)


def by_pillow(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def by_torchvision(data: bytes) -> Tensor:
    """Decode to (3, H, W) uint8; JPEGs by libjpeg-turbo."""
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def from_workers(dataset: Dataset[Any], count: int, task: Task) -> Generator[Any]:
    """Read `count` images by a DataLoader with as many workers as others have threads."""
    # One endless epoch: with few images a new iterator for each would be most of the time.
    sampler = RandomSampler(range(count), replacement=True, num_samples=ENDLESS)
    # Workers are not forked from this process, where other loaders have threads.
    preload_torchvision()
    context = multiprocessing.get_context("forkserver")
    loader = DataLoader(
        dataset,
        batch_size=task.batch_size,
        sampler=sampler,
        num_workers=task.threads,
        multiprocessing_context=context,
        worker_init_fn=leave_signals_to_parent,
    )
    batches = iter(loader)
    try:
        yield from batches
    finally:
        del batches  # the last reference: its workers stop


def spdl(task: Task) -> Generator[Any]:
    """Read by SPDL's threads; FFmpeg decodes, crops, resizes and mirrors each image by a filter.

    Raises UserError where SPDL or the FFmpeg that it needs is not installed, and for `reflect_pad`.
    """
    if task.reflect_pad:
        raise UserError("--reflect-pad is not written for it")
    try:
        import spdl.io
        from spdl.pipeline import PipelineBuilder

        spdl.io.demux_config()  # looks for FFmpeg
    except (ImportError, RuntimeError) as error:
        raise UserError("needs the packages spdl-core and spdl-io, and FFmpeg 4 to 9") from error
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def read(indices: list[int]) -> tuple[Tensor, Tensor]:
        shape = (len(indices), 3, task.image_size, task.image_size)
        images = torch.empty(shape, dtype=torch.uint8).to(memory_format=torch.channels_last)
        for row, index in enumerate(indices):
            data = task.split.files[index].read()
            image = spdl.io.load_image(data, filter_desc=spdl_filter(task))
            images[row] = spdl.io.to_torch(image).permute(2, 0, 1)
        labels = torch.tensor([int(task.split.labels[index]) for index in indices])
        return images.float().div_(255).sub_(mean).div_(std), labels

    def batches() -> Generator[list[int]]:
        while True:
            yield torch.randint(len(task.split), (task.batch_size,)).tolist()

    builder = PipelineBuilder().add_source(batches()).pipe(read, concurrency=task.threads)
    pipeline = builder.add_sink(2).build(num_threads=task.threads)
    with pipeline.auto_stop():
        yield from pipeline


def spdl_filter(task: Task) -> str:
    """Return FFmpeg's words for a random crop: where it does not fit, it is cut to the edges."""
    size, mirror = task.image_size, "hflip," if torch.rand(()) < 0.5 else ""
    top, left, area, ratio = torch.rand(4).tolist()
    share = MIN_SCALE + (1 - MIN_SCALE) * area
    wide = LOW_RATIO * (HIGH_RATIO / LOW_RATIO) ** ratio
    box = ":".join(
        (
            f"w='min(iw,sqrt(iw*ih*{share * wide}))'",
            f"h='min(ih,sqrt(iw*ih*{share / wide}))'",
            f"x='(iw-ow)*{left}'",
            f"y='(ih-oh)*{top}'",
        )
    )
    return f"crop={box},scale={size}:{size}:flags=bilinear,{mirror}format=rgb24"


def spdl_version() -> dict[str, str]:
    """Return the version of SPDL, where it is installed."""
    try:
        return {"spdl-io": version("spdl-io")}
    except PackageNotFoundError:
        return {}


SAMPLE = 1000
"""Images kept in memory, at most: 110 MB of ImageNet's."""
JPEG = b"\xff\xd8\xff"


def sample(split: Split) -> list[bytes]:
    """Return the JPEGs among some images, in random order. Raises UserError for none."""
    chosen = random.Random(0).sample(range(len(split)), min(SAMPLE, len(split)))
    found = [data for index in chosen if (data := split.files[index].read()).startswith(JPEG)]
    if not found:
        raise UserError("there are no JPEGs to decode")
    return found


class DecodedOnly(Dataset[Tensor]):
    """Decodes an image and gives nothing of it away: sending it on would cost time."""

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(io.BytesIO(self.files[index])) as image:
            image.load()
        return torch.empty(0)


def decode(task: Task) -> Generator[Any]:
    """Decode whole images by Pillow's libjpeg-turbo, in processes: threads would share a lock."""
    if not features.check_feature("libjpeg_turbo"):
        raise UserError("Pillow was built without libjpeg-turbo")
    files = sample(task.split)
    return from_workers(DecodedOnly(files), len(files), task)


def decode_crops(task: Task) -> Generator[Any]:
    """Decode random-area crops by DALI's libjpeg-turbo, which skips what lies around.

    Not resized, nor copied out of DALI. What a loader that only crops cannot be faster than.
    """
    if task.reflect_pad:
        raise UserError("with --reflect-pad whole images are decoded")
    try:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline
    except ImportError as error:
        raise UserError("needs the package nvidia-dali-cuda120 or nvidia-dali-cuda130") from error
    files = cycle([np.frombuffer(data, np.uint8) for data in sample(task.split)])

    def batches() -> Iterator[list[NDArray[np.uint8]]]:
        while True:
            yield list(islice(files, task.batch_size))

    pipeline = Pipeline(
        batch_size=task.batch_size, num_threads=task.threads, device_id=None, exec_dynamic=True
    )
    with pipeline:
        source = fn.external_source(source=batches(), batch=True, dtype=types.UINT8, ndim=1)
        crops = fn.decoders.image_random_crop(
            source, device="cpu", random_area=[MIN_SCALE, 1.0], adjust_orientation=False
        )
        pipeline.set_outputs(crops)
    pipeline.build()
    while True:
        yield pipeline.run()


LOADERS: dict[str, Callable[[Task], Generator[Any]]] = {
    "dataloader": dataloader,
    "dataloader-v2": dataloader_v2,
    "spdl": spdl,
    "torchvision": partial(ours, "torchvision"),
    "dali": partial(ours, "dali"),
    "memory": partial(ours, "memory"),
    "decode": decode,
    "decode-crops": decode_crops,
}
