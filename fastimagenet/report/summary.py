"""What a finished run leaves beside its rows: summary.json, the DAWNBench entry, report.html."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastimagenet.config import RunConfig
from fastimagenet.report import dawnbench
from fastimagenet.report.page import write_report
from fastimagenet.training.clock import train_seconds
from fastimagenet.training.recorder import best_record
from pipelines.backends import chosen_backend
from pipelines.datasets import shards as shard_manifest
from pipelines.datasets.known import dataset_name
from pipelines.datasets.manifest import read_manifest
from pipelines.datasets.shards import has_shards
from pipelines.datasets.split import Split
from pipelines.environment import processor, versions
from pipelines.errors import UserError
from pipelines.files import write_object

if TYPE_CHECKING:
    from fastimagenet.training.trainer import Trainer


IMAGENET_NUM_VAL = 50_000


def write_results(
    config: RunConfig, trainer: Trainer, val: Split, started: str, command: str
) -> Path:
    """Write all of them into --output; returns the page's path."""
    summary = summarise(config, trainer, val) | {"started": started, "command": command}
    write_object(config.folder / "summary.json", summary)
    page = write_report(config.folder)
    dawnbench.write_entry(config.folder)
    return page


def summarise(config: RunConfig, trainer: Trainer, val: Split) -> dict[str, Any]:
    """The fields of summary.json; times in seconds, accuracies as fractions."""
    plan, recipe, records = trainer.plan, trainer.plan.recipe, trainer.records
    seconds = trainer.clock.read()
    target, reached = recipe.target_metric, None
    if target is not None:
        rows = [vars(record) for record in records]
        reached = dawnbench.time_to_target(rows, *target)
    best = best_record(records, recipe)
    assert best is not None, "the epoch that a run ends with is always evaluated"
    stepping = seconds["data_wait"] + seconds["compute"] + seconds["communication"]
    images = sum(
        (min(trainer.step, planned.last_step) - planned.first_step) * planned.global_batch
        for planned in plan.phases
        if planned.first_step < trainer.step
    )
    hours = train_seconds(seconds) / 3600
    folder, entry = config.data.name, config.entry
    last = records[-1]
    return {
        "recipe": recipe.name,
        "model": recipe.model,
        "data": folder,
        "dataset": dataset_name(val.classes) or folder,
        "num_classes": len(val.classes),
        "used_blacklist": used_blacklist(config.data.folder, val),
        "seed": config.seed,
        "world_size": trainer.world.world_size,
        "device": trainer.world.device.partition(":")[0],
        "precision": trainer.precision,
        "backend": chosen_backend(config.data.backend),
        "hardware": entry.hardware or hardware(trainer),
        "framework": f"PyTorch {torch.__version__.partition('+')[0]}",
        "versions": versions(),
        "author": entry.author,
        "author_email": entry.author_email,
        "epochs": trainer.epoch,
        "steps": trainer.step,
        "top1": last.top1,
        "top5": last.top5,
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
        "target": None if target is None else {"metric": target[0], "value": target[1]},
        "time_to_target_seconds": reached,
        "cost_per_hour": entry.cost_per_hour,
        "cost_usd": None if entry.cost_per_hour is None else hours * entry.cost_per_hour,
    }


def used_blacklist(folder: Path | None, val: Split) -> bool | None:
    """Whether the blacklisted validation images of ImageNet count; None for other data.

    DAWNBench's word. dataset.json, which `pipelines.prepare` writes and packs into shards, tells;
    without it, all 50,000 images do.
    """
    if folder is None or dataset_name(val.classes) != "ImageNet":
        return None
    try:
        if has_shards(folder):
            facts = shard_manifest.read_manifest(folder).dataset
        else:
            facts = read_manifest(folder)
        told = facts.get("used_blacklist")
    except UserError:  # no reason to lose the results of a run
        told = None
    return told if isinstance(told, bool) else len(val) == IMAGENET_NUM_VAL


def hardware(trainer: Trainer) -> str:
    """The GPUs of all processes, or the CPU cores of this machine."""
    if trainer.device.type == "cuda":
        return f"{trainer.world.world_size} x {torch.cuda.get_device_name(trainer.device)}"
    return processor()
