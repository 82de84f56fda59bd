"""DeepSpeed's operators are compiled once, whatever happened to an earlier build."""

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
def test_a_killed_build_blocks_no_later_one(tmp_path, is_held):
    """torch's lock is removed if no process holds it, and only then."""
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
