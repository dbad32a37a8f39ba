"""Exact top-1, top-5 and loss: counts are summed over batches and ranks and divided once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from fastimagenet.distributed.collectives import Word, all_reduce_sum, broadcast
from fastimagenet.distributed.world import World
from fastimagenet.errors import Stopped
from fastimagenet.recipes.recipe import TOP, TTA
from pipelines.errors import UserError


def check_tta(tta: str) -> None:
    """Raise `UserError` unless `tta` is one of `TTA`."""
    if tta not in TTA:
        raise UserError(f"tta: {tta!r} is none of {', '.join(TTA)}")


UNEVEN = 1.5
"""From this ratio of the largest to the smallest class on, a balanced accuracy stands beside."""


@dataclass(frozen=True)
class Counts:
    """The counts of an evaluation; the fractions raise ZeroDivisionError without images."""

    images: int
    correct1: int
    correct5: int | None
    """None, as all that follows from it, with five classes or fewer, where it would say nothing."""
    loss_sum: float
    """Sum of the cross-entropy, without label smoothing, in nats."""
    tta_correct1: int | None = None
    tta_correct5: int | None = None
    balanced_top1: float | None = None
    """Mean over the classes of the share of their images that is right; None where they were not
    counted, or the largest has less than UNEVEN times the images of the smallest."""

    @classmethod
    def from_totals(cls, totals: list[float], tta: str) -> Counts:
        """Make counts of seven numbers: the fields in their order, of which the last two count with
        a TTA, and how many images were ranked among more than five classes. Then the images of each
        class, and the right ones."""
        images, correct1, correct5, loss_sum, tta1, tta5, ranked, *by_class = totals
        half = len(by_class) // 2
        pairs = [(n, right) for n, right in zip(by_class, by_class[half:], strict=False) if n]
        uneven = len(pairs) > 1 and max(pairs)[0] >= UNEVEN * min(pairs)[0]
        balanced = sum(right / n for n, right in pairs) / len(pairs) if uneven else None
        return cls(
            images=int(images),
            correct1=int(correct1),
            correct5=int(correct5) if ranked else None,
            loss_sum=loss_sum,
            tta_correct1=None if tta == "none" else int(tta1),
            tta_correct5=None if tta == "none" or not ranked else int(tta5),
            balanced_top1=balanced,
        )

    @property
    def top1(self) -> float:
        """A fraction, as are all below but the loss."""
        return self.correct1 / self.images

    @property
    def top5(self) -> float | None:
        return None if self.correct5 is None else self.correct5 / self.images

    @property
    def loss(self) -> float:
        """Mean cross-entropy per image."""
        return self.loss_sum / self.images

    @property
    def tta_top1(self) -> float | None:
        return None if self.tta_correct1 is None else self.tta_correct1 / self.images

    @property
    def tta_top5(self) -> float | None:
        return None if self.tta_correct5 is None else self.tta_correct5 / self.images

    def accuracies(self) -> dict[str, float | None]:
        """Return the accuracies by their names in files and rows."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "balanced_top1": self.balanced_top1,
            "tta_top1": self.tta_top1,
            "tta_top5": self.tta_top5,
        }


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    world: World,
    autocast_dtype: torch.dtype | None,
    tta: str = "none",
    classes: int = 0,
    stopping: Callable[[], bool] | None = None,
    consumer: Callable[[Tensor, Tensor], None] | None = None,
) -> Counts:
    """Count over one pass of the loaders of all processes, on the device of `world`.

    Each process calls it with its own share of the images (B, 3, H, W) and labels (B,) int64, and
    gets the sum over all; they take the buffers, which are the BN statistics, from the first
    process. `autocast_dtype` None: the model runs in its own precision. Either way logits are
    compared in float32. With `tta` the softmax is averaged over `views`; the plain figures are
    those of the first view, from the same pass. With five classes or fewer there is no top-5; an
    image with a NaN among its logits is wrong in every count. The model's modes are left as they
    were. With the number of `classes`, each is counted by itself. `consumer` gets the plain logits
    (B, C) float32 and labels of each batch, on the device. Raises UserError for an unknown `tta`,
    and Stopped on all processes where `stopping`, asked before every batch, is true on one.
    """
    check_tta(tta)
    device, images, ranked = torch.device(world.device), 0, 0
    stop, stopped = Word("stop", world), False
    # Kept on the device: a sync in each batch would leave a GPU idle.
    correct = torch.zeros(2, dtype=torch.float64, device=device)
    tta_correct = torch.zeros(2, dtype=torch.float64, device=device)
    loss_sum = torch.zeros(1, dtype=torch.float64, device=device)
    by_class = torch.zeros(2, classes, dtype=torch.float64, device=device)
    # Every process has statistics of its own; the first one's are saved, and so evaluated.
    broadcast(model.buffers(), world, "the BN statistics")

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal stopped
        for batch in loader:
            # Each process leaves by itself, as they have different numbers of batches.
            stopped = stopping is not None and stop.said(stopping())
            if stopped:
                return
            yield batch

    with eval_mode(model):
        for logits, mean, labels in scores(model, batches(), device, autocast_dtype, tta):
            images += len(labels)
            ranked += len(labels) if logits.shape[1] > TOP else 0
            correct += count_correct(logits, labels)
            loss_sum += cross_entropy(logits, labels, reduction="none").double().sum()
            if mean is not None:
                tta_correct += count_correct(mean, labels)
            if classes:
                right = (best_classes(logits, 1)[:, 0] == labels).double()
                by_class[0].index_add_(0, labels, torch.ones_like(right))
                by_class[1].index_add_(0, labels, right)
            if consumer is not None:
                consumer(logits, labels)
        seen = torch.tensor([images, ranked, stopped], dtype=torch.float64, device=device)
        counted = [seen[:1], correct, loss_sum, tta_correct, seen[1:2], by_class.flatten()]
        totals = torch.cat([*counted, seen[2:]])
        all_reduce_sum(totals, world, "validation counts")  # in float64, exact below 2^53
    *counts, stops = totals.tolist()  # the only wait for the device
    if stops:
        stop.forget()
        raise Stopped
    return Counts.from_totals(counts, tta)


