"""What the commands share: flags of the machine, one-line errors, exit status."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastimagenet.distributed.world import (
    TIMEOUT_SECONDS,
    Launch,
    World,
    end_with_launcher,
    plan_launch,
    report_to_launcher,
)
from fastimagenet.errors import NotWritten, PeerLost
from fastimagenet.machine import keep_freed_memory
from fastimagenet.recipes.recipe import PRECISIONS
from pipelines import cli
from pipelines.backends import BACKENDS
from pipelines.datasets.remote import is_url, local_copy
from pipelines.datasets.split import ON_BAD_IMAGE
from pipelines.errors import UserError

if TYPE_CHECKING:
    import torch

    from fastimagenet.training.trainer import Trainer


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """--data and where and how to compute: the same for train, evaluate and lr_find."""
    add = parser.add_argument
    add(
        "--data",
        type=data_argument,
        metavar="DIR",
        help="image folder DIR/train/CLASS/*, DIR/val/CLASS/*, or shards; those at a URL "
        "(s3://, gs://, hf://) are copied to the user's cache first; default: the embedded digits",
    )
    add("--skip-list", type=Path, metavar="FILE", help="paths of images to leave out, one a line")
    add(
        "--on-bad-image",
        choices=ON_BAD_IMAGE,
        default="error",
        help="files that cannot be read: stop at the start (the default), or leave them out",
    )
    add(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="who decodes; auto: dali where installed, else torchvision",
    )
    add_device_flag(parser)
    add("--precision", choices=PRECISIONS, help="in place of the recipe's")
    add(
        "--nodes",
        type=node_range,
        default=(0, 1),
        metavar="N|MIN:MAX",
        help="machines; MIN:MAX: go on with those that are left, and take others in; default 1",
    )
    add(
        "--nproc-per-node",
        type=int,
        metavar="K",
        help="processes on this machine; default: one per GPU, one on a CPU",
    )
    add(
        "--timeout",
        type=float,
        default=TIMEOUT_SECONDS,
        metavar="SECONDS",
        help=f"to wait for the other processes before giving up; default {TIMEOUT_SECONDS}",
    )
    add("--rdzv-endpoint", metavar="HOST:PORT", help="where nodes meet, the same on every node")


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """--device, as every command has it."""
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")


def data_argument(text: str) -> Path:
    """A folder, or the local copy of the shards at a URL."""
    try:
        return local_copy(text) if is_url(text) else Path(text)
    except UserError as error:  # argparse would say "invalid value" instead
        raise argparse.ArgumentTypeError(str(error)) from None


def node_range(text: str) -> tuple[int, int]:
    """--nodes: (MIN, MAX), or (0, N) for a fixed number. Raises ArgumentTypeError."""
    least, colon, most = text.rpartition(":")
    if not most.isdecimal() or (colon and not least.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be a number of machines or MIN:MAX, not {text}")
    if colon and not 1 <= int(least) <= int(most):
        raise argparse.ArgumentTypeError(f"{text}: 1 <= MIN <= MAX must hold")
    if int(most) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(least or 0), int(most)


def add_run_flags(
    parser: argparse.ArgumentParser, output: str, folder: Callable[[str], Path] = Path
) -> None:
    """What to run and where to leave it: the same for train and lr_find but for the default.

    `folder` is --output's type: of several processes, not all need to be able to write there.
    """
    add = parser.add_argument
    add("--recipe", metavar="NAME|FILE.toml", help="default: digits without --data, else imagenet")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a recipe field, such as max_lr=1.2 or phases.0.image_size=96; repeatable",
    )
    add(
        "--global-batch",
        type=int,
        metavar="N",
        help="images an update in the first phase, the others in proportion: fewer processes add "
        "up the gradients of several batches",
    )
    add("--seed", type=int, default=0)
    add("--output", type=folder, metavar="DIR", help=f"default: {output}")


def launch_of(args: argparse.Namespace, *, elastic: bool = False) -> Launch:
    """Processes and device as the flags have it; `elastic`: the command can change them as it runs.

    Raises UserError naming the flag.
    """
    if not 0 < args.timeout < math.inf:
        raise UserError(f"--timeout must be above 0 seconds, not {args.timeout:g}")
    min_nodes, nodes = args.nodes
    if min_nodes and not elastic:
        raise UserError(f"--nodes {min_nodes}:{nodes} is for fastimagenet.train: --nodes {nodes}")
    return plan_launch(nodes, args.nproc_per_node, args.device, args.rdzv_endpoint, min_nodes)


def one_device(device: str) -> torch.device:
    """That of a command of a single process. Raises UserError where --device is not there."""
    import torch

    launch = plan_launch(1, 1, device, None)
    return torch.device("cpu" if launch.device == "cpu" else "cuda:0")


def data_folder(args: argparse.Namespace) -> Path:
    """--data, or the embedded digits."""
    if args.data is not None:
        return Path(args.data)
    from pipelines.datasets.digits import digits_folder

    return digits_folder()


def data_name(args: argparse.Namespace) -> str:
    """What the data are called where no more is known of them."""
    return "the embedded digits" if args.data is None else data_folder(args).resolve().name


def exit_status(command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """As that of `pipelines.cli`, and 1 where files are missing or another process is.

    In a process of our own launcher the line is left to it.
    """

    def told(argv: Sequence[str] | None) -> int:
        end_with_launcher()
        keep_freed_memory()
        try:
            return command(argv)
        except UserError as error:
            if report_to_launcher(error):
                return 2
            raise
        except NotWritten as error:
            if not report_to_launcher(error):
                print(f"error: {error}", file=sys.stderr)  # noqa: T201
            return 1
        except PeerLost as error:
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)  # threads that still wait for the others would hold up the end

    return cli.exit_status(told, argv)


def stop_on_signals(trainer: Trainer) -> list[int]:
    """From here on SIGTERM and Ctrl-C ask the trainer to stop; the list gets their numbers."""
    numbers: list[int] = []

    def ask_to_stop(number: int, _frame: object) -> None:
        trainer.stop_requested = True
        numbers.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_stop)
    return numbers


def stopped_status(numbers: list[int]) -> int:
    """The exit status of a stopped command; without a number the signal went to another process."""
    return 128 + (numbers[0] if numbers else signal.SIGTERM)


def say(world: World, text: str) -> None:
    """Print for the user, once however many processes there are."""
    if world.is_main:
        print(text, flush=True)  # noqa: T201
