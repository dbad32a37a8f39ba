"""The benchmark commands run and write what they say; how fast is not judged here."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.common.statistics import Estimate, estimate, ratio, shown
from benchmarks.loaders.contestants import LOADERS, Task, by_pillow, by_torchvision, spdl
from benchmarks.research import loader_memory, start_up
from fastimagenet.recipes import named_recipe, toml
from pipelines.datasets.digits import digits_folder
from pipelines.datasets.split import read_split
from pipelines.errors import UserError
from pipelines.prepare.__main__ import main as prepare
from tests.commands import call

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = ("ablation", "loaders", "plan", "gpu_suite", "peers")


def run(name: str, *flags: object) -> int:
    """Run a command in this process; returns its exit status."""
    if name == "research.dali_stages":
        pytest.importorskip("nvidia.dali")
    return call(f"benchmarks.{name}", *flags)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast is not judged, so nobody has to fill queues."""
    monkeypatch.setattr("benchmarks.loaders.__main__.PAUSE_SECONDS", 0.0)


def called(name: str, *flags: str) -> None:
    """Call the command's function, whose errors are raised."""
    if name == "research.dali_stages":
        pytest.importorskip("nvidia.dali")
    main = name if name not in PACKAGES else f"{name}.__main__"
    import_module(f"benchmarks.{main}").main(flags)


def test_intervals_are_those_of_student() -> None:
    assert estimate([1.0, 2.0, 3.0]) == replace(estimate([1.0, 2.0, 3.0], signed=True), low=0)
    found = estimate([1.0, 2.0, 3.0], signed=True)  # 2 +- 4.303 * 1 / sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((2, -0.484, 4.484), abs=1e-3)
    found = estimate([0.0] * 10 + [2.0] * 10)  # 1 +- 2.093 * 1.026 / sqrt(20), 19 degrees
    assert found.high == pytest.approx(1.480, abs=1e-3)
    found = ratio([2.0, 8.0], [1.0, 1.0])  # exp((ln 2 + ln 8) / 2) = 4
    assert found.mean == pytest.approx(4)
    assert found.high == pytest.approx(4 * 2**12.706)


def test_estimates_are_told_without_exponents() -> None:
    assert str(Estimate(11152.4, 950.26, 0.0123456)) == "11,152 (950.3 .. 0.01235)"
    found = shown({"mean": 7.8e14, "low": 1e12, "high": 1e15}, 1e-12, " TFLOP/s")
    assert found == "780 (1 .. 1,000) TFLOP/s"


@pytest.mark.parametrize(
    "flags",
    [pytest.param([], id="random-crop"), pytest.param(["--reflect-pad", "4"], id="reflect-pad")],
)
def test_loaders_writes_rates_ratios_and_what_they_were_measured_on(
    flags: list[str], cifar10: Path, tmp_path: Path
) -> None:
    pytest.importorskip("nvidia.dali")
    sizes = ["--image-size", 32, "--batch-size", 10, "--rounds", 2, "--seconds", 0.05]
    sizes += ["--threads", 1]
    output = tmp_path / "result.json"
    assert run("loaders", "--data", cifar10, *sizes, *flags, "--json", output) == 0
    written = json.loads(output.read_text())
    (measured,) = written["measured"]
    assert (measured["label"], measured["images"]) == (cifar10.name, 500)
    taking_part = set(measured["images_per_sec"])
    assert taking_part | set(written["left_out"]) == set(LOADERS)
    assert set(written["left_out"]) <= {"spdl", *(["decode-crops"] if flags else [])}
    assert set(measured["ratio_to_dataloader"]) == taking_part - {"dataloader"}
    assert set(measured["ratio_to_decode"]) == taking_part - {"decode"}
    assert measured["ratio_to_first"] == {}
    for name, rates in measured["rounds"].items():
        assert measured["images_per_sec"][name]["mean"] == pytest.approx(sum(rates) / 2)
    assert written["versions"]["torch"] and written["hardware"] and written["date"]


def test_loaders_compares_folders_copies_and_shards(
    cifar10: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nvidia.dali")
    prepare(["shard", str(cifar10), str(tmp_path / "shards")])
    data = [f"originals={cifar10}", f"packed={tmp_path / 'shards'}"]
    some = ["dali", "memory"]
    sizes = ["--image-size", 32, 24, "--batch-size", 10, "--rounds", 2, "--seconds", 0.05]
    output = tmp_path / "result.json"
    assert run("loaders", "--data", *data, "--only", *some, *sizes, "--json", output) == 0
    measured = json.loads(output.read_text())["measured"]
    assert [(one["image_size"], one["label"]) for one in measured] == [
        (size, label) for size in (32, 24) for label in ("originals", "packed")
    ]
    for first, other in zip(measured[::2], measured[1::2], strict=True):
        assert first["images"] == other["images"] == 500
        assert list(other["ratio_to_first"]) == some
        rates = [other["rounds"]["dali"][i] / first["rounds"]["dali"][i] for i in (0, 1)]
        mean = math.sqrt(rates[0] * rates[1])
        assert other["ratio_to_first"]["dali"]["mean"] == pytest.approx(mean)
        assert other["ratio_to_dataloader"] == other["ratio_to_decode"] == {}  # not among them
    header = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("|"))
    assert "/ originals" in header


