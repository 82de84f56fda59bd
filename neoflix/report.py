"""A run's report: one HTML file that opens anywhere, and the model card beside it.

`python -m neoflix.report RUN` writes a run's report anew, finished or not; with several runs, one page that compares
them. Nothing is loaded from a network: drawings are inline SVG whose colours are the page's own, in light and in dark.
"""

import json
import math
import os
import re
import shlex
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path

import jinja2

from neoflix.checkpoint import RESULTS_FILE
from neoflix.config import parse_report_args
from neoflix.console import printable, say
from neoflix.distributed import run_and_exit
from neoflix.errors import UserError
from neoflix.manifest import write_text
from neoflix.quality import Judgement, Style, judgement_table, sweep_header, sweep_line
from neoflix.record import Record, file_sizes, read_json
from neoflix.run_folder import LOCK_FILE
from neoflix.template import Template

REPORT_FILE = "report.html"
CARD_FILE = "README.md"
COMPARISON_FILE = "comparison.html"
PAGE_MARK = '<meta name="generator" content="neoflix">'
CARD_MARK = "<!-- Written by neoflix, and written anew by its next run; without this line it is left alone. -->"
TEMPLATES = Path(__file__).with_name("templates")
GIB = 2**30
MOST_COLUMNS = 6  # of samples side by side
MOST_RUNS = 6  # in one comparison: as many as there are colours

# Colours that matplotlib draws with, and the words of the page's style sheet that take their place.
INK, GRID = "#0f0f01", "#0f0f02"
COLOURS = [f"#0f0f1{number}" for number in range(MOST_RUNS)]
STYLE_WORDS = {INK: "var(--ink)", GRID: "var(--grid)"} | {c: f"var(--c{n})" for n, c in enumerate(COLOURS)}


# ---- drawings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Values over steps. `points`: drawn with marks; `colour`: a number."""

    label: str
    steps: list[int]
    values: list[float]
    colour: int = 0
    points: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Drawing:
    title: str
    words: str  # what it shows, for a reader who sees such a thing for the first time
    svg: str


def draw(
    title: str,
    words: str,
    curves: Iterable[Curve],
    log: bool = False,
    levels: Iterable[tuple[str, float]] = (),
    best: tuple[int, float] | None = None,
) -> Drawing | None:
    """Curves over steps as SVG; None where there is nothing to draw.

    Args:
        levels: (label, value) of lines across the drawing.
        best: the point to mark.
    """
    curves = [curve for curve in map(_finite, curves) if curve.steps]
    if not curves:
        return None
    from matplotlib import rc_context  # half a second, at a run's end
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axis = figure.subplots()
        for curve in curves:
            axis.plot(
                curve.steps,
                curve.values,
                color=COLOURS[curve.colour],
                linewidth=1.4,
                linestyle="--" if curve.dashed else "-",
                marker="o" if curve.points or len(curve.steps) == 1 else None,
                markersize=3.5,
                label=curve.label,
            )
        for number, (label, value) in enumerate(levels):
            axis.axhline(value, color=INK, linestyle=("--", ":")[number % 2], linewidth=0.9, label=label)
        if best:
            axis.plot(*best, "o", markersize=9, markerfacecolor="none", markeredgecolor=INK, label="best step")
            axis.axvline(best[0], color=INK, linewidth=0.6, linestyle=":")
        if log:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_xlabel("step", color=INK)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.tick_params(which="both", colors=INK)
        axis.grid(color=GRID, linewidth=0.6)
        for side, spine in axis.spines.items():
            spine.set_color(INK)
            spine.set_visible(side in ("left", "bottom"))
        figure.legend(loc="outside upper left", ncols=3, frameon=False, labelcolor=INK, fontsize=8)
        image = StringIO()
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    return Drawing(title, words, _for_page(image.getvalue(), title))


def _finite(curve: Curve) -> Curve:
    kept = [pair for pair in zip(curve.steps, curve.values, strict=True) if math.isfinite(pair[1])]
    return Curve(curve.label, *([pair[n] for pair in kept] for n in (0, 1)), curve.colour, curve.points, curve.dashed)


