"""Means and ratios with their 95 % confidence intervals, over rounds or seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, log, sqrt
from statistics import fmean, stdev
from typing import Any

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles of Student's t distribution with 1 to 10 degrees of freedom."""


@dataclass(frozen=True)
class Estimate:
    """A mean with the ends of its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return shown(vars(self))


def shown(value: Mapping[str, float], scale: float = 1.0, unit: str = "") -> str:
    """Format an estimate as JSON has it, such as "1,204 (1,190 .. 1,218)"."""
    mean, low, high = (short(scale * value[key]) for key in ("mean", "low", "high"))
    return f"{mean} ({low} .. {high}){unit}"


def short(value: float) -> str:
    """Format with four digits, or all of them before the point: "0.02143", "11,152"."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def estimate(values: Sequence[float], signed: bool = False) -> Estimate:
    """Compute mean and 95 % interval of at least two values, by Student's t.

    It ends at 0, since few values would often give one below, which no time or rate has; not if
    `signed`, for differences.
    """
    mean, freedom = fmean(values), len(values) - 1
    # Above ten degrees the first terms of the Cornish-Fisher expansion are exact to 0.003.
    tail = 1.96 + 2.372 / freedom + 2.823 / freedom**2
    student = STUDENT[freedom - 1] if freedom <= 10 else tail
    margin = student * stdev(values) / sqrt(len(values))
    low = mean - margin
    return Estimate(mean, low if signed else max(0.0, low), mean + margin)


def ratio(values: Sequence[float], base: Sequence[float]) -> Estimate:
    """Compute the geometric mean of the round-by-round ratios and its 95 % interval."""
    logs = [log(value / other) for value, other in zip(values, base, strict=True)]
    found = estimate(logs, signed=True)
    return Estimate(exp(found.mean), exp(found.low), exp(found.high))


def estimates(rounds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the mean of each contestant's rounds with its interval, as JSON has them."""
    return {name: asdict(estimate(values)) for name, values in rounds.items()}


def ratios(rounds: Mapping[str, Sequence[float]], base: str) -> dict[str, Any]:
    """Return the ratios of all others to `base`, as JSON has them; {} where it is not there."""
    others = [name for name in rounds if base in rounds and name != base]
    return {name: asdict(ratio(rounds[name], rounds[base])) for name in others}


def interval(values: Sequence[float], signed: bool = False) -> dict[str, Any]:
    """Return `estimate` as JSON has it; a single value has no interval: null, null."""
    if len(values) == 1:
        return {"mean": values[0], "low": None, "high": None}
    return asdict(estimate(values, signed))


def interval_text(value: Mapping[str, Any], text: Callable[[float], str], single: str = "") -> str:
    """Format an interval, such as "24 s (20 s .. 28 s)"; `single` follows a mean without one."""
    if value["low"] is None:
        return text(value["mean"]) + single
    return f"{text(value['mean'])} ({text(value['low'])} .. {text(value['high'])})"
