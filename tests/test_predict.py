"""Predictions of a trained network: by the command with every back end, and from Python."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import fastimagenet
from fastimagenet.classifier import Classifier
from fastimagenet.training import checkpoint
from pipelines.backends import make_loader
from pipelines.datasets.split import read_split
from pipelines.errors import UserError
from pipelines.loader import LoaderSpec, Stage
from pipelines.workers import hidden_main
from tests.commands import evaluate, output_of

BACKENDS = ["dali", "torchvision", "memory"]
CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def classifier(finished: Path) -> Classifier:
    return fastimagenet.load(finished)


def predict(*arguments: object, status: int = 0) -> tuple[str, str]:
    return output_of("fastimagenet.predict", *arguments, *CPU, status=status)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def undecodable(data: bytes) -> bytes:
    """A JPEG whose header and end are whole, and whose Huffman tables are not."""
    tables = data.index(b"\xff\xc4")
    return data[: tables + 5] + bytes(16) + b"\xff" + data[tables + 22 :]


@pytest.mark.parametrize(
    ("backend", "tta"), [("dali", "none"), ("torchvision", "flip"), ("memory", "none")]
)
def test_top1_is_that_of_evaluate(
    backend: str, tta: str, finished: Path, cifar10: Path, tmp_path: Path
) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    flags = ("--backend", backend, "--tta", tta)
    predict(finished, cifar10 / "val", *flags, "--csv", tmp_path / "found.csv", "--top", 7)
    rows = rows_of(tmp_path / "found.csv")
    assert [row["path"] for row in rows] == [str(f) for f in read_split(cifar10, "val").files]
    out, _ = evaluate(finished, "--data", cifar10, *CPU, *flags, "--json")
    result = json.loads(out)
    correct = sum(Path(row["path"]).parent.name == row["class1"] for row in rows)
    assert correct == 200 * result["top1" if tta == "none" else "tta_top1"]
    for row in rows:
        shares = [float(row[f"p{number}"]) for number in range(1, 8)]
        assert shares == sorted(shares, reverse=True) and sum(shares) < 1.00001
        assert len({row[f"class{number}"] for number in range(1, 8)}) == 7


def test_a_classifier_is_the_command(classifier: Classifier, finished: Path, cifar10: Path) -> None:
    files = sorted((cifar10 / "val" / "ship").iterdir())
    out, _ = predict(finished, *files, "--backend", "torchvision", "--json", "--top", 3)
    from_paths = classifier.predict(files, top=3)
    for row, file, mine in zip(map(json.loads, out.splitlines()), files, from_paths, strict=True):
        assert row["path"] == str(file)
        assert row["classes"] == [name for name, _ in mine]
        assert row["p"] == pytest.approx([share for _, share in mine], abs=1e-6)
    with Image.open(files[0]) as image:
        (alone,) = classifier.predict(image)
    assert [name for name, _ in alone][:3] == [name for name, _ in from_paths[0]]
    assert len(alone) == 5 and len(classifier.predict(str(files[0]), top=99)[0]) == 10


def test_a_classifier_has_the_pixels_of_evaluation(
    classifier: Classifier, photographs: Path
) -> None:
    """On photographs, which have other shapes than the squares that it was trained on."""
    split = read_split(photographs, "val")
    split = split.take(split.shapes[:, 0].argsort()[::100])
    stage = Stage(epochs=1, image_size=classifier.stage.image_size, batch_size=5)
    spec = LoaderSpec(
        split=split,
        stages=(stage,),
        training=False,
        num_threads=0,
        **classifier.recipe.transforms(),
    )
    (images, _), *_ = make_loader("torchvision", spec)
    for pixels, file in zip(images, split.files, strict=True):
        with Image.open(file.path) as image:
            assert torch.equal(classifier.preprocess(image), pixels)


def test_averaged_weights_are_taken(finished: Path, tmp_path: Path) -> None:
    from fastimagenet.training import checkpoint

    state = checkpoint.load(finished / "checkpoints" / "best.pt")
    halved = {f"module.{name}": value / 2 for name, value in state["model"].items()}
    checkpoint.save(tmp_path / "ema.pt", state | {"ema": halved | {"n_averaged": torch.ones(1)}})
    ours = fastimagenet.load(tmp_path / "ema.pt").model.state_dict()
    assert all(
        torch.equal(ours[name], value / 2)
        for name, value in state["model"].items()
        if value.is_floating_point()
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_files_are_named_and_the_others_go_on(
    backend: str, finished: Path, cifar10: Path, tmp_path: Path
) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    files = sorted((cifar10 / "val" / "cat").iterdir())
    data = files[0].read_bytes()
    bad = {"late.jpg": undecodable(data), "half.jpg": data[: len(data) // 2], "notes.txt": b"x"}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    late, half, notes, gone = (tmp_path / name for name in (*bad, "gone.jpg"))
    named = (*files[:8], late, half, *files[8:], late, notes, gone, files[0])
    flags = ("--backend", backend, "--csv", tmp_path / "found.csv")
    out, err = predict(finished, *named, *flags, status=1)
    assert out == f"21 images: {tmp_path / 'found.csv'}\n"
    lines = [line for line in err.splitlines() if "[ERROR]" not in line]
    for line, path, reason in zip(
        lines,
        (half, notes, gone, late, late),
        ("is truncated", "is no image", "cannot be read (No such", "cannot be", "cannot be"),
        strict=True,
    ):
        assert line.startswith(f"left out: {path} {reason}") and "--skip-list" not in line
    rows = rows_of(tmp_path / "found.csv")
    assert [row["path"] for row in rows] == [str(file) for file in (*files, files[0])]
    predict(finished, *files, *flags)
    for row, alone in zip(rows, rows_of(tmp_path / "found.csv"), strict=False):
        assert row["class1"] == alone["class1"]
        assert float(row["p1"]) == pytest.approx(float(alone["p1"]), abs=2e-6)


def test_one_and_two_processes_write_the_same_file(
    finished: Path, cifar10: Path, tmp_path: Path
) -> None:
    """A file that cannot be decoded is in the share of the second one."""
    (tmp_path / "late.jpg").write_bytes(
        undecodable(next((cifar10 / "val" / "cat").iterdir()).read_bytes())
    )
    named = (cifar10 / "val", tmp_path / "late.jpg", "--backend", "torchvision")
    for number, more in ((1, ()), (2, ("--nproc-per-node", 2))):
        _, err = predict(finished, *named, *more, "--csv", tmp_path / str(number), status=1)
        assert f"left out: {tmp_path / 'late.jpg'} cannot be decoded" in err
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert len(rows_of(tmp_path / "1")) == 200


def test_folders_and_names_on_standard_input(
    finished: Path, cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = next((cifar10 / "val" / "dog").iterdir())
    for name in (
        "b.jpg",
        "a/deep/c.jpg",
        "a/d.jpg",
        ".hidden.jpg",
        ".folder/e.jpg",
        "a/@eaDir/f.jpg",
        "x.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(image)
    (tmp_path / "a" / "deep" / "back").symlink_to(tmp_path, target_is_directory=True)
    names = f"{tmp_path}\n\n{tmp_path}/b.jpg\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(names)))
    out, _ = predict(finished, image, "-", "--backend", "torchvision", "--top", 1)
    paths, found = zip(*(line.split("\t") for line in out.splitlines()), strict=True)
    below = (tmp_path / name for name in ("b.jpg", "a/d.jpg", "a/deep/c.jpg", "b.jpg"))
    assert list(paths) == [str(image), *map(str, below)]
    assert len(set(found)) == 1 and found[0].endswith("\u00a0%")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{folder}",), "there is no file in {folder}: name images, or folders that hold some"),
        (("x.jpg", "--top", "0"), "argument --top: must be at least 1, not 0 (see --help)"),
        (("x.jpg", "--csv", "{folder}"), "argument --csv: {folder} is a folder: name a file (see"),
        (("x.jpg", "--csv", "a", "--json"), "argument --json: not allowed with argument --csv"),
    ],
)
def test_mistakes_are_one_line(
    arguments: Sequence[str], message: str, finished: Path, tmp_path: Path
) -> None:
    words = [word.format(folder=tmp_path) for word in arguments]
    _, err = predict(finished, *words, status=2)
    assert err.startswith(f"error: {message.format(folder=tmp_path)}") and err.count("\n") == 1


def test_mistakes_from_python_are_named(
    classifier: Classifier, cifar10: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"bad\.jpg cannot be decoded \(its header is damaged\)$"):
        classifier.predict([tmp_path / "bad.jpg"])
    with pytest.raises(UserError, match=r"gone\.jpg cannot be read \(No such file or directory\)$"):
        classifier.predict(tmp_path / "gone.jpg")
    whole = next((cifar10 / "val" / "dog").iterdir()).read_bytes()
    with (
        Image.open(io.BytesIO(undecodable(whole))) as late,
        pytest.raises(UserError, match=r"^image 1 cannot be decoded"),
    ):
        classifier.predict([Image.new("RGB", (9, 9)), late])
    with pytest.raises(UserError, match="top must be at least 1, not 0"):
        classifier.predict("x.jpg", top=0)
    with pytest.raises(UserError, match=r"image 1 must be a path or an image of Pillow, not <cl"):
        classifier.predict([Image.new("RGB", (9, 9)), 3])  # type: ignore[list-item]
    with pytest.raises(UserError, match="holds no checkpoints/best"):
        fastimagenet.load(tmp_path)


def test_a_network_of_ones_own_is_not_that_of_the_recipe(finished: Path, tmp_path: Path) -> None:
    state = checkpoint.load(finished / "checkpoints" / "best.pt")
    state |= {"model": nn.Linear(3, 10).state_dict(), "ema": None}
    checkpoint.save_last(tmp_path, state)
    with pytest.raises(UserError, match=r"holds another network than the .* of its recipe"):
        fastimagenet.load(tmp_path / "last.pt")


def predict_without_dali(run: str, image: str) -> None:
    found = fastimagenet.load(run).predict(image)
    assert len(found[0]) == 5
    assert not [name for name in sys.modules if name.startswith("nvidia.dali")]


def test_a_classifier_needs_no_dali(finished: Path, cifar10: Path) -> None:
    if find_spec("nvidia") is None:
        pytest.skip("DALI is not installed")
    image = next((cifar10 / "val" / "dog").iterdir())
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=predict_without_dali, args=(str(finished), str(image)))
    with hidden_main():
        process.start()
    process.join()
    assert process.exitcode == 0
