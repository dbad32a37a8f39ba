"""`prepare resize` on real photographs and on every odd kind of file, against Pillow by hand."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, JpegImagePlugin

from pipelines.cli import exit_status
from pipelines.datasets.copies import read_copy
from pipelines.datasets.images import ImageFile
from pipelines.datasets.split import read_split
from pipelines.errors import UserError
from pipelines.prepare.__main__ import main
from pipelines.prepare.resize import shrink, target_size

ROOT = Path(__file__).resolve().parent.parent
LANCZOS = Image.Resampling.LANCZOS
ORIENTATION, MAKE = 0x0112, 0x010F
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture
def src(photographs: Path, tmp_path: Path) -> Path:
    """Twelve photographs for training and six for validation, in three classes."""
    paths = sorted((photographs / "train").glob("*/*"))[::25]
    for index, path in enumerate(paths[:18]):
        split = "train" if index < 12 else "val"
        target = tmp_path / "src" / split / f"class{index % 3}" / f"{path.stem}.JPEG"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return tmp_path / "src"


@pytest.fixture(scope="module")
def photo(photographs: Path) -> Image.Image:
    """A photograph of 500 x 375 in RGB, without metadata."""
    for path in sorted((photographs / "train").glob("*/*")):
        with Image.open(path) as image:
            if image.size == (500, 375) and image.mode == "RGB":
                pixels = image.convert("RGB")
                pixels.info = {}
                return pixels
    raise AssertionError("no photograph of 500 x 375")


def resize(*arguments: object) -> int:
    return main(["resize", *map(str, arguments), "--workers", "2"])


def start(*arguments: object) -> subprocess.Popen[str]:
    """The command in a session of its own, so that all its processes can be counted."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.prepare", "resize", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command, in this process."""
    capsys.readouterr()
    status = exit_status(main, ["resize", *map(str, arguments)])
    return status, *capsys.readouterr()


def pixels_of(path: Path | str) -> np.ndarray:
    """As the loaders decode: RGB, EXIF orientation not applied."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(np.float32)


def difference(copy: Path, original: Path | Image.Image) -> float:
    """Mean difference, of 255, of a copy from the whole original resized by Pillow."""
    if isinstance(original, Path):
        with Image.open(original) as image:
            original = image.convert("RGB")
    found = pixels_of(copy)
    size = (found.shape[1], found.shape[0])
    expected = np.asarray(original.resize(size, LANCZOS)).astype(np.float32)
    return float(np.abs(found - expected).mean())


