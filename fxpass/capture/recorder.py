"""Run the model once on fake tensors, and record each ATen operator as a node of a graph.

The recorder is a dispatch mode below autograd, so it receives composite operators undecomposed; `kinds` says which of
them it decomposes. It records views and in-place writes as they are; `writes` makes the graph functional afterwards.
Where Python reads a *value* (`.item()`, `if x.any()`, a mask as an index), `concrete` computes the value from the real
inputs and adds a guard.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from ..ir.nodes import append
from . import flex, kinds
from .errors import CaptureError, DrawsError, TooManyOperatorsError, model_line
from .fakes import Form, form_of
from .runs import Runs
from .survivors import is_left_behind

aten = torch.ops.aten


@dataclass(frozen=True)
class Origin:
    """Where the value of a placeholder comes from."""

    kind: str  #: "weight", "constant", "fresh" (a constant made in forward) or "input"
    name: str  #: qualified name of a weight or of a constant attribute, path of an input; else empty
    real: Tensor | None  #: the real value; None if the model or its inputs are fake


class Recorder(TorchDispatchMode):
    """While it is active, records each operator that runs as a node of `graph`."""

    supports_higher_order_operators = True

    def __init__(self, fake_mode: FakeTensorMode, names: dict[int, tuple[str, str]], most: int | None = None) -> None:
        """
        Args:
            most: the number of nodes above which recording ends with `TooManyOperatorsError`; None: no limit.
            names: by id of a tensor of the model or of its arguments: kind ("weight", "constant", "foreign") and
                the qualified name.
        """
        super().__init__()
        self.fake_mode = fake_mode
        self.graph = fx.Graph()
        self.origins: dict[fx.Node, Origin] = {}
        self.writes: list[fx.Node] = []  #: in-place operators
        self.autocast: tuple[str, torch.dtype] | None = None  #: device type and dtype; `intercepts` updates it
        self.path = ""  #: qualified name of the module that runs
        self.runs = Runs()
        self.line: str | None = None  #: source line for new nodes; None: the line that runs
        self._names = names
        self._most = most
        self._nodes: dict[int, fx.Node] = {}
        self._fakes: dict[int, Tensor] = {}
        self._alive: list[Any] = []  # the objects whose ids are keys above
        self._results: dict[Any, Any] = {}
        self.read: Any = None  #: the `concrete.Reader` that computes values which Python reads
        self.routing: Any = None  #: the `routing.Routing` that replaces sizes which depend on activations, if any

    # ------------------------------------------------------------------------------------ values and nodes

    def add_input(self, real: Tensor, path: str) -> Tensor:
        """Add a placeholder for an input; return its fake tensor."""
        _refuse_subclass(real, f"the input {path}")
        fake = self._fake_like(real)
        has_value = not isinstance(real, FakeTensor)
        value = real if has_value else getattr(real, "constant", None)
        self._placeholder(fake, "x_" + path, Origin("input", path, value))
        return fake

    def node(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor. Adds a placeholder at the first use of a weight or a constant."""
        known = self._nodes.get(id(tensor))
        return known if known is not None else self._nodes[id(self.fake(tensor))]

    def find(self, tensor: Tensor) -> fx.Node | None:
        """The node of a recorded tensor; None if `tensor` was not recorded."""
        return self._nodes.get(id(tensor))

    def fake(self, tensor: Tensor, fresh: bool = False) -> Tensor:
        """The fake tensor for `tensor`; a recorded tensor itself. Adds a placeholder for a weight or a constant.

        Args:
            fresh: a constant was made in forward.

        Raises:
            CaptureError: `tensor` belongs to a module in the arguments, was left behind by an earlier call, is of a
                subclass that cannot be captured, or has no values.
        """
        if id(tensor) in self._nodes:
            return tensor
        if id(tensor) in self._fakes:
            return self._fakes[id(tensor)]
        kind, name = self._names.get(id(tensor), ("fresh" if fresh else "constant", ""))
        if kind == "foreign":
            raise CaptureError(
                f"the model uses {name}, a tensor of a module in its arguments: add that module to the model "
                "(add_module) before the call, so that the tensor is one of its weights, or pass the tensor itself"
            )
        if kind != "weight" and is_left_behind(tensor):
            raise CaptureError(
                f"the model reads {name or 'a tensor'} at {self.current_line()}, which an earlier call left behind; "
                "pass it from call to call as an argument, or switch off what keeps it"
            )
        _refuse_subclass(tensor, name or "a tensor")
        if tensor.is_meta and not isinstance(tensor, FakeTensor):
            raise CaptureError(f"{name or 'a tensor'} is on the meta device (offloaded?); load the weights first")
        fake = self._fake_like(tensor)
        self._fakes[id(tensor)] = fake
        self._alive.append(tensor)
        real = tensor if not isinstance(tensor, FakeTensor) else getattr(tensor, "constant", None)
        self._placeholder(fake, ("p_" if kind == "weight" else "c_") + name, Origin(kind, name, real))
        return fake

    def register(self, value: Any, node: fx.Node) -> None:
        self._nodes[id(value)] = node
        self._alive.append(value)

    def record(self, op: Any, args: Any, kwargs: dict[str, Any], result: Any) -> fx.Node:
        """Add a node for `op(*args, **kwargs)`, and one for each tensor of a tuple that it returns."""
        node = self._call(op, args, kwargs, result)
        if self.routing:
            self.routing.mark(node)
        if isinstance(result, (tuple, list)):
            for i, item in enumerate(result):
                if isinstance(item, Tensor):
                    part = append(self.graph, operator.getitem, (node, i), meta=self._described(item))
                    if "rows" in node.meta:
                        part.meta["rows"] = node.meta["rows"]
                    self.register(item, part)
        elif isinstance(result, Tensor):
            self.register(result, node)
        return node

    def holds(self) -> Iterator[Any]:
        """Each recorded value, once for each reference that the recorder has to it."""
        yield from self._alive
        yield from self._fakes.values()
        lists: set[int] = set()
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if not isinstance(value, (list, tuple)):
                yield value
            elif id(value) not in lists:
                lists.add(id(value))
                yield from value

    def was_given(self, tensor: Tensor) -> bool:
        """Whether a tensor existed before the recorded run. (Weights of a weight-free model are fake, like results.)"""
        return id(tensor) in self._fakes

    def containers(self) -> set[int]:
        """The ids of the containers that hold the recorder's references."""
        metas = [node.meta for node in self.graph.nodes]
        return {id(each) for each in (self._alive, self._fakes, *metas, *(meta.get("val") for meta in metas))}

    def current_line(self) -> str:
        return self.line or model_line()

    def _call(self, op: Any, args: Any, kwargs: dict[str, Any], value: Any) -> fx.Node:
        if self._most is not None and len(self.graph.nodes) > self._most:
            message = f"it runs more than {self._most:,} operators (a loop over frames or tiles?)"
            weights = (node for node, origin in self.origins.items() if origin.kind == "weight")
            raise TooManyOperatorsError(message, self.runs.repeated(weights))
        return append(self.graph, op, _to_nodes(args, self), _to_nodes(kwargs, self), self._described(value))

    def _described(self, value: Any) -> dict[str, Any]:
        meta = {"val": value, "path": self.path, "trace": self.current_line()}
        if isinstance(value, Tensor):
            meta |= {"shape": tuple(value.shape), "dtype": value.dtype}
        return meta

    def _placeholder(self, fake: Tensor, name: str, origin: Origin) -> None:
        first = next(iter(self.graph.nodes), None)
        with self.graph.inserting_before(first) if first is not None else ExitStack():
            node = self.graph.placeholder(re.sub(r"\W", "_", name))
        node.target = node.name
        node.meta = {"val": fake, "shape": tuple(fake.shape), "dtype": fake.dtype, "path": "", "trace": ""}
        self.origins[node] = origin
        self.register(fake, node)

    def _fake_like(self, tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:
            raise CaptureError(
                f"a tensor with layout {tensor.layout} cannot be captured, at {self.current_line()}; use to_dense()"
            )
        return self._new_fake((tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device))

    def _new_fake(self, form: tuple[Any, ...]) -> Tensor:
        shape, stride, dtype, device = form
        with no_dispatch():
            return FakeTensor(self.fake_mode, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)

    # --------------------------------------------------------------------------------------------- dispatch

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is flex.operator:
            with self:
                return flex.attention(*args, **(kwargs or {}))
        if not isinstance(op, OpOverload):
            raise CaptureError(f"the higher-order operator {op} at {self.current_line()} cannot be captured")
        if kinds.is_metadata(op):
            return op(*args, **(kwargs or {}))
        if any(map(is_traceable_wrapper_subclass_type, types)):  # its class implements the operator by plain tensors
            return self._apart(op, args, kwargs or {}) if kinds.is_composite(op) else NotImplemented
        fresh = op is aten.lift_fresh.default
        args = _map_tensors(args, lambda t: self.fake(t, fresh))
        kwargs = _map_tensors(kwargs or {}, self.fake)
        if op in _SAME:
            return self._same(op, args)
        self._refuse(op, args, kwargs)
        if not kinds.stays_whole(op) or (self.autocast and kinds.is_composite(op) and not self._cast_whole(op)):
            return self._apart(op, args, kwargs)
        if not kinds.returns_tensors(op):
            return self.read(self.record(op, args, kwargs, None), shape_only=False)
        if op.overloadpacket in _RENAMED_VIEWS:
            raise CaptureError(
                f"{op} changes a tensor's shape in place at {self.current_line()}; use the form without `_`"
            )
        if op is aten.cat.default and self.routing and (joined := self.routing.cat(*args, **kwargs)) is not None:
            return joined
        try:
            result = self._run(op, args, kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            return self._dynamic(op, args, kwargs)
        if kinds.mutates(op):
            self._record_write(op, args, kwargs, result)
        else:
            self.record(op, args, kwargs, result)
        return result

    def _record_write(self, op: OpOverload, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Record an in-place operator. The tensor that it writes to keeps its node."""
        node = self._call(op, args, kwargs, result)
        self.writes.append(node)
        if self.routing:
            self.routing.mark_written(node)

    def _run(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        """Compute the fake result. Results are cached by the operands' forms, because models repeat their blocks."""
        if kinds.aliases(op):
            with self.fake_mode:
                return op(*args, **kwargs)
        key = (op, form_of(args), form_of(kwargs))
        if key not in self._results:
            with self.fake_mode:
                result = op(*args, **kwargs)
            self._results[key] = form_of(result)
            return result
        return self._revive(self._results[key])

    def _revive(self, form: Any) -> Any:
        if isinstance(form, Form):
            return self._new_fake(form.data)
        if isinstance(form, tuple) and form and form[0] in (tuple, list):
            return form[0](self._revive(item) for item in form[1:])
        return None

    def _same(self, op: OpOverload, args: Any) -> Tensor:
        """Handle detach, alias and lift: return another tensor object for the same node."""
        source = args[0]
        if op is aten.detach_.default:
            return source
        with self.fake_mode:
            result = aten.alias.default(source)
        if op is aten.lift_fresh.default:
            self.record(aten.clone.default, (source,), {}, result := self._fake_like(source))
            return result
        self.register(result, self._nodes[id(source)])
        return result

    def _apart(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        with ExitStack() as stack:
            if self.autocast:
                device, dtype = self.autocast
                stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
            stack.enter_context(self)
            return _in_steps(op)(*args, **kwargs)

    def _cast_whole(self, op: OpOverload) -> bool:
        return kinds.is_cast_whole(op, self.autocast[0]) if self.autocast else True

    def _dynamic(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        """Record an operator whose result has a size that depends on values."""
        if kinds.is_composite(op):
            return self._apart(op, args, kwargs)
        if op is aten.index.Tensor:
            with self:
                return aten.index.Tensor(args[0], _positions(args[1]))
        if op is aten.masked_select.default:
            with self:
                shape = list(torch.broadcast_shapes(args[0].shape, args[1].shape))
                x, mask = (aten.expand.default(t, shape) for t in args)
                return aten.index.Tensor(x, _positions([mask]))
        if self.routing and (result := self.routing.dynamic(op, args, kwargs)) is not None:
            return result
        node = self.record(op, args, kwargs, None)
        real = self.read(node, shape_only=True)
        result = _map_tensors(real, self._fake_like)
        self.graph.erase_node(node)
        self.record(op, args, kwargs, result)
        return result

    def _refuse(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> None:
        if argument(op, args, kwargs, "train", False) and argument(op, args, kwargs, "p", 0.0):
            raise CaptureError(f"dropout in training mode at {self.current_line()}; call model.eval() first")
        if argument(op, args, kwargs, "dropout_p", 0.0):
            raise CaptureError(
                f"attention with dropout at {self.current_line()}; pass dropout_p=0.0 when the model is in eval mode"
            )
        if op.overloadpacket is aten.as_strided:
            raise CaptureError(
                f"as_strided at {self.current_line()} depends on the order in memory, which a split does not keep; "
                "use unfold, reshape or an index"
            )
        if op in (aten.batch_norm.default, aten.instance_norm.default) and args[3] is not None and args[5]:
            raise CaptureError(f"{op} in training mode at {self.current_line()}; call model.eval() first")
        if any(isinstance(value, torch.ScriptObject) for value in (*args, *kwargs.values())):
            raise CaptureError(
                f"{op} at {self.current_line()} keeps its weight in an object that only this process can read; "
                "keep it as tensors (whole numbers and scales) that forward() multiplies"
            )
        if (
            kinds.is_random(op)
            and argument(op, args, kwargs, "train", True)
            and argument(op, args, kwargs, "dropout", 1)
        ):
            raise DrawsError(
                f"{op} draws random numbers at {self.current_line()}: each rank would draw its own; "
                "pass them in as an input"
            )


def _refuse_subclass(tensor: Tensor, name: str) -> None:
    if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer) and not isinstance(tensor, FakeTensor):
        raise CaptureError(
            f"{name} is a {type(tensor).__name__}: of tensor subclasses only weights can be captured, and only such as "
            "are made of plain tensors (__tensor_flatten__)"
        )


def argument(op: OpOverload, args: Any, kwargs: dict[str, Any], name: str, default: Any) -> Any:
    """The argument of an operator by name; `default` if it was not passed or does not exist."""
    names = kinds.argument_names(op)
    place = names.index(name) if name in names else len(args)
    return args[place] if place < len(args) else kwargs.get(name, default)


def _in_steps(op: OpOverload) -> Any:
    """A function of smaller operators that computes the same as a composite one."""
    return _fill_diagonal if op is aten.fill_diagonal_.default else op.decompose


def _fill_diagonal(x: Tensor, value: Any, wrap: bool = False) -> Tensor:
    """`fill_diagonal_` without a look at memory, so that it works on any view."""
    if wrap and x.dim() == 2 and x.shape[0] > x.shape[1]:
        return aten.fill_diagonal_.default.decompose(x, value, wrap)
    diagonal = x
    for _ in range(x.dim() - 1):
        diagonal = aten.diagonal.default(diagonal, 0, 0, -1)
    aten.fill_.Scalar(diagonal, value)
    return x


def _positions(index: Any) -> list[Any]:
    """Replace each mask in an index by the positions where it is true."""
    plain: list[Any] = []
    for item in index:
        if item is not None and item.dtype in (torch.bool, torch.uint8):
            plain.extend(aten.unbind.int(aten.nonzero.default(item), 1))
        else:
            plain.append(item)
    return plain


def _map_tensors(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map_tensors(v, change) for v in value) if type(value) in (tuple, list) else value
    if isinstance(value, dict):
        return {k: _map_tensors(v, change) for k, v in value.items()}
    return value


def _to_nodes(value: Any, recorder: Recorder) -> Any:
    return _map_tensors(value, recorder.node)


_SAME = {aten.detach.default, aten.detach_.default, aten.alias.default, aten.lift_fresh.default, aten.lift.default}
_RENAMED_VIEWS = {
    *(aten.squeeze_, aten.unsqueeze_, aten.transpose_, aten.t_, aten.swapaxes_, aten.swapdims_),
    *(aten.resize_, aten.resize_as_, aten.set_, aten.as_strided_),
}
