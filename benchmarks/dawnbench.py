"""Seeded runs of a recipe to a target accuracy: how long, how sure, at what cost.

    python -m benchmarks.dawnbench --recipe cifar10 --data CIFAR10 --runs 5 --stop-at-target

Every run is a `python -m fastimagenet.train` of its own, in OUTPUT/seedS. The same command resumes
where it was stopped, and repeats no run that is finished. The status is 1 if a run has missed the
target, or failed, as one does whose loss is not finite any more.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from statistics import median_high

from benchmarks.common.matrix import DATA_AND_DEVICE, Matrix, Training, Variant, measured, set_flags
from benchmarks.common.measuring import begin, command_parser, document, markdown, write_result
from benchmarks.common.statistics import interval, interval_text
from fastimagenet import cli
from fastimagenet.config import EntryFacts, RunConfig
from fastimagenet.recipes.recipe import Recipe
from fastimagenet.report.dawnbench import CLOCKS, clocks_at_target, result_hours, write_entry
from pipelines.cli import at_least, output_folder
from pipelines.datasets.known import dataset_name
from pipelines.datasets.split import read_split
from pipelines.errors import UserError
from pipelines.files import Row, read_object, write_object
from pipelines.formats import duration, percent

PASSED_ON = (
    *DATA_AND_DEVICE,
    *("recipe", "precision", "nproc_per_node", "global_batch", "epochs"),
    *("author", "author_email", "hardware", "cost_per_hour"),
)
"""Flags that train has, too."""
ENERGY = "energy.json"
"""In a run's folder: {"gpu_kwh": of the whole process}."""
JOULES_PER_KWH = 3.6e6


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Raises UserError for the user's mistakes."""
    parser = command_parser(__doc__)
    cli.add_machine_flags(parser)
    cli.add_run_flags(parser, "runs/dawnbench-RECIPE", output_folder)
    add = parser.add_argument
    add("--runs", type=at_least(1), default=1, metavar="N", help="seeds, from --seed on; default 1")
    add("--target", metavar="METRIC=VALUE", help="top5=0.93, top1=0.94; default: the recipe's")
    add("--stop-at-target", action="store_true", help="end each run when it has reached the target")
    add("--epochs", type=int, metavar="E", help="stretch the recipe, LR and phases, to E epochs")
    help_text = "for the DAWNBench entry, as are the next three"
    add("--author", default="anonymous", help=help_text)
    add("--author-email", default="unknown", metavar="ADDRESS")
    add("--hardware", help="default: what is found, such as 1 x NVIDIA H200")
    add("--cost-per-hour", type=float, metavar="USD", help="on-demand price of all nodes")
    args, about = begin(parser, argv)
    names = ("author", "author_email", "hardware", "cost_per_hour")
    EntryFacts(**{name: getattr(args, name) for name in names})  # checks them
    if args.nodes != (0, 1):
        raise UserError("--nodes: the runs are started on this machine alone, as --nodes 1")
    config = cli.run_config(args)
    recipe = target_recipe(config.recipe, args.target)
    if args.output is None:
        args.output = Path("runs") / f"dawnbench-{recipe.name}"
    seeds, launch = range(args.seed, args.seed + args.runs), config.launch.resolved()
    matrix = Matrix.of(
        [variant(args, config, recipe)], seeds, args.output, config.data.root,
        world_size=launch.world_size, folder=lambda _, seed: f"seed{seed}",
    )  # fmt: skip
    gpus = launch.processes if launch.device == "cuda" else 0
    status = matrix.run(around=partial(measured_energy, gpus=gpus))
    if not matrix.finished:
        print("\nno run is finished: nothing to report yet")
        return status or 1
    failed = [run.seed for run in matrix.failed]
    result = read_results(
        matrix.finished, failed, args.runs, args.cost_per_hour, about["command"], args.output
    )
    write_result(args.output, "dawnbench", result, table(result))
    print(f"\n{table(result)}\nall of it: {args.output}", flush=True)
    return status or int(result["success_rate"] < 1)


def target_recipe(recipe: Recipe, target: str | None) -> Recipe:
    """Return the recipe with this target. Raises UserError without one."""
    if target is not None:
        recipe = replace(recipe, target=target)
    if not recipe.target:
        raise UserError(f"--target: recipe {recipe.name} has none; name one, such as top1=0.94")
    return recipe


