"""Checkpoints of a run's folder: which may be resumed, which holds the best model, whose run it is.

`checkpoint-N` is a checkpoint whose save came to its end. What such a folder has lost since, its manifest shows. What
is written, replaced and deleted is in `run_folder.py`.
"""

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path

from neoflix.errors import UserError
from neoflix.manifest import MANIFEST, find_damage, free_bytes, read_manifest, write_json

STATE_FILE = "trainer_state.json"
UNIVERSAL = ".universal"  # a checkpoint's copy for another number of processes (universal.py)
RUN_FILE = "run.json"  # what the run in this folder learns, and from what
RESULTS_FILE = "all_results.json"  # written last of all: the run is finished
STARTS_FILE = "starts.json"  # how the run was started, each time
LIVE_SAMPLES_FILE = "progress_samples.jsonl"  # texts of each evaluation, a line each
LEARNING_ARGUMENTS = (
    "num_train_epochs max_steps learning_rate lr_scheduler_type warmup_steps weight_decay adam_beta1 adam_beta2 "
    "adam_epsilon max_grad_norm optim seed data_seed bf16 fp16 tokens_per_device_batch early_stopping_patience "
    "eval_strategy eval_steps save_strategy save_steps"
).split()
WEIGHTS_FILES = ("model.safetensors", "model.safetensors.index.json")
ADAPTERS_FILE, ADAPTERS_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"  # peft's; a base beside them
PICKLED_WEIGHTS_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SETTINGS_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"),
)
SHARDS_FILE = "latest"  # DeepSpeed's: which folder its shards lie in
# Files of a checkpoint beside its model: what a run needs to go on.
TRAINING_FILES = (MANIFEST, STATE_FILE, SHARDS_FILE, "scheduler.pt", "training_args.bin")


def list_numbered(run: Path) -> list[Path]:
    """The run's `checkpoint-N` folders, complete or not, oldest first."""
    numbered = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in run.glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first, as far as names and sizes of files tell."""
    return [path for path in list_numbered(run) if not (find_damage(path) or find_misplaced(path))]


def find_misplaced(checkpoint: Path) -> str | None:
    """Why a complete folder is no checkpoint of the step that its name says, as a copy is; None where it is."""
    step = read_manifest(checkpoint).get("step")
    return None if checkpoint.name == f"checkpoint-{step}" else f"its {MANIFEST} is of step {step}: it is a copy"


def find_resume_point(output_dir: str, resume_from_checkpoint: str | None, report=print) -> str | None:
    """The checkpoint to go on from: the one asked for, else the newest complete one of the run, else None.

    Every file of it is read and compared with its checksum. One process, before any other looks.

    Args:
        report: called with a sentence for each checkpoint that is passed over.
    """
    if resume_from_checkpoint:
        if damage := find_damage(Path(resume_from_checkpoint), checksums=True):
            raise UserError(
                f"--resume_from_checkpoint {resume_from_checkpoint}: no complete checkpoint ({damage}); leave the "
                "flag out to take the newest complete one of the run"
            )
        return resume_from_checkpoint
    for checkpoint in reversed(list_numbered(Path(output_dir))):
        damage = find_damage(checkpoint, checksums=True) or find_misplaced(checkpoint)
        if damage is None:
            return str(checkpoint)
        report(f"Passing over {checkpoint}, which is not complete: {damage}. Nothing needs it; it can be deleted.")
    return None


def check_space(run: Path, needed: int, what: str) -> None:
    """UserError unless `needed` bytes are free for the run."""
    free = free_bytes(run)
    if free < needed:
        raise UserError(
            f"{run}: {what} {needed / 2**30:.1f} GiB of disk, {free / 2**30:.1f} GiB are free; make room, lower "
            "--save_total_limit, or choose another --output_dir"
        )


def forecast_bytes(num_parameters: int, bytes_per_weight: int) -> int:
    """Size of a checkpoint: the model twice (safetensors, and DeepSpeed's own copy), and Adam's 12 bytes a parameter
    (fp32 weights and two moments)."""
    return num_parameters * (12 + 2 * bytes_per_weight)


def find_best(checkpoints: list[Path]) -> Path:
    """The best of a run's complete checkpoints by what the newest knows, else the newest."""
    best = read_manifest(checkpoints[-1])["best_step"]
    return next((path for path in checkpoints if path.name == f"checkpoint-{best}"), checkpoints[-1])


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
        "num_training_texts": len(train_tokens),
        "texts": describe_texts(args),
        "texts_per_step": args.texts_per_step,
        "lora": args.lora_settings,
        "arguments": {key: arguments[key] for key in LEARNING_ARGUMENTS},
    }


def describe_texts(args) -> dict:
    """The flags that say which texts are held out, for whoever measures the run later."""
    file = Path(args.dataset).expanduser()
    flags = ("text_column", "template", "loss_on_prompt", "validation_fraction", "max_length")
    texts = {key: getattr(args, key) for key in flags}
    return {"dataset": str(file.resolve()) if file.exists() else args.dataset, **texts}


def read_run(folder: str | Path) -> dict | None:
    """What `save_run` wrote, or None where no run was started."""
    try:
        return json.loads(Path(folder, RUN_FILE).read_text())
    except FileNotFoundError:
        return None


