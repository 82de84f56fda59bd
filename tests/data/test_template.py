import json
import random

import pytest

from neoflix.data.template import KEY, Example, Template, attach_template, find_template
from neoflix.data.tokenizer import load_tokenizer
from neoflix.runtime.errors import UserError

PATTERN = "{type} | {listed_in} | {title}: {description}"
ROW = {"type": "Movie", "listed_in": "Crime | Drama", "title": "Alien: Again", "description": "It is: back | again."}


def test_prompt_and_completion():
    template = Template(PATTERN)
    assert (template.fields, template.text_field) == (["type", "listed_in", "title"], "description")
    example = template.fill(ROW)
    assert example == Example(
        prompt=r"Movie | Crime \| Drama | Alien\: Again:",
        completion=" It is: back | again.",
        fields={"type": "Movie", "listed_in": "Crime | Drama", "title": "Alien: Again"},
    )
    assert example.whole == r"Movie | Crime \| Drama | Alien\: Again: It is: back | again."
    assert template.prompt({}) == " |  | :"
    assert template.prompt(ROW, until="title") == r"Movie | Crime \| Drama |"
    assert Example("", "A text without a prompt.").whole == "A text without a prompt."


@pytest.mark.parametrize("pattern", [PATTERN, "{a}||{b}->{c}", "{a} by {b}\n{c}", "Title: {a}\nMood: {b}\nPlot: {c}"])
def test_a_written_field_is_cut_where_it_ends(pattern):
    template, rng = Template(pattern), random.Random(0)
    for _ in range(2000):
        values = ["".join(rng.choices("|-> \\by:\nxMood", k=rng.randint(0, 7))) for _ in template.fields]
        row = dict(zip(template.fields, values, strict=True)) | {template.text_field: "T"}
        example = template.fill(row)
        assert list(example.fields.values()) == [" ".join(value.split()) for value in values]
        for name, value in example.fields.items():
            written = example.whole[len(template.prompt(row, until=name)) :]
            assert template.cut(name, written) == value, repr(example.whole)


BAD_PATTERNS = {
    "{description}": "two columns",
    "no column": "two columns",
    "{}: {description}": "two columns",
    "{a} {b}": "separator",
    "{a}{b}": "separator",
    "{a}: {b}.": r"'\.' follows",
    "{a:>3}: {b}": "nothing else",
    "{a!r}: {b}": "nothing else",
    "{a}: {a}": "twice",
    "{a: {b}": "--template",
    "{a}: {b}}": "literal brace",
}


@pytest.mark.parametrize("pattern", BAD_PATTERNS)
def test_bad_patterns_are_refused(pattern):
    with pytest.raises(UserError, match=BAD_PATTERNS[pattern]) as error:
        Template(pattern)
    assert "\n" not in str(error.value)


def test_unknown_fields_are_refused():
    template = Template(PATTERN)
    template.check(["title", "type"], "--fields")
    for name in ("tilte", "description"):
        with pytest.raises(UserError, match=rf"--fields: .*{name}.*type, listed_in, title"):
            template.check([name], "--fields")


@pytest.mark.parametrize("learns_prompt", [False, True])
def test_tokenizer_carries_the_template(model_dir, tmp_path, learns_prompt):
    tokenizer = load_tokenizer(str(model_dir))
    assert find_template(tokenizer) is None
    attach_template(tokenizer, Template(PATTERN, learns_prompt))
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved[KEY] == {"pattern": PATTERN, "learns_prompt": learns_prompt}, "nothing of the training texts"
    again = load_tokenizer(str(tmp_path))
    assert find_template(again) == Template(PATTERN, learns_prompt)
    attach_template(again, None)
    assert find_template(again) is None


def test_a_template_saved_with_training_rows_still_loads(model_dir):
    tokenizer = load_tokenizer(str(model_dir))
    tokenizer.init_kwargs[KEY] = {"pattern": PATTERN, "learns_prompt": False, "rows": [["Movie", "Crime", "A"]]}
    assert find_template(tokenizer) == Template(PATTERN)
