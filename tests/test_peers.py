"""Other programs beside ours: what they print is read, and they are ended, as the command says.

The stand-ins print, line for line, what fastai 2.8, timm 1.0 and torchvision's reference script
(0.22) have printed into a pipe.
"""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.common.matrix import Data
from benchmarks.peers import __main__ as peers
from benchmarks.peers import watching
from benchmarks.peers.watching import OURS, Contestant
from fastimagenet.training.recorder import EpochRecord, Recorder
from pipelines.errors import UserError
from pipelines.files import Row, read_object
from tests.commands import ROOT, call

STAND_IN = r"""
import subprocess, sys, time

FORMATS = {
    "fastai": (
        "\u2588\b\repoch     train_loss  valid_loss  accuracy  top_k_accuracy  time    \n",
        "\u2588\b\r\rEpoch {n}/2 : |--------------------| 0.00% [0/4 00:00<?]"
        "\rEpoch {n}/2 : |\u2588\u2588\u2588\u2588| 100.00% [4/4 00:18<00:00... 2.5090]"
        "\rEpoch {n}/2 :                  \r\rEpoch {n}/2 :                 \r\u2588\b\r\r"
        "Epoch {n}/2 : |--------------------| 0.00% [0/2 00:00<?]",
        "\rEpoch {n}/2 : |\u2588\u2588\u2588\u2588| 100.00% [2/2 00:02<00:00... 2.4903]\r"
        "Epoch {n}/2 :                  \r{n}         2.490335    2.336654    {top1:.6f}  0.990000"
        "        00:20     \n",
    ),
    "timm": (
        "Scheduled epochs: 2 (epochs + cooldown_epochs). LR stepped per epoch.\n",
        "Train: {n} [   0/4 ( 25%)]  Loss: 2.33 (2.33)  Time: 1.480s,   10.81/s  (1.480s,   "
        "10.81/s)  LR: 6.250e-03  Data: 0.276 (0.276)\n"
        "Train: {n} [   3/4 (100%)]  Loss: 2.28 (2.36)  Time: 1.134s,   14.10/s  (1.533s,   "
        "10.44/s)  LR: 6.250e-03  Data: 0.000 (0.077)\n",
        "Test: [   0/1]  Time: 0.841 (0.841)  Loss:   2.288 ( 2.288)  Acc@1:  99.000 ( 99.000)  "
        "Acc@5: 100.000 (100.000)\n"
        "Test: [   1/1]  Time: 0.273 (0.557)  Loss:   2.315 ( 2.301)  Acc@1:  99.000 "
        "({percent:>7.3f})  Acc@5:  99.000 ( 99.000)\n"
        "Current checkpoints:\n ('checkpoint-0.pth.tar', 99.6)\n\n",
    ),
    "torchvision": (
        "Start training\n",
        "Epoch: [{n}]  [0/5]  eta: 0:00:16  lr: 0.0125  img/s: 5.2  loss: 2.3258 (2.3258)  "
        "acc1: 99.0000 (99.0000)  acc5: 99.0000 (99.0000)  time: 3.2065  data: 0.1702\n"
        "Epoch: [{n}] Total time: 0:00:06\n",
        "Test:   [0/2]  eta: 0:00:01  loss: 5.9840 (5.9840)  acc1: 99.0000 (99.0000)  acc5: 99.0000"
        " (99.0000)  time: 0.8283  data: 0.2329\nTest:  Total time: 0:00:01\n"
        "Test:  Acc@1 {percent:.3f} Acc@5 99.000\n",
    ),
    "ours": (
        "recipe small\n", "",
        "epoch   {next}  16 px  train loss 2.1  500 images/s  train 0.5 s  top-1 {percent:.2f}%  "
        "top-5 99.00%\n",
    ),
}
name, *top1s, last = sys.argv[1:]
start, trained, evaluated = FORMATS[name]
print(start, end="")
for n, top1 in enumerate(top1s):
    print(trained.format(n=n), end="")
    if top1 != "-":
        values = {"top1": float(top1), "percent": 100 * float(top1)}
        print(evaluated.format(n=n, next=n + 1, **values), end="")
if last == "hang":
    print("worker", subprocess.Popen(["sleep", "600"]).pid)
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("deaf")
    time.sleep(600)
sys.exit(int(last))
"""
"""FORMAT (ACCURACY | "-": an epoch that is not evaluated)... (an exit status | "hang": with a
worker, and deaf to SIGTERM)."""
MARK = 0.5


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The command of the stand-in, without its arguments."""
    monkeypatch.setattr(watching, "GRACE_SECONDS", 0.2)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    return shlex.join([sys.executable, str(tmp_path / "stand_in.py")])


@pytest.fixture
def ours(stand_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Contestant:
    """A stand-in for our training, too, which reaches the target."""
    words = shlex.split(f"{stand_in} ours 0.3 - 0.6 0.55 0")
    ours = Contestant(name="ours", words=words, reader=OURS)
    monkeypatch.setattr(peers, "our_training", lambda *_: (ours, tmp_path / "none", MARK))
    return ours


def flags_of(data: Path, output: Path, *commands: str, limit: float = 10_000) -> list[str]:
    """The command's flags, with ours as small as it can be."""
    flags = ["--data", str(data), "--recipe", "tests/small.toml", "--output", str(output)]
    flags += ["--epochs", "1", "--device", "cpu", "--limit", str(limit)]
    return flags + [word for command in commands for word in ("--peer", command)]


