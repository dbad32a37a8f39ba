"""Define the exceptions: `UserError`, a one-line message and exit status 2 of a command."""

from __future__ import annotations

import difflib
from collections.abc import Collection


class UserError(ValueError):
    """A mistake that the user can correct; the text names field, file or flag, and the remedy."""


class Damage(Exception):
    """A file that no back end can read; `text` continues a line that begins with its path."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind = kind
        self.text = text

    def __str__(self) -> str:
        return self.text


def nearest(name: str, known: Collection[str]) -> str | None:
    """Find the known name that a mistyped one is nearest to; None where none is near."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Say which of the known names is nearest to a mistyped one; where none is near, name all."""
    near = nearest(name, known)
    return f"did you mean {near}?" if near else f"known are {', '.join(known)}"
