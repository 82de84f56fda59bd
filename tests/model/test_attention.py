"""Ours = transformers' eager attention, wherever eager is right."""

from functools import partial

import pytest
import torch
from accelerate.utils import send_to_device
from conftest import tiny_config
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import DynamicCache, GPTNeoForCausalLM, StaticCache

from neoflix.data.packing import PackedCollator, TextLayout, group_by_length, lay_out_texts
from neoflix.model.attention import ATTENTION_NAME

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


@pytest.fixture(scope="module")
def pair():
    """(eager model, the same model with our attention)"""
    torch.manual_seed(1)
    config = tiny_config(max_position_embeddings=2048)
    eager = GPTNeoForCausalLM._from_config(config, attn_implementation="eager").eval()
    ours = GPTNeoForCausalLM._from_config(tiny_config(max_position_embeddings=2048), attn_implementation=ATTENTION_NAME)
    ours.load_state_dict(eager.state_dict())
    return eager, ours.eval()


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 500, shape, generator=torch.Generator().manual_seed(7))


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 40, 200])
def test_logits_below_and_above_the_window(pair, length):
    eager, ours = pair
    ids = random_ids(2, length)
    torch.testing.assert_close(ours(ids).logits, eager(ids).logits, **TOLERANCE)


def test_logits_at_full_length(pair):
    eager, ours = pair
    ids = random_ids(1, 2048)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, eager(ids).logits, **TOLERANCE)


@pytest.mark.parametrize("length", [12, 40])
def test_gradients(pair, length):
    ids = random_ids(2, length)
    theirs, mine = (gradients(model, model(ids, labels=ids).loss) for model in pair)
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], atol=2e-5, rtol=1e-3)


# Lengths around the window (16), around a length class (16, 32), and of one token.
@pytest.mark.parametrize("lengths", [[5, 40, 1, 17, 16, 30], [30, 17], [1, 1], [33], [16, 16, 16], [100, 2]])
def test_packed_texts_are_texts_alone(pair, lengths):
    eager, ours = pair
    texts = random_ids(1, sum(lengths)).split(lengths, dim=1)
    position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    options = {"position_ids": position_ids, "use_cache": False}
    packed = ours(torch.cat(texts, 1), attention_mask=lay_out_texts(lengths), **options).logits
    without_layout = ours(torch.cat(texts, 1), **options).logits  # transformers' dense mask
    alone = torch.cat([eager(text).logits for text in texts], 1)
    torch.testing.assert_close(packed, alone, **TOLERANCE)
    torch.testing.assert_close(without_layout, alone, **TOLERANCE)


def test_packed_rows_of_a_batch_stay_apart(pair):
    eager, ours = pair
    ids = random_ids(2, 24)
    position_ids = torch.stack(
        [torch.cat([torch.arange(20), torch.arange(4)]), torch.cat([torch.arange(3), torch.arange(21)])]
    )
    packed = ours(ids, position_ids=position_ids, use_cache=False).logits
    first = torch.cat([eager(ids[:1, :20]).logits, eager(ids[:1, 20:]).logits], 1)
    second = torch.cat([eager(ids[1:, :3]).logits, eager(ids[1:, 3:]).logits], 1)
    torch.testing.assert_close(packed, torch.cat([first, second]), **TOLERANCE)


def test_packed_gradients_with_checkpointing(pair):
    _, ours = pair
    ids = random_ids(1, 60)
    position_ids = torch.cat([torch.arange(20), torch.arange(40)]).unsqueeze(0)
    layout = lay_out_texts([20, 40])
    batch = {
        "input_ids": ids,
        "labels": ids,
        "position_ids": position_ids,
        "attention_mask": layout,
        "use_cache": False,
    }
    plain = gradients(ours, ours(**batch).loss)
    for block in ours.transformer.h:  # what Trainer's --gradient_checkpointing switches on
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    ours.train()
    checkpointed = gradients(ours, ours(**batch).loss)
    ours.eval()
    for block in ours.transformer.h:
        block.gradient_checkpointing = False
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], **TOLERANCE)


def test_left_padding(pair):
    eager, ours = pair
    ids, mask = random_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :25] = 0
    batch = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    theirs, mine = eager(ids, **batch).logits, ours(ids, **batch).logits
    assert mine.isfinite().all()
    torch.testing.assert_close(mine[mask.bool()], theirs[mask.bool()], **TOLERANCE)


