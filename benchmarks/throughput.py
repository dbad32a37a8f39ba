"""What holds a recipe back on this machine, phase by phase: the loader, the model, the memory.

    python -m benchmarks.throughput --data DIR --recipe imagenet

For each phase, in turns: the loader alone, the model alone on a synthetic batch that stays on the
device, and both together. stall = 1 - both / model is what reading costs the training. One process
on one device; with --nproc-per-node K its loader has the K-th part of the cores.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.common.measuring import markdown
from benchmarks.common.rates import (
    PhaseRates,
    copy_bytes_per_sec,
    matmul_flops_per_sec,
    measure_phase,
    phase_trainer,
    this_process,
)
from benchmarks.common.statistics import Estimate, estimate, short, shown
from fastimagenet import cli
from fastimagenet.assemble import chosen_recipe, read_data, with_copies
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Recipe
from fastimagenet.report.summary import hardware
from fastimagenet.training.evaluation import precision_name
from fastimagenet.training.trainer import Trainer
from pipelines.backends import chosen_backend
from pipelines.cli import Parser, at_least, make_parser, output_folder, positive
from pipelines.environment import versions
from pipelines.files import Row, write_object, write_text

DEFINITIONS = {
    "stall": "1 - both / model, of the same round.",
    "data wait": "Share of the time of both together in which the step waited for its batch.",
    "FLOP/s": "Of the model alone: matrix products and convolutions as counted, a multiply-add "
    "counts as two; beside it the share of what a large matrix product reaches here.",
    "bytes/s": "Of the model alone: what every operation reads and writes as counted, without "
    "fusing and caches; beside it the share of what a large copy reaches here. Caches and fused "
    "operations can take it above 100 %.",
    "memory": "GPU: the most that torch had allocated. CPU: the most that was resident.",
}

SHARES = {"model_flops_per_sec": "share_of_matmul", "model_bytes_per_sec": "share_of_copy"}


@dataclass(frozen=True, kw_only=True)
class PhaseResult:
    """One phase; intervals are over the rounds."""

    image_size: int
    batch_size: int
    loader_images_per_sec: Estimate
    model_images_per_sec: Estimate
    both_images_per_sec: Estimate
    stall: Estimate
    data_wait_share: Estimate
    model_flops_per_sec: float
    share_of_matmul: float
    model_bytes_per_sec: float
    share_of_copy: float
    rates: PhaseRates


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured, on what, and when."""

    command: str
    date: str
    hardware: str
    precision: str
    backend: str
    versions: dict[str, str]
    load_average: float
    """Of the machine at the start, over the minute before: well above 0, others ran too."""
    recipe: str
    data: str
    images: int
    rounds: int
    seconds: float
    """Of each turn."""
    matmul_flops_per_sec: Estimate
    copy_bytes_per_sec: Estimate
    phases: list[PhaseResult]
    definitions: dict[str, str]


def parser() -> Parser:
    """All flags of the command."""
    result = make_parser(
        "benchmarks.throughput",
        "Measure loader, model and both for each phase of a recipe, and what they reach of this\n"
        "device's ceilings.",
        "python -m benchmarks.throughput --data imagenet --recipe imagenet",
    )
    cli.add_machine_flags(result)
    cli.add_run_flags(result, "runs/throughput-RECIPE-TIME", output_folder)
    add = result.add_argument
    add("--rounds", type=at_least(2), default=5, help="at least 2, for intervals; default 5")
    add("--seconds", type=positive, default=3.0, help="of each turn; default 3")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    load_average = os.getloadavg()[0]
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    recipe = with_copies(chosen_recipe(args), cli.data_folder(args))
    if args.output is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        args.output = Path("runs") / f"throughput-{recipe.name}-{stamp}"
    command = shlex.join(["python", "-m", "benchmarks.throughput", *argv])
    for measured in measure(args, recipe, command, load_average):
        result = asdict(measured)
        write_object(args.output / "throughput.json", result)
        write_text(args.output / "table.md", table(result))
    print(f"\n{table(result)}\nall of it: {args.output}", flush=True)
    return 0


