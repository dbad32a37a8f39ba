"""What a run could not write to its folder: the training goes on, and its exit status tells."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from fastimagenet.distributed import World, gather_objects


class NotWritten(Exception):
    """A run has come to its end, but files of it are missing; the text names them."""


class Unwritten:
    """The names of what could not be written, each with the reason."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    def attempt(self, name: str, write: Callable[[], object]) -> bool:
        """Whether `write` did its work; an OSError is said on standard error, once for a name."""
        try:
            write()
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            if name not in self._reasons:
                text = f"warning: {name} could not be written: {reason}; the training goes on"
                print(text, file=sys.stderr, flush=True)  # noqa: T201
            self._reasons[name] = reason
            return False
        self._reasons.pop(name, None)
        return True

    def __str__(self) -> str:
        """One line, or nothing where all was written."""
        lost = (f"{name} ({reason})" for name, reason in self._reasons.items())
        return f"not written: {', '.join(lost)}" if self._reasons else ""

    def share(self, world: World) -> None:
        """Have all processes know what the first one could not write; every one has to ask."""
        self._reasons = gather_objects(self._reasons, world, "the end of the training")[0]

    def check(self) -> None:
        """Raise NotWritten unless all was written."""
        if self._reasons:
            raise NotWritten(str(self))
