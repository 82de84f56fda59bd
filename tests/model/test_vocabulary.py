"""The rows of new tokens, token ids and the window."""

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    GPTNeoXConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
)

from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.data.tokenizer import load_tokenizer, read_tokenizer
from neoflix.model.folder import ADAPTERS_FILE
from neoflix.model.load import load_model, load_pretrained
from neoflix.model.lora import check_spare_rows, collect_adapters, save_adapters
from neoflix.runtime.errors import UserError


def test_vocabulary_is_padded_and_old_rows_are_untouched(model, model_dir):
    old = AutoModelForCausalLM.from_pretrained(model_dir).get_input_embeddings().weight
    new = model.get_input_embeddings().weight
    assert (old.shape[0], new.shape[0], model.config.vocab_size) == (500, 512, 512)
    assert torch.equal(new[:500], old)
    assert model.get_output_embeddings().weight is new, "tied weights came apart"


def test_new_rows_start_sensibly(model, tokenizer):
    rows = model.get_input_embeddings().weight
    assert torch.equal(rows[tokenizer.bos_token_id], rows[tokenizer.eos_token_id])
    for row in (tokenizer.pad_token_id, 502, 511):
        torch.testing.assert_close(rows[row], rows[:500].mean(0))


SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 64}
GPTJ_SIZES = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "rotary_dim": 4}
QWEN_SIZES = SIZES | {"num_key_value_heads": 2}
OPT_SIZES = SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 1}
# More rows than the 500 tokens of the tokenizer, to which two are added.
SPARE = {
    "Pythia": GPTNeoXConfig(vocab_size=512, intermediate_size=64, **SIZES),
    "Qwen, tied": Qwen2Config(vocab_size=576, intermediate_size=64, tie_word_embeddings=True, **QWEN_SIZES),
    "Qwen, untied": Qwen2Config(vocab_size=576, intermediate_size=64, **QWEN_SIZES),
    "GPT-J": GPTJConfig(vocab_size=512, **GPTJ_SIZES),
    "Phi": PhiConfig(vocab_size=640, intermediate_size=64, **SIZES),
    "OPT": OPTConfig(vocab_size=504, **OPT_SIZES),
    "GPT-Neo": tiny_config(vocab_size=501),
}


@pytest.fixture(params=SPARE.values(), ids=SPARE)
def spare(request, model_dir, tmp_path):
    """A folder with a model whose embedding has rows that its tokenizer does not use."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(request.param)
    if (head := model.get_output_embeddings()).bias is not None:
        torch.nn.init.normal_(head.bias)
    model.save_pretrained(tmp_path)
    read_tokenizer(model_dir, "").save_pretrained(tmp_path)
    return tmp_path


def test_new_tokens_in_spare_rows_start_sensibly(spare, tokenizer):
    model = load_model(str(spare), tokenizer, torch.float32, SAMPLING_DEFAULTS)
    before = AutoModelForCausalLM.from_pretrained(spare)
    size = before.get_input_embeddings().num_embeddings
    for of in ("get_input_embeddings", "get_output_embeddings"):
        for name, old in getattr(before, of)().named_parameters():
            new = getattr(getattr(model, of)(), name)
            assert torch.equal(new[:500], old[:500]), "what the model knows stays"
            assert torch.equal(new[502:size], old[502:]), "rows without a token stay"
            assert torch.equal(new[500], old[0]), "a beginning starts as the end"
            torch.testing.assert_close(new[501], old.mean(0))
    assert len(new) % 64 == 0
    again = load_model(str(spare), load_tokenizer(str(spare)), torch.float32, SAMPLING_DEFAULTS)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_tokens_that_the_model_has_are_left_alone(spare, tokenizer, tmp_path):
    """A model that was trained with its beginning token, loaded again."""
    model = load_model(str(spare), tokenizer, torch.float32, SAMPLING_DEFAULTS)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    again = load_model(str(tmp_path / "trained"), load_tokenizer(str(tmp_path / "trained")), torch.float32, {})
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_adapters_find_the_rows_that_they_were_trained_with(spare, tokenizer, tmp_path):
    """Also those from before spare rows were filled, whose file does not say that they were."""
    adapted = load_model(str(spare), tokenizer, torch.float32, {}, lora={"rank": 2, "alpha": 4.0})
    adapters, folder = collect_adapters(adapted), tmp_path / "adapters"
    folder.mkdir()
    save_adapters(adapted, {name: weight.normal_() for name, weight in adapters.items()}, folder)
    tokenizer.save_pretrained(folder)
    check_spare_rows(adapted, folder)
    trained = adapted.get_base_model().get_input_embeddings().weight
    merged = load_pretrained(str(folder), torch.float32).get_input_embeddings().weight
    assert torch.equal(merged, trained)
    save_file(adapters, folder / ADAPTERS_FILE, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"adapters.*spare rows.*--output_dir"):
        check_spare_rows(adapted, folder)
    merged = load_pretrained(str(folder), torch.float32).get_input_embeddings().weight
    before = AutoModelForCausalLM.from_pretrained(spare).get_input_embeddings().weight
    assert torch.equal(merged[: len(before)], before)


def test_ids_and_sampling_settings_are_set(model, tokenizer):
    for config in (model.config, model.generation_config):
        assert config.bos_token_id == tokenizer.bos_token_id == 500
        assert config.eos_token_id == tokenizer.eos_token_id == 0
        assert config.pad_token_id == tokenizer.pad_token_id == 501
    assert model.generation_config.temperature == SAMPLING_DEFAULTS["temperature"]
    assert model.generation_config.suppress_tokens == list(range(500, 512))
