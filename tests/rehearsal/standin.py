"""Builds the stand-in for the CUDA runtime, describes its cards, and reads what it counts.

The CUDA build of torch runs on it without a GPU: `Card().environment(folder)` holds what a process needs. It takes the
place of libcudart, cuBLAS, NCCL and NVML by LD_PRELOAD and LD_LIBRARY_PATH. What it cannot show: numbers, speed, and
anything inside a kernel.
"""

import ctypes
import os
import re
import subprocess
import sysconfig
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "standin"
SITE = Path(sysconfig.get_path("purelib"))
WRAPPERS = r"/torch/|cuda_accelerator\.py|/rehearsal/|/functools\.py"
PRELOADED, DRIVER = "libstandin.so", "libcuda.so.1"

COUNTED = re.findall(
    r"each\((?!name)(\w+)\)", (SOURCES / "standin.h").read_text()
)  # the counters' names, in their order


def build(folder: Path) -> None:
    """Compiles the stand-in into `folder`. Needs gcc and binutils; the headers come with torch's CUDA build.

    Functions of CUDA, cuBLAS and NCCL that torch's libraries want and the sources lack become stubs, which succeed and
    are counted as unknown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = [SOURCES / name for name in ("cuda.c", "host.c", "libraries.c")]
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    for source, made in zip(sources, objects, strict=True):
        _gcc("-c", str(source), "-o", made, f"-I{_headers()}")
    has = _symbols("--defined-only", *objects)
    wants = _symbols("-D", "--undefined-only", *map(str, sorted((SITE / "torch" / "lib").glob("*.so"))))
    runtime = sorted(name for name in wants - has if re.match(r"(__)?cuda[A-Z]|cublas|nccl", name))
    declared = (_headers() / "cuda.h").read_text()  # Triton asks for more of the driver than torch
    driver = {name for name in wants if re.match(r"cu[A-Z]", name)}
    driver |= set(re.findall(r"CUDAAPI (cu[A-Z]\w*)\(", declared))
    driver |= set(re.findall(r"#define cu\w+ +(cu\w+)$", declared, re.MULTILINE))
    driver -= set(re.findall(r"^int (cu\w+)\(", (SOURCES / "driver.c").read_text(), re.MULTILINE))
    stub = 'int {0}(void) {{ static int seen; if (!seen++) count_unknown("{0}"); return 0; }}\n'
    (folder / "stubs.c").write_text("void count_unknown(const char *);\n" + "".join(map(stub.format, runtime)))
    (folder / "driver_stubs.c").write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(driver)))
    _gcc("-shared", "-o", str(folder / PRELOADED), *objects, str(folder / "stubs.c"), "-lpthread", "-ldl")
    _gcc("-shared", "-o", str(folder / DRIVER), str(SOURCES / "driver.c"), str(folder / "driver_stubs.c"))
    _gcc("-shared", "-o", str(folder / "libnvidia-ml.so.1"), str(SOURCES / "nvml.c"))
    linked = folder / "libcuda.so"  # the name that -lcuda looks for, when DeepSpeed builds an operator
    linked.unlink(missing_ok=True)
    linked.symlink_to(DRIVER)


def _gcc(*words: str) -> None:
    subprocess.run(["gcc", "-O1", "-fPIC", "-w", *words], check=True)


def _symbols(*words: str) -> set[str]:
    listed = subprocess.run(["nm", *words], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in listed.splitlines() if len(line.split()) > 1}


def _headers() -> Path:
    return next((SITE / "nvidia").glob("*/include/cuda_runtime_api.h")).parent


@dataclass(frozen=True)
class Card:
    """GPUs of one kind. Memory in MiB: as NVML sees it, and as torch sees it."""

    name: str = "NVIDIA GeForce RTX 3090"
    mib: int = 24576
    torch_mib: int = 24258
    capability: int = 86
    count: int = 1
    nvlinks: int = 0

    def environment(self, folder: Path, alias_mib: int = 4) -> dict[str, str]:
        """The variables under which a process sees these cards.

        Args:
            folder: of `build`.
            alias_mib: host blocks from this size on share one piece of real memory, and lose what is written; 0: none.
        """
        one = f"{self.name}|GPU-aa%d|{self.mib}|{self.torch_mib - 300}|{self.capability}|-1|{self.nvlinks}"
        return {
            "LD_PRELOAD": str(folder / PRELOADED),
            "LD_LIBRARY_PATH": str(folder),
            "LIBRARY_PATH": str(folder),
            "PYTHONPATH": str(HERE / "startup"),
            "STANDIN": str(folder),
            "STANDIN_NAME": self.name,
            "STANDIN_MIB": str(self.torch_mib),
            "STANDIN_CARDS": str(self.count),
            "STANDIN_CAPABILITY": str(self.capability),
            "STANDIN_ALIAS_MIB": str(alias_mib),
            "FAKE_GPUS": "\n".join(one % index for index in range(self.count)),
        }


class Counts:
    """What the stand-in counts in this process, and where in Python calls were refused or waited for the device."""

    def __init__(self):
        library = ctypes.CDLL(str(Path(os.environ["STANDIN"], PRELOADED)))
        library.standin_counters.restype = ctypes.POINTER(ctypes.c_int64)
        self._library, self._values = library, library.standin_counters()
        self.waits: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
        self._callbacks = callback(self._refused), callback(self._waited)  # kept alive
        library.standin_on_refusal(self._callbacks[0])
        library.standin_on_wait(self._callbacks[1])

    def read(self) -> dict[str, int]:
        """The counts since the last reset, by the names in standin.h."""
        return dict(zip(COUNTED, self._values[: len(COUNTED)], strict=True))

    def reset(self) -> None:
        self._library.standin_reset()
        self.waits.clear()

    def _refused(self, words: bytes) -> None:
        self.refusals[f"{words.decode()} in {_place()}"] += 1

    def _waited(self, call: bytes) -> None:
        self.waits[_place()] += 1


def _place() -> str:
    """The innermost line of Python that is neither torch's nor a wrapper of it, as package/file.py:line."""
    frames = [frame for frame in traceback.extract_stack() if not re.search(WRAPPERS, frame.filename)]
    if not frames:
        return "?"
    file = frames[-1].filename.rpartition("site-packages/")[2]
    return f"{os.path.relpath(file) if file.startswith('/') else file}:{frames[-1].lineno}"
