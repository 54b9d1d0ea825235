"""The examples run as written, and give the unsplit picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import fxpass
from tests.tools.pipelines import write_pipeline

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize(("command", "name"), [([], "plain.py"), (TORCHRUN, "with_torchrun.py")])
def test_an_example_makes_the_unsplit_picture(command: list[str], name: str, tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "pipeline")
    arguments = [folder, "a red circle", "--steps", "2", "--output", tmp_path / "picture.png"]
    words = [sys.executable, *command, EXAMPLES / name, *arguments]
    done = subprocess.run(list(map(str, words)), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    found = np.asarray(Image.open(tmp_path / "picture.png")).astype(int)
    assert np.abs(found - np.asarray(expected).astype(int)).max() <= 1
    assert found.std() > 1


def test_the_cells_of_the_notebook_run_one_after_the_other(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "pipeline")
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text())
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace('"models/demo"', repr(str(folder)))
            exec(compile(source, cell["id"], "exec"), names)
    exact, stale = (np.asarray(names[name]) for name in ("picture", "stale"))
    assert exact.shape == stale.shape == (64, 64, 3)
    with pytest.raises(ValueError, match="not parallel"):
        fxpass.parallel(names["pipe"].unet)
