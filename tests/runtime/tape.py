"""A graph for tests: records what a step does, and does it again at the same addresses.

What can be taped can be recorded as a CUDA graph: nothing reads a value on the host, and no tensor is made of Python
numbers, for a graph would keep those of the step that it was recorded in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxpass.ir.step import ChannelSpec
from fxpass.runtime.graphs import Outputs
from fxpass.runtime.symmetric_memory import SymmetricChannel, SymmetricMemory, buffer_places

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default}
MADE = {aten.lift_fresh.default, aten.lift.default, aten.scalar_tensor.default}
UNDEFINED = {"empty", "empty_like", "new_empty", "empty_strided", "empty_permuted"}  # what they return is not defined


class Tape(TorchDispatchMode):
    """Records operators with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READS, f"{func} reads a value on the host"
        assert func not in MADE, f"{func} makes a tensor of Python numbers"
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Do it again: the results go where they were."""
        for func, args, kwargs, results in self.steps:
            again = func(*args, **kwargs)
            returns = func._schema.returns
            if not returns or func._schema.name.partition("::")[2] in UNDEFINED:
                continue
            for old, new, declared in zip(flat(results), flat(again), [*returns, *[returns[-1]] * 99], strict=False):
                if declared.alias_info is None and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def flat(results: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(results) if isinstance(each, Tensor)]


def tape(function: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
    """Record a function. A CUDA graph does not run while it is recorded; a tape does, so its effects are undone."""
    recorded = Tape()
    saved = Saved()
    with saved, recorded:
        outputs = function()
    saved.restore()
    return outputs, recorded.replay


class Saved(TorchDispatchMode):
    """Keeps copies of what operators are about to write to."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = [
            value
            for declared, value in [
                *zip(func._schema.arguments, args, strict=False),
                *((each, (kwargs or {})[each.name]) for each in func._schema.arguments if each.name in (kwargs or {})),
            ]
            if declared.alias_info is not None and declared.alias_info.is_write
        ]
        for each in flat(written):
            storage = each.untyped_storage()
            self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        return func(*args, **(kwargs or {}))

    def restore(self) -> None:
        for storage, before in self.before.values():
            storage.copy_(before)


class TestMemory(SymmetricMemory):
    """Symmetric memory of ranks in one process."""

    __test__ = False

    def _prepare(self, specs: Sequence[ChannelSpec], flags: Sequence[Tensor]) -> None:
        self._theirs = [[flag[self.rank, i] for flag in flags] for i in range(len(specs))]
        self._seen = self.flags.numpy()

    def sending(self, channel: int, packed: Any, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def signal(self, channel: int) -> None:
        for flag in self._theirs[channel]:
            flag.copy_(self.step)

    def copy(self, channel: int, parity: int, sources: Sequence[Tensor], targets: Sequence[Sequence[Tensor]]) -> None:
        torch._foreach_copy_(list(targets[parity]), list(sources))

    def wait(self, channel: int) -> None:
        pass  # `run_in_turns` calls `get` when the messages have arrived

    def arrived(self, channel: int) -> bool:
        return bool((self._seen[:, channel] >= self.number).all())


def symmetric_channels(specs: Sequence[ChannelSpec], world: int) -> list[list[SymmetricChannel]]:
    """Each rank's ends of the channels of a context."""
    size, _ = buffer_places(specs, world)
    peers = [torch.zeros(size, dtype=torch.uint8) for _ in range(world)]
    memories = [TestMemory(specs, peers, rank, 1.0) for rank in range(world)]
    return [[SymmetricChannel(memory, i, spec) for i, spec in enumerate(specs)] for memory in memories]
