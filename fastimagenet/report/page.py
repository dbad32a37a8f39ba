"""`report.html` of a run folder: one self-contained page that says what ran and how well."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import tomli_w
from markupsafe import Markup

from fastimagenet.report import plots
from fastimagenet.report.dawnbench import TRAIN_CLOCK
from fastimagenet.report.figures import GREY
from fastimagenet.report.run import DETAILS_PAGE, Run
from pipelines import pages
from pipelines.files import Row, write_text
from pipelines.formats import NO_BREAK, duration, number, percent

METRIC_NAMES = {"top1": "top-1", "top5": "top-5"}
PART_NAMES = {
    "start_up": "start-up",
    "data_wait": "waiting for data",
    "compile": "compile warm-up",
}
DEFINITIONS = {
    "training time": TRAIN_CLOCK,
    "evaluation time": "All passes over the validation images, including test-time augmentation; "
    "not part of the training time.",
    "waiting for data": "Time in which training steps waited for their next batch; part of the "
    "training time.",
    "start-up, compute": "Reading the data folder and building model and loaders; forward and "
    "backward passes and optimizer steps. Both are part of the training time.",
    "communication": "Time in which steps waited for the all-reduce after their own gradients "
    "were ready; part of the training time.",
    "checkpoint": "Saving the state of the run; not part of the training time.",
    "wall time": "From the start of the command to the end of the run: the sum of all parts, "
    "which never overlap.",
    "time to target": "Training time at the end of the first evaluated epoch whose accuracy "
    "without augmentation reaches the target.",
    "top-1, top-5": "Share of all validation images whose class is the network's first guess, or "
    "among its first five; one view each. Balanced: the mean over the classes of the share of "
    "each, where validation has more images of some. With five classes or fewer there is no top-5. "
    "Values with test-time augmentation (TTA) are given separately.",
}


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from the other files and return its path.

    Raises UserError where the folder holds no run.
    """
    path = run_dir / "report.html"
    write_text(path, render(Run.open(run_dir)))
    return path


def render(run: Run) -> str:
    """Fill in the whole page."""
    plan, summary = run.plan, run.summary
    best = summary.get("best_epoch")
    return pages.render(
        Path(__file__).with_name("report.html.jinja"),
        plan=plan,
        summary=summary,
        phases=[_phase_cells(phase) for phase in plan.get("phases", [])],
        epochs=_epoch_table(run.epochs),
        best=next((i for i, row in enumerate(run.epochs) if row["epoch"] == best), None),
        events=[
            (duration(row.get("time_seconds")), number(row.get("step")), row.get("message"))
            for row in run.events
        ],
        details=[
            (f"{quote(os.fsencode(each.folder.name))}/{DETAILS_PAGE}", each.folder.name)
            for each in run.details
        ],
        title=_what(run),
        status=_status(run),
        headline=_headline(run),
        tiles=_tiles(run),
        figures=_figures(run),
        outcomes=Markup(plots.outcomes(run.steps, run.epochs, plan.get("phases", []))),
        split=_split(summary),
        waiting=run.waiting_share,
        split_svg=Markup(plots.time_split(summary.get("time_split_seconds") or {})),
        recipe=recipe_listing(plan.get("recipe", {})),
        environment=_environment(run),
        definitions=DEFINITIONS,
    )


def _what(run: Run) -> str:
    """Name model and data: "resnet18 on CIFAR-10"."""
    model = run.summary.get("model") or run.plan.get("recipe", {}).get("model", "a model")
    data = run.summary.get("dataset") or run.summary.get("data")
    return f"{model} on {'CIFAR-10' if data == 'CIFAR10' else data}" if data else f"{model}"


def _target(run: Run) -> str:
    """Format the target: "94 % top-1"."""
    assert run.target is not None
    metric, value = run.target
    return f"{100 * value:g}{NO_BREAK}% {METRIC_NAMES.get(metric, metric)}"


