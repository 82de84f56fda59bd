"""Tensors without values, on the CPU or on a CUDA device that need not exist: shapes, dtypes, devices and memory."""

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

CUDA = "cuda:0"  # torch's CPU build does not know the current one
CUDA_TYPE, META_TYPE = 1, 14  # in c10/core/DeviceType.h


def fill_with_fakes(model: nn.Module, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """Replaces weights (of any dtype) and buffers of a model on the meta device by fake ones, within `FakeTensorMode`.
    Tied weights stay tied."""
    fakes = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight not in fakes:
                fake = torch.empty(weight.shape, dtype=dtype, device=device)
                fakes[weight] = nn.Parameter(fake, requires_grad=weight.requires_grad)
            setattr(module, name, fakes[weight])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
    return model


@contextmanager
def fake_cuda(capability: tuple[int, int] = (8, 0)) -> Iterator[FakeTensorMode]:
    """`FakeTensorMode` with tensors on a GPU of this compute capability, for what has no backward pass.

    Without a GPU, torch's CUDA build gives CUDA a device guard that does nothing while the mode is on. Its CPU build
    has none to give, so that every indexing would fail; it gets the guard of the meta device.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (META_TYPE + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[CUDA_TYPE]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**40, 2**40))
        try:
            guards[CUDA_TYPE] = before or guards[META_TYPE]
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                yield mode
        finally:
            guards[CUDA_TYPE] = before


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of live tensors, but for those given, and keeps the most at any time.

    An operator's own temporary tensors are not seen. The largest here are those of `logsumexp`, which needs the
    exponentials of its whole input (torch's ReduceOps.cpp); they are counted.
    """

    def __init__(self, *given: torch.Tensor):
        super().__init__()
        self.known, self.live, self.peak = WeakIdKeyDictionary(), 0, 0
        for tensor in given:
            self.known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                self._count(tensor.untyped_storage())
        temporary = args[0].nbytes if function is torch.ops.aten.logsumexp.default else 0
        self.peak = max(self.peak, self.live + temporary)
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.known[storage] = True
        self.live += storage.nbytes()
        weakref.finalize(storage, self._free, storage.nbytes()).atexit = False

    def _free(self, num_bytes: int) -> None:
        self.live -= num_bytes
