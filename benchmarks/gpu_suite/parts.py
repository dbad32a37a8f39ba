"""The parts of the GPU suite: what each runs, for how long at most, and what it leaves.

Every part is a command of its own. On a CPU the same commands run at tiny sizes: that rehearses the
suite, and its figures say nothing of a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.measuring import training_images
from fastimagenet.recipes import named_recipe
from fastimagenet.report.run import rows_of
from fastimagenet.training.recorder import read_rows
from pipelines.datasets.folders import find_split
from pipelines.files import Row, read_object
from pipelines.workers import num_cores

Words = list[str]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the suite was asked for."""

    device: str
    """ "cuda" or "cpu"."""
    data: Path | None = None
    """Photographs: train/CLASS/*, val/CLASS/*."""
    cifar10: Path | None = None
    dali_fails: str = ""
    """Why DALI decodes nothing on this device; "" where it does."""

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
    decodes: bool = False
    """With DALI."""
    alone: bool = False
    """In a process of its own, which it may take down, in place of the one of the others."""


def ceilings(setup: Setup, folder: Path, _: float) -> Words:
    run = [*words("benchmarks.research.device_ceilings", setup), *json(folder)]
    return [*run, "--seconds", "0.6" if setup.small else "6"]


def parity(setup: Setup, folder: Path, _: float) -> Words:
    """Compare few photographs: what decodes wrong on a GPU is wrong in the first of them."""
    sizes = ["32", "--images", "8", "--threads", "1"] if setup.small else ["224", "--images", "64"]
    run = [*words("pipelines.parity", setup), str(setup.data), "--image-size", *sizes]
    return [*run, "--output", str(folder)]


def gpu_tests(files: Words, keyword: str) -> Callable[[Setup, Path, float], Words]:
    """Return the command of the tests in the files that the keyword chooses."""

    def command(setup: Setup, folder: Path, _: float) -> Words:
        paths = [f"tests/gpu/test_{file}.py" for file in files]
        run = ["pytest", *paths, "-v", "--color=no", "-p", "no:cacheprovider"]
        return [*run, "-k", keyword] if keyword else run

    return command


def training(recipe: str) -> Callable[[Setup, Path, float], Words]:
    """Return the command of a run of the recipe."""

    def command(setup: Setup, folder: Path, _: float) -> Words:
        flags = flags_of(["compile=true"]) if recipe == "cifar10-speed" else []
        if setup.small:
            flags = ["--epochs", "2", *small_batches(recipe)]
        run = words("fastimagenet.train", setup, setup.cifar10, "memory")
        return [*run, "--recipe", recipe, *flags, "--output", str(folder / "run")]

    return command


def lr_finder(setup: Setup, folder: Path, _: float) -> Words:
    sweep = ["--num-it", "12", *small_batches("cifar10")] if setup.small else []
    run = words("fastimagenet.lr_find", setup, setup.cifar10, "memory")
    return [*run, "--recipe", "cifar10", *sweep, "--output", str(folder / "sweep")]


def stall(setup: Setup, folder: Path, _: float) -> Words:
    """Measure batches that a fast GPU needs, of the photographs themselves."""
    sizes: tuple[int, ...] = (128, 224)
    batch_size, turns = 512, ["--rounds", "3", "--seconds", "0.8"]
    if setup.small:
        sizes, batch_size, turns = (32,), 2, ["--rounds", "2", "--seconds", "0.1"]
    one = "{{epochs=1,image_size={},batch_size={},data='original'}}"
    phases = ",".join(one.format(size, batch_size) for size in sizes)
    settings = [f"phases=[{phases}]", f"lr_spans=[[0,{len(sizes)},1,1]]"]
    assert setup.data is not None
    data = named_again(setup.data, folder / "photographs", 4 * batch_size)
    run = words("benchmarks.throughput", setup, data, "auto")
    return [*run, "--recipe", "imagenet", *flags_of(settings), *turns, "--output", str(folder)]


