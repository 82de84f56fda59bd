"""Draws a folder of benchmark results: `python benchmarks/plots.py [FOLDER]` writes throughput.png, memory.png,
growth.png and demo.svg into it.

Only the newest line of each setting is drawn. Each kind of hardware gets its own panel.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLORS = {"article": "tab:gray", "ours": "tab:blue"}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "results")
    lines = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    plt.rcParams["svg.fonttype"] = "none"  # text stays text: a small file
    for name, benchmark, draw in (
        ("throughput.png", "train", draw_throughput),
        ("memory.png", "train", draw_memory),
        ("growth.png", "growth", draw_growth),
        ("demo.svg", "run", draw_run),
    ):
        lines_of = [line for line in lines if line["benchmark"] == benchmark and "lora" not in line]
        machines = sorted({line["hardware"] for line in lines_of})
        if not machines:
            continue
        figure, axes = plt.subplots(1, len(machines), figsize=(6 * len(machines), 4), squeeze=False)
        for axis, machine in zip(axes[0], machines, strict=True):
            draw(axis, [line for line in lines_of if line["hardware"] == machine])
            axis.set_title(machine, fontsize=9)
        figure.tight_layout()
        figure.savefig(folder / name, dpi=120)
        print(folder / name)


def draw_throughput(axis, lines: list[dict]) -> None:
    """Real tokens/s against real tokens per step, one line per architecture and side."""
    for architecture in dict.fromkeys(line["architecture"] for line in lines):
        for side, color in COLORS.items():
            points = {
                line["texts_per_step"]: line[side]
                for line in lines
                if line["architecture"] == architecture and side in line
            }
            x = [points[texts]["real_tokens_per_step"] for texts in sorted(points)]
            y = [points[texts]["real_tokens_per_second"] for texts in sorted(points)]
            axis.plot(
                x, y, "o-", color=color, label=f"{architecture}, {side}", alpha=0.4 + 0.6 * (architecture == "small")
            )
    axis.set(xlabel="real tokens per step", ylabel="real tokens/s", ylim=(0, None))
    axis.legend(fontsize=8)


def draw_memory(axis, lines: list[dict]) -> None:
    """Peak memory against the model's size, at the smallest step that was measured."""
    for side, color in COLORS.items():
        smallest = {}
        for line in sorted(lines, key=lambda line: -line["texts_per_step"]):
            if side in line:
                smallest[line[side]["parameters"]] = line[side]
        sizes = sorted(smallest)
        for figure, style in (("peak_host_gib", "o-"), ("peak_device_reserved_gib", "s--")):
            if sizes and all(figure in smallest[size] for size in sizes):
                label = f"{side}, {'host' if 'host' in figure else 'device'}"
                axis.plot(
                    [size / 1e6 for size in sizes],
                    [smallest[size][figure] for size in sizes],
                    style,
                    color=color,
                    label=label,
                )
    axis.set(xlabel="million parameters", ylabel="peak memory, GiB", xscale="log", yscale="log")
    axis.legend(fontsize=8)


def draw_growth(axis, lines: list[dict]) -> None:
    """Seconds to the end of the first step, and host memory, against the rows of the data set."""
    memory = axis.twinx()
    for cache, style in (("cold", "o-"), ("warm", "o--")):
        points = {line["rows"]: line for line in lines if line["processes"] == 1 and line["cache"] == cache}
        rows = sorted(points)
        axis.plot(
            rows, [points[n]["start_up_seconds"] for n in rows], style, color="tab:blue", label=f"start-up, {cache}"
        )
        memory.plot(
            rows, [points[n]["peak_host_gib"] for n in rows], style, color="tab:orange", label=f"memory, {cache}"
        )
    axis.set(xlabel="rows", ylabel="seconds to the end of the first step", xscale="log", yscale="log")
    memory.set(ylabel="peak host memory, GiB", ylim=(0, None))
    handles = [handle for each in (axis, memory) for handle in each.get_legend_handles_labels()[0]]
    axis.legend(handles=handles, fontsize=8)


def draw_run(axis, lines: list[dict]) -> None:
    """Held-out perplexity of one run over its epochs, with the unigram model as a baseline."""
    epochs, perplexity = lines[-1]["epochs"], lines[-1]["perplexity"]
    axis.semilogy(epochs, perplexity, "o-", color=COLORS["ours"], label="held-out texts")
    axis.axhline(lines[-1]["unigram_perplexity"], color=COLORS["article"], linestyle="--", label="unigram model")
    for epoch, value in zip(epochs, perplexity, strict=True):
        axis.annotate(f"{value:,}", (epoch, value), xytext=(4, 6), textcoords="offset points", fontsize=9)
    axis.set(xlabel="epoch", ylabel="perplexity per token", ylim=(100, 8000))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)


if __name__ == "__main__":
    main()
