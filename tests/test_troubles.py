"""docs/troubles.md: each message that it quotes is one that the code prints."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```text\n(.+?)\n```$", re.MULTILINE | re.DOTALL)
MESSAGES = [" ".join(block.split()) for block in BLOCK.findall(
    (ROOT / "docs" / "troubles.md").read_text(encoding="utf-8")
)]  # fmt: skip
VALUE_WORDS = 6
"""A value has fewer words; what has more is a text of the code, too."""


class Template(NamedTuple):
    """A text of the code with places for values."""

    longest: str
    """Of its constant parts."""
    constant: int
    """Characters of all of them."""
    patterns: tuple[re.Pattern[str], ...]
    """Whose values are as short as can be, and as long."""


def template(node: ast.JoinedStr | ast.Constant) -> Template | None:
    """Take the template of a string; None for one that says too little."""
    pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
    texts = [str(p.value) if isinstance(p, ast.Constant) else None for p in pieces]
    constants = [text for text in texts if text is not None]
    if sum(map(len, constants)) < 12:
        return None
    patterns = tuple(
        re.compile("".join(value if text is None else re.escape(text) for text in texts))
        for value in ("(.*?)", "(.*)")
    )
    return Template(max(constants, key=len), sum(map(len, constants)), patterns)


@cache
def templates() -> tuple[Template, ...]:
    found = set()
    for folder in ("fastimagenet", "pipelines"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
                if isinstance(node, ast.JoinedStr) or is_text:
                    found.add(template(node))  # type: ignore[arg-type]
    return tuple(sorted(found - {None}, key=lambda each: -each.constant))  # type: ignore[union-attr]


def produced(text: str) -> bool:
    """Whether the code has a template of the text, and of each longer text within it."""
    for each in templates():
        for pattern in each.patterns if each.longest in text else ():
            if (match := pattern.fullmatch(text)) and all(map(known, match.groups())):
                return True
    return False


def known(part: str) -> bool:
    """Whether a part of a message is a value, a text of the code, or a list of these."""
    if len(part.split()) < VALUE_WORDS or produced(part):
        return True
    return ", " in part and all(map(known, part.split(", ")))


@pytest.mark.parametrize("message", MESSAGES, ids=range(len(MESSAGES)))
def test_the_code_prints_the_message(message: str) -> None:
    text = message.removeprefix("error: ")
    file_and_reason, _, remedy = text.partition(": ")  # as `BadImage` puts them together
    of_a_file = produced(file_and_reason.partition(" ")[2]) and produced(remedy)
    assert produced(text) or produced(text.removesuffix(" (...)")) or of_a_file, message


def test_what_the_code_does_not_print_is_found_out() -> None:
    assert len(MESSAGES) > 40
    assert not produced("the device is out of memory with batch_size 256: lower it")
    assert not produced("--resume: last.pt is of a run with a recipe of some other kind")
