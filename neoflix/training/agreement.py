"""Checks that all processes run the same code on the same data."""

import hashlib

from neoflix.runtime.errors import UserError
from neoflix.runtime.files import ROOT


def check_same_everywhere(args, texts) -> None:
    """Raises UserError in every process if one has other code, versions, settings or texts than the first process.

    Such processes would wait for each other forever, or train a wrong model. Collective.
    """
    from importlib.metadata import version

    from neoflix.runtime.processes import gather, num_processes

    if num_processes() == 1:
        return
    code, data = hashlib.sha256(), hashlib.sha256()
    for path in [*sorted((ROOT / "neoflix").rglob("*.py")), ROOT / "train.py"]:
        code.update(path.read_bytes())
    for example in texts.train:
        data.update(f"{example.prompt}\0{example.completion}\0".encode())
    settings = (
        "deepspeed tokens_per_device_batch per_device_train_batch_size gradient_accumulation_steps bf16 fp16 seed"
    )
    facts = {
        "code": code.hexdigest()[:12],
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed", "accelerate")},
        "texts": data.hexdigest()[:12],
        "settings": {name: str(getattr(args, name)) for name in settings.split()},
    }
    everywhere = gather(facts)
    for rank, theirs in enumerate(everywhere):
        for what in facts:
            if theirs[what] != everywhere[0][what]:
                raise UserError(
                    f"process {rank} has other {what} than process 0 ({theirs[what]}, not {everywhere[0][what]}): "
                    "all nodes must have the same"
                )
