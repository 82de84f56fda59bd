"""The report of a run: whole, self-contained, honest, and drawn by a real browser where there is one."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ROOT
from huggingface_hub import ModelCard

import train
from neoflix.checkpoints.names import LIVE_SAMPLES_FILE
from neoflix.judging.figures import judge
from neoflix.judging.novelty import TrainingTexts
from neoflix.report import main
from neoflix.reporting.history import Record
from neoflix.reporting.pages import REPORT_FILE
from neoflix.reporting.run_log import log_start
from neoflix.reporting.write import finish_run, write_report
from neoflix.runtime.files import read_json

EVIL = "</style><script>alert(1)</script> & <b>|`*x*`"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "br", "img", "hr", "input"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, titles, model_dir) -> Path:
    """A finished run of two epochs; its folder is only read."""
    folder = tmp_path_factory.mktemp("report")
    rows = [{"description": text} for text in titles[:60]]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train.main(
        [
            *("--model_name_or_path", str(model_dir), "--dataset", str(folder / "texts.jsonl")),
            *("--output_dir", str(folder / "run"), "--cache_dir", str(folder / "cache"), "--use_cpu", "true"),
            *("--per_device_train_batch_size", "8", "--learning_rate", "1e-3", "--logging_steps", "1"),
            *("--report_to", "none", "--disable_tqdm", "true", "--num_train_epochs", "2", "--eval_strategy", "steps"),
            *("--eval_steps", "2", "--deepspeed", str(ROOT / "ds_configs" / "cpu.json")),
        ]
    )
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


class Page(HTMLParser):
    """A page's tags, balanced, its ids, what it would load, and its words."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.tags, self.ids, self.loads, self.words = [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_a_run_ends_with_its_report_and_card(finished):
    page = Page(finished / REPORT_FILE)
    figures = json.loads((finished / "all_results.json").read_text())
    assert {"verdict", "curves", "samples", "figures", "run", "files"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids)), "a name is there twice"
    assert all(target == "data:," or target.startswith("#") for target in page.loads), "it would load something"
    assert "script" not in page.tags
    assert 'name="viewport" content="width=device-width' in (finished / REPORT_FILE).read_text(), "tiny on a phone"
    source = (finished / REPORT_FILE).read_text()
    assert not re.search(r"url\((?!#)|@import|https?:", source)
    assert page.tags.count("svg") == 6
    for said in ("It worked", f"{figures['perplexity']:,.2f}", f"{figures['untouched_perplexity']:,.2f}", "torch 2"):
        assert said in page.text
    for said in ("Loss", "Perplexity", "Learning rate", "Gradient norm", "Speed", "Memory", "model.safetensors"):
        assert said in page.text
    assert "host, planned" in page.text
    assert "step 14" in page.text, "no samples of the last evaluation"

    card = ModelCard.load(finished / "README.md")
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert metrics["perplexity"] == pytest.approx(figures["perplexity"], abs=1e-4)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.base_model is None, "a folder here is no model of the hub"
    assert f"generate.py --model_dir {finished.name}" in card.text
    assert str(finished.parent) not in card.content, "the card is published: no path of this machine"


def test_whatever_a_run_holds_is_text(run):
    samples = run / LIVE_SAMPLES_FILE
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    samples.write_text("".join(json.dumps(row | {"text": EVIL + "\x1b[2J"}) + "\n" for row in rows))
    described = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(described | {"model": EVIL}))
    (run / f"{EVIL.replace('/', '')}.txt").write_text("")
    write_report(str(run))
    page = Page(run / REPORT_FILE)
    assert not {"script", "b"} & set(page.tags)
    assert page.text.count(EVIL) == 5 * 4 + 1, "five evaluations of four texts, and the model"
    card = (run / "README.md").read_text()
    assert "<script" not in card
    assert "\x1b" not in card + (run / REPORT_FILE).read_text()
    assert r"\|\`\*x\*\`" in card


