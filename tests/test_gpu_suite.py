"""The GPU suite: rehearsed as a whole on the CPU, and what it does when its parts go wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.common.statistics import Estimate
from benchmarks.gpu_suite import __main__ as gpu_suite
from benchmarks.gpu_suite.parts import PARTS, STEPS, TESTS, Part, Setup, named_again, read_tests
from benchmarks.gpu_suite.processes import Worker
from benchmarks.research import decode_sweep, device_ceilings
from benchmarks.research.decode_sweep import DecodeRate, Task
from fastimagenet.recipes import named_recipe
from fastimagenet.recipes import toml as recipe_toml
from pipelines.cli import Parser
from pipelines.datasets.images import whole_files
from pipelines.datasets.split import Split, read_split
from pipelines.errors import UserError
from pipelines.files import Row, read_object
from pipelines.loader import DaliSettings
from tests.commands import call
from tests.test_step_variants import with_model

ROOT = Path(__file__).resolve().parent.parent


def result_of(folder: Path) -> Row:
    (path,) = folder.glob("*.json")
    return read_object(path)


SIZES = [f"phases.{index}.{size}=8" for index in (0, 1) for size in ("image_size", "eval_size")]
SMALL = ("--precision", "fp32", *(word for field in SIZES for word in ("--set", field)))
SMALLER = {
    "fastimagenet.train": ("--set", "model=smallnet", *SMALL),
    "fastimagenet.lr_find": ("--set", "model=smallnet", *SMALL),
    "benchmarks.throughput": ("--set", "model=smallnet", "--set", "blur_pool=false"),
}
"""What makes a part of the rehearsal one for a test: flags beside its own."""


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's parts with a small network, in this process."""
    recipe = with_model("smallnet")

    def run_here(_: Worker, words: list[str], log: Path, __: float) -> int | None:
        flags = [*words[1:], *SMALLER.get(words[0], ())]
        with log.open("w") as output, redirect_stdout(output), redirect_stderr(output):
            return call(words[0], *flags)

    monkeypatch.setattr(Worker, "run", run_here)
    monkeypatch.setattr("benchmarks.training_step.chosen_recipe", lambda _: (recipe, ()))
    monkeypatch.setattr("benchmarks.common.rates.MATRIX", {"cpu": 64})
    monkeypatch.setattr("benchmarks.common.rates.COPY_BYTES", {"cpu": 1 << 16})


