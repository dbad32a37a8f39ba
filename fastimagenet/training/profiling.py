"""The profiler behind --profile: a trace of ten steps, operation by operation."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

FIRST_STEP, NUM_STEPS = 10, 10
"""Counted from the process's start; the first steps are not like the others."""


class StepProfiler:
    """Traces ten steps to `folder`/rank0.json.gz, for Perfetto or chrome://tracing."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.path = folder / "rank0.json.gz"
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        plan = schedule(wait=FIRST_STEP - 1, warmup=1, active=NUM_STEPS, repeat=1)
        self._profile = profile(
            activities=activities, schedule=plan, on_trace_ready=self._write, record_shapes=True
        )
        self._profile.start()

    def step(self) -> None:
        """Call after every step."""
        self._profile.step()

    def _write(self, traced: profile) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        traced.export_chrome_trace(str(self.path))

    def close(self) -> None:
        """Stop tracing; a run of fewer steps leaves what there is."""
        self._profile.stop()