def variant(args: argparse.Namespace, config: RunConfig, recipe: Recipe) -> Variant:
    """Return what every seed trains. Raises UserError where data or target cannot be taken."""
    data = config.data
    skips = data.on_bad_image == "skip"
    split = read_split(data.root, "train", data.skip_list, skips, data.on_bad_image, data.rule)
    if dataset_name(split.classes) == "CIFAR10" and recipe.target.startswith("top5"):
        raise UserError("--target: the entries of CIFAR-10 hold top-1 only; name top1=VALUE")
    flags = ["--stop-at-target"] if args.stop_at_target else []
    for name in PASSED_ON:
        value = getattr(args, name)
        flags += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    settings = [*args.set, *([f"target={args.target}"] if args.target is not None else [])]
    flags += set_flags(settings)
    counts = {"num_train": len(split), "global_batch": args.global_batch}
    return Variant(name=recipe.name, recipe=recipe, flags=flags, **counts)


@contextmanager
def measured_energy(training: Training, gpus: int) -> Iterator[None]:
    """Write the kWh that so many GPUs took for a training beside it, unless it was begun before or
    NVML is missing."""
    whole = not (training.folder / "plan.json").exists()
    before = gpu_joules(gpus)
    yield
    after = gpu_joules(gpus)
    if whole and training.finished and before is not None and after is not None:
        write_object(training.folder / ENERGY, {"gpu_kwh": (after - before) / JOULES_PER_KWH})


def gpu_joules(count: int) -> float | None:
    """Return what the first `count` GPUs have taken since the driver was loaded, idle or not.

    Of those that CUDA_VISIBLE_DEVICES names, else of this machine's. None for none, without the
    package nvidia-ml-py, and where one does not count (before Volta) or is not found by its name.
    """
    if not count:
        return None
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "")
        names = visible.split(",") if visible else map(str, range(nvml.nvmlDeviceGetCount()))
        handles = [
            nvml.nvmlDeviceGetHandleByIndex(int(name))
            if name.isdecimal()
            else nvml.nvmlDeviceGetHandleByUUID(name)
            for name in islice(names, count)
        ]
        joules = [nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000 for handle in handles]
    except nvml.NVMLError:
        return None
    return sum(joules) if len(joules) == count else None


def read_results(
    finished: Sequence[Training],
    failed_seeds: list[int],
    planned: int,
    cost_per_hour: float | None,
    command: str,
    output: Path,
) -> Row:
    """Read the files of at least one finished run. The entry of the median goes to `output`/entry.

    Intervals are over the runs that reached the target: mean, low and high (95 %), the last two
    null from a single run. Raises UserError where the entry is not valid by the contest's rules.
    """
    summaries = [training.summary for training in finished]
    target = summaries[-1]["target"]
    runs = [seed_result(training, target) for training in finished]
    reached = {run["seed"]: run for run in runs if run["seconds"] is not None}
    seconds = {clock: [run["seconds"][clock] for run in reached.values()] for clock in CLOCKS}
    costs = [(cost_per_hour or 0) * value / 3600 for value in seconds["train"]]
    energies = [run["gpu_kwh"] for run in runs if run["gpu_kwh"] is not None]
    median_seed = entry_hours = None
    if reached:
        middle = median_high(seconds["train"])
        median_seed = next(n for n, run in reached.items() if run["seconds"]["train"] == middle)
        entry_hours = copy_entry(Path(reached[median_seed]["folder"]), output / "entry", target)
    return measured(summaries, command) | {
        "recipe": finished[-1].plan.to_dict()["recipe"],
        "data": summaries[-1]["dataset"],
        "device": summaries[-1]["device"],
        "target": target,
        "planned": planned,  # runs that were asked for
        "n": len(runs),  # that are finished
        "failed_seeds": failed_seeds,  # ended with an error, such as a loss that is not finite
        "reached": len(reached),
        "success_rate": len(reached) / (len(runs) + len(failed_seeds)),
        "clocks": CLOCKS,  # what each counts
        "seconds_to_target": {
            clock: interval(values) for clock, values in seconds.items() if values
        },
        "cost_per_hour": cost_per_hour,
        # Of the training clock to the target, as DAWNBench has it; null without a price.
        "cost_usd": interval(costs) if cost_per_hour is not None and costs else None,
        # Of the whole processes; null where NVML did not tell for every run.
        "gpu_kwh": interval(energies) if len(energies) == len(runs) else None,
        "median_seed": median_seed,  # whose entry it is; of two in the middle the slower run's
        "entry_hours": entry_hours,  # its result by the contest's rules
        "runs": runs,
    }


