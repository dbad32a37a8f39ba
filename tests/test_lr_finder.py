"""The LR finder on real trainers: what it does, by hand; and that it leaves no trace."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import RECIPE, SPLIT, loaders, make_trainer, tiny_model
from torch import Tensor, nn

from fastimagenet import lr_find2
from fastimagenet.distributed.collectives import process_group
from fastimagenet.distributed.world import World
from fastimagenet.lr_finder.sweep import SweepRecord, check_validation, smoothed
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Phase, Recipe
from fastimagenet.training.trainer import Trainer
from pipelines.datasets.images import whole_files
from pipelines.datasets.split import Split, read_split
from pipelines.errors import UserError
from pipelines.workers import hidden_main
from tests.commands import free_endpoint


def scripted(trainer: Trainer, losses: Sequence[float]) -> Trainer:
    """The trainer, whose updates are made but then give the losses of a script."""
    update, script = trainer.update, iter(losses)

    def updating(*arguments: Any) -> Tensor:
        update(*arguments)
        return torch.tensor(next(script))

    trainer.update = updating  # type: ignore[method-assign]
    return trainer


def state(trainer: Trainer) -> dict[str, Any]:
    """All that a sweep must not change, tensors by name."""
    optimizer = trainer.optimizer.state_dict()
    return copy.deepcopy(
        {
            "model": dict(trainer.model.state_dict()),
            "grads": [parameter.grad for parameter in trainer.model.parameters()],
            "ema": {} if trainer.ema is None else dict(trainer.ema.state_dict()),
            "modes": [module.training for module in trainer.model.modules()],
            "momenta": [entry["momentum_buffer"] for entry in optimizer["state"].values()],
            "groups": optimizer["param_groups"],
            "scaler": trainer.scaler.state_dict(),
            "loaders": (trainer.train_loader.state_dict(), trainer.eval_loader.state_dict()),
            "rng": torch.get_rng_state(),
            "progress": (trainer.step, trainer.epoch, trainer.records, trainer.stop_requested),
            "watch": {k: v for k, v in vars(trainer.losses).items() if isinstance(v, Tensor)},
        }
    )


def assert_same(one: Any, two: Any, name: str = "") -> None:
    """Equal bit by bit, all the way down."""
    assert type(one) is type(two), name
    if isinstance(one, Tensor):
        assert torch.equal(one, two), name
        assert one.stride() == two.stride(), name
    elif isinstance(one, dict):
        assert list(one) == list(two), name
        for key in one:
            assert_same(one[key], two[key], f"{name}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), name
        for index, (left, right) in enumerate(zip(one, two, strict=True)):
            assert_same(left, right, f"{name}[{index}]")
    else:
        assert one == two, name


def by_hand(recipe: Recipe, rates: Sequence[float], momentum: float, wd: float) -> Any:
    """Smoothed training losses and raw validation figures of a plain loop, all of one stage."""
    model = tiny_model().to(memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": wd}, {"params": others}],
        lr=1.0,
        momentum=momentum,
        nesterov=recipe.nesterov,
    )
    train, val = loaders(recipe, "synthetic", SPLIT, SPLIT)
    train_batches = [batch for _ in range(3) for batch in train]
    val_batches = [batch for _ in range(3) for batch in val]
    losses, figures = [], []
    for index, lr in enumerate(rates):
        images, labels = train_batches[index]
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()
        loss = nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        images, labels = val_batches[index]
        model.eval()
        with torch.no_grad():
            figures.append(judged(model(images), labels))
    return smoothed(losses), figures


def judged(logits: Tensor, labels: Tensor) -> list[float]:
    """Loss, top-1 and top-5 of a batch."""
    hits = logits.argsort(dim=1, descending=True) == labels[:, None]
    return [
        nn.functional.cross_entropy(logits, labels).item(),
        hits[:, 0].float().mean().item(),
        hits[:, :5].any(dim=1).float().mean().item(),
    ]


def rows(records: Sequence[SweepRecord]) -> tuple[list[float], list[list[float]]]:
    return [r.loss for r in records], [[r.val_loss, r.top1, r.top5] for r in records]


def close(value: Any) -> Any:
    return pytest.approx(value, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("recipe_decay", [0.0, 1e-3])
def test_a_sweep_does_what_a_plain_loop_does(linear: bool, recipe_decay: float) -> None:
    """Three steps an epoch, four validation batches a pass: both go on over the ends."""
    recipe = replace(
        RECIPE,
        phases=(Phase(epochs=3, image_size=8, batch_size=16, eval_size=16),),
        weight_decay=recipe_decay,
    )
    trainer = make_trainer(recipe)
    seen: list[SweepRecord] = []
    arguments: Any = {"momentum": 0.5, "wds": 0.3, "linear": linear, "on_record": seen.append}
    sweep = lr_find2(trainer, 0.001, 1.0, 9, **arguments)
    rates = [0.001 + 0.999 * k / 9 if linear else 0.001 * 1000 ** (k / 9) for k in range(9)]
    losses, figures = by_hand(recipe, rates, 0.5, 0.3)
    assert (sweep.ended, sweep.weight_decay, sweep.momentum) == ("finished", 0.3, 0.5)
    assert (sweep.num_it, sweep.linear) == (9, linear)
    assert [r.iteration for r in sweep.records] == list(range(9))
    assert [r.lr for r in sweep.records] == pytest.approx(rates)
    assert rows(sweep.records) == (close(losses), [close(row) for row in figures])
    assert tuple(seen) == sweep.records


def test_start_lr_and_decay_of_each_layer_group() -> None:
    """As fastai 0.7 took them: one factor for all groups, end_lr is the last one's."""
    recipe = replace(RECIPE, layer_lrs=(0.5, 1.0), phases=RECIPE.phases[:1])
    trainer, rates = make_trainer(recipe), []
    step = trainer.optimizer.step

    def noted(*arguments: Any) -> Any:
        groups = trainer.optimizer.param_groups
        rates.append({g["layer"]: (g["lr"], g["weight_decay"]) for g in groups if g["decays"]})
        return step(*arguments)

    trainer.optimizer.step = noted
    sweep = lr_find2(trainer, [0.001, 0.1], 10, 4, wds=np.array([0.5, 0.25]), stop_dv=False)
    found = [rate[0][0] for rate in rates], [rate[1][0] for rate in rates]
    assert found[1] == pytest.approx([0.1 * 100 ** (k / 4) for k in range(4)])
    assert found[0] == pytest.approx([lr / 100 for lr in found[1]])
    assert {(rate[0][1], rate[1][1]) for rate in rates} == {(0.5, 0.25)}
    assert [record.lr for record in sweep.records] == pytest.approx(found[1])
    assert sweep.weight_decay == 0.25
    factors = {g["layer"]: g["layer_factor"] for g in trainer.optimizer.param_groups}
    assert factors == {0: 0.5, 1: 1.0}  # as they were
    with pytest.raises(
        UserError, match="start_lr has 3 values where the recipe has 2 layer groups"
    ):
        lr_find2(trainer, [1e-3, 1e-3, 1e-2])
    with pytest.raises(UserError, match="--start-lr must be above 0, not -1"):
        lr_find2(trainer, [-1, 1e-2])
    with pytest.raises(UserError, match="--wd must be 0 or more, not -1"):
        lr_find2(trainer, 1e-3, wds=[-1, 1e-2])
    with pytest.raises(UserError, match=r"wds has 2 values where the recipe has 1 layer group \("):
        lr_find2(make_trainer(), 1e-3, wds=[1e-3, 1e-2])


