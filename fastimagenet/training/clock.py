"""The stopwatch: seconds by section, which add up to the wall time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
SECTIONS = (
    "start_up",
    "compile",
    "data_wait",
    "compute",
    "communication",
    "evaluation",
    "checkpoint",
    "other",
)
OUTSIDE_TRAINING = ("compile", "evaluation", "checkpoint")
"""What DAWNBench lets a training clock leave out; everything else counts."""


class Stopwatch:
    """Seconds by section. Exactly one section runs at a time, so they add up to the wall time.

    Starts in "start_up", which has taken `before` seconds elsewhere. A context manager or `waiting`
    enters a section and comes back.
    """

    def __init__(self, before: float = 0.0) -> None:
        self.seconds = dict.fromkeys(SECTIONS, 0.0) | {"start_up": before}
        self._section = "start_up"
        self._since = time.perf_counter()

    def switch(self, section: str) -> str:
        """Go to another section; returns the one that was running."""
        now = time.perf_counter()
        self.seconds[self._section] += now - self._since
        previous, self._section, self._since = self._section, section, now
        return previous

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Run the block in section `name`."""
        previous = self.switch(name)
        try:
            yield
        finally:
            self.switch(previous)

    def waiting(self, items: Iterable[Item], section: str) -> Iterator[Item]:
        """The same items, with the time they take to arrive put into `section`."""
        iterator = iter(items)
        while True:
            with self.section(section):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def move(self, source: str, target: str, seconds: float) -> None:
        """Book seconds, measured otherwise, to another section; no more than there are."""
        seconds = min(seconds, self.seconds[source])
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def read(self) -> dict[str, float]:
        """Seconds by section up to now."""
        self.switch(self._section)
        return dict(self.seconds)

    def carry_over(self, seconds: dict[str, float], lost: float | None = None) -> None:
        """Add the reading of the run that this one goes on with.

        `lost`: seconds from that reading to now, where the run itself went on: they count, as
        "other", in place of what this process has taken so far.
        """
        self.switch(self._section)
        if lost is not None:
            self.seconds = dict.fromkeys(SECTIONS, 0.0) | {"other": lost}
        for section, value in seconds.items():
            self.seconds[section] += value


def train_seconds(seconds: dict[str, float]) -> float:
    """The training clock: the wall time less evaluation, checkpoints and compile warm-up.

    It runs from before data loading and model initialisation, as DAWNBench has it.
    """
    return sum(value for name, value in seconds.items() if name not in OUTSIDE_TRAINING)
