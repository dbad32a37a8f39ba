"""Commands run in this process, where no boundary between processes is what is tested."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch

from fastimagenet import cli


def call(module: str, *arguments: object) -> int:
    """Run `python -m module arguments`; returns its exit status, errors are printed as there."""
    spec = find_spec(module)
    name = f"{module}.__main__" if spec and spec.submodule_search_locations else module
    threads = torch.get_num_threads()
    try:
        with patch.object(cli, "keep_freed_memory"):  # it would stay for the tests to come
            return cli.exit_status(import_module(name).main, list(map(str, arguments)))
    finally:
        torch.set_num_threads(threads)


class Child:
    """A stand-in for the subprocess.Popen of `[python, "-m", module, ...]`."""

    pid = 0

    def __init__(self, command: Sequence[str], **_: Any) -> None:
        self.words = command[1:]

    def wait(self) -> int:
        """Run the command, as a whole."""
        assert self.words[0] == "-m"
        return call(*self.words[1:])

    def terminate(self) -> None:
        """It is never running when it could be asked to stop."""
