"""The number of texts that grow at once by default."""

from types import SimpleNamespace

import pytest
import torch

from neoflix.sampling import slots
from neoflix.sampling.decoder import DecoderSettings
from neoflix.sampling.draw import Draw
from neoflix.sampling.sampler import Sampler
from neoflix.sampling.slots import choose_num_slots, find_ridge, measure_best, measure_rate

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def settings():
    return DecoderSettings(num_slots=1, num_places=40, seed=1, draw=Draw(1.0, 0, 0.95))


@pytest.fixture
def measured(monkeypatch):
    """measured({slots: tokens per second}) -> what was asked for, in order; no step is timed."""

    def measured(rates: dict[int, float], fitting: int = 10_000) -> list[int]:
        asked = []
        monkeypatch.setattr(slots, "count_fitting", lambda model, num_places: fitting)
        monkeypatch.setattr(slots, "measure_rate", lambda *given: asked.append(given[-1]) or rates[given[-1]])
        return asked

    return measured


def choose(num_texts: int, settings, device=CPU) -> int:
    return choose_num_slots(None, SimpleNamespace(device=device, dtype=torch.bfloat16), settings, num_texts)


def test_doubled_while_it_is_worthwhile(measured, settings):
    asked = measured({20: 100, 40: 130, 80: 160, 160: 170, 320: 400})
    assert choose(1000, settings) == 80
    assert asked == [20, 40, 80, 160]


def test_each_slot_is_used_twice(measured, settings):
    asked = measured({20: 100, 40: 200, 80: 400})
    assert choose(100, settings) == 40
    assert choose(79, settings) == 20
    assert asked == [20, 40]


def test_few_texts_are_not_measured(measured, settings):
    asked = measured({})
    assert [choose(number, settings) for number in (1, 7, 20, 21)] == [1, 7, 20, 20]
    assert not asked


def test_a_model_without_slots_keeps_small_batches(measured, settings):
    """transformers' `generate` has no step to time: its rate is 0."""
    measured(dict.fromkeys((20, 40, 80, 160, 320, 640), 0.0))
    assert choose(2000, settings) == 20


def test_no_more_than_fit(measured, settings):
    measured({20: 100, 40: 200, 80: 400, 160: 800}, fitting=90)
    assert choose(1000, settings) == 80
    measured({}, fitting=7)
    assert choose(1000, settings) == 7
    measured({}, fitting=0)  # the decoder says what is missing
    assert choose(1000, settings) == 1


@pytest.mark.parametrize(
    ("name", "clock", "width", "slots"),
    [
        ("NVIDIA GeForce RTX 3090", 9_751_000, 384, 80),  # 71 TFLOP/s, 936 GB/s
        ("NVIDIA H100 80GB HBM3", 2_619_000, 5120, 296),  # 989 TFLOP/s, 3.35 TB/s
        ("Tesla T4", 5_001_000, 256, 208),  # 65 TFLOP/s, 320 GB/s
        ("A card that is not in the table", 9_751_000, 384, 128),
        ("NVIDIA GeForce RTX 3090", 0, 0, 128),
    ],
)
def test_a_gpus_ridge(monkeypatch, measured, settings, name, clock, width, slots):
    properties = SimpleNamespace(name=name, memory_clock_rate=clock, memory_bus_width=width)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert find_ridge(CUDA, torch.bfloat16) == slots
    measured({})
    assert choose(10_000, settings, CUDA) == slots
    assert choose(50, settings, CUDA) == 50  # a step takes as long for fewer
    measured({}, fitting=30)
    assert choose(10_000, settings, CUDA) == 30


def test_a_step_is_timed(run_dir, settings):
    sampler = Sampler.load(run_dir, device="cpu")
    model = sampler.model
    assert measure_rate(sampler._make_decoder, model, settings, 20) > 0
    assert measure_best(sampler._make_decoder, model, settings, 39) == 20
    before = list(sampler.sample(num_samples=30, batch_size=7))
    assert list(sampler.sample(num_samples=90))[:30] == before
