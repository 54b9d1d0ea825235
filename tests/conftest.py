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


@pytest.fixture(scope="session", autouse=True)
def forked_workers() -> Iterator[None]:
    """Worker processes fork from one that has imported torch already, but where a test takes `new_workers`."""
    start = SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxpass.runtime.workers.subprocess", start)
        yield


@pytest.fixture
def new_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes start as they do for users: as new processes, which import torch."""
    monkeypatch.setattr("fxpass.runtime.workers.subprocess", subprocess)
