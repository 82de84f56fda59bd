"""Perplexity of texts under a base model, by default the one that a run started from."""

import math
from collections.abc import Iterable

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from neoflix.checkpoints.runs import find_run
from neoflix.data.packing import IGNORE_INDEX
from neoflix.data.tokenizer import read_tokenizer
from neoflix.model.load import DEMO, load_for_reading
from neoflix.model.packaged import find_packaged
from neoflix.model.vocabulary import get_window
from neoflix.runtime.console import progress
from neoflix.runtime.errors import UserError

PERPLEXITY_TEXTS = 1000  # texts that are measured: at 1,000, chance moves the figure by a few per cent

BATCH_SIZE = 8  # texts that the base model reads at once


def find_base_model(args) -> tuple[str | None, str]:
    """(hub name or folder of the model that the run started from, or None; the reason for None)"""
    if args.base_model == "none":
        return None, "--base_model none"
    if args.judged_file and args.base_model is None:
        return None, "no model was loaded; name one with --base_model"
    name = args.base_model or (find_run(args.model_dir) or {}).get("model")
    if name is None:
        return None, f"{args.model_dir} has no record of the base model; name it with --base_model"
    if name == DEMO:
        return None, "the run started from random weights; name a model with --base_model"
    return name, ""


class BaseModel:
    """A pretrained model that measures how probable texts are.

    Args:
        tokenizer: the model's own. Its end token comes before each text, as between two documents.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def load(cls, name: str, allow_pickle: bool = False) -> "BaseModel":
        """Loads a base model: on CUDA in bf16 (fp16 before Ampere) if there is a GPU, otherwise on the CPU in fp32.

        Raises:
            UserError: if there is no such model, or if its tokenizer has no end token.
        """
        model = load_for_reading(name, None, allow_pickle)
        tokenizer = read_tokenizer(find_packaged(name), f"--base_model {name}")
        if tokenizer.eos_token_id is None:
            raise UserError(f"--base_model {name}: its tokenizer has no end token, which must come before each text")
        return cls(model, tokenizer)

    @torch.inference_mode()
    def perplexity(self, texts: Iterable[str]) -> float | None:
        """exp of the mean loss per token of the base model's tokenizer, over the tokens of all texts together.

        Each text is read by itself, after an end token, up to the model's window. The end of the text is not counted.
        None if no text has a token.
        """
        window, start = get_window(self.model), self.tokenizer.eos_token_id
        encoded = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
        rows = sorted(([start, *ids][:window] for ids in encoded["input_ids"] if ids), key=len)
        total, num_tokens = 0.0, 0
        for at in progress(range(0, len(rows), BATCH_SIZE), desc="Perplexity", delay=2):
            batch = [torch.tensor(row) for row in rows[at : at + BATCH_SIZE]]
            # Padding is on the right, where no real token sees it.
            input_ids = pad_sequence(batch, batch_first=True, padding_value=start).to(self.model.device)
            labels = pad_sequence(batch, batch_first=True, padding_value=IGNORE_INDEX).to(self.model.device)
            num_labels = sum(len(row) - 1 for row in batch)
            total += self.model(input_ids=input_ids, labels=labels).loss.double().item() * num_labels
            num_tokens += num_labels
        return math.exp(min(total / num_tokens, 700.0)) if num_tokens else None
