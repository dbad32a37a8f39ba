"""`Recipe` and its `Phase`s: what a run is, as a frozen value that checks itself.

A recipe is data: `plan.py` derives steps and rates from it, `toml.py` reads and writes it, and the
modules of this package named after data sets hold the named ones.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from fastimagenet.recipes import schedule
from pipelines.errors import UserError, nearest
from pipelines.loader import AUTO_AUGMENT, MAGNITUDES, Stage, Transforms

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
"""torchvision's; they alone have `blur_pool` and `small_stem`."""
MODELS = (*RESNETS, "resnet56", "smallnet", "speednet")
TIMM = "timm:"
"""A model of this prefix is one of timm's networks, an extra."""
OPTIONS = {
    "blur_pool": RESNETS,
    "small_stem": RESNETS,
    "resnet_d": RESNETS,
    "silu": RESNETS,
    "whitening": ("speednet",),
    "dirac_init": ("smallnet", "speednet"),
}
"""The recipe's fields that only some networks have."""
TTA = ("none", "flip", "flip+crop")
"""Test-time augmentation: over which views of an image the prediction is averaged."""


def require(condition: bool, field: str, rule: str, value: object) -> None:
    """Raise UserError naming the recipe field unless the condition holds."""
    if not condition:
        raise UserError(f"recipe field {field} must be {rule}, not {value!r}")


def settle_floats(settings: Recipe | Phase, prefix: str = "") -> None:
    """Convert whole numbers in float fields to floats, so that a recipe is written in one way.

    Raises UserError naming the field that holds NaN or infinity.
    """
    for field in fields(settings):
        if "float" in str(field.type):
            value = getattr(settings, field.name)
            require(_all_finite(value), prefix + field.name, "finite", value)
            object.__setattr__(settings, field.name, _as_floats(value))


def _all_finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_all_finite, value))
    return bool(abs(value) <= sys.float_info.max)  # false for NaN, and no overflow for huge ints


def _as_floats(value: Any) -> Any:
    return tuple(map(_as_floats, value)) if isinstance(value, list | tuple) else float(value)


@dataclass(frozen=True, kw_only=True)
class Phase(Stage):
    """Consecutive epochs at one image size and batch size. Raises UserError naming the field."""

    eval_size: int = 0
    """Size at which this phase is evaluated; 0 means image_size."""

    def __post_init__(self) -> None:
        settle_floats(self, "phases.")
        require(self.epochs >= 1, "phases.epochs", "at least 1", self.epochs)
        require(self.image_size >= 8, "phases.image_size", "at least 8 pixels", self.image_size)
        require(self.batch_size >= 1, "phases.batch_size", "at least 1", self.batch_size)
        require(0 < self.min_scale <= 1, "phases.min_scale", "in (0, 1]", self.min_scale)
        valid = self.eval_size == 0 or self.eval_size >= 8
        require(valid, "phases.eval_size", "0 or at least 8 pixels", self.eval_size)
        require(bool(self.data), "phases.data", 'a copy, "original" or "auto"', self.data)


