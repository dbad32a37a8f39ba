"""Sweeps drawn, tabled and put on a page: what is read off the files, for odd sweeps, too."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from test_report import HOSTILE, ROOT, check_page

from fastimagenet.lr_finder import plots as sweep_plots
from fastimagenet.lr_finder.analysis import best_sweep, labels
from fastimagenet.lr_finder.results import HEADER, sweep_table, table, write_page
from fastimagenet.lr_finder.sweep import Sweep, SweepRecord

NAMES = ["loss_against_lr", "stacked", "rates", "loss_against_iterations"]
FACTS = [("hardware", "8x Sample GPU"), ("torch", "2.15.0"), ("left out", None)]


def make_sweep(
    weight_decay: float = 1e-4, momentum: float = 0.9, count: int = 100, linear: bool = False
) -> Sweep:
    """The loss falls from 2.3 to about 1 and explodes above an LR of 2 / (1 + 100 wd)."""
    records = []
    for iteration in range(count):
        lr = 1e-5 * 10 ** (6 * iteration / 100)
        if linear:
            lr = 0.01 + 2.99 * iteration / 100
        x = lr * (1 + 100 * weight_decay)
        loss = 1 + 1.3 / (1 + (5 * x) ** 1.2) + max(0.0, x - 2) ** 2 + 0.002 * math.cos(iteration)
        records.append(
            SweepRecord(
                iteration=iteration, lr=lr, momentum=momentum, loss=loss,
                val_loss=loss + 0.1 * (-1) ** iteration, top1=1 / (1 + loss),
                top5=1 / (1 + loss**4),
            )
        )  # fmt: skip
    return Sweep(
        weight_decay=weight_decay, momentum=momentum, num_it=100, linear=linear,
        records=tuple(records), ended="finished" if count == 100 else "stopped",
    )  # fmt: skip


def changed(change: Callable[[SweepRecord], SweepRecord], sweep: Sweep | None = None) -> Sweep:
    sweep = sweep or make_sweep()
    return replace(sweep, records=tuple(map(change, sweep.records)))


def grid() -> list[Sweep]:
    return [make_sweep(wd, mom) for wd in (1e-1, 1e-2, 1e-3, 1e-4) for mom in (0.9, 0.95)]


def words_of(path: Path) -> str:
    """All text of an SVG file, which has to be well-formed XML."""
    return "\n".join(ElementTree.parse(path).getroot().itertext())


def page_of(folder: Path, sweeps: list[Sweep], lines: list[str] | None = None) -> str:
    path = write_page(
        folder,
        sweeps,
        sweep_plots.draw(sweeps),
        FACTS,
        ["--set max_lr=0.1"] if lines is None else lines,
    )
    assert path == folder / "lr_find.html"
    return check_page(path.read_text(encoding="utf-8")).text


def test_every_figure_is_an_svg_and_a_png_with_named_axes(tmp_path: Path) -> None:
    paths = sweep_plots.write_figures(tmp_path, sweep_plots.draw(grid()))
    assert [p.name for p in paths] == [f"{n}.{kind}" for n in NAMES for kind in ("svg", "png")]
    assert sorted(tmp_path.iterdir()) == sorted(paths)  # no half-written file beside them
    for png in paths[1::2]:
        with Image.open(png) as image:
            assert image.width >= 1200
            assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    texts = {path.stem: words_of(path) for path in paths[::2]}
    for svg in paths[::2]:
        assert {"width", "height", "viewBox"} <= set(ElementTree.parse(svg).getroot().attrib)
    for name in ("loss_against_lr", "stacked", "rates"):
        assert "learning rate (log axis)" in texts[name]
    for name in ("loss_against_lr", "stacked", "loss_against_iterations"):
        assert "training loss (nats)" in texts[name]
        assert "weight decay, momentum" in texts[name]
        assert all(label in texts[name] for label in ("0.1, 0.9", "0.1, 0.95", "0.0001, 0.95"))
    for axis in ("validation loss (nats)", "top-1 accuracy (%)", "top-5 accuracy (%)"):
        assert axis in texts["stacked"]
    assert "momentum" in texts["rates"] and "iteration" in texts["loss_against_iterations"]


def test_the_suggestions_of_the_best_sweep_lie_on_its_curve() -> None:
    sweeps = [make_sweep(1e-4), make_sweep(1e-3), make_sweep(1)]
    best = best_sweep(sweeps)
    assert best is not None
    found = best.suggestions
    assert found is not None
    axes = sweep_plots.loss_against_lr(sweeps).axes[0]
    marks = {str(line.get_label()): line for line in axes.lines if line.get_linestyle() == "None"}
    wanted = {"valley": found.valley, "steepest": found.steepest, "minimum / 10": found.minimum_10}
    assert list(marks) == [f"{name}: {lr:.3g}" for name, lr in wanted.items()]
    assert len({line.get_marker() for line in marks.values()}) == 3  # told apart without colour
    curve = [(r.lr, r.loss) for r in best.records]
    for line, lr in zip(marks.values(), wanted.values(), strict=True):
        ((x, y),) = zip(line.get_xdata(), line.get_ydata(), strict=True)  # type: ignore[arg-type]
        assert x == lr
        nearest = [loss for _, loss in sorted(curve, key=lambda point: abs(math.log(point[0] / x)))]
        assert min(nearest[:2]) - 1e-9 <= y <= max(nearest[:2]) + 1e-9


def test_there_is_no_panel_of_a_top5_that_no_record_has() -> None:
    without = [changed(lambda record: replace(record, top5=math.nan), sweep) for sweep in grid()]
    names = [
        [axes.get_ylabel()[:5] for axes in sweep_plots.stacked(s).axes] for s in (without, grid())
    ]
    assert names == [["train", "valid", "top-1"], ["train", "valid", "top-1", "top-5"]]


def test_a_single_record_is_a_dot() -> None:
    sweep = make_sweep(count=1)
    for figure in sweep_plots.draw([sweep]).values():
        for axes in figure.axes:
            assert "o" in {line.get_marker() for line in axes.lines}


def test_plateaus_are_thick_stretches() -> None:
    sweep = make_sweep()
    found = sweep.plateau
    assert found is not None
    axes = sweep_plots.loss_against_lr([sweep]).axes[0]
    (band,) = [line for line in axes.lines if line.get_linewidth() > 5]
    xs = list(band.get_xdata())  # type: ignore[arg-type]
    assert (xs[0], xs[-1]) == (found.low_lr, found.high_lr)


def test_a_single_sweep_needs_no_names_and_a_linear_one_no_log_axis() -> None:
    figures = sweep_plots.draw([make_sweep(linear=True)])
    figure = figures["loss_against_lr"]
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_xscale()) == ("learning rate", "linear")
    (legend,) = figure.legends
    assert legend.get_title().get_text() == "learning rates suggested with weight decay 0.0001"
    assert not any(figures[name].legends for name in NAMES[1:])


def test_eight_sweeps_are_told_apart_without_colour() -> None:
    lines = sweep_plots.loss_against_iterations(grid()).axes[0].lines
    looks = {(line.get_linestyle(), line.get_marker()) for line in lines}
    assert len(lines) == len(looks) == 8


def test_one_exploding_curve_does_not_flatten_the_others() -> None:
    exploding = changed(lambda r: replace(r, loss=r.loss if r.lr < 0.01 else 1e6 * r.lr))
    axes = sweep_plots.loss_against_lr([make_sweep(), make_sweep(1e-3), exploding]).axes[0]
    low, high = axes.get_ylim()
    assert 0.5 < low < 1.1 and 2.3 < high < 3
    low, high = sweep_plots.loss_against_lr([make_sweep(), make_sweep(1e-3)]).axes[0].get_ylim()
    assert low < 1.02 and high < 10


def test_validation_is_averaged_from_the_first_record_on_and_cut_as_the_loss_is() -> None:
    sweep = make_sweep()
    average, wanted = 0.0, []
    for count, record in enumerate(sweep.records, 1):
        average = 0.98 * average + 0.02 * 100 * record.top1
        wanted.append(average / (1 - 0.98**count))
    raw, curve = sweep_plots.stacked([sweep]).axes[2].lines
    assert list(curve.get_ydata()) == pytest.approx(wanted[10:-5])  # type: ignore[arg-type]
    shown = [100 * record.top1 for record in sweep.records[10:-5]]
    assert list(raw.get_ydata()) == pytest.approx(shown)  # type: ignore[arg-type]
    assert raw.get_linewidth() < curve.get_linewidth()


def test_rates_are_drawn_once_where_sweeps_share_them() -> None:
    sweeps = [make_sweep(count=60), make_sweep(1e-3), make_sweep(1e-3, 0.95)]
    lr, momentum = sweep_plots.rates(sweeps).axes
    (line,) = lr.lines
    assert len(line.get_xdata()) == 100  # type: ignore[arg-type]
    assert sorted(line.get_ydata()[0] for line in momentum.lines) == [0.9, 0.95]  # type: ignore


def nan_loss(record: SweepRecord) -> SweepRecord:
    return replace(record, loss=math.nan, val_loss=math.nan, top1=math.nan, top5=math.nan)


EMPTY = replace(make_sweep(count=0), ended="not finite")
ODD: dict[str, tuple[list[Sweep], str, bool]] = {
    "no sweep": ([], "No sweep was made.", False),
    "no record": ([EMPTY], "0 of 100 not finite", False),
    "NaN": ([changed(nan_loss)], "No learning rate can be suggested", False),
    "one record": ([make_sweep(count=1)], "was stopped after 1 of 100 iterations.", True),
    "few records": ([make_sweep(count=4)], "No learning rate can be suggested", True),
    "stopped": ([make_sweep(), make_sweep(1e-3, count=50)], "after 50 of 100 iterations.", True),
    "beside an empty one": ([EMPTY, make_sweep()], "100 of 100 finished", True),
    "only rises": (
        [changed(lambda r: replace(r, loss=float(r.iteration)))], "No learning rate", True,
    ),
    "level": ([changed(lambda r: replace(r, loss=1.0))], "No learning rate", True),
    "NaN in validation": ([changed(lambda r: replace(r, val_loss=math.nan, top1=math.nan))],
                          "Learning rate", True),
    "infinite or huge": (
        [changed(lambda r: replace(r, val_loss=1e308 * r.iteration, loss=r.loss))],
        "Learning rate", True,
    ),
    "NaN in between": (
        [changed(lambda r: nan_loss(r) if r.iteration % 7 == 3 else r)], "Learning rate", True,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ODD)
def test_odd_sweeps(tmp_path: Path, name: str) -> None:
    sweeps, said, drawn = ODD[name]
    text = page_of(tmp_path, sweeps)
    assert said in text
    html = (tmp_path / "lr_find.html").read_text(encoding="utf-8")
    assert html.count("<svg") == (4 if drawn else 0)
    assert ("Nothing to draw" in text) == (not drawn)
    assert ("--set max_lr=0.1" in text) == (best_sweep(sweeps) is not None)


def test_no_figures_without_records(tmp_path: Path) -> None:
    assert sweep_plots.draw([EMPTY]) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not rendered: for tests of the words beside them."""
    blank = '<svg viewBox="0 0 1 1"></svg>'
    monkeypatch.setattr("fastimagenet.lr_finder.results.svg", lambda figure, name: blank)


