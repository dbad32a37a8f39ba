"""Schedules as values: frozen objects that map an update's index (from 0) to a LR or a momentum.

`use_clr_beta` follows the 2018 implementation of Leslie Smith's 1cycle policy to the letter,
including its momentum, which runs one update ahead of the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]


def _require(condition: bool, field: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{field} must be {rule}, not {value}")


@dataclass(frozen=True)
class Constant:
    """A value that is the same at every step."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class ClrBetaLR:
    """Up from max_lr/div, back down as far, then towards max_lr/(100 div): all pieces linear.

    With c = int(num_steps (1 - pct/100) / 2) the peak is at step c, max_lr/div again at 2c; the
    rest (pct per cent of the cycle) anneals and never quite reaches its end. Every LR is > 0.

    Raises ValueError naming the field.
    """

    num_steps: int
    max_lr: float
    div: float
    pct: float
    """Share of the cycle left to the final annealing, in PER CENT (13.68 means 13.68 %)."""

    def __post_init__(self) -> None:
        _require(self.max_lr > 0, "max_lr", "above 0", self.max_lr)
        _require(self.div > 0, "use_clr_beta: div", "above 0", self.div)
        _half_cycle(self.num_steps, self.pct)

    def __call__(self, step: int) -> float:
        half = _half_cycle(self.num_steps, self.pct)
        low = self.max_lr / self.div
        if step <= 2 * half:
            return low * (1 + _tent(step, half) * (self.div - 1))
        return low * (1 - 0.99 * (step - 2 * half) / (self.num_steps - 2 * half))


@dataclass(frozen=True)
class ClrBetaMomentum:
    """Falls from max_mom to min_mom while the LR rises, returns, then stays at max_mom.

    One update ahead of the LR, as in the original: step i gets the cycle's value at i + 1, so
    that the first update is already below max_mom.

    Raises ValueError naming the field.
    """

    num_steps: int
    pct: float
    max_mom: float
    min_mom: float

    def __post_init__(self) -> None:
        _check_momentum_range("use_clr_beta", "max_mom", self.max_mom, "min_mom", self.min_mom)
        _half_cycle(self.num_steps, self.pct)

    def __call__(self, step: int) -> float:
        half = _half_cycle(self.num_steps, self.pct)
        if step + 1 > 2 * half:
            return self.max_mom
        return self.max_mom - (self.max_mom - self.min_mom) * _tent(step + 1, half)


def use_clr_beta(
    num_steps: int, max_lr: float, *parameters: float
) -> tuple[ClrBetaLR, ClrBetaMomentum | None]:
    """Make LR and momentum of the parameters (div, pct[, max_mom, min_mom]) over num_steps updates.

    The momentum is None where its range is left out. Raises ValueError naming the field; a tuple
    of three, whose momentum the original dropped without a word, is an error.
    """
    number, rule = len(parameters), "(div, pct) or (div, pct, max_mom, min_mom)"
    _require(number in (2, 4), "use_clr_beta", rule, f"{number} values")
    div, pct, *momentum_range = parameters
    lr = ClrBetaLR(num_steps, max_lr, div, pct)
    return lr, ClrBetaMomentum(num_steps, pct, *momentum_range) if momentum_range else None


def _half_cycle(num_steps: int, pct: float) -> int:
    _require(0 <= pct < 100, "use_clr_beta: pct", "in per cent, from 0 to below 100", pct)
    half = int(num_steps * (1 - pct / 100) / 2)
    rule = f"enough for a rise and a fall beside pct={pct:g}"
    _require(num_steps > 2 and half >= 1, "use_clr_beta: num_steps", rule, num_steps)
    return half


def _tent(step: int, half: int) -> float:
    """Rise from 0 at step 0 to 1 at `half`, and fall to 0 at 2 half."""
    return step / half if step <= half else 1 - (step - half) / half


