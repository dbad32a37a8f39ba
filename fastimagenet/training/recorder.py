"""metrics.jsonl, the rows of a run: written to the run's folder and read back."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from fastimagenet.distributed.collectives import gather_objects
from fastimagenet.distributed.world import World
from fastimagenet.errors import NotWritten
from fastimagenet.recipes.recipe import Recipe
from fastimagenet.sinks import Sinks
from pipelines.errors import UserError
from pipelines.files import Row, write_text


def read_rows(run_dir: Path) -> list[Row]:
    """Read the rows of `run_dir`/metrics.jsonl in order; none without the file.

    An incomplete line, as a killed process leaves one, is skipped.
    """
    path = run_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    rows = []
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A step row; LR and momentum are those of the update."""

    step: int
    """Number of updates done, this one included."""
    epoch: int
    time_seconds: float
    lr: float
    momentum: float
    loss: float
    """Mean over this process's batches of the update."""
    images_per_sec: float
    """Over all processes, since the previous row."""


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """An epoch row. Times are readings of clocks that started with the run."""

    step: int
    """Number of updates done."""
    epoch: int
    """Index, from 0."""
    time_seconds: float
    train_seconds: float
    eval_seconds: float
    data_wait_seconds: float
    image_size: int
    batch_size: int
    images_per_sec: float
    """Over this epoch's training, data wait included."""
    peak_memory_bytes: int | None = None
    """Most that tensors took of the first process's GPU in this epoch; None on a CPU."""
    train_loss: float
    val_loss: float | None = None
    top1: float | None = None
    """A fraction, as all accuracies; None in an epoch without evaluation."""
    top5: float | None = None
    """None with five classes or fewer, too, as tta_top5 and square_top5."""
    balanced_top1: float | None = None
    """Mean over the classes; None where validation has about as many images of each."""
    tta_top1: float | None = None
    tta_top5: float | None = None
    square_top1: float | None = None
    """On squares, beside those of a last evaluation on rectangles."""
    square_top5: float | None = None


def best_record(records: list[EpochRecord], recipe: Recipe) -> EpochRecord | None:
    """Return the first evaluated epoch that is best, by top-5 if that is the target, else by top-1.

    By top-1, too, where there is no top-5. Of equal ones that of the lower validation loss.
    """
    metric = recipe.target_metric[0] if recipe.target_metric else "top1"
    if all(record.top5 is None for record in records):
        metric = "top1"
    evaluated = [record for record in records if getattr(record, metric) is not None]

    def rank(record: EpochRecord) -> tuple[float, float]:
        loss = record.val_loss
        return getattr(record, metric), -loss if loss is not None and loss == loss else -math.inf

    return max(evaluated, key=rank, default=None)


