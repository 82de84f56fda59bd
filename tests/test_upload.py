"""Uploads to a hub on this machine: what is checked before training, what is uploaded, and what a failure leaves."""

import argparse
import json
import shutil
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import READER, WRITER, HubServer, account
from huggingface_hub import snapshot_download
from safetensors.torch import save_file

from neoflix.checkpoints.names import LIST_FILE, RESULTS_FILE, RUN_FILE
from neoflix.model.packaged import HUB_NAME
from neoflix.reporting.card import CARD_MARK
from neoflix.runtime.errors import UploadError, UserError
from neoflix.runtime.files import hash_file
from neoflix.runtime.processes import exit_code_of
from neoflix.sampling.sampler import Sampler
from neoflix.upload import check_upload, collect_files, main, upload, uploading

# huggingface_hub 2.4 sends files by a name that its HTTP client deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

MODEL_FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def hub(monkeypatch):
    """A hub that this process uses, with the token of a writer."""
    hub = HubServer()
    settings = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    yield hub
    hub.stop()


@pytest.fixture
def finished(finished_run, tmp_path) -> Path:
    """A finished run, to be written to."""
    return shutil.copytree(finished_run, tmp_path / "my-run")


def flags_of(run, **values) -> argparse.Namespace:
    flags = {"push_to_hub": True, "hub_model_id": None, "hub_private_repo": None, "hub_token": None}
    return argparse.Namespace(output_dir=str(run), **(flags | values))


def check_and_upload(run, **values) -> str:
    flags = flags_of(run, **values)
    name = check_upload(flags)
    assert upload(flags, name) is None
    return name


def contents(folder: Path) -> dict[str, str]:
    return {str(path): hash_file(path)["xxh3_128"] for path in sorted(folder.rglob("*")) if path.is_file()}


# Before training


def test_the_repository_is_named_by_the_folder_or_the_flag(hub):
    assert check_upload(flags_of("somewhere/my-run")) == "ann/my-run"
    assert check_upload(flags_of("my-run", hub_model_id="other")) == "ann/other"
    assert check_upload(flags_of("my-run", hub_model_id="club/other")) == "club/other"
    assert not hub.repositories, "a check creates nothing"


@pytest.mark.parametrize(
    ("values", "token", "said"),
    [
        ({}, None, "hf auth login"),
        ({}, "hf_" + "x" * 30, "does not accept the token of HF_TOKEN"),
        ({"hub_token": "hf_" + "x" * 30}, WRITER, "does not accept the token of --hub_token"),
        ({}, READER, "write access"),
        ({"hub_model_id": "bob/run"}, WRITER, "may not write to bob; .* ann, club"),
        ({"hub_model_id": "museum/run"}, WRITER, "may not write to museum"),
        ({"hub_model_id": "ann/public", "hub_private_repo": True}, WRITER, "ann/public exists and is public"),
        ({"hub_model_id": "ann/locked"}, WRITER, "may not write to ann/locked"),
        ({"hub_model_id": "ann/broken"}, WRITER, "HTTP 500"),
    ],
)
def test_what_is_refused_before_training(hub, monkeypatch, values, token, said):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    for name in ("ann/public", "ann/locked"):
        hub.create(name)
    hub.refused = {"ann/locked/auth-check": 403, "models/ann/broken": 500}
    with pytest.raises(UserError, match=said) as error:
        check_upload(flags_of("my-run", **values))
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    assert "x" * 30 not in str(error.value)
    assert hub.repositories.keys() == {"ann/public", "ann/locked"}


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # "discard": nobody listens
    with pytest.raises(UserError, match=r"127.0.0.1:9 .*Connection refused"):
        check_upload(flags_of("my-run"))


