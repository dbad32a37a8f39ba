"""Phases that train on smaller copies: which ones, in which order, and what stops them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastimagenet.images import with_copies
from fastimagenet.recipes import named_recipe
from fastimagenet.recipes.plan import Plan
from fastimagenet.recipes.recipe import Phase
from fastimagenet.recipes.toml import with_settings
from fastimagenet.train import main as train_main
from pipelines.backends import make_loader
from pipelines.datasets.copies import ORIGINAL, best_copy, find_copies, read_copy
from pipelines.datasets.split import Split, read_split
from pipelines.errors import UserError
from pipelines.loader import LoaderSpec, Stage
from pipelines.prepare.__main__ import main as prepare


@pytest.fixture(scope="module")
def data(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six classes of three photographs with their copies of 24 and 60 px beside them."""
    root = tmp_path_factory.mktemp("data")
    files = read_split(photographs, "val").files
    for number in range(18):
        for split in ("train", "val"):
            folder = root / split / f"class{number // 3}"
            folder.mkdir(parents=True, exist_ok=True)
            # Names in an order that their suffixes change.
            name = f"{number}.JPEG" if number % 2 else f"{number}-b.jpeg"
            shutil.copy(files[number].path, folder / name)
    assert prepare(["resize", str(root), str(root), "--short-side", "24", "60"]) == 0
    return root


@pytest.fixture
def copied(data: Path, tmp_path: Path) -> Path:
    """The same, for a test that breaks it."""
    return shutil.copytree(data, tmp_path / "data")


def test_the_smallest_copy_that_serves_is_chosen(data: Path) -> None:
    copies = find_copies(data)
    assert copies == {"24": 24, "60": 60}
    chosen = {size: best_copy(copies, size) for size in (16, 19, 20, 48, 49)}
    assert chosen == {16: "24", 19: "24", 20: "60", 48: "60", 49: ORIGINAL}
    recipe = replace(
        named_recipe("digits"),
        phases=(
            Phase(epochs=1, image_size=16, batch_size=4),
            Phase(epochs=1, image_size=16, batch_size=4, data=ORIGINAL),
            Phase(epochs=1, image_size=16, batch_size=4, data="60"),
            Phase(epochs=1, image_size=64, batch_size=4),
        ),
    )
    found = with_copies(recipe, data)
    assert [phase.data for phase in found.phases] == ["24", ORIGINAL, "60", ORIGINAL]
    text = Plan.of(found, 1, 18).describe()
    assert "phases.0 trains on the copies in 24; validation reads the originals" in text
    assert "phases.2 trains on the copies in 60" in text and "phases.1 trains" not in text


def test_a_copy_that_is_not_there_or_not_finished_is_refused(copied: Path) -> None:
    recipe = replace(
        named_recipe("digits"), phases=(Phase(epochs=1, image_size=8, batch_size=4, data="32"),)
    )
    with pytest.raises(UserError, match=r"phases.0.data = '32': .* has 24, 60; .*--short-side 32"):
        with_copies(recipe, copied)
    with pytest.raises(UserError, match=r"= 'foo': .*; name a copy, \"original\" or \"auto\"$"):
        with_copies(with_settings(recipe, ["phases.0.data=foo"]), copied)
    assert with_settings(recipe, ["phases.0.data=24"]).phases[0].data == "24"
    facts = json.loads((copied / "24" / "dataset.json").read_text())
    (copied / "24" / "dataset.json").write_text(json.dumps(facts | {"complete": False}))
    assert find_copies(copied) == {"60": 60}


def test_copies_are_in_the_order_of_the_originals(data: Path) -> None:
    train = read_split(data, "train")
    # As a skip list or a shuffle leave it.
    some = train.take(np.array([7, 0, 11, 3]))
    copy = read_copy(data, "24", some)
    stems = [Path(file.path).stem for file in some.files]
    assert [Path(file.path).stem for file in copy.files] == stems
    assert all(file.path.startswith(f"{data}/24/train/") for file in copy.files)
    assert list(copy.labels) == list(some.labels) and copy.classes == train.classes


def test_an_image_without_a_copy_is_named(copied: Path) -> None:
    (copied / "24" / "train" / "class1" / "3.jpg").unlink()
    (copied / "24" / "train" / "class5" / "17.jpg").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        read_copy(copied, "24", read_split(copied, "train"))
    assert str(caught.value).startswith(
        f"phases.data: {copied}/24 has no readable copy of 2 images, the first "
        f"{copied}/train/class1/3.JPEG: run prepare resize again"
    )


def spec_of(split: Split, copies: dict[str, Split], *names: str, **fields: int) -> LoaderSpec:
    stages = tuple(Stage(epochs=1, image_size=16, batch_size=6, data=name) for name in names)
    return LoaderSpec(split=split, copies=copies, stages=stages, training=True, **fields)


@pytest.mark.parametrize("backend", ["dali", "torchvision", "memory"])
@pytest.mark.parametrize("fields", [{}, {"reflect_pad": 2}])
def test_a_stage_reads_its_copy_in_the_same_order(
    data: Path, backend: str, fields: dict[str, int]
) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    number = {"num_threads": 0 if backend == "torchvision" else 1}
    split = read_split(data, "train")
    copy = read_copy(data, "24", split)

    def batches(spec: LoaderSpec) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        with closing(make_loader(backend, spec)) as loader:
            yield from [*loader, *loader]

    mixed = list(batches(spec_of(split, {"24": copy}, "24", "", **fields, **number)))
    small = list(batches(spec_of(copy, {}, "", "", **fields, **number)))
    large = list(batches(spec_of(split, {}, "", "", **fields, **number)))
    assert len(mixed) == 6
    for got, expected in zip(mixed, small[:3] + large[3:], strict=True):
        assert torch.equal(got[1], expected[1])
        assert torch.allclose(got[0], expected[0], atol=1e-5)
    assert not torch.allclose(mixed[0][0], large[0][0], atol=1e-2)


@pytest.mark.slow
def test_training_says_what_it_reads(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = Path(__file__).parent / "small.toml"
    flags = ["--data", str(data), "--recipe", str(recipe), "--output", str(run)]
    settings = [f"phases.{index}.batch_size=9" for index in range(3)]
    settings.append("phases.2.image_size=24")
    flags += [word for setting in settings for word in ("--set", setting)]
    assert train_main([*flags, "--device", "cpu", "--nproc-per-node", "1"]) == 0
    plan = json.loads((run / "plan.json").read_text())
    assert [phase["data"] for phase in plan["phases"]] == ["24", "24", "60"]
