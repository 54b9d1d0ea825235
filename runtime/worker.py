"""A worker process of the spawn executor: `python -m fxpass.runtime.worker DESCRIPTOR RANK WORLD PORT TIMEOUT THREADS`.

It knows nothing of models: it receives rank programs, weights and inputs, and runs them until the connection closes.
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
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore

from .board import Board
from .collectives import Collectives, Sessions
from .errors import RankError
from .local import HOST, connect
from .runner import Runner
from .wire import Channel, ClosedError


class Worker:
    """Loaded plans by number, and the weights that they share."""

    def __init__(self, links: Collectives) -> None:
        self.links = links
        self.weights: dict[str, Tensor] = {}
        self.plans: dict[int, tuple[Runner, list[str | int], list[Tensor], Sessions]] = {}

    def handle(self, message: tuple[Any, ...]) -> None:
        match message:
            case ("weights", tensors):
                self.weights |= tensors
            case ("load", number, code, sources, tensors, compile):
                # sources: for each placeholder, the name of a weight or an index in `tensors`
                sessions = Sessions(self.links, code.sites, torch.device("cpu"))
                self.plans[number] = (Runner(code, compile), sources, tensors, sessions)
            case ("release", number, unused):
                self.plans.pop(number)[-1].close()
                for name in unused:
                    del self.weights[name]
            case ("run", number, call, step):
                self.links.board.call = call
                runner, sources, tensors, sessions = self.plans[number]
                values = [self.weights[s] if isinstance(s, str) else tensors[s] for s in sources]
                runner.run(values, sessions.at(step), step)


def main(descriptor: int, rank: int, world: int, port: int, timeout: float, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driving process, which ends its workers
    torch.set_num_threads(threads)
    channel = Channel(socket.socket(fileno=descriptor))
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, inbox), daemon=True).start()
    store = TCPStore(HOST, port, is_master=False, timeout=timedelta(seconds=timeout))
    channel.send(("ready", os.getpid()))
    worker = Worker(connect(store, Board(PrefixStore("board", store), rank, world, timeout)))
    with torch.inference_mode():
        while True:
            message = inbox.get()
            try:
                if isinstance(message, BaseException):
                    raise message
                message = message.open()
                worker.handle(message)
            except BaseException as error:
                if not isinstance(error, RankError):
                    worker.links.board.publish(error)
                channel.send(("error", isinstance(error, RankError), "".join(traceback.format_exception(error))))
                return
            if message[0] in ("load", "run"):
                channel.send(("done",))


def _read(channel: Channel, inbox: queue.SimpleQueue[Any]) -> None:
    """Put arriving messages into the inbox. End this process when the driving process closes the connection or dies."""
    parent = os.getppid()
    try:
        while True:
            while not channel.ready(2.0):
                if os.getppid() != parent:
                    raise ClosedError
            inbox.put(channel.packet())
    except ClosedError:
        os._exit(0)
    except BaseException as error:
        inbox.put(error)


if __name__ == "__main__":
    _descriptor, _rank, _world, _port = map(int, sys.argv[1:5])
    _, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_hard, _hard))  # each weight arrives as an open file
    main(_descriptor, _rank, _world, _port, float(sys.argv[5]), int(sys.argv[6]))
