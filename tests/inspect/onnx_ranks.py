"""Run the ONNX models of all ranks in onnx's reference evaluator, joined by their puts and gets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor

from fxpass.capture.structure import WeightTable
from fxpass.inspect.exchanges import message_ids
from fxpass.inspect.onnx_model import Names, step_models
from fxpass.ir.step import PACE, Mode, Step, StepProgram
from fxpass.passes.lower_comm import StepPrograms
from fxpass.plan import Plan
from fxpass.runtime.step_runner import ContextState

#: (rank, mode) -> what has the model, and its program
Models = dict[tuple[int, Mode], tuple[ir.Model, StepProgram]]
SECONDS = 60  #: that a get waits for a put


def models_of(plan: Plan, modes: Sequence[Mode], ranks: Sequence[int] | None = None) -> Models:
    """The ONNX models of these ranks (None: of all) in these modes, weights and constants being inputs."""
    chosen = {rank: StepPrograms(plan.graph, rank) for rank in (range(plan.world_size) if ranks is None else ranks)}
    programs: dict[tuple[int, Mode], StepProgram] = {
        (rank, mode): each[each.canonical(mode)] for rank, each in chosen.items() for mode in modes
    }
    different = list(dict.fromkeys(programs.values()))
    labels = plan.program.weights | dict(zip(plan.program.inputs, plan.program.input_paths, strict=True))
    names = Names(labels, message_ids(plan.graph, next(iter(chosen.values())).channels), plan.program.modules)
    made = dict(zip(different, step_models(different, names, {}), strict=True))
    return {key: (made[program], program) for key, program in programs.items()}


class Wires:
    """The channels between all ranks: each holds the last two messages.

    Args:
        tamper: changes a payload on its way, which `x3.1 0>2` names.
    """

    def __init__(self, tamper: Callable[[str, Any], Any] | None = None) -> None:
        self.tamper = tamper
        self.payloads: dict[tuple[int, str, int], Any] = {}  #: (channel, route, number of the message)
        self.numbers: dict[tuple[int, int], int] = {}  #: messages put so far, by channel and rank
        self.changed = threading.Condition()

    def put(self, rank: int, channel: int, routes: Sequence[str], payloads: Sequence[Any]) -> None:
        with self.changed:
            number = self.numbers[channel, rank] = self.numbers.get((channel, rank), 0) + 1
            for route, payload in zip(routes, payloads, strict=True):
                sent = payload.copy() if self.tamper is None else self.tamper(route, payload.copy())
                self.payloads[channel, route, number] = sent
                self.payloads.pop((channel, route, number - 2), None)
            self.changed.notify_all()

    def get(self, rank: int, channel: int, routes: Sequence[str]) -> list[Any] | None:
        """None if there is no message yet."""
        with self.changed:
            number = self.numbers.get((channel, rank), 0)
            wanted = [(channel, route, number) for route in routes]
            if not number:
                return None
            assert self.changed.wait_for(lambda: all(each in self.payloads for each in wanted), SECONDS), wanted
            return [self.payloads[each] for each in wanted]


def operators(rank: int, wires: Wires, shapes: dict[str, tuple[Any, Any]]) -> list[type[OpRun]]:
    """`Put` and `Get` of a rank.

    Args:
        shapes: shape and dtype of what is got, by name.
    """

    class Put(OpRun):
        op_domain = "fxpass"

        def _run(self, token: Any, *payloads: Any, **attributes: Any) -> tuple[Any, ...]:
            wires.put(rank, self.channel, self.exchanges, payloads)
            return (np.array(True),)

    class Get(OpRun):
        op_domain = "fxpass"

        def _run(self, token: Any, **attributes: Any) -> tuple[Any, ...]:
            found = wires.get(rank, self.channel, self.exchanges)
            if found is None:
                found = [np.zeros(*shapes[name]) for name in self.onnx_node.output[1:]]
            return (np.array(True), *found)

    return [Put, Get]


class Ranks:
    """Steps of all ranks, one after the other."""

    def __init__(self, plan: Plan, model: Any, models: Models, tamper: Callable[[str, Any], Any] | None = None) -> None:
        self.plan, self.models, self.wires = plan, models, Wires(tamper)
        self.context = ContextState()
        tensors = WeightTable(model, list(plan.program.weights.values())).tensors()
        self.weights = dict(zip(plan.program.weights.values(), map(as_array, tensors), strict=True))
        self.constants = {name: as_array(each) for name, each in plan.program.constants.items()}
        self.state: list[dict[str, Any]] = [
            {spec.name: as_array(torch.zeros(spec.shape, dtype=spec.dtype)) for spec in program.state}
            for program in (models[rank, "exact"][1] for rank in range(plan.world_size))
        ]
        self.evaluators: dict[tuple[int, Mode], ReferenceEvaluator] = {}

    def run(self, inputs: Sequence[Tensor], step: Step) -> list[list[Tensor]]:
        """The outputs of every rank."""
        mode = self.context.next(step)
        with ThreadPoolExecutor(self.plan.world_size) as pool:
            return list(pool.map(lambda rank: self._run(rank, mode, inputs, step), range(self.plan.world_size)))

    def _run(self, rank: int, mode: Mode, inputs: Sequence[Tensor], step: Step) -> list[Tensor]:
        model, program = self.models[rank, mode]
        if (rank, mode) not in self.evaluators:
            shapes = {
                str(value.name): (tuple(value.shape or ()), value.dtype.numpy())
                for node in model.graph
                if node.op_type == "Get"
                for value in node.outputs[1:]
            }
            self.evaluators[rank, mode] = ReferenceEvaluator(
                ir.to_proto(model), new_ops=operators(rank, self.wires, shapes)
            )
        given = dict(zip(self.plan.program.input_paths, map(as_array, inputs), strict=True))
        feeds = self.weights | self.constants | given | {PACE: np.array(step.pace)} | self.state[rank]
        outputs: Any = self.evaluators[rank, mode].run(None, feeds)
        state = outputs[len(outputs) - len(program.state) - bool(program.channels) :]
        self.state[rank] = dict(zip((spec.name for spec in program.state), state, strict=False))
        return [torch.from_numpy(np.asarray(each)) for each in outputs[: len(outputs) - len(state)]]


def as_array(x: Tensor) -> Any:
    return x.detach().numpy()
