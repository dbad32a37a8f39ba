"""The one exception that commands turn into a one-line message and exit status 2."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can put right; the text names the field, file or flag and the remedy."""


class Damage(Exception):
    """A file that would stop a back end; `text` goes on after the path."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind = kind
        self.text = text

    def __str__(self) -> str:
        return self.text
