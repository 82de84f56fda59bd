"""The decoding loop: texts grow side by side, and as soon as one ends, the next prompt takes its slot.

A batch has B slots. Every step appends one token to each. When a text ends, its slot goes to the next prompt in line,
so no slot waits for the longest text of a batch (continuous batching: Yu et al., "Orca: A Distributed Serving System
for Transformer-Based Generative Models", OSDI 2022). Keys and values are in one static cache [B, H, L, D] per layer.
Everything that a step needs is on the device, so on CUDA a step is one graph that is replayed; the host reads tokens
two steps late, and the device never waits for it.

Shapes: B slots, V vocabulary, K candidates, L places of a slot, T tokens of a prompt, N texts.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from neoflix.model.attention import ATTENTION_NAME
from neoflix.sampling.draw import Draw, stream_keys
from neoflix.sampling.slot_cache import PLACES, Masks, SlotCache, check_memory, num_rows


@dataclass(eq=False)
class Text:
    """A text that grows.

    Attributes:
        index: the number of its random stream.
        limit: the most new tokens.
        new_ids: the tokens so far, without the end token.
        finish_reason: None while it grows, then "eos" or "length".
    """

    index: int
    prompt_ids: list[int]
    limit: int
    new_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class DecoderSettings:
    """How a decoder writes texts.

    Args:
        num_slots: number of texts that grow at once.
        num_places: most tokens of a text, prompt included.
        seed: the texts are a function of the seed and their index.
        draw: how tokens are drawn.
        repetition_penalty: divides the logits of tokens that the text already has, as `generate` does; 1 is off.
        eos_token_id: the token that ends a text; None if there is none.
        never_drawn: token ids that no text may have.
        in_training: the model is being trained. No graph and no inference tensor outlives a step, and each pass goes
            through the whole model, so that ZeRO-3 gathers the weights.
    """

    num_slots: int
    num_places: int
    seed: int
    draw: Draw
    repetition_penalty: float = 1.0
    eos_token_id: int | None = None
    never_drawn: Sequence[int] = ()
    in_training: bool = False


class Decoder:
    """Grows texts in slots.

    Args:
        model: a causal language model of transformers for which `architectures.find_decoder` chooses this class.
        has_flat_mask: the model makes its own attention mask from a flat one, as those with ALiBi do. Its steps cannot
            be CUDA graphs.

    Raises:
        UserError: if the keys and values of all slots do not fit into the free memory.
    """

    def __init__(self, model: PreTrainedModel, settings: DecoderSettings, has_flat_mask: bool = False):
        self.model, self.device, self.settings = model, model.device, settings
        self.draw, self.masks = settings.draw, Masks(model, has_flat_mask)
        num_slots, num_places, in_training = settings.num_slots, settings.num_places, settings.in_training
        if not in_training:
            check_memory(model, num_slots, num_places)
        self.slots: list[Text | None] = [None] * num_slots
        self.reached = [0] * num_slots  # the host's copy of `places_B`
        self.never_drawn = torch.tensor(settings.never_drawn, dtype=torch.long, device=self.device)
        self.prefilled: dict[tuple, list] = {}  # keys and values of the last prompts, for other texts with the same one

        def room(*shape, dtype=torch.long):
            return torch.zeros(num_slots, *shape, dtype=dtype, device=self.device)

        self.ids_B, self.places_B, self.begins_B, self.keys_B = room(), room(), room(), room()
        self.drawn_B = room()  # -1: not known without more candidates
        self.has_BV = room(num_rows(model), dtype=torch.bool) if settings.repetition_penalty != 1 else None
        self.last_place = num_places - 1
        self.cache = SlotCache(self.places_B, -(-num_places // PLACES) * PLACES)
        self.has_graphs = self.device.type == "cuda" and not in_training and can_be_captured(model, has_flat_mask)
        # With graphs the host reads a step's tokens two steps late, and does not ask whether a draw needs candidates.
        self.lag, self.asks = (2, False) if self.has_graphs else (0, True)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def grow(self, texts: list[Text]) -> Iterator[None]:
        """Grows the texts in their order and yields after each step, with `new_ids` and `finish_reason` up to date.

        On CUDA they are two steps behind the device.
        """
        without_gradients = torch.no_grad() if self.settings.in_training else torch.inference_mode()
        return without_gradients(self._grow)(texts)

    def _grow(self, texts: list[Text]) -> Iterator[None]:
        waiting, unread = deque(texts), deque()
        # Prompts are read in a pass of their own: at once if all texts have the same one, otherwise several together.
        num_prompts = len({tuple(text.prompt_ids) for text in texts})
        refill_at = 1 if num_prompts == 1 else max(1, len(self.slots) // 8)
        while waiting or any(text and not text.finish_reason for text in self.slots):
            free = [slot for slot, text in enumerate(self.slots) if text is None or text.finish_reason]
            if waiting and (len(free) >= refill_at or len(free) >= len(waiting)):
                self._fill([(slot, waiting.popleft()) for slot in free[: len(waiting)]])
            elif not waiting and not self.has_graphs and 2 * len(free) >= len(self.slots):
                self._leave(free)
            self._step()
            unread.append(([(text, text.new_ids) if text else None for text in self.slots], self._send_tokens()))
            if len(unread) > self.lag:
                waiting.extendleft(reversed(self._read(*unread.popleft())))
            yield

    def _fill(self, texts: list[tuple[int, Text]]) -> None:
        """Puts texts into slots. All their tokens but the last go into the cache; the next step reads the last one."""
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
            self.keys_B: stream_keys(self.settings.seed, [text.index for _, text in texts]),
        }
        for column_B, values_N in columns.items():
            column_B[slots_N] = values_N.to(self.device, non_blocking=True)

    def _leave(self, free: list[int]) -> None:
        """Goes on without the free slots. On a CPU each slot costs time; on a GPU another size needs new graphs."""
        kept = [slot for slot in range(len(self.slots)) if slot not in free]
        kept_N = torch.tensor(kept, device=self.device)
        self.slots, self.reached = ([values[slot] for slot in kept] for values in (self.slots, self.reached))
        for name in ("ids_B", "places_B", "begins_B", "keys_B", "drawn_B", "has_BV"):
            if (column := getattr(self, name)) is not None:
                setattr(self, name, column[kept_N])
        self.cache.keep(kept_N, self.places_B)

    def _prefill(self, prompts: set[tuple]) -> None:
        """Computes the keys and values of prompts in one pass. Padding is on the right, where no real token sees it."""
        new = sorted(prompts - self.prefilled.keys(), key=len)
        self.prefilled = {prompt: self.prefilled[prompt] for prompt in prompts - set(new)}
        if not new:
            return
        ids = pad_sequence([torch.tensor(prompt) for prompt in new], batch_first=True).to(self.device)
        # The base model computes no logits, which nobody reads here.
        model = self.model if self.settings.in_training else self.model.base_model
        cache = DynamicCache()  # the model's own may drop what is beyond a sliding window
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        for row, prompt in enumerate(new):
            T = len(prompt)
            self.prefilled[prompt] = [
                (layer.keys[row : row + 1, :, :T], layer.values[row : row + 1, :, :T]) for layer in cache.layers
            ]

    def _step(self) -> None:
        """Appends one token to the text of every slot."""
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
        """A step on the device, from the last tokens to the next ones, without the host."""
        self.cache.length = length
        logits_BV = self.model(
            input_ids=self.ids_B.unsqueeze(1),
            position_ids=self.places_B.unsqueeze(1),
            attention_mask=self.masks(self.places_B, length),
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        if self.has_BV is not None:
            penalty = self.settings.repetition_penalty
            penalised = torch.where(logits_BV < 0, penalty, 1 / penalty) * logits_BV
            logits_BV = torch.where(self.has_BV, penalised, logits_BV)
        logits_BV = logits_BV.index_fill(1, self.never_drawn, float("-inf"))
        steps_B = self.places_B - self.begins_B
        if self.asks:
            tokens_B = self.draw.settled(logits_BV, self.keys_B, steps_B)
        else:
            tokens_B, is_short_B = self.draw(logits_BV, self.keys_B, steps_B)
        if self.has_BV is not None:
            self.has_BV.scatter_(
                1, tokens_B.unsqueeze(1), True
            )  # `[...] = True` copies from the host, which a graph cannot
        self.drawn_B.copy_(tokens_B if self.asks else torch.where(is_short_B, -1, tokens_B))
        self.ids_B.copy_(tokens_B)
        self.places_B.add_(1).clamp_(max=self.last_place)  # an empty slot goes on, and nobody reads it

    def _capture(self, length: int) -> torch.cuda.CUDAGraph:
        """Captures the step as a CUDA graph. torch needs one run before; what that run changes is restored."""
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
        """Sends a step's tokens to the host. Returns them and the event that marks their arrival."""
        if not self.has_graphs:
            return self.drawn_B.clone(), None
        tokens_B = torch.empty(len(self.slots), dtype=torch.long, pin_memory=True)
        tokens_B.copy_(self.drawn_B, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return tokens_B, arrived

    def _read(self, texts: list, sent: tuple[torch.Tensor, torch.cuda.Event | None]) -> list[Text]:
        """Appends a step's tokens to the texts that were in the slots then. Returns the texts whose draw needs more
        candidates; they are queued again and go on from their last known token."""
        tokens_B, arrived = sent
        if arrived:
            arrived.synchronize()
        again = []
        for slot, (entry, token) in enumerate(zip(texts, tokens_B.tolist(), strict=True)):
            text, new_ids = entry or (None, None)
            if text is None or text.finish_reason or text.new_ids is not new_ids:
                continue
            if token < 0:  # needs more candidates
                text.new_ids, self.slots[slot] = new_ids.copy(), None
                again.append(text)
            elif token == self.settings.eos_token_id:
                text.finish_reason = "eos"
            else:
                new_ids.append(token)
                text.finish_reason = "length" if len(new_ids) == text.limit else None
        if again:  # a flat distribution, as at high temperatures
            if self.has_graphs:
                torch.cuda.synchronize()  # no graph is freed while it runs
            self.draw = self.draw.wider()
            self.graphs.clear()
        return again


def can_be_captured(model: PreTrainedModel, has_flat_mask: bool) -> bool:
    """Whether a step can be a CUDA graph: it must not read from the device, as transformers does for a flat mask."""
    is_ours = model.config._attn_implementation == ATTENTION_NAME
    return not has_flat_mask and (is_ours or model._can_compile_fullgraph)
