"""CUDA graphs on a CPU: what a capture records is run again by each replay, at the same addresses.

So the code around a graph is tested without a GPU. A value that a capture has frozen, a tensor that is allocated anew
or a read before the device is ready gives other tokens. torch.cuda's graphs, streams and events are replaced; tensors
and operators are real.
"""

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.item, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero}
NOT_ARRIVED = 10**6  # in pinned memory whose copy was not waited for


class RecordedGraph:
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self, counts: Counter):
        self.counts, self.calls = counts, []

    def pool(self):
        return self

    def replay(self) -> None:
        self.counts["replays"] += 1
        for function, args, kwargs, outputs in self.calls:
            for old, new in zip(outputs, _tensors(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor written in place
                    old.copy_(new)


class _Recording(TorchDispatchMode):
    """Records operators. A capture runs nothing, so what they write to older tensors is undone at its end."""

    def __init__(self, graph: RecordedGraph):
        super().__init__()
        self.graph, self.before = graph, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket in WAITS:
            raise RuntimeError(f"{function}: a captured graph cannot wait for the device")
        for parameter, arg in zip(function._schema.arguments, args, strict=False):
            if parameter.alias_info is not None and parameter.alias_info.is_write:
                self.before.append((arg, arg.clone()))
        output = function(*args, **kwargs)
        self.graph.calls.append((function, args, kwargs, _tensors(output)))
        return output

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, value in reversed(self.before):
            tensor.copy_(value)


class _LateCopies(TorchFunctionMode):
    """Pinned memory, to which copies come when an event after them is waited for."""

    def __init__(self):
        super().__init__()
        self.pinned, self.on_the_way, self.num_arrived = [], deque(), 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.empty and kwargs.pop("pin_memory", False):
            self.pinned.append(torch.full(args, NOT_ARRIVED, **kwargs))
            return self.pinned[-1]
        if function is torch.Tensor.copy_ and kwargs.get("non_blocking") and any(args[0] is x for x in self.pinned):
            self.on_the_way.append((args[0], args[1].clone()))
            return args[0]
        return function(*args, **kwargs)

    @property
    def num_sent(self) -> int:
        return self.num_arrived + len(self.on_the_way)

    def arrive(self, up_to: int | None = None) -> None:
        for _ in range(self.num_arrived, self.num_sent if up_to is None else up_to):
            target, value = self.on_the_way.popleft()
            target.copy_(value)
            self.num_arrived += 1


def _tensors(output) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


@contextmanager
def recorded_graphs() -> Iterator[Counter]:
    """torch.cuda's graphs, streams and events work on the CPU within this. Yields how many "captures" and "replays"
    there were."""
    copies, counts = _LateCopies(), Counter()

    class Event:
        def record(self):
            self.num_sent = copies.num_sent

        def synchronize(self):
            copies.arrive(self.num_sent)

    class Stream:
        def wait_stream(self, other):
            pass

    @contextmanager
    def capture(graph, pool=None):
        counts["captures"] += 1
        with _Recording(graph):
            yield

    stand_ins = {"CUDAGraph": lambda: RecordedGraph(counts), "graph": capture, "synchronize": copies.arrive}
    stand_ins |= {"Event": Event, "Stream": Stream, "current_stream": Stream, "stream": nullcontext}
    with pytest.MonkeyPatch.context() as patch, copies:
        for name, stand_in in stand_ins.items():
            patch.setattr(torch.cuda, name, stand_in)
        yield counts
