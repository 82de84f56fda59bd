"""Runs train.py or generate.py on a stand-in card, and records what each phase took of the device.

    python tests/rehearsal/probe.py FIGURES.json train.py --config recipes/gpt-neo-125m.yaml ...

For each phase: peaks of torch's allocator in bytes, and the stand-in's counts of its last pass.
"""

import functools
import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import standin
import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

STATES = ("_live", "_peak")  # endings of counters that hold a state, not a count
PEAKS = ("allocated", "reserved", "device_peak", "pinned_peak", "host_peak")


class Phases:
    """Peaks and counts by phase.

    Attributes:
        phases: by name, peaks of all passes and counts of the last one.
        total: counts of the whole process, and the places that waited for the device.
    """

    def __init__(self, counts: standin.Counts):
        self.counts, self.phases = counts, {}
        # DeepSpeed resets the peaks too, while it starts.
        self.reset_peaks, torch.cuda.reset_peak_memory_stats = torch.cuda.reset_peak_memory_stats, lambda *_: None
        self.total, self.waits = Counter(), Counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Records what the block takes. The phase that it interrupts does not count it."""
        self._reset()
        yield
        now = {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            **self.counts.read(),
        }
        before = self.phases.get(name, {})
        most = {peak: max(now[peak], before.get(peak, 0)) for peak in PEAKS}
        self.phases[name] = now | most | {"passes": before.get("passes", 0) + 1, "waits": dict(self.counts.waits)}
        self._reset()

    def _reset(self) -> None:
        if torch.cuda.is_initialized():
            self.reset_peaks()
        self.total.update({name: count for name, count in self.counts.read().items() if not name.endswith(STATES)})
        self.waits.update(self.counts.waits)
        self.counts.reset()

    def wrap(self, owner: object, method: str, name: str | Callable[[], str | None]) -> None:
        """Makes each call of a method a phase."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def wrapped(*args, **kwargs):
            phase = name if isinstance(name, str) else name()
            if phase is None:
                return original(*args, **kwargs)
            with self.phase(phase):
                return original(*args, **kwargs)

        setattr(owner, method, wrapped)


class WholeSteps(TrainerCallback):
    """Counts from the end of one step to the end of the next: batches, forward, backward and the optimizer."""

    def __init__(self, phases: Phases):
        self.phases, self.before = phases, None

    def on_step_end(self, args, state, control, **kwargs):
        phases = self.phases
        phases._reset()
        if self.before:
            total, waits = self.before
            counted = {name: phases.total[name] - total[name] for name in phases.total}
            phases.phases["whole step"] = counted | {"waits": dict(phases.waits - waits)}
        self.before = phases.total.copy(), phases.waits.copy()


def watch_training(phases: Phases, figures: dict) -> None:
    """Makes a run's parts phases, and keeps its plan."""
    import deepspeed

    from neoflix.training import saving, trainer
    from neoflix.training.live_samples import ShowSamples

    initialize, make = deepspeed.initialize, trainer.TokenTrainer.__init__

    def watched_initialize(*args, **kwargs):
        with phases.phase("start"):
            made = initialize(*args, **kwargs)
        engine = made[0]
        phases.wrap(engine, "forward", lambda: "forward" if engine.module.training else None)
        phases.wrap(engine, "backward", "backward")
        phases.wrap(engine, "step", "step")
        return made

    def make_with_plan(self, *args, plan=None, **kwargs):
        figures["plan"] = plan and describe(plan)
        make(self, *args, plan=plan, **kwargs)
        self.add_callback(WholeSteps(phases))

    deepspeed.initialize = watched_initialize
    trainer.TokenTrainer.__init__ = make_with_plan
    phases.wrap(trainer, "measure_loss", "evaluate")
    phases.wrap(ShowSamples, "_write", "sample")
    phases.wrap(saving, "save_checkpoint", "save")
    phases.wrap(saving, "save_best", "save the best")


def describe(plan) -> dict:
    """What the plan follows from, and the host's bytes by phase."""
    return {"shape": asdict(plan.shape), "settings": asdict(plan.settings), "host": plan.host_phases}


def watch_sampling(phases: Phases) -> None:
    from neoflix.sampling.decoder import Decoder
    from neoflix.sampling.sampler import Sampler

    phases.wrap(Sampler, "load", "load")
    for method, name in (("_fill", "fill slots"), ("_capture", "capture a graph"), ("_step", "decode a token")):
        phases.wrap(Decoder, method, name)


def main() -> None:
    output, script, *words = sys.argv[1:]
    phases = Phases(standin.Counts())
    figures = {}
    sys.argv = [script, *words]
    try:
        run(script, phases, figures)
    finally:
        last = phases.counts.read()
        figures |= {"phases": phases.phases, "refused": last["refused"], "unknown": last["unknown"]}
        figures["refusals"] = dict(phases.counts.refusals)
        Path(output).write_text(json.dumps(figures, indent=1))
    sys.stdout.flush()
    os._exit(0)  # libraries that end after the stand-in call it


def run(script: str, phases: Phases, figures: dict) -> None:
    entry = importlib.import_module(Path(script).stem)
    watch_training(phases, figures) if script == "train.py" else watch_sampling(phases)
    entry.main(sys.argv[1:])


if __name__ == "__main__":
    main()
