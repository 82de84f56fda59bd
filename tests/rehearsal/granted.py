"""What a rehearsal takes for granted, because kernels compute nothing.

Where the host asks a card for numbers, they are read as on a GPU, and then zeros are taken in their place. The loss is
2, and every loss and weight is finite. Modules are changed when they are imported, so nothing is imported for it.
"""

import importlib.util
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.abc import MetaPathFinder


def read_zeros(torch) -> None:
    Tensor = torch.Tensor
    item, to_list, to_bool = Tensor.item, Tensor.tolist, Tensor.__bool__

    def zero(tensor):
        number = item(tensor)
        return type(number)(0) if tensor.is_cuda else number

    def zeros(tensor):
        numbers = to_list(tensor)
        return to_list(torch.zeros(tensor.shape, dtype=tensor.dtype)) if tensor.is_cuda else numbers

    Tensor.item, Tensor.tolist = zero, zeros
    Tensor.__bool__ = lambda tensor: to_bool(tensor) and not tensor.is_cuda


def draw_zeros(decoder) -> None:
    read = decoder.Decoder._read

    def read_as_zeros(self, texts, sent):
        return read(self, texts, (sent[0].new_zeros(sent[0].shape, device="cpu"), sent[1]))

    decoder.Decoder._read = read_as_zeros


def lose_two(validation) -> None:
    sums = validation._sum_losses

    def sums_of_a_loss(*args):
        sums(*args)
        return 2.0, 1.0

    validation._sum_losses = sums_of_a_loss


def never_diverge(divergence) -> None:
    check = divergence.check_finite

    def check_without_verdict(*args):
        with suppress(divergence.DivergedError):
            check(*args)

    divergence.check_finite = check_without_verdict


AFTER_IMPORT: dict[str, Callable] = {
    "torch": read_zeros,
    "neoflix.sampling.decoder": draw_zeros,
    "neoflix.training.validation": lose_two,
    "neoflix.training.divergence": never_diverge,
}


class ChangingFinder(MetaPathFinder):
    """Finds the modules of AFTER_IMPORT, and changes them once they are executed."""

    def find_spec(self, name, path=None, target=None):
        if name not in AFTER_IMPORT:
            return None
        change = AFTER_IMPORT.pop(name)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_change(module):
            execute(module)
            change(module)

        spec.loader.exec_module = execute_and_change
        return spec


def install() -> None:
    sys.meta_path.insert(0, ChangingFinder())
