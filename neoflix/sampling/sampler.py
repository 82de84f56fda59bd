"""Sampling: prompts in, texts out, each from a random stream of its own.

Text i of seed s depends neither on the batch it grew in nor on those before it, rounding aside, and no generator has
to be stored to go on after an interruption: the noise at each step is a hash of (s, i, step, token). How texts grow,
side by side and fast, is in `decoding.py`.

    from neoflix.generation import Sampler
    for sample in Sampler.load("results").sample(prompts=["A young"], num_samples=3):
        print(sample.text)
"""

import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from neoflix.arguments.sampling import SAMPLING_DEFAULTS, check_sampling
from neoflix.data.fields import FieldPool
from neoflix.data.template import find_template
from neoflix.data.tokenizer import read_tokenizer
from neoflix.model.load import load_for_reading
from neoflix.model.vocabulary import get_window
from neoflix.runtime.console import printable, say
from neoflix.runtime.errors import UserError
from neoflix.sampling.architectures import GenerateDecoder, find_decoder, makes_slots
from neoflix.sampling.cache import num_rows
from neoflix.sampling.decoder import Decoder, Text
from neoflix.sampling.draw import Draw
from neoflix.sampling.inference import optimize_for_inference
from neoflix.sampling.training_fields import read_field_pool

FIELD_TOKENS = 32  # most that a field has which the model writes


@dataclass(frozen=True)
class Sample:
    """One text. `num_tokens`: new ones, the end token not counted; `finish_reason`: "eos" or "length".

    `text` begins with its prompt; where a template made the prompt of `fields`, it is what was written for it alone.
    """

    text: str
    prompt: str
    seed: int
    num_tokens: int
    finish_reason: str
    fields: dict[str, str] | None = None

    @property
    def whole(self) -> str:
        """The text with its prompt in front, as it was written."""
        return self.text if self.fields is None else f"{self.prompt} {self.text}"

    def to_dict(self) -> dict:
        """Without `fields` where the model has no template."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class PrintableStreamer(TextStreamer):
    """transformers' own, without the control characters that a terminal would obey."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)


