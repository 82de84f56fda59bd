"""Device and precision, where no flag sets them."""

import pytest
import torch

from neoflix.arguments.device import follow_hardware
from neoflix.arguments.reader import read_train_flags


@pytest.fixture
def gpu(monkeypatch):
    """gpu(has_bf16) makes torch see a GPU."""

    def see(has_bf16: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)

    return see


def follow(*words: str) -> tuple:
    flags = read_train_flags(list(words))
    follow_hardware(flags)
    return flags.use_cpu, flags.bf16, flags.fp16, flags.dataloader_num_workers


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_gpu_trains_in_half_precision(gpu, has_bf16):
    gpu(has_bf16)
    assert follow() == (False, has_bf16, not has_bf16, 1)
    assert follow("--fp16", "true") == (False, None, True, 1)
    assert follow("--bf16", "false", "--dataloader_num_workers", "0") == (False, False, None, 0)
    assert follow("--use_cpu", "true") == (True, False, False, 0)


def test_a_plan_for_another_gpu_leaves_the_precision_open():
    assert follow("--use_cpu", "true", "--plan", "--plan_device_memory", "24GiB")[1:3] == (None, None)
