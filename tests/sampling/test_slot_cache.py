"""The memory of keys and values is known before the first step."""

import pytest
import torch

from neoflix.model.load import load_pretrained
from neoflix.sampling import slot_cache
from neoflix.sampling.slot_cache import check_memory, find_windows, place_bytes


def test_too_little_memory_says_what_fits(model_dir, monkeypatch):
    model = load_pretrained(str(model_dir), torch.float32).eval()
    a_text = 100 * place_bytes(model) + 16 * 500
    assert place_bytes(model) == 2 * 4 * 32 * 4
    monkeypatch.setattr(slot_cache, "read_host_memory", lambda: 7 * a_text + 1)
    check_memory(model, 7, 100)
    with pytest.raises(ValueError, match=r"--batch_size 8: texts of up to 100 tokens .* --batch_size 7 would fit"):
        check_memory(model, 8, 100)
    monkeypatch.setattr(slot_cache, "read_host_memory", lambda: a_text - 1)
    with pytest.raises(ValueError, match="lower --max_new_tokens"):
        check_memory(model, 1, 100)


def test_windows_by_older_versions_of_transformers(model_dir, monkeypatch):
    """transformers 5.17 gives one set of options for all layers."""
    model = load_pretrained(str(model_dir), torch.float32)
    for kinds, options in (
        (["full_attention", "sliding_attention"], [{}, {"sliding_window": 9}]),
        (["full_attention", "sliding_attention"], {"sliding_window": 9}),
    ):
        monkeypatch.setattr(slot_cache, "get_layer_types_and_kwargs", lambda _, found=(kinds, options): found)
        assert find_windows(model) == {"full_attention": None, "sliding_attention": 9}
