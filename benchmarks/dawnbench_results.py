"""What the seeded runs of a recipe say together: as data, as a table, and one as an entry."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_high

from benchmarks.intervals import estimate
from benchmarks.run_table import markdown
from benchmarks.trainings import Training
from fastimagenet.report.dawnbench import CLOCKS, clocks_at_target, result_hours, write_entry
from fastimagenet.report.run import rows_of
from fastimagenet.training.recorder import read_rows
from pipelines.files import Row, read_object, write_object, write_text
from pipelines.formats import NO_BREAK, duration, percent

ENERGY = "energy.json"
"""In a run's folder: {"gpu_kwh": of the whole process}."""


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """One finished run; accuracies as fractions."""

    seed: int
    folder: str
    epochs: int
    top1: float
    top5: float
    seconds: dict[str, float] | None
    """To the target, by each clock of CLOCKS; None: it was missed."""
    wall_seconds: float
    """Of the whole run."""
    gpu_kwh: float | None
    """Of the whole process; None: not measured."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """All runs, on what, and when. Intervals are over the runs that reached the target."""

    command: str
    date: str
    recipe: Row
    data: str
    device: str
    hardware: str
    precision: str
    versions: dict[str, str]
    target: Row
    """{"metric", "value"}."""
    planned: int
    """Runs that were asked for."""
    n: int
    """Runs that are finished."""
    failed_seeds: list[int]
    """Of runs that ended with an error, such as a loss that is not finite."""
    reached: int
    success_rate: float
    """reached / (n + failed)."""
    clocks: dict[str, str]
    """What each clock counts."""
    seconds_to_target: dict[str, Row]
    """By clock: mean, low, high (95 % interval; null from a single run); {} if none reached it."""
    cost_per_hour: float | None
    cost_usd: Row | None
    """Of the training clock to the target, as DAWNBench has it; null without a price."""
    gpu_kwh: Row | None
    """Of the whole processes; null where NVML did not tell for every run."""
    median_seed: int | None
    """The run whose entry it is; of two in the middle the slower one."""
    entry_hours: float | None
    """Its result by the contest's rules."""
    runs: list[SeedResult]


def read_results(
    finished: list[Training],
    failed_seeds: list[int],
    planned: int,
    cost_per_hour: float | None,
    command: str,
    output: Path,
) -> Result:
    """From the files of at least one finished run. The entry of the median goes to `output`/entry.

    Raises UserError where that is not valid by the contest's rules.
    """
    summaries = [read_object(training.folder / "summary.json") for training in finished]
    summary, target = summaries[-1], summaries[-1]["target"]
    metric, value = target["metric"], target["value"]
    runs = [
        seed_result(training, row, metric, value)
        for training, row in zip(finished, summaries, strict=True)
    ]
    reached = [run.seconds for run in runs if run.seconds is not None]
    middle = median_high(seconds["train"] for seconds in reached) if reached else None
    of_median = [run for run in runs if run.seconds and run.seconds["train"] == middle]
    hours = [seconds["train"] / 3600 for seconds in reached]
    energies = [run.gpu_kwh for run in runs if run.gpu_kwh is not None]
    return Result(
        command=command,
        date=max(row["started"] for row in summaries)[:10],
        recipe=finished[-1].plan.to_dict()["recipe"],
        data=summary["dataset"],
        device=summary["device"],
        hardware=", ".join(dict.fromkeys(row["hardware"] for row in summaries)),
        precision=summary["precision"],
        versions=summary["versions"],
        target=target,
        planned=planned,
        n=len(runs),
        failed_seeds=failed_seeds,
        reached=len(reached),
        success_rate=len(reached) / (len(runs) + len(failed_seeds)),
        clocks=CLOCKS,
        seconds_to_target={
            clock: spread([seconds[clock] for seconds in reached]) for clock in CLOCKS if reached
        },
        cost_per_hour=cost_per_hour,
        cost_usd=(
            spread([cost_per_hour * value for value in hours])
            if cost_per_hour is not None and hours
            else None
        ),
        gpu_kwh=spread(energies) if len(energies) == len(runs) else None,
        median_seed=of_median[0].seed if of_median else None,
        entry_hours=(
            copy_entry(Path(of_median[0].folder), output / "entry", metric, value)
            if of_median
            else None
        ),
        runs=runs,
    )


