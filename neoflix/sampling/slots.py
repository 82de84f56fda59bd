"""How many texts are written at once by default: as many as make the device faster, and no more.

A step reads every weight once, however many texts share it, so more texts cost almost nothing until the products take
longer than reading the weights (the ridge of the roofline: Williams et al., "Roofline: An Insightful Visual Performance
Model for Multicore Architectures", CACM 2009). On a GPU that point is known; on a CPU it is measured.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from neoflix.planning.throughput import peak_flops
from neoflix.sampling.decoder import Decoder, DecoderSettings
from neoflix.sampling.slot_cache import PLACES, count_fitting

FEWEST = 20  # not worth a measurement
MOST = 640
GPU_RIDGE = 128  # if a GPU's peak or bandwidth is not known: between an RTX 3090's 76 and an H100's 295
WORTHWHILE = 1.1  # twice as many texts at once must write so many times as many tokens per second


def choose_num_slots(make_decoder: Callable, model: PreTrainedModel, settings: DecoderSettings, num_texts: int) -> int:
    """The number of texts that should grow at once.

    Args:
        make_decoder: what makes a `Decoder` of the model and settings. On a CPU it makes a few, to time a step of each.
        settings: all but `num_slots`, which is ignored.
        num_texts: number of texts to write. A larger number is worth some seconds of measurement.
    """
    if num_texts <= FEWEST:
        return num_texts
    fitting = max(1, count_fitting(model, settings.num_places))
    if model.device.type == "cuda":
        return min(num_texts, fitting, find_ridge(model.device, model.dtype))
    # Each slot should be used twice or more: otherwise many steps at the end would grow the few longest texts.
    return min(fitting, measure_best(make_decoder, model, settings, min(num_texts // 2, fitting, MOST)))


def find_ridge(device: torch.device, dtype: torch.dtype) -> int:
    """The number of texts at which a GPU's products take as long as reading the weights, a multiple of 8.

    A weight of 2 bytes takes part in 2 FLOP for each text.
    """
    properties = torch.cuda.get_device_properties(device)
    peak = peak_flops(properties.name, dtype.itemsize)
    bytes_per_second = 2 * properties.memory_clock_rate * 1e3 * properties.memory_bus_width / 8  # kHz, double data rate
    if not peak or not bytes_per_second:
        return GPU_RIDGE
    return max(FEWEST, math.ceil(peak / bytes_per_second / 8) * 8)


def measure_best(make_decoder: Callable, model: PreTrainedModel, settings: DecoderSettings, most: int) -> int:
    """The number of slots, 20 or twice, four times, ... that, at most `most`, writes the most tokens per second."""
    best, rate = FEWEST, None
    while 2 * best <= most:
        rate = rate or measure_rate(make_decoder, model, settings, best)
        doubled = measure_rate(make_decoder, model, settings, 2 * best)
        if doubled <= WORTHWHILE * rate:  # both are 0 without slots
            break
        best, rate = 2 * best, doubled
    return best


@torch.inference_mode()
def measure_rate(make_decoder: Callable, model: PreTrainedModel, settings: DecoderSettings, num_slots: int) -> float:
    """Tokens per second of the faster of two steps with so many slots; 0 if the decoder has none."""
    decoder = make_decoder(model, replace(settings, num_slots=num_slots, num_places=PLACES))
    if not isinstance(decoder, Decoder):
        return 0.0
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        decoder._advance(PLACES)
        seconds.append(time.perf_counter() - began)
    return num_slots / min(seconds)
