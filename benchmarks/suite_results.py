"""What the GPU suite has found so far: as data, as Markdown and as a page."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from markupsafe import Markup

from benchmarks import suite_plots
from benchmarks.run_table import markdown
from benchmarks.suite_tables import Section, sections
from fastimagenet.report.figures import svg
from pipelines import pages
from pipelines.files import Row, write_object, write_text
from pipelines.formats import NO_BREAK

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
    """NAME.json, .md and .html, each whole; their paths. The figures come first."""
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
    """What it ran on, in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    load = f"load average {result.load_average:.1f} before"
    return f"{result.hardware}; {versions}; {result.date}; {load}."


def text(result: Result, tables: list[Section]) -> str:
    """The tables as Markdown."""
    lines = [f"# {title(result)}", ""]
    lines += [f"**{result.rehearsal}**", ""] if result.rehearsal else []
    lines += [facts(result), "", f"    {result.command}", ""]
    for section in tables:
        lines += [f"## {section.title}", ""]
        lines += [markdown([section.header, *section.rows]), ""] if section.rows else []
        lines += [section.note, ""] if section.note else []
    return "\n".join(lines).replace(NO_BREAK, " ")


def page(result: Result, data: Row, tables: list[Section]) -> str:
    """The tables and the plots on one page."""
    drawn = suite_plots.figures(data)
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
