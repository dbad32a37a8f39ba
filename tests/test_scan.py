"""`prepare scan` and the check at the start of training, on really damaged and odd files."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from odd_files import Odd, write_odd_files
from PIL import Image

from fastimagenet.train import main as train_main
from pipelines import limits
from pipelines.backends import make_loader
from pipelines.cli import exit_status
from pipelines.datasets.checks import check_file
from pipelines.datasets.images import ImageFile, whole_files
from pipelines.datasets.index import check_images
from pipelines.datasets.split import Split, left_out_note, read_split
from pipelines.errors import UserError
from pipelines.loader import LoaderSpec, Stage
from pipelines.prepare.__main__ import main
from pipelines.prepare.examine import Examined, examine_all
from pipelines.prepare.findings import DAMAGE, NOTES
from pipelines.prepare.scan import examine_files
from pipelines.workers import hidden_main

ROOT = Path(__file__).resolve().parent.parent
GOOD = 12
"""Photographs in the other class of the odd folder."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for scans, so that nothing of the user's is read or written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastimagenet" / "scan"


@pytest.fixture(scope="module")
def odd(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Odd]]:
    """DIR/train/{odd,plain}/*, val the same files, and what is in train/odd by name."""
    root = tmp_path_factory.mktemp("odd")
    found = sorted((photographs / "train").glob("*/*.JPEG"))
    files = write_odd_files(root / "train" / "odd", found[0])
    (root / "train" / "plain").mkdir()
    for path in found[1 : GOOD + 1]:
        shutil.copy(path, root / "train" / "plain")
    (root / "val").symlink_to("train")
    return root, files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train/{cat,dog} and val/{cat,dog} with 3 PNGs each, all different."""
    for number, split in enumerate(("train", "val")):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(3):
                colour = (80 * number, 80 * label, 80 * index)
                Image.new("RGB", (16, 16), colour).save(folder / f"{index}.png")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def decoded(
    odd: tuple[Path, dict[str, Odd]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """The report of a scan of the odd folder with all pixels read, and its skip list."""
    folder = tmp_path_factory.mktemp("decoded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        skip_list = folder / "skip.txt"
        return scan(odd[0], "--decode", "--skip-list", skip_list, status=1), skip_list


def scan(root: Path, *arguments: object, status: int = 0) -> dict[str, Any]:
    """The report of a scan that ends with `status`."""
    report = root.parent / "report.json"
    command = ["scan", str(root), "--workers", "2", "--report", str(report)]
    assert main([*command, *map(str, arguments)]) == status
    content: dict[str, Any] = json.loads(report.read_text())
    return content


def kinds_of(report: dict[str, Any], folder: str = "train/odd/") -> dict[str, tuple[str, ...]]:
    """File name -> what was found, sorted."""
    kinds: dict[str, list[str]] = {}
    for finding in report["findings"]:
        assert finding["severity"] == ("damage" if finding["kind"] in DAMAGE else "note")
        if finding["path"].startswith(folder):
            kinds.setdefault(finding["path"].removeprefix(folder), []).append(finding["kind"])
    return {name: tuple(sorted(found)) for name, found in kinds.items()}


def is_damage(file: Odd) -> bool:
    return any(kind in DAMAGE for kind in file.kinds)


def test_the_verdict_on_every_kind_is_right(
    odd: tuple[Path, dict[str, Odd]], decoded: tuple[dict[str, Any], Path]
) -> None:
    root, files = odd
    assert len(files) >= 100 and {kind for file in files.values() for kind in file.kinds} == {
        *DAMAGE,
        *NOTES,
    }
    headers = kinds_of(scan(root, status=1))
    pixels = kinds_of(decoded[0])
    for name, file in files.items():
        assert pixels.pop(name, ()) == file.kinds, name
        assert headers.pop(name, ()) == (() if file.hidden else file.kinds), name
    assert not headers and not pixels


def test_the_start_of_training_sees_what_a_scan_of_headers_sees(
    odd: tuple[Path, dict[str, Odd]],
) -> None:
    root, files = odd
    paths = [str(root / "train" / "odd" / name) for name in files if name != "folder.jpg"]
    expected = {path for path in paths if is_damage(files[os.path.basename(path)])}
    hidden = {path for path in expected if files[os.path.basename(path)].hidden}
    _, _, bad = check_images((0, whole_files(paths)))
    assert [paths[place] for place, _ in bad] == [
        path for path in paths if path in expected - hidden
    ]
    assert all(text and "\n" not in text for _, text in bad)
    for path in hidden:
        with pytest.raises(Exception, match=r"cannot be decoded"):
            check_file(ImageFile(path), pixels=True)


Job = tuple[str, int, int, list[str]]
"""Back end, image size, seconds and paths."""
READERS: tuple[dict[str, Any], ...] = (
    {"training": False},
    {"training": True},
    {"training": True, "reflect_pad": 2},
)


def read_all(jobs: list[Job], output: Path) -> None:
    """Write two lines for each job: its paths before it is done, then "read" or why not."""
    # No allocation of 20 GB that the system would promise, and no FIFO that is waited for.
    resource.setrlimit(resource.RLIMIT_AS, (14 << 30, 14 << 30))
    with output.with_suffix(".err").open("w") as errors:
        os.dup2(errors.fileno(), 2)
    with output.open("w", buffering=1) as said:
        for backend, size, seconds, paths in jobs:
            print(json.dumps(paths), file=said)
            signal.alarm(seconds)
            print(json.dumps(verdict(backend, size, paths)), file=said)


def verdict(backend: str, size: int, paths: list[str]) -> str:
    """Read the images by each of READERS; "read", or the first one's error."""
    for fields in READERS:
        spec = LoaderSpec(
            split=Split(whole_files(paths), [0] * len(paths), ("a",)),
            stages=(Stage(epochs=1, image_size=size, batch_size=min(4, len(paths))),),
            num_threads=1 if backend == "dali" else 0,
            **fields,
        )
        with closing(make_loader(backend, spec)) as loader:
            try:
                for images, _ in loader:
                    assert images.isfinite().all()
            except Exception as error:
                return " ".join(str(error).split())
    return "read"


