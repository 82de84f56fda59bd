"""Keys and values of texts that grow at once: their places, their masks, and the memory they need.

Shapes: B slots, H heads, L places of a slot, D dimensions of a head, T tokens of a prompt.
"""

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from neoflix.model.attention import ATTENTION_NAME
from neoflix.runtime.console import GIB
from neoflix.runtime.errors import UserError
from neoflix.runtime.hardware import read_host_memory

PLACES = 32  # attention reads the cache up to the next multiple of this; on CUDA each has its own graph

ATTENDS = {"full_attention", "sliding_attention"}  # layers that keep keys and values of single tokens and nothing else


class SlotCache(Cache):
    """Keys and values of B texts. The next token of each text has its own place.

    Attributes:
        length: the number of places that attention reads, the same for all slots.
    """

    def __init__(self, places_B: torch.Tensor, num_places: int):
        super().__init__(layers=[])
        self.places_B, self.num_places, self.length = places_B, num_places, num_places
        self.slots_B = torch.arange(len(places_B), device=places_B.device)
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}

    def _room(self, layer: int, key_BH1D: torch.Tensor, value_BH1D: torch.Tensor) -> None:
        """Allocates a layer's keys and values once their shape is known: zeros, as attention reads places that are not
        written yet, with weight 0."""
        if layer not in self.keys:
            for room, new in ((self.keys, key_BH1D), (self.values, value_BH1D)):
                shape = (len(self.places_B), new.shape[1], self.num_places, new.shape[3])
                room[layer] = torch.zeros(shape, dtype=new.dtype, device=new.device)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Adds one token to each slot: keys and values [B, H, 1, D] -> all [B, H, length, D]."""
        self._room(layer_idx, key_states, value_states)
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[self.slots_B, :, self.places_B] = key_states[:, :, 0]
        values[self.slots_B, :, self.places_B] = value_states[:, :, 0]
        return keys[:, :, : self.length], values[:, :, : self.length]

    def keep(self, slots_N: torch.Tensor, places_N: torch.Tensor) -> None:
        """Keeps some slots, which get new numbers in this order, and from now on have these places."""
        self.places_B, self.slots_B = places_N, self.slots_B[: len(slots_N)]
        for room in (self.keys, self.values):
            for layer in room:
                room[layer] = room[layer][slots_N]

    def fill(self, slot: int, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Sets the first T tokens of a slot: keys and values [1, H, T, D] of each layer."""
        for layer, (key, value) in enumerate(layers):
            self._room(layer, key, value)
            self.keys[layer][slot, :, : key.shape[2]] = key[0]
            self.values[layer][slot, :, : value.shape[2]] = value[0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    # transformers makes its mask from these, given a flat mask [B, L]: the new token is the last of `length` places.

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.length - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length, 0


def find_windows(model: PreTrainedModel) -> dict[str, int | None]:
    """The kinds of attention in a model's layers, by transformers' names, and the number of tokens that each attends
    to: None for the whole text, and for GPT-Neo's local layers, whose window our attention knows.

    Raises:
        ValueError: if a layer keeps something other than keys and values.
    """
    kinds, options = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    if others := set(kinds) - ATTENDS:
        raise ValueError(f"{model.config.model_type} has layers of {', '.join(sorted(others))}")
    if isinstance(options, dict):  # transformers 5.17: the same options for all layers
        options = [{} if kind == "full_attention" else options for kind in kinds]
    return {kind: option.get("sliding_window") for kind, option in zip(kinds, options, strict=True)}


class Masks:
    """Makes the attention mask of a step: the places to which the new token of each slot attends.

    Args:
        is_flat: makes [B, L], from which the model makes its own mask (and ALiBi's distances). Otherwise [B, 1, 1, L],
            or one of these for each kind of layer, which transformers passes on unchanged.
    """

    def __init__(self, model: PreTrainedModel, is_flat: bool):
        self.is_flat, self.windows, self.dtype = is_flat, find_windows(model), model.dtype
        self.takes_bool = model.config._attn_implementation == ATTENTION_NAME  # others may add the mask to the scores
        if is_flat and any(self.windows.values()):
            raise ValueError("a flat mask cannot express a window, as each slot has its own place")

    def __call__(self, places_B: torch.Tensor, length: int) -> torch.Tensor | dict[str, torch.Tensor]:
        places_L, places_B1 = torch.arange(length, device=places_B.device), places_B.unsqueeze(1)
        is_past_BL = places_L <= places_B1
        if self.is_flat:
            return is_past_BL.long()
        masks = {}
        for kind, window in self.windows.items():
            is_seen_BL = is_past_BL if window is None else is_past_BL & (places_L > places_B1 - window)
            masks[kind] = self._for_model(is_seen_BL[:, None, None])
        return masks if len(masks) > 1 else masks.popitem()[1]

    def _for_model(self, is_seen_B11L: torch.Tensor) -> torch.Tensor:
        if self.takes_bool:
            return is_seen_B11L
        lowest = torch.finfo(self.dtype).min
        return torch.zeros_like(is_seen_B11L, dtype=self.dtype).masked_fill(~is_seen_B11L, lowest)


def num_rows(model: PreTrainedModel) -> int:
    """Rows of the output embedding. Under ZeRO-3, where a weight is empty between passes, DeepSpeed knows its shape."""
    weight = model.get_output_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]


@torch.no_grad()
def place_bytes(model: PreTrainedModel) -> int:
    """Bytes of the keys and values of one token. Measured, because configs name heads in many ways."""
    cache = DynamicCache()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model.base_model(input_ids=token, past_key_values=cache, use_cache=True)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def count_fitting(model: PreTrainedModel, num_places: int) -> int:
    """How many texts of so many tokens fit into the free memory: keys, values and logits."""
    return free_memory(model.device) // text_bytes(model, num_places)


def text_bytes(model: PreTrainedModel, num_places: int) -> int:
    logits = 16 * num_rows(model)  # four copies in fp32: raw, scaled, probabilities, spare
    return place_bytes(model) * num_places + logits


def free_memory(device: torch.device) -> int:
    """Free bytes of the model's device."""
    if device.type != "cuda":
        return read_host_memory()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def check_memory(model: PreTrainedModel, num_slots: int, num_places: int) -> None:
    """Raises UserError if keys, values and logits of so many texts need more memory than is free."""
    free, need = free_memory(model.device), text_bytes(model, num_places)
    if num_slots * need <= free:
        return
    raise UserError(
        f"--batch_size {num_slots}: texts of up to {num_places:,} tokens need {num_slots * need / GIB:.1f} GiB besides "
        f"the model, and {free / GIB:.1f} GiB are free; "
        + (f"--batch_size {free // need} would fit" if free >= need else "lower --max_new_tokens")
    )
