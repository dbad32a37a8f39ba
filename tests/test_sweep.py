"""The curve of a sweep: rates, smoothing, the rule that ends it, and what is read off it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from statistics import fmean

import pytest

from fastimagenet.lr_finder import sweep as sweeping
from fastimagenet.lr_finder.analysis import best_sweep, why_nothing
from fastimagenet.lr_finder.sweep import (
    DivergenceRule,
    Plateau,
    Sweep,
    SweepConfig,
    SweepRecord,
    batch_losses,
    smoothed,
    valley_index,
)


def sweep_of(losses: Sequence[float], weight_decay: float = 1e-4, **changes: float) -> Sweep:
    """A sweep with these smoothed losses, at LRs 0.001, 0.002, 0.004, ..."""
    records = tuple(
        SweepRecord(
            iteration=iteration,
            lr=0.001 * 2**iteration,
            momentum=0.9,
            loss=loss,
            val_loss=0.0,
            top1=0.0,
            top5=0.0,
        )
        for iteration, loss in enumerate(losses)
    )
    return Sweep(
        weight_decay=weight_decay,
        momentum=changes.get("momentum", 0.9),
        num_it=len(records),
        linear=False,
        records=records,
        ended="finished",
    )


def test_the_rates_of_a_sweep() -> None:
    rates = [SweepConfig().lr(k) for k in range(100)]
    golden = {0: 1e-5, 1: 1.148154e-5, 20: 1.584893e-4, 50: 0.01, 75: 0.3162278, 99: 8.709636}
    assert {k: rates[k] for k in golden} == pytest.approx(golden)
    linear = SweepConfig(start_lr=1, end_lr=11, num_it=5, linear=True)
    rates = [linear.lr(k) for k in range(5)]
    assert rates == pytest.approx([1, 3, 5, 7, 9])


def test_smoothing_by_hand() -> None:
    assert smoothed([3.0] * 50) == pytest.approx([3.0] * 50)
    # 0.98 x 0.02 + 0.02 x 2 = 0.0596, over 1 - 0.98^2; then 0.98 x 0.0596 + 0.02 x 4 = 0.138408.
    assert smoothed([1, 2, 4]) == pytest.approx([1, 0.0596 / 0.0396, 0.138408 / 0.058808])
    assert list(map(math.isnan, smoothed([1, math.nan, 1]))) == [False, True, True]


def verdicts(losses: Sequence[float]) -> list[str | None]:
    rule = DivergenceRule()
    return [rule.verdict(iteration, loss) for iteration, loss in enumerate(losses)]


def test_a_loss_counts_as_the_best_from_the_twelfth_on() -> None:
    # Were one of the first eleven to count, 4.5 would be too high.
    assert verdicts([1.0] * 11 + [4.5, 17.9]) == [None] * 13
    assert verdicts([1.0] * 11 + [4.5, 18.1]) == [None] * 12 + ["diverged"]
    assert verdicts([1.0] * 12 + [4.0, 4.1]) == [None] * 13 + ["diverged"]
    assert verdicts([9.0] * 11 + [2, 3, 1, 2, 4.1]) == [None] * 15 + ["diverged"]


def test_before_there_is_a_best_only_a_giant_diverges() -> None:
    assert verdicts([3.9e9]) == [None]
    assert verdicts([4.1e9]) == ["diverged"]


def test_a_loss_that_is_not_finite_ends_it_at_once() -> None:
    assert verdicts([math.nan]) == ["not finite"]
    assert verdicts([1.0, math.inf]) == [None, "not finite"]


def test_what_is_shown() -> None:
    assert [r.iteration for r in sweep_of([1.0] * 100).shown()] == list(range(10, 95))
    assert [r.iteration for r in sweep_of([1.0] * 20).shown()] == list(range(10, 15))
    assert len(sweep_of([1.0] * 19).shown()) == 19
    broken = [1.0, math.nan, 2.0, math.inf, 3.0]
    assert [r.iteration for r in sweep_of(broken).shown()] == [0, 2, 4]
    assert [r.iteration for r in sweep_of([math.nan] * 12 + [1.0] * 8).shown()] == [12, 13, 14]
    assert sweep_of([]).shown() == ()
    assert [r.iteration for r in sweep_of([1.0] * 12).shown(4, 0)] == list(range(4, 12))
    assert [r.iteration for r in sweep_of([1.0] * 9).shown(4, 1)] == list(range(9))


def brute_valley(losses: Sequence[float]) -> int:
    """Over all subsequences: the index as fastai counts it."""
    found: dict[int, int] = {}
    for length in range(1, len(losses) + 1):
        for indices in combinations(range(len(losses)), length):
            chosen = [losses[index] for index in indices]
            if all(a > b for a, b in pairwise(chosen)):
                found.setdefault(length, indices[-1])
                found[length] = min(found[length], indices[-1])
    length = max(found)
    start = found[length] - length
    return max(0, start + math.floor(length / 3) + math.floor(length / 3 / 2))


def test_the_valley_against_all_subsequences() -> None:
    draw = random.Random(1)
    for _ in range(200):
        losses = [draw.randint(0, 6) for _ in range(draw.randint(1, 9))]
        assert valley_index(losses) == brute_valley(losses), losses


def test_valleys_by_hand() -> None:
    assert valley_index(list(range(20, 0, -1))) == -1 + 6 + 3
    # The long fall of 12, from index 5 to 16, between two short ones.
    curve = [50, 51, 50, 49, 52, *range(48, 36, -1), 60, 55, 53]
    # 51, 50, 49 come before it: a subsequence may leave out losses (52).
    assert valley_index(curve) == 16 - 15 + 5 + 2
    assert valley_index([1, 2, 3]) == 0
    assert valley_index([2, 1]) == 0


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any fall counts: curves of few points, which no batches could have."""
    monkeypatch.setattr(sweeping, "NOISES", 0.0)


