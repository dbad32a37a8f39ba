"""DAWNBench entries: written from the files of a run, and checked by the contest's rules.

The rules are those of https://github.com/stanford-futuredata/dawn-bench-entries.
"""

from __future__ import annotations

import math
import re
import unicodedata
from datetime import date
from pathlib import Path

from fastimagenet.report.run import row_at_target, rows_of
from fastimagenet.training.recorder import read_rows
from pipelines.errors import UserError
from pipelines.files import Row, read_object, write_object, write_text

REQUIRED = ("version", "author", "authorEmail", "framework", "model", "hardware", "timestamp")
TRAIN_CLOCK = (
    "Training time runs from before the data are opened and the model is built to the end of the "
    "epoch. It excludes evaluation, checkpoints and the warm-up of the compiler."
)
CLOCKS = {
    "train": TRAIN_CLOCK,
    "train_eval": "The training clock and all evaluations up to that epoch, its own included.",
    "train_compile": "The training clock and the warm-up of the compiler.",
    "train_eval_compile": "The training clock, evaluations and the warm-up of the compiler.",
    "wall": "Everything since the start of the command, checkpoints included.",
}
"""The clocks by which the time to a target can be given, and what each counts."""


def clocks_at_target(
    rows: list[Row], metric: str, value: float, compile_seconds: float
) -> dict[str, float] | None:
    """Return the seconds to the target by each of CLOCKS, from epoch rows; None: not reached.

    `compile_seconds` is that of summary.json: compilation comes before the first epoch.
    """
    row = row_at_target(rows, metric, value)
    if row is None:
        return None
    train, evaluation = float(row["train_seconds"]), float(row["eval_seconds"])
    return {
        "train": train,
        "train_eval": train + evaluation,
        "train_compile": train + compile_seconds,
        "train_eval_compile": train + evaluation + compile_seconds,
        "wall": float(row["time_seconds"]),
    }


MISC = {
    **{key: key for key in ("dataset", "recipe", "pretrained", "command", "seed")},
    **{key: key for key in ("precision", "backend")},
    "versions": "versions",
    "worldSize": "world_size",
    "trainSeconds": "train_seconds",
    "evaluationSeconds": "eval_seconds",
    "wallSeconds": "wall_seconds",
    "timeSplitSeconds": "time_split_seconds",
}
"""Key of an entry's `misc` -> field of summary.json."""


def write_entry(run_dir: Path) -> list[Path]:
    """Write `run_dir/dawnbench/*.json` and `*.tsv` and return both paths.

    Returns [] if no epoch has been evaluated yet. Accuracies are in percent and without TTA, which
    is reported in `misc` alone. Raises UserError, and writes nothing, where the entry would not be
    valid.
    """
    summary = read_object(run_dir / "summary.json")
    rows = [r for r in rows_of("epoch", read_rows(run_dir)) if r.get("top1") is not None]
    if not rows:
        return []
    entry = _entry(summary)
    columns = {"top1Accuracy": "top1"}
    if summary.get("dataset") != "CIFAR10" and rows[-1].get("top5") is not None:
        columns["top5Accuracy"] = "top5"
    lines = ["\t".join(("epoch", "hours", *columns))]
    for row in rows:
        hours = f"{row['train_seconds'] / 3600:.8f}"
        accuracies = (f"{100 * row[key]:.4f}" for key in columns.values())
        lines.append("\t".join((str(row["epoch"] + 1), hours, *accuracies)))
    table = "\n".join(lines) + "\n"
    _check_json(entry, f"{run_dir}: DAWNBench entry")
    _check_table(table, f"{run_dir}: DAWNBench table", "usedBlacklist" in entry)

    stem = "_".join(_file_part(entry[key]) for key in ("author", "model", "hardware", "framework"))
    json_path, tsv_path = (run_dir / "dawnbench" / f"{stem}.{kind}" for kind in ("json", "tsv"))
    write_object(json_path, entry)
    write_text(tsv_path, table)
    return [json_path, tsv_path]


def _entry(summary: Row) -> Row:
    entry = {
        "version": "v1.0",
        "author": summary.get("author"),
        "authorEmail": summary.get("author_email"),
        **{key: summary.get(key) for key in ("framework", "model", "hardware")},
        "timestamp": str(summary.get("started"))[:10],
    }
    if summary.get("cost_per_hour") is not None:
        entry["costPerHour"] = summary["cost_per_hour"]
    if summary.get("dataset") == "ImageNet":
        entry["usedBlacklist"] = summary.get("used_blacklist", True)
    misc = {key: summary.get(field) for key, field in MISC.items()}
    misc["clock"] = TRAIN_CLOCK
    misc["ttaTop1Accuracy"] = _percent(summary.get("tta_top1"))
    misc["ttaTop5Accuracy"] = _percent(summary.get("tta_top5"))
    entry["misc"] = {key: value for key, value in misc.items() if value is not None}
    return entry


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else round(100 * fraction, 4)


