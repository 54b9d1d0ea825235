"""Messages between the driving process and its workers: plain data, and tensors through shared memory.

A CPU tensor is sent as the file descriptor of its memory, which is moved to shared memory *in place*: the sender's
tensor stays valid, and both sides see each other's writes. The files are unlinked when they are created, so that none
is left in /dev/shm however the processes end.
"""

from __future__ import annotations

import os
import resource
import select
import socket
import struct
from array import array
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .operators import reference, resolve
from .pickling import Pickler, Unpickler

_HEADER = struct.Struct("<QQ")  # bytes of the message, file descriptors that come before it
_PER_CALL = 200  # file descriptors per system call; Linux takes 253
_PAUSE = 1.0  # seconds of silence, after which a wait is watched
Watch = Callable[[], None]  #: called again and again in a wait for the other side; raises if the wait is in vain


class Connection:
    """One end of a connection.

    The other side may fall silent in the middle of a message, so each wait for it can be watched.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Any, watch: Watch | None = None) -> None:
        """Send a message. Raises `ConnectionError` if the other side has ended."""
        descriptors: list[int] = []
        payload = Pickler(partial(_placed, descriptors, {}), _reduced).pickled(message)
        try:
            self._send(_HEADER.pack(len(payload), len(descriptors)), (), watch)
            for i in range(0, len(descriptors), _PER_CALL):
                self._send(b".", descriptors[i : i + _PER_CALL], watch)
            self._send(payload, (), watch)
        except OSError as error:
            raise ConnectionError(str(error)) from None

    def receive(self, watch: Watch | None = None) -> Any:
        """The next message; waits for it. Raises `ConnectionError` at the end."""
        return self.packet(watch)()

    def packet(self, watch: Watch | None = None) -> Callable[[], Any]:
        """The next message, as a function that unpickles it, to be called once. Raises `ConnectionError` at the end."""
        size, count = _HEADER.unpack(self._exactly(_HEADER.size, watch))
        descriptors: list[int] = []
        while len(descriptors) < count:
            expected = min(_PER_CALL, count - len(descriptors))
            self._wait(select.POLLIN, watch)
            try:
                data, some, _, _ = socket.recv_fds(self._socket, 1, expected)
            except OSError as error:
                raise ConnectionError(str(error)) from None
            if not data:
                raise ConnectionError("the connection ended in the middle of a message")
            if len(some) != expected:
                raise OSError("file descriptors were lost in transfer: the limit of open files is too low (ulimit -n)")
            descriptors += some
        return partial(_unpickled, self._exactly(size, watch), descriptors)

    def ready(self, seconds: float) -> bool:
        """Whether a message (or the end) arrives within the time."""
        return self._can(select.POLLIN, seconds)

    def close(self) -> None:
        self._socket.close()

    def _can(self, event: int, seconds: float | None) -> bool:
        """Whether bytes can be read or written within the time. Raises `ConnectionError` if this end was closed."""
        if self._socket.fileno() < 0:
            raise ConnectionError("the connection was closed")
        poll = select.poll()  # `select.select` takes no file descriptor above 1023
        poll.register(self._socket, event)
        return bool(poll.poll(None if seconds is None else 1000 * seconds))

    def _wait(self, event: int, watch: Watch | None) -> None:
        """Wait until bytes can be read or written."""
        while not self._can(event, None if watch is None else _PAUSE):
            if watch is not None:
                watch()

    def _send(self, data: bytes | memoryview, descriptors: Sequence[int], watch: Watch | None) -> None:
        """Send bytes, the first of them with file descriptors."""
        view = memoryview(data)
        while len(view):
            self._wait(select.POLLOUT, watch)
            along = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
            try:
                view = view[self._socket.sendmsg([view], along, socket.MSG_DONTWAIT) :]
            except BlockingIOError:  # the kernel has less room than it said
                continue
            descriptors = ()

    def _exactly(self, size: int, watch: Watch | None) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while len(view):
            self._wait(select.POLLIN, watch)
            try:
                count = self._socket.recv_into(view)
            except OSError as error:
                raise ConnectionError(str(error)) from None
            if not count:
                raise ConnectionError("the connection ended")
            view = view[count:]
        return data


def raise_file_limit(count: int) -> None:
    """Raise the soft limit of open files if it is too low for `count` more.

    Raises:
        OSError: the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = len(os.listdir("/proc/self/fd")) + count + 256
    if soft == resource.RLIM_INFINITY or need <= soft:
        return
    if hard != resource.RLIM_INFINITY and need > hard:
        raise OSError(
            f"sharing this model's weights needs {need} open files, the limit is {hard}; raise it (`ulimit -Hn`, or "
            "`docker run --ulimit nofile=65536`)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


def _placed(descriptors: list[int], places: dict[int, int], tensor: Tensor) -> Any:
    """What stands for a tensor on the CPU: its form, and which of the descriptors that are sent is that of its memory.

    Args:
        places: by the address of a storage; changed in place, as the descriptors are.
    """
    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        raise TypeError(f"only tensors on the CPU are shared between processes, not {tensor.device}")
    storage = tensor.untyped_storage()
    place = None
    if storage.nbytes():
        descriptor, _ = storage._share_fd_cpu_()  # moves it to shared memory unless it is there
        address = storage.data_ptr()
        if address not in places:
            places[address] = len(descriptors)
            descriptors.append(descriptor)
        place = places[address]
    layout = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
    return (place, storage.nbytes(), tensor.dtype, *layout, tensor.is_conj(), tensor.is_neg())


def _reduced(obj: Any) -> Any:
    """How operators and dataclasses are pickled."""
    if isinstance(obj, torch._ops.OpOverload):
        return resolve, reference(obj)
    if is_dataclass(obj) and not isinstance(obj, type):
        # the fields only, without cached properties: hashes differ between processes
        return _rebuild, (type(obj), {field.name: getattr(obj, field.name) for field in fields(obj)})
    return NotImplemented


def _unpickled(data: bytearray, descriptors: list[int]) -> Any:
    """Unpickle a message; imports the modules that register its operators."""
    storages: dict[int, torch.UntypedStorage] = {}

    def tensor_at(placed: Any) -> Tensor:
        place, size, dtype, shape, stride, offset, conjugate, negative = placed
        if place is None:
            storage = torch.UntypedStorage(0)
        else:
            if place not in storages:
                storages[place] = torch.UntypedStorage._new_shared_fd_cpu(descriptors[place], size)
            storage = storages[place]
        tensor = torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)
        tensor = torch._conj(tensor) if conjugate else tensor
        return torch._neg_view(tensor) if negative else tensor

    try:
        return Unpickler(data, tensor_at).load()
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _rebuild(kind: Any, values: dict[str, Any]) -> Any:
    return kind(**values)
