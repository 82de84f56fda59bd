"""What a rehearsal takes for granted, because kernels compute nothing.

Where the host asks a card for numbers, they are read as on a GPU, and then zeros are taken in their place. The loss is
2, every loss and weight is finite, and no draw needs more candidates. Modules are changed when they are imported, so
nothing is imported for it.
"""

import importlib.util
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from importlib.abc import MetaPathFinder


def read_zeros(torch) -> None:
    Tensor = torch.Tensor
    item, to_list, to_bool = Tensor.item, Tensor.tolist, Tensor.__bool__
    to_cpu, to_words = Tensor.cpu, Tensor.__repr__

    def zero(tensor):
        number = item(tensor)
        return type(number)(0) if tensor.is_cuda else number

    def zeros(tensor):
        numbers = to_list(tensor)
        return to_list(torch.zeros(tensor.shape, dtype=tensor.dtype)) if tensor.is_cuda else numbers

    def copied(tensor, *args, **kwargs):
        """Of what is small, such as norms; weights are copied as they are."""
        copy = to_cpu(tensor, *args, **kwargs)
        return copy.zero_() if tensor.is_cuda and copy.is_floating_point() and copy.numel() < 10**4 else copy

    def described(tensor, **kwargs):
        """DeepSpeed prints all weights when ZeRO-3 starts; torch would select as many of them as a number says."""
        return f"tensor(..., size={tuple(tensor.shape)})" if tensor.is_cuda else to_words(tensor, **kwargs)

    Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.__repr__ = zero, zeros, copied, described
    Tensor.__bool__ = lambda tensor: to_bool(tensor) and not tensor.is_cuda


def draw_zeros(decoder) -> None:
    read = decoder.Decoder._read

    def read_as_zeros(self, texts, sent):
        return read(self, texts, (sent[0].new_zeros(sent[0].shape, device="cpu"), sent[1]))

    decoder.Decoder._read = read_as_zeros


def settle_at_once(draw) -> None:
    draw.Draw.settled = lambda self, *args: self(*args)[0]


def lose_two(validation) -> None:
    sums = validation._sum_losses

    def sums_of_a_loss(*args):
        sums(*args)
        return 2.0, 1.0

    validation._sum_losses = sums_of_a_loss


def measure_here(meters) -> None:
    def own_peaks(self):
        return meters.torch.cuda.max_memory_allocated(), meters.peak_host_bytes()

    meters.Meters._peak_bytes = own_peaks


def never_diverge(divergence) -> None:
    check = divergence.check_finite

    def check_without_verdict(*args):
        with suppress(divergence.DivergedError):
            check(*args)

    divergence.check_finite = check_without_verdict


def group_on_the_host(packing) -> None:
    layout, groups = packing.TextLayout, packing.TextLayout.groups.func

    def groups_of_copy(self):
        """The sizes of groups are numbers too, which torch reads by itself; layouts are small, and really copied."""
        found = groups(self.cpu())
        return [packing.Group(*(tensor.to(self.device) for tensor in group)) for group in found]

    layout.groups = cached_property(groups_of_copy)
    layout.groups.__set_name__(layout, "groups")


def agree(utils) -> None:
    """Stage 3's processes compare what they do by numbers of the card."""
    ask = utils.get_lst_from_rank0

    def ask_and_agree(values):
        with suppress(RuntimeError):
            ask(values)
        return values

    utils.get_lst_from_rank0 = ask_and_agree
    utils.assert_lst_len_same_as_other_ranks = lambda values: None


def end_by_length(utils) -> None:
    """transformers' `generate` asks the card whether all texts have ended; here they end at their longest length."""
    criteria, ended = utils.MaxLengthCriteria, []
    call = criteria.__call__

    def call_and_remember(self, input_ids, *args, **kwargs):
        ended[:] = [input_ids.shape[1] >= self.max_length]
        return call(self, input_ids, *args, **kwargs)

    criteria.__call__ = call_and_remember
    utils.GenerationMixin._has_unfinished_sequences = lambda *args, **kwargs: ended != [True] or bool(ended.clear())


AFTER_IMPORT: dict[str, Callable] = {
    "torch": read_zeros,
    "deepspeed.runtime.zero.utils": agree,
    "transformers.generation.utils": end_by_length,
    "neoflix.data.packing": group_on_the_host,
    "neoflix.sampling.decoder": draw_zeros,
    "neoflix.sampling.draw": settle_at_once,
    "neoflix.training.validation": lose_two,
    "neoflix.training.divergence": never_diverge,
    "neoflix.training.meters": measure_here,
}


class ChangingFinder(MetaPathFinder):
    """Finds the modules of AFTER_IMPORT, and changes them once they are executed."""

    def __init__(self):
        self.sought = set()

    def find_spec(self, name, path=None, target=None):
        if name not in AFTER_IMPORT or name in self.sought:
            return None
        self.sought.add(name)  # the other finders are asked below
        spec = importlib.util.find_spec(name)
        self.sought.remove(name)
        execute = spec.loader.exec_module

        def execute_and_change(module):
            execute(module)
            AFTER_IMPORT[name](module)

        spec.loader.exec_module = execute_and_change
        return spec


def install() -> None:
    sys.meta_path.insert(0, ChangingFinder())
