"""Which number format a run computes in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.errors import UserError

if TYPE_CHECKING:
    import torch


def autocast_dtype(precision: str, device: str) -> torch.dtype | None:
    """The dtype to autocast to, None for plain float32.

    "auto" is bf16 on a GPU and fp32 on a CPU. Raises UserError for fp16 on a CPU.
    """
    import torch

    if precision == "auto":
        precision = "fp32" if device == "cpu" else "bf16"
    if precision == "fp16" and device == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU take bf16 or fp32")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
