"""Schedules against numbers: the golden values of the 2018 classes, and torch's OneCycleLR."""

from __future__ import annotations

import pytest
import torch

from fastimagenet.recipes import schedule
from fastimagenet.recipes.schedule import ClrBetaLR, OneCycleLR, OneCycleMomentum, PiecewiseLinear

GOLDEN = {  # produced by the 2018 schedule classes: nb=100, lr=1, (10, 10, .95, .85)
    0: (0.1, 0.947778),
    1: (0.12, 0.945556),
    44: (0.98, 0.85),
    45: (1.0, 0.852222),
    46: (0.98, 0.854444),
    89: (0.12, 0.95),
    90: (0.1, 0.95),
    91: (0.0901, 0.95),
    98: (0.0208, 0.95),
    99: (0.0109, 0.95),
}


@pytest.mark.parametrize("step", GOLDEN)
def test_use_clr_beta_gives_the_golden_values(step: int) -> None:
    lr, momentum = schedule.use_clr_beta(100, 1.0, 10, 10, 0.95, 0.85)
    assert momentum is not None
    assert lr(step) == pytest.approx(GOLDEN[step][0], abs=1e-12)
    assert momentum(step) == pytest.approx(GOLDEN[step][1], abs=5e-7)


@pytest.mark.parametrize(
    ("steps", "peak", "div", "pct", "half", "first", "last"),
    [(9310, 0.8, 10, 13.68, 4018, 0.08, 0.00086217), (6860, 3.0, 20, 10, 3087, 0.15, 0.00171647)],
)
def test_the_studys_runs(
    steps: int, peak: float, div: float, pct: float, half: int, first: float, last: float
) -> None:
    lr = ClrBetaLR(steps, peak, div, pct)
    values = [lr(step) for step in range(steps)]
    assert values[0] == pytest.approx(first)
    assert values.index(max(values)) == half
    assert max(values) == pytest.approx(peak)
    assert values[2 * half] == pytest.approx(first)
    assert values[-1] == pytest.approx(last, rel=1e-5)
    assert steps - 2 * half == {9310: 1274, 6860: 686}[steps]


def test_without_a_momentum_range_there_is_no_momentum_schedule() -> None:
    assert schedule.use_clr_beta(100, 1.0, 10, 10)[1] is None


@pytest.mark.parametrize(
    ("steps", "parameters", "field"),
    [
        (2, (10, 10), "num_steps"),
        (2, (10, 0), "num_steps"),
        (100, (10,), "1 values"),
        (3, (10, 50), "num_steps"),
        (100, (10, 100), "pct"),
        (100, (10, -1), "pct"),
        (100, (0, 10), "div"),
        (100, (10, 10, 0.85, 0.95), "min_mom"),
        (100, (10, 10, 1.0, 0.9), "max_mom"),
        (100, (10, 10, 0.9), "3 values"),
    ],
)
def test_bad_values_are_named(steps: int, parameters: tuple[float, ...], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        schedule.use_clr_beta(steps, 1.0, *parameters)


@pytest.mark.parametrize("pct_start", [0.3, 0.25])
def test_one_cycle_equals_torchs(pct_start: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.7, total_steps=97, pct_start=pct_start
    )
    lr, momentum = OneCycleLR(97, 0.7, pct_start), OneCycleMomentum(97, pct_start)
    for step in range(97):
        group = optimizer.param_groups[0]
        assert lr(step) == pytest.approx(group["lr"], rel=1e-9)
        assert momentum(step) == pytest.approx(group["momentum"], rel=1e-9)
        optimizer.step()
        if step < 96:
            reference.step()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [((100, 0.0), "max_lr"), ((100, 1.0, 1.0), "pct_start"), ((2, 1.0, 0.3), "num_steps")],
)
def test_one_cycle_names_bad_values(arguments: tuple[float, ...], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        OneCycleLR(*arguments)  # type: ignore[arg-type]


def test_piecewise_linear_by_hand() -> None:
    lr = PiecewiseLinear(((0, 10, 1.0, 2.0), (10, 14, 2.0, 0.0), (14, 20, 0.5, 0.5)))
    assert [lr(step) for step in (0, 5, 9, 10, 12, 13, 14, 19, 99)] == pytest.approx(
        [1.0, 1.5, 1.9, 2.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    )


@pytest.mark.parametrize(
    "spans",
    [(), ((1, 2, 0, 1),), ((0, 2, 0, 1), (3, 4, 0, 1)), ((0, 0, 0, 1),), ((0, 1, -1.0, 1),)],
)
def test_piecewise_linear_refuses_holes(spans: tuple[tuple[float, float, float, float]]) -> None:
    with pytest.raises(ValueError, match="lr_spans"):
        PiecewiseLinear(spans)
