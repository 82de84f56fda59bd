"""A run's report: one HTML file that opens anywhere, and the model card beside it.

`python -m neoflix.report RUN` writes a run's report anew, finished or not; with several runs, one page that compares
them. Nothing is loaded from a network: drawings are inline SVG whose colours are the page's own, in light and in dark.
"""

from contextlib import suppress
from pathlib import Path

import jinja2

from neoflix.checkpoints.names import LOCK_FILE
from neoflix.judging.figures import Judgement, judgement_table
from neoflix.judging.sweep import sweep_header, sweep_line
from neoflix.judging.variety import Style
from neoflix.reporting.curves import GIB, Curve, draw, draw_run
from neoflix.reporting.history import Record, file_sizes
from neoflix.runtime.console import printable
from neoflix.runtime.files import read_json

PAGE_MARK = '<meta name="generator" content="neoflix">'


TEMPLATES = Path(__file__).with_name("templates")


MOST_COLUMNS = 6  # of samples side by side


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _size(num_bytes: float | None) -> str:
    """1,610,612,736 -> '1.5 GiB'"""
    if num_bytes is None:
        return ""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes:,.0f} bytes"


def _duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds > 5400
        else f"{seconds / 60:.0f} min"
        if seconds > 90
        else f"{seconds:.0f} s"
    )


def _render(page: str, **values) -> str:
    """A page, all that comes from a run escaped; Markdown has its own way (`_markdown`)."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(("html.jinja",)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(page).render(values)


def report_page(record: Record) -> str:
    """One run's report as HTML."""
    verdict, sentence = record.verdict()
    return _render(
        "report.html.jinja",
        mark=PAGE_MARK,
        title=record.name,
        verdict={"yes": "It worked", "no": "It did not work", "unknown": "Not known"}[verdict],
        kind=verdict,
        sentence=sentence,
        remarks=record.remarks(),
        what=_what_was_run(record),
        figures=_figures(record),
        drawings=draw_run(record),
        columns=_sample_columns(record),
        judged=_judged(record.folder),
        files=[(name, _size(size)) for name, size in file_sizes(record.folder) if name not in (REPORT_FILE, LOCK_FILE)],
    )


def _what_was_run(record: Record) -> dict[str, str]:
    """What was run, a line each; what the folder does not tell is left out."""
    run, start = record.run, record.start
    texts = run.get("texts", {})
    held_out = start.get("num_validation_texts")
    versions = start.get("versions", {})
    lines = {
        "command": start.get("command"),
        "model": run.get("model"),
        "parameters": start.get("num_parameters") and f"{start['num_parameters']:,}, {start.get('precision')}",
        "texts": texts.get("dataset"),
        "column": texts.get("text_column"),
        "template": texts.get("template"),
        "loss": "on the prompts too" if texts.get("loss_on_prompt") else None,
        "LoRA": ", ".join(f"{name} {value:g}" for name, value in (run.get("lora") or {}).items()),
        "texts to learn from": f"{run['num_training_texts']:,}" if "num_training_texts" in run else None,
        "texts held out": None if held_out is None else f"{held_out:,}",
        "data hash": run.get("data"),
        "texts a step": run.get("texts_per_step"),
        "processes": start.get("num_processes"),
        "DeepSpeed's file": start.get("deepspeed"),
        "hardware": start.get("hardware"),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "begun": start.get("time"),
        "resumed": f"{len(record.starts) - 1} time(s), last from step {start['from_step']:,}"
        if len(record.starts) > 1
        else None,
        "changed on the way": "; ".join(
            f"{each['setting']} {each['was']} -> {each['now']} from step {each['from_step']:,}"
            for each in run.get("changes", [])
        ),
    }
    return {name: str(value) for name, value in lines.items() if value}


def _figures(record: Record) -> dict[str, str]:
    """The run's figures, a line each; those that it does not have are left out."""
    results, best, state = record.results, record.best or {}, record.state
    runtime = next(reversed(record.curve("train_runtime")[1]), None)
    planned = (record.start.get("plan_seconds") or [None])[0]
    skipped = next(reversed(record.curve("skipped_steps")[1]), None)
    mfu = record.curve("mfu")[1]
    lines = {
        "perplexity, untouched": _number(record.untouched and record.untouched["eval_perplexity"]),
        "perplexity, best": _number(best.get("eval_perplexity")),
        "loss, best (nats a token)": _number(best.get("eval_loss"), 4),
        "bits a character, best": _number(best.get("eval_bits_per_char"), 4),
        "best step": f"{best['step']:,}, epoch {best['epoch']:.2f}" if best else "",
        "steps": "{:,} of at most {:,}".format(*record.num_steps),
        "epochs": _number(state.get("epoch")),
        "real tokens/s": _number(results.get("train_tokens_per_second"), 0),
        "MFU, mean": f"{sum(mfu) / len(mfu):.1%}" if mfu else "",
        "time since the last start": _duration(runtime) if runtime else "",
        "time, planned": _duration(planned) if planned else "",
        "device memory, peak": _size(results.get("train_peak_device_bytes") or None),
        "device memory, planned": _size(results.get("plan_device_bytes")),
        "host memory, peak": _size(results.get("train_peak_host_bytes")),
        "host memory, planned": _size(results.get("plan_host_bytes")),
        "steps skipped (fp16)": "" if skipped is None else f"{skipped:,}",
    }
    return {name: value for name, value in lines.items() if value}


