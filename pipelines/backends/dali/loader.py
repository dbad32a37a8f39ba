"""Read with NVIDIA DALI, the fast back end: decode, crop and normalise on the CPU or a GPU.

One pipeline serves the whole run. All that varies from batch to batch (files, labels, image size,
random numbers, even the batch size) is fed to it from `BatchSampler`, so it holds no state of its
own: progressive resizing needs no rebuild and a resume is exact.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.backend import ReleaseUnusedMemory  # type: ignore[attr-defined]
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from pipelines.augment.crops import reflect_crop
from pipelines.backends.dali.finish import Output, finish_batches
from pipelines.backends.dali.graph import decoded_graph, finished_graph
from pipelines.backends.stream import StreamLoader
from pipelines.datasets.checks import check_file
from pipelines.datasets.split import undecodable
from pipelines.errors import Damage, UserError
from pipelines.loader import LoaderSpec
from pipelines.sampling import Batch, BatchSampler, CropParams

Bytes = NDArray[np.uint8]
MAX_KEPT = 16
"""Batches kept at most until a GPU has consumed them; the trainer waits for it at log steps."""
OUT_OF_MEMORY = ("out of memory", "bad_alloc", "cudaErrorMemoryAllocation", "allocation failed")


class DaliLoader(StreamLoader):
    """`Loader` with DALI; on "cpu" it needs neither GPU nor driver."""

    def __init__(self, spec: LoaderSpec) -> None:
        super().__init__(spec)
        check_one_dali()
        # DALI reads it when it first allocates. By default buffers below 32 MB come from malloc,
        # which returns some of them only: batches of 50 at 224 px left 750 to 920 MiB resident, and
        # leave 753 to 755 this way, at no lower rate.
        os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "1M")
        assert spec.device != "cpu" or not spec.half, "float16 is for GPUs"
        self.sampler = BatchSampler(spec)
        sources = {spec.source(stage) for stage in spec.stages}
        self.packed = any(source.in_shards for source in sources)
        """Whether images are read in Python, since DALI's operator reads whole files only."""

    def open(self, epoch: int, step: int) -> Generator[tuple[Tensor, Tensor]]:
        batches = self.sampler.batches(epoch, step)
        threads = self.spec.num_threads
        source = with_bytes(batches, threads) if self.packed else with_paths(batches)
        feed = Feed(self.spec, source, finish=self.spec.device != "cpu")
        pipeline = build(self.spec, feed, self.packed)
        try:
            done = outputs(pipeline, feed)
            on_cpu = self.spec.device == "cpu"
            finished = finish_batches(self.spec, done) if on_cpu else keep_until_consumed(done)
            for images, labels, batch in finished:
                if batch.crops is not None and self.spec.reflect_pad:
                    images = self.reflect_crop(images, batch.crops)
                yield images, labels
        finally:
            del pipeline  # drops the last reference, which ends its threads
            source.close()
            ReleaseUnusedMemory()

    def reflect_crop(self, images: Tensor, crops: CropParams) -> Tensor:
        """Pad, crop and mirror a batch on its own device."""
        offset, mirror = (
            torch.from_numpy(values).to(images.device, non_blocking=True)
            for values in (crops.offset, crops.mirror)
        )
        return reflect_crop(images, offset, mirror, self.spec.reflect_pad)


class Feed:
    """Feeds the pipeline, and remembers the batches in flight."""

    def __init__(
        self, spec: LoaderSpec, batches: Iterator[tuple[Batch, list[Bytes]]], finish: bool
    ) -> None:
        """`finish`: the pipeline resizes and normalises, too."""
        self.batches = batches
        self.random_crops = spec.training and not spec.reflect_pad
        self.finish = finish
        self.in_flight: deque[Batch] = deque()

    def nodes(self) -> tuple[DataNode, DataNode, list[DataNode], list[DataNode]]:
        """Define the pipeline's inputs: files and labels; for random crops offset, area and ratio;
        to finish, shape and, for random crops, mirror."""
        kinds = [(types.UINT8, 1), (types.INT64, 0)]
        kinds += 3 * [(types.FLOAT, 1)] if self.random_crops else []
        kinds += [(types.FLOAT, 1)] if self.finish else []
        kinds += [(types.INT32, 0)] if self.finish and self.random_crops else []
        files, labels, *others = fn.external_source(
            source=self,
            num_outputs=len(kinds),
            batch=True,
            dtype=[dtype for dtype, _ in kinds],
            ndim=[ndim for _, ndim in kinds],
        )
        num_crops = 3 * self.random_crops
        return files, labels, others[:num_crops], others[num_crops:]

    def __call__(self) -> list[Any]:
        """Return the values of the next batch, in the order of `nodes`."""
        batch, files = next(self.batches)
        self.in_flight.append(batch)
        values: list[Any] = [files, batch.labels]
        crops = batch.crops if self.random_crops else None
        if crops is not None:
            values += [crops.offset, crops.area, crops.ratio]
        if self.finish:
            values.append(np.tile(np.array(batch.shape, np.float32), (len(files), 1)))
        if self.finish and crops is not None:
            values.append(crops.mirror)
        return values


