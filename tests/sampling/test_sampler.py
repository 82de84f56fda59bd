"""Prompts in, texts out: each text from a stream of its own, and the model is left as it was."""

import pytest
import torch
from conftest import tiny_config
from transformers import AutoModelForCausalLM, GenerationConfig, GPTNeoForCausalLM

from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.data.tokenizer import load_tokenizer
from neoflix.sampling.decoder import Text
from neoflix.sampling.inference import PackedLinear
from neoflix.sampling.sampler import Sampler


@pytest.fixture(scope="module")
def sampler(run_dir):
    return Sampler.load(run_dir, device="cpu")


def grow(sampler, prompts: list[list[int]], seed: int = 1, **settings) -> list[list[int]]:
    """Token ids that follow each prompt, all texts side by side."""
    settings = sampler.settings(**settings)
    grown = [Text(i, prompt, settings["max_new_tokens"]) for i, prompt in enumerate(prompts)]
    for _ in sampler._decoder(grown, seed, len(grown), settings).grow(grown):
        pass
    return [text.new_ids for text in grown]


def texts(sampler, **options):
    return [sample.text for sample in sampler.sample(seed=5, max_new_tokens=20, **options)]


def test_text_i_is_the_same_in_any_batch(sampler):
    alone = texts(sampler, num_samples=7, batch_size=1)
    assert texts(sampler, num_samples=7, batch_size=7) == alone
    assert texts(sampler, num_samples=7, batch_size=3) == alone
    assert texts(sampler, num_samples=4, batch_size=4) == alone[:4]
    assert len(set(alone)) == 7


def test_prompts_of_unlike_length_share_a_batch(sampler):
    prompts = ["A", "When the harbour freezes over, a retired pilot of great age", "Two brothers"]
    together = texts(sampler, prompts=prompts, num_samples=2, batch_size=6)
    assert together == texts(sampler, prompts=prompts, num_samples=2, batch_size=1)
    for text, prompt in zip(together[::2], prompts, strict=True):
        assert text.startswith(prompt)


def test_no_filter_is_the_models_own_distribution(sampler, run_dir):
    """First tokens of many texts against the softmax of a plain transformers model."""
    model = AutoModelForCausalLM.from_pretrained(run_dir).eval()
    bos = torch.tensor([[sampler.tokenizer.bos_token_id]])
    logits = model(bos).logits[0, -1]
    logits[sampler.never_sampled] = float("-inf")
    top = logits.topk(5).indices
    probabilities = logits.softmax(-1)
    num = 4000
    rows = grow(sampler, [[int(bos)]] * num, 9, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=1)
    first = torch.tensor([row[0] if row else sampler.tokenizer.eos_token_id for row in rows])
    for token in top.tolist():
        p = probabilities[token].item()
        assert abs((first == token).float().mean().item() - p) < 4.5 * (p * (1 - p) / num) ** 0.5


def test_settings_bite(sampler):
    greedy = texts(sampler, num_samples=3, top_k=1)
    assert len(set(greedy)) == 1
    assert len(set(texts(sampler, num_samples=3, top_p=1e-6))) == 1
    assert len(set(texts(sampler, num_samples=3, temperature=1e-4))) == 1
    assert texts(sampler, num_samples=3, repetition_penalty=1.5) != texts(sampler, num_samples=3)


