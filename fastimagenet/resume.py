"""The state of a run in a checkpoint: taken, given back, and refused where it does not fit."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastimagenet import checkpoint
from fastimagenet.distributed import gather_objects, launched_before
from fastimagenet.recorder import EpochRecord
from pipelines.errors import UserError

if TYPE_CHECKING:
    from fastimagenet.trainer import Trainer


ENTRIES = (
    *("recipe", "classes", "num_train", "seed", "model", "ranks", "accumulation", "clock"),
    "saved_at",
)
"""What a checkpoint that a run goes on from holds at least."""


def state_of(trainer: Trainer) -> dict[str, Any]:
    """All that the run needs to go on: tensors and plain values. Every process has to ask."""
    on_gpu = trainer.device.type == "cuda"
    rank_state = {
        "loader": trainer.train_loader.state_dict(),
        "eval_loader": trainer.eval_loader.state_dict(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(trainer.device) if on_gpu else None,
        "loss_total": trainer.losses.total.item(),
    }
    return {
        **trainer.about,
        "model": trainer.model.state_dict(),
        "ema": None if trainer.ema is None else trainer.ema.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "accumulation": trainer.plan.accumulation,
        "step": trainer.step,
        "epoch": trainer.epoch,
        "records": [vars(record) for record in trainer.records],
        "clock": trainer.clock.read(),
        "saved_at": time.time(),
        "ranks": gather_objects(rank_state, trainer.world, f"the save at step {trainer.step}"),
    }


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Go to where `state_of` was taken, but for the clock, which knows no way back.

    Raises UserError for another model, and in mid-epoch for another number of processes or
    batches an update.
    """
    world, ranks = trainer.world, state["ranks"]
    changed = changes(trainer, state)
    if changed and in_mid_epoch(state):
        raise UserError(
            f"--resume: the checkpoint was saved in mid-epoch{changed}: go on from the end of the "
            f"epoch before, --resume DIR/checkpoints/{checkpoint.EPOCH}, or as it was"
        )
    try:
        trainer.model.load_state_dict(state["model"])
        if trainer.ema is not None:
            trainer.ema.load_state_dict(state["ema"])
        trainer.optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--resume: the checkpoint is of another recipe: {reason}") from None
    trainer.scaler.load_state_dict(state["scaler"])
    trainer.step, trainer.epoch, trainer.changed = state["step"], state["epoch"], changed
    if changed:
        trainer.step = round(trainer.plan.step_at(trainer.epoch))
    trainer.records = [EpochRecord(**record) for record in state["records"]]
    rank_state = ranks[world.rank % len(ranks)]
    trainer.train_loader.load_state_dict(rank_state["loader"])
    trainer.eval_loader.load_state_dict(rank_state["eval_loader"])
    trainer.losses.total.fill_(rank_state["loss_total"])
    torch.set_rng_state(rank_state["torch_rng"])
    cuda_rng = rank_state.get("cuda_rng")
    if trainer.device.type == "cuda" and cuda_rng is not None:  # None: the run began on a CPU
        torch.cuda.set_rng_state(cuda_rng, trainer.device)


def in_mid_epoch(state: dict[str, Any]) -> bool:
    """Whether batches of an epoch have been read that is not over."""
    return bool(state["ranks"][0]["loader"]["step"])


def changes(trainer: Trainer, state: dict[str, Any]) -> str:
    """How the plan differs from that of the checkpoint: ", 2 processes before, ..."; or "".

    The processes and the batches of an update may differ, and with them the global batch and,
    by the recipe's rule, the LR.
    """
    plan, processes, accumulation = trainer.plan, len(state["ranks"]), state["accumulation"]
    if (processes, accumulation) == (plan.world_size, plan.accumulation):
        return ""
    first = plan.recipe.phases[0].batch_size
    before = plan.recipe.plan(processes, plan.num_train, first * processes * accumulation)
    epoch = min(state["epoch"], plan.epochs - 1)
    numbers = [
        (p.world_size, p.phase_of_epoch(epoch).global_batch, p.lr(round(p.step_at(epoch))))
        for p in (before, plan)
    ]
    names = ("processes", "global batch", "lr")
    pairs = zip(names, *numbers, strict=True)
    return "".join(f", {name} {old:g} -> {new:g}" for name, old, new in pairs)


def newest_intact(trainer: Trainer, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The last checkpoint or, with a word about it, the one before, or that of the epoch's end.

    Raises UserError naming the last one where none is intact.
    """
    damage: UserError | None = None
    for name in (checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.EPOCH):
        path = folder / name
        try:
            state = checkpoint.load(path, *ENTRIES)
        except UserError as error:
            damage = damage or error
            continue
        if damage is not None and trainer.world.is_main:
            print(f"note: {damage}; going on from {path}", file=sys.stderr)  # noqa: T201
        return path, state
    assert damage is not None
    raise damage


def resume(trainer: Trainer, output: Path, flag: str, *, elastic: bool = False) -> None:
    """Restore from the checkpoint that --resume names; "auto": from the one in `output`, if any.

    `elastic`: where the number of processes has changed in mid-epoch, the epoch begins anew.

    Raises UserError for a checkpoint of another run and for one that not all nodes see.
    """
    if flag == "auto":
        folder = output / "checkpoints"
        found = gather_objects((folder / checkpoint.LAST).exists(), trainer.world, "a check")
        if not any(found):
            return
        if not all(found):
            raise UserError(f"--output {output} must be a folder that all nodes see")
        path, state = newest_intact(trainer, folder)
        if elastic and changes(trainer, state) and in_mid_epoch(state):
            path = folder / checkpoint.EPOCH
            if not path.exists():
                return
            state = checkpoint.load(path, *ENTRIES)
    else:
        path = Path(flag)
        state = checkpoint.load(path, *ENTRIES)
    remedies = {
        "recipe": "another recipe: give the --recipe, --set, --epochs and --precision that it "
        "began with",
        "classes": "other classes: name the --data that it began with",
        "num_train": f"{state['num_train']} training images: name the --data and --skip-list that "
        "it began with",
        "seed": f"another seed: --seed {state['seed']}",
    }
    for name, remedy in remedies.items():
        if state[name] != trainer.about[name]:
            raise UserError(f"--resume: {path} is of a run with {remedy}")
    restore(trainer, state)
    # After a fault the run itself goes on: what was lost since the checkpoint is a part of it.
    saved_at = state["saved_at"]
    lost = max(0.0, time.time() - saved_at) if launched_before(saved_at) else None
    trainer.clock.carry_over(state["clock"], lost)
    if trainer.world.is_main:
        adopt(output / "checkpoints", path, state["epoch"])


def adopt(folder: Path, path: Path, epochs: int) -> None:
    """Give the run's new folder the checkpoint that it goes on from, after so many epochs, and the
    best one until then: its rows and its summary speak of them."""
    if path.parent.resolve() == folder.resolve():
        return
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.link(path, folder / checkpoint.LAST)
    best = path.with_name(checkpoint.BEST)
    if best.exists() and checkpoint.load(best, "epoch")["epoch"] <= epochs:
        checkpoint.link(best, folder / checkpoint.BEST)
