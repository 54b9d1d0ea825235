"""Which operators become one node of the graph, and which are decomposed.

A composite operator (ATen implements it by other operators: linear, conv2d, attention, einsum) stays whole if it is
functional, so that one rule can handle it. A composite operator that may return a view of its operand (reshape,
contiguous, chunk, to) is decomposed, because its result depends on strides.
"""

from __future__ import annotations

from functools import cache

import torch
from torch._C import _dispatch_has_kernel_for_dispatch_key as _has_kernel
from torch._ops import OpOverload

from ..ir.operators import aliases

aten = torch.ops.aten

_METADATA = {
    *(aten.size, aten.sym_size, aten.stride, aten.sym_stride, aten.storage_offset, aten.sym_storage_offset),
    *(aten.numel, aten.sym_numel, aten.dim, aten.is_contiguous, aten.sym_is_contiguous, aten.is_strides_like_format),
    *(aten.is_non_overlapping_and_dense, aten.is_same_size),
}
#: taken apart: joints that are a `cat` of operands with as many dims, and so on
_SPELLINGS = {aten.vstack, aten.row_stack, aten.hstack, aten.dstack, aten.column_stack, aten.concat, aten.concatenate}
_SPELLINGS |= {aten.atleast_1d, aten.atleast_2d, aten.atleast_3d}
_SPELLINGS |= {aten.pad_sequence}  # torch 2.11 has a fake of it that does not take all of its arguments


@cache
def argument_names(op: OpOverload) -> tuple[str, ...]:
    return tuple(argument.name for argument in op._schema.arguments)


@cache
def is_composite(op: OpOverload) -> bool:
    return _has_kernel(op.name(), "CompositeImplicitAutograd")


@cache
def mutates(op: OpOverload) -> bool:
    return op._schema.is_mutable


@cache
def written_arguments(op: OpOverload) -> tuple[str, ...]:
    """The names of the arguments that the operator writes to."""
    arguments = op._schema.arguments
    return tuple(each.name for each in arguments if each.alias_info is not None and each.alias_info.is_write)


@cache
def has_functional_form(op: OpOverload) -> bool:
    """Whether torch knows an operator that returns what `op`, which writes in place, writes."""
    return _has_kernel(op.name(), "Functionalize")


@cache
def returns_tensors(op: OpOverload) -> bool:
    return all("Tensor" in str(r.type) for r in op._schema.returns)


@cache
def stays_whole(op: OpOverload) -> bool:
    """Whether the operator becomes one node."""
    if not is_composite(op):
        return True
    if op.overloadpacket in _SPELLINGS:
        return False
    maybe_aliases = torch.Tag.maybe_aliasing_or_mutating in op.tags  # functional by its schema only
    return not maybe_aliases and not aliases(op) and returns_tensors(op)


@cache
def is_cast_whole(op: OpOverload, device: str) -> bool:
    """Whether autocast casts the operands of a composite operator. Otherwise it casts inside the decomposition."""
    return _has_kernel(op.name(), "Autocast" + device.upper())


@cache
def is_metadata(op: OpOverload) -> bool:
    """Whether the operator returns a size or a device. Such operators run at once and are not recorded."""
    return op.namespace == "prim" or op.overloadpacket in _METADATA


@cache
def is_random(op: OpOverload) -> bool:
    """Whether the operator always draws random numbers. Not so attention and dropout: an argument can switch it off."""
    names = argument_names(op)
    optional = "dropout_p" in names or {"p", "train"} <= {*names}
    return torch.Tag.nondeterministic_seeded in op.tags and not optional
