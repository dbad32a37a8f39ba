"""What no loader on the same processor can be faster than: JPEGs decoded, and nothing else.

Both give batches as the loaders do, so that they are measured in the same turns. The JPEGs are in
memory: some of the images, at random, over and over.
"""

from __future__ import annotations

import io
import random
from collections.abc import Generator, Iterator
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, features
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.loader_rivals import MIN_SCALE, Task, from_workers
from pipelines.datasets.split import Split
from pipelines.errors import UserError

SAMPLE = 1000
"""Images kept in memory, at most: 110 MB of ImageNet's."""
JPEG = b"\xff\xd8\xff"


def sample(split: Split) -> list[bytes]:
    """The JPEGs among some images, in random order. Raises UserError where there are none."""
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
    """Whole images by Pillow's libjpeg-turbo, in processes: threads would share a lock."""
    if not features.check_feature("libjpeg_turbo"):
        raise UserError("Pillow was built without libjpeg-turbo")
    files = sample(task.split)
    return from_workers(DecodedOnly(files), len(files), task)


def decode_crops(task: Task) -> Generator[Any]:
    """Random-area crops by the decoder of DALI, also libjpeg-turbo, which skips what lies around.

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
