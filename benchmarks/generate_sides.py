"""The sides of `generate.py`: five ways to write texts with the same weights and the same sampling settings.

A side is a function of the number of texts. It writes so many at once, decodes them, and returns the number of tokens.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from architectures import build_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    GPTNeoForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import neoflix.model.register  # noqa: F401  `generate_batch` then knows our attention
from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.export import write_weights
from neoflix.model.gpt2 import gpt2_config, name_of
from neoflix.sampling.inference import optimize_for_inference
from neoflix.sampling.int8 import check_int8
from neoflix.sampling.sampler import Sampler

SIDES = ("transformers", "ours", "ours_int8", "generate_batch", "vllm")
TOKENIZER_SIZE = 50_259  # GPT-Neo's tokens and two more special ones; the 45 rows beyond are padding
PAGE = 256  # tokens of a page of generate_batch's cache; its default
VLLM_ON_A_CPU = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # GiB; the threads below


def build_sides(sampler: Sampler, args: Namespace, stack: ExitStack) -> dict[str, Callable[[int], int]]:
    """{name: side} of `args.sides`. The stack ends what they leave running.

    All sides take the sampler's weights, so its model must not be optimized yet.
    """
    settings = SAMPLING_DEFAULTS | {"max_new_tokens": args.max_new_tokens}
    build = {
        "transformers": lambda: partial(
            sample_with_transformers, share_weights(sampler, args, "eager"), sampler.tokenizer, settings
        ),
        "ours": lambda: partial(sample_with_ours, sampler, settings),
        "ours_int8": lambda: partial(sample_with_ours, round_weights(sampler, args), settings),
        "generate_batch": lambda: GenerateBatch(
            share_weights(sampler, args, "ours"), sampler.tokenizer, settings, stack
        ),
        "vllm": lambda: Vllm(sampler, settings, args, stack),
    }
    return {name: build[name]() for name in args.sides}


def share_weights(sampler: Sampler, args: Namespace, attention: str) -> GPTNeoForCausalLM:
    """A second model with the very same weights, in memory once."""
    model = build_model(args.architecture, sampler.model.dtype, sampler.model.device, attention).eval()
    model.load_state_dict(sampler.model.state_dict(), assign=True)
    return model


def round_weights(sampler: Sampler, args: Namespace) -> Sampler:
    """The sampler of `generate.py --int8`."""
    check_int8(sampler.model.device.type)
    return Sampler(optimize_for_inference(share_weights(sampler, args, "ours"), 1, int8=True), sampler.tokenizer)


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer as large as the real one. The model has no row for the end token, so no side can draw it, at no
    extra cost."""
    num_words = min(vocab_size, TOKENIZER_SIZE) - 3
    ids = {f"word{i}": i for i in range(num_words)} | {"bos": num_words, "pad": num_words + 1, "eos": vocab_size}
    words = Tokenizer(WordLevel(ids, unk_token="word0"))
    special = {"bos_token": "bos", "pad_token": "pad", "eos_token": "eos"}
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)


def generation_config(tokenizer: PreTrainedTokenizerBase, settings: dict, **more) -> GenerationConfig:
    """transformers' form of the settings."""
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return GenerationConfig(do_sample=True, **ends, **settings, **more)


def sample_with_transformers(
    model: GPTNeoForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: dict, num_texts: int
) -> int:
    """Samples with plain transformers: eager attention, a cache that grows."""
    prompt = torch.tensor([[tokenizer.bos_token_id]], device=model.device)
    config = generation_config(tokenizer, settings, num_return_sequences=num_texts)
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    tokenizer.batch_decode(output)
    return output[:, 1:].numel()


def sample_with_ours(sampler: Sampler, settings: dict, num_texts: int) -> int:
    """Samples as `python generate.py` does."""
    samples = sampler.sample(num_samples=num_texts, batch_size=num_texts, **settings)
    return sum(sample.num_tokens for sample in samples)


