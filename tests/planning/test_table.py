"""The plan next to what a run measured."""

import json
from pathlib import Path

import pytest
from conftest import GIB

import train
from neoflix.planning.host_memory import CPU_PROCESS


@pytest.mark.process
def test_run_compares_its_plan_with_what_it_took(train_words, tmp_path, capsys):
    """`auto` in a real run, its plan, and the measured peak beside it."""
    run = tmp_path / "run"
    words = [*train_words, "--deepspeed", "auto", "--tokens_per_device_batch", "auto", "--max_steps", "2"]
    train.main([*words, "--num_train_epochs", "1"])
    said = capsys.readouterr().out
    assert "--deepspeed auto: ds_configs/cpu.json" in said
    assert "--tokens_per_device_batch auto: " in said
    assert said.count("plan: host") == 1
    results = json.loads((run / "all_results.json").read_text())
    assert results["plan_host_bytes"] > CPU_PROCESS[4]
    measured = f"measured {results['train_peak_host_bytes'] / GIB:.1f} GiB"
    assert measured in said
    assert any(Path(tmp_path, "cache").glob("counts-*.json"))
