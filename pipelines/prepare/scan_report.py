"""What a scan prints at its end."""

from __future__ import annotations

import argparse
import os
import shlex

from pipelines.prepare.findings import DAMAGE, NOTES, Findings

SHOWN = 3
"""Paths that stand for a kind."""


def describe(findings: Findings, args: argparse.Namespace, num_read: int, seconds: float) -> str:
    """The findings as text: damage, notes, duplicates, problems and what to do."""
    number = len(findings.examined)
    rate = f", {num_read / seconds:,.0f} images/s" if num_read else ""
    what = "all pixels" if findings.decoded else "headers and ends; --decode reads the pixels too"
    lines = [
        f"{number:,} images, {num_read:,} of them read in {seconds:.1f} s{rate} "
        f"({number - num_read:,} unchanged since an earlier scan); {what}"
    ]
    by_kind = findings.by_kind()
    for title, kinds in (("damage, would stop training:", DAMAGE), ("notes:", NOTES)):
        found = {kind: by_kind[kind] for kind in kinds if kind in by_kind}
        if found:
            lines.append(title)
        for kind, files in found.items():
            lines += kind_lines(kind, kinds[kind], files)
    lines += duplicate_lines(findings)
    if findings.problems:
        lines += ["problems, would stop training:", *(f"  {text}" for text in findings.problems)]
    lines.append(advice(findings, args))
    return printable("\n".join(lines))


def kind_lines(kind: str, meaning: str, files: list[tuple[str, str]]) -> list[str]:
    """A line on the kind, then some of its files."""
    lines = [f"  {kind:<12} {len(files):>8,}  {meaning}"]
    lines += [f"      {shown(path)} {text}".rstrip() for path, text in files[:SHOWN]]
    return lines + more(len(files))


def duplicate_lines(findings: Findings) -> list[str]:
    lines = []
    if findings.duplicates:
        images = sum(len(val) for _, val in findings.duplicates)
        lines.append(f"duplicates: {images:,} images of validation are in training as well")
        for train, val in findings.duplicates[:SHOWN]:
            lines.append(f"      {shown(val[0])} = {shown(train[0])}")
        lines += more(len(findings.duplicates))
    if findings.repeated:
        parts = [f"{number:,} in {split}" for split, number in findings.repeated.items()]
        lines.append(f"duplicates within a split: {', '.join(parts)}")
    return lines


def more(number: int) -> list[str]:
    return [f"      and {number - SHOWN:,} more"] if number > SHOWN else []


def shown(path: str) -> str:
    """A path on one line of a bearable length."""
    path = path if path.isprintable() else ascii(path)[1:-1]
    return path if len(path) <= 120 else f"{path[:70]}...{path[-45:]}"


def printable(text: str) -> str:
    """Without what no terminal takes."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def advice(findings: Findings, args: argparse.Namespace) -> str:
    """The last line: what to do now."""
    number = len(findings.damaged())
    if not number:
        return "training stops at the problems above" if findings.problems else "nothing is damaged"
    files = "1 damaged file" if number == 1 else f"{number:,} damaged files"
    if args.skip_list is not None:
        return f"{files}: leave them out with --skip-list {shlex.quote(str(args.skip_list))}"
    return f"{files}: --skip-list FILE writes the list that training takes"
