"""AdamW in five bytes per parameter: it follows fp32 AdamW, and goes on bit for bit."""

import io

import pytest
import torch

from neoflix.checkpoints.find import COMPACT_BYTES
from neoflix.training import compact_adamw
from neoflix.training.compact_adamw import CompactAdamW
from neoflix.training.compact_update import (
    MIX,
    PERIOD,
    decode,
    encode,
    join_bits,
    phase_of,
    place_of,
    split_bits,
    update,
)

ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def optimizer_of(parameter, lr: float = 1e-5) -> CompactAdamW:
    return CompactAdamW([parameter], lr=lr, **ADAM)


def gradients(num_steps: int, shape: tuple, outliers: bool = False):
    """Gradients as a language model has them: of very different sizes, with a mean; outliers are 50 times larger."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(shape, generator=generator).exp() * 1e-4
    if outliers:
        sizes[:, ::640] *= 50
    means = 0.3 * torch.randn(shape, generator=generator)
    for _ in range(num_steps):
        yield (sizes * (means + torch.randn(shape, generator=generator))).bfloat16()


def weights(*shape: int) -> torch.Tensor:
    return (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).bfloat16()


def values_of(parameter, optimizer) -> torch.Tensor:
    """The weights with all their bits."""
    return join_bits(parameter.detach().view(-1), optimizer.state[parameter]["low_bits"]).view(parameter.shape)


@pytest.mark.parametrize("outliers", [False, True])
def test_the_total_move_is_that_of_fp32(outliers):
    """Plain bf16 weights hardly move at this rate."""
    start = weights(16, 2560)
    ours, plain = (torch.nn.Parameter(start.clone()) for _ in range(2))
    exact = torch.nn.Parameter(start.float())
    optimizers = [
        optimizer_of(ours),
        torch.optim.AdamW([plain], lr=1e-5, **ADAM),
        torch.optim.AdamW([exact], lr=1e-5, **ADAM),
    ]
    for gradient in gradients(200, start.shape, outliers):
        for parameter, optimizer in zip((ours, plain, exact), optimizers, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
    move = (exact - start.float()).detach()

    def error(found) -> float:
        return ((found - start.float() - move).norm() / move.norm()).item()

    assert error(values_of(ours, optimizers[0])) < 0.06
    assert error(plain.detach().float()) > 0.5
    each = (values_of(ours, optimizers[0]) - start.float() - move).abs() / move.pow(2).mean().sqrt()
    assert each.max() < 0.6, "no single weight goes astray"


def test_bytes_per_parameter():
    parameter = torch.nn.Parameter(weights(64, 256))
    optimizer = optimizer_of(parameter)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [state for state in optimizer.state[parameter].values() if isinstance(state, torch.Tensor)]
    per_parameter = sum(state.nbytes for state in states) / parameter.numel()
    assert per_parameter == COMPACT_BYTES
    assert per_parameter + parameter.element_size() < 5.1


@pytest.mark.parametrize("place", [0, PERIOD // 4, PERIOD // 2, PERIOD - 1])
def test_bits_of_weights(place):
    """Without dither the bits that follow are cut off. The bf16 weight is a neighbour, by the place's threshold."""
    values = torch.cat([torch.randn(1000), torch.tensor([0.0, 1.0, -1.0, 3e38, 255 / 256, -(2.0**-126)])])
    no_dither, places = torch.zeros(len(values), dtype=torch.int64), torch.full((len(values),), place)
    high, low = split_bits(values, no_dither, places)
    joined = join_bits(high, low)
    assert ((joined - values).abs() <= values.abs() * 2**-14).all()
    assert all(map(torch.equal, split_bits(joined, no_dither, places), (high, low)))
    below = (joined.view(torch.int32) & ~0xFFFF).view(torch.float32)  # next to zero
    rest = (joined.view(torch.int32) & 0xFFFF) / 2**16  # of the last bit of a bf16 value
    threshold = (place * MIX % PERIOD >> 17) / 128
    assert torch.equal(high.float().abs() > below.abs(), rest >= 1 - threshold)


@pytest.mark.parametrize("share", [0.25, 0.004])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_small_move_changes_its_share_of_the_weights(share, sign):
    """A bf16 weight has no further bits at first, and rounding to nearest would not see a quarter of its last bit."""
    last_bit = 2**-7
    parameter = torch.nn.Parameter(torch.full((512, 512), 1.5, dtype=torch.bfloat16))
    optimizer = CompactAdamW([parameter], lr=share * last_bit, **ADAM | {"weight_decay": 0})
    parameter.grad = torch.full_like(parameter, -sign)
    optimizer.step()
    changed = (parameter != 1.5).float()
    assert set(parameter.detach().flatten().tolist()) == {1.5, 1.5 + sign * last_bit}
    assert changed.mean().item() == pytest.approx(share, rel=0.02 + 0.0002 / share)
    assert changed.mean(dim=0).max() < share + 0.1, "not the same ones in each row"


