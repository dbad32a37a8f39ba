"""Variants of a recipe x seeds, each a `python -m fastimagenet.train` in a folder of its own.

What is finished stays, what was stopped resumes: the same command continues where it ended.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from fastimagenet.config import changed_recipe, chosen_recipe
from fastimagenet.images import with_copies
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Recipe
from fastimagenet.report.run import rows_of
from fastimagenet.training.recorder import read_rows
from pipelines.backends import BACKENDS
from pipelines.cli import Parser, at_least, output_folder
from pipelines.datasets.known import dataset_name
from pipelines.datasets.split import check_classes, read_split
from pipelines.errors import UserError
from pipelines.files import Row, read_object
from pipelines.signals import stop_signals

DATA_AND_DEVICE = (
    *("data", "skip_list", "on_bad_image", "val_fraction", "labels"),
    *("backend", "device", "timeout"),
)
"""Flags of `train` that the commands have, too, and pass on."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the matrix: what is trained with every seed."""

    name: str
    recipe: Recipe
    """As `train` makes it of the flags."""
    flags: list[str]
    """Of `train`, beside --data, --seed, --output and --resume."""
    num_train: int
    """Training images."""
    global_batch: int | None = None
    """--global-batch."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One variant with one seed, in its own folder."""

    run: str
    seed: int
    plan: Plan
    folder: Path
    flags: list[str]
    """Of `python -m fastimagenet.train`."""

    @property
    def finished(self) -> bool:
        """Whether the training has ended."""
        return (self.folder / "summary.json").exists()

    @property
    def title(self) -> str:
        """The name in messages."""
        return f"run {self.run}, seed {self.seed}"

    @property
    def summary(self) -> Row:
        """What the finished training has left."""
        return read_object(self.folder / "summary.json")

    @property
    def epochs(self) -> list[Row]:
        """The epochs' rows."""
        return rows_of("epoch", read_rows(self.folder))

    def check_folder(self, data: str) -> None:
        """Raise UserError if the folder holds a run of another recipe, of other data or batches, or
        a finished one that was read or computed by other means."""
        path = self.folder / "plan.json"
        if not path.exists():
            return
        found = read_object(path)
        wanted = json.loads(json.dumps(self.plan.to_dict() | {"data": data}))
        facts = ("data", "num_train", "world_size")
        other = [name for name in facts if found.get(name) != wanted[name]]
        recipe = found.get("recipe", {})
        other += [f"recipe field {k}" for k, v in wanted["recipe"].items() if recipe.get(k) != v]
        if found.get("accumulation", 1) != wanted["accumulation"]:
            other.append("--global-batch")
        if other:
            raise UserError(
                f"--output: {self.folder} holds a run with another {', '.join(other)}: give the "
                "--data, --set, --epochs, --global-batch and --precision that it began with, or "
                "name another folder"
            )
        if not self.finished:  # a resume may change what follows, and the run tells of it
            return
        summary = self.summary
        command = shlex.split(summary.get("command", ""))
        for name in ("backend", "device"):
            asked, began = (value_of(f"--{name}", words) for words in (self.flags, command))
            if asked not in (began, summary.get(name)):
                raise UserError(
                    f"--{name} {asked}: --output {self.folder} holds a run that was finished with "
                    f"--{name} {began}: give that, or name another folder"
                )


def value_of(flag: str, words: Sequence[str]) -> str:
    """Return what follows a flag of `train` whose default is "auto"."""
    return words[words.index(flag) + 1] if flag in words else "auto"


