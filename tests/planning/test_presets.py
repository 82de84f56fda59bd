"""Which DeepSpeed files of ours a machine can use."""

from conftest import ROOT, card

from neoflix.planning.presets import find_presets, missing_swap_folder
from neoflix.runtime.hardware import Machine


def test_presets_are_files_of_ours():
    for machine in (card(24), card(24, is_linked=True), Machine(2**30, None, 2)):
        for num_processes in (1, 4):
            presets = find_presets(machine, num_processes)
            assert len(presets) == len(set(presets))
            assert all((ROOT / name).is_file() for name in presets)


def test_order_depends_on_the_link_between_gpus():
    assert find_presets(card(24, is_linked=True), 4)[0] == "ds_configs/multi_gpu.json"
    assert find_presets(card(24), 4)[0] == "ds_configs/multi_gpu_zero1.json"
    assert find_presets(card(24), 1)[0] == "ds_configs/no_offload.json"
    assert find_presets(Machine(2**30, None, 2), 1) == ["ds_configs/cpu.json"]


def test_a_swap_folder_must_be_there(tmp_path):
    def config(folder) -> dict:
        return {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": str(folder)}}}

    assert missing_swap_folder(config(tmp_path)) is None
    assert missing_swap_folder(config(tmp_path / "none")) == str(tmp_path / "none")
    assert missing_swap_folder({"zero_optimization": {}}) is None