def test_defaults_are_the_recipes_decay_and_the_momentum_at_the_peak() -> None:
    recipe = replace(RECIPE, use_clr_beta=(10, 10, 0.95, 0.85))
    trainer = make_trainer(recipe)
    sweep = lr_find2(trainer, num_it=2)
    plan = trainer.plan
    assert sweep.weight_decay == 1e-3
    # 12 updates, c = int(12 x 0.9 / 2) = 5; the momentum at the peak is that of index 6 of 5.
    assert plan.lr(5) == pytest.approx(0.1)
    assert sweep.momentum == pytest.approx(0.85 + 0.1 / 5)
    assert [record.momentum for record in sweep.records] == [sweep.momentum] * 2
    assert [record.lr for record in sweep.records] == pytest.approx([1e-5, 1e-2])


def test_zero_momentum_and_decay_of_everything() -> None:
    recipe = replace(RECIPE, decay_bn_and_bias=True)
    trainer = make_trainer(recipe)
    decays: list[float] = []

    def note(_: SweepRecord) -> None:
        decays.extend(group["weight_decay"] for group in trainer.optimizer.param_groups)

    sweep = lr_find2(trainer, num_it=2, wds=0.25, momentum=0, on_record=note)
    assert decays == [0.25, 0.25]
    assert sweep.ended == "finished"