class Recorder:
    """Writes rows to `folder`/metrics.jsonl and prints a bar on a terminal, else plain lines."""

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        stream: TextIO | None = None,
        sinks: Sinks | None = None,
    ) -> None:
        self._folder = folder
        self._sinks = sinks or Sinks((), folder, {})
        self._total_steps = total_steps
        self._stream = stream or sys.stdout
        self._bar: Any = None
        self._file: BinaryIO | None = None
        self._pending = b""
        """Bytes of the rows that a full disk has not taken yet."""
        self.unwritten = Unwritten()

    def start(self, step: int, records: list[EpochRecord], epoch_step: int = 0) -> None:
        """Open the file for a run that starts at `step`: later rows are dropped.

        The rows of the earlier epochs, `records`, are kept whatever their steps, which another
        number of processes may have counted; in a new folder those epochs are written first. Of
        the current epoch, which began at `epoch_step`, those of the steps until now are kept.
        """
        rows = read_rows(self._folder) if step else []
        kept = [
            row
            for row in rows
            if row["epoch"] < len(records)
            or (row["kind"] != "epoch" and epoch_step <= row["step"] <= step)
        ]
        kept = kept or [{"kind": "epoch", **asdict(record)} for record in records]
        path = self._folder / "metrics.jsonl"
        write_text(path, "".join(map(_line, kept)))
        self._file = cast(BinaryIO, path.open("ab", buffering=0))
        self._sinks.start(step)
        if self._stream.isatty():
            from tqdm import tqdm

            # Some terminals give their size as 0 x 0, where a bar would not be seen.
            columns, lines = shutil.get_terminal_size()
            self._bar = tqdm(
                total=self._total_steps,
                initial=step,
                unit="step",
                file=self._stream,
                ncols=columns - 1,
                nrows=lines,
                smoothing=0.1,
            )

    def step(self, record: StepRecord) -> None:
        """Write a step row."""
        self._write("step", asdict(record))
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {record.loss:.3f}, {record.images_per_sec:,.0f} images/s"
            )
            self._bar.update(record.step - self._bar.n)

    def epoch(self, record: EpochRecord) -> None:
        """Write and print an epoch row."""
        self._write("epoch", asdict(record))
        text = (
            f"epoch {record.epoch + 1:>3}  {record.image_size} px  "
            f"train loss {record.train_loss:.4f}  {record.images_per_sec:,.0f} images/s  "
            f"train {record.train_seconds:.1f} s"
        )
        if record.top1 is not None:
            text += f"  top-1 {record.top1:.2%}"
        if record.top5 is not None:
            text += f"  top-5 {record.top5:.2%}"
        if record.tta_top1 is not None:
            text += f"  with TTA {record.tta_top1:.2%}"
        if record.square_top1 is not None:
            text += f"  on squares {record.square_top1:.2%}"
        self._print(text)

    def event(self, *, step: int, epoch: int, time_seconds: float, message: str) -> None:
        """Write and print anything else worth keeping, such as a resume."""
        row = {"step": step, "epoch": epoch, "time_seconds": time_seconds, "message": message}
        self._write("event", row)
        self._print(message)

    def close(self) -> None:
        """Close the bar and the file."""
        if self._bar is not None:
            self._bar.close()
        if self._file is not None and not self._file.closed:
            self._flush()
            self._file.close()
        self._sinks.close()

    def _write(self, kind: str, row: Row) -> None:
        self._pending += _line({"kind": kind, **row}).encode()
        self._flush()
        self._sinks.row(kind, row)

    def _flush(self) -> None:
        """Append the pending rows; what the disk does not take stays pending."""
        file = self._file
        assert file is not None, "start() comes first"

        def append() -> None:
            while self._pending:
                self._pending = self._pending[file.write(self._pending) :]

        self.unwritten.attempt("rows of metrics.jsonl", append)

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)


class NullRecorder(Recorder):
    """A recorder that writes and prints nothing, as all processes but the first have it."""

    def __init__(self) -> None:
        super().__init__(Path(), 0)

    def start(self, step: int, records: list[EpochRecord], epoch_step: int = 0) -> None:
        pass

    def _write(self, kind: str, row: Row) -> None:
        pass

    def _print(self, text: str) -> None:
        pass


def _line(row: Row) -> str:
    """Format a row as a JSON line; NaN and infinity, which JSON lacks, become null."""
    clean = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(clean) + "\n"


class Unwritten:
    """Keeps the names of files that could not be written, each with the reason."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    def attempt(
        self, name: str, write: Callable[[], object], errors: type[Exception] = OSError
    ) -> bool:
        """Call `write`; False after one of `errors`, printed once per name as a warning."""
        try:
            write()
        except errors as error:
            reason = str(error)
            if isinstance(error, OSError) and error.errno:
                reason = os.strerror(error.errno)
            elif not isinstance(error, OSError | UserError):  # a defect; what was trained is kept
                traceback.print_exc()
                reason = f"{type(error).__name__}: {reason}"
            if name not in self._reasons:
                text = f"warning: {name} could not be written: {reason}; the training continues"
                print(text, file=sys.stderr, flush=True)  # noqa: T201
            self._reasons[name] = reason
            return False
        self._reasons.pop(name, None)
        return True

    def __str__(self) -> str:
        """Format one line; empty where all was written."""
        lost = (f"{name} ({reason})" for name, reason in self._reasons.items())
        return f"not written: {', '.join(lost)}" if self._reasons else ""

    def share(self, world: World) -> None:
        """Take the reasons of the first process; every process has to call it."""
        self._reasons = gather_objects(self._reasons, world, "the end of the training")[0]

    def check(self) -> None:
        """Raise NotWritten unless all was written."""
        if self._reasons:
            raise NotWritten(str(self))
