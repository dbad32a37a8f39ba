"""The files of `evaluate --details`: three tables, and a page that shows where a network fails."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from fastimagenet.details.outcomes import BINS, Ints, Outcomes
from fastimagenet.report.figures import BLUE, GREY, WIDTH, new_figure, svg, with_legend
from fastimagenet.report.page import write_report
from fastimagenet.report.run import DETAILS_PAGE, PREDICTIONS, holds_run
from pipelines import pages
from pipelines.datasets.images import ImageFile
from pipelines.datasets.pixels import rgb
from pipelines.files import Row, printable, write_table, write_text
from pipelines.formats import number, percent

MATRIX_CLASSES = 50
"""Up to so many classes the page has the whole matrix."""
PAIRS = 30
ALL_CLASSES = 20
"""Up to so many classes the page has all of them, else the EXTREMES at either end."""
EXTREMES = 10
THUMBNAILS = 24
THUMBNAIL_SIDE = 160
"""Pixels, of the longer side."""
CLASS_HEADER = ("class", "precision", "recall", "f1", "support")


def write_details(folder: Path, outcomes: Outcomes, files: Sequence[ImageFile], facts: Row) -> Path:
    """Write predictions.csv, classes.csv, confusion.csv and the page, whose path is returned.

    `files`: of the images, in their order. `facts`: what `evaluate --json` prints. A run's folder
    that `folder` is in gets its report anew, with a link.
    """
    names = outcomes.classes
    figures = outcomes.by_class
    write_table(
        folder / PREDICTIONS,
        ("path", "true", "predicted", "p", "p_true", "loss"),
        (
            (str(files[i]), names[outcomes.labels[i]], predicted_name(outcomes, i), *shares)
            for i, shares in enumerate(
                zip(*map(short, (outcomes.p, outcomes.p_true, outcomes.loss)), strict=True)
            )
        ),
    )
    write_table(
        folder / "classes.csv",
        CLASS_HEADER,
        zip(
            names,
            *map(short, (figures.precision, figures.recall, figures.f1)),
            figures.support.tolist(),
            strict=True,
        ),
    )
    write_table(
        folder / "confusion.csv",
        ("true", "predicted", "images"),
        (
            (names[true], names[predicted], count)
            for true, predicted, count in zip(*outcomes.confusions, strict=True)
        ),
    )
    run = folder.resolve().parent
    path = folder / DETAILS_PAGE
    write_text(path, render(outcomes, files, facts, "../report.html" if holds_run(run) else ""))
    if holds_run(run):
        write_report(run)
    return path


def short(values: Any) -> list[str]:
    """Format numbers for a table, with as many digits as float32 has."""
    return [f"{value:.7g}" for value in values]


def predicted_name(outcomes: Outcomes, index: int) -> str:
    """Name the class that an image was taken for; "" where the outputs are no numbers."""
    label = outcomes.predicted[index]
    return outcomes.classes[label] if label >= 0 else ""


def render(outcomes: Outcomes, files: Sequence[ImageFile], facts: Row, report: str = "") -> str:
    """Fill in the page; `report`: the address of the run's, if there is one."""
    few = len(outcomes.classes) <= MATRIX_CLASSES
    return pages.render(
        Path(__file__).with_name("details.html.jinja"),
        facts=facts,
        report=report,
        tiles=tiles(outcomes, facts),
        names=outcomes.classes,
        matrix=matrix_rows(outcomes) if few else None,
        pairs=None if few else pair_rows(outcomes),
        classes=class_tables(outcomes),
        reliability=Markup(reliability(outcomes)),
        ece=outcomes.calibration.error,
        examples=[example(outcomes, files, i) for i in outcomes.highest_losses(THUMBNAILS)],
        bins=BINS,
    )


def tiles(outcomes: Outcomes, facts: Row) -> list[tuple[str, str, str]]:
    """List name, value and remark of the key figures."""
    tta = facts.get("tta_top1")
    plain = "plain" if tta is None else f"TTA {percent(tta)}"
    found = [("top-1", percent(outcomes.top1), plain)]
    if facts.get("top5") is not None:
        found.append(("top-5", percent(facts["top5"]), "among the first five"))
    return [
        *found,
        ("balanced accuracy", percent(outcomes.balanced_accuracy), "mean recall of all classes"),
        ("calibration error", percent(outcomes.calibration.error), f"ECE of {BINS} bins"),
        ("loss", number(facts["loss"], ".4f"), "mean, nats"),
        ("images", number(facts["images"]), f"{len(outcomes.classes):,} classes"),
    ]


