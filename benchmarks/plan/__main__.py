"""Before renting the nodes: what fits into a budget, predicted from a minute on this one.

    python -m benchmarks.plan --data DIR --minutes 30 --nodes 4 --gpus 8 --price 98.32

Loader, model, evaluation and checkpoints of the recipe are measured on one device here; from their
rates the time of the run is predicted, and the epochs that fit. Accuracies are expected from tables
that others have published, where there are any. The chosen recipe is written as TOML for train.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.common.matrix import DATA_AND_DEVICE
from benchmarks.common.measuring import begin, by_column, command_parser, document
from benchmarks.common.plots import time_bars
from benchmarks.plan.prediction import MIN_STEPS, Candidate, candidates, with_fitting_batch
from fastimagenet import cli
from fastimagenet.config import RunConfig
from fastimagenet.distributed.world import World
from fastimagenet.folder import check_output, result_folder
from fastimagenet.images import read_data, with_copies
from fastimagenet.recipes import toml as recipe_toml
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Recipe
from fastimagenet.report.figures import new_figure, with_legend, write_files
from fastimagenet.training.clock import Stopwatch
from pipelines.cli import Parser, at_least, output_folder, positive
from pipelines.datasets.known import dataset_name
from pipelines.errors import UserError
from pipelines.files import Row, read_object, write_object, write_text
from pipelines.formats import NO_BREAK, duration, percent, time_unit

PASSED_ON = (*DATA_AND_DEVICE, "seed")
"""Flags that train has with the same defaults."""


def parser() -> Parser:
    """Build the command line."""
    result = command_parser(__doc__)
    cli.add_machine_flags(result)
    cli.add_run_flags(result, "runs/plan-RECIPE-TIME", output_folder)
    add = result.add_argument
    help_text = "no probe: set this finished run of --output/recipe.toml beside its prediction"
    add("--check", type=Path, metavar="RUN", help=help_text)
    add("--minutes", type=positive, metavar="M", help="wall time that the run may take")
    add("--gpus", type=at_least(1), metavar="K", help="of a node; default: those of this one, or 1")
    add("--price", type=float, metavar="USD", help="of one node for an hour, on demand")
    add("--target", metavar="METRIC=VALUE", help="top5=0.93, top1=0.94; default: the recipe's")
    help_text = "of measuring, about, start-up aside; default 60"
    add("--probe-seconds", type=positive, default=60.0, metavar="S", help=help_text)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    clock = Stopwatch()
    args, about = begin(parser(), argv)
    if args.check is not None:
        if args.output is None:
            raise UserError("--check needs --output: the folder that the plan was written to")
        print(check(args.output, args.check))
        return 0
    check_numbers(args)
    with result_folder(cli.run_config(args), "plan-") as config:
        return planned(args, about, config, clock)


def planned(args: argparse.Namespace, about: Row, config: RunConfig, clock: Stopwatch) -> int:
    """Plan, write and print the results; returns the exit status. Raises UserError."""
    args.output = config.folder
    if args.target is not None:
        config = replace(config, recipe=replace(config.recipe, target=args.target))
    asked, nodes = config.recipe, config.launch.nodes
    # Only this machine is probed, and it meets no other.
    launch = replace(config.launch, nodes=1, rdzv_endpoint=None).resolved()
    gpus = args.gpus or launch.processes
    check_output(config.folder)
    world = World(local_world_size=gpus, device=launch.first_device)
    train, val = read_data(config.data, say_notes=True)
    recipe = with_fitting_batch(asked, nodes * gpus, len(train))
    Plan.of(recipe, nodes * gpus, len(train))

    from benchmarks.plan.probe import measure

    probed = replace(config, recipe=with_copies(recipe, config.data.root))
    probe, hardware, precision = measure(probed, world, train, val, clock, args.probe_seconds)
    dataset = dataset_name(train.classes)
    found = candidates(
        recipe, probe, dataset=dataset, nodes=nodes, world_size=nodes * gpus,
        budget_seconds=60 * args.minutes, node_price=args.price,
    )  # fmt: skip
    result = about | {"hardware_probed": hardware, "precision": precision}
    result |= {"data": dataset or config.data.name, "nodes": nodes, "gpus_per_node": gpus}
    result |= {"minutes": args.minutes, "node_usd_per_hour": args.price, "probe": asdict(probe)}
    write_results(result, found, config.folder)
    print(f"\n{table(result, found)}\nall of it: {config.folder}", flush=True)
    if note := batch_note(asked, recipe):
        print(note)
    command = ["python", "-m", "fastimagenet.train", *train_flags(args)]
    print(f"train it: {shlex.join(command)}")
    return 0


def batch_note(asked: Recipe, planned: Recipe) -> str:
    """Tell what the plan has changed about the recipe's batches; "" where it is nothing."""
    before, after = ([phase.batch_size for phase in recipe.phases] for recipe in (asked, planned))
    if before == after:
        return ""
    return (
        f"batch size a process: {', '.join(map(str, after))} in place of the recipe's "
        f"{', '.join(map(str, before))}, so that an epoch has at least {MIN_STEPS} steps; "
        "the LR in proportion"
    )