def test_loaders_leaves_out_who_cannot_take_part(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Some of the embedded digits, which are PNGs; one more file is none."""
    data = tmp_path / "data"
    for split in ("train", "val"):
        for label in ("0", "1"):
            folder = data / split / label
            folder.mkdir(parents=True)
            for image in sorted((digits_folder() / split / label).iterdir())[:10]:
                shutil.copy(image, folder)
    (data / "train" / "0" / "bad.png").write_bytes(b"nothing")
    sizes = ["--image-size", 8, "--batch-size", 8, "--rounds", 2, "--seconds", 0.05, "--threads", 1]
    for only, status in ((["torchvision", "decode"], 0), (["decode"], 2)):
        assert run("loaders", "--data", data, *sizes, "--only", *only) == status
        out, err = capfd.readouterr()
        assert "decode is left out: there are no JPEGs to decode" in out
        assert err.startswith("left out 1 bad file of 21; the first: ")
        assert ("error: --only decode: " in err) == (status == 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "1"], "error: argument --rounds: must be at least 2, not 1"),
        (["--data", "a=x", "a=y"], "error: --data: two folders are called a"),
    ],
)
def test_loaders_names_a_wrong_flag(
    flags: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("loaders", *flags) == 2
    assert capfd.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        *(
            ("loaders", f"--{flag} 0")
            for flag in ("image-size", "threads", "batch-size", "seconds")
        ),
        ("loaders", "--reflect-pad -1"),
        ("training_step", "--sizes 0"),
        ("training_step", "--batches 0"),
        ("training_step", "--seconds nan"),
        ("research.step_floor", "--sizes 0"),
        ("research.step_floor", "--batch-size 0"),
        ("research.step_floor", "--ceilings 0 0"),
        *(
            ("research.decode_sweep", f"--{flag} 0")
            for flag in ("threads", "image-size", "batch-size")
        ),
        *(
            ("research.dali_stages", f"--{flag} 0")
            for flag in ("size", "threads", "batch-size", "seconds")
        ),
        ("research.device_ceilings", "--seconds 0"),
        *(
            ("research.loader_memory", f"--{flag} 0")
            for flag in ("image-size", "threads", "batch-size")
        ),
        *(
            ("research.prepare_rates", f"--{flag} 0")
            for flag in ("workers", "short-side", "seconds")
        ),
        ("research.checkpoint_cost", "--interval 0"),
        ("research.start_up", "--threads 0"),
        ("gpu_suite", "--limit 0"),
        ("superconvergence", "--seed -1"),
    ],
)
def test_numbers_that_nothing_can_be_measured_with_are_named(name: str, flags: str) -> None:
    flag, number, *_ = flags.split()
    with pytest.raises(UserError, match=rf"{flag}: must be .*, not {number}"):
        called(name, *flags.split())


def test_the_floor_of_a_recipe_of_ones_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.toml"
    file.write_text(toml.dumps(named_recipe("digits")))
    for recipe in ("digits", str(file)):
        called("research.step_floor", "--recipe", recipe, "--sizes", "8")
    once, again = capfd.readouterr().out.split("\nsmallnet at 8 px")[1:]
    assert once == again


JSON = (
    *(f"research.{name}" for name in ("dali_stages", "decode_sweep", "device_ceilings",
      "loader_memory", "prepare_rates", "start_up")),
    *("loaders", "training_step"),
)  # fmt: skip
OUTPUT = ("ablation", "research.checkpoint_cost", "compare", "dawnbench", "gpu_suite", "plan",
          "peers", "research.growth", "superconvergence", "throughput")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "flag"),
    [*((name, "--json") for name in JSON), *((name, "--output") for name in OUTPUT)],
)
def test_where_nothing_can_be_written_is_told_at_once(name: str, flag: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for wrong in (file / "x", file if flag == "--output" else tmp_path):
        with pytest.raises(UserError, match=rf"{flag}: .* is a (file: name a folder|folder: name)"):
            called(name, flag, str(wrong))
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("decode", [by_pillow, by_torchvision])
def test_rivals_decode_what_pillow_decodes(
    decode: Callable[[bytes], Any], photographs: Path
) -> None:
    file = read_split(photographs, "train").files[0]
    with Image.open(file.path) as image:
        expected = np.asarray(image.convert("RGB"))
    found = decode(file.read())
    pixels = found.permute(1, 2, 0).numpy() if decode is by_torchvision else np.asarray(found)
    assert np.abs(pixels.astype(int) - expected).max() <= 1


def test_spdl_reads_what_it_is_asked_for(cifar10: Path) -> None:
    task = Task(split=read_split(cifar10, "train"), image_size=24, batch_size=500, threads=2)
    with closing(spdl(task)) as batches:
        try:
            images, labels = next(batches)
        except UserError as error:
            pytest.skip(f"spdl {error}")
    assert images.shape == (500, 3, 24, 24) and images.dtype == torch.float32
    assert images.abs().max() < 3 and abs(images.mean()) < 0.5 and 0.5 < images.std() < 1.5
    assert sorted(set(labels.tolist())) == list(range(10))


def test_loader_memory_counts_workers(tmp_path: Path) -> None:
    before, _ = loader_memory.memory()
    child = subprocess.Popen(
        [sys.executable, "-c", "held = bytearray(b'1') * 2**28; print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    after, _ = loader_memory.memory()
    child.communicate(b"\n")
    assert 256 < after - before < 300


def test_loader_memory_writes_what_it_found(
    cifar10: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "memory.json"
    sizes = ["--image-size", "24", "32", "--epochs", "6", "--batch-size", "50"]
    flags = ["--data", cifar10, "--backend", "torchvision", *sizes, "--json", file]
    assert run("research.loader_memory", *flags) == 0
    written = json.loads(file.read_text())
    epochs = written["epochs"]
    assert [one["image_size"] for one in epochs] == [24, 24, 24, 32, 32, 32]
    allocated = [one["allocated_mib"] for one in epochs]
    assert written["allocated_spread"] == max(allocated[1:]) / min(allocated[1:]) - 1
    own = [max(part) / min(part) - 1 for part in (allocated[1:3], allocated[4:])]
    assert written["allocated_spread_at_a_size"] == max(own)
    assert (tmp_path / "memory.svg").exists() and (tmp_path / "memory.png").exists()
    assert run("research.loader_memory", "--data", cifar10, "--epochs", "7") == 2
    assert capfd.readouterr().err.startswith("error: --epochs 7: at least 3 for each of 4 sizes")


def test_memory_of_the_dali_loader_is_flat(photographs: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    file = tmp_path / "memory.json"
    flags = ["--data", photographs, "--image-size", "224", "--epochs", "4", "--json", file]
    command = [sys.executable, "-m", "benchmarks.research.loader_memory", *map(str, flags)]
    assert subprocess.run(command, cwd=ROOT).returncode == 0  # with a memory of its own
    assert json.loads(file.read_text())["allocated_spread"] < 0.05


def test_prepare_rates_compares_with_mere_decoding(cifar10: Path, tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    sizes = ["--short-side", 16, "--rounds", 2, "--seconds", 0.3, "--workers", 2]
    assert run("research.prepare_rates", "--data", cifar10, *sizes, "--json", file) == 0
    written = json.loads(file.read_text())
    assert written["config"]["images"] == 700
    for name in ("scan", "resize"):
        ratios = [a / b for a, b in zip(*map(written["rounds"].get, (name, "decode")), strict=True)]
        mean = math.sqrt(math.prod(ratios))
        assert written["ratio_to_decode"][name]["mean"] == pytest.approx(mean)


def test_prepare_rates_names_a_bad_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "train" / "a" / "bad.jpg"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"nothing")
    assert run("research.prepare_rates", "--data", tmp_path, "--seconds", 0.1) == 2
    assert capfd.readouterr().err.startswith(f"error: --data: {bad} cannot be decoded")


def test_start_up_leaves_nothing_behind(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_up, "STARTS", start_up.STARTS[:1])  # each is a process of its own
    originals = [file.path for file in read_split(photographs, "train").files[:30]]
    for index, path in enumerate(originals):
        folder = tmp_path / "data" / "train" / f"class{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    file = tmp_path / "start-up.json"
    flags = ["--data", str(tmp_path / "data"), "--files", "1000", "--json", str(file)]
    assert start_up.main(flags) == 0
    result = json.loads(file.read_text())
    assert [(one["files"], one["start"]) for one in result["starts"]] == [
        (1000, start) for start in start_up.STARTS
    ]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["data", "start-up.json"]
    with pytest.raises(UserError, match="--scratch /proc: no hard links to --data"):
        start_up.main([*flags, "--scratch", "/proc"])
    with pytest.raises(UserError, match="--files: must be at least 1000"):
        start_up.main([*flags[:2], "--files", "10"])


def test_growth_is_the_exponent_of_the_files() -> None:
    starts = [
        start_up.Start(files=files, start=start, seconds=seconds, peak_mib=1.0)
        for files, factor in ((1000, 1.0), (4000, 2.0))
        for start, seconds in zip(start_up.STARTS, (factor, factor**2, 1.0), strict=True)
    ]
    growth = {start: start_up.growth(starts, start) for start in start_up.STARTS}
    assert growth == pytest.approx({"first": 0.5, "again": 1.0, "ImageFolder": 0.0})
    last = start_up.table(starts, growth).splitlines()[-1]
    assert last.split()[3::2] == ["files^0.50", "files^1.00", "files^0.00"]
