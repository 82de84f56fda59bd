"""DeepSpeed's internals, as far as this project touches them."""

import shutil
from pathlib import Path

import pytest
from conftest import PYTHON, run_program
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
