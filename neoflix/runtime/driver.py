"""NVIDIA's driver, and which builds of torch it can run. Needs only Python's own modules: `launch.sh` asks before it
installs anything (`python -m neoflix.runtime.driver`)."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from neoflix.runtime.errors import UserError

# Oldest driver for each CUDA a torch may be built with (NVIDIA, "CUDA Toolkit Release Notes", table "CUDA Toolkit
# and Minimum Required Driver Version for CUDA Minor Version Compatibility", Linux).
OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 0)}

# Oldest compute capability for it: CUDA 13 has no Maxwell, Pascal and Volta (its release notes, "Deprecated
# Architectures"; pytorch's RELEASE.md, "PyTorch CUDA Support Matrix").
OLDEST_CAPABILITY = {13: (7, 5)}

# Builds of the torch in requirements.txt, the newest CUDA first, which is the one that pip installs by default.
TORCH_BUILDS = {(13, 0): "cu130", (12, 6): "cu126"}
TORCH_INDEX = "https://download.pytorch.org/whl"

USE_THE_CPU = "to use the CPU, empty CUDA_VISIBLE_DEVICES (train.py: --use_cpu true)"
DRIVER_FILE = Path("/proc/driver/nvidia/version")
REQUIREMENTS = Path(__file__).resolve().parent.parent.parent / "requirements.txt"


def output_of(*words: str) -> str:
    """What a program prints; "" if it is missing or fails."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def read_driver() -> tuple[int, ...]:
    """The version of NVIDIA's driver by the kernel or by nvidia-smi (under WSL2 only it tells); () if not known."""
    text = DRIVER_FILE.read_text() if DRIVER_FILE.is_file() else ""
    match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text)
    words = match[1] if match else output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return tuple(int(part) for part in re.findall(r"\d+", words.partition("\n")[0]))


def hides_gpus(visible: str | None) -> bool:
    """Whether a CUDA_VISIBLE_DEVICES hides every GPU: it is set, and begins with neither a number nor a UUID."""
    return visible is not None and not re.match(r"\s*\+?\d|GPU-|MIG-", visible)


def torch_version() -> tuple[int, ...]:
    return _torch_fact("__version__")


def torch_cuda() -> tuple[int, ...]:
    """The version of CUDA that torch was built with; () if it was built without."""
    return _torch_fact("cuda")


def _torch_fact(name: str) -> tuple[int, ...]:
    """The first two numbers of a line of torch's version.py, which imports nothing; () if there are none."""
    spec = importlib.util.find_spec("torch")
    text = Path(spec.origin).with_name("version.py").read_text() if spec else ""
    match = re.search(rf"^{name}\b.*=\s*'(\d+)\.(\d+)", text, re.MULTILINE)
    return tuple(int(part) for part in match.groups()) if match else ()


def check_driver(name: str, driver: tuple[int, ...], built: tuple[int, ...]) -> None:
    """Checks that torch was built with CUDA, and not with a newer one than the driver supports.

    Args:
        name: the GPU's.
        driver: its version; () if it is not known.
        built: the version of CUDA that torch was built with.
    """
    command = install_command(driver)
    if not built:
        remedy = f"install a build with CUDA: {command}" if command else "update the driver, then install one with CUDA"
        raise UserError(f"{name}: torch was built without CUDA; {remedy}; {USE_THE_CPU}")
    oldest = OLDEST_DRIVER.get(built[0], ())
    if driver and driver < oldest:
        or_install = f", or install a torch built for an older CUDA: {command}" if command else ""
        raise UserError(
            f"driver {dotted(driver)} is older than {dotted(oldest)}, the oldest for torch's CUDA {dotted(built)}; "
            f"update the driver (under WSL2 in Windows){or_install}; {USE_THE_CPU}"
        )


def check_capability(name: str, capability: tuple[int, int], built: tuple[int, ...]) -> None:
    """Checks that torch's CUDA still supports a GPU.

    Args:
        name, capability: the GPU's, and its compute capability.
        built: the version of CUDA that torch was built with; () if it was built without.
    """
    oldest = OLDEST_CAPABILITY.get(built[0], (0, 0)) if built else (0, 0)
    if capability < oldest:
        older = next(cuda for cuda in TORCH_BUILDS if capability >= OLDEST_CAPABILITY.get(cuda[0], (0, 0)))
        raise UserError(
            f"{name} has compute capability {dotted(capability)}, and torch's CUDA {dotted(built)} begins at "
            f"{dotted(oldest)}; install a torch built for an older CUDA: {_pip_install(older)}; {USE_THE_CPU}"
        )


def install_command(driver: tuple[int, ...]) -> str:
    """The command that installs the newest build of torch that a driver can run, "" if there is none; for a driver ()
    that is not known, the newest of all."""
    fitting = (cuda for cuda in TORCH_BUILDS if not driver or driver >= OLDEST_DRIVER[cuda[0]])
    cuda = next(fitting, None)
    return _pip_install(cuda) if cuda else ""


def _pip_install(cuda: tuple[int, int]) -> str:
    release = re.search(r"^torch==(\S+)", REQUIREMENTS.read_text(), re.MULTILINE)[1]
    build = TORCH_BUILDS[cuda]
    words = [sys.executable, "-m", "pip", "install", f"torch=={release}+{build}", "--index-url"]
    return shlex.join([*words, f"{TORCH_INDEX}/{build}"])


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def main() -> None:
    """Checks the driver for the torch that is installed or, if there is none, for the one that pip would install."""
    driver, built = read_driver(), torch_cuda() if torch_version() else next(iter(TORCH_BUILDS))
    if not driver or not built or hides_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")):
        return
    try:
        check_driver("NVIDIA's GPU", driver, built)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"NVIDIA driver {dotted(driver)}: runs torch for CUDA {dotted(built)}")


if __name__ == "__main__":
    main()
