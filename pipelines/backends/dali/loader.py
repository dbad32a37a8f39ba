"""Read with NVIDIA DALI, the fast back end: decode, crop and normalise on the CPU or a GPU.

One pipeline serves the whole run. All that varies from batch to batch (files, labels, image size,
random numbers, even the batch size) is fed to it from `BatchSampler`, so it holds no state of its
own: progressive resizing needs no rebuild and a resume is exact.
"""

from __future__ import annotations

import os
import shlex
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from nvidia.dali.backend import ReleaseUnusedMemory  # type: ignore[attr-defined]
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from pipelines.augment.crops import reflect_crop
from pipelines.backends.dali.feed import Fed, Feed, with_bytes, with_paths
from pipelines.backends.dali.finish import finish_batches
from pipelines.backends.dali.graph import decoded_graph, encoded_files, finished_graph
from pipelines.backends.stream import StreamLoader
from pipelines.datasets.checks import check_file
from pipelines.datasets.split import undecodable
from pipelines.errors import Damage, UserError
from pipelines.loader import WHOLE_IMAGES, LoaderSpec
from pipelines.sampling import Batch, BatchSampler, CropParams

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
        sources = {spec.source(stage.copy) for stage in spec.stages}
        self.packed = any(source.in_shards for source in sources)
        """Whether images are read in Python, since DALI's operator reads whole files only."""

    def open(self, epoch: int, step: int) -> Generator[tuple[Tensor, Tensor]]:
        batches = self.sampler.batches(epoch, step)
        threads, on_gpu = self.spec.num_threads, self.spec.device != "cpu"
        source = with_bytes(batches, threads) if self.packed else with_paths(batches)
        feed = Feed(self.spec, source, finish=on_gpu)
        pipeline = build(self.spec, feed, self.packed)
        done = outputs(pipeline, feed)
        device = torch.device(self.spec.device)
        finished = keep_until_consumed(done, device) if on_gpu else finish_batches(self.spec, done)
        try:
            for images, labels, batch in finished:
                if batch.crops is not None and self.spec.reflect_pad:
                    images = self.reflect_crop(images, batch.crops)
                yield images, labels
        finally:
            finished.close()
            done.close()
            del pipeline, done, finished  # the last references, which ends its threads
            source.close()
            ReleaseUnusedMemory()

    def reflect_crop(self, images: Tensor, crops: CropParams) -> Tensor:
        """Pad, crop and mirror a batch on its own device."""
        offset, mirror = (
            torch.from_numpy(values).to(images.device, non_blocking=True)
            for values in (crops.offset, crops.mirror)
        )
        return reflect_crop(images, offset, mirror, self.spec.reflect_pad)


def outputs(pipeline: Pipeline, feed: Feed) -> Generator[tuple[Sequence[Any], Fed]]:
    """Run the pipeline batch after batch: its outputs, in lists of DALI's, and what they are.

    On a GPU the work on them is ordered by torch's current stream there, and the host does not wait
    for it. Raises UserError for a file that cannot be decoded.
    """
    device = torch.device(feed.spec.device)
    on_gpu = device.type != "cpu"
    while True:
        try:
            # Without a stream, DALI has the host wait until the batch is finished.
            done = pipeline.run(torch.cuda.current_stream(device)) if on_gpu else pipeline.run()
        except RuntimeError as error:
            raise unreadable(feed, error) from error
        yield done, feed.in_flight.popleft()


def keep_until_consumed(
    outputs: Iterator[tuple[Sequence[Any], Fed]], device: torch.device
) -> Generator[tuple[Tensor, Tensor, Batch]]:
    """Yield batches on a GPU and keep each until the work that was queued on it is done.

    DALI orders what it writes before what torch's current stream there reads, but reuses memory as
    soon as no reference is left. The end of the work is polled, not waited for, up to MAX_KEPT
    batches: the wait would be measured as one for data.
    """
    queued: deque[tuple[torch.cuda.Event, Tensor, Tensor]] = deque()
    try:
        for done, fed in outputs:
            images, labels = (torch.from_dlpack(output.as_tensor()) for output in done)
            yield images.permute(0, 3, 1, 2), labels, fed.batch
            queued.append((torch.cuda.current_stream(device).record_event(), images, labels))
            while queued and (queued[0][0].query() or len(queued) > MAX_KEPT):
                queued[0][0].synchronize()
                queued.popleft()
    finally:
        torch.cuda.current_stream(device).synchronize()


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
    """Build the pipeline from `feed` to images in HWC and, where `feed.finish`, labels.

    Otherwise images are only decoded, and cropped at random: `finish_batches` does the rest.
    `packed`: the feed has encoded images, else the paths of files.
    """
    pipeline = empty_pipeline(spec)
    with pipeline:
        inputs = feed.nodes()
        images = decoded_graph(spec, encoded_files(inputs, packed), inputs)
        if feed.finish:
            labels = inputs["labels"] if spec.device == "cpu" else inputs["labels"].gpu()
            pipeline.set_outputs(finished_graph(spec, images, inputs), labels)
        else:
            pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def unreadable(feed: Feed, error: RuntimeError) -> Exception:
    """Turn DALI's error into a UserError: out of memory, or the first file in flight that cannot
    be decoded or has changed, or a GPU that cannot decode windows. Where it is none of them, return
    `error` itself."""
    if any(words in str(error) for words in OUT_OF_MEMORY):
        batch = feed.in_flight[-1].batch
        return UserError(
            f"DALI is out of memory with batch_size {len(batch.files)} at {batch.shape[0]} px: "
            "--set phases.INDEX.batch_size=... lowers it for a phase"
        )
    seen = set()  # a benchmark may name few images again and again
    for fed in feed.in_flight:
        for file, (height, width) in zip(fed.batch.files, fed.shapes.tolist(), strict=True):
            if str(file) in seen:
                continue
            seen.add(str(file))
            try:
                header = check_file(file, pixels=True)
            except Damage as damage:
                return undecodable(file, damage)
            if (header.height, header.width) != (height, width):
                folder = shlex.quote(os.path.dirname(file.path))
                return UserError(
                    f"{file} is {header.width} x {header.height} pixels and was {width} x {height} "
                    f"when its folder was indexed: touch {folder} and start again"
                )
    if feed.spec.device != "cpu" and "decoders.image_slice" in str(error):
        cause = " ".join(str(error).partition("encountered:")[2].split())[:200]
        return UserError(
            f"DALI does not decode windows of images on this GPU ({cause}), as is known of "
            f"nvImageCodec 0.9.0 on some: the environment variable {WHOLE_IMAGES}=1 has it decode "
            "whole images and cut them, or take --backend torchvision"
        )
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
