"""Energy that the GPUs take, as NVML counts it; without NVML or a GPU nothing is told."""

from __future__ import annotations

import os
from importlib import import_module

JOULES_PER_KWH = 3.6e6


def gpu_joules() -> float | None:
    """What the GPUs have taken since the driver was loaded, idle ones included; None: not told.

    Those of CUDA_VISIBLE_DEVICES where it names them by number, else all of this machine. It needs
    the package nvidia-ml-py and GPUs that count (Volta and later).
    """
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        numbers = [int(part) for part in visible.split(",") if part.isdigit()]
        handles = map(nvml.nvmlDeviceGetHandleByIndex, numbers or range(nvml.nvmlDeviceGetCount()))
        counts = [nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles]
    except nvml.NVMLError:
        return None
    return sum(counts) / 1000 if counts else None
