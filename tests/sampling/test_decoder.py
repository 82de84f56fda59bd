"""The decoding loop gives what `generate` gives, whatever else is in the batch."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from neoflix.sampling import cache
from neoflix.sampling.cache import check_memory, place_bytes
from neoflix.sampling.decoder import Decoder, Text
from neoflix.sampling.draw import Draw, stream_keys
from neoflix.sampling.inference import PackedLinear, optimize_for_inference

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


def ours(model, prompts, num_slots: int, draw=None, seed=1, penalty=1.0, as_on_cuda=False) -> list[list[int]]:
    texts = [Text(i, prompt, NEW) for i, prompt in enumerate(prompts)]
    optimize_for_inference(model, num_slots)
    num_places = max(LENGTHS) + NEW  # whole blocks: a step too many would leave the cache
    decoder = Decoder(model, num_slots, num_places, seed, draw or Draw(1.0, 1, 1.0), penalty, EOS, [])
    if as_on_cuda:
        decoder.lag, decoder.asks = 2, False
    for _ in decoder.grow(texts):
        pass
    assert all(text.finish_reason == ("length" if len(text.new_ids) == NEW else "eos") for text in texts)
    return [text.new_ids for text in texts]


def load(model_dir, device="cpu", dtype=torch.float32):
    from neoflix.model.load import load_pretrained

    return load_pretrained(str(model_dir), dtype).eval().to(device)


@pytest.mark.parametrize("as_on_cuda", [False, True])
@pytest.mark.parametrize("num_slots", [1, 3, 12])
def test_greedy_is_transformers_greedy(model_dir, prompts, num_slots, as_on_cuda):
    """Texts of unlike length that come and go in the slots, against each by itself in eager attention."""
    assert ours(load(model_dir), prompts, num_slots, as_on_cuda=as_on_cuda) == theirs(model_dir, prompts)


def test_penalty_is_transformers_penalty(model_dir, prompts):
    expected = theirs(model_dir, prompts, repetition_penalty=1.4)
    assert expected != theirs(model_dir, prompts)
    assert ours(load(model_dir), prompts, 4, penalty=1.4) == expected


def test_another_architecture(prompts, tmp_path):
    """Masks that are added up, other names for the same things."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_positions=128, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for implementation in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation).eval()
        assert ours(model, prompts, 5) == theirs(tmp_path, prompts)


SETTINGS = [(1.0, 0, 0.9), (0.7, 0, 0.5), (1.0, 20, 1.0), (1.3, 40, 0.8), (1.0, 0, 1.0), (4.0, 0, 0.95)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_draws_are_from_what_transformers_leaves(temperature, top_k, top_p):
    """Chi-square of 40,000 draws against transformers' own filters, and nothing that they leave out."""
    torch.manual_seed(3)
    logits_1V = 2 * torch.randn(1, 300)
    left_1V = logits_1V / temperature
    left_1V = TopKLogitsWarper(top_k)(None, left_1V) if top_k else left_1V
    left_1V = TopPLogitsWarper(top_p)(None, left_1V) if top_p < 1 else left_1V
    num = 40_000
    expected = left_1V.softmax(-1)[0] * num
    keys = stream_keys(5, list(range(num)))
    for count in (8, 1024):  # candidates: too few for most of these, and all of them
        draw = Draw(temperature, top_k, top_p, count)
        tokens, is_short = draw(logits_1V.expand(num, -1), keys, torch.zeros(num, dtype=torch.long))
        while is_short.any():
            assert top_p < 1
            draw = draw.wider()
            tokens, is_short = draw(logits_1V.expand(num, -1), keys, torch.zeros(num, dtype=torch.long))
        seen = torch.bincount(tokens, minlength=300)
        assert not seen[expected == 0].any()
        often = expected > 5
        freedom = int(often.sum()) - 1
        squares = ((seen - expected) ** 2 / expected)[often].sum()
        assert squares < freedom + 4 * (2 * freedom) ** 0.5  # four deviations; the seed is fixed


@pytest.mark.parametrize("as_on_cuda", [False, True])
def test_few_candidates_are_no_other_draw(model_dir, prompts, as_on_cuda):
    """On CUDA a text goes on from its last known token, with more candidates."""
    for temperature, count in (
        (1.5, 2),
        (0.3, 8),
        (0.2, 3),
    ):  # too few from the first token on, or from somewhere in a text
        every = ours(load(model_dir), prompts, 4, Draw(temperature, 0, 0.95))
        assert len({tuple(row) for row in every}) == len(prompts)
        assert ours(load(model_dir), prompts, 4, Draw(temperature, 0, 0.95, count), as_on_cuda=as_on_cuda) == every


def test_packed_layers_are_the_same_layers(model_dir):
    model, packed = load(model_dir), optimize_for_inference(load(model_dir), 20)
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    ids = torch.randint(0, 500, (3, 40))
    with torch.inference_mode():
        torch.testing.assert_close(packed(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_too_little_memory_says_what_fits(model_dir, monkeypatch):
    model = load(model_dir)
    a_text = 100 * place_bytes(model) + 16 * 500
    assert place_bytes(model) == 2 * 4 * 32 * 4
    monkeypatch.setattr(cache, "read_host_memory", lambda: 7 * a_text + 1)
    check_memory(model, 7, 100)
    with pytest.raises(ValueError, match=r"--batch_size 8: texts of up to 100 tokens .* --batch_size 7 would fit"):
        check_memory(model, 8, 100)
    monkeypatch.setattr(cache, "read_host_memory", lambda: a_text - 1)
    with pytest.raises(ValueError, match="lower --max_new_tokens"):
        check_memory(model, 1, 100)


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