def read_by(jobs: list[Job], folder: Path) -> list[str]:
    """What the back ends make of each job: "read" or why not.

    In processes of their own, since some files end them.
    """
    results: list[str] = []
    output = folder / "said.txt"
    while len(results) < len(jobs):
        arguments = (jobs[len(results) :], output)
        process = multiprocessing.get_context("forkserver").Process(target=read_all, args=arguments)
        with hidden_main():
            process.start()
        process.join()
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        assert lines, output.with_suffix(".err").read_text()[-2000:]
        results += lines[1::2]
        if len(lines) % 2:
            results.append(f"the process ended with {process.exitcode}")
    return results


@pytest.mark.slow
def test_back_ends_read_what_a_scan_calls_fine_and_stop_at_damage(
    odd: tuple[Path, dict[str, Odd]], tmp_path: Path
) -> None:
    """Each file that a scan calls damage stops at least one: else good images would be left out."""
    pytest.importorskip("nvidia.dali")
    root, files = odd
    folder = root / "train" / "odd"
    fine = [name for name in files if not is_damage(files[name]) and name != "folder.jpg"]
    assert len(fine) > 40
    left = [name for name in files if is_damage(files[name])]
    left.sort(key=lambda name: name == "fifo.jpg")  # the last one: its process has to be ended
    for backend in ("torchvision", "dali"):
        jobs = [(backend, 64, 500, [str(folder / name) for name in fine])]
        for name in left:
            size = 288 if files[name].kinds[0].startswith("too-") else 32
            jobs.append((backend, size, 1 if name == "fifo.jpg" else 120, [str(folder / name)]))
        first, *results = read_by(jobs, tmp_path)
        assert first == "read", backend
        left = [name for name, result in zip(left, results, strict=True) if result == "read"]
    assert not left


RECIPE = """
name = "odd"
model = "smallnet"
phases = [{ epochs = 1, image_size = 32, batch_size = 16 }]
max_lr = 0.01
"""


