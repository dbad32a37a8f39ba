"""Rectangular validation: images of about the same aspect ratio share a batch, and more of each is
seen than in a square.

As fast.ai's students did for DAWNBench in 2018; there the validation images were sorted once and
cut in batches whose mean aspect ratio gave the crop.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipelines.loader import LoaderSpec, Stage, eval_range

MULTIPLE = 8
"""The longer side is rounded down to a multiple of this, in pixels."""
MAX_RATIO = 3.0
"""Of the longer to the shorter side, so that a batch of very long images fits into memory."""


class Rectangles:
    """The batches of a validation set, the same at any number of shards."""

    def __init__(self, shapes: NDArray[np.int32]) -> None:
        """`shapes` (N, 2): height and width of the images."""
        self.shapes = shapes

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """The places of the images, from the tallest to the widest."""
        height, width = self.shapes.T
        return np.argsort(width / height, kind="stable")

    def batch(
        self, spec: LoaderSpec, stage: Stage, step: int
    ) -> tuple[NDArray[np.int64], tuple[int, int]]:
        """The images of a shard's batch, and the height and width of their crops."""
        num_batches = -(-len(self.order) // stage.batch_size)
        index = eval_range(num_batches, spec.shard_id, spec.num_shards)[step]
        chosen = self.order[index * stage.batch_size : (index + 1) * stage.batch_size]
        short_side = spec.resized_side(stage.image_size)
        return chosen, crop_shape(self.shapes[chosen], stage.image_size, short_side)


def crop_shape(shapes: NDArray[np.int32], image_size: int, short_side: int) -> tuple[int, int]:
    """Height and width of the crop that all images of a batch allow.

    `shapes` (B, 2); every image is resized so that its shorter side has `short_side` pixels. The
    crop has `image_size` times their mean aspect ratio, and never more than the resized images.
    """
    height, width = shapes.T.astype(np.int64)
    ratio = float(np.mean(width / height))
    shorter = np.minimum(height, width)
    wide = ratio >= 1
    # The other side of the shortest of the resized images, rounded as torchvision does.
    most = int(np.min(short_side * (width if wide else height) // shorter))
    longer = min(image_size * min(max(ratio, 1 / ratio), MAX_RATIO), most)
    longer = max(image_size, int(longer) // MULTIPLE * MULTIPLE)
    return (image_size, longer) if wide else (longer, image_size)
