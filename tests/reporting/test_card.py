"""The model card that is published with a model: true figures, no path of this machine, and no markup from texts."""

import json
import re

import pytest
from conftest import make_record
from huggingface_hub import ModelCard

from neoflix.reporting.card import model_card, without_folders
from neoflix.reporting.history import Record


def test_a_run_ends_with_its_card(finished_run):
    figures = json.loads((finished_run / "all_results.json").read_text())
    card = ModelCard.load(finished_run / "README.md")
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert metrics["perplexity"] == pytest.approx(figures["perplexity"], abs=1e-4)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.base_model is None, "a folder here is no model of the hub"
    assert f"generate.py --model_dir {finished_run.name}" in card.text
    assert str(finished_run.parent) not in card.content, "the card is published: no path of this machine"


@pytest.mark.parametrize(
    ("word", "published"),
    [
        ("/home/me/models/base", "base"),
        ("--output_dir=/home/me/run 1/", "--output_dir=run 1"),
        ("~/texts/x.csv", "x.csv"),
        ("../x.csv", "x.csv"),
        ("some/where/else/x.csv", "x.csv"),
        ("EleutherAI/gpt-neo-2.7B", "EleutherAI/gpt-neo-2.7B"),
        ("hf:owner/name:train", "hf:owner/name:train"),
        ("hf:/home/me/name", "hf:name"),
        ('{"file": "/home/me/x.json"}', '{"file": "x.json"}'),
        ("{title}/{year}: {text}", "{title}/{year}: {text}"),
        ("--max_steps", "--max_steps"),
    ],
)
def test_a_word_without_folders(word, published):
    assert without_folders(word) == published


def test_the_card_holds_no_path_and_nothing_that_markdown_or_yaml_reads(tmp_path):
    record = Record(
        folder=tmp_path / "run: [x] `y`",
        run={
            "model": str(tmp_path / "models" / "*base*"),
            "lora": {"rank": 4, "alpha": 8},
            "texts": {"dataset": str(tmp_path / "a: b.csv"), "template": "`{title}` <b>|</b>: {text}"},
        },
        starts=[{"command": f"train.py --dataset '{tmp_path}/a: b.csv' --model_name_or_path={tmp_path}/models/base"}],
        state={"log_history": []},
        results={"perplexity": 2.0},
        samples=[],
    )
    card = model_card(record)
    assert str(tmp_path) not in card
    assert r"\*base\*" in card
    assert "<b>" not in card
    assert f"--to merged '{record.name}' OUT" in card
    assert re.search(r"the template <code>\\`\{title\}\\`", card)


@pytest.mark.parametrize(("loss_on_prompt", "trained_on"), [(False, "only plot"), (True, "all fields")])
def test_the_card_shows_the_template_and_what_the_loss_covers(loss_on_prompt, trained_on):
    record = make_record([6, 5], [8, 6, 5])
    record.run["texts"] = {"template": "{genre} | {title}: {plot}", "loss_on_prompt": loss_on_prompt}
    card = model_card(record)
    assert r"<code>{genre} \| {title}: {plot}</code>; the loss covers " + trained_on in card
    assert "--fields genre=... title=..." in card