def test_training_ends_at_the_start_or_finishes_with_the_skip_list(
    odd: tuple[Path, dict[str, Odd]],
    decoded: tuple[dict[str, Any], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, files = odd
    recipe, data, run = tmp_path / "odd.toml", tmp_path / "data", tmp_path / "run"
    recipe.write_text(RECIPE)
    (data / "train" / "odd").mkdir(parents=True)
    (data / "val").symlink_to("train")
    fine = [name for name in files if not is_damage(files[name]) and name != "folder.jpg"]
    small = [name for name in fine if (root / "train/odd" / name).stat().st_size < 50_000]
    bad = [name for name in files if is_damage(files[name])]
    for name in (*bad, *small):
        (data / "train" / "odd" / name).symlink_to(root / "train" / "odd" / name)
    shutil.copytree(root / "train" / "plain", data / "train" / "plain")
    command = ["--data", str(data), "--device", "cpu", "--nproc-per-node", "1"]
    command += ["--recipe", str(recipe), "--output", str(run)]
    assert exit_status(train_main, command) == 2
    path = " ".join(str(data / "train" / "odd" / min(bad)).split())
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} ") and error.count("\n") == 1
    assert not run.exists()
    assert exit_status(train_main, [*command, "--skip-list", str(decoded[1])]) == 0
    plan = json.loads((run / "plan.json").read_text())
    assert plan["num_train"] == plan["num_val"] == len(small) + GOOD


def test_the_skip_list_leaves_out_the_damaged_files_whatever_their_names(
    odd: tuple[Path, dict[str, Odd]],
    decoded: tuple[dict[str, Any], Path],
    root: Path,
    tmp_path: Path,
) -> None:
    folder, files = odd
    split = read_split(folder, "train", decoded[1])
    fine = {name for name in files if not is_damage(files[name]) and name != "folder.jpg"}
    assert {Path(path).name for path, *_ in split.files if "/odd/" in path} == fine
    scan(root, "--skip-list", tmp_path / "skip.txt")
    scan(root, "--skip-list", tmp_path / "skip.txt")  # its own list it may replace
    (tmp_path / "mine.txt").write_text("train/cat/0.png\n")
    with pytest.raises(UserError, match=r"mine\.txt was not written by a scan"):
        scan(root, "--skip-list", tmp_path / "mine.txt")


def test_bad_images_end_training_at_the_start_or_are_left_out(root: Path) -> None:
    assert left_out_note(read_split(root, "train", on_bad_image="skip")) == ""
    first, second = root / "train" / "cat" / "1.png", root / "train" / "dog" / "0.png"
    second.write_bytes(second.read_bytes()[:50])
    with pytest.raises(UserError) as caught:
        read_split(root, "train")
    assert str(caught.value).startswith(f"{second} is truncated (a PNG without its end): ")
    first.write_bytes(b"")
    with pytest.raises(UserError) as caught:
        read_split(root, "train")
    message = str(caught.value)
    assert message.startswith(f"{first} is empty, and 1 more files are bad: --on-bad-image skip")
    assert f"python -m pipelines.prepare scan {root} --skip-list FILE" in message
    split = read_split(root, "train", on_bad_image="skip")
    assert len(split) == 4 and list(split.labels) == [0, 0, 1, 1]
    assert split.left_out[0] == (str(first), "is empty")
    assert left_out_note(split) == f"left out 2 bad files of 6; the first: {first} is empty"
    for path in (root / "train" / "cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"class cat has no images that can be read in .*/train: "):
        read_split(root, "train", on_bad_image="skip")


def test_only_what_changed_is_read_again(
    root: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(*arguments: object, status: int = 0) -> int:
        """Files that a scan reads."""
        capsys.readouterr()
        scan(root, *arguments, status=status)
        out, err = capsys.readouterr()
        assert not err, err
        return int(out.split(" images, ")[1].split(" of them")[0])

    assert [read(), read(), read("--decode"), read("--decode"), read()] == [12, 0, 12, 0, 0]
    changed = root / "val" / "dog" / "2.png"
    before = changed.stat()
    changed.write_bytes(changed.read_bytes()[:40])
    assert [read(status=1), read(status=1)] == [1, 0]
    content = changed.read_bytes()
    changed.write_bytes(content[:-1] + b"?")
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert [read(status=1), read("--decode", status=1), read("--decode", status=1)] == [1, 1, 0]
    changed.unlink()
    assert read("--decode") == 0
    assert len(list(own_cache.iterdir())) == 1
    link = root.parent / "link"
    link.symlink_to(root)
    scan(link)
    assert len(list(own_cache.iterdir())) == 1, "one cache for one folder, however it is named"


@pytest.mark.parametrize("content", ["", "[]", '{"format"', "\udcff"])
def test_a_damaged_cache_is_left_aside(
    content: str, root: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan(root)
    (file,) = own_cache.iterdir()
    good = file.read_text()
    file.write_text(content, errors="surrogateescape")
    scan(root)
    out, err = capsys.readouterr()
    assert err.startswith(f"note: the scan cache {file} cannot be read") and err.count("\n") == 1
    assert re.findall(r"(\d+) of them read", out)[-1] == "12"
    assert file.read_text() == good
    row = json.loads(good)
    row["files"]["train/cat/0.png"][4] = [["new-kind", ""]]
    file.write_text(json.dumps(row))
    scan(root)
    assert "new-kind" in capsys.readouterr().err
    row["format"][0] += 1
    file.write_text(json.dumps(row))
    scan(root)
    assert not capsys.readouterr().err, "of another version: no damage"


def test_a_cache_that_cannot_be_written_is_noted(
    root: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_cache.parent.parent.mkdir()
    own_cache.parent.write_text("a file where the folder should be")
    scan(root)
    assert "cannot be written" in capsys.readouterr().err


def test_duplicates_between_and_within_the_splits(
    root: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scan(root)["duplicates_between_splits"] == []
    large = max((photographs / "train").glob("*/*.JPEG"), key=lambda path: path.stat().st_size)
    for name in ("train/cat/a.jpg", "train/dog/b.jpg", "val/dog/c.jpg"):
        shutil.copy(large, root / name)
    content = bytearray(large.read_bytes())
    content[len(content) // 2] ^= 1
    (root / "val" / "cat" / "nearly.jpg").write_bytes(bytes(content))
    shutil.copy(root / "val/cat/1.png", root / "train/cat/1-again.png")
    report = scan(root)
    assert report["duplicates_between_splits"] == [
        {"train": ["train/cat/1-again.png"], "val": ["val/cat/1.png"]},
        {"train": ["train/cat/a.jpg", "train/dog/b.jpg"], "val": ["val/dog/c.jpg"]},
    ]
    assert report["duplicates_within_splits"] == {"train": 1}
    text = capsys.readouterr().out
    assert "2 images of validation are in training as well" in text
    assert "val/cat/1.png = train/cat/1-again.png" in text
    assert scan(root) == report, "from the cache"


def test_folders_that_training_would_stop_at(root: Path) -> None:
    (root / "train" / "loop").symlink_to("loop")
    (root / "train" / "ape").mkdir()
    problems = scan(root, status=1)["problems"]
    assert problems[0] == f"class folder {root}/train/ape has no images"
    assert "only in training: ape" in problems[1] and len(problems) == 2
    (root / "train" / "ape").rmdir()
    for path in (root / "val" / "cat").iterdir():
        path.write_bytes(b"")
    assert scan(root, status=1)["problems"] == ["class cat has no image in val that can be read"]
    shutil.rmtree(root / "val")
    (problem,) = scan(root, status=1)["problems"]
    assert "has no folder val/ (nor valid, validation, test)" in problem
    with pytest.raises(UserError, match="has no folder"):
        main(["scan", str(root / "train")])
    with pytest.raises(UserError, match="no folder"):
        main(["scan", str(root / "nowhere")])
    with pytest.raises(UserError, match="--workers must be at least 1"):
        main(["scan", str(root), "--workers", "0"])
    with pytest.raises(UserError, match=r"--report .* is a folder"):
        main(["scan", str(root), "--report", str(root)])


@pytest.mark.parametrize("command", ["scan", "resize"])
def test_help_says_what_status_1_means(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "Exit status: 1: damaged images" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "Exit status" not in capsys.readouterr().out


def test_nothing_is_written_unasked(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(root.rglob("*"))
    assert main(["scan", str(root)]) == 0
    assert sorted(root.rglob("*")) == before
    assert capsys.readouterr().out.endswith("nothing is damaged\n")


CRASHING = "train/dog/1.png"


def examine_or_die(root: Path, names: list[str]) -> list[tuple[str, Examined]]:
    """A decoder with a defect: one file ends its process."""
    if CRASHING in names:
        os.abort()
    return examine_all(root, False, names)


def test_a_file_that_ends_its_process_is_a_finding(root: Path) -> None:
    names = sorted(str(path.relative_to(root)) for path in root.glob("train/*/[01].png"))
    assert len(names) == 4 and CRASHING in names
    found = dict(
        result
        for part in examine_files(partial(examine_or_die, root), names, 2, size=2)
        for result in part
    )
    assert sorted(found) == names
    kinds = {name: file.findings[0][0] for name, file in found.items() if file.findings}
    assert kinds == {CRASHING: "corrupt"}


def test_no_file_is_blamed_where_processes_can_share_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SHARED_MEMORY", root / "shm")
    with pytest.raises(UserError, match=r"shm, where .* cannot be written to: .* tmpfs there$"):
        scan(root)


def test_processes_are_bounded_in_memory_and_time(root: Path) -> None:
    """The bounds hold for whatever the decoders do."""
    code = (
        "import signal, sys; from pathlib import Path;"
        "from pipelines.prepare import examine;"
        "examine.MAX_SECONDS = 1;"
        "examine.examine_all(Path(sys.argv[1]), True, ['train/cat/0.png']);\n"
        "try: bytearray(examine.MAX_MEMORY)\n"
        "except MemoryError: print('refused', flush=True)\n"
        "signal.setitimer(signal.ITIMER_PROF, 1)\n"
        "while True: pass"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.stdout, result.returncode) == ("refused\n", -27), result.stderr