def test_an_unfinished_run_shows_how_far_it_is(run, capsys):
    for name in ("all_results.json", "trainer_state.json", "README.md", REPORT_FILE):
        (run / name).unlink()
    main([str(run)])
    page = Page(run / REPORT_FILE)
    assert "The run has not come to its end: step 14 of 14" in page.text
    assert page.tags.count("svg") == 6
    assert str(run / REPORT_FILE) in capsys.readouterr().out
    shutil.rmtree(run / "checkpoint-14")
    shutil.rmtree(run / "checkpoint-7", ignore_errors=True)
    with pytest.raises(ValueError, match="no complete checkpoint yet"):
        main([str(run)])
    with pytest.raises(ValueError, match=r"there is no run\.json"):
        main([str(run.parent)])


def test_what_is_not_ours_is_left_alone(run, capsys):
    (run / "README.md").write_text("mine")
    (run / REPORT_FILE).unlink()
    assert write_report(str(run)) == run / REPORT_FILE
    assert (run / "README.md").read_text() == "mine"
    assert "is left alone" in capsys.readouterr().out
    other = run / "other.html"
    other.write_text("mine")
    with pytest.raises(ValueError, match="is left alone"):
        main([str(run), "--output", str(other)])


def test_a_run_does_not_fail_for_its_report(run, capsys):
    (run / REPORT_FILE).unlink()
    (run / REPORT_FILE).mkdir()
    (run / "trainer_state.json").write_text('{"log_history": [{"eval_loss": "?", "step": 0}]}')
    finish_run(str(run), json.loads((run / "all_results.json").read_text()))
    said = capsys.readouterr().out.splitlines()
    assert all(line.startswith("warning: no report") for line in said[:-1])
    assert said[-1].startswith(f"Best model in {run}, perplexity ")


