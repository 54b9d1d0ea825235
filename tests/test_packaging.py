"""What is in the tree is in the wheel: read from pyproject.toml, nothing is built."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_of_the_tree_is_in_the_list() -> None:
    files = [path for top in ("fxpass", "passes", "runtime", "models", "tools") for path in (ROOT / top).rglob("*.py")]
    folders = {path.parent.relative_to(ROOT).parts for path in files if "__pycache__" not in path.parts}
    # rglob does not follow the symlinks, so every folder is seen once
    names = {".".join(parts if parts[0] == "fxpass" else ("fxpass", *parts)) for parts in folders}
    assert names == set(SETUPTOOLS["packages"])


def test_the_symlinks_show_what_the_wheel_maps() -> None:
    for package, folder in SETUPTOOLS["package-dir"].items():
        assert ROOT.joinpath(*package.split(".")).resolve() == (ROOT / folder).resolve()
