"""Define what a loader is asked for (`LoaderSpec`), what it promises (`Loader`), and which batches
each shard reads.

Plain values only: this module knows nothing of training, recipes or torch.distributed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

from pipelines.datasets.known import AUTO, IMAGENET_MEAN, IMAGENET_STD, ORIGINAL

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.datasets.split import Split


WHOLE_IMAGES = "FASTIMAGENET_WHOLE_IMAGES"
"""Environment variable; 1: see `DaliSettings.whole_images`."""


@dataclass(frozen=True, kw_only=True)
class DaliSettings:
    """Settings of a DALI pipeline; its threads are `LoaderSpec.num_threads`. All but the first hold
    on a GPU only; the defaults are not yet measured there."""

    prefetch: int = 2
    """Batches that are prefetched."""
    hw_decoder_load: float = 0.65
    """Share of the images that the hardware decoder takes where there is one. DALI's own default:
    NVIDIA found .65 steadier than .90, and on an A100 .75 faster than all or none. On an H100 that
    decoder is reported to write before its stream lets it (meta-pytorch/torchcodec#1634): whether
    DALI is spared, `tests/gpu` tells; 0 does without."""
    width_hint: int = 0
    """Width of a wide image in pixels, to allocate buffers at the start; 0: they grow."""
    height_hint: int = 0
    """Height of a high image in pixels, likewise."""
    whole_images: bool = field(default_factory=lambda: os.environ.get(WHOLE_IMAGES) == "1")
    """Decode whole images and cut windows out of them: nvImageCodec 0.9.0 is reported to fail in
    decoding windows on some GPUs (its issue 55), by an error on some and a crash on others."""


AUTO_AUGMENT = ("none", "trivial", "rand")
MAGNITUDES = 31
"""Number of magnitudes of an operation of `auto_augment`, from nothing to the largest."""
DECODE_MARGIN = 256 / 224
"""Validation: the short side is resized to this times the size of the centre crop."""


@dataclass(frozen=True, kw_only=True)
class Transforms:
    """How decoded images become the network's input.

    `Recipe` and `LoaderSpec` inherit these fields. Training crops and flips, then augments batches
    on the device in the order of the fields below.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    """Per channel, of pixels in 0..1."""
    upright: bool = False
    """Turn images upright first, by their EXIF orientation: photographs of telephones. XMP does not
    count, nor does an orientation that is no number from 1 to 8."""
    mirror: bool = True
    """Training: flip left-right with probability 1/2."""
    alternating_flip: bool = False
    """With `mirror`: flip each image in every second epoch, half of them in the first one
    (arXiv:2404.00498)."""
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Training: width / height of the random-area crop is drawn log-uniformly from this range."""
    reflect_pad: int = 0
    """Training, when > 0: in place of the random-area crop, resize the whole image to
    `image_size`, pad each side by this many pixels by reflection and crop back at random."""
    auto_augment: str = "none"
    """"trivial": one random operation an image, at any strength (TrivialAugment, arXiv 2103.10158).
    "rand": several at one strength (RandAugment, arXiv 1909.13719)."""
    rand_augment: tuple[int, int] = (2, 9)
    """For "rand": operations an image, and their magnitude of 0..MAGNITUDES - 1."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation are each multiplied by 1 - this to 1 + this (Howard,
    arXiv 1312.5402)."""
    random_erasing: float = 0.0
    """Probability that a rectangle of an image becomes the mean colour (Random Erasing, arXiv
    1708.04896)."""
    mixup: float = 0.0
    """Above 0: alpha of the Beta distribution of the share that an image keeps when pairs of images
    and their labels are blended (mixup, arXiv 1710.09412)."""
    cutmix: float = 0.0
    """Above 0: the same, where a rectangle of the other image is set in (CutMix, arXiv 1905.04899).
    With both, a batch gets one of the two, each with probability 1/2."""
    resize_ratio: float = DECODE_MARGIN
    """Validation: the short side becomes round(image_size * resize_ratio) before the crop."""

    @property
    def mixes(self) -> bool:
        """Whether labels become probabilities."""
        return self.mixup > 0 or self.cutmix > 0

    def transforms(self) -> dict[str, Any]:
        """Return these fields as keyword arguments of another `Transforms`."""
        return {field.name: getattr(self, field.name) for field in fields(Transforms)}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Consecutive epochs of one image size, batch size and crop scale."""

    epochs: int
    image_size: int
    """Height and width of the images in a batch, in pixels."""
    batch_size: int
    """Images per batch and shard."""
    min_scale: float = 0.25
    """Training: smallest share of the image's area that a random crop keeps, in (0, 1]."""
    data: str = AUTO
    """Training: name of the copy of the data to read, such as "160"; "original" is the split
    itself, and so is "auto" where no copy has been chosen for it."""
    rect: bool = False
    """Validation: sort images by aspect ratio; each batch has a shape of its own, whose shorter
    side is `image_size`."""

    @property
    def copy(self) -> str:
        """Name of the spec's copy to read; "" is the split itself."""
        return "" if self.data in (AUTO, ORIGINAL) else self.data


