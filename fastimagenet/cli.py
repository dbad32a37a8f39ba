"""What the commands share: flags of the machine, one-line errors, exit status."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastimagenet.config import DataConfig, RunConfig, changed_recipe, chosen_recipe
from fastimagenet.distributed.world import (
    TIMEOUT_SECONDS,
    Launch,
    World,
    another_speaks,
    end_with_launcher,
    report_to_launcher,
)
from fastimagenet.errors import NotWritten, PeerLost
from fastimagenet.machine import keep_freed_memory, share_out_quota, silence_libraries, spin_briefly
from fastimagenet.recipes.recipe import PRECISIONS
from pipelines import cli
from pipelines.backends import BACKENDS
from pipelines.datasets.folders import SPLIT_FOLDERS, class_names
from pipelines.datasets.remote import is_url, local_copy
from pipelines.datasets.shards import has_shards
from pipelines.datasets.split import ON_BAD_IMAGE
from pipelines.errors import UserError
from pipelines.limits import named_limits
from pipelines.signals import Interrupted, StopSignals, stop_signals

if TYPE_CHECKING:
    import torch

    from fastimagenet.training.trainer import Trainer


def add_checkpoint(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Add the trained network that a command is about; `more` ends its help."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint, or the --output folder of a run for its best.pt" + more,
    )


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """Add --data and where and how to compute: the same for train, evaluate and lr_find."""
    add_data_flags(parser)
    add_compute_flags(parser)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add --data and what becomes of its files."""
    add = parser.add_argument
    add(
        "--data",
        type=data_argument,
        metavar="DIR",
        help="image folder DIR/train/CLASS/*, DIR/val/CLASS/*, or shards; those at a URL "
        "(s3://, gs://, hf://) are copied to the user's cache first; default: the embedded digits",
    )
    add("--skip-list", type=Path, metavar="FILE", help="paths of images to leave out, one per line")
    add(
        "--on-bad-image",
        choices=ON_BAD_IMAGE,
        default="error",
        help="what to do with files that cannot be read: stop at the start (default) or skip them",
    )
    cli.add_rule_flags(parser)


def add_compute_flags(parser: argparse.ArgumentParser) -> None:
    """Add --backend, --device, --precision, and the processes."""
    add = parser.add_argument
    add_backend_flag(parser)
    add_device_flag(parser)
    add("--precision", choices=PRECISIONS, help="override the recipe's precision")
    add(
        "--nodes",
        type=node_range,
        default=(0, 1),
        metavar="N|MIN:MAX",
        help="number of nodes; MIN:MAX enables elastic training; default 1",
    )
    add(
        "--nproc-per-node",
        type=int,
        metavar="K",
        help="processes per node; default: one per GPU, one on a CPU, or what torchrun or srun "
        "has started",
    )
    add(
        "--timeout",
        type=float,
        default=TIMEOUT_SECONDS,
        metavar="SECONDS",
        help=f"how long to wait for the other processes; default {TIMEOUT_SECONDS}",
    )
    add(
        "--rdzv-endpoint",
        metavar="HOST:PORT",
        help="where nodes meet, the same on every node; not under torchrun and srun, whose "
        "processes meet at MASTER_ADDR and MASTER_PORT",
    )


def add_backend_flag(parser: argparse.ArgumentParser) -> None:
    """Add --backend."""
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="loader back end; auto: dali if installed, else torchvision",
    )


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")


def data_argument(text: str) -> Path:
    """Parse --data: a folder, or a URL whose shards are copied."""
    try:
        return local_copy(text) if is_url(text) else Path(text)
    except UserError as error:  # argparse would say "invalid value" instead
        raise argparse.ArgumentTypeError(str(error)) from None