def _sample_columns(record: Record) -> list[dict]:
    """Samples by evaluation, oldest first: the first one, the best one, the last one, and some between."""
    steps = sorted({row["step"] for row in record.samples})
    best = record.best["step"] if record.best else None
    if len(steps) > MOST_COLUMNS:
        shown = {steps[round(n * (len(steps) - 1) / (MOST_COLUMNS - 2))] for n in range(MOST_COLUMNS - 1)}
        steps = [step for step in steps if step in shown or step == best]
    columns = []
    for step in steps:
        rows = [row | {"text": printable(row["text"])} for row in record.samples if row["step"] == step]
        title = "untouched" if step == 0 else f"epoch {rows[0]['epoch']:.2f}"
        columns.append({"title": title, "step": step, "is_best": step == best, "rows": rows})
    return columns


def _judged(folder: Path) -> list[tuple[str, str]]:
    """(title, table) of what `generate.py --judge` and `--sweep` left in the run's folder."""
    tables = []
    for path in sorted([*folder.glob("*.judged.json"), *folder.glob("*/*.judged.json")]):
        with suppress(KeyError, TypeError, ValueError):  # another program's, or another version's
            content = read_json(path, {})
            table = judgement_table(_judgement(content), content["base_model"] or "")
            tables.append((str(path.relative_to(folder)), table))
    for path in sorted([*folder.glob("sweep.json"), *folder.glob("*/sweep.json")]):
        with suppress(KeyError, TypeError, ValueError):
            rows = {
                ",".join(f"{name}={value}" for name, value in row["settings"].items()): _judgement(row)
                for row in read_json(path, {})["rows"]
            }
            width = max(map(len, rows))
            lines = [sweep_header(width), *(sweep_line(name, judgement, width) for name, judgement in rows.items())]
            tables.append((str(path.relative_to(folder)), "\n".join(lines)))
    return tables


def _judgement(content: dict) -> Judgement:
    fields = {name: value for name, value in content.items() if name not in ("base_model", "settings")}
    styles = {name: Style(**fields.pop(name)) for name in ("samples", "texts")}
    return Judgement(**fields, **styles)


def comparison_page(records: list[Record]) -> str:
    """Several runs in one page: their curves one over the other, and what differs."""
    names = _distinct_names(records)
    overlaid = [
        draw(title, words, [curve for n, record in enumerate(records) for curve in curves(n, record)], log=log)
        for title, words, log, curves in (
            (
                "Perplexity on held-out texts",
                "Lower is better. Compare it only where the same texts were held out, and cut into the same tokens.",
                True,
                lambda n, record: [Curve(names[n], *record.curve("eval_perplexity"), n, points=True)],
            ),
            (
                "Bits a character on held-out texts",
                "Lower is better, and comparable whatever the tokens are.",
                False,
                lambda n, record: [Curve(names[n], *record.curve("eval_bits_per_char"), n, points=True)],
            ),
            (
                "Training loss",
                "On the texts it learns from, nats a token.",
                False,
                lambda n, record: [Curve(names[n], *record.curve("loss"), n)],
            ),
            (
                "Speed",
                "Real tokens learnt in a second, on all devices.",
                False,
                lambda n, record: [Curve(names[n], *record.curve("tokens_per_second"), n)],
            ),
        )
    ]
    return _render(
        "comparison.html.jinja",
        mark=PAGE_MARK,
        title=f"{len(records)} runs compared",
        names=names,
        verdicts=[record.verdict() for record in records],
        same_texts=len({record.run.get("data") for record in records}) == 1,
        drawings=[drawing for drawing in overlaid if drawing],
        arguments=_differences([_arguments(record) for record in records]),
        figures=_side_by_side([_figures(record) for record in records]),
    )


def _distinct_names(records: list[Record]) -> list[str]:
    """Folder names; where two are alike, with the folder above."""
    names = [record.name for record in records]
    if len(set(names)) == len(names):
        return names
    paths = [record.folder.resolve() for record in records]
    return [f"{path.parent.name}/{path.name}" for path in paths]


def _arguments(record: Record) -> dict[str, str]:
    said = {**record.run.get("arguments", {}), **record.run.get("texts", {}), **_what_was_run(record)}
    own = ("command", "begun", "resumed")  # every run has its own
    return {name: str(value) for name, value in said.items() if name not in own}


def _side_by_side(columns: list[dict[str, str]]) -> dict[str, list[str]]:
    return {name: [column.get(name, "") for column in columns] for name in dict.fromkeys(k for c in columns for k in c)}


def _differences(columns: list[dict[str, str]]) -> dict[str, list[str]]:
    return {name: values for name, values in _side_by_side(columns).items() if len(set(values)) > 1}


REPORT_FILE = "report.html"


COMPARISON_FILE = "comparison.html"
