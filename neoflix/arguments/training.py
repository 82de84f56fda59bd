"""`TrainArguments`: Hugging Face's TrainingArguments with our defaults and flags, and their checks."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from neoflix.arguments.deepspeed_file import (
    check_agreement,
    check_compiler,
    find_ds_config,
    follow_arguments,
    is_json,
    read_ds_config,
)
from neoflix.arguments.flags import check_flags, check_numbers, check_words, check_writable
from neoflix.arguments.optimizer import check_optimizer, check_schedule
from neoflix.arguments.quick import LORA_RANK
from neoflix.arguments.recipes import nearest
from neoflix.checkpoints.find import check_complete, list_checkpoints
from neoflix.checkpoints.names import RUN_FILE
from neoflix.checkpoints.output_dir import check_output_dir
from neoflix.checkpoints.runs import read_run, read_texts_per_step
from neoflix.checkpoints.same_run import check_overrides
from neoflix.data.template import Template
from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError
from neoflix.runtime.files import ROOT
from neoflix.runtime.redaction import is_secret, redact
from neoflix.training.deepspeed import build_operators, disable_shm_collectives

# Recomputing activations: --activation_checkpointing, which transformers before 5.23 knows by its older name alone.
NAMES_OF_RECOMPUTING = ("activation_checkpointing", "gradient_checkpointing")


RECOMPUTING = next(name for name in NAMES_OF_RECOMPUTING if name in TrainingArguments.__dataclass_fields__)


PACKAGES = {"azure_ml": "azureml-core", "neptune": "neptune-client"}  # whose names are not what --report_to says


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class TrainArguments(TrainingArguments):
    """Hugging Face's `TrainingArguments` with our defaults, and the few flags they have no word for."""

    config: str | None = _option(None, "Recipe: a YAML file of flags; the command line wins over it.")
    model_name_or_path: str = _option(
        "EleutherAI/gpt-neo-2.7B", "Hub name or folder of a causal language model; 'demo' builds a small one."
    )
    allow_pickle: bool = _option(False, "Take weights from a pickle (pytorch_model.bin) where there is no safetensors.")
    dataset: str = _option(
        "netflix",
        "'netflix', 'sample', a CSV, TSV, JSONL, JSON, Parquet or .txt file, a folder of .txt files, or hf:NAME.",
    )
    text_column: str | None = _option(
        None, "Column of the texts; default: 'description', 'text', or the only one that looks like texts."
    )
    template: str | None = _option(
        None, "Other columns in front of each text: '{title} | {listed_in}: {description}'; the last one is learnt."
    )
    loss_on_prompt: bool = _option(False, "Learn to write those columns too.")
    validation_fraction: float = _option(0.1, "Share of the texts held out, chosen by a hash of each text.")
    max_length: int | None = _option(None, "Longest text in tokens, both special ones counted; default: the window.")
    early_stopping_patience: int = _option(2, "Stop after this many evaluations without a better loss; 0: never.")
    override_resumed: list[str] | None = _option(
        None, "Settings that may differ from those of the run that is resumed: learning_rate weight_decay ..."
    )
    on_full_disk: str = _option("stop", "When a checkpoint cannot be written: 'stop', or 'go_on' without it.")
    cache_dir: str | None = _option(None, "Where token caches lie; default: beside Hugging Face's data set cache.")
    lora: bool = _option(False, "Freeze the model and train small adapters beside it (LoRA): little host memory.")
    lora_rank: int = _option(LORA_RANK, "With --lora: width of an adapter.")
    lora_alpha: float | None = _option(None, "With --lora: adapters count alpha / rank times; default: 2 x rank.")
    eval_only: bool = _option(False, "Measure the model on the held-out texts and end; a run's own texts, if unsaid.")
    sample_prompts: list[str] = field(
        default_factory=lambda: [""],
        metadata={"help": "How the texts begin that are written at every evaluation; one or several."},
    )
    num_progress_samples: int = _option(4, "Texts written at every evaluation, for each of these; 0: none.")
    plan: bool = _option(False, "Say what the run will take and whether it fits, and end.")
    plan_must_fit: bool = _option(True, "Refuse a run that by its plan does not fit; false: warn, and try.")
    plan_device_memory: str | None = _option(None, "With --plan: plan for a GPU of this size, such as 24GiB.")
    plan_host_memory: str | None = _option(None, "With --plan: plan for a host with so much memory free.")

    output_dir: str | None = _option("results", "The run's folder: checkpoints, best model, results, curves.")
    deepspeed: dict | str | None = _option(
        str(ROOT / "ds_config.json"), "DeepSpeed's file; 'auto': the fastest of ours that fits."
    )
    per_device_train_batch_size: int = _option(64, "Texts a device takes at once.")
    tokens_per_device_batch: int | str | None = _option(
        None, "Instead of a count of texts: the most tokens a device takes at once, in even batches; or 'auto'."
    )
    per_device_eval_batch_size: int = _option(32, "Texts a device evaluates at once.")
    gradient_accumulation_steps: int = _option(1, "Batches added up before an optimizer step.")
    learning_rate: float = _option(5e-5, "Peak learning rate.")
    lr_scheduler_type: str = _option("cosine", "How the learning rate falls after the warm-up.")
    warmup_steps: float = _option(0.05, "Warm-up: steps, or below 1 a share of all steps.")
    weight_decay: float = _option(0.01, "AdamW's weight decay.")
    num_train_epochs: float = _option(5.0, "Epochs at the most; early stopping may end it sooner.")
    eval_strategy: str = _option("epoch", "When to evaluate.")
    eval_on_start: bool = _option(True, "Evaluate the untouched model first: the figure to beat.")
    save_strategy: str = _option("epoch", "When to save a checkpoint.")
    save_total_limit: int | None = _option(2, "Checkpoints kept: the newest and the best are never deleted.")
    metric_for_best_model: str | None = _option("eval_loss", "What decides which model is best.")
    greater_is_better: bool | None = _option(False, "Whether more of that is better.")
    logging_steps: float = _option(10, "Steps between two lines of the log.")
    logging_nan_inf_filter: bool = _option(False, "Hide losses that are no number; asks the GPU at every batch.")
    logging_first_step: bool = _option(True, "Log the first step too.")
    report_to: None | str | list[str] = _option("tensorboard", "Where curves go.")
    restore_callback_states_from_checkpoint: bool = _option(True, "Resume early stopping's count as well.")
    remove_unused_columns: bool = _option(False, "Always false: batches are made of all columns of the texts.")
    seed: int = _option(42, "Seeds weights, shuffling and dropout.")

    generation: dict = field(default_factory=dict, init=False)
    command = ""  # what was typed, by parse_train_args; no field either
    forecast = None  # the run's Plan, by parse_train_args; no field: it is no argument

    def __post_init__(self):
        self.tokens_per_device_batch = _count_or_auto(self.tokens_per_device_batch, "tokens_per_device_batch")
        if self.eval_only:
            self.deepspeed = None
            self.check()
            super().__post_init__()
            return
        self.deepspeed = find_ds_config(self.deepspeed)
        self.check()
        self.keep_texts_per_step()
        disable_shm_collectives()
        config = read_ds_config(self.deepspeed)
        check_agreement(config, self)
        build_operators(config)
        source, self.deepspeed = self.deepspeed, follow_arguments(config)
        super().__post_init__()
        self.deepspeed = config if is_json(source) else source

    def to_dict(self) -> dict:
        """As curves' programs and a run's record keep the arguments: without secrets."""
        return redact(super().to_dict())

    def __getstate__(self) -> dict:
        """What is pickled, as `training_args.bin` in each checkpoint is: without secrets."""
        parsed = ("hf_deepspeed_config", "deepspeed_plugin", "forecast")  # they hold the DeepSpeed file once more
        plain = {name: value for name, value in vars(self).items() if not (is_secret(name) or name in parsed)}
        return {name: redact(value) if isinstance(value, str | dict) else value for name, value in plain.items()}

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    @property
    def text_template(self) -> Template | None:
        return Template(self.template, self.loss_on_prompt) if self.template else None

    @property
    def lora_settings(self) -> dict | None:
        """What `lora.add_adapters` takes; None where the whole model learns."""
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return {"rank": self.lora_rank, "alpha": alpha} if self.lora else None

    @property
    def texts_per_step(self) -> int:
        """Fewest texts of a step: those of all its batches or, where these are counted in tokens, one for each."""
        texts_per_batch = 1 if self.tokens_per_device_batch else self.train_batch_size
        return texts_per_batch * self.gradient_accumulation_steps * self.world_size

    def keep_texts_per_step(self) -> None:
        """A run that goes on with another number of processes keeps the texts of its steps: each process takes its
        share, in as many batches as that needs. UserError where the shares would not be even."""
        texts_per_step = read_texts_per_step(self.output_dir, self.resume_from_checkpoint)
        if texts_per_step is None:
            return
        num_processes = int(os.environ.get("WORLD_SIZE", "1"))
        share, rest = divmod(texts_per_step, num_processes)
        if rest:
            counts = [str(n) for n in range(1, texts_per_step + 1) if texts_per_step % n == 0]
            raise UserError(
                f"{self.output_dir}: its run takes {texts_per_step} texts a step, and {num_processes} processes cannot "
                f"share them evenly; use {', '.join(counts)} processes, or start anew in another --output_dir"
            )
        batch = 1 if self.tokens_per_device_batch else min(self.per_device_train_batch_size, share)
        while share % batch:
            batch -= 1
        kept = {"gradient_accumulation_steps": share // batch}
        if self.tokens_per_device_batch is None:
            kept["per_device_train_batch_size"] = batch
        changes = [f"--{name} {value}" for name, value in kept.items() if getattr(self, name) != value]
        for name, value in kept.items():
            setattr(self, name, value)
        if changes:
            say(f"The run keeps its {texts_per_step} texts a step on {num_processes} process(es): {' '.join(changes)}")

    def check(self) -> None:
        """Refuses values that no run can use; before devices and process groups are touched."""
        check_numbers(self)
        check_words(self)
        self.check_template()
        if self.tokens_per_device_batch not in (None, "auto") and self.tokens_per_device_batch < 2:
            raise UserError(f"--tokens_per_device_batch {self.tokens_per_device_batch}: must be 2 or more")
        if self.lora and self.model_name_or_path == "demo" and not self.eval_only:
            raise UserError("--lora needs a pretrained model, and 'demo' starts from random weights")
        check_report_to(self.report_to)
        check_overrides(self.override_resumed)
        if self.eval_only:
            self.check_evaluation()
            return
        check_flags(self)
        if self.validation_fraction == 0:  # nothing to evaluate on
            self.eval_strategy, self.eval_on_start, self.metric_for_best_model = "no", False, None
        if not (self.output_dir or "").strip():
            raise UserError("--output_dir is empty; name the run's folder")
        check_writable(self.output_dir)
        check_output_dir(self.output_dir, self.model_name_or_path)
        self.check_resume()
        config = read_ds_config(self.deepspeed)
        check_schedule(self)
        check_optimizer(self, config)
        check_compiler(config)
        self.load_best_model_at_end = False  # Trainer would load it once more; a run keeps its best model in any case

    def check_resume(self) -> None:
        """Turns Hugging Face's words for `--resume_from_checkpoint` into ours, by which None is the newest one."""
        word = str(self.resume_from_checkpoint).lower()
        has_checkpoint = bool(list_checkpoints(Path(self.output_dir)))
        if word in ("true", "latest", "last") and not has_checkpoint:
            raise UserError(
                f"--resume_from_checkpoint {self.resume_from_checkpoint}: {self.output_dir} holds no complete "
                "checkpoint; leave the flag out to start there"
            )
        if word == "false" and has_checkpoint:
            raise UserError(
                f"--resume_from_checkpoint {self.resume_from_checkpoint}: {self.output_dir} holds a run's checkpoints; "
                "choose another --output_dir to start anew"
            )
        if word in ("true", "latest", "last", "false", ""):
            self.resume_from_checkpoint = None
        elif self.resume_from_checkpoint:
            check_complete(self.resume_from_checkpoint)

    def check_template(self) -> None:
        """Raises UserError if the template is malformed or contradicts --text_column."""
        if self.template is None:
            if self.loss_on_prompt:
                raise UserError("--loss_on_prompt: without --template there is no prompt; leave it out, or give one")
            return
        learnt = Template(self.template).text_field
        if self.text_column not in (None, learnt):
            raise UserError(
                f"--text_column {self.text_column}: the template ends with {{{learnt}}}, which is learnt; leave the "
                "flag out, or end the template with that column"
            )

    def check_evaluation(self) -> None:
        """UserError where there is nothing to evaluate on, or a run's folder would be written to."""
        if self.validation_fraction == 0:
            raise UserError("--validation_fraction 0: no text is held out, and --eval_only has nothing to measure on")
        if self.plan:
            raise UserError("--plan forecasts training; with --eval_only, leave it out")
        if not self.output_dir:
            return
        check_writable(self.output_dir)
        folder = Path(self.output_dir).absolute()
        if run := next((path for path in (folder, *folder.parents) if read_run(path)), None):
            raise UserError(
                f"--output_dir {self.output_dir}: {run} is a run's folder (it has a {RUN_FILE}), which --eval_only "
                "leaves alone; name another one, or none"
            )


def check_report_to(report_to: str | list[str] | None) -> None:
    """UserError where curves are to go to what transformers does not know, or to what is not installed."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    if names in (["all"], ["none"]):
        return
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ["none", "all", *sorted(INTEGRATION_TO_CALLBACK)]
            raise UserError(f"--report_to {name}: must be of {', '.join(known)}{nearest(name, known)}")
        if name not in {*get_available_reporting_integrations(), "flyte"}:
            raise UserError(
                f"--report_to {name}: its package is not installed; `pip install {PACKAGES.get(name, name)}`, or take "
                "--report_to tensorboard or none"
            )


def _count_or_auto(value: int | str | None, flag: str) -> int | str | None:
    """A flag's number, which a command line hands over as a word. UserError for any other word than 'auto'."""
    try:
        return value if value in (None, "auto") else int(value)
    except ValueError:
        raise UserError(f"--{flag} {value}: must be a number of tokens, or auto") from None
