"""`python -m fastimagenet.report RUN_DIR`: write the page of a run again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fastimagenet import cli
from fastimagenet.report.page import write_report
from pipelines.cli import make_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status. Raises UserError for a folder without a run."""
    parser = make_parser(
        "fastimagenet.report",
        "Write the report.html of a run again, from the other files in its folder.",
        "python -m fastimagenet.report runs/my-run",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the run's --output folder")
    sys.stdout.write(f"{write_report(parser.parse_args(argv).run_dir)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(cli.exit_status(main, None))
