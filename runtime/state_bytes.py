"""What a rank holds from one step to the next, for each kind of channel."""

from __future__ import annotations

from torch import fx

from ..ir.comm import state_bytes
from ..ir.program import exchanges_of
from ..passes.lower_comm import StepPrograms
from .channels import in_process_bytes
from .process_group import held_bytes
from .shared_memory import file_layout
from .symmetric_memory import buffer_places


def bytes_by_channel(graph: fx.Graph, world: int) -> dict[str, tuple[int, ...]]:
    """Bytes that each rank holds per context (a guidance branch of a generation), by kind of channel.

    Messages for the next step, and what forecasts, estimates and codes need of the steps before. Buffers that exist as
    long as the context does count as well: of shared and of symmetric memory those of all messages, twice where a rank
    may put one while another still reads the last.

    Args:
        graph: a scheduled plan.
    """
    specs = StepPrograms(graph, 0).channels
    ranks = range(world)
    nodes = [declared for _, declared in exchanges_of(graph)]
    state = [sum(state_bytes(declared, declared[0].place(rank)) for declared in nodes) for rank in ranks]
    symmetric = buffer_places(specs, world)[0] if all(each.exchanges[0].lines == 1 for each in specs) else None
    messages = {
        "in one process": [in_process_bytes(specs, rank) for rank in ranks],
        "shared memory": [file_layout(specs, rank)[0] for rank in ranks],
        "gloo": [held_bytes(specs, rank, blocking=True) for rank in ranks],
        "NCCL": [held_bytes(specs, rank, blocking=False) for rank in ranks],
    }
    if symmetric is not None:
        messages["symmetric memory"] = [symmetric] * world
    return {
        kind: tuple(kept + size for kept, size in zip(state, sizes, strict=True)) for kind, sizes in messages.items()
    }
