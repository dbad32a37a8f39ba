"""What the GPU suite has found so far: as data, as Markdown and as a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from markupsafe import Markup

from benchmarks.common.measuring import markdown
from benchmarks.common.statistics import shown
from benchmarks.gpu_suite.parts import TESTS
from benchmarks.gpu_suite.plots import figures
from fastimagenet.report.figures import svg
from pipelines import pages
from pipelines.files import Row, write_object, write_text
from pipelines.formats import NO_BREAK, duration, number, percent, plain

REHEARSAL = "CPU rehearsal at tiny sizes: no figure here is a GPU's, and none is to be quoted."


@dataclass(frozen=True, kw_only=True)
class PartResult:
    """One part."""

    title: str
    status: str
    """ "done", "failed" or "skipped"."""
    device: str
    """What its figures were measured on; "" where it did not run."""
    rehearsal: bool
    """Whether that was a CPU in place of a GPU."""
    command: str = ""
    seconds: float = 0.0
    limit_seconds: float = 0.0
    reason: str = ""
    """Of what was not done, in one line."""
    log_tail: str = ""
    """Of a part that failed."""
    figures: Row


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
    tables = sections(data)
    write_text(paths[1], text(result, tables))
    write_text(paths[2], page(result, data, tables))
    return paths


def title(result: Result) -> str:
    return f"{'CPU rehearsal of the' if result.rehearsal else 'The'} GPU suite"


def facts(result: Result) -> str:
    """Tell in one line what it ran on."""
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    load = f"load average {result.load_average:.1f} before"
    return f"{result.hardware}; {versions}; {result.date}; {load}."


def text(result: Result, tables: list[Section]) -> str:
    """Format the tables as Markdown."""
    lines = [f"# {title(result)}", ""]
    lines += [f"**{result.rehearsal}**", ""] if result.rehearsal else []
    lines += [facts(result), "", f"    {result.command}", ""]
    for section in tables:
        lines += [f"## {section.title}", ""]
        lines += [markdown([section.header, *section.rows]), ""] if section.rows else []
        lines += [section.note, ""] if section.note else []
    return "\n".join(lines).replace(NO_BREAK, " ")


def page(result: Result, data: Row, tables: list[Section]) -> str:
    """Render the tables and the plots on one page."""
    drawn = figures(data)
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
        sections=tables,
        figures=[
            (heading, Markup(svg(figure, f"plot{index}")))
            for index, (heading, figure) in enumerate(drawn.items())
        ],
        failures=failures,
    )


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table with its heading, and a line below it."""

    title: str
    header: tuple[str, ...] = ()
    rows: Sequence[tuple[str, ...]] = ()
    note: str = ""


def sections(result: Row) -> list[Section]:
    """Make a table of the parts and what became of them, then one for each that has figures."""
    found = [overview(result)]
    for name, part in result["parts"].items():
        if part["figures"]:
            header, rows, note = TABLES[name](part["figures"])
            mark = " (CPU rehearsal)" if part["rehearsal"] else ""
            measured = f"On {part['device']}{mark}. {note}"
            title = f"{part['title']}{mark}"
            found.append(Section(title=title, header=header, rows=rows, note=measured.rstrip()))
    return found


def overview(result: Row) -> Section:
    """Tell what became of each part."""
    rows = [
        (
            name,
            part["status"] + (" (CPU rehearsal)" if part["rehearsal"] else ""),
            part["device"] or "-",
            f"{part['seconds']:.0f} s" if part["seconds"] else "-",
            part["reason"].replace("|", "/") or "-",
        )
        for name, part in result["parts"].items()
    ]
    seconds = sum(part["seconds"] for part in result["parts"].values())
    header = ("part", "status", "measured on", "time", "why not")
    return Section(title="Parts", header=header, rows=rows, note=f"{seconds:.0f} s in all.")


Table = tuple[tuple[str, ...], Sequence[tuple[str, ...]], str]


def ceilings(figures: Row) -> Table:
    rows = [
        (
            f"matrix product, {figures['dtype']}",
            shown(figures["matmul_flops_per_sec"], 1e-12, " TFLOP/s"),
        ),
        ("copy, read and written", shown(figures["copy_bytes_per_sec"], 1e-9, " GB/s")),
    ]
    names = ("name", "memory_bytes", "multiprocessors", "compute_capability", "cuda", "cudnn")
    rows += [(name.replace("_", " "), str(figures[name])) for name in names if name in figures]
    note = f"Means with 95 % intervals over {figures['rounds']} turns."
    return ("ceiling", "measured"), rows, note


