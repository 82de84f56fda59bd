"""A machine whose GPUs, driver, memory and torch are not here, for the programs that a test starts."""

import json
import subprocess
from pathlib import Path

RTX_3090 = "NVIDIA GeForce RTX 3090|GPU-aa11|24576|24176|86|-1|0"
SECOND_3090 = "NVIDIA GeForce RTX 3090|GPU-ab22|24576|9000|86|-1|0"
V100 = "Tesla V100-SXM2-16GB|GPU-bb33|16384|16384|70|-1|6"
IN_MIG_MODE = "NVIDIA A100-SXM4-40GB|GPU-cc44|40960|40000|80|1|12"

# Python runs it before anything else: the files that name this machine's memory are other ones.
SITECUSTOMIZE = """
import json, os, pathlib, shutil
facts = json.loads(os.environ["FAKE_MACHINE"])
is_file, exists, read_text, usage = pathlib.Path.is_file, pathlib.Path.exists, pathlib.Path.read_text, shutil.disk_usage
def known(path):
    return facts["files"].get(str(path), "")
pathlib.Path.is_file = lambda path: known(path) is not None and bool(known(path) or is_file(path))
pathlib.Path.exists = lambda path: known(path) is not None and bool(known(path) or exists(path))
pathlib.Path.read_text = lambda path, *a, **k: known(path) or read_text(path, *a, **k)
def disk_usage(path):
    free = facts["free"].get("/dev/shm" if str(path) == "/dev/shm" else "disk")
    return usage(path) if free is None else type(usage(path))(2 * free, free, free)
shutil.disk_usage = disk_usage
"""
# What torch says where only it can tell: it sees a part of a GPU.
TORCH = """
from types import SimpleNamespace
class cuda:
    is_available = staticmethod(lambda: %s)
    device_count = staticmethod(lambda: 1)
    mem_get_info = staticmethod(lambda index: (19 * 2**30, 20 * 2**30))
    @staticmethod
    def get_device_properties(index):
        part = {"name": "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "total_memory": 20 * 2**30, "uuid": "12"}
        return SimpleNamespace(**part, major=8, minor=0, is_integrated=False)
    @staticmethod
    def init():
        raise RuntimeError("No CUDA GPUs are available")
"""


def build_nvml(folder: Path) -> Path:
    """Compiles the library of NVIDIA's driver (fake_nvml.c) into a folder."""
    source = Path(__file__).with_name("fake_nvml.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(folder / "libnvidia-ml.so.1"), str(source)], check=True)
    return folder


def describe_gpus(nvml: Path, *gpus: str, driver: str = "580.95.05") -> dict[str, str]:
    """Environment variables with which a program sees these GPUs."""
    return {"LD_LIBRARY_PATH": str(nvml), "FAKE_GPUS": "\n".join(gpus), "FAKE_DRIVER": driver}


def describe_machine(
    folder: Path,
    torch: str | None = "2.13.0+cu130",
    cuda: str | None = "13.0",
    has_gpu: bool = True,
    host_gib: float = 64,
    shm_mib: float = 8192,
    disk_gib: float = 500,
    files: dict[str, str | None] | None = None,
) -> dict[str, str]:
    """Environment variables with which a Python program finds this machine.

    Args:
        folder: for what the program imports.
        torch, cuda: torch's version (None: not another one than here), and the CUDA that it was built for. It can be
            imported, and does nothing.
        has_gpu: what torch.cuda.is_available() says.
        host_gib, shm_mib, disk_gib: what is free.
        files: the text of other files, None for those that are not there.
    """
    if torch:
        (folder / "torch").mkdir(exist_ok=True)
        (folder / "torch" / "__init__.py").write_text(TORCH % has_gpu)
        (folder / "torch" / "version.py").write_text(f"__version__ = '{torch}'\ncuda: Optional[str] = {cuda!r}\n")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    memory = {"/proc/meminfo": f"MemAvailable: {int(host_gib * 2**20)} kB\n", "/proc/self/cgroup": "0::/no-limit\n"}
    memory |= {"/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.current": "0\n"}
    free = {"/dev/shm": int(shm_mib * 2**20), "disk": int(disk_gib * 2**30)}
    facts = {"files": memory | {"/proc/driver/nvidia/version": None} | (files or {}), "free": free}
    return {"PYTHONPATH": str(folder), "FAKE_MACHINE": json.dumps(facts)}
