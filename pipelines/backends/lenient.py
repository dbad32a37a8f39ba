"""Read images of which some cannot be decoded: those are told, and the others go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.datasets.split import Bad, BadImage, Split
from pipelines.loader import Loader


def readable_batches(
    open_loader: Callable[[Split], Loader],
    split: Split,
    indices: NDArray[np.int64],
    size: int,
    bad: list[Bad],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images (B, 3, S, S) and their indices (B,) int64 in the split, `size` at a time.

    `open_loader` opens a loader to validate on a split in batches of `size`. What cannot be decoded
    is added to `bad`, and missing in its batch; all other batches are what they would be without.
    """
    parts = deque([indices])  # each is read by a loader of its own
    while parts:
        part, done = parts.popleft(), 0
        if not len(part):
            continue
        try:
            with closing(open_loader(split.take(part))) as loader:
                for images, labels in loader:
                    yield images, torch.from_numpy(part[done : done + len(labels)])
                    done += len(labels)
        except BadImage as error:
            at = next(i for i in range(done, len(part)) if split.files[part[i]] == error.file)
            bad.append((str(error.file), error.reason))
            first = at // size * size
            batch = np.delete(part[first : first + size], at - first)
            parts.extendleft((part[first + size :], batch, part[done:first]))
