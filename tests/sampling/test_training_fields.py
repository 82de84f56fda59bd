"""Fields that a prompt leaves out come from the training texts of the model's run."""

import csv
import json

import pytest

from neoflix.data.sources import read_examples
from neoflix.data.split import split_texts
from neoflix.data.template import Template
from neoflix.runtime.errors import UserError
from neoflix.sampling.training_fields import read_field_pool

TEMPLATE = Template("{type}: {title} | {description}")


@pytest.fixture
def model_dir_of_run(tmp_path, titles):
    """A run's folder with its record alone, and its data set beside it."""
    with (tmp_path / "texts.csv").open("w", encoding="utf-8", newline="") as file:
        rows = [("Movie" if i % 2 else "Series", f"Title {i}", text) for i, text in enumerate(titles[:40])]
        csv.writer(file).writerows([("type", "title", "description"), *rows])
    folder = tmp_path / "run"
    (folder / "checkpoint-3").mkdir(parents=True)
    texts = {"dataset": str(tmp_path / "texts.csv"), "validation_fraction": 0.25}
    (folder / "run.json").write_text(json.dumps({"texts": texts}))
    return folder


def test_fields_are_those_of_training_texts(model_dir_of_run, tmp_path):
    split = split_texts(read_examples(tmp_path / "texts.csv", template=TEMPLATE), 0.25)
    for folder in (model_dir_of_run, model_dir_of_run / "checkpoint-3"):
        rows = read_field_pool(folder, TEMPLATE, ["title"]).rows
        assert {row["title"] for row in rows} == {example.fields["title"] for example in split.train}
        assert not {row["title"] for row in rows} & {example.fields["title"] for example in split.validation}


def test_without_the_data_set_the_fields_are_asked_for(model_dir_of_run, tmp_path):
    (tmp_path / "texts.csv").write_text("type,plot\nMovie,A text.\n")
    cases = [(model_dir_of_run, "texts.csv"), (tmp_path, "run.json"), (None, "run.json")]
    for folder, named in cases:
        with pytest.raises(UserError, match=rf"--fields: .*title.*{named}"):
            read_field_pool(folder, TEMPLATE, ["title"])
    (tmp_path / "texts.csv").unlink()
    with pytest.raises(UserError, match=r"--fields: .*title.*texts\.csv"):
        read_field_pool(model_dir_of_run, TEMPLATE, ["title"])
