"""The texts as HTML."""

import base64
import re
from html.parser import HTMLParser

from neoflix.sampling.sampler import Sample
from neoflix.web.cards import draw
from neoflix.web.twins import Twin, Twins
from neoflix.web.writer import Progress

UGLY = '<script>alert(1)</script> ${1 + 1} {{value}} & "quotes" \x1b[2J'


def sample(text: str, reason: str | None = "eos", **more) -> Sample:
    return Sample(text, "", 7, 5, reason, **more)


def words_of(page: str) -> str:
    """The page's words, as a browser shows them."""
    found = []
    parser = HTMLParser()
    parser.handle_data = found.append
    parser.feed(page)
    return "".join(found)


def test_a_text_is_words_and_neither_markup_nor_a_template():
    page = draw(Progress(7, [sample(UGLY, fields={UGLY: UGLY})], {0: Twin(True, UGLY)}, "done"), Twins([UGLY]))
    assert "<script" not in page
    assert not re.search(r"\$\{|\{\{|\x1b", page)
    assert words_of(page).count(UGLY.replace("\x1b", " ")) == 4


def test_copies_are_beside_their_training_text_and_counted():
    texts = [sample("one"), sample("two"), sample("three")]
    found = {0: Twin(True, "ONE"), 1: Twin(False, "TWO"), 2: None}
    page = words_of(draw(Progress(7, texts, found, "done"), Twins(["ONE", "TWO"])))
    assert re.search(r"one.*Copy.*ONE.*two.*Near duplicate.*TWO.*three", page)
    assert "1 copy and 1 near duplicate of the 2 training texts" in page
    found = {0: None, 1: None, 2: None}
    assert "No copy or near duplicate of" in draw(Progress(7, texts, found, "done"), Twins(["ONE"]))
    assert "duplicate" not in draw(Progress(7, texts, found, "done"), Twins([], "no data"))


def test_only_texts_that_grow_have_a_cursor():
    texts = [sample("done"), sample("half a let\ufffd", None), sample("cut off", "length"), Sample("", "", 7, 0, None)]
    writing = draw(Progress(7, texts), Twins([]))
    assert writing.count("nf-growing") == 1
    assert writing.count("nf-card") == 3, "the last one has not begun"
    assert "\ufffd" not in writing
    assert "1 of 4" not in writing
    assert "2 of 4 finished" in writing
    stopped = draw(Progress(7, texts, state="stopped"), Twins([]))
    assert "nf-growing" not in stopped
    assert "Stopped after 2 of 4 texts" in stopped


def test_the_download_holds_the_finished_texts():
    texts = [sample("Ünï 🙂"), sample("half", None)]
    assert "download" not in draw(Progress(7, texts), Twins([]))
    data = re.search(r'base64,([^"]*)" download="samples-7.jsonl"', draw(Progress(7, texts, {}, "stopped"), Twins([])))
    assert base64.b64decode(data[1]).decode() == Progress(7, texts).jsonl
    assert "half" not in Progress(7, texts).jsonl
