"""Whether DALI decodes windows of photographs on this device: a look before anything else there.

    python -m benchmarks.research.window_decoding --data DIR

nvImageCodec 0.9.0 is reported to fail in it on some GPUs, by an error on some and by a crash on
others. `failure` tries it in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from benchmarks.common.measuring import command_parser, training_images
from fastimagenet import cli
from pipelines.backends import make_loader
from pipelines.loader import DaliSettings, LoaderSpec, Stage

BATCH_SIZE = 32


def failure(data: Path, device: str = "cuda:0") -> str:
    """Try it in a process; returns "" where it works, else how the process has ended."""
    words = ["-m", "benchmarks.research.window_decoding", "--data", str(data), "--device", device]
    return ending([sys.executable, *words])


def ending(command: Sequence[str]) -> str:
    """Run a command; returns "" for exit status 0, else the status and its last line."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    said = (done.stdout + done.stderr).strip().splitlines() or ["it said nothing"]
    return f"exit status {done.returncode}: {said[-1][:300]}" if done.returncode else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError where windows fail."""
    parser = command_parser(__doc__, data=True)
    cli.add_device_flag(parser)
    args = parser.parse_args(argv)
    device, split = cli.one_device(args.device), training_images(args.data)
    spec = LoaderSpec(
        split=split,
        stages=(Stage(epochs=1, image_size=128, batch_size=min(BATCH_SIZE, len(split))),),
        training=True,
        device=str(device),
        half=device.type == "cuda",
        dali=DaliSettings(whole_images=False),
    )
    count = 0
    with closing(make_loader("dali", spec)) as loader:
        for images, _ in loader:
            assert torch.isfinite(images.float().sum()), "pixels are numbers"
            count += len(images)
    print(f"windows of {count} images decoded on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
