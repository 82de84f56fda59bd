"""The loss on the held-out texts is a mean over tokens, and its figures are those of the saved model."""

import math
from types import SimpleNamespace

import pytest
import torch

from neoflix.runtime.errors import DivergedError
from neoflix.training.validation import is_evaluated, measure_loss, saved_model_figures

HISTORY = [
    {"step": 0, "eval_loss": 6.0, "eval_perplexity": 403.0},
    {"step": 2, "loss": 5.5},
    {"step": 4, "eval_loss": 5.0, "eval_perplexity": 148.0},
    {"step": 4, "eval_loss": 4.9, "eval_perplexity": 134.0},
]


@pytest.fixture
def trainer():
    """A trainer whose model's loss is the mean of the labels."""

    class Mean(torch.nn.Module):
        def forward(self, labels):
            shifted = labels[:, 1:]
            return SimpleNamespace(loss=shifted[shifted != -100].float().mean())

    return SimpleNamespace(
        model_wrapped=Mean(),
        args=SimpleNamespace(
            device="cpu", eval_only=False, fp16=False, max_grad_norm=1.0, learning_rate=1e-3, output_dir="nowhere"
        ),
        state=SimpleNamespace(global_step=7),
        control=None,
        callback_handler=SimpleNamespace(on_prediction_step=lambda args, state, control: control),
        accelerator=SimpleNamespace(reduce=lambda totals, reduction: totals),
        _prepare_inputs=lambda inputs: inputs,
    )


def test_every_token_counts_once_in_whatever_batch_it_lies(trainer):
    batches = [[[9, 1, 2, 3], [9, 4, -100, -100]], [[9, 6, 8]], [[9]]]  # the last, a filler, has no label
    loader = [{"labels": torch.tensor(batch)} for batch in batches]
    figures = measure_loss(trainer, loader, num_chars=12)
    assert figures["loss"] == pytest.approx(24 / 6)
    assert figures["perplexity"] == pytest.approx(math.exp(4))
    assert figures["bits_per_char"] == pytest.approx(24 / math.log(2) / 12)


def test_an_infinite_loss_is_divergence(trainer):
    loader = [{"labels": torch.tensor([[0.0, math.inf]])}]
    with pytest.raises(DivergedError, match=r"step 7.*held-out.*inf"):
        measure_loss(trainer, loader, num_chars=1)
    trainer.args.eval_only, trainer.args.model_name_or_path = True, "some-model"
    with pytest.raises(DivergedError, match=r"some-model.*inf"):
        measure_loss(trainer, loader, num_chars=1)


def test_a_model_is_evaluated_at_its_own_step_alone():
    for step, expected in ((0, True), (2, False), (4, True), (5, False)):
        assert is_evaluated(SimpleNamespace(log_history=HISTORY, global_step=step)) == expected


def test_figures_are_of_the_saved_step():
    state = SimpleNamespace(log_history=HISTORY)
    assert saved_model_figures(state, 4) == {
        "untouched_perplexity": 403.0,
        "eval_loss": 4.9,
        "eval_perplexity": 134.0,
        "perplexity": 134.0,
        "saved_step": 4,
    }
    assert saved_model_figures(state, 6) == {"untouched_perplexity": 403.0}
    assert saved_model_figures(SimpleNamespace(log_history=HISTORY[1:2]), 2) == {}
