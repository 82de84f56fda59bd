"""Flags that a plan needs, with their defaults."""

from neoflix.runtime.files import ROOT

LORA_RANK = 16  # train.py's default

# The flags that a plan looks at, with train.py's defaults (`tests/planning/test_forecast.py` holds them equal).
PLAN_FLAGS = {
    "model_name_or_path": "EleutherAI/gpt-neo-2.7B", "dataset": "netflix", "text_column": None, "template": None,
    "validation_fraction": 0.1, "max_length": None, "cache_dir": None, "output_dir": "results",
    "deepspeed": str(ROOT / "ds_config.json"), "per_device_train_batch_size": 64, "tokens_per_device_batch": None,
    "per_device_eval_batch_size": 32, "gradient_accumulation_steps": 1, "num_train_epochs": 5.0, "max_steps": -1,
    "save_strategy": "epoch", "save_total_limit": 2, "bf16": None, "fp16": None, "use_cpu": False,
    "gradient_checkpointing": None, "activation_checkpointing": None, "plan": True, "plan_device_memory": None,
    "plan_host_memory": None, "plan_must_fit": True, "lora": False, "lora_rank": LORA_RANK,
}  # fmt: skip


# Further flags that recipes set and no plan depends on, and their types; of words, those that need no further check.
OTHER_FLAGS = {
    "learning_rate": float, "warmup_steps": float, "weight_decay": float, "logging_steps": float, "lora_alpha": float,
    "early_stopping_patience": int, "seed": int, "local_rank": int, "num_progress_samples": int, "sample_prompts": str,
    "disable_tqdm": bool, "eval_strategy": ("no", "epoch"), "lr_scheduler_type": ("linear", "cosine", "constant"),
    "report_to": ("none", "tensorboard"),
}  # fmt: skip
