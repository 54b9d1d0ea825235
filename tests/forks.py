"""Start Python processes in milliseconds: they fork from a server that has imported torch before.

A server has one thread and computes nothing, so that its forks are as good as processes that begin by themselves. Each
test process starts its own servers when it first needs them; they end with it.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import os
import pickle
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = ("torch._dynamo", "torch._inductor.config")  #: of every server
FXPASS = ("fxpass.api",)
SECONDS = 240  #: that a process may take
_NUMBER = struct.Struct("<i")
_LARGEST = 1 << 18  # bytes of a request
_ASIDE = 512  # descriptors from here on are in nobody's way


class Forked:
    """What `subprocess.Popen` is for commands `python -P -m MODULE …` and `python -c CODE …`.

    Args:
        stdin, stdout, stderr: file descriptors, or `subprocess.DEVNULL`; None: those of this process.
        imports: modules that the server imports first, once for all processes that it starts from then on.
        server: which one. Processes of different servers have different seeds of hashes.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        pass_fds: Sequence[int] = (),
        process_group: int | None = None,
        imports: Sequence[str] = FXPASS,
        server: str = "first",
    ) -> None:
        self.args = [*command]
        self.returncode: int | None = None
        self._lock = threading.Lock()
        python, kind, *rest = command if command[1] != "-P" else [command[0], *command[2:]]
        assert python == sys.executable
        assert kind in ("-m", "-c")
        request = {
            "kind": kind,
            "arguments": rest,
            "environment": dict(env),
            "folder": os.getcwd(),
            "imports": imports,
            "group": process_group,
            "descriptors": [0, 1, 2, *pass_fds],
        }
        status, theirs = os.pipe()
        weakref.finalize(self, os.close, status)
        nothing = os.open(os.devnull, os.O_RDWR)
        standard = [nothing if given == subprocess.DEVNULL else given for given in (stdin, stdout, stderr)]
        given = [own if other is None else other for own, other in enumerate(standard)]
        try:
            socket.send_fds(_server(server), [pickle.dumps(request)], [*given, *pass_fds, theirs])
        finally:
            os.close(nothing)
            os.close(theirs)
        self._status = status
        first = os.read(status, _NUMBER.size)
        if not first:
            raise RuntimeError(f"the server of forks ended when it was to start {self.args}; its error is above")
        (self.pid,) = _NUMBER.unpack(first)

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None and self._told(0):
                last = os.read(self._status, _NUMBER.size)
                self.returncode = _NUMBER.unpack(last)[0] if last else -signal.SIGKILL  # the server has ended
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            left = end - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self._told(min(left, 1.0))
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _told(self, seconds: float) -> bool:
        """Whether the server says something within the time."""
        poll = select.poll()  # `select.select` takes no file descriptor above 1023
        poll.register(self._status, select.POLLIN)
        return bool(poll.poll(1000 * seconds))


def run(
    command: Sequence[str], *, env: Mapping[str, str], imports: Sequence[str] = FXPASS, server: str = "first"
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` is, with `capture_output`. Arguments as those of `Forked`."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = Forked(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output.fileno(),
            stderr=errors.fileno(),
            imports=imports,
            server=server,
        )
        try:
            code = process.wait(SECONDS)
        finally:
            process.kill()
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(process.args, code, output.read(), errors.read())


@cache
def _server(_: str) -> socket.socket:
    """The connection to a server, which ends when it is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with theirs:
        command = [sys.executable, "-P", "-m", "tests.forks", str(theirs.fileno())]
        subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
    atexit.register(ours.close)
    return ours


def serve(control: socket.socket) -> dict[str, Any]:
    """Fork for each request; returns in the forks alone, with the request."""
    ended, wake = os.pipe()
    os.set_blocking(ended, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test process
    _imported(IMPORTS)
    tell: dict[int, int] = {}  # a process -> the descriptor to which its exit code is written
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(ended, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if ended in ready:
            os.read(ended, 4096)
            for pid in [*tell]:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    _write(tell.pop(pid), os.waitstatus_to_exitcode(status), last=True)
        if control.fileno() not in ready:
            continue
        data, descriptors, _, _ = socket.recv_fds(control, _LARGEST, _ASIDE)
        if not data:
            os._exit(0)
        request = pickle.loads(data)
        _imported(request["imports"])
        *given, status = descriptors
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            aside = [fcntl.fcntl(each, fcntl.F_DUPFD, _ASIDE) for each in given]
            for each in (*descriptors, *tell.values(), ended, wake):
                os.close(each)
            control.close()
            for each, place in zip(aside, request["descriptors"], strict=True):
                os.dup2(each, place)
                os.close(each)
            return request
        for each in given:
            os.close(each)
        tell[pid] = status
        _write(status, pid)


def _imported(names: Sequence[str]) -> None:
    """Import what all later processes are to have, without a thread."""
    if any(name not in sys.modules for name in names):
        for name in names:
            importlib.import_module(name)
        gc.collect()
        gc.freeze()  # or the forks' searches for garbage would copy it all
    assert len(os.listdir("/proc/self/task")) == 1, f"an import of {names} has started a thread"


def _write(descriptor: int, number: int, *, last: bool = False) -> None:
    """Tell the test process a number, if it still listens."""
    with suppress(BrokenPipeError):
        os.write(descriptor, _NUMBER.pack(number))
    if last:
        os.close(descriptor)


def become(request: dict[str, Any]) -> None:
    """Run what Python is asked to run."""
    if request["group"] is not None:
        os.setpgid(0, request["group"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    paths = request["environment"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [*paths, *(path for path in sys.path if path not in paths)]
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    what, *rest = request["arguments"]
    sys.argv = ["-c", *rest]
    if request["kind"] == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), vars(main))


if __name__ == "__main__":
    become(serve(socket.socket(fileno=int(sys.argv[1]))))
