"""Image folders, the skip list and the embedded digits."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.datasets import digits as digits_module
from pipelines.datasets.copies import find_copies
from pipelines.datasets.digits import digits_folder
from pipelines.datasets.split import Split, check_classes, notes_of, read_split
from pipelines.errors import UserError
from pipelines.prepare.resize import Resizer

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
    ("lines", "note"),
    [
        ("# no names\n", ""),
        ("train/cat/0.png\nval/cat/1.png\n", ""),
        ("cat/0.png\n", " names none of the images that are read; its paths are"),
        ("train/cat/0.png\ny\nval/x\n", ": 2 names match no image, the first: y; its paths are"),
        ("val/cat/1.png\ntrain/cat\n", ": 1 name matches no image, the first: train/cat; its"),
    ],
)
def test_names_of_a_skip_list_that_match_nothing_are_told(
    root: Path, lines: str, note: str
) -> None:
    skip_list = root.parent / "skip.txt"
    skip_list.write_text(lines)
    found = notes_of(*(read_split(root, split, skip_list) for split in ("train", "val")))
    assert "".join(found).startswith(f"note: --skip-list {skip_list}{note}" if note else "")
    assert len(found) == bool(note)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", ["/", "\\"])
def test_a_skip_list_from_windows(root: Path, encoding: str, separator: str) -> None:
    names = ["train/cat/0.png", "train/dog/1 \u00e9.png", "val/dog/0.png"]
    (root / "train" / "dog" / "1.png").rename(root / names[1])
    skip_list = root.parent / "skip.txt"
    text = "\r\n".join(name.replace("/", separator) for name in names)
    skip_list.write_bytes(text.encode(encoding))
    train, val = splits = [read_split(root, split, skip_list) for split in ("train", "val")]
    assert (len(train), len(val), notes_of(*splits)) == (2, 3, [])


def test_a_backslash_is_part_of_a_name_that_has_one(root: Path) -> None:
    (root / "train" / "cat" / "0.png").rename(root / "train" / "cat\\0.png")
    PIXELS.save(root / "train" / "cat" / "a\\b.png")
    skip_list = root.parent / "skip.txt"
    skip_list.write_text("train/cat/a\\b.png\n")
    assert names(root, read_split(root, "train", skip_list))[0] == "train/cat/1.png"


def test_images_below_class_folders_are_read_as_torchvision_reads_them(root: Path) -> None:
    from torchvision.datasets import ImageFolder

    for name in ("cat/images/7.png", "cat/images-2/8.png", "cat/b/c/9.png", "dog/images/0.png"):
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        PIXELS.save(root / "train" / name)
    (root / "train" / "dog" / "images" / "up").symlink_to(root / "train" / "dog")
    (root / "train" / "dog" / "linked").symlink_to(root / "val" / "dog")
    split = read_split(root, "train")
    (root / "train" / "dog" / "images" / "up").unlink()  # in which ImageFolder would go round
    expected = ImageFolder(str(root / "train"))
    assert [file.path for file in split.files] == [path for path, _ in expected.samples]
    assert list(split.labels) == expected.targets and list(split.classes) == expected.classes
    assert len(split) == 10 and notes_of(split) == []


def test_what_is_not_read_is_counted(root: Path) -> None:
    train = root / "train"
    for name in ("@eaDir/cat", "__MACOSX", ".thumbnails", "cat/@eaDir", "dog/sub/.hidden"):
        (train / name).mkdir(parents=True)
        PIXELS.save(train / name / "9.png")
    for name in ("notes.txt", "cat/labels.CSV", "dog/._0.png", "dog/Thumbs.db"):
        (train / name).write_text("no image")
    for name in ("b.png", "a.png"):
        PIXELS.save(train / name)
    splits = [read_split(root, split) for split in ("train", "val")]
    assert len(splits[0]) == 4 and notes_of(*splits) == [
        f"left out 2 loose files beside the class folders; the first: {train}/a.png",
        f"passed over 9 files or folders of metadata; the first: {train}/.thumbnails",
    ]


def test_a_folder_with_a_dataset_json_is_no_class(root: Path) -> None:
    (root / "train" / "160" / "train" / "cat").mkdir(parents=True)
    (root / "train" / "160" / "dataset.json").write_text("{}")
    split = read_split(root, "train")
    assert split.classes == ("cat", "dog")
    assert notes_of(split) == [
        f"passed over 1 file or folder of metadata; the first: {root}/train/160"
    ]
    PIXELS.save(root / "train" / "160" / "beside.png")
    (root / "train" / "160" / "dataset.json").write_text('{"short_side": 160, "quality": 90}')
    assert read_split(root, "train").classes == ("cat", "dog"), "copies in whatever folders"


@pytest.mark.parametrize("content", ["[1]", '{"id": "dog"}', "no JSON"])
def test_a_class_may_have_a_dataset_json_of_another_program(root: Path, content: str) -> None:
    """As Kaggle's tools leave them."""
    for folder in (root, root / "train", root / "train" / "dog"):
        (folder / "dataset.json").write_text(content)
    split = read_split(root, "train")
    assert split.classes == ("cat", "dog") and len(split) == 4
    assert find_copies(root) == find_copies(root / "train") == {}
    facts = Resizer(root, root, (8,), 90).facts_of(root / "8")
    assert facts == {"short_side": 8, "quality": 90}


def test_what_is_there_instead_is_named(root: Path, tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):
        (root / "val" / "cat" / name).rename(root / "val" / f"cat{name}")
        (root / "val" / "dog" / name).rename(root / "val" / f"dog{name}")
    for name in ("cat", "dog"):
        (root / "val" / name).rmdir()
    with pytest.raises(
        UserError, match=r"/val has no class folders but 4 loose files, the first c"
    ):
        read_split(root, "val")
    foreign = root / "foreign"
    foreign.mkdir()
    for name in ("000.tar", "001.tar", "README.md"):
        (foreign / name).touch()
    with pytest.raises(UserError, match=r"foreign holds tar files .*prepare shard DIR DST makes"):
        read_split(foreign, "train")


@pytest.mark.parametrize("other", ["valid", "validation"])
def test_other_names_of_the_validation_split(root: Path, other: str) -> None:
    (root / "val").rename(root / other)
    (root / "test").mkdir()
    split = read_split(root, "val")
    assert names(root, split)[0] == f"{other}/cat/0.png" and split.name == other


def test_missing_things_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*/nowhere: --data takes"):
        read_split(root / "nowhere", "train")
    with pytest.raises(UserError, match="has no folder train/"):
        read_split(root / "train", "train")
    with pytest.raises(UserError, match=r"has no folder val/ \(nor valid, validation, test\)"):
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
        ("notes.doc", b"some text, longer than magic", "is no image"),
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
    train, val = (Split([], [], classes) for classes in (("cat", "dog"), ("cats", "dog")))
    with pytest.raises(UserError, match=r"validation: cats; is cat the same as cats\?\)"):
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
