"""Sampling settings compared: samples and figures for every combination."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from neoflix.judging.figures import Judgement, format_number, format_share
from neoflix.judging.judge import Judge, write_figures
from neoflix.runtime.console import printable, progress, say
from neoflix.runtime.errors import UserError

SWEEP_COLUMNS = (
    ("copies", lambda j: f"{j.copies:.1%}"),
    ("near duplicates", lambda j: f"{j.near_twins:.1%}"),
    ("longest run", lambda j: str(j.longest_run)),
    ("new trigrams", lambda j: f"{j.novel_trigrams:.1%}"),
    ("unknown words", lambda j: format_share(j.unknown_words)),
    ("distinct-2", lambda j: f"{j.samples.distinct_2:.3f}"),
    ("self-BLEU", lambda j: format_number(j.samples.self_bleu, 3)),
    ("length", lambda j: f"{j.samples.mean_words:.1f}"),
    ("ended", lambda j: format_share(j.ended)),
    ("perplexity", lambda j: format_number(j.samples.perplexity, 1)),
)


def name_settings(settings: dict) -> str:
    """{"temperature": 0.7, "top_k": 5} -> 'temperature=0.7,top_k=5'"""
    return ",".join(f"{name}={value}" for name, value in settings.items())


def sweep_header(width: int) -> str:
    """The first line of a sweep's table. `width` is that of the longest name of a setting."""
    return " " * width + "".join(f"{name:>{len(name) + 2}}" for name, _ in SWEEP_COLUMNS)


def sweep_line(name: str, judgement: Judgement, width: int) -> str:
    """The line of one setting."""
    cells = (f"{show(judgement):>{len(column) + 2}}" for column, show in SWEEP_COLUMNS)
    return f"{name:<{width}}" + "".join(cells)


def draw_sweep(judgements: dict[str, Judgement], path: Path) -> bool:
    """Plots novelty (share of trigrams in no training text) against fluency, one point per setting, as PNG.

    Fluency is the perplexity under the base model, low values up; without it, the share of words that occur in the
    training texts. Returns False, and draws nothing, if neither was measured.
    """
    from matplotlib.figure import Figure  # takes half a second, which only a sweep needs

    has_perplexity = all(judgement.samples.perplexity for judgement in judgements.values())
    if not has_perplexity and any(judgement.unknown_words is None for judgement in judgements.values()):
        return False
    figure = Figure(figsize=(8, 6), layout="constrained")
    axis = figure.subplots()
    axis.margins(x=0.25)  # room for the names
    for name, judgement in judgements.items():
        fluency = judgement.samples.perplexity if has_perplexity else 1 - judgement.unknown_words
        point = (judgement.novel_trigrams, fluency)
        # An empty mark: some of the samples are copies or near duplicates.
        axis.plot(*point, "o", color="tab:blue", markerfacecolor="tab:blue" if judgement.novel == 1 else "white")
        axis.annotate(name, point, xytext=(6, 4), textcoords="offset points", fontsize=8)
    axis.set_xlabel("novelty: share of trigrams in no training text")
    if has_perplexity:
        if text_perplexity := next(iter(judgements.values())).texts.perplexity:
            axis.axhline(text_perplexity, color="tab:gray", linestyle="--", label="training texts")
            axis.legend()
        axis.set_yscale("log")
        axis.invert_yaxis()
        axis.set_ylabel("fluency: perplexity under the base model (axis inverted)")
    else:
        axis.set_ylabel("fluency: share of words in the training vocabulary")
    axis.set_title("filled: all samples are novel; empty: some are copies or near duplicates", fontsize=9)
    figure.savefig(path, dpi=120)
    return True


def compare_settings(
    judge: Judge, sample: Callable[..., Iterator], settings: list[dict], output: str
) -> dict[str, Judgement]:
    """Samples and judges with each of the settings, and prints a line for each.

    Args:
        sample: `Sampler.sample` with the arguments that stay the same; called with one of `settings`.
        output: a new folder for each setting's samples, the figures (sweep.json) and the plot (sweep.png).

    Raises:
        UserError: if the folder exists or cannot be made.
    """
    folder, judgements, rows = Path(output), {}, []
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output {output}: the folder cannot be made ({error.strerror})") from error
    names = [name_settings(each) for each in settings]
    width = max(map(len, names))
    print(sweep_header(width), flush=True)
    for name, each in zip(names, settings, strict=True):
        samples = [one.to_dict() for one in progress(sample(**each), desc=name, unit="text", leave=False, disable=None)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        judgements[name] = judge.judge(samples)
        print(printable(sweep_line(name, judgements[name], width)), flush=True)
        rows.append({"settings": each, **asdict(judgements[name])})
        write_figures(folder / "sweep.json", {"base_model": judge.base_name, "rows": rows})
    if judge.no_base:
        print(f"perplexity not measured: {judge.no_base}")
    if draw_sweep(judgements, folder / "sweep.png"):
        say(f"Novelty against fluency: {folder / 'sweep.png'}")
    else:
        say("No sweep.png: for texts without spaces between words, fluency needs the perplexity of --base_model")
    return judgements
