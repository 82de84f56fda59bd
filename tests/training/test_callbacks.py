"""What a run does, checks and shows while it trains."""

import pytest

import train
from neoflix.training.callbacks import Progress


def test_figures_behind_the_bar():
    logs = {"loss": 2.5, "tokens_per_second": 1234.5, "peak_host_bytes": 2**31}
    assert Progress._figures(logs) == {"loss": "2.500", "tok/s": "1,234", "GiB": "2.0"}
    on_gpu = logs | {"mfu": 0.412, "peak_device_bytes": 2**34, "skipped_steps": 3}
    expected = {"loss": "2.500", "tok/s": "1,234", "MFU": "41%", "GiB": "16.0", "skipped": "3"}
    assert Progress._figures(on_gpu) == expected


@pytest.mark.process
def test_loss_that_is_no_number_ends_the_run(train_words):
    words = ["--learning_rate", "1e30", "--max_steps", "20", "--eval_strategy", "no", "--save_strategy", "no"]
    with pytest.raises(ValueError, match=r"the loss is (nan|inf).*--learning_rate than 1e\+30"):
        train.main([*train_words, *words, "--max_grad_norm", "0"])


@pytest.mark.process
def test_steps_that_are_skipped_one_after_the_other_end_the_run(train_words, monkeypatch):
    """DeepSpeed skips a step whose gradients are infinite, and says nothing."""
    load_model = train.load_model

    def load_overflowing_model(*args, **options):
        model = load_model(*args, **options)
        model.transformer.ln_f.weight.register_hook(lambda gradient: gradient * float("inf"))
        return model

    monkeypatch.setattr(train, "load_model", load_overflowing_model)
    words = ["--max_steps", "20", "--eval_strategy", "no", "--save_strategy", "no"]
    with pytest.raises(ValueError, match=r"step 10: 10 steps .*overflow"):
        train.main([*train_words, *words])
