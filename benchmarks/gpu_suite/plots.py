"""The plots of the GPU suite's page."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.common.plots import look
from benchmarks.gpu_suite import parts
from fastimagenet.report.figures import draw_line, new_figure, thousands, with_legend
from pipelines.files import Row
from pipelines.formats import time_unit


def figures(result: Row) -> dict[str, Figure]:
    """Plot the parts that have figures, by heading."""
    own = {name: part["figures"] for name, part in result["parts"].items() if part["figures"]}
    drawn: dict[str, Figure | None] = {}
    drawn["ResNet-50: images/s of the training step, at its best batch"] = step_rates(own)
    drawn["ResNet-50: peak memory of the training step"] = step_memory(own)
    if "decode" in own:
        heading = "DALI: images/s by threads and share of the hardware decoder"
        drawn[heading] = decode_sweep(own["decode"])
    if "stall" in own:
        drawn["Loader, model and both, phase by phase"] = phases(own["stall"])
    drawn["CIFAR-10: accuracy against training time"] = accuracies(own)
    return {heading: figure for heading, figure in drawn.items() if figure is not None}


def line_plot(rows: list[tuple[str, float, float]], xlabel: str, ylabel: str) -> Figure | None:
    """Plot rows (name, x, value): a line with markers for every name through the highest value
    at each x. None where there is nothing to draw."""
    if not rows:
        return None
    lines: dict[str, dict[float, float]] = {}
    for name, x, value in rows:
        points = lines.setdefault(name, {})
        points[x] = max(value, points.get(x, value))
    figure, (axes,) = new_figure()
    for index, (name, points) in enumerate(lines.items()):
        line = sorted(points.items())
        draw_line(axes, line, label=name, **look(index), marker="o", markersize=4)
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    axes.yaxis.set_major_formatter(FuncFormatter(thousands))
    return with_legend(figure, ncols=3)


def step_rates(own: Row) -> Figure | None:
    """Plot every variant at its best batch, and beside them what DALI decodes."""
    rates = [(rate["variant"], rate) for rate in parts.step_rates(own) if not rate["error"]]
    if not rates:
        return None
    decoded = own.get("decode", {"rates": []})["rates"]
    rates += [("DALI alone", rate) for rate in decoded if rate["images_per_sec"]]
    rows = [(name, rate["image_size"], rate["images_per_sec"]["mean"]) for name, rate in rates]
    return line_plot(rows, "image size (px)", "images/s")


def step_memory(own: Row) -> Figure | None:
    """Plot the GiB of the eager step by batch, a line for each size."""
    rows = [
        (f"{rate['image_size']} px", rate["batch_size"], rate["peak_memory_bytes"] / 2**30)
        for rate in parts.step_rates(own)
        if rate["variant"] == "eager" and not rate["error"]
    ]
    return line_plot(rows, "batch", "peak memory (GiB)")


def decode_sweep(decode: Row) -> Figure | None:
    """Plot the rates at the size that was swept, with the other settings as they are by default."""
    rates = [rate for rate in decode["rates"] if rate["images_per_sec"]]
    sizes = [rate["image_size"] for rate in rates]
    swept = max(sizes, key=sizes.count, default=0)
    rows = [
        (
            f"share {rate['settings']['hw_decoder_load']:g}",
            rate["threads"],
            rate["images_per_sec"]["mean"],
        )
        for rate in rates
        if rate["image_size"] == swept
    ]
    return line_plot(rows, f"threads, at {swept} px", "images/s")


def phases(stall: Row) -> Figure:
    """Plot three bars for each phase, with the intervals."""
    figure, (axes,) = new_figure()
    found = stall["phases"]
    for index, part in enumerate(("loader", "model", "both")):
        rates = [phase[f"{part}_images_per_sec"] for phase in found]
        positions = [x + 0.27 * (index - 1) for x in range(len(found))]
        means = [rate["mean"] for rate in rates]
        reach = [rate["high"] - rate["mean"] for rate in rates]
        style = {"color": look(index)["color"], "ecolor": "#555555", "label": part}
        axes.bar(positions, means, 0.25, yerr=reach, capsize=2, **style)
    labels = [f"{phase['image_size']} px\nx {phase['batch_size']}" for phase in found]
    axes.set_xticks(range(len(found)), labels)
    axes.set(ylabel="images/s", ylim=(0, None))
    axes.yaxis.set_major_formatter(FuncFormatter(thousands))
    return with_legend(figure, ncols=3)


def accuracies(own: Row) -> Figure | None:
    """Plot plain top-1 against training time of the runs on CIFAR-10."""
    evaluated = [
        (name, row["train_seconds"], 100 * row["top1"])
        for name in ("cifar10", "cifar10-speed")
        for row in own.get(name, {"evaluated": []})["evaluated"]
    ]
    unit, length = time_unit(max((seconds for _, seconds, _ in evaluated), default=0.0))
    rows = [(name, seconds / length, top1) for name, seconds, top1 in evaluated]
    return line_plot(rows, f"training time ({unit})", "validation top-1 (%)")
