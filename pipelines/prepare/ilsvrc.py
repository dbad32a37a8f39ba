"""What is known of the ILSVRC-2012 validation images: their classes and the blacklist."""

from __future__ import annotations

import io
import re
from importlib import import_module
from pathlib import Path

from pipelines.errors import UserError
from pipelines.prepare.tar import open_gzip, read_bytes, read_members

WNID = re.compile(r"n\d{8}", re.ASCII)
VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.ASCII)
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"
LIMIT = 64 << 20
"""Bytes that a file of the devkit may have; the largest that is read has about 0.2 MB."""


def read_devkit(path: Path) -> dict[int, str]:
    """Number of a validation image (from 1) -> WNID, from ILSVRC2012_devkit_t12.tar.gz.

    Raises UserError where it is damaged or scipy, which reads its MATLAB file, is missing.
    """
    found: dict[str, bytes] = {}
    with open_gzip(path) as archive:
        for member in read_members(archive, path.name):
            for wanted in (GROUND_TRUTH, META):
                if f"/{member.name}".endswith(f"/{wanted}"):
                    if member.size > LIMIT:
                        raise UserError(f"{path}: {member.name!r} is refused: over {LIMIT:,} bytes")
                    found[wanted] = b"".join(read_bytes(archive, path.name, member))
    for wanted in (GROUND_TRUTH, META):
        if wanted not in found:
            raise UserError(f"{path} has no {wanted}: download it again or give --val-labels FILE")
    wnids = read_meta(found[META], path)
    labels = {}
    for number, line in enumerate(found[GROUND_TRUTH].decode("ascii", "replace").split(), start=1):
        if not line.isdigit() or int(line) not in wnids:
            raise UserError(f"{path}: {GROUND_TRUTH}:{number}: no class has the number {line!r}")
        labels[number] = wnids[int(line)]
    return labels


def read_meta(content: bytes, path: Path) -> dict[int, str]:
    """ILSVRC2012_ID -> WNID from the devkit's meta.mat."""
    try:
        loadmat = import_module("scipy.io").loadmat
    except ImportError:
        raise UserError(
            f"{path.name} has a MATLAB file, which scipy reads: pip install scipy, or give "
            "--val-labels FILE"
        ) from None
    try:
        synsets = loadmat(io.BytesIO(content), squeeze_me=True)["synsets"]
        wnids = {
            int(number): str(wnid)
            for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        }
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path}: {META} cannot be read ({text}): download it again") from None
    for wnid in wnids.values():
        if not WNID.fullmatch(wnid):
            raise UserError(f"{path}: {META} has a class {wnid!r}: n and eight digits are expected")
    return wnids


def read_label_file(path: Path) -> dict[int, str]:
    """Number of a validation image (from 1) -> WNID, from lines `WNID` or `FILENAME WNID`.

    Lines with a WNID alone are in the order of the images. UserError names the first wrong line.
    """
    labels: dict[int, str] = {}
    for number, line in enumerate(read_lines(path, "--val-labels"), start=1):
        *names, wnid = line.split() or [""]
        image = VAL_IMAGE.fullmatch(names[0]) if len(names) == 1 else None
        if not WNID.fullmatch(wnid) or len(names) > 1 or (names and image is None):
            raise UserError(
                f"--val-labels: {path}:{number}: n01440764 or ILSVRC2012_val_00000001.JPEG "
                f"n01440764 is expected, not {line[:80]!r}"
            )
        place = int(image[1]) if image else number
        if labels.setdefault(place, wnid) != wnid:
            raise UserError(f"--val-labels: {path}:{number}: image {place} has two classes")
    return labels


def read_blacklist(path: Path) -> frozenset[int]:
    """Numbers (from 1) of the validation images to leave out, one a line."""
    lines = read_lines(path, "--blacklist")
    for number, line in enumerate(lines, start=1):
        if not re.fullmatch(r"[0-9]{1,8}", line):
            raise UserError(
                f"--blacklist: {path}:{number}: the number of a validation image is expected, "
                f"not {line[:80]!r}"
            )
    return frozenset(map(int, lines))


def read_lines(path: Path, flag: str) -> list[str]:
    """Lines without the spaces around them; empty ones at the end are left out."""
    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}: cannot read {path}: {error}") from None
    return [line.strip() for line in lines]