def test_the_page_says_the_result_and_what_it_was_measured_with(
    tmp_path: Path, undrawn: None
) -> None:
    sweeps = [make_sweep(1e-4), make_sweep(1e-3), make_sweep(1)]
    best = best_sweep(sweeps)
    assert best is not None
    found = best.suggestions
    assert found is not None
    text = page_of(tmp_path, sweeps, ["--set max_lr=0.1 --set weight_decay=0.001"])
    assert f"Learning rate {found.steepest:.3g} with weight decay {best.weight_decay:g} " in text
    assert "--set max_lr=0.1 --set weight_decay=0.001" in text
    assert "hardware 8x Sample GPU torch 2.15.0" in text and "left out" not in text
    for row in table(sweeps):
        assert " ".join(row) in text
    html = (tmp_path / "lr_find.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 4 and html.count('<tr class="best">') == 1


def test_everything_is_escaped(tmp_path: Path) -> None:
    path = write_page(tmp_path, [make_sweep()], {}, [(HOSTILE, HOSTILE)], [HOSTILE])
    html = path.read_text(encoding="utf-8")
    assert "<script" not in html and check_page(html).text.count(HOSTILE) == 3


def test_the_table_as_text(tmp_path: Path) -> None:
    sweeps = [make_sweep(1e-4), replace(make_sweep(1e-5, count=3), ended="diverged")]
    low, found = sweeps[0].plateau, sweeps[0].suggestions
    assert low is not None and found is not None
    above, below, first, second = sweep_table(sweeps).split("\n")
    assert len(above) == len(below) == len(first) == len(second) <= 105
    assert above.split()[:2] == ["weight", "minimum"]
    assert below.split()[:3] == ["decay", "momentum", "steepest"]
    assert first.split() == [
        "0.0001", "0.9", f"{found.steepest:.3g}", f"{found.valley:.3g}", f"{found.minimum_10:.3g}",
        f"{low.low_lr:.3g}", "to", f"{low.high_lr:.3g}",
        f"{low.best_loss:.4g}", f"{low.best_lr:.3g}", "100", "of", "100", "finished",
    ]  # fmt: skip
    assert second.split() == ["1e-5", "0.9", *("-" * 6), "3", "of", "100", "diverged"]
    assert all(len(row) == len(HEADER) for row in table(sweeps))


def test_sweeps_are_named_by_what_differs() -> None:
    a, b, c = make_sweep(1e-4, 0.9), make_sweep(1e-2, 0.9), make_sweep(1e-4, 0.95)
    assert labels([a, b]) == ("weight decay", ["0.0001", "0.01"])
    assert labels([a, c]) == ("momentum", ["0.9", "0.95"])
    assert labels([a, b, c])[1] == ["0.0001, 0.9", "0.01, 0.9", "0.0001, 0.95"]
    assert labels([a, a]) == ("sweep", ["1", "2"])


def test_analysis_imports_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, fastimagenet.lr_finder.analysis\n"
        "print(sorted({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "[]\n"
