"""Failures of a training step, turned into messages that say what to set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastimagenet.recipes.plan import Plan, PlannedPhase
from pipelines.errors import UserError

SCALER_PATIENCE_STEPS = 16
"""Non-finite losses in a row from which the fp16 loss scaler, halved at each, may recover."""


class LossMonitor:
    """Sums an epoch's losses and records the step at which they diverged, on the device.

    Only `read` waits for the device. `patience_steps`: non-finite losses in a row that count as
    divergence.
    """

    def __init__(self, device: torch.device, patience_steps: int) -> None:
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        """Sum of the losses of the epoch so far, a float64 scalar on the device."""
        self._patience = patience_steps
        self._bad_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._failed_at = torch.full((), -1, dtype=torch.int64, device=device)

    def update(self, loss: Tensor, step: int) -> None:
        """Add the loss, a scalar on the device, of update `step`."""
        self.total += loss
        self._bad_steps = torch.where(torch.isfinite(loss), 0, self._bad_steps + 1)
        failed = (self._bad_steps == self._patience) & (self._failed_at < 0)
        self._failed_at = torch.where(failed, step, self._failed_at)

    def read(self, loss: Tensor, plan: Plan) -> float:
        """Return the value of `loss`. Raises UserError with step and LR if the run has diverged."""
        # One transfer for both numbers: it waits for all work queued on the device.
        value, failed_at = torch.stack([loss.double(), self._failed_at.double()]).tolist()
        if failed_at >= 0:
            step = int(failed_at)
            raise UserError(
                f"the loss is not finite at step {step}, lr {plan.lr(step):.4g}: try a lower one "
                f"in another --output, such as --set max_lr={plan.recipe.max_lr / 2:g}"
            )
        return float(value)


OUT_OF_MEMORY = ("out of memory", "unable to find an engine")
"""Words of torch errors. With cudnn.benchmark it tries every algorithm, takes lack of memory as a
reason to try the next one, and says in the end that none would run."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether the error says that the GPU is out of memory."""
    return any(words in str(error) for words in OUT_OF_MEMORY)


@contextmanager
def out_of_memory_advice(phase: PlannedPhase, image_size: int) -> Iterator[None]:
    """Turn the GPU's out-of-memory error in the block into one that says what to set.

    The block works on batches of `phase`, at `image_size` pixels.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"the GPU is out of memory with batch_size {phase.batch_size} at {image_size} px: "
            f"--set phases.{phase.index}.batch_size={max(1, phase.batch_size // 2)}"
        ) from None
