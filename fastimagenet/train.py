"""`python -m fastimagenet.train`: a folder of images in, a trained and reported network out.

Flags -> Recipe -> World -> Trainer -> the files of the run.
"""

from __future__ import annotations

import argparse
import math
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastimagenet import cli, recipe_toml
from fastimagenet.distributed import (
    World,
    launched_world,
    process_group,
    run_processes,
    started_by_us,
)
from fastimagenet.files import write_object
from fastimagenet.optimizer import BACKENDS as OPTIMIZER_BACKENDS
from fastimagenet.recipe_book import RECIPES, named_recipe
from fastimagenet.recipes import Recipe
from fastimagenet.recorder import NullRecorder, Recorder, Stopwatch
from pipelines.errors import UserError
from pipelines.folder import Split, check_classes, read_split

if TYPE_CHECKING:
    from fastimagenet.plan import Plan
    from fastimagenet.trainer import Trainer
    from pipelines.loader import Loader


def parser() -> cli.Parser:
    """All flags of the command."""
    result = cli.make_parser(
        "fastimagenet.train",
        "Train an image classifier: DALI, progressive resizing, 1cycle, DDP, mixed precision.",
        "python -m fastimagenet.train --data imagenet --recipe imagenet --output runs/first",
    )
    cli.add_machine_flags(result)
    add = result.add_argument
    add("--recipe", metavar="NAME|FILE.toml", help="default: digits without --data, else imagenet")
    add("--epochs", type=int, metavar="E", help="stretch the recipe, LR and phases, to E epochs")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a recipe field, such as max_lr=1.2 or phases.0.image_size=96; repeatable",
    )
    add("--seed", type=int, default=0)
    add("--output", type=Path, metavar="DIR", help="default: runs/RECIPE-TIME")
    add(
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|PATH",
        help="go on from a checkpoint; auto: from the one in --output, if there is one",
    )
    add(
        "--optimizer-backend",
        choices=OPTIMIZER_BACKENDS,
        default="torch",
        help="apex: the fused optimizer of NVIDIA apex, where installed",
    )
    add("--author", default="anonymous", help="for the DAWNBench entry, as are the next four")
    add("--author-email", default="unknown", metavar="ADDRESS")
    add("--hardware", help="default: what is found, such as 1 x NVIDIA H200")
    add("--cost-per-hour", type=float, metavar="USD", help="on-demand price of all machines")
    add("--dry-run", action="store_true", help="print the plan and leave")
    add("--list-recipes", action="store_true", help="print names and first lines and leave")
    add("--print-recipe", action="store_true", help="print the recipe as TOML and leave")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    clock = Stopwatch()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    if args.list_recipes:
        for name, make in RECIPES.items():
            print(f"{name:26} {(make.__doc__ or '').splitlines()[0]}")  # noqa: T201
        return 0
    check_numbers(args)
    recipe = chosen_recipe(args)
    if args.print_recipe:
        print(recipe_toml.dumps(recipe), end="")  # noqa: T201
        return 0
    launch = cli.launch_of(args)
    data = cli.data_folder(args)
    world = launched_world(launch)
    world_size = launch.world_size if world is None else world.world_size
    if args.dry_run:
        train = read_split(data, "train", args.skip_list, check_files=False)
        print(recipe.plan(world_size, len(train)).describe())  # noqa: T201
        return 0
    check_files = (world is None or world.local_rank == 0) and not started_by_us()
    train, val = read_data(data, args.skip_list, check_files)
    plan = recipe.plan(world_size, len(train))
    if args.output is None:
        args.output = default_output(args.resume, recipe.name)
        argv += ["--output", str(args.output)]
    if not started_by_us() and (world is None or world.is_main):
        check_output(args.output, args.resume)
    if world is None:
        if launch.world_size > 1:
            return run_processes(launch, "fastimagenet.train", argv)
        world = World(device="cpu" if launch.device == "cpu" else "cuda:0")
    with process_group(world):
        return train_and_report(args, plan, world, train, val, clock, argv)


