"""The labels of ImageNet's validation images: of the devkit, a label file or Kaggle's table."""

from __future__ import annotations

import io
import re
from importlib import import_module
from pathlib import Path

from pipelines.errors import UserError
from pipelines.files import read_text
from pipelines.prepare import archives

WNID = re.compile(r"n\d{8}", re.ASCII)
VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.ASCII)
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"
KAGGLE = "LOC_val_solution.csv"


def read_labels(folder: Path, label_file: Path | None) -> dict[int, str]:
    """Read the labels: number of a validation image (from 1) -> WNID.

    `label_file` None: those of the devkit, or of Kaggle's table, in the folder or one above it.
    Raises UserError naming the file.
    """
    if label_file is not None:
        return read_label_file(label_file)
    if (folder / DEVKIT).is_file():
        return read_devkit(folder / DEVKIT)
    for above in (folder, *folder.resolve().parents[:3]):
        if (above / KAGGLE).is_file():
            return read_label_file(above / KAGGLE)
    raise UserError(
        f"{folder} has neither {DEVKIT} nor {KAGGLE}: put it there or give --val-labels FILE"
    )


def read_devkit(path: Path) -> dict[int, str]:
    """Read the devkit, ILSVRC2012_devkit_t12.tar.gz: number of a validation image (from 1) -> WNID.

    Raises UserError where it is damaged or scipy, which reads its MATLAB file, is missing.
    """
    found: dict[str, bytes] = {}
    with archives.open_gzip(path) as archive:
        for member in archives.read_members(archive, path.name):
            for wanted in (GROUND_TRUTH, META):
                if f"/{member.name}".endswith(f"/{wanted}"):
                    found[wanted] = archives.read_whole(archive, path.name, member)
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
    """Read the devkit's meta.mat: ILSVRC2012_ID -> WNID."""
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
    """Read lines `WNID` or `FILENAME WNID`: number of a validation image (from 1) -> WNID.

    Lines with a WNID alone are in the order of the images. Kaggle's table has a heading and rows
    `ILSVRC2012_val_00000001,WNID BOX...`. UserError names the first wrong line.
    """
    labels: dict[int, str] = {}
    lines = read_lines(path, "--val-labels")
    table = bool(lines) and lines[0].lower().startswith("imageid,")
    for number, line in enumerate(lines[1:] if table else lines, start=1 + table):
        if table:
            name, _, boxes = line.partition(",")
            line = " ".join([f"{name}.JPEG", *boxes.split()[:1]])
        *names, wnid = line.split() or [""]
        image = VAL_IMAGE.fullmatch(names[0]) if len(names) == 1 else None
        if not WNID.fullmatch(wnid) or len(names) > 1 or (names and image is None):
            raise UserError(
                f"--val-labels: {path}:{number}: n01440764 or ILSVRC2012_val_00000001.JPEG "
                f"n01440764 is expected, not {line[:80]!r}"
            )
        image_number = int(image[1]) if image else number
        if labels.setdefault(image_number, wnid) != wnid:
            raise UserError(f"--val-labels: {path}:{number}: image {image_number} has two classes")
    return labels


def read_blacklist(path: Path) -> frozenset[int]:
    """Read the numbers (from 1) of the validation images to leave out, one a line."""
    lines = read_lines(path, "--blacklist")
    for number, line in enumerate(lines, start=1):
        if not re.fullmatch(r"[0-9]{1,8}", line):
            raise UserError(
                f"--blacklist: {path}:{number}: the number of a validation image is expected, "
                f"not {line[:80]!r}"
            )
    return frozenset(map(int, lines))


def read_lines(path: Path, flag: str) -> list[str]:
    """Read the stripped lines of a file, without the empty ones at its end."""
    try:
        lines = read_text(path).rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}: cannot read {path}: {error}") from None
    return [line.strip() for line in lines]
