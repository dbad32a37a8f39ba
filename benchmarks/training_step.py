"""How fast the training step is, by image size, batch size and variant, and how far from its floor.

    python -m benchmarks.training_step --sizes 128 224 --variants eager compiled graphs

The step is the Trainer's own, in bf16 and channels_last with the fused optimizer, on a synthetic
batch that stays on the device; learning rate 0, so that nothing diverges. The variants are fields
of the recipe, so users can have each of them. For each size and variant the batch grows until
memory ends. --json is written after each measurement; the exit status is 1 where one failed of
anything but memory. The floor is what the ceilings measured on this device allow for what
`benchmarks.common.floor` counts.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch

from benchmarks.common.floor import NUM_CLASSES, Layer, count_layers, floor_images_per_sec
from benchmarks.common.measuring import begin, command_parser, markdown
from benchmarks.common.rates import (
    calls_per_sec,
    copy_bytes_per_sec,
    matmul_flops_per_sec,
    memory_bytes,
    one_phase,
    update,
)
from benchmarks.common.statistics import Estimate, estimate
from benchmarks.common.tables import gibibytes, steps
from fastimagenet import cli
from fastimagenet.config import chosen_recipe
from fastimagenet.distributed.world import Launch, World
from fastimagenet.models import build_model
from fastimagenet.recipes import named_recipe
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import MODELS, OPTIONS, Phase, Recipe
from fastimagenet.training.loaders import open_loader
from fastimagenet.training.trainer import Trainer
from pipelines.cli import at_least, positive
from pipelines.datasets.images import whole_files
from pipelines.datasets.split import Split
from pipelines.files import write_object
from pipelines.loader import Loader

SIZES = (128, 160, 192, 224, 288)
BATCHES = {"cuda": (64, 128, 256, 512, 1024), "cpu": (8, 16)}
ROUNDS = 5
OUT_OF_MEMORY = "out of memory"
WIDTH = 2
"""Bytes of an activation in bf16."""


FIELDS: dict[str, dict[str, Any]] = {
    "eager": {"compile": False, "cuda_graphs": False},
    "compiled": {"compile": True, "cuda_graphs": False},
    "graphs": {"compile": True, "cuda_graphs": True},
}
VARIANTS = tuple(FIELDS)


def variant_recipe(recipe: Recipe, variant: str, image_size: int, batch_size: int) -> Recipe:
    """Return the recipe as one epoch at this size, in bf16, with the fields of the variant."""
    phase = Phase(epochs=1, image_size=image_size, batch_size=batch_size)
    return replace(one_phase(recipe, phase), precision="bf16", **FIELDS[variant])


def synthetic_trainer(recipe: Recipe, device: str, num_classes: int) -> Trainer:
    """Build a Trainer of one process with a fresh network, always the same, and batches of noise.

    `device` is "cpu" or "cuda:INDEX". Raises UserError for what the device cannot do.
    """
    count = 2 * max(phase.batch_size for phase in recipe.phases)
    labels = [index % num_classes for index in range(count)]
    split = Split(whole_files([""]) * count, labels, tuple(map(str, range(num_classes))))
    plan, world = Plan.of(recipe, 1, count), World(device=device)

    def loader(training: bool) -> Loader:
        stages = plan.phases if training else plan.eval_stages()
        half = recipe.precision != "fp32"
        return open_loader("synthetic", recipe, split, stages, world, training=training, half=half)

    torch.manual_seed(0)
    model = build_model(recipe, num_classes)
    return Trainer(plan, model, loader(True), loader(False), world=world)


@dataclass(frozen=True, kw_only=True)
class StepRate:
    """One size, variant and batch size, on one device."""

    image_size: int
    variant: str
    batch_size: int
    images_per_sec: Estimate
    """Over ROUNDS turns; 0 where there is an error."""
    peak_memory_bytes: int
    """GPU: the most that torch had allocated, with CUDA graphs from their recording on. CPU: the
    most that the process has had resident up to here."""
    flops_per_image: float
    """Of a step, as the floor counts them; a multiply-add is two."""
    bytes_per_image: float
    floor_images_per_sec: float | None
    """What no step can be faster than, from the ceilings measured here; None with an error."""
    error: str
    """Why there is no rate; "" otherwise."""

    @property
    def share_of_floor(self) -> float:
        """Measured / floor; 0 with an error."""
        return self.images_per_sec.mean / (self.floor_images_per_sec or 1)

    def __str__(self) -> str:
        start = f"{self.image_size} px  {self.variant:8}  batch {self.batch_size:4}  "
        if self.error:
            return start + self.error
        return (
            f"{start}{self.images_per_sec} images/s, {100 * self.share_of_floor:.1f} % of the "
            f"floor's {self.floor_images_per_sec:,.0f}, {gibibytes(self.peak_memory_bytes)}"
        )


def sweep(
    sizes: Sequence[int],
    variants: Sequence[str],
    batches: Sequence[int],
    *,
    device: str,
    seconds: float,
    report: Callable[[StepRate], object],
    recipe: Recipe | None = None,
) -> list[StepRate]:
    """Measure every size and variant with each batch size, smallest first, until memory ends.

    `device` is "cpu" or "cuda:INDEX". A rate takes `seconds`, in ROUNDS parts, and goes to `report`
    (such as `print`) at once. What fails gets a row with its error and ends that batch sweep; the
    next variant follows. `recipe`: `imagenet` for one node unless given.
    """
    recipe = recipe or named_recipe("imagenet", 1)
    ceilings = measure_ceilings(torch.device(device), seconds)
    rates: list[StepRate] = []
    for size in sizes:
        layers = count_layers(recipe, size)
        for variant in variants:
            for batch_size in sorted(batches):
                chosen = variant_recipe(recipe, variant, size, batch_size)
                rates.append(rate_of(chosen, variant, layers, ceilings, device, seconds))
                report(rates[-1])
                if rates[-1].error:
                    break
    return rates


@cache
def measure_ceilings(device: torch.device, seconds: float) -> tuple[float, float]:
    """Measure FLOP/s of a large bf16 matrix product and bytes/s of a large copy.

    The best of ROUNDS turns each: a ceiling is not an average.
    """
    turn, turns, dtype = seconds / ROUNDS, range(ROUNDS), torch.bfloat16
    products = [matmul_flops_per_sec(device, dtype, turn) for _ in turns]
    return max(products), max(copy_bytes_per_sec(device, turn) for _ in turns)


def rate_of(
    recipe: Recipe,
    variant: str,
    layers: Sequence[Layer],
    ceilings: tuple[float, float],
    device: str,
    seconds: float,
) -> StepRate:
    """Measure a recipe of one phase, or return the error that it ends with."""
    phase = recipe.phases[0]
    rates, peak, error = [0.0] * ROUNDS, 0, ""
    floor: float | None = floor_images_per_sec(layers, phase.batch_size, WIDTH, *ceilings)
    free_memory(torch.device(device))
    try:
        rates, peak = measure(recipe, device, seconds)
    except Exception as raised:  # of any kind: what a compiler may raise is no closed list
        if OUT_OF_MEMORY not in str(raised):
            traceback.print_exc()
        floor, error = None, " ".join(str(raised).split())[:300] or type(raised).__name__
    return StepRate(
        image_size=phase.image_size,
        variant=variant,
        batch_size=phase.batch_size,
        images_per_sec=estimate(rates),
        peak_memory_bytes=peak,
        flops_per_image=float(sum(layer.flops for layer in layers)),
        bytes_per_image=sum(layer.bytes(phase.batch_size, WIDTH) for layer in layers),
        floor_images_per_sec=floor,
        error=error,
    )


def free_memory(device: torch.device) -> None:
    """Free what the measurement before has left: networks, compiled code, CUDA graphs."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def measure(recipe: Recipe, device: str, seconds: float) -> tuple[list[float], int]:
    """Measure images per second, round by round, and the peak of the memory in bytes."""
    trainer = synthetic_trainer(recipe, device, NUM_CLASSES)
    if recipe.compile:
        trainer.compile_all_sizes()
    images, labels = next(iter(trainer.train_loader))
    update(trainer, images, labels)  # cuDNN tries its algorithms, which takes memory
    if trainer.device.type == "cuda" and not recipe.cuda_graphs:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    turn = seconds / ROUNDS
    rates = [
        len(labels) * calls_per_sec(lambda: update(trainer, images, labels), trainer.device, turn)
        for _ in range(ROUNDS)
    ]
    return rates, memory_bytes(trainer.device)


