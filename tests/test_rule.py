"""Images in no folders of splits: a share of each class, or a table of labels, validates."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from pipelines.cli import exit_status
from pipelines.datasets.copies import read_copy
from pipelines.datasets.rule import SplitRule
from pipelines.datasets.split import Split, notes_of, read_split
from pipelines.errors import UserError
from pipelines.prepare.__main__ import main as prepare
from tests.commands import SMALL, evaluate, output_of, train

FLAGS = ["--val-fraction", "0.2", "--workers", "1"]
FIFTH = SplitRule(val_fraction=0.2)
VALIDATING = ["cat/1.png", "cat/7.png", "dog/4.png", "dog/7.png"]
"""Of nine images each; another hash would move images of runs that are to be resumed."""
PIXELS = Image.new("RGB", (8, 8), (1, 200, 90))


def write(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        PIXELS.save(root / name)


def touch(root: Path, numbers: range) -> None:
    """Files in three classes, those of one below a folder, which are not looked at."""
    for name in ("cat", "dog/images", "eel"):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            (root / name / f"{number}.jpg").touch()


def both(root: Path, rule: SplitRule = FIFTH, check_files: bool = False) -> tuple[Split, Split]:
    train, val = (
        read_split(root, split, check_files=check_files, rule=rule) for split in ("train", "val")
    )
    return train, val


def test_each_class_gives_its_share_and_new_images_move_none_of_the_old(tmp_path: Path) -> None:
    touch(tmp_path / "a", range(400))
    train, val = both(tmp_path / "a")
    before = {*train.names()}, {*val.names()}
    assert len(before[0] | before[1]) == 1200 == len(train) + len(val)
    assert train.classes == val.classes == ("cat", "dog", "eel")
    # Within four standard deviations of a binomial: 400 draws of a fifth.
    assert all(abs(count - 80) < 32 for count in Counter(list(val.labels)).values())
    assert notes_of(train, val) == []
    touch(tmp_path / "a", range(1000))
    train, val = both(tmp_path / "a")
    assert before[0] < {*train.names()} and before[1] < {*val.names()}
    (tmp_path / "b").mkdir()
    (tmp_path / "a").rename(tmp_path / "b" / "train")
    moved = both(tmp_path / "b")
    assert [split.names() for split in moved] == [train.names(), val.names()]


def test_these_images_validate_on_any_machine_and_in_any_release(tmp_path: Path) -> None:
    write(tmp_path, [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(9)])
    assert [name.decode() for name in both(tmp_path)[1].names()] == VALIDATING


def test_small_classes_have_one_on_either_side_and_it_is_told(tmp_path: Path) -> None:
    write(tmp_path, ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png", "eel/0.png", "eel/1.png"])
    for fraction in (1e-9, 1 - 1e-9):
        train, val = both(tmp_path, SplitRule(val_fraction=fraction))
        assert list(train.labels) == list(val.labels) == [0, 1, 2]
        assert {*train.names()}.isdisjoint(val.names())
        (note,) = notes_of(train, val)
        assert f"note: --val-fraction {fraction:g}: 3 classes have too few images" in note
        assert "the first cat; more images may take it back" in note
    (tmp_path / "dog" / "0.png").unlink()
    with pytest.raises(UserError, match=r"--val-fraction: class dog has one image in .*: it takes"):
        both(tmp_path)


def test_what_cannot_be_divided_is_one_line(tmp_path: Path, shards: Path) -> None:
    write(tmp_path, [f"{split}/{name}/0.png" for split in ("train", "val") for name in "ab"])
    for fraction in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(UserError, match=r"--val-fraction must be above 0 and below 1, not"):
            SplitRule(val_fraction=fraction)
    with pytest.raises(
        UserError, match=r"--val-fraction: .* has a folder val/ already: leave the flag out"
    ):
        both(tmp_path)
    with pytest.raises(UserError, match=r"--val-fraction: .* holds shards, with splits already"):
        both(shards)
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(UserError, match=r"no folder val/ .*, or --val-fraction 0.2 takes a share"):
        read_split(tmp_path, "val")
    with pytest.raises(UserError, match=r"no folder train/.*, or --val-fraction 0.2 reads .*/CLA"):
        read_split(tmp_path / "train", "train")
    write(tmp_path, ["c/1.png"])
    with pytest.raises(UserError, match=r"no folder train/.*, or --labels FILE.csv says what"):
        read_split(tmp_path / "c", "train")


@pytest.fixture(scope="module")
def shards(cifar10: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards") / "cifar10"
    assert prepare(["shard", str(cifar10 / "train"), str(root), *FLAGS]) == 0
    return root


def test_copies_and_shards_follow_the_rule(cifar10: Path, shards: Path, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    shutil.copytree(cifar10 / "train", root)
    train, val = both(root, check_files=True)
    packed = [read_split(shards, split) for split in ("train", "val")]
    assert sorted(packed[0].names()) == sorted(train.names())
    assert packed[1].names() == val.names()
    assert prepare(["resize", str(root), str(root), "--short-side", "16", *FLAGS]) == 0
    assert json.loads((root / "16" / "dataset.json").read_text())["images"] == {"all": 500}
    assert both(root)[0].names() == train.names(), "the copies are no class"
    copy = read_copy(root, "16", train)
    assert [Path(file.path).stem for file in copy.files] == [
        Path(file.path).stem for file in train.files
    ]
    assert copy.files[0].path.startswith(f"{root}/16/{train.classes[0]}/")
    alone = both(root / "16")
    stems = [[name.rpartition(b".")[0] for name in split.names()] for split in (*alone, train, val)]
    assert stems[:2] == stems[2:], "copies by themselves are divided as their originals"
    (root / "24").mkdir()
    shutil.copy(train.files[0].path, root / "24")
    with pytest.raises(UserError, match=r"/24 holds images of .*/photos itself: name another DST"):
        prepare(["resize", str(root), str(root), "--short-side", "24", *FLAGS])


def test_training_and_evaluation_divide_alike(
    cifar10: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = cifar10 / "train", tmp_path / "run"
    flags = ("--val-fraction", 0.2, "--epochs", 1, "--set", "tta=none", *SMALL)
    out, _ = train("--data", data, "--output", run, *flags)
    plan = json.loads((run / "plan.json").read_text())
    counts = plan["num_train"], plan["num_val"]
    assert sum(counts) == 500 and 60 < counts[1] < 140 and plan["data"] == str(data)
    assert f"  data: {counts[0]} training and {counts[1]} validation images, 10 classes" in out
    summary = json.loads((run / "summary.json").read_text())
    for flags in ((), ("--data", data), ("--data", data, "--val-fraction", 0.2)):
        found, error = evaluate(run, *flags, "--device", "cpu", "--json")
        result = json.loads(found)
        assert (result["images"], result["split"]) == (counts[1], "val")
        assert result["top1"] == summary["top1"]
        assert ("divided as its run had it, --val-fraction 0.2" in error) == (len(flags) < 4)
    # Data with a folder of their own are not divided, whatever the checkpoint's run did.
    found, error = evaluate(run, "--data", cifar10, "--device", "cpu", "--json")
    assert json.loads(found)["images"] == 200 and "divided" not in error
    _, error = evaluate(run, "--data", tmp_path, "--device", "cpu", status=2)
    assert error.splitlines()[-1].startswith("error: ")


def labelled(root: Path, content: str) -> SplitRule:
    (root / "labels.csv").write_text(content)
    return SplitRule(labels=root / "labels.csv")


def test_a_table_names_images_classes_and_splits(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write(root, [f"images/{number}.png" for number in range(6)])
    rule = labelled(
        tmp_path,
        "split,path,label,author\nval,images/3.png,dog,x\ntrain,images/2.png,cat,x\n"
        f"train,{root}/images/1.png,dog,\nval,images/0.png,cat\n\ntest,images/4.png,cat,\n",
    )
    for _ in range(2):  # made, then perhaps from the cache
        train, val = both(root, rule, check_files=True)
        assert train.names() == [b"images/2.png", b"images/1.png"]
        assert val.names() == [b"images/0.png", b"images/3.png"]
        assert list(train.labels) == list(val.labels) == [0, 1]
        assert train.classes == val.classes == ("cat", "dog")
        assert notes_of(train, val) == [
            f"left out 1 row of --labels {tmp_path}/labels.csv of split test"
        ]
    skip_list = tmp_path / "skip.txt"
    skip_list.write_text("images/9.png\nimages/4.png\n")
    lists = [read_split(root, split, skip_list, rule=rule) for split in ("train", "val")]
    assert "1 name matches no image, the first: images/9.png" in notes_of(*lists)[0]
    (root / "images" / "3.png").unlink()
    with pytest.raises(UserError, match=r"images/3.png cannot be read \(No such file"):
        both(root, rule, check_files=True)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_table_from_windows_with_a_fraction(tmp_path: Path, encoding: str) -> None:
    root = tmp_path / "data"
    names = [f"images/{number}.png" for number in range(40)]
    write(root, names)
    lines = [
        name.replace("/", "\\") + (",h\u00e9" if i % 2 else ",a") for i, name in enumerate(names)
    ]
    (tmp_path / "t.csv").write_bytes("\r\n".join(["Path,Label", *lines]).encode(encoding))
    train, val = both(root, SplitRule(labels=tmp_path / "t.csv", val_fraction=0.25))
    assert train.classes == ("a", "h\u00e9") and len(train) + len(val) == 40
    assert 2 <= len(val) <= 20
    flags = ["--labels", str(tmp_path / "t.csv"), "--workers", "1"]
    assert prepare(["resize", str(root), str(root), "--short-side", "8", *flags]) == 0
    copy = read_copy(root, "8", train)
    assert [Path(file.path).name for file in copy.files] == [
        f"{Path(file.path).stem}.jpg" for file in train.files
    ]
    flags += ["--val-fraction", "0.25"]
    assert prepare(["shard", str(root), str(tmp_path / "dst"), *flags]) == 0
    assert len(read_split(tmp_path / "dst", "val")) == len(val)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1 must name the columns path, label"),
        ("0.png,cat\n", "line 1 must name the columns path, label"),
        ("path,label\n", "names no image"),
        ("path,label\n0.png\n", "line 2 must have a label that could name a folder, not ''"),
        ("path,label\n0.png,a/b\n", "line 2 must have a label that could name a folder"),
        ("path,label\n,cat\n", "line 2 must have a path"),
        ("path,label\n../0.png,cat\n", "line 2 must name an image in "),
        ("path,label\n0.png,a\n1.png,a\n0.png,b\n", "line 4 has another label or split of 0.png"),
        ("path,label\n0.png,a\n1.png,b\n", "has no column split: --val-fraction 0.2 takes"),
        ("path,label,split\n0.png,a,trian\n", "the column split must be train, val, valid, "),
        ("path,label,split\n0.png,a,train\n", "the column split has no row of val"),
        ('path,label\n"0.png,a\n', "labels.csv: unexpected end of data"),
    ],
)
def test_a_wrong_table_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path, ["0.png", "1.png"])
    with pytest.raises(UserError) as caught:
        both(tmp_path, labelled(tmp_path, content))
    assert "--labels" in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_that_says_the_splits_takes_no_fraction(tmp_path: Path) -> None:
    write(tmp_path, ["0.png", "1.png"])
    rule = labelled(tmp_path, "path,label,split\n0.png,a,train\n1.png,a,val\n")
    with pytest.raises(UserError, match=r"--val-fraction: --labels .* has a column split: leave"):
        both(tmp_path, SplitRule(labels=rule.labels, val_fraction=0.5))
    with pytest.raises(UserError, match=r"--labels: cannot read .*/none.csv"):
        both(tmp_path, SplitRule(labels=tmp_path / "none.csv"))


@pytest.mark.parametrize("flags", [("--val-fraction", "2"), ("--labels", "none.csv")])
@pytest.mark.parametrize(
    "command", ["fastimagenet.train", "fastimagenet.lr_find", "pipelines.parity"]
)
def test_commands_take_the_flags(command: str, flags: tuple[str, str], cifar10: Path) -> None:
    if command == "pipelines.parity":
        pytest.importorskip("nvidia.dali")
        flags = (str(cifar10), *flags)
    else:
        flags = ("--data", str(cifar10), *SMALL, *flags)
    _, error = output_of(command, *flags, status=2)
    assert error.startswith("error: --") and error.count("\n") == 1


def test_scan_and_shard_take_the_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "data", [f"{name}/{number}.png" for name in "ab" for number in range(5)])
    (tmp_path / "data" / "a" / "3.png").write_bytes(b"")
    command = ["scan", str(tmp_path / "data"), "--workers", "1"]
    report = tmp_path / "report.json"
    assert prepare([*command, "--val-fraction", "0.4", "--report", str(report)]) == 1
    found = json.loads(report.read_text())
    assert found["images"] == 10 and found["problems"] == []
    assert [each["path"] for each in found["findings"] if each["kind"] == "empty"] == ["a/3.png"]
    assert found["duplicates_between_splits"], "the images are all alike"
    with pytest.raises(UserError, match=r"scan .*/data --val-fraction 0.4 --skip-list FILE writes"):
        both(tmp_path / "data", SplitRule(val_fraction=0.4), check_files=True)
    capsys.readouterr()
    assert exit_status(prepare, command) == 2
    assert "or --val-fraction 0.2 reads" in capsys.readouterr().err
