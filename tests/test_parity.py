"""The parity command: its figures are those of an independent comparison, its verdict is right."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from pipelines.backends import make_loader
from pipelines.cli import exit_status
from pipelines.datasets.images import whole_files
from pipelines.datasets.split import Split, read_split
from pipelines.loader import LoaderSpec, Stage
from pipelines.parity import compare
from pipelines.parity.__main__ import evenly, main
from pipelines.parity.compare import (
    CROP_SPEC,
    MIN_SCALE,
    Comparison,
    crop_test,
    kolmogorov_smirnov,
    our_crops,
)
from pipelines.sampling import BatchSampler, crop_box, draw_crops

pytest.importorskip("nvidia.dali")

BILINEAR = Image.Resampling.BILINEAR
NUM_CROPS = compare.NUM_CROPS
HOSTILE = "<img src=x onerror=alert(1)>&'\".png"


@pytest.fixture(scope="module")
def some(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 of the photographs in three classes, the same ones in both splits."""
    root = tmp_path_factory.mktemp("some")
    for index, path in enumerate(sorted((photographs / "val").glob("*/*"))[:450:30]):
        for split in ("train", "val"):
            folder = root / split / f"class{index % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / path.name).symlink_to(path.resolve())
    return root


@pytest.fixture(autouse=True)
def fewer_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision takes a second for 10,000 crops, which each command draws for three shapes."""
    monkeypatch.setattr(compare, "NUM_CROPS", 1000)


def parity(folder: Path, output: Path, *flags: object) -> int:
    return exit_status(main, [str(folder), "--output", str(output), *map(str, flags)])


def written(output: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """parity.json and the rows of images.csv."""
    with (output / "images.csv").open(newline="", errors="surrogateescape") as file:
        return json.loads((output / "parity.json").read_text()), list(csv.DictReader(file))


def centre_view(image: Image.Image, size: int) -> np.ndarray:
    """The short side resized, the long one rounded down, then the centre: by Pillow alone."""
    short = round(size * 256 / 224)
    width, height = image.size
    narrow = short, int(short * height / width)
    scaled = narrow if width < height else (int(short * width / height), short)
    left, top = (round((side - size) / 2) for side in scaled)
    image = image.resize(scaled, BILINEAR)
    return np.asarray(image.crop((left, top, left + size, top + size)), np.float64)


def expected_images(root: Path, training: bool, size: int) -> dict[str, tuple[float, float]]:
    """Name: mean and maximum difference of an image, from DALI's own 0..255 and Pillow alone."""
    split = read_split(root, "train" if training else "val")
    spec = LoaderSpec(
        split=split,
        stages=(Stage(epochs=1, image_size=size, batch_size=len(split), min_scale=MIN_SCALE),),
        training=training,
        mean=(0.0, 0.0, 0.0),
        std=(1 / 255, 1 / 255, 1 / 255),
    )
    loader = make_loader("dali", spec)
    images = next(iter(loader))[0].permute(0, 2, 3, 1).double().numpy().copy()
    loader.close()
    batch = BatchSampler(spec).batch(0, 0)
    found = {}
    for index, (file, ours) in enumerate(zip(batch.files, images, strict=True)):
        image = Image.open(file.path).convert("RGB")
        if batch.crops is None:
            expected = centre_view(image, size)
        else:
            box = crop_box(image.height, image.width, batch.crops, index, (3 / 4, 4 / 3))
            top, left, high, wide = (int(edge) for edge in box)
            image = image.crop((left, top, left + wide, top + high)).resize((size, size), BILINEAR)
            expected = np.asarray(image, np.float64)
            expected = expected[:, ::-1] if batch.crops.mirror[index] else expected
        difference = np.abs(ours - expected)
        found[str(Path(file.path).relative_to(root))] = (difference.mean(), difference.max())
    return found