def best(rates: Sequence[StepRate]) -> list[StepRate]:
    """Return the fastest batch size of each size and variant that has a rate."""
    chosen: dict[tuple[int, str], StepRate] = {}
    for rate in sorted(rates, key=lambda rate: rate.images_per_sec.mean):
        if not rate.error:
            chosen[rate.image_size, rate.variant] = rate
    return sorted(chosen.values(), key=rates.index)


def table(rates: Sequence[StepRate]) -> str:
    """Format the best batch of every size and variant as Markdown."""
    return markdown(steps([asdict(rate) for rate in best(rates)]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    parser = command_parser(__doc__, json=True)
    add = parser.add_argument
    add("--recipe", default="imagenet", metavar="NAME|FILE.toml", help="default imagenet")
    add("--model", choices=MODELS, help="in place of the recipe's")
    add("--sizes", type=at_least(8), nargs="+", default=SIZES, metavar="S")
    add("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    add("--batches", type=at_least(1), nargs="+", metavar="B", help="default: by device")
    add("--seconds", type=positive, default=10.0, help="of a rate, in five parts; default 10")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    args, about = begin(parser, argv)
    kind = Launch(1, 1, args.device).resolved().device
    recipe, _ = chosen_recipe(args.recipe)
    if args.model:
        others: dict[str, Any] = {
            name: False for name, models in OPTIONS.items() if args.model not in models
        }
        recipe = replace(recipe, model=args.model, **others)
    if kind != "cpu":
        about["hardware"] = torch.cuda.get_device_name(0)
    about |= {"recipe": recipe.name, "model": recipe.model, "rounds": ROUNDS}
    rates: list[StepRate] = []

    def report(rate: StepRate) -> None:
        rates.append(rate)
        print(rate, flush=True)
        if args.json is not None:
            found = [asdict(rate) for rate in rates]
            write_object(args.json, about | {"seconds": args.seconds, "rates": found})

    sweep(
        args.sizes, args.variants, args.batches or BATCHES[kind], recipe=recipe,
        device="cpu" if kind == "cpu" else "cuda:0", seconds=args.seconds, report=report,
    )  # fmt: skip
    network = f"{recipe.name}, {recipe.model}"
    print(f"\n{about['hardware']}; torch {torch.__version__}; {network}, bf16\n\n{table(rates)}")
    failed = [rate for rate in rates if rate.error and OUT_OF_MEMORY not in rate.error]
    for rate in failed:
        print(f"error: {rate}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