def _for_page(svg: str, title: str) -> str:
    """Matplotlib's file as a part of a page: no header, no addresses, no names that another drawing has too, and the
    page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'<svg (.*?)width="[^"]*" height="[^"]*"', r"<svg \1", svg, count=1)
    for colour, word in STYLE_WORDS.items():
        svg = svg.replace(colour, word)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def draw_run(record: Record) -> list[Drawing]:
    """The drawings of one run's report."""
    untouched, best = record.untouched, record.best
    steps, losses = record.curve("loss")
    perplexities = [math.exp(min(loss, 700)) for loss in losses]
    drawings = [
        draw(
            "Loss",
            "How surprised the model is by each next token (nats): on the texts it learns from and, the figure that "
            "counts, on texts it has never seen. Lower is better; where the second one rises, it has begun to learn by "
            "heart.",
            [Curve("training", steps, losses), Curve("held out", *record.curve("eval_loss"), 1, points=True)],
            levels=[("untouched model", untouched["eval_loss"])] if untouched else [],
            best=(best["step"], best["eval_loss"]) if best else None,
        ),
        draw(
            "Perplexity",
            "The same as a number of choices: a perplexity of 20 is the doubt between 20 equally likely tokens.",
            [
                Curve("training", steps, perplexities),
                Curve("held out", *record.curve("eval_perplexity"), 1, points=True),
            ],
            log=True,
            levels=[("untouched model", untouched["eval_perplexity"])] if untouched else [],
            best=(best["step"], best["eval_perplexity"]) if best else None,
        ),
        draw(
            "Learning rate",
            "How large the steps are: they grow while it warms up, then fall.",
            [Curve("learning rate", *record.curve("learning_rate"))],
        ),
        draw(
            "Gradient norm",
            "How steep the loss is, before it is cut off at --max_grad_norm. Single peaks are common; where it grows "
            "tenfold and stays there, the learning rate is too high.",
            [Curve("gradient norm", *record.curve("grad_norm"))],
        ),
        draw(
            "Speed",
            "Real tokens learnt in a second, on all devices.",
            [Curve("tokens/s", *record.curve("tokens_per_second"))],
        ),
        draw(
            "Share of the hardware's peak",
            "Model FLOPs utilization: how much of what the devices can do at best goes into the model's own products.",
            [Curve("MFU, %", *_scaled(record.curve("mfu"), 0.01))],
        ),
        draw_memory(record),
    ]
    return [drawing for drawing in drawings if drawing]


def draw_memory(record: Record) -> Drawing | None:
    """Peaks of memory, and what the plan said."""
    curves, levels = [], []
    for number, (where, name) in enumerate((("device", "device, fullest one"), ("host", "host, all processes"))):
        curves.append(Curve(name, *_scaled(record.curve(f"peak_{where}_bytes"), GIB), number))
        if planned := record.results.get(f"plan_{where}_bytes"):
            levels.append((f"{where}, planned", planned / GIB))
    return draw(
        "Memory", "The most that was held so far, GiB, and what the plan said before the run.", curves, levels=levels
    )


def _scaled(curve: tuple[list, list], unit: float) -> tuple[list, list]:
    return curve[0], [value / unit for value in curve[1]]


# ---- pages -------------------------------------------------------------------------------------------------


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


# ---- the model card ----------------------------------------------------------------------------------------


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


# ---- writing -----------------------------------------------------------------------------------------------


def write_page(path: Path, page: str) -> None:
    """UserError where the file is not ours, or cannot be written."""
    _write(path, page, PAGE_MARK, "name another file with --output, or move it away")


def _write(path: Path, content: str, mark: str, way_out: str) -> None:
    try:
        if path.exists() and mark not in path.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{path}: is not a file that neoflix wrote, and is left alone; {way_out}")
        write_text(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def write_report(output_dir: str) -> Path | None:
    """Writes a run's report and model card, and returns the report's path. What goes wrong is one line of warning and
    None: a run of hours does not fail for its report."""
    try:
        record = Record.read(output_dir)
        path = record.folder / REPORT_FILE
        if record.results:  # until then there is no model at the top
            _try(lambda: _write(record.folder / CARD_FILE, model_card(record), CARD_MARK, "move it away for a new one"))
        write_page(path, report_page(record))
        return path
    except Exception as error:
        _warn(error)
        return None


def _try(write: Callable[[], None]) -> None:
    try:
        write()
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    if os.environ.get("NEOFLIX_TRACEBACK"):
        traceback.print_exception(error)
    say(f"warning: no report: {' '.join(str(error).split()) or type(error).__name__}")


def close_run(output_dir: str) -> None:
    """A run's last words: where the best model is, how good, and where to read on. One process."""
    path = write_report(output_dir)
    perplexity = read_json(Path(output_dir, RESULTS_FILE), {}).get("perplexity")
    say(f"Best model in {output_dir}" + ("" if perplexity is None else f", perplexity {perplexity:,.2f}"))
    if path:
        say(f"Report: {path} (open it in a browser)")


def main(argv: list[str] | None = None) -> None:
    args = parse_report_args(argv)
    if len(args.runs) > MOST_RUNS:
        raise UserError(f"{len(args.runs)} runs: at most {MOST_RUNS} can be told apart in one page; name fewer")
    records = [Record.read(run) for run in args.runs]
    if len(records) > 1:
        path, page = Path(args.output or COMPARISON_FILE), comparison_page(records)
    else:
        path, page = Path(args.output or records[0].folder / REPORT_FILE), report_page(records[0])
    write_page(path, page)
    say(f"Report: {path} (open it in a browser)")


if __name__ == "__main__":
    run_and_exit(main)
