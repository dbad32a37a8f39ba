"""The house's arrows: who may import whom, and what stays unimported until it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {
    "pipelines": {"pipelines"},
    "fastimagenet": {"fastimagenet", "pipelines"},
    "benchmarks": {"benchmarks", "fastimagenet", "pipelines"},
}
OURS = set(LAYERS) | {"tests"}


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", LAYERS)
def test_imports_point_one_way(folder: str) -> None:
    for path in files(folder):
        ours = {name.partition(".")[0] for name in imported(path)} & OURS
        assert ours <= LAYERS[folder], f"{path} imports {ours - LAYERS[folder]}"


def test_the_schedule_imports_only_math() -> None:
    packages = {n.partition(".")[0] for n in imported(ROOT / "fastimagenet/schedule.py")}
    assert packages <= {"__future__", "math", "collections", "dataclasses"}


def test_pipelines_do_not_know_of_torch_distributed() -> None:
    for path in files("pipelines"):
        assert not any(name.startswith("torch.distributed") for name in imported(path)), path


def test_one_file_reads_the_launchers_environment() -> None:
    for path in files("fastimagenet") + files("pipelines"):
        text = path.read_text(encoding="utf-8")
        mentions = any(word in text for word in ('"RANK"', '"WORLD_SIZE"', '"SLURM_'))
        assert not mentions or path.name == "distributed.py", path


def test_only_the_trainer_wraps_in_ddp() -> None:
    for path in files("fastimagenet"):
        users = "DistributedDataParallel(" in path.read_text(encoding="utf-8")
        assert not users or path.name == "trainer.py", path


@pytest.mark.parametrize(
    "code",
    [
        "import fastimagenet, pipelines",
        "from fastimagenet.train import main; main(['--list-recipes'])",
        "from fastimagenet.train import main; main(['--print-recipe', '--recipe', 'imagenet'])",
        "from fastimagenet.train import main; main(['--dry-run', '--device', 'cpu'])",
        "import fastimagenet.evaluate, fastimagenet.lr_find, pipelines.parity.__main__",
    ],
)
def test_quick_answers_import_neither_torch_nor_dali(code: str) -> None:
    check = "; import sys; bad = {'torch', 'nvidia.dali', 'matplotlib'} & set(sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code + check + "; assert not bad, bad"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