def named_again(data: Path, folder: Path, count: int) -> Path:
    """Return the image folder; or `folder`, filled with links to its training images under so many
    names that there are at least `count`."""
    split = training_images(data)
    if len(split) >= count:
        return data
    for turn in range(-(-count // len(split))):
        for file, label in zip(split.files, split.labels, strict=True):
            image = Path(file.path)
            # Images of the same name may lie in several folders below that of their class.
            inside = image.relative_to(find_split(data, "train") / split.classes[label])
            link = folder / "train" / split.classes[label] / str(turn) / inside
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(image.resolve())
    (folder / "val").symlink_to(find_split(data, "val").resolve())
    return folder


def decode(setup: Setup, folder: Path, seconds: float) -> Words:
    run = [*words("benchmarks.research.decode_sweep", setup), *json(folder)]
    run += ["--data", str(setup.data)]
    if setup.small:
        sizes = ["--image-size", "32", "48", "--batch-size", "8", "--threads", "1", "2"]
        return [*run, *sizes, "--entries", "200", "--seconds", "0.1"]
    run += ["--image-size", "128", "224", "--batch-size", "512", "--seconds", "0.9"]
    return [*run, "--threads", str(min(16, num_cores())), "--limit", f"{seconds - 8:.0f}"]


def step(
    sizes: tuple[int, ...], variant: str, batches: tuple[int, ...]
) -> Callable[[Setup, Path, float], Words]:
    """Return the command of ResNet-50's training step."""

    def command(setup: Setup, folder: Path, _: float) -> Words:
        run = [*words("benchmarks.training_step", setup), *json(folder)]
        if setup.small:  # compiling takes minutes on a small CPU
            tiny = ["--sizes", "32", "--variants", "eager", "--batches", "2"]
            return [*run, "--seconds", "0.2", *tiny]
        run += ["--seconds", "1", "--sizes", *map(str, sizes), "--variants", variant]
        return [*run, "--batches", *map(str, batches)]

    return command


def step_rates(figures: dict[str, Row]) -> list[Row]:
    """Return all rates of the training step in the parts' figures, smallest images first."""
    rates = [rate for name in STEPS for rate in figures.get(name, {"rates": []})["rates"]]
    return sorted(rates, key=lambda rate: rate["image_size"])


def words(module: str, setup: Setup, data: Path | None = None, backend: str = "") -> Words:
    """Return the module with its device; with `data`: one process, which reads by `backend`."""
    found = [module, "--device", setup.device]
    if data is not None:
        one_process = ["--nproc-per-node", "1", "--backend", backend]
        found += ["--data", str(data), *one_process]
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


STEPS: dict[str, tuple[tuple[int, ...], str, tuple[int, ...], int]] = {
    "eager": ((128, 224, 160), "eager", (128, 512, 1024), 110),
    "compiled-224": ((224,), "compiled", (512,), 65),
    "graphs-224": ((224,), "graphs", (512,), 65),
    "graphs-128": ((128,), "graphs", (1024,), 60),
}
"""Image sizes, variant, batches and seconds."""
QUICK = "eager and not resnet50"
TESTS = {
    "tests-quick": (["training_step", "loaders"], f"({QUICK}) or outlives", 55),
    "tests-loaders": (["loaders"], "not outlives", 65),
    "tests-faults": (["gpu_faults"], "", 70),
    "tests-step": (["training_step"], f"not ({QUICK})", 150),
    "tests-training": (["training"], "", 150),
}
"""Files in tests/gpu, which of their tests, and seconds. That a batch outlives the next ones is
seen early: on an H100 the hardware decoder is reported to write before its stream lets it
(meta-pytorch/torchcodec#1634)."""
CIFAR10 = {"cifar10-speed": 70, "cifar10": 45}
"""Recipes and seconds; the first one is compiled before its clock starts."""


def step_part(name: str) -> Part:
    sizes, variant, batches, seconds = STEPS[name]
    at = ", ".join(map(str, sizes))
    return Part(
        name=name, title=f"ResNet-50's training step, {variant}, {at} px", seconds=seconds,
        command=step(sizes, variant, batches), read=read_json("result.json"),
    )  # fmt: skip


def test_part(name: str) -> Part:
    files, keyword, seconds = TESTS[name]
    chosen = f", {keyword}" if keyword else ""
    return Part(
        name=name, title=f"Tests in tests/gpu, {' and '.join(files)}{chosen}", seconds=seconds,
        command=gpu_tests(files, keyword), read=read_tests, alone=True,
    )  # fmt: skip


PARTS = (
    Part(
        name="ceilings", title="What the device does at most", seconds=30,
        command=ceilings, read=read_json("result.json"),
    ),
    Part(
        name="parity", title="DALI's pixels against torchvision's", seconds=40,
        command=parity, read=read_json("parity.json"), needs="data", decodes=True,
    ),
    step_part("eager"),
    Part(
        name="decode", title="DALI's decoding of photographs", seconds=75,
        command=decode, read=read_json("result.json"), needs="data", decodes=True,
    ),
    Part(
        name="stall", title="What reading costs the training, phase by phase", seconds=90,
        command=stall, read=read_json("throughput.json"), needs="data", decodes=True,
    ),
    *(step_part(name) for name in STEPS if name != "eager"),
    test_part("tests-quick"),
    *(
        Part(
            name=recipe, title=f"CIFAR-10, recipe {recipe}", seconds=seconds,
            command=training(recipe), read=read_run, needs="cifar10",
        )
        for recipe, seconds in CIFAR10.items()
    ),
    test_part("tests-loaders"),
    test_part("tests-faults"),
    Part(
        name="lr-finder", title="LR finder on CIFAR-10", seconds=25,
        command=lr_finder, read=read_json("sweep/lr_find.json"), needs="cifar10",
    ),
    test_part("tests-step"),
    test_part("tests-training"),
)  # fmt: skip
"""In the order in which they run, the most telling first: a visit of 15 minutes ends before the
last ones. What a part leaves of its time goes to those after it."""