@pytest.mark.parametrize("num_levels", [127, 255])
def test_rounding_is_right_on_average(num_levels):
    values = torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) ** 8
    values[:, 0] = 1
    total = torch.zeros(values.shape, dtype=torch.float64)
    for step in range(1, 1001):
        dither = torch.full(values.shape, phase_of(step))
        codes, largest = encode(values, dither, num_levels)
        assert codes.min() >= 0
        assert codes.max() == num_levels
        total += decode(codes, largest, num_levels)
    assert torch.allclose(total.float() / 1000, values, rtol=2e-3, atol=2e-8)


def test_dither_differs_by_step_and_element():
    places = [place_of(element) for element in range(0, 12800, 128)]
    assert len({(phase_of(step) + place) % PERIOD for step in range(100) for place in places}) == 10_000
    assert 0 <= phase_of(10**6) < PERIOD
    assert 0 <= place_of(10**9) < PERIOD


def train(parameter, optimizer, num_steps: int, skip: int = 0) -> None:
    for gradient in list(gradients(skip + num_steps, parameter.shape))[skip:]:
        parameter.grad = gradient
        optimizer.step()


@pytest.mark.parametrize("shape", [(8, 256), (3, 5), (96,), (1,)])
def test_saved_and_loaded_it_goes_on_bit_for_bit(shape):
    """Also for sizes that are not multiples of a block."""
    whole = torch.nn.Parameter(weights(*shape))
    uninterrupted = optimizer_of(whole, lr=1e-3)
    train(whole, uninterrupted, 6)

    first = torch.nn.Parameter(weights(*shape))
    saved = optimizer_of(first, lr=1e-3)
    train(first, saved, 3)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    second = torch.nn.Parameter(first.detach().clone())
    resumed = optimizer_of(second, lr=0.5)
    resumed.load_state_dict(torch.load(file))
    assert resumed.state[second]["low_bits"].dtype == torch.int8
    train(second, resumed, 3, skip=3)
    assert torch.equal(values_of(second, resumed), values_of(whole, uninterrupted))


def test_pieces_are_the_whole(monkeypatch):
    """Without a compiler a large parameter is updated piece by piece."""
    results = []
    for size in (2**30, 256):
        monkeypatch.setitem(compact_adamw.CHUNK, "cpu", size)
        parameter = torch.nn.Parameter(weights(5, 256))
        optimizer = optimizer_of(parameter, lr=1e-3)
        train(parameter, optimizer, 3)
        results.append(values_of(parameter, optimizer))
    assert torch.equal(*results)


def test_a_small_variance_does_not_vanish():
    """Beside one that is 10^20 times larger: without it the next step would be too large."""
    parameter = torch.nn.Parameter(weights(1, 128))
    optimizer = optimizer_of(parameter)
    for _ in range(3):
        parameter.grad = torch.full_like(parameter, 1e-10)
        parameter.grad[0, 0] = 1
        optimizer.step()
        assert optimizer.state[parameter]["exp_avg_sq"].min() > 0


def test_weight_decay():
    """Each step takes lr x weight_decay off a weight that has no gradient."""
    parameter = torch.nn.Parameter(torch.ones(2, 128, dtype=torch.bfloat16))
    optimizer = CompactAdamW([parameter], lr=1e-3, **ADAM | {"weight_decay": 0.5})
    for _ in range(100):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    expected = torch.full((2, 128), (1 - 1e-3 * 0.5) ** 100)
    assert torch.allclose(values_of(parameter, optimizer), expected, rtol=1e-4)


def test_a_parameter_without_gradient_stays():
    parameter = torch.nn.Parameter(weights(4, 128))
    before = parameter.detach().clone()
    optimizer = optimizer_of(parameter)
    optimizer.step()
    assert torch.equal(parameter, before)
    assert not optimizer.state


def test_rows_without_gradient_keep_their_variance():
    """Tokens that a batch lacks: their second moment shrinks by beta2, however often."""
    parameter = torch.nn.Parameter(weights(2, 128))
    optimizer = optimizer_of(parameter)
    parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    parameter.grad = torch.zeros_like(parameter)
    for _ in range(100):
        optimizer.step()
    state = optimizer.state[parameter]
    variance = decode(state["exp_avg_sq"].view(2, 128), state["exp_avg_sq_max"], 255)
    expected = 0.001 * parameter.new_tensor(1e-3).float() ** 2 * 0.999**100
    assert torch.allclose(variance, expected.expand_as(variance), rtol=1e-3)