@pytest.mark.usefixtures("in_this_process")
def test_the_suite_is_rehearsed_on_a_cpu(cifar10: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    steps = ("eager",)
    left_out = [
        *TESTS,
        "cifar10-speed",
        "lr-finder",
        *(name for name in STEPS if name not in steps),
    ]
    copy = tmp_path / "copy"
    flags = ["--device", "cpu", "--data", cifar10, "--cifar10", cifar10, "--copy", copy]
    flags += ["--output", tmp_path, "--skip", *left_out]
    assert gpu_suite.main(list(map(str, flags))) == 0
    result = result_of(tmp_path)
    assert result["device"] == "cpu" and result["rehearsal"].startswith("CPU rehearsal")
    assert set(result["parts"]) == {part.name for part in PARTS}
    for name, part in result["parts"].items():
        if name in left_out:
            assert (part["status"], part["reason"]) == ("skipped", "not asked for")
            continue
        assert part["status"] == "done", part
        assert part["rehearsal"] and part["device"] == result["hardware"], name
        assert part["figures"] and part["command"].startswith("python -m "), name
    figures = {name: part["figures"] for name, part in result["parts"].items()}
    assert figures["ceilings"]["matmul_flops_per_sec"]["mean"] > 0
    assert figures["cifar10"]["epochs"] == 2 and len(figures["cifar10"]["evaluated"]) >= 1
    assert [phase["image_size"] for phase in figures["stall"]["phases"]] == [32]
    assert figures["decode"]["decoder"] == "cpu"
    assert all(rate["images_per_sec"]["mean"] > 0 for rate in figures["decode"]["rates"])
    assert figures["parity"]["within"]
    for name in steps:
        (step,) = figures[name]["rates"]
        assert step["peak_memory_bytes"] > 2**20 and not step["error"]
    (table,) = tmp_path.glob("*-rehearsal.md")
    assert table.read_text().count("lack imports and the start of CUDA") == 1  # of CIFAR-10
    headings = [line for line in table.read_text().splitlines() if line.startswith("#")]
    assert all("rehearsal" in line for line in headings if line != "## Parts")
    assert table.read_text().count("## ResNet-50's training step") == 1
    (page,) = tmp_path.glob("*-rehearsal.html")
    text = page.read_text()
    assert text.count("<svg") >= 4 and "src=" not in text
    (parts,) = copy.glob("*-rehearsal-parts.tar.gz")
    assert {path.name for path in copy.iterdir()} == {
        parts.name, *(path.name for path in tmp_path.glob("*-rehearsal.*"))
    }  # fmt: skip
    with tarfile.open(parts) as archive:
        kept = archive.getnames()
    assert {"stall/throughput.json", "decode/log.txt", "cifar10/run/metrics.jsonl"} <= set(kept)
    assert not any("photographs" in name or name.endswith(".pt") for name in kept)


class Parsed(Exception):
    """The flags are right: the command would begin."""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", [part.name for part in PARTS])
def test_the_command_of_every_part_is_right(
    name: str, device: str, cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = (part for part in PARTS if part.name == name)
    setup = Setup(device=device, data=cifar10, cifar10=cifar10)
    module, *flags = part.command(setup, tmp_path, part.seconds)
    if module == "pytest":
        files = [flag for flag in flags if flag.endswith(".py")]
        assert files and all((ROOT / file).is_file() for file in files)
        return
    parse = Parser.parse_args

    def parse_only(parser: Parser, *args: Any) -> None:
        namespace = parse(parser, *args)
        if recipe := getattr(namespace, "recipe", None):
            recipe_toml.with_settings(named_recipe(recipe, 1), getattr(namespace, "set", []))
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", parse_only)
    command = f"{module}.__main__" if module == "pipelines.parity" else module
    with pytest.raises(Parsed):
        import_module(command).main(flags)


def test_two_calls_of_a_visit_have_time_for_all_that_tells_most() -> None:
    """The first of 9 minutes, the second of 4; tests that compile come last."""
    seconds = {part.name: part.seconds for part in PARTS}
    names = list(seconds)
    second = names.index("tests-quick")
    assert sum(seconds[name] for name in names[:second]) <= 540 - 5
    assert names[second:] == [
        "tests-quick", "cifar10-speed", "cifar10", "tests-loaders", "tests-faults", "lr-finder",
        "tests-step", "tests-training",
    ]  # fmt: skip
    assert sum(seconds[name] for name in names[second : second + 4]) <= 240 - 5
    assert sum(seconds[name] for name in TESTS) >= 340


def test_every_file_of_gpu_tests_is_a_part() -> None:
    files = (ROOT / "tests" / "gpu").glob("test_*.py")
    named = {file for several, _, _ in TESTS.values() for file in several}
    assert {path.stem.removeprefix("test_") for path in files} == named


def test_few_photographs_make_large_batches(cifar10: Path, tmp_path: Path) -> None:
    assert named_again(cifar10, tmp_path, 500) == cifar10
    again = named_again(cifar10, tmp_path, 501)
    few, many = (read_split(root, "train") for root in (cifar10, again))
    assert again == tmp_path and len(many) == 2 * len(few)
    assert many.classes == few.classes and sorted(many.labels) == sorted(2 * list(few.labels))
    assert len({Path(file.path).resolve() for file in many.files}) == len(few)
    assert len(read_split(again, "val")) == len(read_split(cifar10, "val"))


def part(name: str, script: str, read: Callable[[Path], Row], needs: str = "") -> Part:
    """A part that runs a Python script in its folder."""

    def command(_: Setup, folder: Path, __: float) -> list[str]:
        start = f"import os\nfolder = {str(folder)!r}\n"
        start += "open(folder + '/process', 'w').write(str(os.getpid()))\n"
        (folder / "script.py").write_text(start + script)
        return ["timeit", "-n1", "-r1", f"exec(open({str(folder / 'script.py')!r}).read(), {{}})"]

    return Part(name=name, title=name, seconds=1, command=command, read=read, needs=needs)


FOUND = {"cut_by_limit": True, "rates": [], "decoder": "cpu", "photographs": 1, "entries": 1}
LEFT = f"import json\njson.dump({FOUND}, open(folder + '/left.json', 'w'))\n"


def left(folder: Path) -> Row:
    return read_object(folder / "left.json") if (folder / "left.json").exists() else {}


def test_a_failing_part_is_told_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hang = "import time, subprocess, sys\n"
    hang += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    hang += "open(folder + '/pid', 'w').write(str(child.pid))\ntime.sleep(600)\n"
    parts = (
        part("ceilings", "print('so far')\nraise ValueError('no such thing')", left),
        part("cifar10", "", left, needs="cifar10"),
        part("stall", "", left),
        part("decode", LEFT + hang, left),
        part("eager", LEFT, left),
    )
    monkeypatch.setattr(gpu_suite, "PARTS", parts)
    monkeypatch.setattr(gpu_suite, "REHEARSAL_TIMES", 3)
    folder = tmp_path / "suite"
    assert gpu_suite.main(["--device", "cpu", "--output", str(folder)]) == 1
    assert "failed: ceilings, stall, decode" in capsys.readouterr().err
    result = result_of(folder)
    statuses = {name: one["status"] for name, one in result["parts"].items()}
    assert statuses == {
        "ceilings": "failed", "cifar10": "skipped", "stall": "failed", "decode": "failed",
        "eager": "done",
    }  # fmt: skip
    processes = [(folder / name / "process").read_text() for name in statuses if name != "cifar10"]
    assert len({*processes[:3]}) == 1 and processes[3] != processes[2]  # after the end of its time
    found = result["parts"]
    assert found["ceilings"]["reason"] == "exit status 1: ValueError: no such thing"
    assert "so far" in found["ceilings"]["log_tail"]
    assert found["cifar10"]["reason"] == "needs --cifar10"
    assert found["stall"]["reason"] == "it left no figures"
    assert found["decode"]["reason"].startswith("not done within ")
    assert "KeyboardInterrupt" in found["decode"]["log_tail"]  # it can say where it was
    assert found["decode"]["figures"] == found["eager"]["figures"] == FOUND
    orphan = Path(f"/proc/{(folder / 'decode' / 'pid').read_text()}")
    deadline = time.monotonic() + 30
    while orphan.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (page,) = folder.glob("*.html")
    assert "no such thing" in page.read_text()
    with pytest.raises(UserError, match="holds another suite"):
        gpu_suite.main(["--device", "cpu", "--output", str(folder)])


def test_a_page_that_cannot_be_drawn_costs_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = "import json\njson.dump({'rates': 1}, open(folder + '/left.json', 'w'))\n"
    monkeypatch.setattr(gpu_suite, "PARTS", (part("eager", odd, left),))
    assert gpu_suite.main(["--device", "cpu", "--output", str(tmp_path)]) == 1
    assert "no tables or page" in capsys.readouterr().err
    assert result_of(tmp_path)["parts"]["eager"]["figures"] == {"rates": 1}


def test_a_suite_that_is_stopped_leaves_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, copy = tmp_path / "suite", tmp_path / "copy"
    parts = part("decode", LEFT, left), part("eager", "import time\ntime.sleep(600)", left)
    monkeypatch.setattr(gpu_suite, "PARTS", tuple(replace(one, seconds=30) for one in parts))
    process = folder / "eager" / "process"

    def stop_when_running() -> None:
        until = time.monotonic() + 300
        while not (process.exists() and process.read_text()) and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop_when_running)
    stopper.start()
    status = call("benchmarks.gpu_suite", "--device", "cpu", "--output", folder, "--copy", copy)
    stopper.join()
    assert status == 143
    assert not Path(f"/proc/{process.read_text()}").exists()
    for place in (folder, copy):
        found = result_of(place)["parts"]
        assert found["decode"]["status"] == "done" and "eager" not in found


@pytest.mark.parametrize("called", [True, False])
def test_a_limit_holds_for_all_parts(
    called: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part takes all of its time; of the last none is left. As a command its process, which
    unpacked for 100 seconds before, counts from its start."""
    now, limits = 0.0, []

    def run(_: Worker, words: list[str], log: Path, limit: float) -> None:
        nonlocal now
        now += limit
        limits.append(limit)

    names = ("ceilings", "eager", "graphs-224", "graphs-128")
    parts = tuple(replace(part(name, "", left), seconds=100) for name in names)
    monkeypatch.setattr(gpu_suite, "PARTS", parts)
    monkeypatch.setattr(gpu_suite, "REHEARSAL_TIMES", 1)
    monkeypatch.setattr(gpu_suite, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(Worker, "run", run)
    flags = ["--device", "cpu", "--limit", "250", "--output", str(tmp_path)]
    monkeypatch.setattr(gpu_suite, "process_seconds", lambda: 100)
    monkeypatch.setattr("sys.argv", ["gpu_suite", *flags])
    assert gpu_suite.main(flags if called else None) == 1
    assert limits == ([100, 100, 45] if called else [100, 45])
    last = result_of(tmp_path)["parts"]["graphs-128"]
    assert (last["status"], last["reason"]) == ("skipped", "no time left")


def test_the_age_of_a_process_counts_what_it_was_before() -> None:
    python = sys.executable
    code = "from benchmarks.common.measuring import process_seconds; print(process_seconds())"
    become = f"time.sleep(0.2); os.execv({python!r}, [{python!r}, '-c', {code!r}])"
    start = time.monotonic()
    command = [python, "-S", "-c", f"import os, time; {become}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.2 <= float(done.stdout) <= time.monotonic() - start + 0.02  # a tick


def test_what_pytest_did_not_finish_counts_as_not_passed(tmp_path: Path) -> None:
    lines = [
        "tests/gpu/test_a.py::test_one[a b-1] PASSED                          [ 25%]",
        "tests/gpu/test_a.py::test_two FAILED  [ 50%]",
        "tests/gpu/test_a.py::test_three SKIPPED (needs more)  [ 75%]",
        "tests/gpu/test_a.py::test_four ",
    ]
    (tmp_path / "log.txt").write_text("\n".join(lines))
    assert read_tests(tmp_path) == {
        "counts": {"passed": 1, "failed": 1, "skipped": 1, "unfinished": 1},
        "not_passed": ["tests/gpu/test_a.py::test_two", "tests/gpu/test_a.py::test_four"],
        "skipped": ["tests/gpu/test_a.py::test_three (needs more)"],
    }


def test_the_decode_sweep_carries_the_best_settings_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU by its name alone: rates are made up, best at share .75, 8 threads, depth 3."""

    def measure(_: Task, size: int, threads: int, settings: DaliSettings) -> DecodeRate:
        rate = 1000.0 - 100 * abs(settings.hw_decoder_load - 0.75) - abs(threads - 8)
        rate -= 10 * abs(settings.prefetch - 3) + (5 if settings.width_hint else 0)
        return DecodeRate(
            image_size=size, batch_size=8, threads=threads, settings=settings,
            images_per_sec=Estimate(rate, rate, rate),
        )  # fmt: skip

    monkeypatch.setattr(Task, "measure", measure)
    shapes = decode_sweep.np.array(99 * [[480, 640], [900, 300]] + 2 * [[9000, 8000]], "int32")
    split = Split(whole_files(200 * ["a"]), 200 * [0], ("a",), shapes=shapes)
    gpu = decode_sweep.torch.device("cuda:0")
    task = Task(split=split, device=gpu, batch_size=8, seconds=1.0)
    rates = list(task.sweep([128, 224, 288], [4, 8, 16]))
    loads, depths = decode_sweep.HW_DECODER_LOADS, decode_sweep.PREFETCHES
    # The default at 224 px is among the shares, the best settings at 224 px among the depths.
    assert len(rates) == 3 + 3 * len(loads) - 1 + len(depths) + 1 + 2
    assert len({(rate.image_size, rate.threads, rate.settings) for rate in rates}) == len(rates)
    assert {rate.image_size for rate in rates[3:-2]} == {224}
    hinted = rates[-3].settings
    assert (hinted.width_hint, hinted.height_hint) == (640, 900)
    for rate, size in zip(rates[-2:], (128, 288), strict=True):
        assert (rate.image_size, rate.threads) == (size, 8)
        assert rate.settings == DaliSettings(hw_decoder_load=0.75, prefetch=3)


def test_what_dalis_hardware_decoder_needs_is_told() -> None:
    """Without a driver nvJPEG finds no engine; without nvJPEG none is asked for."""
    found = device_ceilings.jpeg_decoder()
    assert list(found) == ["libnvcuvid", "nvjpeg", "jpeg_engines"]
    if device_ceilings.nvjpeg_library() is None:
        assert found["jpeg_engines"] is None
    elif device_ceilings.library("libcuda.so.1") is None:
        assert found["jpeg_engines"] == 0 and found["libnvcuvid"] is False
    assert device_ceilings.library("no such library.so") is None


def test_entries_name_the_photographs_again_and_again() -> None:
    split = Split(whole_files(["a", "b", "c"]), [0, 1, 2], ("a", "b", "c"))
    many = decode_sweep.repeated(split, 7)
    assert [file.path for file in many.files] == ["a", "b", "c", "a", "b", "c", "a"]
    assert list(many.labels) == [0, 1, 2, 0, 1, 2, 0]
    assert len(decode_sweep.repeated(split, 2)) == 3
