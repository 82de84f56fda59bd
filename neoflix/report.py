"""`python -m neoflix.report RUN`: write a run's report, or compare several runs."""

import argparse
from pathlib import Path

from neoflix.arguments.command_line import Parser
from neoflix.reporting.curves import MAX_RUNS
from neoflix.reporting.history import Record
from neoflix.reporting.pages import COMPARISON_FILE, REPORT_FILE, comparison_page, report_page
from neoflix.reporting.write import write_page
from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError
from neoflix.runtime.processes import run_and_exit


def parse_report_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of `python -m neoflix.report`."""
    parser = Parser(prog="python -m neoflix.report", description="Write a run's report, or compare several runs.")
    add = parser.add_argument
    add(
        "--output",
        help="HTML file to write (default: report.html in the run's folder; for several runs comparison.html)",
    )
    add("runs", metavar="RUN", nargs="+", help="a run's folder, finished or not; several runs are compared in one page")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_report_args(argv)
    if len(args.runs) > MAX_RUNS:
        raise UserError(f"{len(args.runs)} runs: one page can show at most {MAX_RUNS}")
    records = [Record.read(run) for run in args.runs]
    if len(records) > 1:
        path, page = Path(args.output or COMPARISON_FILE), comparison_page(records)
    else:
        path, page = Path(args.output or records[0].folder / REPORT_FILE), report_page(records[0])
    write_page(path, page)
    say(f"Report: {path} (open it in a browser)")


if __name__ == "__main__":
    run_and_exit(main)
