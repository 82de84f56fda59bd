"""The optimizer's settings once a checkpoint is loaded into it."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from neoflix.training.resuming import read_hyperparameters, restore_settings


@pytest.fixture
def resumed():
    """(optimizer, schedule, this start's settings) as they are after the state of another start was loaded."""

    def make(rate: float, weight_decay: float):
        groups = [
            {"params": [torch.zeros(2, requires_grad=True)], "weight_decay": decay} for decay in (weight_decay, 0)
        ]
        optimizer = torch.optim.AdamW(groups, lr=rate)
        return optimizer, LambdaLR(optimizer, lambda step: 1 - step / 10)

    earlier, earlier_schedule = make(1e-3, 0.01)
    for _ in range(4):
        earlier.step()
        earlier_schedule.step()
    optimizer, schedule = make(4e-4, 0.5)
    settings = read_hyperparameters(optimizer)
    optimizer.load_state_dict(earlier.state_dict())
    schedule.load_state_dict(earlier_schedule.state_dict())
    return optimizer, schedule, settings


def test_a_start_that_changes_settings_brings_its_own(resumed):
    optimizer, schedule, _ = resumed
    restore_settings(*resumed, has_changes=True)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([4e-4 * 0.6] * 2)
    assert schedule.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([4e-4 * 0.5] * 2)


def test_any_other_goes_on_with_the_rate_of_the_checkpoint(resumed):
    optimizer, schedule, settings = resumed
    optimizer.param_groups[1]["weight_decay"] = 0.01  # as DeepSpeed loads a universal checkpoint
    settings = [group | {"weight_decay": decay} for group, decay in zip(settings, (0.01, 0), strict=True)]
    restore_settings(optimizer, schedule, settings, has_changes=False)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0]
    assert schedule.get_last_lr() == pytest.approx([1e-3 * 0.6] * 2)
