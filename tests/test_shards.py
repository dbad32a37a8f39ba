"""Reading shards: the same images as in the folder, and hostile ones refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd_files import odd_files

from pipelines.datasets.checks import Header, check_file
from pipelines.datasets.folders import list_folder
from pipelines.datasets.images import ImageFile, whole_files
from pipelines.datasets.index import check_images, make_index
from pipelines.datasets.shards import index_text, layout, list_shards, member_names, shard_stamps
from pipelines.datasets.split import undecodable
from pipelines.errors import Damage, UserError
from pipelines.prepare.__main__ import main
from pipelines.prepare.shard import Plan, write_tar

TAR, INDEX = "val-00000.tar", "val-00000.idx"


@pytest.fixture(scope="module")
def packed(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An image folder of 40 photographs in 4 classes, and its shards of about 1 MiB."""
    root = tmp_path_factory.mktemp("packed")
    for number, path in enumerate(sorted((photographs / "train").glob("*/*"))[:40]):
        split = "train" if number < 30 else "val"
        target = root / "src" / split / f"class {number % 4}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    arguments = ["shard", root / "src", root / "dst", "--shard-size", 1, "--workers", 1]
    assert main([*map(str, arguments)]) == 0
    return root / "src", root / "dst"


@pytest.fixture
def dst(packed: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the shards to be damaged."""
    return Path(shutil.copytree(packed[1], tmp_path / "dst"))


def test_they_hold_what_the_folder_holds(packed: tuple[Path, Path]) -> None:
    src, dst = packed
    for split, number in (("train", 30), ("val", 10)):
        folder = make_index(list_folder(src / split))
        shards = make_index(list_shards(dst, split))
        listing = shards.listing
        assert listing.classes == folder.listing.classes and len(listing.images) == number
        assert len(listing.images.holders) == len(list(dst.glob(f"{split}-*.tar"))) > 1
        paths = [Path(file.path) for file in folder.listing.images]
        place = {path.read_bytes(): place for place, path in enumerate(paths)}
        order = [place[file.read()] for file in listing.images]
        assert sorted(order) == list(range(number)) and (order == sorted(order)) == (split == "val")
        assert (listing.labels == folder.listing.labels[order]).all()
        assert (shards.shapes == folder.shapes[order]).all() and shards.bad == []
        first = listing.images[0]
        name = f"class%20{listing.labels[0]}/{paths[order[0]].name}"
        assert str(first) == f"{dst}/{split}-00000.tar:{name}"


@pytest.mark.parametrize(
    "arguments", [("scan",), ("resize", "new", "--short-side", 16), ("shard", "new")]
)
def test_commands_that_take_image_files_say_so(
    packed: tuple[Path, Path], arguments: tuple[object, ...], tmp_path: Path
) -> None:
    command, *others = arguments
    target = [str(tmp_path / "new") if each == "new" else str(each) for each in others]
    text = f"{packed[1]} holds shards, which prepare {command} does not read: name the image folder"
    with pytest.raises(UserError, match=f"^{text}"):
        main([str(command), str(packed[1]), *target])
    assert not (tmp_path / "new").exists()


def test_no_scan_is_advised_of_what_it_does_not_read(packed: tuple[Path, Path]) -> None:
    image = list_shards(packed[1], "val").images[0]
    text = str(undecodable(image, ValueError("a defect")))
    assert text == f"{image} cannot be decoded (a defect): name it in --skip-list"


def test_they_are_read_in_the_order_of_the_tar(packed: tuple[Path, Path]) -> None:
    images = list_shards(packed[1], "train").images
    found = []
    for path in images.holders:
        with tarfile.open(path) as tar:
            found += [
                (path, info.offset_data, info.size, info.name)
                for info in tar
                if not info.name.endswith(".cls")
            ]
    assert [tuple(image) for image in images] == found


def verdict(image: ImageFile, pixels: bool) -> Header | str:
    try:
        return check_file(image, pixels)
    except Damage as damage:
        return str(damage)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on damaged metadata
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_file_of_any_kind_is_judged_alike_in_a_shard(photographs: Path, tmp_path: Path) -> None:
    photograph = min((photographs / "train").glob("*/*.JPEG"))
    slow = {"100-megapixels.jpg", "200-megapixels.png", "text-bomb.png"}
    contents = [
        file.content for file in odd_files(photograph) if file.content and file.name not in slow
    ]
    for content in (contents[0], *contents[-3:]):
        contents += [content[:size] for size in (1, 2, 11, 33, 600, len(content) - 1)]
    paths = []
    for number, content in enumerate(contents):
        paths.append(str(tmp_path / f"{number}.bin"))
        Path(paths[-1]).write_bytes(content)
    sizes = np.array([len(content) for content in contents])
    labels = np.zeros(len(paths), np.int32)
    names = member_names(["c"], map(os.path.basename, paths), labels.tolist())
    with (tmp_path / "shard.tar").open("wb") as file:
        write_tar(file, Plan("shard.tar", paths, names, sizes, labels))
    rows = zip(layout(sizes)[0].tolist(), sizes.tolist(), names, strict=True)
    parts = [ImageFile(str(tmp_path / "shard.tar"), *row) for row in rows]
    for pixels in (False, True):
        alone = [verdict(image, pixels) for image in whole_files(paths)]
        assert [verdict(image, pixels) for image in parts] == alone
        damaged = [found for found in alone if isinstance(found, str)]
        assert 30 < len(damaged) < len(alone) - 30
        assert len({text.partition(" (")[0] for text in damaged}) > 5


def manifest_of(dst: Path) -> dict[str, Any]:
    return dict(json.loads((dst / "shards.json").read_text()))


def sign(dst: Path) -> None:
    """Make the manifest agree with the first validation shard and its index, whatever they are."""
    manifest = manifest_of(dst)
    entry = manifest["splits"]["val"][0]
    entry["sha256"] = sha256((dst / TAR).read_bytes()).hexdigest()
    entry["index_sha256"] = sha256((dst / INDEX).read_bytes()).hexdigest()
    entry["bytes"] = (dst / TAR).stat().st_size
    entry["images"] = max(1, len((dst / INDEX).read_bytes().splitlines()) - 1)
    (dst / "shards.json").write_text(json.dumps(manifest))


def rows_of(dst: Path) -> list[list[str]]:
    return [line.split(" ") for line in (dst / INDEX).read_text().splitlines()]


def forge_index(dst: Path, names: list[str], sizes: list[int], labels: list[int]) -> None:
    """An index and a shard of the right length, without content, for these images."""
    array = np.array(sizes, np.int64)
    (dst / INDEX).write_text(index_text(names, array, np.array(labels, np.int32)))
    (dst / TAR).write_bytes(b"")
    os.truncate(dst / TAR, layout(array)[2])
    manifest = manifest_of(dst)
    entry = manifest["splits"]["val"][0]
    entry["index_sha256"] = sha256((dst / INDEX).read_bytes()).hexdigest()
    entry["bytes"], entry["images"] = layout(array)[2], len(names)
    (dst / "shards.json").write_text(json.dumps(manifest))


def test_forging_an_honest_index_is_taken(dst: Path) -> None:
    forge_index(dst, ["class%200/a.jpg", "class%203/b.img"], [1000, 2000], [0, 3])
    images = list_shards(dst, "val").images
    assert tuple(images[1])[1:] == (1024 + 1024 + 3 * 512 - 512, 2000, "class%203/b.img")


@pytest.mark.parametrize(
    "names, sizes, labels, message",
    [
        (["../../tmp/a.jpg"], [1000], [0], "damaged"),
        (["/etc/passwd.jpg"], [1000], [0], "damaged"),
        (["class%200/../../a.jpg"], [1000], [0], "damaged"),
        (["class%200/a/b.jpg"], [1000], [0], "damaged"),
        (["class%200/a b.jpg"], [1000], [0], "damaged"),
        (["class%200/a"], [1000], [0], "damaged"),
        (["class%209/a.jpg"], [1000], [0], r"damaged \(no class b'class%209'\)"),
        (["class%200/a.jpg"], [1000], [10], r"damaged \(its entries\)"),
        (["class%200/" + 97 * "a" + ".jpg"], [1000], [0], "a name too long"),
        (["class%200/a.jpg"], [0], [0], "an image of no or more than"),
        (["class%200/a.jpg"], [(1 << 30) + 1], [0], "an image of no or more than"),
        (["class%200/a.jpg", "class%200/b.jpg"], [1 << 40, 1], [0, 0], "damaged"),
    ],
)
def test_hostile_indexes_are_refused(
    dst: Path, names: list[str], sizes: list[int], labels: list[int], message: str
) -> None:
    forge_index(dst, names, sizes, labels)
    with pytest.raises(UserError, match=rf"val-00000\.idx is .*{message}"):
        list_shards(dst, "val")


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.pop(),  # fewer images than the first line says
        lambda rows: rows[1].__setitem__(1, "4096"),  # another place
        lambda rows: rows[1].__setitem__(1, "99999999999"),  # behind the end
        lambda rows: rows[1].__setitem__(1, "-512"),
        lambda rows: rows[1].__setitem__(2, "10"),
        lambda rows: rows[1].__setitem__(2, "1" + 30 * "0"),
        lambda rows: rows[1].__setitem__(7, "../../x.cls"),
        lambda rows: rows[1].append("more"),
        lambda rows: rows.append(rows[1]),  # an image twice
        lambda rows: rows[0].__setitem__(0, "v1.1"),
        lambda rows: rows.__setitem__(slice(1, 3), rows[2:0:-1]),
        lambda rows: rows.__setitem__(slice(None), [["\0" * 100]]),
        lambda rows: rows.__setitem__(slice(None), [["a" * 5_000_000]]),
        lambda rows: rows.clear(),
    ],
)
def test_indexes_that_do_not_follow_from_their_images_are_refused(
    dst: Path, change: Callable[[list[list[str]]], object]
) -> None:
    rows = rows_of(dst)
    change(rows)
    (dst / INDEX).write_text("".join(" ".join(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"val-00000\.idx is damaged \(its checksum\): copy it"):
        list_shards(dst, "val")
    sign(dst)
    with pytest.raises(UserError, match=r"val-00000\.idx is (damaged|not the index of)"):
        list_shards(dst, "val")


@pytest.mark.parametrize(
    "fields",
    [
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"type": tarfile.LNKTYPE, "linkname": "../../../etc/passwd"},
        {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5},
        {"type": tarfile.FIFOTYPE},
        {"type": tarfile.DIRTYPE},
        {"type": tarfile.XHDTYPE},
        {"type": tarfile.GNUTYPE_LONGNAME},
        {"type": tarfile.GNUTYPE_SPARSE},
        {"name": "../../../tmp/planted.jpg"},
        {"name": "/tmp/planted.jpg"},
        {"name": "class%203/another.jpg"},
        {"size": 8**11 - 1},
        {"size": 1},
    ],
)
def test_tar_members_that_are_not_what_the_index_says_are_bad_images(
    dst: Path, fields: dict[str, Any]
) -> None:
    images = list_shards(dst, "val").images
    image = images[1]
    info = tarfile.TarInfo(image.name)
    info.size = image.size or 0
    for name, value in fields.items():
        setattr(info, name, value)
    with (dst / TAR).open("r+b") as file:
        file.seek(image.start - 512)
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
    sign(dst)
    before = sorted(dst.parent.rglob("*"))
    listing = list_shards(dst, "val")
    _, shapes, bad = check_images((0, list(listing.images)))
    assert bad == [(1, "is not what its shard has there (another tar header)")]
    assert [place for place, shape in enumerate(shapes) if not any(shape)] == [1]
    assert sorted(dst.parent.rglob("*")) == before


def test_shards_of_another_length_are_refused(dst: Path) -> None:
    length = (dst / TAR).stat().st_size
    for other in (length - 1, length // 2, 0, length + 512, 1 << 40):
        os.truncate(dst / TAR, other)
        with pytest.raises(UserError, match=rf"val-00000\.tar has {other:,} bytes, which should"):
            list_shards(dst, "val")


@pytest.mark.parametrize("name", [TAR, INDEX, "shards.json"])
def test_missing_files_and_what_is_no_file_are_named(dst: Path, name: str) -> None:
    (dst / name).unlink()
    with pytest.raises(UserError, match=rf"/{name} cannot be read \(No such file"):
        list_shards(dst, "val")
    with pytest.raises(UserError, match=rf"/{name} cannot be read \(No such file"):
        shard_stamps(dst, "val")
    os.mkfifo(dst / name)
    with pytest.raises(UserError, match=rf"/{name} (is no regular file|has 0 bytes)"):
        list_shards(dst, "val")
    (dst / name).unlink()
    if name != TAR:
        with (dst / name).open("wb") as file:
            file.truncate((32 << 20) + 1)
        with pytest.raises(UserError, match=rf"/{name} has more than 33,554,432 bytes"):
            list_shards(dst, "val")


@pytest.mark.parametrize(
    "change, field",
    [
        (lambda m: m.update(format="tar"), "format"),
        (lambda m: m.update(version=2), "version"),
        (lambda m: m.update(seed=-1), "seed"),
        (lambda m: m.update(seed=0.5), "seed"),
        (lambda m: m.update(shard_size=True), "shard_size"),
        (lambda m: m.update(classes=None), "classes"),
        (lambda m: m.update(classes=[]), "classes"),
        (lambda m: m.update(classes=["b", "a"]), "classes"),
        (lambda m: m.update(classes=["a", "a"]), "classes"),
        (lambda m: m.update(classes=["..", "a"]), "classes"),
        (lambda m: m.update(classes=["a/b"]), "classes"),
        (lambda m: m.update(classes=["\ud800"]), "classes"),
        (lambda m: m.update(splits={}), "splits"),
        (lambda m: m.update(splits={"../val": []}), "splits"),
        (lambda m: m["splits"].update(val=[]), "val"),
        (lambda m: m["splits"].update(val=[1]), "val"),
        (lambda m: m["splits"]["val"][0].update(file="../val-00000.tar"), "file"),
        (lambda m: m["splits"]["val"][0].update(file="/dev/zero"), "file"),
        (lambda m: m["splits"]["val"][0].update(images="1"), "images"),
        (lambda m: m["splits"]["val"][0].update(images=10**30), "images"),
        (lambda m: m["splits"]["val"][0].update(bytes=0), "bytes"),
        (lambda m: m["splits"]["val"][0].update(sha256="0"), "sha256"),
        (lambda m: m["splits"]["val"][0].update(index_sha256=None), "index_sha256"),
    ],
)
def test_damaged_manifests_are_refused(
    dst: Path, change: Callable[[dict[str, Any]], object], field: str
) -> None:
    manifest = manifest_of(dst)
    change(manifest)
    (dst / "shards.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"shards\.json is damaged \(its field {field}\): copy"):
        list_shards(dst, "val")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"a":' * 100_000, "1e999"])
def test_what_is_no_manifest_is_refused(dst: Path, text: str) -> None:
    (dst / "shards.json").write_text(text)
    with pytest.raises(UserError, match=r"shards\.json is damaged \((no JSON|its field format)\)"):
        list_shards(dst, "val")


def test_shards_that_are_not_all_written_are_refused(dst: Path) -> None:
    manifest = manifest_of(dst)
    manifest["splits"]["val"][-1]["sha256"] = None
    (dst / "shards.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"/dst is not complete: call python -m .* shard again"):
        list_shards(dst, "val")
    del manifest["splits"]["val"]
    (dst / "shards.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="/dst has no shards of the split val"):
        list_shards(dst, "val")


def test_the_stamps_change_with_the_files(dst: Path) -> None:
    before = shard_stamps(dst, "val")
    for name in ("shards.json", TAR, INDEX):
        os.utime(dst / name, (1, 1))
        now = shard_stamps(dst, "val")
        assert sum(one != other for one, other in zip(before, now, strict=True)) == 2
        before = now