class GenerateBatch:
    """Samples with transformers' continuous batching and our attention, as docs/loading.md shows.

    Its cache and, on a GPU, its CUDA graphs are kept from turn to turn, and made anew for another number of texts.
    """

    def __init__(self, model: GPTNeoForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: dict, stack: ExitStack):
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # a warning each turn that it is kept
        stack.callback(model.destroy_cached_continuous_batching_manager)
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.num_texts = 0

    def __call__(self, num_texts: int) -> int:
        if num_texts != self.num_texts:
            self.model.destroy_cached_continuous_batching_manager()
            self.num_texts = num_texts
        outputs = self.model.generate_batch(
            [[self.tokenizer.bos_token_id]] * num_texts,
            generation_config=generation_config(self.tokenizer, self.settings),
            continuous_batching_config=self.room_for(num_texts),
            persistent_manager=True,
        )
        ids = [output.generated_tokens for output in outputs.values()]
        self.tokenizer.batch_decode(ids)
        return sum(map(len, ids))

    def room_for(self, num_texts: int) -> ContinuousBatchingConfig:
        """A cache for so many texts. By default it is most of the free memory, which other sides need."""
        pages = -(-(1 + self.settings["max_new_tokens"]) // PAGE)
        return ContinuousBatchingConfig(num_blocks=num_texts * pages + 1, max_batch_tokens=max(num_texts, PAGE))


def check_vllm_python(name: str | None) -> None:
    """Ends with exit code 2 unless `name` is a program."""
    if name and shutil.which(name):
        return
    found = f"{name} is no program" if name else "neither is set"
    print(
        f"error: --sides vllm needs a Python with vLLM in VLLM_PYTHON or --vllm_python, but {found};"
        " docs/export.md says how to make one",
        file=sys.stderr,
    )
    sys.exit(2)


class Vllm:
    """Samples with vLLM, in a process of its own, from the export in GPT-2's layout. The stack ends the process.

    On a GPU vLLM compiles the model and records CUDA graphs, as it does by default.

    Attributes:
        version: vLLM's.
    """

    def __init__(self, sampler: Sampler, settings: dict, args: Namespace, stack: ExitStack):
        names = {"max_new_tokens": "max_tokens"}
        asked = {
            "prompt": [sampler.tokenizer.bos_token_id],
            "never": [sampler.tokenizer.bos_token_id, sampler.tokenizer.pad_token_id],
            "settings": {names.get(name, name): value for name, value in settings.items()},
            "engine": {
                "dtype": name_of(sampler.model.dtype),
                "max_num_seqs": max(args.batch_sizes),
                "enforce_eager": sampler.model.device.type == "cpu",  # there it would compile for minutes
                "gpu_memory_utilization": 0.5,  # the other sides are on the same GPU
            },
        }
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as many as the other sides have
        with tempfile.TemporaryDirectory() as folder:
            export(sampler, Path(folder))
            asked["engine"]["model"] = folder
            process = subprocess.Popen(
                [args.vllm_python, str(Path(__file__).with_name("vllm_side.py")), json.dumps(asked)],
                env={"VLLM_LOGGING_LEVEL": "ERROR", **VLLM_ON_A_CPU, **os.environ, **threads},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self.process = stack.enter_context(process)
            self.version = self.read_answer()  # when it has loaded the export

    def __call__(self, num_texts: int) -> int:
        print(num_texts, file=self.process.stdin, flush=True)
        return int(self.read_answer())

    def read_answer(self) -> str:
        answer = self.process.stdout.readline().strip()
        if not answer:
            sys.exit(f"error: vLLM ended with exit code {self.process.wait()}; its messages are above")
        return answer


def export(sampler: Sampler, folder: Path) -> None:
    """Writes the model in GPT-2's layout, as `python -m neoflix.export --to gpt2` does."""
    config = gpt2_config(sampler.model.config, len(sampler.tokenizer), sampler.model.dtype)
    write_weights(sampler.model, config, folder)
    torch.cuda.empty_cache()  # of the copy; vLLM asks how much is free
    sampler.tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
