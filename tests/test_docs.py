"""The documents do not rot: what they name exists, and the code that they quote is the code."""

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/design.md")
FENCE = re.compile(r"^( *)```python\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def python_blocks(document: str) -> list[str]:
    """The contents of blocks marked python, without the indentation of the list they may stand in."""
    return [
        "\n".join(line.removeprefix(indent) for line in body.splitlines())
        for indent, body in FENCE.findall(text_of(document))
    ]


def quotations() -> list[tuple[str, str]]:
    """(file, code) of the blocks in CONTRIBUTING.md, whose first line says where the code is from."""
    split = [block.partition("\n") for block in python_blocks("CONTRIBUTING.md")]
    return [(first.removeprefix("# "), code) for first, _, code in split]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", text_of(document), re.MULTILINE))
    assert named <= targets


def test_the_readme_names_the_two_commands_of_a_newcomer() -> None:
    assert {"make demo", "make test"} <= set(re.findall(r"make [a-z]+", text_of("README.md")))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_images_lead_somewhere(document: str) -> None:
    text = text_of(document)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)", text, re.M)
    }
    assert links or document != "README.md"
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif "://" not in link:
            assert (ROOT / document).parent.joinpath(link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_named_in_code_marks_exist(document: str) -> None:
    named = re.findall(r"`((?:fxpass|passes|runtime|models|tools|tests|benchmarks|docs)/[\w./]*)`", text_of(document))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("number", range(len(python_blocks("README.md"))))
def test_python_in_the_readme_compiles(number: int) -> None:
    compile(python_blocks("README.md")[number], "README.md", "exec")


def test_names_in_the_readme_are_public() -> None:
    public = re.search(r"__all__ = (\[.*?\])", text_of("fxpass/__init__.py"), re.DOTALL)
    assert public is not None
    named = {name for block in python_blocks("README.md") for name in re.findall(r"\bfxpass\.(\w+)\(", block)}
    assert named
    assert all(f'"{name}"' in public.group(1) for name in named)


def test_the_readme_names_every_class_that_is_tested_for_exactness() -> None:
    classes = set(re.findall(r"diffusers\.([A-Z]\w+)\(", text_of("models/small.py")))
    assert len(classes) > 10
    assert classes <= set(re.findall(r"`(\w+)`", text_of("README.md")))


def test_contributing_quotes_a_rule_and_a_pass() -> None:
    files = {file for file, _ in quotations()}
    assert any(file.startswith("passes/rules/") for file in files)
    assert "passes/bucket.py" in files


@pytest.mark.parametrize(("file", "code"), quotations(), ids=lambda value: value.partition("\n")[0][:40])
def test_quoted_code_stands_in_its_file(file: str, code: str) -> None:
    assert code.strip()
    assert textwrap.dedent(code).strip() in textwrap.dedent(text_of(file)) or code.rstrip() in text_of(file)