@dataclass(frozen=True)
class OneCycleLR:
    """The cosine shape of torch.optim.lr_scheduler.OneCycleLR and of fastai's fit_one_cycle.

    From max_lr/div_factor to max_lr over pct_start of the steps, then to
    max_lr/(div_factor final_div_factor) at the last step.

    Raises ValueError naming the field.
    """

    num_steps: int
    max_lr: float
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def __post_init__(self) -> None:
        _require(self.max_lr > 0, "max_lr", "above 0", self.max_lr)
        _require(self.div_factor > 0, "one_cycle: div_factor", "above 0", self.div_factor)
        final = self.final_div_factor
        _require(final > 0, "one_cycle: final_div_factor", "above 0", final)
        _check_one_cycle(self.num_steps, self.pct_start)

    def __call__(self, step: int) -> float:
        first = self.max_lr / self.div_factor
        last = first / self.final_div_factor
        return _cosine_cycle(step, self.num_steps, self.pct_start, (first, self.max_lr, last))


@dataclass(frozen=True)
class OneCycleMomentum:
    """Momentum of the cosine one-cycle: max_momentum -> base_momentum -> max_momentum.

    Raises ValueError naming the field.
    """

    num_steps: int
    pct_start: float = 0.3
    max_momentum: float = 0.95
    base_momentum: float = 0.85

    def __post_init__(self) -> None:
        _check_momentum_range(
            "one_cycle", "max_momentum", self.max_momentum, "base_momentum", self.base_momentum
        )
        _check_one_cycle(self.num_steps, self.pct_start)

    def __call__(self, step: int) -> float:
        values = (self.max_momentum, self.base_momentum, self.max_momentum)
        return _cosine_cycle(step, self.num_steps, self.pct_start, values)


def one_cycle(
    num_steps: int,
    max_lr: float,
    pct_start: float,
    div_factor: float,
    final_div_factor: float,
    max_momentum: float,
    base_momentum: float,
) -> tuple[OneCycleLR, OneCycleMomentum]:
    """Make LR and momentum of the recipe field. Raises ValueError naming the field."""
    lr = OneCycleLR(num_steps, max_lr, pct_start, div_factor, final_div_factor)
    return lr, OneCycleMomentum(num_steps, pct_start, max_momentum, base_momentum)


def _check_one_cycle(num_steps: int, pct_start: float) -> None:
    _require(0 < pct_start < 1, "one_cycle: pct_start", "a fraction between 0 and 1", pct_start)
    rise, total = pct_start * num_steps - 1, num_steps - 1
    rule = f"enough for pct_start={pct_start:g}"
    _require(0 < rise < total, "one_cycle: num_steps", rule, num_steps)


def _check_momentum_range(
    field: str, max_name: str, high: float, min_name: str, low: float
) -> None:
    _require(0 <= high < 1, f"{field}: {max_name}", "in [0, 1)", high)
    _require(0 <= low <= high, f"{field}: {min_name}", f"from 0 to {max_name} = {high:g}", low)


def _cosine_cycle(
    step: int, num_steps: int, pct_start: float, values: tuple[float, float, float]
) -> float:
    peak, end = pct_start * num_steps - 1, num_steps - 1
    first, middle, last = values
    if step <= peak:
        return _cosine(first, middle, step / peak)
    return _cosine(middle, last, (step - peak) / (end - peak))


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))


@dataclass(frozen=True)
class PiecewiseLinear:
    """Linear inside each span `(first, last, start, end)`; spans may jump where they meet.

    `first` and `last` are steps (fractions are fine, for spans that come from epochs) or, for the
    check of a recipe, epochs; at `last` the next span holds. Past the last span its end value
    stays.

    Raises ValueError naming the span that is empty or does not meet its neighbour.
    """

    spans: tuple[tuple[float, float, float, float], ...]

    def __post_init__(self) -> None:
        if not self.spans:
            raise ValueError("lr_spans must hold at least one (first, last, start, end)")
        expected = 0.0
        for index, (first, last, start, end) in enumerate(self.spans):
            where = f"lr_spans.{index}"
            _require(first == expected, where, f"a span that begins at {expected:g}", f"{first:g}")
            _require(last > first, where, f"a span that ends after {first:g}", f"{last:g}")
            _require(start >= 0 and end >= 0, where, "of values from 0 up", (start, end))
            expected = last

    def __call__(self, step: int) -> float:
        for first, last, start, end in self.spans:
            if step < last:
                return start + (end - start) * (step - first) / (last - first)
        return self.spans[-1][3]
