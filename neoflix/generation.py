"""Sampling on top of Hugging Face's `generate`, each text from a random stream of its own.

Text i of seed s is argmax over logits + Gumbel noise, which is a draw from their softmax (the Gumbel-max
trick, https://arxiv.org/abs/1411.0030); the noise at a step is a hash of (s, i, step, token). So a text
depends neither on the batch it grew in nor on those before it, rounding aside, and no generator has to be
stored to go on after an interruption.

Shapes: B texts, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from neoflix.config import SAMPLING_DEFAULTS
from neoflix.consolidation import whole_weights
from neoflix.model import get_window, load_pretrained

MASK_64 = (1 << 64) - 1


@dataclass(frozen=True)
class Sample:
    """One text. `num_tokens`: new ones, the end token not counted; `finish_reason`: "eos" or "length"."""

    text: str
    prompt: str
    seed: int
    num_tokens: int
    finish_reason: str

    to_dict = asdict


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finalizer on int64 (arithmetic modulo 2^64): nearby inputs, unrelated outputs.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _signed(x: int) -> int:
    x &= MASK_64
    return x - (1 << 64) if x >> 63 else x


class GumbelNoise(LogitsProcessor):
    """Adds the noise that turns `generate`'s argmax into a draw, a stream for each row.

    Args:
        seed: of the whole run.
        indices: which text each row is, B of them.
        prompt_length: columns of `input_ids` before the first new token.
    """

    def __init__(self, seed: int, indices: list[int], prompt_length: int, device: torch.device):
        self.prompt_length = prompt_length
        keys = [_signed((seed << 32) ^ index) for index in indices]
        self.keys_B1 = _mix(_mix(torch.tensor(keys, device=device)) + 1).unsqueeze(1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length
        tokens_V = torch.arange(scores.shape[1], device=scores.device)
        bits_BV = _mix(_mix(self.keys_B1 + step) + tokens_V)
        uniform_BV = (((bits_BV >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53
        return scores - uniform_BV.log().neg().log().to(scores.dtype)


class Sampler:
    """A model, its tokenizer and its sampling settings, ready to write.

    sampler = Sampler.load("results")
    for sample in sampler.sample(prompts=["A young"], num_samples=3):
        print(sample.text)
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.saved = model.generation_config
        model.generation_config = GenerationConfig()  # else `generate` mixes the saved settings into ours
        if tokenizer.pad_token_id is None:  # a pretrained model as it came
            tokenizer.pad_token_id = tokenizer.eos_token_id
        control = {tokenizer.bos_token_id, tokenizer.pad_token_id} - {tokenizer.eos_token_id}
        rows = model.get_output_embeddings().weight.shape[0]
        self.never_sampled = sorted(control | set(range(len(tokenizer), rows)))

    @classmethod
    def load(cls, folder: str | Path, device: str | None = None, allow_pickle: bool = False) -> "Sampler":
        """Loads a run's folder or a checkpoint; on CUDA in bf16 (fp16 before Ampere), else on the CPU in fp32.

        Args:
            allow_pickle: take weights from pytorch_model.bin where there is no safetensors file (docs/loading.md).
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float32
        if device.startswith("cuda"):
            dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        with whole_weights(Path(folder)) as source:
            model = load_pretrained(str(source), dtype, allow_pickle).to(device)
            try:
                tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", trust_remote_code=False)
            except (OSError, ValueError) as error:
                raise ValueError(f"--model_dir {folder}: holds a model but no tokenizer") from error
        return cls(model, tokenizer)

    def settings(self, **overrides) -> dict:
        """Sampling settings: what is given here, else what the model was saved with, else the defaults."""
        saved = {name: getattr(self.saved, name, None) for name in SAMPLING_DEFAULTS}
        chosen = SAMPLING_DEFAULTS.copy()
        for source in (saved, overrides):
            chosen |= {name: value for name, value in source.items() if value is not None}
        return chosen

    def sample(
        self,
        prompts: list[str] | None = None,
        num_samples: int = 1,
        seed: int = 42,
        batch_size: int = 20,
        first_index: int = 0,
        **settings,
    ) -> Iterator[Sample]:
        """Writes `num_samples` texts for each prompt, in order, and yields each batch as it is done.

        Args:
            prompts: how the texts begin; space at a prompt's end is dropped, since no training text ends there.
            first_index: which of the seed's texts the first one is; the others follow.
            settings: temperature, top_k (0: off), top_p, repetition_penalty, max_new_tokens (fewer where the
                model's window ends).

        Raises:
            ValueError: where a prompt leaves no room in the model's window.
        """
        jobs = [prompt.rstrip() for prompt in prompts or [""] for _ in range(num_samples)]
        encoded = {prompt: self._encode(prompt) for prompt in set(jobs)}
        return self._write(jobs, encoded, seed, batch_size, first_index, self.settings(**settings))

    def _write(self, jobs, encoded, seed, batch_size, first_index, settings) -> Iterator[Sample]:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            indices = [first_index + start + i for i in range(len(batch))]
            new_ids = self._grow([encoded[prompt] for prompt in batch], indices, seed, settings)
            for prompt, ids in zip(batch, new_ids, strict=True):
                yield self._as_sample(prompt, encoded[prompt], ids, seed)

    def _encode(self, prompt: str) -> list[int]:
        ids = self.tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if len(ids) + 2 > get_window(self.model):
            raise ValueError(
                f"--prompt: {len(ids):,} tokens leave no room in the model's window of "
                f"{get_window(self.model):,}; shorten it"
            )
        return [self.tokenizer.bos_token_id, *ids]

    @torch.inference_mode()
    def _grow(self, prompts: list[list[int]], indices: list[int], seed: int, settings: dict) -> list[list[int]]:
        """Token ids that follow each prompt."""
        batch = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.model.device)
        prompt_length = batch["input_ids"].shape[1]
        processors = LogitsProcessorList()
        if settings["temperature"] != 1.0:
            processors.append(TemperatureLogitsWarper(float(settings["temperature"])))
        if settings["top_k"]:
            processors.append(TopKLogitsWarper(settings["top_k"]))
        if settings["top_p"] < 1.0:
            processors.append(TopPLogitsWarper(settings["top_p"]))
        processors.append(GumbelNoise(seed, indices, prompt_length, self.model.device))
        output = self.model.generate(
            **batch,
            logits_processor=processors,
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=min(settings["max_new_tokens"], get_window(self.model) - prompt_length),
                repetition_penalty=settings["repetition_penalty"],
                suppress_tokens=self.never_sampled or None,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            ),
        )
        return output[:, prompt_length:].tolist()

    def _as_sample(self, prompt: str, prompt_ids: list[int], new_ids: list[int], seed: int) -> Sample:
        eos = self.tokenizer.eos_token_id
        ended = eos in new_ids
        new_ids = new_ids[: new_ids.index(eos)] if ended else new_ids
        text = self.tokenizer.decode(prompt_ids[1:] + new_ids, skip_special_tokens=False)
        return Sample(text.strip(), prompt, seed, len(new_ids), "eos" if ended else "length")
