"""Plots of a run as SVG: loss, learning rate, speed, memory; and of several runs in one."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from io import StringIO

from neoflix.reporting.history import Record
from neoflix.runtime.console import GIB

MAX_RUNS = 6  # in one comparison: as many as there are colours

# The page has a light and a dark style, and matplotlib knows neither. So it draws with placeholder colours that occur
# nowhere else, and `_for_page` replaces each by a CSS variable, to which the page's style sheet gives a colour.
INK, GRID = "#0f0f01", "#0f0f02"
COLOURS = [f"#0f0f1{number}" for number in range(MAX_RUNS)]
CSS_VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)"} | {c: f"var(--c{n})" for n, c in enumerate(COLOURS)}


@dataclass(frozen=True)
class Curve:
    """Values over steps, or over what `draw` is told. `points` draws marks; `colour` is an index of COLOURS."""

    label: str
    steps: list[float]
    values: list[float]
    colour: int = 0
    points: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Plot:
    """A plot in a page. `caption` explains it to a reader who sees such a plot for the first time."""

    title: str
    caption: str
    svg: str


def draw(
    title: str,
    caption: str,
    curves: Iterable[Curve],
    log: bool = False,
    levels: Iterable[tuple[str, float]] = (),
    best: tuple[float, float] | None = None,
    over: str = "step",
) -> Plot | None:
    """Draws curves over steps as SVG; None if they have no points.

    Args:
        over: what they are over, if not steps: a number on a logarithmic axis.
        levels: (label, value) of horizontal lines.
        best: the point to mark.
    """
    curves = [curve for curve in map(_finite, curves) if curve.steps]
    if not curves:
        return None
    from matplotlib import rc_context  # takes half a second
    from matplotlib.figure import Figure

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
            axis.plot(*best, "o", markersize=9, markerfacecolor="none", markeredgecolor=INK, label=f"best {over}")
            axis.axvline(best[0], color=INK, linewidth=0.6, linestyle=":")
        _style(axis, log, over)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, labelcolor=INK, fontsize=8)
        image = StringIO()
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    return Plot(title, caption, _for_page(image.getvalue(), title))


def _style(axis, log: bool, over: str) -> None:
    """Scales, ticks and colours. Numbers on a logarithmic axis are written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if over != "step":
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
    if log:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_xlabel(over, color=INK)
    axis.tick_params(which="both", colors=INK)
    axis.grid(color=GRID, linewidth=0.6)
    for side, spine in axis.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))


def _finite(curve: Curve) -> Curve:
    kept = [pair for pair in zip(curve.steps, curve.values, strict=True) if math.isfinite(pair[1])]
    return Curve(curve.label, *([pair[n] for pair in kept] for n in (0, 1)), curve.colour, curve.points, curve.dashed)


def _for_page(svg: str, title: str) -> str:
    """Makes matplotlib's file a part of a page: in the page's colours, without header, URLs, and ids that another plot
    has too."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'<svg (.*?)width="[^"]*" height="[^"]*"', r"<svg \1", svg, count=1)
    for placeholder, variable in CSS_VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def draw_run(record: Record) -> list[Plot]:
    """The plots of one run's report."""
    baseline, best = record.baseline, record.best
    steps, losses = record.curve("loss")
    perplexities = [math.exp(min(loss, 700)) for loss in losses]
    plots = [
        draw(
            "Loss",
            "Mean loss per token (nats), on the training texts and on held-out texts, which the model never sees. The "
            "held-out loss is the one that counts, and lower is better. Where it rises, the model memorizes its texts.",
            [Curve("training", steps, losses), Curve("held out", *record.curve("eval_loss"), 1, points=True)],
            levels=[("before training", baseline["eval_loss"])] if baseline else [],
            best=(best["step"], best["eval_loss"]) if best else None,
        ),
        draw(
            "Perplexity",
            "exp(loss): with a perplexity of 20, the model is as unsure as between 20 equally likely tokens.",
            [
                Curve("training", steps, perplexities),
                Curve("held out", *record.curve("eval_perplexity"), 1, points=True),
            ],
            log=True,
            levels=[("before training", baseline["eval_perplexity"])] if baseline else [],
            best=(best["step"], best["eval_perplexity"]) if best else None,
        ),
        draw(
            "Learning rate",
            "The size of the steps: it grows during warmup, then falls.",
            [Curve("learning rate", *record.curve("learning_rate"))],
        ),
        draw(
            "Gradient norm",
            "Before clipping at --max_grad_norm. Single peaks are common; if it grows tenfold and stays there, the "
            "learning rate is too high.",
            [Curve("gradient norm", *record.curve("grad_norm"))],
        ),
        draw(
            "Speed",
            "Training tokens per second on all devices, without padding.",
            [Curve("tokens/s", *record.curve("tokens_per_second"))],
        ),
        draw(
            "Model FLOPs utilization",
            "Share of the devices' peak performance that the model's own matrix products use.",
            [Curve("MFU, %", *_scaled(record.curve("mfu"), 0.01))],
        ),
        draw_memory(record),
    ]
    return [plot for plot in plots if plot]


def draw_memory(record: Record) -> Plot | None:
    """Peak memory, and the plan's forecast."""
    curves, levels = [], []
    for number, (where, name) in enumerate((("device", "device (the fullest)"), ("host", "host (all processes)"))):
        curves.append(Curve(name, *_scaled(record.curve(f"peak_{where}_bytes"), GIB), number))
        if planned := record.results.get(f"plan_{where}_bytes"):
            levels.append((f"{where}, planned", planned / GIB))
    return draw(
        "Memory", "Peak memory so far in GiB, and the forecast of the plan before the run.", curves, levels=levels
    )


def _scaled(curve: tuple[list, list], unit: float) -> tuple[list, list]:
    return curve[0], [value / unit for value in curve[1]]


def draw_comparison(records: list[Record], names: list[str]) -> list[Plot]:
    """The plots of several runs, each with one curve per run."""

    def overlay(title: str, caption: str, key: str, points: bool = False, log: bool = False) -> Plot | None:
        runs = enumerate(zip(names, records, strict=True))
        return draw(title, caption, [Curve(name, *run.curve(key), n, points) for n, (name, run) in runs], log=log)

    plots = [
        overlay(
            "Perplexity on held-out texts",
            "Lower is better. Comparable only for the same held-out texts and the same tokenizer.",
            "eval_perplexity",
            points=True,
            log=True,
        ),
        overlay(
            "Bits per character on held-out texts",
            "Lower is better. Comparable for any tokenizer.",
            "eval_bits_per_char",
            points=True,
        ),
        overlay("Training loss", "On the training texts, in nats per token.", "loss"),
        overlay("Speed", "Training tokens per second on all devices, without padding.", "tokens_per_second"),
    ]
    return [plot for plot in plots if plot]
