"""Which checkpoint a run goes on from, and what of the run may have changed since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastimagenet.distributed.collectives import gather_objects
from fastimagenet.distributed.world import World
from fastimagenet.recipes import toml
from fastimagenet.recipes.plan import Plan
from fastimagenet.training import checkpoint
from pipelines.errors import UserError

State = dict[str, Any]
"""What `Trainer.state_dict` has returned."""


def find_checkpoint(
    source: str, folder: Path | None, plan: Plan, world: World, elastic: bool
) -> tuple[Path, State] | None:
    """Load the checkpoint that `Trainer.resume` is asked for; None where "auto" finds none.

    Raises UserError for one that is damaged, or that not all nodes see.
    """
    if source != "auto":
        return Path(source), checkpoint.load(Path(source), *checkpoint.ENTRIES)
    assert folder is not None, "resuming from the run's folder takes one"
    checkpoints = folder / "checkpoints"
    found = gather_objects((checkpoints / checkpoint.LAST).exists(), world, "a check")
    if not any(found):
        return None
    if not all(found):
        raise UserError(f"--output {folder} must be a folder that all nodes see")
    path, state = checkpoint.newest_intact(checkpoints, say=world.is_main)
    if elastic and _in_mid_epoch(state) and _differences(plan, state):
        path = checkpoints / checkpoint.EPOCH
        return (path, checkpoint.load(path, *checkpoint.ENTRIES)) if path.exists() else None
    return path, state


def check_same_run(path: Path, state: State, own: dict[str, Any]) -> None:
    """Raise UserError where the checkpoint at `path` is of a run with other facts than `own`.

    The recipes, the checkpoint's being TOML, are compared as values: releases write their fields in
    different orders.
    """
    remedies = {
        "classes": "other classes: name the --data that it began with",
        "num_train": f"{state['num_train']} training images: name the --data and --skip-list "
        "that it began with",
        "seed": f"another seed: --seed {state['seed']}",
        "images": "other images, though as many (their names, classes or sizes): name the "
        "--data that it began with, as they were",
    }
    what = f"--resume: {path} is of a run with"
    for name, remedy in remedies.items():
        # Releases before had no digest of the images.
        if name in state and name in own and state[name] != own[name]:
            raise UserError(f"{what} {remedy}")
    before = toml.loads(state["recipe"], f"the recipe in {path}")
    names = toml.differing_fields(before, own["recipe"])
    if names and all(name.endswith((".data", ".batch_size")) for name in names):
        settings = " ".join(f"--set {name}={toml.field_of(before, name)}" for name in names)
        raise UserError(
            f"{what} other copies of the images or other batches, which follow from what is there "
            f"and from the processes where nothing is said: give {settings}"
        )
    if names:
        raise UserError(
            f"{what} another recipe ({', '.join(names)}): give the --recipe, --set, --epochs and "
            "--precision that it began with"
        )
    if state.get("copies", own.get("copies")) != own.get("copies"):
        raise UserError(
            f"{what} other copies of the images, made anew since: it takes those it began with"
        )


def plan_changes(plan: Plan, state: State) -> str:
    """Say how the plan differs from the checkpoint's: ", processes 2 -> 1, ..."; or "".

    Raises UserError where it does and the checkpoint is from within an epoch.
    """
    changes = _differences(plan, state)
    if changes and _in_mid_epoch(state):
        raise UserError(
            f"--resume: the checkpoint was saved in mid-epoch{changes}: resume from the end of "
            f"the epoch before, --resume DIR/checkpoints/{checkpoint.EPOCH}, or as it was"
        )
    return changes


def _differences(plan: Plan, state: State) -> str:
    """Say how the plan differs from the checkpoint's.

    The number of processes and of micro-batches an update may differ, and with them the global
    batch and, by the recipe's rule, the LR.
    """
    processes, accumulation = len(state["ranks"]), state["accumulation"]
    if (processes, accumulation) == (plan.world_size, plan.accumulation):
        return ""
    first = plan.recipe.phases[0].batch_size
    before = Plan.of(plan.recipe, processes, plan.num_train, first * processes * accumulation)
    epoch = min(state["epoch"], plan.epochs - 1)
    numbers = [
        (p.world_size, p.phase_of_epoch(epoch).global_batch, p.lr(round(p.step_at(epoch))))
        for p in (before, plan)
    ]
    names = ("processes", "global batch", "lr")
    pairs = zip(names, *numbers, strict=True)
    return "".join(f", {name} {old:g} -> {new:g}" for name, old, new in pairs)


def _in_mid_epoch(state: State) -> bool:
    """Tell whether a saved state is from within an epoch."""
    return bool(state["ranks"][0]["loader"]["step"])


def rounding_note(state: State, threads: int | None, deterministic: bool) -> str:
    """Say what of this process sums in another order than before: "" for the same bits."""
    changes = []
    before = state.get("threads")
    if before and threads and before != threads:
        changes.append(f"on {threads} threads in place of {before}")
    if state.get("deterministic", deterministic) != deterministic:
        changes.append(f"{'with' if deterministic else 'without'} --deterministic")
    same = "equal to a run without a stop up to rounding only"
    return f", {' and '.join(changes)}: {same}" if changes else ""
