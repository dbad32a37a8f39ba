"""How fast the loaders are against a DataLoader as most people write it.

    python -m benchmarks.loaders --data DIR --image-size 224 --threads 2

All read the same training images, endlessly and in random order, and cut random crops of a quarter
to the whole of the area (with --reflect-pad: of the whole image, padded), flipped half of the time,
normalised to float32 on the CPU. They take turns: in each round every loader makes a few batches
that are not counted, then batches for some seconds. The intervals are over the rounds. Our back end
"memory" takes part where the set fits; what it spends on reading the set once is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import date
from math import exp, log, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from pipelines import make_loader
from pipelines.datasets import IMAGENET_MEAN, IMAGENET_STD
from pipelines.digits import digits_folder
from pipelines.environment import processor, versions
from pipelines.errors import UserError
from pipelines.loader import Loader, LoaderSpec, Stage
from pipelines.split import Split, read_split

BACKENDS = ("torchvision", "dali", "memory")
MIN_SCALE = 0.25
WARM_UP_BATCHES = 6
"""More than any loader makes ahead, so that none is measured on its stock."""
ENDLESS = 10**9
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles of Student's t distribution with 1 to 10 degrees of freedom."""


@dataclass(frozen=True)
class Estimate:
    """A mean with the ends of its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ({self.low:.4g} .. {self.high:.4g})"


@dataclass(frozen=True)
class Result:
    """What was measured, on what, and when."""

    config: dict[str, Any]
    images_per_sec: dict[str, Estimate]
    """Per loader, over the rounds."""
    ratio_to_dataloader: dict[str, Estimate]
    """Geometric mean over the rounds."""
    rounds: dict[str, list[float]]
    """Images per second of each round."""
    versions: dict[str, str]
    hardware: str
    load_average: float
    """Of the machine at the start, over the minute before: well above 0, others ran too."""
    date: str


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """What a user writes: open, transform, return."""

    def __init__(self, split: Split, image_size: int, reflect_pad: int) -> None:
        self.split = split
        crop = [transforms.RandomResizedCrop(image_size, scale=(MIN_SCALE, 1.0), antialias=True)]
        if reflect_pad:
            crop = [
                transforms.Resize((image_size, image_size)),
                transforms.RandomCrop(image_size, reflect_pad, padding_mode="reflect"),
            ]
        self.transform = transforms.Compose(
            [
                *crop,
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.split.files[index].path) as image:
            return self.transform(image.convert("RGB")), self.split.labels[index]


def dataloader(split: Split, args: argparse.Namespace) -> Iterator[Any]:
    """Batches of a plain DataLoader with as many workers as the others have threads."""
    dataset = ImageFolder(split, args.image_size, args.reflect_pad)
    # One endless epoch: with few images a new iterator for each would be most of the time.
    sampler = RandomSampler(dataset, replacement=True, num_samples=ENDLESS)
    loader = DataLoader(
        dataset, batch_size=args.batch_size, sampler=sampler, num_workers=args.threads
    )
    return iter(loader)


def ours(backend: str, split: Split, args: argparse.Namespace) -> Loader:
    """One of our back ends. Raises UserError where a set does not fit into memory."""
    stage = Stage(
        epochs=1, image_size=args.image_size, batch_size=args.batch_size, min_scale=MIN_SCALE
    )
    spec = LoaderSpec(
        split=split,
        stages=(stage,),
        training=True,
        num_threads=args.threads,
        reflect_pad=args.reflect_pad,
    )
    return make_loader(backend, spec)


def endless(loader: Loader) -> Iterator[Any]:
    """Batches epoch after epoch; closing the generator closes the loader."""
    with closing(loader):
        while True:
            yield from loader


def images_per_sec(batches: Iterator[Any], batch_size: int, seconds: float) -> float:
    """The rate over at least `seconds`, after batches that are not counted."""
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    count = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        next(batches)
        count += 1
    return count * batch_size / elapsed


def measure(split: Split, args: argparse.Namespace) -> dict[str, list[float]]:
    """Images per second of every loader in every round."""
    # The plain DataLoader forks its workers, so it comes before any thread of the others.
    loaders = {"dataloader": dataloader(split, args)}
    for backend in BACKENDS:
        try:
            loaders[backend] = endless(ours(backend, split, args))
        except UserError as error:
            if backend != "memory":
                raise
            print(f"memory is left out: {error}", flush=True)
    rounds: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(args.rounds + 1):
        for name, batches in loaders.items():
            rate = images_per_sec(batches, args.batch_size, args.seconds if number else 0.1)
            if number:  # round 0 is warm-up: files into the page cache, buffers to their size
                rounds[name].append(rate)
                print(f"round {number}  {name:12} {rate:8.1f} images/s", flush=True)
    for name, batches in loaders.items():
        if name in BACKENDS:
            batches.close()  # type: ignore[attr-defined]
    return rounds


def estimate(values: list[float]) -> Estimate:
    """Mean and 95 % interval by Student's t."""
    mean, freedom = fmean(values), len(values) - 1
    # Above ten degrees the first terms of the Cornish-Fisher expansion are exact to 0.003.
    tail = 1.96 + 2.372 / freedom + 2.823 / freedom**2
    student = STUDENT[freedom - 1] if freedom <= 10 else tail
    margin = student * stdev(values) / sqrt(len(values))
    return Estimate(mean, mean - margin, mean + margin)


