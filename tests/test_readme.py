"""The examples of the README run as written, each in a fresh process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("said", ["1.7e-06", "circle.png"])
def test_the_first_examples_of_the_readme_do_what_they_say(said: str, tmp_path: Path) -> None:
    (example,) = (block for block in EXAMPLES if said in block)
    example = example.replace("guidance_scale=2", "guidance_scale=2, num_inference_steps=2")
    tmp_path.joinpath("script.py").write_text(example.replace('"models/demo"', repr(str(ROOT / "models" / "demo"))))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if said == "circle.png":
        assert tmp_path.joinpath("circle.png").stat().st_size > 1000
    else:
        (difference,) = re.findall(r"tensor\((\S+)\)", done.stdout)
        assert float(difference) < 1e-5
