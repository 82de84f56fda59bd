"""Nothing pickled is loaded unless it was asked for, and no code of a model's own is run."""

import json
import pickle
import shutil
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from conftest import PYTHON, run_program
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import generate
import train
from neoflix.data.tokenizer import load_tokenizer
from neoflix.model import source
from neoflix.model.load import find_tokenizer, load_pretrained
from neoflix.model.source import check_reachable
from neoflix.runtime.processes import exit_code_of


class PickleBomb:
    """A pickle that creates `target` when it is read without care."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)

    def save(self, path: Path, num_bytes: int = 0) -> None:
        data = pickle.dumps({"module": self}, protocol=2)
        path.write_bytes(data + bytes(max(num_bytes - len(data), 0)))


@pytest.fixture
def pickled_dir(model_dir, tmp_path) -> Path:
    """A model's folder whose weights are in pytorch_model.bin."""
    folder = shutil.copytree(model_dir, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def assert_refused(folder: Path | str, file: str) -> None:
    with pytest.raises(ValueError, match=f"{file}.*pickle.*--allow_pickle true") as error:
        load_pretrained(str(folder), torch.float32)
    assert "\n" not in str(error.value)


def test_pickled_weights_are_refused_by_name(pickled_dir):
    assert_refused(pickled_dir, "pytorch_model.bin")


def test_a_flag_allows_them(pickled_dir, model_dir):
    loaded = load_pretrained(str(pickled_dir), torch.float32, allow_pickle=True).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    assert loaded.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(loaded[name], weight)


def test_safetensors_win_where_both_are_there(model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "both")
    bomb = PickleBomb(tmp_path / "exploded")
    bomb.save(folder / "pytorch_model.bin")
    for allow_pickle in (False, True):
        load_pretrained(str(folder), torch.float32, allow_pickle)
    assert not bomb.target.exists()


def test_even_allowed_ones_hold_tensors_only(pickled_dir, tmp_path):
    bomb = PickleBomb(tmp_path / "exploded")
    bomb.save(pickled_dir / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights"):
        load_pretrained(str(pickled_dir), torch.float32, allow_pickle=True)
    assert not bomb.target.exists()
    with suppress(RuntimeError):
        torch.load(pickled_dir / "pytorch_model.bin", weights_only=False)
    assert bomb.target.exists(), "the bomb was none"


def test_pickled_shards_are_refused(pickled_dir):
    (pickled_dir / "pytorch_model.bin").rename(pickled_dir / "pytorch_model-00001-of-00001.bin")
    (pickled_dir / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    assert_refused(pickled_dir, "pytorch_model.bin.index.json")


@pytest.mark.parametrize("by", ["config.json", "index"])
def test_pickles_by_another_name_are_refused(pickled_dir, by):
    """transformers takes both for safetensors: use_safetensors=True lets them through."""
    (pickled_dir / "pytorch_model.bin").rename(pickled_dir / "adapter_model.bin")
    weights = torch.load(pickled_dir / "adapter_model.bin", weights_only=True)
    if by == "index":
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "adapter_model.bin")}
        (pickled_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        config = json.loads((pickled_dir / "config.json").read_text())
        (pickled_dir / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
    AutoModelForCausalLM.from_pretrained(pickled_dir, use_safetensors=True)
    assert_refused(pickled_dir, "adapter_model.bin")


@pytest.mark.process
def test_a_repository_of_the_hub_with_pickles_alone_is_refused(pickled_dir, tmp_path):
    """As it lies in the cache after an earlier download."""
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--somebody--model"
    shutil.copytree(pickled_dir, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = "import torch; from neoflix.model.load import load_pretrained as f; f('somebody/model', torch.float32{})"
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    said = run_program(PYTHON, "-c", code.format(""), env=env, expect=1)
    assert "somebody/model: its weights are in pytorch_model.bin, a pickle" in said
    run_program(PYTHON, "-c", code.format(", True"), env=env)


@pytest.mark.process
def test_both_programs_refuse_and_allow(pickled_dir, train_words, tmp_path, capsys):
    words = {
        generate.main: ["--model_dir", str(pickled_dir), "--num_samples", "1", "--max_new_tokens", "2"],
        train.main: [*train_words, "--model_name_or_path", str(pickled_dir), "--max_steps", "1"],
    }
    for main, flags in words.items():
        assert exit_code_of(lambda main=main, flags=flags: main(flags)) == 2
        assert "pytorch_model.bin, a pickle" in capsys.readouterr().err
        main([*flags, "--allow_pickle", "true"])


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_of_a_models_own_is_not_run(model_dir, tmp_path, part, monkeypatch):
    folder = shutil.copytree(model_dir, tmp_path / "with-code")
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask whether it may
    if part == "model":
        config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="own code"):
            load_pretrained(str(folder), torch.float32)
    else:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        assert len(load_tokenizer(str(folder))) == 502  # tokenizer.json says all that is needed
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_from_elsewhere_is_not_resumed(train_words, tmp_path, capsys):
    """DeepSpeed and Trainer would unpickle it: shards, schedule, random states."""
    checkpoint = tmp_path / "elsewhere" / "checkpoint-1"
    (checkpoint / "global_step1").mkdir(parents=True)
    bomb = PickleBomb(tmp_path / "exploded")
    for name in ("scheduler.pt", "rng_state.pth", "global_step1/mp_rank_00_model_states.pt"):
        bomb.save(checkpoint / name)
    (checkpoint / "latest").write_text("global_step1")
    (checkpoint / "trainer_state.json").write_text("{}")
    words = [*train_words, "--resume_from_checkpoint", str(checkpoint)]
    assert exit_code_of(lambda: train.main(words)) == 2
    assert "manifest.json" in capsys.readouterr().err
    assert not bomb.target.exists()


def test_a_hub_that_cannot_be_reached_is_said_at_once(model_dir, monkeypatch):
    """Before its library begins to try; whoever answers, with whatever, can be reached."""
    monkeypatch.setattr("neoflix.model.source.is_offline_mode", lambda: False)  # as outside of these tests
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # it knows no HEAD: 501
        monkeypatch.setattr("neoflix.model.source.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        thread = Thread(target=server.handle_request)
        thread.start()
        check_reachable("somebody/something")
        thread.join()
    with pytest.raises(ValueError, match=f"somebody/something: .*{source.ENDPOINT} cannot be reached"):
        find_tokenizer("somebody/something", [], Path())
    check_reachable(str(model_dir))
