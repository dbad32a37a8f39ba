"""What became of every image: against scikit-learn and torchmetrics, and as a page."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastimagenet.details.collect import Collector
from fastimagenet.details.outcomes import Outcomes
from fastimagenet.details.page import render, write_details
from fastimagenet.distributed.world import World
from pipelines.datasets.images import whole_files
from tests.commands import evaluate

FACTS = {
    "checkpoint": "best.pt", "epoch": 3, "epochs": 3, "split": "val", "image_size": 32,
    "images": 60, "top5": 0.9, "loss": 1.25, "tta_top1": 0.5,
}  # fmt: skip


def outcomes_of(logits: Tensor, labels: Tensor, batch: int = 37) -> Outcomes:
    collector = Collector()
    for start in range(0, len(labels), batch):
        collector(logits[start : start + batch], labels[start : start + batch])
    names = tuple(f"class {number}" for number in range(logits.shape[1]))
    return collector.outcomes(World(), names)


def table(num: int, num_classes: int, scale: float, unused: int = 0) -> tuple[Tensor, Tensor]:
    """Logits that are often right, and labels of which the last `unused` classes have none."""
    generator = torch.Generator().manual_seed(num)
    labels = torch.randint(num_classes - unused, (num,), generator=generator)
    logits = torch.randn(num, num_classes, generator=generator)
    logits[torch.arange(num), labels] += 1
    return scale * logits, labels


@pytest.mark.parametrize(
    ("num_classes", "scale", "unused"), [(10, 3.0, 0), (7, 40.0, 2), (60, 0.1, 1), (2, 1.0, 1)]
)
def test_figures_are_those_of_scikit_learn_and_torchmetrics(
    num_classes: int, scale: float, unused: int
) -> None:
    """Also where logits are so large that probabilities are rounded to 1."""
    from sklearn import metrics
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, labels = table(300, num_classes, scale, unused)
    found = outcomes_of(logits, labels)
    true, predicted = labels.numpy(), logits.argmax(dim=1).numpy()
    every = list(range(num_classes))
    assert np.array_equal(found.matrix, metrics.confusion_matrix(true, predicted, labels=every))
    assert found.matrix.trace() == round(300 * found.top1) == (true == predicted).sum()
    figures = found.by_class
    for ours, theirs in zip(
        (figures.precision, figures.recall, figures.f1, figures.support),
        metrics.precision_recall_fscore_support(true, predicted, labels=every, zero_division=0),
        strict=True,
    ):
        assert ours == pytest.approx(theirs, abs=1e-12)
    recalls = metrics.recall_score(true, predicted, labels=sorted(set(true)), average="macro")
    assert found.balanced_accuracy == pytest.approx(recalls, abs=1e-12)
    ece = multiclass_calibration_error(logits.softmax(dim=1), labels, max(num_classes, 2))
    assert found.calibration.error == pytest.approx(float(ece), abs=1e-6)
    assert found.calibration.count.sum() == 300
    assert found.loss == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels, reduction="none").numpy(), rel=1e-6
    )
    shares = logits.softmax(dim=1).numpy()
    assert np.array_equal(found.p, shares[np.arange(300), predicted])
    assert np.array_equal(found.p_true, shares[np.arange(300), true])


def test_outputs_that_are_no_numbers_are_no_prediction() -> None:
    logits, labels = table(20, 4, 3.0)
    logits[[3, 8], [1, 2]] = float("nan")
    found = outcomes_of(logits, labels)
    assert found.predicted[[3, 8]].tolist() == [-1, -1]
    assert found.matrix.sum() == found.calibration.count.sum() == 18
    assert found.matrix.trace() == round(20 * found.top1)
    assert set(found.highest_losses(2).tolist()) == {3, 8}
    files = whole_files(f"/nowhere/{i}.jpg" for i in range(20))
    assert "taken for <b>nothing</b>" in render(found, files, FACTS)


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with details in its folder, whose name is not UTF-8."""
    folder = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(finished, folder)
    details = folder / os.fsdecode(b"look \xe9")
    out, _ = evaluate(folder, "--device", "cpu", "--json", "--details", details, "--tta", "flip")
    (folder / "result.json").write_text(out)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_files_are_those_of_the_same_evaluation(run: Path) -> None:
    from sklearn import metrics

    result = json.loads((run / "result.json").read_text())
    page = Path(result["details"])
    names = ("predictions", "classes", "confusion")
    images, classes, pairs = (rows_of(page.with_name(f"{name}.csv")) for name in names)
    assert len(images) == result["images"] == 200
    true, predicted = ([row[name] for row in images] for name in ("true", "predicted"))
    assert true == [Path(row["path"]).parent.name for row in images]
    assert all(Path(row["path"]).is_file() for row in images)
    right = sum(a == b for a, b in zip(true, predicted, strict=True))
    assert right == 200 * result["top1"]
    diagonal = sum(int(row["images"]) for row in pairs if row["true"] == row["predicted"])
    assert diagonal == right and sum(int(row["images"]) for row in pairs) == 200
    mean = sum(float(row["loss"]) for row in images) / 200
    assert mean == pytest.approx(result["loss"], rel=1e-6)
    every = [row["class"] for row in classes]
    expected = metrics.precision_recall_fscore_support(
        true, predicted, labels=every, zero_division=0
    )
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [float(row[name]) for row in classes] == pytest.approx(list(values), abs=1e-6)
    for row in images:
        assert np.log(float(row["p_true"])) == pytest.approx(-float(row["loss"]), abs=1e-4)
        assert float(row["p"]) >= float(row["p_true"])


def test_the_page_and_the_report_link_each_other(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    html = Path(result["details"]).read_text(encoding="utf-8")
    assert "<script" not in html and html.count("src=") == html.count('src="data:image/') == 24
    assert 'href="../report.html"' in html
    for share in (result["top1"], result["tta_top1"]):
        assert f"{100 * share:.2f}\u00a0%" in html
    assert html.count("<figure>") == html.count('src="data:image/jpeg;base64,') == 24
    assert html.count('<table class="matrix">') == 1
    report = (run / "report.html").read_text(encoding="utf-8")
    assert report.count('href="look%20%E9/page.html"') == 1


def test_a_thousand_classes_are_a_page_of_two_megabytes(photographs: Path, tmp_path: Path) -> None:
    logits, labels = table(20_000, 1000, 2.0)
    found = outcomes_of(logits, labels, 10_000)
    files = whole_files(map(str, sorted((photographs / "val").glob("*/*"))))
    path = write_details(tmp_path / "look", found, files * 40, FACTS)
    assert path.stat().st_size < 2_000_000
    html = path.read_text(encoding="utf-8")
    assert html.count("data:image/jpeg") == 24 and "matrix" not in html.partition("<body>")[2]
    true, predicted, counts = found.confusions
    most = counts[true != predicted].max()
    head = html.partition("Most confused pairs")[2]
    assert head.partition("</section>")[0].count("<tr>") == 31
    assert f"<td>{most}</td>" in head.partition("</section>")[0]
    assert "Worst classes" in html and "Best classes" in html and "report.html" not in html
