import pytest
import torch
from conftest import tiny_config
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTNeoXConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
)

from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.data.tokenizer import load_tokenizer, read_tokenizer
from neoflix.model.attention import ATTENTION_NAME
from neoflix.model.folder import ADAPTERS_FILE
from neoflix.model.load import build_demo_model, load_model, load_pretrained
from neoflix.model.lora import check_spare_rows, collect_adapters, save_adapters
from neoflix.model.vocabulary import get_window, keeps_texts_apart
from neoflix.runtime.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return load_tokenizer(str(model_dir))


@pytest.fixture
def model(model_dir, tokenizer):
    return load_model(str(model_dir), tokenizer, torch.float32, SAMPLING_DEFAULTS)


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
    with pytest.raises(UserError, match="were trained while the base model's spare rows stayed untrained"):
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


def test_saved_model_is_plain_hugging_face(model, tmp_path):
    """Whoever loads it without this project gets the same model, and never a padded row."""
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config._attn_implementation != ATTENTION_NAME
    ids = torch.arange(1, 40).unsqueeze(0)
    torch.testing.assert_close(plain(ids).logits, model.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    torch.manual_seed(0)
    sampled = plain.generate(ids, num_return_sequences=8, max_new_tokens=50, temperature=5.0)
    assert sampled[:, 39:].max() <= 501
    assert plain.generation_config.do_sample


def test_gpt_neo_takes_our_attention_by_default(model_dir, model):
    assert keeps_texts_apart(model)
    assert keeps_texts_apart(load_pretrained(str(model_dir), torch.float32))
    assert keeps_texts_apart(build_demo_model(512))


def test_any_causal_language_model_loads(tokenizer, tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=32, n_layer=2, n_head=2, n_positions=64)).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), tokenizer, torch.float32, SAMPLING_DEFAULTS)
    assert not keeps_texts_apart(model)
    assert get_window(model) == 64
    assert model.config.vocab_size == 512


def test_demo_is_small_and_ready():
    model = build_demo_model(4096)
    assert sum(weight.numel() for weight in model.parameters()) < 5_000_000
    assert model.config.attention_layers == ["global", "local", "global", "local"]


@pytest.mark.parametrize("missing", ["weights", "config", "everything", "network", "whole weights"])
def test_folder_without_a_model_is_one_sentence(missing, tmp_path, model):
    folder = tmp_path / "folder"
    if missing == "everything":
        folder.mkdir()
    elif missing != "network":
        model.save_pretrained(folder)
    if missing == "weights":
        (folder / "model.safetensors").unlink()
    if missing == "config":
        (folder / "config.json").unlink()
    if missing == "whole weights":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="model_name_or_path") as error:
        load_pretrained("nobody/none" if missing == "network" else str(folder), torch.float32)
    assert "\n" not in str(error.value)


def test_weights_of_another_architecture_are_refused(model, tmp_path):
    """transformers would fill what is missing with random numbers and only warn."""
    model.save_pretrained(tmp_path)
    tiny_config(num_layers=6, attention_types=[[["global", "local"], 3]], vocab_size=512).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lack"):
        load_pretrained(str(tmp_path), torch.float32)
