"""The model card, README.md, that is published with a model."""

import json
import re
import shlex
from html import escape
from pathlib import Path

from neoflix.data.template import Template
from neoflix.reporting.history import Record
from neoflix.reporting.pages import (
    _figures,
    _render,
    _what_was_run,
)
from neoflix.runtime.console import printable

CARD_FILE = "README.md"


CARD_MARK = "<!-- Written by neoflix, and written anew by its next run; without this line it is left alone. -->"


def model_card(record: Record) -> str:
    """The run's README.md in the hub's format: what it is, how good, and how to sample from it."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    run, best = record.run, record.best
    dataset = Path(run.get("texts", {}).get("dataset", "unknown")).name
    metrics = {"loss": "eval_loss", "perplexity": "eval_perplexity", "bits_per_character": "eval_bits_per_char"}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["neoflix", "text-generation"],
        base_model=_hub_name(run.get("model", "")),
        model_name=record.name,
        eval_results=[
            EvalResult("text-generation", "text", dataset, metric, round(best[key], 4), dataset_split="held out")
            for metric, key in metrics.items()
        ]
        if best
        else None,
    )
    last = [row["text"] for row in record.samples if best and row["step"] == best["step"]]
    pattern, learns_prompt = (run.get("texts", {}).get(key) for key in ("template", "loss_on_prompt"))
    template = Template(pattern, learns_prompt) if pattern else None
    fields = dict.fromkeys(template.fields, "...") if template else {}
    words = _render(
        "README.md.jinja",
        mark=CARD_MARK,
        title=_markdown(record.name),
        folder=shlex.quote(record.name),
        template=template,
        pattern=pattern and _markdown(pattern),
        example_fields=" ".join(f"{shlex.quote(name)}=..." for name in fields),
        beginning=json.dumps(template.prompt(fields) if template else "A young")[1:-1],
        is_adapted=bool(run.get("lora")),
        base=_markdown(_without_folders(run.get("model", ""))),
        sentence=record.verdict()[1],
        remarks=record.remarks(),
        what={name: _markdown(value) for name, value in _what_is_published(record).items()},
        figures=_figures(record),
        samples=[_markdown(text) for text in last],
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{words}"))


def _hub_name(model: str) -> str | None:
    """A model's name on the hub; None for a folder."""
    return model if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model) and not Path(model).exists() else None


def _what_is_published(record: Record) -> dict[str, str]:
    """What was run, without the folders of this machine."""
    what = _what_was_run(record)
    for name in what.keys() & {"model", "texts"}:
        what[name] = _without_folders(what[name])
    if "command" in what:
        what["command"] = shlex.join(map(_without_folders, shlex.split(what["command"])))
    return what


def _without_folders(word: str) -> str:
    """A word of a command in which each path is its last name alone; names of the hub and URLs stay."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if re.match(r"hf:[/~.]", value):
        return f"{flag}{equals}hf:{Path(value).name}"
    if _hub_name(value) or value.startswith("hf:"):
        return word
    if value.startswith(("/", "~", "./", "../")) or re.fullmatch(r"[\w.@+ -]+(/[\w.@+ -]+)+/?", value):
        return flag + equals + (Path(value).name or value)
    return flag + equals + re.sub(r"(?<![\w:/.~}-])(?:~|\.{1,2})?/(?:[^\s/:'\"=,]+/)*", "", value)  # within JSON


def _markdown(text: str) -> str:
    """A text as it is, in one line, whatever it holds that Markdown or HTML would read."""
    return re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", escape(" ".join(printable(text).split()), quote=False))