def rows_of(output: Path) -> dict[str, Row]:
    """The result's rows by name."""
    return {row["name"]: row for row in read_object(output / "peers.json")["rows"]}


def test_our_command_is_a_training_and_its_lines_are_read(
    cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Contestant] = []

    def watch(one: Contestant, *_: object) -> Row:
        asked.append(one)
        return {"outcome": "missed"}

    monkeypatch.setattr(peers, "watch", watch)
    flags = [*flags_of(cifar10, tmp_path / "out", "timm=true"), "--target", "top1=0.02"]
    assert call("benchmarks.peers", *flags) == 1
    (ours,) = asked
    python, *words = ours.words
    assert python == sys.executable and words[:2] == ["-m", "fastimagenet.train"]
    assert {"--recipe", "tests/small.toml", "target=top1=0.02", str(cifar10)} <= {*words}
    stream = io.StringIO()
    with closing(Recorder(tmp_path, 10, stream)) as recorder:
        recorder.start(0, [])
        values = dict.fromkeys(EpochRecord.__dataclass_fields__, 0)
        recorder.epoch(EpochRecord(**values | {"train_seconds": 12.5, "top1": 0.615}))  # type: ignore[arg-type]
    told = ours.reader.top1.match(stream.getvalue())
    assert told is not None
    assert (told["epoch"], told["train"], told["top1"]) == ("1", "12.5", "61.50")