def test_the_figures_are_those_of_an_independent_comparison(
    some: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert parity(some, output, "--image-size", 96, 160) == 0
    stdout = capsys.readouterr().out
    assert stdout.endswith(f"{output}/parity.html\n")
    about, rows = written(output)
    assert about["within"] and about["date"] and about["versions"]["torch"] == version("torch")
    settings = [("val", 96), ("val", 160), ("train", 96), ("train", 160)]
    assert [(one["split"], one["image_size"]) for one in about["comparisons"]] == settings
    for one, (split, size) in zip(about["comparisons"], settings, strict=True):
        expected = expected_images(some, split == "train", size)
        own = [row for row in rows if (row["split"], row["image_size"]) == (split, str(size))]
        assert {row["name"] for row in own} == set(expected) and len(own) == 15
        for row in own:
            mean, highest = expected[row["name"]]
            assert float(row["mean"]) == pytest.approx(mean, abs=1e-6)
            assert float(row["max"]) == pytest.approx(highest, abs=1e-6)
        means = [mean for mean, _ in expected.values()]
        assert one["images"] == one["images_in_split"] == 15
        assert one["mean"] == pytest.approx(np.mean(means), abs=1e-6)
        assert one["percentile_99"] == pytest.approx(np.percentile(means, 99), abs=1e-6)
        assert one["max"] == pytest.approx(max(highest for _, highest in expected.values()))
        assert 0 < one["mean"] < one["bound_mean"] == 0.25
        assert one["max_inside"] <= 1 and one["bound_max"] == (2 if split == "val" else None)
        worst = sorted(expected, key=lambda name: -expected[name][0])[:6]
        assert [image["name"] for image in one["worst"]] == worst
        printed = f"{'validation' if split == 'val' else 'training'} +{size} +within +"
        assert re.search(printed + rf"{one['mean']:.3f} .* 15 of 15\n", stdout)


def test_bounds_hold_on_photographs(photographs: Path, tmp_path: Path) -> None:
    """On 50 of the 500; benchmarks/results has the figures of all."""
    assert parity(photographs, tmp_path, "--image-size", 224, 128, "--images", 50) == 0
    about, rows = written(tmp_path)
    assert len(rows) == 4 * 50
    for one in about["comparisons"]:
        assert (one["images"], one["images_in_split"]) == (50, 500) and one["mean"] <= 0.25
        assert one["max_inside"] <= 2
        assert one["split"] == "train" or one["max"] <= 2
    assert len(about["crops"]) == 3


def test_images_of_odd_shapes_are_within_the_bounds(photographs: Path, tmp_path: Path) -> None:
    """Tall, wide, tiny, and as large as the views are; enlarged up to 146 times."""
    photograph = Image.open(sorted((photographs / "val").glob("*/*"))[7]).convert("RGB")
    shapes = [(1, 1), (2, 3), (5, 5), (9, 9), (16, 900), (900, 16), (4, 1000), (1000, 6)]
    shapes += [(40, 40), (46, 47), (257, 255), (256, 256), (224, 224), (255, 1100)]
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for width, height in shapes:
            image = photograph.resize((width, height))
            image.save(tmp_path / split / "a" / f"{width}x{height}.png")
            image.save(tmp_path / split / "a" / f"{width}x{height}.jpg")
    assert parity(tmp_path, tmp_path / "out", "--image-size", 128, 40) == 0
    about, rows = written(tmp_path / "out")
    assert len(rows) == 4 * 2 * len(shapes)
    for one in about["comparisons"]:
        assert one["max_inside"] <= 1
    for row in rows:
        assert row["split"] == "train" or float(row["max"]) <= 1
    crops = [(one["width"], one["height"]) for one in about["crops"]]
    assert (crops[0], crops[-1]) == ((4, 1000), (1000, 6))


class Pictures(HTMLParser):
    """The tags, the text and the `<img>`s of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        assert not any(name.startswith("on") for name in values)
        assert (values.get("href") or "data:,") == "data:,"
        if tag == "img":
            self.addresses.append(values["src"] or "")

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self) -> list[Image.Image]:
        head = "data:image/png;base64,"
        assert all(address.startswith(head) for address in self.addresses)
        codes = [address.removeprefix(head) for address in self.addresses]
        return [Image.open(io.BytesIO(base64.b64decode(code))) for code in codes]


def test_pixels_that_really_differ_end_with_1_and_are_shown_first(
    some: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Pillow's own conversion clips 16-bit grey to 255, where DALI and our rule scale it."""
    clipping = lambda image, upright=False: image.convert("RGB")  # noqa: E731
    monkeypatch.setattr("pipelines.parity.compare.rgb", clipping)
    for split in ("train", "val"):
        folder = tmp_path / split / "a"
        folder.mkdir(parents=True)
        paths = sorted(some.glob("val/*/*"))[:7]
        for path in paths:
            (folder / path.name).symlink_to(path.resolve())
        grey = np.asarray(Image.open(paths[0]).convert("L").resize((120, 90)))
        Image.fromarray(grey.astype(np.uint16) * 257).save(folder / HOSTILE)
        (folder / b"\xff16.png".decode("utf-8", "surrogateescape")).symlink_to(folder / HOSTILE)
    output = tmp_path / "out"
    assert parity(tmp_path, output, "--image-size", 64) == 1
    assert capsys.readouterr().out.count("OUTSIDE") == 2
    about, rows = written(output)
    assert not about["within"] and not any(one["within"] for one in about["comparisons"])
    assert all(one["within"] for one in about["crops"])
    odd = {row["name"] for row in rows if float(row["mean"]) > 20}
    assert odd == {row["name"] for row in rows if row["name"].endswith("png")} and len(odd) == 4
    for one in about["comparisons"]:
        assert {image["name"] for image in one["worst"][:2]} < odd

    page = Pictures((output / "parity.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags and page.text.count("2 more beyond 0.5") == 2
    assert HOSTILE in page.text and "\\udcff16.png" in page.text
    pictures = page.images()
    assert len(pictures) == page.tags.count("img") == 2 * 6 * 3
    assert {picture.size for picture in pictures} == {(64, 64)}
    reference, ours, difference = (np.asarray(picture).astype(int) for picture in pictures[:3])
    mean = about["comparisons"][0]["worst"][0]["mean"]
    assert np.abs(ours - reference).mean() == pytest.approx(mean, abs=0.01) and mean > 20
    assert np.array_equal(difference, np.minimum(255, 100 * np.abs(ours - reference)))


def test_a_shifted_view_is_outside_the_bounds(some: Path) -> None:
    """By a single pixel; and what is compared, on numbers to be checked by hand."""
    path = sorted(some.glob("val/*/*"))[0]
    image = torch.from_numpy(np.array(Image.open(path).convert("RGB").resize((65, 64))))
    image = image.permute(2, 0, 1)[None].float()
    for split in ("train", "val"):
        same, shifted = Comparison(split, 64), Comparison(split, 64)
        same.add(["a"], image[..., 1:], image[..., 1:])
        shifted.add(["a"], image[..., 1:], image[..., :-1])
        assert (same.within, same.mean, same.max) == (True, 0, 0)
        assert not shifted.within

    values = torch.zeros(2, 3, 4, 4)
    other = values.clone()
    other[0, 0, 0, 1], other[1, 2, 1, 1], other[1, 2, 2, 1] = 9, 1, 3
    found = Comparison("val", 4)
    found.add(["a", "b"], values, other)
    assert found.means == pytest.approx([9 / 48, 4 / 48]) and found.maxima == [9, 3]
    assert (found.max, found.max_inside) == (9, 3)
    assert found.mean == pytest.approx(13 / 96) and not found.within
    assert [one.name for one in found.worst] == ["a", "b"]
    other[0, 0, 0, 1], other[1, 2, 2, 1] = 2, 2
    found = Comparison("val", 4)
    found.add(["a", "b"], values, other)
    assert found.within


def test_only_as_many_images_as_asked_for_evenly_spread(
    some: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parity(some, tmp_path, "--images", 5, "--image-size", 32) == 0
    assert capsys.readouterr().out.count("5 of 15") == 2
    _, rows = written(tmp_path)
    listed = [Path(file.path).name for file in read_split(some, "val").files]
    for split in ("val", "train"):
        names = {Path(row["name"]).name for row in rows if row["split"] == split}
        assert names == set(listed[::3])
    split = Split(whole_files(map(str, range(10))), list(range(10)), ("a",))
    assert evenly(split, 4).labels.tolist() == [0, 2, 5, 7]
    assert evenly(split, 10).labels.tolist() == evenly(split, 11).labels.tolist() == [*range(10)]


def test_a_damaged_file_is_left_out_and_named(
    some: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for path in sorted(some.glob("val/*/*"))[:4]:
            (tmp_path / split / "a" / path.name).symlink_to(path.resolve())
    bad = tmp_path / "val" / "a" / "bad.jpg"
    bad.write_bytes(path.read_bytes()[:3000])
    assert parity(tmp_path, tmp_path / "out", "--image-size", 32) == 0
    out = capsys.readouterr().out
    assert f"left out 1 bad file of 5; the first: {bad} " in out and out.count("4 of 4") == 2
    assert str(bad) in (tmp_path / "out" / "parity.html").read_text()
    skip_list = tmp_path / "skip"
    skip_list.write_text("val/a/bad.jpg\n")
    assert parity(tmp_path, tmp_path / "out", "--image-size", 32, "--skip-list", skip_list) == 0
    assert "left out" not in capsys.readouterr().out


def dali_crops(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths of crops that DALI has cut from an image whose red and green say where."""
    size, batch_size = 32, 500
    spec = LoaderSpec(
        split=Split(whole_files([str(path)] * count), [0] * count, ("a",)),
        stages=(Stage(epochs=1, image_size=size, batch_size=batch_size, min_scale=MIN_SCALE),),
        training=True,
        mirror=False,
        mean=(0.0, 0.0, 0.0),
        std=(1 / 255, 1 / 255, 1 / 255),
    )
    # The slope of a straight line through the inner pixels, which DALI's repeated edges leave.
    x = np.arange(1, size - 1) - (size - 1) / 2
    weights = x / (x**2).sum()
    loader = make_loader("dali", spec)
    high, wide = [], []
    for images, _ in loader:
        inner = images[:, :, 1:-1, 1:-1].double().numpy()
        wide.append(size * (inner[:, 0].mean(1) @ weights))
        high.append(size * (inner[:, 1].mean(2) @ weights))
    loader.close()
    return np.concatenate(high), np.concatenate(wide)


def test_dali_draws_crops_of_the_area_and_aspect_of_random_resized_crop(tmp_path: Path) -> None:
    """10,000 crops as they come out of DALI against 10,000 boxes of torchvision."""
    stats = pytest.importorskip("scipy.stats")
    width, height, count = 128, 96, 10_000
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    Image.fromarray(np.stack((x, y, x), 2)).save(tmp_path / "where.png")
    high, wide = dali_crops(tmp_path / "where.png", count)
    torch.manual_seed(1)
    image = Image.new("RGB", (width, height))
    scale, ratio = (MIN_SCALE, 1.0), (3 / 4, 4 / 3)
    boxes = [RandomResizedCrop.get_params(image, scale, ratio)[2:] for _ in range(count)]
    expected_high, expected_wide = np.array(boxes, np.float64).T
    areas = stats.ks_2samp(high * wide, expected_high * expected_wide)
    aspects = stats.ks_2samp(np.log(wide / high), np.log(expected_wide / expected_high))
    assert areas.pvalue > 1e-3 and aspects.pvalue > 1e-3
    crops = draw_crops(CROP_SPEC, np.random.default_rng(1), count, 0.12)
    _, _, other_high, other_wide = crop_box(height, width, crops, slice(None), ratio)
    assert stats.ks_2samp(high * wide, other_high * other_wide).pvalue < 1e-6, "blind to 4 %"


@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (1200, 100), (3, 4)])
def test_crops_of_the_command_pass_for_any_seed(shape: tuple[int, int]) -> None:
    for seed in range(4):
        assert crop_test(*shape, seed).within


def test_all_crops_of_the_command_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "NUM_CROPS", NUM_CROPS)
    assert NUM_CROPS == 10_000 and crop_test(375, 500).within


def test_kolmogorov_smirnov_is_scipys(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for shift in (0, 0.02, 0.05, 0.2):
        first, second = generator.normal(size=10_000), generator.normal(shift, size=8_000)
        expected = stats.ks_2samp(first, second, method="asymp")
        distance, p = kolmogorov_smirnov(first, second)
        assert distance == pytest.approx(expected.statistic)
        assert p == pytest.approx(expected.pvalue, rel=0.05, abs=1e-12)
    assert kolmogorov_smirnov(first, first) == (0, 1)
    monkeypatch.setattr(compare, "NUM_CROPS", NUM_CROPS)
    high, wide = our_crops(375, 500, 0)
    assert kolmogorov_smirnov(high * wide, 1.05 * high * wide)[1] < 1e-4


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--image-size", "0"], "--image-size must be at least 1, not 0"),
        (["--images", "0"], "--images must be at least 1, not 0"),
        (["--threads", "-1"], "--threads must be at least 1, not -1"),
        (["--image-size", "x"], "--image-size"),
        (["--output", __file__], "is a file: name a folder"),
        (["--skip-list", "missing"], "--skip-list: cannot read missing"),
    ],
)
def test_wrong_flags_are_one_line(
    flags: list[str], message: str, some: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parity(some, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


def test_wrong_folders_are_one_line(
    some: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "val").symlink_to(some / "val")
    wrong = {"none": "no folder", "half": "no folder train"}
    for folder, message in wrong.items():
        assert parity(tmp_path / folder, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error
    if not torch.cuda.is_available():
        assert parity(some, tmp_path / "out", "--device", "cuda") == 2
        assert "--device cuda" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
