"""What this device is, and what a large matrix product and a large copy reach on it.

python -m benchmarks.research.device_ceilings --json FILE
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, distribution

import torch

from benchmarks.common.measuring import command_parser
from benchmarks.common.rates import ceilings
from fastimagenet import cli
from pipelines.cli import positive
from pipelines.environment import NVJPEG, nvjpeg_version, processor
from pipelines.files import Row, write_object
from pipelines.loader import DaliSettings

ROUNDS = 5
HARDWARE = ctypes.c_int(3)
"""NVJPEG_BACKEND_HARDWARE of nvjpeg.h."""


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
        "decodes": "whole images" if DaliSettings().whole_images else "windows",
    }


def jpeg_decoder() -> Row:
    """Tell what DALI's hardware decoder needs: the driver's library, without which DALI falls back
    to the GPU's cores in silence, nvJPEG, and the engines that it finds; null where unknown."""
    found: Row = {"libnvcuvid": library("libnvcuvid.so.1") is not None}
    found |= {"nvjpeg": ".".join(map(str, nvjpeg_version())) or None, "jpeg_engines": None}
    nvjpeg = nvjpeg_library()
    if nvjpeg is None:
        return found
    handle, engines, cores = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()
    created = nvjpeg.nvjpegCreateEx(HARDWARE, None, None, ctypes.c_uint(0), ctypes.byref(handle))
    if created:  # no status but 0 is a success: there is no such decoder, or no driver for it
        return found | {"jpeg_engines": 0}
    asked = nvjpeg.nvjpegGetHardwareDecoderInfo(handle, ctypes.byref(engines), ctypes.byref(cores))
    nvjpeg.nvjpegDestroy(handle)
    return found if asked else found | {"jpeg_engines": engines.value}


def nvjpeg_library() -> ctypes.CDLL | None:
    """Load the nvJPEG of the installed package, as DALI does, or else the system's."""
    for name in NVJPEG:
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:
            continue
        for file in files:
            if file.name.startswith("libnvjpeg.so"):
                return library(str(file.locate()))
    return library("libnvjpeg.so.13") or library("libnvjpeg.so.12")


def library(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


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
    if args.json is not None:
        write_object(args.json, result)
    if device.type != "cpu":
        result |= jpeg_decoder()  # of others' libraries, which may end this process
        if args.json is not None:
            write_object(args.json, result)
    for name, value in result.items():
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
