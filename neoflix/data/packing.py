"""From tokens to batches: order, packing, padding, labels."""

import heapq
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from neoflix.runtime.errors import UserError

SHORTEST_GROUP = 16  # texts up to this length share a group: padding them costs less than another kernel


class TextLayout(torch.Tensor):
    """Long [1, 1, N, L]: the position in the packed row of each text's tokens, padded with the text's last position.

    It is passed as a model's `attention_mask`. Its type tells it from a mask; `.to()`, pinned memory and worker
    processes keep the type. It has four dimensions because transformers passes such a mask on unchanged. Otherwise
    transformers would look for the texts itself, which makes the host wait for the device in every forward pass.
    """

    @cached_property
    def groups(self) -> list["Group"]:
        """The texts in groups of similar length, so that little of a group is padding. Computed once for all layers,
        because it waits for the device."""
        return [_group(layout_NL) for layout_NL in group_by_length(self.as_subclass(torch.Tensor)[0, 0])]


class Group(NamedTuple):
    """Texts of similar length.

    Attributes:
        layout: [N, L], as in a `TextLayout`.
        places: [tokens], each token's position in the packed row.
        cells: [tokens], each token's position in the flattened [N, L].
    """

    layout: torch.Tensor
    places: torch.Tensor
    cells: torch.Tensor


def _group(layout_NL: torch.Tensor) -> Group:
    is_token_NL = torch.arange(layout_NL.shape[1], device=layout_NL.device) <= layout_NL[:, -1:] - layout_NL[:, :1]
    return Group(layout_NL, layout_NL[is_token_NL], is_token_NL.flatten().nonzero().squeeze(1))


def lay_out_texts(lengths: list[int]) -> TextLayout:
    """The layout of texts of these lengths, packed into one row."""
    lengths_N1 = torch.tensor(lengths).unsqueeze(1)
    starts_N1 = lengths_N1.cumsum(0) - lengths_N1
    return (starts_N1 + torch.arange(max(lengths)).minimum(lengths_N1 - 1))[None, None].as_subclass(TextLayout)


def group_by_length(layout_NL: torch.Tensor) -> list[torch.Tensor]:
    """Splits a layout by length into pieces [N, L], one for each power of two, so that little of it is padding."""
    lengths_N = layout_NL[:, -1] - layout_NL[:, 0] + 1
    class_N = lengths_N.clamp(min=SHORTEST_GROUP).sub(1).log2().floor()
    groups = [class_N == length_class for length_class in class_N.unique()]
    return [layout_NL[group, : int(lengths_N[group].max())] for group in groups]


IGNORE_INDEX = -100  # the label of tokens without a loss, in torch and Hugging Face


class EpochOrder(Sampler[int]):
    """An order of texts that depends only on the seed and the epoch, not on resuming or the number of processes.

    Args:
        lengths_N: tokens of each text.
        texts_per_step: texts per step of all processes; with `by_length`, these have similar lengths.
        by_length: group texts by length (`--train_sampling_strategy group_by_length`).
    """

    def __init__(self, lengths_N: np.ndarray, texts_per_step: int, seed: int, by_length: bool):
        self.lengths_N, self.texts_per_step, self.seed, self.by_length = lengths_N, texts_per_step, seed, by_length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths_N)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.by_length:
            yield from get_length_grouped_indices(self.lengths_N.tolist(), self.texts_per_step, generator=generator)
        else:
            yield from torch.randperm(len(self), generator=generator).tolist()


class TokenBatches(Sampler[list[int]]):
    """One process's batches, of about equal numbers of tokens and none above a budget.

    Texts are assigned longest first, each to the batch with the fewest tokens so far (Graham's longest-processing-time
    rule, 1969: the fullest batch is at most a third above the optimum, and close to it with many texts). So no process
    waits long for another. Each epoch shuffles texts of equal length and the order of batches. The sizes of batches and
    their number, a multiple of `batches_per_step`, are the same in every epoch.

    Args:
        lengths_N: tokens of each text; the number of texts is a multiple of `batches_per_step` (`fill_up`).
        budget: the most tokens in a batch.
        batches_per_step: number of processes times accumulated batches.
        rank, world_size: this process gets every `world_size`-th batch, starting with number `rank`.

    Raises:
        UserError: if one text is longer than the budget.
    """

    def __init__(
        self, lengths_N: np.ndarray, budget: int, batches_per_step: int, rank: int, world_size: int, seed: int
    ):
        if (longest := lengths_N.max()) > budget:
            raise UserError(
                f"--tokens_per_device_batch {budget}: the longest text has {longest} tokens; raise it to that, "
                f"or cut texts with --max_length {budget}"
            )
        self.lengths_N, self.rank, self.world_size, self.seed, self.epoch = lengths_N, rank, world_size, seed, 0
        descending = (-np.sort(-lengths_N)).tolist()
        num_batches = -(-sum(descending) // budget)
        while True:
            num_batches = min(-(-num_batches // batches_per_step) * batches_per_step, len(descending))
            self.ranks_of_batches, fullest = self._deal(descending, num_batches)
            if fullest <= budget:
                break
            num_batches += 1 + num_batches // 100

    @staticmethod
    def _deal(descending: list[int], num_batches: int) -> tuple[list[list[int]], int]:
        """(texts of each batch, numbered from the longest; tokens of the fullest batch)"""
        batches = [[] for _ in range(num_batches)]
        emptiest_first = [(0, batch) for batch in range(num_batches)]
        for rank, length in enumerate(descending):
            num_tokens, batch = emptiest_first[0]
            heapq.heapreplace(emptiest_first, (num_tokens + length, batch))
            batches[batch].append(rank)
        return batches, max(emptiest_first)[0]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.ranks_of_batches) // self.world_size

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        shuffled_N = rng.permutation(len(self.lengths_N))
        longest_first_N = shuffled_N[np.argsort(-self.lengths_N[shuffled_N], kind="stable")]
        for batch in rng.permutation(len(self.ranks_of_batches))[self.rank :: self.world_size]:
            yield longest_first_N[self.ranks_of_batches[batch]].tolist()


class PackedCollator:
    """Packs texts into one row without padding. Attention keeps the texts apart.

    Labels are the tokens themselves, since the model shifts them. The tokens of a prompt, and the first token of each
    text, have no label: no text predicts the next one. `use_cache` is off because training needs no cache.
    """

    def __call__(self, examples: list[dict]) -> dict:
        """-> input_ids, position_ids, labels: long [1, T]; attention_mask: the `TextLayout`; use_cache: False."""
        lengths = [len(example["input_ids"]) for example in examples]
        input_ids = torch.tensor([i for example in examples for i in example["input_ids"]]).unsqueeze(0)
        position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
        prompt_length = [example["prompt_length"] for example in examples]
        prompt_length_1T = torch.tensor(prompt_length).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": lay_out_texts(lengths),
            "labels": input_ids.masked_fill(position_ids < prompt_length_1T, IGNORE_INDEX),
            "use_cache": False,
        }


class PaddedCollator:
    """Pads texts on the right to the longest one, for models whose attention does not keep packed texts apart."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict]) -> dict:
        """-> input_ids, attention_mask, labels: long [B, T]; padding and prompts have no label."""
        rows = [torch.tensor(example["input_ids"]) for example in examples]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)
        is_real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        prompt_length_B1 = torch.tensor([[example["prompt_length"]] for example in examples])
        is_prompt = torch.arange(input_ids.shape[1]) < prompt_length_B1
        labels = input_ids.masked_fill((is_real == 0) | is_prompt, IGNORE_INDEX)
        return {"input_ids": input_ids, "attention_mask": is_real, "labels": labels}
