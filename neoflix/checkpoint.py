"""Checkpoints of a run's folder: which may be resumed, which holds the best model, whose run it is."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

STATE_FILE = "trainer_state.json"  # Trainer writes it last
RUN_FILE = "run.json"  # what the run in this folder learns, and from what
RESULTS_FILE = "all_results.json"
LEARNING_ARGUMENTS = (
    "num_train_epochs max_steps learning_rate lr_scheduler_type warmup_steps weight_decay adam_beta1 adam_beta2 "
    "adam_epsilon max_grad_norm optim seed data_seed bf16 fp16 per_device_train_batch_size "
    "tokens_per_device_batch gradient_accumulation_steps early_stopping_patience eval_strategy eval_steps "
    "save_strategy save_steps"
).split()
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")


def is_complete(checkpoint: Path) -> bool:
    """True where the last file of a checkpoint was written, whole, and its weights are there."""
    try:
        json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError):
        return False
    return any(checkpoint.glob("*.safetensors"))


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    numbered = []
    for path in run.glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and is_complete(path):
            numbered.append((int(match[1]), path))
    return [path for _, path in sorted(numbered)]


def find_resume_point(output_dir: str, resume_from_checkpoint: str | None) -> str | None:
    """The checkpoint to go on from: the one asked for, else the newest complete one of the run, else None."""
    if resume_from_checkpoint:
        checkpoint = Path(resume_from_checkpoint)
        if not is_complete(checkpoint):
            raise ValueError(
                f"--resume_from_checkpoint {checkpoint}: no complete checkpoint there; leave the flag out "
                "to take the newest complete one of the run"
            )
        return str(checkpoint)
    checkpoints = list_checkpoints(Path(output_dir))
    return str(checkpoints[-1]) if checkpoints else None


def describe_run(args, model, tokenizer, train_tokens) -> dict:
    """What a run is: model, tokenizer, data (by hash), and every argument that changes what it learns."""
    architecture = ("model_type", "hidden_size", "num_layers", "num_hidden_layers", "vocab_size")
    backend = tokenizer.backend_tokenizer.to_str().encode()
    arguments = json.loads(args.to_json_string())
    return {
        "model": args.model_name_or_path,
        "architecture": {key: getattr(model.config, key) for key in architecture if hasattr(model.config, key)},
        "tokenizer": hashlib.sha256(backend).hexdigest()[:16],
        "data": str(train_tokens.split),
        "arguments": {key: arguments[key] for key in LEARNING_ARGUMENTS},
    }


def read_run(folder: str | Path) -> dict | None:
    """What `save_run` wrote, or None where no run was started."""
    try:
        return json.loads(Path(folder, RUN_FILE).read_text())
    except FileNotFoundError:
        return None


def save_run(folder: str, run: dict) -> None:
    """Records what a run is, so that no other one goes on in its folder, and that it is not finished."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, RESULTS_FILE).unlink(missing_ok=True)
    unfinished = Path(folder, f"{RUN_FILE}.part")
    unfinished.write_text(json.dumps(run, indent=2) + "\n")
    unfinished.replace(Path(folder, RUN_FILE))


def check_same_run(checkpoint: str, run: dict) -> None:
    """ValueError where a checkpoint comes from a run with another model, tokenizer or data."""
    before = read_run(Path(checkpoint).parent)
    if before is None:
        return
    for key in ("model", "architecture", "tokenizer", "data"):
        if before.get(key) != run[key]:
            was = f" ({before.get(key)}, now {run[key]})" if key == "model" else ""
            raise ValueError(
                f"{checkpoint} belongs to a run with another {key}{was}; choose another --output_dir, "
                "or start it again as it was"
            )


def is_finished(output_dir: str, run: dict) -> bool:
    """True where this very run, arguments and all, has already come to its end in this folder."""
    return read_run(output_dir) == run and Path(output_dir, RESULTS_FILE).is_file()


def promote(checkpoint: str, output_dir: str) -> None:
    """Puts a checkpoint's model, tokenizer and generation settings at the top of the run's folder.

    Files are hard links where the file system has them: no second copy of the weights.
    """
    for stale in _model_files(Path(output_dir)):
        stale.unlink()
    for source in _model_files(Path(checkpoint)):
        target = Path(output_dir, source.name)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


def _model_files(folder: Path) -> list[Path]:
    return [path for pattern in MODEL_FILES + TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()]


def find_model(model_dir: str) -> Path:
    """The folder to load a model from: `model_dir` itself, or the best or newest checkpoint of that run."""
    folder = Path(model_dir)
    if not folder.is_dir():
        raise ValueError(f"--model_dir {model_dir}: no such folder; name a run's folder or one checkpoint of it")
    if any(folder.glob("*.safetensors")) and (folder / "config.json").is_file():
        return folder
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise ValueError(f"--model_dir {model_dir}: holds no model and no complete checkpoint; train one first")
    best = json.loads((checkpoints[-1] / STATE_FILE).read_text()).get("best_model_checkpoint")
    return next((path for path in checkpoints if best and path.name == Path(best).name), checkpoints[-1])
