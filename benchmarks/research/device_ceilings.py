"""What this device is, and what a large matrix product and a large copy reach on it.

python -m benchmarks.research.device_ceilings --json FILE
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

from benchmarks.common.measuring import command_parser
from benchmarks.common.rates import ceilings
from fastimagenet import cli
from pipelines.cli import positive
from pipelines.environment import processor
from pipelines.files import Row, write_object

ROUNDS = 5


def facts(device: torch.device) -> Row:
    """Return the name, and for a GPU what CUDA says of it; memory in bytes."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    parser = command_parser(__doc__, json=True)
    cli.add_device_flag(parser)
    parser.add_argument("--seconds", type=positive, default=6.0, help="of all turns; default 6")
    args = parser.parse_args(argv)
    device = cli.one_device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    products, copies = ceilings(device, dtype, ROUNDS, args.seconds / (2 * (ROUNDS + 1)))
    result = facts(device) | {
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_flops_per_sec": asdict(products),
        "copy_bytes_per_sec": asdict(copies),  # read and written
        "rounds": ROUNDS,
    }
    for name, value in result.items():
        print(f"{name}: {value}")
    if args.json is not None:
        write_object(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