def seed_result(training: Training, target: Row) -> Row:
    """Return what one finished run gave, accuracies as fractions.

    `seconds` to the target, by each clock of CLOCKS, is None where it was missed; `gpu_kwh` is that
    of the whole process, None where it was not measured.
    """
    summary, energy = training.summary, training.folder / ENERGY
    compile_seconds = summary["time_split_seconds"]["compile"]
    goal = target["metric"], target["value"]
    return {
        "seed": training.seed,
        "folder": str(training.folder),
        **{name: summary[name] for name in ("epochs", "top1", "top5", "wall_seconds")},
        "seconds": clocks_at_target(training.epochs, *goal, compile_seconds),
        "gpu_kwh": read_object(energy)["gpu_kwh"] if energy.exists() else None,
    }


def copy_entry(run: Path, folder: Path, target: Row) -> float:
    """Copy the entry of a run that reached its target into `folder`, and check it.

    Returns its result in hours.
    """
    for stale in folder.glob("*.[jt]s*"):
        stale.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    copies = [Path(shutil.copy(path, folder)) for path in write_entry(run)]
    return result_hours(copies[0], copies[1], target["metric"], target["value"])


def table(result: Row) -> str:
    """Format as Markdown: how many reached the target, how long by each clock, what it cost."""
    metric, value, runs = result["target"]["metric"], result["target"]["value"], result["runs"]
    versions = result["versions"]
    times = [["time to target", "mean (95 % interval)", *(f"seed {run['seed']}" for run in runs)]]
    for clock, seconds in result["seconds_to_target"].items():
        own = [duration(run["seconds"][clock]) if run["seconds"] else "missed" for run in runs]
        times.append([clock, interval_text(seconds, duration, " (one run)"), *own])
    ends = [["seed", "epochs", "last top-1", "last top-5"]]
    for run in runs:
        accuracies = [percent(run["top1"]), percent(run["top5"])]
        ends.append([str(run["seed"]), str(run["epochs"]), *accuracies])
    notes = [f"- `{clock}`: {text}" for clock, text in CLOCKS.items()]
    notes += [f"- cost: {cost_text(result)}", f"- energy of the GPUs: {energy_text(result)}"]
    if result["entry_hours"] is not None:
        notes += [
            f"- DAWNBench entry of the median run, seed {result['median_seed']}: "
            f"{result['entry_hours']:.8f} hours, in `entry/`"
        ]
    return document(
        f"# {result['recipe']['name']} on {result['data']} to {metric.replace('top', 'top-')} of "
        f"{100 * value:g} %",
        f"{result['hardware']}; {result['precision']}; torch {versions['torch']}, "
        f"Python {versions['python']}; {result['date']}.",
        success_text(result),
        markdown(times) if result["reached"] else "",
        markdown(ends),
        "\n".join(notes),
    )


def success_text(result: Row) -> str:
    """Tell how many of how many reached the target."""
    text = f"{result['reached']} of {result['n']} finished runs reached the target"
    if failed := result["failed_seeds"]:
        text += f"; failed with an error: seed {', '.join(map(str, failed))}"
    missing = result["planned"] - result["n"] - len(failed)
    return text + (f"; {missing} not finished." if missing else ".")


def cost_text(result: Row) -> str:
    """Tell the cost in US dollars."""
    price = result["cost_per_hour"]
    if price is None:
        return "no --cost-per-hour was given"
    if result["cost_usd"] is None:
        return "no run reached the target"
    mean = interval_text(result["cost_usd"], "${:.4g}".format, " (one run)")
    return f"{mean} to the target by the training clock, at ${price:g} an hour"


def energy_text(result: Row) -> str:
    """Tell the energy in kWh."""
    if result["gpu_kwh"] is None:
        return "not measured"
    return interval_text(result["gpu_kwh"], "{:.4g} kWh".format, " (one run)") + " a run"


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