def outputs(pipeline: Pipeline, feed: Feed) -> Generator[Output]:
    """Run the pipeline batch after batch. Raises UserError for a file that cannot be decoded."""
    while True:
        try:
            images, labels = pipeline.run()
        except RuntimeError as error:
            raise unreadable(feed, error) from error
        yield images, torch.from_dlpack(labels.as_tensor()), feed.in_flight.popleft()


def keep_until_consumed(outputs: Iterator[Output]) -> Generator[tuple[Tensor, Tensor, Batch]]:
    """Yield batches on a GPU and keep each until the work that was queued on it is done.

    DALI knows nothing of torch's streams and reuses memory as soon as no reference is left. The end
    of the work is polled, not waited for, up to MAX_KEPT batches: the wait would be measured as one
    for data.
    """
    queued: deque[tuple[torch.cuda.Event, Tensor, Tensor]] = deque()
    try:
        for decoded, labels, batch in outputs:
            images = torch.from_dlpack(decoded.as_tensor())
            yield images.permute(0, 3, 1, 2), labels, batch
            queued.append((torch.cuda.current_stream().record_event(), images, labels))
            while queued and (queued[0][0].query() or len(queued) > MAX_KEPT):
                queued[0][0].synchronize()
                queued.popleft()
    finally:
        torch.cuda.current_stream().synchronize()


def with_paths(batches: Iterator[Batch]) -> Generator[tuple[Batch, list[Bytes]]]:
    """Pair batches with the paths of their files."""
    for batch in batches:
        yield batch, [np.frombuffer(os.fsencode(file.path), np.uint8) for file in batch.files]


def with_bytes(batches: Iterator[Batch], num_threads: int) -> Generator[tuple[Batch, list[Bytes]]]:
    """Pair batches with their encoded images, read one batch ahead.

    Raises UserError that names an image that cannot be read.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        reading: deque[tuple[Batch, list[Future[bytes]]]] = deque()
        for batch in batches:
            reading.append((batch, [pool.submit(file.read) for file in batch.files]))
            if len(reading) == 1:
                continue
            batch, files = reading.popleft()
            encoded = []
            for file, future in zip(batch.files, files, strict=True):
                try:
                    encoded.append(np.frombuffer(future.result(), np.uint8))
                except (OSError, EOFError) as error:
                    raise undecodable(file, error) from error
            yield batch, encoded


def empty_pipeline(spec: LoaderSpec) -> Pipeline:
    """Make a pipeline for the batches, threads and device of the spec."""
    on_gpu = spec.device != "cpu"
    return Pipeline(
        batch_size=max(stage.batch_size for stage in spec.stages),
        num_threads=spec.num_threads,
        device_id=torch.device(spec.device).index if on_gpu else None,
        prefetch_queue_depth=spec.dali.prefetch,
        exec_dynamic=True,
    )


def build(spec: LoaderSpec, feed: Feed, packed: bool) -> Pipeline:
    """Build the pipeline from `feed` to (images HWC, labels).

    Unless `feed.finish`, images are only decoded, and cropped at random: `finish_batches` does the
    rest. `packed`: the feed has encoded images, else the paths of files.
    """
    pipeline = empty_pipeline(spec)
    with pipeline:
        files, labels, crops, view = feed.nodes()
        encoded = files if packed else fn.io.file.read(files)
        images = decoded_graph(spec, encoded, crops)
        if feed.finish:
            images = finished_graph(spec, encoded, images, *view)
        pipeline.set_outputs(images, labels if spec.device == "cpu" else labels.gpu())
    pipeline.build()
    return pipeline


def unreadable(feed: Feed, error: RuntimeError) -> Exception:
    """Turn DALI's error into a UserError: out of memory, or the first file in flight that cannot
    be decoded. Where it is neither, return `error` itself."""
    if any(words in str(error) for words in OUT_OF_MEMORY):
        batch = feed.in_flight[-1]
        return UserError(
            f"DALI is out of memory with batch_size {len(batch.files)} at {batch.shape[0]} px: "
            "--set phases.INDEX.batch_size=... lowers it for a phase"
        )
    for batch in feed.in_flight:
        for file in batch.files:
            try:
                check_file(file, pixels=True)
            except Damage as damage:
                return undecodable(file, damage)
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
