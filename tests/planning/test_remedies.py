"""What a plan recommends to a run that does not fit, or that ran out of memory."""

from dataclasses import replace

import pytest
import torch
from conftest import GIB, LLAMA, NETFLIX, card, forecast_of, plan_flags, shape_of

import train
from neoflix.arguments.deepspeed_file import read_ds_config
from neoflix.arguments.reader import read_train_flags
from neoflix.data.packing import PackedCollator
from neoflix.model.shape import read_shape
from neoflix.planning.forecast import forecast
from neoflix.planning.lengths import Texts
from neoflix.planning.remedies import explain, explain_failure, smallest_changes
from neoflix.planning.settings import read_settings
from neoflix.runtime.hardware import Machine


@pytest.mark.parametrize(
    ("size", "gib", "host"), [("2.7B", 12, 64), ("2.7B", 16, 64), ("2.7B", 24, 48), ("1.3B", 8, 64), ("2.7B", 80, 40)]
)
def test_every_change_it_names_makes_the_run_fit(size, gib, host, processes, monkeypatch):
    """The words, given to train.py, lead to the very forecast that stands beside them."""
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    machine = card(gib, host)
    misfit = forecast_of(size, machine)
    assert not misfit.fits
    text = explain(misfit)
    assert "too large" in text
    changes = smallest_changes(misfit)
    assert changes
    for words, changed in changes:
        assert words in text
        args = plan_flags(*words.split()) if words.startswith("--") else plan_flags()
        shape = read_shape(args.model_name_or_path) if "--model" in words else shape_of(size)
        config = read_ds_config(args.deepspeed)
        settings = read_settings(args, shape, NETFLIX, machine, config)
        again = forecast(shape, NETFLIX, settings, machine)
        assert again.fits
        assert again.host_bytes == changed.host_bytes
        assert again.device_bytes == pytest.approx(changed.device_bytes, rel=0.01)


@pytest.mark.process
def test_out_of_memory_shows_the_plan(train_words, tmp_path, monkeypatch):
    """The allocator's own error, for more than any machine has."""
    monkeypatch.setattr(PackedCollator, "__call__", lambda *_: torch.empty(2**56))
    with pytest.raises(ValueError, match="out of memory") as caught:
        train.main([*train_words, "--eval_strategy", "no", "--eval_on_start", "false"])
    for part in ("host memory", "Python, torch, DeepSpeed"):
        assert part in str(caught.value)
    message = explain_failure(forecast_of("2.7B", card(24)), "CUDA out of memory", 22 * GIB, 23 * GIB, 40 * GIB)
    for size in ("22.0 GiB", "23.0 GiB", "40.0 GiB"):
        assert size in message
    changes = [line for line in message.splitlines() if line.startswith("  --")]
    assert len(changes) == 3
    assert "--per_device_train_batch_size 32 --gradient_accumulation_steps 2" in changes[0]


def test_changes_are_single_and_the_smallest_come_first():
    plan = forecast_of("2.7B", card(16))
    flags = [flags for flags, _ in smallest_changes(plan, most=99)]
    kinds = [words.split()[0] for words in flags]
    assert len(kinds) == len(set(flags))
    assert kinds.index("--activation_checkpointing") < kinds.index("--model_name_or_path")
    assert kinds[0] == "--per_device_train_batch_size"


def test_a_machine_on_which_nothing_fits():
    assert not smallest_changes(forecast_of("125M", card(0.5, 1)))
    assert "smaller model" in explain(forecast_of("125M", card(0.5, 1)))


def test_changes_of_a_padded_run_keep_its_budget(tmp_path):
    LLAMA.save_pretrained(tmp_path)
    shape = replace(read_shape(str(tmp_path)), model_type="bloom")  # texts of a Llama are packed
    texts = Texts(7008, 779, 32.0, 5.0, 51, "given")
    args = read_train_flags(["--plan", "--tokens_per_device_batch", "6400"])
    roomy = Machine(2**40, None, 2)
    whole = forecast(shape, texts, read_settings(args, shape, texts, roomy, {}), roomy)
    tight = Machine(int(whole.host_bytes * 0.9), None, 2)
    words, changed = smallest_changes(forecast(shape, texts, read_settings(args, shape, texts, tight, {}), tight))[0]
    assert words == "--tokens_per_device_batch 3200 --gradient_accumulation_steps 2"
    again = read_settings(read_train_flags(["--plan", *words.split()]), shape, texts, tight, {})
    assert again.batch_tokens == changed.settings.batch_tokens
