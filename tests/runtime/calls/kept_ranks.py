"""A rank of `test_kept.py`: decodes frame by frame, and uses the cache afterwards."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fxpass
from fxpass.runtime.calls import module as modules
from tests.runtime.calls.test_kept import LEFT, cached, received


@torch.no_grad()
def main() -> dict[str, Any]:
    modules.OPERATORS = 60
    model, z = cached()
    expected = model.decode(z)
    (cache,) = LEFT
    module = fxpass.parallelize(model, 2)
    close = [torch.allclose(module.decode(z), expected, atol=1e-5) for _ in range(3)]
    output = received(module, z)["output"]
    same = torch.allclose(LEFT[0] + 0, cache, atol=1e-5)
    module.close()
    return {"close": close, "output": output, "frames": expected.nbytes // 2, "cache": same}


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = main()
    Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(result))
    dist.barrier()