def node_range(text: str) -> tuple[int, int]:
    """Parse --nodes to (MIN, MAX), or (0, N) for a fixed number. Raises ArgumentTypeError."""
    least, colon, most = text.rpartition(":")
    if not most.isdecimal() or (colon and not least.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be a number of nodes or MIN:MAX, not {text}")
    if colon and not 1 <= int(least) <= int(most):
        raise argparse.ArgumentTypeError(f"{text}: 1 <= MIN <= MAX must hold")
    if int(most) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(least or 0), int(most)


def add_run_flags(
    parser: argparse.ArgumentParser, output: str, folder: Callable[[str], Path] = Path
) -> None:
    """Add --recipe, --set, --seed, --output and the like: the same for train and lr_find.

    `folder` is --output's type: of several processes, not all need to be able to write there.
    """
    add_recipe_flags(parser)
    add = parser.add_argument
    add(
        "--global-batch",
        type=int,
        metavar="N",
        help="images per update in the first phase, other phases in proportion: fewer processes "
        "accumulate the gradients of several micro-batches",
    )
    add("--output", type=folder, metavar="DIR", help=f"default: {output}, or the next free name")


def add_deterministic_flag(parser: argparse.ArgumentParser) -> None:
    """Add --deterministic: the same for train and lr_find."""
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits from every run on the same machine, more slowly; an operation that "
        "torch cannot repeat is named",
    )


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add --recipe, --set and --seed."""
    add = parser.add_argument
    add("--recipe", metavar="NAME|FILE.toml", help="default: that of the data, else photos")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a recipe field, such as max_lr=1.2, phases.0.image_size=96 or, in all phases, "
        "phases.*.batch_size=16; repeatable",
    )
    add("--seed", type=int, default=0)


def launch_of(args: argparse.Namespace, *, elastic: bool = False) -> Launch:
    """Build the Launch that the flags ask for; `elastic`: the command takes --nodes MIN:MAX.

    Raises UserError naming the flag.
    """
    min_nodes, nodes = args.nodes
    if min_nodes and not elastic:
        raise UserError(f"--nodes {min_nodes}:{nodes} is for fastimagenet.train: --nodes {nodes}")
    return Launch(
        nodes=nodes,
        nproc_per_node=args.nproc_per_node,
        device=args.device,
        rdzv_endpoint=args.rdzv_endpoint,
        max_restarts=getattr(args, "max_restarts", 0),
        min_nodes=min_nodes,
        timeout_seconds=args.timeout,
    )


def data_config(args: argparse.Namespace) -> DataConfig:
    """Build the DataConfig of `add_machine_flags`."""
    return DataConfig(
        folder=args.data,
        skip_list=args.skip_list,
        on_bad_image=args.on_bad_image,
        val_fraction=args.val_fraction,
        labels=args.labels,
        backend=args.backend,
    )


def with_rule_of(path: Path, data: DataConfig, say_notes: bool) -> DataConfig:
    """Divide data without a folder of their own for validation as the checkpoint's run did."""
    if data.rule.given or has_shards(data.root) or not data.root.is_dir():
        return data
    if any(class_names(data.root / name) for name in SPLIT_FOLDERS["val"]):
        return data
    from fastimagenet.training import checkpoint

    found = checkpoint.load(path).get("rule") or {}
    data = replace(
        data,
        val_fraction=found.get("val_fraction"),
        labels=Path(found["labels"]) if found.get("labels") else None,
    )
    if data.rule.given and say_notes:
        print(f"note: divided as its run had it,{data.rule.flags()}", file=sys.stderr)  # noqa: T201
    return data


def run_config(args: argparse.Namespace, *, elastic: bool = False, **more: Any) -> RunConfig:
    """Build the RunConfig of `add_machine_flags` and `add_run_flags`, with `more` fields.

    Raises UserError naming the flag or the recipe's field.
    """
    data, launch = data_config(args), launch_of(args, elastic=elastic)
    settings = [*args.set, *([f"precision={args.precision}"] if args.precision else [])]
    recipe, chosen = chosen_recipe(args.recipe, data, launch)
    recipe, notes = changed_recipe(recipe, settings, getattr(args, "epochs", None))
    fields: dict[str, Any] = {
        "notes": (*chosen, *notes),
        "recipe": recipe,
        "data": data,
        "launch": launch,
        "output": args.output,
        "seed": args.seed,
        "global_batch": args.global_batch,
    }
    return RunConfig(**fields | more)


def one_device(device: str) -> torch.device:
    """Choose the device of a command of one process. Raises UserError if --device is not there."""
    import torch

    return torch.device(Launch(1, 1, device).resolved().first_device)


def exit_status(command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """Run a command as `pipelines.cli` does; status 1 if files or another process are missing.

    In a process of our own launcher the line, or the traceback, is left to it.
    """

    def told(argv: Sequence[str] | None) -> int:
        end_with_launcher()
        keep_freed_memory()
        spin_briefly()
        silence_libraries()
        share_out_quota()
        try:
            with named_limits():
                return command(argv)
        except UserError as error:
            if report_to_launcher(error):
                return 2
            raise
        except NotWritten as error:
            if not report_to_launcher(error):
                print(f"error: {error}", file=sys.stderr)  # noqa: T201
            return 1
        except Interrupted as interrupted:
            if another_speaks():
                return 128 + interrupted.number
            raise
        except PeerLost as error:
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)  # threads that still wait for the others would hold up the end
        except BrokenPipeError:
            raise
        except Exception as error:
            if not report_to_launcher(error):
                raise
            return 1

    return cli.exit_status(told, argv)


@contextmanager
def stopping_on_signals(trainer: Trainer) -> Iterator[StopSignals]:
    """Have a stop signal in the block ask the trainer to stop, which saves first."""

    def ask() -> None:
        trainer.stop_requested = True

    with stop_signals(ask) as signals:
        yield signals


def stopped_status(signals: StopSignals) -> int:
    """Return the exit status of a stopped command; the signal may have gone to another process."""
    return 128 + (signals.number or signal.SIGTERM)


def say(world: World, text: str) -> None:
    """Print for the user, once however many processes there are."""
    if world.is_main:
        print(text, flush=True)  # noqa: T201
