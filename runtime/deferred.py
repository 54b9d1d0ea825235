"""Deferred tensors: results of a call that has not run yet, because it waits for another one to run at once with it.

A deferred tensor has the shape, the dtype and the device of its value. Slices, chunks, views and copies of it are
deferred as well. Any other use computes it, and works on the value, a plain tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

#: what is known before the value is
METADATA: set[Any] = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_nested")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.get_device),
    *(torch.is_tensor, torch.is_floating_point, torch.is_complex, torch.numel),
}
#: functions of one tensor whose results are deferred
DEFERRED: set[Any] = {
    *(Tensor.__getitem__, Tensor.narrow, Tensor.select, Tensor.unsqueeze, Tensor.squeeze, Tensor.unflatten),
    *(Tensor.chunk, Tensor.split, Tensor.unbind, Tensor.tensor_split, Tensor.view, Tensor.reshape, Tensor.flatten),
    *(Tensor.permute, Tensor.transpose, Tensor.movedim, Tensor.detach, Tensor.clone, Tensor.contiguous),
    *(Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double),
    *(torch.narrow, torch.select, torch.unsqueeze, torch.squeeze, torch.unflatten, torch.clone, torch.detach),
    *(torch.chunk, torch.split, torch.unbind, torch.tensor_split, torch.reshape, torch.flatten),
    *(torch.permute, torch.transpose, torch.movedim),
}


class Source:
    """A call that has not run yet, and all tensors that are deferred because of it, in the order of their making.

    Args:
        run: runs the call, and then gives `give` its results, or `fail` the reason why there are none.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        self.run: Callable[[], None] | None = run
        self._results: list[DeferredTensor] = []
        self._later: list[tuple[Any, Any, Any, list[DeferredTensor]]] = []

    def results(self, like: Sequence[Tensor]) -> list[DeferredTensor]:
        """The results of the call.

        Args:
            like: tensors of their shapes, dtypes and devices.
        """
        self._results = [DeferredTensor(self, each, each.device) for each in like]
        return self._results

    def later(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What a function of a deferred tensor, its first argument, returns: deferred tensors."""
        base: DeferredTensor = args[0]
        shaped = torch.empty(base.shape, dtype=base.dtype, device="meta")
        leaves, spec = pytree.tree_flatten(func(shaped, *args[1:], **kwargs))
        made = [DeferredTensor(self, each, base.device) for each in leaves]
        self._later.append((func, args, kwargs, made))
        return pytree.tree_unflatten(made, spec)

    def give(self, values: Sequence[Tensor]) -> None:
        """Give all tensors their values, before anything writes to the results."""
        for each, value in zip(self._results, values, strict=True):
            each.value = value
        for func, args, kwargs, made in self._later:
            try:
                found = pytree.tree_leaves(func(args[0].value, *args[1:], **kwargs))
            except Exception as error:
                for each in made:
                    each.error = error
                continue
            for each, value in zip(made, found, strict=True):
                each.value = value
        self._end()

    def fail(self, error: BaseException) -> None:
        """Tell all tensors why they have no values."""
        for each in [*self._results, *(each for *_, made in self._later for each in made)]:
            each.error = error
        self._end()

    def _end(self) -> None:
        self.run = None
        self._results, self._later = [], []


class DeferredTensor(Tensor):
    """A tensor whose value another call computes.

    Attributes:
        value: None until it is computed.
        error: why it was not; None if nothing went wrong.
    """

    source: Source
    value: Tensor | None
    error: BaseException | None

    @staticmethod
    def __new__(cls, source: Source, like: Tensor, device: torch.device) -> DeferredTensor:
        made = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=device)  # type: ignore[attr-defined]
        made.source, made.value, made.error = source, None, None
        return made

    def __init__(self, source: Source, like: Tensor, device: torch.device) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA and _waits(args[0]):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in DEFERRED and _waits(args[0]) and _fixed((args[1:], kwargs)):
            return args[0].source.later(func, args, kwargs)
        args, kwargs = plain((args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Operators that did not come through Python's interface."""
        args, kwargs = plain((args, kwargs or {}))
        return func(*args, **kwargs)


def plain(tree: Any) -> Any:
    """Arguments with values in place of deferred tensors, which are computed.

    Raises:
        RuntimeError: a value was not computed.
    """
    return pytree.tree_map_only(DeferredTensor, value_of, tree)


def value_of(deferred: DeferredTensor) -> Tensor:
    """The value of a deferred tensor, which is computed if need be.

    Raises:
        RuntimeError: it was not computed.
    """
    if _waits(deferred) and (run := deferred.source.run) is not None:  # else another thread gives it its value
        run()
    if deferred.error is not None:
        raise RuntimeError(f"this result of an earlier call was not computed: {deferred.error}") from deferred.error
    assert deferred.value is not None
    return deferred.value


def _waits(x: Any) -> bool:
    return isinstance(x, DeferredTensor) and x.value is None and x.error is None


def _fixed(tree: Any) -> bool:
    """Whether nobody can change arguments before they are used: no lists, tensors or arrays."""
    if isinstance(tree, slice):
        return _fixed((tree.start, tree.stop, tree.step))
    if isinstance(tree, (tuple, dict)):
        return all(map(_fixed, tree.values() if isinstance(tree, dict) else tree))
    return tree is None or tree is Ellipsis or isinstance(tree, (int, str, torch.dtype, torch.memory_format))
