"""Messages between processes: however many pieces they come in, and when the other side falls silent."""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from fxpass.runtime.wire import Connection


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


class SilenceError(Exception):
    pass


def give_up() -> None:
    raise SilenceError


@pytest.mark.parametrize("bytes_", [0, 5, 16, 20], ids=["nothing", "half a header", "a header", "half a message"])
def test_a_wait_for_the_rest_of_a_message_can_be_given_up(
    ends: tuple[socket.socket, socket.socket], bytes_: int
) -> None:
    ours, theirs = ends
    theirs.sendall((b"\x28" + bytes(15) + bytes(4))[:bytes_])
    with pytest.raises(SilenceError):
        Connection(ours).receive(give_up)


def test_a_wait_for_file_descriptors_can_be_given_up(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    theirs.sendall(b"\x28" + bytes(7) + b"\x02" + bytes(7))
    with pytest.raises(SilenceError):
        Connection(ours).receive(give_up)


def test_a_message_that_nobody_takes_can_be_given_up(ends: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(SilenceError):
        Connection(ends[0]).send(bytes(10 << 20), give_up)


def test_a_large_message_with_many_tensors_arrives_and_they_share_memory(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = map(Connection, ends)
    message = [torch.full((3,), float(i)) for i in range(450)], os.urandom(3 << 20)
    sending = threading.Thread(target=ours.send, args=(message, give_up))
    sending.start()
    tensors, data = theirs.receive(give_up)
    sending.join()
    assert data == message[1]
    message[0][449].fill_(-1)
    assert [each.tolist() for each in tensors] == [each.tolist() for each in message[0]]


def test_file_descriptors_above_1023_can_be_waited_for() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1100):
            stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        ours, theirs = (Connection(stack.enter_context(end)) for end in socket.socketpair())
        assert ours.fileno() > 1023
        assert not ours.ready(0)
        theirs.send("message", give_up)
        assert ours.ready(0)
        assert ours.receive(give_up) == "message"


def test_a_closed_end_and_an_ended_one_are_connection_errors(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = map(Connection, ends)
    ours.close()
    for use in (lambda: theirs.send("message"), theirs.receive, lambda: ours.send("message"), ours.receive):
        with pytest.raises(ConnectionError):
            use()
