"""`TrainFlags`: the flags of train.py that are read without torch, with their types, defaults and help texts.

The plan needs some of them, and recipes set the others. `reader.py` reads them; `TrainArguments` inherits them, and
adds Hugging Face's other flags.
"""

from dataclasses import dataclass, field

from neoflix.arguments.values import layers_or_auto, tokens_or_auto, yes_or_array
from neoflix.runtime.files import ROOT

TOKENS = {"type": tokens_or_auto, "metavar": "N|auto"}
TUNE = {"type": yes_or_array, "metavar": "true|false|array", "nargs": "?", "const": True}
LAYERS = {"type": layers_or_auto, "metavar": "true|false|auto|N", "nargs": "?", "const": True}


def _option(default, text: str, **parser_options):
    """A field with its help text, and argparse's options if its type does not decide them."""
    return field(default=default, metadata={"help": text, **parser_options})


@dataclass
class TrainFlags:
    """Flags with their defaults. A default of None means: the program decides, as the help text describes."""

    config: str | None = _option(None, "Recipe: a YAML file of flags. The command line wins over it.")
    model_name_or_path: str = _option(
        "EleutherAI/gpt-neo-2.7B",
        "Hub name or folder of a causal language model, 'smollm2' for a pretrained one of 135 million parameters, from "
        "a Python package, or 'demo' for a small new one.",
    )
    dataset: str = _option(
        "netflix",
        "'netflix', 'sample', a CSV, TSV, JSONL, JSON, Parquet or .txt file, a folder of .txt files, or hf:NAME.",
    )
    text_column: str | None = _option(
        None, "Column with the texts. By default 'description', 'text', or the only column that looks like texts."
    )
    template: str | None = _option(
        None, "Prompt made of other columns: '{title} | {listed_in}: {description}'. The last column is the target."
    )
    loss_on_prompt: bool = _option(False, "Train on the prompt too, not only on the text that follows it.")
    validation_fraction: float = _option(0.1, "Fraction of the texts that is held out, chosen by a hash of each text.")
    max_length: int | None = _option(
        None, "Longest text in tokens, with its two special tokens. By default the model's window."
    )
    output_dir: str | None = _option("results", "Folder of the run: checkpoints, best model, results, curves.")
    cache_dir: str | None = _option(
        None, "Folder for tokenized texts. By default next to Hugging Face's cache of data sets."
    )

    lora: bool = _option(False, "Freeze the model and train small adapters (LoRA). Needs little host memory.")
    lora_rank: int = _option(16, "With --lora: rank of the adapters.")
    lora_alpha: float | None = _option(None, "With --lora: adapters are scaled by alpha / rank. By default 2 x rank.")
    learning_rate: float = _option(5e-5, "Peak learning rate.")
    lr_scheduler_type: str = _option("cosine", "Shape of the learning rate after the warm-up.")
    warmup_steps: float = _option(0.05, "Steps of warm-up, or below 1 their fraction of all steps.")
    weight_decay: float = _option(0.01, "Weight decay of AdamW.")
    num_train_epochs: float = _option(5.0, "Most epochs to train. Early stopping may end the run before.")
    max_steps: int = _option(-1, "Number of optimizer steps; -1: as many as --num_train_epochs takes.")
    early_stopping_patience: int = _option(2, "Stop after this many evaluations without a better loss; 0: never.")
    seed: int = _option(42, "Seed of new weights, shuffling and dropout.")

    per_device_train_batch_size: int = _option(64, "Texts in a batch of each device.")
    tokens_per_device_batch: int | str | None = _option(
        None, "Most tokens in a batch of each device, instead of a number of texts; 'auto': as many as fit.", **TOKENS
    )
    gradient_accumulation_steps: int = _option(1, "Batches before each optimizer step.")
    per_device_eval_batch_size: int = _option(32, "Texts in an evaluation batch of each device.")
    deepspeed: dict | str | None = _option(
        str(ROOT / "ds_config.json"), "DeepSpeed's JSON file; 'auto': the fastest file in ds_configs/ that fits."
    )
    bf16: bool | None = _option(None, "Train in bf16. By default on a GPU that has it.")
    fp16: bool | None = _option(None, "Train in fp16. By default on a GPU without bf16.")
    activation_checkpointing: int | str | None = _option(
        None,
        "Recompute activations in the backward pass: less memory, a third more compute. A number: of that many layers; "
        "'auto': of as few as memory needs.",
        **LAYERS,
    )
    gradient_checkpointing: bool | None = _option(None, "The older name of --activation_checkpointing.")
    use_cpu: bool | None = _option(None, "Train on the CPU. By default where there is no GPU.")
    dataloader_num_workers: int | None = _option(
        None, "Processes that prepare batches. By default 1 with a GPU, else 0."
    )
    local_rank: int = _option(-1, "Set by the launcher.")

    eval_strategy: str = _option("epoch", "When to evaluate: no, steps or epoch.")
    eval_on_start: bool = _option(True, "Evaluate the untouched model first, as the baseline.")
    save_strategy: str = _option("epoch", "When to save a checkpoint: no, steps, epoch or best.")
    save_total_limit: int | None = _option(2, "Checkpoints to keep. The newest and the best are never deleted.")
    resume_from_checkpoint: str | None = _option(None, "Checkpoint to continue from. By default the run's newest one.")
    override_resumed: list[str] | None = _option(
        None, "Settings that may differ from those of the run that is resumed: learning_rate weight_decay ..."
    )
    logging_steps: float = _option(10, "Steps between two lines of the log.")
    report_to: None | str | list[str] = _option("tensorboard", "Where to send curves.")
    disable_tqdm: bool | None = _option(None, "Show no progress bar.")
    sample_prompts: list[str] = field(
        default_factory=lambda: [""],
        metadata={"help": "Prompts for the samples that are written at each evaluation."},
    )
    num_progress_samples: int = _option(4, "Samples written at each evaluation, for each prompt; 0: none.")
    allow_pickle: bool = _option(
        False, "Load weights from a pickle (pytorch_model.bin) if there is no safetensors file."
    )

    push_to_hub: bool = _option(False, "Upload the best model to the Hugging Face hub at the end of the run.")
    hub_model_id: str | None = _option(
        None, "With --push_to_hub: the repository, OWNER/NAME. By default the name of --output_dir, under your user."
    )
    hub_private_repo: bool | None = _option(
        None, "With --push_to_hub: make a new repository private. By default as your account or organization has it."
    )
    hub_token: str | None = _option(None, "With --push_to_hub: a token that may write. HF_TOKEN or a login is safer.")

    plan: bool = _option(False, "Show what the run needs and whether it fits, and exit.")
    plan_must_fit: bool = _option(True, "Refuse a run that does not fit by its plan; false: warn and try.")
    plan_device_memory: str | None = _option(None, "With --plan: plan for a GPU of this size, such as 24GiB.")
    plan_host_memory: str | None = _option(None, "With --plan: plan for a host with this much free memory.")
    tune: str | None = _option(
        None,
        "Find the learning rate, and with --lora the rank, by short runs; 'array': write them for a SLURM array.",
        **TUNE,
    )
    tune_rates: list[str] | None = _option(
        None, "With --tune: learning rates to try. By default six from a quarter to eight times --learning_rate."
    )
    tune_steps: int | None = _option(
        None, "With --tune: steps of the longest runs. By default all runs together train for about two epochs."
    )
    eval_only: bool = _option(
        False, "Evaluate the model on held-out texts and exit. By default on those of the run that trained it."
    )


