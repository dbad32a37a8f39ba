"""The report page: self-contained, well-formed, escaped, and true to the files of the run."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_dawnbench import SUMMARY, epoch_rows, write_run

from fastimagenet import cli
from fastimagenet.report import figures, plots
from fastimagenet.report.__main__ import main
from fastimagenet.report.page import recipe_listing, write_report
from fastimagenet.report.run import Run
from pipelines.errors import UserError
from pipelines.formats import duration

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]

RECIPE: Row = {
    "name": "sample", "phases": [{"epochs": 2, "image_size": 16}, {"epochs": 2, "image_size": 32}],
    "model": "resnet18", "max_lr": 0.8, "mean": [0.4914, 0.48216, 0.44653], "lr_spans": [],
    "target": {"metric": "top1", "value": 0.94}, "unset": None,
}  # fmt: skip
VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Tags in order with their attributes, all text, and tags left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        """With plain spaces and hyphens."""
        plain = " ".join(self.texts).replace("\u00a0", " ").replace("\u2011", "-")
        return re.sub(r"\s+", " ", plain)


def phase(first: int, epochs: int, size: int, steps: int) -> Row:
    return {
        "first_epoch": first, "epochs": epochs, "image_size": size, "eval_size": 32,
        "batch_size": 64, "global_batch": 512, "steps_per_epoch": steps,
        "first_step": first * steps, "lr_first": 0.08, "lr_last": 0.0123,
    }  # fmt: skip


def step_rows(epochs: int = 4, steps: int = 10) -> list[Row]:
    return [
        {"kind": "step", "step": step, "epoch": step // steps, "time_seconds": float(step),
         "lr": 0.1 + 0.001 * step, "momentum": 0.9, "loss": 2 / (step + 1), "images_per_sec": 1e4}
        for step in range(epochs * steps)
    ]  # fmt: skip


def make_run(
    folder: Path, rows: list[Row] | None = None, plan: Row | None = None, **changes: Any
) -> Path:
    rows = step_rows() + epoch_rows() if rows is None else rows
    write_run(folder, rows, **changes)
    whole = {
        "recipe": RECIPE, "world_size": 8, "num_train": 50000, "num_val": 10000,
        "num_classes": 10, "epochs": 4, "total_steps": 40,
        "phases": [phase(0, 2, 16, 10), phase(2, 2, 32, 10)], "notes": ["a note"],
    } | (plan or {})  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(whole))
    return folder


def rendered(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


def check_page(html: str) -> Page:
    """What must hold for every page: nothing external, closed tags, well-formed plots."""
    page = Page(html)
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in {"script", "img", "iframe", "object", "embed"}
        for name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster"):
            value = attributes.get(name) or "#"
            assert value.startswith("#") or value == "data:,"
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(|href=")#([^)"]+)', html)
    assert set(used) <= set(ids)
    svgs = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(svgs) == html.count("<svg")
    for svg in svgs:
        assert "viewBox" in ElementTree.fromstring(svg).attrib
    return page


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run that has all there can be."""
    return rendered(make_run(tmp_path_factory.mktemp("run")))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are made but not rendered: for tests of the words beside them."""
    monkeypatch.setattr(plots, "svg", lambda figure, name: '<svg viewBox="0 0 1 1"></svg>')


def test_a_whole_run(whole: str) -> None:
    html = whole
    page = check_page(html)
    assert html.count("<svg") == 8
    text = page.text
    assert "resnet18 on CIFAR-10 reached 94.50 % top-1 and 99.85 % top-5 in 6.0 min" in text
    assert "of training on 8x Sample GPU." in text
    assert "The target of 94 % top-1 was reached in 4.5 min." in text
    assert "With test-time augmentation: 95.12 % top-1." in text
    assert "12,346" in text and "2.2 % waiting for data" in text  # 8 / 360
    assert "stopped" not in text
    for value in SUMMARY["time_split_seconds"].values():
        assert f" {value:.2f} {100 * value / 400:.1f} % " in text
    assert "wall time 400.00 100.0 %" in text
    parts = ("start-up", "compile warm-up", "waiting for data", "compute", "communication",
             "evaluation", "checkpoint", "other")  # fmt: skip
    for part, value in zip(parts, (5, 20, 8, 320, 27, 12, 3, 5), strict=True):
        assert f" {part} {value:.2f} {value / 4:.1f} % " in text
    assert "a note" in text and "train --seed 7" in text and "torch 2.15.0" in text


def test_tables_hold_the_numbers_of_the_files(whole: str) -> None:
    text = check_page(whole).text
    assert " 1 to 2 16 32 64 512 10 0 0.08 0.0123 " in text
    assert " 3 to 4 32 32 64 512 10 20 0.08 0.0123 " in text
    assert " 1 16 512 2.0000 1.9000 50.00 % 90.00 % - - 90.00 2.00 3.00 " in text
    assert " 2 16 512 1.0000 - - - - - 180.00 4.00 6.00 " in text
    assert " 4 32 512 0.5000 0.4750 94.50 % 99.85 % 95.12 % 99.90 % 360.00 8.00 12.00 " in text


NS = "{http://www.w3.org/2000/svg}"


def ticks(part: ElementTree.Element, axis: str) -> list[tuple[float, float]]:
    """Value and position of the labelled ticks of the "x" or "y" axis."""
    found = []
    for group in part.iter(f"{NS}g"):
        if re.search(rf"-{axis}tick_\d+$", group.get("id", "")):
            mark = next(group.iter(f"{NS}use"))
            for label in group.iter(f"{NS}text"):
                found.append((float(str(label.text).replace(",", "")), float(mark.attrib[axis])))
    return found


def drawn(part: ElementTree.Element, xs: list[tuple[float, float]]) -> list[list[Any]]:
    """The points of each curve that has markers, read back with the plot's own ticks."""

    def scale(marks: list[tuple[float, float]], position: str) -> float:
        (v0, p0), (v1, p1) = marks[0], marks[-1]
        return v0 + (float(position) - p0) * (v1 - v0) / (p1 - p0)

    ys = ticks(part, "y")
    return [
        [(scale(xs, u.attrib["x"]), scale(ys, u.attrib["y"])) for u in group.iter(f"{NS}use")]
        for group in part.iter(f"{NS}g")
        if re.search(r"-line2d_\d+$", group.get("id", ""))
    ]


