"""What DDP needs beside itself: the gradient all-reduce, timed, and synchronised BN."""

# No `from __future__ import annotations`: DDP reads the hook's annotations as types.
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from pipelines.errors import UserError


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """Compute the model's BN statistics over all processes. Raises UserError on a CPU."""
    if device.type == "cpu":
        raise UserError("recipe field sync_bn = true needs a GPU: --set sync_bn=false on a CPU")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


class CommunicationTimer:
    """Sets the all-reduce hook of a DDP model, in bf16 if asked, and times its exposed part.

    The last gradient bucket is full when the backward pass has nothing left to compute: from then
    until backward returns (on a GPU: until the stream continues) the process only waits.
    """

    def __init__(self, model: DistributedDataParallel, bf16_gradients: bool) -> None:
        self._cuda = next(model.parameters()).is_cuda
        self._reduce: Any = default_hooks.allreduce_hook
        if bf16_gradients:
            self._reduce = default_hooks.bf16_compress_hook
        self._last_bucket: Any = None
        self._spans: list[tuple[Any, Any]] = []
        model.register_comm_hook(None, self._hook)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _hook(self, _: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        if bucket.is_last():
            self._last_bucket = self._now()
        future: torch.futures.Future[torch.Tensor] = self._reduce(None, bucket)
        return future

    def after_backward(self) -> None:
        """Call when backward has returned."""
        if self._last_bucket is not None:
            self._spans.append((self._last_bucket, self._now()))
            self._last_bucket = None

    def take_seconds(self) -> float:
        """Return the seconds waited since the last call; the device has to be synchronised."""
        spans, self._spans = self._spans, []
        if self._cuda:
            return sum(start.elapsed_time(end) for start, end in spans) / 1000
        return float(sum(end - start for start, end in spans))