def ratio(values: list[float], base: list[float]) -> Estimate:
    """Geometric mean of the round-by-round ratios and its 95 % interval."""
    logs = estimate([log(value / other) for value, other in zip(values, base, strict=True)])
    return Estimate(exp(logs.mean), exp(logs.low), exp(logs.high))


def run(args: argparse.Namespace) -> Result:
    """Measure all loaders in turn."""
    load_average = os.getloadavg()[0]
    split = read_split(args.data or digits_folder(), "train")
    rounds = measure(split, args)
    base = rounds["dataloader"]
    return Result(
        config={
            "data": str(args.data or "embedded digits"),
            "images": len(split),
            "image_size": args.image_size,
            "threads": args.threads,
            "batch_size": args.batch_size,
            "min_scale": MIN_SCALE,
            "reflect_pad": args.reflect_pad,
            "seconds": args.seconds,
        },
        images_per_sec={name: estimate(rates) for name, rates in rounds.items()},
        ratio_to_dataloader={
            name: ratio(rates, base) for name, rates in rounds.items() if rates is not base
        },
        rounds=rounds,
        versions=versions(),
        hardware=processor(),
        load_average=load_average,
        date=date.today().isoformat(),
    )


def parser() -> argparse.ArgumentParser:
    example = "example: python -m benchmarks.loaders --data /data/imagenet --threads 2"
    result = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=example)
    add = result.add_argument
    add("--data", type=Path, help="folder with train/CLASS/IMAGE (default: the embedded digits)")
    add("--image-size", type=int, default=224)
    add("--reflect-pad", type=int, default=0, help="in place of random areas: pad, crop back")
    add("--threads", type=int, default=2, help="decoding threads or worker processes")
    add("--batch-size", type=int, default=64)
    add("--rounds", type=int, default=5, help="at least 2, for the intervals")
    add("--seconds", type=float, default=8, help="per loader and round")
    add("--json", type=Path, help="write the result here as well")
    return result


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        if args.rounds < 2:
            raise UserError("--rounds: at least 2, for the intervals")
        torch.set_num_threads(args.threads)  # for what is augmented in this process
        result = run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{result.hardware}, {args.threads} threads, {args.image_size} px (95 % intervals)")
    for name, rate in result.images_per_sec.items():
        print(f"{name:12} {rate} images/s")
    for name, value in result.ratio_to_dataloader.items():
        print(f"{name} / dataloader  {value}")
    if args.json is not None:
        args.json.write_text(json.dumps(asdict(result), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
