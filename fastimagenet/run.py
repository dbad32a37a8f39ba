"""A training or a sweep: from a `RunConfig` to the files of its folder.

Each builder has one job: check what all ranks were asked for, build the loaders, build the trainer.
The benchmarks use the same ones.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastimagenet import cli
from fastimagenet.config import RunConfig
from fastimagenet.distributed.collectives import gather_objects
from fastimagenet.distributed.processes import Processes
from fastimagenet.distributed.world import TRAINED, World, run_id
from fastimagenet.folder import RunFolder
from fastimagenet.images import data_notes, digest_of, read_copies, read_data, with_copies
from fastimagenet.lr_finder.sweep import Sweep, SweepConfig, check_validation
from fastimagenet.recipes import toml
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import TOP, Recipe
from fastimagenet.sinks import Sinks
from fastimagenet.training.clock import Stopwatch
from fastimagenet.training.determinism import deterministic
from fastimagenet.training.recorder import Recorder
from pipelines.datasets.split import Split
from pipelines.errors import UserError
from pipelines.files import write_object
from pipelines.loader import Stage

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastimagenet.training.trainer import Trainer
    from pipelines.loader import Loader

WHITENING_IMAGES = 2000
"""About so many; airbench94 takes 5,000, of which each gives 961 patches at 32 px."""


def check_target(recipe: Recipe, num_classes: int) -> None:
    """Raise UserError for a target in top-5 that any network reaches."""
    if recipe.target.startswith("top5") and num_classes <= TOP:
        raise UserError(
            f"recipe field target = {recipe.target!r} says nothing of {num_classes} classes: "
            "--set target=top1=0.9, or --set target= for none"
        )


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
    if len(recipes) > 1:
        names = toml.differing_fields(*map(toml.loads, sorted(recipes)[:2]))
        if all(name.endswith(".data") for name in names):
            raise UserError(
                "--data: copies of the images are not there for all processes: give all of them "
                "the same files"
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
    config: RunConfig,
    plan: Plan,
    world: World,
    train: Split,
    val: Split,
    copies: Mapping[str, Split],
) -> tuple[Loader, Loader]:
    """Open this process's loaders of the training and the validation images.

    Raises UserError for a back end that is not installed.
    """
    from fastimagenet.training.evaluation import autocast_dtype
    from fastimagenet.training.loaders import open_loader

    dtype = autocast_dtype(plan.recipe.precision, world.device.partition(":")[0])
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
    copies = read_copies(config.data.root, plan, train)
    images, copied = digest_of(train, val), digest_of(*copies.values())
    check_same_on_all_ranks(config, recipe, (len(train), len(val)), images + copied, world)
    autocast_dtype(recipe.precision, world.device.partition(":")[0])  # refuses before it builds
    torch.manual_seed(config.seed)
    model = build_model(recipe, len(train.classes))
    if recipe.whitening:
        whiten(model, config.data.backend, recipe, train, world)
    return Trainer(
        plan,
        model,
        *build_loaders(config, plan, world, train, val, copies),
        world=world,
        recorder=recorder,
        clock=clock,
        folder=folder,
        about={
            "classes": list(train.classes),
            "seed": config.seed,
            "images": images,
            "copies": copied,
            "rule": config.data.rule.to_plain(),
        },
        optimizer_backend=config.optimizer_backend,
        checkpoint_steps=config.checkpoint_steps,
        bucket_mb=config.bucket_mb,
        class_weights=class_weights(recipe, train),
    )


def class_weights(recipe: Recipe, train: Split) -> torch.Tensor | None:
    """Return the weight of each class in the training loss, (classes,) float32; None: all alike.

    (images / (classes x images of the class)) to the recipe's power; with 1 as scikit-learn's
    "balanced".
    """
    import torch

    if not recipe.class_weight_power:
        return None
    counts = np.bincount(train.labels, minlength=len(train.classes))
    weights = (len(train) / (len(counts) * counts)) ** recipe.class_weight_power
    return torch.from_numpy(weights).float()


def start_from_pretrained(trainer: Trainer) -> None:
    """Load the weights that the recipe starts from, if any, and say which.

    Every process does. Raises UserError naming the recipe's `pretrained`.
    """
    from fastimagenet.training.pretrained import load_pretrained

    recipe = trainer.plan.recipe
    if recipe.pretrained:
        found = load_pretrained(trainer.model, recipe, trainer.about["classes"])
        cli.say(trainer.world, found)


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
        "notes": [*config.notes, *data_notes(train, val, plan.recipe)],
        "run": run_id(),
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
    train, val = read_data(config.data, say_notes=True, recipe=recipe)
    check_target(recipe, len(train.classes))
    plan = Plan.of(recipe, world_size, len(train), config.global_batch)
    return "\n".join([*config.notes, described(plan, train, val)])


def train(
    config: RunConfig, argv: Sequence[str] | None = None, clock: Stopwatch | None = None
) -> tuple[int, Path | None]:
    """Train, in as many processes as the config asks for, and leave the files of the run.

    `argv`: the flags as they were typed, which are those of the processes that are started.
    Returns the exit status, 0 or 128 + the signal's number for a run that was stopped and has saved
    its state, and the folder; None where processes started on several nodes have chosen it.
    Raises UserError for the user's mistakes and NotWritten for files that are missing.
    """
    clock = clock or Stopwatch()
    recipe = with_copies(config.recipe, config.data.root)
    processes = Processes.of(config.launch)
    train, val = read_data(config.data, processes.is_first, config.notes, recipe)
    check_target(recipe, len(train.classes))
    plan = Plan.of(recipe, processes.world_size, len(train), config.global_batch)
    argv = config.flags() if argv is None else argv
    with RunFolder(config) as folder:
        argv = [*argv, *folder.take_for(processes)]
        work = partial(_train, folder, plan, train=train, val=val, clock=clock, argv=argv)
        seconds, name = sum(clock.read().values()), str(config.output or "")
        with deterministic(config.deterministic, recipe):
            status = processes.run("fastimagenet.train", argv, work, seconds, name)
        return status, folder.path or config.output


def _train(
    run_folder: RunFolder,
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
    from fastimagenet.report.summary import (
        RESULTS,
        missing_results,
        remove_results,
        write_result,
    )
    from fastimagenet.training.profiling import StepProfiler

    results = list(RESULTS)
    config = run_folder.shared(world)
    folder = config.folder
    recorder = None
    if world.is_main:
        sinks = Sinks(config.log, folder, {"data": config.data.name, **asdict(plan.recipe)})
        recorder = Recorder(folder, plan.total_steps, sinks=sinks)
    trainer = build_trainer(
        config, plan, world, train, val, clock, recorder=recorder, folder=folder
    )
    trainer.stop_at_target = config.stop_at_target
    # What was started again resumes from what it has left itself.
    flag = "auto" if run_folder.is_own else config.resume
    if flag is not None:
        trainer.resume(flag, elastic=bool(config.launch.min_nodes))
        missing = gather_objects(missing_results(folder), world, "a check")[0]
        if trainer.finished and not missing:
            cli.say(world, f"the run in {folder} is finished: nothing is left to train")
            return 0
        if trainer.finished:
            results = missing
    if not trainer.step:
        start_from_pretrained(trainer)
    if config.profile and world.is_main:
        trainer.profiler = StepProfiler(folder / "profile", trainer.device)
    cli.say(world, described(plan, train, val))
    if plan.recipe.compile:  # minutes, in which a signal has nothing to wait for
        trainer.compile_all_sizes()
    if world.is_main:
        if not trainer.finished:
            remove_results(folder)
        write_plan(config, plan, train, val)
    unwritten = trainer.recorder.unwritten
    begun = trainer.step
    with cli.stopping_on_signals(trainer) as stopped_by:
        try:
            trainer.fit()
        except Stopped:
            unwritten.share(world)
            unwritten.check()
            flags = f"--output {shlex.quote(str(folder))} --resume auto"
            cli.say(world, f"stopped at step {trainer.step}; resume with {flags}")
            return cli.stopped_status(stopped_by)
        except Exception as error:
            if trainer.step > begun:
                error.add_note(TRAINED)
            raise
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
) -> tuple[int, Path | None]:
    """Sweep the learning rate, in as many processes as the config asks for, and write the results.

    `argv`: the flags as they were typed, for the processes that are started.
    Returns the exit status, 0 or 128 + the signal's number if it was stopped, and the folder as
    `train` does.
    Raises UserError for the user's mistakes and NotWritten for files that are missing.
    """
    clock = clock or Stopwatch()
    recipe = with_copies(config.recipe, config.data.root)
    # A sweep leaves nothing that it could go on from.
    processes = Processes.of(replace(config.launch, max_restarts=0))
    argv = [*config.flags(), *settings.flags()] if argv is None else argv
    if processes.is_first:
        settings.check_recipe_out()
    train, val = read_data(config.data, processes.is_first, config.notes, recipe)
    plan = Plan.of(recipe, processes.world_size, len(train), config.global_batch)
    check_validation(plan, len(val))
    val = shuffled(val, config.seed)
    with RunFolder(config, "lr_find-") as folder:
        argv = [*argv, *folder.take_for(processes)]
        work = partial(_sweep, folder, settings, plan, train=train, val=val, clock=clock, argv=argv)
        name = str(config.output or "")
        with deterministic(config.deterministic, recipe):
            status = processes.run("fastimagenet.lr_find", argv, work, name=name)
        return status, folder.path or config.output


def shuffled(split: Split, seed: int) -> Split:
    """Return the same images in random order.

    Folders are listed by class, and a sweep evaluates each iteration on one batch.
    """
    return split.take(np.random.default_rng(seed).permutation(len(split)))


def _sweep(
    run_folder: RunFolder,
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

    config = run_folder.shared(world)
    started = time.strftime("%Y-%m-%dT%H:%M:%S")
    command = shlex.join(["python", "-m", "fastimagenet.lr_find", *argv])
    trainer = build_trainer(config, plan, world, train, val, clock)
    start_from_pretrained(trainer)
    cli.say(world, settings.describe(plan))
    if plan.recipe.compile:
        trainer.compile_all_sizes(plan.phases[:1])
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