def test_greedy_is_transformers_greedy(sampler, run_dir):
    model = AutoModelForCausalLM.from_pretrained(run_dir, attn_implementation="eager").eval()
    ids = [sampler.tokenizer.bos_token_id, *sampler.tokenizer("Two brothers")["input_ids"]]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=30, eos_token_id=0, pad_token_id=501, suppress_tokens=sampler.never_sampled
    )
    theirs = model.generate(torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist()
    assert grow(sampler, [ids], top_k=1, max_new_tokens=30) == [theirs]


def test_saved_settings_hold_unless_overruled(sampler):
    assert sampler.settings()["max_new_tokens"] == 24
    assert sampler.settings()["temperature"] == SAMPLING_DEFAULTS["temperature"]
    assert sampler.settings(temperature=1.5, top_k=None)["temperature"] == 1.5


def test_rows_without_a_token_are_never_sampled(sampler):
    """At this temperature every row is as likely as any other: 3,000 draws would hit the 11 rows without a text."""
    rows = grow(sampler, [[500]] * 100, temperature=1e4, top_p=1.0, max_new_tokens=40)
    drawn = {token for row in rows for token in row}
    assert sampler.never_sampled == list(range(500, 512))
    assert len(drawn) > 300
    assert not drawn & set(sampler.never_sampled)


def test_window_is_never_passed(sampler):
    long = next(sampler.sample(max_new_tokens=5000, num_samples=1, prompts=["word " * 40]))
    assert long.num_tokens + len(sampler.tokenizer(long.prompt)["input_ids"]) + 1 <= 256
    with pytest.raises(ValueError, match=r"--prompt 'word word .*\[\.\.\.\]': [0-9]+ tokens .*256"):
        sampler.sample(prompts=["A", "word " * 300])
    with pytest.raises(ValueError, match=r"--prompt 'A .udcff': is not UTF-8"):  # a shell that speaks Latin-1
        sampler.sample(prompts=["A \udcff"])


@pytest.mark.parametrize("bad", [{"temperature": 0}, {"top_p": 0.0}, {"top_p": 1.2}, {"top_k": -1}, {"num_samples": 0}])
def test_settings_that_mean_nothing(sampler, bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value}: "):
        sampler.sample(**bad)
    with pytest.raises(TypeError, match=r"'temprature'.*temperature, top_k"):
        sampler.sample(temprature=1.0)


def test_one_prompt_needs_no_list(sampler):
    assert texts(sampler, prompts="Two brothers") == texts(sampler, prompts=["Two brothers"])


def test_pretrained_model_as_it_came_can_write(model_dir):
    sampler = Sampler.load(model_dir, device="cpu")
    assert next(sampler.sample(max_new_tokens=5)).num_tokens <= 5


def test_control_tokens_in_a_prompt_are_text(sampler):
    """Typed by a user, the end token's name is thirteen characters."""
    ids = sampler._encode("A <|endoftext|> <|startoftext|>")
    assert ids[0] == sampler.tokenizer.bos_token_id
    assert not {sampler.tokenizer.eos_token_id, sampler.tokenizer.bos_token_id} & set(ids[1:])
    assert sampler.tokenizer.decode(ids[1:]) == "A <|endoftext|> <|startoftext|>"


def test_texts_after_the_first_ones(sampler):
    whole = texts(sampler, num_samples=9, batch_size=4)
    assert texts(sampler, num_samples=9, batch_size=4, skip=5) == whole[5:]
    assert texts(sampler, num_samples=9, batch_size=4, skip=9) == []
    assert texts(sampler, num_samples=4, batch_size=4, first_index=5) == whole[5:]


def describe(model, ids: torch.Tensor) -> tuple:
    """All that sampling could change: weights, modules, modes, settings, outputs, and the random generator's state."""
    rng = torch.random.get_rng_state()
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    torch.manual_seed(7)  # dropout is on: the same modules draw the same masks
    logits = model(ids).logits
    torch.random.set_rng_state(rng)
    return modules, model.generation_config.to_dict(), addresses, weights, logits, rng


@pytest.mark.parametrize("in_training", [False, True])
def test_a_sampler_leaves_the_model_as_it_was(model_dir, in_training):
    """A model in training: with dropout, one part of it frozen in eval mode, twice with other batch sizes."""
    torch.manual_seed(0)
    model = GPTNeoForCausalLM(tiny_config(vocab_size=512, resid_dropout=0.3)).train()
    model.transformer.h[0].eval()
    sampler = Sampler(model, load_tokenizer(str(model_dir)), in_training=in_training)
    ids = torch.randint(0, 500, (2, 20))
    before = describe(model, ids)
    for batch_size in (5, 1, 3):
        assert len(texts(sampler, num_samples=5, batch_size=batch_size)) == 5
    next(sampler.sample(num_samples=2))  # not taken to the end
    after = describe(model, ids)
    assert after[:3] == before[:3]
    assert after[3].keys() == before[3].keys()
    assert all(torch.equal(after[3][name], weight) for name, weight in before[3].items())
    assert torch.equal(after[4], before[4])
    assert torch.equal(after[5], before[5])
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in model.parameters())
    model(ids, labels=ids).loss.backward()


def test_the_model_that_it_loads_itself_is_made_faster(sampler, run_dir):
    assert any(isinstance(module, PackedLinear) for module in sampler.model.modules())
    given = Sampler(AutoModelForCausalLM.from_pretrained(run_dir), sampler.tokenizer)
    assert texts(given, num_samples=3) == texts(sampler, num_samples=3)


def test_text_of_a_prompt_in_words(sampler):
    sample = next(sampler.sample("Two brothers ", seed=1))
    assert sample.prompt == "Two brothers"
    assert sample.text == sample.whole
    assert sample.text.startswith("Two brothers")
    assert list(sample.to_dict()) == ["text", "prompt", "seed", "num_tokens", "finish_reason"]
