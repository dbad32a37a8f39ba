"""No figure without a result: the tables of the README against the files in benchmarks/results."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = re.compile(r"(?<![\w.-])(\d[\d,]*\.?\d*|\.\d+)(k| %)?(?!\w)")
FACTORS = {"k": 1e-3, " %": 100.0, " TFLOP/s": 1e-12, " GB/s": 1e-9, " GiB": 2**-30, "": 1.0}
"""From a number in a result file to the one in a table, by the unit behind it or its cell."""


def numbers(value: Any) -> Iterator[float]:
    """All of them in a JSON value."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def measured() -> list[float]:
    """Every number in a result file, sorted; those of rehearsals do not count."""
    found = (json.loads(path.read_text()) for path in RESULTS.glob("*.json"))
    return sorted({each for one in found if not one.get("rehearsal") for each in numbers(one)})


def unfounded(text: str, known: list[float]) -> list[str]:
    """The figures in the tables of a text that no known number rounds to, each with its row."""
    bad, lines = [], text.splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if not (line.startswith("|") and before.startswith("|")) or line.startswith("|--"):
            continue  # no table, or its header
        for cell in map(str.rstrip, line.split("|")[2:]):
            ending = next(unit for unit in FACTORS if cell.endswith(unit))
            for digits, own in FIGURE.findall(cell):
                unit = own or ending
                value, half = float(digits.replace(",", "")), 0.5001 / 10 ** places(digits)
                low, high = ((value + side) / FACTORS[unit] for side in (-half, half))
                place = bisect_left(known, low)
                if place == len(known) or known[place] > high:
                    bad.append(f"{digits}{unit} in {line}")
    return bad


def places(digits: str) -> int:
    """Behind the point."""
    return len(digits.partition(".")[2])


TABLES = [
    (ROOT / "README.md", 12),
    (ROOT / "docs/benchmarks.md", 12),
    (RESULTS / "README.md", 50),
]


@pytest.mark.parametrize("path, lines", TABLES)
def test_every_figure_in_a_table_of_results_is_in_a_result_file(path: Path, lines: int) -> None:
    text = path.read_text()
    tables = (
        text.partition("## Measured")[2].partition("\n## ")[0] or text.partition("\n| file (")[0]
    )
    assert tables.count("\n|") >= lines
    assert unfounded(tables, measured()) == []


def test_a_made_up_figure_is_refused() -> None:
    table = "| what | rate | share |\n|---|---|---|\n| a 5 | 1,235 (1.2k) | 14.5 % |\n"
    table += "| b | 780 (771 .. 790) TFLOP/s | 9 s, 2 MiB |\n"
    others = [2, 9, 7.7111e14, 7.798e14, 7.9e14]
    assert unfounded(table, sorted([0.14496, 1234.6, *others])) == []
    found = unfounded(table, sorted([0.146, 1233.9, *others]))
    assert [text.split(" in ")[0] for text in found] == ["1,235", "14.5 %"]


@pytest.mark.parametrize("path", [ROOT / "docs/benchmarks.md", RESULTS / "README.md"])
def test_result_files_that_are_named_are_there(path: Path) -> None:
    names = re.findall(r"\d{4}-\d\d-\d\d-[\w.-]+\.(?:json|svg|html|md)\b", path.read_text())
    assert names
    for name in names:
        assert (RESULTS / name).is_file(), name
