"""Recipes: validation, TOML and --set, stretching, and the plan derived from them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from fastimagenet.recipes import RECIPES, named_recipe
from fastimagenet.recipes import toml as recipe_toml
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Phase, Recipe
from fastimagenet.recipes.superconvergence import COMPARISON, RUNS, STUDY
from pipelines.errors import UserError


def two_phases(**changes: object) -> Recipe:
    phases = (
        Phase(epochs=4, image_size=16, batch_size=100, eval_size=32),
        Phase(epochs=2, image_size=32, batch_size=50),
    )
    return replace(Recipe(name="test", phases=phases, model="smallnet"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("nodes", [1, 2, 3, 16, 64])
def test_every_named_recipe_survives_toml_and_makes_a_plan(name: str, nodes: int) -> None:
    recipe = named_recipe(name, nodes)
    text = recipe_toml.dumps(recipe)
    again = recipe_toml.loads(text)
    assert again == recipe
    # Resuming compares texts: 10 in place of 10.0 would be another recipe.
    assert recipe_toml.dumps(again) == text
    assert recipe_toml.dumps(recipe_toml.with_settings(recipe, [])) == text
    many = name.startswith("imagenet") and name != "imagenet-one-gpu"
    plan = Plan.of(recipe, 8 * nodes if many else 1, 1_281_167)
    rates = [plan.lr(step) for step in range(0, plan.total_steps, 97)]
    assert min(rates) >= 0
    assert plan.lr(plan.total_steps - 1) < max(rates) / 50


def test_a_name_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UserError, match=r"--recipe imagnet is neither .*: did you mean imagenet\?"):
        named_recipe("imagnet")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("max_lr=-1", "recipe field max_lr must be above 0"),
        ("max_lr=fast", "recipe field max_lr must be a number"),
        ("mirror=1", "recipe field mirror must be true or false"),
        ("phases.1.image_size=3", "recipe field phases.1.image_size must be at least 8 pixels"),
        ("phases.1.min_scale=0", "recipe field phases.1.min_scale must be in (0, 1]"),
        ("phases.2.epochs=2", "--set phases.2.epochs: phases has entries 0 to 1, not 2"),
        (
            "phases.0.image_sise=2",
            "unknown recipe field phases.0.image_sise: did you mean image_size?",
        ),
        ("phases=[]", "recipe field phases must be at least one phase"),
        ("max_Lr=1", "unknown recipe field max_Lr: did you mean max_lr?"),
        ("name.x=1", "--set name.x: name holds a plain value, nothing below it"),
        ("model=resnet5", "recipe field model must be one of resnet18"),
        ("blur_pool=true", "recipe field blur_pool must be false for model smallnet"),
        ("tta=flop", "recipe field tta must be one of none, flip, flip+crop"),
        ("precision=fp64", "recipe field precision must be one of auto, bf16, fp16, fp32"),
        ("target=top3=0.9", "recipe field target must be such as"),
        ("target=top1=90", "recipe field target must be such as"),
        ("schedule=piecewise", "recipe field lr_spans must be spans that end with the last epoch"),
        ("auto_augment=wide", "recipe field auto_augment must be one of none, trivial, rand, not"),
        ("rand_augment=[0, 9]", "recipe field rand_augment must be [1 or more operations, magni"),
        ("rand_augment=[2, 31]", "operations, magnitude 0 to 30], not (2, 31)"),
        ("color_jitter=1.5", "recipe field color_jitter must be in [0, 1], not 1.5"),
        ("random_erasing=-0.1", "recipe field random_erasing must be in [0, 1], not -0.1"),
        ("mixup=-1", "recipe field mixup must be 0 or more, not -1.0"),
        ("cutmix=inf", "recipe field cutmix must be finite, not inf"),
        ("resize_ratio=inf", "recipe field resize_ratio must be finite, not inf"),
        ("resize_ratio=1e9", "recipe field resize_ratio must be from 1 to 4, not 1000000000.0"),
        ("weight_decay=inf", "recipe field weight_decay must be finite, not inf"),
        ("mean=[nan, 1, 1]", "recipe field mean must be finite, not (nan, 1, 1)"),
        ("std=[inf, 1, 1]", "recipe field std must be finite, not (inf, 1, 1)"),
        ("aspect_ratio=[0.5, inf]", "recipe field aspect_ratio must be finite, not (0.5, inf)"),
        ("use_clr_beta=[inf, 10]", "recipe field use_clr_beta must be finite, not (inf, 10)"),
        ("one_cycle=[0.3, inf, 1e4, 0.95, 0.85]", "recipe field one_cycle must be finite, not"),
        ("lr_spans=[[0, 6, 1, inf]]", "recipe field lr_spans must be finite, not ((0, 6, 1, inf"),
        ("phases.1.min_scale=nan", "recipe field phases.1.min_scale must be finite, not nan"),
        (f"max_lr=1{'0' * 400}", "recipe field max_lr must be finite, not 1000"),
        ("reflect_pad=16", "recipe field reflect_pad must be below image_size"),
        ("lr_spans=[[0, 6, 1]]", "recipe field lr_spans.0 must be a list of 4 values"),
        ("bias_lr_factor=0", "recipe field bias_lr_factor must be above 0, not 0.0"),
        ("use_clr_beta=[10, 10, 0.9]", "recipe field use_clr_beta must be (div, pct) or"),
        ("use_clr_beta=[10]", "use_clr_beta must be (div, pct) or (div, pct, max_mom, min_mom), "),
        ("use_clr_beta=[10, 100]", "recipe field use_clr_beta: pct must be in per cent"),
        ("use_clr_beta=[0, 10]", "recipe field use_clr_beta: div must be above 0, not 0.0"),
        (
            "use_clr_beta=[10, 10, 0.85, 0.95]",
            "recipe field use_clr_beta: min_mom must be from 0 to max_mom = 0.85, not 0.95",
        ),
        ("one_cycle=[2, 25, 1e4, 0.95, 0.85]", "recipe field one_cycle: pct_start must be a fr"),
        ("lr_spans=[[5, 1, 2, 3]]", "recipe field lr_spans.0 must be a span that begins at 0, not"),
        (
            "lr_spans=[[0, 3, 1, 2], [4, 6, 2, 1]]",
            "recipe field lr_spans.1 must be a span that begins at 3, not 4",
        ),
        (
            "optimizer=adam",
            "recipe field optimizer must be one of sgd, adamw, muon (perhaps adamw), not 'adam'",
        ),
        ("muon=[0.2, 1]", "recipe field muon must be [LR factor above 0, momentum in [0, 1)], not"),
        ("whitening=true", "recipe field whitening must be false for model smallnet, not True"),
        (
            "whitening_bias_epochs=-1",
            "whitening_bias_epochs must be 0 or more, not -1",
        ),
        ("max_lr", "--set max_lr: write it as FIELD=VALUE"),
    ],
)
def test_errors_name_the_field(setting: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        recipe_toml.with_settings(two_phases(), [setting])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("use_clr_beta=[10, 99.9]", "recipe field use_clr_beta: num_steps must be enough for"),
        ("phases.1.batch_size=1001", "phases.1.batch_size = 1001 x 1 processes is more than"),
    ],
)
def test_errors_of_the_plan_name_the_field(setting: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        Plan.of(recipe_toml.with_settings(two_phases(), [setting]), 1, 1000)
    assert message in str(error.value)


def test_one_setting_fits_all_phases_to_a_small_folder() -> None:
    with pytest.raises(UserError, match=r"--set phases\.\*\.batch_size=13 or less") as error:
        Plan.of(two_phases(), 3, 40)
    setting = re.findall(r"--set (\S+)", str(error.value))[0]
    fitting = recipe_toml.with_settings(two_phases(), [setting, "phases.*.image_size=24"])
    assert [(p.batch_size, p.image_size) for p in fitting.phases] == [(13, 24), (13, 24)]
    assert [p.steps_per_epoch for p in Plan.of(fitting, 3, 40).phases] == [1, 1]
    with pytest.raises(UserError, match="take fewer processes"):
        Plan.of(two_phases(), 3, 2)
    with pytest.raises(UserError, match=r"unknown recipe field phases\.0\.batch: did you mean"):
        recipe_toml.with_settings(two_phases(), ["phases.*.batch=1"])


def test_settings_change_fields_at_any_depth() -> None:
    settings = ["max_lr=2", "phases.1.image_size=24", "tta=flip", "use_clr_beta.1=20"]
    changed = recipe_toml.with_settings(two_phases(), settings)
    assert (changed.max_lr, changed.tta, changed.use_clr_beta[1]) == (2.0, "flip", 20.0)
    assert [phase.image_size for phase in changed.phases] == [16, 24]


def test_only_mirrored_images_alternate() -> None:
    with pytest.raises(UserError, match="alternating_flip must be false where mirror is false"):
        recipe_toml.with_settings(two_phases(), ["mirror=false", "alternating_flip=true"])


def test_a_toml_file_names_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("max_lr = = 2")
    with pytest.raises(UserError, match=r"mine\.toml is not valid TOML"):
        recipe_toml.load(path)
    path.write_text('name = "x"')
    with pytest.raises(UserError, match="recipe field phases is missing"):
        recipe_toml.load(path)
    with pytest.raises(UserError, match=r"absent\.toml cannot be read: No such file"):
        recipe_toml.load(tmp_path / "absent.toml")


def test_the_plan_counts_steps_phase_by_phase() -> None:
    plan = Plan.of(two_phases(), world_size=3, num_train=1000)
    first, second = plan.phases
    assert (first.global_batch, first.steps_per_epoch, first.first_step) == (300, 3, 0)
    assert (second.global_batch, second.steps_per_epoch, second.first_step) == (150, 6, 12)
    assert (plan.total_steps, plan.epochs) == (24, 6)
    assert [plan.phase_at(step) for step in (0, 11, 12, 23)] == [first, first, second, second]
    assert [plan.phase_of_epoch(epoch) for epoch in (0, 3, 4, 5)] == [first, first, second, second]
    assert (first.eval_size, second.eval_size) == (32, 32)


def test_the_lr_follows_the_global_batch_of_each_phase() -> None:
    recipe = two_phases(
        lr_reference_batch=100,
        schedule="piecewise",
        lr_spans=((0, 6, 0.5, 0.5),),
        max_lr=2.0,
    )
    plan = Plan.of(recipe, world_size=2, num_train=1000)
    assert plan.lr(0) == pytest.approx(0.5 * 2.0 * 200 / 100)
    assert plan.lr(plan.total_steps - 1) == pytest.approx(0.5 * 2.0 * 100 / 100)


def test_the_2018_schedule_of_one_machine_epoch_by_epoch() -> None:
    plan = Plan.of(named_recipe("imagenet-2018-1"), 8, 1_281_167)
    published = {0: 1.0, 7: 2.0, 13: 0.4375, 22: 0.04375, 25: 0.0025}
    for epoch, lr in published.items():
        assert plan.lr(int(plan.step_at(epoch))) == pytest.approx(lr)
    assert plan.lr(plan.total_steps - 1) == pytest.approx(0.00025, rel=0.01)
    assert plan.momentum(1000) == 0.9


@pytest.mark.parametrize(
    ("run", "iterations", "top1", "first_lr", "peak_step", "peak_lr", "last_lr", "min_mom"),
    [
        ("1", 9310, 0.9353, 0.08, 4018, 0.8, 0.00086217, 0.85),
        ("2", 9310, 0.9258, 0.08, 2327, 0.8, 0.00081701, 0.85),
        ("3a", 4900, 0.9231, 0.15, 2205, 3.0, 0.00180306, 0.85),
        ("3b", 6860, 0.9308, 0.15, 3087, 3.0, 0.00171647, 0.85),
        ("4a", 9310, 0.9339, 0.08, 4018, 0.8, 0.00086217, 0.90),
        ("4b", 4900, 0.9225, 0.15, 2205, 3.0, 0.00180306, 0.90),
    ],
)
def test_a_run_of_the_super_convergence_study_update_by_update(
    run: str,
    iterations: int,
    top1: float,
    first_lr: float,
    peak_step: int,
    peak_lr: float,
    last_lr: float,
    min_mom: float,
) -> None:
    plan = Plan.of(named_recipe(f"cifar10-superconvergence-{run}"), 1, 50_000)
    assert plan.total_steps == STUDY[run].iterations == iterations
    assert STUDY[run].top1 == top1
    assert plan.lr(0) == pytest.approx(first_lr)
    assert plan.lr(peak_step) == pytest.approx(peak_lr)
    assert max(range(iterations), key=plan.lr) == peak_step
    assert plan.lr(2 * peak_step) == pytest.approx(first_lr)
    assert plan.lr(iterations - 1) == pytest.approx(last_lr, rel=1e-5)
    # Momentum runs one update ahead.
    assert plan.momentum(peak_step - 1) == pytest.approx(min_mom)
    assert plan.momentum(iterations - 1) == (0.9 if run.startswith("4") else 0.95)


def test_the_first_recipe_of_the_study_stays_as_it_was_named() -> None:
    """Run 3b in batches of 512, of which 50,000 images make 97 an epoch."""
    recipe = named_recipe("cifar10-superconvergence")
    assert recipe.phases == (Phase(epochs=70, image_size=32, batch_size=512),)
    assert Plan.of(recipe, 1, 50_000).total_steps == 6790
    changed = {"name": recipe.name, "phases": recipe.phases}
    assert replace(RUNS["3b"], **changed) == recipe  # type: ignore[arg-type]


def test_the_comparison_differs_in_the_schedule_and_the_updates_alone() -> None:
    plans = {run: Plan.of(recipe, 1, 50_000) for run, recipe in COMPARISON.items()}
    fast, slow = plans["1cycle"], plans["steps"]
    control = replace(plans["steps-high"].recipe, name=slow.recipe.name, max_lr=0.1)
    assert control == slow.recipe
    assert plans["steps-high"].recipe.max_lr == fast.recipe.max_lr
    assert slow.total_steps == 2 * fast.total_steps
    (phase,) = slow.recipe.phases
    schedule = ("name", "max_lr", "schedule", "lr_spans", "momentum")
    changed = {field: getattr(fast.recipe, field) for field in schedule}
    changed["phases"] = (replace(phase, epochs=fast.epochs),)
    assert replace(slow.recipe, **changed) == fast.recipe
    rates = [slow.lr(step) / slow.recipe.max_lr for step in range(slow.total_steps)]
    half, quarter = slow.total_steps // 2, slow.total_steps // 4
    assert rates == pytest.approx([1.0] * half + [0.1] * quarter + [0.01] * quarter)


def test_the_study_and_the_comparison_are_in_the_recipe_book() -> None:
    for recipe in RUNS.values():
        assert named_recipe(recipe.name) == recipe
        assert RECIPES[recipe.name].__doc__


def test_evaluation_passes_follow_the_phases() -> None:
    recipe = two_phases(eval_every_epochs=4)
    plan = Plan.of(recipe, 1, 1000)
    assert [epoch for epoch in range(6) if plan.evaluates(epoch)] == [3, 5]
    assert [stage.image_size for stage in plan.eval_stages()] == [32, 32]
    assert {stage.batch_size for stage in plan.eval_stages()} == {50}


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 6, 7, 12, 100])
def test_stretching_keeps_proportions(epochs: int) -> None:
    stretched = two_phases(schedule="piecewise", lr_spans=((0, 2, 0, 1), (2, 6, 1, 0))).stretched(
        epochs
    )
    assert stretched.epochs == epochs
    assert stretched.lr_spans[-1][1] == epochs
    assert stretched.lr_spans[0][1] == pytest.approx(epochs / 3)
    if epochs % 3 == 0:
        assert [phase.epochs for phase in stretched.phases] == [2 * epochs // 3, epochs // 3]
    Plan.of(stretched, 1, 1000)


def test_spans_that_do_not_hold_may_reach_past_the_end() -> None:
    recipe = two_phases(lr_spans=((0, 8, 0, 1), (8, 9, 1, 0)))
    assert recipe.stretched(6).lr_spans == recipe.lr_spans


def test_stretching_to_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match="--epochs must be at least 1"):
        two_phases().stretched(0)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_recipe_from_windows_is_read(tmp_path: Path, encoding: str) -> None:
    text = recipe_toml.dumps(named_recipe("cifar10")).replace("\n", "\r\n")
    (tmp_path / "mine.toml").write_bytes(text.encode(encoding))
    assert recipe_toml.load(tmp_path / "mine.toml") == named_recipe("cifar10")
