"""`prepare shard` on real photographs, read back by tarfile, DALI and DALI's index tool."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from hashlib import sha256
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from test_prepare_resize import processes_of

from pipelines.cli import exit_status
from pipelines.datasets.split import read_split
from pipelines.errors import UserError
from pipelines.prepare.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
WDS2IDX = Path(sys.executable).parent / "wds2idx"
COUNT = 150
"""Photographs of each split, about 16 MB, of a call that is stopped after 5 shards of 1 MiB."""
NAMES = {
    "plain.JPEG": "plain.JPEG",
    "plain.jpg": "~{}.jpg",
    "two.dots.jpeg": "two%2Edots.jpeg",
    "a space (7).jpg": "a%20space%20%287%29.jpg",
    "h\u00f6chst.jpg": "h%C3%B6chst.jpg",
    "no-suffix": "no-suffix.img",
    "label.cls": "label%2Ecls.img",
    "odd.j pg": "odd%2Ej%20pg.img",
    "~0.jpg": "%7E0.jpg",
    "fits-" + 91 * "n" + ".jpg": "fits-" + 91 * "n" + ".jpg",
    "fits-not-" + 88 * "n" + ".jpg": "~{}.jpg",
    "long-" + 240 * "n" + ".jpg": "~{}.jpg",
}
"""File names, and the members' after the class; a number is the place in the sorted split."""


@pytest.fixture
def src(photographs: Path, tmp_path: Path) -> Path:
    """26 photographs for training and 6 for validation, with names of every kind, in 3 classes."""
    folder = tmp_path / "src"
    paths = iter(sorted((photographs / "train").glob("*/*"))[::15])
    classes = ("class one", "n01440764", 255 * "w")
    for split, count in (("train", 4), ("val", 2)):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                shutil.copy(next(paths), folder / split / name / f"{number}.JPEG")
    for name in NAMES:
        shutil.copy(next(paths), folder / "train" / "n01440764" / name)
    (folder / "train" / "class one" / ".hidden").write_bytes(b"")
    return folder


def shard(*arguments: object) -> int:
    return main(["shard", *map(str, arguments), "--workers", "2"])


def start(*arguments: object) -> subprocess.Popen[str]:
    """The command in a session of its own, as a terminal starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.prepare", "shard", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command, in this process."""
    capsys.readouterr()
    status = exit_status(main, ["shard", *map(str, arguments)])
    return status, *capsys.readouterr()


