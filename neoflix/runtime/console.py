"""What a run prints: messages and progress bars, from one process for all."""

import os
import sys
import unicodedata
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

GIB = 2**30

_console = 2  # file descriptor of the run's own stderr


def accept_any_text() -> None:
    """Makes stdout and stderr write characters that their encoding lacks as escape sequences. A terminal that is not
    UTF-8, or half a surrogate pair in a text, must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """A text without control characters, which a terminal would obey and HTML does not allow; line ends stay."""
    return "".join(" " if char != "\n" and unicodedata.category(char) == "Cc" else char for char in text)


def is_main_process() -> bool:
    """True in the one process that prints and writes files: rank 0 of all nodes, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Prints once for the whole run."""
    if is_main_process():
        print(message, flush=True)


def shout(message: str) -> None:
    """Prints to the run's own log from any process, for what the main process can no longer print."""
    if message:
        os.write(_console, f"{message}\n".encode(errors="backslashreplace"))


def log_to_own_file() -> None:
    """If NEOFLIX_LOG_DIR names a folder, every process but the main one prints to a file there, named by its rank."""
    folder = os.environ.get("NEOFLIX_LOG_DIR")
    if folder and not is_main_process():
        Path(folder).mkdir(parents=True, exist_ok=True)
        global _console
        _console = os.dup(sys.stderr.fileno())
        log = os.open(Path(folder, f"rank-{os.environ['RANK']}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())


class _Lines(tqdm):
    """A progress bar for a log file: a new line each time, and nothing is overwritten."""

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
        """Other messages come between two lines; the bar does not have to be drawn again below them."""
        yield


def progress(iterable=None, **options) -> tqdm:
    """A progress bar: live on a terminal, a line every half minute in a log file, silent in other processes."""
    is_terminal = sys.stderr.isatty()
    pace = {"mininterval": 0.5} if is_terminal else {"mininterval": 30, "maxinterval": 60}
    options = {**pace, "dynamic_ncols": True, "disable": not is_main_process()} | options
    return (tqdm if is_terminal else _Lines)(iterable, **options)


def write_beside_progress(message: str) -> None:
    """Prints in the main process, on lines of its own beside the progress bar."""
    if is_main_process():
        (tqdm if sys.stderr.isatty() else _Lines).write(message, file=sys.stdout)
        sys.stdout.flush()
