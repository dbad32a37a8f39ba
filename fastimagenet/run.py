"""A training or a sweep: from a `RunConfig` to the files of its folder.

Each builder has one job: read the data, choose the copies, check what all ranks were asked for,
build the loaders, build the trainer. The benchmarks use the same ones.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastimagenet import cli
from fastimagenet.config import DataConfig, RunConfig
from fastimagenet.distributed.collectives import gather_objects
from fastimagenet.distributed.processes import Processes
from fastimagenet.distributed.world import World, restarted, started_by_us
from fastimagenet.lr_finder.sweep import Sweep, SweepConfig, check_validation
from fastimagenet.recipes import toml
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import TOP, Recipe
from fastimagenet.training.clock import Stopwatch
from fastimagenet.training.recorder import Recorder
from pipelines.backends import start_workers
from pipelines.datasets.copies import best_copy, find_copies, read_copy
from pipelines.datasets.known import AUTO, ORIGINAL
from pipelines.datasets.split import Split, check_classes, check_several, notes_of, read_split
from pipelines.errors import UserError
from pipelines.files import write_object
from pipelines.loader import Stage

if TYPE_CHECKING:
    from torch import nn

    from fastimagenet.training.trainer import Trainer
    from pipelines.loader import Loader

WHITENING_IMAGES = 2000
"""About so many; airbench94 takes 5,000, of which each gives 961 patches at 32 px."""


def read_data(data: DataConfig, say_notes: bool) -> tuple[Split, Split]:
    """Read both splits and check their files. Raises UserError naming the folder or file.

    `say_notes`: print what was left out on standard error.
    """
    start_workers(data.backend)
    train, val = (
        read_split(data.root, split, data.skip_list, on_bad_image=data.on_bad_image, rule=data.rule)
        for split in ("train", "val")
    )
    check_classes(train, val)
    check_several(train)
    for note in notes_of(train, val) if say_notes else ():
        print(note, file=sys.stderr)  # noqa: T201
    return train, val


def check_target(recipe: Recipe, num_classes: int) -> None:
    """Raise UserError for a target in top-5 that any network reaches."""
    if recipe.target.startswith("top5") and num_classes <= TOP:
        raise UserError(
            f"recipe field target = {recipe.target!r} says nothing of {num_classes} classes: "
            "--set target=top1=0.9, or --set target= for none"
        )


def with_copies(recipe: Recipe, root: Path) -> Recipe:
    """Choose the copies in the data folder that the phases train on.

    Raises UserError where a phase names one that is not there, or not finished.
    """
    copies = find_copies(root)
    phases = []
    for index, phase in enumerate(recipe.phases):
        data = best_copy(copies, phase.image_size) if phase.data == AUTO else phase.data
        if data not in (*copies, ORIGINAL):
            there = f"has {', '.join(copies)}" if copies else "has no finished copies"
            remedy = f'name a copy, "{ORIGINAL}" or "{AUTO}"'
            if data.isdecimal():
                resize = f"python -m pipelines.prepare resize {root} {root}"
                remedy = f"{resize} --short-side {data} makes one"
            raise UserError(
                f"recipe field phases.{index}.data = {data!r}: {root} {there}; {remedy}"
            )
        phases.append(replace(phase, data=data))
    return replace(recipe, phases=tuple(phases))


def check_output(folder: Path, resuming: bool = False) -> None:
    """Raise UserError if the folder cannot take this run, which, resumed, may find itself there."""
    from fastimagenet.training.checkpoint import LAST

    results = [name for name in ("summary.json", "lr_find.json") if (folder / name).exists()]
    if results and not (folder / "checkpoints" / LAST).exists():
        raise UserError(
            f"--output {folder} holds another run's {results[0]} and no checkpoint to resume from: "
            "name another folder"
        )
    if not resuming and (folder / "plan.json").exists():
        raise UserError(
            f"--output {folder} holds another run: name another folder, "
            "or resume a stopped training by train --resume auto"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file: name a folder")


def images_digest(train: Split, val: Split) -> str:
    """Tell the images of a run from all others by their names, labels and bytes."""
    return f"{train.digest()[:32]}{val.digest()[:32]}"


def check_same_on_all_ranks(
    config: RunConfig, recipe: Recipe, num_images: tuple[int, int], digest: str, world: World
) -> None:
    """Raise UserError unless all processes were asked for the same and see the same images.

    `num_images`: of training and validation; `digest`: of all of them.
    """
    asked = num_images, digest, toml.dumps(recipe), config.seed
    counts, digests, recipes, seeds = map(
        set, zip(*gather_objects(asked, world, "a check"), strict=True)
    )
    if len(counts) > 1:
        raise UserError(
            f"--data: the processes see different images, {min(counts)} and {max(counts)} "
            "(training, validation): give all of them the same files"
        )
    if len(digests) > 1:
        raise UserError(
            "--data: the processes see as many images, but of other names, classes or sizes: give "
            "all of them the same files"
        )
    if len(recipes) > 1 or len(seeds) > 1:
        flag = "--seed" if len(seeds) > 1 else "--recipe, --set or --epochs"
        raise UserError(f"{flag}: the processes differ: type the same command on every node")


def build_loaders(
    config: RunConfig, plan: Plan, world: World, train: Split, val: Split
) -> tuple[Loader, Loader]:
    """Open this process's loaders of the training and the validation images.

    Raises UserError for a back end that is not installed and for copies that are missing.
    """
    from fastimagenet.training.evaluation import autocast_dtype
    from fastimagenet.training.loaders import open_loader

    dtype = autocast_dtype(plan.recipe.precision, world.device.partition(":")[0])
    copies = {
        phase.copy: read_copy(config.data.root, phase.copy, train)
        for phase in plan.phases
        if phase.copy
    }
    open_ = partial(
        open_loader,
        config.data.backend,
        plan.recipe,
        world=world,
        half=dtype is not None,
        seed=config.seed,
    )
    return (
        open_(train, plan.phases, training=True, copies=copies, accumulation=plan.accumulation),
        open_(val, plan.eval_stages(), training=False),
    )


def build_trainer(
    config: RunConfig,
    plan: Plan,
    world: World,
    train: Split,
    val: Split,
    clock: Stopwatch,
    *,
    recorder: Recorder | None = None,
    folder: Path | None = None,
) -> Trainer:
    """Build the trainer with its network and loaders.

    Without a `recorder` it writes no rows, without a `folder` no checkpoints. Raises UserError for
    what this machine cannot do.
    """
    import torch

    from fastimagenet.models import build_model
    from fastimagenet.training.evaluation import autocast_dtype
    from fastimagenet.training.trainer import Trainer

    recipe = plan.recipe
    if world.device != "cpu" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: this build of torch cannot use the CUDA device; --device cpu runs"
        )
    images = images_digest(train, val)
    check_same_on_all_ranks(config, recipe, (len(train), len(val)), images, world)
    autocast_dtype(recipe.precision, world.device.partition(":")[0])  # refuses before it builds
    torch.manual_seed(config.seed)
    model = build_model(recipe, len(train.classes))
    if recipe.whitening:
        whiten(model, config.data.backend, recipe, train, world)
    return Trainer(
        plan,
        model,
        *build_loaders(config, plan, world, train, val),
        world=world,
        recorder=recorder,
        clock=clock,
        folder=folder,
        about={
            "classes": list(train.classes),
            "seed": config.seed,
            "images": images,
            "rule": config.data.rule.to_plain(),
        },
        optimizer_backend=config.optimizer_backend,
        checkpoint_steps=config.checkpoint_steps,
        bucket_mb=config.bucket_mb,
    )


def whiten(model: nn.Module, backend: str, recipe: Recipe, train: Split, world: World) -> None:
    """Set the first layer from training images, the same on every process.

    They are taken in even steps from the list, which goes by classes, and read as for validation
    at the size of the last phase.
    """
    from fastimagenet.models.speednet import SpeedNet, WhiteningConv2d
    from fastimagenet.training.loaders import open_loader

    some = train.take(np.arange(0, len(train), max(1, len(train) // WHITENING_IMAGES)))
    stage = Stage(epochs=1, image_size=recipe.phases[-1].image_size, batch_size=100)
    alone = replace(world, rank=0, world_size=1)
    loader = open_loader(backend, recipe, some, (stage,), alone, training=False, half=False)
    assert isinstance(model, SpeedNet) and isinstance(model.first, WhiteningConv2d)
    with closing(loader):
        model.first.whiten(images for images, _ in loader)


def write_plan(config: RunConfig, plan: Plan, train: Split, val: Split) -> None:
    """Write plan.json; the first file of a run, and the mark that a folder holds one."""
    facts = {
        "data": os.path.abspath(config.data.root),
        "num_val": len(val),
        "num_classes": len(train.classes),
        "left_out": len(train.left_out) + len(val.left_out),
        "notes": [*config.notes, *notes_of(train, val)],
    }
    write_object(config.folder / "plan.json", plan.to_dict() | facts)


def described(plan: Plan, train: Split, val: Split) -> str:
    """Format the plan and the counts of the images."""
    images = f"{len(train):,} training and {len(val):,} validation images"
    return f"{plan.describe()}\n  data: {images}, {len(train.classes):,} classes"


def dry_run(config: RunConfig) -> str:
    """Format the plan of the images that training would read; of the run nothing is written."""
    recipe = with_copies(config.recipe, config.data.root)
    world_size = Processes.of(config.launch).world_size
    train, val = read_data(config.data, say_notes=True)
    check_target(recipe, len(train.classes))
    plan = Plan.of(recipe, world_size, len(train), config.global_batch)
    return "\n".join([described(plan, train, val), *config.notes])


def train(
    config: RunConfig, argv: Sequence[str] | None = None, clock: Stopwatch | None = None
) -> int:
    """Train, in as many processes as the config asks for, and leave the files of the run.

    `argv`: the flags as they were typed, which are those of the processes that are started.
    Returns 0, or 128 + the signal's number for a run that was stopped and has saved its state.
    Raises UserError for the user's mistakes and NotWritten for files that are missing.
    """
    clock = clock or Stopwatch()
    recipe = with_copies(config.recipe, config.data.root)
    processes = Processes.of(config.launch)
    for note in config.notes if processes.is_first else ():
        print(note, file=sys.stderr)  # noqa: T201
    train, val = read_data(config.data, processes.is_first)
    check_target(recipe, len(train.classes))
    plan = Plan.of(recipe, processes.world_size, len(train), config.global_batch)
    if config.output is None:
        config = config.with_output()
        argv = None if argv is None else [*argv, "--output", str(config.folder)]
    argv = config.flags() if argv is None else argv
    if processes.is_first:
        check_output(config.folder, config.resumes_here)
    work = partial(_train, config, plan, train=train, val=val, clock=clock, argv=argv)
    return processes.run("fastimagenet.train", argv, work, sum(clock.read().values()))


def _train(
    config: RunConfig,
    plan: Plan,
    world: World,
    *,
    train: Split,
    val: Split,
    clock: Stopwatch,
    argv: Sequence[str],
) -> int:
    """Train in one process; on rank 0 write the files of the run."""
    from fastimagenet.errors import Stopped
    from fastimagenet.report.summary import RESULTS, missing_results, write_result
    from fastimagenet.training.profiling import StepProfiler

    results = list(RESULTS)
    # Named after the time, it may have another name on another node.
    folder = gather_objects(config.folder, world, "the choice of the folder")[0]
    config = replace(config, output=folder)
    recorder = Recorder(folder, plan.total_steps) if world.is_main else None
    trainer = build_trainer(
        config, plan, world, train, val, clock, recorder=recorder, folder=folder
    )
    trainer.stop_at_target = config.stop_at_target
    # What our launcher has started again resumes from what it has left itself.
    flag = "auto" if restarted() or (config.resume is None and started_by_us()) else config.resume
    if flag is not None:
        trainer.resume(flag, elastic=bool(config.launch.min_nodes))
        missing = gather_objects(missing_results(folder), world, "a check")[0]
        if trainer.finished and not missing:
            cli.say(world, f"the run in {folder} is finished: nothing is left to train")
            return 0
        if trainer.finished:
            results = missing
    if config.profile and world.is_main:
        trainer.profiler = StepProfiler(folder / "profile", trainer.device)
    if world.is_main:
        write_plan(config, plan, train, val)
    cli.say(world, described(plan, train, val))
    unwritten = trainer.recorder.unwritten
    with cli.stopping_on_signals(trainer) as stopped_by:
        try:
            trainer.fit()
        except Stopped:
            unwritten.share(world)
            unwritten.check()
            flags = f"--output {shlex.quote(str(folder))} --resume auto"
            cli.say(world, f"stopped at step {trainer.step}; resume with {flags}")
            return cli.stopped_status(stopped_by)
        unwritten.share(world)
        if world.is_main:
            command = shlex.join(["python", "-m", "fastimagenet.train", *argv])
            write = partial(write_result, config, trainer, val, command)
            written = [
                name
                for name in results
                if unwritten.attempt(name, partial(write, name), errors=Exception)
            ]
            if "report.html" in written:
                cli.say(world, f"report: {folder / 'report.html'}")
        unwritten.check()
    return 0


def sweep(
    config: RunConfig,
    settings: SweepConfig,
    argv: Sequence[str] | None = None,
    clock: Stopwatch | None = None,
) -> int:
    """Sweep the learning rate, in as many processes as the config asks for, and write the results.

    `argv`: the flags as they were typed, for the processes that are started.
    Returns 0, or 128 + the signal's number if it was stopped.
    Raises UserError for the user's mistakes and NotWritten for files that are missing.
    """
    clock = clock or Stopwatch()
    recipe = with_copies(config.recipe, config.data.root)
    processes = Processes.of(config.launch)
    if config.output is None:
        config = config.with_output("lr_find-")
        argv = None if argv is None else [*argv, "--output", str(config.folder)]
    argv = [*config.flags(), *settings.flags()] if argv is None else argv
    if processes.is_first:
        check_output(config.folder)
        settings.check_recipe_out()
    train, val = read_data(config.data, processes.is_first)
    plan = Plan.of(recipe, processes.world_size, len(train), config.global_batch)
    check_validation(plan, len(val))
    val = shuffled(val, config.seed)
    work = partial(_sweep, config, settings, plan, train=train, val=val, clock=clock, argv=argv)
    return processes.run("fastimagenet.lr_find", argv, work)


def shuffled(split: Split, seed: int) -> Split:
    """Return the same images in random order.

    Folders are listed by class, and a sweep evaluates each iteration on one batch.
    """
    return split.take(np.random.default_rng(seed).permutation(len(split)))


def _sweep(
    config: RunConfig,
    settings: SweepConfig,
    plan: Plan,
    world: World,
    *,
    train: Split,
    val: Split,
    clock: Stopwatch,
    argv: Sequence[str],
) -> int:
    """Make the sweeps in one process; on rank 0 write and print the results."""
    from fastimagenet.lr_finder.finder import sweep_all
    from fastimagenet.lr_finder.results import write_results

    started = time.strftime("%Y-%m-%dT%H:%M:%S")
    command = shlex.join(["python", "-m", "fastimagenet.lr_find", *argv])
    trainer = build_trainer(config, plan, world, train, val, clock)
    cli.say(world, settings.describe(plan))
    if world.is_main:
        write_plan(config, plan, train, val)
    sweeps: list[Sweep] = []
    with cli.stopping_on_signals(trainer) as stopped_by:
        try:
            for each in sweep_all(trainer, settings, config.folder):
                sweeps.append(each)
        finally:  # an error in a later sweep leaves the earlier ones
            if world.is_main and sweeps:
                results = write_results(config, settings, sweeps, trainer, val, started, command)
                cli.say(world, results)
    return cli.stopped_status(stopped_by) if sweeps[-1].ended == "stopped" else 0
