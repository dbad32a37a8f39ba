"""The house's arrows: who may import whom, and what stays unimported until it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {
    "pipelines": {"pipelines"},
    "fastimagenet": {"fastimagenet", "pipelines"},
    "benchmarks": {"benchmarks", "fastimagenet", "pipelines"},
}
OURS = set(LAYERS) | {"tests"}
PARTS = {
    "fastimagenet": (
        *("errors", "machine", "sinks", "recipes", "models", "distributed", "config", "training"),
        *("report", "details", "lr_finder", "cli", "folder", "images", "run"),
    ),
    "pipelines": (
        *(
            "errors",
            "files",
            "formats",
            "pages",
            "limits",
            "signals",
            "workers",
            "cli",
            "environment",
        ),
        *("datasets", "loader", "sampling", "augment", "backends", "prepare", "parity"),
    ),
}
"""Files and folders from the bottom to the top: each imports only what stands before it. Commands
and the Python API, which are not listed, and `__main__` may import all of them."""


@cache
def imported(path: Path) -> frozenset[str]:
    """Full names of all modules that a file imports, in functions and for type checkers too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def modules() -> dict[str, Path]:
    """All modules of the product by name; a package is its __init__."""
    found = {}
    for folder in LAYERS:
        for path in files(folder):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@pytest.mark.parametrize("folder", LAYERS)
def test_imports_point_one_way(folder: str) -> None:
    for path in files(folder):
        ours = {name.partition(".")[0] for name in imported(path)} & OURS
        assert ours <= LAYERS[folder], f"{path} imports {ours - LAYERS[folder]}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    known = modules()
    graph = {}
    for name, path in known.items():
        edges = {other for other in imported(path) & known.keys() if other != name}
        # `from package import module` needs the module, not what the package's __init__ has.
        graph[name] = {e for e in edges if not any(o.startswith(f"{e}.") for o in edges)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("package", PARTS)
def test_the_parts_of_a_package_stand_on_one_another(package: str) -> None:
    parts = PARTS[package]
    for name, path in modules().items():
        part = [*name.split("."), ""][1]
        if name.partition(".")[0] != package or part not in parts or path.stem == "__main__":
            continue
        for other in imported(path):
            target = [*other.split("."), "", ""][1]
            if other.partition(".")[0] == package and target in parts:
                assert parts.index(target) <= parts.index(part), f"{name} imports {other}"


def test_nothing_below_the_commands_sees_argparse() -> None:
    top = {"cli", "train", "evaluate", "predict", "export", "lr_find", "__main__"}
    for path in files("fastimagenet"):
        assert path.stem in top or "argparse" not in imported(path), path


def test_the_schedule_imports_only_math() -> None:
    packages = {n.partition(".")[0] for n in imported(ROOT / "fastimagenet/recipes/schedule.py")}
    assert packages <= {"__future__", "math", "collections", "dataclasses"}


def test_pipelines_do_not_know_of_torch_distributed() -> None:
    for path in files("pipelines"):
        assert not any(name.startswith("torch.distributed") for name in imported(path)), path


def test_one_file_reads_the_launchers_environment() -> None:
    for path in files("fastimagenet") + files("pipelines"):
        text = path.read_text(encoding="utf-8")
        mentions = any(word in text for word in ('"RANK"', '"WORLD_SIZE"', '"SLURM_'))
        assert not mentions or path.name == "world.py", path


def test_one_file_wraps_in_ddp() -> None:
    for path in files("fastimagenet"):
        users = "DistributedDataParallel(" in path.read_text(encoding="utf-8")
        assert not users or path.name == "updates.py", path


@pytest.mark.parametrize(
    ("codes", "unwanted"),
    [
        (
            (
                "import fastimagenet, pipelines",
                "from fastimagenet.train import main; main(['--list-recipes'])",
                "main(['--print-recipe', '--recipe', 'imagenet'])",
                "main(['--dry-run', '--device', 'cpu'])",
                "import fastimagenet.evaluate, fastimagenet.lr_find, pipelines.parity.__main__",
                "import fastimagenet.predict, fastimagenet.export",
            ),
            (),
        ),
        (
            ("import fastimagenet.recipes, fastimagenet.recipes.plan",),
            ("pipelines.datasets.index", "pipelines.datasets.shards", "pipelines.workers"),
        ),
    ],
    ids=["commands", "recipes"],
)
def test_quick_answers_import_neither_torch_nor_dali(
    codes: tuple[str, ...], unwanted: tuple[str, ...]
) -> None:
    """One after the other in a process, as what is imported stays."""
    bad = {"torch", "nvidia.dali", "matplotlib", *unwanted}
    check = f"import sys; bad = {bad!r} & set(sys.modules); assert not bad, bad"
    script = "\n".join(line for code in codes for line in (code, check))
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
