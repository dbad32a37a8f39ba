"""The rows of a learning-rate sweep: to the terminal and to metrics.jsonl."""

from __future__ import annotations

from dataclasses import asdict

from fastimagenet.formats import plain
from fastimagenet.recorder import NullRecorder, Recorder, Stopwatch
from fastimagenet.sweep import Sweep, SweepRecord


class SweepRecorder(Recorder):
    """One bar over the iterations of all sweeps on a terminal, else one line for each sweep."""

    def record(
        self, index: int, weight_decay: float, clock: Stopwatch, record: SweepRecord
    ) -> None:
        """One iteration of sweep `index` (from 0); `step` counts the updates of the sweep."""
        row = {"step": record.iteration, "epoch": 0, "time_seconds": sum(clock.read().values())}
        self._write("sweep", row | {"sweep": index, "weight_decay": weight_decay} | asdict(record))
        if self._bar is not None:
            text = f"lr {record.lr:.2e}, loss {record.loss:.3f}"
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()

    def end_of_sweep(self, index: int, num_sweeps: int, sweep: Sweep) -> None:
        """Say how sweep `index` (from 0) ended; the bar goes on at the next one's first."""
        self._print(
            f"sweep {index + 1} of {num_sweeps}: weight decay {plain(sweep.weight_decay)}, "
            f"momentum {plain(sweep.momentum, 4)}: {how_it_ended(sweep)}"
        )
        if self._bar is not None and sweep.ended != "stopped":
            self._bar.update((index + 1) * sweep.num_it - self._bar.n)


class NullSweepRecorder(NullRecorder, SweepRecorder):
    """What the processes other than the first hold: it writes nothing."""


def how_it_ended(sweep: Sweep) -> str:
    """Such as "diverged after 85 of 100 iterations, at lr 1.26"."""
    done = len(sweep.records)
    ended = {"not finite": "the loss was not finite"}.get(sweep.ended, sweep.ended)
    if sweep.ended == "finished":
        return f"{done} iterations, up to lr {plain(sweep.records[-1].lr, 3)}"
    text = f"{ended} after {done} of {sweep.num_it} iterations"
    return f"{text}, at lr {plain(sweep.records[-1].lr, 3)}" if done else text
