"""The fast back end: NVIDIA DALI reads, decodes, crops and normalises, on the CPU or a GPU.

One pipeline serves the whole run. All that varies from batch to batch (files, labels, image size,
random numbers, even the batch size) is fed to it from `Order`, so it holds no state of its own:
progressive resizing needs no rebuild and a resume is exact.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.backend import ReleaseUnusedMemory  # type: ignore[attr-defined]
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from pipelines.batch_crop import reflect_crop
from pipelines.dali_graph import random_crop_graph, validation_graph, whole_image_graph
from pipelines.damage import Damage
from pipelines.errors import UserError
from pipelines.folder import undecodable
from pipelines.headers import check_file
from pipelines.loader import LoaderSpec
from pipelines.order import Batch, Draws, Order
from pipelines.stream import StreamLoader

QUEUE_DEPTH = 2
"""Batches that are made ahead; on a GPU other depths are not yet measured."""
OUT_OF_MEMORY = ("out of memory", "bad_alloc", "cudaErrorMemoryAllocation", "allocation failed")


class DaliLoader(StreamLoader):
    """`Loader` by DALI; on "cpu" it needs neither GPU nor driver."""

    def __init__(self, spec: LoaderSpec) -> None:
        super().__init__(spec)
        check_one_dali()
        assert spec.device != "cpu" or not spec.half, "float16 is for GPUs"
        self.order = Order(spec)

    def open(self, epoch: int, step: int) -> Generator[tuple[Tensor, Tensor]]:
        held: deque[tuple[Tensor, Tensor, torch.cuda.Event]] = deque()
        feed = Feed(self.order.batches(epoch, step), crops=not self.spec.reflect_pad)
        pipeline = build(self.spec, feed)
        try:
            while True:
                try:
                    images, labels = pipeline.run()
                except RuntimeError as error:
                    raise unreadable(feed, error) from error
                draws = feed.taken().draws
                images = torch.from_dlpack(images.as_tensor())
                batch = images.permute(0, 3, 1, 2)
                if draws is not None and self.spec.reflect_pad:
                    batch = self.reflect_crop(batch, draws)
                target = torch.from_dlpack(labels.as_tensor())
                yield batch, target
                if self.spec.device != "cpu":
                    # DALI does not know of torch's streams: its memory is held on to until the
                    # work that was queued on it is done.
                    held.append((images, target, torch.cuda.current_stream().record_event()))
                    if len(held) > QUEUE_DEPTH:
                        held.popleft()[-1].synchronize()
        finally:
            del pipeline  # the last reference: its threads end
            ReleaseUnusedMemory()

    def reflect_crop(self, images: Tensor, draws: Draws) -> Tensor:
        """Pad, crop and mirror a batch on its own device."""
        offset = torch.from_numpy(draws.offset).to(images.device, non_blocking=True)
        mirror = torch.from_numpy(draws.mirror).to(images.device, non_blocking=True)
        return reflect_crop(images, offset, mirror, self.spec.reflect_pad)


class Feed:
    """The source of the pipeline's inputs; remembers the batches that are on their way."""

    def __init__(self, batches: Iterator[Batch], crops: bool) -> None:
        self.batches = batches
        self.crops = crops
        self.under_way: deque[Batch] = deque()

    def __call__(self) -> list[Any]:
        """One batch as DALI takes it; the order is that of `kinds` in `build`."""
        batch = next(self.batches)
        self.under_way.append(batch)
        paths = [np.frombuffer(os.fsencode(path), np.uint8) for path in batch.paths]
        size = np.full(len(paths), batch.image_size, np.float32)
        values: list[Any] = [paths, batch.labels, size]
        if batch.draws is not None and self.crops:
            draws = batch.draws
            values += [draws.offset, draws.mirror, draws.area, draws.ratio]
        return values

    def taken(self) -> Batch:
        """The oldest batch under way, which has arrived."""
        return self.under_way.popleft()


def build(spec: LoaderSpec, feed: Feed) -> Pipeline:
    """Make the pipeline that turns what `feed` gives into (images HWC, labels)."""
    on_gpu = spec.device != "cpu"
    pipeline = Pipeline(
        batch_size=max(stage.batch_size for stage in spec.stages),
        num_threads=spec.num_threads,
        device_id=torch.device(spec.device).index if on_gpu else None,
        prefetch_queue_depth=QUEUE_DEPTH,
        exec_dynamic=True,
    )
    with pipeline:
        kinds = [(types.UINT8, 1), (types.INT64, 0), (types.FLOAT, 0)]
        if spec.training and not spec.reflect_pad:
            kinds += [(types.FLOAT, 1), (types.INT32, 0), (types.FLOAT, 1), (types.FLOAT, 1)]
        paths, labels, size, *draws = fn.external_source(
            source=feed,
            num_outputs=len(kinds),
            batch=True,
            dtype=[dtype for dtype, _ in kinds],
            ndim=[ndim for _, ndim in kinds],
        )
        encoded = fn.io.file.read(paths)
        if not spec.training:
            images = validation_graph(spec, encoded, size)
        elif spec.reflect_pad:
            images = whole_image_graph(spec, encoded, size)
        else:
            images = random_crop_graph(spec, encoded, size, *draws)
        pipeline.set_outputs(images, labels.gpu() if on_gpu else labels)
    pipeline.build()
    return pipeline


def unreadable(feed: Feed, error: RuntimeError) -> Exception:
    """The UserError for memory, or for the first file under way that a back end cannot decode.

    Where it is neither, `error` itself.
    """
    if any(words in str(error) for words in OUT_OF_MEMORY):
        batch = feed.under_way[-1]
        return UserError(
            f"DALI is out of memory with batch_size {len(batch.paths)} at {batch.image_size} px: "
            "--set phases.INDEX.batch_size=... lowers it for a phase"
        )
    for batch in feed.under_way:
        for path in batch.paths:
            try:
                check_file(path, pixels=True)
            except Damage as damage:
                return undecodable(path, damage)
    return error


def check_one_dali() -> None:
    """Raise UserError if two DALI packages are installed, which overwrite each other."""
    names = []
    for name in ("nvidia-dali-cuda120", "nvidia-dali-cuda130"):
        try:
            version(name)
        except PackageNotFoundError:
            continue
        names.append(name)
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)} are both installed: uninstall both, install one")
