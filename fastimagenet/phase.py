"""`Phase`: consecutive epochs of a recipe at one image size and batch size."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from pipelines.errors import UserError

if TYPE_CHECKING:
    from fastimagenet.recipes import Recipe


def require(condition: bool, field: str, rule: str, value: object) -> None:
    """Raise UserError naming the recipe field unless the condition holds."""
    if not condition:
        raise UserError(f"recipe field {field} must be {rule}, not {value!r}")


def settle_floats(settings: Recipe | Phase, prefix: str = "") -> None:
    """Make floats of whole numbers in float fields: 10 and 10.0 are one value, but not one text,
    and runs are told apart by their recipe's text.

    Raises UserError naming the field that holds NaN or infinity.
    """
    for field in fields(settings):
        if "float" in str(field.type):
            value = getattr(settings, field.name)
            require(_all_finite(value), prefix + field.name, "finite", value)
            object.__setattr__(settings, field.name, _as_floats(value))


def _all_finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_all_finite, value))
    return bool(abs(value) <= sys.float_info.max)  # false for NaN, and no overflow for huge ints


def _as_floats(value: Any) -> Any:
    return tuple(map(_as_floats, value)) if isinstance(value, list | tuple) else float(value)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Consecutive epochs at one image size and batch size. Raises UserError naming the field."""

    epochs: int
    image_size: int
    """Training images are this many pixels high and wide."""
    batch_size: int
    """Images an update PER GPU (per process on a CPU)."""
    min_scale: float = 0.25
    """Smallest share of the image's area that a random crop keeps."""
    eval_size: int = 0
    """Size at which this phase is evaluated; 0 means image_size."""
    data: str = "auto"
    """The copy in the data folder that is trained on, such as "160"; "original" for none, "auto"
    for the smallest that serves image_size."""
    rect: bool = False
    """Evaluate rectangles, of which eval_size is the shorter side, in place of squares."""

    def __post_init__(self) -> None:
        settle_floats(self, "phases.")
        require(self.epochs >= 1, "phases.epochs", "at least 1", self.epochs)
        require(self.image_size >= 8, "phases.image_size", "at least 8 pixels", self.image_size)
        require(self.batch_size >= 1, "phases.batch_size", "at least 1", self.batch_size)
        require(0 < self.min_scale <= 1, "phases.min_scale", "in (0, 1]", self.min_scale)
        valid = self.eval_size == 0 or self.eval_size >= 8
        require(valid, "phases.eval_size", "0 or at least 8 pixels", self.eval_size)
        require(bool(self.data), "phases.data", 'a copy, "original" or "auto"', self.data)
