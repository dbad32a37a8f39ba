"""What a device can do at most, measured, and what a training step asks of it, counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastimagenet.training.trainer import Trainer

MATRIX = {"cpu": 2048, "cuda": 8192}
"""Rows and columns."""
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Beyond any cache."""


def synchronize(device: torch.device) -> None:
    """Wait for what is queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def calls_per_sec(
    call: Callable[[], object], device: torch.device, seconds: float, warm_up: int = 1
) -> float:
    """How often a second `call` is done over at least `seconds`, after calls not counted."""
    for _ in range(warm_up):
        call()
    synchronize(device)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        call()
        count += 1
        if device.type == "cuda" and count % 16 == 0:  # or the queue would run far ahead
            torch.cuda.synchronize(device)
    synchronize(device)
    return count / (time.perf_counter() - start)


def matmul_flops_per_sec(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Floating-point operations a second of a large square matrix product."""
    size = MATRIX[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty(size, size, device=device, dtype=dtype)
    rate = calls_per_sec(lambda: torch.mm(left, right, out=product), device, seconds)
    return 2 * size**3 * rate


def copy_bytes_per_sec(device: torch.device, seconds: float) -> float:
    """Bytes read and written a second by a large copy in the device's memory."""
    size = COPY_BYTES[device.type]
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size * calls_per_sec(lambda: target.copy_(source), device, seconds)


class ByteCounter(TorchDispatchMode):
    """Sums the bytes of the tensors that every operation takes and gives; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = tree_leaves((args, kwargs, result))
            self.bytes += sum(x.numel() * x.element_size() for x in leaves if isinstance(x, Tensor))
        return result


def step_costs(trainer: Trainer, images: Tensor, labels: Tensor) -> tuple[int, int]:
    """Floating-point operations, and bytes moved, of the forward and backward pass of a batch.

    Operations: matrix products and convolutions, a multiply-add counts as two. Bytes: what every
    operation of the uncompiled network reads and writes; fusing and caches make it less. The
    update of the weights is left out of both.
    """
    trainer.model.train()
    with FlopCounterMode(display=False) as flops, ByteCounter() as moved:
        with torch.autocast(trainer.device.type, trainer.dtype, enabled=trainer.dtype is not None):
            logits = trainer.model(images)
        cross_entropy(logits.float(), labels).backward()
    trainer.optimizer.zero_grad(set_to_none=True)
    return flops.get_total_flops(), moved.bytes
