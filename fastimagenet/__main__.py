"""The command `fastimagenet`: `fastimagenet train ...` is `python -m fastimagenet.train ...`."""

from __future__ import annotations

import runpy
import sys

from fastimagenet import __version__
from fastimagenet.cli import exit_status
from pipelines.errors import UserError, did_you_mean

COMMANDS = {
    "train": ("fastimagenet.train", "train an image classifier"),
    "batches": ("fastimagenet.batches", "show the images as the network gets them"),
    "evaluate": ("fastimagenet.evaluate", "count the exact accuracy of a checkpoint"),
    "predict": ("fastimagenet.predict", "name the classes of images"),
    "export": ("fastimagenet.export", "write a trained network for other programs"),
    "lr_find": ("fastimagenet.lr_find", "find learning rate, weight decay and momentum"),
    "report": ("fastimagenet.report", "write the report page of a run again"),
    "prepare": ("pipelines.prepare", "unpack, scan, resize and shard data sets"),
    "parity": ("pipelines.parity", "compare DALI's pixels with torchvision's"),
}
"""Name: module and what it does."""


def main() -> int:
    """Run the command that the first argument names; returns the exit status."""
    return exit_status(run, None)


def run(_: object = None) -> int:
    """Hand the other arguments to the command's module, which ends the process."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        lines = [f"  {command:10} {does}" for command, (_, does) in COMMANDS.items()]
        print("usage: fastimagenet COMMAND ...\n", *lines, sep="\n")  # noqa: T201
        print("\nfastimagenet COMMAND --help shows the flags of a command.")  # noqa: T201
        return 0
    if name == "--version":
        print(f"fastimagenet {__version__}")  # noqa: T201
        return 0
    if name not in COMMANDS:
        raise UserError(f"there is no command {name}: {did_you_mean(name, COMMANDS)}")
    module, _ = COMMANDS[name]
    sys.argv[:2] = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
