"""Layer groups, frozen epochs, AdamW, clipping and class weights against plain loops of torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastimagenet.models.parts import layer_groups, parts
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Phase, Recipe
from fastimagenet.training.optimizer import make_optimizer, set_rates
from fastimagenet.training.trainer import Trainer
from pipelines.errors import UserError
from tests.networks import make_model
from tests.test_trainer import SPLIT, loaders

GROUPS = Recipe(
    name="groups",
    model="smallnet",
    phases=(Phase(epochs=4, image_size=8, batch_size=16),),
    max_lr=0.05,
    weight_decay=1e-2,
    pretrained="weights.pt",
    layer_lrs=(0.01, 0.1, 1.0),
    frozen_epochs=2,
)
"""Twelve updates, of which the first six move the head alone."""


def three_layers() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding=1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 7),
    )


def trainer_of(recipe: Recipe, weights: Tensor | None = None) -> Trainer:
    return Trainer(
        Plan.of(recipe, 1, len(SPLIT)),
        three_layers(),
        *loaders(recipe, "synthetic", SPLIT, SPLIT),
        class_weights=weights,
    )


def test_parts_run_from_stem_to_head() -> None:
    sizes = {"resnet18": 6, "resnet50": 6, "resnet56": 29, "smallnet": 7, "speednet": 5}
    for name, count in sizes.items():
        model = make_model(name, 10)
        found = parts(model)
        assert len(found) >= 3 and len(found) == count, (name, len(found))
        listed = [id(each) for part in found for each in part]
        assert sorted(listed) == sorted(map(id, model.parameters())), name  # each once
        assert any(each.shape[0] == 10 for each in found[-1])


def test_three_groups_of_a_resnet_end_with_layer2_and_layer4() -> None:
    """Where fastai cuts it."""
    model = make_model("resnet18", 10)
    groups = layer_groups(model, 3)
    names = {0: set(), 1: set(), 2: set()}  # type: dict[int, set[str]]
    for name, parameter in model.named_parameters():
        names[groups[parameter]].add(name.partition(".")[0])
    assert names == {
        0: {"conv1", "bn1", "layer1", "layer2"},
        1: {"layer3", "layer4"},
        2: {"fc"},
    }


def test_more_groups_than_parts_are_refused() -> None:
    with pytest.raises(UserError, match=r"layer_lrs must have 2 to 6 values.* has 6 parts"):
        layer_groups(make_model("resnet18", 10), 7)


def rates(plan: Plan, step: int, frozen: int) -> list[float]:
    lr = plan.lr(step)
    return [0.0, 0.0, lr] if step < frozen else [lr * 0.01, lr * 0.1, lr]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_it_does_what_a_loop_over_torchs_groups_does(name: str, clip: float) -> None:
    recipe = replace(GROUPS, optimizer=name, clip_grad_norm=clip)
    plan, reference = Plan.of(recipe, 1, len(SPLIT)), three_layers()
    reference.to(memory_format=torch.channels_last)
    conv, bn, _, second, *_, head = reference
    frozen = (*conv.parameters(), *bn.parameters(), *second.parameters())
    start = [each.detach().clone() for each in frozen]
    groups: list[dict[str, Any]] = [
        {"params": [conv.weight], "weight_decay": 1e-2, "layer": 0},
        {"params": list(bn.parameters()), "weight_decay": 0.0, "layer": 0},
        {"params": [second.weight], "weight_decay": 1e-2, "layer": 1},
        {"params": [second.bias], "weight_decay": 0.0, "layer": 1},
        {"params": [head.weight], "weight_decay": 1e-2, "layer": 2},
        {"params": [head.bias], "weight_decay": 0.0, "layer": 2},
    ]
    optimizer: torch.optim.Optimizer
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, fused=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.99), fused=True)
    trainer = trainer_of(recipe)
    batches = [b for _ in range(4) for b in loaders(recipe, "synthetic", SPLIT, SPLIT)[0]]
    assert len(batches) == plan.total_steps == 12
    for step, (images, labels) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rates(plan, step, frozen=6)[group["layer"]]
            momentum = plan.momentum(step)
            group.update(momentum=momentum) if name == "sgd" else group.update(
                betas=(momentum, 0.99)
            )
        if step == 6:  # what was remembered of the frozen ones is forgotten
            for parameter in frozen:
                optimizer.state.pop(parameter)
        nn.functional.cross_entropy(reference(images), labels).backward()
        if clip:
            nn.utils.clip_grad_norm_(reference.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        trainer._train_module.train()
        trainer.epoch = step // 3
        trainer.train_step(((images, labels),), plan.phases[0])
        if step == 5:
            assert all(torch.equal(a, b) for a, b in zip(start, frozen, strict=True))
            own = list(trainer.model.parameters())[: len(frozen)]
            assert all(torch.equal(a, b) for a, b in zip(start, own, strict=True))
        pairs = zip(reference.parameters(), trainer.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), f"step {step}"
    assert not torch.equal(start[0], conv.weight)


def test_muon_leaves_frozen_filters_as_they_are() -> None:
    recipe = replace(GROUPS, optimizer="muon")
    model = make_model("smallnet", 7).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, recipe, "torch")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    set_rates(optimizer, 0.1, 0.9, epoch=0)
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert changed == ["fc.weight"]


def test_a_resume_within_the_frozen_epochs_goes_on_exactly() -> None:
    whole = trainer_of(GROUPS)
    whole.fit()
    part = trainer_of(GROUPS)
    part.train_epoch()
    state = part.state_dict()
    resumed = trainer_of(GROUPS)
    resumed.load_state_dict(state)
    resumed.fit()
    for each in (part, resumed):
        each.train_loader.close()
        each.eval_loader.close()
    assert resumed.step == whole.step
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_class_weights_sum_over_the_batch_and_divide_by_its_images() -> None:
    weights = torch.tensor([0.5, 1.0, 2.0, 1.0, 1.0, 3.0, 1.0])
    trainer = trainer_of(replace(GROUPS, label_smoothing=0.1), weights)
    torch.manual_seed(2)
    logits, labels = torch.randn(8, 7), torch.arange(8) % 7
    whole = trainer.loss(logits, labels)
    halves = [trainer.loss(logits[half], labels[half]) for half in (slice(4), slice(4, 8))]
    torch.testing.assert_close(whole, torch.stack(halves).mean())  # as ranks and micro-batches do
    # By hand: of each image the cross-entropy to a target smoothed over weighted classes.
    log = logits.log_softmax(1)
    nll = -log[range(8), labels] * weights[labels]
    smooth = -(log * weights).sum(1) / 7
    torch.testing.assert_close(whole, (0.9 * nll + 0.1 * smooth).sum() / 8)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layer_lrs": (1.0,)}, "layer_lrs must be two or more values above 0"),
        ({"layer_lrs": (0.0, 1.0)}, "layer_lrs must be two or more values above 0"),
        ({"layer_lrs": (float("nan"), 1.0)}, "layer_lrs must be finite"),
        ({"frozen_epochs": -1}, "frozen_epochs must be from 0 to the 4 epochs"),
        ({"frozen_epochs": 5}, "frozen_epochs must be from 0 to the 4 epochs"),
        ({"pretrained": ""}, "frozen_epochs must be 0 where nothing is pretrained"),
        ({"clip_grad_norm": -1.0}, "clip_grad_norm must be 0 or more"),
        ({"class_weight_power": -0.5}, "class_weight_power must be 0 or more"),
        ({"optimizer": "adam"}, "optimizer must be one of sgd, adamw, muon"),
        ({"model": "resnet19"}, "model must be one of resnet18, "),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"recipe field {message}"):
        replace(GROUPS, **fields)


def test_stretching_keeps_an_epoch_that_is_not_frozen() -> None:
    assert GROUPS.stretched(2).frozen_epochs == 1
    assert GROUPS.stretched(8).frozen_epochs == 2
    assert replace(GROUPS, frozen_epochs=4).stretched(2).frozen_epochs == 2
