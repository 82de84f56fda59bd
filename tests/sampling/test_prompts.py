"""The prompts that a command line names: in words, from a file, or as fields of the model's template."""

import pytest

from neoflix.arguments.generate import parse_generate_args
from neoflix.data.template import Template, attach_template
from neoflix.data.tokenizer import load_tokenizer
from neoflix.sampling.prompts import read_prompts


@pytest.fixture
def read(model_dir, tmp_path):
    """read(*words, template=None) -> the prompts for a model with that template."""

    def read(*words, template=None):
        tokenizer = load_tokenizer(str(model_dir))
        attach_template(tokenizer, template)
        tokenizer.save_pretrained(tmp_path / "model")
        return read_prompts(parse_generate_args(list(map(str, words))), tmp_path / "model")

    return read


def test_words_are_the_prompt(read):
    assert read("--prompt", "A young ") == ["A young "]
    assert read() == [""]


def test_lines_of_a_file(read, tmp_path):
    (tmp_path / "prompts.txt").write_text("A young\n\n  \nTwo brothers\n")
    assert read("--prompt", tmp_path / "prompts.txt") == ["A young", "Two brothers"]
    for content in (b"\n \n", b"\xff\xfe"):
        (tmp_path / "prompts.txt").write_bytes(content)
        with pytest.raises(ValueError, match=r"--prompt .*prompts\.txt"):
            read("--prompt", tmp_path / "prompts.txt")


def test_a_template_has_fields_unless_there_are_words(read, tmp_path):
    template = Template("{title}: {description}")
    assert read(template=template) == [{}]
    assert read("--fields", "title=The Last Ferry", template=template) == [{"title": "The Last Ferry"}]
    assert read("--prompt", "A young", template=template) == ["A young"]
    (tmp_path / "fields.csv").write_text("title,year\nOne,1\nTwo,2\n")
    assert read("--fields_file", tmp_path / "fields.csv", template=template) == [{"title": "One"}, {"title": "Two"}]
    with pytest.raises(ValueError, match="--template"):
        read("--fields", "title=The Last Ferry")
