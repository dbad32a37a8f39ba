"""Everything in this folder needs an NVIDIA GPU and is skipped without one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.research.window_decoding import failure
from pipelines.backends import has_dali
from pipelines.loader import WHOLE_IMAGES

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def windows_fail(photographs: Path) -> str:
    """Why DALI does not decode windows of images here; "" where it does.

    Where it does not, it might end this process, and all tests have it decode whole images. The
    GPU suite has looked before.
    """
    if (known := os.environ.get(WHOLE_IMAGES)) is not None:
        return f"{WHOLE_IMAGES}=1" if known == "1" else ""
    found = failure(photographs) if has_dali() else ""
    os.environ[WHOLE_IMAGES] = "1" if found else "0"
    return found


@pytest.fixture(autouse=True)
def decoding(request: pytest.FixtureRequest) -> None:
    """Tests that read images know before whether windows are decoded."""
    if {"photographs", "cifar10"} & {*request.fixturenames}:
        request.getfixturevalue("windows_fail")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once why a test has failed: the suite may end this process before the summary."""
    if report.failed:
        print(f"\n{report.longreprtext}", file=sys.__stderr__, flush=True)
