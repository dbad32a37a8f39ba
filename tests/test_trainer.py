"""The training loop against a plain loop by hand, and what stops it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastimagenet.errors import Stopped
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Phase, Recipe
from fastimagenet.training import checkpoint
from fastimagenet.training.clock import Stopwatch
from fastimagenet.training.evaluation import Counts
from fastimagenet.training.failures import LossMonitor, out_of_memory_advice
from fastimagenet.training.trainer import Trainer
from pipelines.backends import make_loader
from pipelines.datasets.images import whole_files
from pipelines.datasets.split import Split, read_split
from pipelines.errors import UserError
from pipelines.loader import Loader, LoaderSpec

RECIPE = Recipe(
    name="test",
    model="smallnet",
    phases=(
        Phase(epochs=2, image_size=8, batch_size=16, eval_size=16),
        Phase(epochs=1, image_size=16, batch_size=8),
    ),
    max_lr=0.1,
    label_smoothing=0.1,
    weight_decay=1e-3,
    nesterov=True,
)
SPLIT = Split(whole_files([""]) * 50, [index % 7 for index in range(50)], tuple("abcdefg"))

PLAN = Plan.of(RECIPE, 1, len(SPLIT))


def tiny_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 7),
    )


def loaders(recipe: Recipe, backend: str, train: Split, val: Split) -> tuple[Loader, Loader]:
    """Those of training and validation."""
    plan = Plan.of(recipe, 1, len(train))

    def make(training: bool) -> Loader:
        return make_loader(
            backend,
            LoaderSpec(
                split=train if training else val,
                stages=plan.phases if training else plan.eval_stages(),
                training=training,
                seed=3,
            ),
        )

    return make(True), make(False)


def make_trainer(
    recipe: Recipe = RECIPE, model: nn.Module | None = None, folder: Path | None = None
) -> Trainer:
    return Trainer(
        Plan.of(recipe, 1, len(SPLIT)),
        model or tiny_model(),
        *loaders(recipe, "synthetic", SPLIT, SPLIT),
        folder=folder,
    )


def test_it_does_what_a_plain_loop_does() -> None:
    plan = Plan.of(RECIPE, 1, len(SPLIT))
    reference = tiny_model().to(memory_format=torch.channels_last)
    decayed = [p for p in reference.parameters() if p.ndim > 1]
    others = [p for p in reference.parameters() if p.ndim <= 1]
    average = copy.deepcopy(reference)
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 1e-3}, {"params": others}], lr=1.0, momentum=0.9
    )
    loader, _ = loaders(RECIPE, "synthetic", SPLIT, SPLIT)
    for step, (images, labels) in enumerate(b for _ in range(3) for b in loader):
        for group in optimizer.param_groups:
            group.update(lr=plan.lr(step), momentum=plan.momentum(step), nesterov=True)
        nn.functional.cross_entropy(reference(images), labels, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for old, new in zip(average.parameters(), reference.parameters(), strict=True):
                decay = (1 + step) / (10 + step)  # below 0.9 up to the 81st update
                old.copy_(new if step == 0 else decay * old + (1 - decay) * new)
    loader.close()

    trainer = make_trainer(replace(RECIPE, ema_decay=0.9))
    trainer.fit()
    assert trainer.step == step + 1 == 2 * 3 + 6
    for ours, theirs in zip(trainer.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    pairs = zip(trainer.evaluated_model.parameters(), average.parameters(), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bf16_stays_near_fp32() -> None:
    plain, mixed = make_trainer(), make_trainer(replace(RECIPE, precision="bf16"))
    plain.fit()
    mixed.fit()
    for one, two in zip(plain.records, mixed.records, strict=True):
        assert two.train_loss == pytest.approx(one.train_loss, rel=0.02)
        assert two.train_loss != one.train_loss


def test_fp16_on_a_cpu_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="--precision fp16 needs a GPU"):
        make_trainer(replace(RECIPE, precision="fp16"))


class Diverging(nn.Module):
    """Gives NaN from a call on."""

    def __init__(self, from_call: int) -> None:
        super().__init__()
        self.inner, self.calls, self.from_call = tiny_model(), 0, from_call

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.inner(images)
        return logits * math.nan if self.calls > self.from_call else logits


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_lr() -> None:
    trainer = make_trainer(model=Diverging(2))
    lr = f"{trainer.plan.lr(2):.4g}"
    with pytest.raises(UserError, match=rf"not finite at step 2, lr {lr}: .*--set max_lr=0\.05"):
        trainer.fit()


def test_the_loss_scaler_gets_its_chance() -> None:
    plan, bad, good = Plan.of(RECIPE, 1, 50), torch.tensor(math.inf), torch.tensor(1.0)
    watch = LossMonitor(torch.device("cpu"), patience_steps=3)
    for step, loss in enumerate([bad, bad, good, bad, bad]):
        watch.update(loss, step)
    assert watch.read(good, plan) == 1.0
    watch.update(bad, 5)
    watch.update(good, 6)
    with pytest.raises(UserError, match="step 5"):
        watch.read(good, plan)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
    ],
)
def test_out_of_memory_says_what_was_tried_and_what_to_set(error: RuntimeError) -> None:
    advice = r"batch_size 8 at 16 px: --set phases\.1\.batch_size=4"
    with pytest.raises(UserError, match=advice), out_of_memory_advice(PLAN.phases[1], 16):
        raise error


def test_other_errors_are_no_matter_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_advice(PLAN.phases[1], 16):
        raise RuntimeError("shapes do not match")


def test_compiling_leaves_the_model_as_it_was() -> None:
    trainer = make_trainer()
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.compile_all_sizes()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert trainer.clock.read()["compile"] > 0


@pytest.mark.parametrize("beforehand", [True, False])
def test_fit_compiles_what_is_not_compiled_yet(
    monkeypatch: pytest.MonkeyPatch, beforehand: bool
) -> None:
    # The commands compile before they listen for signals; a Trainer of one's own may not.
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    trainer = make_trainer(replace(RECIPE, compile=True))
    if beforehand:
        trainer.compile_all_sizes()
    seconds = trainer.clock.read().get("compile", 0.0)
    assert (seconds > 0) is beforehand
    trainer.fit()
    assert (trainer.clock.read()["compile"] == seconds) is beforehand


class Killed(Exception):
    """Ends a training in the middle of an update."""


@pytest.fixture(scope="module")
def make_cifar10_trainer(cifar10: Path) -> Callable[..., Trainer]:
    """Two phases over 500 images of CIFAR-10; the second begins at step 16."""
    recipe = replace(
        RECIPE,
        phases=(
            Phase(epochs=2, image_size=16, batch_size=60, eval_size=24),
            Phase(epochs=1, image_size=24, batch_size=50),
        ),
        ema_decay=0.9,
    )
    train, val = read_split(cifar10, "train"), read_split(cifar10, "val")

    def make(backend: str, folder: Path, checkpoint_steps: int = 0) -> Trainer:
        model = tiny_model()
        model[-1] = nn.Linear(8, 10)  # type: ignore[operator]
        return Trainer(
            Plan.of(recipe, 1, len(train)),
            model,
            *loaders(recipe, backend, train, val),
            folder=folder,
            checkpoint_steps=checkpoint_steps,
        )

    return make


@pytest.fixture(scope="module")
def undisturbed_run(
    make_cifar10_trainer: Callable[..., Trainer], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Trainer]:
    """The run over a back end that nothing has disturbed; made once for each."""

    @cache
    def run(backend: str) -> Trainer:
        torch.manual_seed(5)
        trainer = make_cifar10_trainer(backend, tmp_path_factory.mktemp("whole"))
        trainer.fit()
        return trainer

    return run


def check_the_rest(whole: Trainer, resumed: Trainer, folder: Path) -> None:
    """Resume from the checkpoint in the folder, to the weights and figures of `whole`."""
    resumed.load_state_dict(checkpoint.load(folder / "checkpoints" / "last.pt"))
    resumed.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    losses = [(r.train_loss, r.val_loss, r.top1) for r in whole.records]
    assert losses == [(r.train_loss, r.val_loss, r.top1) for r in resumed.records]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "stop_at"), [("dali", 3), ("dali", 16), ("dali", 17), ("torchvision", 3)]
)
def test_a_stopped_training_resumes_bit_for_bit(
    backend: str,
    stop_at: int,
    undisturbed_run: Callable[[str], Trainer],
    make_cifar10_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    first = make_cifar10_trainer(backend, tmp_path)
    update = first.train_step

    def stopping(*arguments: object) -> Tensor:
        loss = update(*arguments)  # type: ignore[arg-type]
        first.stop_requested = first.step == stop_at
        return loss

    torch.manual_seed(5)
    first.train_step = stopping  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        first.fit()
    assert first.step == stop_at
    torch.manual_seed(99)
    check_the_rest(undisturbed_run(backend), make_cifar10_trainer(backend, tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("backend", "checkpoint_steps", "killed_at", "saved_at"),
    [
        ("dali", 5, 8, 5),
        ("dali", 15, 16, 15),
        ("dali", 15, 17, 16),
        ("dali", 17, 19, 17),
        ("torchvision", 15, 16, 15),
    ],
    ids=["mid-epoch", "before a phase", "at its start", "after it", "torchvision"],
)
def test_a_killed_training_resumes_bit_for_bit_from_its_last_checkpoint(
    backend: str,
    checkpoint_steps: int,
    killed_at: int,
    saved_at: int,
    undisturbed_run: Callable[[str], Trainer],
    make_cifar10_trainer: Callable[..., Trainer],
    tmp_path: Path,
) -> None:
    """The second phase begins at step 16; the update after `killed_at` - 1 never ends."""
    torch.manual_seed(5)
    first = make_cifar10_trainer(backend, tmp_path, checkpoint_steps)
    update = first.train_step

    def dying(*arguments: object) -> Tensor:
        loss = update(*arguments)  # type: ignore[arg-type]
        if first.step == killed_at:
            raise Killed
        return loss

    first.train_step = dying  # type: ignore[method-assign]
    with pytest.raises(Killed):
        first.fit()
    torch.manual_seed(99)
    second = make_cifar10_trainer(backend, tmp_path)
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["step"] == saved_at
    check_the_rest(undisturbed_run(backend), second, tmp_path)


def test_the_parts_of_a_run_add_up_to_its_wall_time(tmp_path: Path) -> None:
    trainer = make_trainer(folder=tmp_path)
    before = time.perf_counter()
    trainer.clock = Stopwatch()
    after = time.perf_counter()
    trainer.fit()
    shortest = time.perf_counter() - after
    seconds = trainer.clock.read()
    longest = time.perf_counter() - before
    assert shortest <= sum(seconds.values()) <= longest
    for part in ("start_up", "data_wait", "compute", "evaluation", "checkpoint"):
        assert seconds[part] > 0, part


@pytest.mark.parametrize("over", [True, False])
def test_data_are_waited_for_only_while_the_device_has_nothing_to_do(
    over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the event of a GPU's last update: over, or never over, at each batch."""
    log: list[str] = []
    moved: list[tuple[str, str]] = []

    class Event:
        def record(self) -> None:
            log.append("record")

        def query(self) -> bool:
            log.append("query")
            return over

    trainer = make_trainer()
    trainer._updated = Event()  # type: ignore[assignment]
    trainer.clock.switch("compute")
    monkeypatch.setattr(trainer.clock, "move", lambda a, b, seconds: moved.append((a, b)))
    trainer.train_epoch()
    steps = trainer.step
    assert steps >= 2 and log == ["query", "record"] * steps
    assert moved == ([] if over else [("data_wait", "compute")] * steps)


