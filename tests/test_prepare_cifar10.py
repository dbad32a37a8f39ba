"""`prepare cifar10` on small archives of exactly the official structure, python and binary."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.datasets.known import CIFAR10_CLASSES
from pipelines.datasets.split import check_classes, read_split
from pipelines.errors import UserError
from pipelines.prepare.__main__ import main

COUNT = 20
NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


class Batches:
    """Pixels (6, N, 3, 32, 32) uint8 and labels (6, N) of the six batches, each class in each."""

    pixels = np.random.default_rng(0).integers(0, 256, (6, COUNT, 3, 32, 32), np.uint8)
    labels = np.stack(
        [np.random.default_rng(i).permutation(np.arange(COUNT) % 10) for i in range(6)]
    )


def short_text(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text


def array_pickle(shape: tuple[int, int], content: bytes, code: bytes = b"u1") -> bytes:
    """An array as Python 2 and NumPy 1 pickled it; only the notes (BINPUT) are left out."""
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        + b"(K\x01J" + struct.pack("<i", shape[0]) + b"J" + struct.pack("<i", shape[1]) + b"\x86"
        + b"cnumpy\ndtype\n" + short_text(code) + b"K\x00K\x01\x87R"
        + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + b"\x89T" + struct.pack("<i", len(content)) + content + b"tb"
    )  # fmt: skip


def batch_pickle(index: int, data: bytes | None = None, labels: list[int] | None = None) -> bytes:
    """One batch, protocol 2, keys in the official order."""
    if data is None:
        data = array_pickle((COUNT, 3072), Batches.pixels[index].tobytes())
    numbers = Batches.labels[index].tolist() if labels is None else labels
    text = b"testing batch 1 of 1" if index == 5 else b"training batch %d of 5" % (index + 1)
    names = b"".join(short_text(b"some_s_%06d.png" % number) for number in range(COUNT))
    return (
        b"\x80\x02}q\x01("
        + short_text(b"batch_label") + short_text(text)
        + short_text(b"labels") + b"](" + b"".join(b"K" + bytes([n]) for n in numbers) + b"e"
        + short_text(b"data") + data
        + short_text(b"filenames") + b"](" + names + b"eu."
    )  # fmt: skip


def python_files() -> dict[str, bytes]:
    return {name: batch_pickle(index) for index, name in enumerate(NAMES)}


def binary_files() -> dict[str, bytes]:
    records = np.concatenate(
        [Batches.labels[:, :, None].astype(np.uint8), Batches.pixels.reshape(6, COUNT, 3072)],
        axis=2,
    )
    return {f"{name}.bin": records[index].tobytes() for index, name in enumerate(NAMES)}


def write_archive(path: Path, folder: str, files: dict[str, bytes]) -> Path:
    """In an order as mixed as the official one, with a page and meta data that nobody reads."""
    with tarfile.open(path, "w:gz") as archive:
        top = tarfile.TarInfo(folder)
        top.type = tarfile.DIRTYPE
        archive.addfile(top)
        for name in ["readme.html", *sorted(files, reverse=True)]:
            content = files.get(name, b"<html>")
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_source(tmp_path: Path, version: str) -> Path:
    files = python_files() if version.startswith("python") else binary_files()
    if version.endswith("archive"):
        kind = "python" if version.startswith("python") else "binary"
        path = tmp_path / f"cifar-10-{kind}.tar.gz"
        return write_archive(path, f"cifar-10-batches-{'py' if kind == 'python' else 'bin'}", files)
    folder = tmp_path / "unpacked"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def prepare(*arguments: object) -> int:
    return main(["cifar10", *map(str, arguments)])


def test_the_small_batches_are_what_numpy_reads() -> None:
    """The official files are read with a plain unpickler and NumPy; so are these."""
    for index, content in enumerate(python_files().values()):
        batch = pickle.loads(content, encoding="bytes")
        assert np.array_equal(batch[b"data"], Batches.pixels[index].reshape(COUNT, 3072))
        assert batch[b"labels"] == Batches.labels[index].tolist()
        assert len(batch[b"filenames"]) == COUNT


@pytest.mark.parametrize(
    "version", ["python archive", "python folder", "binary archive", "binary folder"]
)
def test_every_version_gives_the_same_pixels(
    tmp_path: Path, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dst = tmp_path / "cifar10"
    assert prepare(write_source(tmp_path, version), dst) == 0
    out = capsys.readouterr().out
    assert f"train: 100 images, val: 20 images in {dst}; 120 written now, 0 were there" in out
    assert "note: this is not all of CIFAR-10" in out
    assert ("is not the official archive: its md5 is" in out) == version.endswith("archive")
    seen = Counter[str]()
    for split, batches in (("train", range(5)), ("val", [5])):
        place = 0
        for batch in batches:
            for pixels, label in zip(Batches.pixels[batch], Batches.labels[batch], strict=True):
                path = dst / split / CIFAR10_CLASSES[label] / f"{place:05}.png"
                with Image.open(path) as image:
                    assert image.mode == "RGB"
                    assert np.array_equal(np.asarray(image), pixels.transpose(1, 2, 0))
                place += 1
                seen[split] += 1
    assert sum(1 for path in dst.rglob("*") if path.is_file()) == seen.total() + 1
    manifest = json.loads((dst / "dataset.json").read_text())
    assert manifest["dataset"] == "CIFAR10" and manifest["images"] == {"train": 100, "val": 20}
    splits = [read_split(dst, split) for split in ("train", "val")]
    check_classes(*splits)
    assert splits[0].classes == CIFAR10_CLASSES


def test_the_folder_that_holds_the_archive_will_do(tmp_path: Path) -> None:
    write_source(tmp_path, "binary archive")
    prepare(tmp_path, tmp_path / "cifar10")
    assert len(list((tmp_path / "cifar10").rglob("*.png"))) == 120


def test_a_second_call_writes_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, dst = write_source(tmp_path, "python archive"), tmp_path / "cifar10"
    prepare(source, dst)
    gone, emptied, *others = sorted(dst.rglob("*.png"))
    contents = [path.read_bytes() for path in (gone, emptied)]
    inodes = [path.stat().st_ino for path in others]
    gone.unlink()
    emptied.write_bytes(b"")
    (dst / ".partial").mkdir()
    (dst / ".partial" / "4711").write_bytes(b"half an im")
    capsys.readouterr()
    prepare(source, dst)
    assert "2 written now, 118 were there" in capsys.readouterr().out
    assert [path.read_bytes() for path in (gone, emptied)] == contents
    assert [path.stat().st_ino for path in others] == inodes
    assert not (dst / ".partial").exists()
    (gone.parent / "mine.png").write_bytes(contents[0])
    with pytest.raises(UserError, match="has 11 files where the archive has 10"):
        prepare(source, dst)


HOSTILE = {
    "a command": b"cposix\nsystem\n(U\x0etouch evil.txttR",
    "eval": b"c__builtin__\neval\n(U\x1copen('evil.txt','w').close()tR",
    "another function of numpy": b"cnumpy.core.multiarray\nscalar\n)R",
    "objects": array_pickle((1, 3072), bytes(3072), b"O8"),
    "floats": array_pickle((1, 3072), bytes(3072 * 4), b"f4"),
    "cut short": array_pickle((1, 3072), bytes(3000)),
    "another shape": array_pickle((4, 768), bytes(3072)),
    "a list of pixels": b"](K\x01e",
    "a huge memo": b"(U\x01at0r\xff\xff\xff\x7f",
    "a huge text": b"T\xff\xff\xff\x7fabc",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles_are_refused(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_source(tmp_path, "python folder")
    (source / "data_batch_1").write_bytes(batch_pickle(0, data))
    with pytest.raises(UserError, match="data_batch_1 is no batch of CIFAR-10") as caught:
        prepare(source, tmp_path / "dst")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil.txt").exists()
    assert not list((tmp_path / "dst").rglob("*.png"))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("data_batch_2", batch_pickle(1, labels=[3] * 19), "has 20 images but 19 labels"),
        ("data_batch_2", batch_pickle(1, labels=[10] * 20), "has labels that are not 0 to 9"),
        ("test_batch", b"", "test_batch is no batch of CIFAR-10"),
        ("test_batch", None, "is no CIFAR-10: it should have data_batch_1"),
    ],
)
def test_wrong_files_are_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    source = write_source(tmp_path, "python folder")
    if content is None:
        (source / name).unlink()
    else:
        (source / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(source, tmp_path / "dst")


def test_damaged_archives_are_named(tmp_path: Path) -> None:
    source = write_source(tmp_path, "binary archive")
    whole = source.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "is damaged"),
        (whole[:-8] + b"cccc" + whole[-4:], "is damaged .CRC check failed"),
        (b"no archive", "is damaged .Not a gzipped file"),
    ):
        source.write_bytes(content)
        with pytest.raises(UserError, match=message):
            prepare(source, tmp_path / "dst")
    (tmp_path / "unpacked").mkdir()
    for name, content in binary_files().items():
        (tmp_path / "unpacked" / name).write_bytes(content[:-1])
    with pytest.raises(UserError, match="no whole number of images of 3,073 bytes"):
        prepare(tmp_path / "unpacked", tmp_path / "dst")
    with pytest.raises(UserError, match="no file or folder"):
        prepare(tmp_path / "absent", tmp_path / "dst")
