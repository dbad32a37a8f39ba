"""A look at the decoding of windows, and how it tells of a process that crashes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("nvidia.dali")

from benchmarks.research.window_decoding import ending, main


@pytest.mark.parametrize(
    ("flags", "what"), [([], "windows of images"), (["--whole-images"], "images")]
)
def test_they_are_decoded(
    flags: list[str], what: str, cifar10: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data", str(cifar10), "--device", "cpu", *flags]) == 0
    assert capsys.readouterr().out == f"480 {what} decoded on cpu\n"


def test_a_crash_an_error_and_a_hang_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    python = [sys.executable, "-S", "-c"]
    assert ending([*python, "print('fine')"]) == ""
    error = ending([*python, "print('so far'); raise SystemExit('INTERNAL_ERROR')"])
    assert error == "exit status 1: INTERNAL_ERROR"
    assert "so far" in capsys.readouterr().err
    crash = ending([*python, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"])
    assert crash == "exit status -11: it said nothing"
    hang = ending([*python, "import time; time.sleep(600)"], limit=0.5)
    assert hang == "not done within 0 s"
