"""Perplexity of texts under the model that a run began with."""

import math
from collections.abc import Iterable

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from neoflix.checkpoints.runs import find_run
from neoflix.data.packing import IGNORE_INDEX
from neoflix.data.tokenizer import read_tokenizer
from neoflix.model.load import DEMO, load_for_reading
from neoflix.model.vocabulary import get_window
from neoflix.runtime.console import progress
from neoflix.runtime.errors import UserError

PERPLEXITY_TEXTS = 1000  # a large model reads no more of them: at 1,000 texts chance moves the figure by a few per cent


BATCH_SIZE = 8  # texts that the base model reads at once


def find_base_model(args) -> tuple[str | None, str]:
    """(hub name or folder of the model that the run began as, or None; why there is none)."""
    if args.base_model == "none":
        return None, "left out by --base_model none"
    if args.judged_file and args.base_model is None:
        return None, "no model was loaded; name one with --base_model"
    name = args.base_model or (find_run(args.model_dir) or {}).get("model")
    if name is None:
        return None, f"nothing in {args.model_dir} says what the model was; name it with --base_model"
    if name == DEMO:
        return None, "the run began from scratch; name another model with --base_model"
    return name, ""


class BaseModel:
    """A pretrained model that says how probable texts are.

    Args:
        tokenizer: the model's own; its end token stands before each text, as between two documents.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def load(cls, name: str, allow_pickle: bool = False) -> "BaseModel":
        """Loads it, on CUDA in bf16 (fp16 before Ampere), else on the CPU in fp32. UserError where it is not there."""
        model = load_for_reading(name, None, allow_pickle)
        tokenizer = read_tokenizer(name, f"--base_model {name}")
        if tokenizer.eos_token_id is None:
            raise UserError(f"--base_model {name}: its tokenizer has no end token to put before a text")
        return cls(model, tokenizer)

    @torch.inference_mode()
    def perplexity(self, texts: Iterable[str]) -> float | None:
        """exp of the mean loss in nats per token of the base's tokenizer, over all texts' tokens together.

        Texts are read one by one, each after an end token, their own end not counted; those longer than the model's
        window up to there. None where no text has a token.
        """
        window, start = get_window(self.model), self.tokenizer.eos_token_id
        encoded = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
        rows = sorted(([start, *ids][:window] for ids in encoded["input_ids"] if ids), key=len)
        total, num_tokens = 0.0, 0
        for at in progress(range(0, len(rows), BATCH_SIZE), desc="Perplexity", delay=2):
            batch = [torch.tensor(row) for row in rows[at : at + BATCH_SIZE]]
            # Padding on the right: no token before it sees it.
            input_ids = pad_sequence(batch, batch_first=True, padding_value=start).to(self.model.device)
            labels = pad_sequence(batch, batch_first=True, padding_value=IGNORE_INDEX).to(self.model.device)
            num_labels = sum(len(row) - 1 for row in batch)
            total += self.model(input_ids=input_ids, labels=labels).loss.double().item() * num_labels
            num_tokens += num_labels
        return math.exp(min(total / num_tokens, 700.0)) if num_tokens else None
