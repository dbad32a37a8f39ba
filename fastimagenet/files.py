"""The files of a run folder: how they are written whole, and how they are read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.files import write_object as write_object
from pipelines.files import write_text as write_text
from pipelines.files import written_beside as written_beside

Row = dict[str, Any]
"""A JSON object: a row of metrics.jsonl, or all of summary.json or plan.json."""


def read_object(path: Path) -> Row:
    """The JSON object in `path`; UserError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name the --output folder of a run") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


def read_rows(run_dir: Path) -> list[Row]:
    """The rows of `run_dir`/metrics.jsonl in order; none without the file.

    A line that is torn, as a killed process leaves one, is left out.
    """
    path = run_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    rows = []
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def rows_of(kind: str, rows: list[Row]) -> list[Row]:
    """Those of one kind: "step", "epoch" or "event"."""
    return [row for row in rows if row.get("kind") == kind]
