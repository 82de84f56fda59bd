"""`generate.py --web`: its page by HTTP, and in a browser on a desk and on a phone.

The browser is Playwright's own (`playwright install chromium`) or the system's Chromium or Chrome. Without one the
tests that need it are skipped.
"""

import base64
import html
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import PYTHON, ROOT, read_jsonl

import generate
from neoflix.data.template import Template, attach_template
from neoflix.data.tokenizer import load_tokenizer
from neoflix.runtime.console import printable

pytestmark = [
    pytest.mark.xdist_group("web"),
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs Gradio: requirements-web.txt"),
]
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DESK, PHONE = {"width": 1200, "height": 800}, {"width": 375, "height": 812}
# Waiting for a growing text could miss it: on a busy machine the texts may be finished when the browser draws again.
NOTE_GROWING = """() => new MutationObserver(() => {
    window.hasGrown ||= document.querySelector(".nf-growing") !== null
}).observe(document.body, {childList: true, subtree: true, attributes: true})"""
SETTINGS = ["--seed", "7", "--num_samples", "3", "--max_new_tokens", "120"]


@contextmanager
def serving(*words: str):
    """The address of a page, until Ctrl-C."""
    program = subprocess.Popen(
        [PYTHON, "generate.py", "--web", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    printed = []
    try:
        for line in program.stdout:
            printed.append(line)
            if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                threading.Thread(target=program.stdout.read, daemon=True).start()
                yield address[0]
                break
        else:
            pytest.fail("".join(printed))
        program.send_signal(signal.SIGINT)
        assert program.wait(60) == 130
    finally:
        program.kill()
        program.wait()
        program.stdout.close()


@pytest.fixture(scope="module")
def samples(run_dir, tmp_path_factory) -> list[dict]:
    """What generate.py writes with the page's settings."""
    path = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    generate.main(["--model_dir", str(run_dir), *SETTINGS, "--prompt", "A young", "--output", str(path)])
    return read_jsonl(path)


@pytest.fixture(scope="module")
def twins(samples) -> list[str]:
    """Training texts: the first sample itself, and the second one with another last word."""
    return [samples[0]["text"], samples[1]["text"] + " indeed"]


@pytest.fixture(scope="module")
def page(run_dir, twins, tmp_path_factory):
    """The address of a page whose model was trained on `twins`."""
    path = tmp_path_factory.mktemp("data") / "twins.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in twins))
    data = ["--dataset", str(path), "--text_column", "text", "--validation_fraction", "0"]
    with serving("--model_dir", str(run_dir), "--prompt", "A young", *SETTINGS, "--batch_size", "2", *data) as address:
        yield address


@pytest.fixture(scope="module")
def page_of_fields(run_dir, tmp_path_factory):
    """The address of a page of a model with fields, whose training texts are unknown."""
    folder = tmp_path_factory.mktemp("fields") / "run"
    shutil.copytree(run_dir, folder)
    tokenizer = load_tokenizer(str(run_dir))
    attach_template(tokenizer, Template("{kind} | {title}: {plot}"))
    tokenizer.save_pretrained(folder)
    with serving("--model_dir", str(folder), "--fields", "kind=Film") as address:
        yield address


def call(page: str, name: str, *values) -> list[tuple[str, list]]:
    """The events of a call, each with its data, as anybody who speaks HTTP gets them."""
    address = f"{page}/gradio_api/call/{name}"
    request = urllib.request.Request(
        address, json.dumps({"data": values}).encode(), {"Content-Type": "application/json"}
    )
    with NO_PROXY.open(request, timeout=60) as response:
        event_id = json.load(response)["event_id"]
    with NO_PROXY.open(f"{address}/{event_id}", timeout=120) as response:
        lines = response.read().decode()
    found = re.findall(r"event: (\w+)\ndata: (.*)", lines)
    return [(event, json.loads(data)) for event, data in found if event != "heartbeat"]


def read_download(page: str) -> list[dict]:
    data = re.search(r"base64,([^\"]*)", page)[1]
    return [json.loads(line) for line in base64.b64decode(data).decode().splitlines()]


def test_texts_appear_while_they_are_written_and_are_those_of_generate_py(page, samples, twins):
    events = call(page, "write", "A young", 0.8, 0.95, 3, "7")
    assert events[-1][0] == "complete"
    shown = [data[0] for _, data in events if data]
    assert any("nf-growing" in each for each in shown), "unfinished texts were shown"
    assert read_download(shown[-1]) == samples
    assert "1 copy and 1 near duplicate of the 2 training texts" in shown[-1]
    words = html.unescape(shown[-1])
    for twin in twins:
        assert printable(twin) in words


def test_errors_are_sentences_by_http_too(page):
    for values, fact in (
        (("A", 0, 0.95, 1, ""), "temperature=0"),
        (("word " * 300, 0.8, 0.95, 1, ""), "leave no room"),
        (("A", 0.8, 0.95, 1000, ""), "1 to 100"),
    ):
        event, data = call(page, "write", *values)[-1]
        assert event == "complete"
        assert re.search(rf'role="alert">[^<]*{fact}', data[0])


def test_a_port_in_use(page, run_dir):
    port = page.rpartition(":")[2]
    words = [PYTHON, "generate.py", "--web", "--web_port", port, "--model_dir", str(run_dir)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"error: --web_port {port}: " in done.stderr
    assert "Traceback" not in done.stderr


def test_fields_of_a_model_whose_training_texts_are_unknown(page_of_fields):
    with NO_PROXY.open(f"{page_of_fields}/config", timeout=60) as response:
        config = json.dumps(json.load(response))
    assert "not marked" in config
    assert [name for name in ("kind", "title", "plot") if f'"label": "{name}"' in config] == ["kind", "title"]
    done = call(page_of_fields, "write", "Film", "The Last Ferry", 0.8, 0.95, 2, "7")[-1][1][0]
    assert [row["fields"] for row in read_download(done)] == [{"kind": "Film", "title": "The Last Ferry"}] * 2
    refused = call(page_of_fields, "write", "Film", "", 0.8, 0.95, 2, "7")[-1][1][0]
    assert re.search(r'role="alert">fields: give title too', refused)


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("needs Playwright: requirements-dev.txt")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = own if Path(own).exists() else next(filter(None, map(shutil.which, BROWSERS)), None)
        if path is None:
            pytest.skip("no browser: `playwright install chromium`, or the system's package chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """visit(address, PHONE): a page in the browser. At the end, no request went elsewhere and nothing failed."""
    tabs, asked, wrong = [], [], []

    def open_page(address: str, size: dict):
        tab = browser.new_page(viewport=size)
        tabs.append(tab)
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("response", lambda response: response.status >= 400 and wrong.append(response.url))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(address)
        tab.get_by_role("button", name="Write").wait_for()
        return tab

    yield open_page
    for tab in tabs:
        tab.close()
    assert not wrong
    assert asked
    assert not [url for url in asked if not re.match(r"(http://127\.0\.0\.1:\d+/|data:|blob:http://127\.)", url)]


def press(tab, name: str) -> None:
    tab.get_by_role("button", name=name).click()


def what_sticks_out(tab) -> list[str]:
    """Elements that end to the right of the window: a phone would have to be scrolled for them, or cut them off."""
    return tab.evaluate(
        """[...document.querySelectorAll("body *")]
        .filter(each => each.checkVisibility() && each.getBoundingClientRect().right > window.innerWidth + 1)
        .map(each => each.outerHTML.slice(0, 200))"""
    )


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_a_newcomer_writes_and_downloads(page, samples, twins, visit, size):
    tab = visit(page, size)
    assert tab.get_by_label("Beginning").input_value() == "A young"
    assert tab.get_by_label("Seed").input_value() == "7"
    assert not what_sticks_out(tab)
    tab.evaluate(NOTE_GROWING)
    press(tab, "Write")
    tab.get_by_text("Download as JSONL").wait_for()
    assert tab.evaluate("window.hasGrown")
    cards = tab.locator(".nf-card")
    assert cards.count() == 3
    for number, (mark, twin) in enumerate(zip(("Copy", "Near duplicate"), twins, strict=True)):
        shown = "".join(cards.nth(number).inner_text().split())
        assert "".join(f"{mark} of a training text {printable(twin)}".split()) in shown
    assert "training text" not in cards.nth(2).inner_text()
    assert not what_sticks_out(tab)
    with tab.expect_download() as download:
        tab.get_by_text("Download as JSONL").click()
    assert download.value.suggested_filename == "samples-7.jsonl"
    assert read_jsonl(Path(download.value.path())) == samples


def test_errors_appear_on_the_page(page, visit):
    tab = visit(page, PHONE)
    tab.get_by_label("Temperature").fill("0")
    press(tab, "Write")
    alert = tab.get_by_role("alert")
    alert.get_by_text("temperature=0: must be above 0").wait_for()
    tab.get_by_label("Temperature").fill("0.8")
    tab.get_by_label("Beginning").fill("word " * 300)
    press(tab, "Write")
    alert.get_by_text("leave no room").wait_for()
    assert not what_sticks_out(tab)


def test_stop_and_a_new_request_end_the_one_before(page, visit):
    one, other = visit(page, DESK), visit(page, PHONE)
    for tab in (one, other):
        tab.get_by_label("Texts").fill("100")
    press(one, "Write")
    one.locator(".nf-growing").first.wait_for()
    press(one, "Stop")
    one.get_by_text(re.compile(r"Stopped after \d+ of 100 texts")).wait_for()
    assert one.locator(".nf-growing").count() == 0
    # On the same page, and on another one.
    press(one, "Write")
    one.locator(".nf-growing").first.wait_for()
    one.get_by_label("Beginning").fill("Two brothers")
    press(one, "Write")
    one.locator(".nf-growing").get_by_text("Two brothers").first.wait_for()
    press(other, "Write")
    other.locator(".nf-growing").first.wait_for()
    one.get_by_text("Stopped after").wait_for()
    assert "Two brothers" in one.locator(".nf-card").first.inner_text()
    other.get_by_label("Texts").fill("1")
    press(other, "Write")
    other.get_by_text("1 text, seed 7").wait_for()


def test_a_closed_page_lets_the_next_one_write(page, visit):
    tab = visit(page, DESK)
    tab.get_by_label("Texts").fill("100")
    press(tab, "Write")
    tab.locator(".nf-growing").first.wait_for()
    tab.close()
    events = call(page, "write", "A young", 0.8, 0.95, 1, "7")
    assert "1 text, seed 7" in events[-1][1][0]


def test_ctrl_c_does_not_wait_for_texts(run_dir):
    with serving("--model_dir", str(run_dir), *SETTINGS, "--batch_size", "1") as address:
        data = {"data": ["A young", 0.8, 0.95, 100, "7"]}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}/gradio_api/call/write", json.dumps(data).encode(), headers)
        with NO_PROXY.open(request, timeout=60) as response:
            assert json.load(response)["event_id"]
        time.sleep(1)  # it writes by then, as a text takes a second


def test_boxes_for_fields(page_of_fields, visit):
    tab = visit(page_of_fields, PHONE)
    assert tab.get_by_text("not marked").is_visible()
    assert tab.get_by_label("kind").input_value() == "Film"
    tab.get_by_label("title").fill("The Last Ferry")
    tab.get_by_label("Temperature").press("Enter")
    tab.get_by_text("Download as JSONL").wait_for()
    assert tab.locator(".nf-card").first.get_by_text("kind: Film · title: The Last Ferry").is_visible()
    assert not what_sticks_out(tab)
