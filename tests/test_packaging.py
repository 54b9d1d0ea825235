"""The wheel contains all packages of the tree, and the package runs with torch and NumPy alone."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest

from fxpass.extras import EXTRA_OF

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
PACKAGE_OF = {
    "PIL": "pillow",
    "skimage": "scikit-image",
    "vl_convert": "vl-convert-python",
}  #: modules whose distribution has another name

HIDE = """
import os, sys
from importlib.machinery import PathFinder

VISIBLE = set(os.environ["VISIBLE_MODULES"].split())

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        places = [spec.origin or "", *(spec.submodule_search_locations or ())] if spec else []
        hidden = path is None and name not in VISIBLE and any("site-packages" in place for place in places)
        return None if hidden else spec

sys.meta_path = [Bare if each is PathFinder else each for each in sys.meta_path]
"""
SCRIPT = """
import importlib.util
import torch
from torch import nn

import fxpass

for name in ("diffusers", "transformers", "typer", "rich", "PIL", "scipy", "pytest"):
    assert importlib.util.find_spec(name) is None, name


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.norm = nn.GroupNorm(4, 8)

    def forward(self, sample, timestep):
        return self.last(self.norm(self.first(sample)) * timestep.sin())


torch.manual_seed(0)
torch.set_num_threads(1)
model = Block().eval()
for executor in ("lockstep", "spawn"):
    with fxpass.parallelize(model, 2, executor=executor) as split, torch.no_grad():
        for step in range(2):
            x, t = torch.randn(1, 3, 16, 8), torch.tensor(1.0 + step)
            assert (split(x, t) - model(x, t)).abs().max() < 1e-5, executor
        assert {"halo", "moments"} <= {role for role, size in split.plan.bytes_by_role.items() if size}
    print(executor, "is exact")
"""


def modules_of(*packages: str) -> set[str]:
    """The modules of packages and of everything that these require."""
    waiting, found = list(packages), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name not in found:
            with contextlib.suppress(PackageNotFoundError):  # for another platform
                required = requires(name) or []
                found.add(name)
                waiting += [re.split(r"[^\w.-]", each)[0] for each in required if "extra ==" not in each]
    of = packages_distributions()
    return {module for module, names in of.items() if found & {re.sub(r"[-_.]+", "-", n).lower() for n in names}}


def bare(folder: Path, *command: str, packages: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run Python where of all that is installed only torch, NumPy and `packages`, with what they require, are seen."""
    folder.joinpath("sitecustomize.py").write_text(HIDE)  # also for the processes that it starts
    visible = " ".join(modules_of("torch", "numpy", *packages))
    environment = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "VISIBLE_MODULES": visible}
    run = [sys.executable, *command]
    return subprocess.run(run, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def test_every_package_of_the_tree_is_in_the_list() -> None:
    files = [path for top in ("fxpass", "passes", "runtime", "models", "tools") for path in (ROOT / top).rglob("*.py")]
    folders = {path.parent.relative_to(ROOT).parts for path in files if "__pycache__" not in path.parts}
    # rglob does not follow the symlinks, so every folder is seen once
    names = {".".join(parts if parts[0] == "fxpass" else ("fxpass", *parts)) for parts in folders}
    assert names == set(SETUPTOOLS["packages"])


def test_the_symlinks_show_what_the_wheel_maps() -> None:
    for package, folder in SETUPTOOLS["package-dir"].items():
        assert ROOT.joinpath(*package.split(".")).resolve() == (ROOT / folder).resolve()


def test_the_weights_of_the_demos_are_not_in_the_wheel() -> None:
    assert not SETUPTOOLS["include-package-data"]
    folders = {package: ROOT / SETUPTOOLS["package-dir"][package] for package in SETUPTOOLS["package-data"]}
    data = [
        path
        for package, globs in SETUPTOOLS["package-data"].items()
        for g in globs
        for path in folders[package].glob(g)
    ]
    assert sum(path.stat().st_size for path in data) < 100_000


def test_only_torch_and_numpy_are_required() -> None:
    assert [re.split(r"[<>=]", each)[0] for each in PYPROJECT["project"]["dependencies"]] == ["torch", "numpy"]


def test_the_extra_that_an_error_names_installs_the_module() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    for module, extra in EXTRA_OF.items():
        assert PACKAGE_OF.get(module, module) in [re.split(r"[<>=]", each)[0] for each in extras[extra]]


def test_a_module_is_split_with_torch_and_numpy_alone(tmp_path: Path) -> None:
    tmp_path.joinpath("script.py").write_text(SCRIPT)
    done = bare(tmp_path, "script.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["lockstep is exact", "spawn is exact"]


@pytest.mark.parametrize(
    ("packages", "command", "extra"),
    [
        ([], ["-m", "fxpass.tools.cli", "plan", "sdxl"], "cli"),
        (["typer", "rich"], ["-m", "fxpass.tools.cli", "plan", "sdxl"], "diffusers"),
        ([], ["-c", "import fxpass.models.small"], "diffusers"),
        ([], ["-c", "import fxpass.models.catalog"], "diffusers"),
        ([], ["-c", "import fxpass.models.zoo"], "diffusers"),
    ],
)
def test_a_missing_extra_is_named_with_the_line_that_installs_it(
    packages: list[str], command: list[str], extra: str, tmp_path: Path
) -> None:
    done = bare(tmp_path, *command, packages=packages)
    assert done.returncode != 0
    assert f'pip install "fxpass[{extra}]"' in done.stderr.splitlines()[-1]
    assert "plan" not in command or len(done.stderr.splitlines()) == 1
