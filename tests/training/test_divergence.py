"""A run that diverges ends."""

import pytest

import train


def test_loss_that_is_no_number_ends_the_run(train_words):
    words = ["--learning_rate", "1e30", "--max_steps", "20", "--eval_strategy", "no", "--save_strategy", "no"]
    with pytest.raises(ValueError, match=r"the loss is (nan|inf); use a lower --learning_rate than 1e\+30"):
        train.main([*train_words, *words, "--max_grad_norm", "0"])


def test_steps_that_are_skipped_one_after_the_other_end_the_run(train_words, monkeypatch):
    """DeepSpeed skips a step whose gradients are infinite, and says nothing."""
    load_model = train.load_model

    def load_overflowing_model(*args, **options):
        model = load_model(*args, **options)
        model.transformer.ln_f.weight.register_hook(lambda gradient: gradient * float("inf"))
        return model

    monkeypatch.setattr(train, "load_model", load_overflowing_model)
    words = ["--max_steps", "20", "--eval_strategy", "no", "--save_strategy", "no"]
    with pytest.raises(ValueError, match="step 10: 10 steps in a row were skipped: gradients overflow; use a"):
        train.main([*train_words, *words])
