"""The planner's arithmetic on recorded numbers, and the command on the digits."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from test_dawnbench import write_run

from benchmarks.plan.__main__ import batch_note, check, main, parser, train_flags, write_results
from benchmarks.plan.prediction import (
    Probe,
    SizeRates,
    candidates,
    epochs_for,
    expected_accuracy,
    longest_within,
    predict,
    sizes_of,
    with_fitting_batch,
)
from fastimagenet.recipes import named_recipe
from fastimagenet.recipes import toml as recipe_toml
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Phase, Recipe
from pipelines.errors import UserError
from pipelines.files import read_object, write_object

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
RECIPE = Recipe(
    name="two sizes",
    phases=(
        Phase(epochs=2, image_size=16, batch_size=50, eval_size=24),
        Phase(epochs=2, image_size=32, batch_size=50),
    ),
    tta="flip",
    eval_every_epochs=2,
    target="top1=0.7",
)
PROBE = Probe(
    num_train=1020,
    num_val=200,
    start_up_seconds=3.0,
    first_batch_seconds=0.5,
    compile_seconds=40.0,
    checkpoint_seconds=0.25,
    last_checkpoint_seconds=0.1,
    train=[
        SizeRates(
            image_size=16,
            batch_size=50,
            loader=500.0,
            model=1000.0,
            both=400.0,
            data_wait_share=0.6,
            spread=0.02,
        ),
        SizeRates(
            image_size=32,
            batch_size=50,
            loader=900.0,
            model=250.0,
            both=200.0,
            data_wait_share=0.2,
            spread=0.03,
        ),
    ],
    eval_images_per_sec={24: 100.0, 32: 50.0},
    tta_images_per_sec=25.0,
)


def test_the_prediction_by_hand() -> None:
    """1,020 images make 20 whole batches of 50 an epoch; epochs 2 and 4 are evaluated."""
    seconds = predict(Plan.of(RECIPE, 1, 1020), PROBE)
    assert seconds == pytest.approx(
        {
            "start_up": 3.0,
            "compile": 0.0,
            "compute": 2000 / 400 * 0.4 + 2000 / 200 * 0.8,
            "data_wait": 0.5 + 2000 / 400 * 0.6 + 2000 / 200 * 0.2,
            "evaluation": 200 / 100 + 200 / 25,
            "checkpoint": 4 * 0.25 + 0.1,
        }
    )
    compiled = predict(Plan.of(replace(RECIPE, compile=True), 1, 1020), PROBE)
    assert compiled == seconds | {"compile": 40.0}


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_a_recorded_probe_predicts_the_run_that_followed_it(name: str) -> None:
    """From the committed probes and runs: the same recipe as then, its times within 10 %."""
    path = max(RESULTS.glob(f"*-plan-{name}.json"))
    plan, parts = read_object(path), read_object(path.with_stem(path.stem + "-check"))["parts"]
    recorded = plan["probe"]
    probe = Probe(**{
        **recorded,
        "train": [SizeRates(**rates) for rates in recorded["train"]],
        "eval_images_per_sec": {
            int(size): rate for size, rate in recorded["eval_images_per_sec"].items()
        },
    })  # fmt: skip
    (found, *_) = candidates(
        named_recipe(name), probe, dataset=None, nodes=1, world_size=1,
        budget_seconds=60 * plan["minutes"], node_price=None,
    )  # fmt: skip
    assert found.recipe.epochs == sum(p["epochs"] for p in plan["predicted"][0]["recipe"]["phases"])
    assert found.train_seconds == pytest.approx(parts["train"]["measured_seconds"], rel=0.1)
    assert found.wall_seconds == pytest.approx(parts["wall"]["measured_seconds"], rel=0.1)


def test_two_processes_share_the_images() -> None:
    seconds = predict(Plan.of(RECIPE, 2, 1020), PROBE)
    assert seconds["compute"] == pytest.approx((2000 / 400 * 0.4 + 2000 / 200 * 0.8) / 2)
    assert seconds["evaluation"] == pytest.approx((200 / 100 + 200 / 25) / 2)


def test_rectangles_cost_a_pass_over_squares() -> None:
    phases = (RECIPE.phases[0], replace(RECIPE.phases[1], rect=True))
    seconds = predict(Plan.of(replace(RECIPE, phases=phases), 1, 1020), PROBE)
    assert seconds["evaluation"] == pytest.approx(200 / 100 + 200 / 25 + 200 / 50)


def test_the_longest_run_within_the_budget() -> None:
    made = longest_within(RECIPE, PROBE, 1, 60.0)
    assert made is not None
    wall = sum(predict(Plan.of(made, 1, 1020), PROBE).values())
    beyond = RECIPE.stretched(made.epochs + 1)
    assert wall <= 60.0 < sum(predict(Plan.of(beyond, 1, 1020), PROBE).values())
    assert longest_within(RECIPE, PROBE, 1, 5.0) is None


def test_what_there_is_to_choose_from() -> None:
    found = candidates(
        RECIPE, PROBE, dataset="CIFAR10", nodes=2, world_size=2, budget_seconds=60, node_price=36.0
    )
    names = [each.name for each in found]
    assert names == ["recipe", "up to 16 px", "32 px throughout", "own epochs"]
    assert all(each.wall_seconds <= 60 for each in found[:3])
    assert found[0].cost_usd == pytest.approx(found[0].wall_seconds / 3600 * 2 * 36)
    assert found[0].global_batches == [100, 100]
    outside = found[0].seconds["evaluation"] + found[0].seconds["checkpoint"]
    assert found[0].train_seconds == pytest.approx(found[0].wall_seconds - outside)
    assert found[0].accuracy is None and "no published table" in found[0].accuracy_source
    with pytest.raises(UserError, match=r"--minutes 0\.1: one epoch of two sizes is predicted"):
        candidates(
            RECIPE, PROBE, dataset=None, nodes=1, world_size=1, budget_seconds=6, node_price=None
        )


def test_variants_take_sizes_of_the_recipe_only() -> None:
    variants = sizes_of(RECIPE)
    sizes = {
        name: [(phase.image_size, phase.eval_size) for phase in recipe.phases]
        for name, recipe in variants.items()
    }
    assert sizes == {
        "recipe": [(16, 24), (32, 0)],
        "up to 16 px": [(16, 24), (16, 24)],
        "32 px throughout": [(32, 0), (32, 0)],
    }


def test_expected_accuracy_is_what_was_published() -> None:
    """ffcv-imagenet: 16 epochs 73.8/90.8, 32 epochs 76.6/92.7, 88 epochs 78.4/94.1."""
    accuracy, source = expected_accuracy("resnet50", "ImageNet", 16)
    assert accuracy == {"top1": 0.738, "top5": 0.908} and "ffcv" in source
    between, _ = expected_accuracy("resnet50", "ImageNet", 16 * 2**0.5)
    assert between == pytest.approx({"top1": (0.738 + 0.766) / 2, "top5": (0.908 + 0.927) / 2})
    assert expected_accuracy("resnet50", "ImageNet", 100)[0] is None
    assert expected_accuracy("resnet50", "ImageNet", 10)[0] is None
    assert expected_accuracy("resnet18", "ImageNet", 32)[0] is None
    assert expected_accuracy("resnet56", "CIFAR10", 70)[0] == {"top1": 0.9308}
    # 92.7 at 32 and 94.1 at 88: 93 is at 32 * (88 / 32) ** (3 / 14) = 39.7.
    assert epochs_for("resnet50", "ImageNet", "top5", 0.93) == 40
    assert epochs_for("resnet50", "ImageNet", "top5", 0.95) is None
    assert epochs_for("smallnet", "CIFAR10", "top1", 0.5) is None


def test_a_batch_too_large_for_the_data_is_halved_with_its_lr() -> None:
    recipe = named_recipe("digits")
    assert with_fitting_batch(recipe, 1, 1437) == recipe
    small = with_fitting_batch(recipe, 8, 1437)
    assert {phase.batch_size for phase in small.phases} == {16}
    assert small.max_lr == pytest.approx(0.2 / 4)
    assert Plan.of(small, 8, 1437).phases[0].steps_per_epoch == 11
    ruled = replace(recipe, lr_reference_batch=64)
    assert with_fitting_batch(ruled, 8, 1437).max_lr == 0.2


def test_a_run_is_set_beside_its_prediction(tmp_path: Path) -> None:
    """Predicted: start-up 3 s, waiting 5.5 s, computing and evaluating 10 s each, saving 1 s."""
    (chosen,) = candidates(
        RECIPE, PROBE, dataset=None, nodes=1, world_size=1, budget_seconds=33, node_price=None
    )[:1]
    result = {"minutes": 0.55, "node_usd_per_hour": None, "nodes": 1, "gpus_per_node": 1,
              "hardware_probed": "-", "precision": "fp32", "versions": {"torch": "-"}, "date": "-",
              "data": "-", "probe": asdict(PROBE)}  # fmt: skip
    write_results(result, [chosen], tmp_path / "plan")
    assert chosen.recipe == RECIPE
    split = {"start_up": 4.0, "compile": 0.0, "data_wait": 5.5, "compute": 8.0,
             "communication": 0.0, "evaluation": 10.0, "checkpoint": 0.5, "other": 0.0}  # fmt: skip
    run = write_run(
        tmp_path / "run", time_split_seconds=split, train_seconds=17.5, wall_seconds=28.0
    )
    write_object(run / "plan.json", Plan.of(RECIPE, 1, 1020).to_dict())
    text = check(tmp_path / "plan", run)
    parts = read_object(tmp_path / "plan" / "check.json")["parts"]
    assert parts["start_up"]["error"] == pytest.approx(3 / 4 - 1)
    assert parts["wall"]["predicted_seconds"] == pytest.approx(29.6)
    assert parts["wall"]["error"] == pytest.approx(29.6 / 28 - 1)
    assert parts["compile"]["error"] is None
    assert "-25.0 %" in text
    write_object(run / "plan.json", Plan.of(replace(RECIPE, max_lr=2.0), 1, 1020).to_dict())
    with pytest.raises(UserError, match=r"another recipe .* max_lr differs"):
        check(tmp_path / "plan", run)
    write_object(run / "plan.json", Plan.of(RECIPE, 2, 1020).to_dict())
    with pytest.raises(UserError, match=r"run on 2 process\(es\), the plan in .* is for 1: name a"):
        check(tmp_path / "plan", run)


@pytest.mark.slow
def test_the_command_writes_a_recipe_that_train_takes(tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--minutes", "20", "--probe-seconds", "0.5", "--nodes", "2"]
    for index, size in enumerate((8, 12)):
        flags += ["--set", f"phases.{index}.image_size={size}"]
        flags += ["--set", f"phases.{index}.batch_size=32"]
    assert main([*flags, "--price", "3", "--output", str(tmp_path / "out")]) == 0
    plan = read_object(tmp_path / "out" / "plan.json")
    recipe = recipe_toml.load(tmp_path / "out" / "recipe.toml")
    first = plan["predicted"][0]
    assert recipe.epochs == sum(phase["epochs"] for phase in first["recipe"]["phases"])
    assert 0 < first["predicted_train_seconds"] < first["predicted_wall_seconds"] <= 20 * 60
    assert first["cost_usd"] == pytest.approx(first["predicted_wall_seconds"] / 3600 * 2 * 3)
    probe = plan["probe"]
    assert [rates["image_size"] for rates in probe["train"]] == [8, 12]
    assert min(rates["both"] for rates in probe["train"]) > 0
    assert probe["checkpoint_seconds"] > 0 and probe["last_checkpoint_seconds"] > 0
    assert probe["start_up_seconds"] > 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert "predicted" in text and "not measured" in text
    assert "No accuracy is expected: no published table" in text
    assert (tmp_path / "out" / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minutes", "0"], "--minutes: must be a number above 0"),
        (["--price", "-1"], "--minutes M is required"),
        (["--minutes", "1", "--gpus", "0"], "--gpus: must be at least 1"),
        (["--minutes", "1", "--price", "-1"], "--price must be"),
        (["--minutes", "1", "--target", "93"], "target must be such as"),
        (["--minutes", "1", "--global-batch", "64"], "--global-batch: the batches are"),
    ],
)
def test_a_wrong_flag_is_named(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        main([*flags, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_run_is_left_as_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_object(run / "plan.json", Plan.of(RECIPE, 1, 1020).to_dict())
    before = (run / "plan.json").read_bytes()
    with pytest.raises(UserError, match=r"--output .* holds another run"):
        main(["--minutes", "1", "--device", "cpu", "--output", str(run)])
    with pytest.raises(UserError, match=r"--output .* holds no plan"):
        main(["--check", str(run), "--output", str(run)])
    assert (run / "plan.json").read_bytes() == before


@pytest.mark.parametrize(
    ("given", "passed_on"),
    [
        ("--minutes 9 --precision fp32", ""),
        (
            "--data photos --skip-list bad.txt --on-bad-image skip --backend memory --device cpu "
            "--seed 3",
            "--data photos --skip-list bad.txt --on-bad-image skip --backend memory --device cpu "
            "--seed 3",
        ),
        ("--nproc-per-node 2", "--nproc-per-node 2"),
        (
            "--nodes 4 --gpus 8 --nproc-per-node 1",
            "--nproc-per-node 8 --nodes 4 --rdzv-endpoint HOST:PORT",
        ),
        ("--nodes 2 --rdzv-endpoint a:1", "--nodes 2 --rdzv-endpoint a:1"),
    ],
)
def test_the_command_to_train_is_that_of_the_predicted_run(given: str, passed_on: str) -> None:
    args = parser().parse_args(["--output", "plans/one", *given.split()])
    assert train_flags(args) == ["--recipe", "plans/one/recipe.toml", *passed_on.split()]


def test_a_batch_that_differs_from_the_recipes_is_told() -> None:
    assert batch_note(RECIPE, with_fitting_batch(RECIPE, 1, 1020)) == ""
    note = batch_note(RECIPE, with_fitting_batch(RECIPE, 1, 102))
    assert note.startswith("batch size a process: 12, 12 in place of the recipe's 50, 50")
