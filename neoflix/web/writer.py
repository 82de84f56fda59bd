"""Writes the texts of one request after the other, and shows them while they grow."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from neoflix.runtime.errors import UserError
from neoflix.sampling.sampler import Sample, Sampler
from neoflix.web.twins import Twin, Twins

MOST_TEXTS = 100  # of a request: a page with more is slow, and `generate.py --output` writes any number


@dataclass
class Progress:
    """What a request has so far.

    Attributes:
        seed: that of the texts.
        samples: all texts, finished or not.
        twins: by the finished texts' numbers, the training text that each repeats, or None.
        state: "writing", "done" or "stopped".
        error: why the request was refused, or None.
    """

    seed: int = 0
    samples: list[Sample] = field(default_factory=list)
    twins: dict[int, Twin | None] = field(default_factory=dict)
    state: str = "writing"
    error: str | None = None

    @property
    def finished(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.finish_reason]

    @property
    def jsonl(self) -> str:
        """The finished texts as lines of a file of samples, as `generate.py --output` writes them."""
        return "".join(json.dumps(sample.to_dict(), ensure_ascii=False) + "\n" for sample in self.finished)


class Writer:
    """Writes texts on request.

    Args:
        settings: batch size and sampling settings that a request does not choose.
    """

    def __init__(self, sampler: Sampler, twins: Twins, settings: dict):
        self.sampler, self.twins, self.settings = sampler, twins, settings
        self._num_stops = 0

    def stop(self) -> None:
        """Ends the request that is being written at its next look, within about 0.1 s or one token."""
        self._num_stops += 1

    def write(
        self,
        prompt: str | dict[str, str],
        num_samples: float | None = None,
        seed: str | int | None = None,
        **settings: float | None,
    ) -> Iterator[Progress]:
        """Yields the request's progress about ten times a second, and its end. Calls must not overlap.

        Args:
            prompt: the texts' beginning or, for a model with a template, the fields; empty ones are left out.
            num_samples: 1 to 100.
            seed: None or empty: a new one.
            settings: those of `Sampler.sample`; None leaves a setting as it is.
        """
        num_stops, progress = self._num_stops, Progress()
        yield progress
        try:
            progress.seed = random.randrange(1, 1_000_000) if seed in (None, "") else _whole("seed", seed)
            num_samples = _whole("number of texts", num_samples)
            if not 1 <= num_samples <= MOST_TEXTS:
                raise UserError(f"number of texts {num_samples:,}: must be 1 to {MOST_TEXTS}")
            if isinstance(prompt, dict):
                prompt = {name: value.strip() for name, value in prompt.items() if value.strip()}
            chosen = self.settings | {name: value for name, value in settings.items() if value is not None}
            for samples in self.sampler.watch(prompt, num_samples, progress.seed, **chosen):
                self._note(progress, samples)
                if self._num_stops != num_stops:
                    progress.state = "stopped"
                    break
                yield progress
            else:
                progress.state = "done"
        except UserError as error:
            progress.state, progress.error = "stopped", str(error).removeprefix("--")  # no flag here
        yield progress

    def _note(self, progress: Progress, samples: list[Sample]) -> None:
        progress.samples = samples
        for number, sample in enumerate(samples):
            if sample.finish_reason and number not in progress.twins:
                progress.twins[number] = self.twins.find(sample.text)


def _whole(name: str, value: str | float | None) -> int:
    try:
        number = float(value)
        if number == int(number):
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"{name} {value}: must be a whole number")
