"""Texts as they come out of a decoder: each when it is finished, or all while they grow."""

import time
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, TextStreamer

from neoflix.sampling.decoder import Text
from neoflix.sampling.inference import eval_mode


def finish_in_order(
    model: PreTrainedModel, steps: Iterator[None], texts: list[Text], streamer: TextStreamer | None = None
) -> Iterator[Text]:
    """Yields the texts in their order, each when it is finished.

    Args:
        steps: grow the texts (`Decoder.grow`).
        streamer: is given the tokens of each text in turn, as they come.
    """
    with eval_mode(model):
        for text in texts:
            shown = 0
            if streamer and text.prompt_ids[1:]:
                streamer.put(torch.tensor(text.prompt_ids[1:]))
            while True:
                if streamer and text.new_ids[shown:]:
                    streamer.put(torch.tensor(text.new_ids[shown:]))
                    shown = len(text.new_ids)
                if text.finish_reason:
                    break
                next(steps)
            if streamer:
                streamer.end()
            yield text


def look_in(model: PreTrainedModel, steps: Iterator[None], every: float) -> Iterator[None]:
    """Yields every so many seconds while the steps are made, and once after the last one."""
    with eval_mode(model):
        looked = time.monotonic()
        for _ in steps:
            if time.monotonic() - looked >= every:
                yield
                looked = time.monotonic()
        yield
