"""`parity.html`: one self-contained page with the figures and the images that differ most."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops

from pipelines.files import write_text
from pipelines.pages import render
from pipelines.parity.compare import BOUNDS, Comparison, Example
from pipelines.parity.crop_shapes import DRAWS, SIGNIFICANCE
from pipelines.parity.results import CROP_HEADER, HEADER, SPLITS, Results
from pipelines.prepare.findings import printable, shown

AMPLIFIED = 100
"""The differences of pixels are shown times this: one of 3 of 255 is as bright as can be."""
BINS, END = 50, 0.5
"""Of the histograms: bars, and the mean difference where the last one ends."""


@dataclass(frozen=True)
class Histogram:
    """The mean differences of the images of one comparison."""

    title: str
    bound: float
    counts: list[int]
    """Images in each of BINS equal parts of 0 to END."""
    beyond: int
    """Images farther to the right."""


def write_page(folder: Path, results: Results) -> Path:
    """Write `folder/parity.html` and return its path."""
    facts = results.facts()
    html = render(
        Path(__file__).with_name("parity.html.jinja"),
        results=results,
        facts={**facts, **facts.pop("versions")},
        headline=headline(results),
        header=HEADER,
        crop_header=CROP_HEADER,
        draws=DRAWS,
        significance=SIGNIFICANCE,
        histograms=[histogram(one) for one in results.comparisons],
        end=END,
        examples=[
            (title(one), one.image_size, [example(found) for found in one.worst])
            for one in results.comparisons
        ],
    )
    path = folder / "parity.html"
    write_text(path, html)
    return path


def headline(results: Results) -> str:
    if results.within:
        return "DALI gives the pixels that torchvision gives"
    return "DALI's pixels or crops differ from torchvision's by more than the bounds"


def title(one: Comparison) -> str:
    return f"{SPLITS[one.split]}, {one.image_size} px"


def histogram(one: Comparison) -> Histogram:
    counts, _ = np.histogram(one.means, BINS, (0, END))
    beyond = len(one.means) - int(counts.sum())
    return Histogram(title(one), BOUNDS[one.split][0], counts.tolist(), beyond)


def example(found: Example) -> dict[str, Any]:
    """An image as the template shows it."""
    difference = ImageChops.difference(found.ours, found.reference)
    bright = difference.point(lambda value: min(255, AMPLIFIED * value))
    return {
        "name": printable(shown(found.name)),
        "mean": found.mean,
        "max": found.max,
        "pictures": {
            "torchvision": inline(found.reference),
            "DALI": inline(found.ours),
            f"difference x {AMPLIFIED}": inline(bright),
        },
    }


def inline(image: Image.Image) -> str:
    """A PNG as the address of an `<img>`."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