def holds(curves: list[list[Any]], wanted: list[tuple[float, float]]) -> bool:
    return any(
        len(curve) == len(wanted)
        and all(math.dist(a, b) < 0.01 for a, b in zip(curve, wanted, strict=True))
        for curve in curves
    )


def test_accuracy_is_drawn_where_it_belongs() -> None:
    """The plot's own ticks give its scale; points of the top-1 curve are read back with it."""
    svg = ElementTree.fromstring(plots.accuracy(epoch_rows(), [], ("top1", 0.94)))
    wanted = [(1.5, 50.0), (4.5, 94.12), (6.0, 94.5)]  # minutes, percent
    assert holds(drawn(svg, ticks(svg, "x")), wanted)


def test_outcomes_are_drawn_at_the_steps_where_they_were_computed() -> None:
    phases = [phase(0, 2, 16, 10), phase(2, 2, 32, 10)]
    svg = ElementTree.fromstring(plots.outcomes(step_rows(), epoch_rows(), phases))
    panels = [g for g in svg.iter(f"{NS}g") if "-axes_" in g.get("id", "")]
    xs = ticks(panels[3], "x")
    assert len(panels) == 4
    assert holds(drawn(panels[1], xs), [(10, 1.9), (30, 1.9 / 3), (40, 1.9 / 4)])
    assert holds(drawn(panels[2], xs), [(10, 50.0), (30, 94.12), (40, 94.5)])
    assert holds(drawn(panels[3], xs), [(10, 90.0), (30, 99.8), (40, 99.85)])
    words = "".join(svg.itertext())
    for name in ("training loss (nats)", "validation loss (nats)", "top-1 accuracy (%)", "step"):
        assert name in words
    assert "16 px" in words and "32 px" in words
    for panel in panels:
        styles = [path.get("style", "") for path in panel.iter(f"{NS}path")]
        assert sum("dasharray" in s and "#777777" in s for s in styles) == 1  # the second phase
    assert plots.outcomes([], [], phases) == ""


def test_target_not_reached_and_tta_never_in_place_of_plain(tmp_path: Path, undrawn: None) -> None:
    run = make_run(tmp_path, target={"metric": "top1", "value": 0.95})
    text = check_page(rendered(run)).text
    assert "The target of 95 % top-1 was not reached." in text


def test_no_target_and_a_price(tmp_path: Path, undrawn: None) -> None:
    run = make_run(
        tmp_path, plan={"recipe": RECIPE | {"target": ""}}, target=None, cost_usd=1.234,
        cost_per_hour=24.5,
    )  # fmt: skip
    text = check_page(rendered(run)).text
    assert "The target" not in text and "94 % top-1" not in text
    assert "cost $1.23 at $24.5 an hour" in text


HOSTILE = '<script>alert("x")</script>$a_b$&amp;'


def test_everything_is_escaped(tmp_path: Path) -> None:
    rows = [*epoch_rows(), {"kind": "event", "message": HOSTILE}]
    keys = ("data", "dataset", "model", "hardware", "author", "command", "framework", "backend")
    run = make_run(
        tmp_path / "<script>",
        rows,
        plan={"recipe": RECIPE | {"name": HOSTILE}, "notes": [HOSTILE]},
        target={"metric": HOSTILE, "value": 0.9},
        versions={HOSTILE: HOSTILE},
        time_split_seconds={HOSTILE: 400.0},
        **dict.fromkeys(keys, HOSTILE),
    )
    html = rendered(run)
    page = check_page(html)
    assert "<script" not in html
    assert page.text.count(HOSTILE) >= len(keys) + 4


def no_evaluation() -> list[Row]:
    empty = dict.fromkeys(("val_loss", "top1", "top5", "tta_top1", "tta_top5"))
    return step_rows(2) + [row | empty for row in epoch_rows()[:2]]


