"""What holds a recipe back on this machine, phase by phase: the loader, the model, the memory.

    python -m benchmarks.throughput --data DIR --recipe imagenet

For each phase, in turns: the loader alone, the model alone on a synthetic batch that stays on the
device, and both together. stall = 1 - both / model is what reading costs the training. One process
on one device; with --nproc-per-node K its loader has the K-th part of the cores.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch

from benchmarks.common.measuring import begin, command_parser, document, markdown, write_result
from benchmarks.common.rates import (
    PhaseRates,
    ceilings,
    measure_phase,
    phase_trainer,
    run_config,
    this_process,
)
from benchmarks.common.statistics import estimate, shown
from benchmarks.common.tables import phases
from fastimagenet import cli
from fastimagenet.config import RunConfig
from fastimagenet.images import read_data
from fastimagenet.recipes.plan import Plan
from fastimagenet.report.summary import hardware
from pipelines.backends import chosen_backend
from pipelines.cli import output_folder
from pipelines.files import Row

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    parser = command_parser(__doc__, turn_seconds=3)
    cli.add_machine_flags(parser)
    cli.add_run_flags(parser, "runs/throughput-RECIPE-TIME", output_folder)
    args, about = begin(parser, argv)
    with run_config(args, "throughput-") as config:
        for measured in measure(config, args.rounds, args.seconds):
            result = about | measured
            write_result(config.folder, "throughput", result, table(result))
    print(f"\n{table(result)}\nall of it: {config.folder}", flush=True)
    return 0


def measure(config: RunConfig, rounds: int, seconds: float) -> Iterator[Row]:
    """Measure the ceilings, then phase by phase; yields what is known after each."""
    world, recipe = this_process(config), config.recipe
    train, val = read_data(config.data, say_notes=True)
    Plan.of(recipe, 1, len(train))  # names a batch that is too large before anything is measured
    found = {
        "backend": chosen_backend(config.data.backend),
        "recipe": recipe.name,
        "data": config.data.name,
        "images": len(train),
        "rounds": rounds,
        "seconds": seconds,  # of each turn
        "definitions": DEFINITIONS,
    }
    done: list[Row] = []
    for index, phase in enumerate(recipe.phases):
        with phase_trainer(config, phase, world, train, val) as trainer:
            if not index:
                dtype, turn = trainer.dtype or torch.float32, seconds / 2
                matmul, copy = ceilings(trainer.device, dtype, rounds, turn)
                found |= {"matmul_flops_per_sec": asdict(matmul)}
                found |= {"copy_bytes_per_sec": asdict(copy), "hardware": hardware(trainer)}
                found |= {"precision": trainer.precision}
            print(f"phase {index}: {phase.image_size} px, batch {phase.batch_size}", flush=True)
            rates = measure_phase(trainer, train, config.seed, rounds, seconds)
        done.append(phase_result(rates, matmul.mean, copy.mean))
        yield found | {"phases": done}


def phase_result(rates: PhaseRates, matmul: float, copy: float) -> Row:
    """Compute means, with intervals over the rounds, and the shares of one phase of what the
    device can do; `matmul` in FLOP/s, `copy` in bytes/s."""
    model = estimate(rates.model)
    flops, moved = model.mean * rates.flops_per_image, model.mean * rates.bytes_per_image
    stalls = [1 - both / alone for both, alone in zip(rates.both, rates.model, strict=True)]
    return {
        "image_size": rates.image_size,
        "batch_size": rates.batch_size,
        "loader_images_per_sec": asdict(estimate(rates.loader)),
        "model_images_per_sec": asdict(model),
        "both_images_per_sec": asdict(estimate(rates.both)),
        "stall": asdict(estimate(stalls, signed=True)),
        "data_wait_share": asdict(estimate(rates.data_wait_share)),
        "model_flops_per_sec": flops,
        "share_of_matmul": flops / matmul,
        "model_bytes_per_sec": moved,
        "share_of_copy": moved / copy,
        "rates": asdict(rates),
    }


def table(result: Row) -> str:
    """Format the result as Markdown."""
    matmul, copy = result["matmul_flops_per_sec"], result["copy_bytes_per_sec"]
    return document(
        f"# {result['recipe']} on {result['data']}: what holds it back",
        f"{result['hardware']}; {result['precision']}; {result['backend']}; torch "
        f"{result['versions']['torch']}; {result['date']}; load average "
        f"{result['load_average']:.1f} before. Images/s of one process, mean (95 % interval), "
        f"{result['rounds']} rounds of {result['seconds']:g} s.",
        markdown(phases(result)),
        f"Ceilings measured here: matrix product {shown(matmul, 1e-9, ' GFLOP/s')}, copy "
        f"{shown(copy, 1e-9, ' GB/s')}.",
        "\n".join(f"- {name}: {words}" for name, words in result["definitions"].items()),
    )


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