def members(dst: Path, split: str) -> list[tuple[str, bytes]]:
    """Name and content of all members of a split, in order, by Python's own reader."""
    found = []
    for path in sorted(dst.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                assert (info.mode, info.uid, info.gid, info.mtime) == (0o644, 0, 0, 0)
                assert info.isreg() and not info.pax_headers and info.offset_data % 512 == 0
                file = tar.extractfile(info)
                assert file is not None
                found.append((info.name, file.read()))
    return found


def samples(dst: Path, split: str) -> list[tuple[str, bytes, int]]:
    """(member, image, label) as WebDataset groups them: by all before the base name's first dot."""
    groups: dict[str, dict[str, tuple[str, bytes]]] = {}
    for name, content in members(dst, split):
        folder, _, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        assert suffix not in groups.setdefault(f"{folder}/{stem}", {})
        groups[f"{folder}/{stem}"][suffix] = name, content
    found = []
    for group in groups.values():
        (suffix,) = set(group) - {"cls"}
        found.append((*group[suffix], int(group["cls"][1])))
    return found


def files_of(dst: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in dst.iterdir()}


def test_images_below_class_folders_keep_their_paths(src: Path, tmp_path: Path) -> None:
    """So that two of one name stay apart, and copies are found."""
    folder = src / "train" / "class one"
    for number in (1, 2):
        below = folder / f"part {number}" / "images"
        below.mkdir(parents=True)
        shutil.copy(folder / "0.JPEG", below / "same.jpg")
    assert shard(src, tmp_path / "dst") == 0
    splits = [read_split(root, "train") for root in (src, tmp_path / "dst")]
    names = [sorted(n for n in split.names() if n.startswith(b"class one/")) for split in splits]
    assert names[0] == names[1] and names[0][-1] == b"class one/part 2/images/same.jpg"
    assert len(names[0]) == 6 and len(splits[1]) == 26


def test_shards_hold_every_file_bit_for_bit(
    src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (src / "dataset.json").write_text('{"dataset": "ImageNet", "used_blacklist": false}')
    assert shard(src, tmp_path / "dst", "--shard-size", 1) == 0
    dst = tmp_path / "dst"
    classes = sorted(path.name for path in (src / "train").iterdir())
    for split, count in (("train", 24), ("val", 6)):
        paths = sorted(path for path in src.glob(f"{split}/*/*") if path.name[0] != ".")
        found = samples(dst, split)
        assert len(found) == len(paths) == count
        expected = {(path.read_bytes(), classes.index(path.parent.name)) for path in paths}
        assert {(image, label) for _, image, label in found} == expected
        in_order = [path.read_bytes() for path in paths]
        assert ([image for _, image, _ in found] == in_order) == (split == "val")
    manifest = json.loads((dst / "shards.json").read_text())
    assert manifest["classes"] == classes and manifest["complete"] is True
    assert manifest["images"] == {"train": 24, "val": 6}
    assert manifest["dataset"] == {"dataset": "ImageNet", "used_blacklist": False}
    shards = manifest["splits"]["train"] + manifest["splits"]["val"]
    assert len(manifest["splits"]["train"]) > 2
    names = {"shards.json"}
    for entry in shards:
        tar, index = dst / entry["file"], (dst / entry["file"]).with_suffix(".idx")
        assert entry["bytes"] == tar.stat().st_size < 2 << 20
        assert entry["sha256"] == sha256(tar.read_bytes()).hexdigest()
        assert entry["index_sha256"] == sha256(index.read_bytes()).hexdigest()
        assert index.read_text().startswith(f"v1.2 {entry['images']}\n")
        names |= {tar.name, index.name}
    assert names == set(files_of(dst))
    assert f"dst: {len(shards)} written, 0 were there" in capsys.readouterr().out


def test_names_that_readers_would_stumble_over_are_encoded(src: Path, tmp_path: Path) -> None:
    shard(src, tmp_path / "dst")
    paths = sorted(path for path in src.glob("train/*/*") if path.name[0] != ".")
    member_of = {image: name for name, image, _ in samples(tmp_path / "dst", "train")}
    for place, path in enumerate(paths):
        name = member_of[path.read_bytes()]
        folder, _, base = name.rpartition("/")
        assert folder == {"class one": "class%20one", "n01440764": "n01440764"}.get(
            path.parent.name, "~2"
        )
        assert base == NAMES.get(path.name, path.name).format(place)
        if "~" not in name and ".img" not in name:
            original = unquote_to_bytes(name)
            assert original == os.fsencode(path.relative_to(src / "train"))


def test_the_seed_decides_the_order_and_nothing_else_does(src: Path, tmp_path: Path) -> None:
    for name, flags in (
        ("one", ()),
        ("same", ("--seed", 0, "--workers", 1)),
        ("other", ("--seed", 1)),
    ):
        assert main(["shard", *map(str, (src, tmp_path / name, "--shard-size", 1, *flags))]) == 0
        for path in src.glob("*/*/*"):
            os.utime(path, (1, 1))
    one, other = files_of(tmp_path / "one"), files_of(tmp_path / "other")
    assert one == files_of(tmp_path / "same")
    assert one["val-00000.tar"] == other["val-00000.tar"]
    assert one["train-00000.tar"] != other["train-00000.tar"]
    assert sorted(samples(tmp_path / "one", "train")) == sorted(
        samples(tmp_path / "other", "train")
    )


@pytest.mark.skipif(not WDS2IDX.exists(), reason="DALI's wds2idx is not installed")
def test_indexes_are_those_of_dalis_own_tool(src: Path, tmp_path: Path) -> None:
    shard(src, tmp_path / "dst", "--shard-size", 1)
    tars = sorted((tmp_path / "dst").glob("*.tar"))
    assert len(tars) > 3
    for tar in tars:
        command = [str(WDS2IDX), str(tar), str(tmp_path / "index")]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        assert (tmp_path / "index").read_bytes() == tar.with_suffix(".idx").read_bytes()


def test_dalis_own_reader_reads_them(src: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    dst = tmp_path / "dst"
    shard(src, dst, "--shard-size", 1)
    tars = sorted(dst.glob("train-*.tar"))
    pipeline = Pipeline(batch_size=24, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        pipeline.set_outputs(
            *fn.readers.webdataset(
                paths=[str(tar) for tar in tars],
                index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
                ext=["JPEG;jpeg;jpg;img", "cls"],
            )
        )
    pipeline.build()
    images, labels = pipeline.run()
    found = [
        (np.array(images.at(place)).tobytes(), int(np.array(labels.at(place)).tobytes()))
        for place in range(24)
    ]
    assert found == [(image, label) for _, image, label in samples(dst, "train")]


def test_a_second_call_mends_what_is_damaged_or_older_than_its_images(
    src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dst = tmp_path / "dst"
    shard(src, dst, "--shard-size", 1)
    expected = files_of(dst)
    tars = sorted(dst.glob("*.tar"))
    assert len(tars) >= 4
    data = bytearray(expected[tars[0].name])
    data[700] ^= 1
    tars[0].write_bytes(data)
    tars[1].with_suffix(".idx").unlink()
    path = next((src / "val").glob("*/*"))
    os.utime(path, (time.time() + 5,) * 2)
    inode = tars[2].stat().st_ino
    capsys.readouterr()
    shard(src, dst, "--shard-size", 1)
    assert f"dst: 3 written, {len(tars) - 3} were there" in capsys.readouterr().out
    assert files_of(dst) == expected and tars[2].stat().st_ino == inode


def test_other_images_or_flags_need_another_folder(src: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    shard(src, dst)
    expected = files_of(dst)
    with pytest.raises(UserError, match=r"--seed: .*/dst was made with 0, not 1: name another"):
        shard(src, dst, "--seed", 1)
    with pytest.raises(UserError, match=r"--shard-size: .*/dst was made with 128, not 64: name"):
        shard(src, dst, "--shard-size", 64)
    (src / "train" / "class one" / "0.JPEG").unlink()
    with pytest.raises(UserError, match="/dst holds shards of other images: name another DST"):
        shard(src, dst)
    assert files_of(dst) == expected
    (dst / "shards.json").unlink()
    with pytest.raises(UserError, match=r"/dst is not empty and has no shards\.json: name a new"):
        shard(src, dst)
    (dst / "shards.json").write_text("{")
    with pytest.raises(UserError, match=r"/dst/shards\.json is damaged \(no JSON\)"):
        shard(src, dst)


def test_wrong_flags_are_named_before_anything_is_written(src: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((src, src / "dst"), "/src/dst lies in .*/src itself: name another DST"),
        ((src, src), "/src lies in .*/src itself: name another DST"),
        ((tmp_path / "none", tmp_path / "dst"), "no folder .*/none: "),
        ((src, tmp_path / "dst", "--shard-size", 0), "--shard-size must be from 1 to 1024 MiB"),
        ((src, tmp_path / "dst", "--seed", -1), "--seed must be from 0 to 9223372036854775807"),
    ):
        with pytest.raises(UserError, match=message):
            shard(*arguments)
    shutil.rmtree(src / "val" / "n01440764")
    with pytest.raises(UserError, match=r"differ .only in training: n01440764"):
        shard(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists() and sorted(os.listdir(src)) == ["train", "val"]


def test_bad_images_are_named_or_left_out(
    src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = src / "train" / "class one" / "bad.jpg"
    bad.write_bytes((src / "train" / "class one" / "0.JPEG").read_bytes()[:999])
    status, _, err = run(capsys, src, tmp_path / "dst")
    assert status == 2 and err.startswith(f"error: {bad} is truncated") and err.count("\n") == 1
    assert not (tmp_path / "dst").exists()
    (tmp_path / "list.txt").write_text("train/class one/bad.jpg\n")
    status, out, err = run(capsys, src, tmp_path / "dst", "--skip-list", tmp_path / "list.txt")
    assert (status, err) == (0, "") and "train: 24 images" in out
    status, out, err = run(capsys, src, tmp_path / "skip", "--on-bad-image", "skip")
    assert (status, err) == (0, "") and "left out 1 bad file of 25; the first: " in out
    assert files_of(tmp_path / "dst") == files_of(tmp_path / "skip")


def test_the_split_test_stands_in_for_val(src: Path, tmp_path: Path) -> None:
    shard(src, tmp_path / "one")
    (src / "val").rename(src / "test")
    shard(src, tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    shutil.rmtree(src / "train")
    shard(src, tmp_path / "three")
    assert sorted(files_of(tmp_path / "three")) == ["shards.json", "val-00000.idx", "val-00000.tar"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_call_leaves_whole_shards_and_is_resumed(
    photographs: Path,
    tmp_path: Path,
    number: signal.Signals,
    capsys: pytest.CaptureFixture[str],
) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    for split in ("train", "val"):
        (src / split).mkdir(parents=True)
        for folder in sorted((photographs / split).iterdir())[:COUNT]:
            (src / split / folder.name).symlink_to(folder, target_is_directory=True)
    arguments = (src, dst, "--shard-size", 1, "--workers", 2)
    process = start(*arguments)
    deadline = time.monotonic() + 60
    while len(list(dst.glob("*.idx"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert number == signal.SIGKILL or err == "interrupted\n"
    while processes_of(process.pid):
        assert time.monotonic() < deadline, "its worker processes are still there"
        time.sleep(0.05)
    there = {path: path.stat().st_ino for path in dst.glob("*.tar")}
    whole = [path for path in there if path.with_suffix(".idx").exists()]
    for path in whole:
        with tarfile.open(path) as tar:
            count = int(path.with_suffix(".idx").read_text().split()[1])
            assert len(tar.getmembers()) == 2 * count
    assert json.loads((dst / "shards.json").read_text())["complete"] is False
    assert (dst / ".partial").exists() == (number == signal.SIGKILL)
    status, out, err = run(capsys, *arguments)
    assert (status, err) == (0, ""), err
    assert f"{len(whole)} were there" in out and not (dst / ".partial").exists()
    assert all(path.stat().st_ino == there[path] for path in whole)
    assert json.loads((dst / "shards.json").read_text())["complete"] is True
    assert len(samples(dst, "val")) == COUNT
