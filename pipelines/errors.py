"""Define the exceptions: `UserError`, a one-line message and exit status 2 of a command."""

from __future__ import annotations


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
