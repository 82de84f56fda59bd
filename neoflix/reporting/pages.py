"""A run's report, and the comparison of several runs: one HTML file each, which loads nothing from a network.

Plots are inline SVG in the page's own colours, light and dark.
"""

from contextlib import suppress
from pathlib import Path

from neoflix.checkpoints.names import LOCK_FILE
from neoflix.judging.figures import Judgement, judgement_table
from neoflix.judging.sweep import name_settings, sweep_header, sweep_line
from neoflix.judging.variety import Style
from neoflix.reporting.curves import draw_comparison, draw_run
from neoflix.reporting.facts import describe_setup, list_figures
from neoflix.reporting.formats import format_size
from neoflix.reporting.history import Record, file_sizes
from neoflix.reporting.render import render
from neoflix.reporting.verdict import judge_run, list_remarks
from neoflix.runtime.console import printable
from neoflix.runtime.files import read_json

REPORT_FILE = "report.html"

COMPARISON_FILE = "comparison.html"

PAGE_MARK = '<meta name="generator" content="neoflix">'

MAX_COLUMNS = 6  # of samples side by side


def report_page(record: Record) -> str:
    """One run's report as HTML."""
    verdict, sentence = judge_run(record)
    sizes = [(name, size) for name, size in file_sizes(record.folder) if name not in (REPORT_FILE, LOCK_FILE)]
    return render(
        "report.html.jinja",
        mark=PAGE_MARK,
        title=record.name,
        verdict={"yes": "It worked", "no": "It did not work", "unknown": "Not known"}[verdict],
        kind=verdict,
        sentence=sentence,
        remarks=list_remarks(record),
        setup=describe_setup(record),
        figures=list_figures(record),
        plots=draw_run(record),
        columns=_sample_columns(record),
        judged=_judged_tables(record.folder),
        files=[(name, format_size(size)) for name, size in sizes],
    )


def _sample_columns(record: Record) -> list[dict]:
    """The samples of some evaluations, oldest first: the first, the best and the last one, and some between."""
    steps = sorted({row["step"] for row in record.samples})
    best = record.best["step"] if record.best else None
    if len(steps) > MAX_COLUMNS:
        shown = {steps[round(n * (len(steps) - 1) / (MAX_COLUMNS - 2))] for n in range(MAX_COLUMNS - 1)}
        steps = [step for step in steps if step in shown or step == best]
    columns = []
    for step in steps:
        rows = [row | {"text": printable(row["text"])} for row in record.samples if row["step"] == step]
        title = "before training" if step == 0 else f"epoch {rows[0]['epoch']:.2f}"
        columns.append({"title": title, "step": step, "is_best": step == best, "rows": rows})
    return columns


def _judged_tables(folder: Path) -> list[tuple[str, str]]:
    """(file name, table) of the figures that `generate.py --judge` and `--sweep` wrote in the run's folder."""
    tables = []
    for path in sorted([*folder.glob("*.judged.json"), *folder.glob("*/*.judged.json")]):
        with suppress(KeyError, TypeError, ValueError):  # of another program or version
            content = read_json(path, {})
            table = judgement_table(_read_judgement(content), content["base_model"] or "")
            tables.append((str(path.relative_to(folder)), table))
    for path in sorted([*folder.glob("sweep.json"), *folder.glob("*/sweep.json")]):
        with suppress(KeyError, TypeError, ValueError):
            rows = {name_settings(row["settings"]): _read_judgement(row) for row in read_json(path, {})["rows"]}
            width = max(map(len, rows))
            lines = [sweep_header(width), *(sweep_line(name, judgement, width) for name, judgement in rows.items())]
            tables.append((str(path.relative_to(folder)), "\n".join(lines)))
    return tables


def _read_judgement(content: dict) -> Judgement:
    fields = {name: value for name, value in content.items() if name not in ("base_model", "settings")}
    styles = {name: Style(**fields.pop(name)) for name in ("samples", "texts")}
    return Judgement(**fields, **styles)


def comparison_page(records: list[Record]) -> str:
    """Several runs in one page: their curves in common plots, and what differs between them."""
    names = _distinct_names(records)
    return render(
        "comparison.html.jinja",
        mark=PAGE_MARK,
        title=f"{len(records)} runs compared",
        names=names,
        verdicts=[judge_run(record) for record in records],
        same_texts=len({record.run.get("data") for record in records}) == 1,
        plots=draw_comparison(records, names),
        settings=_differences([_settings(record) for record in records]),
        figures=_side_by_side([list_figures(record) for record in records]),
    )


def _distinct_names(records: list[Record]) -> list[str]:
    """The folders' names; if two are equal, with the parent folder."""
    names = [record.name for record in records]
    if len(set(names)) == len(names):
        return names
    paths = [record.folder.resolve() for record in records]
    return [f"{path.parent.name}/{path.name}" for path in paths]


def _settings(record: Record) -> dict[str, str]:
    settings = {**record.run.get("arguments", {}), **record.run.get("texts", {}), **describe_setup(record)}
    own = ("command", "started", "resumed")  # they always differ
    return {name: str(value) for name, value in settings.items() if name not in own}


def _side_by_side(columns: list[dict[str, str]]) -> dict[str, list[str]]:
    return {name: [column.get(name, "") for column in columns] for name in dict.fromkeys(k for c in columns for k in c)}


def _differences(columns: list[dict[str, str]]) -> dict[str, list[str]]:
    return {name: values for name, values in _side_by_side(columns).items() if len(set(values)) > 1}
