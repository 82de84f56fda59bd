"""What the server of forked.py loads once: all that a run imports, and what DeepSpeed finds out about the machine.

Nothing here may start a thread: it would be missing in what is forked.
"""

import functools
import gc

import cpuinfo
import deepspeed.runtime.engine
import matplotlib.backends.backend_svg
import matplotlib.figure
import tensorboard
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.runtime.zero.muon import muon_optimizer  # torch's compiler with it: two seconds

import generate
import train
from neoflix.runtime.environment import prepare_environment
from neoflix.training.deepspeed import build_operators

# Starts a process for a second, three times in each run; the answer is the same for all.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)

prepare_environment()
build_operators({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
gc.collect()
gc.freeze()  # no collection looks at it again, neither here nor in what is forked
