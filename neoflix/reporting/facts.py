"""The facts of a run in lines, name and value: how it was started, and its figures."""

from neoflix.reporting.formats import format_duration, format_number, format_size
from neoflix.reporting.history import Record


def describe_setup(record: Record) -> dict[str, str]:
    """How the run was started; what its folder does not record is left out."""
    run, start = record.run, record.start
    texts = run.get("texts", {})
    held_out = start.get("num_validation_texts")
    versions = start.get("versions", {})
    lines = {
        "command": start.get("command"),
        "model": run.get("model"),
        "parameters": start.get("num_parameters") and f"{start['num_parameters']:,}, {start.get('precision')}",
        "texts": texts.get("dataset"),
        "column": texts.get("text_column"),
        "template": texts.get("template"),
        "loss": "on the prompts too" if texts.get("loss_on_prompt") else None,
        "LoRA": ", ".join(f"{name} {value:g}" for name, value in (run.get("lora") or {}).items()),
        "training texts": f"{run['num_training_texts']:,}" if "num_training_texts" in run else None,
        "held-out texts": None if held_out is None else f"{held_out:,}",
        "data hash": run.get("data"),
        "texts per step": run.get("texts_per_step"),
        "processes": start.get("num_processes"),
        "DeepSpeed file": start.get("deepspeed"),
        "hardware": start.get("hardware"),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "started": start.get("time"),
        "resumed": f"{len(record.starts) - 1} time(s), last from step {start['from_step']:,}"
        if len(record.starts) > 1
        else None,
        "changed while resuming": "; ".join(
            f"{each['setting']} {each['was']} -> {each['now']} from step {each['from_step']:,}"
            for each in run.get("changes", [])
        ),
    }
    return {name: str(value) for name, value in lines.items() if value}


def list_figures(record: Record) -> dict[str, str]:
    """The run's figures; those that it does not have are left out."""
    results, best, state = record.results, record.best or {}, record.state
    planned = (record.start.get("plan_seconds") or [None])[0]
    skipped, mfu = record.last("skipped_steps"), record.curve("mfu")[1]
    lines = {
        "perplexity before training": format_number(record.baseline and record.baseline["eval_perplexity"]),
        "perplexity of the best model": format_number(best.get("eval_perplexity")),
        "loss of the best model (nats per token)": format_number(best.get("eval_loss"), 4),
        "bits per character of the best model": format_number(best.get("eval_bits_per_char"), 4),
        "best step": f"{best['step']:,}, epoch {best['epoch']:.2f}" if best else "",
        "steps": "{:,} of at most {:,}".format(*record.num_steps),
        "epochs": format_number(state.get("epoch")),
        "real tokens/s": format_number(results.get("train_tokens_per_second"), 0),
        "MFU, mean": f"{sum(mfu) / len(mfu):.1%}" if mfu else "",
        "time since the last start": format_duration(record.last("train_runtime")),
        "time, planned": format_duration(planned),
        "device memory, peak": format_size(results.get("train_peak_device_bytes") or None),
        "device memory, planned": format_size(results.get("plan_device_bytes")),
        "host memory, peak": format_size(results.get("train_peak_host_bytes")),
        "host memory, planned": format_size(results.get("plan_host_bytes")),
        "skipped steps (fp16)": "" if skipped is None else f"{skipped:,}",
    }
    return {name: value for name, value in lines.items() if value}
