"""The wheel: built, installed without the clone, and used from other folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: object, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("fastimagenet", "pipelines"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "-w", source / "dist", ".", cwd=source)
    (path,) = (source / "dist").iterdir()
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment that has the wheel, and finds what it depends on in that of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin/python", "install")
    run(*pip, "--no-deps", "--no-index", wheel, cwd=folder)
    return folder


def test_it_has_the_packages_and_their_templates_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"fastimagenet", "pipelines"}
    shipped = {name for name in names if name.endswith((".py", ".jinja", "py.typed"))}
    for package in ("fastimagenet", "pipelines"):
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".py", ".jinja") or path.name == "py.typed":
                assert str(path.relative_to(ROOT)) in shipped


def test_it_trains_the_digits_beside_a_folder_called_pipelines(
    environment: Path, tmp_path: Path
) -> None:
    (tmp_path / "pipelines").mkdir()
    small = ("--set", "phases.1.image_size=8", "--set", "phases.1.batch_size=256")
    flags = ("--epochs", 1, "--device", "cpu", "--output", "run", *small)
    run(environment / "bin/fastimagenet", "train", *flags, cwd=tmp_path)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["data"] == "digits" and summary["epochs"] == 1


def test_a_package_called_pipelines_is_named(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines/__init__.py").touch()
    train = (environment / "bin/python", "-m", "fastimagenet.train", "--list-recipes")
    done = run(*train, cwd=tmp_path, status=2)
    assert done.stderr == (
        f"error: {tmp_path / 'pipelines'} hides fastimagenet's package pipelines: rename it or "
        "work in another folder\n"
    )
    command = environment / "bin/fastimagenet"
    assert run(command, "--version", cwd=tmp_path).stdout.startswith("fastimagenet 0.")
    assert "digits" in run(command, "train", "--list-recipes", cwd=tmp_path).stdout
    done = run(command, "trian", cwd=tmp_path, status=2)
    assert done.stderr == "error: there is no command trian: did you mean train?\n"