def test_the_loss_is_smoothed_and_the_diverging_batch_not_recorded() -> None:
    calm = [2.0] * 12
    trainer = scripted(make_trainer(), [*calm, 50.0, 1e4, 1.0])
    sweep = lr_find2(trainer, num_it=100)
    assert sweep.ended == "diverged"
    losses = smoothed([*calm, 50.0, 1e4])
    assert losses[-2] < 8 < losses[-1]
    assert rows(sweep.records)[0] == pytest.approx(losses[:-1])
    assert sweep.num_it == 100


def test_early_losses_are_not_the_best() -> None:
    """Over 4 x the first ones, which would stop it did they count."""
    trainer = scripted(make_trainer(), [0.01] * 3 + [5.0] * 17)
    assert lr_find2(trainer, num_it=20).ended == "finished"
    assert lr_find2(scripted(make_trainer(), [3.9e9]), num_it=1).ended == "finished"
    sweep = lr_find2(scripted(make_trainer(), [4.1e9]), num_it=1)
    assert (sweep.ended, sweep.records) == ("diverged", ())


def test_nan_ends_it_at_the_first_step_and_later() -> None:
    sweep = lr_find2(scripted(make_trainer(), [math.nan]), num_it=100)
    assert (sweep.ended, sweep.records) == ("not finite", ())
    sweep = lr_find2(scripted(make_trainer(), [1.0, 1.0, math.nan]), num_it=100)
    assert (sweep.ended, len(sweep.records)) == ("not finite", 2)


def test_without_stop_dv_it_always_runs_to_the_end() -> None:
    script = [1.0] * 12 + [1e6] * 3
    sweep = lr_find2(scripted(make_trainer(), script), num_it=15, stop_dv=False)
    assert (sweep.ended, len(sweep.records)) == ("finished", 15)
    sweep = lr_find2(scripted(make_trainer(), [1, math.nan, 1]), num_it=3, stop_dv=False)
    assert sweep.ended == "finished"
    assert [math.isnan(record.loss) for record in sweep.records] == [False, True, True]
    sweep = lr_find2(scripted(make_trainer(), [math.nan] * 3), num_it=3, stop_dv=False)
    assert (sweep.ended, len(sweep.records)) == ("not finite", 3)


