"""A run folder, read back: its plan, summary and rows."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fastimagenet.recipes import toml
from fastimagenet.recipes.plan import Plan
from fastimagenet.training.recorder import read_rows
from pipelines.errors import UserError
from pipelines.files import Row, read_object
from pipelines.formats import percent
from pipelines.pages import framed

PREDICTIONS, DETAILS_PAGE = "predictions.csv", "page.html"
"""What a folder of `evaluate --details` holds among others."""


def rows_of(kind: str, rows: list[Row]) -> list[Row]:
    """Select the rows of one kind: "step", "epoch" or "event"."""
    return [row for row in rows if row.get("kind") == kind]


def row_at_target(rows: list[Row], metric: str, value: float) -> Row | None:
    """Return the first evaluated epoch row with `metric` >= `value`, a fraction; None without."""
    for row in rows:
        if row.get(metric) is not None and row[metric] >= value:
            return row
    return None


def time_to_target(rows: list[Row], metric: str, value: float) -> float | None:
    """Return the training time in seconds at the first epoch row that reaches the target."""
    row = row_at_target(rows, metric, value)
    return None if row is None else float(row["train_seconds"])


def planned(row: Row) -> Plan:
    """Make the plan of plan.json anew. Raises UserError, KeyError or TypeError where that fails."""
    recipe = toml.from_plain(row["recipe"])
    world_size, accumulation = row["world_size"], row.get("accumulation", 1)
    first_batch = recipe.phases[0].batch_size * world_size * accumulation
    return Plan.of(recipe, world_size, row["num_train"], first_batch)


def checkpoint_at(path: Path) -> Path:
    """Return the checkpoint, which is best.pt of a run's folder. Raises UserError without one."""
    if not path.is_dir():
        return path
    for folder in (path / "checkpoints", path):
        if (folder / "best.pt").exists():
            return folder / "best.pt"
    raise UserError(f"{path} holds no checkpoints/best.pt: name a checkpoint, or a run's folder")


def data_of_run(checkpoint: Path) -> Path | None:
    """Return the folder of the data that the checkpoint's run read; None where nothing tells.

    Raises UserError where they are no longer there.
    """
    plan = checkpoint.absolute().parent.parent / "plan.json"
    if not plan.exists() or not (found := read_object(plan).get("data")):
        return None
    folder = Path(found)
    if not folder.is_dir():
        raise UserError(f"--data: the data of the run, {folder}, are not there: name them")
    return folder


def holds_run(folder: Path) -> bool:
    """Tell whether a training has left its plan and rows in a folder."""
    return (folder / "plan.json").exists() and (folder / "metrics.jsonl").exists()


@dataclass(frozen=True)
class Details:
    """What `evaluate --details` has left in a folder; a notebook shows its page."""

    folder: Path

    @property
    def predictions(self) -> list[dict[str, str]]:
        """Rows of predictions.csv: path, true, predicted, p, p_true, loss of every image."""
        with (self.folder / PREDICTIONS).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def _repr_html_(self) -> str | None:
        return framed(self.folder / DETAILS_PAGE)


@dataclass(frozen=True, kw_only=True, repr=False)
class Run:
    """What a run has left in its folder; a notebook shows its report."""

    folder: Path
    plan: Row
    """plan.json: the derived plan and the recipe."""
    summary: Row
    """summary.json; {} for a run that was stopped before it could write one."""
    steps: list[Row]
    """Rows of metrics.jsonl, as are the two below."""
    epochs: list[Row]
    events: list[Row]

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Read the folder of a finished or stopped run. Raises UserError where it holds none."""
        folder = Path(folder)
        plan = read_object(folder / "plan.json")
        if not {"recipe", "phases"} <= plan.keys():  # benchmarks.plan writes such a file, too
            raise UserError(f"{folder}/plan.json is not of a run: name a run's --output folder")
        summary = folder / "summary.json"
        rows = read_rows(folder)
        return cls(
            folder=folder,
            plan=plan,
            summary=read_object(summary) if summary.exists() else {},
            steps=rows_of("step", rows),
            epochs=rows_of("epoch", rows),
            events=rows_of("event", rows),
        )

    @property
    def details(self) -> list[Details]:
        """Those of the folders in this one that `evaluate --details` has filled, by name."""
        found = sorted(path.parent for path in self.folder.glob(f"*/{PREDICTIONS}"))
        return [Details(each) for each in found if (each / DETAILS_PAGE).exists()]

    def __repr__(self) -> str:
        """Say in a line how far it came."""
        top1 = self.results["top1"]
        reached = "" if top1 is None else f", top-1 {percent(top1)}"
        planned = self.plan.get("epochs", 0)
        return f"Run({str(self.folder)!r}: {self.epochs_done} of {planned} epochs{reached})"

    def _repr_html_(self) -> str | None:
        return framed(self.folder / "report.html")

    @cached_property
    def rates(self) -> list[Row]:
        """Rows with "step", "lr", "layer_lrs" and "momentum" of every update done, by the plan.

        Of the logged ones alone where they had other rates, since the run was resumed by another
        number of processes, or where the recipe is of a release that had other fields.
        """
        try:
            plan = planned(self.plan)
            for row in self.steps:
                if not math.isclose(row["lr"], plan.lr(row["step"] - 1), rel_tol=1e-6):
                    return self.steps
        except (UserError, KeyError, TypeError):
            return self.steps
        done = max((row["step"] for row in (*self.steps, *self.epochs)), default=0)
        return [
            {
                "step": step + 1,
                "lr": plan.lr(step),
                "layer_lrs": plan.layer_lrs(step),
                "momentum": plan.momentum(step),
            }
            for step in range(min(done, plan.total_steps))
        ]

    @property
    def pretrained(self) -> str:
        """The weights that the training started from; "" for one from scratch."""
        return str(self.plan["recipe"].get("pretrained") or "")

    @property
    def target(self) -> tuple[str, float] | None:
        """Metric ("top1" or "top5") and fraction to reach, or None without a target."""
        target = self.summary.get("target") or self.plan.get("recipe", {}).get("target")
        if isinstance(target, str) and target:
            metric, _, value = target.partition("=")
            return metric, float(value)
        return (target["metric"], target["value"]) if target else None

    @property
    def seconds_to_target(self) -> float | None:
        """Training time until the target was reached; None if it was not, or without one."""
        return None if self.target is None else time_to_target(self.epochs, *self.target)

    @property
    def waiting_share(self) -> float | None:
        """Share of the training time spent waiting for data; None without a summary."""
        wait, train = (self.summary.get(f"{part}_seconds") for part in ("data_wait", "train"))
        return wait / train if train and wait is not None else None

    @property
    def epochs_done(self) -> int:
        """How many epochs were trained."""
        return self.epochs[-1]["epoch"] + 1 if self.epochs else 0

    @property
    def results(self) -> Row:
        """Accuracies as fractions and train_seconds, from the summary or else the last rows."""
        rows = self.epochs
        evaluated = [row for row in rows if row.get("top1") is not None]
        last = {**(rows[-1] if rows else {}), **(evaluated[-1] if evaluated else {})}
        if rows:
            last["train_seconds"] = rows[-1]["train_seconds"]
        keys = (
            *("top1", "top5", "balanced_top1", "tta_top1", "tta_top5", "square_top1"),
            "train_seconds",
        )
        return {key: self.summary[key] if key in self.summary else last.get(key) for key in keys}
