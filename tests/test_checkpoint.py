"""Checkpoints on a real disk: atomic, harmless, and refused by name when they are not whole."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from fastimagenet.training import checkpoint
from pipelines.errors import UserError


class RunsCode:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    state = {"model": {"weight": torch.arange(6.0)}, "step": 3, "ranks": [{"loader": {"a": 1}}]}
    path = tmp_path / "new" / "last.pt"
    checkpoint.save(path, state)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["model"].pop("weight"), state["model"].pop("weight"))  # type: ignore[attr-defined]
    assert loaded == state
    assert [entry.name for entry in path.parent.iterdir()] == ["last.pt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"model": 1})
    with pytest.raises(TypeError, match="cannot pickle"):
        checkpoint.save(path, {"model": (item for item in ())})
    assert checkpoint.load(path) == {"model": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "junk"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"model": torch.zeros(1000)})
    content = path.read_bytes()
    path.write_bytes(
        {"truncated": content[: len(content) // 2], "empty": b"", "junk": b"x" * 500}[damage]
    )
    with pytest.raises(UserError, match=r"last\.pt cannot be read"):
        checkpoint.load(path)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """torch.load itself takes most of them for other weights."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"model": torch.randn(300), "step": 7})
    torch.load(path, weights_only=True)
    content = path.read_bytes()
    generator = random.Random(0)
    bits = [8 * len(content) - 1 - bit for bit in range(8 * 90)]  # the end with the checksum
    bits += [generator.randrange(8 * len(content)) for _ in range(1000)]
    for bit in bits:
        altered = bytearray(content)
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        with pytest.raises(UserError, match=r"last\.pt cannot be read.*checksum"):
            checkpoint.load(path)


def test_the_last_two_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, best in enumerate((True, True, False, False)):
        checkpoint.save_last(tmp_path, {"step": step}, [checkpoint.BEST] if best else [])
    steps = {path.name: checkpoint.load(path)["step"] for path in tmp_path.iterdir()}
    assert steps == {"last.pt": 3, "previous.pt": 2, "best.pt": 1}
    with pytest.raises(TypeError, match="cannot pickle"):
        checkpoint.save_last(tmp_path, {"step": (item for item in ())}, [checkpoint.BEST])
    assert {path.name: checkpoint.load(path)["step"] for path in tmp_path.iterdir()} == steps


@pytest.mark.parametrize("renames", range(4))
def test_a_save_cut_short_after_damage_leaves_an_intact_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """A campaign of faults found it: a flipped bit, then a kill between two renames."""
    for step in range(2):
        checkpoint.save_last(tmp_path, {"step": step})
    content = bytearray((tmp_path / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "last.pt").write_bytes(content)
    replace, left = Path.replace, iter(range(renames))

    def killed(path: Path, target: Path) -> Path:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with suppress(KeyboardInterrupt):
        checkpoint.save_last(tmp_path, {"step": 2})
    steps = []
    for name in (checkpoint.LAST, checkpoint.PREVIOUS):
        with suppress(UserError):
            steps.append(checkpoint.load(tmp_path / name)["step"])
    assert steps == [[0], [0], [2, 0], [2]][renames]


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "hostile.pt"
    torch.save({"model": RunsCode(tmp_path / "ran")}, path)
    with pytest.raises(UserError, match=r"hostile\.pt cannot be read.*checksum"):
        checkpoint.load(path)
    with path.open("r+b") as file:
        checkpoint.seal(file)
    with pytest.raises(UserError, match=r"hostile\.pt cannot be read.*: it holds more than tens"):
        checkpoint.load(path)
    assert not (tmp_path / "ran").exists()


def test_a_missing_or_foreign_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.pt does not exist"):
        checkpoint.load(tmp_path / "none.pt")
    checkpoint.save(tmp_path / "list.pt", [1, 2])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"list\.pt was not written by fastimagenet\.train"):
        checkpoint.load(tmp_path / "list.pt", "model")
    checkpoint.save(tmp_path / "weights.pt", {"model": {}})
    with pytest.raises(UserError, match=r"weights\.pt .*: it has no recipe"):
        checkpoint.load(tmp_path / "weights.pt", "model", "recipe")
