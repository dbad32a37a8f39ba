"""What others have published of accuracy after so many epochs, and nothing beyond it."""

from __future__ import annotations

from math import log

from benchmarks.published import published
from fastimagenet.recipes.superconvergence import STUDY


def expected_accuracy(
    model: str, dataset: str | None, epochs: float
) -> tuple[dict[str, float] | None, str]:
    """Accuracies that were published for this network after so many epochs, and by whom.

    Between two published figures it is interpolated linearly in the logarithm of the epochs;
    outside of them, and for other networks, there is none.
    """
    table, source = accuracy_table(model, dataset)
    if not table:
        return None, "no published table for this network on these data"
    known = sorted(table)
    if not known[0] <= epochs <= known[-1]:
        return None, f"{source} has {known[0]} to {known[-1]} epochs only"
    high = next(count for count in known if count >= epochs)
    low = max(count for count in known if count <= epochs)
    share = 0.0 if low == high else log(epochs / low) / log(high / low)
    values = {
        metric: value + share * (table[high][metric] - value)
        for metric, value in table[low].items()
    }
    return values, source


def epochs_for(model: str, dataset: str | None, metric: str, value: float) -> int | None:
    """The fewest epochs for which `expected_accuracy` gives the target; None: none do."""
    table, _ = accuracy_table(model, dataset)
    for epochs in range(min(table, default=1), max(table, default=0) + 1):
        accuracy, _ = expected_accuracy(model, dataset, epochs)
        if accuracy is not None and accuracy.get(metric, 0) >= value:
            return epochs
    return None


def accuracy_table(model: str, dataset: str | None) -> tuple[dict[int, dict[str, float]], str]:
    """Epochs -> accuracies, and the source."""
    if (model, dataset) == ("resnet50", "ImageNet"):
        entries = [e for e in published({"ImageNet"}, "top1") if e.name == "ffcv-imagenet"]
        rows = {
            entry.epochs: {"top1": entry.top1, "top5": entry.top5}
            for entry in entries
            if entry.epochs and entry.top1 and entry.top5
        }
        return rows, "ffcv-imagenet's table (image sizes of its own)"
    if (model, dataset) == ("resnet56", "CIFAR10"):
        runs = (STUDY[run] for run in ("3a", "3b", "1"))
        return {run.epochs: {"top1": run.top1} for run in runs}, "the super-convergence study"
    return {}, ""