def measure(
    args: argparse.Namespace, recipe: Recipe, command: str, load_average: float
) -> Iterator[Result]:
    """The ceilings, then phase by phase: what is known after each."""
    world = this_process(args)
    train, val = read_data(args, world)
    Plan.of(recipe, 1, len(train))  # names a batch that is too large before anything is measured
    measured: list[PhaseRates] = []
    for index, phase in enumerate(recipe.phases):
        with phase_trainer(args, recipe, phase, world, train, val) as trainer:
            if not index:
                matmul, copy = ceilings(trainer, args)
                facts = hardware(trainer), precision_name(trainer.dtype)
            print(f"phase {index}: {phase.image_size} px, batch {phase.batch_size}", flush=True)
            measured.append(measure_phase(trainer, args, train, args.rounds, args.seconds))
        yield Result(
            command=command,
            date=time.strftime("%Y-%m-%d"),
            hardware=facts[0],
            precision=facts[1],
            backend=chosen_backend(args.backend),
            versions=versions(),
            load_average=load_average,
            recipe=recipe.name,
            data=cli.data_name(args),
            images=len(train),
            rounds=args.rounds,
            seconds=args.seconds,
            matmul_flops_per_sec=matmul,
            copy_bytes_per_sec=copy,
            phases=[phase_result(rates, matmul.mean, copy.mean) for rates in measured],
            definitions=DEFINITIONS,
        )


def ceilings(trainer: Trainer, args: argparse.Namespace) -> tuple[Estimate, Estimate]:
    """FLOP/s of a matrix product in the precision of the training, and bytes/s of a copy."""
    device, dtype, seconds = trainer.device, trainer.dtype or torch.float32, args.seconds / 2
    turns = [
        (matmul_flops_per_sec(device, dtype, seconds), copy_bytes_per_sec(device, seconds))
        for _ in range(args.rounds + 1)
    ]
    matmul, copy = zip(*turns[1:], strict=True)  # at first the clocks of an idle GPU are low
    return estimate(list(matmul)), estimate(list(copy))


def phase_result(rates: PhaseRates, matmul: float, copy: float) -> PhaseResult:
    """Means and shares of one phase; `matmul` in FLOP/s, `copy` in bytes/s."""
    model = estimate(rates.model)
    flops, moved = model.mean * rates.flops_per_image, model.mean * rates.bytes_per_image
    stalls = [1 - both / alone for both, alone in zip(rates.both, rates.model, strict=True)]
    return PhaseResult(
        image_size=rates.image_size,
        batch_size=rates.batch_size,
        loader_images_per_sec=estimate(rates.loader),
        model_images_per_sec=model,
        both_images_per_sec=estimate(rates.both),
        stall=estimate(stalls),
        data_wait_share=estimate(rates.data_wait_share),
        model_flops_per_sec=flops,
        share_of_matmul=flops / matmul,
        model_bytes_per_sec=moved,
        share_of_copy=moved / copy,
        rates=rates,
    )


def table(result: Row) -> str:
    """Markdown."""
    rates = ("loader", "model", "both")
    header = ("phase", *rates, "stall", "data wait", "FLOP/s", "bytes/s", "memory")
    rows = [
        (
            f"{phase['image_size']} px x {phase['batch_size']}",
            *(shown(phase[f"{part}_images_per_sec"]) for part in rates),
            shown(phase["stall"], 100, " %"),
            f"{100 * phase['data_wait_share']['mean']:.1f} %",
            *(
                f"{short(phase[rate] / 1e9)} G, {100 * phase[share]:.0f} %"
                for rate, share in SHARES.items()
            ),
            f"{phase['rates']['memory_bytes'] / 2**30:.2f} GiB",
        )
        for phase in result["phases"]
    ]
    matmul, copy = result["matmul_flops_per_sec"], result["copy_bytes_per_sec"]
    return "\n".join(
        [
            f"# {result['recipe']} on {result['data']}: what holds it back",
            "",
            f"{result['hardware']}; {result['precision']}; {result['backend']}; torch "
            f"{result['versions']['torch']}; {result['date']}; load average "
            f"{result['load_average']:.1f} before. Images/s of one process, mean (95 % interval), "
            f"{result['rounds']} rounds of {result['seconds']:g} s.",
            "",
            markdown([header, *rows]),
            "",
            f"Ceilings measured here: matrix product {shown(matmul, 1e-9, ' GFLOP/s')}, copy "
            f"{shown(copy, 1e-9, ' GB/s')}.",
            "",
            *(f"- {name}: {words}" for name, words in result["definitions"].items()),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
