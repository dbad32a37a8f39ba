"""How long it takes from a start to the first batch, by the number of files.

    python -m benchmarks.research.start_up --data DIR --files 10000 1000000 --json FILE

Hard links to the training images of DIR, in 1,000 class folders, are made below --scratch and
removed again. Each start is a process of its own; its clock runs from after the imports to the
first training batch. "first": without an index; "again": with the one that the first start has
left; "ImageFolder": torchvision's, with a DataLoader, which looks at no header. The operating
system has the files in its cache throughout: what a cold disk adds is not measured. Memory is the
largest resident size of the process, imports included.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.common.measuring import begin, command_parser, markdown, training_images
from pipelines import cli
from pipelines.backends import BACKENDS, chosen_backend
from pipelines.cli import at_least
from pipelines.datasets.index import SETTLED_SECONDS
from pipelines.errors import UserError
from pipelines.files import write_object

CLASSES = 1000
BATCH_SIZE = 64
IMAGE_SIZE = 128
CHILD = """
import json, resource, sys, time
import torch
root, loader, backend, batch_size, image_size, threads = json.loads(sys.argv[1])
if loader == "ImageFolder":
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms
else:
    from pipelines.backends import make_loader
    from pipelines.loader import LoaderSpec, Stage
    from pipelines.datasets.split import read_split
    if backend == "dali":
        import pipelines.backends.dali.loader
if __name__ == "__main__":
    start = time.perf_counter()
    if loader == "ImageFolder":
        steps = [transforms.RandomResizedCrop(image_size), transforms.ToTensor()]
        data = datasets.ImageFolder(root + "/train", transforms.Compose(steps))
        batches = DataLoader(data, batch_size, shuffle=True, num_workers=threads)
    else:
        stage = Stage(epochs=1, image_size=image_size, batch_size=batch_size)
        split = read_split(root, "train")
        spec = LoaderSpec(split=split, stages=(stage,), training=True, num_threads=threads)
        batches = make_loader(backend, spec)
    images, _ = next(iter(batches))
    assert images.shape[0] == batch_size
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([seconds, peak]), flush=True)
    import os
    os._exit(0)
"""


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start."""

    files: int
    start: str
    """ "first", "again" or "ImageFolder"."""
    seconds: float
    peak_mib: float


STARTS = ("first", "again", "ImageFolder")


@contextmanager
def linked(originals: list[str], count: int, scratch: Path) -> Iterator[Path]:
    """Make a data folder of `count` hard links, with room for a cache beside it, for a while."""
    with ExitStack() as stack:
        try:
            folder = tempfile.TemporaryDirectory(prefix="start-up-", dir=scratch)
            root = Path(stack.enter_context(folder))
            make_links(originals, count, root / "data" / "train")
        except OSError as error:
            raise UserError(
                f"--scratch {scratch}: no hard links to --data can be made there "
                f"({error.strerror}): name a folder on the same file system"
            ) from None
        time.sleep(SETTLED_SECONDS + 1)  # an index of folders that have just changed is not kept
        yield root


def make_links(originals: list[str], count: int, split: Path) -> None:
    """Make `count` files in CLASSES folders."""
    with tqdm(total=count, unit="link", desc="making links", disable=None) as bar:
        for label in range(CLASSES):
            folder = split / f"n{label:08}"
            folder.mkdir(parents=True)
            numbers = range(label, count, CLASSES)
            for number in numbers:
                os.link(originals[number % len(originals)], f"{folder}/{folder.name}_{number}.JPEG")
            bar.update(len(numbers))


def measure(root: Path, files: int, start: str, backend: str, threads: int) -> Start:
    """Start a process and take the time to its first batch."""
    loader = "ImageFolder" if start == "ImageFolder" else "ours"
    task = [str(root / "data"), loader, backend, BATCH_SIZE, IMAGE_SIZE, threads]
    script = root / "child.py"
    script.write_text(CHILD)
    environment = os.environ | {"XDG_CACHE_HOME": str(root / "cache"), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, str(script), json.dumps(task)]
    seconds, peak = json.loads(subprocess.check_output(command, env=environment, text=True))
    return Start(files=files, start=start, seconds=seconds, peak_mib=peak)


def growth(starts: Sequence[Start], start: str) -> float:
    """Compute the exponent of the seconds from the fewest to the most files: 1 is linear."""
    own = sorted((one for one in starts if one.start == start), key=lambda one: one.files)
    few, many = own[0], own[-1]
    return math.log(many.seconds / few.seconds) / math.log(many.files / few.files)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status. Raises UserError for the user's mistakes."""
    parser = command_parser(__doc__, data=True, json=True)
    add = parser.add_argument
    numbers = [10_000, 100_000, 1_000_000, 1_300_000]
    add("--files", type=at_least(CLASSES), nargs="+", default=numbers)
    add("--backend", choices=BACKENDS, default="auto")
    add("--threads", type=at_least(1), default=2, help="decoding threads, or DataLoader's workers")
    add("--scratch", type=Path, metavar="DIR", help="where links can be made; default: beside DIR")
    args, about = begin(parser, argv)
    # Links to links: the originals may be symbolic ones.
    originals = [os.path.realpath(file.path) for file in training_images(args.data).files]
    backend = chosen_backend(args.backend)
    scratch = args.scratch or Path(originals[0]).parents[2]
    starts = []
    for files in sorted(args.files):
        with linked(originals, files, scratch) as root:
            for start in STARTS:
                one = measure(root, files, start, backend, args.threads)
                starts.append(one)
                told = f"{one.seconds:7.2f} s  {one.peak_mib:7,.0f} MiB"
                print(f"{files:>9,} files, {start:11}  {told}", flush=True)
    several = len(set(args.files)) > 1
    exponents = {kind: growth(starts, kind) for kind in STARTS} if several else {}
    print("\n" + table(starts, exponents))
    if args.json is not None:
        config = {"files": sorted(args.files), "backend": backend, "threads": args.threads}
        config |= {"image_size": IMAGE_SIZE, "batch_size": BATCH_SIZE}
        rows = [asdict(one) for one in starts]
        result = {"config": config, "starts": rows, "growth": exponents}
        write_object(args.json, about | result)
    return 0


def table(starts: Sequence[Start], exponents: dict[str, float]) -> str:
    """Format seconds and memory by the number of files as Markdown."""
    rows = [["files", *(f"{kind}, s / MiB" for kind in STARTS)]]
    for files in dict.fromkeys(one.files for one in starts):
        own = [one for one in starts if one.files == files]
        rows.append([f"{files:,}", *(f"{one.seconds:.2f} / {one.peak_mib:,.0f}" for one in own)])
    if exponents:
        rows.append(["growth", *(f"files^{value:.2f}" for value in exponents.values())])
    return markdown(rows)


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
