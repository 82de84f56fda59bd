"""Settings of a plan from flags and environment."""

import pytest

from neoflix.arguments.parse import read_all_flags
from neoflix.arguments.reader import read_train_flags
from neoflix.planning.plan_run import plan_run
from neoflix.planning.settings import rounds_pinned
from neoflix.runtime.gpus import PINNED_MEMORY


def test_pinned_memory_is_neither_rounded_nor_cached_beyond_one_limit(monkeypatch):
    limits = dict(setting.split(":") for setting in PINNED_MEMORY.split(","))
    assert limits.keys() == {"pinned_max_round_threshold_mb", "pinned_max_cached_size_mb"}
    assert len(set(limits.values())) == 1, "torch 2.13 hands a cached buffer out that is too small"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", PINNED_MEMORY)
    assert not rounds_pinned()


@pytest.mark.parametrize(
    ("words", "weight_bytes"),
    [
        ([], 2),
        (["--bf16", "false", "--fp16", "false"], 4),
        (["--bf16", "false"], 4),
        (["--fp16", "true"], 2),
        (["--use-cpu", "false"], 2),
    ],
)
def test_precision_is_planned_as_it_will_be(words, weight_bytes, train_words):
    """Without torch, and by the parser of all flags."""
    words = [*train_words[:-2], *words, "--deepspeed", "ds_configs/cpu.json", "--plan", "--plan_device_memory", "24GiB"]
    quick = plan_run(read_train_flags(words))
    full = plan_run(read_all_flags([*words, "--adam_beta2", "0.99"]))
    assert quick.settings.weight_bytes == full.settings.weight_bytes == weight_bytes
