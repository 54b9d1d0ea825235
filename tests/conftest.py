"""One thread, one seed, and the same examples on every machine."""

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import settings

import tests.properties  # noqa: F401  registers the profiles

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
