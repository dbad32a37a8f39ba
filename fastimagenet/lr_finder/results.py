"""What sweeps say together: the suggestion, a table, figures, and the files of the command."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from fastimagenet.config import RunConfig
from fastimagenet.lr_finder.analysis import Choice, best_sweep, choose, in_words, why_nothing
from fastimagenet.lr_finder.plots import draw, stacked, write_figures
from fastimagenet.lr_finder.sweep import (
    FEWEST,
    SKIP_FIRST,
    SKIP_LAST,
    Suggestions,
    Sweep,
    SweepConfig,
    SweepRecord,
)
from fastimagenet.recipes import toml as recipe_toml
from fastimagenet.report.figures import svg, with_text
from fastimagenet.report.run import rows_of
from fastimagenet.report.summary import what_ran
from fastimagenet.training.recorder import read_rows
from fastimagenet.training.trainer import Trainer
from pipelines.datasets.split import Split
from pipelines.errors import UserError
from pipelines.files import Row, read_object, write_object, write_text
from pipelines.formats import NO_BREAK, plain
from pipelines.pages import render


@dataclass(frozen=True, kw_only=True, repr=False)
class Sweeps:
    """The sweeps of one command or call, and the settings that they suggest."""

    runs: tuple[Sweep, ...]
    """One for each weight decay and momentum, in the order of `SweepConfig.combinations`."""
    suggestion: Choice | None
    """The recipe settings to train with, max_lr first; None where nothing can be read off."""

    @classmethod
    def open(cls, folder: str | Path) -> Sweeps:
        """Read the folder that `fastimagenet.lr_find` has left. Raises UserError without one."""
        summary = read_object(Path(folder) / "lr_find.json")
        rows = rows_of("sweep", read_rows(Path(folder)))
        runs = [
            Sweep(
                weight_decay=run["weight_decay"],
                momentum=run["momentum"],
                num_it=summary["num_it"],
                linear=summary["linear"],
                records=tuple(map(_record, (row for row in rows if row["sweep"] == index))),
                ended=run["ended"],
            )
            for index, run in enumerate(summary["sweeps"])
        ]
        chosen = summary["chosen"]
        if chosen is not None:
            suggestions = Suggestions(**chosen["suggestions"])
            chosen |= {"suggestions": suggestions, "settings": tuple(chosen["settings"])}
        return cls(runs=tuple(runs), suggestion=chosen and Choice(**chosen))

    def plot(
        self, skip_first: int = SKIP_FIRST, skip_last: int = SKIP_LAST, smoothed: bool = True
    ) -> Figure:
        """Draw losses and accuracies against the LR, a panel each.

        The first `skip_first` and last `skip_last` records of each sweep are left out, unless fewer
        than 5 would be left. `smoothed`: average validation as the training loss is averaged;
        otherwise draw what each batch gave.
        """
        for name, value in (("skip_first", skip_first), ("skip_last", skip_last)):
            if value < 0:
                raise UserError(f"{name} must be 0 or more, not {value}")
        return stacked(self.runs, skip_first, skip_last, smoothed)

    def __repr__(self) -> str:
        """Say what the command prints: the table, the best sweep and what to type."""
        return "\n".join([sweep_table(self.runs), *verdict(self.runs, self.suggestion)])

    def _repr_html_(self) -> str:
        """Show the same in a notebook, and the curves."""
        return with_text(repr(self), self.plot())


def _record(row: Row) -> SweepRecord:
    """Restore a record from its row, in which NaN and infinity are null."""
    values = {field.name: row[field.name] for field in fields(SweepRecord)}
    finite: Row = {name: math.nan if v is None else v for name, v in values.items()}
    return SweepRecord(**finite)


HEADER = (
    *("weight decay", "momentum", "steepest", "valley", "minimum / 10", "plateau"),
    *("lowest loss", "at LR", "iterations recorded", "ended"),
)


def table(sweeps: Sequence[Sweep]) -> list[list[str]]:
    """Return a row per sweep under HEADER; LRs to 3 digits, "-" where nothing can be read off."""
    rows = []
    for sweep in sweeps:
        row = [plain(sweep.weight_decay), plain(sweep.momentum, 4)]
        low, found = sweep.plateau, sweep.suggestions
        if low and found:
            row += [plain(lr, 3) for lr in (found.steepest, found.valley, found.minimum_10)]
            row.append(f"{plain(low.low_lr, 3)} to {plain(low.high_lr, 3)}")
            row += [plain(low.best_loss, 4), plain(low.best_lr, 3)]
        else:
            row += ["-"] * 6
        rows.append([*row, f"{len(sweep.records)} of {sweep.num_it}", sweep.ended])
    return rows


def sweep_table(sweeps: Sequence[Sweep]) -> str:
    """Return the table as aligned plain text of about 100 columns, its header on two lines."""
    words = [name.split(" ", 1) for name in HEADER]
    above, below = [w[0] if len(w) > 1 else "" for w in words], [w[-1] for w in words]
    rows = [above, below, *table(sweeps)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def verdict(sweeps: Sequence[Sweep], choice: Choice | None) -> list[str]:
    """Say which sweep is best, its three learning rates and what to type, line by line."""
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
    if best.still_falls:
        lines.append("  the loss still falls where the sweep ends: a higher --end-lr shows more")
    return [*lines, *paste_lines(choice)]


def paste_lines(choice: Choice) -> list[str]:
    """Return what to type, under a line that says where."""
    return ["to train with it, add to the flags of fastimagenet.train:", f"  {choice.flags}"]


HEADINGS = {
    "loss_against_lr": "Training loss against learning rate",
    "stacked": "Training and validation against learning rate",
    "loss_against_iterations": "Training loss against iterations",
    "rates": "Learning rate and momentum against iterations",
}
GLOSSARY = {
    "valley": "Halfway, in iterations, down the stretch where the loss falls: fast progress, and "
    "far from where the loss rises again. With few epochs it can be too low.",
    "steepest": "Where the loss falls fastest; it sets max_lr. On a noisy curve this can be a "
    "chance step at the far left: look at the curve before using it.",
    "minimum / 10": "A tenth of the learning rate at which the loss is lowest. If the loss still "
    "falls at the end of a sweep, it only says where the sweep ended.",
    "plateau": "The learning rates around the lowest loss at which the loss is above it by at most "
    "a tenth of the whole fall: the thick pale stretch of a curve. It may end where the sweep did.",
    "best sweep": "The sweep with the largest weight decay that still tolerates a high learning "
    "rate: its lowest loss is near the lowest of all, and its plateau reaches at least half as "
    "high a rate as that of any other such sweep. Drawn thick.",
    "smoothing": "Losses and accuracies are moving averages in which each new batch counts 2 %. "
    "They lag behind the batches by some iterations, so the lowest point and the start of the "
    "plateau are drawn too far right.",
    "diverged": "The sweep ended because its smoothed loss was above four times its best.",
}
SPAN = (
    f"The first {SKIP_FIRST} and last {SKIP_LAST} iterations are not drawn where there are "
    f"{SKIP_FIRST + SKIP_LAST + FEWEST} or more. A curve that rises far above its start leaves the "
    "plot."
)


def write_page(
    folder: Path,
    sweeps: Sequence[Sweep],
    figures: dict[str, Figure],
    facts: Sequence[tuple[str, Any]],
    recipe_lines: Sequence[str],
) -> Path:
    """Write `folder/lr_find.html` and return its path.

    `figures`: from `plots.draw`.
    `facts`: names and values of what was measured with (command, data, hardware, versions).
    `recipe_lines`: what to type to train with the result; left out where no sweep is best.
    """
    best = best_sweep(sweeps)
    html = render(
        Path(__file__).with_name("lr_find.html.jinja"),
        headline=headline(sweeps),
        remarks=remarks(sweeps),
        recipe="\n".join(recipe_lines if best else ()),
        figures={name: Markup(svg(figure, name)) for name, figure in figures.items()},
        headings=HEADINGS,
        header=[name.replace("/ ", f"/{NO_BREAK}") for name in HEADER],
        rows=table(sweeps),
        best=None if best is None else list(sweeps).index(best),
        glossary=GLOSSARY,
        span=SPAN,
        facts=[(name, value) for name, value in facts if value not in (None, "")],
    )
    path = folder / "lr_find.html"
    write_text(path, html)
    return path


def headline(sweeps: Sequence[Sweep]) -> str:
    """State the result in words: "Learning rate 0.24 with weight decay 0.001"."""
    best = best_sweep(sweeps)
    if best is None or best.suggestions is None:
        return "No learning rate can be suggested"
    return f"Learning rate {plain(best.suggestions.steepest, 3)} with {in_words(best, sweeps)}"


def remarks(sweeps: Sequence[Sweep]) -> list[str]:
    """List what the headline leaves out: why nothing is suggested, and sweeps cut short."""
    sentences = []
    if best_sweep(sweeps) is None:
        reason = why_nothing(sweeps)
        sentences.append(f"{reason[0].upper()}{reason[1:]}.")
    for sweep in sweeps:
        if sweep is best_sweep(sweeps) and sweep.still_falls:
            sentences.append("The loss still falls where it ends: a higher --end-lr shows more.")
        if sweep.ended == "stopped":
            name = in_words(sweep, sweeps)
            done = f"{len(sweep.records)} of {sweep.num_it} iterations"
            sentences.append(f"The sweep with {name} was stopped after {done}.")
    return sentences


FACTS = (
    *("recipe", "dataset", "image_size", "global_batch", "num_it", "seed", "device"),
    *("world_size", "threads", "deterministic", "precision", "backend", "hardware", "started"),
    *("seconds", "command"),
)
"""Fields of lr_find.json that the page lists; the versions follow."""
SETTINGS = ("start_lr", "end_lr", "num_it", "linear", "stop_dv")
"""Fields of `SweepConfig` that lr_find.json has."""


def write_results(
    config: RunConfig,
    sweep: SweepConfig,
    runs: Sequence[Sweep],
    trainer: Trainer,
    val: Split,
    started: str,
    command: str,
) -> str:
    """Write lr_find.json, figures, page and recipe; return what the user is told."""
    folder, choice = config.folder, choose(trainer.plan, runs, sweep)
    first = trainer.plan.phases[0]
    summary = what_ran(config, trainer, val) | {
        **{"started": started, "command": command, "image_size": first.image_size},
        **{"batch_size": first.batch_size, "global_batch": first.global_batch},
        **{name: getattr(sweep, name) for name in SETTINGS},
        "sweeps": [sweep_row(run) for run in runs],
        "chosen": None if choice is None else asdict(choice),
        "max_lr": None if choice is None else choice.max_lr,
        "seconds": round(sum(trainer.clock.read().values()), 2),
    }
    write_object(folder / "lr_find.json", summary)
    figures = draw(runs)
    write_figures(folder, figures)
    facts = [(name.replace("_", " "), summary[name]) for name in FACTS]
    facts += summary["versions"].items()
    page = write_page(folder, runs, figures, facts, [] if choice is None else paste_lines(choice))
    stopped = runs[-1].ended == "stopped"
    lines = [repr(Sweeps(runs=tuple(runs), suggestion=choice))]
    recipe_out = sweep.recipe_out
    if recipe_out is not None:
        if choice is None or stopped:
            why = "the sweep was stopped" if stopped else "nothing was found"
            lines.append(f"--recipe-out {recipe_out} is not written: {why}")
        else:
            recipe = recipe_toml.with_settings(config.recipe, list(choice.settings))
            write_text(recipe_out, recipe_toml.dumps(recipe))
            lines.append(f"recipe with these values: {recipe_out}")
    lines.append(f"{'stopped; what was recorded' if stopped else 'report'}: {page}")
    return "\n".join(lines)


def sweep_row(sweep: Sweep) -> dict[str, Any]:
    """Return what is read off one sweep; its records are in metrics.jsonl."""
    suggestions, flat = sweep.suggestions, sweep.plateau
    return {
        "weight_decay": sweep.weight_decay,
        "momentum": sweep.momentum,
        "ended": sweep.ended,
        "iterations": len(sweep.records),
        "suggestions": None if suggestions is None else asdict(suggestions),
        "plateau": None if flat is None else asdict(flat),
    }