def test_copies_are_the_photographs_smaller(
    src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dst = tmp_path / "dst"
    assert resize(src, dst, "--short-side", 160, 300) == 0
    originals = sorted(src.glob("*/*/*"))
    assert len(originals) == 18
    verbatim = {160: 0, 300: 0}
    for side in (160, 300):
        for original in originals:
            copy = (dst / str(side) / original.relative_to(src)).with_suffix(".jpg")
            with Image.open(original) as image:
                width, height = image.size
            if min(width, height) <= side:
                assert copy.read_bytes() == original.read_bytes()
                verbatim[side] += 1
                continue
            with Image.open(copy) as image:
                assert isinstance(image, JpegImagePlugin.JpegImageFile)
                assert (image.mode, JpegImagePlugin.get_sampling(image)) == ("RGB", 0)
                assert min(image.size) == side and not image.info.get("progressive")
                assert abs(max(image.size) - max(width, height) * side / min(width, height)) <= 0.5
                assert (image.width > image.height) == (width > height)
            assert difference(copy, original) < 4.5
        manifest = json.loads((dst / str(side) / "dataset.json").read_text())
        assert manifest == {
            "short_side": side,
            "quality": 90,
            "complete": True,
            "images": {"train": 12, "val": 6},
            "damaged": [],
        }
        split = read_split(dst / str(side), "train")
        assert len(split) == 12 and split.classes == ("class0", "class1", "class2")
    out = capsys.readouterr().out
    total = sum(path.stat().st_size for path in originals) / 1e6
    small = sum(path.stat().st_size for path in (dst / "160").glob("*/*/*")) / 1e6
    assert f"{dst}/160: 18 images, {small:.1f} MB of {total:.1f} MB; " in out
    assert f"{18 - verbatim[300]} written, {verbatim[300]} copied bit for bit, 0 were there" in out
    assert verbatim[300] > 0 and not (dst / ".partial").exists()


def odd_images(photo: Image.Image, folder: Path) -> dict[str, str]:
    """Files of every kind that Pillow and DALI decode; what has to become of each at 375 px."""
    folder.mkdir(parents=True)
    grey, small = photo.convert("L"), photo.resize((120, 90), LANCZOS)
    exif = Image.Exif()
    exif[ORIENTATION], exif[MAKE] = 6, "A maker of cameras"
    alpha = photo.copy()
    alpha.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    cmyk_profile = SRGB[:16] + b"CMYK" + SRGB[20:]
    encode: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "baseline.jpeg": (photo, {"quality": 95}),
        "progressive.JPEG": (photo, {"quality": 95, "progressive": True}),
        "comment.jpg": (photo, {"comment": b"many words" * 99}),
        "grey.jpg": (grey, {}),
        "cmyk.jpg": (photo.convert("CMYK"), {"icc_profile": cmyk_profile}),
        "rotated.jpg": (photo, {"exif": exif, "icc_profile": SRGB}),
        "small.jpg": (small, {"exif": exif, "icc_profile": SRGB, "comment": b"kept"}),
        "small-grey.jpg": (small.convert("L"), {}),
        "small-cmyk.jpg": (small.convert("CMYK"), {}),
        "tiny.png": (small, {}),
        "rgb.png": (photo, {"exif": exif, "icc_profile": SRGB}),
        "alpha.png": (alpha, {}),
        "grey-alpha.png": (grey.convert("LA"), {}),
        "palette.png": (photo.convert("P", palette=Image.Palette.ADAPTIVE), {"transparency": 3}),
        "bits.png": (photo.convert("1"), {}),
        "deep.png": (deep, {}),
        "film.webp": (photo, {"save_all": True, "append_images": [grey.convert("RGB")]}),
        "bitmap.bmp": (photo, {}),
        "scan.tiff": (photo, {"exif": exif}),
        "plain.ppm": (photo, {}),
        "wave.jp2": (photo, {}),
        "long-" + 200 * "n" + ".jpg": (photo, {}),
        "h\u00f6chst.jpg": (photo, {}),
        "png-named.JPEG.jpeg": (photo, {"format": "PNG"}),
    }
    for name, (image, options) in encode.items():
        image.save(folder / name, **options)
    return dict.fromkeys(encode, "written") | dict.fromkeys(
        ["baseline.jpeg", "progressive.JPEG", "comment.jpg", "grey.jpg", "rotated.jpg", "small.jpg",
         "small-grey.jpg", "long-" + 200 * "n" + ".jpg", "h\u00f6chst.jpg"], "verbatim",
    )  # fmt: skip


def test_every_kind_of_image_looks_to_a_model_as_the_original_does(
    photo: Image.Image, tmp_path: Path
) -> None:
    from pipelines.backends.torchvision import decode

    kinds = odd_images(photo, tmp_path / "src" / "train" / "class")
    (tmp_path / "src" / "test" / "class").mkdir(parents=True)
    for name in ("grey.jpg", "alpha.png"):
        shutil.copy(
            tmp_path / "src" / "train" / "class" / name, tmp_path / "src" / "test" / "class"
        )
    dst = tmp_path / "dst"
    assert resize(tmp_path / "src", dst, "--short-side", 375, 100, "--quality", 95) == 0
    for name, verdict in kinds.items():
        source = tmp_path / "src" / "train" / "class" / name
        original = Image.fromarray(decode(ImageFile(str(source))).permute(1, 2, 0).numpy())
        copy = (dst / "375" / "train" / "class" / name).with_suffix(".jpg")
        with Image.open(copy) as image:
            assert (image.format, image.size) == ("JPEG", original.size), name
        assert (copy.read_bytes() == source.read_bytes()) == (verdict == "verbatim"), name
        # A bitmap of black and white dots is the worst case of JPEG.
        assert difference(copy, original) < (12 if name == "bits.png" else 3), name
        copy = (dst / "100" / "train" / "class" / name).with_suffix(".jpg")
        with Image.open(copy) as image:
            assert min(image.size) == min(100, *original.size), name
            assert image.mode == ("L" if name == "small-grey.jpg" else "RGB"), name
        assert difference(copy, original) < 3, name
    for copy in dst.glob("*/test/class/*"):
        assert copy.read_bytes() == Path(str(copy).replace("/test/", "/train/")).read_bytes()
    assert len(list(dst.glob("*/test/class/*"))) == 4


