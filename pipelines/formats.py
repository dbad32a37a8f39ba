"""Format numbers for people, in the HTML pages and on the terminal."""

from __future__ import annotations

import math

NO_BREAK = "\u00a0"


def number(value: float | None, form: str = ",", unit: str = "") -> str:
    """Format a number, with its unit on the same line; "-" for None."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    return f"{value:{form}}{NO_BREAK}{unit}" if unit else f"{value:{form}}"


def percent(fraction: float | None, digits: int = 2) -> str:
    """Format a fraction: 0.9412 -> "94.12 %"."""
    return number(None if fraction is None else 100 * fraction, f".{digits}f", "%")


def time_unit(seconds: float) -> tuple[str, float]:
    """Choose the unit that suits a duration, and its length in seconds."""
    if seconds < 180:
        return "s", 1.0
    return ("min", 60.0) if seconds < 3 * 3600 else ("h", 3600.0)


def duration(seconds: float | None) -> str:
    """Format a duration in the unit that suits it."""
    if seconds is None:
        return "-"
    unit, length = time_unit(seconds)
    return number(seconds / length, ".3g" if seconds < 100 else ".1f", unit)


def plain(value: float | None, digits: int = 6) -> str:
    """Format a number as short as its digits allow: "0.24", "1e-5", "100"; "-" for None."""
    if value is None:
        return "-"
    return f"{float(f'{value:.{digits}g}'):g}".replace("e-0", "e-").replace("e+0", "e+")
