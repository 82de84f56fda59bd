"""The model card, README.md, that is published with a model."""

import json
import re
import shlex
from pathlib import Path

from neoflix.data.template import Template
from neoflix.model.packaged import HUB_NAME, SMOLLM2
from neoflix.reporting.facts import describe_setup, list_figures
from neoflix.reporting.history import Record
from neoflix.reporting.render import escape_markdown, render
from neoflix.reporting.verdict import judge_run, list_remarks

CARD_FILE = "README.md"

CARD_MARK = "<!-- Written by neoflix"  # how it recognizes its own file


def model_card(record: Record) -> str:
    """The run's README.md in the hub's format: figures, samples, and how to sample from the model."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    run, best = record.run, record.best
    dataset = Path(run.get("texts", {}).get("dataset", "unknown")).name
    metrics = {"loss": "eval_loss", "perplexity": "eval_perplexity", "bits_per_character": "eval_bits_per_char"}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["neoflix", "text-generation"],
        base_model=hub_name(run.get("model", "")),
        license="apache-2.0" if run.get("model") == SMOLLM2 else None,
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
    body = render(
        "README.md.jinja",
        mark=f"{CARD_MARK}. The next run replaces this file; delete this line to keep it. -->",
        title=escape_markdown(record.name),
        folder=shlex.quote(record.name),
        pattern=pattern and escape_markdown(pattern),
        trained_on="all fields" if learns_prompt else template and f"only {escape_markdown(template.text_field)}",
        example_fields=" ".join(f"{shlex.quote(name)}=..." for name in fields),
        beginning=json.dumps(template.prompt(fields) if template else "A young")[1:-1],
        is_adapted=bool(run.get("lora")),
        is_packaged=run.get("model") == SMOLLM2,
        base=escape_markdown(without_folders(run.get("model", ""))),
        sentence=judge_run(record)[1],
        remarks=list_remarks(record),
        setup={name: escape_markdown(value) for name, value in _published_setup(record).items()},
        figures=list_figures(record),
        samples=[escape_markdown(text) for text in last],
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def hub_name(model: str) -> str | None:
    """The model's name on the hub; None for a folder."""
    if model == SMOLLM2:
        return HUB_NAME
    return model if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model) and not Path(model).exists() else None


def _published_setup(record: Record) -> dict[str, str]:
    """The run's setup without the folders of this machine."""
    setup = describe_setup(record)
    for name in setup.keys() & {"model", "texts"}:
        setup[name] = without_folders(setup[name])
    if "command" in setup:
        setup["command"] = shlex.join(map(without_folders, shlex.split(setup["command"])))
    return setup


def without_folders(word: str) -> str:
    """A word of a command with each path cut to its last part. Hub names and URLs are kept."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if re.match(r"hf:[/~.]", value):
        return f"{flag}{equals}hf:{Path(value).name}"
    if hub_name(value) or value.startswith("hf:"):
        return word
    if value.startswith(("/", "~", "./", "../")) or re.fullmatch(r"[\w.@+ -]+(/[\w.@+ -]+)+/?", value):
        return flag + equals + (Path(value).name or value)
    return flag + equals + re.sub(r"(?<![\w:/.~}-])(?:~|\.{1,2})?/(?:[^\s/:'\"=,]+/)*", "", value)  # within JSON