def test_several_runs_in_one_page(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    described = json.loads((other / "run.json").read_text())
    described["arguments"]["learning_rate"] = 0.25
    (other / "run.json").write_text(json.dumps(described))
    main([str(run), str(other), "--output", str(tmp_path / "both.html")])
    page = Page(tmp_path / "both.html")
    assert page.tags.count("svg") == 4
    differences = page.text.partition("What differs between them")[2].partition("Their figures")[0]
    assert differences.split() == ["run", "other", "learning_rate", "0.001", "0.25"]
    with pytest.raises(ValueError, match="at most 6"):
        main([str(run)] * 7)


def test_judged_samples_are_in_it(run, titles):
    judgement = asdict(judge(titles[:3], TrainingTexts(titles[:60]), no_perplexity="not asked for"))
    (run / "s.judged.json").write_text(json.dumps({"base_model": None, **judgement}))
    (run / "broken.judged.json").write_text('{"copies": 1}')
    (run / "sweep").mkdir()
    rows = [{"settings": {"temperature": 0.7}, **judgement}]
    (run / "sweep" / "sweep.json").write_text(json.dumps({"base_model": None, "rows": rows}))
    write_report(str(run))
    page = Page(run / REPORT_FILE)
    assert "judged" in page.ids
    for said in (
        "s.judged.json",
        "copies of training texts 100.0%",
        "sweep/sweep.json",
        "temperature=0.7 100.0%",
    ):
        assert said in page.text
    assert "broken.judged.json a" not in page.text


# ---- the verdict -------------------------------------------------------------------------------------------


def record(training: list[float], held_out: list[float], finished=True, max_steps=None, **facts) -> Record:
    """A run that evaluates before training and after each ten steps, and logs in their middle."""
    log = [
        {"step": 10 * n, "epoch": n, "eval_loss": x, "eval_perplexity": 2**x, "eval_bits_per_char": x}
        for n, x in enumerate(held_out)
    ]
    log += [{"step": 10 * n + 5, "loss": x, "skipped_steps": facts.get("skipped", 0)} for n, x in enumerate(training)]
    step = 10 * max(len(held_out) - 1, 0)
    state = {"log_history": log, "global_step": step, "max_steps": max_steps or step}
    best = min(log[1 : len(held_out)], key=lambda line: line["eval_loss"], default={"step": 0})["step"]
    run = {"num_training_texts": facts.get("texts", 5000)}
    starts = [{"num_validation_texts": facts.get("held", 500)}]
    return Record(Path("run"), run, starts, state, {"saved_step": best} if finished else {}, [])


VERDICTS = {
    "learnt": (record([6, 5], [8, 6, 5.995]), "yes", []),
    "still learning": (record([6, 5], [8, 6, 5]), "yes", ["still getting better"]),
    "overfits": (record([6, 5, 4, 3], [8, 5, 4, 4.5, 5]), "yes", ["overfits after step 20"]),
    "rises with the training loss": (record([6, 5, 7, 8], [8, 5, 4, 4.5, 5]), "yes", []),
    "no better": (record([6, 5], [4, 4.5, 4.2]), "no", ["--learning_rate"]),
    "unfinished": (record([6], [8, 5], finished=False, max_steps=90), "yes", ["not come to its end: step 10 of 90"]),
    "early": (record([6, 5], [8, 5, 5], max_steps=90), "yes", ["--early_stopping_patience"]),
    "few": (record([6, 5], [8, 6, 6], texts=200), "yes", ["Only 200 texts"]),
    "few held out": (record([6, 5], [8, 6, 6], held=20), "yes", ["Only 20 texts were held out"]),
    "skipped": (record([6, 5], [8, 6, 6], skipped=4), "yes", ["4 of 20 steps were skipped"]),
    "not measured": (record([6], []), "unknown", []),
    "untouched alone": (record([6], [5]), "unknown", []),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdict(case):
    run, verdict, remarks = VERDICTS[case]
    assert run.verdict()[0] == verdict
    said = run.remarks()
    assert len(said) == len(remarks), said
    for remark, sentence in zip(remarks, said, strict=True):
        assert remark in sentence


def test_no_token_of_a_hub_is_written_down(tmp_path):
    command = "train.py --local_rank=0 --hub_token hf_secret --push_to_hub_token=hf_secret --seed 7"
    log_start(str(tmp_path), {"command": command, "from_step": 0})
    (start,) = read_json(tmp_path / "starts.json", [])
    assert start["command"] == "train.py --hub_token ... --push_to_hub_token=... --seed 7"


# ---- a real browser ----------------------------------------------------------------------------------------

# A page as wide as a phone, in a page that measures it.
PHONE = """<iframe src="report.html" width="390" height="800" style="border: 0"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, body = frame.contentWindow.getComputedStyle(page.body);
  const drawn = [...page.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().height > 100);
  const ink = frame.contentWindow.getComputedStyle(page.querySelector("svg text")).fill;
  document.body.textContent = JSON.stringify({width: page.documentElement.scrollWidth, drawn: drawn.length,
    paper: body.backgroundColor, ink: ink});
};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_it(run, tmp_path, scheme):
    (run / "phone.html").write_text(PHONE)
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    words += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--v=0",
        "--virtual-time-budget=5000",
    ]
    words += ["--force-dark-mode"] * (scheme == "dark")
    done = subprocess.run(
        [BROWSER, *words, "--dump-dom", (run / "phone.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    assert ":CONSOLE" not in done.stderr
    seen = json.loads(re.search(r"<body>(\{.*?\})", done.stdout)[1])
    assert seen["width"] <= 390, "a phone has to scroll sideways"
    assert seen["drawn"] == 6
    paper, ink = (
        ("rgb(255, 255, 255)", "rgb(31, 35, 40)") if scheme == "light" else ("rgb(13, 17, 23)", "rgb(230, 237, 243)")
    )
    assert (seen["paper"], seen["ink"]) == (paper, ink)
