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
LIMIT_SECONDS = 60.0
"""A decoder that fails may hang."""
TAIL_LINES = 30


def failure(data: Path, *, whole_images: bool = False) -> str:
    """Try it on a GPU in a process; returns "" where it works, else how the process has ended.

    `whole_images`: without windows, which tells whether DALI decodes anything there.
    """
    words = ["-m", "benchmarks.research.window_decoding", "--data", str(data), "--device", "cuda:0"]
    return ending([sys.executable, *words, *(["--whole-images"] if whole_images else [])])


def ending(command: Sequence[str], limit: float = LIMIT_SECONDS) -> str:
    """Run a command; returns "" for exit status 0, else the status and its last line, having
    printed the end of what it said."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return f"not done within {limit:.0f} s"
    if not done.returncode:
        return ""
    said = done.stdout.strip().splitlines() or ["it said nothing"]
    print("\n".join(said[-TAIL_LINES:]), file=sys.stderr)
    return f"exit status {done.returncode}: {said[-1][:300]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError where windows fail."""
    parser = command_parser(__doc__, data=True)
    cli.add_device_flag(parser)
    help_text = "decode whole images and cut them"
    parser.add_argument("--whole-images", action="store_true", help=help_text)
    args = parser.parse_args(argv)
    device, split = cli.one_device(args.device), training_images(args.data)
    spec = LoaderSpec(
        split=split,
        stages=(Stage(epochs=1, image_size=128, batch_size=min(BATCH_SIZE, len(split))),),
        training=True,
        device=str(device),
        half=device.type == "cuda",
        dali=DaliSettings(whole_images=args.whole_images),
    )
    count = 0
    with closing(make_loader("dali", spec)) as loader:
        for images, _ in loader:
            assert torch.isfinite(images.float().sum()), "pixels are numbers"
            count += len(images)
    what = "images" if args.whole_images else "windows of images"
    print(f"{count} {what} decoded on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
