"""Writes reports and model cards, never over a file that neoflix did not write."""

import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neoflix.checkpoints.runs import save_results
from neoflix.reporting.card import CARD_FILE, CARD_MARK, model_card
from neoflix.reporting.formats import side_by_side
from neoflix.reporting.history import Record
from neoflix.reporting.pages import PAGE_MARK, REPORT_FILE, report_page
from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import write_text


def write_page(path: Path, page: str) -> None:
    """Writes a report or a comparison.

    Raises:
        UserError: if the file exists and neoflix did not write it, or if it cannot be written.
    """
    _write(path, page, PAGE_MARK, "name another file with --output, or move it away")


def _write(path: Path, content: str, mark: str, way_out: str) -> None:
    try:
        if path.exists() and mark not in path.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{path}: is not a file that neoflix wrote, so it is not overwritten; {way_out}")
        write_text(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def write_report(output_dir: str) -> Path | None:
    """Writes a run's report and model card. Returns the report's path, or None after a warning if it could not be
    written: a run of hours must not fail because of its report."""
    with _errors_as_warnings():
        record = Record.read(output_dir)
        if record.results:  # before, the folder has no model
            with _errors_as_warnings():
                way_out = "move it away to get a new one"
                _write(record.folder / CARD_FILE, model_card(record), CARD_MARK, way_out)
        path = record.folder / REPORT_FILE
        write_page(path, report_page(record))
        return path
    return None


@contextmanager
def _errors_as_warnings() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if os.environ.get("NEOFLIX_TRACEBACK"):
            traceback.print_exception(error)
        say(f"warning: no report: {' '.join(str(error).split()) or type(error).__name__}")


def show_change(output_dir: str) -> None:
    """Prints what the model wrote before and after training, side by side."""
    with _errors_as_warnings():
        record = Record.read(output_dir)
        if pairs := record.before_and_after():
            say(side_by_side(("before training", "after"), pairs, shutil.get_terminal_size().columns))


def finish_run(output_dir: str, results: dict) -> None:
    """Writes a run's results and report, and prints where the best model is and how good. To be called in one
    process."""
    save_results(output_dir, results)
    path = write_report(output_dir)
    perplexity = results.get("perplexity")
    show_change(output_dir)
    say(f"Best model in {output_dir}" + ("" if perplexity is None else f", perplexity {perplexity:,.2f}"))
    if path:
        say(f"Report: {path} (open it in a browser)")
