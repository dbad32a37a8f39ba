"""What a sweep says about the recipe: the learning rate it suggests, in the recipe's own units."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from matplotlib.figure import Figure

from fastimagenet.assemble import chosen_recipe
from fastimagenet.lr_finder.analysis import (
    ENOUGH,
    FEWEST,
    SKIPPED_FIRST,
    SKIPPED_LAST,
    Suggestions,
    Sweep,
    SweepRecord,
    best_sweep,
    in_words,
    plateau,
    shown,
    still_falls,
    suggest,
)
from fastimagenet.lr_finder.plots import draw, write_figures
from fastimagenet.recipes import toml as recipe_toml
from fastimagenet.report.figures import svg
from fastimagenet.report.summary import hardware
from fastimagenet.training.clock import Stopwatch
from fastimagenet.training.recorder import NullRecorder, Recorder
from pipelines.backends import chosen_backend
from pipelines.datasets.known import dataset_name
from pipelines.datasets.split import Split
from pipelines.environment import versions
from pipelines.files import Row, write_object, write_text
from pipelines.formats import plain
from pipelines.pages import render

if TYPE_CHECKING:
    from fastimagenet.recipes.plan import Plan
    from fastimagenet.recipes.recipe import Recipe
    from fastimagenet.training.trainer import Trainer


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


HEADER = (
    *("weight decay", "momentum", "steepest", "valley", "minimum / 10", "plateau"),
    *("lowest loss", "at LR", "iterations recorded", "ended"),
)


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


class SweepRecorder(Recorder):
    """One bar over the iterations of all sweeps on a terminal, else one line for each sweep."""

    def record(
        self, index: int, weight_decay: float, clock: Stopwatch, record: SweepRecord
    ) -> None:
        """One iteration of sweep `index` (from 0); `step` counts the updates of the sweep."""
        row = {"step": record.iteration, "epoch": 0, "time_seconds": sum(clock.read().values())}
        self._write("sweep", row | {"sweep": index, "weight_decay": weight_decay} | asdict(record))
        if self._bar is not None:
            text = f"lr {record.lr:.2e}, loss {record.loss:.3f}"
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()

    def end_of_sweep(self, index: int, num_sweeps: int, sweep: Sweep) -> None:
        """Say how sweep `index` (from 0) ended; the bar goes on at the next one's first."""
        self._print(
            f"sweep {index + 1} of {num_sweeps}: weight decay {plain(sweep.weight_decay)}, "
            f"momentum {plain(sweep.momentum, 4)}: {how_it_ended(sweep)}"
        )
        if self._bar is not None and sweep.ended != "stopped":
            self._bar.update((index + 1) * sweep.num_it - self._bar.n)


class NullSweepRecorder(NullRecorder, SweepRecorder):
    """What the processes other than the first hold: it writes nothing."""


def how_it_ended(sweep: Sweep) -> str:
    """Such as "diverged after 85 of 100 iterations, at lr 1.26"."""
    done = len(sweep.records)
    ended = {"not finite": "the loss was not finite"}.get(sweep.ended, sweep.ended)
    if sweep.ended == "finished":
        return f"{done} iterations, up to lr {plain(sweep.records[-1].lr, 3)}"
    text = f"{ended} after {done} of {sweep.num_it} iterations"
    return f"{text}, at lr {plain(sweep.records[-1].lr, 3)}" if done else text


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
        Path(__file__).with_name("lr_find.html.jinja"),
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


FACTS = (
    *("recipe", "dataset", "image_size", "global_batch", "num_it", "seed", "device"),
    *("world_size", "precision", "backend", "hardware", "started", "seconds", "command"),
)
"""Fields of lr_find.json that the page lists; the versions follow."""


