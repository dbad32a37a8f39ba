"""The floor of a training step: the time that its computing and moving must take.

    python -m benchmarks.research.step_floor --sizes 224 --ceilings 989 4.8

`benchmarks.common.floor` says what is counted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.common.floor import Layer, count_layers, floor_images_per_sec
from benchmarks.common.measuring import command_parser, markdown
from fastimagenet import cli
from fastimagenet.config import chosen_recipe
from pipelines.cli import at_least, positive


def table(layers: Sequence[Layer], batch_size: int, ceilings: Sequence[float]) -> str:
    """Format as Markdown, by height of the results, what an image costs; microseconds where
    `ceilings`, in FLOP/s and bytes/s, are given."""
    rows = [("results", "layers", "GFLOP", "MB", "FLOP/B", "us")]
    for size in [*dict.fromkeys(layer.image_size for layer in layers), 0]:
        chosen = [layer for layer in layers if size in (layer.image_size, 0)]
        flops = sum(layer.flops for layer in chosen)
        moved = sum(layer.bytes(batch_size, 2) for layer in chosen)
        rate = floor_images_per_sec(chosen, batch_size, 2, *ceilings) if ceilings else None
        seconds = f"{1e6 / rate:.2f}" if rate else "-"
        name = f"{size} x {size}" if size else "all"
        cells = (f"{flops / 1e9:.3f}", f"{moved / 1e6:.1f}", f"{flops / moved:.0f}", seconds)
        rows.append((name, str(len(chosen)), *cells))
    return markdown(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--recipe", default="imagenet", metavar="NAME|FILE.toml", help="default imagenet")
    add("--sizes", type=at_least(8), nargs="+", default=[224], metavar="S", help="default 224")
    add("--batch-size", type=at_least(1), default=256, help="to divide weights by; default 256")
    add("--ceilings", type=positive, nargs=2, metavar=("TFLOPS", "TBS"), help="of a device")
    args = parser.parse_args(argv)
    recipe, _ = chosen_recipe(args.recipe)
    ceilings = [value * 1e12 for value in args.ceilings or ()]
    for size in args.sizes:
        layers = count_layers(recipe, size)
        print(f"\n{recipe.model} at {size} px, batch {args.batch_size}, bf16, a step and image:\n")
        print(table(layers, args.batch_size, ceilings))
        if ceilings:
            rate = floor_images_per_sec(layers, args.batch_size, 2, *ceilings)
            print(f"\nat most {rate:,.0f} images/s")
    return 0


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
