"""The GPU suite: rehearsed as a whole on the CPU, and what it does when its parts go wrong."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.statistics import Estimate
from benchmarks.gpu_suite import __main__ as gpu_suite
from benchmarks.gpu_suite import steps as suite_steps
from benchmarks.gpu_suite.parts import PARTS, TESTS, Part, Setup, read_tests
from benchmarks.research import decode_sweep, device_ceilings
from benchmarks.research.decode_sweep import DecodeRate, Task
from benchmarks.training_step import StepRate
from fastimagenet.recipes import named_recipe
from fastimagenet.recipes import toml as recipe_toml
from pipelines.cli import Parser
from pipelines.datasets.images import whole_files
from pipelines.datasets.split import Split
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
    "benchmarks.gpu_suite.steps": (),
}
"""What makes a part of the rehearsal one for a test: flags beside its own."""
SPEEDNETS = ("whitening", "dirac_init")
REAL = ("ceilings",)
"""Parts that are rehearsed as processes of their own."""


@pytest.fixture
def mostly_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's parts with a small network, in this process, but for those in REAL."""
    run, recipe = gpu_suite.run, with_model("smallnet")

    def run_here(words: list[str], log: Path, limit: float) -> int | None:
        if log.parent.name in REAL:
            return run(words, log, limit)
        flags = [*words[2:], *SMALLER.get(words[1], ())]
        if "cifar10-speed" in flags:
            flags += [word for name in SPEEDNETS for word in ("--set", f"{name}=false")]
            # Muon's bf16 is emulated on many CPUs, and takes a minute there.
            flags += ["--set", "optimizer=sgd", "--set", "max_lr=0.1"]
        with log.open("w") as output, redirect_stdout(output), redirect_stderr(output):
            return call(words[1], *flags)

    monkeypatch.setattr(gpu_suite, "run", run_here)
    monkeypatch.setattr("benchmarks.training_step.named_recipe", lambda *_: recipe)
    monkeypatch.setattr("benchmarks.common.rates.MATRIX", {"cpu": 64})
    monkeypatch.setattr("benchmarks.common.rates.COPY_BYTES", {"cpu": 1 << 16})


@pytest.mark.usefixtures("mostly_in_process")
def test_the_suite_is_rehearsed_on_a_cpu(cifar10: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    left_out = [f"tests-{name}" for name in TESTS if f"tests-{name}" not in REAL]
    flags = ["--device", "cpu", "--data", cifar10, "--cifar10", cifar10, "--output", tmp_path]
    assert gpu_suite.main([*map(str, flags), "--skip", *left_out]) == 0
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
    assert figures["lr-finder"]["sweeps"][0]["iterations"] > 0
    assert [phase["image_size"] for phase in figures["stall"]["phases"]] == [32]
    assert figures["decode"]["decoder"] == "cpu"
    assert all(rate["images_per_sec"]["mean"] > 0 for rate in figures["decode"]["rates"])
    (step,) = figures["steps"]["rates"]
    assert step["peak_memory_bytes"] > 2**20 and not step["error"]
    (table,) = tmp_path.glob("*-rehearsal.md")
    headings = [line for line in table.read_text().splitlines() if line.startswith("#")]
    assert all("rehearsal" in line for line in headings if line != "## Parts")
    (page,) = tmp_path.glob("*-rehearsal.html")
    text = page.read_text()
    assert text.count("<svg") >= 4 and "src=" not in text


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
        assert (ROOT / flags[0]).is_file()
        return
    parse = Parser.parse_args

    def parse_only(parser: Parser, *args: Any) -> None:
        namespace = parse(parser, *args)
        if recipe := getattr(namespace, "recipe", None):
            recipe_toml.with_settings(named_recipe(recipe, 1), namespace.set)
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", parse_only)
    with pytest.raises(Parsed):
        import_module(module).main(flags)


def test_the_parts_fit_into_eight_minutes() -> None:
    assert sum(part.seconds for part in PARTS) + 10 <= 480


def test_every_file_of_gpu_tests_is_a_part() -> None:
    files = (ROOT / "tests" / "gpu").glob("test_*.py")
    assert {path.stem.removeprefix("test_") for path in files} == set(TESTS)


def part(name: str, script: str, read: Callable[[Path], Row], needs: str = "") -> Part:
    """A part that runs a Python script in its folder."""

    def command(_: Setup, folder: Path, __: float) -> list[str]:
        (folder / "script.py").write_text(f"folder = {str(folder)!r}\n{script}")
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
        part("steps", LEFT, left),
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
        "steps": "done",
    }  # fmt: skip
    found = result["parts"]
    assert found["ceilings"]["reason"] == "exit status 1: ValueError: no such thing"
    assert "so far" in found["ceilings"]["log_tail"]
    assert found["cifar10"]["reason"] == "needs --cifar10"
    assert found["stall"]["reason"] == "it left no figures"
    assert found["decode"]["reason"].startswith("not done within ")
    assert found["decode"]["figures"] == found["steps"]["figures"] == FOUND
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
    monkeypatch.setattr(gpu_suite, "PARTS", (part("steps", odd, left),))
    assert gpu_suite.main(["--device", "cpu", "--output", str(tmp_path)]) == 1
    assert "no tables or page" in capsys.readouterr().err
    assert result_of(tmp_path)["parts"]["steps"]["figures"] == {"rates": 1}


