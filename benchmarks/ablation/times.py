"""What each part gives in time: every training ends at the same accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.ablation.parts import FULL, remarks
from benchmarks.common.matrix import Data, Training, measured
from benchmarks.common.measuring import by_column, document
from benchmarks.common.statistics import interval, interval_text
from pipelines.files import Row
from pipelines.formats import duration, percent

TO_TARGET = "time_to_target_seconds"
"""In a summary: the training clock where the target was reached; null where it was missed."""


def read_times(trainings: Sequence[Training], data: Data, command: str) -> Row:
    """Return the time to the target of each part's shortest run that reached it, in plain values.

    A row's `runs` are those of all lengths; its `seconds` and `ratio`, to the whole recipe seed by
    seed, are null unless every seed has reached the target.
    """
    times: dict[tuple[str, int], float] = {}
    for one in trainings:
        if one.summary[TO_TARGET] is not None:
            times[one.run, one.seed] = one.summary[TO_TARGET]
    rows = []
    for run in dict.fromkeys(one.run for one in trainings):
        own = [one for one in trainings if one.run == run]
        seeds = sorted({one.seed for one in own})
        row: Row = {"run": run, "seeds": seeds, "seconds": None, "ratio": None}
        if all((run, seed) in times for seed in seeds):
            found = [times[run, seed] for seed in seeds]
            row["seconds"] = interval(found) | {"values": found}
            if run != FULL and all((FULL, seed) in times for seed in seeds):
                ratios = [times[run, seed] / times[FULL, seed] for seed in seeds]
                row["ratio"] = interval(ratios) | {"values": ratios}
        names = (TO_TARGET, "epochs", "top1", "train_seconds", "wall_seconds", "time_split_seconds")
        row["runs"] = [
            {"seed": one.seed} | {name: one.summary[name] for name in names} for one in own
        ]
        rows.append(row)
    summaries = [one.summary for one in trainings]
    about = {"recipe": summaries[0]["recipe"], "target": summaries[0]["target"]}
    return measured(summaries, command) | about | {"data": asdict(data), "rows": rows}


def times_table(result: Row) -> str:
    """Format the times to the target as Markdown."""
    target = result["target"]
    return document(
        f"# Recipe {result['recipe']} to {percent(target['value'])} {target['metric']}, one part "
        "switched off at a time",
        f"{result['hardware']}; {result['precision']}; torch {result['versions']['torch']}; "
        f"{result['date']}; {Data(**result['data']).counts}.",
        by_column([cells(row) for row in result["rows"]]),
        "Training clock of the shortest run that reached the target; epochs: the lengths trained, "
        "of each seed; means over n seeds, with 95 % intervals for n > 1. Data: the share of the "
        "training clock in which the last run waited for images.",
        remarks(result),
    )


def cells(row: Row) -> dict[str, str]:
    """Format the row of one part, by column."""
    last = row["runs"][-1]
    waiting = last["time_split_seconds"]["data_wait"] / last["train_seconds"]
    return {
        "switched off": "nothing" if row["run"] == FULL else row["run"],
        "n": str(len(row["seeds"])),
        "to target": interval_text(row["seconds"], duration) if row["seconds"] else "missed",
        "ratio": interval_text(row["ratio"], "{:.2f}".format) if row["ratio"] else "-",
        "epochs": ", ".join(str(run["epochs"]) for run in row["runs"]),
        "top-1 of the last": percent(last["top1"]),
        "data": percent(waiting),
    }
