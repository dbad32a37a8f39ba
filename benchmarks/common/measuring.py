"""What all commands that measure share: facts about the machine, flags, tables, their images."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.cli import Parser, at_least, make_parser, output_file, positive
from pipelines.datasets.split import Split, notes_of, read_split
from pipelines.environment import processor, versions
from pipelines.files import Row, write_object, write_text
from pipelines.formats import NO_BREAK


def begin(parser: Parser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, Row]:
    """Parse the flags; return them, and what every result file tells of command and machine.

    `load_average` is that of the minute before: well above 0, other processes ran too.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    return parser.parse_args(argv), {
        "command": shlex.join([*parser.prog.split(), *argv]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": processor(),
        "versions": versions(),
        "load_average": os.getloadavg()[0],
    }


def process_seconds() -> float:
    """Return the age of this process, which an exec keeps: what a limit on it has to count.

    0 in a sandbox that does not tell when it began.
    """
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return max(0.0, age) if ticks else 0.0


def command_parser(
    doc: str, *, data: bool = False, turn_seconds: float = 0, json: bool = False
) -> Parser:
    """Make a command's parser from the docstring of its module: its first line and its example.

    `data`: with --data, a folder of training images. `turn_seconds` > 0: with --rounds and, by
    default so many, --seconds, for contestants that take turns. `json`: with --json, a file.
    """
    example = re.search(r"python -m (\S+).*", doc)
    assert example is not None
    parser = make_parser(example[1], doc.partition("\n")[0], example[0])
    add = parser.add_argument
    if data:
        help_text = "image folder: DIR/train/CLASS/IMAGE"
        add("--data", type=Path, required=True, metavar="DIR", help=help_text)
    if turn_seconds:
        help_text = "at least 2, for the intervals; default 5"
        add("--rounds", type=at_least(2), default=5, help=help_text)
        help_text = f"of each turn; default {turn_seconds:g}"
        add("--seconds", type=positive, default=turn_seconds, help=help_text)
    if json:
        add("--json", type=output_file, metavar="FILE", help="write the result")
    return parser


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format a table whose first row is its header, aligned for the terminal, too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded).replace(NO_BREAK, " ")


def by_column(rows: Sequence[Mapping[str, str]]) -> str:
    """Format a table of rows that name their columns, the same ones in all."""
    return markdown([list(rows[0]), *(list(row.values()) for row in rows)])


def document(*blocks: str) -> str:
    """Join headings, tables and paragraphs to a Markdown file; empty ones are left out."""
    return "\n\n".join(filter(None, blocks)).replace(NO_BREAK, " ") + "\n"


def write_result(folder: Path, name: str, result: Row, table: str) -> None:
    """Write FOLDER/NAME.json and table.md."""
    write_object(folder / f"{name}.json", result)
    write_text(folder / "table.md", table)


def training_images(root: Path) -> Split:
    """Read the training images; lines on standard error tell what is left out."""
    split = read_split(root, "train", on_bad_image="skip")
    for note in notes_of(split):
        print(note, file=sys.stderr)
    return split
