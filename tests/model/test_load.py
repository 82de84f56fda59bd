import pytest
import torch
from conftest import tiny_config
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from neoflix.arguments.sampling import SAMPLING_DEFAULTS
from neoflix.model.attention import ATTENTION_NAME
from neoflix.model.load import build_demo_model, load_model, load_pretrained
from neoflix.model.loss import causal_lm_loss
from neoflix.model.vocabulary import get_window, keeps_texts_apart


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
    """Its texts are packed if our attention keeps them apart; BLOOM's has distances of its own (ALiBi)."""
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    bloom = BloomForCausalLM(BloomConfig(vocab_size=500, hidden_size=32, n_layer=2, n_head=2))
    for name, model, packed, window in (("gpt2", gpt2, True, 64), ("bloom", bloom, False, 2048)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        model = load_model(str(tmp_path / name), tokenizer, torch.float32, SAMPLING_DEFAULTS)
        assert keeps_texts_apart(model) is packed
        assert model.loss_function is causal_lm_loss
        assert get_window(model) == window
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
    with pytest.raises(ValueError, match="missing"):
        load_pretrained(str(tmp_path), torch.float32)
