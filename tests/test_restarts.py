"""What the launcher makes of its processes' ends: a restart where one can help, and one stop.

The processes are small scripts in place of a command, the launcher is the real one.
"""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastimagenet.distributed.launch import run_processes
from fastimagenet.distributed.world import TRAINED, Launch
from fastimagenet.errors import NotWritten
from pipelines.errors import UserError

BEGIN = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
attempt = len(list(folder.iterdir()))
(folder / str(attempt)).touch()
launcher = os.getppid()

def fail(name, text, traceback, status=1):  # as torch's error handler writes it
    more = {"py_callstack": traceback, "timestamp": "1"}
    report = {"message": {"message": f"{name}: {text}", "extraInfo": more}}
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(report))
    sys.exit(status)

"""
SAVE = """
def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # a user who is in a hurry
        os.kill(launcher, number)
        time.sleep(.1)
    (folder / "saved").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
"""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for the attempts; the temporary ones are to be empty in the end."""
    for name in ("attempts", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    handlers = [signal.getsignal(number) for number in SIGNALS]
    yield tmp_path
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    for number, handler in before.items():
        signal.signal(number, handler)
    assert list((tmp_path / "temporary").iterdir()) == []


def launch(place: Path, script: str) -> int:
    (place / "in_place_of_a_command.py").write_text(BEGIN + script)
    asked = Launch(1, 1, "cpu").resolved()
    return run_processes(asked, "in_place_of_a_command", [str(place / "attempts")])


def attempts(place: Path) -> int:
    return len(list((place / "attempts").iterdir()))


@pytest.mark.parametrize(
    ("script", "started", "said"),
    [
        ("fail('RuntimeError', 'no compiler', 'the traceback')", 1, 1),
        (f"fail('RuntimeError', 'one', 'the traceback {TRAINED}')", 2, 1),
        (f"fail('RuntimeError', 'one', f'the traceback {{attempt}} {TRAINED}')", 4, 4),
        ("os.kill(os.getpid(), signal.SIGKILL) if attempt < 2 else None", 3, 0),
        ("sys.exit(1)", 4, 0),
        ("sys.exit(2)", 1, 0),
    ],
)
def test_a_process_is_started_again_where_that_can_help(
    script: str, started: int, said: int, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a defect only where it had trained, and not after the same one: and each is told once.

    Otherwise after a signal, or where another process was lost; not after the user's mistake.
    """
    status = launch(place, script)
    assert status == (0 if "else None" in script else 2 if "exit(2)" in script else 1)
    assert attempts(place) == started
    err = capsys.readouterr().err
    assert err.count("the traceback") == said
    assert err.count("note: rank 0 ") == started - 1
    assert all(line.startswith(("note: rank 0 ", "the traceback")) for line in err.splitlines())


@pytest.mark.parametrize(("error", "status"), [(UserError, 2), (NotWritten, 1)])
def test_what_a_process_tells_the_user_is_said_once(
    error: type[Exception], status: int, place: Path
) -> None:
    with pytest.raises(error, match=r"^a line$"):
        launch(place, f"fail('{error.__name__}', 'a line', '', {status})")
    assert attempts(place) == 1


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_signal_lets_the_processes_save_whatever_follows(
    number: signal.Signals, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And torch has nothing to say of it."""
    stop = f"os.kill(launcher, {number.value})\ntime.sleep(60)"
    assert launch(place, SAVE + stop) == 128 + number
    assert (place / "attempts" / "saved").exists()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_ignored_stays_ignored(number: signal.Signals, place: Path) -> None:
    """As under nohup, and in the background of a script."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        stop = f"os.kill(launcher, {number.value})\ntime.sleep(.5)"
        assert launch(place, SAVE + stop) == 0
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)
    assert not (place / "attempts" / "saved").exists()


def test_no_stop_is_claimed_of_what_was_not_saved(place: Path) -> None:
    """The status of a process that fails while it saves, and of one that had to be killed."""
    failing = "signal.signal(signal.SIGTERM, lambda *_: os._exit(9))\n"
    assert launch(place, f"{failing}os.kill(launcher, 15)\ntime.sleep(60)") == 9


def test_no_place_for_temporary_files_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(UserError, match=r"no folder for temporary files .*: set TMPDIR"):
        launch(place, "")