def test_it_ends_at_the_evaluation_that_reaches_the_target() -> None:
    """Of seven classes each image is among the five best or not: any start reaches 1 %."""
    trainer = make_trainer(replace(RECIPE, target="top5=0.01", eval_every_epochs=2, tta="flip"))
    trainer.stop_at_target = True
    trainer.fit()
    assert (trainer.epoch, len(trainer.records)) == (2, 2)
    assert [record.top5 is None for record in trainer.records] == [True, False]
    assert trainer.records[-1].tta_top5 is not None, "the last evaluation has the TTA"
    trainer.fit()  # as a resume of a run that was killed before it wrote its results
    assert trainer.epoch == 2
    missed = make_trainer(replace(RECIPE, target="top1=1.0"))
    missed.stop_at_target = True
    missed.fit()
    assert missed.epoch == RECIPE.epochs


def test_a_target_that_is_reached_early_is_counted_on_the_images_of_its_own_epoch() -> None:
    """With TTA at the size of its phase, not of the next one."""
    phases = (replace(RECIPE.phases[0], eval_size=24), RECIPE.phases[1])
    recipe = replace(RECIPE, phases=phases, target="top5=0.01", eval_every_epochs=2, tta="flip")
    trainer, seen = make_trainer(recipe), set()
    trainer.model.register_forward_pre_hook(
        lambda module, inputs: None if module.training else seen.add(inputs[0].shape[-1])
    )
    trainer.stop_at_target = True
    trainer.fit()
    assert (trainer.epoch, seen, trainer.eval_loader.epoch) == (2, {24}, 1)


