"""The report of a run: whole, self-contained, honest, and drawn by a real browser where there is one."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest

from neoflix.checkpoints.names import LIVE_SAMPLES_FILE
from neoflix.judging.figures import judge
from neoflix.judging.novelty import TrainingTexts
from neoflix.report import main
from neoflix.reporting.pages import REPORT_FILE
from neoflix.reporting.write import write_report

EVIL = "</style><script>alert(1)</script> & <b>|`*x*`"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "br", "img", "hr", "input"}


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy of a finished run, to be changed."""
    return shutil.copytree(finished_run, tmp_path / "run")


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


def test_a_run_ends_with_its_report(finished_run):
    page = Page(finished_run / REPORT_FILE)
    figures = json.loads((finished_run / "all_results.json").read_text())
    assert {"verdict", "curves", "samples", "figures", "run", "files"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids)), "a name is there twice"
    assert all(target == "data:," or target.startswith("#") for target in page.loads), "it would load something"
    assert "script" not in page.tags
    assert 'name="viewport" content="width=device-width' in (finished_run / REPORT_FILE).read_text(), "tiny on a phone"
    source = (finished_run / REPORT_FILE).read_text()
    assert not re.search(r"url\((?!#)|@import|https?:", source)
    assert page.tags.count("svg") == 6
    for said in ("It worked", f"{figures['perplexity']:,.2f}", f"{figures['untouched_perplexity']:,.2f}", "torch 2"):
        assert said in page.text
    for said in ("Loss", "Perplexity", "Learning rate", "Gradient norm", "Speed", "Memory", "model.safetensors"):
        assert said in page.text
    assert "host, planned" in page.text
    assert "step 14" in page.text, "no samples of the last evaluation"


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
    assert "step 14 of 14" in page.text
    assert page.tags.count("svg") == 6
    assert str(run / REPORT_FILE) in capsys.readouterr().out
    shutil.rmtree(run / "checkpoint-14")
    shutil.rmtree(run / "checkpoint-7", ignore_errors=True)
    with pytest.raises(ValueError, match="no complete checkpoint yet"):
        main([str(run)])
    with pytest.raises(ValueError, match=r"run\.json"):
        main([str(run.parent)])


def test_several_runs_in_one_page(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    described = json.loads((other / "run.json").read_text())
    described["arguments"]["learning_rate"] = 0.25
    (other / "run.json").write_text(json.dumps(described))
    main([str(run), str(other), "--output", str(tmp_path / "both.html")])
    page = Page(tmp_path / "both.html")
    assert page.tags.count("svg") == 4
    differences = page.text.partition("Different settings")[2].partition("Figures")[0]
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
