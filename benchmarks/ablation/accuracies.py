"""What each part gives in accuracy: every training of the recipe's length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from benchmarks.ablation.parts import FULL, remarks
from benchmarks.common.matrix import Data, Training, measured
from benchmarks.common.measuring import by_column, document
from benchmarks.common.statistics import interval, interval_text
from pipelines.files import Row
from pipelines.formats import duration, percent


def read_accuracies(trainings: Sequence[Training], data: Data, command: str) -> Row:
    """Return all that is finished, in plain values: times in seconds, accuracies as fractions.

    Differences to the whole recipe, in points of `judged`, are means over the seeds that both have.
    At least one run of the whole recipe must be finished.
    """
    summaries = {(training.run, training.seed): training.summary for training in trainings}
    values = list(summaries.values())
    judged = "top1" if values[0]["tta_top1"] is None else "tta_top1"
    rows = []
    for run in dict.fromkeys(run for run, _ in summaries):
        own = {seed: summary for (name, seed), summary in summaries.items() if name == run}
        points = [
            100 * (summary[judged] - summaries[FULL, seed][judged])
            for seed, summary in own.items()
            if (FULL, seed) in summaries
        ]
        row: Row = {"run": run, "seeds": list(own)}
        for name in ("top1", "tta_top1", "train_seconds", "wall_seconds"):
            found = [summary[name] for summary in own.values()]
            row[name] = None if None in found else interval(found) | {"values": found}
        differs = points and run != FULL
        row["difference_points"] = (
            interval(points, signed=True) | {"values": points} if differs else None
        )
        row["summaries"] = list(own.values())
        rows.append(row)
    about = {"recipe": values[0]["recipe"], "epochs": values[0]["epochs"]}
    return (
        measured(values, command) | about | {"data": asdict(data), "judged": judged, "rows": rows}
    )


def accuracies_table(result: Row) -> str:
    """Format the result as Markdown."""
    name = "with TTA" if result["judged"] == "tta_top1" else "plain"
    return document(
        f"# Recipe {result['recipe']}, one part switched off at a time",
        f"{result['hardware']}; {result['precision']}; torch {result['versions']['torch']}; "
        f"{result['date']}; {result['epochs']} epochs; {Data(**result['data']).counts}.",
        by_column([cells(row) for row in result["rows"]]),
        f"Means over n seeds, with 95 % intervals for n > 1; differences to the first row {name}, "
        "seed by seed. Train: the training clock; wall: everything.",
        remarks(result),
    )


def cells(row: Row) -> dict[str, str]:
    """Format the row of one part, by column."""

    def text(name: str, one: Callable[[float], str] = percent) -> str:
        return "-" if row[name] is None else interval_text(row[name], one)

    return {
        "switched off": "nothing" if row["run"] == FULL else row["run"],
        "n": str(len(row["seeds"])),
        "top-1": text("top1"),
        "with TTA": text("tta_top1"),
        "difference (points)": text("difference_points", "{:+.2f}".format),
        "train": duration(row["train_seconds"]["mean"]),
        "wall": duration(row["wall_seconds"]["mean"]),
    }
