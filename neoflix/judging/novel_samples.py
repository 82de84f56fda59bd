"""Sampling of novel texts only: those that are not duplicates or near duplicates of training texts."""

from collections import Counter
from collections.abc import Callable, Iterator

from neoflix.judging.novelty import TrainingTexts
from neoflix.runtime.errors import UserError

MAX_DRAWS_PER_TEXT = 20  # then `--novel` gives up: the model mostly repeats its training texts


def keep_novel(
    sample: Callable[..., Iterator], training: TrainingTexts, prompts: list[str], num_samples: int
) -> Iterator:
    """Yields `num_samples` novel samples for each prompt.

    First come the samples that would be drawn without this filter, except those it drops; then, in place of the
    dropped ones, samples with the next indices. What is kept depends on the seed and the settings alone.

    Args:
        sample: `Sampler.sample` with seed and settings; called with prompts, `num_samples` and `first_index`.

    Raises:
        UserError: if more than 20 draws per sample are needed.
    """
    wanted = len(prompts) * num_samples
    missing, drawn = Counter(dict.fromkeys(range(len(prompts)), num_samples)), 0
    rounds = [(list(range(len(prompts))), num_samples)]
    while rounds:
        for numbers, num in rounds:
            if drawn + num * len(numbers) > MAX_DRAWS_PER_TEXT * wanted:
                raise UserError(
                    f"--novel: only {wanted - missing.total():,} of the {wanted:,} texts asked for are novel after "
                    f"{drawn:,} draws; raise --temperature or --top_p, or train for fewer epochs"
                )
            samples = sample([prompts[number] for number in numbers], num, first_index=drawn)
            for place, each in enumerate(samples):
                drawn += 1
                if training.is_novel(each.text):
                    missing[numbers[place // num]] -= 1
                    yield each
        rounds = [([number], num) for number, num in missing.items() if num]
