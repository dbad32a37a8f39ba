"""What `benchmarks.loaders` measured: as data, and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.intervals import Estimate, estimate, ratio
from benchmarks.run_table import markdown

Rounds = dict[str, list[float]]
"""Images per second of each round, per loader."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All loaders on one folder, at one image size."""

    label: str
    data: str
    images: int
    image_size: int
    images_per_sec: dict[str, Estimate]
    """Per loader, over the rounds."""
    ratio_to_dataloader: dict[str, Estimate]
    """Geometric mean over the rounds; as the following two."""
    ratio_to_decode: dict[str, Estimate]
    """To the rate of decoding whole images of the same folder."""
    ratio_to_first: dict[str, Estimate]
    """To the same loader on the first folder; empty for that one."""
    rounds: Rounds


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured, on what, and when."""

    config: dict[str, Any]
    measured: list[Measured]
    left_out: dict[str, str]
    """Loaders that could not take part, and why."""
    versions: dict[str, str]
    hardware: str
    load_average: float
    """Of the machine at the start, over the minute before: well above 0, others ran too."""
    date: str


def compare(
    rounds: Rounds, first: Rounds | None, *, label: str, data: str, images: int, image_size: int
) -> Measured:
    """Means and ratios of one folder; `first` are the rounds of the first folder."""

    def ratios_to(base: str) -> dict[str, Estimate]:
        others = [name for name in rounds if base in rounds and name != base]
        return {name: ratio(rounds[name], rounds[base]) for name in others}

    return Measured(
        label=label,
        data=data,
        images=images,
        image_size=image_size,
        images_per_sec={name: estimate(rates) for name, rates in rounds.items()},
        ratio_to_dataloader=ratios_to("dataloader"),
        ratio_to_decode=ratios_to("decode"),
        ratio_to_first={
            name: ratio(rates, first[name])
            for name, rates in rounds.items()
            if first is not None and name in first
        },
        rounds=rounds,
    )


def table(measured: list[Measured]) -> str:
    """One line per image size, folder and loader, as Markdown; means with 95 % intervals."""
    header = ["image size", "data", "loader", "images/s", "/ dataloader", "/ decode"]
    several = any(one.ratio_to_first for one in measured)
    if several:
        header.append(f"/ {measured[0].label}")
    rows = [header]
    for one in measured:
        for name, rate in one.images_per_sec.items():
            ratios = [one.ratio_to_dataloader, one.ratio_to_decode]
            ratios += [one.ratio_to_first] if several else []
            cells = [str(found.get(name, "-")) for found in ratios]
            rows.append([f"{one.image_size} px", one.label, name, str(rate), *cells])
    return markdown(rows)