@dataclass(kw_only=True)
class Matrix:
    """Trainings in the order in which they run: seed by seed, so that what disturbs the machine
    disturbs all variants alike, and a stopped matrix has something of each."""

    trainings: list[Training]
    failed: list[Training] = field(default_factory=list)
    """Those that ended with an error in this call."""

    @classmethod
    def of(
        cls,
        variants: Sequence[Variant],
        seeds: Sequence[int],
        output: Path,
        data: Path,
        world_size: int = 1,
        folder: Callable[[str, int], str] = "{}-seed{}".format,
    ) -> Matrix:
        """Plan all trainings. Raises UserError where a recipe cannot be planned, and where a folder
        holds another run."""
        trainings = []
        for seed in seeds:
            for variant in variants:
                path = output / folder(variant.name, seed)
                flags = ["--seed", str(seed), "--output", str(path), "--resume", "auto"]
                recipe = with_copies(variant.recipe, data)
                num_train, batch = variant.num_train, variant.global_batch
                plan = Plan.of(recipe, world_size, num_train, batch)
                flags = [*variant.flags, *flags]
                trainings.append(
                    Training(run=variant.name, seed=seed, plan=plan, folder=path, flags=flags)
                )
        for training in trainings:
            training.check_folder(os.path.abspath(data))
        return cls(trainings=trainings)

    @property
    def finished(self) -> list[Training]:
        """Those that have ended, in order."""
        return [training for training in self.trainings if training.finished]

    def run(
        self,
        around: Callable[[Training], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> int:
        """Train what is not finished, one after the other; returns the exit status.

        A stop signal makes the training save and exit, and ends the matrix. A training that fails,
        as one does whose loss is not finite any more, is added to `failed`, and the others go on:
        status 1. `around` is entered before each training and left after it.
        """
        child: subprocess.Popen[bytes] | None = None

        def stop() -> None:
            if child is not None:
                child.terminate()

        with stop_signals(stop) as signals:
            for training in self.trainings:
                if training.finished:
                    print(f"{training.title}: finished before, in {training.folder}", flush=True)
                    continue
                command = ["-m", "fastimagenet.train", *training.flags]
                print(f"\n{training.title}: {shlex.join(['python', *command])}", flush=True)
                with around(training):
                    # In a session of its own: Ctrl-C reaches it by us alone, as SIGTERM.
                    child = subprocess.Popen([sys.executable, *command], start_new_session=True)
                    if signals.number:  # before there was a child to stop
                        child.terminate()
                    status = child.wait()
                if signals.number:
                    print(f"{training.title}: stopped; the same command resumes", flush=True)
                    return 128 + signals.number
                if status:
                    print(f"{training.title}: ended with status {status}", file=sys.stderr)
                    self.failed.append(training)
        return int(bool(self.failed))

    @property
    def failed_text(self) -> str:
        """A sentence of which have failed; "" for none."""
        titles = "; ".join(training.title for training in self.failed)
        return f"Failed with an error: {titles}." if titles else ""


def measured(summaries: Sequence[Row], command: str) -> Row:
    """Return the head of a result: what was run on what, and when, by the runs' summaries.

    The runs may have been made on several machines: different values are listed.
    """
    versions = [summary["versions"] for summary in summaries]
    return {
        "command": command,
        "date": max(summary["started"] for summary in summaries)[:10],
        **{
            name: ", ".join(dict.fromkeys(summary[name] for summary in summaries))
            for name in ("hardware", "precision")
        },
        "versions": {
            name: ", ".join(dict.fromkeys(one.get(name, "none") for one in versions))
            for name in versions[0]
        },
    }


@dataclass(frozen=True, kw_only=True)
class Data:
    """What was trained and validated on."""

    name: str
    dataset: str | None
    """ "CIFAR10" where the classes are CIFAR-10's."""
    train_images: int
    val_images: int
    suffixes: dict[str, int]
    """Images of both splits by the end of their file names, such as ".png"."""

    @property
    def is_cifar10(self) -> bool:
        """Whether it is all of CIFAR-10."""
        counts = (self.train_images, self.val_images)
        return self.dataset == "CIFAR10" and counts == (50_000, 10_000)

    @property
    def is_jpeg(self) -> bool:
        """Whether any image is compressed with loss, by its name."""
        return not {".jpg", ".jpeg"}.isdisjoint(self.suffixes)

    @property
    def counts(self) -> str:
        """Both numbers of images and the kinds of files, in words."""
        images = f"{self.train_images:,} training and {self.val_images:,} validation images"
        return f"{images} ({', '.join(self.suffixes)})"


def describe(folder: Path) -> Data:
    """Count the images. Raises UserError naming the folder."""
    train, val = (read_split(folder, split, check_files=False) for split in ("train", "val"))
    check_classes(train, val)
    suffixes = Counter(Path(file.path).suffix.lower() for file in (*train.files, *val.files))
    return Data(
        name=folder.resolve().name,
        dataset=dataset_name(train.classes),
        train_images=len(train),
        val_images=len(val),
        suffixes=dict(suffixes),
    )


def add_matrix_flags(parser: Parser, runs: int, output: Path) -> None:
    """Add the flags of commands that train on all of a data set, by one process each."""
    add = parser.add_argument
    add("--runs", type=at_least(1), default=runs, metavar="N", help=f"seeds; default {runs}")
    add("--seed", type=at_least(0), default=0, metavar="S", help="the first seed; default 0")
    help_text = f"default {output}"
    add("--output", type=output_folder, default=output, metavar="DIR", help=help_text)
    add_training_flags(parser)


def add_training_flags(parser: Parser) -> None:
    """Add what `variant` reads beside --data."""
    add = parser.add_argument
    add("--epochs", type=int, metavar="E", help="a rehearsal: stretch the recipes to E epochs")
    help_text = "a rehearsal: change a recipe field in all runs; repeatable"
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help=help_text)
    help_text = "as of train; default memory: decoded once, so that no loader holds a GPU back"
    add("--backend", choices=BACKENDS, default="memory", help=help_text)
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="as of train")


def set_flags(settings: Sequence[str]) -> list[str]:
    """Return recipe fields, FIELD=VALUE, as flags of `train`."""
    return [word for setting in settings for word in ("--set", setting)]


def variant(
    args: argparse.Namespace, name: str, recipe: str, num_train: int, settings: Sequence[str] = ()
) -> Variant:
    """Return the recipe as the flags of `add_training_flags` change it, then `settings`.

    `recipe`: its name, or a TOML file. One process: its batch size is then that of all together.
    """
    flags = ["--recipe", recipe, "--data", str(args.data), "--nproc-per-node", "1"]
    flags += ["--backend", args.backend, "--device", args.device]
    changes = [*args.set, *settings]
    flags += set_flags(changes)
    flags += [] if args.epochs is None else ["--epochs", str(args.epochs)]
    changed, _ = changed_recipe(chosen_recipe(recipe)[0], changes, args.epochs)
    return Variant(name=name, recipe=changed, flags=flags, num_train=num_train)