def train_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags of the predicted run; what else was given is in recipe.toml."""
    flags = ["--recipe", str(args.output / "recipe.toml")]
    for name in PASSED_ON:
        value = getattr(args, name)
        if value != parser().get_default(name):
            flags += [f"--{name.replace('_', '-')}", str(value)]
    if processes := args.gpus or args.nproc_per_node:
        flags += ["--nproc-per-node", str(processes)]
    if (nodes := args.nodes[1]) > 1:
        flags += ["--nodes", str(nodes), "--rdzv-endpoint", args.rdzv_endpoint or "HOST:PORT"]
    return flags


def check_numbers(args: argparse.Namespace) -> None:
    """Raise UserError naming the flag."""
    if args.minutes is None:
        raise UserError("--minutes M is required: the wall time that the run may take")
    if args.global_batch is not None:
        raise UserError("--global-batch: the batches are the recipe's; --set phases.0.batch_size=N")
    if args.price is not None and not 0 <= args.price < 1e9:
        raise UserError(f"--price must be a number of US dollars, not {args.price}")


CLOCKS = ("train_seconds", "wall_seconds")
UNQUIET = 0.1
"""Spread of the probed rates above which a prediction within 10 % is not to be had."""
NOT_MEASURED = (
    "All times and costs are predicted from the probe, not measured: processes and nodes are taken "
    "to scale perfectly, and to be like the device probed."
)


def write_results(result: Row, found: list[Candidate], folder: Path) -> None:
    """Write plan.json, table.md, plan.svg and .png, and recipe.toml: the first candidate."""
    rows = []
    for each in found:
        totals = {f"predicted_{name}": getattr(each, name) for name in CLOCKS}
        rows.append(asdict(each) | totals)
    probe = result["probe"]
    # Names in a JSON object are text.
    rates = {str(size): rate for size, rate in probe["eval_images_per_sec"].items()}
    probe = probe | {"eval_images_per_sec": rates}
    write_object(folder / "plan.json", result | {"probe": probe, "predicted": rows})
    write_text(folder / "table.md", table(result, found))
    write_text(folder / "recipe.toml", recipe_toml.dumps(found[0].recipe))
    write_files(picture(found, result["minutes"]), folder, "plan")


def table(result: Row, found: list[Candidate]) -> str:
    """Format the candidates as Markdown."""
    sources = dict.fromkeys(each.accuracy_source for each in found)
    known = any(each.accuracy for each in found)
    spread = max(rates["spread"] for rates in result["probe"]["train"])
    price = result["node_usd_per_hour"]
    nodes = f"{result['nodes']} x {result['gpus_per_node']} processes"
    unquiet = ": the machine was not quiet, and the prediction is as uncertain"
    notes = [
        NOT_MEASURED,
        f"The probed training rates varied by up to {100 * spread:.0f} % from round to round"
        + (f"{unquiet}." if spread > UNQUIET else "."),
        ("Accuracies are expected, not measured" if known else "No accuracy is expected")
        + f": {'; '.join(sources)}.",
    ]
    return document(
        f"# {found[0].recipe.name} on {result['data']} within {result['minutes']:g} minutes: "
        "predicted",
        f"{nodes} like the one probed: {result['hardware_probed']}; {result['precision']}; "
        f"torch {result['versions']['torch']}; {result['date']}"
        + ("." if price is None else f"; ${price:g} an hour and node."),
        by_column([row(each) for each in found]),
        "\n".join(notes),
    )


def row(each: Candidate) -> dict[str, str]:
    """Format the cells of one candidate, by column."""
    recipe, accuracy = each.recipe, each.accuracy or {}
    sizes = epochs_by_size(recipe).items()
    return {
        "predicted": each.name,
        "epochs": str(recipe.epochs),
        "sizes": ", ".join(f"{size} px x {epochs}" for size, epochs in sizes),
        "global batch": ", ".join(dict.fromkeys(f"{batch:,}" for batch in each.global_batches)),
        "steps": f"{each.steps:,}",
        "train": duration(each.train_seconds),
        "wall": duration(each.wall_seconds),
        "cost": "-" if each.cost_usd is None else f"${each.cost_usd:,.2f}",
        "expected top-1": percent(accuracy.get("top1"), 1),
        "top-5": percent(accuracy.get("top5"), 1),
    }


def epochs_by_size(recipe: Recipe) -> dict[int, int]:
    """Sum the epochs by size: variants of a recipe have phases of equal sizes."""
    sizes = dict.fromkeys((phase.image_size for phase in recipe.phases), 0)
    for phase in recipe.phases:
        sizes[phase.image_size] += phase.epochs
    return sizes


def picture(found: list[Candidate], minutes: float) -> Figure:
    """Plot the predicted wall time of every candidate by its parts, and the budget."""
    unit, length = time_unit(60 * minutes)
    figure, (axes,) = new_figure(size=(6.6, 1.6 + 0.55 * len(found)))
    time_bars(axes, {in_picture(each): each.seconds for each in found}, length)
    axes.axvline(60 * minutes / length, color="#333333", linestyle="--", linewidth=1.2)
    axes.set_xlim(0, 1.05 * max(60 * minutes, *(each.wall_seconds for each in found)) / length)
    axes.set(xlabel=f"predicted wall time ({unit}); dashed: the budget")
    return with_legend(figure, ncols=3)


def in_picture(each: Candidate) -> str:
    """Format name, epochs, and what is expected of them."""
    text = f"{each.name}\n{each.recipe.epochs} epochs"
    if each.accuracy:
        text += f", expected {percent(each.accuracy['top1'], 1)} top-1"
    return text.replace(NO_BREAK, " ")


def check(plan_dir: Path, run_dir: Path) -> str:
    """Set what the run of `plan_dir`/recipe.toml took beside its prediction, in check.json.

    Raises UserError for a run of another recipe, or on another number of processes.
    """
    plan = read_object(plan_dir / "plan.json")
    if "predicted" not in plan:  # a run has a file of that name, too
        raise UserError(f"--output {plan_dir} holds no plan: name the folder of one")
    predicted = plan["predicted"][0]
    summary = read_object(run_dir / "summary.json")
    ran = read_object(run_dir / "plan.json")
    processes, planned = ran["world_size"], plan["nodes"] * plan["gpus_per_node"]
    if processes != planned:
        raise UserError(
            f"--check {run_dir} is a run on {processes} process(es), the plan in {plan_dir} is for "
            f"{planned}: name a run on as many"
        )
    recipe, wanted = ran["recipe"], predicted["recipe"]
    for name, value in wanted.items():
        found = recipe.get(name)
        if name == "phases":  # the copies that were read are chosen when the run starts
            value, found = ([row | {"data": ""} for row in rows] for rows in (value, found))
        if found != value:
            raise UserError(f"{run_dir} is a run of another recipe than {plan_dir}: {name} differs")
    parts = {
        part: (seconds, summary["time_split_seconds"].get(part, 0.0))
        for part, seconds in predicted["seconds"].items()
    }
    for name in CLOCKS:
        parts[name.removesuffix("_seconds")] = predicted[f"predicted_{name}"], summary[name]
    rows = {
        part: {"predicted_seconds": ours, "measured_seconds": real, "error": error(ours, real)}
        for part, (ours, real) in parts.items()
    }
    about = {key: summary[key] for key in ("hardware", "versions", "started", "command")}
    write_object(plan_dir / "check.json", about | {"parts": rows})
    cells = [
        {
            "part": part,
            "predicted": f"{row['predicted_seconds']:.2f} s",
            "measured": f"{row['measured_seconds']:.2f} s",
            "predicted / measured - 1": percent(row["error"], 1),
        }
        for part, row in rows.items()
    ]
    return by_column(cells)


def error(predicted: float, measured: float) -> float | None:
    """Return the error relative to what was measured; None where that is nothing."""
    return predicted / measured - 1 if measured else None


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