def _status(run: Run) -> str:
    """Say how far a run came that did not complete its plan."""
    planned = run.plan.get("epochs", 0)
    if run.epochs_done >= planned:
        return ""
    ended = "ended at its target" if run.summary else "stopped or still running"
    return f"{ended}: {run.epochs_done} of {planned} epochs done"


def _headline(run: Run) -> list[str]:
    """State in short sentences what was reached, whether the target was, and TTA."""
    results, hardware = run.results, run.summary.get("hardware") or "unknown hardware"
    what = _what(run)
    spent = f"{duration(results['train_seconds'])} of training on {hardware}"
    if results["train_seconds"] is None:
        return [f"{what}: no epoch has been finished yet."]
    if results["top1"] is None:
        return [f"{what}: not evaluated yet after {spent}."]
    top5 = "" if results["top5"] is None else f" and {percent(results['top5'])} top-5"
    sentences = [f"{what} reached {percent(results['top1'])} top-1{top5} in {spent}."]
    if run.pretrained:
        sentences.append(f"It started from pretrained weights ({run.pretrained}).")
    if run.target:
        seconds = run.seconds_to_target
        reached = "was not reached" if seconds is None else f"was reached in {duration(seconds)}"
        sentences.append(f"The target of {_target(run)} {reached}.")
    if results["tta_top1"] is not None:
        sentences.append(f"With test-time augmentation: {percent(results['tta_top1'])} top-1.")
    if results["square_top1"] is not None:
        sentences.append(
            f"Evaluated on rectangles; on square crops: {percent(results['square_top1'])} top-1."
        )
    lost = plots.lost_epoch(run.epochs)
    if lost:
        sentences.append(f"The training loss is not a finite number from epoch {lost} on.")
    return sentences


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """List name, value and remark of the key figures."""
    summary, results = run.summary, run.results
    tiles = []
    for metric, name in METRIC_NAMES.items():
        if metric == "top5" and results["top1"] is not None and results["top5"] is None:
            continue  # five classes or fewer
        tta, balanced = results[f"tta_{metric}"], results.get(f"balanced_{metric}")
        remark = "plain" if tta is None else f"TTA {percent(tta)}"
        remark += "" if balanced is None else f", balanced {percent(balanced)}"
        tiles.append((name, percent(results[metric]), remark))
    planned = run.plan.get("epochs", run.epochs_done)
    of_all = f" of {planned}" if run.epochs_done != planned else ""
    remark = f"{run.epochs_done}{of_all} epoch{'s' if planned != 1 else ''}"
    if not of_all and summary.get("steps"):
        remark += f", {number(summary['steps'])} steps"
    tiles.append(("training time", duration(results["train_seconds"]), remark))
    if run.target:
        seconds = run.seconds_to_target
        reached = "not reached" if seconds is None else duration(seconds)
        tiles.append(("time to target", reached, _target(run)))
    if summary.get("cost_usd") is not None:
        price = number(summary.get("cost_per_hour"), "g")
        tiles.append(("cost", f"${summary['cost_usd']:,.2f}", f"at ${price} an hour"))
    if summary.get("images_per_sec") is not None:
        waiting = run.waiting_share
        remark = "all processes" if waiting is None else f"{100 * waiting:.1f} % waiting for data"
        tiles.append(("images/s", number(summary["images_per_sec"], ",.0f"), remark))
    if summary.get("wall_seconds") is not None:
        remark = f"evaluation {duration(summary.get('eval_seconds'))}"
        tiles.append(("wall time", duration(summary["wall_seconds"]), remark))
    return tiles


