"""What a sweep says about the recipe: the learning rate it suggests, in the recipe's own units."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastimagenet.sweep import FEWEST, Suggestions, Sweep, best_sweep, shown, suggest

if TYPE_CHECKING:
    from fastimagenet.plan import Plan
    from fastimagenet.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best sweep, the LR taken from it, and the recipe fields that it makes."""

    index: int
    """The sweep's place, from 0."""
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


def choose(
    plan: Plan, sweeps: Sequence[Sweep], weight_decay: bool, momentum: bool
) -> Choice | None:
    """The choice among the sweeps of a plan; None where nothing can be read off them.

    `weight_decay` and `momentum`: whether these were swept, so that they belong to the choice.
    """
    sweep = best_sweep(sweeps)
    if sweep is None:
        return None
    suggestions = suggest(sweep)
    assert suggestions is not None, "a sweep with a plateau has suggestions"
    lr = suggested_lr(suggestions)
    max_lr = recipe_max_lr(plan, lr)
    settings = [f"max_lr={max_lr}"]
    if weight_decay:
        settings.append(f"weight_decay={sweep.weight_decay}")
    if momentum:
        settings.append(momentum_setting(plan.recipe, sweep.momentum))
    return Choice(
        index=list(sweeps).index(sweep),
        suggestions=suggestions,
        lr=lr,
        max_lr=max_lr,
        settings=tuple(settings),
    )


def suggested_lr(suggestions: Suggestions) -> float:
    """The one of the three that becomes max_lr: where the smoothed loss falls fastest.

    A tenth of the minimum depends on where the sweep ends if the loss still falls there; valley,
    the default of fastai v2, is low for training in few epochs.
    """
    return suggestions.steepest


def recipe_max_lr(plan: Plan, lr: float) -> float:
    """The max_lr with which the plan's LR peaks at `lr`, to 3 significant digits.

    max_lr is not always the peak: lr_reference_batch multiplies it by the global batch, and
    lr_spans hold multiples of it. All of that is linear in max_lr, so the plan as it is gives the
    factor. The peak is that of all phases, not of the one swept: where a later phase has a larger
    batch and so a higher LR, no step of the run goes beyond the LR that the sweep has found.
    """
    peak = plan.lr(plan.peak_step)
    return float(f"{lr * plan.recipe.max_lr / peak:.3g}")


def momentum_setting(recipe: Recipe, momentum: float) -> str:
    """The setting with which the recipe has this momentum where its LR peaks.

    A schedule that cycles the momentum has its lower end there; the upper end moves out of the
    way only where it has to.
    """
    if recipe.schedule == "use_clr_beta" and len(recipe.use_clr_beta) == 4:
        div, pct, high, _ = recipe.use_clr_beta
        return f"use_clr_beta={[div, pct, max(high, momentum), momentum]}"
    if recipe.schedule == "one_cycle":
        pct_start, div, final_div, high, _ = recipe.one_cycle
        return f"one_cycle={[pct_start, div, final_div, max(high, momentum), momentum]}"
    return f"momentum={momentum}"


def why_nothing(sweeps: Sequence[Sweep]) -> str:
    """Why `choose` gave None, and what to try, in a sentence."""
    endings = {sweep.ended for sweep in sweeps}
    if "stopped" in endings:
        return "the sweep was stopped too early"
    if max(len(shown(sweep)) for sweep in sweeps) >= FEWEST:
        return "the loss never fell: try a lower --start-lr, or a higher --num-it"
    if "finished" in endings:
        return "there are too few iterations: try a higher --num-it"
    return (
        "the loss is not finite, or runs away, within the first iterations: try a lower --start-lr"
    )
