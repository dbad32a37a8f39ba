"""The plots of the GPU suite's page."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.common.plots import LOOKS
from fastimagenet.report.figures import Points, draw_line, new_figure, thousands, with_legend
from pipelines.files import Row
from pipelines.formats import time_unit

MARKER = {"marker": "o", "markersize": 4}


def figures(result: Row) -> dict[str, Figure]:
    """Plot the parts that have figures, by heading."""
    found: dict[str, Figure] = {}
    own = {name: part["figures"] for name, part in result["parts"].items() if part["figures"]}
    drawn: dict[str, tuple[Callable[[Row], Figure | None], Row]] = {}
    if "steps" in own:
        drawn["ResNet-50: images/s of the training step, at its best batch"] = (step_rates, own)
        drawn["ResNet-50: peak memory of the training step"] = (step_memory, own["steps"])
    if "decode" in own:
        drawn["DALI: images/s by threads and share of the hardware decoder"] = (
            decode_sweep,
            own["decode"],
        )
    if "stall" in own:
        drawn["Loader, model and both, phase by phase"] = (phases, own["stall"])
    if own.keys() & {"cifar10", "cifar10-speed"}:
        drawn["CIFAR-10: accuracy against training time"] = (accuracies, own)
    for heading, (draw, what) in drawn.items():
        figure = draw(what)
        if figure is not None:
            found[heading] = figure
    return found


def line_plot(lines: dict[str, Points], xlabel: str, ylabel: str) -> Figure | None:
    """Plot a line with markers for every name; None where there is nothing to draw."""
    lines = {name: sorted(points) for name, points in lines.items() if points}
    if not lines:
        return None
    figure, (axes,) = new_figure()
    for index, (name, points) in enumerate(lines.items()):
        draw_line(axes, points, label=name, **LOOKS[index % len(LOOKS)], **MARKER)
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    axes.yaxis.set_major_formatter(FuncFormatter(thousands))
    return with_legend(figure, ncols=3)


def by_name(rows: list[tuple[str, float, float]]) -> dict[str, Points]:
    """Return the highest value at each x, by name, from rows (name, x, value)."""
    best: dict[str, dict[float, float]] = {}
    for name, x, value in rows:
        points = best.setdefault(name, {})
        points[x] = max(value, points.get(x, value))
    return {name: list(points.items()) for name, points in best.items()}


def step_rates(own: Row) -> Figure | None:
    """Plot every variant at its best batch, and beside them what DALI decodes."""
    rows = [
        (rate["variant"], rate["image_size"], rate["images_per_sec"]["mean"])
        for rate in own["steps"]["rates"]
        if not rate["error"]
    ]
    decoded = [
        ("DALI alone", rate["image_size"], rate["images_per_sec"]["mean"])
        for rate in own.get("decode", {"rates": []})["rates"]
        if rate["images_per_sec"]
    ]
    return line_plot(by_name(rows + decoded), "image size (px)", "images/s")


def step_memory(steps: Row) -> Figure | None:
    """Plot the GiB of the eager step by batch, a line for each size."""
    lines: dict[str, Points] = {}
    for rate in steps["rates"]:
        if rate["variant"] == "eager" and not rate["error"]:
            point = (rate["batch_size"], rate["peak_memory_bytes"] / 2**30)
            lines.setdefault(f"{rate['image_size']} px", []).append(point)
    return line_plot(lines, "batch", "peak memory (GiB)")


def decode_sweep(decode: Row) -> Figure | None:
    """Plot the rates at the size that was swept, with the other settings as they are by default."""
    rates = [rate for rate in decode["rates"] if rate["images_per_sec"]]
    if not rates:
        return None
    sizes = [rate["image_size"] for rate in rates]
    swept = max(sizes, key=sizes.count)
    rows = [
        (
            f"share {rate['settings']['hw_decoder_load']:g}",
            rate["threads"],
            rate["images_per_sec"]["mean"],
        )
        for rate in rates
        if rate["image_size"] == swept
    ]
    return line_plot(by_name(rows), f"threads, at {swept} px", "images/s")


def phases(stall: Row) -> Figure | None:
    """Plot three bars for each phase, with the intervals."""
    figure, (axes,) = new_figure()
    found = stall["phases"]
    for index, part in enumerate(("loader", "model", "both")):
        rates = [phase[f"{part}_images_per_sec"] for phase in found]
        positions = [x + 0.27 * (index - 1) for x in range(len(found))]
        means = [rate["mean"] for rate in rates]
        reach = [rate["high"] - rate["mean"] for rate in rates]
        look = {"color": LOOKS[index]["color"], "ecolor": "#555555", "label": part}
        axes.bar(positions, means, 0.25, yerr=reach, capsize=2, **look)
    labels = [f"{phase['image_size']} px\nx {phase['batch_size']}" for phase in found]
    axes.set_xticks(range(len(found)), labels)
    axes.set(ylabel="images/s", ylim=(0, None))
    axes.yaxis.set_major_formatter(FuncFormatter(thousands))
    return with_legend(figure, ncols=3)


def accuracies(own: Row) -> Figure | None:
    """Plot plain top-1 against training time of the runs on CIFAR-10."""
    runs: Row = {name: own[name] for name in ("cifar10", "cifar10-speed") if name in own}
    longest = max((row["train_seconds"] for run in runs.values() for row in run["evaluated"]),
                  default=0.0)  # fmt: skip
    unit, length = time_unit(longest)
    lines: dict[str, Points] = {
        name: [(row["train_seconds"] / length, 100 * row["top1"]) for row in run["evaluated"]]
        for name, run in runs.items()
    }
    return line_plot(lines, f"training time ({unit})", "validation top-1 (%)")
