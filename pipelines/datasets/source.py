"""Where the images of a split are listed: class folders or shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipelines.datasets.folders import SPLIT_FOLDERS, find_split, folder_stamps, list_folder
from pipelines.datasets.images import Listing
from pipelines.datasets.shards import has_shards, list_shards, shard_stamps


@dataclass(frozen=True)
class Source:
    """A split of a data folder."""

    folder: Path
    """That which holds the classes, or the shards."""
    place: Path
    """What errors call it, and the index is named after."""
    stamps: Callable[[], list[int]]
    """What changes with the images that are listed."""
    listing: Callable[[], Listing]
    elsewhere: str
    """What the paths of the other split's images begin with; empty without one."""

    @property
    def split_name(self) -> str:
        """The name of the split's folder, such as "test"."""
        return self.place.name


def find_source(root: Path, split: str) -> Source:
    """Find the images of a split. Raises UserError where the data folder has none."""
    other = "val" if split == "train" else "train"
    if has_shards(root):
        stamps, listing = partial(shard_stamps, root, split), partial(list_shards, root, split)
        return Source(root, root / split, stamps, listing, f"{root / other}-")
    folder = find_split(root, split)
    others = [f"{root / name}/" for name in SPLIT_FOLDERS[other] if (root / name).is_dir()]
    stamps, listing = partial(folder_stamps, folder), partial(list_folder, folder)
    return Source(folder, folder, stamps, listing, others[0] if others else "")
