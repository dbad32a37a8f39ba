"""`python -m fastimagenet.evaluate CHECKPOINT`: the exact accuracy of a trained network."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastimagenet import cli
from fastimagenet.distributed.processes import Processes
from fastimagenet.distributed.world import World
from fastimagenet.recipes.recipe import TTA
from fastimagenet.report.run import checkpoint_at, data_of_run
from pipelines.backends import start_workers
from pipelines.cli import Parser, make_parser, output_folder
from pipelines.datasets.split import Split, check_several, notes_of
from pipelines.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from fastimagenet.training.evaluation import Counts

MAX_IMAGE_SIZE = 65535
"""That of a JPEG."""


def parser() -> Parser:
    """Build the parser with all flags of the command."""
    result = make_parser(
        "fastimagenet.evaluate",
        "Evaluate a checkpoint: exact top-1 and top-5 over all validation images.",
        "python -m fastimagenet.evaluate runs/first/checkpoints/best.pt --data imagenet --tta flip",
    )
    cli.add_checkpoint(result, "; without --data the data of that run are taken")
    cli.add_machine_flags(result)
    result.add_argument(
        "--tta",
        choices=TTA,
        default="none",
        help="test-time augmentation, reported beside the plain accuracy",
    )
    result.add_argument(
        "--image-size", type=int, metavar="S", help="override the recipe's last image size"
    )
    result.add_argument(
        "--rect",
        action="store_true",
        help="evaluate also on rectangles of the images' own aspect ratios",
    )
    result.add_argument(
        "--details",
        type=output_folder,
        metavar="DIR",
        help="write what became of every image and class, and a page, into this folder; a run's "
        "report links those in its own folder",
    )
    result.add_argument("--json", action="store_true", help="print one JSON object")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status. Raises UserError for the user's mistakes."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    processes = Processes.of(cli.launch_of(args))
    path = checkpoint_at(args.checkpoint)
    if args.data is None:
        args.data = data_of_run(path)
        if args.data is not None and processes.is_first:
            print(f"note: no --data given: {args.data}, as its run had", file=sys.stderr)  # noqa: T201
    data = cli.with_rule_of(path, cli.data_config(args), processes.is_first)
    if args.image_size is not None and not 8 <= args.image_size <= MAX_IMAGE_SIZE:
        rule = f"from 8 to {MAX_IMAGE_SIZE} pixels"
        raise UserError(f"--image-size must be {rule}, not {args.image_size}")
    start_workers(data.backend)
    val = data.read("val")
    check_several(val)
    for note in notes_of(val) if processes.is_first else ():
        print(note, file=sys.stderr)  # noqa: T201

    def work(world: World) -> int:
        started = time.perf_counter()
        from fastimagenet.details.collect import Collector

        collector = Collector() if args.details else None
        facts, (counts, *rect) = evaluate_checkpoint(
            path,
            val,
            world,
            backend=data.backend,
            precision=args.precision,
            tta=args.tta,
            image_size=args.image_size,
            rect=args.rect,
            consumer=collector,
        )
        seconds = time.perf_counter() - started
        result = facts | {"images": counts.images, **counts.accuracies(), "loss": counts.loss}
        for other in rect:
            result |= {f"rect_{name}": value for name, value in other.accuracies().items()}
        result["seconds"] = seconds
        if collector is not None:
            outcomes = collector.outcomes(world, val.classes)
            if world.is_main:
                from fastimagenet.details.page import write_details

                result["details"] = str(write_details(args.details, outcomes, val.files, result))
        cli.say(world, json.dumps(result) if args.json else describe(result))
        return 0

    return processes.run("fastimagenet.evaluate", argv, work, name=str(args.checkpoint))


def evaluate_checkpoint(
    path: Path,
    val: Split,
    world: World,
    *,
    backend: str = "auto",
    precision: str | None = None,
    tta: str = "none",
    image_size: int | None = None,
    rect: bool = False,
    consumer: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[dict[str, Any], list[Counts]]:
    """Count over all processes: on squares and, with `rect`, on rectangles.

    Returns what was counted on, as --json has it, and the counts. `precision` and `image_size`: in
    place of the recipe's. `consumer`: gets logits and labels of the squares, see `evaluate`.
    Raises UserError naming the checkpoint, flag or folder.
    """
    import torch

    from fastimagenet.classifier import load
    from fastimagenet.training.evaluation import autocast_dtype, evaluate
    from fastimagenet.training.failures import is_out_of_memory
    from fastimagenet.training.loaders import open_loader

    network = load(path)
    if network.classes != val.classes:
        pairs = zip_longest(network.classes, val.classes, fillvalue="none")
        known, there = next((a, b) for a, b in pairs if a != b)
        raise UserError(
            f"{path} knows {len(network.classes)} classes, --data has "
            f"{len(val.classes)}, and the first that differ are {known} and {there}: name the data "
            "that it was trained on"
        )
    recipe = network.recipe
    dtype = autocast_dtype(precision or recipe.precision, world.device.partition(":")[0])
    stage = network.stage
    if image_size is not None:
        stage = replace(stage, image_size=image_size)
    stages = (stage, replace(stage, rect=True)) if rect else (stage,)
    facts = {
        "checkpoint": str(path),
        "epoch": network.epoch,
        "epochs": recipe.epochs,
        "split": val.name,
        "image_size": stage.image_size,
    }
    model = network.model.to(world.device).to(memory_format=torch.channels_last)
    loader = open_loader(
        backend, recipe, val, stages, world, training=False, half=dtype is not None
    )
    try:
        counts = [
            evaluate(
                model,
                loader,
                world=world,
                autocast_dtype=dtype,
                tta=tta,
                classes=len(val.classes),
                consumer=None if stage.rect else consumer,
            )
            for stage in stages
        ]
        return facts, counts
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise UserError(
                f"--image-size {stage.image_size}: a batch of {stage.batch_size} such images does "
                "not fit into memory; give a smaller one"
            ) from None
        raise
    finally:
        loader.close()


def describe(result: dict[str, Any]) -> str:
    """Format the figures, TTA and rectangles beside the plain ones."""

    def figures(prefix: str) -> str:
        names = {"top-1": "top1", "top-5": "top5", "balanced top-1": "balanced_top1"}
        found = {name: result.get(prefix + key) for name, key in names.items()}
        return ", ".join(f"{name} {it:.2%}" for name, it in found.items() if it is not None)

    text = (
        f"{result['checkpoint']}, epoch {result['epoch']} of {result['epochs']}, at "
        f"{result['image_size']} px\n{result['images']:,} images of {result['split']} in "
        f"{result['seconds']:.1f} s: {figures('')}, loss {result['loss']:.4f}"
    )
    for title, prefix in (("with TTA", "tta_"), ("on rectangles", "rect_")):
        if found := figures(prefix):
            text += f"\n{title}: {found}"
    text += f"; with TTA: {found}" if (found := figures("rect_tta_")) else ""
    return text + (f"\ndetails: {result['details']}" if "details" in result else "")


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
