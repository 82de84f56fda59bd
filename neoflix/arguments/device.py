"""Flags that the hardware decides unless they are given."""

import argparse

import torch

from neoflix.runtime.hardware import has_gpu


def follow_hardware(flags: argparse.Namespace) -> None:
    """Sets the device, the precision and the number of data loader processes where they are None.

    A GPU trains in bf16 if it has it, else in fp16, and a process next to it prepares the next batch; a CPU trains in
    fp32. A plan for another GPU leaves the precision to that GPU.
    """
    if flags.use_cpu is None:
        flags.use_cpu = not has_gpu()
    is_gpu = not flags.use_cpu and has_gpu()
    if flags.dataloader_num_workers is None:
        flags.dataloader_num_workers = int(is_gpu)
    if flags.bf16 is None and flags.fp16 is None and not flags.plan_device_memory:
        flags.bf16 = is_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        flags.fp16 = is_gpu and not flags.bf16
