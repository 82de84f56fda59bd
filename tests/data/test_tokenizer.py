import shutil

import pytest
from conftest import gpt2_tokenizer_dir

from neoflix.data.tokenizer import BOS, EOS, PAD, load_tokenizer, train_tokenizer


def test_gpt_neo_gets_a_beginning_and_a_padding_token(model_dir):
    tokenizer = load_tokenizer(str(model_dir))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, PAD)
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert len(set(ids)) == 3
    assert len(tokenizer) == 502


def test_real_vocabulary(tmp_path):
    if gpt2_tokenizer_dir() is None:
        pytest.skip("needs GPT2_TOKENIZER_DIR")
    folder = tmp_path / "gpt2"
    shutil.copytree(gpt2_tokenizer_dir(), folder, copy_function=shutil.copyfile)
    (folder / "config.json").write_text('{"model_type": "gpt_neo"}')
    tokenizer = load_tokenizer(str(folder))
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [50257, 50256, 50258]


def test_tokens_that_differ_already_are_kept(model_dir, tmp_path):
    tokenizer = load_tokenizer(str(model_dir))
    tokenizer.add_special_tokens({"bos_token": "<s>", "pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<s>", EOS, "<pad>")
    assert len(again) == len(tokenizer)


def test_saved_and_loaded_is_the_same(model_dir, tmp_path, titles):
    tokenizer = load_tokenizer(str(model_dir))
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again(titles)["input_ids"] == tokenizer(titles)["input_ids"]
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_trained_tokenizer_is_made_once_and_loses_nothing(titles, tmp_path):
    tokenizer = train_tokenizer(titles, 600, tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, PAD)
    assert len(tokenizer) == 600
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = train_tokenizer(titles, 600, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == made
    for text in [*titles[:20], "Ünïcode, 文字 and \n lines"]:
        assert again.decode(again(text)["input_ids"]) == text


@pytest.mark.parametrize("name", ["an/unknown-model", "folder"])
def test_no_tokenizer_is_one_sentence(tmp_path, name):
    with pytest.raises(ValueError, match="no tokenizer found") as error:
        load_tokenizer(str(tmp_path) if name == "folder" else name)
    assert "\n" not in str(error.value)
