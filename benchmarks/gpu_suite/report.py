"""What the GPU suite has found so far: as data, as Markdown and as a page."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.common import tables
from benchmarks.common.measuring import document, markdown
from benchmarks.common.plots import svgs
from benchmarks.common.statistics import shown
from benchmarks.common.tables import Table
from benchmarks.gpu_suite.parts import STEPS, TESTS, step_rates
from benchmarks.gpu_suite.plots import figures
from pipelines import pages
from pipelines.files import Row, write_object, write_text
from pipelines.formats import duration, number, percent, plain

REHEARSAL = "CPU rehearsal at tiny sizes: no figure here is a GPU's, and none is to be quoted."


@dataclass(frozen=True, kw_only=True)
class PartResult:
    """One part."""

    title: str
    status: str
    """ "done", "failed" or "skipped"."""
    device: str = ""
    """What its figures were measured on; "" where it did not run."""
    rehearsal: bool = False
    """Whether that was a CPU in place of a GPU."""
    command: str = ""
    seconds: float = 0.0
    limit_seconds: float = 0.0
    reason: str = ""
    """Of what was not done, in one line."""
    log_tail: str = ""
    """Of a part that failed."""
    figures: Row = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The whole suite; `parts` grows as it runs."""

    command: str
    date: str
    device: str
    """ "cuda" or "cpu"."""
    hardware: str
    rehearsal: str
    """REHEARSAL on a CPU, "" on a GPU."""
    versions: dict[str, str]
    load_average: float
    """Of the machine at the start, over the minute before: well above 0, others ran too."""
    data: Row
    parts: dict[str, PartResult]

    @property
    def name(self) -> str:
        """Of the files: date, hardware and what ran, as in benchmarks/results."""
        machine = self.hardware.partition(",")[0].lower().replace(" x ", "x-", 1)
        words = re.sub(r"[^a-z0-9]+", "-", machine).strip("-")
        return f"{self.date}-{words}-gpu-suite{'-rehearsal' if self.rehearsal else ''}"

    @property
    def failed(self) -> list[str]:
        """The names of the parts that failed."""
        return [name for name, part in self.parts.items() if part.status == "failed"]


def write_results(result: Result, folder: Path) -> list[Path]:
    """Write NAME.json, .md and .html, the figures first; returns their paths."""
    data = asdict(result)
    paths = [folder / f"{result.name}{suffix}" for suffix in (".json", ".md", ".html")]
    write_object(paths[0], data)
    parts = sections(data)
    write_text(paths[1], text(result, parts))
    write_text(paths[2], page(result, data, parts))
    return paths


def title(result: Result) -> str:
    return f"{'CPU rehearsal of the' if result.rehearsal else 'The'} GPU suite"


def facts(result: Result) -> str:
    """Tell in one line what it ran on."""
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    load = f"load average {result.load_average:.1f} before"
    return f"{result.hardware}; {versions}; {result.date}; {load}."


def text(result: Result, parts: list[Section]) -> str:
    """Format the tables as Markdown."""
    blocks = [f"**{result.rehearsal}**"] if result.rehearsal else []
    blocks += [facts(result), f"    {result.command}"]
    for section in parts:
        blocks += [f"## {section.title}", markdown(section.rows) if section.rows[1:] else ""]
        blocks.append(section.note)
    return document(f"# {title(result)}", *blocks)


