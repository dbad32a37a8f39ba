"""One learning-rate sweep: its settings, its records and what is read off them, without torch."""

from __future__ import annotations

import itertools
import math
import os
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Literal

from fastimagenet.recipes.plan import Plan
from pipelines.errors import UserError
from pipelines.formats import plain

Ended = Literal["finished", "diverged", "not finite", "stopped"]
MEMORY = 0.98
"""Weight of the past in the smoothed losses."""
DIVERGED = 4.0
"""A sweep has diverged at this multiple of its best loss."""
SKIP_FIRST, SKIP_LAST = 10, 5
"""Records left out of plots and analysis by default."""
FEWEST = 5
"""Records that a suggestion or a plateau needs."""
FROZEN = """
  the last layer group alone learns, as in the frozen epochs: --set frozen_epochs=0 for all"""
NOISES = 3.0
"""The loss has to fall by so many times its noise. Losses that are noise alone do that in 1 of 100
sweeps of 100 iterations, by simulation."""
TOLERANCE = 0.1
"""Share of a curve's fall by which a loss may lie above the lowest and still be near it."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The settings of a sweep, or of several: one for each weight decay and momentum.

    Raises UserError for a value out of range, named as the command's flag.
    """

    start_lr: float = 1e-5
    """LR of the first update, as the optimizer gets it."""
    end_lr: float = 10
    num_it: int = 100
    """Updates of each sweep."""
    weight_decays: tuple[float, ...] = ()
    """Empty: the recipe's."""
    momenta: tuple[float, ...] = ()
    """Empty: what the recipe has where its LR peaks."""
    linear: bool = False
    """Raise the LR linearly, not exponentially."""
    stop_dv: bool = True
    """End a sweep whose loss diverges or is not finite."""
    recipe_out: Path | None = None
    """New TOML file for the recipe with the values found."""

    def __post_init__(self) -> None:
        if not 0 < self.start_lr < math.inf:
            raise UserError(f"--start-lr must be above 0, not {self.start_lr:g}")
        if not self.start_lr < self.end_lr < math.inf:
            raise UserError(
                f"--end-lr must be above --start-lr, {self.start_lr:g}, not {self.end_lr:g}"
            )
        if self.num_it < 1:
            raise UserError(f"--num-it must be at least 1, not {self.num_it}")
        for weight_decay in self.weight_decays:
            if not 0 <= weight_decay < math.inf:
                raise UserError(f"--wd must be 0 or more, not {weight_decay:g}")
        for momentum in self.momenta:
            if not 0 <= momentum < 1:
                raise UserError(f"--momentum must be in [0, 1), not {momentum:g}")

    def lr(self, iteration: int) -> float:
        """Return the LR of an iteration (from 0): a geometric or, if `linear`, arithmetic series.

        The series starts at start_lr; end_lr would be that of iteration num_it, one past the last.
        """
        fraction = iteration / self.num_it
        if self.linear:
            return self.start_lr + (self.end_lr - self.start_lr) * fraction
        return self.start_lr * (self.end_lr / self.start_lr) ** fraction

    def flags(self) -> list[str]:
        """Return the flags of `fastimagenet.lr_find` that ask for the same."""
        words = ["--start-lr", repr(self.start_lr), "--end-lr", repr(self.end_lr)]
        words += ["--num-it", str(self.num_it)]
        for flag, values in (("--wd", self.weight_decays), ("--momentum", self.momenta)):
            words += [flag, *map(repr, values)] if values else []
        words += ["--linear"] if self.linear else []
        words += [] if self.stop_dv else ["--no-stop-dv"]
        return words + (["--recipe-out", str(self.recipe_out)] if self.recipe_out else [])

    def check_recipe_out(self) -> None:
        """Raise UserError if the recipe found could not be written to `recipe_out`."""
        path = self.recipe_out
        if path is None:
            return
        if path.suffix != ".toml":
            raise UserError(f"--recipe-out {path} must end with .toml, as --recipe takes it")
        if path.is_dir():
            raise UserError(f"--recipe-out {path} is a folder: name a file")
        if path.exists():
            raise UserError(f"--recipe-out {path} exists and is left alone: name a new file")
        if not path.parent.is_dir():
            raise UserError(f"--recipe-out {path}: there is no folder {path.parent}")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise UserError(f"--recipe-out {path}: the folder {path.parent} cannot be written to")

    def describe(self, plan: Plan) -> str:
        """Say what will be swept."""
        first = plan.phases[0]
        return (
            f"sweep: recipe {plan.recipe.name}, {plan.recipe.model}, its first phase: "
            f"{first.image_size} px, batch {first.batch_size}, global batch {first.global_batch}, "
            f"{plan.num_train:,} training images, world size {plan.world_size}\n"
            f"  lr {self.start_lr:g} -> {self.end_lr:g} in {self.num_it} iterations, "
            f"{'linear' if self.linear else 'exponential'}"
            + (FROZEN if plan.recipe.frozen_epochs else "")
        )

    def combinations(self, plan: Plan) -> list[tuple[float, float]]:
        """List the weight decay and momentum of each sweep, without repetitions."""
        weight_decays = self.weight_decays or (plan.recipe.weight_decay,)
        momenta = self.momenta or (plan.momentum(plan.peak_step),)
        return list(itertools.product(dict.fromkeys(weight_decays), dict.fromkeys(momenta)))


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
    """Mean over one validation batch per process, not smoothed; so are the two below."""
    top1: float
    top5: float
    """NaN with five classes or fewer."""