def _file_part(text: str) -> str:
    """Turn `text` into a part of a file name: ASCII, no underscore, at most 48 characters."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", plain).strip("-.")[:48] or "unnamed"


def check_entry(json_path: Path, tsv_path: Path) -> list[dict[str, float]]:
    """Return an entry's rows. Raises UserError with what is wrong by the contest's rules."""
    if (json_path.suffix, tsv_path.suffix) != (".json", ".tsv") or json_path.stem != tsv_path.stem:
        raise UserError(f"{json_path.name}, {tsv_path.name}: should be NAME.json and NAME.tsv")
    parts = json_path.stem.split("_")
    if len(parts) < 4 or not all(parts):
        raise UserError(f"{json_path.name}: should be [author]_[model]_[hardware]_[framework].json")
    entry = read_object(json_path)
    _check_json(entry, str(json_path))
    try:
        table = tsv_path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{tsv_path}: cannot be read as text: {error}") from None
    return _check_table(table, str(tsv_path), "usedBlacklist" in entry)


def result_hours(json_path: Path, tsv_path: Path, metric: str, value: float) -> float:
    """Return an entry's result as the contest reads it: the hours of the first row at the target.

    The target: `metric`, "top1" or "top5", of at least `value`, a fraction. Raises UserError with
    what is wrong with the entry, or that it does not reach the target.
    """
    rows, column = check_entry(json_path, tsv_path), f"{metric}Accuracy"
    if column not in rows[0]:
        raise UserError(f"{tsv_path}: one column {column} is required for the target")
    for row in rows:
        if row[column] / 100 >= value:
            return row["hours"]
    raise UserError(f"{tsv_path}: no row has {column} of {100 * value:g} or more")


def _check_json(entry: Row, where: str) -> None:
    for key in REQUIRED:
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise UserError(f"{where}: {key} is required and should be text that is not empty")
    if entry["version"] != "v1.0":
        raise UserError(f"{where}: version should be v1.0, not {entry['version']}")
    try:
        if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", entry["timestamp"]):
            raise ValueError
        date.fromisoformat(entry["timestamp"])
    except ValueError:
        wrong = entry["timestamp"]
        raise UserError(f"{where}: timestamp should be a date yyyy-mm-dd, not {wrong}") from None
    cost = entry.get("costPerHour", 0)
    if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 <= cost < math.inf:
        raise UserError(f"{where}: costPerHour should be a number of US dollars, not {cost!r}")
    if not isinstance(entry.get("misc", {}), dict):
        raise UserError(f"{where}: misc should be an object {{}}")
    if not isinstance(entry.get("usedBlacklist", True), bool):
        raise UserError(f"{where}: usedBlacklist should be true or false")


def _check_table(text: str, where: str, imagenet: bool) -> list[dict[str, float]]:
    """Check and return the rows of a table, whose columns may be in any order."""
    header, *lines = [line.split("\t") for line in text.rstrip().splitlines()] or [[]]
    needed = ["epoch", "hours", "top1Accuracy", *(["top5Accuracy"] if imagenet else [])]
    for name in needed:
        if header.count(name) != 1:
            raise UserError(f"{where}: one column {name} is required; the header has {header}")
    if not lines:
        raise UserError(f"{where}: at least one row, one for each epoch, is required")
    rows = [{"epoch": -math.inf, "hours": -math.inf}]
    for number, fields in enumerate(lines, start=2):
        if len(fields) != len(header):
            raise UserError(f"{where}:{number}: {len(header)} fields expected, not {len(fields)}")
        row: dict[str, float] = {}
        for name, field in zip(header, fields, strict=True):
            try:
                value = row[name] = int(field) if name == "epoch" else float(field)
            except ValueError:
                raise UserError(f"{where}:{number}: {name} is not a number: {field!r}") from None
            if name.endswith("Accuracy") and not 0 <= value <= 100:
                raise UserError(f"{where}:{number}: {name} should be in 0..100, not {field}")
            if name in rows[0] and (value < 0 or not rows[-1][name] < value < math.inf):
                raise UserError(f"{where}:{number}: {name} should rise row by row: {field}")
        rows.append(row)
    return rows[1:]
