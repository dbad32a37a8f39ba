"""`python -m pipelines.parity DIR`: the fast pipeline against torchvision, pixel by pixel."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipelines.backends import has_dali
from pipelines.cli import add_rule_flags, exit_status, make_parser
from pipelines.datasets.rule import SplitRule
from pipelines.datasets.split import Split, notes_of, read_split
from pipelines.errors import UserError
from pipelines.files import printable
from pipelines.workers import num_cores

MOST_IMAGES = 1000
DESCRIPTION = """\
Compare the pixels of the dali back end with those of torchvision's transforms on Pillow images:
validation (Resize, CenterCrop) and training (RandomResizedCrop, the same crop in both).
Exit status: 0 within the bounds, 1 not."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError naming the flag or file."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    root = Path(os.path.abspath(args.folder))
    rule = SplitRule(val_fraction=args.val_fraction, labels=args.labels)
    whole = {
        name: read_split(root, name, args.skip_list, on_bad_image="skip", rule=rule)
        for name in ("val", "train")
    }
    device = find_device(args.device)

    from pipelines.parity.compare import compare, crop_test, spec_of, typical_shapes
    from pipelines.parity.results import Results

    specs = [
        spec_of(evenly(split, args.images), name == "train", size, device, args.threads)
        for name, split in whole.items()
        for size in dict.fromkeys(args.image_size)
    ]
    with tqdm(total=sum(len(spec.split) for spec in specs), unit="image", disable=None) as bar:
        comparisons = [compare(spec, root, bar.update) for spec in specs]
    results = Results(
        comparisons=comparisons,
        crops=[crop_test(*shape) for shape in typical_shapes(specs[-1].split)],
        num_images={name: len(split) for name, split in whole.items()},
        notes=[printable(note) for note in notes_of(*whole.values())],
        command=printable(shlex.join(["python", "-m", "pipelines.parity", *argv])),
        device=device,
    )
    page = results.write(args.output)
    print(f"{results.text()}\n{printable(str(page))}", flush=True)  # noqa: T201
    return 0 if results.within else 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags and check them."""
    parser = make_parser(
        "pipelines.parity", DESCRIPTION, "python -m pipelines.parity imagenet --output parity"
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="image folder DIR/train/CLASS/*, DIR/val/CLASS/*")
    add("--image-size", type=int, nargs="+", default=[224, 128], metavar="S", help="in pixels")
    add("--images", type=int, default=MOST_IMAGES, metavar="N",
        help=f"at most, from each split, evenly spread; default: {MOST_IMAGES:,}")  # fmt: skip
    add("--output", type=Path, metavar="DIR", help="folder; default: runs/parity-TIME")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where DALI decodes")
    add("--threads", type=int, default=num_cores(), metavar="K", help="default: one a core")
    add("--skip-list", type=Path, metavar="FILE", help="files to leave out, one a line")
    add_rule_flags(parser)
    args = parser.parse_args(argv)
    for flag, number in (
        *(("--image-size", size) for size in args.image_size),
        ("--images", args.images),
        ("--threads", args.threads),
    ):
        if number < 1:
            raise UserError(f"{flag} must be at least 1, not {number}")
    if args.output is None:
        args.output = Path("runs") / f"parity-{time.strftime('%Y%m%d-%H%M%S')}"
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output} is a file: name a folder")
    if not has_dali():
        raise UserError(
            "parity compares DALI with torchvision: install the package nvidia-dali-cuda120 or "
            "nvidia-dali-cuda130"
        )
    return args


def evenly(split: Split, most: int) -> Split:
    """Take at most `most` images of a split, at equal distances."""
    count = min(most, len(split))
    return split.take(np.arange(count) * len(split) // count)


def find_device(device: str) -> str:
    """Name the device as `LoaderSpec` does. Raises UserError where there is no GPU to take."""
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("--device cuda: torch finds no CUDA device; --device cpu runs without one")
    return "cuda:0" if available and device != "cpu" else "cpu"


if __name__ == "__main__":
    sys.exit(exit_status(main, None))
