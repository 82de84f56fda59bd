"""How the processes of a run agree, and how they end."""

import functools
import itertools
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from neoflix.runtime.console import accept_any_text, is_main_process, printable, say, shout
from neoflix.runtime.errors import RUN_ME_AGAIN, MainProcessError, StoppedEarly, UserError
from neoflix.runtime.launcher import prevent_restart, report_error
from neoflix.runtime.store import connect
from neoflix.runtime.watchdog import Failure, end_for, end_process, get_watchdog, leave_exit_code, start_watchdog

LONGEST_WAIT = timedelta(hours=12)  # for the main process, which tokenizes the texts or converts a checkpoint


_calls = itertools.count()  # of `run_on_main_process` and `wait_for_others`


@functools.cache
def _cpu_group() -> dist.ProcessGroup:
    """All processes, connected through the CPU: what they exchange never waits for a GPU, and may take hours."""
    return dist.new_group(backend="gloo", timeout=LONGEST_WAIT)


@functools.cache
def _store() -> dist.Store:
    """The store of the functions below. Unlike a process group it exists from the start, before devices are used."""
    store = connect(serves=is_main_process())
    store.set_timeout(LONGEST_WAIT)
    return store


def num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: Any) -> list:
    """Returns the values of all processes, by rank. Collective."""
    if num_processes() == 1:
        return [value]
    values = [None] * num_processes()
    dist.all_gather_object(values, value, group=_cpu_group())
    return values


def any_across_ranks(flag: bool) -> bool:
    """Whether the flag is true in any process. Collective; a fraction of a millisecond on one machine."""
    if num_processes() == 1:
        return flag
    flags = torch.tensor([int(flag)])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=_cpu_group())
    return bool(flags.item())


def run_on_main_process(function: Callable, *args) -> Any:
    """Calls a function in the main process and returns its result in every process. Collective; also works before
    there is a process group.

    Raises:
        UserError: in every process, if the main one raises it.
        MainProcessError: in the others, if the main one raises any other exception.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return function(*args)
    key = f"answer{next(_calls)}"
    if not is_main_process():
        answer, error = pickle.loads(_store().get(key))
        if error:
            raise error
        return answer
    answer, error = None, None
    try:
        answer = function(*args)
        return answer
    except UserError as caught:
        error = UserError(str(caught))
        error.exit_code = caught.exit_code
        raise
    except BaseException as caught:  # the others wait, whatever it is
        error = MainProcessError(f"rank 0 failed ({type(caught).__name__}: {caught})")
        raise
    finally:
        _store().set(key, pickle.dumps((answer, error)))


def wait_for_others() -> None:
    """Makes the main process wait until all others have come here; they do not wait. Collective; also works before
    there is a process group."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return
    arrived = f"arrived{next(_calls)}_"
    if is_main_process():
        _store().wait([f"{arrived}{rank}" for rank in range(1, world_size)])
    else:
        _store().set(f"{arrived}{os.environ['RANK']}", "")


@contextmanager
def main_process_first() -> Iterator[None]:
    """Runs the block in the first process of each machine, then in the others, which find its caches filled.
    Collective. An exception in any process ends all of them (`watchdog.py`)."""
    is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if not is_first:
        gather(None)
    yield
    if is_first:
        gather(None)


def exit_code_of(main: Callable[[], None]) -> int:
    """Runs an entry point and returns its exit code. A UserError is printed as one sentence, without a traceback;
    NEOFLIX_TRACEBACK=1 shows it. Other exceptions are raised."""
    try:
        main()
    except UserError as error:
        if os.environ.get("NEOFLIX_TRACEBACK"):
            traceback.print_exc()
        _print_once(str(error))
        report_error(str(error))
        prevent_restart()
        return error.exit_code
    except StoppedEarly as stopped:
        say(str(stopped))
        prevent_restart()
        return RUN_ME_AGAIN
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has ended, as in `generate.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the flush at exit fails
        return 128 + signal.SIGPIPE
    return 0


def _print_once(error: str) -> None:
    """Prints the message of a UserError, from whichever process has it, and only once if several have the same."""
    watchdog, error = get_watchdog(), printable(error)  # it may quote a text
    if watchdog is None:
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif watchdog.may_print(error):
        who = "" if is_main_process() else f"{watchdog.describe_itself()}: "
        shout(f"error: {who}{error}")


def run_and_exit(main: Callable[[], None]) -> None:
    """Runs an entry point and ends the process with its exit code. If one of several processes fails, all end with its
    exit code."""

    def watched_main() -> None:
        start_watchdog()
        main()

    accept_any_text()
    try:
        code = exit_code_of(watched_main)
    except SystemExit as request:  # argparse's --help
        code = int(request.code or 0)
    except Exception as error:
        _explain(error)
        code = 1
    if get_watchdog() or dist.is_initialized():
        end_process(code)
    leave_exit_code(code)
    sys.exit(code)


def _explain(error: Exception) -> None:
    """Prints the traceback of a bug. If the exception follows from another process's failure, it just ends this one."""
    watchdog = get_watchdog()
    if isinstance(error, MainProcessError):
        end_for(Failure(1, 0, ""))
    if watchdog and (failure := watchdog.wait_for_failure()):
        end_for(failure)
    traceback.print_exception(error)
    if watchdog:
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        shout(f"error: {watchdog.describe_itself()} failed ({words}); last reported: {watchdog.activity()}")
