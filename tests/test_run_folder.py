"""The folder of a run: taken by one run alone, locked until its end, left as it was found."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path

import pytest

from fastimagenet import folder as folder_module
from fastimagenet.config import RunConfig
from fastimagenet.distributed.world import LAUNCHER, RUN, Launch, World
from fastimagenet.folder import LOCK, RunFolder, is_own, lock
from fastimagenet.recipes import named_recipe
from pipelines.errors import UserError
from pipelines.files import write_object
from tests.commands import SMALL, error_of

ALONE = World()


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (LAUNCHER, RUN, "RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def config(output: Path | None = None, nodes: int = 1) -> RunConfig:
    return RunConfig(recipe=named_recipe("digits"), output=output, launch=Launch(nodes, 1, "cpu"))


def test_runs_of_the_same_second_take_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastimagenet.config.run_time", lambda: "20261129-100000")
    with RunFolder(config()) as one, RunFolder(config()) as two, RunFolder(config(), "x-") as other:
        paths = [str(each.shared(ALONE).output) for each in (one, two, other)]
        assert paths[0] == "runs/digits-20261129-100000"
        assert paths[1:] == [f"{paths[0]}-2", "runs/x-digits-20261129-100000"]
        (Path(paths[0]) / "plan.json").touch()
    # What holds nothing is gone, and the lock with it.
    assert list(Path("runs").rglob("*")) == [Path(paths[0]), Path(paths[0]) / "plan.json"]


def test_a_folder_is_locked_and_the_second_run_says_by_whom(digits: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with RunFolder(config(output)) as first:
        first.take()
        for more in ((), ("--resume", "auto")):
            message = error_of("--data", digits, "--output", output, *SMALL, *more)
            who = f"process {os.getpid()} on "
            assert f"--output {output} is in use by {who}" in message and " since 20" in message
        assert (output / LOCK).exists()  # the second one has left it
    assert not output.exists()
    output.mkdir()
    with RunFolder(config(output)) as second:
        second.take()
    assert list(output.iterdir()) == []  # not made by it, and kept


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        lock(tmp_path)
        os.write(writer, b"locked")
        signal.pause()
    assert os.read(reader, 6) == b"locked"
    with pytest.raises(UserError, match=f"is in use by process {child} on "):
        lock(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    held = lock(tmp_path)
    assert held is not None
    assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    for each in (held, reader, writer):
        os.close(each)


def test_a_lock_that_has_just_been_given_back_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking it the file was removed: another one would lock a new file."""
    flock, removed = fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not removed:
            (tmp_path / LOCK).unlink()
            removed.append(True)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    held = lock(tmp_path)
    assert held is not None and removed
    with pytest.raises(UserError, match="is in use by"):
        lock(tmp_path)
    os.close(held)


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(folder_module.fcntl, "flock", none)
    with RunFolder(config(tmp_path / "run")) as folder:
        assert folder.shared(ALONE).output == tmp_path / "run"
        assert "run: its file system knows no locks (No locks available)" in capsys.readouterr().err
        assert list((tmp_path / "run").iterdir()) == []


def test_only_what_this_very_run_has_left_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that its launcher starts again; another one's checkpoints are left alone."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").touch()
    with pytest.raises(UserError, match="holds another run"), RunFolder(config(tmp_path)) as folder:
        folder.take()
    for name, value in ((LAUNCHER, "1"), (RUN, "20261129-100000-01234567"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    for run, own in ((None, False), ("20261129-100000-76543210", False), (os.environ[RUN], True)):
        write_object(tmp_path / "plan.json", {"run": run})
        assert is_own(tmp_path) is own
        for nodes in (1, 2):  # taken by the launcher, and by rank 0
            with RunFolder(config(tmp_path, nodes)) as folder:
                if nodes == 2 and not own:
                    with pytest.raises(UserError, match="holds another run"):
                        folder.shared(ALONE)
                else:
                    folder.shared(ALONE)
                    assert folder.is_own is own
    (tmp_path / "plan.json").write_text("{")
    assert not is_own(tmp_path)


def test_a_restarted_run_of_several_nodes_finds_its_own_new_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 0 chooses it: by the time that the nodes have agreed on, not by that of its start."""
    for name, value in ((LAUNCHER, "1"), (RUN, "20261129-100000-01234567"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    Path("runs/digits-20261129-100000").mkdir(parents=True)
    for restarted in (False, True):
        with RunFolder(config(nodes=2)) as folder:
            path = folder.shared(ALONE).folder
            assert str(path) == "runs/digits-20261129-100000-2" and folder.is_own is restarted
            write_object(path / "plan.json", {"run": os.environ[RUN]})
