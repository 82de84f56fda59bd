"""What a program answers before it imports torch, which takes seconds."""

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
        if "RANK" in os.environ or os.environ.get("NEOFLIX_TRACEBACK"):
            return
        print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
