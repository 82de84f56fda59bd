"""The DeepSpeed files in ds_configs/, and which of them a machine can use."""

from pathlib import Path

from neoflix.runtime.hardware import Machine


def find_presets(machine: Machine, num_processes: int, is_fp16: bool = False) -> list[str]:
    """DeepSpeed files for this machine, the fastest first. `one_card.json` needs bf16.

    Without NVLink ZeRO-1 comes before ZeRO-2, because it sends gradients once per step and not once per batch.

    Args:
        is_fp16: whether the run is set to fp16.
    """
    if not machine.has_gpu:
        return ["ds_configs/cpu.json"]
    one = ["ds_configs/no_offload.json"]
    several = ["ds_configs/multi_gpu.json", "ds_configs/multi_gpu_zero1.json"]
    fast = one if num_processes == 1 else several if machine.is_linked else several[::-1]
    compact = ["ds_configs/one_card.json"] if machine.capability >= (8, 0) and not is_fp16 else []
    return [*fast, *compact, "ds_config.json", "ds_configs/zero3_offload.json", "ds_configs/nvme.json"]


def with_small_card(presets: list[str], num_processes: int, accumulation: int) -> list[str]:
    """The files that a run may be changed to: `auto` leaves out the one that clips gradients in another way."""
    if "ds_configs/one_card.json" not in presets or num_processes > 1 or accumulation > 1:
        return presets
    return [*presets, "ds_configs/one_small_card.json"]


def missing_swap_folder(config: dict) -> str | None:
    """The `nvme_path` of a DeepSpeed file if it is not a folder of this machine, else None."""
    block = config["zero_optimization"].get("offload_optimizer", {})
    if block.get("device") == "nvme" and not Path(block["nvme_path"]).is_dir():
        return block["nvme_path"]
    return None
