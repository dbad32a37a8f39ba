"""Stop on a signal: by an exception or, where something has to be saved first, by being asked."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""What asks a command to end: a scheduler, Ctrl-C, a closed terminal, and SLURM's warning before
the time is up."""


class Interrupted(KeyboardInterrupt):
    """A stop signal has arrived where nothing has to be saved; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        """Say it as commands have always said it of Ctrl-C, and name any other signal."""
        name = signal.Signals(self.number).name
        return "interrupted" if name == "SIGINT" else f"interrupted by {name}"


class StopSignals:
    """The handler of the stop signals: hears the first one and ignores all that follow.

    A terminal that closes sends several at once, and a user who waits for a save sends more: none
    of them may end what the first one has begun.
    """

    def __init__(self, ask: Callable[[], object] | None) -> None:
        self.number: int | None = None
        """The signal that was heard."""
        self.ends_process = False
        """Whether the process ends with the block: what follows a signal is then ignored for
        good."""
        self._ask = ask

    def __call__(self, number: int, frame: FrameType | None = None) -> None:
        if self.number is not None:
            return
        self.number = number
        if self._ask is None:
            raise Interrupted(number)
        self._ask()


@contextmanager
def stop_signals(ask: Callable[[], object] | None = None) -> Iterator[StopSignals]:
    """Have the first stop signal in the block call `ask` or, without one, raise Interrupted.

    Blocks may be nested: what the inner one has heard, the outer one ignores; what the outer one
    has heard before, where an exception was lost in a callback, the inner one hears at once. A
    signal that was ignored stays ignored (nohup). Outside of the main thread, where Python takes
    no signals, nothing changes.
    """
    heard = StopSignals(ask)
    before = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        # None: a handler that is not Python's, and could not be restored.
        before = {n: h for n, h in handlers.items() if h not in (signal.SIG_IGN, None)}
    around = [handler for handler in before.values() if isinstance(handler, StopSignals)]
    try:
        for number in before:
            signal.signal(number, heard)
        for outer in around:
            if outer.number is not None:
                heard(outer.number)
        yield heard
    finally:
        for outer in around:
            outer.number = outer.number or heard.number
        over = heard.ends_process and heard.number is not None
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if over else handler)