def tests(figures: Row) -> Table:
    rows = [(outcome, str(count)) for outcome, count in figures["counts"].items()]
    notes = [
        f"{title}: {'; '.join(figures[key])}."
        for title, key in (("Not passed", "not_passed"), ("Skipped", "skipped"))
        if figures[key]
    ]
    return ("outcome", "tests"), rows, " ".join(notes)


def run(figures: Row) -> Table:
    """Format a finished run, or the accuracies of one that was not."""
    if "top1" not in figures:
        rows = [(str(row["epoch"] + 1), duration(row["train_seconds"]), percent(row["top1"]))
                for row in figures["evaluated"]]  # fmt: skip
        return ("epochs done", "train time", "top-1"), rows, "The run did not end."
    target = figures["target"]
    reached = figures["time_to_target_seconds"]
    mark = "no target" if target is None else f"{target['metric']} {percent(target['value'])}: "
    if target is not None:
        mark += "not reached" if reached is None else duration(reached)
    header = ("top-1", "with TTA", "train time", "wall time", "images/s", "epochs", "target")
    row = (
        percent(figures["top1"]),
        percent(figures["tta_top1"]),
        duration(figures["train_seconds"]),
        duration(figures["wall_seconds"]),
        number(figures["images_per_sec"], ",.0f"),
        str(figures["epochs"]),
        mark,
    )
    about = f"{figures['dataset']}, {figures['precision']}, back end {figures['backend']}, n = 1."
    return header, [row], about


def lr_finder(figures: Row) -> Table:
    header = ("weight decay", "iterations", "ended", "max_lr suggested", "time")
    rows = [
        (
            plain(sweep["weight_decay"]),
            str(figures["num_it"]),
            str(sweep.get("ended", "-")),
            plain(figures["max_lr"], 3),
            duration(figures["seconds"]),
        )
        for sweep in figures["sweeps"]
    ]
    return header, rows, f"Recipe {figures['recipe']}, {figures['image_size']} px."


def stall(figures: Row) -> Table:
    header = ("phase", "loader", "model", "both", "stall", "data wait", "FLOP/s", "memory")
    rows = [
        (
            f"{phase['image_size']} px x {phase['batch_size']}",
            *(shown(phase[f"{part}_images_per_sec"]) for part in ("loader", "model", "both")),
            shown(phase["stall"], 100, " %"),
            percent(phase["data_wait_share"]["mean"], 1),
            percent(phase["share_of_matmul"], 0) + " of the ceiling",
            gibibytes(phase["rates"]["memory_bytes"]),
        )
        for phase in figures["phases"]
    ]
    note = f"Images/s with 95 % intervals over {figures['rounds']} rounds of {figures['seconds']:g}"
    note += f" s; {figures['images']:,} photographs, back end {figures['backend']}, "
    return header, rows, f"{note}{figures['precision']}. stall = 1 - both / model."


def decode(figures: Row) -> Table:
    header = ("size", "threads", "hardware share", "prefetch", "preallocated", "images/s")
    rows = [
        (
            f"{rate['image_size']} px",
            str(rate["threads"]),
            plain(rate["settings"]["hw_decoder_load"]) if figures["decoder"] == "mixed" else "-",
            str(rate["settings"]["prefetch"]),
            "yes" if rate["settings"]["width_hint"] else "no",
            shown(rate["images_per_sec"]) if rate["images_per_sec"] else rate["error"],
        )
        for rate in figures["rates"]
    ]
    note = f"{figures['decoder']} decoding of {figures['photographs']:,} photographs as "
    note += f"{figures['entries']:,} entries, from the page cache."
    cut = " The time ended before the sweep." if figures["cut_by_limit"] else ""
    return header, rows, note + cut


def steps(figures: Row) -> Table:
    header = ("size", "variant", "batch", "images/s", "measured / floor", "peak memory")
    rows = []
    for rate in sorted(figures["rates"], key=lambda rate: rate["image_size"]):
        floor = rate["floor_images_per_sec"]
        share = rate["images_per_sec"]["mean"] / floor if floor else None
        rows.append(
            (
                f"{rate['image_size']} px",
                rate["variant"],
                str(rate["batch_size"]),
                rate["error"] or shown(rate["images_per_sec"]),
                "-" if rate["error"] else percent(share, 0),
                "-" if rate["error"] else gibibytes(rate["peak_memory_bytes"]),
            )
        )
    note = "Forward, backward and update on a synthetic batch that stays on the device."
    cut = " The time ended before the sweep." if figures["cut_by_limit"] else ""
    return header, rows, note + cut


TABLES: dict[str, Callable[[Row], Table]] = {
    "ceilings": ceilings,
    **{f"tests-{name}": tests for name in TESTS},
    "cifar10": run,
    "cifar10-speed": run,
    "lr-finder": lr_finder,
    "stall": stall,
    "decode": decode,
    "steps": steps,
}


def gibibytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
