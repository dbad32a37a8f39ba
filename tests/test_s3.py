"""Shards from an object store: DALI's reader against a real server of the S3 protocol."""

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

from pipelines.datasets.remote import Wanted, fetched, in_groups
from pipelines.datasets.shards import list_shards
from pipelines.errors import UserError
from pipelines.prepare.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
FETCH = """
import sys
from pipelines.cli import exit_status
from pipelines.s3 import fetched
sys.exit(exit_status(lambda argv: print(fetched(argv[0])) or 0, sys.argv[1:]))
"""
PROBE = """
import sys
from pipelines.s3 import read_objects
(data,) = next(read_objects([[sys.argv[1]]]))
assert bytes(data) == b"content", bytes(data)
"""


class Bucket:
    """A bucket on the server, and a process that reads from it."""

    def __init__(self, client: Any, endpoint: str, cache: Path) -> None:
        self.client = client
        self.environment = dict(
            os.environ,
            AWS_ENDPOINT_URL=endpoint,
            AWS_ACCESS_KEY_ID="a-key",
            AWS_SECRET_ACCESS_KEY="its-secret",
            AWS_EC2_METADATA_DISABLED="true",
            XDG_CACHE_HOME=str(cache),
        )

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket="bucket", Key=key, Body=content)

    def put_folder(self, prefix: str, folder: Path) -> None:
        for path in folder.iterdir():
            self.put(f"{prefix}/{path.name}", path.read_bytes())

    def start(self, code: str, url: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code, url],
            cwd=ROOT,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str, url: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(code, url, **environment)
        out, err = process.communicate(timeout=120)
        return process.returncode, out.strip(), err

    def fetch(self, url: str) -> Path:
        status, out, err = self.run(FETCH, url)
        assert status == 0, err
        return Path(out)

    def error(self, url: str, **environment: str) -> str:
        status, _, err = self.run(FETCH, url, **environment)
        assert status == 2 and err.count("\n") == 1, err
        return err.removeprefix("error: ")


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Any, str]]:
    """A client of a server on loopback, and the server's address."""
    pytest.importorskip("nvidia.dali")
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


@pytest.fixture
def bucket(server: tuple[Any, str], tmp_path: Path) -> Bucket:
    bucket = Bucket(*server, tmp_path / "cache")
    bucket.put("probe", b"content")
    status, _, err = bucket.run(PROBE, "s3://bucket/probe")
    if status:
        pytest.skip(f"this build of DALI does not read s3://: {err.splitlines()[-1]}")
    return bucket


@pytest.fixture(scope="module")
def shards(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of about 1 MiB of 40 photographs."""
    root = tmp_path_factory.mktemp("s3")
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


def test_shards_are_fetched_once_and_then_local(bucket: Bucket, shards: Path) -> None:
    bucket.put_folder("some/where", shards)
    folder = bucket.fetch("s3://bucket/some/where")
    assert folder.parent == Path(bucket.environment["XDG_CACHE_HOME"]) / "fastimagenet" / "shards"
    assert files_of(folder) == files_of(shards)
    assert len(list_shards(folder, "train").images) == 30
    bucket.client.delete_object(Bucket="bucket", Key="some/where/train-00000.tar")
    assert bucket.fetch("s3://bucket/some/where/") == folder
    bucket.put("elsewhere/shards.json", (shards / "shards.json").read_bytes())
    assert bucket.fetch("s3://bucket/elsewhere") == folder, "the same data"


def test_a_stopped_copy_is_gone_on_with(bucket: Bucket, shards: Path) -> None:
    bucket.put_folder("stopped", shards)
    folder = bucket.fetch("s3://bucket/stopped")
    kept = (folder / "train-00000.tar").stat().st_ino
    (folder / "shards.json").unlink()
    (folder / "train-00001.tar").unlink()
    (folder / "val-00000.idx").unlink()
    (folder / ".train-00001.tar.999").write_bytes(b"half")
    bucket.client.delete_object(Bucket="bucket", Key="stopped/train-00000.tar")
    assert bucket.fetch("s3://bucket/stopped") == folder
    assert files_of(folder) == files_of(shards)
    assert (folder / "train-00000.tar").stat().st_ino == kept


def test_processes_of_a_node_share_one_copy(bucket: Bucket, shards: Path) -> None:
    bucket.put_folder("shared", shards)
    processes = [bucket.start(FETCH, "s3://bucket/shared") for _ in range(3)]
    found = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], found
    (folder,) = {Path(out.strip()) for out, _ in found}
    assert files_of(folder) == files_of(shards)
    assert sum("fetching" in err for _, err in found) <= 1


def test_what_cannot_be_read_is_one_line(bucket: Bucket, shards: Path) -> None:
    for url in ("s3://bucket/nowhere", "s3://no-such-bucket/x"):
        assert bucket.error(url).startswith(f"{url}/shards.json cannot be read (S3 Object not ")
    refused = bucket.error("s3://bucket/some/where", AWS_ENDPOINT_URL="http://127.0.0.1:1")
    assert "connect" in refused and "AWS_ENDPOINT_URL" in refused
    bucket.put_folder("partly", shards)
    bucket.client.delete_object(Bucket="bucket", Key="partly/val-00001.tar")
    error = bucket.error("s3://bucket/partly")
    assert "object=partly/val-00001.tar" in error and "AWS_ACCESS_KEY_ID" in error


def test_damaged_and_hostile_shards_are_one_line(bucket: Bucket, shards: Path) -> None:
    bucket.put_folder("damaged", shards)
    data = bytearray((shards / "train-00001.tar").read_bytes())
    data[5000] ^= 1
    bucket.put("damaged/train-00001.tar", bytes(data))
    error = bucket.error("s3://bucket/damaged")
    assert error.startswith("train-00001.tar is damaged in the bucket (its checksum)")
    cache = Path(bucket.environment["XDG_CACHE_HOME"])
    assert not list(cache.rglob("train-00001.tar")) and not list(cache.rglob("shards.json"))

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
        assert message in bucket.error("s3://bucket/forged")
    assert not list(cache.parent.rglob("planted*"))


def test_no_bucket_is_named() -> None:
    with pytest.raises(UserError, match="s3:// names no bucket: expected s3://BUCKET/PREFIX"):
        fetched("s3://")


def test_objects_are_read_a_few_at_a_time() -> None:
    sizes = [300 << 20, 0, 300 << 20, 1 << 30, 0, 0, 0, 0, 0]
    files = [Wanted(str(place), size, "") for place, size in enumerate(sizes)]
    groups = [[int(file.name) for file in group] for group in in_groups(files)]
    assert groups == [[0, 1], [2], [3], [4, 5, 6, 7], [8]]


def test_a_command_takes_the_address_as_its_data(bucket: Bucket, shards: Path) -> None:
    bucket.put_folder("for/training", shards)

    def train(url: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fastimagenet.train", "--dry-run", "--data", url]
        command += ["--recipe", "digits", "--set", "phases.0.batch_size=5"]
        command += ["--set", "phases.1.batch_size=5"]
        return subprocess.run(
            command, cwd=ROOT, env=bucket.environment, capture_output=True, text=True, timeout=120
        )

    done = train("s3://bucket/for/training")
    assert done.returncode == 0 and "30 training images" in done.stdout, done
    failed = train("s3://bucket/nowhere")
    # DALI prints a line of its own.
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith(
        "error: argument --data: s3://bucket/nowhere/shards.json cannot be read"
    )
