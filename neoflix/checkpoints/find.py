"""Finds the checkpoints of a run's folder: which are complete, which can be resumed, and which holds the best model.

A folder gets the name `checkpoint-N` once its save is complete. Its manifest shows whether it has lost anything since.
"""

import re
from pathlib import Path

from neoflix.checkpoints.manifest import MANIFEST, find_corruption, read_manifest
from neoflix.checkpoints.names import RESULTS_FILE, RUN_FILE, TRAINING_FILES
from neoflix.model.folder import (
    PICKLED_WEIGHTS_FILES,
    WEIGHTS_FILES,
    holds_adapters,
)
from neoflix.runtime.errors import UserError


def list_numbered(run: Path) -> list[Path]:
    """The run's `checkpoint-N` folders, complete or not, oldest first."""
    numbered = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in run.glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. Only names and sizes of files are checked, not checksums."""
    return [path for path in list_numbered(run) if not (find_corruption(path) or find_misplaced(path))]


def find_misplaced(checkpoint: Path) -> str | None:
    """Why a complete folder is not the checkpoint of the step in its name (it is a copy); None where it is."""
    step = read_manifest(checkpoint).get("step")
    return None if checkpoint.name == f"checkpoint-{step}" else f"its {MANIFEST} is of step {step}: it is a copy"


def check_complete(resume_from_checkpoint: str, checksums: bool = False) -> None:
    """Raises UserError if the checkpoint that `--resume_from_checkpoint` names is not complete.

    Args:
        checksums: read every file and compare it with its checksum, not only names and sizes.
    """
    if damage := find_corruption(Path(resume_from_checkpoint), checksums=checksums):
        raise UserError(
            f"--resume_from_checkpoint {resume_from_checkpoint}: not a complete checkpoint ({damage}); without the "
            "flag, the run resumes from its newest complete one"
        )


def find_resume_point(output_dir: str, resume_from_checkpoint: str | None, report=print) -> str | None:
    """Returns the checkpoint to resume from: the one asked for, or else the newest complete one of the run, or None.

    Every file of it is read and compared with its checksum. One process.

    Args:
        report: called with a sentence for each checkpoint that is skipped.
    """
    if resume_from_checkpoint:
        check_complete(resume_from_checkpoint, checksums=True)
        return resume_from_checkpoint
    for checkpoint in reversed(list_numbered(Path(output_dir))):
        damage = find_corruption(checkpoint, checksums=True) or find_misplaced(checkpoint)
        if damage is None:
            return str(checkpoint)
        report(f"Skipping {checkpoint}, which is not complete: {damage}. Nothing needs it; it can be deleted.")
    return None


COMPACT_BYTES = 3 + 8 / 128  # of CompactAdamW's states, per parameter: three bytes, and two scales for each block


def forecast_bytes(num_parameters: int, bytes_per_weight: int, is_compact: bool) -> int:
    """The size of a checkpoint: the model twice (safetensors, and DeepSpeed's own copy), and 12 bytes per parameter for
    Adam (fp32 weights and two moments); with `CompactAdamW` once, and its states."""
    if is_compact:
        return int(num_parameters * (bytes_per_weight + COMPACT_BYTES))
    return num_parameters * (12 + 2 * bytes_per_weight)


def find_best(checkpoints: list[Path]) -> Path:
    """The best of a run's complete checkpoints, by the newest one's manifest; without an evaluation, the newest."""
    best = read_manifest(checkpoints[-1])["best_step"]
    return next((path for path in checkpoints if path.name == f"checkpoint-{best}"), checkpoints[-1])


def list_model_files(checkpoint: Path) -> list[Path]:
    """A checkpoint's model, tokenizer and generation settings: the files at its top, of those that its manifest names,
    that are not for resuming."""
    named = (read_manifest(checkpoint) or {"files": None})["files"]
    paths = [path for path in checkpoint.iterdir() if path.is_file() and path.name not in TRAINING_FILES]
    paths = [path for path in paths if not path.name.startswith("rng_state")]
    return sorted(path for path in paths if named is None or path.name in named)


def find_model(model_dir: str, flag: str = "--model_dir") -> Path:
    """The folder to load a model from: `model_dir` itself or, for an unfinished run, its best complete checkpoint.

    Args:
        flag: the name of the flag, for messages.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise UserError(f"{flag} {model_dir}: no such folder; use a run's folder or one of its checkpoints")
    checkpoints = list_checkpoints(folder)
    is_unfinished = (folder / RUN_FILE).is_file() and not (folder / RESULTS_FILE).is_file()
    weights = WEIGHTS_FILES + PICKLED_WEIGHTS_FILES
    holds_model = (folder / "config.json").is_file() and any((folder / name).is_file() for name in weights)
    holds_model = holds_model or holds_adapters(folder)
    if checkpoints and (is_unfinished or not holds_model):
        return find_best(checkpoints)
    if holds_model:
        return folder
    raise UserError(f"{flag} {model_dir}: holds no model and no complete checkpoint; train one first")
