"""`prepare imagenet` on small archives of the official structure, made here of real photographs."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.datasets.images import whole_files
from pipelines.datasets.split import Split, read_split
from pipelines.errors import UserError
from pipelines.prepare.__main__ import main
from pipelines.prepare.archives import read_bytes, read_members

ROOT = Path(__file__).resolve().parent.parent
TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
WNIDS = ["n02119789", "n01440764", "n02100735"]
"""In the order of their ILSVRC2012_ID, which is not that of their names."""
VAL_IDS = [2, 3, 1, 1, 2, 3, 3]


def add(archive: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


def tar_of(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            add(archive, name, content, mtime=time.time())
    return file.getvalue()


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08}.JPEG"


def write_devkit(path: Path, ids: list[int]) -> None:
    """As the official one: a struct array of leaves and inner nodes, and one ID a line."""
    from scipy.io import savemat

    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children")
    synsets = np.empty((len(WNIDS) + 1, 1), dtype=[(name, object) for name in fields])
    for index, wnid in enumerate([*WNIDS, "n00001740"]):
        children = np.arange(3 * (index == len(WNIDS)), dtype=np.uint16)
        synsets[index, 0] = (index + 1.0, wnid, f"word {index}", "", float(len(children)), children)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets}, do_compression=True)
    root = "ILSVRC2012_devkit_t12"
    with tarfile.open(path, "w:gz") as archive:
        add(archive, f"{root}/", type=tarfile.DIRTYPE)
        add(archive, f"{root}/readme.txt", b"of no use\n")
        add(archive, f"{root}/data/meta.mat", meta.getvalue())
        lines = "".join(f"{number}\n" for number in ids).encode()
        add(archive, f"{root}/data/ILSVRC2012_validation_ground_truth.txt", lines)


@pytest.fixture(scope="module")
def images(photographs: Path) -> dict[str, bytes]:
    """SPLIT/WNID/NAME -> content: what has to come out."""
    paths = sorted((photographs / "train").glob("*/*"))[::20]
    contents = iter([path.read_bytes() for path in paths])
    tree = {
        f"train/{wnid}/{wnid}_{number}.JPEG": next(contents)
        for wnid in WNIDS
        for number in (10, 7, 10026)
    }
    return tree | {
        f"val/{WNIDS[number - 1]}/{val_name(place)}": next(contents)
        for place, number in enumerate(VAL_IDS, start=1)
    }


@pytest.fixture
def archives(images: dict[str, bytes], tmp_path: Path) -> Path:
    """A folder with both archives and the devkit."""
    folder = tmp_path / "archives"
    folder.mkdir()
    inner: dict[str, dict[str, bytes]] = {wnid: {} for wnid in WNIDS}
    val = {}
    for path, content in images.items():
        split, wnid, name = path.split("/")
        if split == "train":
            inner[wnid][name] = content
        else:
            val[name] = content
    (folder / TRAIN).write_bytes(tar_of({f"{k}.tar": tar_of(v) for k, v in inner.items()}))
    (folder / VAL).write_bytes(tar_of(dict(sorted(val.items()))))
    write_devkit(folder / DEVKIT, VAL_IDS)
    return folder


def tree_of(root: Path) -> dict[str, bytes]:
    """All files under a folder but dataset.json, hidden ones too."""
    files = (path for path in root.rglob("*") if not path.is_dir())
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in files
        if path.name != "dataset.json"
    }


def prepare(*arguments: object) -> int:
    return main(["imagenet", *map(str, arguments)])


def error_of(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        prepare(*arguments)
    return str(caught.value)


def test_archives_become_class_folders(
    archives: Path, images: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dst = tmp_path / "imagenet"
    assert prepare(archives, dst) == 0
    assert tree_of(dst) == images
    out = capsys.readouterr().out
    assert f"train: 9 images in 3 classes in {dst}/train; 9 written now, 0 were there" in out
    assert "train: note: this is not all of ILSVRC-2012, whose" in out
    manifest = json.loads((dst / "dataset.json").read_text())
    assert manifest["dataset"] == "ImageNet" and manifest["used_blacklist"] is True
    assert manifest["splits"]["train"] == {
        "archive": TRAIN,
        "archive_bytes": (archives / TRAIN).stat().st_size,
        "images": 9,
        "classes": 3,
    }
    assert manifest["splits"]["val"]["images"] == 7 and manifest["splits"]["val"]["left_out"] == []
    train, val = read_split(dst, "train"), read_split(dst, "val")
    assert train.classes == val.classes == tuple(sorted(WNIDS))


@pytest.mark.parametrize("with_names", [False, True])
def test_a_label_file_serves_in_place_of_the_devkit(
    archives: Path, images: dict[str, bytes], tmp_path: Path, with_names: bool
) -> None:
    (archives / DEVKIT).unlink()
    assert "--val-labels" in error_of(archives, tmp_path / "imagenet")
    lines = [WNIDS[number - 1] for number in VAL_IDS]
    if with_names:
        lines = [f"{val_name(place)} {wnid}" for place, wnid in enumerate(lines, start=1)][::-1]
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(lines) + "\n\n")
    assert prepare(archives, tmp_path / "imagenet", "--val-labels", labels) == 0
    assert tree_of(tmp_path / "imagenet") == images


def test_one_split_alone_and_then_the_other(
    archives: Path, images: dict[str, bytes], tmp_path: Path
) -> None:
    dst = tmp_path / "imagenet"
    (archives / DEVKIT).rename(archives / "later")
    assert prepare(archives, dst, "--split", "train") == 0
    assert tree_of(dst) == {k: v for k, v in images.items() if k.startswith("train/")}
    (archives / "later").rename(archives / DEVKIT)
    assert prepare(archives, dst, "--split", "val") == 0
    assert tree_of(dst) == images
    assert set(json.loads((dst / "dataset.json").read_text())["splits"]) == {"train", "val"}


def test_a_second_call_writes_what_is_missing_or_cut(
    archives: Path, images: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dst = tmp_path / "imagenet"
    prepare(archives, dst)
    missing, cut, *others = [dst / name for name in images if name.startswith("train/")]
    inodes = {path: path.stat().st_ino for path in others}
    missing.unlink()
    os.truncate(cut, 0)
    capsys.readouterr()
    prepare(archives, dst)
    out = capsys.readouterr().out
    assert "train; 2 written now, 7 were there" in out and "val; 0 written now, 7 were" in out
    assert tree_of(dst) == images
    assert {path: path.stat().st_ino for path in others} == inodes


@pytest.fixture
def kaggle(images: dict[str, bytes], tmp_path: Path) -> Path:
    """What Kaggle's archive unpacks to: val/ is flat, its labels are in a table of boxes."""
    folder = tmp_path / "kaggle"
    rows = ["ImageId,PredictionString"]
    for path, content in images.items():
        split, wnid, name = path.split("/")
        place = folder / "ILSVRC/Data/CLS-LOC" / split / (wnid if split == "train" else "")
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
        if split == "val":
            rows.append(f"{name.removesuffix('.JPEG')},{wnid} 85 1 499 272 {wnid} 4 4 90 90 ")
    (folder / "LOC_val_solution.csv").write_text("\r\n".join([rows[0], *rows[:0:-1]]) + "\r\n")
    return folder


