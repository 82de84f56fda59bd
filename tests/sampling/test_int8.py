"""Linear layers in 8-bit integers: close to fp32, also beside large features, and the same for a row in any batch."""

import json

import pytest
import torch
from conftest import OTHERS
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from neoflix.arguments.generate import parse_generate_args
from neoflix.model.load import load_pretrained
from neoflix.runtime.errors import UserError
from neoflix.sampling.inference import optimize_for_inference
from neoflix.sampling.int8 import Int8Linear, find_block, hadamard
from neoflix.sampling.sample_files import SampleFile, open_output
from neoflix.sampling.sampler import Sampler


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("size", [1, 2, 64])
def test_the_rotation_is_orthogonal(size):
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size))
    assert matrix.abs().unique().numel() == 1


def test_blocks_divide_the_features():
    assert [find_block(size) for size in (768, 576, 100, 6, 7)] == [64, 64, 4, 2, 1]


@pytest.mark.parametrize(("num_features", "has_bias"), [(768, True), (100, False), (7, True)])
def test_the_layer_is_close_to_the_one_in_fp32(num_features, has_bias):
    torch.manual_seed(0)
    linear = nn.Linear(num_features, 48, bias=has_bias).requires_grad_(False)
    x = torch.randn(2, 5, num_features)
    found = Int8Linear(linear.weight, linear.bias)(x)
    assert found.shape == (2, 5, 48)
    assert relative_error(found, linear(x)) < 0.02


def test_a_large_feature_does_not_drown_the_others():
    """The large feature has no weight here, so that the others alone make the output."""
    torch.manual_seed(0)
    linear = nn.Linear(768, 48, bias=False).requires_grad_(False)
    linear.weight[:, 3] = 0
    x = torch.randn(20, 768)
    x[:, 3] = 100
    assert relative_error(Int8Linear(linear.weight, None)(x), linear(x)) < 0.06  # without the rotation 0.23


def test_a_row_does_not_depend_on_the_others():
    torch.manual_seed(0)
    layer, x = Int8Linear(torch.randn(48, 768), torch.randn(48)), torch.randn(20, 768)
    x[4] = 0
    together = layer(x)
    assert torch.equal(together, torch.cat([layer(row.unsqueeze(0)) for row in x]))
    assert torch.equal(together[:7], layer(x[:7]))
    assert together.isfinite().all()


def test_a_model_loses_little(model_dir, tmp_path):
    """GPT-Neo, and GPT-2, whose layers have transposed weights."""
    torch.manual_seed(0)
    ids = torch.randint(1, 500, (8, 40))
    AutoModelForCausalLM.from_config(OTHERS["gpt2"]).save_pretrained(tmp_path)
    for folder in (model_dir, tmp_path):
        model, rounded = (load_pretrained(str(folder), torch.float32).eval() for _ in range(2))
        optimize_for_inference(rounded, 20, int8=True)
        kept = [type(module) for module in rounded.modules() if type(module).__name__ in ("Linear", "Conv1D")]
        assert not kept
        with torch.inference_mode():
            expected, found = model(ids).logits, rounded(ids).logits
        assert 0 < relative_error(found, expected) < 0.1
        losses = [cross_entropy(x[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for x in (expected, found)]
        torch.testing.assert_close(losses[1], losses[0], rtol=0.01, atol=0)


def test_text_i_is_the_same_in_any_batch(run_dir):
    sampler = Sampler.load(run_dir, device="cpu", int8=True)
    assert any(isinstance(module, Int8Linear) for module in sampler.model.modules())
    texts = {}
    for batch_size in (1, 3, 7):
        samples = sampler.sample(seed=5, num_samples=7, batch_size=batch_size, max_new_tokens=20)
        texts[batch_size] = [sample.text for sample in samples]
    assert texts[1] == texts[3] == texts[7]
    assert len(set(texts[1])) == 7


def test_a_gpu_is_refused_before_the_model_is_loaded(tmp_path):
    with pytest.raises(UserError, match=r"--int8: .* on a CPU; leave it out"):
        Sampler.load(tmp_path / "none", device="cuda", int8=True)


def test_a_cpu_without_the_instructions_is_slower_and_says_so(run_dir, monkeypatch, capsys):
    for has_them in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has_them=has_them: {"avx512_vnni": has_them})
        Sampler.load(run_dir, device="cpu", int8=True)
        assert ("slower than fp32" in capsys.readouterr().out) is not has_them


def test_a_file_is_not_continued_in_another_precision(run_dir, tmp_path):
    path = str(tmp_path / "samples.jsonl")

    def open_as(*flags: str) -> SampleFile:
        args = parse_generate_args(["--model_dir", str(run_dir), "--output", path, "--num_samples", "2", *flags])
        return open_output(args, run_dir, [""])

    class Row:
        to_dict = staticmethod(dict)

    for begun, other in (((), ("--int8", "true")), (("--int8", "true"), ())):
        for name in ("", ".job"):
            (tmp_path / f"samples.jsonl{name}").unlink(missing_ok=True)
        next(writer := open_as(*begun).append(iter([Row(), Row()])))
        writer.close()
        with pytest.raises(UserError, match=r"was started with other int8 \((True|False), now (True|False)\)"):
            open_as(*other)
        assert open_as(*begun).num_done == 1
    note = tmp_path / "samples.jsonl.job"
    of_earlier_release = {name: value for name, value in json.loads(note.read_text()).items() if name != "int8"}
    note.write_text(json.dumps(of_earlier_release))
    assert open_as().num_done == 1
