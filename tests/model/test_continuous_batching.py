"""Texts of `generate_batch` with our attention are those of `generate` with transformers' eager attention."""

import pytest
import torch
from conftest import tiny_config
from transformers import ContinuousBatchingConfig, GenerationConfig, GPTNeoForCausalLM

import neoflix.model.register  # noqa: F401  transformers then knows ATTENTION_NAME
from neoflix.model.attention import ATTENTION_NAME
from neoflix.model.continuous_batching import MANAGER, PagedCache

GREEDY = GenerationConfig(
    max_new_tokens=30, do_sample=False, eos_token_id=499, pad_token_id=0, suppress_tokens=[3, 200, 201]
)
# Below and above the window of 16; the last two begin with the same tokens, which fill a page of the cache.
LENGTHS = (5, 40, 1, 17, 16, 70, 45)
CONFIGS = {
    "all prompts at once": {"num_blocks": 64, "max_batch_tokens": 256},
    "prompts in pieces": {"num_blocks": 64, "max_batch_tokens": 16},
    "texts wait for the cache": {"num_blocks": 8, "max_batch_tokens": 64},
}


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 499, (length,), generator=generator).tolist() for length in LENGTHS]
    prompts[-1][:35] = prompts[-2][:35]
    return prompts


@pytest.fixture(scope="module")
def pair():
    """(eager, ours), with the same weights."""
    torch.manual_seed(1)
    eager = GPTNeoForCausalLM._from_config(tiny_config(), attn_implementation="eager").eval()
    ours = GPTNeoForCausalLM._from_config(tiny_config(), attn_implementation=ATTENTION_NAME)
    ours.load_state_dict(eager.state_dict())
    return eager, ours.eval()


@pytest.fixture(scope="module")
def expected(pair):
    eager, _ = pair
    texts = []
    for prompt in make_prompts():
        ids = torch.tensor([prompt])
        row = eager.generate(ids, attention_mask=torch.ones_like(ids), generation_config=GREEDY)[0]
        texts.append(row[len(prompt) :].tolist())
    return texts


def generate(model, config: dict, **options) -> list[list[int]]:
    config = ContinuousBatchingConfig(page_size=16, **config)
    options |= {"generation_config": GREEDY, "continuous_batching_config": config}
    return [output.generated_tokens for output in model.generate_batch(make_prompts(), **options).values()]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_texts_are_those_of_generate(pair, expected, config):
    _, ours = pair
    assert generate(ours, config) == expected
    assert ours.config._attn_implementation == ATTENTION_NAME


def test_a_kept_manager_is_the_models(pair, expected):
    _, ours = pair
    config = CONFIGS["all prompts at once"]
    assert generate(ours, config, persistent_manager=True) == expected
    manager = getattr(ours, MANAGER)
    assert generate(ours, config, persistent_manager=True) == expected
    assert getattr(ours, MANAGER) is manager
    ours.destroy_cached_continuous_batching_manager()
    assert not hasattr(ours, MANAGER)


def test_eager_attention_is_left_to_transformers(pair):
    for model, is_ours in zip(pair, (False, True), strict=True):
        assert (model.init_continuous_batching(GREEDY).model is not model) == is_ours


def test_places_among_the_keys_of_all_texts():
    """Two texts with 3 and 10 tokens, of which 3 and 2 are new, then two rows of padding."""
    bounds = {
        "cu_seq_lens_q": torch.tensor([0, 3, 5, 5]),
        "cu_seq_lens_k": {"full_attention": torch.tensor([0, 3, 13, 13])},
    }
    places = PagedCache({**bounds, "num_queries": 7}).place_Q1
    assert places[:5, 0].tolist() == [0, 1, 2, 11, 12]
    assert places.shape == (7, 1)
