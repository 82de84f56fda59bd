"""The decoding loop: texts grow side by side, each at its own place, and a finished one makes room for the next.

A batch has B slots. Every step appends one token to each; a text that has ended leaves its slot to the next one in
line, so that no slot waits for the slowest text of a batch (Yu et al., "Orca: A Distributed Serving System for
Transformer-Based Generative Models", OSDI 2022, call it continuous batching). Keys and values lie in one static cache
[B, H, L, D] a layer. All a step needs is on the device, so that on CUDA it is one graph, replayed; the host reads
tokens two steps late and never has the device wait.

Shapes: B slots, V vocabulary, K candidates, L places of a slot, T tokens of a prompt, N texts.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from neoflix.model.attention import ATTENTION_NAME
from neoflix.sampling.cache import Masks, SlotCache, check_memory, num_rows
from neoflix.sampling.draw import PLACES, Draw, stream_keys


@dataclass(eq=False)
class Text:
    """A text that grows. `index`: names its random stream; `limit`: most new tokens; `finish_reason`: None, "eos" or
    "length"; the end token is not in `new_ids`."""

    index: int
    prompt_ids: list[int]
    limit: int
    new_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class Decoder:
    """Grows texts in `num_slots` slots.

    Args:
        model: a causal language model of transformers that `architectures.find_decoder` finds to be right with it.
        num_places: most tokens of a text, prompt included.
        draw: how tokens are drawn.
        repetition_penalty: divides the logits of tokens that the text has already, as `generate` does; 1: none.
        eos_token_id: the token that ends a text; None: none does.
        never_drawn: token ids that no text may get.
        in_training: the model is one that trains: nothing of it is kept from one pass to the next (a graph, tensors of
            inference mode), every pass is one of the whole model, as ZeRO-3 gathers it, and each step is one pass.
        has_flat_mask: the model makes its mask by itself, as those with ALiBi do; no CUDA graphs then.

    Raises:
        UserError: where keys and values of so many slots do not fit into the memory that is free.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_slots: int,
        num_places: int,
        seed: int,
        draw: Draw,
        repetition_penalty: float,
        eos_token_id: int | None,
        never_drawn: list[int],
        in_training: bool = False,
        has_flat_mask: bool = False,
    ):
        self.model, self.device, self.seed = model, model.device, seed
        self.draw, self.repetition_penalty, self.eos_token_id = draw, repetition_penalty, eos_token_id
        self.in_training, self.masks = in_training, Masks(model, has_flat_mask)
        if not in_training:
            check_memory(model, num_slots, num_places)
        self.slots: list[Text | None] = [None] * num_slots
        self.reached = [0] * num_slots  # the host's own count of `places_B`
        self.never_drawn = torch.tensor(never_drawn, dtype=torch.long, device=self.device)
        self.prefilled: dict[tuple, list] = {}  # keys and values of the last prompts, for other texts that begin so

        def room(*shape, dtype=torch.long):
            return torch.zeros(num_slots, *shape, dtype=dtype, device=self.device)

        self.ids_B, self.places_B, self.begins_B, self.keys_B = room(), room(), room(), room()
        self.drawn_B = room()  # -1: not known without more candidates
        self.has_BV = room(num_rows(model), dtype=torch.bool) if repetition_penalty != 1 else None
        self.last_place = num_places - 1
        self.cache = SlotCache(self.places_B, -(-num_places // PLACES) * PLACES)
        self.has_graphs = self.device.type == "cuda" and not in_training and can_be_captured(model, has_flat_mask)
        # With graphs the host reads a step's tokens two steps late, and never asks if a draw needs more candidates.
        self.lag, self.asks = (2, False) if self.has_graphs else (0, True)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def grow(self, texts: list[Text]) -> Iterator[None]:
        """Grows all texts, in line, and yields after each step; `new_ids` and `finish_reason` tell how far each is.

        On CUDA a step's tokens are read when the device is two steps on.
        """
        without_gradients = torch.no_grad() if self.in_training else torch.inference_mode()
        return without_gradients(self._grow)(texts)

    def _grow(self, texts: list[Text]) -> Iterator[None]:
        waiting, unread = deque(texts), deque()
        # Prompts take a pass of their own: as soon as there is one slot where they are known, else several at once.
        num_prompts = len({tuple(text.prompt_ids) for text in texts})
        refill_at = 1 if num_prompts == 1 else max(1, len(self.slots) // 8)
        while waiting or any(text and not text.finish_reason for text in self.slots):
            free = [slot for slot, text in enumerate(self.slots) if text is None or text.finish_reason]
            if waiting and (len(free) >= refill_at or len(free) >= len(waiting)):
                self._fill([(slot, waiting.popleft()) for slot in free[: len(waiting)]])
            self._step()
            unread.append(([(text, text.new_ids) if text else None for text in self.slots], self._send_tokens()))
            if len(unread) > self.lag:
                waiting.extendleft(reversed(self._read(*unread.popleft())))
            yield

    def _fill(self, texts: list[tuple[int, Text]]) -> None:
        """Puts texts into slots: all tokens but the last into the cache; the next step takes that one."""
        ids = [text.prompt_ids + text.new_ids for _, text in texts]
        self._prefill({tuple(known[:-1]) for known in ids} - {()})
        for (slot, text), known in zip(texts, ids, strict=True):
            self.slots[slot], self.reached[slot] = text, len(known) - 1
            if known[:-1]:
                self.cache.fill(slot, self.prefilled[tuple(known[:-1])])
            if self.has_BV is not None:
                self.has_BV[slot] = False
                self.has_BV[slot, torch.tensor(known, device=self.device)] = True
        slots_N = torch.tensor([slot for slot, _ in texts]).to(self.device, non_blocking=True)
        columns = {
            self.ids_B: torch.tensor([known[-1] for known in ids]),
            self.places_B: torch.tensor([len(known) - 1 for known in ids]),
            self.begins_B: torch.tensor([len(text.prompt_ids) - 1 for _, text in texts]),
            self.keys_B: stream_keys(self.seed, [text.index for _, text in texts]),
        }
        for column_B, values_N in columns.items():
            column_B[slots_N] = values_N.to(self.device, non_blocking=True)

    def _prefill(self, prompts: set[tuple]) -> None:
        """Keys and values of prompts, in one pass: on the right they are padded, which no real token sees."""
        new = sorted(prompts - self.prefilled.keys(), key=len)
        self.prefilled = {prompt: self.prefilled[prompt] for prompt in prompts - set(new)}
        if not new:
            return
        ids = pad_sequence([torch.tensor(prompt) for prompt in new], batch_first=True).to(self.device)
        model = self.model if self.in_training else self.model.base_model  # the latter leaves out logits nobody reads
        cache = DynamicCache()  # not the model's own, which may leave out what is beyond a sliding window
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        for row, prompt in enumerate(new):
            T = len(prompt)
            self.prefilled[prompt] = [
                (layer.keys[row : row + 1, :, :T], layer.values[row : row + 1, :, :T]) for layer in cache.layers
            ]

    def _step(self) -> None:
        """One token for every slot."""
        live = [place for place, text in zip(self.reached, self.slots, strict=True) if text and not text.finish_reason]
        length = min(-(-(max(live, default=0) + 1) // PLACES) * PLACES, self.cache.num_places)
        if self.has_graphs:
            if length not in self.graphs:
                self.graphs[length] = self._capture(length)
            self.graphs[length].replay()
        else:
            self._advance(length)
        self.reached = [place + 1 for place in self.reached]

    def _advance(self, length: int) -> None:
        """A step on the device: from the last tokens to the next ones, nothing of which the host sees."""
        self.cache.length = length
        logits_BV = self.model(
            input_ids=self.ids_B.unsqueeze(1),
            position_ids=self.places_B.unsqueeze(1),
            attention_mask=self.masks(self.places_B, length),
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        if self.has_BV is not None:
            penalised = torch.where(logits_BV < 0, self.repetition_penalty, 1 / self.repetition_penalty) * logits_BV
            logits_BV = torch.where(self.has_BV, penalised, logits_BV)
        logits_BV = logits_BV.index_fill(1, self.never_drawn, float("-inf"))
        steps_B = self.places_B - self.begins_B
        if self.asks:
            tokens_B = self.draw.settled(logits_BV, self.keys_B, steps_B)
        else:
            tokens_B, is_short_B = self.draw(logits_BV, self.keys_B, steps_B)
        if self.has_BV is not None:
            self.has_BV.scatter_(1, tokens_B.unsqueeze(1), True)  # `[...] = True` would copy from the host: no graph
        self.drawn_B.copy_(tokens_B if self.asks else torch.where(is_short_B, -1, tokens_B))
        self.ids_B.copy_(tokens_B)
        self.places_B.add_(1).clamp_(max=self.last_place)  # an empty slot goes on, unseen

    def _capture(self, length: int) -> torch.cuda.CUDAGraph:
        """The step as a CUDA graph. It is run once before, as torch asks; what that changed is put back."""
        state = [x for x in (self.ids_B, self.places_B, self.drawn_B, self.has_BV) if x is not None]
        before = [x.clone() for x in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._advance(length)
        torch.cuda.current_stream().wait_stream(side)
        for x, old in zip(state, before, strict=True):
            x.copy_(old)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        with torch.cuda.graph(graph, pool=pool):
            self._advance(length)
        return graph

    def _send_tokens(self) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """A step's tokens on their way to the host, and what says that they are there."""
        if not self.has_graphs:
            return self.drawn_B.clone(), None
        tokens_B = torch.empty(len(self.slots), dtype=torch.long, pin_memory=True)
        tokens_B.copy_(self.drawn_B, non_blocking=True)
        there = torch.cuda.Event()
        there.record()
        return tokens_B, there

    def _read(self, texts: list, sent: tuple[torch.Tensor, torch.cuda.Event | None]) -> list[Text]:
        """Appends a step's tokens to the texts that stood in the slots then. Returns texts that go on with more
        candidates, from their last token that is known."""
        tokens_B, there = sent
        if there:
            there.synchronize()
        again = []
        for slot, (entry, token) in enumerate(zip(texts, tokens_B.tolist(), strict=True)):
            text, new_ids = entry or (None, None)
            if text is None or text.finish_reason or text.new_ids is not new_ids:
                continue
            if token < 0:  # takes its place in line again, as far as it is
                text.new_ids, self.slots[slot] = new_ids.copy(), None
                again.append(text)
            elif token == self.eos_token_id:
                text.finish_reason = "eos"
            else:
                new_ids.append(token)
                text.finish_reason = "length" if len(new_ids) == text.limit else None
        if again:  # a flat distribution, as at high temperatures
            if self.has_graphs:
                torch.cuda.synchronize()  # no graph is thrown away as it runs
            self.draw = self.draw.wider()
            self.graphs.clear()
        return again


def can_be_captured(model: PreTrainedModel, has_flat_mask: bool) -> bool:
    """Whether a step can be a CUDA graph: nothing in it may ask the device, as transformers does of a flat mask."""
    is_ours = model.config._attn_implementation == ATTENTION_NAME
    return not has_flat_mask and (is_ours or model._can_compile_fullgraph)