@dataclass(frozen=True, kw_only=True)
class Suggestions:
    """Learning rates that the usual rules read off a curve."""

    valley: float
    steepest: float
    minimum_10: float


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """The learning rates at which the smoothed loss is near its lowest.

    The smoothed loss lags: it still falls where the batches' losses are already flat, so low_lr
    is late. high_lr hardly is, since a diverging loss soon outweighs the past.
    """

    best_loss: float
    """The lowest smoothed training loss."""
    best_lr: float
    low_lr: float
    high_lr: float
    """First and last LR of the stretch; the last may be where the sweep ended."""


@dataclass(frozen=True, kw_only=True, repr=False)
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

    def shown(
        self, skip_first: int = SKIP_FIRST, skip_last: int = SKIP_LAST
    ) -> tuple[SweepRecord, ...]:
        """Return the records to draw and analyse: of finite loss, without the first and last few.

        Where fewer than FEWEST would be left, none is skipped.
        """
        records = self.records
        if len(records) >= skip_first + skip_last + FEWEST:
            records = records[skip_first : len(records) - skip_last]
        return tuple(record for record in records if math.isfinite(record.loss))

    @property
    def losses(self) -> list[float]:
        """Smoothed training losses of the records that are shown by default."""
        return [record.loss for record in self.shown()]

    @property
    def still_falls(self) -> bool:
        """Whether the sweep finished with its lowest loss at the end."""
        losses = self.losses
        return self.ended == "finished" and bool(losses) and losses[-1] == min(losses)

    @property
    def fall(self) -> float:
        """By how much the smoothed loss falls from the first record shown to the lowest."""
        return self.losses[0] - min(self.losses)

    @cached_property
    def noise(self) -> float:
        """Standard error of the smoothed loss at the first record shown.

        It averages few batches there. Their own spread is taken from the differences between
        neighbours, which a trend hardly changes, and from the median of those, which the batches
        of a diverging end do not change.
        """
        batches = batch_losses([record.loss for record in self.records])
        steps = [abs(after - before) for before, after in pairwise(batches)]
        # The median of the absolute value of a normal variable is .6745 of its deviation.
        spread = median(step for step in steps if math.isfinite(step)) / 0.6745 / math.sqrt(2)
        weights = [MEMORY**age for age in range(self.shown()[0].iteration + 1)]
        return spread * math.hypot(*weights) / sum(weights)

    @property
    def readable(self) -> bool:
        """Whether anything can be read off the curve.

        Not with fewer than FEWEST records, with a loss that does not fall by more than its noise,
        or with one that still fell when the sweep was stopped: its lowest and steepest points are
        yet to come.
        """
        losses = self.losses
        if len(losses) < FEWEST or self.fall <= NOISES * self.noise:
            return False
        return self.ended != "stopped" or losses[-1] > min(losses)

    @property
    def outcome(self) -> str:
        """How the sweep ended: "diverged after 85 of 100 iterations, at lr 1.26"."""
        done = len(self.records)
        at = f" lr {plain(self.records[-1].lr, 3)}" if done else ""
        if self.ended == "finished":
            return f"{done} iterations, up to{at}"
        ended = {"not finite": "the loss was not finite"}.get(self.ended, self.ended)
        return f"{ended} after {done} of {self.num_it} iterations" + (f", at{at}" if done else "")

    def __repr__(self) -> str:
        """Say how it ended and what is suggested."""
        lines = [
            f"weight decay {plain(self.weight_decay)}, momentum {plain(self.momentum, 4)}: "
            f"{self.outcome}"
        ]
        if found := self.suggestions:
            lines.append(
                f"valley {plain(found.valley, 3)}, steepest {plain(found.steepest, 3)}, "
                f"minimum / 10 {plain(found.minimum_10, 3)}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Show the same in a notebook, and the loss against the LR."""
        from fastimagenet.report.figures import draw_line, new_figure, with_text

        figure, (axes,) = new_figure()
        draw_line(axes, [(record.lr, record.loss) for record in self.shown()])
        axes.set_xscale("linear" if self.linear else "log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("training loss (nats)")
        return with_text(repr(self), figure)

    @cached_property
    def suggestions(self) -> Suggestions | None:
        """LRs by the three rules of fastai v2 (callback/schedule.py); None if not readable.

        valley, its default, due to ESRI: see `valley_index`. steepest: where d loss / d log(lr) to
        the next record is most negative. minimum_10: a tenth of the LR of the lowest loss.
        """
        if not self.readable:
            return None
        records, losses = self.shown(), self.losses
        slopes = [
            (after.loss - before.loss) / math.log(after.lr / before.lr)
            for before, after in pairwise(records)
        ]
        return Suggestions(
            valley=records[valley_index(losses)].lr,
            steepest=records[slopes.index(min(slopes))].lr,
            minimum_10=records[losses.index(min(losses))].lr / 10,
        )

    @cached_property
    def plateau(self) -> Plateau | None:
        """The stretch around the lowest loss that `near_lowest` allows; None if not readable."""
        if not self.readable:
            return None
        records, losses = self.shown(), self.losses
        low = high = best = losses.index(min(losses))
        limit = near_lowest(losses)
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


class DebiasedAverage:
    """Exponential moving average, corrected for its start at 0."""

    def __init__(self) -> None:
        self._average, self._count = 0.0, 0

    def update(self, value: float) -> float:
        """Add a value and return the average; NaN from the first NaN on."""
        self._count += 1
        self._average = MEMORY * self._average + (1 - MEMORY) * value
        return self._average / (1 - MEMORY**self._count)


def smoothed(values: Iterable[float]) -> list[float]:
    """Return the debiased average after each value."""
    average = DebiasedAverage()
    return [average.update(value) for value in values]


def batch_losses(averages: Sequence[float]) -> list[float]:
    """Return the values that `smoothed` has averaged to these."""
    sums = [value * (1 - MEMORY**count) for count, value in enumerate(averages, start=1)]
    return [(after - MEMORY * before) / (1 - MEMORY) for before, after in pairwise([0.0, *sums])]


class DivergenceRule:
    """Decide when a sweep has diverged, as fastai 0.7 did; asked at each iteration in turn.

    A loss counts as the best from the twelfth iteration on: the first few are mostly chance.
    """

    def __init__(self) -> None:
        self._best = 1e9

    def verdict(self, iteration: int, loss: float) -> Ended | None:
        """Return how the sweep ends at this smoothed loss, unrecorded, or None to continue.

        `iteration` counts from 0.
        """
        if not math.isfinite(loss):
            return "not finite"
        if loss > DIVERGED * self._best:
            return "diverged"
        if loss < self._best and iteration > 10:
            self._best = loss
        return None


def check_validation(plan: Plan, num_val: int) -> None:
    """Raise UserError if the validation images do not fill a batch of every process."""
    smallest = plan.smallest_phase
    batch_size = smallest.batch_size
    if num_val < batch_size * plan.world_size:
        processes = f" on each of {plan.world_size} processes" if plan.world_size > 1 else ""
        fits = f"--set phases.{smallest.index}.batch_size={num_val // plan.world_size} or less"
        if num_val < 2 * plan.world_size:
            fits = "take fewer processes" if plan.world_size > 1 else "there are too few"
        raise UserError(
            f"a validation set of {num_val} images is smaller than one batch of "
            f"{batch_size}{processes}: {fits}"
        )


def valley_index(losses: Sequence[float]) -> int:
    """Return the index of the middle of the valley, counted as fastai does.

    The valley ends where the longest strictly decreasing subsequence, of n losses, ends (the
    first such index), and begins n before. Its middle third is entered at int(n / 3), and the
    result lies half of a third further, int(n / 6). Raises ValueError without losses.
    """
    lengths: list[int] = []
    # By length, minus the highest loss that a decreasing subsequence of that length ends with.
    ends: list[float] = []
    for loss in losses:
        index = bisect_left(ends, -loss)
        ends[index : index + 1] = [-loss]
        lengths.append(index + 1)
    longest = max(lengths)
    # A curve that only falls begins one before its first loss.
    return max(0, lengths.index(longest) - longest + int(longest / 3) + int(longest / 6))


def near_lowest(losses: Sequence[float]) -> float:
    """Return the highest loss near the lowest: above it by a tenth of the fall from the first."""
    return min(losses) + TOLERANCE * (losses[0] - min(losses))
