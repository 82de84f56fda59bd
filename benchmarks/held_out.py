"""A run's held-out texts, and what a model finds likely in them."""

import torch

from neoflix.checkpoints.runs import find_run
from neoflix.data.sources import find_local_dataset, read_examples
from neoflix.data.split import split_texts
from neoflix.runtime.cache import default_cache_dir


def read_texts(run: str, num_prompts: int, num_texts: int | None) -> tuple[list[str], list[str]]:
    """(first words of so many training texts, so many held-out texts; None: all)"""
    recorded = find_run(run)["texts"]
    path = find_local_dataset(recorded["dataset"], default_cache_dir())
    split = split_texts(read_examples(path), recorded["validation_fraction"])
    prompts = [example.completion.split()[: 1 + i % 4] for i, example in enumerate(split.train[:num_prompts])]
    return [" ".join(words) for words in prompts], [example.completion for example in split.validation[:num_texts]]


def encode(text: str, tokenizer) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]


@torch.no_grad()
def log_probabilities(model, ids: list[int], num_tokens: int) -> torch.Tensor:
    """fp32 [tokens after the first, vocabulary]"""
    return model(torch.tensor([ids])).logits[0, :-1, :num_tokens].float().log_softmax(-1)
