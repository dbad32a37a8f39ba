"""The commands of docs/own-photos.md, one after the other, on a small folder."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from fastimagenet.__main__ import COMMANDS
from tests.commands import ROOT, call, summary_of
from tests.networks import make_model

SMALL = ["--device", "cpu", "--set", "model=smallnet", "--set", "pretrained=weights.pth"]
"""No network here, to fetch weights from: random ones of a small one."""
SHORTER = {
    "train": [*SMALL, "--epochs", "2"],
    "lr_find": SMALL,
    "evaluate": ["--device", "cpu"],
}
"""What a test adds."""


def commands() -> list[str]:
    text = (ROOT / "docs" / "own-photos.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_there_are_as_many_as_it_says() -> None:
    assert 8 <= len(commands()) <= 12 and all(map(str.strip, commands()))


def test_the_commands_lead_from_a_folder_to_an_answer(
    cifar10: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("onnx", reason="needs the extra export")
    for name in ("cat", "frog"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for path in sorted((cifar10 / "train" / name).iterdir())[:16]:
            shutil.copy(path, folder)
    shutil.copy(next((cifar10 / "val" / "cat").iterdir()), tmp_path / "new.jpg")
    torch.save(make_model("smallnet", 1000).state_dict(), tmp_path / "weights.pth")
    for command in commands():
        program, name, *words = shlex.split(command)
        assert program == "fastimagenet"
        module, _ = COMMANDS[name]
        if "--num-it" in words:
            words[words.index("--num-it") + 1] = "4"
        words += SHORTER.get(name, [])
        status = call(module, *words, cwd=tmp_path)
        out, err = capsys.readouterr()
        assert status == 0, f"{command}\n{out}\n{err}"
        if "--dry-run" in words:
            assert "recipe photos" in out and "starts from pretrained weights: weights.pth" in out
            assert "all but the last are frozen for 1 epochs" in out
        if name == "predict":
            assert "cat" in out and "frog" in out
    assert (tmp_path / "batches.html").exists() and (tmp_path / "photos.onnx").exists()
    assert (tmp_path / "runs/first/details/page.html").exists()
    summary = summary_of(tmp_path / "runs/first")
    assert summary["target"] is None and summary["pretrained"] == "weights.pth"
    assert "details/page.html" in (tmp_path / "runs/first/report.html").read_text()
