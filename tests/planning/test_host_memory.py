"""Host memory: the offloaded optimizer by arithmetic."""

from dataclasses import replace

import pytest
from conftest import GIB, NETFLIX, card, forecast_of, shape_of

from neoflix.arguments.deepspeed_file import read_ds_config
from neoflix.arguments.reader import read_train_flags
from neoflix.model.shape import SMOLLM2_SHAPE
from neoflix.planning.forecast import forecast
from neoflix.planning.lengths import Texts
from neoflix.planning.settings import read_settings
from neoflix.runtime.hardware import Machine


def test_host_memory_of_the_offloads(processes):
    """18 bytes per parameter and the embedding in transit, on as many processes as there are; pinned buffers rounded
    up to a power of two if torch does that; NVMe: bf16 gradients and four buffers of a sub-group."""
    shape = shape_of("2.7B")

    def held(name: str, machine: Machine = card(24), **more) -> float:  # noqa: B008
        found = forecast_of("2.7B", machine, deepspeed=name)
        found = forecast(shape, NETFLIX, replace(found.settings, **more), machine)
        phase = found.host_phases["train"]
        return sum(phase.values()) - phase["Python, torch, DeepSpeed"]

    embedding = 2 * shape.embedding
    plain = {"rounds_pinned": False}
    assert held("ds_config.json", **plain) == pytest.approx(18 * shape.num_parameters + embedding, rel=1e-6)
    with_sums = held("ds_config.json", accumulation=2, **plain)
    assert with_sums == pytest.approx(20 * shape.num_parameters + embedding, rel=1e-6)
    assert held("ds_config.json", rounds_pinned=True) / GIB == pytest.approx(
        16 + 16 + 8 + 0.25 + 8 * 2.65e9 / GIB, rel=0.01
    )
    assert held("ds_configs/zero3_offload.json", **plain) == pytest.approx(20 * shape.num_parameters, rel=1e-6)
    config = read_ds_config("ds_configs/zero3_offload.json")
    config["zero_optimization"]["offload_optimizer"]["ratio"] = 0.8  # Twin-Flow
    partly = held("ds_configs/zero3_offload.json", ds_config=config, **plain)
    assert partly < 0.9 * held("ds_configs/zero3_offload.json", **plain)
    assert held("ds_configs/nvme.json", **plain) == pytest.approx(2 * 2.65e9 + 4 * 4 * 1.29e8, rel=0.02)
    one = held("ds_config.json", **plain)
    processes(4)
    assert held("ds_config.json", **plain) == pytest.approx((one - embedding) / 4 + embedding, rel=1e-6)
    processes(4, on_a_node=2)
    halves = forecast_of("2.7B", card(24))
    assert halves.host_bytes == 2 * sum(halves.host.values()), "a node holds its own processes only"


def test_memory_of_a_llama_is_what_was_measured():
    """SmolLM2-135M on data/sample_titles.csv, ZeRO-0 in fp32 on two cores, 16 texts at once, GiB."""
    shape, texts, machine = SMOLLM2_SHAPE, Texts(357, 43, 36.5, 9.07, 66, "given"), Machine(2**40, None, 2)
    for words, measured in (([], 3.68), (["--lora", "true"], 2.86)):
        args = read_train_flags(["--plan", "--per_device_train_batch_size", "16", *words])
        settings = read_settings(args, shape, texts, machine, {})
        assert forecast(shape, texts, settings, machine).host_bytes / 2**30 == pytest.approx(measured, rel=0.1)
