"""Skip lists: the files of a data folder that training leaves out."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pipelines.errors import UserError


def read_skip_list(root: Path, skip_list: Path | str) -> frozenset[str]:
    """Absolute paths of the files to leave out: one a line, absolute or relative to `root`.

    `#` begins a comment. A path that holds a `#`, a line break or the like is a JSON string.
    """
    try:
        lines = Path(skip_list).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--skip-list: cannot read {skip_list}: {error}") from error
    names = []
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line.startswith('"'):
            names.append(line.partition("#")[0].strip())
            continue
        try:
            names.append(json.JSONDecoder().raw_decode(line)[0])
        except ValueError as error:
            raise UserError(
                f"--skip-list: line {number} of {skip_list} is no JSON string: {error}"
            ) from error
    return frozenset(os.path.normpath(root / name) for name in names if name)


def skip_line(name: str) -> str:
    """A path as a line that `read_skip_list` takes."""
    plain = (
        name.isprintable() and name.strip() == name and not name.startswith('"') and "#" not in name
    )
    return name if plain else json.dumps(name)
