"""A look at the decoding of windows, and how it tells of a process that crashes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("nvidia.dali")

from benchmarks.research.window_decoding import ending, main


def test_windows_are_decoded(cifar10: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(cifar10), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "windows of 480 images decoded on cpu\n"


def test_a_crash_and_an_error_are_told() -> None:
    python = [sys.executable, "-S", "-c"]
    assert ending([*python, "print('fine')"]) == ""
    error = ending([*python, "print('so far'); raise SystemExit('INTERNAL_ERROR')"])
    assert error == "exit status 1: INTERNAL_ERROR"
    crash = ending([*python, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"])
    assert crash == "exit status -11: it said nothing"
