"""The parts of the GPU suite: what each runs, for how long at most, and what it leaves.

Every part is a command of its own, so that an error on the GPU ends with its process. On a CPU the
same commands run at tiny sizes: that rehearses the suite, and its figures say nothing of a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastimagenet.recipes import RECIPES, named_recipe
from fastimagenet.report.run import rows_of
from fastimagenet.training.recorder import read_rows
from pipelines.files import Row, read_object

Words = list[str]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the suite was asked for."""

    device: str
    """ "cuda" or "cpu"."""
    data: Path | None = None
    """Photographs: train/CLASS/*, val/CLASS/*."""
    cifar10: Path | None = None

    @property
    def small(self) -> bool:
        """Whether this only rehearses."""
        return self.device == "cpu"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part."""

    name: str
    title: str
    seconds: int
    """What it is given; what earlier parts left comes on top."""
    command: Callable[[Setup, Path, float], Words]
    """From the setup, the part's folder and its seconds: what follows `python -m`."""
    read: Callable[[Path], Row]
    """The figures in its folder, as far as it got; {} for none."""
    needs: str = ""
    """The field of the setup without which it cannot run."""


def ceilings(setup: Setup, folder: Path, _: float) -> Words:
    run = [*words("benchmarks.research.device_ceilings", setup), *json(folder)]
    return [*run, "--seconds", "0.6" if setup.small else "6"]


def gpu_tests(name: str) -> Callable[[Setup, Path, float], Words]:
    """Return the command of a file of tests, in a process that it can take down."""

    def command(setup: Setup, folder: Path, _: float) -> Words:
        return ["pytest", f"tests/gpu/test_{name}.py", "-v", "--color=no", "-p", "no:cacheprovider"]

    return command


def training(recipe: str) -> Callable[[Setup, Path, float], Words]:
    """Return the command of a run of the recipe."""

    def command(setup: Setup, folder: Path, _: float) -> Words:
        flags = flags_of(["compile=true"]) if recipe == "cifar10-speed" else []
        if setup.small:
            flags = ["--epochs", "2", *small_batches(recipe)]
        run = words("fastimagenet.train", setup, "cifar10", "memory")
        return [*run, "--recipe", recipe, *flags, "--output", str(folder / "run")]

    return command


def lr_finder(setup: Setup, folder: Path, _: float) -> Words:
    sweep = ["--num-it", "12", *small_batches("cifar10")] if setup.small else []
    run = words("fastimagenet.lr_find", setup, "cifar10", "memory")
    return [*run, "--recipe", "cifar10", *sweep, "--output", str(folder / "sweep")]


def stall(setup: Setup, folder: Path, _: float) -> Words:
    """Measure the recipe `imagenet` on the photographs themselves even where there are copies."""
    settings = [f"phases.{i}.data=original" for i in range(len(named_recipe("imagenet").phases))]
    turns = ["--rounds", "3", "--seconds", "0.8"]
    if setup.small:
        settings = ["phases=[{epochs=1,image_size=32,batch_size=2,data='original'}]"]
        settings += ["lr_spans=[[0,1,1,1]]"]
        turns = ["--rounds", "2", "--seconds", "0.1"]
    run = words("benchmarks.throughput", setup, "data", "auto")
    return [*run, "--recipe", "imagenet", *flags_of(settings), *turns, "--output", str(folder)]


def decode(setup: Setup, folder: Path, seconds: float) -> Words:
    run = [*words("benchmarks.research.decode_sweep", setup), *json(folder)]
    run += ["--data", str(setup.data)]
    if setup.small:
        sizes = ["--image-size", "32", "48", "--batch-size", "8", "--threads", "1", "2"]
        return [*run, *sizes, "--entries", "200", "--seconds", "0.1"]
    return [*run, "--limit", f"{seconds - 8:.0f}"]


def steps(setup: Setup, folder: Path, seconds: float) -> Words:
    run = [*words("benchmarks.gpu_suite.steps", setup), *json(folder)]
    if setup.small:  # compiling takes minutes on a small CPU
        sizes = ["--image-size", "32", "--batch-size", "2", "--variants"]
        return [*run, "--seconds", "0.2", *sizes]
    # A variant begun within the limit compiles for up to a minute.
    return [*run, "--limit", f"{max(30.0, seconds - 60):.0f}"]


