"""Hosts on one machine: Linux network namespaces, joined by a bridge and veth links."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[2]


def ip(*arguments: object, check: bool = True) -> bool:
    """Run the ip command; returns whether it worked."""
    command = ["ip", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert not check or result.returncode == 0, f"{command}: {result.stderr}"
    return result.returncode == 0


class Hosts:
    """A switch and `count` hosts with the addresses 10.77.0.1, 10.77.0.2, ..."""

    def __init__(self, count: int) -> None:
        self.switch = f"fi{os.getpid()}s"
        self.names = [f"fi{os.getpid()}h{index}" for index in range(count)]

    def build(self) -> None:
        """Make the namespaces and the links between them."""
        for name in (self.switch, *self.names):
            ip("netns", "add", name)
        ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.switch, "link", "set", "bridge", "up")
        for index, name in enumerate(self.names):
            port = ("port" + str(index), "netns", self.switch)
            ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", *port)
            ip("-n", self.switch, "link", "set", f"port{index}", "master", "bridge", "up")
            ip("-n", name, "address", "add", f"{self.address(index)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")

    def address(self, index: int) -> str:
        """Return the IP address of a host."""
        return f"10.77.0.{index + 1}"

    def link(self, index: int, state: str) -> None:
        """Cut ("down") or restore ("up") the link of a host."""
        ip("-n", self.switch, "link", "set", f"port{index}", state)

    def remove(self) -> None:
        """Remove the namespaces, and with them the links."""
        for name in (*self.names, self.switch):
            ip("netns", "del", name, check=False)

    def start(
        self, index: int, module: str, *arguments: object, log: TextIO | None = None
    ) -> subprocess.Popen[str]:
        """Start `python -m module` on a host; its output goes to pipes, or to `log`."""
        command = ["ip", "netns", "exec", self.names[index], sys.executable, "-m", module]
        return subprocess.Popen(
            [*command, *map(str, arguments)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log or subprocess.PIPE,
            stderr=log or subprocess.PIPE,
            text=True,
            # The same in all runs that are compared: sums depend on the number of threads.
            env={"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"} | dict(os.environ),
        )


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Make hosts that are removed at the end."""
    network = Hosts(count)
    try:
        network.build()
        yield network
    finally:
        network.remove()


def permitted() -> bool:
    """Return whether this user may make network namespaces."""
    name = f"fi{os.getpid()}p"
    try:
        return ip("netns", "add", name, check=False)
    except FileNotFoundError:
        return False
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
