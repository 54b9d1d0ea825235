"""What the tests on CUDA share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.cuda.ranks import plain


@pytest.fixture
def plain_products() -> Iterator[None]:
    """Products of matrices without TF32, and deterministic convolutions."""
    backends = torch.backends
    before = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.deterministic
    plain("cuda:0")
    yield
    backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.deterministic = before
