"""`Processes`: the one place where a command joins its processes, or starts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastimagenet.distributed.collectives import process_group
from fastimagenet.distributed.world import Launch, World, launched_world, started_by_us


@dataclass(frozen=True)
class Processes:
    """The processes that a command runs in: this one alone, those of a launcher, or new ones."""

    launch: Launch
    """Resolved for this machine."""
    world: World | None
    """This process among them; None if they have not been started."""

    @classmethod
    def of(cls, asked: Launch) -> Processes:
        """Find out what was asked for and what was launched.

        Raises UserError naming the flag or the launcher's variable.
        """
        return cls(asked.resolved(), launched_world(asked))

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return self.launch.world_size if self.world is None else self.world.world_size

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that checks the run's folder and speaks to the user
        before the processes work together."""
        return not started_by_us() and (self.world is None or self.world.is_main)

    @property
    def is_whole(self) -> bool:
        """Whether all other processes of the run, if there will be any, come from this one."""
        return self.world is None and self.launch.nodes == 1

    def run(
        self,
        module: str,
        argv: Sequence[str],
        work: Callable[[World], int],
        seconds_before: float = 0.0,
        name: str = "",
    ) -> int:
        """Run `work` in this process as one of the world, or start `python -m module argv` in each.

        `seconds_before`: seconds since the command was typed, which count as the run's. `name`:
        what was typed that tells this run from others, the same for all its processes.
        Returns the exit status. Raises what `work` or, in one line, a started process raises.
        """
        run = f"{module} {name}".rstrip()
        if self.world is None and self.launch.world_size > 1:
            from fastimagenet.distributed.launch import run_processes  # imports torch

            return run_processes(self.launch, module, list(argv), seconds_before, run)
        world = self.world or World(device=self.launch.first_device)
        with process_group(world, self.launch.timeout_seconds, run):
            return work(world)
