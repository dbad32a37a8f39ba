"""Everything in this folder needs an NVIDIA GPU and is skipped without one."""

from __future__ import annotations

import os
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


@pytest.fixture(scope="session", autouse=True)
def windows_fail(photographs: Path) -> str:
    """Why DALI does not decode windows of images here; "" where it does.

    Where it does not, it might end this process, and all tests have it decode whole images.
    """
    found = failure(photographs) if has_dali() else ""
    if found:
        os.environ[WHOLE_IMAGES] = "1"
    return found
