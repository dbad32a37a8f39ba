"""`python -m fastimagenet.batches`: a page of images as the network gets them, phase by phase.

The training images are the first batch of each phase, as a run with the same seed reads it; the
validation images are a few of each class. All back ends give the same ones.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastimagenet import cli, run
from fastimagenet.config import RunConfig, changed_recipe, chosen_recipe
from fastimagenet.distributed.world import World
from fastimagenet.images import read_copies, read_data, with_copies
from fastimagenet.recipes.plan import Plan, PlannedPhase
from pipelines import pages
from pipelines.cli import Parser, at_least, make_parser, output_folder
from pipelines.files import printable, write_text
from pipelines.loader import Transforms

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.loader import Loader

SHOWN = 16
"""Images of each kind and phase by default."""


def parser() -> Parser:
    """Build the parser with all flags of the command."""
    result = make_parser(
        "fastimagenet.batches",
        "Write a page of training and validation images as the network gets them.",
        "python -m fastimagenet.batches --data photos",
    )
    cli.add_data_flags(result)
    cli.add_backend_flag(result)
    cli.add_recipe_flags(result)
    add = result.add_argument
    add("--images", type=at_least(1), default=SHOWN, metavar="N", help=f"default {SHOWN}")
    add("--output", type=output_folder, default=Path(), metavar="DIR", help="default: here")
    return result


@dataclass(frozen=True)
class Picture:
    """An image as the network gets it, without its normalisation."""

    label: str
    """Its class, or the shares of its classes where images are mixed."""
    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    """(H, W, 3)."""


@dataclass(frozen=True)
class Seen:
    """What a phase shows the network."""

    phase: PlannedPhase
    training: list[Picture]
    validation: list[Picture]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status. Raises UserError for the user's mistakes."""
    args = parser().parse_args(argv)
    data = cli.data_config(args)
    recipe, chosen = chosen_recipe(args.recipe, data)
    recipe, notes = changed_recipe(recipe, args.set)
    config = RunConfig(recipe=recipe, data=data, seed=args.seed, notes=(*chosen, *notes))
    seen = look(config, args.images)
    path = args.output / "batches.html"
    write_text(path, render(config, seen))
    for note in config.notes:
        print(note, file=sys.stderr)  # noqa: T201
    print(path)  # noqa: T201
    return 0


def look(config: RunConfig, count: int) -> list[Seen]:
    """Read up to `count` training and validation images of each phase. Raises UserError."""
    recipe = with_copies(config.recipe, config.data.root)
    train, val = read_data(config.data, say_notes=True, recipe=recipe)
    plan = Plan.of(recipe, 1, len(train), config.global_batch)
    some = val.take(np.linspace(0, len(val) - 1, min(count, len(val))).astype(np.int64))
    passes = [plan.phase_of_epoch(epoch) for epoch in range(plan.epochs) if plan.evaluates(epoch)]
    seen = []
    for phase in plan.phases:
        # A pass that is broken off goes on where it was: each phase gets loaders of its own.
        training, validation = run.build_loaders(
            config, plan, World(), train, some, read_copies(config.data.root, plan, train)
        )
        with closing(training), closing(validation):
            read = partial(first_pictures, transforms=recipe, classes=train.classes, count=count)
            evaluated = phase in passes
            seen.append(
                Seen(
                    phase,
                    read(training, phase.first_epoch),
                    read(validation, passes.index(phase)) if evaluated else [],
                )
            )
    return seen


def first_pictures(
    loader: Loader, epoch: int, transforms: Transforms, classes: Sequence[str], count: int
) -> list[Picture]:
    """Return up to `count` of the first images that the loader reads in an epoch."""
    loader.epoch = epoch
    found: list[Picture] = []
    for images, labels in loader:
        pixels = denormalised(images, transforms)
        found += [
            Picture(named(label, classes), image)
            for image, label in zip(pixels, labels, strict=True)
        ]
        if len(found) >= count:
            break
    return found[:count]


def denormalised(images: Tensor, transforms: Transforms) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return normalised images (B, 3, H, W) as pixels (B, H, W, 3)."""
    values = images.float().permute(0, 2, 3, 1).numpy()
    mean, std = (np.array(each, np.float32) for each in (transforms.mean, transforms.std))
    pixels: np.ndarray[Any, np.dtype[np.float32]] = (values * std + mean) * 255
    return pixels.round().clip(0, 255).astype(np.uint8)


def named(label: Tensor, classes: Sequence[str]) -> str:
    """Name the class of a label, or the shares of its probabilities."""
    if label.ndim == 0:
        return printable(classes[int(label)])
    shares = sorted(((float(share), name) for share, name in zip(label, classes, strict=True)))
    parts = [f"{share:.0%} {printable(name)}" for share, name in reversed(shares) if share >= 0.005]
    return parts[0].partition(" ")[2] if len(parts) == 1 else ", ".join(parts)


def render(config: RunConfig, seen: list[Seen]) -> str:
    """Fill in the page."""
    from PIL import Image

    def cells(pictures: list[Picture]) -> list[dict[str, str]]:
        return [
            {"label": each.label, "source": pages.inline(Image.fromarray(each.pixels))}
            for each in pictures
        ]

    return pages.render(
        Path(__file__).with_name("batches.html.jinja"),
        recipe=config.recipe.name,
        data=printable(config.data.name),
        seed=config.seed,
        phases=[
            {
                "title": title(each.phase),
                "parts": {
                    f"training, {each.phase.image_size} px": cells(each.training),
                    f"validation, {each.phase.eval_size} px": cells(each.validation),
                },
            }
            for each in seen
        ],
    )


def title(phase: PlannedPhase) -> str:
    """Name a phase by its epochs."""
    first, last = phase.first_epoch + 1, phase.first_epoch + phase.epochs
    return f"epoch {first}" if first == last else f"epochs {first} to {last}"


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
