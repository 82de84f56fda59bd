"""Whole weights out of ZeRO-3's shards, for checkpoints that were saved without gathering.

At ZeRO stages 0 to 2 every process holds all weights, and at stage 3 DeepSpeed gathers them for each save, unless
its file says `"stage3_gather_16bit_weights_on_model_save": false`. Then they lie in the optimizer's shards alone, in
fp32, a piece of each parameter with each process. DeepSpeed knows that layout (deepspeed.utils.zero_to_fp32). Its
shards are pickles, so that only those of a complete checkpoint, by its manifest, are read.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch

from neoflix.checkpoints.find import list_model_files
from neoflix.checkpoints.manifest import MANIFEST, find_corruption, read_manifest
from neoflix.model.folder import SHARDS_FILE, WEIGHTS_FILES, has_shards_alone, has_weights
from neoflix.runtime.console import progress, say
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import HashedFile, free_bytes, sync_folder, without_wildcards, write_json

WEIGHTS = WEIGHTS_FILES[0]


MAPPED_BYTES = 2**28  # of the shards, read before their pages are given back


SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@contextmanager
def whole_weights(folder: Path, in_place: bool = True) -> Iterator[Path]:
    """A folder with the whole weights of `folder`: itself, gathered where need be or, where it cannot be written to,
    a temporary one that is deleted when the context ends. UserError as `gather_weights`.

    Args:
        in_place: False leaves `folder` as it is, whether it can be written to or not.
    """
    if (in_place and os.access(folder, os.W_OK)) or not has_shards_alone(folder):
        gather_weights(folder)
        yield folder
        return
    _check_shards(folder)
    with tempfile.TemporaryDirectory(prefix="neoflix-") as temporary:
        say(f"{folder} is left as it is: gathering into {temporary}, for this time only")
        for path in list_model_files(folder):
            shutil.copyfile(path, Path(temporary, path.name))
        _gather(folder, Path(temporary))
        yield Path(temporary)


def gather_weights(checkpoint: Path) -> None:
    """Gives a checkpoint that has ZeRO-3's shards alone a `model.safetensors`, and its manifest an entry for it.

    An interrupted gathering leaves `model.safetensors.part`, which counts for nothing. Other processes that want the
    same weights wait. UserError where the checkpoint is not complete or the disk too small.
    """
    if not has_shards_alone(checkpoint):
        return
    _check_shards(checkpoint)
    with (checkpoint / SHARDS_FILE).open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not has_weights(checkpoint):
            entry = _gather(checkpoint, checkpoint)
            manifest = read_manifest(checkpoint)
            manifest["files"][WEIGHTS] = entry
            write_json(checkpoint / MANIFEST, manifest)


def _check_shards(checkpoint: Path) -> None:
    """UserError unless every pickle that DeepSpeed is about to read is one that this project wrote, as far as a
    manifest can tell. Reads the whole checkpoint: a damaged shard would become damaged weights."""
    say(f"{checkpoint} holds its weights in ZeRO-3's shards only: checking these, then gathering them, once")
    damage = find_corruption(checkpoint, checksums=True)
    if damage is None:
        names = {str(path.relative_to(checkpoint)) for path in _shard_folder(checkpoint).glob("*.pt")}
        strange = names - read_manifest(checkpoint)["files"].keys()
        damage = f"{min(strange)} is not named in its {MANIFEST}" if strange else None
    if damage:
        raise UserError(f"{checkpoint}: {damage}; its shards are not read, name another checkpoint")


def _shard_folder(checkpoint: Path) -> Path:
    return checkpoint / (checkpoint / SHARDS_FILE).read_text(encoding="utf-8").strip()


def _open_shards(checkpoint: Path) -> dict:
    """Each weight's name and a handle to it: `shape`, `dtype` (fp32), and `contiguous()`, which reads it. Tied weights
    have one name. The shards are mapped into memory for as long as a handle is held."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # else it warns
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # seconds to import

    quiet = (redirect_stdout(StringIO()), redirect_stderr(StringIO()))  # it reports to whom called it as a program
    with quiet[0], quiet[1], without_wildcards(checkpoint) as readable:
        weights = get_fp32_state_dict_from_zero_checkpoint(readable, lazy_mode=True)
    first_names = {id(weight): name for name, weight in reversed(weights.items())}
    return {name: weight for name, weight in weights.items() if first_names[id(weight)] == name}


def _gather(checkpoint: Path, target: Path) -> dict:
    """Streams a checkpoint's weights, in the dtype it was trained in, into `target`; returns a manifest's entry."""
    weights = _open_shards(checkpoint)
    dtype = getattr(torch, json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["dtype"])
    dtypes = {name: dtype if weight.dtype.is_floating_point else weight.dtype for name, weight in weights.items()}
    sizes = {name: weights[name].shape.numel() * dtypes[name].itemsize for name in weights}
    total, free = sum(sizes.values()), free_bytes(target)
    if free < total:
        raise UserError(
            f"{target}: gathered weights take {total / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free"
        )
    names = sorted(weights, key=lambda name: -dtypes[name].itemsize)  # so that each begins at a multiple of its own
    unfinished = target / f"{WEIGHTS}.part"
    try:
        with closing(HashedFile(unfinished)) as file, progress(total=total, unit="B", unit_scale=True) as bar:
            file.write(safetensors_header(names, dtypes, weights, sizes))
            num_mapped = 0
            for name in names:
                if (
                    num_mapped > MAPPED_BYTES
                ):  # pages of a mapped file, once read, are this process's until it is closed
                    weights, num_mapped = _open_shards(checkpoint), 0
                weight = weights[name].contiguous()
                num_mapped += weight.nbytes
                file.write(weight.to(dtypes[name]).flatten().view(torch.uint8).numpy())
                bar.update(sizes[name])
        unfinished.rename(target / WEIGHTS)
        sync_folder(target)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{target}: the gathered weights could not be written ({error.strerror})") from error
    return file.entry()


def safetensors_header(names: list[str], dtypes: dict, weights: dict, sizes: dict) -> bytes:
    """The beginning of a safetensors file: its length, and where which weight lies. Of the weights, shapes suffice.

    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtypes[name]],
            "shape": list(weights[name].shape),
            "data_offsets": [offset, offset + sizes[name]],
        }
        offset += sizes[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
