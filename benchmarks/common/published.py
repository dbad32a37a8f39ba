"""Published figures to stand beside ours: times to an accuracy, each with hardware and source."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Published:
    """One entry of published.toml."""

    name: str
    dataset: str
    """"ImageNet" or "CIFAR10"."""
    hardware: str
    seconds: float
    """To the accuracy, by its authors' own clock."""
    source: str
    top1: float | None = None
    """Fractions; None: not told."""
    top5: float | None = None
    at_least: bool = False
    """The accuracies are a threshold that was passed, not what was reached."""
    usd: float | None = None
    epochs: int | None = None


def published(datasets: set[str], metric: str) -> list[Published]:
    """Return the entries of these data sets that tell "top1" or "top5", fastest first."""
    text = (Path(__file__).parent / "published.toml").read_text(encoding="utf-8")
    entries = [Published(**entry) for entry in tomllib.loads(text)["entry"]]
    told = [e for e in entries if e.dataset in datasets and getattr(e, metric) is not None]
    return sorted(told, key=lambda entry: entry.seconds)