@pytest.mark.parametrize("place", ["", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_folders_become_class_folders(
    kaggle: Path, images: dict[str, bytes], tmp_path: Path, place: str
) -> None:
    dst = tmp_path / "imagenet"
    assert prepare(kaggle / place, dst) == 0
    assert tree_of(dst) == images
    assert prepare(kaggle / place, dst) == 0 and tree_of(dst) == images  # a second call
    source = kaggle / "ILSVRC/Data/CLS-LOC/val"
    manifest = json.loads((dst / "dataset.json").read_text())
    assert manifest["splits"]["val"]["folder"] == str(source)
    one = next(source.iterdir())  # no second copy of 150 GB
    assert one.samefile(next(dst.rglob(one.name)))


def test_what_reads_kaggles_folders_as_they_are_is_told_of_prepare(
    kaggle: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"as Kaggle has it: python -m pipelines.prepare imagenet "):
        read_split(kaggle, "train")
    folder = kaggle / "ILSVRC/Data/CLS-LOC"
    assert len(read_split(folder, "train")) == 9
    with pytest.raises(UserError, match=f"7 loose files, .* imagenet {folder} DST sorts ImageNet"):
        read_split(folder, "val")


def test_on_another_disk_kaggles_images_are_copied(
    kaggle: Path, images: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert prepare(kaggle, tmp_path / "imagenet") == 0
    assert tree_of(tmp_path / "imagenet") == images


def test_what_is_wrong_in_kaggles_folders_is_named(kaggle: Path, tmp_path: Path) -> None:
    val, dst = kaggle / "ILSVRC/Data/CLS-LOC/val", tmp_path / "dst"
    (val / "mine.jpg").write_bytes(b"image")
    assert f"{val}/mine.jpg is refused: a flat ILSVRC2012_val_" in error_of(kaggle, dst)
    (val / "mine.jpg").rename(val / val_name(50_000))
    assert f"{val}: {val_name(50_000)} has no label; there are 7" in error_of(kaggle, dst)
    (kaggle / "LOC_val_solution.csv").rename(kaggle / "elsewhere.csv")
    assert "has neither ILSVRC2012_devkit" in error_of(kaggle, dst)
    (val / val_name(50_000)).unlink()
    assert prepare(kaggle, dst, "--val-labels", kaggle / "elsewhere.csv") == 0


def many_images(path: Path, count: int) -> None:
    """A validation archive of small files, so that there is time to stop its unpacking."""
    with tarfile.open(path, "w") as archive:
        for number in range(1, count + 1):
            add(archive, val_name(number), b"%08d" % number * 100)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_call_leaves_whole_files_and_is_resumed(
    tmp_path: Path, number: signal.Signals
) -> None:
    count, dst = 3_000, tmp_path / "imagenet"
    many_images(tmp_path / VAL, count)
    labels = tmp_path / "labels.txt"
    labels.write_text("n01440764\n" * count)
    arguments = ["imagenet", tmp_path, dst, "--split", "val", "--val-labels", labels]
    command = [sys.executable, "-m", "pipelines.prepare", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    folder = dst / "val" / "n01440764"
    deadline = time.monotonic() + 60
    while not (folder.is_dir() and len(os.listdir(folder)) > 50):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) in [(-signal.SIGKILL, ""), (130, "interrupted\n")]
    there = tree_of(dst / "val")
    assert 50 < len(there) < count and not (dst / "dataset.json").exists()
    assert {len(content) for content in there.values()} == {800}
    assert (dst / ".partial").exists() == (number == signal.SIGKILL)
    assert main(list(map(str, arguments))) == 0
    done = tree_of(dst)
    assert len(done) == count and done[f"val/n01440764/{val_name(77)}"] == b"00000077" * 100


def test_the_blacklist_is_a_choice_that_is_written_down(
    archives: Path, images: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastimagenet.report.summary import used_blacklist

    blacklist = tmp_path / "blacklist.txt"
    blacklist.write_text("2\n7\n")
    dst = tmp_path / "imagenet"
    prepare(archives, dst, "--blacklist", blacklist)
    black = {name for name in images if name.endswith((val_name(2), val_name(7)))}
    assert tree_of(dst) == {name: images[name] for name in images.keys() - black}
    assert "val: 2 blacklisted images are left out" in capsys.readouterr().out
    manifest = json.loads((dst / "dataset.json").read_text())
    assert manifest["used_blacklist"] is False
    assert manifest["splits"]["val"]["left_out"] == [val_name(2), val_name(7)]
    classes = ("n01440764", *(f"n1{index:07}" for index in range(999)))
    some = Split(whole_files(["some"]), [0], classes)
    assert used_blacklist(dst, some) is False

    prepare(archives, dst)
    assert tree_of(dst) == images
    assert used_blacklist(dst, some) is True
    (dst / "dataset.json").unlink()
    assert used_blacklist(dst, some) is False, "one image is not all 50,000"
    assert used_blacklist(dst, Split(whole_files(["same"]) * 50_000, [0] * 50_000, classes)) is True
    assert used_blacklist(dst, read_split(dst, "val")) is None
    assert "is blacklisted but there" in error_of(archives, dst, "--blacklist", blacklist)


def huge(info: tarfile.TarInfo) -> None:
    info.size = 1 << 40


def negative(info: tarfile.TarInfo) -> None:
    info.size = -1024


def kind(value: bytes) -> Callable[[tarfile.TarInfo], None]:
    def change(info: tarfile.TarInfo) -> None:
        info.type = value
        info.linkname = "../../outside"

    return change


HOSTILE = [
    ("../../outside/evil.JPEG", None),
    ("/tmp/outside/ILSVRC2012_val_00000001.JPEG", None),
    ("../ILSVRC2012_val_00000001.JPEG", None),
    ("n01440764_1.JPEG/../../../evil", None),
    ("ILSVRC2012_val_00000001.JPEG\n", None),
    ("evil" * 40, None),  # a long name: a header of its own
    *((val_name(1), kind(value)) for value in b"1 2 3 4 6 7 S L K V M".split()),
    (val_name(1), huge),
    (val_name(1), negative),
]


@pytest.mark.parametrize("place", ["val", "train", "inner"])
@pytest.mark.parametrize("name, change", HOSTILE)
def test_hostile_members_are_refused(
    archives: Path, tmp_path: Path, place: str, name: str, change: Callable | None
) -> None:
    if place == "train":
        name = name.replace(val_name(1), "n01440764.tar")
    elif place == "inner":
        name = name.replace(val_name(1), "n01440764_1.JPEG")
    info = tarfile.TarInfo(name)
    if change is not None:
        change(info)
    header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    content = header + tar_of({val_name(3): b"image"})
    if place == "inner":
        content = tar_of({"n01440764.tar": content})
    (archives / (VAL if place == "val" else TRAIN)).write_bytes(content)
    before = tree_of(tmp_path)
    split = "val" if place == "val" else "train"
    message = error_of(archives, tmp_path / "dst", "--split", split)
    assert "refused" in message or "ends within" in message or "damaged at byte" in message
    assert "\n" not in message and tree_of(tmp_path) == before, "nothing was written anywhere"


def test_a_cut_archive_is_named_and_what_came_before_is_kept(
    archives: Path, images: dict[str, bytes], tmp_path: Path
) -> None:
    whole = (archives / TRAIN).read_bytes()
    for tenth in (1, 5, 9):
        (archives / TRAIN).write_bytes(whole[: len(whole) * tenth // 10])
        message = error_of(archives, tmp_path / "dst", "--split", "train")
        assert TRAIN in message and "download it again" in message
        assert tree_of(tmp_path / "dst").items() <= images.items()
    (archives / TRAIN).write_bytes(whole)
    prepare(archives, tmp_path / "dst")
    assert tree_of(tmp_path / "dst") == images


def test_mutated_archives_end_in_an_error_or_in_their_files() -> None:
    draw = random.Random(5)
    whole = tar_of({f"name-{index}": bytes([index]) * 700 for index in range(4)})
    outcomes = {True: 0, False: 0}
    for _ in range(600):
        content = bytearray(whole[: draw.choice((len(whole), draw.randrange(len(whole))))])
        for _ in range(draw.choice((0, 1, 8))):
            # Most of the bytes of an archive are its files', which nobody reads here.
            place = draw.randrange(4) * 1536 + draw.randrange(512)
            if place < len(content):
                content[place] = draw.randrange(256)
        file = io.BytesIO(content)
        try:
            found = list(read_members(file, "archive", end=len(content)))
            assert len(found) <= 4 and all(member.end <= len(content) for member in found)
            for member in found:
                assert len(b"".join(read_bytes(file, "archive", member))) == member.size
            outcomes[True] += 1
        except UserError:
            outcomes[False] += 1
    assert min(outcomes.values()) > 40, outcomes


def test_files_that_are_not_the_archives_are_told(archives: Path, tmp_path: Path) -> None:
    dst = tmp_path / "imagenet"
    prepare(archives, dst)
    (dst / "val" / WNIDS[0] / "mine.JPEG").write_bytes(b"image")
    assert f"{dst}/val/{WNIDS[0]} has 3 files where the archive has 2" in error_of(archives, dst)


def test_a_disk_without_room_is_told_before_anything_is_written(
    archives: Path, tmp_path: Path
) -> None:
    os.truncate(archives / TRAIN, 1 << 43)  # 8.8 TB without a byte on the disk
    message = error_of(archives, tmp_path / "dst")
    assert "GB free and needs 8,972.0 GB" in message and not (tmp_path / "dst").exists()


def test_two_calls_at_once_are_refused(archives: Path, tmp_path: Path) -> None:
    lock = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is writing to" in error_of(archives, tmp_path)
    finally:
        os.close(lock)


@pytest.mark.parametrize(
    "labels, message",
    [
        ("n01440764\n01440764\n", r"labels.txt:2: n01440764 or .* not '01440764'"),
        ("n01440764\n\nn01440764\n", "labels.txt:2: "),
        (f"{val_name(1)} n01440764 n01440764\n", "labels.txt:1: "),
        ("../../evil n01440764\n", "labels.txt:1: "),
        (f"{val_name(1)} n01440764\n{val_name(1)} n02119789\n", "image 1 has two classes"),
        ("n01440764\n", r"ILSVRC2012_val_00000002.JPEG has no label; there are 1"),
    ],
)
def test_wrong_labels_are_named(archives: Path, tmp_path: Path, labels: str, message: str) -> None:
    (tmp_path / "labels.txt").write_text(labels)
    arguments = (archives, tmp_path / "dst", "--val-labels", tmp_path / "labels.txt")
    with pytest.raises(UserError, match=message):
        prepare(*arguments)


def test_wrong_devkits_flags_and_lists_are_named(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst, lines = tmp_path / "dst", tmp_path / "lines.txt"
    lines.write_text("17\nn01440764\n")
    assert "lines.txt:2: the number of" in error_of(archives, dst, "--blacklist", lines)
    assert "cannot read" in error_of(archives, dst, "--blacklist", tmp_path / "absent")
    message = error_of(archives, dst, "--split", "train", "--blacklist", lines)
    assert message == "--blacklist is about validation images: not with --split train"
    assert f"{tmp_path} has no {VAL}" in error_of(tmp_path, dst)
    monkeypatch.setitem(sys.modules, "scipy.io", None)  # as where it is not installed
    assert "pip install scipy, or give --val-labels FILE" in error_of(archives, dst)
    monkeypatch.undo()
    write_devkit(archives / DEVKIT, [1, 9])
    assert "ground_truth.txt:2: no class has the number '9'" in error_of(archives, dst)
    devkit = (archives / DEVKIT).read_bytes()
    (archives / DEVKIT).write_bytes(devkit[:-200])
    assert f"{DEVKIT} is damaged" in error_of(archives, dst)
    (archives / DEVKIT).write_bytes(b"no archive")
    assert f"{DEVKIT} is damaged (Not a gzipped file" in error_of(archives, dst)
    assert not dst.exists()
