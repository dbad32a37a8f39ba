"""What this device is, and what a large matrix product and a large copy reach on it.

python -m benchmarks.device_ceilings --json FILE
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.ceilings import copy_bytes_per_sec, matmul_flops_per_sec
from benchmarks.intervals import estimate
from fastimagenet import cli
from pipelines.cli import make_parser, output_file, positive
from pipelines.environment import processor
from pipelines.files import write_object

ROUNDS = 5


def facts(device: torch.device) -> dict[str, Any]:
    """Name, and for a GPU what CUDA says of it; memory in bytes."""
    if device.type == "cpu":
        return {"name": processor()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "free_bytes": torch.cuda.mem_get_info(device)[0],
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "host": processor(),
    }


def measure(device: torch.device, seconds: float) -> dict[str, Any]:
    """Both ceilings over ROUNDS turns, after one that is not counted: an idle GPU's clocks are low.

    FLOP/s in bf16 on a GPU and fp32 on a CPU; bytes read and written a second; `seconds` in all.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    turn = seconds / (2 * (ROUNDS + 1))
    turns = [
        (matmul_flops_per_sec(device, dtype, turn), copy_bytes_per_sec(device, turn))
        for _ in range(ROUNDS + 1)
    ]
    products, copies = zip(*turns[1:], strict=True)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_flops_per_sec": asdict(estimate(list(products))),
        "copy_bytes_per_sec": asdict(estimate(list(copies))),
        "rounds": ROUNDS,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    parser = make_parser(
        "benchmarks.device_ceilings",
        "Measure a large matrix product and a large copy on this device.",
        "python -m benchmarks.device_ceilings --seconds 4",
    )
    cli.add_device_flag(parser)
    parser.add_argument("--seconds", type=positive, default=6.0, help="of all turns; default 6")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the result")
    args = parser.parse_args(argv)
    device = cli.one_device(args.device)
    result = facts(device) | measure(device, args.seconds)
    for name, value in result.items():
        print(f"{name}: {value}")
    if args.json is not None:
        write_object(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
