"""What to change when a run does not fit: presets, and the smallest change that helps."""

from dataclasses import replace
from pathlib import Path

from neoflix.arguments.deepspeed_file import read_ds_config
from neoflix.arguments.quick import LORA_RANK
from neoflix.model.shape import HUB_SHAPES, gpt_neo_shape
from neoflix.planning.forecast import Plan, forecast
from neoflix.planning.table import plan_table
from neoflix.runtime.console import GIB
from neoflix.runtime.files import ROOT
from neoflix.runtime.gpus import PINNED_MEMORY
from neoflix.runtime.hardware import Machine


def presets(machine: Machine, num_processes: int) -> list[str]:
    """The shipped set-ups that this machine can run, fastest first.

    Where GPUs have no NVLink ZeRO-1 comes before ZeRO-2: it sends gradients once a step, not once a batch.
    """
    if not machine.has_gpu:
        return ["ds_configs/cpu.json"]
    alone = ["ds_configs/no_offload.json"]
    many = ["ds_configs/multi_gpu.json", "ds_configs/multi_gpu_zero1.json"]
    fast = alone if num_processes == 1 else many if machine.is_linked else many[::-1]
    return [*fast, "ds_config.json", "ds_configs/zero3_offload.json", "ds_configs/nvme.json"]


def _cannot_swap(config: dict) -> str | None:
    block = config["zero_optimization"].get("offload_optimizer", {})
    if block.get("device") == "nvme" and not Path(block["nvme_path"]).is_dir():
        return f"its nvme_path {block['nvme_path']} is no folder here"
    return None


def explain(plan: Plan) -> str:
    """A plan that does not fit: its table, what is too large, and the three smallest changes that would make it fit."""
    lines = ["this run does not fit", plan_table(plan)]
    for what, needed, there, largest in plan.over_budget():
        lines.append(f"too large: {needed / GIB:.1f} GiB of {what}, {there / GIB:.1f} GiB are there; {largest}")
    found = smallest_changes(plan)
    lines += [f"  {words}: {_describe_cost(changed, plan)}" for words, changed in found]
    if not found:
        lines.append("nothing that this project knows would make it fit: take a smaller model or a larger machine")
    return "\n".join(lines)


LEARNS_WORSE = "bf16_states.json"  # a last resort: `auto` never takes it


def _describe_cost(plan: Plan, before: Plan) -> str:
    device = f"device {plan.device_bytes / GIB:.1f} GiB, " if plan.machine.has_gpu else ""
    price = "; learns worse (ds_configs/bf16_states.md)" if plan.settings.ds_name == LEARNS_WORSE else ""
    price += "; adapters alone learn (docs/lora.md)" if plan.settings.lora_rank > before.settings.lora_rank else ""
    return f"{device}host {plan.host_bytes / GIB:.1f} GiB, disk {plan.run_bytes / GIB:.1f} GiB{price}"


def smallest_changes(plan: Plan, most: int = 3) -> list[tuple[str, Plan]]:
    """The first changes, from the least to the most that they ask for, with which the run fits: (words, its plan)."""
    found = {}
    for words, changed in _changes(plan):
        parts = frozenset(words.removeprefix("--").split(" --"))
        if changed.fits and not any(fewer <= parts for fewer in found):
            found[parts] = (words, changed)
        if len(found) == most:
            break
    return list(found.values())


def smaller_runs(plan: Plan, most: int = 3) -> list[tuple[str, Plan]]:
    """The first changes with which the run takes at least a tenth less of the device or of the host than planned: for a
    run that failed although it seemed to fit."""
    tight = replace(plan.machine, host_memory=int(0.9 * plan.host_bytes))
    if plan.machine.has_gpu:
        taken = plan.machine.device_memory - int(0.9 * plan.device_bytes)
        tight = replace(plan.machine, device_taken=max(plan.machine.device_taken, taken))
    return smallest_changes(replace(plan, machine=tight), most)


def _changes(plan: Plan):
    """Single changes first; then pairs, of one that helps without sufficing and another; then smaller models."""
    kinds = (_batch_changes, _recomputing, _disk_changes, _host_changes, _preset_changes, _last_resorts)
    singles = [change for kind in kinds for change in kind(plan)]
    yield from singles
    for words, changed in singles:
        if not changed.fits and _excess(changed) < _excess(plan):
            for kind in kinds:
                yield from (
                    (f"{words} {others}", both) for others, both in kind(changed) if _flags(others) != _flags(words)
                )
    for name, known in reversed(HUB_SHAPES.items()):
        smaller = gpt_neo_shape(known)
        if smaller.num_parameters < plan.shape.num_parameters * 0.9:
            yield f"--model_name_or_path {name}", forecast(smaller, plan.texts, plan.settings, plan.machine)


