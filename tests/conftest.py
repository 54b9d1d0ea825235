"""One thread, one seed, and the same examples on every machine."""

import os
import random
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import settings

import tests.properties  # noqa: F401  registers the profiles
from tests.forks import Forked

torch.set_num_threads(1)  # results do not depend on the machine, and processes-as-ranks do not crowd each other out
os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the processes that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a network
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


STARTING = ("fxpass.runtime.workers", "fxpass.predict.ranks")  #: modules that start processes


@pytest.fixture(scope="session", autouse=True)
def forked_processes() -> Iterator[None]:
    """Workers and ranks fork from a process that has imported torch already, but where a test has `new_processes`."""
    start = SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired)
    with pytest.MonkeyPatch.context() as patch:
        for module in STARTING:
            patch.setattr(f"{module}.subprocess", start)
        yield


@pytest.fixture
def new_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers and ranks start as they do for users: as new processes, which import torch."""
    for module in STARTING:
        monkeypatch.setattr(f"{module}.subprocess", subprocess)
