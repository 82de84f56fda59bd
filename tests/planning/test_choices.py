"""What 'auto' stands for."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import GIB, NETFLIX, ROOT, card, forecast_of, plan_flags, shape_of

from neoflix.arguments.deepspeed_file import read_ds_config
from neoflix.planning.choices import choose_auto, choose_batch, choose_ds_config
from neoflix.planning.plan_run import plan_run
from neoflix.planning.presets import find_presets
from neoflix.runtime.hardware import Machine

# (model, GiB of a card, GiB of the host, cards, linked) -> the DeepSpeed file
CHOICES = [
    ("2.7B", 80, 256, 1, False, "ds_configs/no_offload.json"),
    ("2.7B", 48, 128, 1, False, "ds_configs/one_card.json"),
    ("2.7B", 24, 16, 1, False, "ds_configs/one_card.json"),
    ("2.7B", 16, 64, 1, False, "ds_config.json"),
    ("2.7B", 9, 64, 1, False, "ds_configs/zero3_offload.json"),
    ("1.3B", 48, 64, 1, False, "ds_configs/no_offload.json"),
    ("1.3B", 24, 16, 1, False, "ds_configs/one_card.json"),
    ("1.3B", 12, 16, 1, False, "ds_configs/one_card.json"),
    ("125M", 12, 16, 1, False, "ds_configs/no_offload.json"),
    ("2.7B", 48, 256, 4, True, "ds_configs/multi_gpu.json"),
    ("2.7B", 48, 256, 4, False, "ds_configs/multi_gpu_zero1.json"),
    ("2.7B", 24, 512, 2, True, "ds_configs/one_card.json"),
    ("1.3B", 24, 512, 8, True, "ds_configs/multi_gpu.json"),
]


@pytest.mark.parametrize(("size", "gib", "host", "cards", "linked", "expected"), CHOICES)
def test_auto_takes_the_fastest_that_fits(size, gib, host, cards, linked, expected, processes, capsys):
    processes(cards)
    machine = card(gib, host, num_devices=cards, is_linked=linked)
    flags = plan_flags("--deepspeed", "auto")
    choices = choose_auto(flags, shape_of(size), NETFLIX, machine)
    chosen, layers = choices["deepspeed"], choices["activation_checkpointing"]
    assert chosen == expected
    assert forecast_of(size, machine, "--activation_checkpointing", str(layers), deepspeed=chosen).fits
    order = find_presets(machine, cards)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("passed over ")]
    assert len(said) == order.index(chosen), "a line for each that is faster and does not fit"
    for name, line in zip(order, said, strict=False):
        assert not forecast_of(size, machine, "--activation_checkpointing", "true", deepspeed=name).fits
        assert line.startswith(f"passed over {name}: needs ")


def test_auto_recomputes_as_few_layers_as_needed():
    """With 1 GiB to spare; a card that has no bf16 has no compact optimizer."""
    flags = plan_flags("--deepspeed", "ds_configs/one_card.json", "--activation_checkpointing", "auto")
    for gib, most_layers in ((24, 8), (32, 0)):
        layers = choose_auto(flags, shape_of("2.7B"), NETFLIX, card(gib))["activation_checkpointing"]
        assert (0 < layers <= most_layers) if most_layers else layers == 0
        for count, is_roomy in ((layers, True), (layers - 1, False)):
            words = ["--activation_checkpointing", str(count) if count > 1 else "false"]
            plan = forecast_of("2.7B", card(gib), *words, deepspeed="ds_configs/one_card.json")
            if count >= 0:
                assert (plan.device_bytes <= (gib - 1) * GIB) == is_roomy
    turing = replace(card(24), capability=(7, 5))
    assert "ds_configs/one_card.json" not in find_presets(turing, 1)
    assert "ds_configs/one_card.json" not in find_presets(card(24), 1, is_fp16=True)
    assert "ds_configs/one_card.json" in find_presets(card(24), 1)


def test_auto_on_a_cpu_and_where_nothing_fits(processes):
    chosen, _ = choose_ds_config(plan_flags(), shape_of("125M"), NETFLIX, Machine(16 * GIB, None, 2))
    assert chosen == "ds_configs/cpu.json"
    with pytest.raises(ValueError, match="none fits"):
        choose_ds_config(plan_flags(), shape_of("2.7B"), NETFLIX, card(4, 8))


def test_auto_batch_is_the_largest_that_fits(processes):
    config = read_ds_config("ds_config.json")

    def fits(tokens: int) -> bool:
        return forecast_of("2.7B", card(16), "--tokens_per_device_batch", str(tokens)).fits

    tight = choose_batch(plan_flags(), shape_of("2.7B"), NETFLIX, card(16), config)
    assert fits(tight)
    assert not fits(tight + 64)
    roomy = choose_batch(plan_flags(), shape_of("125M"), NETFLIX, card(80), config)
    assert roomy == int(7008 * 31.8 / 50) // 64 * 64, "an epoch keeps 50 steps"


def test_one_process_decides_for_all(model_dir, catalogue):
    """Its answer names a file by the project's folder, which may lie elsewhere on another machine."""
    asked = []

    def decide(function, *args):
        asked.append(function(*args))
        return asked[-1]

    flags = plan_flags("--model_name_or_path", str(model_dir), "--dataset", str(catalogue), "--use_cpu", "true")
    flags.deepspeed = flags.tokens_per_device_batch = "auto"
    plan = plan_run(flags, decide)
    (choices,) = asked
    assert choices["deepspeed"] == "ds_configs/cpu.json"
    assert Path(flags.deepspeed).resolve() == ROOT / "ds_configs" / "cpu.json"
    assert flags.tokens_per_device_batch == choices["tokens_per_device_batch"] == plan.settings.budget > 0


def test_flags_that_are_set_are_not_chosen():
    assert choose_auto(plan_flags(), shape_of("125M"), NETFLIX, card(24)) == {}
