"""What is packed for a GPU machine without network, and what becomes of it there."""

from __future__ import annotations

import struct
import tarfile
import zipfile
from pathlib import Path

import markupsafe
import pytest

from benchmarks.gpu_suite import fatbin, pack, visit
from pipelines.errors import UserError


def container(*entries: tuple[int, int, bytes]) -> bytes:
    """Code for GPUs as a library holds it: kind, architecture, code."""
    found = b""
    for kind, architecture, code in entries:
        head = struct.pack("<HHIQ", kind, 257, 64, len(code)).ljust(28, b"h")
        found += (head + struct.pack("<I", architecture)).ljust(64, b"h") + code
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(found)) + found


def test_code_for_other_gpus_is_blanked() -> None:
    both = ((2, 80, b"eighty"), (2, 90, b"ninety"), (1, 90, b"ptx"))
    other = ((2, 80, b"eighty"), (1, 80, b"ptx"))
    odd = b"\x50\xed\x55\xba" + b"no container"
    library = b"before" + container(*both) + odd + container(*other) + b"after" + odd[:4]
    zeros = ((2, 80, bytes(6)), (2, 90, b"ninety"), (1, 90, bytes(3)))
    expected = library.replace(container(*both), container(*zeros))
    assert fatbin.blanked(library, 90) == expected != library
    assert fatbin.blanked(library, 75) == library  # it would have nothing to run


def test_what_is_packed_is_unpacked_and_the_suite_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = tmp_path / "from"
    (shared / "data").mkdir(parents=True)
    trees = {visit.IMAGES: "imagenet-sample/{}/{}.JPEG", visit.CIFAR10: "cifar10/train/{}/{}.jpg"}
    for name, pattern in trees.items():
        with tarfile.open(shared / "data" / name, "w:gz" if name.endswith("gz") else "w") as made:
            for index in range(10):
                about = tarfile.TarInfo(pattern.format(f"class{index}", index))
                made.addfile(about)
    (extension,) = Path(markupsafe.__file__).parent.glob("_speedups*.so")

    def download(python: str, folder: Path) -> None:
        assert python == "3.12"
        folder.mkdir()
        with zipfile.ZipFile(folder / "some.whl", "w") as wheel:
            wheel.write(extension, "some/_a.cpython-312-x86_64-linux-gnu.so")
            wheel.write(extension, "some/_a.cpython-311-x86_64-linux-gnu.so")
            for path in (
                "some/__init__.py",
                "some/include/a.h",
                "nvidia/nvtiff/lib/libnvtiff.so.0",
            ):
                wheel.writestr(path, "")

    monkeypatch.setattr(pack, "download", download)
    out = tmp_path / "out"
    flags = ["--shared", str(shared), "--output", str(out), "--architecture", "90"]
    with pytest.raises(UserError, match=r"--photographs: .* has 10, not 450"):
        pack.main(flags)
    assert pack.main([*flags, "--photographs", "2", "5"]) == 0
    assert capsys.readouterr().out.count(" MiB ") == 4

    begun: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(visit.os, "execve", lambda *call: begun.append(call))
    work = tmp_path / "work"
    for step in ("first", "second"):
        visit.main([str(out / step), "--work", str(work), "--limit", "240"])
    (_, first, _), (_, second, environment) = begun
    data, cifar = ["--data", str(work / "data")], ["--cifar10", str(work / "cifar10" / "cifar10")]
    assert first[1:] == ["-m", "benchmarks.gpu_suite", *data, "--limit", "240"]
    assert second[1:] == ["-m", "benchmarks.gpu_suite", *data, *cifar, "--limit", "240"]
    assert environment["PYTHONPATH"].split(":")[0] == str(work / "site")
    site = {path.relative_to(work / "site").as_posix() for path in (work / "site").rglob("*.*")}
    assert site == {"some/__init__.py", "some/_a.cpython-312-x86_64-linux-gnu.so"}
    assert len(list((work / "data" / "train").glob("*/*.JPEG"))) == 7
    with tarfile.open(Path(environment["FASTIMAGENET_SHARED"]) / "data" / visit.IMAGES) as made:
        assert sum(one.isfile() for one in made) == 7
    with pytest.raises(UserError, match=r"has none of site\.tar\.xz"):
        visit.main([str(tmp_path), "--work", str(work)])
