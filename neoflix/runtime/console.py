"""What a run prints: messages and progress bars, from one process for all. A leaf, without torch."""

import os
import sys
import unicodedata
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm

_console = 2  # file descriptor of the run's own stderr


def accept_any_text() -> None:
    """Has stdout and stderr write what their encoding lacks as escape sequences: a terminal that is not UTF-8, or half
    a surrogate pair in a text, must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """A text without control characters, which a terminal would obey and a page may not hold; line ends stay."""
    return "".join(" " if char != "\n" and unicodedata.category(char) == "Cc" else char for char in text)


def is_main_process() -> bool:
    """True in the one process that speaks and writes: rank 0 of all nodes, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Prints once for the whole run."""
    if is_main_process():
        print(message, flush=True)


def shout(message: str) -> None:
    """Prints in the run's own log from any process, for what the main one can no longer say. Empty: nothing."""
    if message:
        os.write(_console, f"{message}\n".encode(errors="backslashreplace"))


def log_to_own_file() -> None:
    """Where NEOFLIX_LOG_DIR names a folder, every process but the main one writes there, to a file by its rank."""
    folder = os.environ.get("NEOFLIX_LOG_DIR")
    if folder and not is_main_process():
        Path(folder).mkdir(parents=True, exist_ok=True)
        global _console
        _console = os.dup(sys.stderr.fileno())
        log = os.open(Path(folder, f"rank-{os.environ['RANK']}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())


class _Lines(tqdm):
    """A progress bar for a log file: a line each time, and nothing is taken back."""

    @staticmethod
    def status_printer(file):
        def print_line(words: str) -> None:
            if words.strip():
                file.write(f"{words.strip()}\n")
                file.flush()

        return print_line

    def clear(self, *args, **kwargs):
        pass

    @classmethod
    @contextmanager
    def external_write_mode(cls, file=None, nolock=False):
        """Other words come between two lines: the bar need not be drawn again below them."""
        yield


def progress(iterable=None, **options) -> tqdm:
    """A progress bar: lively on a terminal, a line every half minute in a log file, silent in other processes."""
    lively = sys.stderr.isatty()
    pace = {"mininterval": 0.5} if lively else {"mininterval": 30, "maxinterval": 60}
    options = {**pace, "dynamic_ncols": True, "disable": not is_main_process()} | options
    return (tqdm if lively else _Lines)(iterable, **options)


def write_beside_progress(message: str) -> None:
    """Prints in the main process, on lines of its own, whatever bar is there."""
    if is_main_process():
        (tqdm if sys.stderr.isatty() else _Lines).write(message, file=sys.stdout)
        sys.stdout.flush()


GIB = 2**30
