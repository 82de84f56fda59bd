"""What a program answers without torch, whose import takes seconds."""

import os
import sys
from collections.abc import Callable

from neoflix.runtime.console import accept_any_text, printable
from neoflix.runtime.errors import UserError


def answer_early(answer: Callable[[], None]) -> None:
    """Calls `answer`, and ends the program with its exit code if it raises UserError.

    If a launcher started the process, or with NEOFLIX_TRACEBACK=1, the error is left to the program itself, which meets
    it again and ends all processes, or shows the traceback.
    """
    accept_any_text()
    try:
        answer()
    except UserError as error:
        if "RANK" not in os.environ and not os.environ.get("NEOFLIX_TRACEBACK"):
            _end_by(error)


def run_without_torch(main: Callable[[], None]) -> None:
    """Runs a whole program, and ends it with the exit code of the UserError that it raises; NEOFLIX_TRACEBACK=1 shows
    the traceback."""
    accept_any_text()
    try:
        main()
    except UserError as error:
        if os.environ.get("NEOFLIX_TRACEBACK"):
            raise
        _end_by(error)


def _end_by(error: UserError) -> None:
    print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)