def test_a_suite_that_is_stopped_leaves_what_it_had(tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--output", tmp_path, "--only", "ceilings", "steps"]
    command = [sys.executable, "-m", "benchmarks.gpu_suite", *map(str, flags)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "steps").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    parts = result_of(tmp_path)["parts"]
    assert parts["ceilings"]["status"] == "done" and "steps" not in parts


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


def step_rate(size: int, variant: str, batch: int, rate: float, error: str = "") -> StepRate:
    return StepRate(
        image_size=size, variant=variant, batch_size=batch,
        images_per_sec=Estimate(rate, rate, rate), peak_memory_bytes=1, flops_per_image=1.0,
        bytes_per_image=1.0, floor_images_per_sec=None if error else 2 * rate, error=error,
    )  # fmt: skip


def test_batches_grow_while_that_pays_and_end_with_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """224 px: 1,024 images are no faster. 288 px: memory ends at 512, of graphs at 256."""
    asked: list[tuple[int, str, int]] = []
    eager = {(224, 128): 100, (224, 256): 120, (224, 512): 130, (224, 1024): 131, (288, 256): 50}

    def sweep(
        sizes: list[int], variants: list[str], batches: list[int], *, report: Any, **_: object
    ) -> None:
        (size,), (variant,) = sizes, variants
        for batch in batches:
            asked.append((size, variant, batch))
            gone = size == 288 and batch == (256 if variant == "graphs" else 512)
            error = "the GPU is out of memory with batch_size" if gone else ""
            report(step_rate(size, variant, batch, eager.get((size, batch), 10), error))
            if error:
                break

    monkeypatch.setattr(suite_steps, "sweep", sweep)
    flags = ["--device", "cpu", "--json", str(tmp_path / "steps.json")]
    assert suite_steps.main([*flags, "--image-size", "224", "288"]) == 0
    assert asked == [
        *((224, "eager", batch) for batch in (128, 256, 512, 1024)),
        *((224, variant, 1024) for variant in ("compiled", "graphs")),
        *((288, "eager", batch) for batch in (128, 256, 512)),
        *(
            (288, variant, batch)
            for variant, batch in (("compiled", 256), ("graphs", 256), ("graphs", 128))
        ),
    ]
    written = read_object(tmp_path / "steps.json")
    assert not written["cut_by_limit"] and len(written["rates"]) == len(asked)
    asked.clear()
    assert suite_steps.main([*flags, "--image-size", "224", "288"]) == 0
    assert asked == []  # all of it is there


def test_a_cuda_error_is_left_to_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sweep(sizes: list[int], *_: object, report: Any, **__: object) -> None:
        report(step_rate(sizes[0], "eager", 128, 0, "CUDA error: an illegal memory access"))

    class Replaced(BaseException):
        pass

    def execv(program: str, words: list[str]) -> None:
        assert program == sys.executable and words[1:3] == ["-m", "benchmarks.gpu_suite.steps"]
        raise Replaced

    monkeypatch.setattr(suite_steps, "sweep", sweep)
    monkeypatch.setattr(suite_steps.os, "execv", execv)
    flags = ["--device", "cpu", "--json", str(tmp_path / "steps.json"), "--variants"]
    with pytest.raises(Replaced):
        suite_steps.main([*flags, "--image-size", "224"])
    (rate,) = read_object(tmp_path / "steps.json")["rates"]
    assert rate["error"].startswith("CUDA error")


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
    assert len(rates) == 3 + 3 * len(loads) + len(depths) + 1 + 3
    assert {rate.image_size for rate in rates[3:-3]} == {224}
    hinted = rates[-4].settings
    assert (hinted.width_hint, hinted.height_hint) == (640, 900)
    for rate, size in zip(rates[-3:], (128, 224, 288), strict=True):
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