def test_squares_are_counted_after_rectangles_of_the_last_phase(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the plan's pass for them, however early the target is reached."""
    phases = tuple(replace(phase, rect=True) for phase in RECIPE.phases)
    phases = (phases[0], replace(phases[1], epochs=2))
    trainer, passes = make_trainer(), []
    trainer.plan = Plan.of(replace(RECIPE, phases=phases, target="top1=0.1"), 1, len(SPLIT))
    trainer.stop_at_target = True
    assert [stage.rect for stage in trainer.plan.eval_stages()] == [True] * 4 + [False]

    def evaluate(tta: str = "none") -> Counts:
        passes.append(trainer.eval_loader.epoch)
        trainer.eval_loader.epoch += 1
        return Counts(10, 5, 7, 1.0)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    for trainer.epoch, expected in ((1, [1]), (2, [2, 4])):
        passes.clear()
        trainer.eval_loader.epoch = trainer.epoch
        fields = trainer.evaluate_epoch(trainer.plan.phase_of_epoch(trainer.epoch))
        assert passes == expected and ("square_top1" in fields) == (len(expected) == 2)
        assert trainer.eval_loader.epoch == trainer.epoch + 1


def test_a_loader_of_other_epochs_than_the_plans_is_refused() -> None:
    trainer = make_trainer()
    trainer.plan = Plan.of(RECIPE, 1, 2 * len(SPLIT))
    with pytest.raises(UserError, match=r"gives 3 batches in epoch 1 and the plan has 6: open it"):
        trainer.fit()


def test_a_resumed_run_takes_the_clock_and_both_loaders_with_it(tmp_path: Path) -> None:
    first, second = make_trainer(folder=tmp_path), make_trainer(folder=tmp_path)
    first.fit()
    saved = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
    second.resume("auto")
    assert second.clock.read()["compute"] == saved["clock"]["compute"] > 0
    assert second.train_loader.state_dict() == first.train_loader.state_dict()
    assert second.eval_loader.state_dict() == {"epoch": 3, "step": 0}


def test_another_folder_gets_the_checkpoints_that_its_rows_speak_of(tmp_path: Path) -> None:
    old, new = tmp_path / "old" / "checkpoints", tmp_path / "new" / "checkpoints"
    first, second = make_trainer(folder=old.parent), make_trainer(folder=new.parent)
    first.fit()
    second.resume(str(old / "epoch.pt"))
    assert second.finished
    for name in ("last.pt", "best.pt"):
        step = checkpoint.load(old / name)["step"]
        assert checkpoint.load(new / name)["step"] == step


def test_what_a_run_is_resumed_from_is_what_it_would_start_again_from(tmp_path: Path) -> None:
    """The epoch before, in its own folder, where the last checkpoint is newer."""
    folder, trainer = tmp_path / "checkpoints", make_trainer(folder=tmp_path)
    trainer.epoch = 1
    checkpoint.save_last(folder, trainer.state_dict(), [checkpoint.EPOCH])
    trainer.epoch = 2
    checkpoint.save_last(folder, trainer.state_dict())
    make_trainer(folder=tmp_path).resume(str(folder / checkpoint.EPOCH))
    assert checkpoint.load(folder / checkpoint.LAST)["epoch"] == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({}, r"of a run with another recipe \(max_lr\): give the --recipe, --set,"),
        ({"classes": ["cat"]}, "of a run with other classes: name the --data that"),
        ({"num_train": 49}, "of a run with 50 training images: name the --data and --skip-list"),
        ({"seed": 4}, "of a run with another seed: --seed 0"),
        ({"copies": "56"}, "of a run with other copies of the images, made anew since"),
        ({"images": "34"}, "of a run with other images, though as many .* name the --data"),
    ],
)
def test_another_run_is_refused(other: dict[str, Any], message: str, tmp_path: Path) -> None:
    first = make_trainer(folder=tmp_path)
    first.about |= {"images": "12", "copies": "12"}
    second = make_trainer(RECIPE if other else replace(RECIPE, max_lr=0.2), folder=tmp_path)
    second.about |= other
    checkpoint.save_last(tmp_path / "checkpoints", first.state_dict())
    with pytest.raises(UserError, match=message):
        second.resume("auto")