def _excess(plan: Plan) -> int:
    return sum(needed - there for _, needed, there, _ in plan.over_budget())


def _flags(words: str) -> set[str]:
    return {word for word in words.split() if word.startswith("--")}


def _with(plan: Plan, **changes) -> Plan:
    return forecast(plan.shape, plan.texts, replace(plan.settings, **changes), plan.machine)


def _cheaper_batch(plan: Plan, divisor: int) -> dict:
    settings, texts, packed = plan.settings, plan.texts, plan.shape.is_gpt_neo
    cheaper = {"accumulation": settings.accumulation * divisor}
    if settings.batch_texts is None:
        budget = settings.budget // divisor
        tokens, padding = texts.of_budget(budget, packed), texts.padding(None, budget, packed)
        return cheaper | {"budget": budget, "batch_tokens": tokens, "padding": padding}
    count = settings.batch_texts // divisor
    tokens, padding = texts.of_batch(count, packed), texts.padding(count, None, packed)
    return cheaper | {"batch_texts": count, "batch_tokens": tokens, "padding": padding}


def _batch_changes(plan: Plan):
    """Smaller batches, more of them a step; the largest that fits comes first."""
    texts, divisor = plan.settings.batch_texts, 2
    while (texts or plan.settings.budget // max(plan.texts.longest, 1)) // divisor >= 1:
        cheaper = _cheaper_batch(plan, divisor)
        flag, count = ("per_device_train_batch_size", texts and texts // divisor)
        if texts is None:
            flag, count = "tokens_per_device_batch", cheaper["budget"]
        words = f"--{flag} {count} --gradient_accumulation_steps {cheaper['accumulation']}"
        changed = _with(plan, **cheaper, eval_tokens=min(plan.settings.eval_tokens, cheaper["batch_tokens"]))
        if changed.fits or texts == divisor:
            yield words, changed
            return
        divisor *= 2


def _recomputing(plan: Plan):
    if not plan.settings.recomputes:
        yield "--activation_checkpointing true", _with(plan, recomputes=True)


def _disk_changes(plan: Plan):
    if plan.settings.num_checkpoints > 2:
        yield "--save_total_limit 1", _with(plan, num_checkpoints=2)
    if plan.settings.num_checkpoints:
        yield "--save_strategy no", _with(plan, num_checkpoints=0)


def _host_changes(plan: Plan):
    if plan.settings.rounds_pinned and plan.pinned_bytes:
        yield f"PYTORCH_ALLOC_CONF={PINNED_MEMORY}", _with(plan, rounds_pinned=False)


def _preset_changes(plan: Plan):
    for name in presets(plan.machine, plan.settings.num_processes):
        config = read_ds_config(ROOT / name)
        if Path(name).name != plan.settings.ds_name and not _cannot_swap(config):
            yield f"--deepspeed {name}", _with(plan, ds_config=config, ds_name=Path(name).name)


def _last_resorts(plan: Plan):
    """What changes what is learnt, not only how."""
    if not plan.settings.lora_rank:
        yield "--lora true", _with(plan, lora_rank=LORA_RANK)
    if plan.machine.capability >= (8, 0) and plan.settings.weight_bytes == 2 and plan.settings.ds_name != LEARNS_WORSE:
        config = read_ds_config(ROOT / "ds_configs" / LEARNS_WORSE)
        words = f"--bf16 true --deepspeed ds_configs/{LEARNS_WORSE}"
        yield words, _with(plan, ds_config=config, ds_name=LEARNS_WORSE)


def explain_failure(plan: Plan | None, error: str, allocated: int, reserved: int, host: int) -> str:
    """Out of memory: the plan's table beside the allocator's figures, and the smallest changes from here.

    Args:
        allocated, reserved, host: peaks in bytes: what torch handed out and held on the device, 0 without a GPU, and
            what this process had of the host.
    """
    device = f"torch handed out {allocated / GIB:.1f} GiB at the peak and held {reserved / GIB:.1f} GiB; "
    lines = [f"out of memory: {error.splitlines()[0]}"]
    lines += [f"{device if reserved else ''}this process had {host / GIB:.1f} GiB of the host's memory"]
    changes = smaller_runs(plan) if plan else []
    if plan:
        lines += [plan_table(plan)]
    lines += ["what would take less:"] if changes else ["a smaller --per_device_train_batch_size would take less"]
    return "\n".join([*lines, *(f"  {words}: {_describe_cost(changed, plan)}" for words, changed in changes)])
