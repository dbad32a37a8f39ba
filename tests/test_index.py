"""The index of a split: what it holds, when it is made anew, who makes it."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import limits
from pipelines.backends import make_loader
from pipelines.datasets import folders as folders_module
from pipelines.datasets import index as index_module
from pipelines.datasets.folders import folder_stamps, list_folder
from pipelines.datasets.images import ImageFile
from pipelines.datasets.index import Index, cached_index, load, make_index, save
from pipelines.datasets.split import read_split
from pipelines.errors import UserError
from pipelines.files import cache_folder
from pipelines.loader import LoaderSpec, Stage

SIZES = {"ant": [(8, 9), (20, 10)], "bee": [(30, 31), (7, 8), (5, 6)]}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of real PNGs of known sizes, in folders that pass for settled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_module, "SETTLED_SECONDS", -3600)
    for split in ("train", "val"):
        for name, sizes in SIZES.items():
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number, size in enumerate(sizes):
                Image.new("RGB", size).save(folder / f"{number} \u00e9.png")
    return tmp_path / "data"


def caches() -> list[Path]:
    return sorted((cache_folder() / "index").glob("*.npz"))


def index_of(folder: Path) -> Index:
    return cached_index(folder, partial(folder_stamps, folder), partial(list_folder, folder))


def test_files_labels_and_shapes(root: Path) -> None:
    for _ in range(2):  # made, then from the cache
        split = read_split(root, "train")
        paths = [file.path for file in split.files]
        assert paths == [
            str(root / "train" / name / f"{number} \u00e9.png")
            for name, sizes in SIZES.items()
            for number in range(len(sizes))
        ]
        assert all(Path(path).is_file() for path in paths)
        assert list(split.labels) == [0, 0, 1, 1, 1] and split.classes == ("ant", "bee")
        assert split.shapes is not None
        assert split.shapes.tolist() == [
            [height, width] for sizes in SIZES.values() for width, height in sizes
        ]
        assert split.files[-1] == split.files[4] == split.files[2:][2]
        assert len(caches()) == 1


def test_an_index_holds_until_a_folder_changes(root: Path) -> None:
    read_split(root, "train")
    image = root / "train" / "bee" / "1 \u00e9.png"
    image.write_bytes(b"junk")
    assert len(read_split(root, "train")) == 5, "files are not looked at again"
    os.utime(image.parent)
    with pytest.raises(UserError, match="is no image"):
        read_split(root, "train")
    image.unlink()
    assert len(read_split(root, "train")) == 4
    (root / "train" / "cat").mkdir()
    shutil.copy(root / "train" / "ant" / "0 \u00e9.png", root / "train" / "cat")
    assert read_split(root, "train").classes == ("ant", "bee", "cat")


def test_a_bad_image_that_was_mended_in_place_is_good_again(root: Path) -> None:
    image = root / "train" / "ant" / "0 \u00e9.png"
    good = image.read_bytes()
    image.write_bytes(good[:40])
    for _ in range(2):
        with pytest.raises(UserError, match="is truncated"):
            read_split(root, "train")
    assert len(caches()) == 1
    split = read_split(root, "train", on_bad_image="skip")
    assert len(split) == 4 and split.left_out[0][0] == str(image)
    image.write_bytes(good)
    split = read_split(root, "train")
    assert len(split) == 5 and split.shapes is not None and split.shapes[0].tolist() == [9, 8]


def test_what_has_just_changed_is_not_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "SETTLED_SECONDS", 3600)
    read_split(root, "train")
    assert not caches()


def added(root: Path) -> None:
    shutil.copy(root / "ant" / "0 \u00e9.png", root / "ant" / "2.png")


def removed(root: Path) -> None:
    (root / "bee" / "1 \u00e9.png").unlink()


def added_below(root: Path) -> None:
    (root / "bee" / "more" / "deeper" / "2.png").write_bytes((root / "2.png").read_bytes())


@pytest.mark.parametrize(("change", "number"), [(added, 6), (removed, 4), (added_below, 6)])
@pytest.mark.parametrize("clock", ["as it is", "stands"])
def test_an_index_does_not_hold_by_the_times_of_folders_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], number: int,
    clock: str,
) -> None:  # fmt: skip
    """Times can be set back, as by rsync; of some file systems, the clock ticks in seconds."""
    folder = root / "train"
    (folder / "bee" / "more" / "deeper").mkdir(parents=True)
    shutil.copy(folder / "ant" / "0 \u00e9.png", folder / "2.png")
    if clock == "stands":
        look = folders_module.look
        still = lambda path: replace(look(path), stamp=(1, 1, look(path).stamp[2]))  # noqa: E731
        monkeypatch.setattr(folders_module, "look", still)
    assert len(read_split(root, "train")) == 5
    before = {path: path.stat() for path in (folder, *folder.rglob("*")) if path.is_dir()}
    change(folder)
    for path, status in before.items():
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(read_split(root, "train")) == number


@pytest.mark.parametrize("backend", ["dali", "torchvision", "memory"])
def test_a_file_that_is_gone_says_that_the_index_is_old(root: Path, backend: str) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    split = read_split(root, "train")
    gone = root / "train" / "bee" / "1 \u00e9.png"
    gone.unlink()
    threads = 1 if backend == "dali" else 0
    stages = (Stage(epochs=1, image_size=8, batch_size=5),)
    with pytest.raises(UserError) as caught, closing(
        make_loader(backend, LoaderSpec(split=split, stages=stages, training=True,
                                        num_threads=threads))
    ) as loader:  # fmt: skip
        list(loader)
    message = str(caught.value)
    assert message.startswith(f"{gone} is gone since the images were listed: start again; ")
    command = message.partition("is old: ")[2].partition(" forgets all")[0]
    assert caches()
    subprocess.run(command, shell=True, check=True)
    assert not caches() and len(read_split(root, "train")) == 4


@pytest.mark.parametrize("damage", [b"", b"PK\3\4 no zip", None])
def test_a_damaged_cache_is_made_anew(root: Path, damage: bytes | None) -> None:
    read_split(root, "train")
    (path,) = caches()
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    assert len(read_split(root, "train")) == 5
    assert load(path, folder_stamps(root / "train")) is not None


def test_without_a_cache_folder_it_works_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert len(read_split(root, "train")) == 5


def test_many_files_are_looked_at_by_processes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "train" / "bee" / "bad.jpg").write_bytes(b"")
    listing = list_folder(root / "train")
    few = make_index(listing)
    monkeypatch.setattr(index_module, "MANY", 1)
    monkeypatch.setattr(index_module, "CHUNK", 2)
    many = make_index(listing)
    assert np.array_equal(many.shapes, few.shapes) and many.bad == few.bad == [(5, "is empty")]


def test_threads_look_at_them_where_processes_can_share_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where /dev/shm is not mounted: DALI needs none of it."""
    monkeypatch.setattr(index_module, "MANY", 1)
    monkeypatch.setattr(limits, "SHARED_MEMORY", root / "shm")
    assert len(make_index(list_folder(root / "train")).shapes) == 5


