"""What finished runs say, as data: of each seed, of each run and all together."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import fmean

from benchmarks.trainings import Training
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.superconvergence import STUDY
from fastimagenet.report.run import rows_of
from fastimagenet.training.recorder import read_rows
from pipelines.files import Row, read_object

ACCURACY = (
    "plain top-1 of all validation images after the last epoch: mean over n seeds, lowest .. "
    "highest"
)


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


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """What one training gave. Times in seconds, accuracies as fractions."""

    seed: int
    folder: str
    started: str
    top1: float
    """After the last epoch: the figure that counts."""
    best_top1: float
    """Of all epochs."""
    train_seconds: float
    wall_seconds: float
    images_per_sec: float


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run gave over its n seeds; accuracies as fractions."""

    run: str
    recipe: Row
    iterations: int
    published: Row | None
    """The study's own values and top1; None for the comparison, which has none."""
    n: int
    seeds: list[SeedResult]
    mean: float
    lowest: float
    highest: float
    difference_points: float | None
    """100 (mean - published); None without a published figure, and for a rehearsal."""
    train_seconds: float
    images_per_sec: float
    """Means, as the one before."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything measured, on what, and when."""

    command: str
    date: str
    hardware: str
    precision: str
    versions: dict[str, str]
    data: Data
    rehearsal: str
    """What makes it another experiment than the published one; "" if nothing does."""
    accuracy: str
    runs: list[RunResult]


def read_results(trainings: list[Training], data: Data, rehearsal: str, command: str) -> Result:
    """The finished ones among `trainings`, of which there must be one."""
    finished = [training for training in trainings if training.finished]
    summaries = [read_object(training.folder / "summary.json") for training in finished]
    plans = {training.run: training.plan for training in finished}
    return Result(
        command=command,
        date=max(summary["started"] for summary in summaries)[:10],
        hardware=each([summary["hardware"] for summary in summaries]),
        precision=each([summary["precision"] for summary in summaries]),
        versions={
            name: each([summary["versions"].get(name, "none") for summary in summaries])
            for name in summaries[0]["versions"]
        },
        data=data,
        rehearsal=rehearsal,
        accuracy=ACCURACY,
        runs=[
            run_result(run, plan, [seed_result(t) for t in finished if t.run == run], rehearsal)
            for run, plan in plans.items()
        ],
    )


def each(values: list[str]) -> str:
    """All different ones; the runs may have been made on several machines."""
    return ", ".join(dict.fromkeys(values))


def run_result(run: str, plan: Plan, seeds: list[SeedResult], rehearsal: str) -> RunResult:
    """Of the finished seeds of one run."""
    published = STUDY.get(run)
    top1 = [seed.top1 for seed in seeds]
    mean = fmean(top1)
    return RunResult(
        run=run,
        recipe=asdict(plan.recipe),
        iterations=plan.total_steps,
        published=asdict(published) if published else None,
        n=len(seeds),
        seeds=seeds,
        mean=mean,
        lowest=min(top1),
        highest=max(top1),
        difference_points=100 * (mean - published.top1) if published and not rehearsal else None,
        train_seconds=fmean(seed.train_seconds for seed in seeds),
        images_per_sec=fmean(seed.images_per_sec for seed in seeds),
    )


def seed_result(training: Training) -> SeedResult:
    """Of one finished training."""
    summary = read_object(training.folder / "summary.json")
    epochs = rows_of("epoch", read_rows(training.folder))
    return SeedResult(
        seed=training.seed,
        folder=str(training.folder),
        started=summary["started"],
        top1=summary["top1"],
        best_top1=max(row["top1"] for row in epochs if row["top1"] is not None),
        train_seconds=summary["train_seconds"],
        wall_seconds=summary["wall_seconds"],
        images_per_sec=summary["images_per_sec"],
    )
