"""`lr_find.html`: one self-contained page that says what learning-rate sweeps have found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from fastimagenet.figures import svg
from fastimagenet.files import write_text
from fastimagenet.formats import plain
from fastimagenet.pages import render
from fastimagenet.sweep import (
    ENOUGH,
    SKIPPED_FIRST,
    SKIPPED_LAST,
    Sweep,
    best_sweep,
    still_falls,
    suggest,
)
from fastimagenet.sweep_result import suggested_lr, why_nothing
from fastimagenet.sweep_table import HEADER, in_words, table

HEADINGS = {
    "loss_against_lr": "Training loss against learning rate",
    "stacked": "Training and validation against learning rate",
    "loss_against_iterations": "Training loss against iterations",
    "rates": "Learning rate and momentum against iterations",
}
GLOSSARY = {
    "valley": "Half way, in iterations, down the stretch on which the loss falls: fast progress, "
    "and far from where the loss rises again; with few epochs it can be too low.",
    "steepest": "Where the loss falls fastest: it sets max_lr. On a noisy curve this can be a "
    "chance step at the far left: look at the curve before using it.",
    "minimum / 10": "A tenth of the learning rate at which the loss is lowest. Where the loss "
    "still falls at the end of a sweep it only says where that ended.",
    "plateau": "The learning rates around the lowest loss where it is at most a tenth of the whole "
    "fall above: the thick pale stretch of a curve. Its end may be where the sweep ended.",
    "best sweep": "The one of the largest weight decay that still tolerates a high learning rate: "
    "its lowest loss is near the lowest of all, and its plateau reaches at least half as high a "
    "rate as any other such sweep's. Drawn thick.",
    "smoothing": "Losses and accuracies are running averages in which each new batch counts 2 %. "
    "They lag: the average turns some iterations after the batches did, so the lowest point and "
    "the plateau's beginning are drawn too far right.",
    "diverged": "The smoothed loss was above four times its best, and the sweep ended.",
}
SPAN = (
    f"Of {ENOUGH} and more iterations the first {SKIPPED_FIRST} and the last {SKIPPED_LAST} are "
    "not drawn. A curve that rises far above where it began leaves the plot."
)


def write_page(
    folder: Path,
    sweeps: Sequence[Sweep],
    figures: dict[str, Figure],
    facts: Sequence[tuple[str, Any]],
    recipe_lines: Sequence[str],
) -> Path:
    """Write `folder/lr_find.html` and return its path.

    `figures`: those of `sweep_plots.draw`.
    `facts`: name and value of what it was measured with (command, data, hardware, versions).
    `recipe_lines`: what the user pastes to train with the result, left out where no sweep is best.
    """
    best = best_sweep(sweeps)
    html = render(
        "lr_find.html.jinja",
        headline=headline(sweeps),
        remarks=remarks(sweeps),
        recipe="\n".join(recipe_lines if best else ()),
        figures={name: Markup(svg(figure, name)) for name, figure in figures.items()},
        headings=HEADINGS,
        header=HEADER,
        rows=[(sweep is best, row) for sweep, row in zip(sweeps, table(sweeps), strict=True)],
        glossary=GLOSSARY,
        span=SPAN,
        facts=[(name, value) for name, value in facts if value not in (None, "")],
    )
    path = folder / "lr_find.html"
    write_text(path, html)
    return path


def headline(sweeps: Sequence[Sweep]) -> str:
    """The result in words: "Learning rate 0.24 with weight decay 0.001"."""
    best = best_sweep(sweeps)
    found = None if best is None else suggest(best)
    if best is None or found is None:
        return "No learning rate can be suggested"
    return f"Learning rate {plain(suggested_lr(found), 3)} with {in_words(best, sweeps)}"


def remarks(sweeps: Sequence[Sweep]) -> list[str]:
    """What has to be known beside the headline: why there is none, and sweeps cut short."""
    sentences = []
    if best_sweep(sweeps) is None:
        reason = why_nothing(sweeps) if sweeps else "no sweep was made"
        sentences.append(f"{reason[0].upper()}{reason[1:]}.")
    for sweep in sweeps:
        if sweep is best_sweep(sweeps) and still_falls(sweep):
            sentences.append("The loss still falls where it ends: a higher --end-lr shows more.")
        if sweep.ended == "stopped":
            name = in_words(sweep, sweeps)
            done = f"{len(sweep.records)} of {sweep.num_it} iterations"
            sentences.append(f"The sweep with {name} was stopped after {done}.")
    return sentences
