"""DeepSpeed's internals, as far as this project touches them."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import PYTHON, losses, run_program, weights
from torch.utils.cpp_extension import _get_build_directory

LOAD = """
from neoflix.runtime.environment import prepare_environment
prepare_environment()
from neoflix.training.deepspeed import build_operators, disable_shm_collectives
disable_shm_collectives()
build_operators({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
print("loaded")
"""


@pytest.mark.parametrize("is_held", [False, True])
@pytest.mark.process
def test_a_build_that_was_killed_keeps_nobody_waiting(tmp_path, is_held):
    """torch's lock is passed over where nobody holds it, and only there."""
    run_program(PYTHON, "-c", LOAD)  # built, for certain
    built = Path(_get_build_directory("cpu_adam", verbose=False))
    shutil.copytree(built, tmp_path / "cpu_adam")
    env = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    lock = (tmp_path / "cpu_adam" / "lock").open("w")
    if not is_held:
        lock.close()
        assert "loaded" in run_program(PYTHON, "-c", LOAD, env=env, timeout=60)
        return
    with pytest.raises(AssertionError, match="still running"):
        run_program(PYTHON, "-c", LOAD, env=env, timeout=15)
    lock.close()


OFFLOADED = ["--deepspeed", "ds_config.json", "--max_steps", "4", "--logging_steps", "1"]


def test_gradients_read_together_are_read_as_deepspeed_reads_them(run, monkeypatch):
    """Same norms and weights, bit for bit, and the backward pass asks for no gradient's values."""
    asked, ask = [], torch.Tensor.__bool__

    def ask_and_count(tensor):
        if sys._getframe(1).f_code.co_name.startswith("update_offload_overflow_tracker"):
            asked.append(tensor)
        return ask(tensor)

    monkeypatch.setattr(torch.Tensor, "__bool__", ask_and_count)
    ours = run("ours", *OFFLOADED)
    assert not asked
    monkeypatch.setattr("neoflix.training.deepspeed.read_gradients_together", lambda engine: None)
    theirs = run("theirs", *OFFLOADED)
    assert len(asked) > 4 * 10
    assert losses(ours, "grad_norm") == losses(theirs, "grad_norm")
    assert all(torch.equal(weight, weights(theirs)[name]) for name, weight in weights(ours).items())


def test_an_infinite_gradient_skips_an_offloaded_step(run, monkeypatch):
    """The weights stay as they are: the gradient of one weight is infinite at every step."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    from neoflix.training.trainer import TokenTrainer

    trained, asked, before, seen = TokenTrainer.train, DeepSpeedZeroOptimizer.has_overflow, {}, []

    def ask_and_remember(optimizer, *args):
        seen.append(bool(optimizer.local_overflow))
        return asked(optimizer, *args)

    def train_with_infinity(trainer, start):
        before.update({name: weight.detach().clone() for name, weight in trainer.model.named_parameters()})
        trainer.model.transformer.ln_f.bias.register_hook(lambda gradient: gradient.fill_(torch.inf))
        return trained(trainer, start)

    monkeypatch.setattr(DeepSpeedZeroOptimizer, "has_overflow", ask_and_remember)
    monkeypatch.setattr(TokenTrainer, "train", train_with_infinity)
    after = weights(run("run", *OFFLOADED, "--bf16", "true"))
    assert all(torch.equal(before[name], weight) for name, weight in after.items())
    assert seen == [True] * 4
