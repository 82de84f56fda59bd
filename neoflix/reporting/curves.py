"""Drawings of a run as SVG: loss, learning rate, memory."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from io import StringIO

from neoflix.reporting.history import Record

# Colours that matplotlib draws with, and the words of the page's style sheet that take their place.
INK, GRID = "#0f0f01", "#0f0f02"


MOST_RUNS = 6  # in one comparison: as many as there are colours
COLOURS = [f"#0f0f1{number}" for number in range(MOST_RUNS)]


STYLE_WORDS = {INK: "var(--ink)", GRID: "var(--grid)"} | {c: f"var(--c{n})" for n, c in enumerate(COLOURS)}


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


GIB = 2**30
