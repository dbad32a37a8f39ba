"""What training images go through beyond crop and flip: plain values, everything off by default."""

from __future__ import annotations

from dataclasses import dataclass

AUTO_AUGMENT = ("none", "trivial", "rand")
MAGNITUDES = 31
"""Steps between nothing and the largest magnitude of an operation of `auto_augment`."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """In this order, on the device that the batches are on: see `pipelines.batch_augment`."""

    auto_augment: str = "none"
    """One of AUTO_AUGMENT: on pixels rounded to 0..255, as TrivialAugmentWide or RandAugment."""
    rand_augment: tuple[int, int] = (2, 9)
    """For "rand": operations an image, and their magnitude of 0..MAGNITUDES - 1."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation are each multiplied by 1 - this to 1 + this."""
    random_erasing: float = 0.0
    """Probability that a rectangle of an image becomes the mean colour."""
    mixup: float = 0.0
    """Above 0: alpha of the Beta distribution of the share that an image keeps."""
    cutmix: float = 0.0
    """Above 0: the same, where a rectangle of the other image is set in. With both, a batch gets
    one of the two, each with probability 1/2."""

    @property
    def mixes(self) -> bool:
        """Whether labels become probabilities."""
        return self.mixup > 0 or self.cutmix > 0