def test_orientation_and_rgb_profile_are_kept_but_not_applied(
    photo: Image.Image, tmp_path: Path
) -> None:
    folder = tmp_path / "src" / "train" / "class"
    odd_images(photo, folder)
    assert resize(tmp_path / "src", tmp_path, "--short-side", 100) == 0
    copies = tmp_path / "100" / "train" / "class"
    for name, orientation, profile in (
        ("rotated", 6, SRGB),
        ("rgb", 6, SRGB),
        ("scan", 6, None),  # which Pillow would turn upright as it decodes
        ("cmyk", 1, None),
        ("comment", 1, None),
    ):
        with Image.open(copies / f"{name}.jpg") as image:
            exif = image.getexif()
            assert exif.get(ORIENTATION, 1) == orientation, name
            assert set(exif) <= {ORIENTATION}, "no other tag is kept"
            assert image.info.get("icc_profile") == profile, name
            assert "comment" not in image.info
            assert image.size == (133, 100)


def test_large_jpegs_are_decoded_smaller_and_hardly_change(
    photo: Image.Image, tmp_path: Path
) -> None:
    path = tmp_path / "large.jpg"
    photo.resize((3001, 2251), LANCZOS).save(path, quality=95)
    with Image.open(path) as image:
        whole = image.convert("RGB")
    for side in (160, 352):
        (copy,) = shrink(path, (side,), 95)
        assert not copy.verbatim
        (tmp_path / "copy.jpg").write_bytes(copy.content)
        plain = whole.resize(target_size((3001, 2251), side), LANCZOS)
        plain.save(tmp_path / "plain.jpg", quality=95, subsampling=0)
        with Image.open(tmp_path / "copy.jpg") as image:
            assert image.size == plain.size
        loss = [difference(tmp_path / name, whole) for name in ("copy.jpg", "plain.jpg")]
        assert loss[0] < loss[1] + 0.6
    both = shrink(path, (160, 352), 95)
    assert both[1].content == copy.content, "the largest length decides how it is decoded"


@pytest.mark.parametrize(
    "size, side, expected",
    [
        ((500, 375), 160, (213, 160)),
        ((375, 500), 160, (160, 213)),
        ((20_000, 300), 160, (10_667, 160)),
        ((301, 300), 160, (161, 160)),
        ((161, 161), 160, (160, 160)),
    ],
)
def test_target_sizes(size: tuple[int, int], side: int, expected: tuple[int, int]) -> None:
    assert target_size(size, side) == expected


