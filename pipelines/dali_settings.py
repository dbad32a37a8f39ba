"""How DALI is set up: what changes its speed and memory, never a pixel that a CPU decodes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DaliSettings:
    """Settings of a pipeline, whose threads are those of the `LoaderSpec`. The last three hold on a
    GPU only; the defaults are not yet measured there."""

    prefetch: int = 2
    """Batches that are made ahead."""
    hw_decoder_load: float = 0.99
    """Share of the images that the hardware decoder takes where there is one."""
    width_hint: int = 0
    """Pixels of the widest image, for which buffers are made at the start; 0: they grow."""
    height_hint: int = 0
    """Likewise of the highest."""