def diverged() -> list[Row]:
    rows = step_rows() + epoch_rows()
    rows[-1] |= {"train_loss": math.nan, "val_loss": math.inf}
    rows[39]["loss"] = math.nan
    rows[38]["loss"] = 1e9
    return rows


def nulls() -> list[Row]:
    keep = {"kind", "step", "epoch", "image_size", "batch_size"}
    keep |= {"train_seconds", "eval_seconds", "data_wait_seconds"}
    rows = step_rows() + epoch_rows()
    return [{k: v if k in keep else None for k, v in row.items()} for row in rows]


@pytest.mark.parametrize(
    "rows, said",
    [
        ([], "no epoch has been finished yet"),
        (step_rows(1), "0 of 4 epochs done"),
        (no_evaluation(), "not evaluated yet after 6.0 min"),
        (diverged(), "The training loss is not a finite number from epoch 4 on."),
        (nulls(), "not a finite number from epoch 1 on"),
        (epoch_rows()[:1], "1 of 4 epochs"),
    ],
    ids=["nothing", "steps only", "no evaluation", "NaN", "nulls", "one epoch"],
)
def test_odd_runs(tmp_path: Path, rows: list[Row], said: str) -> None:
    results = dict.fromkeys(("top1", "top5", "tta_top1", "tta_top5"))
    changes: Row = results | {"train_seconds": None} if not rows or rows == step_rows(1) else {}
    if rows == no_evaluation():
        changes = results
    page = check_page(rendered(make_run(tmp_path, rows, **changes)))
    assert said in page.text


def test_a_run_that_was_killed_has_no_summary(tmp_path: Path, undrawn: None) -> None:
    run = make_run(tmp_path, step_rows(3) + epoch_rows()[:3])
    (run / "summary.json").unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "st')
    text = check_page(rendered(run)).text
    assert "3 of 4 epochs done" in text
    assert "reached 94.12 % top-1 and 99.80 % top-5 in 4.5 min" in text
    assert "The target of 94 % top-1 was reached in 4.5 min." in text


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    first = epoch_rows()[0]
    epochs = [
        first | {"epoch": e, "step": 130 * (e + 1), "train_seconds": 9.0 * (e + 1)}
        for e in range(100)
    ]
    plan = {"epochs": 100, "total_steps": 13000, "phases": [phase(0, 100, 16, 130)]}
    run = make_run(tmp_path, step_rows(100, 130) + epochs, plan)
    html = rendered(run)
    check_page(html)
    assert len(html) < 500_000


def test_thinned_points_are_medians_of_neighbours() -> None:
    points = [(float(x), 0.0 if x % 26 == 0 else 7.0) for x in range(13000)]
    thin = figures.thin(points)
    assert len(thin) == 500
    assert {y for _, y in thin} == {7.0}
    assert thin[0][0] == 12.5
    assert figures.thin(points[:400]) == points[:400]
    assert figures.thin([]) == []


def test_recipe_listing_is_toml_that_holds_the_recipe() -> None:
    listing = recipe_listing(RECIPE)
    assert "mean = [0.4914, 0.48216, 0.44653]" in listing
    assert tomllib.loads(listing) == {key: v for key, v in RECIPE.items() if v is not None}


def test_durations_have_sensible_units() -> None:
    shown = [duration(value) for value in (0.0, 2.591, 43.2, 179.0, 180.0, 1297.8, 10800.0)]
    plain = [text.replace("\u00a0", " ") for text in shown]
    assert plain == ["0 s", "2.59 s", "43.2 s", "179.0 s", "3.0 min", "21.6 min", "3.0 h"]


def test_a_folder_without_a_run_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)  # not that of the tests to come

    def refused(folder: Path) -> str:
        assert cli.exit_status(main, [str(folder)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
        assert not (folder / "report.html").exists()
        return err

    for wrong in (tmp_path, tmp_path / "missing"):
        assert "plan.json" in refused(wrong)
    for text in ("{", '{"predicted": []}'):  # torn; as benchmarks.plan writes it
        (tmp_path / "plan.json").write_text(text)
        refused(tmp_path)


def test_the_command_renders_the_same_page_without_torch_or_pyplot(
    tmp_path: Path, whole: str
) -> None:
    run = make_run(tmp_path / "run")
    code = (
        "import sys; from fastimagenet.report.__main__ import main\n"
        "status = main(sys.argv[1:])\n"
        "print(status, sorted({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == f"{run / 'report.html'}\n0 []\n"
    assert (run / "report.html").read_text(encoding="utf-8") == whole


def test_a_run_is_opened(tmp_path: Path) -> None:
    run = Run.open(str(make_run(tmp_path)))
    assert run.folder == tmp_path
    assert [len(rows) for rows in (run.steps, run.epochs, run.events)] == [40, 4, 0]
    assert (run.target, run.seconds_to_target, run.epochs_done) == (("top1", 0.94), 270.0, 4)
    assert (run.plan["recipe"], run.summary["seed"]) == (RECIPE, 7)
    with pytest.raises(UserError, match="no such file"):
        Run.open(tmp_path / "missing")
