"""`TrainArguments`: Hugging Face's TrainingArguments with our flags and defaults."""

import argparse
import traceback
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

import torch
from transformers import TrainingArguments

from neoflix.arguments.deepspeed_file import follow_arguments, is_compact, is_json, read_ds_config, updates_in_backward
from neoflix.arguments.train_flags import TrainFlags
from neoflix.data.template import Template
from neoflix.runtime.cache import default_cache_dir
from neoflix.runtime.errors import UserError
from neoflix.runtime.redaction import is_secret, redact


@dataclass
class TrainArguments(TrainFlags, TrainingArguments):
    """The arguments of a run: `TrainFlags`, Hugging Face's `TrainingArguments`, and these defaults of ours for it.

    Making them connects the processes of the run, as transformers does it.
    """

    metric_for_best_model: str | None = "eval_loss"
    greater_is_better: bool | None = False
    logging_nan_inf_filter: bool = False  # it synchronizes with the GPU at every batch
    logging_first_step: bool = True
    restore_callback_states_from_checkpoint: bool = True  # resumes the count of early stopping
    remove_unused_columns: bool = False  # batches use all columns

    generation: dict = field(default_factory=dict, init=False)
    command = ""  # the command line; not a field
    recomputed_layers: ClassVar[int | None] = None  # None: all or none, by activation_checkpointing
    uses_compact_adamw: ClassVar[bool] = False  # by the DeepSpeed file
    updates_in_backward: ClassVar[bool | str] = False

    def __post_init__(self):
        self.bf16, self.fp16, self.use_cpu = bool(self.bf16), bool(self.fp16), bool(self.use_cpu)
        self.dataloader_num_workers = self.dataloader_num_workers or 0
        # The older name too, for transformers before 5.23.
        layers = self.activation_checkpointing or self.gradient_checkpointing
        self.recomputed_layers = None if isinstance(layers, bool) else layers
        self.activation_checkpointing = self.gradient_checkpointing = bool(layers)
        if self.validation_fraction == 0:  # nothing to evaluate on
            self.eval_strategy, self.eval_on_start, self.metric_for_best_model = "no", False, None
        self.load_best_model_at_end = False  # `save_best` does it, and Trainer would load the model once more
        self.push_to_hub = False  # `upload.py` does it, once, where Trainer would at each save
        self.greater_is_better = False
        # A pinned batch is copied to the GPU while it still computes the step before.
        self.accelerator_config = {"non_blocking": bool(self.dataloader_pin_memory) and not self.use_cpu}
        if self.deepspeed is None:
            super().__post_init__()
            return
        config = read_ds_config(self.deepspeed)
        self.uses_compact_adamw, self.updates_in_backward = is_compact(config), updates_in_backward(config)
        source, self.deepspeed = self.deepspeed, follow_arguments(config)
        bf16 = self.bf16
        if self.uses_compact_adamw:  # the weights are in bf16, but mixed precision would mean fp32 copies of them
            self.bf16 = False
        super().__post_init__()
        self.bf16 = bf16
        self.deepspeed = config if is_json(source) else source

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> "TrainArguments":
        """The arguments of checked flags (`parse.read_all_flags`).

        Raises:
            UserError: transformers refuses a combination of flags.
        """
        try:
            args = cls(**{f.name: getattr(flags, f.name) for f in fields(cls) if f.init})
        except ValueError as error:
            if isinstance(error, UserError) or not _is_raised_in("transformers", error):
                raise
            raise UserError(str(error)) from error
        args.generation, args.command = flags.generation, flags.command
        return args

    def to_dict(self) -> dict:
        """The arguments without secrets, as logging programs and the run's record get them."""
        return redact(super().to_dict())

    def __getstate__(self) -> dict:
        """The state without secrets, for `training_args.bin` in each checkpoint."""
        parsed = ("hf_deepspeed_config", "deepspeed_plugin")  # they hold the DeepSpeed file again
        plain = {name: value for name, value in vars(self).items() if not (is_secret(name) or name in parsed)}
        return {name: redact(value) if isinstance(value, str | dict) else value for name, value in plain.items()}

    @property
    def cache(self) -> Path:
        """Folder for tokenized texts and tokenizers."""
        return Path(self.cache_dir or default_cache_dir())

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    @property
    def text_template(self) -> Template | None:
        return Template(self.template, self.loss_on_prompt) if self.template else None

    @property
    def model_options(self) -> dict:
        """Options of `load.load_model`."""
        return {"allow_pickle": self.allow_pickle, "lora": self.lora_settings}

    @property
    def lora_settings(self) -> dict | None:
        """Arguments of `lora.add_adapters`, or None if the whole model is trained."""
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        return {"rank": self.lora_rank, "alpha": alpha} if self.lora else None

    @property
    def texts_per_step(self) -> int:
        """Texts of a step in all its batches; if batches are counted in tokens, the fewest: one per batch."""
        texts_per_batch = 1 if self.tokens_per_device_batch else self.train_batch_size
        return texts_per_batch * self.gradient_accumulation_steps * self.world_size


def _is_raised_in(package: str, error: Exception) -> bool:
    """Whether this package's own code raises an exception. Anywhere else it is a bug."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] == package
