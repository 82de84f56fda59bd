"""Two processes on the CPU: the same run as with one."""

import json
import signal
import time

import pytest
import torch
from conftest import DEEPSPEED, environment_without_launcher, free_port, losses, results, run_program
from forked import launch, start_ranks
from safetensors.torch import load_file

from neoflix.checkpoints.names import LIVE_SAMPLES_FILE
from neoflix.reporting.run_log import read_live_samples
from neoflix.sampling.sampler import Sampler


@pytest.fixture
def deepspeed_run(train_words, tmp_path):
    """deepspeed_run("name", processes, *words) -> (the run's folder, what it said)"""

    def run(name: str, num_processes: int, *words: str):
        folder = tmp_path / name
        return folder, launch(num_processes, "train.py", *train_words, "--output_dir", folder, *words)

    return run


def same_weights(one, other) -> bool:
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return all(torch.allclose(ours[name], theirs[name], atol=2e-5, rtol=1e-4) for name in ours)


def first_samples(folder) -> list[str]:
    """Texts of the model before its first step: the same in any number of processes, at any ZeRO stage."""
    texts = [row["text"] for row in read_live_samples(folder) if row["step"] == 0]
    assert len(texts) == 4
    return texts


def test_two_processes_are_one(deepspeed_run):
    """Same texts a step, same losses, same weights, over epochs whose last step is not full."""
    words = ["--num_train_epochs", "2"]
    one, _ = deepspeed_run("one", 1, *words)
    two, output = deepspeed_run("two", 2, *words, "--per_device_train_batch_size", "4")
    assert len(losses(one)) == 14
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert losses(two, "eval_loss") == pytest.approx(losses(one, "eval_loss"), rel=1e-5)
    assert same_weights(one, two)
    assert (two / "checkpoint-14" / "global_step14" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").is_file()
    assert output.count("Best model in") == 1, "more than one process spoke"
    assert first_samples(two) == first_samples(one)

    # Resumed on two processes, the run goes on by itself.
    _, output = deepspeed_run("two", 2, "--num_train_epochs", "3", "--per_device_train_batch_size", "4")
    assert "Resuming from" in output
    assert results(two)["global_step"] == 21


def test_two_processes_take_the_token_batches_that_one_accumulates(deepspeed_run):
    words = ["--num_train_epochs", "1", "--tokens_per_device_batch", "300"]
    one, _ = deepspeed_run("one", 1, *words, "--gradient_accumulation_steps", "2")
    two, _ = deepspeed_run("two", 2, *words)
    assert len(losses(one)) >= 8
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert same_weights(one, two)


def test_zero_3_shards_and_saves_whole_weights(deepspeed_run, tmp_path):
    """The contract holds at stage 3 as well: vocabulary grown before sharding, weights whole on disk."""
    config = tmp_path / "zero3.json"
    optimizer = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
    config.write_text(
        json.dumps(
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu"},
                    "stage3_gather_16bit_weights_on_model_save": True,
                },
                "optimizer": optimizer,
                "gradient_clipping": "auto",
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "train_batch_size": "auto",
                "steps_per_print": 1000000000,
            }
        )
    )
    words = ["--num_train_epochs", "1"]
    one, _ = deepspeed_run("one", 1, *words)
    three, output = deepspeed_run("three", 2, *words, "--per_device_train_batch_size", "4", "--deepspeed", str(config))
    assert losses(three) == pytest.approx(losses(one), rel=1e-4)
    assert same_weights(one, three)
    assert first_samples(one)
    assert not (three / LIVE_SAMPLES_FILE).exists()
    assert output.count("No samples during training") == 1
    assert Sampler.load(three, device="cpu").model.config.vocab_size == 512


def test_the_main_process_writes_to_the_folder_after_the_others_have_checked_it(train_words, tmp_path):
    """A process that starts late checks the folder as it was before the run."""
    logs, folder = [tmp_path / "0", tmp_path / "1"], tmp_path / "run"
    words = [*train_words, "--max_steps", "1", "--per_device_train_batch_size", "4", "--num_progress_samples", "0"]
    programs = start_ranks(2, "train.py", *words, env=environment_without_launcher(), logs=logs)
    try:
        programs[1].send_signal(signal.SIGSTOP)
        while "plan: " not in logs[0].read_text():
            assert programs[0].poll() is None, logs[0].read_text()
            time.sleep(0.05)
        time.sleep(1)  # in which a main process that does not wait writes to the folder
        assert not folder.exists()
        programs[1].send_signal(signal.SIGCONT)
        codes = [program.wait(300) for program in programs]
    finally:
        for program in programs:
            program.kill()
            program.wait()
    assert codes == [0, 0], logs[1].read_text()
    assert results(folder)["global_step"] == 1


def test_zero_3_shards_the_demo_model(deepspeed_run):
    words = ["--model_name_or_path", "demo", "--deepspeed", "ds_configs/zero3_offload.json", "--max_steps", "1"]
    folder, _ = deepspeed_run("demo", 2, *words, "--per_device_train_batch_size", "4", "--num_progress_samples", "0")
    assert results(folder)["global_step"] == 1
    assert Sampler.load(folder, device="cpu").model.config.num_layers == 4


def test_bad_input_ends_all_processes_with_exit_code_2(train_words, tmp_path):
    """By way of the real launcher."""
    launcher = [DEEPSPEED, "--num_accelerators", "2", "--master_port", free_port()]
    output = run_program(*launcher, "train.py", *train_words, "--text_column", "synopsis", expect=2)
    assert sum(line.startswith("error: ") for line in output.splitlines()) == 1
    assert "it has title, description" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()
