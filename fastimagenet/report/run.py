"""The files of a run folder: how they are written whole, and how they are read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastimagenet.training.recorder import read_rows
from pipelines.errors import UserError
from pipelines.files import Row, read_object


def rows_of(kind: str, rows: list[Row]) -> list[Row]:
    """Those of one kind: "step", "epoch" or "event"."""
    return [row for row in rows if row.get("kind") == kind]


@dataclass(frozen=True)
class Run:
    """What the files of a run folder hold."""

    plan: Row
    summary: Row
    """{} for a run that was stopped before it could write one."""
    steps: list[Row]
    epochs: list[Row]
    events: list[Row]

    @property
    def target(self) -> tuple[str, float] | None:
        """("top1" or "top5", fraction), or None without a target."""
        target = self.summary.get("target") or self.plan.get("recipe", {}).get("target")
        if isinstance(target, str) and target:
            metric, _, value = target.partition("=")
            return metric, float(value)
        return (target["metric"], target["value"]) if target else None

    @property
    def epochs_done(self) -> int:
        return self.epochs[-1]["epoch"] + 1 if self.epochs else 0

    @property
    def results(self) -> Row:
        """Accuracies as fractions and train_seconds: the summary's, or the last rows'."""
        rows = self.epochs
        evaluated = [row for row in rows if row.get("top1") is not None]
        last = {**(rows[-1] if rows else {}), **(evaluated[-1] if evaluated else {})}
        if rows:
            last["train_seconds"] = rows[-1]["train_seconds"]
        keys = ("top1", "top5", "tta_top1", "tta_top5", "square_top1", "train_seconds")
        return {key: self.summary[key] if key in self.summary else last.get(key) for key in keys}


def read_run(run_dir: Path) -> Run:
    """Raises UserError where the folder holds no run."""
    plan = read_object(run_dir / "plan.json")
    if not {"recipe", "phases"} <= plan.keys():  # benchmarks.plan writes a file of that name, too
        raise UserError(f"{run_dir}/plan.json is not of a run: name a run's --output folder")
    summary = run_dir / "summary.json"
    rows = read_rows(run_dir)
    return Run(
        plan=plan,
        summary=read_object(summary) if summary.exists() else {},
        steps=rows_of("step", rows),
        epochs=rows_of("epoch", rows),
        events=rows_of("event", rows),
    )
