"""The commands on shards: local ones and those in a bucket, resumed in the middle of an epoch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastimagenet.report.run import rows_of
from fastimagenet.train import main as train_main
from fastimagenet.training.recorder import read_rows
from pipelines.datasets.split import read_split
from pipelines.errors import UserError
from pipelines.prepare.__main__ import main as prepare

SMALL = ["--recipe", "tests/small.toml", "--device", "cpu", "--nproc-per-node", "1"]


@pytest.fixture(scope="module")
def shards(cifar10: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards") / "cifar10"
    assert prepare(["shard", str(cifar10), str(root), "--workers", "1"]) == 0
    return root


def test_a_split_of_shards(cifar10: Path, shards: Path) -> None:
    folders, packed = (read_split(root, "train") for root in (cifar10, shards))
    assert packed.classes == folders.classes and len(packed) == len(folders) == 500
    images = {file.read(): label for file, label in zip(folders.files, folders.labels, strict=True)}
    assert len(images) == 500
    for file, label in zip(packed.files, packed.labels, strict=True):
        assert images.pop(file.read()) == label
    val = [read_split(root, "val") for root in (cifar10, shards)]
    assert [file.read() for file in val[0].files] == [file.read() for file in val[1].files]


def test_skip_lists_and_bad_images_of_shards(shards: Path, cifar10: Path, tmp_path: Path) -> None:
    files = read_split(shards, "train").files
    skip_list = tmp_path / "skip.txt"
    names = [f"{Path(file.path).name}:{file.name}" for file in files[3:5]]
    skip_list.write_text("\n".join(names))
    left = read_split(shards, "train", skip_list)
    assert len(left) == 498 and not {file.name for file in files[3:5]} & {
        f.name for f in left.files
    }

    for name in (path.name for path in shards.iterdir()):
        (tmp_path / name).write_bytes((shards / name).read_bytes())
    with (tmp_path / "train-00000.tar").open("r+b") as file:
        file.seek(files[7].start)
        file.write(b"junk")
    with pytest.raises(UserError) as caught:
        read_split(tmp_path, "train")
    assert str(caught.value) == (
        f"{tmp_path}/train-00000.tar:{files[7].name} is no image (JPEG, PNG, BMP, TIFF, WebP, PNM "
        "or JPEG 2000): --on-bad-image skip leaves such files out, or name them in --skip-list FILE"
    )
    split = read_split(tmp_path, "train", on_bad_image="skip")
    assert len(split) == 499 and len(split.left_out) == 1


@pytest.mark.slow
def test_training_on_shards_stops_and_goes_on(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same validation images, exactly, and the same losses after a stop in mid-epoch.

    That every back end reads shards, and resumes, is in the contract of the loaders.
    """

    def run(name: str, *flags: str) -> int:
        data = ["--data", str(shards), "--output", str(tmp_path / name), "--epochs", "2"]
        return train_main([*data, *SMALL, *flags])

    assert run("whole") == 0
    plan = json.loads((tmp_path / "whole" / "plan.json").read_text())
    assert plan["data"] == str(shards) and (plan["num_train"], plan["num_val"]) == (500, 200)

    from fastimagenet.training.trainer import Trainer

    step = Trainer.train_step

    def stop_at_15(trainer: Trainer, *args: object) -> object:
        loss = step(trainer, *args)  # type: ignore[arg-type]
        trainer.stop_requested = trainer.step == 15
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_at_15)
        assert run("stopped") == 143
    assert run("stopped", "--resume", "auto") == 0
    whole, stopped = (
        [(row["step"], row["loss"]) for row in rows_of("step", read_rows(tmp_path / name))]
        for name in ("whole", "stopped")
    )
    assert stopped == whole