def seed_result(training: Training, summary: Row, metric: str, value: float) -> SeedResult:
    """Of one finished run."""
    folder = training.folder
    epochs = rows_of("epoch", read_rows(folder))
    compile_seconds = summary["time_split_seconds"]["compile"]
    energy = folder / ENERGY
    return SeedResult(
        seed=training.seed,
        folder=str(folder),
        epochs=summary["epochs"],
        top1=summary["top1"],
        top5=summary["top5"],
        seconds=clocks_at_target(epochs, metric, value, compile_seconds),
        wall_seconds=summary["wall_seconds"],
        gpu_kwh=read_object(energy)["gpu_kwh"] if energy.exists() else None,
    )


def spread(values: list[float]) -> Row:
    """Mean and 95 % interval by Student's t; one value has no interval."""
    if len(values) == 1:
        return {"mean": values[0], "low": None, "high": None}
    return asdict(estimate(values))


def copy_entry(run: Path, folder: Path, metric: str, value: float) -> float:
    """The entry of a run that reached its target, checked, into `folder`; its result in hours."""
    for stale in folder.glob("*.[jt]s*"):
        stale.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    copies = [Path(shutil.copy(path, folder)) for path in write_entry(run)]
    return result_hours(copies[0], copies[1], metric, value)


def write_results(result: Result, folder: Path) -> str:
    """dawnbench.json and table.md; returns the table."""
    write_object(folder / "dawnbench.json", asdict(result))
    text = table(result)
    write_text(folder / "table.md", text)
    return text


def table(result: Result) -> str:
    """Markdown: how many reached the target, how long by each clock, what it cost."""
    metric, value = result.target["metric"], result.target["value"]
    goal = f"{metric.replace('top', 'top-')} of {100 * value:g} %"
    lines = [
        f"# {result.recipe['name']} on {result.data} to {goal}",
        "",
        f"{result.hardware}; {result.precision}; torch {result.versions['torch']}, "
        f"Python {result.versions['python']}; {result.date}.",
        "",
        success_text(result),
        "",
    ]
    if result.reached:
        rows = [
            (clock, interval_text(value, duration), *seconds_of(result, clock))
            for clock, value in result.seconds_to_target.items()
        ]
        seeds = [f"seed {run.seed}" for run in result.runs]
        lines += [markdown([("time to target", "mean (95 % interval)", *seeds), *rows]), ""]
    rows = [
        (str(run.seed), str(run.epochs), percent(run.top1), percent(run.top5))
        for run in result.runs
    ]
    lines += [markdown([("seed", "epochs", "last top-1", "last top-5"), *rows]), ""]
    lines += [f"- `{clock}`: {words}" for clock, words in result.clocks.items()]
    lines += [f"- cost: {cost_text(result)}", f"- energy of the GPUs: {energy_text(result)}"]
    if result.entry_hours is not None:
        lines += [
            f"- DAWNBench entry of the median run, seed {result.median_seed}: "
            f"{result.entry_hours:.8f} hours, in `entry/`"
        ]
    return "\n".join(lines).replace(NO_BREAK, " ") + "\n"


def success_text(result: Result) -> str:
    """How many of how many."""
    text = f"{result.reached} of {result.n} finished runs reached the target"
    if result.failed_seeds:
        text += f"; failed with an error: seed {', '.join(map(str, result.failed_seeds))}"
    missing = result.planned - result.n - len(result.failed_seeds)
    return text + (f"; {missing} not finished." if missing else ".")


def seconds_of(result: Result, clock: str) -> list[str]:
    """One clock of every run."""
    return [
        "missed" if run.seconds is None else duration(run.seconds[clock]) for run in result.runs
    ]


def interval_text(value: Row, text: Callable[[float], str]) -> str:
    """Such as "24 s (20 s .. 28 s)"."""
    if value["low"] is None:
        return f"{text(value['mean'])} (one run)"
    return f"{text(value['mean'])} ({text(value['low'])} .. {text(value['high'])})"


def cost_text(result: Result) -> str:
    """In US dollars."""
    if result.cost_per_hour is None:
        return "no --cost-per-hour was given"
    if result.cost_usd is None:
        return "no run reached the target"
    mean = interval_text(result.cost_usd, lambda value: f"${value:.4g}")
    return f"{mean} to the target by the training clock, at ${result.cost_per_hour:g} an hour"


def energy_text(result: Result) -> str:
    """In kWh."""
    if result.gpu_kwh is None:
        return "not measured"
    return interval_text(result.gpu_kwh, lambda value: f"{value:.4g} kWh") + " a run"
