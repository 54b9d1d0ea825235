"""The predicted memory of a device, against what a step really allocates."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxpass.ir import comm
from fxpass.ir.step import Mode, StepProgram
from fxpass.passes.codegen import step_code
from fxpass.passes.lower_comm import StepPrograms
from fxpass.passes.targets import find
from fxpass.predict import memory
from fxpass.predict.memory import weights_of
from fxpass.predict.price import Prices
from tests.inspect.plans import planned, small

META = torch.device("meta")


class Alive:
    """Counts the bytes of storages that are alive."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.known: set[int] = set()

    def add(self, tree: Any) -> None:
        for each in pytree.tree_leaves(tree):
            if isinstance(each, Tensor) and (key := each.untyped_storage()._cdata) not in self.known:
                storage = each.untyped_storage()
                self.known.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.end, key, storage.nbytes())
        self.most = max(self.most, self.now)

    def end(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def watched(self, operator: Any) -> Any:
        """An operator whose results are counted."""

        def run(*args: Any, **kwargs: Any) -> Any:
            result = operator(*args, **kwargs)
            self.add(result)
            return result

        return run if callable(operator) else operator


def measured(program: StepProgram, inputs: tuple[str, ...]) -> int:
    """The largest number of bytes alive between two operators of a step, beside weights and state."""
    values: list[Tensor] = []
    given = 0
    for node in program.graph.find_nodes(op="placeholder"):
        shape, dtype = node.meta["local_shape"], node.meta["dtype"]
        values.append(torch.empty(shape, dtype=dtype, device=META))
        given += values[-1].nbytes if node.target in inputs else 0
    alive = Alive()
    alive.known |= {each.untyped_storage()._cdata for each in values}
    code = step_code(program)
    table = {name: alive.watched(each) if name.startswith("f") else each for name, each in code.table.items()}
    run = replace(code, table=table).run(values)
    received = None
    with torch.no_grad():
        try:
            while True:
                act, channel, _ = run.send(received)
                received = None
                if act == "get":
                    exchanges = program.channels[channel].exchanges
                    received = [comm.new_received(each, program.rank, META) for each in exchanges]
                    alive.add(received)
        except StopIteration:
            return alive.most + given


@pytest.mark.parametrize("mode", ["exact", "steady"])
@pytest.mark.parametrize("make", [lambda: planned("displaced", 3), lambda: small("flux", 2, "displaced")])
def test_predicted_activations_are_those_of_a_step(make: Any, mode: Mode) -> None:
    made = make()
    program = StepPrograms(made.graph, 0)[mode]
    prices = Prices(find("cpu").device, made.world_size)
    predicted = memory.alive(program, made.program.inputs, prices).max(0)
    assert float(predicted[0]) == pytest.approx(measured(program, made.program.inputs), rel=0.15)


def test_weights_count_whole_on_every_rank() -> None:
    made = small("unet_sd")
    from fxpass.models.small import case

    whole = sum(each.nbytes for each in case("unet_sd").build().parameters())
    assert weights_of(made.program, made.graph, range(made.world_size)) >= whole
