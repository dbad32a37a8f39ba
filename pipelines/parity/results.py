"""What a parity check has found: on the terminal and in files."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from pipelines.environment import processor, versions
from pipelines.files import write_object, written_beside
from pipelines.parity.compare import BOUNDS, Comparison
from pipelines.parity.crop_shapes import DRAWS, SIGNIFICANCE, CropTest

SPLITS = {"val": "validation", "train": "training"}
HEADER = ("split", "px", "verdict", "mean", "99 %", "max", "inside", "bound", "images")
CROP_HEADER = ("image", "verdict", "area D", "p", "aspect D", "p")


@dataclass(frozen=True)
class Results:
    """All comparisons of a call, and what they were made with."""

    comparisons: list[Comparison]
    crops: list[CropTest]
    num_images: dict[str, int]
    """By split, of those that could have been compared."""
    notes: list[str]
    """What was left out because it cannot be read."""
    command: str
    device: str

    @property
    def within(self) -> bool:
        pixels = all(one.within for one in self.comparisons)
        return pixels and all(one.within for one in self.crops)

    def facts(self) -> dict[str, Any]:
        """What has to be known of the figures."""
        return {
            "command": self.command,
            "device": self.device if self.device == "cpu" else torch.cuda.get_device_name(),
            "hardware": processor(),
            "versions": versions(),
            "date": date.today().isoformat(),
        }

    def rows(self) -> list[tuple[str, ...]]:
        """The comparisons as the cells under HEADER."""
        return [
            (
                SPLITS[one.split],
                str(one.image_size),
                verdict(one.within),
                f"{one.mean:.3f}",
                f"{one.percentile_99:.3f}",
                f"{one.max:.3g}",
                f"{one.max_inside:.3g}",
                bound_in_words(one.split),
                f"{len(one.names):,} of {self.num_images[one.split]:,}",
            )
            for one in self.comparisons
        ]

    def crop_rows(self) -> list[tuple[str, ...]]:
        """The tests of the crops as the cells under CROP_HEADER."""
        rows = []
        for one in self.crops:
            cells = [f"{one.width} x {one.height}", verdict(one.within)]
            for distance, p in one.distances.values():
                cells += [f"{distance:.4f}", f"{p:.2g}"]
            rows.append(tuple(cells))
        return rows


def bound_in_words(split: str) -> str:
    mean, highest = BOUNDS[split]
    return f"mean {mean}" if highest is None else f"mean {mean}, max {highest:g}"


def verdict(within: bool) -> str:
    return "within" if within else "OUTSIDE"


def describe(results: Results) -> str:
    """The results as text for the terminal."""
    return "\n".join(
        (
            *results.notes,
            "difference of dali from torchvision on Pillow images, of 255:",
            *aligned(HEADER, results.rows()),
            f"{DRAWS:,} random crops of each, Kolmogorov-Smirnov distance D and its p-value, "
            f"which has to be {SIGNIFICANCE:g} at least:",
            *aligned(CROP_HEADER, results.crop_rows()),
        )
    )


def aligned(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table; the first column to the left, the others to the right."""
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]


def write_files(folder: Path, results: Results) -> None:
    """`parity.json`, all but the figures of each image, and `images.csv` with those."""
    write_object(folder / "parity.json", to_dict(results))
    with (
        written_beside(folder / "images.csv") as beside,
        beside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        rows = csv.writer(file)
        rows.writerow(("split", "image_size", "name", "mean", "max"))
        for one in results.comparisons:
            for row in zip(one.names, one.means, one.maxima, strict=True):
                rows.writerow((one.split, one.image_size, *row))


def to_dict(results: Results) -> dict[str, Any]:
    """As JSON: differences of 255, names relative to the folder."""
    comparisons = []
    for one in results.comparisons:
        bound_mean, bound_max = BOUNDS[one.split]
        comparisons.append(
            {
                "split": one.split,
                "image_size": one.image_size,
                "images": len(one.names),
                "images_in_split": results.num_images[one.split],
                "mean": one.mean,
                "percentile_99": one.percentile_99,
                "max": one.max,
                "max_inside": one.max_inside,
                "bound_mean": bound_mean,
                "bound_max": bound_max,
                "within": one.within,
                "worst": [{"name": x.name, "mean": x.mean, "max": x.max} for x in one.worst],
            }
        )
    crops = [
        {
            "height": one.height,
            "width": one.width,
            **{name: {"distance": d, "p": p} for name, (d, p) in one.distances.items()},
            "within": one.within,
        }
        for one in results.crops
    ]
    return {"within": results.within, "comparisons": comparisons, "crops": crops, **results.facts()}
