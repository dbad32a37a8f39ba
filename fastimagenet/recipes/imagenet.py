"""Recipes for ImageNet: node count -> recipe is one table, and the four of 2018."""

from __future__ import annotations

from dataclasses import replace

from fastimagenet.recipes.recipe import Phase, Recipe

_IMAGENET_VARIANTS = {1: (16, 128, 2.0), 2: (18, 128, 3.0), 4: (18, 64, 3.0), 8: (18, 64, 4.0)}
"""Nodes of 8 GPUs -> epochs, images per GPU and peak LR for the global batch that they make. The
LR grows with the batch by less than the linear rule, which breaks down beyond some 2,000 images
(Goyal et al. 2017 warm up for five epochs to hold it to 8,192; we have eighteen in all)."""


def imagenet(nodes: int = 1) -> Recipe:
    """ResNet-50 on ImageNet to 93 % top-5, for nodes of 8 GPUs; sizes grow from 128 to 224.

    From 9 nodes on the variant for 8 holds, and its LR follows the global batch.
    python -m fastimagenet.train --data IMAGENET --recipe imagenet --nodes N. Not yet measured.
    """
    fitting = max(count for count in _IMAGENET_VARIANTS if count <= nodes)
    epochs, batch_size, max_lr = _IMAGENET_VARIANTS[fitting]
    return Recipe(
        name="imagenet",
        phases=(
            Phase(epochs=6, image_size=128, batch_size=batch_size, eval_size=160),
            Phase(epochs=6, image_size=160, batch_size=batch_size, eval_size=208),
            Phase(epochs=4, image_size=192, batch_size=batch_size, eval_size=256),
            Phase(epochs=2, image_size=224, batch_size=batch_size, eval_size=288),
        ),
        max_lr=max_lr,
        lr_reference_batch=8 * fitting * batch_size,
        schedule="piecewise",
        lr_spans=((0, 2, 0.1, 1.0), (2, 16, 1.0, 0.1), (16, 18, 0.1, 0.0)),
        weight_decay=5e-5,
        label_smoothing=0.1,
        blur_pool=True,
        bf16_gradients=nodes > 1,
        tta="flip",
        target="top5=0.93",
    ).stretched(epochs)


def imagenet_one_gpu(nodes: int = 1) -> Recipe:
    """ResNet-50 on ImageNet to 93 % top-5 on one large GPU: the batches of 8 GPUs on one.

    A step has some 610 launches whatever its size: in batches of 128 small images a fast GPU would
    wait for them. For 140 GB; batches of half the size do on 80. Not yet measured.
    python -m fastimagenet.train --data IMAGENET --recipe imagenet-one-gpu.
    """
    recipe = imagenet(1)
    phases = (replace(p, batch_size=1024 if p.image_size < 192 else 512) for p in recipe.phases)
    return replace(recipe, name="imagenet-one-gpu", phases=tuple(phases))


def _imagenet_2018(
    machines: int, phases: tuple[Phase, ...], *spans: tuple[float, float, float, float]
) -> Recipe:
    """What the 2018 runs share. Their static loss scale, 1,024, diverged on one machine: ours is
    dynamic, or bf16. At 288 px they, too, were validated on rectangles."""
    return Recipe(
        name=f"imagenet-2018-{machines}",
        phases=phases,
        schedule="piecewise",
        lr_spans=spans,
        momentum=0.9,
        weight_decay=1e-4,
        target="top5=0.93",
    )


def imagenet_2018_1(nodes: int = 1) -> Recipe:
    """fast.ai's DAWNBench schedule for one machine of 8 V100, 28 epochs, phase by phase.

    Claimed in 2018: 109:12 minutes to 93 % top-5. Not yet measured here.
    """
    return _imagenet_2018(
        1,
        (
            Phase(epochs=13, image_size=128, batch_size=512),
            Phase(epochs=12, image_size=224, batch_size=224, min_scale=0.087),
            Phase(epochs=3, image_size=288, batch_size=128, min_scale=0.5, rect=True),
        ),
        (0, 7, 1.0, 2.0),
        (7, 13, 2.0, 0.25),
        (13, 22, 0.4375, 0.04375),
        (22, 25, 0.04375, 0.004375),
        (25, 28, 0.0025, 0.00025),
    )


def imagenet_2018_4(nodes: int = 4) -> Recipe:
    """fast.ai's DAWNBench schedule for 4 machines of 8 V100, 30 epochs.

    Claimed in 2018: 29:44 minutes to 93 % top-5. Not yet measured here.
    """
    return _imagenet_2018(
        4,
        (
            Phase(epochs=6, image_size=128, batch_size=256),
            Phase(epochs=7, image_size=128, batch_size=512),
            Phase(epochs=15, image_size=224, batch_size=224, min_scale=0.087),
            Phase(epochs=2, image_size=288, batch_size=128, min_scale=0.5, rect=True),
        ),
        (0, 6, 2.0, 4.0),
        (6, 11, 4.0, 4.0),
        (11, 13, 4.0, 2.0),
        (13, 16, 1.75, 1.75),
        (16, 24, 1.75, 0.175),
        (24, 28, 0.175, 0.0175),
        (28, 30, 0.01, 0.001),
    )


def imagenet_2018_8(nodes: int = 8) -> Recipe:
    """fast.ai's DAWNBench schedule for 8 machines of 8 V100, 36 epochs.

    Claimed in 2018: 19:04 minutes to 93 % top-5. Not yet measured here.
    """
    return _imagenet_2018(
        8,
        (
            Phase(epochs=6, image_size=128, batch_size=128),
            Phase(epochs=8, image_size=128, batch_size=256),
            Phase(epochs=3, image_size=224, batch_size=128, min_scale=0.087),
            Phase(epochs=12, image_size=224, batch_size=224, min_scale=0.087),
            Phase(epochs=7, image_size=288, batch_size=128, min_scale=0.5, rect=True),
        ),
        (0, 6, 1.92, 3.84),
        (6, 11, 3.84, 3.84),
        (11, 14, 3.84, 1.92),
        (14, 17, 1.92, 1.92),
        (17, 23, 1.92, 0.336),
        (23, 29, 0.336, 0.0336),
        (29, 36, 0.0192, 0.00192),
    )


def imagenet_2018_16(nodes: int = 16) -> Recipe:
    """fast.ai's DAWNBench schedule for 16 machines of 8 V100, 50 epochs (93 % at epoch 37).

    Claimed in 2018: 16:08 minutes to 93 % top-5. Not yet measured here.
    """
    return _imagenet_2018(
        16,
        (
            Phase(epochs=6, image_size=128, batch_size=64),
            Phase(epochs=10, image_size=128, batch_size=128),
            Phase(epochs=3, image_size=224, batch_size=64, min_scale=0.08),
            Phase(epochs=18, image_size=224, batch_size=192, min_scale=0.08),
            Phase(epochs=13, image_size=288, batch_size=128, min_scale=0.5, rect=True),
        ),
        (0, 6, 1.88, 3.76),
        (6, 16, 3.76, 3.76),
        (16, 19, 1.88, 1.88),
        (19, 31, 0.564, 0.564),
        (31, 37, 0.0564, 0.0564),
        (37, 38, 0.0376, 0.0376),
        (38, 50, 0.00376, 0.00376),
    )
