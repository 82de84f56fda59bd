"""Sampling: prompts in, texts out, each from a random stream of its own.

Text i of seed s does not depend on its batch or on the texts before it, up to rounding. Resuming needs no stored
generator: the noise at each step is a hash of (s, i, step, token). How texts grow side by side is in `decoder.py`.

    from neoflix.sampling.sampler import Sampler
    for sample in Sampler.load("results").sample(prompts=["A young"], num_samples=3):
        print(sample.text)
"""

import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from neoflix.arguments.sampling import SAMPLING_DEFAULTS, check_sampling
from neoflix.data.fields import FieldPool
from neoflix.data.template import find_template
from neoflix.data.tokenizer import read_tokenizer
from neoflix.model.load import load_for_reading
from neoflix.model.vocabulary import get_window
from neoflix.runtime.console import printable
from neoflix.runtime.errors import UserError
from neoflix.sampling.architectures import GenerateDecoder, find_decoder, makes_slots
from neoflix.sampling.decoder import Decoder, DecoderSettings, Text
from neoflix.sampling.draw import Draw
from neoflix.sampling.growth import finish_in_order, look_in
from neoflix.sampling.inference import eval_mode, prepare
from neoflix.sampling.int8 import check_int8
from neoflix.sampling.slot_cache import num_rows
from neoflix.sampling.slots import FEWEST, choose_num_slots
from neoflix.sampling.training_fields import read_field_pool

FIELD_TOKENS = 32  # most tokens of a field that the model writes


@dataclass(frozen=True)
class Sample:
    """A text that a model wrote.

    Attributes:
        text: the text as the data set has it in its text column. A prompt in words is the beginning of that text; a
            prompt that the template made of `fields` is not part of it.
        prompt: what the model was given.
        num_tokens: number of new tokens, without the end token.
        finish_reason: "eos" or "length"; None while the text grows.
        fields: the template's fields; None if the prompt was given in words.
    """

    text: str
    prompt: str
    seed: int
    num_tokens: int
    finish_reason: str | None
    fields: dict[str, str] | None = None

    @property
    def whole(self) -> str:
        """The prompt and what follows it."""
        return self.text if self.fields is None else f"{self.prompt} {self.text}"

    def to_dict(self) -> dict:
        """A line of a file of samples; without `fields` if there are none."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class PrintableStreamer(TextStreamer):
    """transformers' streamer, without the control characters that a terminal would obey."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)


