"""Evaluation against a double loop in numpy, on logits that the test stores itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastimagenet.distributed.world import World
from fastimagenet.recipes.recipe import TTA
from fastimagenet.training.evaluation import Counts, eval_mode, evaluate, views
from pipelines.errors import UserError


class Stored(nn.Module):
    """Gives row i of a table for an image whose every pixel is i."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[images[:, 0, 0, 0].long()]


def batches(first: int, last: int, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images first..last-1 in batches of `size`, the last one ragged."""
    for start in range(first, last, size):
        index = torch.arange(start, min(start + size, last))
        yield index.float()[:, None, None, None].expand(-1, 3, 16, 16), labels[index]


def reference(logits: np.ndarray, labels: np.ndarray) -> tuple[int, int, float]:
    """correct1, correct5 and the summed cross-entropy, image by image and class by class."""
    correct1 = correct5 = 0
    loss = 0.0
    for row, label in zip(logits.astype(np.float64), labels, strict=True):
        better = sum(1 for score in row if score > row[label])
        correct1 += better < 1
        correct5 += better < 5
        loss += math.log(sum(math.exp(score - row[label]) for score in row))
    return correct1, correct5, loss


def table(num: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num, num_classes, generator=generator)
    return logits, torch.randint(num_classes, (num,), generator=generator)


@pytest.mark.parametrize("num_classes", [1, 2, 4, 5, 6, 40])
def test_counts_and_loss_with_a_ragged_last_batch(num_classes: int) -> None:
    logits, labels = table(103, num_classes)
    loader = batches(0, 103, labels, 16)
    counts = evaluate(Stored(logits), loader, world=World(), autocast_dtype=None)
    correct1, correct5, loss = reference(logits.numpy(), labels.numpy())
    ranked = num_classes > 5
    assert (counts.images, counts.correct1) == (103, correct1)
    assert counts.correct5 == (correct5 if ranked else None)
    assert counts.loss_sum == pytest.approx(loss, rel=1e-6, abs=1e-6)
    assert counts.top1 == correct1 / 103
    assert counts.top5 == (correct5 / 103 if ranked else None)
    assert counts.loss == pytest.approx(loss / 103, rel=1e-6, abs=1e-6)
    assert (counts.tta_top1, counts.tta_top5) == (None, None)


@pytest.mark.parametrize("tta", TTA)
@pytest.mark.parametrize("num_shards", range(1, 9))
def test_shards_add_up_to_the_same_integers(num_shards: int, tta: str) -> None:
    """Also where some shards are empty, and whatever the batches."""
    for num_images in (5, 61):
        logits, labels = table(num_images, 8, seed=1)
        model = Stored(logits)
        whole = evaluate(
            model, batches(0, num_images, labels, 100), world=World(), autocast_dtype=None, tta=tta
        )
        edges = [num_images * shard // num_shards for shard in range(num_shards + 1)]
        shards = [
            evaluate(
                model, batches(first, last, labels, 4), world=World(), autocast_dtype=None, tta=tta
            )
            for first, last in pairwise(edges)
        ]
        numbers = [[value or 0 for value in astuple(shard)[:6]] for shard in shards]
        total = Counts.from_totals(
            [float(sum(column)) for column in zip(*numbers, strict=True)] + [num_images], tta
        )
        assert total.loss_sum == pytest.approx(whole.loss_sum, rel=1e-12)
        assert (total.images, total.correct1, total.correct5) == (
            num_images, whole.correct1, whole.correct5,
        )  # fmt: skip
        assert (total.tta_correct1, total.tta_correct5) == (whole.tta_correct1, whole.tta_correct5)
        assert (total.tta_top1 is None) == (tta == "none")
        if tta != "none":  # the stored table does not see views: both figures are one
            assert (total.tta_correct1, total.tta_correct5) == (total.correct1, total.correct5)


def test_no_batches_count_nothing() -> None:
    model = Stored(torch.zeros(1, 3))
    assert evaluate(model, [], world=World(), autocast_dtype=None) == Counts(0, 0, None, 0.0)
    with_tta = evaluate(model, [], world=World(), autocast_dtype=None, tta="flip")
    assert with_tta == Counts(0, 0, None, 0.0, 0, None)
    with pytest.raises(ZeroDivisionError):
        _ = with_tta.top1


@pytest.mark.parametrize(
    ("counts", "tta"),
    [
        (Counts(3, 1, 2, 0.1), "none"),
        (Counts(2**53 - 1, 2**53 - 2, 2**52 + 1, 1 / 3, 0, 2**53 - 3), "flip"),
    ],
)
def test_counts_come_back_from_float64(counts: Counts, tta: str) -> None:
    numbers = torch.tensor([value or 0 for value in astuple(counts)[:6]], dtype=torch.float64)
    again = Counts.from_totals([*numbers.tolist(), 1.0], tta)
    assert again == counts
    assert all(type(value) is int for value in (again.images, again.correct5))


@pytest.mark.parametrize("tta", TTA)
def test_nan_is_never_correct(tta: str) -> None:
    """Every image would be correct; in three of five a NaN at, beside or all over the label."""
    logits = torch.eye(5, 7) * 9
    logits[1, 1] = math.nan
    logits[2, 6] = math.nan
    logits[3] = math.nan
    loader = batches(0, 5, torch.arange(5), 3)
    counts = evaluate(Stored(logits), loader, world=World(), autocast_dtype=None, tta=tta)
    assert (counts.images, counts.correct1, counts.correct5) == (5, 2, 2)
    assert math.isnan(counts.loss)
    expected = None if tta == "none" else 2
    assert (counts.tta_correct1, counts.tta_correct5) == (expected, expected)


def coded(size: int) -> Tensor:
    """(1, 1, size, size): the pixel in row y and column x is 100 y + x."""
    position = torch.arange(size, dtype=torch.float32)
    return (100 * position[:, None] + position)[None, None]


def test_views_by_hand() -> None:
    image = coded(32)
    assert [v[0, 0, 5, 7].item() for v in views(image, "none")] == [507]
    assert [v[0, 0, 5, 7].item() for v in views(image, "flip")] == [507, 524]
    six = [v[0, 0] for v in views(image, "flip+crop")]
    # Moved by 2 px: down and right, mirrored; up and left, mirrored.
    assert [v[5, 7].item() for v in six] == [507, 524, 305, 322, 709, 726]
    # What comes in is the reflection about the border pixel.
    assert [v[0, 0].item() for v in six] == [0, 31, 202, 229, 202, 229]
    assert [v[31, 31].item() for v in six] == [3131, 3100, 2929, 2902, 2929, 2902]


@pytest.mark.parametrize(("height", "width"), [(16, 16), (31, 47), (224, 288), (12, 20)])
def test_views_against_numpy(height: int, width: int) -> None:
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    images = images.contiguous(memory_format=torch.channels_last)
    actual = list(views(images, "flip+crop"))
    for view, expected in zip(actual, numpy_views(images.numpy()), strict=True):
        np.testing.assert_array_equal(view.numpy(), expected)
        assert view.is_contiguous(memory_format=torch.channels_last)


def numpy_views(images: np.ndarray) -> list[np.ndarray]:
    height, width = images.shape[-2:]
    dy, dx = height // 16, width // 16
    padded = np.pad(images, ((0, 0), (0, 0), (dy, dy), (dx, dx)), mode="reflect")
    down = padded[..., :height, :width]
    up = padded[..., 2 * dy :, 2 * dx :]
    return [v for x in (images, down, up) for v in (x, x[..., ::-1])]


@pytest.mark.parametrize(("tta", "num_views"), [("flip", 2), ("flip+crop", 6)])
def test_tta_of_a_real_network_against_numpy(tta: str, num_views: int) -> None:
    """Labels are the best, fifth and sixth class in turn by numpy's average, so each image tells
    whether the network's average is the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(392, 9))
    images = 8 * torch.randn(90, 3, 32, 32)
    probabilities = np.zeros((90, 9))
    for view in numpy_views(images.numpy())[:num_views]:
        with torch.no_grad():
            logits = model(torch.from_numpy(view.copy())).double().numpy()
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities += exponentials / exponentials.sum(axis=1, keepdims=True)
    ranking = torch.from_numpy(probabilities).argsort(dim=1, descending=True)
    labels = ranking[torch.arange(90), torch.tensor([0, 4, 5]).repeat(30)]
    with torch.no_grad():
        plain = reference(model(images).numpy(), labels.numpy())

    loader = list(zip(images.split(25), labels.split(25), strict=True))
    counts = evaluate(model, loader, world=World(), autocast_dtype=None, tta=tta)
    assert (counts.tta_correct1, counts.tta_correct5) == (30, 60)
    assert (counts.correct1, counts.correct5) == plain[:2]
    assert counts.loss_sum == pytest.approx(plain[2], rel=1e-5)
    assert plain[0] < 28  # the views do differ


def test_tta_averages_the_softmax() -> None:
    """Two images, three classes, label 0. By hand, image and mirror image:

    (30, 30.5, -20) and (3, 0, -20): softmax .38 .62 0 and .95 .05 0, so class 0; the
    exponentials would say class 1. (100, 98, 0) and (0, 3, 3): softmax .88 .12 0 and .02 .49 .49,
    so class 0; the logits would say class 1.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    logits = [[30, 30.5, -20], [100, 98, 0], [0, 3, 3], [3, 0, -20]]
    model[1].weight = nn.Parameter(torch.tensor(logits).T.contiguous())
    images = torch.eye(4)[:2].reshape(2, 1, 1, 4)
    counts = evaluate(
        model, [(images, torch.zeros(2).long())], world=World(), autocast_dtype=None, tta="flip"
    )
    assert (counts.correct1, counts.tta_correct1) == (1, 2)


def test_unknown_tta_is_named_before_anything_is_read() -> None:
    with pytest.raises(UserError, match=r"^tta: 'crop' is none of none, flip, flip\+crop$"):
        evaluate(nn.Identity(), [], world=World(), autocast_dtype=None, tta="crop")
    with pytest.raises(UserError, match=r"^tta: "):
        next(views(coded(16), "mirror"))


def test_autocast_and_float32_logits() -> None:
    """In bfloat16 the logits are those of autocast; their loss is summed in full precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    images, labels = torch.randn(40, 3, 16, 16), torch.randint(10, (40,))
    for dtype in (None, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits = model(images)
        assert logits.dtype == (dtype or torch.float32)
        expected = reference(logits.float().numpy(), labels.numpy())
        counts = evaluate(model, [(images, labels)], world=World(), autocast_dtype=dtype)
        assert (counts.correct1, counts.correct5) == expected[:2]
        assert counts.loss_sum == pytest.approx(expected[2], rel=1e-6)


def test_modes_come_back_and_nothing_is_learned() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten())
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader = [(torch.randn(2, 3, 4, 4), torch.tensor([0, 1]))]
    first, second = (evaluate(model, loader, world=World(), autocast_dtype=None) for _ in range(2))
    assert first == second  # dropout is off
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_modes_come_back_after_an_exception() -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(4).eval())

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        assert not any(module.training for module in model.modules())
        raise UserError("images/broken.jpg: cannot be decoded")
        yield

    with pytest.raises(UserError, match="broken"):
        evaluate(model, loader(), world=World(), autocast_dtype=None)
    assert [module.training for module in model.modules()] == [True, True, False]
    with pytest.raises(KeyError), eval_mode(model.eval()):
        raise KeyError
    assert not model.training


@pytest.mark.parametrize("even", [False, True])
def test_balanced_accuracy_is_scikit_learns_where_classes_are_uneven(even: bool) -> None:
    from sklearn.metrics import balanced_accuracy_score

    torch.manual_seed(4)
    labels = torch.arange(60) % 3 if even else torch.tensor([0] * 40 + [1] * 15 + [2] * 5)
    logits = torch.randn(60, 4) + nn.functional.one_hot(labels, 4)
    logits[3] = math.nan
    counts = evaluate(
        Stored(logits), batches(0, 60, labels, 7), world=World(), autocast_dtype=None, classes=4
    )
    predicted = logits.argmax(dim=1)
    predicted[3] = 3  # a class that no image has
    if even:
        assert counts.balanced_top1 is None
    else:
        expected = balanced_accuracy_score(labels, predicted)
        assert counts.balanced_top1 == pytest.approx(expected, abs=1e-12)
        assert counts.balanced_top1 != counts.top1
    loader = batches(0, 60, labels, 7)
    plain = evaluate(Stored(logits), loader, world=World(), autocast_dtype=None)
    assert plain.balanced_top1 is None and plain.accuracies() | {"balanced_top1": None} == (
        counts.accuracies() | {"balanced_top1": None}
    )
