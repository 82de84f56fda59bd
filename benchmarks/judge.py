"""Seconds and memory of judging samples: `python benchmarks/judge.py --samples 10000 --texts 8000`.

Texts are chains of words in which each word follows the last one somewhere in data/sample_titles.csv or, if
NETFLIX_TITLES_CSV names it, in the real catalogue. One sample in twenty is a training text and one in twenty a
training text with another last word; judging must find them. The others are chains of their own. Reading files and
the base model's perplexity are not included. The last line is JSON; --output also appends it to a file.
"""

import argparse
import os
import random
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from machine import write_line

from neoflix.data.sources import SAMPLE_PATH, read_examples
from neoflix.judging.figures import judge
from neoflix.judging.novelty import NEAR_DUPLICATE, TrainingTexts
from neoflix.training.meters import peak_host_bytes


def main() -> None:
    args = parse_args()
    source = Path(os.environ.get("NETFLIX_TITLES_CSV", SAMPLE_PATH))
    chains = Chains([example.completion for example in read_examples(source, "description")])
    texts = [chains.draw() for _ in range(args.texts)]
    samples = [plant(chains, texts, number) for number in range(args.samples)]
    before = peak_host_bytes()

    began = time.process_time(), time.perf_counter()
    training = TrainingTexts(texts)
    indexed = time.process_time()
    found = judge(samples, training)
    ended = time.process_time(), time.perf_counter()
    planted = len(range(0, args.samples, 10)) / args.samples
    if found.near_twins < 0.99 * planted:
        sys.exit(f"error: {found.near_twins:.1%} near duplicates found, {planted:.1%} were planted")
    write_line(
        {
            "num_samples": args.samples,
            "num_texts": args.texts,
            "words_from": "sample" if source == SAMPLE_PATH else "netflix",
            "cpu_seconds": ended[0] - began[0],
            "cpu_seconds_index": indexed - began[0],
            "cpu_seconds_judge": ended[0] - indexed,
            "wall_seconds": ended[1] - began[1],
            "peak_bytes_before": before,  # imports, texts and samples
            "peak_bytes": peak_host_bytes(),
            "near_twin_from": NEAR_DUPLICATE,
            "found": asdict(found),
        },
        args.output,
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--texts", type=int, default=8_000)
    parser.add_argument("--output", help="JSON lines file to append to")
    return parser.parse_args()


class Chains:
    """Texts in which every pair of adjacent words occurs in a real text, with the real texts' lengths."""

    def __init__(self, texts: list[str]):
        self.random = random.Random(0)
        self.texts = [text.split() for text in texts]
        self.followers = defaultdict(list)
        for words in self.texts:
            for word, follower in pairwise(words):
                self.followers[word].append(follower)

    def draw(self) -> str:
        choose = self.random.choice
        words = [choose(self.texts)[0]]
        for _ in range(len(choose(self.texts)) - 1):
            words.append(choose(self.followers.get(words[-1]) or choose(self.texts)))
        return " ".join(words)


def plant(chains: Chains, texts: list[str], number: int) -> str:
    if number % 20 == 0:
        return chains.random.choice(texts)
    if number % 10 == 0:
        return chains.random.choice(texts).rpartition(" ")[0] + " otherwise"
    return chains.draw()


if __name__ == "__main__":
    main()
