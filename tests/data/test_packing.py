import numpy as np
import pytest
import torch

from neoflix.data.packing import IGNORE_INDEX, PackedCollator, PaddedCollator, TokenBatches, lay_out_texts
from neoflix.data.tokens import fill_up
from neoflix.model.load import load_model


def batches_of(lengths, budget, batches_per_step=1, world_size=1, epoch=0, seed=1):
    """What each process gets: a list of batches for each rank."""
    ranks = []
    for rank in range(world_size):
        sampler = TokenBatches(np.array(lengths), budget, batches_per_step, rank, world_size, seed)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
    return ranks


@pytest.mark.parametrize("budget", [64, 100, 1000, 5000])
def test_token_batches_are_whole_even_and_within_the_budget(budget):
    lengths = np.random.default_rng(0).integers(14, 65, 1003)
    (batches,) = batches_of(lengths, budget, batches_per_step=4)
    assert sorted(text for batch in batches for text in batch) == list(range(1003))
    sums = [lengths[batch].sum() for batch in batches]
    assert max(sums) <= budget
    assert len(batches) % 4 == 0
    assert all(batches)
    if budget >= 1000:  # nearly full, and alike
        assert max(sums) - min(sums) <= 64
        assert sum(sums) > 0.85 * budget * len(batches)


def test_token_batches_of_texts_of_very_different_lengths():
    lengths = np.concatenate([np.full(3, 2048), np.full(500, 20), np.full(40, 300)])
    (batches,) = batches_of(lengths, 2048)
    assert max(lengths[batch].sum() for batch in batches) <= 2048
    assert len(batches) <= 1.1 * lengths.sum() / 2048, "a text as long as the budget leaves the other batches full"


def test_each_epoch_draws_other_batches_and_the_same_again():
    lengths = np.random.default_rng(0).integers(14, 65, 200)
    first, second = (batches_of(lengths, 500, epoch=epoch) for epoch in (0, 1))
    assert first != second
    assert first == batches_of(lengths, 500, epoch=0)
    assert first != batches_of(lengths, 500, seed=2)
    assert len(first[0]) == len(second[0]), "Trainer counts steps once"


def test_processes_and_accumulation_see_the_same_texts_in_a_step():
    lengths = np.random.default_rng(0).integers(14, 65, 333)
    (alone,) = batches_of(lengths, 300, batches_per_step=6)
    two = batches_of(lengths, 300, batches_per_step=6, world_size=2)
    assert [batch for pair in zip(*two, strict=True) for batch in pair] == alone


def test_text_longer_than_the_budget_is_refused():
    with pytest.raises(ValueError, match=r"the longest text has 64 tokens.*--max_length 60"):
        batches_of([10, 64], 60)


def test_the_end_is_a_target_and_padding_is_not(tokens, tokenizer):
    examples = [tokens[i] for i in range(5)]
    packed, padded = PackedCollator()(examples), PaddedCollator(tokenizer.pad_token_id)(examples)
    num_labels = sum(len(example["input_ids"]) - 1 for example in examples)
    for batch in (packed, padded):
        labels = batch["labels"][:, 1:]
        assert (labels == tokenizer.eos_token_id).sum() == len(examples)
        assert (labels != IGNORE_INDEX).sum() == num_labels
        assert not torch.isin(labels, torch.tensor([tokenizer.pad_token_id, tokenizer.bos_token_id])).any()
    assert packed["input_ids"].shape == (1, num_labels + len(examples))
    assert (padded["input_ids"][padded["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_filled_up_texts_count_nothing(tokens, tokenizer):
    filled = fill_up(tokens, 16, tokenizer.bos_token_id)
    batch = PackedCollator()([filled[i] for i in range(40, 48)])
    assert (batch["labels"] == IGNORE_INDEX).all()


def loss_and_gradients(model, batches) -> tuple[float, dict[str, torch.Tensor]]:
    """Sum over batches of the summed loss, so that it does not matter how texts are laid into batches."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=1).loss
        loss.backward()
        total += loss.item()
    return total, {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_packed_equals_one_by_one_equals_padded(tokens, tokenizer, model_dir):
    model = load_model(str(model_dir), tokenizer, torch.float32, {})
    examples = [tokens[i] for i in range(12)]
    assert max(len(e["input_ids"]) for e in examples) > model.config.window_size
    plain = [{"input_ids": torch.tensor([e["input_ids"]])} for e in examples]
    one_by_one = loss_and_gradients(model, [batch | {"labels": batch["input_ids"]} for batch in plain])
    packed = loss_and_gradients(model, [PackedCollator()(examples)])
    padded = loss_and_gradients(model, [PaddedCollator(tokenizer.pad_token_id)(examples)])
    for other in (packed, padded):
        assert other[0] == pytest.approx(one_by_one[0], rel=1e-5)
        for name, gradient in one_by_one[1].items():
            scale = gradient.abs().max().clamp(min=1.0)
            torch.testing.assert_close(other[1][name] / scale, gradient / scale, atol=1e-5, rtol=1e-4)


def test_groups_hold_each_token_once_and_are_found_once():
    lengths = [3, 40, 17, 20, 1, 33]
    layout = lay_out_texts(lengths)
    places = torch.cat([group.places for group in layout.groups])
    assert sorted(places.tolist()) == list(range(sum(lengths)))
    for group in layout.groups:
        assert torch.equal(group.layout.flatten()[group.cells], group.places)
    assert layout.groups is layout.groups, "each layer would wait for the device again"
