"""What a run logs and shows."""

import math

from conftest import ON_CPU, history


def test_what_the_log_and_the_bar_say(run, capfd):
    folder = run("run", *ON_CPU, "--max_steps", "3", "--report_to", "tensorboard", "--disable_tqdm", "false")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    line = next(line for line in history(folder) if "loss" in line)
    assert line["peak_host_bytes"] > 100_000_000
    assert line["grad_norm"] > 0, "without ZeRO DeepSpeed forgets the norm it clips by"
    assert math.isfinite(line["tokens_per_second"])
    events = EventAccumulator(str(next((folder / "runs").rglob("events*")).parent))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/tokens_per_second", "train/peak_host_bytes", "train/grad_norm"} <= set(tags["scalars"])
    assert "samples/text_summary" in tags["tensors"]
    out, err = capfd.readouterr()
    bar = [line for line in err.splitlines() if line.startswith("Training:")]
    assert "tok/s=" in bar[-1]
    assert "GiB=" in bar[-1]
    assert "\r" not in err, "a log file's lines stay"
    assert out.count("Best model in") == 1
