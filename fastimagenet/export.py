"""`python -m fastimagenet.export CHECKPOINT OUT`: a trained network for other programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fastimagenet import cli
from fastimagenet.config import DataConfig
from fastimagenet.report.run import checkpoint_at, data_of_run
from pipelines.cli import Parser, make_parser
from pipelines.errors import UserError

IMAGES = 32
"""On so many validation images, from all over the list, the export is tried."""


def parser() -> Parser:
    """Build the parser with all flags of the command."""
    result = make_parser(
        "fastimagenet.export",
        "Write a trained network for other programs, run what was written on real images, and say "
        "how far its outputs are from the network's own.",
        "python -m fastimagenet.export runs/first first.onnx",
    )
    add = result.add_argument
    cli.add_checkpoint(result)
    add(
        "out",
        metavar="OUT",
        help="NAME.onnx, NAME.pt2 (torch.export), NAME.safetensors (the weights), or a folder in "
        "Hugging Face's format, which timm loads",
    )
    add(
        "--raw",
        action="store_true",
        help="leave the normalisation out of the graph, which then takes normalised images",
    )
    add(
        "--data",
        type=cli.data_argument,
        metavar="DIR",
        help="data with the validation images that it is tried on; default: those of the run, or "
        "the embedded digits",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status. Raises UserError for the user's mistakes."""
    args = parser().parse_args(argv)
    path = checkpoint_at(args.checkpoint)
    folder = args.data or data_of_run(path)

    from fastimagenet.classifier import load
    from fastimagenet.forms import form_of, write_export

    form = form_of(args.out)
    if args.raw and not form.is_graph:
        raise UserError(f"--raw is for .onnx and .pt2: {args.out} holds the weights alone")
    network = load(path)
    form.check(network.recipe)
    data = DataConfig(folder=folder, on_bad_image="skip")
    val = cli.with_rule_of(path, data, say_notes=False).read("val")
    files = val.files[:: -(-len(val) // IMAGES)]
    difference = write_export(network, Path(args.out), form, files, args.raw)
    print(  # noqa: T201
        f"{args.out}: epoch {network.epoch} of {network.recipe.epochs}; on {len(files)} validation "
        f"images no logit is farther from the network's own than {difference:.2g}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