class Sampler:
    """Writes texts with a model, which it leaves as it is: weights, modules, and train or eval mode.

    Args:
        in_training: the model is being trained: see `DecoderSettings`.
        field_pool: where the fields that a prompt leaves out are drawn from. By default the pool is read from the data
            set of the run in `model_dir`, when a field is left out for the first time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        in_training: bool = False,
        field_pool: FieldPool | None = None,
        model_dir: Path | None = None,
    ):
        self.model, self.tokenizer, self.in_training = model, tokenizer, in_training
        self.saved = model.generation_config
        self.template = find_template(tokenizer)
        self._field_pool, self._model_dir = field_pool, model_dir
        control = {tokenizer.bos_token_id, tokenizer.pad_token_id} - {tokenizer.eos_token_id, None}
        self.never_sampled = sorted(control | set(range(len(tokenizer), num_rows(model))))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | None = None,
        allow_pickle: bool = False,
        batch_size: int = 20,
        int8: bool = False,
    ) -> "Sampler":
        """Loads a run's folder or a checkpoint and optimizes the model for inference.

        Args:
            device: by default CUDA, in bf16 (fp16 before Ampere), if there is a GPU; otherwise the CPU, in fp32.
            allow_pickle: load weights from pytorch_model.bin if there is no safetensors file (docs/loading.md).
            batch_size: most texts that will be written at once; any other is possible too, but slower.
            int8: compute with 8-bit integers on a CPU, which is faster and rounds (docs/sampling.md).

        Raises:
            UserError: as `load_for_reading`; with int8 also if there is a GPU, or if transformers samples the model.
        """
        if int8:
            check_int8(device)
        model = load_for_reading(str(folder), device, allow_pickle)
        sampler = cls(model, read_tokenizer(folder, f"--model_dir {folder}"), model_dir=Path(folder))
        prepare(model, min(batch_size, FEWEST), int8, makes_slots(sampler._make_decoder))
        return sampler

    @cached_property
    def _make_decoder(self):
        """Found when the first text is written: it takes a few passes through the model."""
        return find_decoder(self.model)

    def settings(self, **overrides) -> dict:
        """Sampling settings: those given here, else those saved with the model, else the defaults."""
        if unknown := overrides.keys() - SAMPLING_DEFAULTS:
            raise TypeError(f"{unknown.pop()!r} is not a sampling setting; use {', '.join(SAMPLING_DEFAULTS)}")
        saved = {name: getattr(self.saved, name, None) for name in SAMPLING_DEFAULTS}
        given = {name: value for source in (saved, overrides) for name, value in source.items() if value is not None}
        return SAMPLING_DEFAULTS | given

    def sample(
        self,
        prompts: str | dict | list[str | dict] | None = None,
        num_samples: int = 1,
        seed: int = 42,
        batch_size: int | None = None,
        first_index: int = 0,
        skip: int = 0,
        streamer: TextStreamer | None = None,
        **settings,
    ) -> Iterator[Sample]:
        """Writes `num_samples` texts for each prompt and yields them in order, each as soon as it is finished.

        Args:
            prompts: one or several. In words, a prompt is the beginning of its text; spaces at its end are dropped, as
                no training text ends there, and the name of a control token is plain text. For a model with a template
                a prompt can be its fields, such as {"title": "The Last Ferry"}. Fields that are left out are written
                by the model if it was trained to, and otherwise drawn from its training texts. None leaves out all.
            batch_size: number of texts that grow at once; None: as many as this device writes fastest (`slots.py`).
            first_index: index of the first text within the seed's texts.
            skip: number of texts to leave out at the beginning; the others are the same as without `skip`.
            streamer: is given the tokens of each text in turn, as they come.
            settings: temperature, top_k (0: off), top_p, repetition_penalty, max_new_tokens (fewer if the model's
                window ends before).

        Raises:
            UserError: if a setting is not valid, a prompt leaves no room in the model's window, or memory is too small.
        """
        jobs, fields, settings = self._plan(prompts, num_samples, seed, batch_size, first_index, settings)
        steps, texts = self._begin(jobs, seed, batch_size, settings, skip)
        finished = finish_in_order(self.model, steps, texts, streamer)
        return (self._to_sample(text, jobs[text.index], fields.get(text.index), seed) for text in finished)

    def watch(
        self,
        prompts: str | dict | list[str | dict] | None = None,
        num_samples: int = 1,
        seed: int = 42,
        batch_size: int | None = None,
        every: float = 0.1,
        **settings,
    ) -> Iterator[list[Sample]]:
        """Writes the texts that `sample` writes, and yields all of them while they grow. Arguments and errors as there.

        Args:
            every: seconds between two looks at the texts. The last look is at the finished texts.
        """
        jobs, fields, settings = self._plan(prompts, num_samples, seed, batch_size, 0, settings)
        steps, texts = self._begin(jobs, seed, batch_size, settings)
        for _ in look_in(self.model, steps, every):
            yield [self._to_sample(text, jobs[text.index], fields.get(text.index), seed) for text in texts]

    def _plan(
        self, prompts, num_samples: int, seed: int, batch_size: int | None, first_index: int, settings: dict
    ) -> tuple[dict[int, str], dict[int, dict], dict]:
        """(the prompt of each text, the fields of those that have some, both by the text's index; all settings)"""
        settings = self.settings(**settings)
        checked = settings | {"num_samples": num_samples} | ({} if batch_size is None else {"batch_size": batch_size})
        for name, value in checked.items():
            check_sampling(f"{name}={value}", name, value)
        given = [prompts] if isinstance(prompts, str | dict) else prompts or [{} if self.template else ""]
        jobs = dict(enumerate((prompt for prompt in given for _ in range(num_samples)), first_index))
        fields = {index: prompt for index, prompt in jobs.items() if isinstance(prompt, dict)}
        fields = self._fill_in(fields, seed, batch_size, settings)
        jobs |= {index: self.template.prompt(each) for index, each in fields.items()}
        return {index: prompt.rstrip() for index, prompt in jobs.items()}, fields, settings

    def _begin(
        self, prompts: dict[int, str], seed: int, batch_size: int | None, settings: dict, skip: int = 0
    ) -> tuple[Iterator[None], list[Text]]:
        """(the steps that grow a text for each prompt, these texts), without the first `skip` ones. Prompts are by the
        text's index."""
        encoded = {prompt: self._encode(prompt) for prompt in dict.fromkeys(prompts.values())}
        limits = {prompt: min(settings["max_new_tokens"], self.window - len(ids)) for prompt, ids in encoded.items()}
        texts = [Text(index, encoded[prompt], limits[prompt]) for index, prompt in prompts.items()]
        if not texts:
            return iter(()), texts
        decoder = self._decoder(texts, seed, batch_size, settings)
        return decoder.grow(texts[skip:]), texts[skip:]

    def _fill_in(self, fields: dict[int, dict], seed: int, batch_size: int | None, settings: dict) -> dict[int, dict]:
        """All of the template's fields for each text, by its index. Fields that were not given are written by the model
        in the template's order, each after the fields before it, or drawn from the training texts."""
        if not fields:
            return fields
        if self.template is None:
            raise UserError("the model was trained without --template, so it has no fields; use a prompt in words")
        for given in fields.values():
            self.template.check(given, f"--fields {' '.join(given)}")
        if not self.template.learns_prompt:
            return {index: self._draw_fields(given, seed, index) for index, given in fields.items()}
        fields = {index: dict(given) for index, given in fields.items()}
        settings = settings | {"max_new_tokens": FIELD_TOKENS}
        for number, name in enumerate(self.template.fields, start=1):
            jobs = {index: self.template.prompt(given, name) for index, given in fields.items() if name not in given}
            steps, texts = self._begin(jobs, seed + number * 1_000_003, batch_size, settings)  # streams of their own
            for text in finish_in_order(self.model, steps, texts):
                fields[text.index][name] = self.template.cut(name, self._decode(text.new_ids))
        return fields

    def _draw_fields(self, given: dict[str, str], seed: int, index: int) -> dict[str, str]:
        missing = [name for name in self.template.fields if name not in given]
        if not missing:
            return given
        if self._field_pool is None:
            self._field_pool = read_field_pool(self._model_dir, self.template, missing)
        return self._field_pool.draw(given, seed, index)

    def _decoder(
        self, texts: list[Text], seed: int, batch_size: int | None, settings: dict
    ) -> Decoder | GenerateDecoder:
        settings = DecoderSettings(
            num_slots=min(batch_size or FEWEST, len(texts)),
            num_places=max(len(text.prompt_ids) + text.limit for text in texts),
            seed=seed,
            draw=Draw(settings["temperature"], settings["top_k"], settings["top_p"]),
            repetition_penalty=settings["repetition_penalty"],
            eos_token_id=self.tokenizer.eos_token_id,
            never_drawn=self.never_sampled,
            in_training=self.in_training,
        )
        with eval_mode(self.model):
            if batch_size is None:
                num_slots = choose_num_slots(self._make_decoder, self.model, settings, len(texts))
                settings = replace(settings, num_slots=num_slots)
            return self._make_decoder(self.model, settings)

    def _to_sample(self, text: Text, prompt: str, fields: dict | None, seed: int) -> Sample:
        ids = text.prompt_ids[1:] + text.new_ids if fields is None else text.new_ids
        return Sample(self._decode(ids).strip(), prompt, seed, len(text.new_ids), text.finish_reason, fields)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    @property
    def window(self) -> int:
        """Most tokens of a text, prompt and beginning token included. A sliding window is not a limit."""
        return get_window(self.model)

    def check_prompts(self, prompts: list[str], flag: str) -> None:
        """Raises UserError if a prompt leaves no room in the model's window; `flag` is how the user gave it."""
        for prompt in prompts:
            self._encode(prompt.rstrip(), flag)

    def _encode(self, prompt: str, flag: str = "--prompt") -> list[int]:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"{flag} {textwrap.shorten(prompt, 40)!r}: is not UTF-8; type it again") from None
        ids = self.tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if len(ids) + 2 > self.window:
            raise UserError(
                f"{flag} {textwrap.shorten(prompt, 40)!r}: {len(ids):,} tokens leave no room in the model's window "
                f"of {self.window:,}; shorten it"
            )
        return [self.tokenizer.bos_token_id, *ids]
