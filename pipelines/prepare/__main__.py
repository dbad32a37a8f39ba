"""`python -m pipelines.prepare COMMAND`: one module of this package a command.

Each has `add_flags(parser)` and `run(args) -> exit status`, and is imported only when asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from pipelines.cli import exit_status, make_parser

COMMANDS = {
    "imagenet": (
        "Class folders from the ILSVRC-2012 archives (resumable).",
        "archives imagenet",
    ),
    "cifar10": (
        "Class folders of PNGs, pixel for pixel, from the CIFAR-10 archive.",
        "cifar-10-python.tar.gz cifar10",
    ),
    "scan": (
        "Find damaged and odd images before training does.\n"
        "Exit status: 1: damaged images, or folders that would stop training, were found.",
        "imagenet",
    ),
    "resize": (
        "Copies of an image folder that decode faster, one tree per length of the short side.\n"
        "Exit status: 1: damaged images were found; they have no copy.",
        "imagenet imagenet-small --short-side 160 352",
    ),
    "shard": (
        "WebDataset tar shards of an image folder, which training reads as it reads the folder.",
        "imagenet imagenet-shards",
    ),
}
"""Name: what it does, in the first line by itself; the arguments of an example."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Raises UserError for the user's mistakes."""
    argv = list(sys.argv[1:] if argv is None else argv)
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{text.splitlines()[0]}" for name, (text, _) in COMMANDS.items()]
    outer = make_parser(
        "pipelines.prepare",
        "\n".join(("Prepare data. Commands, each with its own --help:", *lines)),
        "python -m pipelines.prepare resize --help",
    )
    outer.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    name = outer.parse_args(argv[:1]).command
    summary, example = COMMANDS[name]
    module = f"pipelines.prepare {name}"
    parser = make_parser(module, summary, f"python -m {module} {example}")
    command = import_module(f"pipelines.prepare.{name}")
    command.add_flags(parser)
    return int(command.run(parser.parse_args(argv[1:])))


if __name__ == "__main__":
    sys.exit(exit_status(main, None))
