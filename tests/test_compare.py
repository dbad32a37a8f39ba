"""Finished runs beside published entries: the page, the picture and the figures that ship."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from test_dawnbench import epoch_rows
from test_report import check_page, make_run, step_rows

from benchmarks.common.published import published
from benchmarks.compare import comparison, main, row, short_names
from fastimagenet.recipes import named_recipe
from fastimagenet.recipes.plan import Plan
from fastimagenet.report.run import Run, planned
from pipelines.errors import UserError


def finished_run(folder: Path, **changes: object) -> Path:
    """Four epochs, up to 94.5 % top-1, of the written run of the other tests."""
    plan = Plan.of(named_recipe("cifar10"), 8, 50_000).to_dict()
    return make_run(folder, plan={"recipe": plan["recipe"]}, **changes)


def test_the_page_holds_runs_and_published_entries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = finished_run(tmp_path / "one")
    two = finished_run(tmp_path / "<two>", rows=step_rows() + epoch_rows()[:3], steps=30)
    assert main([str(one), str(two), "--output", str(tmp_path / "out")]) == 0
    assert "4.5 min" in capsys.readouterr().out  # to the target of 94 %
    page = check_page((tmp_path / "out" / "compare.html").read_text())
    for words in ("2 runs compared", "<two>", "beside 8 published entries", "airbench94_muon",
                  "9.43 s", "$0.258", "at least 94.0 %", "8x Sample GPU", "DAWNBench"):  # fmt: skip
        assert words in page.text, words
    assert "ffcv-imagenet" not in page.text
    with Image.open(tmp_path / "out" / "comparison.png") as picture:
        assert picture.width >= 1200


def test_what_does_not_compare_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = finished_run(tmp_path / "one")
    two = finished_run(tmp_path / "two", dataset="digits", target={"metric": "top1", "value": 0.9})
    assert main([str(one), str(two), "--output", str(tmp_path)]) == 0
    said = "their accuracies do not compare, of CIFAR10, 50,000 images; digits, 50,000 images"
    out = capsys.readouterr().out
    assert f"note: {said}\nnote: their times to target do not compare, of 94 % top-1; 90 %" in out
    page = check_page((tmp_path / "compare.html").read_text())
    assert said[1:] in page.text
    assert main([str(one), str(one), "--output", str(tmp_path)]) == 0
    assert "compare," not in capsys.readouterr().out


def test_the_lr_is_the_one_trained_with(finished: Path, tmp_path: Path) -> None:
    """Every update's, not that of every tenth; where the plan was another, the logged ones."""
    run = Run.open(finished)
    made = planned(run.plan)
    assert [rate["step"] for rate in run.rates] == list(range(1, 41))
    assert [rate["lr"] for rate in run.rates] == [made.lr(step) for step in range(40)]
    assert max(rate["lr"] for rate in run.rates) > max(row["lr"] for row in run.steps)
    shutil.copytree(finished, tmp_path / "run")
    plan = run.plan | {"recipe": run.plan["recipe"] | {"lr_reference_batch": 25}}
    (tmp_path / "run" / "plan.json").write_text(json.dumps(plan))
    other = Run.open(tmp_path / "run")
    assert other.rates == other.steps  # which were logged with another plan
    scaled = replace(other, steps=[])
    assert row("run", scaled)["peak LR"] == f"{max(rate['lr'] for rate in scaled.rates):.4g}"
    assert max(rate["lr"] for rate in scaled.rates) > 1.5 * max(rate["lr"] for rate in run.rates)


def test_other_data_have_no_entries_beside_them(tmp_path: Path) -> None:
    one = finished_run(tmp_path / "one", dataset="digits")
    assert main([str(one), "--output", str(tmp_path)]) == 0
    page = check_page((tmp_path / "compare.html").read_text())
    assert "there is no published entry for these data" in page.text
    assert "airbench94" not in page.text


def test_imagenet_runs_to_top5_are_compared_in_top5(tmp_path: Path) -> None:
    target = {"metric": "top5", "value": 0.93}
    run = finished_run(tmp_path / "one", dataset="ImageNet", target=target)
    what = comparison({"one": Run.open(run)})
    assert what.metric == "top5"
    assert "fast.ai 2018" in {entry.name for entry in what.entries}
    assert what.points(what.runs["one"], "epoch") == [
        (1, pytest.approx(90)), (3, pytest.approx(99.8)), (4, pytest.approx(99.85))
    ]  # fmt: skip
    assert what.points(what.runs["one"], "train_seconds")[0][0] == 90


def test_a_run_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "one")
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match="one is not finished"):
        main([str(run), "--output", str(tmp_path)])


def test_the_contests_entries_are_those_of_its_lists() -> None:
    imagenet = {(e.hardware, e.seconds, e.usd) for e in published({"ImageNet"}, "top5")}
    minutes = {("8 x V100", 177.45, 72.40), ("32 x V100", 29.71, 48.48),
               ("64 x V100", 18.88, 61.63), ("128 x V100", 18.09, 118.07),
               ("8 x V100", 21.63, 7.43)}  # fmt: skip
    assert {(name, round(60 * time, 6), usd) for name, time, usd in minutes} <= imagenet
    assert ("128 x V100", 157.6, 14.43) in imagenet
    cifar = {(e.hardware, e.seconds, e.usd) for e in published({"CIFAR10"}, "top1")}
    assert {("8 x V100", 174.0, 1.18), ("1 x V100", 404.1, 0.258), ("8 x V100", 9.43, None),
            ("1 x V100", 71.8, 0.021)} <= cifar  # fmt: skip
    every = published({"ImageNet", "CIFAR10"}, "top1") + published({"ImageNet"}, "top5")
    assert all(entry.source and entry.hardware and entry.seconds > 0 for entry in every)


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert short_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert short_names(["x/a", "y/a", "y/b"]) == ["x/a", "y/a", "y/b"]