def test_a_real_divergence() -> None:
    """Absurd LRs on a network without normalisation."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 7))
    trainer = make_trainer(model=model)
    before = state(trainer)
    sweep = lr_find2(trainer, 1e-3, 1e30, 60)
    assert sweep.ended == "diverged"
    assert 12 <= len(sweep.records) < 30
    assert_same(state(trainer), before)
    whole = lr_find2(trainer, 1e-3, 1e30, 60, stop_dv=False)
    assert (whole.ended, len(whole.records)) == ("finished", 60)
    assert whole.records[: len(sweep.records)] == sweep.records
    assert not math.isfinite(whole.records[-1].loss)
    assert_same(state(trainer), before)


def positions(trainer: Trainer, num_it: int) -> list[tuple[int, int, int]]:
    """Epochs of both loaders and image size of each batch trained on."""
    found: list[tuple[int, int, int]] = []
    update = trainer.update

    def updating(batches: Any, *arguments: Any) -> Tensor:
        ((images, _),) = batches
        found.append((trainer.train_loader.epoch, trainer.eval_loader.epoch, images.shape[-1]))
        return update(batches, *arguments)

    trainer.update = updating  # type: ignore[method-assign]
    lr_find2(trainer, end_lr=0.1, num_it=num_it)
    del trainer.update
    return found


def test_it_stays_in_its_phase_and_evaluation_stage() -> None:
    """Epochs 0 and 1 of 3 steps, epoch 2 of 6; 7 validation batches a pass, at 16, 16 and 24 px."""
    recipe = replace(
        RECIPE,
        phases=(
            Phase(epochs=2, image_size=8, batch_size=16, eval_size=16),
            Phase(epochs=1, image_size=16, batch_size=8, eval_size=24),
        ),
    )
    trainer = make_trainer(recipe)
    found = positions(trainer, 16)
    epochs = [epoch for epoch, _, _ in found]
    assert epochs == [0] * 3 + [1] * 3 + [0] * 3 + [1] * 3 + [0] * 3 + [1]
    assert {size for _, _, size in found} == {8}
    # A pass has ended where the batch after its last is asked for.
    assert [at for _, at, _ in found] == [0] * 8 + [1] * 7 + [0]
    # After a phase's last batch, before its end.
    trainer.train_loader.load_state_dict({"epoch": 1, "step": 3})
    assert [(epoch, size) for epoch, _, size in positions(trainer, 4)] == [(0, 8)] * 3 + [(1, 8)]
    trainer.train_loader.load_state_dict({"epoch": 2, "step": 0})
    trainer.eval_loader.epoch = 2
    # Past the plan's end both go on as in its last epoch.
    found = positions(trainer, 8)
    assert found == [(2, 2, 16)] * 6 + [(3, 2, 16)] * 2
    assert (trainer.train_loader.epoch, trainer.eval_loader.epoch) == (2, 2)


def test_after_the_last_epoch_it_goes_on_in_the_last_phase() -> None:
    trainer = make_trainer()
    trainer.fit()
    before = state(trainer)
    sweep = lr_find2(trainer, end_lr=0.1, num_it=8)
    assert len(sweep.records) == 8
    assert_same(state(trainer), before)


@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "backward", "record"])
def test_everything_is_as_it_was_whatever_happens(
    failure: type[BaseException] | None, where: str
) -> None:
    trainer = make_trainer(replace(RECIPE, ema_decay=0.9))
    # As on a GPU in fp16: a broken-off step leaves marks in the scaler.
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=True)
    train_two_steps(trainer)
    trainer.model[1].eval()  # type: ignore[index, operator]
    before, clock = state(trainer), trainer.clock.read()
    seen: list[SweepRecord] = []

    def fail(*_: Any) -> None:
        if failure is not None and len(seen) == 4:
            raise failure

    def on_record(record: SweepRecord) -> None:
        seen.append(record)
        torch.rand(1)  # as a network with dropout would draw
        if where == "record":
            fail()

    handles = [
        trainer.model.register_forward_hook(fail if where == "forward" else lambda *_: None),
        trainer.model[-1].register_full_backward_hook(  # type: ignore[index, operator, union-attr]
            fail if where == "backward" else lambda *_: None
        ),
    ]
    if failure is None:
        sweep = lr_find2(trainer, num_it=12, wds=0.5, momentum=0.1, on_record=on_record)
        assert len(sweep.records) == 12
    else:
        with pytest.raises(failure):
            lr_find2(trainer, num_it=12, wds=0.5, momentum=0.1, on_record=on_record)
        assert len(seen) == 4
    for handle in handles:
        handle.remove()
    assert_same(state(trainer), before)
    after = trainer.clock.read()
    assert after["other"] > clock["other"]
    assert {name for name in after if after[name] != clock[name]} <= {"other", "start_up"}
    train_two_steps(trainer)


def train_two_steps(trainer: Trainer) -> None:
    for (images, labels), _ in zip(trainer.train_loader, range(2), strict=False):
        trainer.train_step(((images, labels),), trainer.plan.phases[0])


def test_a_step_broken_off_between_scaler_and_optimizer() -> None:
    trainer = make_trainer()
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=True)
    before = state(trainer)
    step = trainer.optimizer.step

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    trainer.optimizer.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        lr_find2(trainer)
    trainer.optimizer.step = step  # type: ignore[method-assign]
    assert_same(state(trainer), before)
    train_two_steps(trainer)


@pytest.mark.parametrize(
    ("backend", "optimizer"), [("dali", "sgd"), ("torchvision", "sgd"), ("memory", "muon")]
)
def test_training_continues_as_without_a_sweep(backend: str, optimizer: str, cifar10: Path) -> None:
    """A sweep before the first step and one in mid-epoch change no bit of any later loss."""
    recipe = replace(
        RECIPE,
        phases=(
            Phase(epochs=2, image_size=16, batch_size=20, eval_size=24),
            Phase(epochs=1, image_size=24, batch_size=20),
        ),
        ema_decay=0.9,
        optimizer=optimizer,
    )
    splits = (read_split(cifar10, name) for name in ("train", "val"))
    train, val = (split.take(np.arange(0, len(split), 5)) for split in splits)

    def losses(sweeps_at: set[int]) -> tuple[Trainer, list[float]]:
        model = tiny_model()
        model[-1] = nn.Linear(8, 10)  # type: ignore[operator]
        plan = Plan.of(recipe, 1, len(train))
        trainer = Trainer(plan, model, *loaders(recipe, backend, train, val))
        found: list[float] = []
        step = trainer.train_step

        def stepping(*arguments: Any) -> Tensor:
            loss = step(*arguments)
            found.append(loss.item())
            if trainer.step in sweeps_at:
                assert lr_find2(trainer, num_it=7, wds=0.1).ended == "finished"
            return loss

        trainer.train_step = stepping  # type: ignore[method-assign]
        torch.manual_seed(7)
        if 0 in sweeps_at:
            lr_find2(trainer, num_it=3)
        trainer.fit()
        return trainer, found

    plain, expected = losses(set())
    swept, found = losses({0, 8})
    assert len(expected) == 15
    assert found == expected
    for name, value in plain.evaluated_model.state_dict().items():
        assert torch.equal(value, swept.evaluated_model.state_dict()[name]), name
    figures = [(r.train_loss, r.val_loss, r.top1, r.top5) for r in plain.records]
    assert figures == [(r.train_loss, r.val_loss, r.top1, r.top5) for r in swept.records]


def test_bf16_stays_near_fp32() -> None:
    plain = lr_find2(make_trainer(), end_lr=0.1, num_it=12)
    trainer = make_trainer(replace(RECIPE, precision="bf16"))
    before = state(trainer)
    mixed = lr_find2(trainer, end_lr=0.1, num_it=12)
    assert_same(state(trainer), before)
    one, two = rows(plain.records)[0], rows(mixed.records)[0]
    assert two == pytest.approx(one, rel=0.02)
    assert two != one


def test_a_request_to_stop_ends_it() -> None:
    trainer = make_trainer()

    def stop(record: SweepRecord) -> None:
        trainer.stop_requested = record.iteration == 2

    sweep = lr_find2(trainer, on_record=stop)
    assert (sweep.ended, len(sweep.records)) == ("stopped", 3)
    assert trainer.stop_requested


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start_lr": 0}, "--start-lr must be above 0, not 0"),
        ({"start_lr": math.nan}, "--start-lr must be above 0, not nan"),
        ({"start_lr": 1, "end_lr": 1}, "--end-lr must be above --start-lr, 1, not 1"),
        ({"end_lr": math.inf}, "--end-lr must be above --start-lr, 1e-05, not inf"),
        ({"num_it": 0}, "--num-it must be at least 1, not 0"),
        ({"wds": -1e-4}, "--wd must be 0 or more, not -0.0001"),
        ({"momentum": 1}, "--momentum must be in [0, 1), not 1"),
        ({"momentum": -0.1}, "--momentum must be in [0, 1), not -0.1"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        lr_find2(make_trainer(), **arguments)
    assert str(error.value) == message


def test_a_validation_set_smaller_than_a_batch_is_refused() -> None:
    val = Split(whole_files([""]) * 7, [index % 7 for index in range(7)], tuple("abcdefg"))
    plan = Plan.of(RECIPE, 1, len(SPLIT))
    trainer = Trainer(plan, tiny_model(), *loaders(RECIPE, "synthetic", SPLIT, val))
    before = state(trainer)
    message = (
        "a validation set of 7 images is smaller than one batch of 8: "
        "--set phases.1.batch_size=7 or less"
    )
    with pytest.raises(UserError) as error:
        lr_find2(trainer)
    assert str(error.value) == message
    assert_same(state(trainer), before)
    check_validation(plan, 8)
    with pytest.raises(UserError, match=r"15 images .* 8 on each of 2 processes: .*size=7 or"):
        check_validation(Plan.of(RECIPE, 2, len(SPLIT)), 15)


TWO_RECIPE = replace(RECIPE, phases=(Phase(epochs=3, image_size=8, batch_size=8),))


def shard(training: bool, rank: int, val: Split = SPLIT) -> Any:
    from pipelines.backends import make_loader
    from pipelines.loader import LoaderSpec

    plan = Plan.of(TWO_RECIPE, 2, len(SPLIT))
    stages = plan.phases if training else plan.eval_stages()
    split = SPLIT if training else val
    spec = LoaderSpec(
        **{"split": split, "stages": stages, "training": training},
        **{"shard_id": rank, "num_shards": 2, "seed": rank},  # the seed: noise of its own
    )
    return make_loader("synthetic", spec)


def two_by_hand(rates: Sequence[float]) -> tuple[list[float], list[list[float]]]:
    """Both shards' batches through one model: BN is each shard's own, its statistics shard 0's."""
    model = tiny_model().to(memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.5, nesterov=True)
    train = [over_epochs(shard(True, rank)) for rank in range(2)]
    val = [over_epochs(shard(False, rank)) for rank in range(2)]
    losses, figures = [], []
    for lr in rates:
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()
        shares = []
        for rank in (1, 0):
            kept = copy.deepcopy(dict(model.named_buffers()))
            images, labels = next(train[rank])
            loss = nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1) / 2
            loss.backward()
            shares.append(loss.item())
            if rank:
                model.load_state_dict(kept, strict=False)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(shares))
        images, labels = map(torch.cat, zip(*(next(batches) for batches in val), strict=True))
        model.eval()
        with torch.no_grad():
            figures.append(judged(model(images), labels))
    return smoothed(losses), figures