def end_the_process(_: object) -> None:
    """A decoder with a defect."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_file_that_ends_its_process_is_for_a_scan_to_find(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "MANY", 1)
    monkeypatch.setattr(index_module, "check_images", end_the_process)
    with pytest.raises(UserError, match=r"killed.*decoder: .* scan DIR --workers 1 finds such f"):
        make_index(list_folder(root / "train"))


def test_a_script_without_the_usual_guard_is_not_run_again(root: Path) -> None:
    script = root / "script.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from pipelines.datasets import folders, index\n"
        "index.MANY = index.CHUNK = 2\n"
        "listing = folders.list_folder(Path(sys.argv[1]))\n"
        "print('run', len(index.make_index(listing).shapes))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(root / "train")],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("run 5\n", 0), done.stderr


def test_one_process_makes_it_and_the_others_wait(root: Path) -> None:
    folder = root / "train"
    found: list[Index] = []
    index_of(folder)
    (path,) = caches()
    made = load(path, folder_stamps(folder))
    assert made is not None
    path.unlink()
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    thread = threading.Thread(target=lambda: found.append(index_of(folder)))
    thread.start()
    time.sleep(0.2)
    assert not found, "it waits"
    marked = Index(made.listing, made.shapes + 1000, made.sizes, made.orientations, [])
    save(path, marked, folder_stamps(folder))
    os.close(lock)
    thread.join()
    assert np.array_equal(found[0].shapes, marked.shapes), "it took what the other one had made"


def test_tens_of_bytes_an_image(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "n01440764"
    folder.mkdir(parents=True)
    for number in range(500):
        (folder / f"n01440764_{number:05}.JPEG").touch()
    listing = list_folder(tmp_path / "train")
    images = listing.images
    arrays = (images.holder, images.names, images.name_start, images.name_size, listing.labels)
    assert len(images) == 500 and sum(array.nbytes for array in arrays) < 50 * 500


@pytest.mark.parametrize("skip", ["train/ant/1 \u00e9.png\nval/bee/0 \u00e9.png\nno/such.png\n"])
def test_a_skip_list_holds_for_an_index_from_the_cache(root: Path, skip: str) -> None:
    skip_list = root / "skip.txt"
    skip_list.write_text(skip, encoding="utf-8")
    counts: Callable[[str], int] = lambda split: len(read_split(root, split, skip_list))  # noqa: E731
    assert [counts("train"), counts("val"), counts("train")] == [4, 4, 4]


def test_parts_of_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(b"0123456789")
    assert ImageFile(str(path), 3, 4, "a/b.jpg").read() == b"3456"
    assert ImageFile(str(path)).read() == b"0123456789"
    with pytest.raises(EOFError, match=r"shard ends within a/b.jpg"):
        ImageFile(str(path), 8, 4, "a/b.jpg").read()


def test_another_way_to_the_same_folder_has_its_own_paths(root: Path) -> None:
    read_split(root, "train")
    other = root.parent / "other"
    other.symlink_to(root)
    assert {file.path.partition("/train/")[0] for file in read_split(other, "train").files} == {
        str(other)
    }
