"""`Classifier`: a trained network, its classes and its preprocessing, of a checkpoint alone.

It needs neither the data nor DALI; the command `predict` is the fast way for many files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from fastimagenet.models import build_model
from fastimagenet.recipes import toml
from fastimagenet.recipes.recipe import Recipe
from fastimagenet.report.run import checkpoint_at
from fastimagenet.training import checkpoint
from fastimagenet.training.evaluation import best_classes, eval_mode, scores
from pipelines.augment.crops import normalise
from pipelines.backends.torchvision import validation_crop
from pipelines.datasets.checks import damage
from pipelines.datasets.pixels import rgb
from pipelines.errors import UserError
from pipelines.loader import Stage

Picture = str | Path | Image.Image
"""The path of an image, or an image that is open."""


@dataclass(frozen=True)
class Preprocess:
    """Turns an image of Pillow into the network's input: (3, S, S) float32, normalised.

    The pixels are those of evaluation with the back end torchvision: the short side is resized,
    and the centre is cut out.
    """

    image_size: int
    """S, pixels."""
    resize_ratio: float
    """The short side becomes round(image_size * this)."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Per channel, of pixels in 0..1."""
    upright: bool
    """Whether EXIF orientation is applied first."""

    def __call__(self, image: Image.Image) -> Tensor:
        shape = self.image_size, self.image_size
        pixels = functional.pil_to_tensor(rgb(image, self.upright))
        pixels = validation_crop(pixels, shape, self.resize_ratio)
        mean = 255 * torch.tensor(self.mean, dtype=torch.float32)
        std = 255 * torch.tensor(self.std, dtype=torch.float32)
        return normalise(pixels.permute(1, 2, 0)[None].float(), mean, std)[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Classifier:
    """A trained network with all that it takes to use it."""

    path: Path
    """Of the checkpoint."""
    epoch: int
    """Epochs that it was trained for."""
    classes: tuple[str, ...]
    recipe: Recipe = field(repr=False)
    model: nn.Module = field(repr=False)
    """Normalised images (B, 3, H, W) -> logits (B, len(classes)). In evaluation mode, on the CPU
    until it is moved, with the averaged weights where the recipe averages them."""

    @property
    def stage(self) -> Stage:
        """The image size and the batch size of the last evaluation."""
        last = self.recipe.phases[-1]
        return Stage(
            epochs=1,
            image_size=last.eval_size or last.image_size,
            batch_size=min(phase.batch_size for phase in self.recipe.phases),
        )

    @property
    def preprocess(self) -> Preprocess:
        """What makes the network's input of an image of Pillow."""
        recipe, size = self.recipe, self.stage.image_size
        return Preprocess(size, recipe.resize_ratio, recipe.mean, recipe.std, recipe.upright)

    def predict(
        self, images: Picture | Iterable[Picture], top: int = 5
    ) -> list[list[tuple[str, float]]]:
        """Name the `top` likeliest classes of each image, with their probabilities, best first.

        images: paths or images of Pillow, or one of them, which gives a list of one. The network
        runs in float32 on the device that it is on. An image whose outputs have a NaN gets [].
        Raises UserError naming the file that cannot be read, or the argument.
        """
        if top < 1:
            raise UserError(f"top must be at least 1, not {top}")
        several = [images] if isinstance(images, Picture) else images
        device, names = next(self.model.parameters()).device, self.classes
        found = []
        with eval_mode(self.model):
            for logits, _, _ in scores(self.model, self._batches(several), device, None, "none"):
                best = best_classes(logits, min(top, len(names)))
                p = logits.softmax(dim=1).gather(1, best.clamp(min=0))
                for classes, shares in zip(best.tolist(), p.tolist(), strict=True):
                    pairs = zip(classes, shares, strict=True)
                    found.append([(names[label], share) for label, share in pairs if label >= 0])
        return found

    def _batches(self, images: Iterable[Picture]) -> Iterator[tuple[Tensor, Tensor]]:
        """Read images in batches, with labels that say nothing."""
        preprocess, pictures = self.preprocess, enumerate(images)
        while batch := list(islice(pictures, self.stage.batch_size)):
            inputs = [read(preprocess, image, index) for index, image in batch]
            yield torch.stack(inputs), torch.zeros(len(batch), dtype=torch.int64)


def read(preprocess: Preprocess, image: Picture, index: int) -> Tensor:
    """Preprocess the image at `index` of a list. Raises UserError with its path or index."""
    if not isinstance(image, Picture):
        raise UserError(f"image {index} must be a path or an image of Pillow, not {type(image)}")
    name = f"image {index}" if isinstance(image, Image.Image) else str(image)
    try:
        if isinstance(image, Image.Image):
            return preprocess(image)
        with Image.open(image) as opened:
            return preprocess(opened)
    except Exception as error:
        raise UserError(f"{name} {damage(error)}") from error


def load(checkpoint_or_run: str | Path) -> Classifier:
    """Load a checkpoint, or the best one of a run's folder, onto the CPU.

    Raises UserError naming what is missing or damaged.
    """
    path = checkpoint_at(Path(checkpoint_or_run))
    state = checkpoint.load(path, "recipe", "classes", "model", "ema", "epoch")
    recipe = toml.loads(state["recipe"], f"the recipe in {path}")
    classes = tuple(state["classes"])
    model = build_model(recipe, len(classes))
    try:
        model.load_state_dict(checkpoint.weights(state))
    except RuntimeError:
        raise UserError(
            f"checkpoint {path} holds another network than the {recipe.model} of its recipe, one "
            'of your own: build that and load the "model" of torch.load(path) into it'
        ) from None
    return Classifier(
        path=path, epoch=state["epoch"], classes=classes, recipe=recipe, model=model.eval()
    )