def test_copies_that_have_come_since_are_named(tmp_path: Path) -> None:
    first, second = make_trainer(folder=tmp_path), make_trainer(folder=tmp_path)
    phases = tuple(replace(phase, data="160") for phase in RECIPE.phases)
    second.plan = Plan.of(replace(RECIPE, phases=phases), 1, len(SPLIT))
    first.about["copies"], second.about["copies"] = "", "12"
    checkpoint.save_last(tmp_path / "checkpoints", first.state_dict())
    remedy = r"said: give --set phases\.0\.data=auto --set phases\.1\.data=auto"
    with pytest.raises(UserError, match=remedy):
        second.resume("auto")


def test_another_model_is_refused() -> None:
    trainer = make_trainer()
    trainer.fit()
    with pytest.raises(UserError, match="the checkpoint is of another recipe"):
        make_trainer(model=nn.Linear(3, 3)).load_state_dict(trainer.state_dict())


def test_another_number_of_processes_resumes_at_the_end_of_an_epoch_only() -> None:
    """The state is made one of two processes: 50 images make 1 update of them, not 3."""
    recipe = replace(RECIPE, lr_reference_batch=16)
    trainer = make_trainer(recipe)
    trainer.train_epoch()
    state = trainer.state_dict()
    two = state | {"ranks": state["ranks"] * 2, "step": 1}
    resumed = make_trainer(recipe)
    resumed.load_state_dict(two)
    assert (resumed.epoch, resumed.step) == (1, 3)
    lr = [Plan.of(recipe, 2, 50).lr(1), Plan.of(recipe, 1, 50).lr(3)]
    changed = f", processes 2 -> 1, global batch 32 -> 16, lr {lr[0]:g} -> {lr[1]:g}"
    assert resumed.plan_changes == changed
    for _ in zip(range(2), resumed.train_loader, strict=False):
        resumed.step += 1
    middle = resumed.state_dict()
    middle["ranks"] *= 2
    with pytest.raises(UserError, match=r"saved in mid-epoch, processes 2 -> 1, .*epoch\.pt"):
        make_trainer(recipe).load_state_dict(middle)


def test_synchronised_batch_norm_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="recipe field sync_bn = true needs a GPU"):
        make_trainer(replace(RECIPE, sync_bn=True))
