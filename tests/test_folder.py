"""Image folders, the skip list and the embedded digits."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.datasets import digits as digits_module
from pipelines.datasets.digits import digits_folder
from pipelines.datasets.split import Split, check_classes, read_split, skip_list_note
from pipelines.errors import UserError

PIXELS = Image.fromarray(np.zeros((4, 4, 3), np.uint8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train/{cat,dog} and val/{cat,dog}, two images a class."""
    for split in ("train", "val"):
        for name in ("dog", "cat"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in (1, 0):
                PIXELS.save(folder / f"{index}.png")
    return tmp_path


def names(root: Path, split: Split) -> list[str]:
    return [os.path.relpath(path, root) for path, *_ in split.files]


def test_a_split_is_sorted_by_class_and_name(root: Path) -> None:
    (root / "train" / "cat" / ".hidden").write_text("no image")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "README.txt").write_text("not in a class folder")
    split = read_split(root, "train")
    assert names(root, split) == [f"train/{x}.png" for x in ("cat/0", "cat/1", "dog/0", "dog/1")]
    assert list(split.labels) == [0, 0, 1, 1] and split.classes == ("cat", "dog")
    assert len(split) == 4


def test_links_to_folders_are_followed(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    linked = tmp_path_factory.mktemp("linked")
    (linked / "train").mkdir()
    (linked / "train" / "ape").symlink_to(root / "train" / "cat")
    (linked / "val").symlink_to(root / "val")
    assert names(linked, read_split(linked, "train")) == ["train/ape/0.png", "train/ape/1.png"]
    assert len(read_split(linked, "val")) == 4


def test_test_is_taken_where_val_is_missing(root: Path) -> None:
    (root / "val").rename(root / "test")
    assert names(root, read_split(root, "val"))[0] == "test/cat/0.png"


def test_the_skip_list_takes_paths_of_both_kinds(root: Path) -> None:
    skip_list = root / "skip.txt"
    skip_list.write_text(
        f"# two bad ones\ntrain/cat/0.png  # relative\n\n{root}/train/dog/1.png\nval/cat/1.png\n"
    )
    assert names(root, read_split(root, "train", skip_list)) == [
        "train/cat/1.png",
        "train/dog/0.png",
    ]
    assert len(read_split(root, "val", skip_list)) == 3


@pytest.mark.parametrize(
    ("lines", "strange"),
    [("# no names\n", False), ("train/cat/0.png\nx\n", False), ("cat/0.png\n", True)],
)
def test_a_skip_list_that_names_nothing_is_noted(root: Path, lines: str, strange: bool) -> None:
    skip_list = root / "skip.txt"
    skip_list.write_text(lines)
    train, val = (read_split(root, split, skip_list) for split in ("train", "val"))
    note = skip_list_note(skip_list, train, val)
    assert note.startswith(f"note: --skip-list {skip_list} names none of the im") == strange
    assert bool(note) == strange


def test_missing_things_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*/nowhere: --data takes"):
        read_split(root / "nowhere", "train")
    with pytest.raises(UserError, match="has no folder train/"):
        read_split(root / "train", "train")
    with pytest.raises(UserError, match="has no folder val or test/"):
        read_split(root / "train", "val")
    with pytest.raises(UserError, match=r"--skip-list: cannot read .*absent"):
        read_split(root, "train", root / "absent")
    (root / "empty" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="empty/train has no class folders"):
        read_split(root / "empty", "train")
    (root / "train" / "ant").mkdir()
    with pytest.raises(UserError, match=r"class ant has no images in .*/train: add"):
        read_split(root, "train")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("notes.txt", b"some text, longer than magic", "is no image"),
        ("empty.jpg", b"", "is empty"),
        ("sound.webp", b"RIFF\x00\x00\x00\x00WAVEfmt ", "is no image"),
        ("film.gif", b"GIF89a" + bytes(20), "is no image"),
    ],
)
def test_a_file_that_is_no_image_is_named(
    root: Path, name: str, content: bytes, message: str
) -> None:
    path = root / "train" / "dog" / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_split(root, "train")
    assert f"{path} {message}" in str(caught.value) and "--skip-list" in str(caught.value)
    skip_list = root / "skip.txt"
    skip_list.write_text(f"train/dog/{name}\n")
    assert len(read_split(root, "train", skip_list)) == 4
    assert len(read_split(root, "train", check_files=False)) == 5


@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp", "tiff", "webp", "ppm", "jp2"])
def test_every_kind_that_both_back_ends_decode_passes(root: Path, kind: str) -> None:
    PIXELS.resize((32, 32)).save(root / "train" / "dog" / f"image.{kind}")
    assert len(read_split(root, "train")) == 5


def test_classes_that_differ_are_named() -> None:
    train, val = (Split([], [], tuple(classes)) for classes in ("abcdef", "aq"))
    check_classes(train, train)
    with pytest.raises(UserError, match=r"only in training: b, c, d and 2 more; .*validation: q"):
        check_classes(train, val)


def test_the_digits_are_scikit_learns(digits: Path) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    splits = [read_split(digits, split) for split in ("train", "val")]
    assert [len(split) for split in splits] == [1438, 359]
    check_classes(*splits)
    seen = set()
    for split in splits:
        shares = np.bincount(split.labels) / len(split)
        assert np.abs(shares - 0.1).max() < 0.005, "every digit has about the same share"
        for (path, *_), label in zip(split.files, split.labels, strict=True):
            index = int(Path(path).stem)
            seen.add(index)
            pixels = np.asarray(Image.open(path))
            assert data.target[index] == label == int(split.classes[label])
            assert np.abs(pixels / (255 / 16) - data.images[index]).max() < 0.04
    assert len(seen) == 1797


def test_two_processes_make_the_digits_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one writes them, another one finishes: the folder of that one stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    writing: list[Path] = []

    def write(folder: Path) -> None:
        writing.append(folder)
        (folder / "train").mkdir()
        (folder / "train" / f"{len(writing)}.png").touch()
        if len(writing) == 1:
            found.append(digits_folder())

    found: list[Path] = []
    monkeypatch.setattr(digits_module, "write_digits", write)
    found.append(digits_folder())
    (folder,) = set(found)
    assert folder.is_relative_to(tmp_path) and len(set(writing)) == 2
    assert [path.name for path in folder.rglob("*.png")] == ["2.png"]
    assert list(folder.parent.iterdir()) == [folder], "nothing half-made is left beside it"
