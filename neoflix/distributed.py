"""Which of the processes of a run this one is. A leaf: imports nothing of ours."""

import atexit
import ctypes
import os
import socket
import sys
import warnings
from pathlib import Path

import torch
from tqdm.auto import tqdm


def is_main_process() -> bool:
    """True in the one process that speaks and writes: rank 0 of all nodes, or the only process."""
    return int(os.environ.get("RANK", "0")) == 0


def prepare_environment() -> None:
    """Tells DeepSpeed what it would have to guess: this Python's programs, the accelerator, and, where no
    launcher set RANK, that this is the only process (it would look for MPI)."""
    # DeepSpeed compiles with the first `ninja` on the PATH, and needs one. A system's own, of another version,
    # does not know what .venv's has built, and builds it all again: over a minute, at each change.
    programs = str(Path(sys.executable).parent)
    if os.environ.get("PATH", "").split(os.pathsep)[0] != programs:
        os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", "")])
    # DeepSpeed 0.19 calls torch.distributed by names that torch 2.13 announces it will drop: nothing a user can do.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # else it warns
    _share_cores()
    if not torch.cuda.is_available():
        _keep_freed_memory()
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _share_cores() -> None:
    """Divides the cores among this machine's processes, where nobody has: all of them on all cores are 5 to 10
    times slower (two processes, two cores)."""
    num_processes = int(os.environ.get("LOCAL_SIZE", "1"))  # by DeepSpeed's launcher
    if "OMP_NUM_THREADS" not in os.environ and num_processes > 1:
        num_threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
        torch.set_num_threads(num_threads)
        os.environ["OMP_NUM_THREADS"] = str(num_threads)  # else accelerate takes all cores once more


def _keep_freed_memory() -> None:
    """Has glibc keep the tensors that training frees, up to 2 GiB, for those of the next step.

    Without this each large tensor is a new mapping that the kernel fills with zeros page by page as it is first
    written: `torch.zeros` of 96 MB takes 22 ms then, and 2 ms from kept memory. A GPU's tensors have torch's own
    cache.
    """
    trim_threshold, mmap_max = -1, -4  # glibc's malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has none
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def say(message: str) -> None:
    """Prints once for the whole run."""
    if is_main_process():
        print(message, flush=True)


def progress(iterable=None, **options) -> tqdm:
    """A progress bar: lively on a terminal, a line every half minute in a log file, silent in other processes."""
    quick = 0.5 if sys.stderr.isatty() else 30
    options = {"mininterval": quick, "dynamic_ncols": True, "disable": not is_main_process()} | options
    return tqdm(iterable, **options)


def exit_code_of(main) -> int:
    """Runs an entry point. What the user got wrong (ValueError) is one sentence and exit code 2, no traceback;
    NEOFLIX_TRACEBACK=1 shows where it arose."""
    try:
        main()
    except ValueError as error:
        if os.environ.get("NEOFLIX_TRACEBACK"):
            raise
        if is_main_process():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run_and_exit(main) -> None:
    """Runs an entry point and ends the process with its exit code.

    Where processes were connected, C++'s own tidying up at exit is left out: now and then a thread of gloo or
    DeepSpeed is still running by then, and a finished run would end as "terminate called", exit code -6.
    """
    code = exit_code_of(main)
    if not torch.distributed.is_initialized():
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
