"""The model card, README.md, that is published with a model."""

import json
import re
import shlex
from pathlib import Path

from neoflix.data.template import Template
from neoflix.model.packaged import SMOLLM2, hub_name
from neoflix.reporting.facts import describe_setup, list_figures
from neoflix.reporting.history import Record
from neoflix.reporting.render import escape_markdown, render
from neoflix.reporting.verdict import judge_run, list_remarks

CARD_FILE = "README.md"

CARD_MARK = "<!-- Written by neoflix"  # how it recognizes its own file


LICENSES = {SMOLLM2: "apache-2.0"} | {f"EleutherAI/gpt-neo-{size}": "mit" for size in ("125m", "125M", "1.3B", "2.7B")}


def model_card(record: Record, repository: str | None = None) -> str:
    """The run's README.md in the hub's format: figures, samples, and how to sample from the model.

    Args:
        repository: the card is for this repository of the hub, OWNER/NAME; None: for the run's folder.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    run, best = record.run, record.best
    dataset = Path(run.get("texts", {}).get("dataset", "unknown")).name
    metrics = {"loss": "eval_loss", "perplexity": "eval_perplexity", "bits_per_character": "eval_bits_per_char"}
    is_adapted, base = bool(run.get("lora")), hub_name(run.get("model", ""))
    name = repository.partition("/")[2] if repository else record.name
    data = ModelCardData(
        library_name="peft" if is_adapted else "transformers",
        pipeline_tag="text-generation",
        tags=["neoflix", "text-generation", *(["lora"] if is_adapted else [])],
        base_model=base,
        base_model_relation=base and ("adapter" if is_adapted else "finetune"),
        license=LICENSES.get(run.get("model")),
        model_name=name,
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
        mark=f"{CARD_MARK}. The next {'upload' if repository else 'run'} replaces this file; delete this line to keep "
        "it. -->",
        title=escape_markdown(name),
        folder=shlex.quote(name),
        repository=repository,
        pattern=pattern and escape_markdown(pattern),
        trained_on="all fields" if learns_prompt else template and f"only {escape_markdown(template.text_field)}",
        example_fields=" ".join(f"{shlex.quote(name)}=..." for name in fields),
        beginning=json.dumps(template.prompt(fields) if template else "A young")[1:-1],
        is_adapted=is_adapted,
        is_packaged=run.get("model") == SMOLLM2,
        base=escape_markdown(without_folders(run.get("model", ""))),
        base_on_hub=base,
        sentence=judge_run(record)[1],
        remarks=list_remarks(record),
        setup={name: escape_markdown(value) for name, value in _published_setup(record).items()},
        figures=list_figures(record),
        samples=[escape_markdown(text) for text in last],
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


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
