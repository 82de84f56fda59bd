"""Writing reports and model cards, never over a file of the user's."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path

from neoflix.checkpoints.runs import save_results
from neoflix.reporting.card import CARD_FILE, CARD_MARK, model_card
from neoflix.reporting.history import Record
from neoflix.reporting.pages import PAGE_MARK, REPORT_FILE, report_page
from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import write_text


def write_page(path: Path, page: str) -> None:
    """UserError where the file is not ours, or cannot be written."""
    _write(path, page, PAGE_MARK, "name another file with --output, or move it away")


def _write(path: Path, content: str, mark: str, way_out: str) -> None:
    try:
        if path.exists() and mark not in path.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{path}: is not a file that neoflix wrote, and is left alone; {way_out}")
        write_text(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def write_report(output_dir: str) -> Path | None:
    """Writes a run's report and model card, and returns the report's path. What goes wrong is one line of warning and
    None: a run of hours does not fail for its report."""
    try:
        record = Record.read(output_dir)
        path = record.folder / REPORT_FILE
        if record.results:  # until then there is no model at the top
            _try(lambda: _write(record.folder / CARD_FILE, model_card(record), CARD_MARK, "move it away for a new one"))
        write_page(path, report_page(record))
        return path
    except Exception as error:
        _warn(error)
        return None


def _try(write: Callable[[], None]) -> None:
    try:
        write()
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    if os.environ.get("NEOFLIX_TRACEBACK"):
        traceback.print_exception(error)
    say(f"warning: no report: {' '.join(str(error).split()) or type(error).__name__}")


def finish_run(output_dir: str, results: dict) -> None:
    """Writes a run's results and its report, and prints where they and the best model are. One process."""
    save_results(output_dir, results)
    path = write_report(output_dir)
    perplexity = results.get("perplexity")
    say(f"Best model in {output_dir}" + ("" if perplexity is None else f", perplexity {perplexity:,.2f}"))
    if path:
        say(f"Report: {path} (open it in a browser)")
