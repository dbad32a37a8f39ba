"""Many mutated files through the scan: a verdict on each, within memory and time."""

from __future__ import annotations

import random
import resource
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from odd_files import odd_files

from pipelines.datasets.images import whole_files
from pipelines.datasets.index import check_images
from pipelines.prepare.examine import Examined, examine_all
from pipelines.prepare.findings import DAMAGE, NOTES
from pipelines.prepare.scan import examine_files

NUM_FILES = 1500
MAX_RESIDENT = 1 << 20
"""KiB that a process which examines them may come to hold."""
SEED = 2018


def seeds(photograph: Path) -> list[bytes]:
    """Whole images of every format, small ones, and some that are damaged already."""
    contents = {file.content for file in odd_files(photograph) if file.content is not None}
    return sorted(content for content in contents if 0 < len(content) < 200_000)


def mutate(generator: random.Random, content: bytes) -> bytes:
    """One to four changes, most of them where the header is."""
    data = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        reach = generator.choice((40, 700, len(data)))
        at = generator.randrange(min(reach, len(data)) or 1)
        length = generator.choice((1, 2, 4, generator.randint(1, 5000)))
        change = generator.randrange(6)
        if change == 0 and data:
            data[at] ^= 1 << generator.randrange(8)
        elif change == 1:
            data[at : at + 4] = generator.choice(
                (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\0\1")
            )
        elif change == 2:
            data[at : at + length] = generator.randbytes(length)
        elif change == 3:
            data[at:at] = data[at // 2 : at // 2 + length]
        elif change == 4:
            del data[at : at + length]
        elif change == 5:
            del data[at + length :]
    return bytes(data)


def measured(root: Path, names: list[str]) -> list[tuple[str, Examined]]:
    """Each file's result; raises MemoryError if this process has held more than it should."""
    results = []
    for name in names:
        results += examine_all(root, True, [name])
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > MAX_RESIDENT:
            raise MemoryError(name)
    return results


@pytest.fixture(scope="module")
def mutated(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of NUM_FILES mutated images."""
    folder = tmp_path_factory.mktemp("mutated")
    generator = random.Random(SEED)
    contents = seeds(min((photographs / "train").glob("*/*.JPEG")))
    assert len(contents) > 80
    for index in range(NUM_FILES):
        (folder / f"{index:04}.jpg").write_bytes(mutate(generator, generator.choice(contents)))
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on damaged metadata
def test_a_scan_has_a_verdict_on_every_mutated_file(mutated: Path) -> None:
    names = sorted(path.name for path in mutated.iterdir())
    found: dict[str, Examined] = {}
    for part in examine_files(partial(measured, mutated), names, workers=2, size=50):
        found.update(part)
    assert sorted(found) == names
    kinds: Counter[str] = Counter()
    for name, file in found.items():
        assert not any("ends the process" in text for _, text in file.findings), name
        kinds.update(kind for kind, _ in file.findings)
    assert set(kinds) <= {*DAMAGE, *NOTES}
    damaged = {
        name for name, file in found.items() if any(kind in DAMAGE for kind, _ in file.findings)
    }
    assert NUM_FILES // 4 < len(damaged) < NUM_FILES, "mutants of all sorts"
    _, _, found_bad = check_images((0, whole_files(str(mutated / name) for name in names)))
    bad = {names[place] for place, _ in found_bad}
    assert bad <= damaged, "what the start of training calls bad, a scan calls damage"
    assert len(bad) > len(damaged) // 2
