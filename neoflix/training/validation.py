"""The loss on the held-out texts, per token, and which of its figures belong to the saved model."""

import math

import torch
from transformers import Trainer

from neoflix.data.packing import IGNORE_INDEX
from neoflix.runtime.errors import DivergedError
from neoflix.training.divergence import diverged


def measure_loss(trainer: Trainer, loader, num_chars: int) -> dict[str, float]:
    """Computes the loss in nats per real token, end token included, exact for any batch size and world size.

    Collective.

    Args:
        num_chars: characters of all texts together.

    Returns:
        `loss`, `perplexity`, `bits_per_char` (of the texts' own characters).

    Raises:
        DivergedError: where the loss is NaN or infinite.
    """
    loss_sum, num_labels = _sum_losses(trainer, loader)
    loss, args = loss_sum / num_labels, trainer.args
    if not math.isfinite(loss):
        what = f"the loss on the held-out texts is {loss}"
        if args.eval_only:
            raise DivergedError(f"{args.model_name_or_path}: {what}")
        raise diverged(args, trainer.state.global_step, what)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_char": loss_sum / math.log(2) / num_chars,
    }


@torch.no_grad()
def _sum_losses(trainer: Trainer, loader) -> tuple[float, float]:
    """(sum of losses in nats, number of labels) over all processes."""
    model, args = trainer.model_wrapped, trainer.args
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=args.device)
    for inputs in loader:
        inputs = trainer._prepare_inputs(inputs)
        num_labels = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        mean_loss = model(**inputs).loss.double()
        totals += torch.stack([torch.where(num_labels > 0, mean_loss * num_labels, 0.0), num_labels.double()])
        trainer.control = trainer.callback_handler.on_prediction_step(args, trainer.state, trainer.control)
    return tuple(trainer.accelerator.reduce(totals, reduction="sum").tolist())


def is_evaluated(state) -> bool:
    """Whether the model as it is now was evaluated."""
    return any("eval_loss" in line and line["step"] == state.global_step for line in state.log_history)


def saved_model_figures(state, saved_step: int | None) -> dict[str, float]:
    """The figures of the model saved at a step, and `untouched_perplexity`, that before training; what was not measured
    is absent."""
    evaluations, figures = [line for line in state.log_history if "eval_loss" in line], {}
    if evaluations and evaluations[0]["step"] == 0:
        figures["untouched_perplexity"] = evaluations[0]["eval_perplexity"]
    if saved := [line for line in evaluations if line["step"] == saved_step]:
        figures |= {key: value for key, value in saved[-1].items() if key.startswith("eval_")}
        figures |= {"perplexity": saved[-1]["eval_perplexity"], "saved_step": saved_step}
    return figures
