"""`--log`: the rows of a run, also to the tools that teams watch.

A tool that fails is named once and left out from then on; metrics.jsonl has all rows in any case.
"""

from __future__ import annotations

import csv
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from pipelines.errors import UserError
from pipelines.files import Row, write_text

NAMES = {
    "step": {
        "loss": "train/loss",
        "lr": "train/lr",
        "momentum": "train/momentum",
        "images_per_sec": "train/images_per_sec",
    },
    "epoch": {
        "train_loss": "train/epoch_loss",
        "image_size": "train/image_size",
        "peak_memory_bytes": "train/peak_memory_bytes",
        "val_loss": "val/loss",
        "top1": "val/top1",
        "top5": "val/top5",
        "balanced_top1": "val/balanced_top1",
        "tta_top1": "val/tta_top1",
        "tta_top5": "val/tta_top5",
        "train_seconds": "time/train_seconds",
        "eval_seconds": "time/eval_seconds",
        "data_wait_seconds": "time/data_wait_seconds",
    },
}
"""Kind of row -> its fields -> the names under which they are logged; accuracies are fractions."""
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "csv": "csv"}
"""What --log takes, and the module that each needs."""


def check_logs(names: Sequence[str]) -> None:
    """Raise UserError for a tool that is not known or not installed."""
    for name in names:
        if name not in PACKAGES:
            raise UserError(f"--log must be one of {', '.join(PACKAGES)}, not {name!r}")
        if find_spec(PACKAGES[name]) is None:
            raise UserError(f"--log {name}: pip install {PACKAGES[name]}, which is not there")


class Sink(Protocol):
    """A tool that figures are logged to."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log figures by name after so many updates."""

    def close(self) -> None:
        """Finish; what was logged is then in the tool's hands."""


class Sinks:
    """All tools that a run logs to, on its first process.

    `about`: plain values that describe the run. The tools keep what they write in `folder`, but for
    MLflow, which has its own place (MLFLOW_TRACKING_URI). Raises UserError as `check_logs` does.
    """

    def __init__(self, names: Sequence[str], folder: Path, about: Row) -> None:
        check_logs(names)
        self._names = tuple(dict.fromkeys(names))
        self._folder, self._about = folder, about
        self._open: dict[str, Sink] = {}

    def start(self, step: int) -> None:
        """Open the tools for a run that goes on after `step` updates: later rows are dropped."""
        makers: dict[str, Callable[[Path, int, Row], Sink]] = {
            "tensorboard": TensorBoard,
            "wandb": WandB,
            "mlflow": MLflow,
            "csv": Table,
        }
        for name in self._names:
            make = partial(makers[name], self._folder, step, self._about)
            if (made := self._attempt(name, make)) is not None:
                self._open[name] = made

    def row(self, kind: str, row: Row) -> None:
        """Log what a row of metrics.jsonl holds of NAMES; what is not finite is left out."""
        values = {
            name: float(row[field])
            for field, name in NAMES.get(kind, {}).items()
            if isinstance(row.get(field), int | float) and isfinite(row[field])
        }
        for name, sink in tuple(self._open.items()) if values else ():
            self._attempt(name, partial(sink.log, row["step"], values))

    def close(self) -> None:
        """Close the tools."""
        for name, sink in tuple(self._open.items()):
            self._attempt(name, sink.close)
        self._open.clear()

    def _attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """Call `work`; after an error of any kind say so and leave the tool out."""
        try:
            return work()
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            text = f"note: --log {name} is left out from now on: {reason}"
            print(text, file=sys.stderr, flush=True)  # noqa: T201
            self._open.pop(name, None)
            return None


class TensorBoard:
    """Event files in FOLDER/tensorboard."""

    def __init__(self, folder: Path, step: int, about: Row) -> None:
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        # Readers drop what an earlier process has written from this step on.
        self._writer = writer(folder / "tensorboard", purge_step=step + 1 if step else None)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, with its files in FOLDER/wandb; WANDB_MODE=offline works."""

    def __init__(self, folder: Path, step: int, about: Row) -> None:
        wandb = import_module("wandb")
        identity = folder / "wandb" / "run-id.txt"
        if not (step and identity.exists()):
            write_text(identity, secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastimagenet"),
            name=folder.name,
            id=identity.read_text(encoding="utf-8"),
            resume="allow",
            dir=folder,
            config=about,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)  # W&B itself drops a step that it has

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, whose name is that of the folder."""

    def __init__(self, folder: Path, step: int, about: Row) -> None:
        self._client = import_module("mlflow").MlflowClient()
        identity = folder / "mlflow-run.txt"
        self._has: dict[str, int] = {}
        """The last step of each metric that the run has from before."""
        if step and identity.exists():
            self._run = identity.read_text(encoding="utf-8")
            metrics = self._client.get_run(self._run).data.metrics
            for name in metrics:
                history = self._client.get_metric_history(self._run, name)
                self._has[name] = max(metric.step for metric in history)
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fastimagenet")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self._run = self._client.create_run(experiment, run_name=folder.name).info.run_id
        write_text(identity, self._run)
        for key, value in about.items():
            self._client.log_param(self._run, key, str(value)[:500])

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if step > self._has.get(name, -1):
                self._client.log_metric(self._run, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class Table:
    """FOLDER/log.csv: step, name, value."""

    def __init__(self, folder: Path, step: int, about: Row) -> None:
        path, kept = folder / "log.csv", ["step,name,value"]
        if step and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines()[1:]:
                number = line.partition(",")[0]
                if number.isdecimal() and int(number) <= step and line.count(",") == 2:
                    kept.append(line)
        write_text(path, "\n".join(kept) + "\n")
        self._file = path.open("a", encoding="utf-8", newline="", buffering=1)
        self._writer = csv.writer(self._file, lineterminator="\n")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._writer.writerows((step, name, repr(value)) for name, value in values.items())

    def close(self) -> None:
        self._file.close()
