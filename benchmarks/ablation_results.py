"""What the finished runs of an ablation say: as data, and as a Markdown table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from statistics import fmean
from typing import Any

from benchmarks.intervals import estimate
from benchmarks.run_results import Data, each
from benchmarks.run_table import markdown
from benchmarks.trainings import Training
from pipelines.files import read_object
from pipelines.formats import NO_BREAK, duration, percent

FULL = "all"
"""The name of the runs in which nothing is switched off."""

HEADER = ("switched off", "n", "top-1", "with TTA", "difference (points)", "train", "wall")


def read_ablation(trainings: list[Training], data: Data, command: str) -> dict[str, Any]:
    """All that is finished, in plain values: times in seconds, accuracies as fractions.

    Differences to the whole recipe, in points of `judged`, are means over the seeds that both have.
    At least one run of the whole recipe must be finished.
    """
    finished = [training for training in trainings if training.finished]
    summaries = {
        (training.run, training.seed): read_object(training.folder / "summary.json")
        for training in finished
    }
    judged = "top1" if next(iter(summaries.values()))["tta_top1"] is None else "tta_top1"
    rows = []
    for run in dict.fromkeys(run for run, _ in summaries):
        own = {seed: summary for (name, seed), summary in summaries.items() if name == run}
        points = [
            100 * (summary[judged] - summaries[FULL, seed][judged])
            for seed, summary in own.items()
            if (FULL, seed) in summaries
        ]
        row: dict[str, Any] = {"run": run, "seeds": list(own)}
        for field in ("top1", "tta_top1", "train_seconds", "wall_seconds"):
            values = [summary[field] for summary in own.values()]
            row[field] = None if None in values else interval(values)
        row["difference_points"] = interval(points) if points and run != FULL else None
        row["summaries"] = list(own.values())
        rows.append(row)
    values = list(summaries.values())
    return {
        "command": command,
        "date": max(summary["started"] for summary in values)[:10],
        "recipe": values[0]["recipe"],
        "epochs": values[0]["epochs"],
        "hardware": each([summary["hardware"] for summary in values]),
        "precision": each([summary["precision"] for summary in values]),
        "versions": values[0]["versions"],
        "data": asdict(data),
        "judged": judged,
        "rows": rows,
    }


def interval(values: list[float]) -> dict[str, Any]:
    """The mean of the values, which are kept, and where there are two its 95 % interval."""
    result: dict[str, Any] = {"mean": fmean(values), "values": values}
    if len(values) > 1:
        found = estimate(values)
        result |= {"low": found.low, "high": found.high}
    return result


def table(result: dict[str, Any]) -> str:
    """The table as Markdown, with what it was measured on."""
    data = result["data"]
    name = "with TTA" if result["judged"] == "tta_top1" else "plain"
    lines = [
        f"# Recipe {result['recipe']}, one part switched off at a time",
        "",
        f"{result['hardware']}; {result['precision']}; torch {result['versions']['torch']}; "
        f"{result['date']}; {result['epochs']} epochs; {data['train_images']:,} training and "
        f"{data['val_images']:,} validation images ({', '.join(data['suffixes'])}).",
        "",
        markdown([HEADER, *map(cells, result["rows"])]),
        "",
        f"Means over n seeds, with 95 % intervals for n > 1; differences to the first row {name}, "
        "seed by seed. Train: the training clock; wall: everything.",
    ]
    return "\n".join(lines).replace(NO_BREAK, " ") + "\n"


def cells(row: dict[str, Any]) -> list[str]:
    """The row of one part."""
    accuracies = [
        "-" if row[field] is None else spread(row[field], percent) for field in ("top1", "tta_top1")
    ]
    difference = row["difference_points"]
    times = [duration(row[field]["mean"]) for field in ("train_seconds", "wall_seconds")]
    points = "-" if difference is None else spread(difference, "{:+.2f}".format)
    name = "nothing" if row["run"] == FULL else row["run"]
    return [name, str(len(row["seeds"])), *accuracies, points, *times]


def spread(values: dict[str, Any], text: Callable[[float], str]) -> str:
    """The mean, and its interval where there is one."""
    if "low" not in values:
        return text(values["mean"])
    return f"{text(values['mean'])} ({text(values['low'])} .. {text(values['high'])})"
