"""What a plan leaves: the table, the picture, the data, and the recipe to train with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.planner import Candidate
from benchmarks.run_table import markdown
from fastimagenet.recipes import toml as recipe_toml
from fastimagenet.recipes.recipe import Recipe
from fastimagenet.report.figures import new_figure, with_legend, write_files
from fastimagenet.report.plots import TIME_COLOURS
from pipelines.errors import UserError
from pipelines.files import Row, read_object, write_object, write_text
from pipelines.formats import NO_BREAK, duration, percent, time_unit

UNQUIET = 0.1
"""Spread of the probed rates above which a prediction within 10 % is not to be had."""
NOT_MEASURED = (
    "All times and costs are predicted from the probe, not measured: processes and nodes are taken "
    "to scale perfectly, and to be like the device probed."
)


def write_results(result: Row, found: list[Candidate], folder: Path) -> None:
    """plan.json, table.md, plan.svg and .png, and recipe.toml: the first candidate."""
    rows = [
        asdict(each)
        | {
            "predicted_wall_seconds": each.wall_seconds,
            "predicted_train_seconds": each.train_seconds,
        }
        for each in found
    ]
    probe = result["probe"]
    # Names in a JSON object are text.
    rates = {str(size): rate for size, rate in probe["eval_images_per_sec"].items()}
    probe = probe | {"eval_images_per_sec": rates}
    write_object(folder / "plan.json", result | {"probe": probe, "predicted": rows})
    write_text(folder / "table.md", table(result, found))
    write_text(folder / "recipe.toml", recipe_toml.dumps(found[0].recipe))
    write_files(picture(found, result["minutes"]), folder, "plan")


def table(result: Row, found: list[Candidate]) -> str:
    """Markdown."""
    header = (
        *("predicted", "epochs", "sizes", "global batch", "updates", "train", "wall", "cost"),
        *("expected top-1", "top-5"),
    )
    rows = [row(each) for each in found]
    sources = dict.fromkeys(each.accuracy_source for each in found)
    known = any(each.accuracy for each in found)
    spread = max(rates["spread"] for rates in result["probe"]["train"])
    price = result["node_usd_per_hour"]
    machines = f"{result['nodes']} x {result['gpus_per_node']} processes"
    lines = [
        f"# {found[0].recipe.name} on {result['data']} within {result['minutes']:g} minutes: "
        "predicted",
        "",
        f"{machines} like the one probed: {result['hardware_probed']}; {result['precision']}; "
        f"torch {result['versions']['torch']}; {result['date']}"
        + ("." if price is None else f"; ${price:g} an hour and node."),
        "",
        markdown([header, *rows]),
        "",
        NOT_MEASURED,
        f"The probed training rates varied by up to {100 * spread:.0f} % from round to round"
        + (
            ": the machine was not quiet, and the prediction is as uncertain."
            if spread > UNQUIET
            else "."
        ),
        ("Accuracies are expected, not measured" if known else "No accuracy is expected")
        + f": {'; '.join(sources)}.",
    ]
    return "\n".join(lines).replace(NO_BREAK, " ") + "\n"


def row(each: Candidate) -> tuple[str, ...]:
    """The cells of one candidate."""
    recipe, accuracy = each.recipe, each.accuracy or {}
    return (
        each.name,
        str(recipe.epochs),
        ", ".join(f"{size} px x {epochs}" for size, epochs in epochs_by_size(recipe).items()),
        ", ".join(dict.fromkeys(f"{batch:,}" for batch in each.global_batches)),
        f"{each.steps:,}",
        duration(each.train_seconds),
        duration(each.wall_seconds),
        "-" if each.cost_usd is None else f"${each.cost_usd:,.2f}",
        percent(accuracy.get("top1"), 1),
        percent(accuracy.get("top5"), 1),
    )


def epochs_by_size(recipe: Recipe) -> dict[int, int]:
    """Variants of a recipe have phases of equal sizes, told as one."""
    sizes = dict.fromkeys((phase.image_size for phase in recipe.phases), 0)
    for phase in recipe.phases:
        sizes[phase.image_size] += phase.epochs
    return sizes


def picture(found: list[Candidate], minutes: float) -> Figure:
    """The predicted wall time of every candidate by its parts, and the budget."""
    unit, length = time_unit(60 * minutes)
    figure, (axes,) = new_figure(size=(6.6, 1.6 + 0.55 * len(found)))
    places, left = range(len(found)), [0.0] * len(found)
    for part, colour in TIME_COLOURS.items():
        values = [each.seconds.get(part, 0.0) / length for each in found]
        if any(values):
            label = part.replace("_", " ")
            axes.barh(places, values, 0.6, left, color=colour, label=label)
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.axvline(60 * minutes / length, color="#333333", linestyle="--", linewidth=1.2)
    axes.set_yticks(places, [in_picture(each) for each in found])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(xlabel=f"predicted wall time ({unit}); dashed: the budget")
    return with_legend(figure, ncols=3)


def in_picture(each: Candidate) -> str:
    """Name, epochs, and what is expected of them."""
    text = f"{each.name}\n{each.recipe.epochs} epochs"
    if each.accuracy:
        text += f", expected {percent(each.accuracy['top1'], 1)} top-1"
    return text.replace(NO_BREAK, " ")


def check(plan_dir: Path, run_dir: Path) -> str:
    """What the run of `plan_dir`/recipe.toml took, beside its prediction: check.json and a table.

    Raises UserError for a run of another recipe.
    """
    plan = read_object(plan_dir / "plan.json")
    if "predicted" not in plan:  # a run has a file of that name, too
        raise UserError(f"--output {plan_dir} holds no plan: name the folder of one")
    predicted = plan["predicted"][0]
    summary = read_object(run_dir / "summary.json")
    recipe = read_object(run_dir / "plan.json")["recipe"]
    wanted = predicted["recipe"]
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
    parts["train"] = predicted["predicted_train_seconds"], summary["train_seconds"]
    parts["wall"] = predicted["predicted_wall_seconds"], summary["wall_seconds"]
    rows = {
        part: {"predicted_seconds": ours, "measured_seconds": real, "error": error(ours, real)}
        for part, (ours, real) in parts.items()
    }
    about = {key: summary[key] for key in ("hardware", "versions", "started", "command")}
    write_object(plan_dir / "check.json", about | {"parts": rows})
    header = ("part", "predicted", "measured", "predicted / measured - 1")
    cells = [
        (part, f"{row['predicted_seconds']:.2f} s", f"{row['measured_seconds']:.2f} s",
         percent(row["error"], 1))
        for part, row in rows.items()
    ]  # fmt: skip
    return markdown([header, *cells])


def error(predicted: float, measured: float) -> float | None:
    """Relative to what was measured; None where that is nothing."""
    return predicted / measured - 1 if measured else None