@dataclass(frozen=True, kw_only=True)
class LoaderSpec(Transforms):
    """Everything a back end needs to read one split for a whole run.

    The last stage lasts for as many epochs as are asked for.
    """

    split: Split
    stages: tuple[Stage, ...]
    training: bool
    """True: shuffled, augmented, full batches only. False: every image once, in order."""
    shard_id: int = 0
    """This process's global rank."""
    num_shards: int = 1
    accumulation: int = 1
    """Training: micro-batches per update. This shard reads, batch after batch, what as many shards
    would have read."""
    seed: int = 0
    """The run's seed, the same on every shard."""
    device: str = "cpu"
    """Device of the batches: "cpu" or "cuda:INDEX"."""
    half: bool = False
    """Yield float16 images (on a GPU only) in place of float32."""
    num_threads: int = 2
    """Decoding threads (dali, memory) or worker processes (torchvision; 0: this process reads)."""
    copies: Mapping[str, Split] = field(default_factory=dict)
    """By name: the same images in the same order in other files, such as smaller ones."""
    dali: DaliSettings = field(default_factory=DaliSettings)
    """For the back end dali; the others ignore it."""

    def stage_at(self, epoch: int) -> Stage:
        """Find the stage of `epoch` (from 0)."""
        for stage in self.stages:
            if epoch < stage.epochs:
                return stage
            epoch -= stage.epochs
        return self.stages[-1]

    def steps_at(self, epoch: int) -> int:
        """Count the batches that this shard yields in `epoch`."""
        stage, count = self.stage_at(epoch), len(self.split)
        if self.training:
            shards = self.num_shards * self.accumulation
            return train_steps(count, stage.batch_size, shards) * self.accumulation
        if stage.rect:
            num_batches = -(-count // stage.batch_size)
            return len(eval_range(num_batches, self.shard_id, self.num_shards))
        return -(-len(eval_range(count, self.shard_id, self.num_shards)) // stage.batch_size)

    def step_and_shard(self, step: int) -> tuple[int, int]:
        """Convert batch `step` of an epoch to the step and shard that it would have if each
        micro-batch of an update had a shard of its own."""
        step, micro_batch = divmod(step, self.accumulation)
        return step, self.shard_id * self.accumulation + micro_batch

    def source(self, copy: str) -> Split:
        """Return what `Stage.copy` names: a copy, or the split itself."""
        return self.copies[copy] if copy else self.split


class Loader(Protocol):
    """Reads one epoch a pass.

    - `for images, labels in loader` yields the rest of the current epoch: images
      (B, 3, S, S), or (B, 3, H, W) as each batch has it where the stage is `rect`, float32 or
      float16, normalised, channels_last in memory, on the device; labels (B,) int64 on the device,
      but with mixup or cutmix, in training, (B, classes) float32 probabilities: torch's
      cross_entropy takes both. A finished pass increments `epoch`; after a pass that the caller
      breaks off, the next one resumes with the very next batch.
    - Training: the same number of full batches on every shard, no image twice in an epoch,
      fewer than one global batch left out, another order each epoch. The order, the crops, the
      flips and all other augmentation follow from seed, epoch, step and shard alone.
    - Validation: each image exactly once over all shards, the last batch may be smaller.
    - A batch that cannot be decoded raises `UserError` with the file's path.
    """

    epoch: int
    """The epoch, from 0, that the next pass reads or resumes. May be set between passes; a jump
    discards prefetched batches."""

    def __len__(self) -> int:
        """Count the batches of the whole current epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def state_dict(self) -> dict[str, Any]:
        """Return the exact position, in plain values that `torch.load(weights_only=True)` accepts.

        Where it was taken after the last batch of a pass but before its end, the next pass yields
        nothing and increments `epoch`.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position that `state_dict` of a loader with an equal spec returned."""

    def close(self) -> None:
        """Free threads, processes and memory; closing twice is fine."""


def resized_side(image_size: int, resize_ratio: float) -> int:
    """Compute the shorter side of an image in validation before the crop, in pixels."""
    return int(image_size * resize_ratio + 0.5)


def train_steps(num_images: int, batch_size: int, num_shards: int) -> int:
    """Count the full batches that every shard reads in an epoch."""
    return num_images // (batch_size * num_shards)


def eval_range(count: int, shard_id: int, num_shards: int) -> range:
    """Return the part of `count` images or batches that one shard reads.

    The parts are contiguous and disjoint, cover all, and differ in size by one at most.
    """
    return range(count * shard_id // num_shards, count * (shard_id + 1) // num_shards)