def matrix_rows(outcomes: Outcomes) -> list[tuple[str, list[tuple[int, int]]]]:
    """List each true class with the number of images and their share in per cent, by prediction."""
    matrix, support = outcomes.matrix, outcomes.by_class.support
    shares = np.rint(100 * matrix / np.maximum(support, 1)[:, None]).astype(int)
    cells = np.stack([matrix, shares], axis=2).tolist()
    return list(zip(outcomes.classes, cells, strict=True))


def pair_rows(outcomes: Outcomes) -> list[tuple[str, ...]]:
    """List the pairs of classes that were confused most often."""
    true, predicted, counts = outcomes.confusions
    wrong = np.flatnonzero(true != predicted)
    most = wrong[np.argsort(-counts[wrong], kind="stable")[:PAIRS]]
    names, support = outcomes.classes, outcomes.by_class.support
    return [
        (names[true[i]], names[predicted[i]], number(int(counts[i])),
         percent(counts[i] / support[true[i]], 1))
        for i in most
    ]  # fmt: skip


def class_tables(outcomes: Outcomes) -> list[tuple[str, list[tuple[str, ...]]]]:
    """List headings and rows of classes: all from the worst F1 on, or the worst and the best."""
    there = np.flatnonzero(outcomes.by_class.support)
    order = there[np.argsort(outcomes.by_class.f1[there], kind="stable")]
    if len(order) <= ALL_CLASSES:
        return [("Classes, the worst first", class_rows(outcomes, order))]
    return [
        ("Worst classes", class_rows(outcomes, order[:EXTREMES])),
        ("Best classes", class_rows(outcomes, order[::-1][:EXTREMES])),
    ]


def class_rows(outcomes: Outcomes, order: Ints) -> list[tuple[str, ...]]:
    figures = outcomes.by_class
    return [
        (outcomes.classes[i],
         *(percent(values[i], 1) for values in (figures.precision, figures.recall, figures.f1)),
         number(int(figures.support[i])))
        for i in order
    ]  # fmt: skip


def reliability(outcomes: Outcomes) -> str:
    """Draw accuracy against confidence, and below how many images there are at each."""
    found = outcomes.calibration
    # The images of probability 1 are drawn in the last bin.
    count = np.append(found.count[: BINS - 1], found.count[BINS - 1 :].sum())
    right = found.accuracy * found.count
    right = np.append(right[: BINS - 1], right[BINS - 1 :].sum())
    left = np.arange(BINS) / BINS
    figure, (upper, lower) = new_figure(2, size=(WIDTH, 4.6), sharex=True)
    look: Row = {"width": 1 / BINS, "align": "edge", "edgecolor": "white"}
    upper.bar(left, 100 * right / np.maximum(count, 1), color=BLUE, **look, label="accuracy")
    upper.plot([0, 1], [0, 100], color="black", linestyle="--", linewidth=1.2, label="calibrated")
    upper.set_ylabel("right (%)")
    upper.set_ylim(0, 100)
    lower.bar(left, 100 * count / max(1, count.sum()), color=GREY, **look)
    lower.set_ylabel("images (%)")
    lower.set_xlabel("probability of the predicted class")
    lower.set_xlim(0, 1)
    return svg(with_legend(figure), "reliability")


def example(outcomes: Outcomes, files: Sequence[ImageFile], index: int) -> Row:
    """Describe an image as the template shows it."""
    file = files[index]
    name = file.name or "/".join(Path(file.path).parts[-2:])
    return {
        "name": printable(name),
        "picture": thumbnail(file),
        "true": outcomes.classes[outcomes.labels[index]],
        "predicted": predicted_name(outcomes, index) or "nothing",
        "p": outcomes.p[index],
        "p_true": outcomes.p_true[index],
        "loss": outcomes.loss[index],
    }


def thumbnail(file: ImageFile) -> str:
    """Return a small JPEG as the address of an `<img>`; "" where the image cannot be read."""
    stream = io.BytesIO()
    try:
        with file.open() as opened, Image.open(opened) as image:
            image.draft("RGB", (2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE))
            small = rgb(image, upright=True)  # as every viewer shows it
    except Exception:  # gone since it was evaluated, or what DALI alone reads
        return ""
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    small.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
