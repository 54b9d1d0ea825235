"""A worker process of the spawn executor: `python -m fxpass.runtime.worker DESCRIPTOR RANK WORLD PORT …`.

It knows nothing of models: it receives codes, weights and inputs, and runs steps until the connection closes.
"""

from __future__ import annotations

import os
import queue
import resource
import signal
import socket
import sys
import threading
import traceback
from collections import Counter
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore, is_nccl_available

from ..ir.code import StepCode
from ..ir.step import Mode
from .board import Board
from .errors import RankError
from .groups import HOST, connect
from .held import Held
from .network import Network
from .numerics import apply
from .rank_steps import RankSteps
from .step_runner import LoadedPlan, StepRunner, new_compiler
from .weights import allocate, bytes_of, views
from .wire import Connection


class Worker:
    """Loaded plans by number, with the codes that the driving process has sent so far, and their weights."""

    def __init__(self, network: Network, device: torch.device) -> None:
        self.network = network
        self.device = device
        self.weights: dict[str, Tensor] = {}  #: shared with the driving process, or copies
        self.buffer = torch.empty(0, dtype=torch.uint8)  #: through which copies come
        self.plans: dict[int, LoadedPlan] = {}
        self.codes: dict[int, dict[Mode, list[StepCode]]] = {}
        self.steps: dict[int, RankSteps] = {}
        self.held = Held()  #: of all executors

    def handle(self, message: tuple[Any, ...]) -> None:
        match message:
            case ("weights", tensors):
                self.weights |= tensors
            case ("buffer", buffer):
                self.buffer = buffer
            case ("copies", forms):
                allocate(forms, self.weights, self.device)
            case ("tied", names):
                self.weights |= {name: self.weights[first] for name, first in names.items()}
            case ("piece", piece):
                for (name, start, size), part in zip(piece, views(self.buffer, piece), strict=True):
                    if name in self.weights:  # else other workers need it
                        bytes_of(self.weights[name])[start : start + size].copy_(part)
            case ("numerics", choices):
                apply(choices)
            case ("load", number, plan):
                self.plans[number] = plan
                self.codes[number] = {}
                self.steps[number] = self.loaded(plan, self.codes[number])
            case ("code", number, mode, codes):
                self.codes[number][mode] = [code.on(self.device) for code in codes]
            case ("release", number):
                self.steps.pop(number).close()
                del self.plans[number], self.codes[number]
            case ("forget", numbers):
                self.held.forget(numbers)
            case ("drop", names):
                for name in names:
                    self.weights.pop(name, None)
            case ("run", number, call, context, mode, pace, holding):
                self.network.board.call = call
                plan = self.plans[number]
                weights = [self.weights[name] for name in plan.weights]
                inputs = [x if kept else x.to(self.device) for x, kept in zip(plan.inputs, plan.on_host, strict=True)]
                self.steps[number].run(weights, inputs, context, mode, pace, self.held, holding)

    def loaded(self, plan: LoadedPlan, codes: dict[Mode, list[StepCode]]) -> RankSteps:
        constants = [constant.to(self.device) for constant in plan.constants]
        board = self.network.board
        runners = [
            StepRunner(
                plan.names,
                constants,
                state,
                channels,
                lambda mode, i=i: codes[mode][i],
                self.device,
                Counter(),
                new_compiler(rank, board.world) if plan.compile else None,
            )
            for i, (rank, (channels, state)) in enumerate(
                zip(plan.placement.ranks(board.rank), plan.ranks, strict=True)
            )
        ]
        return RankSteps(
            runners,
            lambda specs: self.network.open(specs, self.device, plan.placement),
            plan.placement,
            self.network,
            graph=plan.graph,
        )


def main(descriptor: int, rank: int, world: int, port: int, timeout: float, threads: int, device: torch.device) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driving process, which ends its workers
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    connection = Connection(socket.socket(fileno=descriptor))
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
    store = TCPStore(HOST, port, is_master=False, timeout=timedelta(seconds=timeout))
    connection.send(("ready", os.getpid()))
    board = Board(PrefixStore("board", store), rank, world, timeout)
    worker = Worker(connect(board, device, nccl=is_nccl_available(), local=True), device)
    with torch.inference_mode():
        while True:
            message = inbox.get()
            try:
                if isinstance(message, BaseException):
                    raise message
                message = message()
                worker.handle(message)
            except BaseException as error:
                if not isinstance(error, RankError):
                    worker.network.board.publish(error)
                connection.send(("error", isinstance(error, RankError), "".join(traceback.format_exception(error))))
                if device.type == "cuda":  # nothing is left to wait for what a device still does
                    os._exit(0)
                return
            if message[0] in ("load", "code", "piece", "run"):
                connection.send(("done",))


def _read(connection: Connection, inbox: queue.SimpleQueue[Any]) -> None:
    """Put arriving messages into the inbox. End this process when the driving process closes the connection or dies."""
    parent = os.getppid()
    try:
        while True:
            while not connection.ready(2.0):
                if os.getppid() != parent:
                    raise ConnectionError
            inbox.put(connection.packet())
    except ConnectionError:
        os._exit(0)
    except BaseException as error:
        inbox.put(error)


if __name__ == "__main__":
    _descriptor, _rank, _world, _port = map(int, sys.argv[1:5])
    _, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_hard, _hard))  # each weight arrives as an open file
    main(_descriptor, _rank, _world, _port, float(sys.argv[5]), int(sys.argv[6]), torch.device(sys.argv[7]))