def _figures(run: Run) -> list[tuple[str, Markup]]:
    """List heading and plot (or "") in the order of the page."""
    phases = run.plan.get("phases", [])
    svgs = {
        "Accuracy against training time": plots.accuracy(run.epochs, phases, run.target),
        "Loss": plots.losses(run.steps, run.epochs, phases),
        "Learning rate and momentum": plots.schedule(run.rates, phases),
        "Image size and batch size": plots.sizes(run.epochs, phases),
        "Speed": plots.throughput(run.steps, phases),
        "Seconds of each epoch": plots.epoch_seconds(run.epochs),
    }
    return [(heading, Markup(svg)) for heading, svg in svgs.items()]


def _split(summary: Row) -> list[tuple[str, str, str]]:
    """List name with its colour, seconds and share of the parts of the wall time."""
    parts = summary.get("time_split_seconds") or {}
    parts = {key: value or 0.0 for key, value in parts.items()}
    total = sum(parts.values()) or 1.0
    swatch = Markup('<span class="swatch" style="background:{}"></span>{}')
    return [
        (
            swatch.format(plots.TIME_COLOURS.get(key, GREY), PART_NAMES.get(key, key)),
            number(seconds, ",.2f"),
            percent(seconds / total, 1),
        )
        for key, seconds in parts.items()
    ]


def _phase_cells(phase: Row) -> list[str]:
    """Format a row of the table of phases."""
    first = phase["first_epoch"]
    counts = ("batch_size", "global_batch", "steps_per_epoch", "first_step")
    return [
        f"{first + 1} to {first + phase['epochs']}",
        *(str(phase[key]) for key in ("image_size", "eval_size")),
        *(number(phase[key]) for key in counts),
        *(number(phase[key], ".4g") for key in ("lr_first", "lr_last")),
    ]


EPOCH_HEADER = (
    *("epoch", "image px", "batch", "train loss", "val loss", "top-1", "top-5"),
    *("balanced top-1", "TTA top-1", "TTA top-5", "training s", "waiting s", "evaluation s"),
)


def _epoch_table(epochs: list[Row]) -> list[list[str]]:
    """Format the table of epochs, its header first, without accuracies that no epoch has."""
    rows = [list(EPOCH_HEADER), *map(_epoch_cells, epochs)]
    empty = [
        column
        for column, name in enumerate(EPOCH_HEADER)
        if "top-5" in name or "TTA" in name or "balanced" in name
        if all(row[column] == percent(None) for row in rows[1:])
    ]
    return [[cell for column, cell in enumerate(row) if column not in empty] for row in rows]


def _epoch_cells(row: Row) -> list[str]:
    """Format a row of the table of epochs."""
    return [
        str(row["epoch"] + 1),
        *(number(row.get(key)) for key in ("image_size", "batch_size")),
        *(number(row.get(key), ".4f") for key in ("train_loss", "val_loss")),
        *(
            percent(row.get(key))
            for key in ("top1", "top5", "balanced_top1", "tta_top1", "tta_top5")
        ),
        *(
            number(row.get(key), ",.2f")
            for key in ("train_seconds", "data_wait_seconds", "eval_seconds")
        ),
    ]


def _environment(run: Run) -> list[tuple[str, Any]]:
    """List names and values of what the run was measured with."""
    keys = (
        *("hardware", "threads", "deterministic", "device", "world_size", "precision", "backend"),
        *("framework", "pretrained", "data", "seed", "started", "author"),
    )
    facts = [(key.replace("_", " "), run.summary.get(key)) for key in keys]
    facts += list((run.summary.get("versions") or {}).items())
    return [(key, value) for key, value in facts if value not in (None, "")]


def recipe_listing(recipe: Row) -> str:
    """Format a recipe as TOML, with each list of plain values on one line."""
    text = tomli_w.dumps(_without_nulls(recipe))
    return re.sub(
        r"\[\n((?: +[^\[\]{}\n]+,\n)+) *\]",
        lambda match: f"[{' '.join(match[1].split())[:-1]}]",
        text,
    )


def _without_nulls(value: Any) -> Any:
    """Drop null, which TOML lacks; the recipe's reader uses the default for a missing field."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