def test_right_padding(pair):
    eager, ours = pair
    ids, mask = random_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, 25:] = 0
    real = ours(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(real, eager(ids, attention_mask=mask).logits[mask.bool()], **TOLERANCE)


T = 40  # beyond the window of 16
CAUSAL = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
PADDED = torch.ones(2, T, dtype=torch.long).index_fill(1, torch.arange(5), 0)
LOWEST = torch.finfo(torch.float32).min
BIASES = -0.3 * torch.arange(T).float() * torch.arange(1, 5).view(1, 4, 1, 1)
MASKS = {
    "2-D": PADDED,
    "2-D, bool": PADDED.bool(),
    "2-D, float": PADDED.float(),
    "4-D float, causal": torch.zeros(1, 1, T, T).masked_fill(~CAUSAL, LOWEST),
    "4-D float, causal, -inf": torch.zeros(1, 1, T, T).masked_fill(~CAUSAL, -torch.inf),
    "4-D float, padding": torch.zeros(2, 1, T, T).masked_fill(~(CAUSAL & PADDED.bool()[:, None, None]), LOWEST),
    "4-D float, all queries": torch.zeros(2, 1, 1, T).masked_fill(~PADDED.bool()[:, None, None], LOWEST),
    "4-D float, nothing": torch.zeros(1, 1, T, T),
    "4-D float, biases": BIASES.expand(1, 4, T, T),
    "4-D half, biases": BIASES.half().expand(1, 4, T, T),
    "4-D bool, causal": CAUSAL,
    "4-D bool, nothing": torch.ones(1, 1, T, T, dtype=torch.bool),
    "4-D long, causal": CAUSAL.long(),
    "4-D long, nothing": torch.ones(1, 1, T, T, dtype=torch.long),
    "4-D long, two rows": CAUSAL.long().expand(2, 1, T, T),
    "4-D int, added": (1 - PADDED.int()[:, None, None]) * -10000,
    "4-D long, zeros": torch.zeros(1, 1, T, T, dtype=torch.long),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_are_eagers(pair, mask):
    """Eager adds whatever it is given to the scores, and sees neither later tokens nor those outside the window."""
    eager, ours = pair
    ids, is_real = random_ids(2, T), PADDED.bool() if mask.shape[0] == 2 else torch.ones(2, T, dtype=torch.bool)
    theirs, mine = eager(ids, attention_mask=mask).logits, ours(ids, attention_mask=mask).logits
    assert mine.isfinite().all()
    torch.testing.assert_close(mine[is_real], theirs[is_real], **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_masks_of_ones_and_zeros_hide_padding(pair, dtype):
    eager, ours = pair
    ids, mask = random_ids(2, T), (CAUSAL & PADDED.bool()[:, None, None]).to(dtype)
    theirs, mine = eager(ids, attention_mask=PADDED).logits, ours(ids, attention_mask=mask).logits
    torch.testing.assert_close(mine[PADDED.bool()], theirs[PADDED.bool()], **TOLERANCE)


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bool, torch.float32, torch.long])
def test_masks_with_a_cache(pair, dtype, is_static):
    """A prompt, several tokens at once beyond the window, then one by one."""
    eager, ours = pair
    ids = random_ids(2, T)
    cache = StaticCache(config=ours.config, max_cache_len=64) if is_static else DynamicCache(config=ours.config)
    pieces, at = [], 0
    for length in (10, 20, 1, 9):
        num_keys = 64 if is_static else at + length
        mask = torch.arange(num_keys) <= torch.arange(at, at + length).unsqueeze(1)
        mask = mask.expand(2, 1, -1, -1)
        if dtype is not None:
            mask = torch.zeros(mask.shape).masked_fill(~mask, LOWEST) if dtype.is_floating_point else mask.to(dtype)
        mask = mask if dtype is not None else None
        pieces.append(ours(ids[:, at : at + length], attention_mask=mask, past_key_values=cache).logits)
        at += length
    torch.testing.assert_close(torch.cat(pieces, 1), eager(ids).logits, **TOLERANCE)


POSITIONS = (PADDED.cumsum(1) - 1).clamp(min=0)
BATCHES = {
    "no mask": {},
    "no cache": {"use_cache": False},
    "padded on the left": {"attention_mask": PADDED, "position_ids": POSITIONS},
    "padded on the right": {"attention_mask": PADDED.flip(1)},
    "packed": {"position_ids": torch.cat([torch.arange(15), torch.arange(25)]).expand(2, T), "use_cache": False},
}


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_forward_pass_is_one_graph(pair, batch, backend):
    _, ours = pair
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(ours, backend=backend, fullgraph=True)(random_ids(2, T), **batch).logits
        plain = ours(random_ids(2, T), **batch).logits
    is_real = batch.get("attention_mask", torch.ones(2, T)).bool()
    torch.testing.assert_close(compiled[is_real], plain[is_real], **TOLERANCE)


@pytest.mark.parametrize("is_padded", [False, True])
def test_decoding_from_a_flat_mask_is_one_graph(pair, is_padded):
    """transformers makes the mask of a step, as in `generate` with a static cache."""
    _, ours = pair
    ids, cache = random_ids(2, T), StaticCache(config=ours.config, max_cache_len=64)
    position_ids = POSITIONS if is_padded else torch.arange(T).expand(2, T)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, logits = torch.compile(ours, backend="eager", fullgraph=True), []
    with torch.no_grad():
        prompt = {"attention_mask": PADDED[:, :20] if is_padded else None, "position_ids": position_ids[:, :20]}
        ours(ids[:, :20], past_key_values=cache, **prompt)
        for place in range(20, T):
            mask = pad(PADDED[:, : place + 1], (0, 63 - place)) if is_padded else None
            step = {"attention_mask": mask, "position_ids": position_ids[:, place : place + 1]}
            logits.append(compiled(ids[:, place : place + 1], past_key_values=cache, **step).logits)
        whole = ours(ids, attention_mask=PADDED if is_padded else None, position_ids=position_ids).logits
    torch.testing.assert_close(torch.cat(logits, 1), whole[:, 20:], **TOLERANCE)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_decoding_with_a_static_cache_is_one_graph(pair):
    _, ours = pair
    ids, cache = random_ids(2, T), StaticCache(config=ours.config, max_cache_len=64)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, logits = torch.compile(ours, backend="eager", fullgraph=True), []
    with torch.no_grad():
        ours(ids[:, :20], past_key_values=cache)
        for place in range(20, T):
            options = {"past_key_values": cache, "position_ids": torch.full((2, 1), place)}
            options["attention_mask"] = (torch.arange(64) <= place).expand(2, 1, 1, 64)
            logits.append(compiled(ids[:, place : place + 1], **options).logits)
        torch.testing.assert_close(torch.cat(logits, 1), ours(ids).logits[:, 20:], **TOLERANCE)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.process
def test_a_layout_keeps_its_type():
    layout = PackedCollator()([{"input_ids": [1, 2, 3], "prompt_length": 1}])["attention_mask"]
    assert type(layout) is TextLayout
    assert type(layout.to("meta", non_blocking=True)) is TextLayout
    assert type(send_to_device({"attention_mask": layout}, "meta")["attention_mask"]) is TextLayout
    rows = [{"input_ids": [1, 2, 3], "prompt_length": 1}] * 2
    loader = DataLoader(rows, batch_size=2, collate_fn=PackedCollator(), num_workers=1)
    assert type(next(iter(loader))["attention_mask"]) is TextLayout


def test_attention_weights_are_refused(pair):
    _, ours = pair
    with pytest.raises(ValueError, match='needs a model loaded with attn_implementation="eager"'):
        ours(random_ids(1, 4), output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        ours.config.output_attentions = True


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("prompt_length", [1, 10, 30])
def test_generation_past_the_window(pair, cache, prompt_length):
    eager, ours = pair
    ids, mask = random_ids(2, prompt_length), torch.ones(2, prompt_length, dtype=torch.long)
    mask[0, : prompt_length // 2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": 499}
    theirs = eager.generate(ids, **options)
    mine = ours.generate(ids, cache_implementation=cache, **options)
    assert mine.tolist() == theirs.tolist()


def test_no_position_squared_buffer(pair):
    eager, ours = pair
    assert any(buffer.numel() == 2048**2 for buffer in eager.buffers())
    assert not any(buffer.numel() >= 2048**2 for buffer in ours.buffers())


def test_layout_visits_each_token_once():
    layout = lay_out_texts([20, 1, 29, 33, 17])
    assert layout.shape == (1, 1, 5, 33)
    assert layout[0, 0, 1].tolist() == [20] * 33, "a text of one token repeats it"
    groups = group_by_length(layout.as_subclass(torch.Tensor)[0, 0])
    # Up to 16, up to 32, up to 64 tokens.
    assert [tuple(group.shape) for group in groups] == [(1, 1), (3, 29), (1, 33)]
    assert sorted({place for group in groups for place in group.flatten().tolist()}) == list(range(100))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_texts_on_cuda(pair, dtype):
    eager, ours = (model.to("cuda", dtype) for model in pair)
    lengths = [5, 40, 1, 17, 16, 30]
    texts = random_ids(1, sum(lengths)).cuda().split(lengths, dim=1)
    position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).cuda()
    batch = {"position_ids": position_ids, "attention_mask": lay_out_texts(lengths).cuda(), "use_cache": False}
    packed = ours(torch.cat(texts, 1), **batch).logits
    alone = torch.cat([eager(text).logits for text in texts], 1)
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(packed, alone, atol=tolerance, rtol=tolerance)
    for model in pair:
        model.to("cpu", torch.float32)