def chosen_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that the flags name, with all their changes. Raises UserError."""
    name = args.recipe or ("imagenet" if args.data else "digits")
    if name.endswith(".toml"):
        recipe = recipe_toml.load(Path(name))
    else:
        recipe = named_recipe(name, args.nodes)
    if args.set:
        recipe = recipe_toml.with_settings(recipe, args.set)
    if args.epochs is not None:
        recipe = recipe.stretched(args.epochs)
    return recipe if args.precision is None else replace(recipe, precision=args.precision)


def read_data(data: Path, skip_list: Path | None, check_files: bool) -> tuple[Split, Split]:
    """Both splits, checked. Raises UserError naming the folder or file."""
    train = read_split(data, "train", skip_list, check_files)
    val = read_split(data, "val", skip_list, check_files)
    check_classes(train, val)
    return train, val


def check_numbers(args: argparse.Namespace) -> None:
    """Raise UserError for flags that would only be found wrong once the training is over."""
    if args.seed < 0:
        raise UserError(f"--seed must be 0 or more, not {args.seed}")
    if args.nodes < 1:
        raise UserError(f"--nodes must be at least 1, not {args.nodes}")
    for flag, text in (("--author", args.author), ("--author-email", args.author_email)):
        if not text.strip():
            raise UserError(f"{flag} must not be empty: DAWNBench requires it")
    cost = args.cost_per_hour
    if cost is not None and not 0 <= cost < math.inf:
        raise UserError(f"--cost-per-hour must be a number of US dollars, not {cost}")


def default_output(resume: str | None, name: str) -> Path:
    """Where a run without --output goes: on in the folder of its checkpoint, or to a new one."""
    if resume == "auto":
        raise UserError("--resume auto needs the --output folder of the run to go on with")
    if resume is not None:
        return Path(resume).resolve().parent.parent
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_output(folder: Path, resume: str | None) -> None:
    """Raise UserError if the folder cannot take this run."""
    own = resume == "auto" or (
        resume is not None and folder.resolve() in Path(resume).resolve().parents
    )
    if not own and (folder / "plan.json").exists():
        raise UserError(
            f"--output {folder} holds another run: go on with it by --resume auto, "
            "or name another folder"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file: name a folder")


def train_and_report(
    args: argparse.Namespace,
    plan: Plan,
    world: World,
    train: Split,
    val: Split,
    clock: Stopwatch,
    argv: list[str],
) -> int:
    """What one process does: model, training, and on rank 0 the files of the run."""
    from fastimagenet.summary import write_results
    from fastimagenet.trainer import Stopped

    started = time.strftime("%Y-%m-%dT%H:%M:%S")
    trainer = make_trainer(args, plan, world, train, val, clock)
    if world.is_main:
        write_plan(args.output, plan, train, val)
    cli.say(world, plan.describe())

    def ask_to_stop(number: int, _frame: object) -> None:
        trainer.stop_requested = True
        stopped_by.append(number)

    stopped_by: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_stop)
    try:
        trainer.fit()
    except Stopped:
        flags = f"--output {shlex.quote(str(args.output))} --resume auto"
        cli.say(world, f"stopped at step {trainer.step}; go on with {flags}")
        return 128 + (stopped_by[0] if stopped_by else signal.SIGTERM)
    if world.is_main:
        command = shlex.join(["python", "-m", "fastimagenet.train", *argv])
        page = write_results(args, trainer, val, started, command)
        cli.say(world, f"report: {page}")
    return 0


def make_trainer(
    args: argparse.Namespace, plan: Plan, world: World, train: Split, val: Split, clock: Stopwatch
) -> Trainer:
    """The trainer with its network, loaders and, for --resume, its state."""
    import torch

    from fastimagenet.model import make_model
    from fastimagenet.precision import autocast_dtype
    from fastimagenet.reading import open_loader
    from fastimagenet.resume import resume
    from fastimagenet.trainer import Trainer

    recipe = plan.recipe
    if world.device != "cpu" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: this build of torch cannot use the CUDA device; --device cpu runs"
        )
    dtype = autocast_dtype(recipe.precision, world.device.partition(":")[0])
    torch.manual_seed(args.seed)
    model = make_model(
        recipe.model,
        len(train.classes),
        zero_init_last_gamma=recipe.zero_init_last_gamma,
        blur_pool=recipe.blur_pool,
        small_stem=recipe.small_stem,
    )

    def loader(training: bool) -> Loader:
        return open_loader(
            args.backend,
            recipe,
            train if training else val,
            plan.train_stages() if training else plan.eval_stages(),
            world,
            training=training,
            half=dtype is not None,
            seed=args.seed,
        )

    main = world.is_main
    recorder = Recorder(args.output, plan.total_steps) if main else NullRecorder()
    trainer = Trainer(
        plan,
        model,
        world,
        loader,
        recorder,
        clock=clock,
        folder=args.output,
        about={
            "recipe": recipe_toml.dumps(recipe),
            "classes": list(train.classes),
            "num_train": len(train),
            "seed": args.seed,
        },
        optimizer_backend=args.optimizer_backend,
    )
    if args.resume is not None:
        resume(trainer, args.output, args.resume)
    return trainer


def write_plan(folder: Path, plan: Plan, train: Split, val: Split) -> None:
    """plan.json; the first file of a run, and the mark that a folder holds one."""
    facts = {"num_val": len(val), "num_classes": len(train.classes)}
    write_object(folder / "plan.json", plan.to_dict() | facts)


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
