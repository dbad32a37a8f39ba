"""Sweeps side by side: the best one, what the recipe takes from it, or why nothing."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from fastimagenet.lr_finder.sweep import (
    FEWEST,
    NOISES,
    Suggestions,
    Sweep,
    SweepConfig,
    near_lowest,
)
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Recipe
from pipelines.formats import plain

HIGH_ENOUGH = 0.5
"""Share of the highest LR tolerated by any sweep that the best sweep has to tolerate."""


def best_sweep(sweeps: Sequence[Sweep]) -> Sweep | None:
    """Return the sweep of the largest weight decay that still tolerates a high LR.

    The rule of the super-convergence study. Only sweeps whose lowest loss is near the lowest of
    all are compared: with far too large a weight decay a network learns little at a high LR, but
    does not diverge. Of these, a high LR is at least half the highest `high_lr`. Among sweeps of
    the same weight decay, the one of the lowest loss wins. None without a plateau.
    """
    found = [(sweep, flat) for sweep in sweeps if (flat := sweep.plateau) is not None]
    if not found:
        return None
    lowest, _ = min(found, key=lambda pair: pair[1].best_loss)
    limit = near_lowest(lowest.losses)
    found = [(sweep, flat) for sweep, flat in found if flat.best_loss <= limit]
    high = HIGH_ENOUGH * max(flat.high_lr for _, flat in found)
    found = [(sweep, flat) for sweep, flat in found if flat.high_lr >= high]
    return max(found, key=lambda pair: (pair[0].weight_decay, -pair[1].best_loss))[0]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best sweep, the LR taken from it, and the recipe settings that follow."""

    index: int
    """Of the sweep, from 0."""
    suggestions: Suggestions
    lr: float
    """What the optimizer is given."""
    max_lr: float
    """The same in the recipe's units."""
    settings: tuple[str, ...]
    """For --set: "max_lr=0.24"."""

    @property
    def flags(self) -> str:
        """The settings as they are typed after `python -m fastimagenet.train`."""
        return " ".join(f"--set {shlex.quote(setting)}" for setting in self.settings)


def choose(plan: Plan, sweeps: Sequence[Sweep], config: SweepConfig) -> Choice | None:
    """Choose among the sweeps of a plan; None where nothing can be read off them.

    The LR is where the smoothed loss falls fastest: a tenth of the minimum depends on where the
    sweep ends if the loss still falls there; valley, the default of fastai v2, is low for training
    in few epochs. Weight decay and momentum are set if they were swept.
    """
    sweep = best_sweep(sweeps)
    if sweep is None:
        return None
    suggestions = sweep.suggestions
    assert suggestions is not None, "a sweep with a plateau has suggestions"
    lr = suggestions.steepest
    max_lr = recipe_max_lr(plan, lr)
    settings = [f"max_lr={max_lr}"]
    if config.weight_decays:
        settings.append(f"weight_decay={sweep.weight_decay}")
    if config.momenta:
        settings.append(momentum_setting(plan.recipe, sweep.momentum))
    return Choice(
        index=list(sweeps).index(sweep),
        suggestions=suggestions,
        lr=lr,
        max_lr=max_lr,
        settings=tuple(settings),
    )


def recipe_max_lr(plan: Plan, lr: float) -> float:
    """Return the max_lr with which the plan's LR peaks at `lr`, to 3 significant digits.

    max_lr is not always the peak: lr_reference_batch multiplies it by the global batch, and
    lr_spans hold multiples of it. All of that is linear in max_lr, so the plan gives the factor.
    The peak is that of all phases, not of the one swept: where a later phase has a larger batch
    and so a higher LR, no step of the run exceeds the LR that the sweep has found.
    """
    peak = plan.lr(plan.peak_step)
    return float(f"{lr * plan.recipe.max_lr / peak:.3g}")


def momentum_setting(recipe: Recipe, momentum: float) -> str:
    """Return the setting with which the recipe has this momentum where its LR peaks.

    A schedule that cycles the momentum has its lower end there; the upper end is raised only if
    it would be below.
    """
    if recipe.schedule == "use_clr_beta" and len(recipe.use_clr_beta) == 4:
        div, pct, high, _ = recipe.use_clr_beta
        return f"use_clr_beta={[div, pct, max(high, momentum), momentum]}"
    if recipe.schedule == "one_cycle":
        pct_start, div, final_div, high, _ = recipe.one_cycle
        return f"one_cycle={[pct_start, div, final_div, max(high, momentum), momentum]}"
    return f"momentum={momentum}"


def why_nothing(sweeps: Sequence[Sweep]) -> str:
    """Say why `choose` returned None, and what to try."""
    if not sweeps:
        return "no sweep was made"
    endings = {sweep.ended for sweep in sweeps}
    if "stopped" in endings:
        return "the sweep was stopped too early"
    long = [sweep for sweep in sweeps if len(sweep.shown()) >= FEWEST]
    if long:
        remedy = "try a lower --start-lr, or a higher --num-it"
        sweep = max(long, key=lambda each: each.fall)
        if not sweep.fall:
            return f"the loss never fell: {remedy}"
        most = ", at most" if len(long) > 1 else ""
        return (
            f"the loss hardly fell{most} by {plain(sweep.fall, 2)} from {plain(sweep.losses[0], 4)}"
            f", where {plain(NOISES * sweep.noise, 2)} may be chance: {remedy}"
        )
    if "finished" in endings:
        return "there are too few iterations: try a higher --num-it"
    return "the loss is not finite, or diverges, in the first iterations: try a lower --start-lr"


FIELDS = ("weight_decay", "momentum")
"""What sweeps can differ in."""


def labels(sweeps: Sequence[Sweep]) -> tuple[str, list[str]]:
    """Return a legend's title and labels: "weight decay" and the value of each sweep.

    Sweeps that are all alike are numbered.
    """
    fields = _differing(sweeps)
    if not fields:
        return "sweep", [str(number) for number in range(1, len(sweeps) + 1)]
    return ", ".join(fields).replace("_", " "), [
        ", ".join(plain(getattr(sweep, field)) for field in fields) for sweep in sweeps
    ]


def in_words(sweep: Sweep, sweeps: Sequence[Sweep]) -> str:
    """Name a sweep by what differs from the others: "weight decay 0.01, momentum 0.9".

    By its weight decay where nothing differs.
    """
    fields = _differing(sweeps) or ["weight_decay"]
    words = (f"{field} {plain(getattr(sweep, field))}" for field in fields)
    return ", ".join(words).replace("_", " ")


def _differing(sweeps: Sequence[Sweep]) -> list[str]:
    return [field for field in FIELDS if len({getattr(sweep, field) for sweep in sweeps}) > 1]
