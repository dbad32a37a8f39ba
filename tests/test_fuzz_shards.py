"""Many mutated shards, indexes and manifests: each is read, or refused in one line."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.datasets.index import check_images
from pipelines.datasets.known import CIFAR10_CLASSES
from pipelines.datasets.shards import list_shards
from pipelines.errors import UserError
from pipelines.prepare.__main__ import main

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

NUM_MUTANTS = 500
MAX_MEMORY = 256 << 20
"""Bytes that reading one may take on top of what the process has."""
MAX_SECONDS = 20.0
"""CPU time of one, so that a hang is an error; they take milliseconds."""
FILES = ("train-00000.tar", "train-00000.idx", "shards.json")
WORDS = (
    *(b"0", b"-1", b"1" + 18 * b"0", b"9" * 400, b"1e999", b"NaN", b"true", b"null", b"{}", b"[[["),
    *(b"../../../tmp/x", b"/etc/passwd", b"%00", b"\0", b"\xff\xfe", b" ", b"\n", b'"', b"~0"),
    *(b"77777777777\0", b"1", b"2", b"5", b"L", b"x", b"S", b"ustar  \0", b"\x80" + 11 * b"\xff"),
)
"""What stands in the way of parsers: numbers, paths, quotes, and types and sizes of tar members."""
mutation = st.tuples(
    st.sampled_from((*FILES, FILES[0], FILES[0])),
    st.sampled_from(
        ("overwrite", "overwrite", "flip", "flip", "insert", "remove", "repeat", "cut")
    ),
    st.one_of(st.integers(0, 700), st.integers(0, 70_000)),
    st.sampled_from(WORDS),
    st.integers(0, 300),
)
mutants = st.tuples(st.lists(mutation, min_size=1, max_size=3), st.booleans())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A shard of 20 JPEGs of 1 KB in 10 classes, its index and its manifest."""
    root = tmp_path_factory.mktemp("whole")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 24, 3), np.uint8)
    for number, image in enumerate(pixels):
        folder = root / "src" / "train" / CIFAR10_CLASSES[number // 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:04}.jpg")
    assert main(["shard", str(root / "src"), str(root / "dst"), "--workers", "1"]) == 0
    return {name: (root / "dst" / name).read_bytes() for name in FILES}


def mutated(content: bytes, what: str, at: int, word: bytes, length: int) -> bytes:
    data = bytearray(content)
    at %= len(data) + 1
    if what == "overwrite":
        data[at : at + len(word)] = word
    elif what == "insert":
        data[at:at] = word
    elif what == "remove":
        del data[at : at + length]
    elif what == "repeat":
        data[at:at] = data[at : at + length]
    elif what == "cut":
        del data[at:]
    elif what == "flip" and at < len(data):
        data[at] ^= 1 << length % 8
    return bytes(data)


def signed(files: dict[str, bytes]) -> bytes:
    """The manifest, made to agree with the other files as a forger would."""
    try:
        manifest = json.loads(files["shards.json"])
        manifest["splits"]["train"][0] |= {
            "index_sha256": sha256(files["train-00000.idx"]).hexdigest(),
            "bytes": len(files["train-00000.tar"]),
            "images": max(1, files["train-00000.idx"].count(b"\n") - 1),
        }
        return json.dumps(manifest).encode()
    except (ValueError, KeyError, TypeError, IndexError):
        return files["shards.json"]


@contextmanager
def bounded() -> Iterator[None]:
    """Memory and CPU time beyond the bounds raise MemoryError and TimeoutError."""

    def too_long(number: int, frame: object) -> None:
        raise TimeoutError

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)


def outcome(folder: Path) -> str:
    """What becomes of shards: "refused", "damaged images" or "read"."""
    try:
        listing = list_shards(folder, "train")
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        return "refused"
    images = list(listing.images)
    _, shapes, bad = check_images((0, images))
    length = os.stat(images[0].path).st_size
    for image, label, shape in zip(images, listing.labels.tolist(), shapes, strict=True):
        assert image.size is not None and 512 <= image.start <= length - image.size
        assert image.name.startswith(f"{listing.classes[label]}/") and ".." not in image.name
        assert len(image.read()) == image.size
        assert not any(shape) or (min(shape) > 0 and shape[3] == image.size)
    return "damaged images" if bad else "read"


def test_the_bounds_are_held() -> None:
    with bounded():
        with pytest.raises(MemoryError):
            bytearray(2 * MAX_MEMORY)


@pytest.mark.slow
def test_every_mutated_shard_is_read_or_refused(whole: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    outcomes: Counter[str] = Counter()

    @hypothesis.settings(max_examples=NUM_MUTANTS, deadline=None, database=None, derandomize=True)
    @hypothesis.given(mutants)
    def each(mutant: tuple[list[tuple[str, str, int, bytes, int]], bool]) -> None:
        mutations, forged = mutant
        files = dict(whole)
        for name, *change in mutations:
            files[name] = mutated(files[name], *change)
        if forged:
            files["shards.json"] = signed(files)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        with bounded():
            outcomes[outcome(folder)] += 1

    each()
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted([*FILES, "shards"])
    assert outcomes.total() >= NUM_MUTANTS * 4 // 5, outcomes
    assert all(
        outcomes[what] > NUM_MUTANTS // 25 for what in ("refused", "damaged images", "read")
    ), outcomes