def words(module: str, setup: Setup, data: str = "", backend: str = "") -> Words:
    """Return the module with its device; with `data`: one process, which reads by `backend`."""
    found = [module, "--device", setup.device]
    if data:
        one_process = ["--nproc-per-node", "1", "--backend", backend]
        found += ["--data", str(getattr(setup, data)), *one_process]
    return found


def small_batches(recipe: str) -> Words:
    """Return flags that make the recipe one for a few hundred images and a small CPU."""
    phases = range(len(named_recipe(recipe).phases))
    return flags_of(["compile=false", *(f"phases.{i}.batch_size=50" for i in phases)])


def flags_of(settings: Words) -> Words:
    """Return recipe fields as flags."""
    return [word for setting in settings for word in ("--set", setting)]


def json(folder: Path) -> Words:
    return ["--json", str(folder / "result.json")]


def read_json(name: str) -> Callable[[Path], Row]:
    """Return a function that reads the file `name` of a folder."""

    def read(folder: Path) -> Row:
        path = folder / name
        return read_object(path) if path.exists() else {}

    return read


OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
TEST = re.compile(rf"^(tests/\S+::.+?) +(?:({OUTCOMES})\b(?: (\(.*\)))?.*)?$", re.M)
"""A line of pytest -v. A test's name is there before it begins, its outcome once it has ended."""


def read_tests(folder: Path) -> Row:
    """Count the outcomes, and name what did not pass and what was skipped, with why."""
    log = folder / "log.txt"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    names: dict[str, list[str]] = {}
    for name, outcome, reason in TEST.findall(text):
        names.setdefault(outcome.lower() or "unfinished", []).append(f"{name} {reason}".rstrip())
    bad = ("failed", "error", "unfinished")
    return {
        "counts": {outcome: len(found) for outcome, found in names.items()},
        "not_passed": [name for outcome in bad for name in names.get(outcome, [])],
        "skipped": names.get("skipped", []),
    }


RUN_FIELDS = (
    *("recipe", "model", "data", "dataset", "device", "precision", "backend", "hardware"),
    *("epochs", "steps", "top1", "tta_top1", "train_seconds", "eval_seconds", "wall_seconds"),
    *("time_split_seconds", "images_per_sec", "target", "time_to_target_seconds", "seed"),
)


def read_run(folder: Path) -> Row:
    """Read the run's summary, and accuracy by training time of its evaluated epochs."""
    summary = read_json("run/summary.json")(folder)
    epochs = [
        {name: row[name] for name in ("epoch", "train_seconds", "image_size", "top1")}
        for row in rows_of("epoch", read_rows(folder / "run"))
        if row["top1"] is not None
    ]
    if not summary and not epochs:
        return {}
    return {name: summary[name] for name in RUN_FIELDS if name in summary} | {"evaluated": epochs}


TESTS = {"loaders": 30, "training": 50, "training_step": 50, "gpu_faults": 30}
"""Files in tests/gpu and seconds."""
CIFAR10 = {"cifar10": 35, "cifar10-speed": 55}
"""Recipes and seconds; the second one is compiled before its clock starts."""


PARTS = (
    Part(
        name="ceilings", title="What the device does at most", seconds=15,
        command=ceilings, read=read_json("result.json"),
    ),
    *(
        Part(
            name=f"tests-{name}", title=f"The tests in tests/gpu/test_{name}.py", seconds=seconds,
            command=gpu_tests(name), read=read_tests,
        )
        for name, seconds in TESTS.items()
    ),
    *(
        Part(
            name=recipe, title=f"CIFAR-10, recipe {recipe}", seconds=seconds,
            command=training(recipe), read=read_run, needs="cifar10",
        )
        for recipe, seconds in CIFAR10.items()
        if recipe in RECIPES
    ),
    Part(
        name="lr-finder", title="LR finder on CIFAR-10", seconds=25,
        command=lr_finder, read=read_json("sweep/lr_find.json"), needs="cifar10",
    ),
    Part(
        name="stall", title="What reading costs the training, phase by phase", seconds=60,
        command=stall, read=read_json("throughput.json"), needs="data",
    ),
    Part(
        name="decode", title="DALI's decoding of photographs", seconds=30,
        command=decode, read=read_json("result.json"), needs="data",
    ),
    Part(
        name="steps", title="The training step of ResNet-50", seconds=90,
        command=steps, read=read_json("result.json"),
    ),
)  # fmt: skip
"""In the order in which they run: together less than eight minutes, and the last ones, which
measure as much as there is time for, get what the others left."""
