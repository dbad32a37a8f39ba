"""Share among all commands: a parser with errors of one line, types of arguments, exit status."""

from __future__ import annotations

import argparse
import io
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from pipelines.errors import UserError
from pipelines.limits import named_limits
from pipelines.signals import Interrupted, stop_signals


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, as all errors of the commands."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def make_parser(module: str, description: str, example: str) -> Parser:
    """Make a parser whose help ends with an example."""
    return Parser(
        prog=f"python -m {module}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_rule_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that divide images which are not in train/ and val/: see `SplitRule`."""
    parser.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="validate on this share of DIR/CLASS/*, or of DIR/train/CLASS/*: those with the "
        "lowest hashes of their paths, so that new images move none of the old",
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE.csv",
        help="images and their classes, in columns path, label and, without --val-fraction, split",
    )


def check_seed(seed: int) -> None:
    """Raise UserError unless every random generator in use takes the --seed."""
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed must be from 0 to {2**63 - 1} (2^63 - 1), not {seed}")


def at_least(least: int) -> Callable[[str], int]:
    """Make an argparse type: integers from `least` on."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        return value

    return number


def positive(text: str) -> float:
    """An argparse type: finite numbers above 0."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return value


def output_folder(text: str) -> Path:
    """An argparse type: a writable folder, or one that can be made."""
    path = Path(text)
    existing = next(each for each in (path, *path.parents) if os.path.exists(each))
    if not existing.is_dir():
        raise argparse.ArgumentTypeError(f"{existing} is a file: name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{existing} cannot be written to: name another folder")
    return path


def output_file(text: str) -> Path:
    """An argparse type: a file that can be written, or made with its folder."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder: name a file")
    output_folder(str(path.parent))
    return path


def open_standard_streams() -> None:
    """Open on the null device what the caller has closed (`>&-`): a file would get its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def exit_status(command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """Run a command; a UserError becomes one line on standard error and status 2.

    A stop signal becomes one line and 128 + its number. `argv` None: the process's own, which
    ends with the command.
    """
    open_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # paths need not be UTF-8
        sys.stdout.reconfigure(errors="surrogateescape")
    with stop_signals() as signals:
        signals.ends_process = argv is None
        return _exit_status(command, argv)


def _exit_status(command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    try:
        with named_limits():
            return command(argv)
    except UserError as error:
        message = " ".join(str(error).split())
    except BrokenPipeError:  # as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        return 128 + signal.SIGPIPE
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)  # noqa: T201
        return 128 + interrupted.number
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    return 2