class Sampler:
    """A model, its tokenizer and its sampling settings, ready to write.

    Args:
        in_training: the model is to be trained on: it is left as it is, where else faster modules take the place of
            some of its own. Put it into `eval` mode for as long as it writes.
        field_pool: where the fields that a prompt leaves out are drawn from. By default, it is read from the data set
            of the run in `model_dir`, the first time that one is left out.
    """

    draw = Draw

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        in_training: bool = False,
        field_pool: FieldPool | None = None,
        model_dir: Path | None = None,
    ):
        self.model = model if in_training else model.eval()
        self.in_training = in_training
        self.tokenizer = tokenizer
        self.saved = model.generation_config
        self.template = find_template(tokenizer)
        self._field_pool, self._model_dir = field_pool, model_dir
        control = {tokenizer.bos_token_id, tokenizer.pad_token_id} - {tokenizer.eos_token_id, None}
        self._make_decoder = None  # found when the first text is written: at ZeRO stage 3 a pass needs all processes
        self.never_sampled = sorted(control | set(range(len(tokenizer), num_rows(model))))

    @classmethod
    def load(cls, folder: str | Path, device: str | None = None, allow_pickle: bool = False) -> "Sampler":
        """Loads a run's folder or a checkpoint; on CUDA in bf16 (fp16 before Ampere), else on the CPU in fp32.

        Args:
            allow_pickle: take weights from pytorch_model.bin where there is no safetensors file (docs/loading.md).
        """
        model = load_for_reading(str(folder), device, allow_pickle)
        return cls(model, read_tokenizer(folder, f"--model_dir {folder}"), model_dir=Path(folder))

    def settings(self, **overrides) -> dict:
        """Sampling settings: what is given here, else what the model was saved with, else the defaults."""
        if unknown := overrides.keys() - SAMPLING_DEFAULTS:
            raise TypeError(f"{unknown.pop()!r} is no sampling setting; there are {', '.join(SAMPLING_DEFAULTS)}")
        saved = {name: getattr(self.saved, name, None) for name in SAMPLING_DEFAULTS}
        chosen = SAMPLING_DEFAULTS.copy()
        for source in (saved, overrides):
            chosen |= {name: value for name, value in source.items() if value is not None}
        return chosen

    def sample(
        self,
        prompts: str | dict | list[str | dict] | None = None,
        num_samples: int = 1,
        seed: int = 42,
        batch_size: int = 20,
        first_index: int = 0,
        skip: int = 0,
        streamer: TextStreamer | None = None,
        **settings,
    ) -> Iterator[Sample]:
        """Writes `num_samples` texts for each prompt and yields each as it is done, in order.

        Args:
            prompts: how the texts begin, one or several. Space at a prompt's end is dropped, since no training text
                ends there; what looks like a control token is text. For a model with a template also fields, such as
                {"title": "The Last Ferry"}: those left out are written by the model, if it learnt to, else drawn
                from its training texts; and None: all of them are.
            batch_size: how many texts grow side by side.
            first_index: which of the seed's texts the first one is; the others follow.
            skip: leaves out so many of the texts, the first ones; the others are the same as with them.
            streamer: is given the tokens of each text in turn, as they come.
            settings: temperature, top_k (0: off), top_p, repetition_penalty, max_new_tokens (fewer where the
                model's window ends).

        Raises:
            UserError: for settings that mean nothing, and where a prompt leaves no room in the model's window or the
                texts none in memory.
        """
        settings = self.settings(**settings)
        for name, value in {**settings, "num_samples": num_samples, "batch_size": batch_size}.items():
            check_sampling(f"{name}={value}", name, value)
        prompts = [prompts] if isinstance(prompts, str | dict) else prompts or [{} if self.template else ""]
        jobs = dict(enumerate((prompt for prompt in prompts for _ in range(num_samples)), first_index))
        fields = {index: prompt for index, prompt in jobs.items() if isinstance(prompt, dict)}
        fields = self._fill_in(fields, seed, batch_size, settings)
        jobs |= {index: self.template.prompt(given) for index, given in fields.items()}
        return self._grow(jobs, fields, seed, batch_size, settings, skip, streamer)

    def _grow(
        self,
        jobs: dict[int, str],
        fields: dict[int, dict],
        seed: int,
        batch_size: int,
        settings: dict,
        skip: int = 0,
        streamer: TextStreamer | None = None,
    ) -> Iterator[Sample]:
        """A text for each prompt, both by the text's index."""
        encoded = {prompt: self._encode(prompt.rstrip()) for prompt in set(jobs.values())}
        texts = []
        for index, prompt in jobs.items():
            limit = min(settings["max_new_tokens"], self.window - len(encoded[prompt]))
            texts.append((prompt.rstrip(), fields.get(index), Text(index, encoded[prompt], limit)))
        if not texts:
            return iter(())
        decoder = self._decoder([text for *_, text in texts], seed, batch_size, settings)
        return self._write(decoder, texts[skip:], seed, streamer)

    def _fill_in(self, fields: dict[int, dict], seed: int, batch_size: int, settings: dict) -> dict[int, dict]:
        """All of the template's fields for each text, by its index. Those left out are written by the model in the
        template's order, each from what stands before it, or drawn from the training rows."""
        if not fields:
            return fields
        if self.template is None:
            raise UserError("the model was trained without --template: it knows no fields, only how a text begins")
        for given in fields.values():
            self.template.check(given, f"--fields {' '.join(given)}")
        if not self.template.learns_prompt:
            return {index: self._draw_fields(given, seed, index) for index, given in fields.items()}
        fields = {index: dict(given) for index, given in fields.items()}
        settings = settings | {"max_new_tokens": FIELD_TOKENS}
        for number, name in enumerate(self.template.fields, start=1):
            jobs = {index: self.template.prompt(given, name) for index, given in fields.items() if name not in given}
            samples = self._grow(jobs, {}, seed + number * 1_000_003, batch_size, settings)  # streams of their own
            for (index, prompt), sample in zip(jobs.items(), samples, strict=True):
                fields[index][name] = self.template.cut(name, sample.text[len(prompt.strip()) :])
        return fields

    def _draw_fields(self, given: dict[str, str], seed: int, index: int) -> dict[str, str]:
        missing = [name for name in self.template.fields if name not in given]
        if not missing:
            return given
        if self._field_pool is None:
            self._field_pool = read_field_pool(self._model_dir, self.template, missing)
        return self._field_pool.draw(given, seed, index)

    def _decoder(self, texts: list[Text], seed: int, batch_size: int, settings: dict) -> Decoder | GenerateDecoder:
        num_slots = min(batch_size, len(texts))
        if self._make_decoder is None:
            self._make_decoder = find_decoder(self.model)
            if not self.in_training and not makes_slots(self._make_decoder):
                kind = self.model.config.model_type
                say(f"note: transformers' generate samples {kind} models, which is slower than this project's decoder")
        if not self.in_training and makes_slots(self._make_decoder):
            optimize_for_inference(self.model, num_slots)
        return self._make_decoder(
            self.model,
            num_slots,
            max(len(text.prompt_ids) + text.limit for text in texts),
            seed,
            self.draw(settings["temperature"], settings["top_k"], settings["top_p"]),
            settings["repetition_penalty"],
            self.tokenizer.eos_token_id,
            self.never_sampled,
            self.in_training,
        )

    def _write(self, decoder, texts, seed, streamer) -> Iterator[Sample]:
        steps = decoder.grow([text for *_, text in texts])
        for prompt, given, text in texts:
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
            ids = text.prompt_ids[1:] + text.new_ids if given is None else text.new_ids
            whole = self.tokenizer.decode(ids, skip_special_tokens=False)
            yield Sample(whole.strip(), prompt, seed, len(text.new_ids), text.finish_reason, given)

    @property
    def window(self) -> int:
        """Most tokens a text can have, prompt and beginning token included. A sliding window is no limit."""
        return get_window(self.model)

    def check_prompts(self, prompts: list[str], flag: str) -> None:
        """UserError where one leaves no room in the model's window; `flag`: how the user named them."""
        for prompt in prompts:
            self._encode(prompt.rstrip(), flag)

    def _encode(self, prompt: str, flag: str = "--prompt") -> list[int]:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"{flag} {textwrap.shorten(prompt, 40)!r}: is not UTF-8; type it anew") from None
        ids = self.tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if len(ids) + 2 > self.window:
            raise UserError(
                f"{flag} {textwrap.shorten(prompt, 40)!r}: {len(ids):,} tokens leave no room in the model's window "
                f"of {self.window:,}; shorten it"
            )
        return [self.tokenizer.bos_token_id, *ids]
