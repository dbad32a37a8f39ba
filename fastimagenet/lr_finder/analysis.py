"""A learning-rate sweep and what is read off it: no torch, no drawing."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from pipelines.formats import plain

Ended = Literal["finished", "diverged", "not finite", "stopped"]
MEMORY = 0.98
"""Weight of the past in the smoothed losses."""
DIVERGED = 4.0
"""Times the best loss: there a sweep has diverged."""
SKIPPED_FIRST, SKIPPED_LAST, ENOUGH = 10, 5, 20
"""Records left out of drawing and analysis, and how many there must be for that."""
FEWEST = 5
"""Records that a suggestion or a plateau needs."""
TOLERANCE = 0.1
"""Share of a curve's fall by which a loss may lie above the lowest and is still near it."""
HIGH_ENOUGH = 0.5
"""Share of the highest LR tolerated that a sweep has to tolerate to be the best one."""


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """One iteration of a sweep."""

    iteration: int
    """From 0."""
    lr: float
    momentum: float
    loss: float
    """Training loss over all processes: the debiased average with weight 0.98 on the past."""
    val_loss: float
    """Mean over one validation batch (a process), not smoothed, as are the two below."""
    top1: float
    top5: float


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What `lr_find2` has recorded."""

    weight_decay: float
    momentum: float
    num_it: int
    linear: bool
    records: tuple[SweepRecord, ...]
    ended: Ended
    """finished: all iterations; diverged: smoothed loss above 4 x the best; not finite: it was
    NaN or infinite (without stop_dv: all of it); stopped: by the user."""


def sweep_lr(iteration: int, start_lr: float, end_lr: float, num_it: int, linear: bool) -> float:
    """LR of an iteration (from 0): a geometric series or, `linear`, an arithmetic one.

    start_lr comes first; end_lr would be that of iteration num_it, one past the last.
    """
    fraction = iteration / num_it
    if linear:
        return start_lr + (end_lr - start_lr) * fraction
    return start_lr * (end_lr / start_lr) ** fraction


class DebiasedAverage:
    """Exponential moving average that does not lean towards the 0 it starts from."""

    def __init__(self) -> None:
        self._average, self._count = 0.0, 0

    def update(self, value: float) -> float:
        """The average with one more value; NaN for ever after a NaN."""
        self._count += 1
        self._average = MEMORY * self._average + (1 - MEMORY) * value
        return self._average / (1 - MEMORY**self._count)


def smoothed(values: Iterable[float]) -> list[float]:
    """The debiased average after each value, as the training loss of a sweep has it."""
    average = DebiasedAverage()
    return [average.update(value) for value in values]


class DivergenceRule:
    """Ends a sweep whose loss has run away, as fastai 0.7 did: asked at each iteration in turn.

    A loss only counts as the best from the twelfth on: the first few are mostly chance.
    """

    def __init__(self) -> None:
        self._best = 1e9

    def verdict(self, iteration: int, loss: float) -> Ended | None:
        """How the sweep ends at this smoothed loss, which is not to be recorded; None: it goes on.

        `iteration` counts from 0.
        """
        if not math.isfinite(loss):
            return "not finite"
        if loss > DIVERGED * self._best:
            return "diverged"
        if loss < self._best and iteration > 10:
            self._best = loss
        return None


def shown(sweep: Sweep) -> tuple[SweepRecord, ...]:
    """The records that are drawn and analysed: those of finite loss but the first 10 and last 5.

    Of fewer than 20 records all of finite loss.
    """
    records = sweep.records
    if len(records) >= ENOUGH:
        records = records[SKIPPED_FIRST:-SKIPPED_LAST]
    return tuple(record for record in records if math.isfinite(record.loss))


def still_falls(sweep: Sweep) -> bool:
    """Whether a sweep that went to its end has its lowest loss there."""
    losses = [record.loss for record in shown(sweep)]
    return sweep.ended == "finished" and bool(losses) and losses[-1] == min(losses)


@dataclass(frozen=True, kw_only=True)
class Suggestions:
    """Learning rates that other tools would read off the curve."""

    valley: float
    steepest: float
    minimum_10: float


def judged(sweep: Sweep, losses: Sequence[float]) -> bool:
    """Whether anything can be read off the losses shown.

    Not off fewer than 5, off losses that never fall, and off a sweep that was stopped while its
    loss still fell: its lowest and steepest points are yet to come.
    """
    if len(losses) < FEWEST or min(losses) == losses[0]:
        return False
    return sweep.ended != "stopped" or losses[-1] > min(losses)


def suggest(sweep: Sweep) -> Suggestions | None:
    """LRs by the three rules that fastai v2 has (callback/schedule.py), on the records shown.

    valley, its default, due to ESRI: see `valley_index`. steepest: where d loss / d log(lr) to
    the next record is most negative. minimum_10: a tenth of the LR of the lowest loss.
    None where `judged` says no.
    """
    records = shown(sweep)
    losses = [record.loss for record in records]
    if not judged(sweep, losses):
        return None
    lowest = losses.index(min(losses))
    slopes = [
        (after.loss - before.loss) / math.log(after.lr / before.lr)
        for before, after in pairwise(records)
    ]
    return Suggestions(
        valley=records[valley_index(losses)].lr,
        steepest=records[slopes.index(min(slopes))].lr,
        minimum_10=records[lowest].lr / 10,
    )


def valley_index(losses: Sequence[float]) -> int:
    """The middle of the valley, by fastai's count of indices.

    The valley ends where the longest strictly decreasing subsequence, of n losses, does (the
    first such place), and begins n places before. Its middle third is entered at int(n / 3), and
    half of a third further, int(n / 6), is the place. Raises ValueError without losses.
    """
    lengths: list[int] = []
    # By length, minus the highest loss that a decreasing subsequence of that length ends with.
    ends: list[float] = []
    for loss in losses:
        place = bisect_left(ends, -loss)
        ends[place : place + 1] = [-loss]
        lengths.append(place + 1)
    longest = max(lengths)
    # A curve that only falls begins one place before its first loss.
    return max(0, lengths.index(longest) - longest + int(longest / 3) + int(longest / 6))


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """The learning rates at which the smoothed loss is near its lowest.

    That loss lags: it goes on falling while the batches' losses are already flat, so low_lr is
    late. high_lr hardly is, since a loss that runs away soon outweighs the past.
    """

    best_loss: float
    """The lowest smoothed training loss."""
    best_lr: float
    low_lr: float
    high_lr: float
    """The first and the last LR of the stretch; the last may be where the sweep ended."""


def plateau(sweep: Sweep) -> Plateau | None:
    """The stretch of LRs around the lowest loss where it is at most a tenth of the fall above.

    The fall is from the first loss shown to the lowest. None where fewer than 5 records are shown
    or the first has the lowest loss.
    """
    records = shown(sweep)
    losses = [record.loss for record in records]
    if not judged(sweep, losses):
        return None
    low = high = best = losses.index(min(losses))
    limit = nearness(losses)
    while losses[low - 1] <= limit:  # the first loss is above
        low -= 1
    while high + 1 < len(losses) and losses[high + 1] <= limit:
        high += 1
    return Plateau(
        best_loss=losses[best],
        best_lr=records[best].lr,
        low_lr=records[low].lr,
        high_lr=records[high].lr,
    )


def nearness(losses: Sequence[float]) -> float:
    """The highest loss that is near the lowest."""
    return min(losses) + TOLERANCE * (losses[0] - min(losses))


def best_sweep(sweeps: Sequence[Sweep]) -> Sweep | None:
    """The sweep of the largest weight decay that still tolerates a high LR, the study's rule.

    Only sweeps whose lowest loss is near the lowest of all are compared: with a weight decay far
    too large a network learns little at a high LR, but does not diverge. Of these, high is at
    least half the highest `high_lr`. Among sweeps of the same weight decay, such as of several
    momenta, the one of the lowest loss. None without a plateau.
    """
    found = [(sweep, flat) for sweep in sweeps if (flat := plateau(sweep)) is not None]
    if not found:
        return None
    lowest, _ = min(found, key=lambda pair: pair[1].best_loss)
    limit = nearness([record.loss for record in shown(lowest)])
    found = [(sweep, flat) for sweep, flat in found if flat.best_loss <= limit]
    high = HIGH_ENOUGH * max(flat.high_lr for _, flat in found)
    found = [(sweep, flat) for sweep, flat in found if flat.high_lr >= high]
    return max(found, key=lambda pair: (pair[0].weight_decay, -pair[1].best_loss))[0]


FIELDS = {"weight decay": "weight_decay", "momentum": "momentum"}
"""What sweeps can differ in."""


def labels(sweeps: Sequence[Sweep]) -> tuple[str, list[str]]:
    """A legend's title and labels: "weight decay" and what each sweep has of it.

    Sweeps that are all alike are numbered.
    """
    names = _differing(sweeps)
    if not names:
        return "sweep", [str(number) for number in range(1, len(sweeps) + 1)]
    return ", ".join(names), [
        ", ".join(plain(getattr(sweep, FIELDS[name])) for name in names) for sweep in sweeps
    ]


def in_words(sweep: Sweep, sweeps: Sequence[Sweep]) -> str:
    """What sets it apart from the others: "weight decay 0.01, momentum 0.9"; weight decay alone
    where nothing does."""
    names = _differing(sweeps) or ["weight decay"]
    return ", ".join(f"{name} {plain(getattr(sweep, FIELDS[name]))}" for name in names)


def _differing(sweeps: Sequence[Sweep]) -> list[str]:
    return [
        name
        for name, field in FIELDS.items()
        if len({getattr(sweep, field) for sweep in sweeps}) > 1
    ]
