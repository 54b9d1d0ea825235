"""Every command of the README and the pages runs: on small models at every change, and as it is written in slow tests.

What is only parsed (`test_docs.py`) is listed here with the reason.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.test_docs import DOCUMENTS, ROOT, commands, text_of
from tests.tools.command import fxpass
from tests.tools.pipelines import write_pipeline
from tests.torchrun import ranks

COMMAND = r"fxpass (models|[a-z]+ \S.*)|(torchrun|([\w./]*/)?python) \S.*"
#: what stands for the models, files and nodes of the commands
STANDING = {
    "sdxl": "small:dit",
    "flux-dev": "small:flux",
    "dit-xl-512": "small:dit",
    "MODEL": "small:dit",
    "package.module:factory": "tests.tools.models:good",
    "my_package.my_module:make_model": "tests.tools.models:good",
    "NODE": "x0.0",
    "NAME": "partition",
    "FILE": "file.html",
}
MEASURES = "it measures for minutes; tests/benchmarks runs what it measures with"
NOT_RUN = {
    r"python -m benchmarks\.\w+.*": MEASURES,
    r"fxpass calibrate .*": "it measures this machine for a minute; tests/predict runs its parts",
    r".*python -m pre_commit .*": "it changes the checkout",
    r".*python -m (pytest|tests\.mutants) .*": "it runs tests",
    r"python script.py": "test_readme.py runs the script",
    r"fxpass trace MODEL --measured": "it starts a process for each rank; tests/predict runs that",
}


def written() -> list[str]:
    """The commands that are more than a name, each once."""
    found = dict.fromkeys(line for document in DOCUMENTS for line in commands(document))
    return [line for line in found if re.fullmatch(COMMAND, line)]


def to_run() -> list[str]:
    return [line for line in written() if not any(re.fullmatch(each, line) for each in NOT_RUN)]


def of_the_catalog(line: str) -> bool:
    return line.startswith("fxpass") and any(word in line.split() for word in ("sdxl", "flux-dev", "dit-xl-512"))


def small(line: str) -> Sequence[str]:
    """The words of a command, on a small model."""
    words = [STANDING.get(word, word) for word in shlex.split(line)]
    return [word if word != "file.html" or "--json" not in words else "file.json" for word in words]


def run(words: Sequence[str]) -> None:
    ran = fxpass(*words[1:])
    assert ran.exit_code == 0, ran.stderr


def run_apart(words: Sequence[str]) -> str:
    """Run a command of Python or torchrun in processes of its own; returns what it writes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, *words[1:]] if words[0] == "torchrun" else [sys.executable, *words[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def marked(line: str) -> object:
    return pytest.param(line, marks=[pytest.mark.slow] if " onnx " in line or " study " in line else [])


@pytest.mark.parametrize("line", [marked(line) for line in to_run() if re.match(r"fxpass (?!generate)", line)])
def test_a_command_runs_on_a_small_model(line: str) -> None:
    run(small(line))


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in to_run() if of_the_catalog(line)])
def test_a_command_on_a_model_of_the_catalog_runs_as_it_is_written(line: str) -> None:
    run(shlex.split(line))


@pytest.mark.parametrize("line", [line for line in to_run() if " generate " in line])
def test_generate_runs_with_a_tiny_pipeline(line: str, pipeline: Path) -> None:
    words = [str(pipeline) if word == "models/demo" else word for word in shlex.split(line)]
    words += ["--steps", "1"]
    if words[0] == "torchrun":
        _, option, world, run_module, module, *arguments = words
        assert (option, run_module) == ("--nproc-per-node", "-m")
        ranks(module, *arguments, world=int(world))
    else:
        run([*words, "--executor", "lockstep"])
    assert Path("circle.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_script_for_torchrun_runs_on_two_cpus(pipeline: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", text_of("README.md"), re.DOTALL)
    (script,) = (block for block in blocks if "LOCAL_RANK" in block)
    for gpu, cpu in {
        'torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))': "",
        "stabilityai/stable-diffusion-xl-base-1.0": str(pipeline),
        "torch.float16": "torch.float32",
        '"cuda"': '"cpu"',
        "pipe(": "pipe(num_inference_steps=7, prompt=",
    }.items():
        assert gpu in script
        script = script.replace(gpu, cpu)
    Path("script.py").write_text(script)
    (line,) = (line for line in to_run() if line == "torchrun --nproc-per-node 8 script.py")
    run_apart(shlex.split(line.replace("8", "2")))
    assert Path("lighthouse.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in to_run() if line.startswith("python -m fxpass.tools.sweeps")])
def test_a_sweep_runs_as_it_is_written(line: str) -> None:
    assert run_apart(shlex.split(line))


def test_every_command_is_run_or_has_a_reason_not_to() -> None:
    kinds = (r"fxpass .*", r"torchrun .* (script\.py|generate .*)", r"python -m fxpass\.tools\.sweeps.*")
    assert not [line for line in to_run() if not any(re.fullmatch(kind, line) for kind in kinds)]
    assert all(any(re.fullmatch(each, line) for line in written()) for each in NOT_RUN)
