"""Failures of a training step, turned into messages that say what to set."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastimagenet.errors import PeerLost
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


OUT_OF_MEMORY = ("out of memory", "unable to find an engine", "allocate memory")
"""Words of torch errors, on a GPU and a CPU. With cudnn.benchmark it tries every algorithm, takes
lack of memory as a reason to try the next one, and says in the end that none would run."""


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether the error says that the device is out of memory."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


@contextmanager
def out_of_memory_advice(phase: PlannedPhase, image_size: int) -> Iterator[None]:
    """Turn an out-of-memory error in the block into one that says what to set.

    The block works on batches of `phase`, at `image_size` pixels.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = f"batch_size={phase.batch_size // 2}"
        if phase.batch_size == 1:
            smaller = f"image_size={image_size // 2}"
        raise UserError(
            f"the device is out of memory with batch_size {phase.batch_size} at {image_size} px: "
            f"--set phases.{phase.index}.{smaller}"
        ) from None


def check_single_images(model: nn.Module, phases: Iterable[PlannedPhase]) -> None:
    """Raise UserError where BN would normalise a single value: of a batch of one image, and where
    the network has come down to one pixel."""
    for phase in phases:
        if phase.batch_size > 1:
            continue
        # Without memory and arithmetic: torch looks at the shapes.
        trial, size = copy.deepcopy(model).to("meta").train(), phase.image_size
        try:
            trial(torch.empty(1, 3, size, size, device="meta"))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"recipe field phases.{phase.index}.batch_size = 1: at {size} px batch "
                "normalisation has a single value per channel: "
                f"--set phases.{phase.index}.batch_size=2 or more"
            ) from None


@contextmanager
def compile_advice() -> Iterator[None]:
    """Turn whatever keeps torch from compiling in the block into one line: no compiler, a folder
    from which nothing may run, no name for the cache's folder."""
    try:
        yield
    except (UserError, PeerLost):
        raise
    except Exception as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        reasons = [reason for each in causes for words, reason in COMPILE if words in str(each)]
        of_torch = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        if not reasons and not of_torch:
            raise
        reason = reasons[0] if reasons else (str(error).splitlines() or [repr(error)])[0]
        raise UserError(
            f"recipe field compile = true: {reason}; --set compile=false runs without"
        ) from error


TEMPORARY = "set TORCHINDUCTOR_CACHE_DIR to a folder in which programs may be written and run"
COMPILE = (
    ("C++ compiler", "torch finds no C++ compiler: install g++, or name one in CXX"),
    ("C compiler", "torch finds no C compiler: install gcc, or name one in CC"),
    ("failed to map segment", f"what was compiled may not be run from its folder: {TEMPORARY}"),
    ("Permission denied", f"the folder for what is compiled cannot be used: {TEMPORARY}"),
    ("Read-only file system", f"the folder for what is compiled cannot be used: {TEMPORARY}"),
    ("No space left", f"the folder for what is compiled is full: {TEMPORARY}"),
    ("getpwuid", f"this user has no name, which the folder for what is compiled has: {TEMPORARY}"),
    ("No usable temporary directory", f"there is no temporary folder: {TEMPORARY}"),
)
"""Words of errors while torch compiles, and what is said in their place."""