def test_damaged_files_are_listed_and_the_rest_is_done(
    src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = next((src / "train" / "class0").iterdir()).read_bytes()
    folder = src / "train" / "class1"
    reasons = {
        "cut.jpg": (whole[: len(whole) // 2], "is truncated"),
        "header.jpg": (whole[:20], "is truncated"),
        "empty.jpg": (b"", "is empty"),
        "notes.doc": (b"words, no image", "is no image (JPEG, PNG"),
        "film.gif": (b"GIF89a" + bytes(20), "is no image that every back end reads (GIF"),
    }
    for name, (content, _) in reasons.items():
        (folder / name).write_bytes(content)
    (folder / "gone.jpg").symlink_to(src / "nowhere")
    os.mkfifo(folder / "pipe.jpg")
    (folder / ".hidden").write_bytes(b"")
    (folder / "a folder").mkdir()
    status, out, err = run(capsys, src, tmp_path / "dst", "--short-side", 160)
    assert status == 1, err
    lines = dict(line.split(": ", 1) for line in err.splitlines())
    expected = {name: reason for name, (_, reason) in reasons.items()}
    expected |= {"gone.jpg": "cannot be read (No such file", "pipe.jpg": "is no regular file"}
    assert lines.keys() == {str(folder / name) for name in expected}
    for name, reason in expected.items():
        assert lines[str(folder / name)].startswith(reason), name
    assert "160: 18 images" in out and "7 damaged images have no copy; they are listed" in out
    assert len(list((tmp_path / "dst").glob("160/*/*/*"))) == 18
    manifest = json.loads((tmp_path / "dst" / "160" / "dataset.json").read_text())
    assert manifest["damaged"] == sorted(f"train/class1/{name}" for name in expected)
    assert manifest["complete"] is True and manifest["images"] == {"train": 12, "val": 6}


def test_images_below_class_folders_have_copies_and_what_has_none_is_told(
    src: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    below = src / "train" / "class0" / "images"
    below.mkdir()
    image = next(path for path in (src / "train" / "class0").iterdir() if path.is_file())
    image.rename(below / image.name)
    shutil.copy(below / image.name, src / "train" / "loose.jpg")
    (src / "test").mkdir()
    shutil.copy(below / image.name, src / "test" / "unlabelled.jpg")
    status, out, _ = run(capsys, src, src, "--short-side", 100)
    assert status == 0 and "100: 18 images" in out
    assert (src / "100/train/class0/images" / image.name).with_suffix(".jpg").is_file()
    told = f"left out 1 loose file beside the class folders; the first: {src}/train/loose.jpg\n"
    assert told in out
    told = "no copies of test/, which training does not read: "
    assert f"{told}{src}/test has no class folders but 1 loose file, the first unlabelled" in out
    train = read_split(src, "train")
    copy = read_copy(src, "100", train)
    stems = [[Path(file.path).stem for file in split.files] for split in (train, copy)]
    assert stems[0] == stems[1] and len(stems[0]) == 12
    shutil.rmtree(src / "val")
    status, _, err = run(capsys, src, src, "--short-side", 100)
    assert status == 2 and err.startswith(f"error: {src}/test has no class folders but 1 loose")


def test_a_second_call_makes_what_is_missing_or_older_than_its_source(
    src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dst = tmp_path / "dst"
    resize(src, dst, "--short-side", 160)
    missing, emptied, changed, *others = sorted((dst / "160").glob("*/*/*"))
    inodes = [path.stat().st_ino for path in others]
    expected = missing.read_bytes()
    missing.unlink()
    emptied.write_bytes(b"")
    source = (src / changed.relative_to(dst / "160")).with_suffix(".JPEG")
    Image.new("RGB", (400, 200), "red").save(source)
    os.utime(source, (time.time() + 5,) * 2)
    capsys.readouterr()
    resize(src, dst, "--short-side", 160)
    assert "3 written, 0 copied bit for bit, 15 were there" in capsys.readouterr().out
    assert missing.read_bytes() == expected and emptied.stat().st_size > 0
    assert pixels_of(changed).shape == (160, 320, 3)
    assert [path.stat().st_ino for path in others] == inodes
    os.utime(changed, (time.time() + 10,) * 2)  # or else it is older than its source, soon after
    source = min(src.glob("train/*/*"))
    replacement = Path(shutil.copy2(max(src.glob("val/*/*")), tmp_path))
    os.utime(replacement, (1, 1))
    replacement.replace(source)
    capsys.readouterr()
    resize(src, dst, "--short-side", 160)
    assert ", 17 were there" in capsys.readouterr().out
    inodes = [path.stat().st_ino for path in others]
    resize(src, dst, "--short-side", 160, 120)
    assert [path.stat().st_ino for path in others] == inodes
    assert len(list((dst / "120").glob("*/*/*"))) == 18
    with pytest.raises(UserError, match="160 was made with 90, not 80: name another DST or"):
        resize(src, dst, "--short-side", 160, "--quality", 80)


COUNT = 160
"""Photographs of a call that is stopped after 20."""


def processes_of(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(text[3]) == session and text[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_call_leaves_whole_images_no_process_and_is_resumed(
    photographs: Path,
    tmp_path: Path,
    number: signal.Signals,
    capsys: pytest.CaptureFixture[str],
) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    (src / "train").mkdir(parents=True)
    for folder in sorted((photographs / "train").iterdir())[:COUNT]:
        (src / "train" / folder.name).symlink_to(folder, target_is_directory=True)
    arguments = (src, dst, "--short-side", 160, "--workers", 2)
    process = start(*arguments)
    deadline = time.monotonic() + 60
    while len(list(dst.glob("160/train/*/*"))) < 20:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
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
    there = {path: path.stat().st_ino for path in dst.glob("160/train/*/*")}
    assert 20 <= len(there) < COUNT
    for path in there:
        assert min(pixels_of(path).shape[:2]) <= 160  # decodes to the end
    assert json.loads((dst / "160" / "dataset.json").read_text())["complete"] is False
    assert (dst / ".partial").exists() == (number == signal.SIGKILL)
    status, out, err = run(capsys, *arguments)
    assert (status, err) == (0, ""), err
    assert f"{len(there)} were there" in out and not (dst / ".partial").exists()
    assert len(list(dst.glob("160/train/*/*"))) == COUNT
    assert {path: path.stat().st_ino for path in there} == there
    assert json.loads((dst / "160" / "dataset.json").read_text())["complete"] is True


def test_wrong_flags_and_folders_are_named(src: Path, tmp_path: Path) -> None:
    file = tmp_path / "files" / "64"
    file.parent.mkdir()
    file.touch()
    for arguments, message in (
        ((src, tmp_path, "--short-side", 7), "--short-side must be at least 8 pixels, not 7"),
        ((src, tmp_path, "--short-side", 160, "--quality", 96), "--quality must be from 1 to 95"),
        (
            (tmp_path, tmp_path, "--short-side", 160),
            "has no folder train/: expected train/CLASS/IMAGE, or --val-fraction 0.2 reads",
        ),
        ((src, tmp_path), "--short-side"),
        ((src, file, "--short-side", 160), f"{file} is a file: DST must be a folder"),
        ((src, file.parent, "--short-side", 64), f"{file} is a file: DST must be a folder"),
    ):
        with pytest.raises(UserError, match=message):
            resize(*arguments)
    src.rename(tmp_path / "160")
    with pytest.raises(UserError, match=r"/160 is .*/160 itself: name another DST"):
        resize(tmp_path / "160", tmp_path, "--short-side", 160)


def test_images_of_one_stem_are_told_before_anything_is_written(src: Path, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(src / "val" / "class0" / "a.png")
    Image.new("RGB", (9, 9)).save(src / "val" / "class0" / "a.bmp")
    with pytest.raises(UserError, match=r"a\.(png|bmp) and val/class0/a\.(png|bmp) would have the"):
        resize(src, tmp_path / "dst", "--short-side", 160)
    assert not (tmp_path / "dst").exists()


def test_a_folder_that_cannot_be_written_to_is_one_line(
    src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dst" / "160" / "train").mkdir(parents=True)
    (tmp_path / "dst" / "160" / "train" / "class2").write_text("no folder")
    status, _, err = run(capsys, src, tmp_path / "dst", "--short-side", 160)
    assert status == 2 and err.count("\n") == 1, err
    assert err.startswith(f"error: cannot use {tmp_path}/dst/160/train/class2")
    assert not (tmp_path / "dst" / ".partial").exists()


def test_what_is_known_of_the_original_is_said_of_the_copy(src: Path, tmp_path: Path) -> None:
    (src / "dataset.json").write_text('{"dataset": "ImageNet", "used_blacklist": false}')
    resize(src, src, "--short-side", 160)
    manifest = json.loads((src / "160" / "dataset.json").read_text())
    assert manifest["dataset"] == "ImageNet" and manifest["used_blacklist"] is False
