"""What a finished run leaves beside its rows: summary.json, the DAWNBench entry, report.html."""

from __future__ import annotations

from pathlib import Path

import torch

from fastimagenet.config import RunConfig
from fastimagenet.report import dawnbench
from fastimagenet.report.page import write_report
from fastimagenet.report.run import time_to_target
from fastimagenet.training.clock import train_seconds
from fastimagenet.training.recorder import best_record
from fastimagenet.training.trainer import Trainer
from pipelines.backends import chosen_backend
from pipelines.datasets import shards as shard_manifest
from pipelines.datasets.known import IMAGENET_COUNTS, dataset_name
from pipelines.datasets.manifest import read_manifest
from pipelines.datasets.shards import has_shards
from pipelines.datasets.split import Split
from pipelines.environment import processor, versions
from pipelines.errors import UserError
from pipelines.files import Row, write_object

RESULTS = {
    "summary.json": "summary.json",
    "report.html": "report.html",
    "dawnbench/": "dawnbench/*.tsv",
}
"""The results of a run, and by which files of its folder each is known to be there."""


def missing_results(folder: Path) -> list[str]:
    """List the results that are not there."""
    return [name for name, files in RESULTS.items() if not any(folder.glob(files))]


def remove_results(folder: Path) -> None:
    """Remove the results of a run that goes on: they are of where it has ended before."""
    for files in (*RESULTS.values(), "dawnbench/*.json"):
        for path in folder.glob(files):
            path.unlink(missing_ok=True)


def write_result(config: RunConfig, trainer: Trainer, val: Split, command: str, name: str) -> None:
    """Write one of RESULTS to the run's folder; all others follow from summary.json."""
    folder = config.folder
    if name == "report.html":
        write_report(folder)
    elif name == "dawnbench/":
        dawnbench.write_entry(folder)
    else:
        facts = {"started": trainer.started, "command": command}
        write_object(folder / name, summarise(config, trainer, val) | facts)


def what_ran(config: RunConfig, trainer: Trainer, val: Split) -> Row:
    """Return the fields that say which recipe ran on which data and machine."""
    recipe, world = trainer.plan.recipe, trainer.world
    return {
        "recipe": recipe.name,
        "model": recipe.model,
        "pretrained": recipe.pretrained or None,
        "data": config.data.name,
        "dataset": dataset_name(val.classes) or config.data.name,
        "num_classes": len(val.classes),
        "seed": config.seed,
        "world_size": world.world_size,
        "device": world.device.partition(":")[0],
        "threads": trainer.threads,
        "deterministic": trainer.deterministic,
        "precision": trainer.precision,
        "backend": chosen_backend(config.data.backend),
        "hardware": config.entry.hardware or hardware(trainer),
        "versions": versions(),
    }


def summarise(config: RunConfig, trainer: Trainer, val: Split) -> Row:
    """Return the fields of summary.json; times in seconds, accuracies as fractions."""
    recipe, records = trainer.plan.recipe, trainer.records
    seconds = trainer.clock.read()
    target = recipe.target_metric
    best, last = best_record(records, recipe), records[-1]
    assert best is not None, "the epoch that a run ends with is always evaluated"
    stepping = seconds["data_wait"] + seconds["compute"] + seconds["communication"]
    images = sum(
        (min(trainer.step, planned.last_step) - planned.first_step) * planned.global_batch
        for planned in trainer.plan.phases
        if planned.first_step < trainer.step
    )
    cost = config.entry.cost_per_hour
    return what_ran(config, trainer, val) | {
        "used_blacklist": used_blacklist(config.data.folder, val),
        "framework": f"PyTorch {torch.__version__.partition('+')[0]}",
        "author": config.entry.author,
        "author_email": config.entry.author_email,
        "epochs": trainer.epoch,
        "steps": trainer.step,
        "top1": last.top1,
        "top5": last.top5,
        "balanced_top1": last.balanced_top1,
        "tta_top1": last.tta_top1,
        "tta_top5": last.tta_top5,
        "square_top1": last.square_top1,
        "square_top5": last.square_top5,
        "best_epoch": best.epoch,
        "train_seconds": train_seconds(seconds),
        "eval_seconds": seconds["evaluation"],
        "data_wait_seconds": seconds["data_wait"],
        "wall_seconds": sum(seconds.values()),
        "time_split_seconds": seconds,
        "images_per_sec": images / stepping,
        "target": target and {"metric": target[0], "value": target[1]},
        "time_to_target_seconds": target and time_to_target([vars(r) for r in records], *target),
        "cost_per_hour": cost,
        "cost_usd": None if cost is None else train_seconds(seconds) / 3600 * cost,
    }


def used_blacklist(folder: Path | None, val: Split) -> bool | None:
    """Return whether the blacklisted validation images of ImageNet count; None for other data.

    The name is DAWNBench's. dataset.json, which `pipelines.prepare` writes and packs into shards,
    records it; without that file they count if there are all 50,000 images.
    """
    if folder is None or dataset_name(val.classes) != "ImageNet":
        return None
    try:
        if has_shards(folder):
            facts = shard_manifest.read_manifest(folder).dataset
        else:
            facts = read_manifest(folder)
        recorded = facts.get("used_blacklist")
    except UserError:  # no reason to lose the results of a run
        recorded = None
    return recorded if isinstance(recorded, bool) else len(val) == IMAGENET_COUNTS["val"]


def hardware(trainer: Trainer) -> str:
    """Name the GPUs of all processes, or the CPU cores of this node."""
    if trainer.device.type == "cuda":
        return f"{trainer.world.world_size} x {torch.cuda.get_device_name(trainer.device)}"
    return processor()