@pytest.mark.usefixtures("exact")
def test_suggestions_by_hand() -> None:
    losses = [10, 9.9, 9, 8, 4, 3, 2, 3, 5]
    found = sweep_of(losses).suggestions
    assert found is not None
    # Seven losses fall, up to index 6: 6 - 7 + 2 + 1 = 2.
    assert found.valley == 0.004
    assert found.steepest == 0.008  # from 8 to 4
    assert found.minimum_10 == pytest.approx(0.0064)


@pytest.mark.usefixtures("exact")
def test_the_slope_is_that_over_the_logarithm() -> None:
    sweep = sweep_of([10, 9, 6, 5, 4])
    rates = [0.1, 0.2, 1.0, 1.1, 3.0]  # of the falls by 1, 3, 1, 1 the third is over the least
    changed = [replace(record, lr=lr) for record, lr in zip(sweep.records, rates, strict=True)]
    found = replace(sweep, records=tuple(changed)).suggestions
    assert found is not None
    assert found.steepest == 1.0


@pytest.mark.parametrize(
    "losses", [[], [1.0] * 9, [1, 2, 3, 4, 5], [1.0, 2, 1, 3, 1], [4, 3, 2, 1], [math.nan] * 40]
)
def test_nothing_is_read_off_too_short_a_curve_or_one_that_never_falls(
    losses: list[float],
) -> None:
    assert sweep_of(losses).suggestions is None
    assert sweep_of(losses).plateau is None
    assert best_sweep([sweep_of(losses)]) is None


def batches(count: int, seed: int, slope: float) -> list[float]:
    """Losses of batches around ln 2, which fall by `slope` a batch."""
    draw = random.Random(seed)
    return [draw.gauss(math.log(2) + 0.02, 0.05) - slope * index for index in range(count)]