def model_and_optimizer(max_norm: float | None):
    """Two layers that share a weight, as embedding and head do. None: updates in `step`."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16)).bfloat16()
    model[2].weight = model[0].weight
    optimizer = CompactAdamW(model.parameters(), lr=1e-2, **ADAM)
    if max_norm is not None:
        optimizer.update_in_backward(max_norm)
    return model, optimizer


def take_steps(model, optimizer, numbers) -> list[float]:
    """Norms of the gradients."""
    norms = []
    for number in numbers:
        inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(number)).bfloat16()
        model(inputs).square().sum().backward()
        if not optimizer._norms:
            norms.append(torch.stack([p.grad.float().norm() for p in model.parameters()]).norm().item())
        optimizer.step()
        if hasattr(optimizer, "_global_grad_norm"):
            norms.append(optimizer._global_grad_norm.item())
        optimizer.zero_grad()
    return norms


def states_of(model, optimizer) -> list[torch.Tensor]:
    return [values_of(parameter, optimizer) for parameter in model.parameters()]


def test_updates_in_the_backward_pass_are_those_after_it():
    """Without clipping they are the same, also of a weight that has two gradients; no gradient is left."""
    after, during = model_and_optimizer(None), model_and_optimizer(0)
    assert take_steps(*during, range(4)) == pytest.approx(take_steps(*after, range(4)), rel=1e-5)
    for ours, theirs in zip(states_of(*during), states_of(*after), strict=True):
        assert torch.equal(ours, theirs)
    during[0](torch.ones(1, 16).bfloat16()).sum().backward()
    assert all(parameter.grad is None for parameter in during[0].parameters())


def test_gradients_are_clipped_by_the_norm_of_the_step_before():
    model, optimizer = model_and_optimizer(0.5)
    (norm,) = take_steps(model, optimizer, [0])
    assert norm > 1, "or nothing is clipped"
    assert optimizer.param_groups[0]["clip_factor"].item() == pytest.approx(0.5 / norm, rel=1e-4)
    before = [optimizer.state[p]["exp_avg_max"].max().item() for p in model.parameters()]
    take_steps(model, optimizer, [1])
    unclipped = model_and_optimizer(0)
    take_steps(*unclipped, [0, 1])
    for parameter, first, other in zip(model.parameters(), before, unclipped[0].parameters(), strict=True):
        clipped, whole = (o.state[p]["exp_avg_max"].max() for o, p in ((optimizer, parameter), (unclipped[1], other)))
        assert clipped < max(first, whole)


def test_the_norm_of_the_step_before_is_saved():
    whole = model_and_optimizer(0.5)
    take_steps(*whole, range(4))
    first = model_and_optimizer(0.5)
    take_steps(*first, range(2))
    second = model_and_optimizer(0.5)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    take_steps(*second, range(2, 4))
    for ours, theirs in zip(states_of(*second), states_of(*whole), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_must_be_in_bf16():
    with pytest.raises(ValueError, match="bf16"):
        optimizer_of(torch.nn.Parameter(torch.zeros(4)))


def compare_compiled(device: str) -> None:
    """The compiled update against plain torch on the CPU: a code may differ by one where rounding is a tie."""
    compiled = torch.compile(update, fullgraph=True)
    shape = (33, 128)
    found, expected = [], []
    for place, results, function in ((device, found, compiled), ("cpu", expected, update)):
        parameter = torch.nn.Parameter(weights(*shape).to(place))
        optimizer = optimizer_of(parameter, lr=1e-3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compact_adamw, "update", function)
            patch.setattr(compact_adamw, "has_triton", lambda: False)
            patch.setitem(compact_adamw.CHUNK, place, 2**20)
            for gradient in gradients(3, shape):
                parameter.grad = gradient.to(place)
                optimizer.step()
        state = optimizer.state[parameter]
        results += [values_of(parameter, optimizer), state["exp_avg"].float(), state["exp_avg_sq"].float()]
    for ours, theirs in zip(found, expected, strict=True):
        differs = (ours.cpu() - theirs).abs() > 1e-6
        assert differs.float().mean() < 0.01
    assert torch.allclose(found[0].cpu(), expected[0], atol=1e-4)


@pytest.mark.process
def test_compiled_as_plain():
    compare_compiled("cpu")


@pytest.mark.gpu
def test_compiled_on_a_gpu():
    compare_compiled("cuda")
