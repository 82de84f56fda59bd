"""Flags whose values transformers, torch or an installed package has to check."""

import json

from accelerate.utils import DynamoBackend
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from neoflix.arguments.recipes import nearest
from neoflix.runtime.errors import UserError

# The figures of an evaluation. Less is better for each of them.
METRICS = [f"{prefix}{metric}" for prefix in ("eval_", "") for metric in ("loss", "perplexity", "bits_per_char")]
JSON_FLAGS = ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
PACKAGES = {"azure_ml": "azureml-core", "neptune": "neptune-client"}  # named differently in --report_to


def check_words(flags) -> None:
    """Raises UserError for a word that its flag does not have."""
    words = {
        "eval_strategy": IntervalStrategy,
        "logging_strategy": IntervalStrategy,
        "save_strategy": SaveStrategy,
        "lr_scheduler_type": SchedulerType,
        "optim": OptimizerNames,
        "debug": ("", "underflow_overflow"),
        "metric_for_best_model": METRICS,
        "torch_compile_mode": _compile_modes() if flags.torch_compile_mode else (),
        "torch_compile_backend": _compile_backends() if flags.torch_compile_backend else (),
    }
    for name, known in words.items():
        value, known = getattr(flags, name), [getattr(word, "value", word) for word in known]
        for word in value if isinstance(value, list) else [value]:
            if getattr(word, "value", word) not in (None, *known):
                raise UserError(
                    f"--{name} {word}: must be one of {', '.join(filter(None, known))}{nearest(word, known)}"
                )
    if flags.greater_is_better and flags.metric_for_best_model:
        raise UserError(f"--greater_is_better true: a lower {flags.metric_for_best_model} is better; leave it out")


def _compile_modes() -> list[str]:
    from torch._inductor import list_mode_options  # seconds

    return list(list_mode_options())


def _compile_backends() -> list[str]:
    """The backends of torch.compile that accelerate accepts."""
    from torch._dynamo import list_backends  # seconds

    return sorted({backend.value.lower() for backend in DynamoBackend} & set(list_backends(None)))


def read_objects(flags) -> dict:
    """The flags that are JSON objects, as dicts. UserError for any other JSON."""
    return {name: _read_object(name, value) for name in JSON_FLAGS if (value := getattr(flags, name, None))}


def _read_object(name: str, value: str | dict) -> dict:
    if isinstance(value, dict):
        return value
    try:
        read = json.loads(value)
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise UserError(f"--{name} {value}: must be a JSON object, such as '{{\"num_cycles\": 2}}'")
    return read


def check_report_to(report_to: str | list[str] | None) -> None:
    """Raises UserError if transformers does not know a program that curves are sent to, or it is not installed."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    if names in (["all"], ["none"]):
        return
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ["none", "all", *sorted(INTEGRATION_TO_CALLBACK)]
            raise UserError(f"--report_to {name}: must be one of {', '.join(known)}{nearest(name, known)}")
        if name not in {*get_available_reporting_integrations(), "flyte"}:
            raise UserError(
                f"--report_to {name}: its package is not installed; `pip install {PACKAGES.get(name, name)}`, or use "
                "--report_to tensorboard or none"
            )