def test_offline_is_said_before_anything_is_asked(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        check_upload(flags_of("my-run"))
    assert not hub.requests


@pytest.mark.parametrize(
    ("entity", "permissions", "is_allowed"),
    [
        ("ann", ["repo.content.read", "repo.write"], True),
        ("ann/my-run", ["repo.write"], True),
        ("ann", ["repo.content.read"], False),
        ("ann/another", ["repo.write"], False),
        ("club", ["repo.write"], False),
    ],
)
def test_a_fine_grained_token_must_name_owner_or_repository(hub, entity, permissions, is_allowed):
    scopes = [{"entity": {"type": "user", "name": entity}, "permissions": permissions}]
    hub.accounts[WRITER] = account("ann", "fineGrained")
    hub.accounts[WRITER]["auth"]["accessToken"]["fineGrained"] = {"global": [], "scoped": scopes}
    if is_allowed:
        assert check_upload(flags_of("my-run")) == "ann/my-run"
        return
    with pytest.raises(UserError, match="write access"):
        check_upload(flags_of("my-run"))


# After training


def test_a_run_is_uploaded_as_a_model_that_loads(hub, finished, tmp_path, capsys):
    before = contents(finished)
    (finished / "notes.txt").write_text("the user's own")
    name = check_and_upload(finished, hub_private_repo=True)
    found = hub.repositories[name]
    assert found.private
    assert found.commits == [(["README.md", *MODEL_FILES], [])]
    assert not [file for file, content in found.files.items() if str(tmp_path).encode() in content]
    card = found.files["README.md"].decode()
    assert 'from_pretrained("ann/my-run")' in card
    assert 'from_pretrained(".")' in (finished / "README.md").read_text(), "the folder keeps its own card"
    (finished / "notes.txt").unlink()
    assert contents(finished) == before
    assert WRITER not in "".join(capsys.readouterr())

    copy = snapshot_download(name, local_dir=tmp_path / "copy")
    texts = [[each.text for each in Sampler.load(folder).sample([""], 4, seed=3)] for folder in (finished, copy)]
    assert texts[0] == texts[1]


def test_uploading_again_replaces_files_and_removes_stale_weights(hub, finished):
    name = check_and_upload(finished)
    found = hub.repositories[name]
    check_and_upload(finished)
    assert len(found.commits) == 1, "nothing has changed"
    earlier = ["adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors"]
    others = ["pytorch_model.bin", "notes.md"]
    found.files |= dict.fromkeys([*earlier, *others], b"earlier")
    settings = json.loads((finished / "generation_config.json").read_text()) | {"temperature": 0.5}
    (finished / "generation_config.json").write_text(json.dumps(settings))
    check_and_upload(finished)
    assert found.commits[1] == (["generation_config.json"], earlier)
    assert json.loads(found.files["generation_config.json"])["temperature"] == 0.5
    assert found.files.keys() >= {*others}


def test_a_card_of_the_users_is_uploaded_and_one_on_the_hub_is_kept(hub, finished):
    (finished / "README.md").write_text("# Mine\n")
    name = check_and_upload(finished)
    found = hub.repositories[name]
    assert found.files["README.md"] == b"# Mine\n"
    (finished / "README.md").write_text(f"{CARD_MARK}. -->")
    check_and_upload(finished)
    assert found.files["README.md"] == b"# Mine\n", "somebody may have written it on the hub"


@pytest.mark.parametrize("at", ["POST /api/repos/create", "/preupload/", "objects/batch", "PUT /lfs", "/commit/"])
def test_a_refused_upload_leaves_the_run_as_it_was(hub, finished, at):
    before = contents(finished)
    hub.refused = {at: 403}
    with pytest.raises(UploadError, match=rf"HTTP 403.*python -m neoflix.upload {finished} --hub_model_id") as error:
        check_and_upload(finished)
    assert error.value.exit_code == 4
    assert "\n" not in str(error.value)
    assert contents(finished) == before
    hub.refused = {}
    check_and_upload(finished)
    assert len(hub.repositories["ann/my-run"].commits) == 1


def test_a_hub_that_breaks_off(hub, finished):
    hub.on_request = lambda request: "/commit/" in request
    with pytest.raises(UploadError, match="disconnected"):
        check_and_upload(finished)


def test_a_request_to_stop_does_not_wait_for_the_network(hub, finished):
    is_over = threading.Event()

    def stall(request: str) -> bool:
        if request.startswith("PUT"):
            (finished / "STOP").touch()
            is_over.wait(60)
        return is_over.is_set()

    hub.on_request = stall
    flags = flags_of(finished)
    reason = upload(flags, check_upload(flags))
    assert "STOP" in reason
    assert not (finished / "STOP").exists(), "the same command goes on"
    assert not hub.repositories["ann/my-run"].commits
    is_over.set()


def test_nothing_is_asked_without_the_flag(hub, finished):
    with uploading(flags_of(finished, push_to_hub=False)):
        pass
    assert not hub.requests


def test_a_run_that_fails_is_not_uploaded(hub, finished):
    with pytest.raises(ZeroDivisionError), uploading(flags_of(finished)):
        raise ZeroDivisionError
    assert not hub.repositories


# Adapters


@pytest.fixture
def adapters(tmp_path) -> Path:
    """The folder of a finished run with LoRA adapters for smollm2."""
    run = tmp_path / "adapted"
    run.mkdir()
    save_file({"lora_A": torch.zeros(2)}, run / "adapter_model.safetensors")
    files = {
        "adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "smollm2"},
        RUN_FILE: {"model": "smollm2", "lora": {"rank": 4, "alpha": 8}},
        RESULTS_FILE: {},
        LIST_FILE: {"id": "0" * 8, "files": {"adapter_config.json": [], "adapter_model.safetensors": []}},
    }
    for name, content in files.items():
        (run / name).write_text(json.dumps(content))
    return run


def test_adapters_name_a_base_of_the_hub(adapters):
    files = collect_files(adapters)
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == HUB_NAME
    assert "smollm2" in (adapters / "adapter_config.json").read_text()


def test_adapters_for_a_folder_are_not_uploaded(adapters, tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")}
    (adapters / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="--to merged"):
        collect_files(adapters)


# The program


def test_a_finished_run_is_uploaded_by_hand(hub, finished):
    main([str(finished), "--hub_model_id", "club/by-hand", "--hub_private_repo"])
    assert hub.repositories["club/by-hand"].private
    assert len(hub.repositories["club/by-hand"].commits) == 1


def test_an_unfinished_run_is_not(hub, finished, capsys):
    (finished / RESULTS_FILE).unlink()
    assert exit_code_of(lambda: main([str(finished)])) == 2
    assert "holds no finished run" in capsys.readouterr().err
    assert not hub.requests
