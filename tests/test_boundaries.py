"""Imports between folders go downwards only, and models are named in models/ only; checked on the sources."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = {"ir", "capture", "passes"}
MAY_IMPORT = {
    "ir": {"ir"},
    "capture": {"ir", "capture"},
    "passes": COMPILER,
    "runtime": COMPILER | {"runtime"},
    "calls": COMPILER | {"runtime", "calls"},
    "inspect": COMPILER | {"runtime", "inspect"},
    "predict": COMPILER | {"runtime", "inspect", "predict"},
    "models": COMPILER | {"models"},
    "front": COMPILER | {"runtime", "calls", "inspect", "predict", "models", "front"},  # fxpass/*.py
    "report": COMPILER | {"runtime", "inspect", "predict", "front", "report"},
    "tools": COMPILER | {"runtime", "calls", "inspect", "predict", "models", "front", "report", "tools"},
}
#: what users get, for type checkers alone
TYPES = {("runtime/calls/module.py", "fxpass.plan.Plan")}
FOLDERS = {
    "ir": "fxpass/ir",
    "capture": "fxpass/capture",
    "passes": "passes",
    "runtime": "runtime",
    "calls": "fxpass/calls",
    "inspect": "fxpass/inspect",
    "predict": "fxpass/predict",
    "report": "fxpass/report",
    "models": "models",
    "front": "fxpass",
    "tools": "tools",
}

# Distinctive names match anywhere in a word, short ones only at its start: `edit` is no model.
MODEL_NAME = re.compile(
    r"(?i:unet|sdxl|pixart|mmdit|hunyuan|cogv(?:ideo|iew)|stable_?(?:diffusion|audio|cascade)|auraflow|hidream|omnigen|qwen"
    r"|lumina|kandinsky|controlnet|easyanimate|skyreels|autoencoder_?kl)"
    r"|(?<![A-Za-z])(?i:dit|flux2?|wan|sana|sd3|ltxv?|mochi|cosmos|allegro|latte|chroma|bria|uvit|z_?image)(?![a-z])"
)


def sources(part: str) -> Iterator[Path]:
    folder = ROOT / FOLDERS[part]
    return iter(sorted(folder.glob("*.py") if part == "front" else folder.rglob("*.py")))


def module_name(path: Path) -> list[str]:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "fxpass" else ["fxpass", *parts]
    return parts if parts[-1] != "__init__" else parts[:-1]


def imported(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that a file imports, `from a import b` as a.b."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path)[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def part_of(name: str) -> str | None:
    """The folder that a dotted name belongs to; None outside the project, and for extras.py."""
    parts = name.split(".")
    if parts[0] != "fxpass" or parts[1:2] == ["extras"]:  # extras.py imports nothing of the project
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "front"


def code_only(tree: ast.Module) -> str:
    """The source without comments and docstrings, which may mention models as examples."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = node.body[ast.get_docstring(node) is not None :] or [ast.Pass()]
    return ast.unparse(tree)


@pytest.mark.parametrize("part", FOLDERS)
def test_imports_go_downwards_only(part: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(part)
        for line, name in imported(path, ast.parse(path.read_text()))
        if (target := part_of(name)) is not None and target not in MAY_IMPORT[part]
        if (str(path.relative_to(ROOT)), name) not in TYPES
    ]
    assert not wrong, "\n".join(wrong)


def test_what_runs_on_a_rank_imports_nothing_of_calls() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted((ROOT / "runtime").glob("*.py"))
        for line, name in imported(path, ast.parse(path.read_text()))
        if name.startswith("fxpass.runtime.calls")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", FOLDERS)
def test_the_folders_are_imported_under_the_package_name(part: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(part)
        for line, name in imported(path, ast.parse(path.read_text()))
        if name.split(".")[0] in {"passes", "runtime", "models", "tools", "tests", "benchmarks"}
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "part", ["front", "ir", "capture", "passes", "runtime", "calls", "inspect", "predict", "report"]
)
def test_no_model_is_named_outside_models(part: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {match.group()} in `{line.strip()}`"
        for path in sources(part)
        for line in code_only(ast.parse(path.read_text())).splitlines()
        if (match := MODEL_NAME.search(line))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("text", ["UNet2DConditionModel", "is_flux", "MMDiT", "DiTTransformer2D", "'wan'", "sd3_rope"])
def test_a_model_name_is_recognised(text: str) -> None:
    assert MODEL_NAME.search(text)


@pytest.mark.parametrize("text", ["edit", "audit_log", "condition", "wanted", "influx", "latter", "ConditionError"])
def test_an_ordinary_word_is_no_model_name(text: str) -> None:
    assert not MODEL_NAME.search(text)
