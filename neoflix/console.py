"""What a run prints: messages and progress bars, from one process for all. A leaf, without torch."""

import os
import sys
from contextlib import contextmanager

from tqdm.auto import tqdm


def is_main_process() -> bool:
    """True in the one process that speaks and writes: rank 0 of all nodes, or the only process."""
    return int(os.environ.get("RANK", "0")) == 0


def say(message: str) -> None:
    """Prints once for the whole run."""
    if is_main_process():
        print(message, flush=True)


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
