"""The decoding loop gives what `generate` gives, whatever else is in the batch."""

from itertools import islice

import pytest
import torch
from recorded_graphs import recorded_graphs
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from neoflix.sampling.decoder import Decoder, DecoderSettings, Text
from neoflix.sampling.draw import Draw
from neoflix.sampling.inference import optimize_for_inference

EOS, PAD = 0, 501
NEW = 32  # tokens at the most
LENGTHS = (1, 2, 40, 3, 17, 1, 9, 64, 5, 16, 1, 30)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Twelve of unlike lengths, below and above the window of 16 tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 500, (length,), generator=generator).tolist() for length in LENGTHS]


def theirs(model_dir, prompts: list[list[int]], dtype=torch.float32, device="cpu", **settings) -> list[list[int]]:
    """What transformers' eager `generate` writes greedily after each prompt, one by one."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager", dtype=dtype).eval().to(device)
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=EOS, pad_token_id=PAD, **settings)
    rows = []
    for prompt in prompts:
        new = model.generate(torch.tensor([prompt], device=device), generation_config=config)[0, len(prompt) :].tolist()
        rows.append(new[: new.index(EOS)] if EOS in new else new)
    return rows


def count_steps(decoder: Decoder, texts: list[Text]) -> int:
    """Grows the texts; a loop without end stops."""
    return sum(1 for _ in islice(decoder.grow(texts), 2 * NEW * len(texts)))


def ours(model, prompts, num_slots: int, draw=None, seed=1, penalty=1.0, as_on_cuda=False) -> list[list[int]]:
    texts = [Text(i, prompt, NEW) for i, prompt in enumerate(prompts)]
    optimize_for_inference(model, num_slots)
    settings = DecoderSettings(
        num_slots=num_slots,
        num_places=max(LENGTHS) + NEW,  # whole blocks: a step too many would leave the cache
        seed=seed,
        draw=draw or Draw(1.0, 1, 1.0),
        repetition_penalty=penalty,
        eos_token_id=EOS,
    )
    decoder = Decoder(model, settings)
    if not as_on_cuda:
        num_steps = count_steps(decoder, texts)
    else:
        decoder.has_graphs, decoder.lag, decoder.asks = True, 2, False
        with recorded_graphs() as counts:
            num_steps = count_steps(decoder, texts)
        assert counts["replays"] == num_steps
        assert 0 < counts["captures"] < num_steps / 2 or decoder.draw != settings.draw
    assert all(text.finish_reason == ("length" if len(text.new_ids) == NEW else "eos") for text in texts)
    return [text.new_ids for text in texts]


def load(model_dir, device="cpu", dtype=torch.float32):
    from neoflix.model.load import load_pretrained

    return load_pretrained(str(model_dir), dtype).eval().to(device)


@pytest.fixture(scope="module")
def greedy(model_dir, prompts) -> list[list[int]]:
    return theirs(model_dir, prompts)


@pytest.mark.parametrize("as_on_cuda", [False, True])
@pytest.mark.parametrize("num_slots", [1, 3, 12])
def test_greedy_is_transformers_greedy(model_dir, prompts, greedy, num_slots, as_on_cuda):
    """Texts of different lengths that come and go in the slots, against each by itself in eager attention."""
    assert ours(load(model_dir), prompts, num_slots, as_on_cuda=as_on_cuda) == greedy


def test_slots_without_a_text_are_left(model_dir, prompts):
    """Where each slot costs time, the longest texts grow by themselves."""
    limits, widths = (3, 5, 20, 20, 6, 32), []
    texts = [Text(i, prompts[i], limit) for i, limit in enumerate(limits)]
    settings = DecoderSettings(num_slots=4, num_places=96, seed=1, draw=Draw(1.0, 0, 1.0), repetition_penalty=1.2)
    decoder = Decoder(load(model_dir), settings)
    for _ in decoder.grow(texts):
        widths.append(len(decoder.slots))
    assert [len(text.new_ids) for text in texts] == list(limits)
    # The fifth text follows the first at step 4, and the sixth the second at step 6.
    assert widths == [4] * 20 + [1] * 17
    alone = Text(5, prompts[5], 32)
    for _ in Decoder(load(model_dir), settings).grow([alone]):
        pass
    assert texts[5].new_ids == alone.new_ids


@pytest.mark.parametrize("as_on_cuda", [False, True])
def test_penalty_is_transformers_penalty(model_dir, prompts, greedy, as_on_cuda):
    expected = theirs(model_dir, prompts, repetition_penalty=1.4)
    assert expected != greedy
    assert ours(load(model_dir), prompts, 4, penalty=1.4, as_on_cuda=as_on_cuda) == expected


def test_another_architecture(prompts, tmp_path):
    """Masks that are added up, other names for the same things."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_positions=128, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for implementation in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation).eval()
        assert ours(model, prompts, 5) == theirs(tmp_path, prompts)


@pytest.mark.parametrize(
    ("temperature", "count", "num_slots", "seed"), [(1.5, 2, 4, 1), (0.3, 8, 4, 2), (0.2, 3, 12, 1)]
)
def test_few_candidates_do_not_change_the_draw(model_dir, prompts, temperature, count, num_slots, seed):
    """Too few from the first token on, or later in a text. On CUDA the text continues from its last known token, with
    more candidates, and what the steps that were under way drew for it is forgotten."""
    every = ours(load(model_dir), prompts, num_slots, Draw(temperature, 0, 0.95), seed)
    assert len({tuple(row) for row in every}) == len(prompts)
    few = Draw(temperature, 0, 0.95, count)
    for as_on_cuda in (False, True):
        assert ours(load(model_dir), prompts, num_slots, few, seed, as_on_cuda=as_on_cuda) == every


# ---- on a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("num_slots", [1, 5])
def test_greedy_on_a_gpu(model_dir, prompts, num_slots):
    assert ours(load(model_dir, "cuda"), prompts, num_slots) == theirs(model_dir, prompts, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("num_slots", [1, 5])
def test_penalty_on_a_gpu(model_dir, prompts, num_slots):
    """Nothing of it may be copied from the host while a graph is captured."""
    expected = theirs(model_dir, prompts, device="cuda", repetition_penalty=1.4)
    assert ours(load(model_dir, "cuda"), prompts, num_slots, penalty=1.4) == expected


@pytest.mark.gpu
def test_texts_on_a_gpu_are_those_of_the_cpu(model_dir, prompts):
    """Graphs, late reading, and a draw that needs more candidates again and again."""
    draw = Draw(1.5, 0, 0.95, num_candidates=2)
    assert ours(load(model_dir, "cuda"), prompts, 4, draw) == ours(load(model_dir), prompts, 4, draw)


@pytest.mark.gpu
def test_half_precision_on_a_gpu(model_dir, prompts):
    rows = ours(load(model_dir, "cuda", torch.bfloat16), prompts, 4, Draw(1.0, 0, 0.95))
    assert len({tuple(row) for row in rows}) == len(prompts)