def write_results(
    args: argparse.Namespace,
    trainer: Trainer,
    val: Split,
    sweeps: Sequence[Sweep],
    started: str,
    command: str,
) -> str:
    """Write all of it; returns what the user is told."""
    plan, folder = trainer.plan, args.output
    choice = choose(plan, sweeps, bool(args.wd), bool(args.momentum))
    summary = summarise(args, trainer, val, sweeps, choice)
    summary |= {"started": started, "command": command}
    write_object(folder / "lr_find.json", summary)
    figures = draw(sweeps)
    write_figures(folder, figures)
    facts = [(name.replace("_", " "), summary[name]) for name in FACTS]
    facts += summary["versions"].items()
    page = write_page(folder, sweeps, figures, facts, [] if choice is None else paste_lines(choice))
    stopped = sweeps[-1].ended == "stopped"
    lines = [sweep_table(sweeps), *verdict(sweeps, choice)]
    if args.recipe_out is not None:
        if choice is None or stopped:
            why = "the sweep was stopped" if stopped else "nothing was found"
            lines.append(f"--recipe-out {args.recipe_out} is not written: {why}")
        else:
            recipe = recipe_toml.with_settings(chosen_recipe(args), list(choice.settings))
            write_text(args.recipe_out, recipe_toml.dumps(recipe))
            lines.append(f"recipe with these values: {args.recipe_out}")
    lines.append(f"{'stopped; what was recorded' if stopped else 'report'}: {page}")
    return "\n".join(lines)


def verdict(sweeps: Sequence[Sweep], choice: Choice | None) -> list[str]:
    """The best sweep, its three learning rates and what to type, line by line."""
    if choice is None:
        return [f"no learning rate can be suggested: {why_nothing(sweeps)}"]
    best, found = sweeps[choice.index], choice.suggestions
    so_far = " so far" if sweeps[-1].ended == "stopped" else ""
    lines = [
        f"best sweep{so_far}: weight decay {plain(best.weight_decay)}, "
        f"momentum {plain(best.momentum, 4)}",
        f"  valley {plain(found.valley, 3)}, steepest {plain(found.steepest, 3)}, "
        f"minimum / 10 {plain(found.minimum_10, 3)}",
    ]
    lr, max_lr = plain(choice.lr, 3), plain(choice.max_lr, 3)
    if lr != max_lr:
        lines.append(
            f"  lr {lr} is max_lr {max_lr} here: the recipe's LR peaks at max_lr x "
            f"{plain(choice.lr / choice.max_lr, 3)} with this many processes"
        )
    if still_falls(best):
        lines.append("  the loss still falls where the sweep ends: a higher --end-lr shows more")
    return [*lines, *paste_lines(choice)]


def paste_lines(choice: Choice) -> list[str]:
    """What to type, under a line that says where."""
    return ["to train with it, add to the flags of fastimagenet.train:", f"  {choice.flags}"]


def summarise(
    args: argparse.Namespace,
    trainer: Trainer,
    val: Split,
    sweeps: Sequence[Sweep],
    choice: Choice | None,
) -> Row:
    """The fields of lr_find.json; learning rates as the optimizer gets them but for max_lr."""
    plan, world = trainer.plan, trainer.world
    first = plan.phases[0]
    folder = args.data.resolve().name if args.data else "digits"
    return {
        "recipe": plan.recipe.name,
        "model": plan.recipe.model,
        "data": folder,
        "dataset": dataset_name(val.classes) or folder,
        "num_classes": len(val.classes),
        "seed": args.seed,
        "world_size": world.world_size,
        "device": world.device.partition(":")[0],
        "precision": trainer.precision,
        "backend": chosen_backend(args.backend),
        "hardware": hardware(trainer),
        "versions": versions(),
        "image_size": first.image_size,
        "batch_size": first.batch_size,
        "global_batch": first.global_batch,
        "start_lr": args.start_lr,
        "end_lr": args.end_lr,
        "num_it": args.num_it,
        "linear": args.linear,
        "stop_dv": not args.no_stop_dv,
        "sweeps": [sweep_row(sweep) for sweep in sweeps],
        "chosen": None if choice is None else asdict(choice),
        "max_lr": None if choice is None else choice.max_lr,
        "seconds": round(sum(trainer.clock.read().values()), 2),
    }


def sweep_row(sweep: Sweep) -> dict[str, Any]:
    """What is read off one sweep; its records are in metrics.jsonl."""
    suggestions, flat = suggest(sweep), plateau(sweep)
    return {
        "weight_decay": sweep.weight_decay,
        "momentum": sweep.momentum,
        "ended": sweep.ended,
        "iterations": len(sweep.records),
        "suggestions": None if suggestions is None else asdict(suggestions),
        "plateau": None if flat is None else asdict(flat),
    }
