"""Where the time of a run went: bars, each as the text of one inline `<svg>`.

The functions return "" where there is nothing to draw.
"""

from __future__ import annotations

from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastimagenet.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    SMALL,
    VERMILLION,
    WIDTH,
    YELLOW,
    new_figure,
    svg,
    thousands,
    with_legend,
)
from fastimagenet.files import Row

TIME_COLOURS = {
    "start_up": SKY,
    "compile": PURPLE,
    "data_wait": VERMILLION,
    "compute": BLUE,
    "communication": ORANGE,
    "evaluation": GREEN,
    "checkpoint": YELLOW,
    "other": GREY,
}


def epoch_seconds(epochs: list[Row]) -> str:
    """Seconds of each epoch: training, waiting for data taken out of it, and evaluation."""
    if not epochs:
        return ""
    figure, (axes,) = new_figure()
    before: Row = {"train_seconds": 0.0, "eval_seconds": 0.0, "data_wait_seconds": 0.0}
    parts: dict[str, list[float]] = {"computing": [], "waiting for data": [], "evaluation": []}
    for row in epochs:
        wait = row["data_wait_seconds"] - before["data_wait_seconds"]
        train = row["train_seconds"] - before["train_seconds"]
        parts["computing"].append(max(0.0, train - wait))
        parts["waiting for data"].append(wait)
        parts["evaluation"].append(max(0.0, row["eval_seconds"] - before["eval_seconds"]))
        before = row
    numbers = [row["epoch"] + 1 for row in epochs]
    bottom = [0.0] * len(epochs)
    for (name, values), key in zip(
        parts.items(), ("compute", "data_wait", "evaluation"), strict=True
    ):
        axes.bar(numbers, values, 0.8, bottom, label=name, color=TIME_COLOURS[key])
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(numbers) <= 4:
        axes.set_xticks(numbers)
    axes.set(xlabel="epoch", ylabel="seconds", xlim=(0.4, max(numbers[-1], 4) + 0.6))
    axes.yaxis.set_major_formatter(FuncFormatter(thousands))
    axes.grid(visible=False, axis="x")
    return svg(with_legend(figure), "epoch_seconds")


def time_split(seconds: Row) -> str:
    """One bar over the whole wall time; parts above 10 % carry their share, and their name
    where it fits."""
    parts = {key: float(value) for key, value in seconds.items() if value and value > 0}
    total = sum(parts.values())
    if not total:
        return ""
    figure, (axes,) = new_figure(size=(WIDTH, 0.8))
    left = 0.0
    for key, value in parts.items():
        share = 100 * value / total
        colour = TIME_COLOURS.get(key, GREY)
        axes.barh(0, share, left=left, color=colour, edgecolor="white", linewidth=1)
        words = key.split("_")
        # A letter takes up to 2 % of the bar's width.
        lines = [*(words if share > 2 * max(map(len, words)) else []), f"{share:.0f} %"]
        if share > 10:
            ink = "white" if colour == BLUE else "black"
            place: Row = {"ha": "center", "va": "center", "color": ink, "fontsize": SMALL}
            axes.text(left + share / 2, 0, "\n".join(lines), parse_math=False, **place)
        left += share
    axes.set(xlim=(0, 100), ylim=(-0.4, 0.4))
    axes.set_axis_off()
    return svg(figure, "time_split")
