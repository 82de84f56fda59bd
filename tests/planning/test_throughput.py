"""FLOPs, peaks and MFU, against arithmetic and the makers' figures."""

from dataclasses import replace

import pytest
from conftest import tiny_config

from neoflix.arguments.reader import read_train_flags
from neoflix.planning.plan_run import plan_run
from neoflix.planning.throughput import PEAK_TFLOPS, flops_per_token, peak_flops, recomputed_flops_per_token


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("A100-SXM4-40GB", 312),  # older drivers leave NVIDIA out
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 3090", 71),
    ],
)
def test_peaks_are_found_by_the_whole_name(name, tflops):
    assert peak_flops(name, weight_bytes=2) == tflops * 1e12
    assert peak_flops(name, weight_bytes=4) is None, "fp32 products aren't bf16 products"


@pytest.mark.parametrize(
    "name",
    [
        *("NVIDIA RTX A1000", "NVIDIA RTX A400", "NVIDIA T400", "NVIDIA T400 4GB", "NVIDIA RTX 4000 Ada Generation"),
        *("NVIDIA GeForce RTX 3090 Laptop GPU", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"),
        *("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100", "Quadro RTX 6000", "a card of 24 GiB", ""),
    ],
)
def test_other_names_have_no_peak(name):
    assert peak_flops(name, weight_bytes=2) is None


def test_no_name_is_listed_with_its_maker():
    assert not any(name.startswith("NVIDIA ") for name in PEAK_TFLOPS)


def test_flops_by_hand():
    """Two products forward, two for inputs' gradients, two for weights'; attention's scores and values likewise."""
    assert flops_per_token(100, 2, 8, 10.0) == 6 * 100 + 6 * 2 * 8 * 10
    assert flops_per_token(100, 2, 8, 10.0, is_lora=True) == 4 * 100 + 6 * 2 * 8 * 10
    assert recomputed_flops_per_token(100, 2, 8, 10.0) == 2 * 100 + 2 * 2 * 8 * 10


@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize("recomputes", [False, True])
def test_utilization_counts_the_models_own_products(is_lora, recomputes, tmp_path):
    """MFU by hand: what is computed again never counts, whatever is trained."""
    tiny_config(hidden_size=64).save_pretrained(tmp_path)
    words = ["--model_name_or_path", str(tmp_path), "--dataset", "sample", "--cache_dir", str(tmp_path)]
    words += ["--lora", str(is_lora), "--activation_checkpointing", str(recomputes), "--plan_device_memory", "80GiB"]
    plan = plan_run(read_train_flags([*words, "--plan"]))
    assert plan.utilization(1000.0) is None, "no peak is known of a card that isn't there"
    assert plan.seconds() is None
    h100 = replace(plan, machine=replace(plan.machine, device_name="NVIDIA H100 80GB HBM3"))
    per_token = (4 if is_lora else 6) * plan.shape.num_parameters + 6 * 4 * 64 * plan.texts.mean
    assert h100.utilization(1000.0) == pytest.approx(1000 * per_token / 989e12)
    extra = 2 * plan.shape.num_parameters + 2 * 4 * 64 * plan.texts.mean if recomputes else 0
    assert plan.flops == pytest.approx(plan.settings.train_tokens * (per_token + extra))
    in_fp32 = replace(h100, settings=replace(plan.settings, weight_bytes=4))
    assert in_fp32.utilization(1000.0) is None
    on_cpu = plan_run(read_train_flags([*words[:-2], "--use_cpu", "true", "--deepspeed", "ds_configs/cpu.json"]))
    assert on_cpu.utilization(1000.0) is None
    assert on_cpu.seconds()[0] > 0
