"""The notebooks in examples/, cell by cell."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_the_notebooks_run_and_show_runs_sweeps_and_details(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process, which forgets its names in between: starting another takes long."""
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    for name in ("cat", "ship", "truck"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for file in sorted((cifar10 / "train" / name).iterdir())[:20]:
            (tmp_path / "photos" / name / file.name).symlink_to(file)
    first, second = (
        nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
        for name in ("first_steps", "own_photographs")
    )
    first.cells += [nbformat.v4.new_code_cell("%reset -f"), *second.cells]
    client = NotebookClient(first, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = {
        cell.source.splitlines()[-1]: output["data"]
        for cell in first.cells
        for output in cell.get("outputs", [])
        if "data" in output
    }
    for name in ("run", "details"):
        assert "<iframe srcdoc=" in shown[name]["text/html"], name
    assert shown["run"]["text/plain"].startswith("Run('runs/photos': 1 of 1 epochs, top-1 ")
    for name in ("sweep", "sweep.runs[0]"):
        assert "<svg" in shown[name]["text/html"], name
    assert (tmp_path / "runs/first-steps/report.html").exists()
    assert (tmp_path / "runs/photos/details/predictions.csv").exists()
