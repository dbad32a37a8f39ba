"""The published super-convergence study of CIFAR-10, run by run, and a comparison for a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fastimagenet.recipes.recipe import Phase, Recipe
from pipelines.datasets.known import CIFAR10_MEAN, CIFAR10_STD


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """What a run of the study set, and what it published."""

    max_lr: float
    epochs: int
    use_clr_beta: tuple[float, float, float, float]
    iterations: int
    top1: float
    """Of the validation images after the last epoch, a fraction; one training each."""


STUDY = {
    "1": StudyRun(
        max_lr=0.8, epochs=95, use_clr_beta=(10, 13.68, 0.95, 0.85), iterations=9310, top1=0.9353
    ),
    "2": StudyRun(
        max_lr=0.8, epochs=95, use_clr_beta=(10, 50, 0.95, 0.85), iterations=9310, top1=0.9258
    ),
    "3a": StudyRun(
        max_lr=3.0, epochs=50, use_clr_beta=(20, 10, 0.95, 0.85), iterations=4900, top1=0.9231
    ),
    "3b": StudyRun(
        max_lr=3.0, epochs=70, use_clr_beta=(20, 10, 0.95, 0.85), iterations=6860, top1=0.9308
    ),
    "4a": StudyRun(
        max_lr=0.8, epochs=95, use_clr_beta=(10, 13.68, 0.9, 0.9), iterations=9310, top1=0.9339
    ),
    "4b": StudyRun(
        max_lr=3.0, epochs=50, use_clr_beta=(20, 10, 0.9, 0.9), iterations=4900, top1=0.9225
    ),
}
"""Sylvain Gugger's experiments 1 to 4 of April 2018: the notebook "Cyclical LR and momentums" of
github.com/sgugger/Deep-Learning and the post sgugger.github.io/the-1cycle-policy.html. They follow
Smith and Topin (arXiv:1708.07120), who trained the same network for 64,000 iterations."""
BATCH_SIZE = 510
"""The study's 98 updates an epoch are 97 of 512 images and one of the 336 left over, 510.2 on
average. Our epochs hold whole batches only, and 50,000 images make 98 of 510."""
_SMALL = Recipe(
    name="cifar10-1cycle-cpu",
    model="smallnet",
    phases=(Phase(epochs=40, image_size=8, batch_size=128),),
    max_lr=2.0,
    use_clr_beta=(10, 15, 0.95, 0.85),
    weight_decay=1e-4,
    zero_init_last_gamma=False,
    precision="bf16",
    mean=CIFAR10_MEAN,
    std=CIFAR10_STD,
    reflect_pad=1,
    resize_ratio=1.0,
)
_STEPS = replace(
    _SMALL,
    name="cifar10-steps-cpu",
    phases=(replace(_SMALL.phases[0], epochs=80),),
    max_lr=0.1,
    schedule="piecewise",
    lr_spans=((0, 40, 1.0, 1.0), (40, 60, 0.1, 0.1), (60, 80, 0.01, 0.01)),
    momentum=0.9,
)
COMPARISON = {
    "1cycle": _SMALL,
    "steps": _STEPS,
    "steps-high": replace(_STEPS, name="cifar10-steps-high-cpu", max_lr=_SMALL.max_lr),
}
"""Schedules on a small scale, on few and small images, where a network overfits soon: 1cycle
against a constant LR, divided by 10 after half and after three quarters, that gets twice the
updates. "steps" has the LR, 0.1, and the momentum that ResNets were published with
(arXiv:1512.03385); "steps-high" is the control, 1cycle's own peak LR. All else is the same.
Smith and Topin (arXiv:1708.07120) found the advantage of a high LR to be greater there. Two CPU
cores, n = 2 (2026-11-23): 57.52 %, 56.38 % ("steps") and 56.40 % ("steps-high")."""
IMAGES_PER_CLASS = 1000
"""The comparison trains on the first of each class, by name."""


def study_recipe(run: str) -> Recipe:
    """Make the recipe of a run in `STUDY`: ResNet-56, SGD with weight decay on everything, fp32."""
    published = STUDY[run]
    return Recipe(
        name=f"cifar10-superconvergence-{run}",
        model="resnet56",
        phases=(Phase(epochs=published.epochs, image_size=32, batch_size=BATCH_SIZE),),
        max_lr=published.max_lr,
        use_clr_beta=published.use_clr_beta,
        weight_decay=1e-4,
        decay_bn_and_bias=True,
        zero_init_last_gamma=False,
        precision="fp32",
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        reflect_pad=4,
        resize_ratio=1.0,
        target="top1=0.94",
    )


def cifar10_superconvergence(nodes: int = 1) -> Recipe:
    """Run 3b of the 2018 super-convergence study in batches of 512: ResNet-56, 70 epochs.

    Of 50,000 images that is 6,790 updates; cifar10-superconvergence-3b makes the study's 6,860.
    Published: 93.08 % on the original pixels. Not yet measured here.
    """
    phases = (Phase(epochs=70, image_size=32, batch_size=512),)
    return replace(study_recipe("3b"), name="cifar10-superconvergence", phases=phases)


def _listed(recipe: Recipe, citation: str) -> Callable[[int], Recipe]:
    def make(nodes: int = 1) -> Recipe:
        return recipe

    make.__doc__ = citation
    return make


def _study_citation(run: str) -> str:
    """Write the docstring of a recipe of the study."""
    published = STUDY[run]
    return f"""Run {run} of the super-convergence study: peak LR {published.max_lr:g}, \
{published.epochs} epochs, {published.use_clr_beta}.

    python -m benchmarks.superconvergence --data CIFAR10 --only {run}.
    Published: {100 * published.top1:.2f} % on the original pixels. Not yet measured here.
    """


RECIPES: dict[str, Callable[[int], Recipe]] = {
    "cifar10-superconvergence": cifar10_superconvergence,
    **{study_recipe(run).name: _listed(study_recipe(run), _study_citation(run)) for run in STUDY},
    "cifar10-1cycle-cpu": _listed(
        COMPARISON["1cycle"], "1cycle on two CPU cores, with half the updates of cifar10-steps-cpu."
    ),
    "cifar10-steps-cpu": _listed(
        COMPARISON["steps"], "Step decay from LR 0.1 on two CPU cores, against cifar10-1cycle-cpu."
    ),
    "cifar10-steps-high-cpu": _listed(
        COMPARISON["steps-high"], "Step decay from the peak LR of cifar10-1cycle-cpu, its control."
    ),
}
"""As the recipe book lists them."""
RUNS = {run: study_recipe(run) for run in STUDY} | COMPARISON
"""Both groups by the names that `python -m benchmarks.superconvergence --only` takes."""