def over_epochs(loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def one_of_two(rank: int, folder: Path) -> None:
    """What each of two processes does: a whole sweep, one that rank 1 stops, and a mistake."""
    world = World(rank, rank, 2, 2)

    def trainer(val: Split = SPLIT) -> Trainer:
        loaders = shard(True, rank, val), shard(False, rank, val)
        return Trainer(Plan.of(TWO_RECIPE, 2, len(SPLIT)), tiny_model(), *loaders, world=world)

    def stop(record: SweepRecord) -> None:
        if record.iteration == 3 and rank == 1:
            swept.stop_requested = True

    with process_group(world):
        swept = trainer()
        before = state(swept)
        whole = lr_find2(swept, 0.01, 1.0, 9, wds=0.3, momentum=0.5)
        assert_same(state(swept), before)
        assert swept.communication is not None and swept.communication.take_seconds() == 0
        stopped = lr_find2(swept, on_record=stop)
        assert_same(state(swept), before | {"progress": (0, 0, [], rank == 1)})
        with pytest.raises(UserError) as error:
            lr_find2(trainer(Split(whole_files([""]), [0], tuple("abcdefg"))))
        result = {"whole": asdict(whole), "stopped": asdict(stopped), "error": str(error.value)}
        (folder / f"{rank}.json").write_text(json.dumps(result))


def second_of_two(master: dict[str, str], folder: Path) -> None:
    """What the second one does, in a process of its own."""
    os.environ |= master
    one_of_two(1, folder)


def test_two_processes_over_gloo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sweep on both, equal to one reduced by hand; a stop and a mistake shared, too."""
    master = dict(zip(("MASTER_ADDR", "MASTER_PORT"), free_endpoint().split(":"), strict=True))
    for name, value in master.items():
        monkeypatch.setenv(name, value)
    context = multiprocessing.get_context("forkserver")
    second = context.Process(target=second_of_two, args=(master, tmp_path))
    with hidden_main():
        second.start()
    one_of_two(0, tmp_path)
    second.join(300)
    assert second.exitcode == 0
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == two
    assert one["error"].startswith(
        "a validation set of 1 images is smaller than one batch of 8 on each of 2 processes: "
    )
    assert (one["stopped"]["ended"], len(one["stopped"]["records"])) == ("stopped", 4)
    losses, figures = two_by_hand([0.01 * 100 ** (k / 9) for k in range(9)])
    records = [SweepRecord(**record) for record in one["whole"]["records"]]
    assert rows(records) == (close(losses), [close(row) for row in figures])
