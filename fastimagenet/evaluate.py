"""`python -m fastimagenet.evaluate CHECKPOINT`: the exact accuracy of a trained network."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastimagenet import cli
from fastimagenet.config import DataConfig
from fastimagenet.distributed.processes import Processes
from fastimagenet.distributed.world import World
from fastimagenet.recipes import toml
from fastimagenet.recipes.recipe import TTA, Recipe
from pipelines.backends import start_workers
from pipelines.cli import Parser, make_parser
from pipelines.datasets.folders import SPLIT_FOLDERS, class_names
from pipelines.datasets.shards import has_shards
from pipelines.datasets.split import Split, check_several, notes_of
from pipelines.errors import UserError
from pipelines.files import read_object
from pipelines.loader import Stage

if TYPE_CHECKING:
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
    result.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint, or the --output folder of a run for its best.pt; without --data the "
        "data of that run are taken",
    )
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
    data = with_rule_of(path, cli.data_config(args), processes.is_first)
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
        facts, (counts, *rect) = evaluate_checkpoint(
            path,
            val,
            world,
            backend=data.backend,
            precision=args.precision,
            tta=args.tta,
            image_size=args.image_size,
            rect=args.rect,
        )
        seconds = time.perf_counter() - started
        result = facts | {"images": counts.images, **counts.accuracies(), "loss": counts.loss}
        for other in rect:
            result |= {f"rect_{name}": value for name, value in other.accuracies().items()}
        result["seconds"] = seconds
        cli.say(world, json.dumps(result) if args.json else describe(result))
        return 0

    return processes.run("fastimagenet.evaluate", argv, work, name=str(args.checkpoint))


def checkpoint_at(path: Path) -> Path:
    """Return the checkpoint, which is best.pt of a run's folder. Raises UserError without one."""
    if not path.is_dir():
        return path
    for folder in (path / "checkpoints", path):
        if (folder / "best.pt").exists():
            return folder / "best.pt"
    raise UserError(f"{path} holds no checkpoints/best.pt: name a checkpoint, or a run's folder")


def data_of_run(checkpoint: Path) -> Path | None:
    """Return the folder of the data that the checkpoint's run read; None where nothing tells.

    Raises UserError where they are no longer there.
    """
    plan = checkpoint.absolute().parent.parent / "plan.json"
    if not plan.exists() or not (found := read_object(plan).get("data")):
        return None
    folder = Path(found)
    if not folder.is_dir():
        raise UserError(f"--data: the data of the run, {folder}, are not there: name them")
    return folder


def with_rule_of(path: Path, data: DataConfig, say_notes: bool) -> DataConfig:
    """Divide data without a folder of their own for validation as the checkpoint's run did."""
    if data.rule.given or has_shards(data.root) or not data.root.is_dir():
        return data
    if any(class_names(data.root / name) for name in SPLIT_FOLDERS["val"]):
        return data
    from fastimagenet.training import checkpoint

    found = checkpoint.load(path).get("rule") or {}
    data = replace(
        data,
        val_fraction=found.get("val_fraction"),
        labels=Path(found["labels"]) if found.get("labels") else None,
    )
    if data.rule.given and say_notes:
        print(f"note: divided as its run had it,{data.rule.flags()}", file=sys.stderr)  # noqa: T201
    return data


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
) -> tuple[dict[str, Any], list[Counts]]:
    """Count over all processes: on squares and, with `rect`, on rectangles.

    Returns what was counted on, as --json has it, and the counts. `precision` and `image_size`: in
    place of the recipe's.
    Raises UserError naming the checkpoint, flag or folder.
    """
    import torch

    from fastimagenet.training import checkpoint
    from fastimagenet.training.evaluation import autocast_dtype, evaluate
    from fastimagenet.training.failures import is_out_of_memory
    from fastimagenet.training.loaders import open_loader

    state = checkpoint.load(path, "recipe", "classes", "model", "ema", "epoch")
    recipe = toml.loads(state["recipe"], f"the recipe in {path}")
    if tuple(state["classes"]) != val.classes:
        pairs = zip_longest(state["classes"], val.classes, fillvalue="none")
        known, there = next((a, b) for a, b in pairs if a != b)
        raise UserError(
            f"{path} knows {len(state['classes'])} classes, --data has "
            f"{len(val.classes)}, and the first that differ are {known} and {there}: name the data "
            "that it was trained on"
        )
    dtype = autocast_dtype(precision or recipe.precision, world.device.partition(":")[0])
    last = recipe.phases[-1]
    stage = Stage(
        epochs=1,
        image_size=image_size or last.eval_size or last.image_size,
        batch_size=min(phase.batch_size for phase in recipe.phases),
    )
    stages = (stage, replace(stage, rect=True)) if rect else (stage,)
    facts = {
        "checkpoint": str(path),
        "epoch": state["epoch"],
        "epochs": recipe.epochs,
        "split": val.name,
        "image_size": stage.image_size,
    }
    model = trained_model(recipe, state, len(val.classes))
    model = model.to(world.device, memory_format=torch.channels_last)
    loader = open_loader(
        backend, recipe, val, stages, world, training=False, half=dtype is not None
    )
    try:
        counts = [
            evaluate(model, loader, world=world, autocast_dtype=dtype, tta=tta) for _ in stages
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


def trained_model(recipe: Recipe, state: dict[str, Any], num_classes: int) -> Any:
    """Build the network with its trained weights, averaged where the recipe averages them."""
    from fastimagenet.models import build_model
    from fastimagenet.training import checkpoint

    model = build_model(recipe, num_classes)
    model.load_state_dict(checkpoint.weights(state))
    return model


def describe(result: dict[str, Any]) -> str:
    """Format the figures, TTA and rectangles beside the plain ones."""

    def figures(prefix: str) -> str:
        names = {"top-1": result.get(f"{prefix}top1"), "top-5": result.get(f"{prefix}top5")}
        return ", ".join(
            f"{name} {value:.2%}" for name, value in names.items() if value is not None
        )

    text = (
        f"{result['checkpoint']}, epoch {result['epoch']} of {result['epochs']}, at "
        f"{result['image_size']} px\n{result['images']:,} images of {result['split']} in "
        f"{result['seconds']:.1f} s: {figures('')}, loss {result['loss']:.4f}"
    )
    for title, prefix in (("with TTA", "tta_"), ("on rectangles", "rect_")):
        if found := figures(prefix):
            text += f"\n{title}: {found}"
    return text + (f"; with TTA: {found}" if (found := figures("rect_tta_")) else "")


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
