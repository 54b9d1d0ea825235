"""The kernels by which GPUs of one machine write to each other. Imported on CUDA only: they need triton."""
# pyright: reportMissingParameterType=false, reportMissingImports=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer


@triton.jit
def signal(flags, step, stopped):
    """Write the number of this step into flags of other ranks: one program each. Not after a wait that was stopped.

    Args:
        flags: the addresses of the flags, int64 [readers].
        step: the number of this step, 0-dim int32.
        stopped: 0-dim int32 on the device; what is sent after a wait without its message is garbage.
    """
    flag = tl.load(flags + tl.program_id(0)).to(tl.pointer_type(tl.int32))
    if tl.load(stopped, volatile=True) == 0:
        tl.atomic_xchg(flag, tl.load(step), sem="release", scope="sys")


@triton.jit
def wait(flags, step, stopped, abort, timed_out, limit):
    """Spin until each flag has reached the number of this step: one program each.

    Ends as well when the host sets `abort`, after `limit` nanoseconds, and at once if an earlier wait ended so; then it
    sets `stopped`, and `timed_out` if the limit was the reason.

    Args:
        flags: the addresses of the own flags of the senders, int64 [senders].
        step: the number of this step, 0-dim int32.
        stopped: 0-dim int32 on the device.
        abort, timed_out: addresses of int32 words in pinned memory of the host.
    """
    flag = tl.load(flags + tl.program_id(0)).to(tl.pointer_type(tl.int32))
    abort_word = abort.to(tl.pointer_type(tl.int32))
    wanted = tl.load(step)
    began = globaltimer()
    late = 0
    end = tl.load(stopped, volatile=True)
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    while (seen < wanted) & (end == 0):
        late = (globaltimer() - began > limit).to(tl.int32)
        end = late | tl.load(abort_word, volatile=True) | tl.load(stopped, volatile=True)
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    if seen < wanted:
        tl.store(stopped, 1)
        if late != 0:
            tl.store(timed_out.to(tl.pointer_type(tl.int32)), 1)


@triton.jit
def copy(source, table, words: tl.constexpr):
    """Copy pieces of one tensor to any addresses: one program for each piece.

    Args:
        source: the address of the tensor's storage; it and all below are multiples of 16 bytes.
        table: int64 [pieces, 3]: where the piece begins in the storage, where it goes to (an address), and its size.
        words: the largest size of a piece, in words of 4 bytes; a power of 2.
    """
    row = table + tl.program_id(0) * 3
    start = (source + tl.load(row)).to(tl.pointer_type(tl.int32))
    goal = tl.load(row + 1).to(tl.pointer_type(tl.int32))
    lane = tl.arange(0, words)
    inside = lane < tl.multiple_of(tl.load(row + 2) // 4, 4)
    values = tl.load(tl.multiple_of(start, 16) + lane, mask=inside)
    tl.store(tl.multiple_of(goal, 16) + lane, values, mask=inside)
