"""Run the ranks of a test as torchrun does on one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from tests.forks import FXPASS, ROOT, SECONDS, Forked

SERVERS = ("first", "second")
TRANSPORTS = {"memory": {}, "gloo": {"FXPASS_SHM_DISABLE": "1"}}  # what each adds to the environment
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}


def torchrun(module: str, *arguments: str, folder: Path, transport: str = "memory", world: int = 2) -> list[Any]:
    """What the ranks of a module saw, which they write to FOLDER/<rank>.json. FOLDER is their last argument."""
    ranks(module, *arguments, str(folder), transport=transport, world=world)
    return found(folder, world)


def ranks(
    module: str, *arguments: str, transport: str = "memory", world: int = 2, imports: Sequence[str] = FXPASS
) -> None:
    """Run the ranks to their end: forked, with the environment that torchrun gives them, and hash seeds of their own.

    Args:
        imports: modules that are imported before they fork.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as torchrun, which outlives the ranks
    environment = ENVIRONMENT | TRANSPORTS[transport]
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    command = [sys.executable, "-m", module, *arguments]
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(world)]
        started: list[Forked] = []
        try:
            for rank, output in enumerate(outputs):
                own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                started.append(
                    Forked(
                        command,
                        env=own,
                        stdin=subprocess.DEVNULL,
                        stdout=output.fileno(),
                        stderr=output.fileno(),
                        imports=imports,
                        server=SERVERS[rank % 2],
                    )
                )
            end = time.monotonic() + SECONDS
            while any(each.poll() is None for each in started) and not any(each.poll() for each in started):
                assert time.monotonic() < end, f"{module}: the ranks have not ended within {SECONDS} s"
                time.sleep(0.02)
            failed = [rank for rank, each in enumerate(started) if each.poll()]
        finally:
            for each in started:
                each.kill()
                each.wait()
        for rank in failed:
            outputs[rank].seek(0)
            raise AssertionError(f"{module}: rank {rank} has failed:\n{outputs[rank].read().decode()[-8000:]}")


def found(folder: Path, world: int) -> list[Any]:
    """What each rank has written."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
