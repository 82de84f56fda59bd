"""The facts of a run, name and value; what is not known is left out."""

from conftest import make_record

from neoflix.reporting.facts import describe_setup, list_figures


def test_figures():
    record = make_record([6, 5], [3, 2, 1])
    record.results.update({"train_tokens_per_second": 1234.5, "train_peak_host_bytes": 2**30, "plan_host_bytes": 2**29})
    figures = list_figures(record)
    assert (figures["perplexity before training"], figures["perplexity of the best model"]) == ("8.00", "2.00")
    assert (figures["real tokens/s"], figures["best step"]) == ("1,234", "20, epoch 2.00")
    assert (figures["host memory, peak"], figures["host memory, planned"]) == ("1.0 GiB", "512.0 MiB")
    assert "device memory, peak" not in figures


def test_setup():
    record = make_record([6], [8, 5])
    record.run.update({"model": "demo", "lora": {"rank": 4, "alpha": 8.0}, "texts": {"dataset": "x.csv"}})
    record.run["changes"] = [{"setting": "learning_rate", "was": 0.1, "now": 0.2, "from_step": 1000}]
    record.starts.append({"command": "train.py", "from_step": 1000, "versions": {"torch": "2"}})
    setup = describe_setup(record)
    assert (setup["command"], setup["model"], setup["texts"]) == ("train.py", "demo", "x.csv")
    assert setup["LoRA"] == "rank 4, alpha 8"
    assert setup["training texts"] == "5,000"
    assert setup["changed while resuming"] == "learning_rate 0.1 -> 0.2 from step 1,000"
    assert setup["resumed"].endswith("step 1,000")
    assert "template" not in setup
