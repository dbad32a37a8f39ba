"""Read and write `dataset.json` in an image folder, which says where its images are from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.files import write_object

NAME = "dataset.json"


def read_manifest(root: Path) -> dict[str, Any]:
    """Read `root/dataset.json`; empty without the file. Raises UserError if it is damaged."""
    path = root / NAME
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}): remove it") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is expected, not {type(value).__name__}: remove it")
    return value


def write_manifest(root: Path, value: dict[str, Any]) -> Path:
    """Write `root/dataset.json`, whole or not at all; returns its path."""
    path = root / NAME
    write_object(path, value)
    return path
