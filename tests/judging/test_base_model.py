"""Perplexity under the base model, and which model that is."""

import json
import math
import re

import pytest
import torch
from conftest import generate_words
from transformers import AutoModelForCausalLM

import generate
from neoflix.arguments.generate import parse_generate_args
from neoflix.judging.base_model import BaseModel, find_base_model


def test_perplexity_is_the_models_own(model_dir, titles):
    """One text at a time through plain transformers, in eager attention; the longest is cut at the window of 256."""
    base = BaseModel.load(str(model_dir))
    texts = ["One.", *titles[:11], "", " ".join(titles[:20])]
    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager").eval().to(base.model.device)
    losses = []
    for text in texts:
        ids = torch.tensor([[0, *base.tokenizer(text)["input_ids"]][:256]], device=model.device)
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        losses += [-logs[i, token].item() for i, token in enumerate(ids[0, 1:])]
    assert base.perplexity(texts) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-3)
    assert base.perplexity([""]) is None


def test_a_base_that_cannot_be_had_is_said_in_words(recorded_run, tmp_path, capsys):
    for words, reason in (
        (["--base_model", str(tmp_path / "none")], f"--base_model .*{tmp_path / 'none'}: not a folder"),
        (["--base_model", "none"], "--base_model none"),
    ):
        generate.main(generate_words(recorded_run, "--judge", *words))
        assert re.search(f"not measured: .*{reason}", capsys.readouterr().out)
    run = json.loads((recorded_run / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(run | {"model": "demo"}))
    args = parse_generate_args(["--model_dir", str(tmp_path), "--judge"])
    name, reason = find_base_model(args)
    assert name is None
    assert "random weights" in reason
    (tmp_path / "run.json").unlink()
    assert f"{tmp_path} has no record" in find_base_model(args)[1]
