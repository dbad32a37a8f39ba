"""`Outcomes`: what became of each image of an evaluation, and the figures that follow.

All figures are scikit-learn's of the same names, with 0 in place of a division by zero; the
calibration error is torchmetrics'.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
BINS = 15
"""Bins of equal width for the calibration error. A probability that was rounded to 1 is in one of
its own, as torchmetrics has it."""


@dataclass(frozen=True, kw_only=True)
class ClassFigures:
    """Figures of each class, (C,); fractions but for the last."""

    precision: Floats
    """Of the images that were taken for it, those that are of it."""
    recall: Floats
    """Of its images, those that were found."""
    f1: Floats
    """Harmonic mean of both."""
    support: Ints
    """Images of the class."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How often images were right whose predicted class had a like probability, by bin."""

    count: Ints
    """(BINS + 1,): images."""
    confidence: Floats
    """Mean probability of the predicted class; 0 without images, as is the next."""
    accuracy: Floats

    @property
    def error(self) -> float:
        """ECE: the mean distance of accuracy and confidence, by images (arXiv:1706.04599)."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float((gaps * self.count).sum() / max(1, self.count.sum()))


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcomes:
    """Of N images in the order of their split; C classes."""

    classes: tuple[str, ...]
    labels: Ints
    """(N,): the true class."""
    predicted: Ints
    """(N,): the likeliest class; -1 where the network's outputs have a NaN."""
    p: Floats
    """(N,): its probability."""
    p_true: Floats
    """(N,): the probability of the true class."""
    loss: Floats
    """(N,): cross-entropy, nats."""

    @property
    def top1(self) -> float:
        return float((self.labels == self.predicted).mean())

    @cached_property
    def confusions(self) -> tuple[Ints, Ints, Ints]:
        """True class, predicted class and number of images, of every pair that there is.

        Sorted by the two classes. A matrix would be too large for very many classes.
        """
        known = self.predicted >= 0
        number = len(self.classes)
        pairs = self.labels[known] * number + self.predicted[known]
        found, counts = np.unique(pairs, return_counts=True)
        return found // number, found % number, counts.astype(np.int64)

    @property
    def matrix(self) -> Ints:
        """(C, C): images by true class, in rows, and predicted class."""
        result = np.zeros((len(self.classes), len(self.classes)), np.int64)
        true, predicted, counts = self.confusions
        result[true, predicted] = counts
        return result

    @cached_property
    def by_class(self) -> ClassFigures:
        number = len(self.classes)
        support = np.bincount(self.labels, minlength=number)
        times = np.bincount(self.predicted[self.predicted >= 0], minlength=number)
        right = np.bincount(self.labels[self.labels == self.predicted], minlength=number)
        return ClassFigures(
            precision=right / np.maximum(times, 1),
            recall=right / np.maximum(support, 1),
            f1=2 * right / np.maximum(support + times, 1),
            support=support,
        )

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that have images."""
        figures = self.by_class
        return float(figures.recall[figures.support > 0].mean())

    @cached_property
    def calibration(self) -> Calibration:
        known = self.predicted >= 0
        p, right = self.p[known], (self.labels == self.predicted)[known]
        # Probabilities are float32, and so are the bounds that they are compared with.
        bins = np.searchsorted(np.linspace(0, 1, BINS + 1, dtype=np.float32), p, side="right") - 1
        count = np.bincount(bins, minlength=BINS + 1)
        return Calibration(
            count=count,
            confidence=np.bincount(bins, p, BINS + 1) / np.maximum(count, 1),
            accuracy=np.bincount(bins, right, BINS + 1) / np.maximum(count, 1),
        )

    def highest_losses(self, count: int) -> Ints:
        """Indices of the images with the highest losses, NaN first."""
        return np.argsort(-np.nan_to_num(self.loss, nan=np.inf), kind="stable")[:count]