@pytest.mark.usefixtures("ours")
def test_peers_that_reach_the_target_are_ended_and_not_repeated(
    cifar10: Path, stand_in: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = {"fastai": "0.01 0.995", "timm-20": "0.01 - 0.995", "torchvision": "0.01 - 0.995"}
    commands = [
        f"{name}={stand_in} {name.partition('-')[0]} {top1s} hang" for name, top1s in names.items()
    ]
    flags = flags_of(cifar10, tmp_path / "out", *commands)
    assert call("benchmarks.peers", *flags) == 0
    capfd.readouterr()
    rows = rows_of(tmp_path / "out")
    assert list(rows) == ["ours", *names]
    own = rows["ours"]
    assert own["top1"] == 0.55 and own["train_seconds"] == 0.5  # its own clock
    assert [one["epoch"] for one in own["epochs"]] == [1, 3, 4]
    assert own["images_per_sec"] == 4 * 500 / 0.5
    for name, top1s in names.items():
        epochs = len(top1s.split())  # one of those of three is not evaluated
        row = rows[name]
        assert [one["top1"] for one in row["epochs"]] == pytest.approx([0.01, 0.995])
        assert 0 < row["train_seconds"] < row["wall_seconds"] < 600
        assert [one["epoch"] for one in row["epochs"]] == [1, epochs]
        assert row["images_per_sec"] == pytest.approx(epochs * 500 / row["train_seconds"])
        assert row["ratio"] == pytest.approx(own["wall_seconds"] / row["wall_seconds"])
        assert row["versions"].keys() >= {"python", "torch"}
    assert "| torchvision |" in (tmp_path / "out" / "table.md").read_text()
    assert call("benchmarks.peers", *flags) == 0
    assert capfd.readouterr().out.count("finished before") == 4
    with pytest.raises(UserError, match=r"timm-20\.json is of another command or target"):
        peers.main(flags_of(cifar10, tmp_path / "out", f"timm-20={stand_in} x"))


@pytest.mark.usefixtures("ours")
def test_what_fails_or_misses_is_told_and_the_others_run(
    cifar10: Path, stand_in: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    commands = (
        f"timm-broken={stand_in} timm 0.3 3",
        f"timm-mute={stand_in} timm 0",
        f"timm-short={stand_in} timm 0.3 0.4 0",
        f"timm-late={stand_in} timm 0.2 0.50 0.1 0",
    )
    assert call("benchmarks.peers", *flags_of(cifar10, out, *commands)) == 1
    err = capfd.readouterr().err
    assert f"timm-broken: ended with status 3, see {out / 'timm-broken.log'}" in err
    assert f"timm-mute: printed no accuracy that is known, see {out / 'timm-mute.log'}" in err
    rows = rows_of(out)
    outcomes = {name: (row["outcome"], row["top1"], row["ratio"]) for name, row in rows.items()}
    assert outcomes["ours"] == ("reached", 0.55, 1.0)  # to its end
    assert outcomes["timm-broken"] == ("failed", 0.3, None)
    assert outcomes["timm-mute"] == ("failed", None, None)
    assert outcomes["timm-short"] == ("missed", 0.4, None)
    assert outcomes["timm-late"][:2] == ("reached", 0.5)  # and ended there
    kept = sorted(path.name for path in out.glob("*.json"))
    assert kept == ["ours.json", "peers.json", "timm-late.json", "timm-short.json"]


@pytest.mark.usefixtures("ours")
def test_a_peer_is_ended_at_the_limit_and_run_again_to_a_later_one(
    cifar10: Path, stand_in: str, tmp_path: Path
) -> None:
    command = f"torchvision={stand_in} torchvision 0.1 hang"
    assert call("benchmarks.peers", *flags_of(cifar10, tmp_path / "out", command, limit=2)) == 0
    rows = rows_of(tmp_path / "out")
    row, own = rows["torchvision"], rows["ours"]
    assert (row["outcome"], row["wall_seconds"]) == ("limit", None)
    assert row["seconds"] >= 2 * own["wall_seconds"] and row["ratio"] <= 0.5
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| more than " in text and "| below 0." in text
    assert peers.is_done(row, row["seconds"]) and not peers.is_done(row, row["seconds"] + 1)


def test_without_our_own_time_no_peer_is_run(
    cifar10: Path, ours: Contestant, stand_in: str, tmp_path: Path
) -> None:
    ours.words[:] = shlex.split(f"{stand_in} ours 0.3 0")
    flags = flags_of(cifar10, tmp_path / "out", f"timm={stand_in} timm 0.9 0")
    for _ in range(2):  # trained, then kept
        assert call("benchmarks.peers", *flags) == 1
    assert not (tmp_path / "out" / "timm.log").exists()


@pytest.mark.usefixtures("ours")
def test_a_stop_ends_the_peer_with_its_workers(
    cifar10: Path, stand_in: str, tmp_path: Path
) -> None:
    """It has to be killed, being deaf; what had finished stays."""
    log = tmp_path / "out" / "timm.log"

    def stop_when_deaf() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until and lines_of(log)[-1:] != ["deaf"]:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop_when_deaf)
    stopper.start()
    flags = flags_of(cifar10, tmp_path / "out", f"timm={stand_in} timm 0.1 hang")
    status = call("benchmarks.peers", *flags)
    stopper.join()
    assert status == 128 + signal.SIGTERM
    assert [path.name for path in (tmp_path / "out").glob("*.json")] == ["ours.json"]
    (worker,) = (line.split()[1] for line in lines_of(log) if line.startswith("worker"))
    until = time.monotonic() + 60
    while runs(worker):
        assert time.monotonic() < until
        time.sleep(0.01)


def lines_of(log: Path) -> list[str]:
    """What the log has so far."""
    return log.read_text().splitlines() if log.exists() else []


def runs(process: str) -> bool:
    """Whether the process is there, and not merely its status, which its parent has not read."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--peer", "keras=true"], "--peer: NAME must be one of fastai, timm, torchvision, or"),
        (["--peer", "timm/20=true"], "--peer: NAME must be one of fastai, timm, torchvision, or"),
        (["--peer", "timm=no-such-program x"], "--peer: timm: there is no program 'no-such-"),
        (["--peer", "timm="], "--peer: timm: there is no program ''"),
        (["--peer", "timm='true"], '--peer: timm: No closing quotation in "\'true"'),
        (["--peer", "timm=true", "--peer", "timm=false"], "--peer timm, timm: each needs a name"),
        (["--peer", "timm=true", "--target", "top5=0.9"], "--target top5=0.9: peers are read for"),
        (["--peer", "timm=true", "--limit", "0"], "--limit: must be a number above 0, not 0"),
        ([], "--peer"),
    ],
)
def test_a_wrong_flag_is_named_before_anything_is_trained(
    flags: list[str], message: str, cifar10: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        peers.main([*flags_of(cifar10, tmp_path / "out"), *flags])
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_result_of_before_is_read() -> None:
    """Its rows have no numbers, but every epoch was evaluated."""
    path = next((ROOT / "benchmarks" / "results").glob("*-imagewoof-peers-to-70.json"))
    result = read_object(path)
    assert "epoch" not in result["rows"][0]["epochs"][0]
    again = [peers.figures(row, result["rows"][0], 9025) for row in result["rows"]]
    assert again == result["rows"]
    assert peers.table(result) == path.with_suffix(".md").read_text()


def test_the_table_names_commands_and_versions() -> None:
    data = Data(name="d", dataset=None, train_images=9, val_images=3, suffixes={".jpg": 12})
    row: Row = {
        "name": "ours", "command": "train", "outcome": "reached", "wall_seconds": 60.0,
        "train_seconds": 50.0, "seconds": 61.0, "versions": {}, "started": "2026-11-29 01:02:03",
        "epochs": [{"top1": 0.71, "wall_seconds": 60.0, "train_seconds": 50.0}],
    }  # fmt: skip
    peer = row | {"name": "timm", "command": "python train.py", "wall_seconds": 240.0}
    peer |= {"versions": {"timm": "1.0.31"}}
    result: Row = {
        "rows": [peers.figures(each, row, 9) for each in (row, peer)], "hardware": "h",
        "versions": {"torch": "2", "python": "3"}, "date": "2026-11-29", "target": 0.7,
        "limit": 4.0, "data": vars(data),
    }  # fmt: skip
    text = " ".join(peers.table(result).split())
    assert "| timm | 240.0 s" in text.replace("4.0 min", "240.0 s") and "| 0.25 " in text
    assert "- timm, 2026-11-29 01:02:03, timm 1.0.31: `python train.py`" in text
