"""A rank of `test_kept.py`: decodes frame by frame, and uses the cache afterwards."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fxpass
from fxpass.runtime.calls import module as modules
from fxpass.runtime.errors import DisagreementError
from tests.runtime.calls.test_kept import LEFT, cached, received


@torch.no_grad()
def seen(disable: str) -> dict[str, Any]:
    """What this rank saw.

    Args:
        disable: "1" not to use shared memory.
    """
    os.environ["FXPASS_SHM_DISABLE"] = disable
    modules.OPERATORS = 60
    model, z = cached()
    expected = model.decode(z)
    (cache,) = LEFT
    module = fxpass.parallelize(model, 2)
    close = [torch.allclose(module.decode(z), expected, atol=1e-5) for _ in range(3)]
    output = received(module, z)["output"]
    same = torch.allclose(LEFT[0] + 0, cache, atol=1e-5)
    refused = refuse_different_caches(module, z)
    module.close()
    return {"close": close, "output": output, "frames": expected.nbytes // 2, "cache": same, "refused": refused}


def refuse_different_caches(module: Any, z: Tensor) -> bool:
    """Whether two caches of one shape are not mixed where each rank uses another one."""
    caches: list[Tensor] = []
    for factor in (1, 2):
        module.decode(factor * z)
        caches += LEFT
    with pytest.raises(DisagreementError, match="takes other values than rank 0 of those that earlier calls have left"):
        _ = caches[dist.get_rank()] + 0
    return True


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = [seen("0"), seen("1")]
    Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(result))
    dist.barrier()