def find_run(folder: str | Path) -> dict | None:
    """What the run is that a folder belongs to, its own or one checkpoint's; None where it is no run's."""
    folder = Path(folder).resolve()
    is_checkpoint = re.fullmatch(r"checkpoint-\d+", folder.name)
    return read_run(folder) or (read_run(folder.parent) if is_checkpoint else None)


def read_texts_per_step(output_dir: str, resume_from_checkpoint: str | None) -> int | None:
    """Texts a step of the run that is about to go on, by what it saved; None where nothing goes on."""
    run = Path(resume_from_checkpoint).parent if resume_from_checkpoint else Path(output_dir)
    if list_numbered(run) or (run / RESULTS_FILE).is_file():
        return (read_run(run) or {}).get("texts_per_step")
    return None


def save_run(folder: str, run: dict) -> None:
    """Records what a run is, so that no other one goes on in its folder, and that it is not finished."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for of_the_end in (RESULTS_FILE, STATE_FILE):
        Path(folder, of_the_end).unlink(missing_ok=True)
    write_json(Path(folder, RUN_FILE), run)


def check_same_run(checkpoint: str, run: dict) -> None:
    """UserError where a checkpoint comes from a run with another model, tokenizer or data."""
    before = read_run(Path(checkpoint).parent)
    if before is None:
        return
    for key in ("model", "architecture", "tokenizer", "data", "lora"):
        if before.get(key) != run[key]:
            was = f" ({before.get(key)}, now {run[key]})" if key in ("model", "lora") else ""
            raise UserError(
                f"{checkpoint} belongs to a run with another {key}{was}; choose another --output_dir, "
                "or start it again as it was"
            )


def is_finished(output_dir: str, run: dict) -> bool:
    """True where this very run, arguments and all, has already come to its end in this folder. (Its texts are told by
    their hash, "data", wherever the file lies now.)"""
    before = read_run(output_dir) or {}
    is_same = {"lora": None} | before | {"texts": None} == run | {"texts": None}
    return is_same and Path(output_dir, RESULTS_FILE).is_file()


def save_results(output_dir: str, results: dict) -> None:
    """Writes the run's figures; from then on it is finished."""
    write_json(Path(output_dir, RESULTS_FILE), results)


def list_model_files(checkpoint: Path) -> list[Path]:
    """A checkpoint's model, tokenizer and generation settings: the files at its top that training does not need to go
    on, of those that its manifest names."""
    named = (read_manifest(checkpoint) or {"files": None})["files"]
    paths = [path for path in checkpoint.iterdir() if path.is_file() and path.name not in TRAINING_FILES]
    paths = [path for path in paths if not path.name.startswith("rng_state")]
    return sorted(path for path in paths if named is None or path.name in named)


def list_loaded_files(folder: Path) -> list[Path]:
    """The files that decide over a model that is loaded from a folder: weights, configuration and tokenizer."""
    names = {*WEIGHTS_FILES, *PICKLED_WEIGHTS_FILES, ADAPTERS_FILE, ADAPTERS_CONFIG_FILE, SHARDS_FILE, *SETTINGS_FILES}
    for index in (WEIGHTS_FILES[1], PICKLED_WEIGHTS_FILES[1]):
        with suppress(FileNotFoundError):
            names |= {*json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()}
    return sorted(path for path in map(folder.joinpath, names) if path.is_file())


def find_model(model_dir: str, flag: str = "--model_dir") -> Path:
    """The folder to load a model from: `model_dir` itself or, where a run has not come to its end, its best
    complete checkpoint. `flag` is how the user named it."""
    folder = Path(model_dir)
    if not folder.is_dir():
        raise UserError(f"{flag} {model_dir}: no such folder; name a run's folder or one checkpoint of it")
    checkpoints = list_checkpoints(folder)
    is_unfinished = (folder / RUN_FILE).is_file() and not (folder / RESULTS_FILE).is_file()
    weights = WEIGHTS_FILES + PICKLED_WEIGHTS_FILES + (SHARDS_FILE,)
    holds_model = (folder / "config.json").is_file() and any((folder / name).is_file() for name in weights)
    holds_model = holds_model or holds_adapters(folder)
    if checkpoints and (is_unfinished or not holds_model):
        return find_best(checkpoints)
    if holds_model:
        return folder
    raise UserError(f"{flag} {model_dir}: holds no model and no complete checkpoint; train one first")


def has_weights(folder: Path) -> bool:
    """Whether `from_pretrained` finds weights in a folder, or adapters, and no pickled ones."""
    return any((folder / name).is_file() for name in (*WEIGHTS_FILES, ADAPTERS_FILE))


def holds_adapters(folder: str | Path) -> bool:
    """Whether what a folder holds is LoRA adapters of another model, by safetensors (lora.py)."""
    return all(Path(folder, name).is_file() for name in (ADAPTERS_FILE, ADAPTERS_CONFIG_FILE))


def has_shards_alone(folder: Path) -> bool:
    """Whether a folder is a checkpoint of DeepSpeed's without whole weights: ZeRO-3's, saved without gathering."""
    return not has_weights(folder) and (folder / SHARDS_FILE).is_file()
