"""Which of the processes of a run this one is, how they agree, and how they end."""

import atexit
import ctypes
import functools
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from neoflix.console import is_main_process, say
from neoflix.errors import UserError

RUN_ME_AGAIN = 75  # exit code: stopped on request, the same command goes on from there (EX_TEMPFAIL of sysexits.h)


_console = 2  # file descriptor of the run's own stderr


class StoppedEarly(Exception):  # noqa: N818 - no error
    """The run stopped on request, with its checkpoint saved; says where."""


class DeadProcessError(RuntimeError):
    """Another process of the run died; says which one, and what it last said."""


def prepare_environment() -> None:
    """Tells DeepSpeed what it would have to guess: this Python's programs, the accelerator, and, where no
    launcher set RANK, that this is the only process (it would look for MPI)."""
    # DeepSpeed compiles with the first `ninja` on the PATH, and needs one. A system's own, of another version,
    # does not know what .venv's has built, and builds it all again: over a minute, at each change.
    programs = str(Path(sys.executable).parent)
    if os.environ.get("PATH", "").split(os.pathsep)[0] != programs:
        os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", "")])
    # Accelerate says how many threads it takes, where nobody says (`_share_cores` does, for several processes).
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset", category=UserWarning)
    # DeepSpeed 0.19 calls torch.distributed by names that torch 2.13 announces it will drop: nothing a user can do.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if sys.prefix != sys.base_prefix:
        # What DeepSpeed compiles lies in this virtual environment: in a home folder that several share, each would
        # find the other's and compile it anew, a minute at each start.
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "torch_extensions")))
    _log_to_own_file()
    _pin_what_is_asked()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # else it warns
    _share_cores()
    if not torch.cuda.is_available():
        keep_freed_memory()
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _log_to_own_file() -> None:
    """Where NEOFLIX_LOG_DIR names a folder, every process but the main one writes there, to a file by its rank."""
    folder = os.environ.get("NEOFLIX_LOG_DIR")
    if folder and not is_main_process():
        Path(folder).mkdir(parents=True, exist_ok=True)
        global _console
        _console = os.dup(sys.stderr.fileno())
        log = os.open(Path(folder, f"rank-{os.environ['RANK']}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())


def _share_cores() -> None:
    """Divides the cores among this machine's processes, where nobody has: all of them on all cores are 5 to 10
    times slower (two processes, two cores)."""
    num_processes = int(os.environ.get("LOCAL_SIZE", "1"))  # by DeepSpeed's launcher
    if "OMP_NUM_THREADS" not in os.environ and num_processes > 1:
        num_threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
        torch.set_num_threads(num_threads)
        os.environ["OMP_NUM_THREADS"] = str(num_threads)  # else accelerate takes all cores once more


def _pin_what_is_asked() -> None:
    """Has torch pin as much host memory as it is asked for, where it would round up to a power of two: 25 GiB of
    GPT-Neo-2.7B's offloaded optimizer become 40. Small buffers it still rounds, to use them again. (torch 2.13 knows
    the word.)"""
    said = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if not said and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):
        os.environ["PYTORCH_ALLOC_CONF"] = "pinned_max_round_threshold_mb:64"


def keep_freed_memory() -> None:
    """Has glibc keep the tensors that a step frees, up to 2 GiB, for those of the next one.

    Without this each large tensor is a new mapping that the kernel fills with zeros page by page as it is first
    written: `torch.zeros` of 96 MB takes 22 ms then, and 2 ms from kept memory. A GPU's tensors have torch's own
    cache.
    """
    trim_threshold, mmap_max = -1, -4  # glibc's malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has none
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


@functools.cache
def _cpu_group() -> dist.ProcessGroup:
    """All processes, connected by way of the CPU: a word between them never waits for a GPU, and may take hours
    (the main process tokenises, or converts a checkpoint, while the others wait)."""
    return dist.new_group(backend="gloo", timeout=timedelta(hours=12))


def num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: Any) -> list:
    """Each process's value, in every process, by rank. Collective."""
    if num_processes() == 1:
        return [value]
    values = [None] * num_processes()
    dist.all_gather_object(values, value, group=_cpu_group())
    return values


def any_rank(flag: bool) -> bool:
    """True in every process where it is true in one. Collective; a fraction of a millisecond on one machine."""
    if num_processes() == 1:
        return flag
    flags = torch.tensor([int(flag)])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=_cpu_group())
    return bool(flags.item())


def ask_main_process(function: Callable, *args) -> Any:
    """What `function` returns in the main process, or the UserError it raises, in every process. Collective."""
    answer, error = None, None
    if is_main_process():
        try:
            answer = function(*args)
        except UserError as caught:
            error = caught
    if num_processes() > 1:
        message = [(answer, str(error) if error else None)]
        dist.broadcast_object_list(message, src=0, group=_cpu_group())
        answer, error = message[0][0], UserError(message[0][1]) if message[0][1] else None
    if error:
        raise error
    return answer


def shout(message: str) -> None:
    """Prints in the run's own log from any process, for what the main one can no longer say. Empty: nothing."""
    if message:
        os.write(_console, f"{message}\n".encode())


def exit_code_of(main) -> int:
    """Runs an entry point. What the user got wrong (UserError) is one sentence and exit code 2, no traceback;
    NEOFLIX_TRACEBACK=1 shows where it arose."""
    try:
        main()
    except UserError as error:
        if os.environ.get("NEOFLIX_TRACEBACK"):
            raise
        if is_main_process():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except StoppedEarly as stopped:
        say(str(stopped))
        return RUN_ME_AGAIN
    except DeadProcessError as error:
        shout(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough, as in `generate.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit complains
        return 128 + signal.SIGPIPE
    return 0


def run_and_exit(main) -> None:
    """Runs an entry point and ends the process with its exit code."""
    try:
        code = exit_code_of(main)
    except Exception:
        traceback.print_exc()
        code = 1
    if dist.is_initialized():
        end_process(code)
    leave_exit_code(code)
    sys.exit(code)


def end_process(code: int) -> None:
    """Ends this process at once, from any thread.

    Where processes were connected, C++'s own tidying up at exit is left out: now and then a thread of gloo or
    DeepSpeed is still running by then, and a finished run would end as "terminate called", exit code -6.
    """
    if code in (0, RUN_ME_AGAIN):  # else a thread of Python's may wait for a process that is gone
        atexit._run_exitfuncs()
    leave_exit_code(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_exit_code(code: int) -> None:
    """Writes the run's exit code where launch.sh looks for it: DeepSpeed's launcher does not always hand it on."""
    if is_main_process() and (path := os.environ.get("NEOFLIX_EXIT_CODE_FILE")):
        Path(path).write_text(f"{code}\n")
