"""Present what a parity check has found: on the terminal, as JSON and CSV, and as a page."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from PIL import ImageChops

from pipelines import pages
from pipelines.environment import processor, versions
from pipelines.files import atomic_write, printable, write_object, write_text
from pipelines.parity.compare import NUM_CROPS, SIGNIFICANCE, Comparison, CropTest, Example
from pipelines.prepare.findings import shown

SPLITS = {"val": "validation", "train": "training"}
HEADER = ("split", "px", "verdict", "mean", "99 %", "max", "inside", "bound", "images")
CROP_HEADER = ("image", "verdict", "area D", "p", "aspect D", "p")
OUTSIDE = "OUTSIDE"
AMPLIFIED = 100
"""The differences of pixels are shown times this: one of 3 of 255 is as bright as can be."""
BINS, END = 50, 0.5
"""Of the histograms: bars, and the mean difference where the last one ends."""
Rows = list[tuple[str, ...]]


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

    def rows(self) -> Rows:
        """The comparisons as the cells under HEADER."""
        rows: Rows = []
        for one in self.comparisons:
            mean, highest = one.bounds
            cells = (
                *(SPLITS[one.split], str(one.image_size), "within" if one.within else OUTSIDE),
                *(f"{one.mean:.3f}", f"{one.percentile_99:.3f}"),
                *(f"{one.max:.3g}", f"{one.max_inside:.3g}"),
                f"mean {mean}" + ("" if highest is None else f", max {highest:g}"),
                f"{len(one.names):,} of {self.num_images[one.split]:,}",
            )
            rows.append(cells)
        return rows

    def crop_rows(self) -> Rows:
        """The tests of the crops as the cells under CROP_HEADER."""
        rows = []
        for one in self.crops:
            cells = [f"{one.width} x {one.height}", "within" if one.within else OUTSIDE]
            for distance, p in one.distances.values():
                cells += [f"{distance:.4f}", f"{p:.2g}"]
            rows.append(tuple(cells))
        return rows

    def text(self) -> str:
        """Two tables for the terminal."""
        lines = [
            *self.notes,
            "difference of dali from torchvision on Pillow images, of 255:",
            *aligned(HEADER, self.rows()),
            f"{NUM_CROPS:,} random crops of each, Kolmogorov-Smirnov distance D and its p-value, "
            f"which has to be {SIGNIFICANCE:g} at least:",
            *aligned(CROP_HEADER, self.crop_rows()),
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """As JSON: differences of 255, names relative to the folder."""
        comparisons = [
            {
                "split": one.split,
                "image_size": one.image_size,
                "images": len(one.names),
                "images_in_split": self.num_images[one.split],
                "mean": one.mean,
                "percentile_99": one.percentile_99,
                "max": one.max,
                "max_inside": one.max_inside,
                "bound_mean": one.bounds[0],
                "bound_max": one.bounds[1],
                "within": one.within,
                "worst": [{"name": x.name, "mean": x.mean, "max": x.max} for x in one.worst],
            }
            for one in self.comparisons
        ]
        crops = [
            {
                "height": one.height,
                "width": one.width,
                **{name: {"distance": d, "p": p} for name, (d, p) in one.distances.items()},
                "within": one.within,
            }
            for one in self.crops
        ]
        return {"within": self.within, "comparisons": comparisons, "crops": crops, **self.facts()}

    def page(self) -> str:
        """The page of the figures and the images that differ most."""
        facts = self.facts()
        return pages.render(
            Path(__file__).with_name("parity.html.jinja"),
            results=self,
            facts=(facts | facts.pop("versions")).items(),
            header=HEADER,
            rows=marked(self.rows()),
            crop_header=CROP_HEADER,
            crop_rows=marked(self.crop_rows()),
            num_crops=NUM_CROPS,
            significance=SIGNIFICANCE,
            histograms=[histogram(one) for one in self.comparisons],
            end=END,
            examples=[
                (title(one), one.image_size, [example(found) for found in one.worst])
                for one in self.comparisons
            ],
        )

    def write(self, folder: Path) -> Path:
        """Write `parity.json`, `images.csv` with the figures of each image, and `parity.html`,
        whose path is returned."""
        write_object(folder / "parity.json", self.as_dict())
        with (
            atomic_write(folder / "images.csv") as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            rows = csv.writer(file)
            rows.writerow(("split", "image_size", "name", "mean", "max"))
            for one in self.comparisons:
                for row in zip(one.names, one.means, one.maxima, strict=True):
                    rows.writerow((one.split, one.image_size, *row))
        page = folder / "parity.html"
        write_text(page, self.page())
        return page


def aligned(header: tuple[str, ...], rows: Rows) -> list[str]:
    """Lines of a table; the first column to the left, the others to the right."""
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]


def marked(rows: Rows) -> Rows:
    """The same cells for a page, where those that are OUTSIDE stand out."""
    mark = Markup(f'<b class="outside">{OUTSIDE}</b>')
    return [tuple(mark if cell == OUTSIDE else cell for cell in row) for row in rows]


def title(one: Comparison) -> str:
    return f"{SPLITS[one.split]}, {one.image_size} px"


def histogram(one: Comparison) -> dict[str, Any]:
    """Count the images by their mean difference: BINS bars up to END, and those beyond it."""
    counts, _ = np.histogram(one.means, BINS, (0, END))
    beyond = len(one.means) - int(counts.sum())
    return {
        "title": title(one),
        "bound": one.bounds[0],
        "counts": counts.tolist(),
        "beyond": beyond,
    }


def example(found: Example) -> dict[str, Any]:
    """An image as the template shows it."""
    difference = ImageChops.difference(found.ours, found.reference)
    bright = difference.point(lambda value: min(255, AMPLIFIED * value))
    return {
        "name": printable(shown(found.name)),
        "mean": found.mean,
        "max": found.max,
        "pictures": {
            "torchvision": pages.inline(found.reference),
            "DALI": pages.inline(found.ours),
            f"difference x {AMPLIFIED}": pages.inline(bright),
        },
    }
