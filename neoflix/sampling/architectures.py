"""Finds out how a model can be sampled, from what it computes and not from a list of names.

Training reads whole texts, sampling reads them token by token, and an architecture may treat the two differently: ALiBi
takes its distances from the mask, a recurrent model keeps a state instead of keys and values, RoBERTa counts its
positions from 2, BERT reads in both directions. So every model except GPT-Neo (whose attention is ours) first grows a
few short texts, and its logits token by token must equal its logits for the whole texts.

Shapes: B texts at once, T tokens, V vocabulary, N texts.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from neoflix.model.attention import ATTENTION_NAME
from neoflix.runtime.errors import UserError
from neoflix.sampling.decoder import Decoder, DecoderSettings, Text
from neoflix.sampling.draw import stream_keys
from neoflix.sampling.inference import eval_mode
from neoflix.sampling.slot_cache import num_rows

# Lengths of the test prompts: two of the same length at once, some above and some below PROBE_WINDOW, and the beginning
# token alone after another text, whose state RecurrentGemma would continue with.
PROMPT_LENGTHS = (7, 7, 3, 1, 12)

PROBE_WINDOW = 4  # sliding windows during the test

PROBE_STEPS = 3

# Largest difference of logits (root mean square, in standard deviations of a token's logits) that counts as rounding.
# For 50 architectures of two layers it was at most 2e-6 in fp32, 0.003 in fp16 and 0.018 in bf16, and at least 0.5 if
# positions, masks or states were wrong. For SmolLM2-135M's 30 pretrained layers it is 0.089 in bf16.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}

HALF_TOLERANCE = 0.2


class DrawProcessor(LogitsProcessor):
    """Makes transformers' greedy `generate` choose the tokens that `Decoder` would draw, with the same noise."""

    def __init__(self, draw, keys_B: torch.Tensor, prompt_length: int, penalty: float, never_drawn: torch.Tensor):
        self.draw, self.keys_B, self.prompt_length, self.never_drawn = draw, keys_B, prompt_length, never_drawn
        self.penalty = RepetitionPenaltyLogitsProcessor(penalty)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores_BV = self.penalty(input_ids, scores).index_fill(1, self.never_drawn, float("-inf"))
        steps_B = torch.full_like(self.keys_B, input_ids.shape[1] - self.prompt_length)
        tokens_B = self.draw.settled(scores_BV, self.keys_B, steps_B)
        return torch.full_like(scores_BV, float("-inf")).scatter_(1, tokens_B.unsqueeze(1), 0.0)


class GenerateDecoder:
    """Grows texts by transformers' own `generate`, for models that `Decoder` does not support. The texts are those that
    `Decoder` would draw: a function of seed and index alone.

    Consecutive texts with prompts of the same length share a batch, so there is no padding.

    Args:
        use_cache: False reads the whole text again for each token.
    """

    def __init__(self, model: PreTrainedModel, settings: DecoderSettings, use_cache: bool = True):
        self.model, self.settings, self.use_cache = model, settings, use_cache
        self.never_drawn = torch.tensor(settings.never_drawn, dtype=torch.long, device=model.device)

    def grow(self, texts: list[Text]) -> Iterator[None]:
        """Grows the texts in their order and yields after each batch."""
        num_slots, waiting = self.settings.num_slots, deque(texts)
        while waiting:
            batch = [waiting.popleft()]
            while waiting and len(waiting[0].prompt_ids) == len(batch[0].prompt_ids) and len(batch) < num_slots:
                batch.append(waiting.popleft())
            self._generate(batch)
            yield

    def _generate(self, texts: list[Text]) -> None:
        settings, end = self.settings, self.settings.eos_token_id
        ids_BT = torch.tensor([text.prompt_ids for text in texts], device=self.model.device)
        keys_B = stream_keys(settings.seed, [text.index for text in texts]).to(self.model.device)
        processor = DrawProcessor(settings.draw, keys_B, ids_BT.shape[1], settings.repetition_penalty, self.never_drawn)
        config = GenerationConfig(
            do_sample=False,  # the processor draws
            max_new_tokens=max(text.limit for text in texts),
            eos_token_id=end,
            pad_token_id=end,
            use_cache=self.use_cache,
        )
        with _generation_config(self.model, config):
            rows = self.model.generate(
                ids_BT, attention_mask=torch.ones_like(ids_BT), logits_processor=LogitsProcessorList([processor])
            )
        for text, row in zip(texts, rows[:, ids_BT.shape[1] :].tolist(), strict=True):
            ends = end in row[: text.limit]
            text.new_ids = row[: row.index(end)] if ends else row[: text.limit]
            text.finish_reason = "eos" if ends else "length"


@contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replaces the model's saved settings for a while: `generate` would add them to those it is given."""
    saved, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = saved


def find_decoder(model: PreTrainedModel) -> Callable[..., Decoder | GenerateDecoder]:
    """The fastest decoder whose logits equal those of a forward pass over whole texts, as in training.

    Takes about a dozen passes over a few tokens.

    Raises:
        UserError: if no decoder is right.
    """
    if model.config.model_type == "gpt_neo" and model.config._attn_implementation == ATTENTION_NAME:
        return Decoder
    with eval_mode(model), torch.no_grad():
        for decoder in (
            Decoder,
            partial(Decoder, has_flat_mask=True),
            GenerateDecoder,
            partial(GenerateDecoder, use_cache=False),
        ):
            if _is_right(model, decoder):
                return decoder
    raise UserError(
        f"{model.name_or_path}: a {model.config.model_type} model has other logits token by token than for a whole "
        "text, so it cannot be sampled as it is trained; use one of the architectures in docs/loading.md"
    )


def check_can_be_sampled(model: PreTrainedModel) -> None:
    """Raises UserError for a model that no decoder can sample. Not checked under ZeRO-3, where no process has the whole
    weights."""
    if not is_deepspeed_zero3_enabled():
        find_decoder(model)


def makes_slots(make: Callable[..., Decoder | GenerateDecoder]) -> bool:
    """Whether the result of `find_decoder` makes a `Decoder`."""
    return getattr(make, "func", make) is Decoder


class Recorder:
    """A draw that records the logits of each text and step, and chooses the likeliest token."""

    def __init__(self):
        self.logits: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, logits_BV, keys_B, steps_B) -> tuple[torch.Tensor, torch.Tensor]:
        for text_and_step, logits_V in zip(zip(keys_B.tolist(), steps_B.tolist(), strict=True), logits_BV, strict=True):
            self.logits[text_and_step] = logits_V.float()
        return logits_BV.argmax(-1), torch.zeros_like(steps_B, dtype=torch.bool)

    def settled(self, *args) -> torch.Tensor:
        return self(*args)[0]


def _is_right(model: PreTrainedModel, make: Callable[..., Decoder | GenerateDecoder]) -> bool:
    """Whether a decoder's logits equal those of the whole texts, for a few texts of several lengths, two at once."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(num_rows(model), (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    texts = [Text(index, prompt, PROBE_STEPS) for index, prompt in enumerate(prompts)]
    recorder, num_places = Recorder(), max(PROMPT_LENGTHS) + PROBE_STEPS
    settings = DecoderSettings(num_slots=2, num_places=num_places, seed=0, draw=recorder, in_training=True)
    with _short_windows(model):
        try:
            for _ in make(model, settings).grow(texts):
                pass
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever an architecture does that this decoder does not support; the next one is tried
            return False
        whole_NTV = _read_whole(model, [text.prompt_ids + text.new_ids for text in texts])
    keys = stream_keys(0, [text.index for text in texts]).tolist()
    steps = [(text, key, step) for text, key in zip(texts, keys, strict=True) for step in range(PROBE_STEPS)]
    by_token = torch.stack([recorder.logits[key, step] for _, key, step in steps])
    whole = torch.stack([whole_NTV[text.index, len(text.prompt_ids) - 1 + step] for text, _, step in steps])
    if not whole.isfinite().all():
        return True  # fp16 overflows: nothing can be compared, and training reports it
    error = (by_token - whole).square().mean(-1).sqrt() / whole.std(-1).clamp(min=1e-6)
    return bool((error < TOLERANCE.get(model.dtype, HALF_TOLERANCE)).all())


def _read_whole(model: PreTrainedModel, texts: list[list[int]]) -> torch.Tensor:
    """Logits [N, T, V] of whole texts, padded on the right as in training."""
    rows = [torch.tensor(ids) for ids in texts]
    ids_NT = pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id or 0).to(model.device)
    is_real_NT = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(model.device)
    return model(input_ids=ids_NT, attention_mask=is_real_NT).logits.float()


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Sets sliding windows to a few tokens, so that a text of a dozen tokens is longer than them."""
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    if window is None:
        yield
        return
    config.sliding_window = PROBE_WINDOW
    try:
        yield
    finally:
        config.sliding_window = window