@pytest.mark.parametrize("count", [40, 100])
def test_nothing_is_suggested_from_noise(count: int) -> None:
    level = [sweep_of(smoothed(batches(count, seed, 0.0))) for seed in range(100)]
    assert sum(sweep.suggestions is not None for sweep in level) <= 3
    assert all(sweep.fall > 0 for sweep in level[:3])
    falling = [sweep_of(smoothed(batches(count, seed, 0.3 / count))) for seed in range(100)]
    assert all(sweep.suggestions is not None for sweep in falling)


def test_by_how_much_it_hardly_fell_is_said() -> None:
    values = batches(40, 0, 0.0)
    sweeps = [sweep_of(smoothed(values)), sweep_of(smoothed(values[::-1]))]
    assert batch_losses([r.loss for r in sweeps[0].records]) == pytest.approx(values)
    # On average that of 11 batches, by the spread that they were drawn with.
    noises = [sweep_of(smoothed(batches(40, seed, 0.0))).noise for seed in range(200)]
    assert fmean(noises) == pytest.approx(0.05 / math.sqrt(11), rel=0.05)
    text = why_nothing(sweeps)
    fall = max(sweep.fall for sweep in sweeps)
    assert text.startswith(f"the loss hardly fell, at most by {fall:.2g} from ")
    assert "may be chance: try a lower --start-lr, or a higher --num-it" in text


@pytest.mark.usefixtures("exact")
def test_the_plateau_by_hand() -> None:
    # A fall of 10: up to 1 above the lowest, 5.9 is in, 6.1 is out on both sides.
    found = sweep_of([15, 12, 5.5, 6.1, 5.9, 5, 5.2, 6.0, 6.1, 5.1, 40]).plateau
    assert found == Plateau(
        best_loss=5,
        best_lr=pytest.approx(0.032),
        low_lr=pytest.approx(0.016),
        high_lr=pytest.approx(0.128),
    )


@pytest.mark.usefixtures("exact")
def test_a_plateau_may_reach_the_end_of_the_curve() -> None:
    found = sweep_of([15, 14, 9, 5.5, 5]).plateau
    assert found is not None
    assert (found.low_lr, found.best_lr, found.high_lr) == pytest.approx((0.008, 0.016, 0.016))


def falling_to(lowest: int, length: int = 12, best_loss: float = 1.0) -> list[float]:
    """Losses that fall from 5 to best_loss at index `lowest` and leap up behind it."""
    fall = [5 - (5 - best_loss) * index / lowest for index in range(lowest + 1)]
    return fall + [20.0] * (length - lowest - 1)


def test_the_largest_weight_decay_that_tolerates_a_high_lr_wins() -> None:
    small, middle = sweep_of(falling_to(8), 1e-4), sweep_of(falling_to(7), 1e-3)
    large, flat = sweep_of(falling_to(6), 1e-2), sweep_of([1.0] * 12, 1)
    # LRs double from one index to the next: 7 has just half of 8.
    assert best_sweep([small, middle, large, flat]) is middle
    assert best_sweep([flat, large, middle, small]) is middle
    assert best_sweep([small, large]) is small
    assert best_sweep([flat]) is None
    assert best_sweep([]) is None


def test_a_weight_decay_that_keeps_the_network_from_learning_does_not_win() -> None:
    good = sweep_of(falling_to(8, best_loss=1.0), 1e-3)
    near = sweep_of(falling_to(8, best_loss=1.39), 1e-2)  # the limit is 1.4
    poor = sweep_of(falling_to(8, best_loss=1.41), 1e-1)
    assert best_sweep([good, near, poor]) is near
    # Nor does its high LR count, beside which the others' were low.
    poor = sweep_of(falling_to(11, best_loss=3.0), 1e-1)
    assert best_sweep([good, near, poor]) is near


def test_among_equal_weight_decays_the_lowest_loss_wins() -> None:
    high = sweep_of(falling_to(8, best_loss=1.2), momentum=0.8)
    low = sweep_of(falling_to(8, best_loss=1.1), momentum=0.9)
    assert best_sweep([high, low]) is best_sweep([low, high]) is low