SCHEDULES = ("use_clr_beta", "one_cycle", "piecewise")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
METRICS = ("top1", "top5")
TOP = 5
"""The classes of top-5. With no more than these a network always finds the right one among them."""
OPTIMIZERS = ("sgd", "adamw", "muon")
MANY_STEPS = 10**18
"""With so many a schedule can only be wrong in itself."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Transforms):
    """A whole training run but for the data, the machine and the seed.

    Variants are made by `dataclasses.replace`. Raises UserError naming the field.
    """

    name: str
    phases: tuple[Phase, ...]
    model: str = "resnet50"
    """One of MODELS, or "timm:NAME", whose mean and std hold unless others are given."""
    pretrained: str = ""
    """The weights that the training starts from: "imagenet", the name of weights of torchvision's,
    such as "IMAGENET1K_V1", or a file (.pt, .pth, .safetensors). Empty: drawn at random."""
    layer_lrs: tuple[float, ...] = ()
    """The LR of each layer group in multiples of max_lr, stem to head, such as [0.01, 0.1, 1.0]:
    see `parts.layer_groups`. Empty: the same for all."""
    frozen_epochs: int = 0
    """For so many epochs only the last layer group learns; without `layer_lrs` that is the head.
    BN runs as in training all the while: its statistics go on following the images."""

    max_lr: float = 1.0
    """Peak learning rate; the schedules scale with it."""
    lr_reference_batch: int = 0
    """Global batch that max_lr is meant for: the LR is scaled by global batch / this, phase by
    phase. 0 takes max_lr as it is."""
    schedule: str = "use_clr_beta"
    """Which of the three fields below holds."""
    use_clr_beta: tuple[float, ...] = (10.0, 10.0, 0.95, 0.85)
    """(div, pct[, max_mom, min_mom]): triangular 1cycle; pct in per cent; see schedule.py."""
    one_cycle: tuple[float, float, float, float, float] = (0.3, 25.0, 1e4, 0.95, 0.85)
    """(pct_start, div_factor, final_div_factor, max_momentum, base_momentum): cosine 1cycle."""
    lr_spans: tuple[tuple[float, float, float, float], ...] = ()
    """(first epoch, last epoch, start, end) for schedule "piecewise", in multiples of max_lr."""

    optimizer: str = "sgd"
    """"adamw": Loshchilov and Hutter (arXiv:1711.05101), whose beta1 follows the momentum. "muon"
    updates the filters of convolutions by Muon, all else by SGD: see `optimizer.Muon`."""
    muon: tuple[float, float] = (0.15, 0.6)
    """(LR in multiples of max_lr, momentum) of what Muon updates. In airbench94_muon, at a batch of
    2,000: 0.24 beside 1.656 for the head, counted for a mean loss and logits over 9; and 0.6."""
    bias_lr_factor: float = 1.0
    """The LR of BN's biases, and of a whitening layer's, in multiples of all others'; 64 in
    airbench94 (arXiv:2404.00498)."""
    momentum: float = 0.9
    """Where the schedule does not cycle it."""
    nesterov: bool = False
    """Nesterov's form of the momentum, of SGD and of Muon."""
    weight_decay: float = 5e-5
    """A part of the gradient with SGD, in multiples of the LR taken off the weights with AdamW.
    What Muon updates does not decay."""
    decay_bn_and_bias: bool = False
    """Whether BN's weights, and all biases, decay as well."""
    clip_grad_norm: float = 0.0
    """Above 0: scale the gradients of an update down to at most this norm, of all together."""
    class_weight_power: float = 0.0
    """Above 0: weigh the training loss of a class by (images / (classes x images of the class)) to
    this power; 1 is scikit-learn's "balanced". The sum of a batch is divided by its images."""
    label_smoothing: float = 0.0
    """The part of the target that is spread evenly over all classes (Szegedy et al. 2015,
    arXiv:1512.00567)."""
    ema_decay: float = 0.0
    """Evaluate an exponential moving average of the weights; 0 is off. The decay grows up to this:
    after n updates it is (1 + n) / (10 + n)."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    compile: bool = False
    """torch.compile the training step; every size is warmed up before the clock starts."""
    cuda_graphs: bool = False
    """With compile, on GPUs: replay forward and backward pass as one CUDA graph each per size, so
    that no kernel waits for its launch."""
    bf16_gradients: bool = False
    """Compress gradients to bf16 for the all-reduce between processes."""
    sync_bn: bool = False
    """BN statistics of the batches of all processes, on GPUs; otherwise each has its own."""

    zero_init_last_gamma: bool = True
    """The last BN weight of every residual block starts at 0, so that each block starts as its
    shortcut (Goyal et al. 2017, arXiv:1706.02677)."""
    blur_pool: bool = False
    """ResNet-18 to 152: low-pass filters where the image shrinks, see `resnet.add_blur`."""
    small_stem: bool = False
    """ResNet-18 to 152: 3x3 stride-1 stem without max-pool, for images up to 64 px."""
    resnet_d: bool = False
    """ResNet-18 to 152: three 3x3 convolutions as the stem, shortcuts that average: see
    `resnet.use_resnet_d`."""
    silu: bool = False
    """ResNet-18 to 152: SiLU in place of ReLU."""
    whitening: bool = False
    """speednet: the first filters whiten patches of the training images: `WhiteningConv2d`."""
    whitening_bias_epochs: int = 3
    """The bias of a whitening layer learns for so many epochs, then it is frozen, too."""
    dirac_init: bool = False
    """smallnet, speednet: convolutions start by handing on their input: `speednet.use_dirac`."""

    tta: str = "none"
    """Test-time augmentation of the last evaluation, reported beside the plain figure."""
    eval_every_epochs: int = 1
    """The last epoch is always evaluated."""
    target: str = ""
    """Such as "top1=0.94": the mark that time to target is measured to."""

    def __post_init__(self) -> None:
        settle_floats(self)
        self._check_choices()
        self._check_numbers()
        self._check_schedules()
        if self.target:
            metric, _, value = self.target.partition("=")
            valid = metric in METRICS and _is_fraction(value)
            require(valid, "target", 'such as "top1=0.94" or "top5=0.93"', self.target)

    def _check_choices(self) -> None:
        choices = {
            "schedule": SCHEDULES,
            "precision": PRECISIONS,
            "tta": TTA,
            "auto_augment": AUTO_AUGMENT,
            "optimizer": OPTIMIZERS,
        }
        if not self.model.startswith(TIMM):
            choices["model"] = MODELS
        for field, names in choices.items():
            value = getattr(self, field)
            near = None if value in names else nearest(value, names)
            rule = f"one of {', '.join(names)}" + (f" (perhaps {near})" if near else "")
            require(value in names, field, rule, value)
        require(bool(self.phases), "phases", "at least one phase", self.phases)
        if self.schedule == "piecewise":
            epochs = sum(phase.epochs for phase in self.phases)
            reach = self.lr_spans[-1][1] if self.lr_spans else 0
            rule = f"spans that end with the last epoch, {epochs}"
            require(reach == epochs, "lr_spans", rule, self.lr_spans)
        valid = self.compile or not self.cuda_graphs
        require(valid, "cuda_graphs", "false where compile is false", self.cuda_graphs)
        for field, models in OPTIONS.items():
            valid = self.model in models or not getattr(self, field)
            require(valid, field, f"false for model {self.model}", True)
        valid = not (self.small_stem and self.resnet_d)
        require(valid, "resnet_d", "false where small_stem is true: each is a stem", True)
        valid = self.mirror or not self.alternating_flip
        require(valid, "alternating_flip", "false where mirror is false", True)

    def _check_numbers(self) -> None:
        for field in ("max_lr", "bias_lr_factor"):
            require(getattr(self, field) > 0, field, "above 0", getattr(self, field))
        factor, momentum = self.muon
        valid = factor > 0 and 0 <= momentum < 1
        require(valid, "muon", "[LR factor above 0, momentum in [0, 1)]", self.muon)
        epochs = self.whitening_bias_epochs
        require(epochs >= 0, "whitening_bias_epochs", "0 or more", epochs)
        for field in ("momentum", "ema_decay", "label_smoothing"):
            require(0 <= getattr(self, field) < 1, field, "in [0, 1)", getattr(self, field))
        for field in ("weight_decay", "mixup", "cutmix", "lr_reference_batch", "reflect_pad"):
            require(getattr(self, field) >= 0, field, "0 or more", getattr(self, field))
        for field in ("color_jitter", "random_erasing"):
            require(0 <= getattr(self, field) <= 1, field, "in [0, 1]", getattr(self, field))
        num_ops, magnitude = self.rand_augment
        valid = num_ops >= 1 and 0 <= magnitude < MAGNITUDES
        rule = f"[1 or more operations, magnitude 0 to {MAGNITUDES - 1}]"
        require(valid, "rand_augment", rule, self.rand_augment)
        require(1 <= self.resize_ratio <= 4, "resize_ratio", "from 1 to 4", self.resize_ratio)
        require(min(self.std) > 0, "std", "above 0 for every channel", self.std)
        low, high = self.aspect_ratio
        require(0 < low <= high, "aspect_ratio", "(low, high) above 0", self.aspect_ratio)
        for field in ("clip_grad_norm", "class_weight_power"):
            require(getattr(self, field) >= 0, field, "0 or more", getattr(self, field))
        valid = len(self.layer_lrs) != 1 and all(factor > 0 for factor in self.layer_lrs)
        require(valid, "layer_lrs", "two or more values above 0, or none", list(self.layer_lrs))
        frozen = self.frozen_epochs
        valid = 0 <= frozen <= self.epochs
        require(valid, "frozen_epochs", f"from 0 to the {self.epochs} epochs", frozen)
        rule = "0 where nothing is pretrained (of photos, photos-scratch is that)"
        require(not frozen or bool(self.pretrained), "frozen_epochs", rule, frozen)
        every = self.eval_every_epochs
        require(every >= 1, "eval_every_epochs", "at least 1", every)
        smallest = min(phase.image_size for phase in self.phases)
        require(self.reflect_pad < smallest, "reflect_pad", "below image_size", self.reflect_pad)

    def _check_schedules(self) -> None:
        """Check all schedules, unused ones too; too few steps are for the plan to find."""
        try:
            schedule.use_clr_beta(MANY_STEPS, self.max_lr, *self.use_clr_beta)
            schedule.one_cycle(MANY_STEPS, self.max_lr, *self.one_cycle)
            if self.lr_spans:
                schedule.PiecewiseLinear(self.lr_spans)
        except ValueError as error:
            raise UserError(f"recipe field {error}") from None

    @property
    def epochs(self) -> int:
        """Epochs of all phases together."""
        return sum(phase.epochs for phase in self.phases)

    @property
    def num_layer_groups(self) -> int:
        """Layer groups that learn at rates of their own; 1 where all are alike."""
        return len(self.layer_lrs) or (2 if self.frozen_epochs else 1)

    def layer_factors(self, epoch: float) -> tuple[float, ...]:
        """Return the LR of each layer group during `epoch` (from 0), in multiples of the plan's."""
        factors = self.layer_lrs or (1.0,) * self.num_layer_groups
        if epoch >= self.frozen_epochs:
            return factors
        return (*(0.0 for _ in factors[1:]), factors[-1])

    @property
    def target_metric(self) -> tuple[str, float] | None:
        """Metric, "top1" or "top5", and fraction to reach; None without a target."""
        if not self.target:
            return None
        metric, _, value = self.target.partition("=")
        return metric, float(value)

    def reached_by(self, accuracies: Mapping[str, float | None]) -> bool:
        """Tell whether these fractions, by metric, reach the target; False without one."""
        if self.target_metric is None:
            return False
        metric, mark = self.target_metric
        value = accuracies.get(metric)
        return value is not None and value >= mark

    def stretched(self, epochs: int) -> Recipe:
        """Stretch phases and schedule together to another number of epochs.

        Phase boundaries move in proportion and are rounded to whole epochs; a phase that is left
        without an epoch drops out. Raises UserError for less than one epoch.
        """
        if epochs < 1:
            raise UserError(f"--epochs must be at least 1, not {epochs}")
        factor = epochs / self.epochs
        phases, end = [], 0
        for phase in self.phases:
            first, end = end, end + phase.epochs
            length = round(end * factor) - round(first * factor)
            if length:
                phases.append(replace(phase, epochs=length))
        spans = [(a * factor, b * factor, start, end) for a, b, start, end in self.lr_spans]
        if self.schedule == "piecewise":
            spans[-1] = (spans[-1][0], float(epochs), *spans[-1][2:])
        frozen = self.frozen_epochs
        if frozen < self.epochs:
            frozen = min(frozen, epochs - 1)
        return replace(
            self, phases=tuple(phases), lr_spans=tuple(spans), frozen_epochs=min(frozen, epochs)
        )


def _is_fraction(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False
