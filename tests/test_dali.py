"""What is particular to the DALI back end; the rest is in the contract and pixel tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("nvidia.dali")

from pipelines.dali import DaliLoader, check_one_dali
from pipelines.errors import UserError
from pipelines.folder import read_split
from pipelines.loader import LoaderSpec, Stage

STAGES = (
    Stage(epochs=1, image_size=32, batch_size=32),
    Stage(epochs=1, image_size=48, batch_size=64, min_scale=0.1),
)


def test_one_stream_serves_sizes_batch_sizes_and_scales(cifar10: Path) -> None:
    """No rebuild: the stream that the first batch opened gives all that follow."""
    spec = LoaderSpec(split=read_split(cifar10, "train"), stages=STAGES, training=True)
    loader = DaliLoader(spec)
    streams = set()
    for _ in range(3):
        for _ in loader:
            streams.add(id(loader.stream))
    loader.close()
    assert len(streams) == 1


def test_two_dali_packages_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia_dali_cuda120", "nvidia_dali_cuda130"):
        folder = tmp_path / f"{name}-2.4.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 2.4.0\n"
        )
    check_one_dali()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(UserError, match="cuda120 and nvidia-dali-cuda130 are both installed"):
        check_one_dali()
