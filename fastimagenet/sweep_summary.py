"""What a finished sweep leaves beside its rows: lr_find.json, figures, page and recipe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastimagenet import recipe_toml
from fastimagenet.assemble import chosen_recipe
from fastimagenet.files import Row, write_object, write_text
from fastimagenet.formats import plain
from fastimagenet.summary import hardware, precision_name
from fastimagenet.sweep import Sweep, plateau, still_falls, suggest
from fastimagenet.sweep_page import write_page
from fastimagenet.sweep_plots import draw, write_figures
from fastimagenet.sweep_result import Choice, choose, why_nothing
from fastimagenet.sweep_table import sweep_table
from pipelines import chosen_backend
from pipelines.datasets import dataset_name
from pipelines.environment import versions
from pipelines.split import Split

if TYPE_CHECKING:
    from fastimagenet.trainer import Trainer

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
        "precision": precision_name(trainer.dtype),
        "backend": chosen_backend(args.backend),
        "hardware": hardware(trainer),
        "versions": versions(),
        "image_size": first.phase.image_size,
        "batch_size": first.phase.batch_size,
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