# How --help groups them. The first group has what most runs need.
GROUPS = {
    "most used": """config model_name_or_path dataset text_column template validation_fraction output_dir
        num_train_epochs learning_rate per_device_train_batch_size deepspeed lora plan eval_only""",
    "texts": "loss_on_prompt max_length cache_dir",
    "training": """max_steps lr_scheduler_type warmup_steps weight_decay early_stopping_patience seed lora_rank
        lora_alpha gradient_accumulation_steps""",
    "learning rate": "tune tune_rates tune_steps",
    "memory and speed": """tokens_per_device_batch per_device_eval_batch_size bf16 fp16 activation_checkpointing use_cpu
        dataloader_num_workers plan_must_fit plan_device_memory plan_host_memory""",
    "publishing": "push_to_hub hub_model_id hub_private_repo hub_token",
    "evaluation, checkpoints, logs": """eval_strategy eval_on_start save_strategy save_total_limit
        resume_from_checkpoint override_resumed logging_steps report_to disable_tqdm sample_prompts num_progress_samples
        allow_pickle""",
}

# Values that are valid in every run. Any other value of these flags is checked with the help of transformers.
PLAIN_VALUES = {
    "lr_scheduler_type": ("linear", "cosine", "constant", "constant_with_warmup"),
    "eval_strategy": ("no", "epoch"),
    "save_strategy": ("no", "epoch"),
    "report_to": ("none", "tensorboard", ["none"], ["tensorboard"]),
}
