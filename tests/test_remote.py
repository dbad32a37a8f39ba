"""Shards from an object store: a real server of the S3 protocol, and other protocols of fsspec."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastimagenet.cli import data_argument
from pipelines.datasets.remote import is_url, local_copy
from pipelines.datasets.shards import list_shards
from pipelines.errors import UserError
from pipelines.prepare.__main__ import main

fsspec = pytest.importorskip("fsspec")
ROOT = Path(__file__).resolve().parent.parent
FETCH = """
import sys
from pipelines.cli import exit_status
from pipelines.datasets.remote import local_copy
sys.exit(exit_status(lambda argv: print(local_copy(argv[0])) or 0, sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, where the copies go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastimagenet" / "shards"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Any, str]]:
    """A client of a server on loopback, and the server's address."""
    pytest.importorskip("s3fs")
    pytest.importorskip("flask_cors")
    moto = pytest.importorskip("moto.server")
    import boto3

    thread = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    thread.start()
    try:
        endpoint = "http://{}:{}".format(*thread.get_host_and_port())
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="a-key",
            aws_secret_access_key="its-secret",
        )
        client.create_bucket(Bucket="bucket")
        yield client, endpoint
    finally:
        thread.stop()


class Bucket:
    """A bucket on the server."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket="bucket", Key=key, Body=content)

    def put_folder(self, prefix: str, folder: Path) -> None:
        for path in folder.iterdir():
            self.put(f"{prefix}/{path.name}", path.read_bytes())

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket="bucket", Key=key)


@pytest.fixture
def bucket(server: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> Bucket:
    client, endpoint = server
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "a-key",
        "AWS_SECRET_ACCESS_KEY": "its-secret",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    return Bucket(client)


@pytest.fixture(scope="module")
def shards(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of about 1 MiB of 40 photographs."""
    root = tmp_path_factory.mktemp("remote")
    for number, path in enumerate(sorted((photographs / "train").glob("*/*"))[:40]):
        split = "train" if number < 30 else "val"
        target = root / "src" / split / f"class{number % 2}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    arguments = ["shard", root / "src", root / "dst", "--shard-size", 1, "--workers", 1]
    assert main([*map(str, arguments)]) == 0
    return root / "dst"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def error_of(url: str) -> str:
    with pytest.raises(UserError) as caught:
        local_copy(url)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shards_are_copied_once_and_then_local(
    bucket: Bucket, shards: Path, own_cache: Path
) -> None:
    bucket.put_folder("some/where", shards)
    folder = data_argument("s3://bucket/some/where")  # as every command does
    assert folder.parent == own_cache
    assert files_of(folder) == files_of(shards)
    assert len(list_shards(folder, "train").images) == 30
    bucket.delete("some/where/train-00000.tar")
    assert local_copy("s3://bucket/some/where/") == folder
    bucket.put("elsewhere/shards.json", (shards / "shards.json").read_bytes())
    assert local_copy("s3://bucket/elsewhere") == folder, "the same data"


def test_a_stopped_copy_is_resumed(bucket: Bucket, shards: Path) -> None:
    bucket.put_folder("stopped", shards)
    folder = local_copy("s3://bucket/stopped")
    kept = (folder / "train-00000.tar").stat().st_ino
    (folder / "shards.json").unlink()
    (folder / "train-00001.tar").unlink()
    (folder / "val-00000.idx").unlink()
    (folder / ".train-00001.tar.999").write_bytes(b"half")
    bucket.delete("stopped/train-00000.tar")
    assert local_copy("s3://bucket/stopped") == folder
    assert files_of(folder) == files_of(shards)
    assert (folder / "train-00000.tar").stat().st_ino == kept


def test_what_a_purge_of_the_cache_has_taken_is_fetched_again(shards: Path) -> None:
    """As scratch disks are purged: by age, file by file."""
    url = f"file://{shards}"
    folder = local_copy(url)
    kept = (folder / "train-00000.tar").stat().st_ino
    (folder / "train-00000.idx").unlink()
    (folder / "val-00000.tar").unlink()
    assert local_copy(url) == folder and files_of(folder) == files_of(shards)
    assert (folder / "train-00000.tar").stat().st_ino == kept


def test_processes_of_a_node_share_one_copy(shards: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FETCH, f"file://{shards}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    found = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], found
    (folder,) = {Path(out.strip()) for out, _ in found}
    assert files_of(folder) == files_of(shards)
    assert sum("fetching" in err for _, err in found) <= 1


def test_other_protocols_are_read_alike(shards: Path, own_cache: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe_file(f"/data/{path.name}", path.read_bytes())
    folder = local_copy("memory://data")
    assert folder.parent == own_cache and files_of(folder) == files_of(shards)
    memory.rm("/data", recursive=True)
    assert "memory://data/shards.json cannot be read (FileNotFoundError" in error_of(
        "memory://data"
    )


def test_missing_packages_and_unknown_protocols_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "foo://a/b cannot be read (Protocol not known: foo)" in error_of("foo://a/b")
    assert error_of("s3://") == "s3:// names no bucket: expected s3://BUCKET/PREFIX"
    extra = "pip install 'fastimagenet[remote]'"
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    assert error_of("gs://a/b").startswith("gs://a/b: ") and "gcsfs" in error_of("gs://a/b")
    assert extra in error_of("gs://a/b")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    assert error_of("s3://a/b") == f"s3://a/b is read by fsspec: {extra}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("s3://a/b", True), ("simplecache::s3://a", False), ("a/b", False), ("C:/a//b", False)],
)
def test_what_a_url_is(text: str, expected: bool) -> None:
    assert is_url(text) == expected


def test_what_cannot_be_read_is_one_line(
    bucket: Bucket, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in ("s3://bucket/nowhere", "s3://no-such-bucket/x"):
        assert error_of(url).startswith(f"{url}/shards.json cannot be read (FileNotFoundError")
    bucket.put_folder("partly", shards)
    bucket.delete("partly/val-00001.tar")
    error = error_of("s3://bucket/partly")
    assert "partly/val-00001.tar cannot be read" in error and "AWS_ACCESS_KEY_ID" in error
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    refused = error_of("s3://bucket/some/where")
    assert "connect" in refused and "AWS_ENDPOINT_URL" in refused


def test_damaged_and_hostile_shards_are_one_line(
    bucket: Bucket, shards: Path, own_cache: Path
) -> None:
    bucket.put_folder("damaged", shards)
    data = bytearray((shards / "train-00001.tar").read_bytes())
    data[5000] ^= 1
    for content, what in ((bytes(data), "its checksum"), (bytes(data) + b"more", "its size")):
        bucket.put("damaged/train-00001.tar", content)
        error = error_of("s3://bucket/damaged")
        assert error.startswith(f"train-00001.tar is damaged in the bucket ({what})")
    assert not list(own_cache.rglob("train-00001.tar*")) and not list(own_cache.rglob("*.json"))

    manifest = json.loads((shards / "shards.json").read_text())
    entry = manifest["splits"]["train"][0]
    for key, value, message in (
        ("file", "../../../planted.tar", "shards.json is damaged (its field file)"),
        ("bytes", 1 << 49, "GB that are free for"),
        ("sha256", None, "s3://bucket/forged is not complete"),
    ):
        before = entry[key]
        entry[key] = value
        bucket.put("forged/shards.json", json.dumps(manifest).encode())
        entry[key] = before
        assert message in error_of("s3://bucket/forged")
    assert not list(own_cache.parent.parent.parent.rglob("planted*"))


def test_a_command_takes_the_address_as_its_data(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastimagenet.train import main as train

    flags = ["--dry-run", "--recipe", "digits", "--set", "phases.0.batch_size=5"]
    flags += ["--set", "phases.1.batch_size=5", "--data"]
    assert train([*flags, f"file://{shards}"]) == 0
    assert "30 training images" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"argument --data: file:///nowhere/shards\.json cannot be"):
        train([*flags, "file:///nowhere"])


def test_a_command_says_in_one_line_what_is_wrong(own_cache: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FETCH, "file:///nowhere"],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: file:///nowhere/shards.json cannot be read")
