"""Deferred tensors: results of a call that has not run yet, because it waits for another one to run at once with it.

A deferred tensor has the shape, the dtype and the device of its value. Slices, chunks, views and copies of it are
deferred as well. Any other use computes it, and works on the value, a plain tensor.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...capture.guards import version

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


class Step:
    """A function of deferred tensors, and the tensors that it makes. These keep it alive, and it does not keep them.

    Args:
        args, kwargs: nobody else changes them.
    """

    def __init__(self, func: Any, args: Any, kwargs: Any) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.made: list[weakref.ref[DeferredTensor]] = []

    def evaluate(self) -> None:
        """Give the tensors their values, or the reason why there are none."""
        try:
            args, kwargs = pytree.tree_map_only(DeferredTensor, _known, (self.args, self.kwargs))
            with torch.inference_mode(False), torch.no_grad():  # writes to inference tensors are not counted
                found = pytree.tree_leaves(self.func(*args, **kwargs))
        except Exception as error:
            self.fail(error)
            return
        for reference, value in zip(self.made, found, strict=True):
            _give(reference, value)

    def fail(self, error: BaseException) -> None:
        """Tell the tensors why they have no values."""
        for reference in self.made:
            if (each := reference()) is not None:
                each.error = error


class Source:
    """A call that has not run yet, and all tensors that are deferred because of it, in the order of their making.

    Several threads may use its tensors.

    Args:
        run: runs the call, and then gives `give` its results, or `fail` the reason why there are none.
    """

    metadata = METADATA  #: functions that need no value
    fed = False  #: whether the results are made anew for each step of a denoiser

    def __init__(self, run: Callable[[], None]) -> None:
        self.run: Callable[[], None] | None = run
        self._results: list[weakref.ref[DeferredTensor]] = []
        self._steps: list[weakref.ref[Step]] = []
        self._ended: BaseException | bool = False  #: True once the results have values; or why they have none
        self._lock = threading.RLock()

    def results(self, like: Sequence[Tensor]) -> list[DeferredTensor]:
        """The results of the call.

        Args:
            like: tensors of their shapes, dtypes and devices.
        """
        made = [DeferredTensor(self, each, each.device, None, place) for place, each in enumerate(like)]
        self._results = [weakref.ref(each) for each in made]
        return made

    def takes(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether the results of a function with a deferred tensor among its arguments are deferred, too."""
        return func in DEFERRED and bool(args) and _waits(args[0]) and _fixed((args[1:], kwargs))

    def later(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What a function of deferred tensors returns: deferred tensors."""
        leaves = pytree.tree_leaves((args, kwargs))
        device = next(each.device for each in leaves if isinstance(each, DeferredTensor))
        shaped = pytree.tree_map_only(Tensor, _without_data, (args, kwargs))
        found, spec = pytree.tree_flatten(func(*shaped[0], **shaped[1]))
        step = Step(func, args, kwargs)
        made = [DeferredTensor(self, each, device, step, place) for place, each in enumerate(found)]
        step.made = [weakref.ref(each) for each in made]
        with self._lock:
            if self._ended is False:
                self._steps.append(weakref.ref(step))
            elif self._ended is True:
                step.evaluate()
            else:
                step.fail(self._ended)
        return pytree.tree_unflatten(made, spec)

    def give(self, values: Sequence[Tensor]) -> None:
        """Give all tensors their values, before anything writes to the results."""
        with self._lock:
            for reference, value in zip(self._results, values, strict=True):
                _give(reference, value)
            for step in self._end(True):
                step.evaluate()

    def fail(self, error: BaseException) -> None:
        """Tell all tensors why they have no values."""
        with self._lock:
            for reference in self._results:
                if (each := reference()) is not None:
                    each.error = error
            for step in self._end(error):
                step.fail(error)

    def _end(self, ended: BaseException | bool) -> list[Step]:
        """The steps whose results are still used."""
        steps = [step for reference in self._steps if (step := reference()) is not None]
        self.run, self._ended, self._steps = None, ended, []
        return steps


class DeferredTensor(Tensor):
    """A tensor whose value another call computes.

    Attributes:
        step: what made it of other deferred tensors; None if it is a result of the call.
        place: which of the results it is, of the step or of the call.
        value: None until it is computed.
        version: the version of the value when it was new.
        error: why it was not computed; None if nothing went wrong.
    """

    source: Source
    step: Step | None
    place: int
    value: Tensor | None
    version: int
    error: BaseException | None

    @staticmethod
    def __new__(
        cls: type[DeferredTensor], source: Source, like: Tensor, device: torch.device, step: Step | None, place: int
    ) -> DeferredTensor:
        made = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=device)
        made.source, made.step, made.place = source, step, place
        made.value, made.version, made.error = None, 0, None
        return made

    def __init__(self, source: Source, like: Tensor, device: torch.device, step: Step | None, place: int) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _waits(args[0] if args else None) and func in args[0].source.metadata:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        source = next((each.source for each in leaves if isinstance(each, DeferredTensor)), None)
        if source is not None and source.takes(func, args, kwargs):
            return source.later(func, args, kwargs)
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
    with deferred.source._lock:
        return _known(deferred)


def _known(deferred: DeferredTensor) -> Tensor:
    """The value of a deferred tensor whose source has run."""
    if deferred.error is not None:
        raise RuntimeError(f"this result of an earlier call was not computed: {deferred.error}") from deferred.error
    assert deferred.value is not None
    return deferred.value


def _give(reference: weakref.ref[DeferredTensor], value: Tensor) -> None:
    if (deferred := reference()) is not None:
        deferred.value, deferred.version = value, version(value)


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _waits(x: Any) -> bool:
    return isinstance(x, DeferredTensor) and x.value is None and x.error is None


def _fixed(tree: Any) -> bool:
    """Whether nobody can change arguments before they are used: no lists, tensors or arrays."""
    if isinstance(tree, slice):
        return _fixed((tree.start, tree.stop, tree.step))
    if isinstance(tree, (tuple, dict)):
        return all(map(_fixed, tree.values() if isinstance(tree, dict) else tree))
    return tree is None or tree is Ellipsis or isinstance(tree, (int, str, torch.dtype, torch.memory_format))
