"""What a rank holds from one step to the next, for each kind of channel."""

from __future__ import annotations

import operator

from torch import fx

from ..ir.comm import state_bytes
from ..ir.mesh import Placement
from ..ir.program import exchanges_of
from ..passes.lower_comm import StepPrograms
from .channels import in_process_bytes
from .process_group import held_bytes
from .shared_memory import file_layout
from .symmetric_memory import buffer_places


def bytes_by_channel(graph: fx.Graph, placement: Placement) -> dict[str, tuple[int, ...]]:
    """Bytes that each process holds per context (a guidance branch of a generation), by kind of channel.

    In one process these are those of each rank.

    Messages for the next step, and what forecasts, estimates and codes need of the steps before. Buffers that exist as
    long as the context does count as well: of shared and of symmetric memory those of all messages, twice where a rank
    may put one while another still reads the last.

    Args:
        graph: a scheduled plan.
    """
    specs = StepPrograms(graph, 0).channels
    processes = range(placement.processes)
    nodes = [declared for _, declared in exchanges_of(graph)]

    def kept(rank: int) -> int:
        return sum(state_bytes(declared, rank) for declared in nodes)

    here = [[in_process_bytes(specs, rank, ranks) for rank in ranks] for ranks in placement]
    messages = {
        "shared memory": [file_layout(specs, placement, each)[0] for each in processes],
        "gloo": [held_bytes(specs, placement, each, blocking=True) for each in processes],
        "NCCL": [held_bytes(specs, placement, each, blocking=False) for each in processes],
    }
    if all(each.exchanges[0].lines == 1 for each in specs) and not placement.several:
        messages["symmetric memory"] = [buffer_places(specs, placement.world)[0]] * placement.world
    state = [sum(map(kept, ranks)) + sum(own) for ranks, own in zip(placement, here, strict=True)]
    found = {kind: tuple(map(operator.add, state, sizes)) for kind, sizes in messages.items()}
    every = [kept(rank) + in_process_bytes(specs, rank) for rank in range(placement.world)]
    return {"in one process": tuple(every)} | found