def page(result: Result, data: Row, parts: list[Section]) -> str:
    """Render the tables and the plots on one page."""
    failures = [
        (part["title"], part["reason"], part["log_tail"])
        for part in data["parts"].values()
        if part["status"] == "failed"
    ]
    return pages.render(
        Path(__file__).with_name("gpu_suite.html.jinja"),
        title=title(result),
        rehearsal=result.rehearsal,
        facts=facts(result),
        command=result.command,
        sections=parts,
        figures=svgs(figures(data)),
        failures=failures,
    )


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table with its heading, and a line below it."""

    title: str
    rows: Table
    """The header first."""
    note: str


def sections(result: Row) -> list[Section]:
    """Make a table of the parts and what became of them, then one for each that has figures."""
    found = [overview(result)]
    parts = {name: part for name, part in result["parts"].items() if part["figures"]}
    own = {name: part["figures"] for name, part in parts.items()}
    if ran := [name for name in STEPS if name in parts]:  # one table of them all
        rates = {"title": "ResNet-50's training step", "figures": {"rates": step_rates(own)}}
        parts[ran[0]] = parts[ran[0]] | rates  # the page's figures have each part's own
    for name, part in parts.items():
        if name not in ran[1:]:
            rows, note = TABLES[name](part["figures"])
            mark = " (CPU rehearsal)" if part["rehearsal"] else ""
            measured = f"On {part['device']}{mark}. {note}".rstrip()
            found.append(Section(title=f"{part['title']}{mark}", rows=rows, note=measured))
    return found


def overview(result: Row) -> Section:
    """Tell what became of each part."""
    rows: Table = [("part", "status", "measured on", "time", "why not")]
    for name, part in result["parts"].items():
        status = part["status"] + (" (CPU rehearsal)" if part["rehearsal"] else "")
        time = f"{part['seconds']:.0f} s" if part["seconds"] else "-"
        reason = part["reason"].replace("|", "/") or "-"
        rows.append((name, status, part["device"] or "-", time, reason))
    seconds = sum(part["seconds"] for part in result["parts"].values())
    return Section(title="Parts", rows=rows, note=f"{seconds:.0f} s in all.")


Shown = tuple[Table, str]
"""A table, and a note below it."""


def ceilings(figures: Row) -> Shown:
    product = shown(figures["matmul_flops_per_sec"], 1e-12, " TFLOP/s")
    rows: Table = [
        ("ceiling", "measured"),
        (f"matrix product, {figures['dtype']}", product),
        ("copy, read and written", shown(figures["copy_bytes_per_sec"], 1e-9, " GB/s")),
    ]
    names = (
        *("name", "memory_bytes", "multiprocessors", "compute_capability", "cuda", "cudnn"),
        *("libnvcuvid", "nvjpeg", "jpeg_engines", "decodes"),
    )
    rows += [(name.replace("_", " "), str(figures[name])) for name in names if name in figures]
    return rows, f"Means with 95 % intervals over {figures['rounds']} turns."


def parity(figures: Row) -> Shown:
    rows: Table = [("split", "px", "mean", "99 %", "max", "bound of the mean", "images")]
    for one in figures["comparisons"]:
        cells = (f"{one[name]:.3f}" for name in ("mean", "percentile_99", "max"))
        bound, images = f"{one['bound_mean']:g}", str(one["images"])
        rows.append((one["split"], str(one["image_size"]), *cells, bound, images))
    verdict = "Within" if figures["within"] else "Outside"
    return rows, f"{verdict} the bounds; differences of 255."


def tests(figures: Row) -> Shown:
    rows = [(outcome, str(count)) for outcome, count in figures["counts"].items()]
    notes = [
        f"{title}: {'; '.join(figures[key])}."
        for title, key in (("Not passed", "not_passed"), ("Skipped", "skipped"))
        if figures[key]
    ]
    return [("outcome", "tests"), *rows], " ".join(notes)


WARM = "Where an earlier part has used its process, its times lack imports and the start of CUDA."


def run(figures: Row) -> Shown:
    """Format a finished run, or the accuracies of one that was not."""
    if "top1" not in figures:
        rows = [(str(row["epoch"] + 1), duration(row["train_seconds"]), percent(row["top1"]))
                for row in figures["evaluated"]]  # fmt: skip
        return [("epochs done", "train time", "top-1"), *rows], "The run did not end."
    target, reached = figures["target"], figures["time_to_target_seconds"]
    mark = "no target"
    if target is not None:
        outcome = "not reached" if reached is None else duration(reached)
        mark = f"{target['metric']} {percent(target['value'])}: {outcome}"
    header = ("top-1", "with TTA", "train time", "wall time", "images/s", "epochs", "target")
    row = (
        *(percent(figures[name]) for name in ("top1", "tta_top1")),
        *(duration(figures[name]) for name in ("train_seconds", "wall_seconds")),
        number(figures["images_per_sec"], ",.0f"),
        str(figures["epochs"]),
        mark,
    )
    about = f"{figures['dataset']}, {figures['precision']}, back end {figures['backend']}, n = 1."
    return [header, row], f"{about} {WARM}"


def lr_finder(figures: Row) -> Shown:
    rows: Table = [("weight decay", "iterations", "ended", "max_lr suggested", "time")]
    for sweep in figures["sweeps"]:
        ended, seconds = str(sweep.get("ended", "-")), duration(figures["seconds"])
        cells = (str(figures["num_it"]), ended, plain(figures["max_lr"], 3), seconds)
        rows.append((plain(sweep["weight_decay"]), *cells))
    return rows, f"Recipe {figures['recipe']}, {figures['image_size']} px. {WARM}"


def stall(figures: Row) -> Shown:
    note = f"Images/s with 95 % intervals over {figures['rounds']} rounds of {figures['seconds']:g}"
    note += f" s; {figures['images']:,} names of photographs, back end {figures['backend']}, "
    note += f"{figures['precision']}. stall = 1 - both / model. Percentages: of the ceilings."
    return tables.phases(figures), note


def decode(figures: Row) -> Shown:
    rows = [tables.decode_row(rate, figures["decoder"]) for rate in figures["rates"]]
    note = f"{figures['decoder']} decoding of {figures['photographs']:,} photographs as "
    note += f"{figures['entries']:,} entries, from the page cache."
    note += " The time ended before the sweep." if figures["cut_by_limit"] else ""
    return [tables.DECODE_HEADER, *rows], note


def steps(figures: Row) -> Shown:
    note = "Forward, backward and update on a synthetic batch that stays on the device."
    return tables.steps(figures["rates"]), note


TABLES: dict[str, Callable[[Row], Shown]] = {
    "ceilings": ceilings,
    "parity": parity,
    **dict.fromkeys(STEPS, steps),
    **dict.fromkeys(TESTS, tests),
    "cifar10": run,
    "cifar10-speed": run,
    "lr-finder": lr_finder,
    "stall": stall,
    "decode": decode,
}
