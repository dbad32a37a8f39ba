"""Recipes for CIFAR-10 on a CPU or a GPU."""

from __future__ import annotations

from fastimagenet.recipes.recipe import Phase, Recipe
from pipelines.datasets.known import CIFAR10_MEAN, CIFAR10_STD


def cifar10(nodes: int = 1) -> Recipe:
    """CIFAR-10 in minutes on two CPU cores.

    python -m fastimagenet.train --data CIFAR10 --recipe cifar10. Two cores of an AMD EPYC, bf16, on
    a copy compressed to JPEG at quality 75 with 4:2:0 chroma: 87.79 % top-1,
    88.64 % with TTA, 494 s of training, 529 s in all,
    n = 1 (2026-11-22). cifar10-airbench94, which reaches 94.0 % with TTA on the original pixels,
    reaches 90.8 % on that copy.
    """
    return Recipe(
        name="cifar10",
        model="smallnet",
        phases=(
            Phase(epochs=5, image_size=24, batch_size=256, eval_size=32),
            Phase(epochs=4, image_size=32, batch_size=256),
        ),
        max_lr=0.3,
        schedule="piecewise",
        lr_spans=((0, 2.25, 0.1, 1.0), (2.25, 9, 1.0, 0.01)),
        nesterov=True,
        weight_decay=1.2e-3,
        label_smoothing=0.2,
        precision="bf16",
        zero_init_last_gamma=False,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        reflect_pad=2,
        resize_ratio=1.0,
        tta="flip+crop",
        eval_every_epochs=3,
        target="top1=0.94",
    )


def cifar10_speed(nodes: int = 1) -> Recipe:
    """CIFAR-10 by what the holders of the speed record found, with sizes that grow.

    python -m fastimagenet.train --data CIFAR10 --recipe cifar10-speed --backend memory
    The network, whitening, dirac start, Muon, bias LR, label smoothing, alternating flip and TTA
    are those of airbench94_muon (github.com/KellerJordan/cifar10-airbench, arXiv:2404.00498), its
    8 epochs at 32 px are ours at growing sizes, its rates those for our batch. `compile = true`
    is meant for a GPU. Two cores of an AMD EPYC, bf16, on a copy compressed to JPEG at quality 75
    with 4:2:0 chroma: 89.85 % top-1, 90.65 % with TTA in 783 s with evaluation, means of 3 seeds,
    beside 993 s of airbench94 (n = 1) in the same sitting (2026-11-26).
    """
    return Recipe(
        name="cifar10-speed",
        model="speednet",
        phases=(
            Phase(epochs=5, image_size=24, batch_size=1000, eval_size=32),
            Phase(epochs=5, image_size=32, batch_size=1000),
        ),
        max_lr=0.83,
        schedule="piecewise",
        lr_spans=((0, 10, 1.0, 0.0),),
        optimizer="muon",
        muon=(0.205, 0.6),
        bias_lr_factor=64,
        momentum=0.85,
        nesterov=True,
        weight_decay=2.4e-3,
        decay_bn_and_bias=True,
        label_smoothing=0.2,
        precision="bf16",
        whitening=True,
        whitening_bias_epochs=3,
        dirac_init=True,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        alternating_flip=True,
        reflect_pad=2,
        resize_ratio=1.0,
        tta="flip+crop",
        eval_every_epochs=10,
        target="top1=0.94",
    )
