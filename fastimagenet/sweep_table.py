"""Sweeps in words: what tells them apart, and the table of what each of them gave."""

from __future__ import annotations

from collections.abc import Sequence

from fastimagenet.formats import plain
from fastimagenet.sweep import Sweep, plateau, suggest

HEADER = (
    *("weight decay", "momentum", "steepest", "valley", "minimum / 10", "plateau"),
    *("lowest loss", "at LR", "iterations recorded", "ended"),
)
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


def table(sweeps: Sequence[Sweep]) -> list[list[str]]:
    """One row per sweep under HEADER; LRs to three digits, "-" where nothing can be read off."""
    return [_row(sweep) for sweep in sweeps]


def sweep_table(sweeps: Sequence[Sweep]) -> str:
    """The same table as aligned plain text, its header on two lines, without a newline at the end.

    About 100 characters wide.
    """
    above = [first if rest else "" for first, _, rest in (name.partition(" ") for name in HEADER)]
    below = [rest or first for first, _, rest in (name.partition(" ") for name in HEADER)]
    rows = [above, below, *table(sweeps)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(lines)


def _row(sweep: Sweep) -> list[str]:
    low, found = plateau(sweep), suggest(sweep)
    return [
        plain(sweep.weight_decay),
        plain(sweep.momentum, 4),
        "-" if found is None else plain(found.steepest, 3),
        "-" if found is None else plain(found.valley, 3),
        "-" if found is None else plain(found.minimum_10, 3),
        "-" if low is None else f"{plain(low.low_lr, 3)} to {plain(low.high_lr, 3)}",
        "-" if low is None else plain(low.best_loss, 4),
        "-" if low is None else plain(low.best_lr, 3),
        f"{len(sweep.records)} of {sweep.num_it}",
        sweep.ended,
    ]


def _differing(sweeps: Sequence[Sweep]) -> list[str]:
    return [
        name
        for name, field in FIELDS.items()
        if len({getattr(sweep, field) for sweep in sweeps}) > 1
    ]
