"""What a machine has free."""

import shutil

from conftest import GIB

from neoflix.runtime import hardware
from neoflix.runtime.hardware import read_host_memory, read_machine


def test_memory_is_what_the_tightest_cgroup_leaves(tmp_path):
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:  8388608 kB\n")
    (proc / "self" / "cgroup").write_text("0::/job/step\n")
    assert read_host_memory(proc, cgroups) == 8 * GIB, "no limit anywhere"
    job = cgroups / "job"
    (job / "step").mkdir(parents=True)
    (job / "step" / "memory.max").write_text("max\n")
    (job / "step" / "memory.current").write_text("5\n")
    (job / "memory.max").write_text(f"{4 * GIB}\n")
    (job / "memory.current").write_text(f"{3 * GIB}\n")
    (job / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\n")
    assert read_host_memory(proc, cgroups) == 2 * GIB, "the one above limits; pages of files count as free"

    (proc / "self" / "cgroup").write_text("4:cpu:/x\n3:memory:/old\n")
    old = cgroups / "memory" / "old"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text(f"{6 * GIB}")
    (old / "memory.usage_in_bytes").write_text(f"{GIB}")
    assert read_host_memory(proc, cgroups) == 5 * GIB, "version 1"


def test_checkpoints_that_lie_there_already_need_no_other_space(tmp_path, monkeypatch):
    """The disk's free space is fixed here: other programs write to it meanwhile."""
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda folder: free)
    before = read_machine(str(tmp_path)).disk
    (tmp_path / "checkpoint-4" / "global_step4").mkdir(parents=True)
    (tmp_path / "checkpoint-4" / "global_step4" / "states.pt").write_bytes(bytes(3 * 2**20))
    assert read_machine(str(tmp_path)).disk == before + 3 * 2**20