@torch.no_grad()  # not inference_mode: torch.compile makes a second graph for its tensors
def scores(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    autocast_dtype: torch.dtype | None,
    tta: str,
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Run a network, which is in evaluation mode, on batches of images and labels.

    Yields for each the logits (B, C) float32 of the images as they are, the softmax averaged over
    `views`, None without TTA, and the labels, all on the device.
    """
    for images, labels in batches:
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
            outputs = [model(view) for view in views(images, tta)]
        mean = None
        if tta != "none":
            # Softmax first: averaged logits, or their exponentials, let one view outvote all.
            mean = torch.stack(outputs).float().softmax(dim=-1).mean(dim=0)
        yield outputs[0].float(), mean, labels


def best_classes(scores: Tensor, count: int) -> Tensor:
    """Choose the classes with the highest scores (B, C): (B, count) int64, the best first.

    Of equal scores the first ones are those that `count_correct` counts. In a row with a NaN all
    are -1: no class is predicted there.
    """
    top = min(TOP, scores.shape[1])
    best = scores.topk(top, dim=1).indices
    if count > top:
        others = scores.scatter(1, best, -math.inf).topk(count - top, dim=1).indices
        best = torch.cat([best, others], dim=1)
    return best[:, :count].masked_fill(scores.isnan().any(dim=1, keepdim=True), -1)


def count_correct(scores: Tensor, labels: Tensor) -> Tensor:
    """Count images whose label (B,) has the best, and one of the five best, scores (B, C).

    -> (2,) int64 on the same device. A row of scores with a NaN is wrong in both.
    """
    best = scores.topk(min(TOP, scores.shape[1]), dim=1).indices
    # topk takes NaN for the greatest of all numbers: it would be a hit at the label.
    hit = (best == labels[:, None]) & ~scores.isnan().any(dim=1, keepdim=True)
    return torch.stack([hit[:, 0].sum(), hit.sum()])


def views(images: Tensor, tta: str) -> Iterator[Tensor]:
    """Yield the views of the images (B, C, H, W) to average, the images themselves first.

    "none": 1. "flip": 2, also the mirror image (left-right). "flip+crop": 6, also both of these
    for the images moved by (H // 16, W // 16) pixels down and right, and up and left, filled by
    reflection. Mirrored, these are the moves along the other diagonal. The CIFAR-10 speed
    records use such views: airbench94 moves by 1 of 32 px, weighs the moved ones half and averages
    logits (arXiv:2404.00498). On one network trained here on JPEG copies (n = 1) that gave 90.20 %
    top-1, 2 px and equal weights on softmax 90.26 %: no difference, so the views stay equal.
    """
    check_tta(tta)
    yield images
    if tta == "none":
        return
    yield images.flip(-1)
    if tta == "flip":
        return
    height, width = images.shape[-2:]
    dy, dx = height // 16, width // 16
    padded = pad(images, (dx, dx, dy, dy), mode="reflect")
    for top, left in ((0, 0), (2 * dy, 2 * dx)):
        moved = padded[..., top : top + height, left : left + width]
        # One memory layout for all views: a compiled model would be compiled anew for another.
        moved = moved.contiguous(memory_format=torch.channels_last)
        yield moved
        yield moved.flip(-1)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode; then every module is in the mode it was in.

    cuDNN does not search: a smaller last batch, and each shape of rectangles, would cost seconds.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    searches = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = searches
        for module in training:
            module.training = True


def autocast_dtype(precision: str, device: str) -> torch.dtype | None:
    """Return the dtype to autocast to, None for plain float32.

    "auto" is bf16 on a GPU and fp32 on a CPU. Raises UserError for fp16 on a CPU.
    """
    if precision == "auto":
        precision = "fp32" if device == "cpu" else "bf16"
    if precision == "fp16" and device == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU take bf16 or fp32")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
