"""From measured rates to a predicted time, and to the epochs that fit a budget. Arithmetic only.

Everything here is predicted. The parts of a run are those of `time_split_seconds` in summary.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log

from benchmarks.common.published import published
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Recipe
from fastimagenet.recipes.superconvergence import STUDY
from pipelines.errors import UserError

MIN_STEPS = 8
"""An epoch has at least so many steps; the batch is halved until it has."""
MAX_EPOCHS = 1000


@dataclass(frozen=True, kw_only=True)
class SizeRates:
    """Medians over the rounds, of one process on one device, in images per second."""

    image_size: int
    batch_size: int
    loader: float
    model: float
    both: float
    data_wait_share: float
    """Of the time of both together."""
    spread: float
    """(highest - lowest) / median of both: how unquiet the machine was."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured on this machine."""

    num_train: int
    num_val: int
    start_up_seconds: float
    """From the start of the command to loaders and model."""
    first_batch_seconds: float
    """Of a new training loader and a new validation loader together."""
    compile_seconds: float
    """Of all sizes."""
    checkpoint_seconds: float
    """That an epoch's end waits for its checkpoint."""
    last_checkpoint_seconds: float
    """That the run's end waits for its last one to be on the disk."""
    train: list[SizeRates]
    eval_images_per_sec: dict[int, float]
    """By eval_size, of one process."""
    tta_images_per_sec: float
    """With the recipe's TTA, at its last eval_size."""

    def rates(self, image_size: int, batch_size: int) -> SizeRates:
        """Return the rates measured at this size, with the nearest batch."""
        at_size = (rates for rates in self.train if rates.image_size == image_size)
        return min(at_size, key=lambda rates: abs(rates.batch_size - batch_size))


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe with what it is predicted to take."""

    name: str
    recipe: Recipe
    steps: int
    global_batches: list[int]
    seconds: dict[str, float]
    """Predicted, by part."""
    cost_usd: float | None
    """Predicted, of the wall time on all nodes; None without a price."""
    accuracy: dict[str, float] | None
    """Expected from published figures, as fractions by "top1" and "top5"; None: none apply."""
    accuracy_source: str

    @property
    def wall_seconds(self) -> float:
        """Predicted."""
        return sum(self.seconds.values())

    @property
    def train_seconds(self) -> float:
        """Predicted, by the training clock."""
        outside = ("compile", "evaluation", "checkpoint")
        return sum(value for part, value in self.seconds.items() if part not in outside)


def predict(plan: Plan, probe: Probe) -> dict[str, float]:
    """Predict the seconds by part of the run. Processes are taken to scale perfectly: what they
    would wait for each other is not in it."""
    world, recipe = plan.world_size, plan.recipe
    seconds = {
        "start_up": probe.start_up_seconds,
        "compile": probe.compile_seconds if recipe.compile else 0.0,
        "data_wait": probe.first_batch_seconds,
        "compute": 0.0,
        "evaluation": 0.0,
        "checkpoint": plan.epochs * probe.checkpoint_seconds + probe.last_checkpoint_seconds,
    }
    for planned in plan.phases:
        images = planned.epochs * planned.steps_per_epoch * planned.batch_size
        rates = probe.rates(planned.image_size, planned.batch_size)
        seconds["compute"] += images / rates.both * (1 - rates.data_wait_share)
        seconds["data_wait"] += images / rates.both * rates.data_wait_share
    for epoch in range(plan.epochs):
        if plan.evaluates(epoch):
            planned = plan.phase_of_epoch(epoch)
            rate = probe.eval_images_per_sec[planned.eval_size]
            last = epoch + 1 == plan.epochs
            if last and planned.rect:  # once more, on squares
                seconds["evaluation"] += probe.num_val / world / rate
            rate = probe.tta_images_per_sec if last and recipe.tta != "none" else rate
            seconds["evaluation"] += probe.num_val / world / rate
    return seconds


def with_fitting_batch(recipe: Recipe, world_size: int, num_train: int) -> Recipe:
    """Halve the recipe's batches until an epoch has MIN_STEPS steps. The LR goes down in
    proportion, here or, where the recipe has a lr_reference_batch, in the plan."""
    factor, batches = 1, [phase.batch_size for phase in recipe.phases]
    while any(
        num_train // (batch // factor * world_size) < MIN_STEPS
        for batch in batches
        if batch // factor > 1
    ):
        factor *= 2
    phases = tuple(
        replace(phase, batch_size=max(1, phase.batch_size // factor)) for phase in recipe.phases
    )
    lr = recipe.max_lr if recipe.lr_reference_batch else recipe.max_lr / factor
    return replace(recipe, phases=phases, max_lr=lr)


def sizes_of(recipe: Recipe) -> dict[str, Recipe]:
    """Return the recipe, and variants that take only sizes it has."""
    sizes = sorted({phase.image_size for phase in recipe.phases})
    if len(sizes) == 1:
        return {"recipe": recipe}
    evaluated = {phase.image_size: phase.eval_size for phase in recipe.phases}

    def at(size_of: Mapping[int, int]) -> Recipe:
        phases = tuple(
            replace(phase, image_size=size, eval_size=evaluated[size])
            for phase in recipe.phases
            for size in (size_of[phase.image_size],)
        )
        return replace(recipe, phases=phases)

    smaller = {size: min(size, sizes[-2]) for size in sizes}
    return {
        "recipe": recipe,
        f"up to {sizes[-2]} px": at(smaller),
        f"{sizes[-1]} px throughout": at(dict.fromkeys(sizes, sizes[-1])),
    }


def longest_within(
    recipe: Recipe, probe: Probe, world_size: int, budget_seconds: float
) -> Recipe | None:
    """Stretch the recipe to the most epochs whose predicted wall time is within the budget;
    None: not even one epoch is."""
    best = None
    for epochs in range(1, MAX_EPOCHS + 1):
        made = recipe.stretched(epochs)
        seconds = predict(Plan.of(made, world_size, probe.num_train), probe)
        if sum(seconds.values()) <= budget_seconds:
            best = made
        # Phase boundaries are rounded, so one more epoch can take less: look a little further.
        elif epochs > (best.epochs if best else 0) + len(recipe.phases):
            break
    return best


def candidates(
    recipe: Recipe,
    probe: Probe,
    *,
    dataset: str | None,
    nodes: int,
    world_size: int,
    budget_seconds: float,
    node_price: float | None,
) -> list[Candidate]:
    """List the choices: the recipe and its variants within the budget; then, beyond it or not,
    the recipe over its own epochs and over those that published tables give for its target.

    `node_price` in US dollars an hour of one node. Raises UserError where not one epoch fits.
    """

    def candidate(name: str, made: Recipe) -> Candidate:
        plan = Plan.of(made, world_size, probe.num_train)
        seconds = predict(plan, probe)
        accuracy, source = expected_accuracy(made.model, dataset, made.epochs)
        hours = sum(seconds.values()) / 3600
        return Candidate(
            name=name,
            recipe=made,
            steps=plan.total_steps,
            global_batches=[planned.global_batch for planned in plan.phases],
            seconds=seconds,
            cost_usd=None if node_price is None else hours * nodes * node_price,
            accuracy=accuracy,
            accuracy_source=source,
        )

    found: list[Candidate] = []
    for name, variant in sizes_of(recipe).items():
        made = longest_within(variant, probe, world_size, budget_seconds)
        if made is not None and made not in [each.recipe for each in found]:
            found.append(candidate(name, made))
        elif made is None and name == "recipe":
            one = candidate(name, variant.stretched(1))
            raise UserError(
                f"--minutes {budget_seconds / 60:g}: one epoch of {recipe.name} is predicted to "
                f"take {one.wall_seconds / 60:.3g} minutes; give more minutes or nodes"
            )
    others = {"own epochs": recipe.epochs}
    if recipe.target_metric:
        needed = epochs_for(recipe.model, dataset, *recipe.target_metric)
        others |= {} if needed is None else {"epochs to target": needed}
    for name, epochs in others.items():
        if epochs not in [each.recipe.epochs for each in found[:1]]:
            found.append(candidate(name, recipe.stretched(epochs)))
    return found


def expected_accuracy(
    model: str, dataset: str | None, epochs: float
) -> tuple[dict[str, float] | None, str]:
    """Return accuracies that were published for this network after so many epochs, and by whom.

    Between two published figures it is interpolated linearly in the logarithm of the epochs;
    outside of them, and for other networks, there is none.
    """
    table, source = accuracy_table(model, dataset)
    if not table:
        return None, "no published table for this network on these data"
    known = sorted(table)
    if not known[0] <= epochs <= known[-1]:
        return None, f"{source} has {known[0]} to {known[-1]} epochs only"
    high = next(count for count in known if count >= epochs)
    low = max(count for count in known if count <= epochs)
    share = 0.0 if low == high else log(epochs / low) / log(high / low)
    values = {
        metric: value + share * (table[high][metric] - value)
        for metric, value in table[low].items()
    }
    return values, source


def epochs_for(model: str, dataset: str | None, metric: str, value: float) -> int | None:
    """Return the fewest epochs for which `expected_accuracy` gives the target; None: none do."""
    table, _ = accuracy_table(model, dataset)
    for epochs in range(min(table, default=1), max(table, default=0) + 1):
        accuracy, _ = expected_accuracy(model, dataset, epochs)
        if accuracy is not None and accuracy.get(metric, 0) >= value:
            return epochs
    return None


def accuracy_table(model: str, dataset: str | None) -> tuple[dict[int, dict[str, float]], str]:
    """Return the accuracies by epochs, and the source."""
    if (model, dataset) == ("resnet50", "ImageNet"):
        entries = [e for e in published({"ImageNet"}, "top1") if e.name == "ffcv-imagenet"]
        rows = {
            entry.epochs: {"top1": entry.top1, "top5": entry.top5}
            for entry in entries
            if entry.epochs and entry.top1 and entry.top5
        }
        return rows, "ffcv-imagenet's table (image sizes of its own)"
    if (model, dataset) == ("resnet56", "CIFAR10"):
        runs = (STUDY[run] for run in ("3a", "3b", "1"))
        return {run.epochs: {"top1": run.top1} for run in runs}, "the super-convergence study"
    return {}, ""
