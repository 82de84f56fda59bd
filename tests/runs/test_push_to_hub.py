"""Whole runs that end on a hub of this machine."""

import json
import re
import signal
import subprocess
import threading

import pytest
from conftest import DEEPSPEED, ON_CPU, PYTHON, ROOT, environment_without_launcher, free_port, run_program
from hub_server import READER, WRITER, HubServer

from neoflix.sampling.sampler import Sampler

WORDS = [*ON_CPU, "--max_steps", "2", "--num_progress_samples", "0", "--push_to_hub", "true"]


@pytest.fixture
def hub(model_dir):
    """A hub that has the small base model."""
    hub = HubServer()
    hub.create("club/base", {path.name: path.read_bytes() for path in model_dir.iterdir()})
    yield hub
    hub.stop()


@pytest.fixture
def push(hub, train_words, tmp_path):
    """push(*words) -> what a run said that is uploaded to the hub"""

    def push(*words: str, expect: int = 0, token: str | None = WRITER, launcher: tuple = (PYTHON,)) -> str:
        env = hub.environment(token) | {"HF_HOME": str(tmp_path / "home")}
        return run_program(*launcher, "train.py", *train_words, *WORDS, *words, expect=expect, env=env)

    return push


def run_card(hub, name: str, tmp_path) -> str:
    """What the Python code in a repository's card prints, with greedy texts."""
    card = hub.repositories[name].files["README.md"].decode()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    script = tmp_path / "card.py"
    script.write_text(
        code.replace("generate(**beginning)", "generate(**beginning, do_sample=False, max_new_tokens=24)")
    )
    env = environment_without_launcher() | hub.environment() | {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([PYTHON, str(script)], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def greedy(folder, prompt: str = "A young") -> str:
    sampler = Sampler.load(folder)
    return next(iter(sampler.sample([prompt], 1, top_k=1, max_new_tokens=24))).text.strip()


def test_a_run_ends_on_the_hub_or_says_how_to_get_there(push, hub, tmp_path):
    hub.refused = {"/commit/": 503}
    output = push("--hub_model_id", "my-model", expect=4)
    assert "python -m neoflix.upload" in output
    assert "Traceback" not in output
    assert (tmp_path / "run" / "all_results.json").is_file()
    assert not hub.repositories["ann/my-model"].commits

    hub.refused = {}
    output = push("--hub_model_id", "my-model")
    assert "already holds this run" in output
    assert "train_runtime" not in output
    assert len(hub.repositories["ann/my-model"].commits) == 1
    assert run_card(hub, "ann/my-model", tmp_path) == greedy(tmp_path / "run")


def test_adapters_are_uploaded_as_peft_has_them(push, hub, tmp_path, model_dir):
    words = ["--lora", "true", "--lora_rank", "4", "--learning_rate", "0.05"]
    push(*words, "--model_name_or_path", "club/base", "--hub_model_id", "club/adapters")
    found = hub.repositories["club/adapters"]
    assert {"adapter_config.json", "adapter_model.safetensors"} < found.files.keys()
    assert not [name for name in found.files if name.startswith("model")]
    assert b"base_model_relation: adapter" in found.files["README.md"]
    config = tmp_path / "run" / "adapter_config.json"  # this process is offline: the base's folder
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(model_dir)}))
    text = run_card(hub, "club/adapters", tmp_path)
    assert text == greedy(tmp_path / "run")
    assert text != greedy(model_dir), "the adapters have an effect"


def test_two_processes_upload_once_and_end_together(push, hub):
    launcher = (DEEPSPEED, "--num_accelerators", "2", "--master_port", free_port())
    hub.refused = {"/commit/": 403}
    output = push(launcher=launcher, expect=4)
    assert output.count("could not be uploaded") == 1
    hub.refused = {}
    output = push(launcher=launcher)
    assert output.count("Uploaded: ") == 1
    assert len(hub.repositories["ann/run"].commits) == 1


@pytest.mark.parametrize("token", [None, READER, "hf_" + "x" * 30])
def test_without_a_token_that_may_write_nothing_is_trained(push, hub, tmp_path, token):
    output = push(expect=2, token=token)
    assert output.count("error: ") == 1
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()
    assert hub.repositories.keys() == {"club/base"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_an_upload_that_is_stopped(hub, train_words, tmp_path, number, code):
    is_over, log = threading.Event(), tmp_path / "log"
    env = environment_without_launcher() | hub.environment()
    with log.open("w") as output:
        words = [PYTHON, "train.py", *train_words, *WORDS]
        program = subprocess.Popen(words, cwd=ROOT, env=env, stdout=output, stderr=output)

    def stop(request: str) -> bool:
        if request.startswith("PUT"):
            program.send_signal(number)
            is_over.wait(120)
        return is_over.is_set()

    hub.on_request = stop
    try:
        assert program.wait(timeout=300) == code, log.read_text()
    finally:
        is_over.set()
        program.kill()
    assert "Stopped before the upload" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not hub.repositories["ann/run"].commits
