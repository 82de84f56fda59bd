"""What a process sets before torch and DeepSpeed start: programs, cores, memory, its rank."""

import ctypes
import os
import sys
import warnings
from pathlib import Path

import torch

from neoflix.runtime.console import log_to_own_file
from neoflix.runtime.gpus import PINNED_MEMORY
from neoflix.runtime.hardware import build_folder
from neoflix.runtime.launcher import is_num_threads_chosen, local_processes


def prepare_environment() -> None:
    """Sets what DeepSpeed would otherwise guess: this Python's programs, the accelerator and, unless a launcher started
    several processes, that this is the only one (it would look for MPI)."""
    # DeepSpeed compiles with the first `ninja` on the PATH. The system's own, of another version, does not recognize
    # what the one in .venv has built, and builds it all again: over a minute, at each change.
    programs = str(Path(sys.executable).parent)
    if os.environ.get("PATH", "").split(os.pathsep)[0] != programs:
        os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", "")])
    # Accelerate prints how many threads it uses unless the variable is set (`_share_cores` sets it).
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset", category=UserWarning)
    # DeepSpeed 0.19 uses names of torch.distributed that torch 2.13 deprecates; a user can do nothing about it.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if folder := build_folder():
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    log_to_own_file()
    _pin_exact_sizes()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # otherwise it warns
    _share_cores()
    if not torch.cuda.is_available():
        tune_malloc()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        # Port 0: the system chooses a free port, so that two runs never use the same one.
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update(alone)
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # torchrun's, at another port


def _share_cores() -> None:
    """Divides the cores among this machine's processes, unless OMP_NUM_THREADS is set. If all of them use all cores,
    they are 5 to 10 times slower (two processes, two cores)."""
    num_processes = local_processes()
    if num_processes > 1 and not is_num_threads_chosen():
        num_threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
        torch.set_num_threads(num_threads)
        os.environ["OMP_NUM_THREADS"] = str(num_threads)  # otherwise accelerate uses all cores again


def _pin_exact_sizes() -> None:
    """Makes torch pin host memory in exact sizes (`PINNED_MEMORY`), unless the user configured its allocator. Torch
    before 2.13 refuses the setting."""
    configured = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if not configured and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):
        os.environ["PYTORCH_ALLOC_CONF"] = PINNED_MEMORY


def tune_malloc() -> None:
    """Makes glibc keep the memory of tensors that a step frees, up to 2 GiB, for the next step.

    Otherwise each large tensor is a new mapping that the kernel fills with zeros page by page when it is first written:
    `torch.zeros` of 96 MB takes 22 ms, against 2 ms in kept memory. Tensors on a GPU have torch's own cache.
    """
    trim_threshold, mmap_max = -1, -4  # glibc's malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has none
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
