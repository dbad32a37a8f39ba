"""The stopwatch of a run: seconds by section, which add up to the wall time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
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
"""Sections that DAWNBench lets a training clock leave out; everything else counts."""


class Stopwatch:
    """Measures seconds by section. One section runs at any time, so they add up to the wall time.

    Starts in "start_up", to which `before` seconds are added that have passed elsewhere. `section`
    and `waiting` enter a section and return to the previous one.
    """

    def __init__(self, before: float = 0.0) -> None:
        self.seconds = dict.fromkeys(SECTIONS, 0.0) | {"start_up": before}
        self._section = "start_up"
        self._since = time.perf_counter()

    def switch(self, section: str) -> str:
        """Enter another section; returns the previous one."""
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

    def waiting(
        self, items: Iterable[Item], section: str, busy: Callable[[], bool]
    ) -> Iterator[Item]:
        """Yield the same items; the time that they take to arrive counts as `section`.

        Where `busy()` is true when an item is there, nothing has waited for it: its time stays in
        the section of before.
        """
        iterator = iter(items)
        while True:
            before = self.seconds[section]
            with self.section(section):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            if busy():
                self.move(section, self._section, self.seconds[section] - before)
            yield item

    def move(self, source: str, target: str, seconds: float) -> None:
        """Move seconds that were measured otherwise to another section, at most all of them."""
        seconds = min(seconds, self.seconds[source])
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def read(self) -> dict[str, float]:
        """Return the seconds by section up to now."""
        self.switch(self._section)
        return dict(self.seconds)

    def carry_over(self, seconds: dict[str, float], lost: float | None = None) -> None:
        """Add the reading of the run that this one resumes.

        `lost`: seconds from that reading to now, if it is the same run, restarted: they count, as
        "other", in place of what this process has taken so far.
        """
        self.switch(self._section)
        if lost is not None:
            self.seconds = dict.fromkeys(SECTIONS, 0.0) | {"other": lost}
        for section, value in seconds.items():
            self.seconds[section] += value


def train_seconds(seconds: dict[str, float]) -> float:
    """Compute the training clock: the wall time less evaluation, checkpoints and compilation.

    It starts before data loading and model initialisation, as DAWNBench requires.
    """
    return sum(value for name, value in seconds.items() if name not in OUTSIDE_TRAINING)
