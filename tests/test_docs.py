"""The documents stay true: links, files and commands exist, and quoted code equals the code."""

import re
import shlex
import textwrap
import tomllib
from pathlib import Path

import pytest
import typer
import typer.main

from fxpass.tools.commands.app import app
from tests.tools.command import fxpass

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ("balance", "coverage", "traffic")  #: pages that the sweeps write
PAGES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.stem not in GENERATED)
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *PAGES)
FENCE = re.compile(r"^( *)```python\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def python_blocks(document: str) -> list[str]:
    """The contents of blocks marked python, without the indentation of a surrounding list."""
    return [
        "\n".join(line.removeprefix(indent) for line in body.splitlines())
        for indent, body in FENCE.findall(text_of(document))
    ]


def quotations() -> list[tuple[str, str]]:
    """(file, code) of the blocks in CONTRIBUTING.md, whose first line names the file."""
    split = [block.partition("\n") for block in python_blocks("CONTRIBUTING.md")]
    return [(first.removeprefix("# "), code) for first, _, code in split]


def headings(document: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)", text_of(document), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def commands(document: str) -> list[str]:
    """The commands of a document: indented lines and code marks, with or without a prompt."""
    text = re.sub(r"```.*?```", "", text_of(document), flags=re.DOTALL)
    found = re.findall(r"^ {4}(?:\$ )?(.+)$|`([^`]+)`", text, re.MULTILINE)
    return [re.sub(r"\s+", " ", line or mark).partition(" #")[0].strip() for line, mark in found]


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
    assert links or document != "README.md"
    for link in links:
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = (ROOT / document).parent.joinpath(file).resolve() if file else ROOT / document
            assert target.exists(), link
            assert not anchor or anchor in headings(str(target.relative_to(ROOT))), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of_fxpass_have_the_options_that_are_written(document: str) -> None:
    group = typer.main.get_command(app)
    for line in commands(document):
        match = re.fullmatch(r"(?:.* -m fxpass\.tools\.cli|fxpass) ([a-z]+)((?: .*)?)", line)
        if match and not re.search(r"[A-Z]{4}|…", line):  # MODEL, PASS: to be filled in
            name, arguments = match.groups()
            with typer.Context(group) as parent:
                command = group.get_command(parent, name)
                assert command is not None, line
                if arguments:
                    command.make_context(name, shlex.split(arguments), parent=parent)  # parses, and runs nothing


def outputs(document: str) -> list[tuple[str, list[str]]]:
    """The commands of a document that are shown with what they print, and the lines of that."""
    found = re.findall(r"^ {4}\$ (fxpass .+)\n((?: {4}.*\n)+)", text_of(document), re.MULTILINE)
    return [(command, [line.strip() for line in lines.splitlines()]) for command, lines in found]


@pytest.mark.parametrize(("command", "lines"), outputs("docs/targets.md"), ids=lambda value: str(value)[:70])
def test_the_page_on_targets_shows_what_its_commands_print(command: str, lines: list[str]) -> None:
    printed = [line.strip() for line in fxpass(*shlex.split(command)[1:]).stdout.splitlines()]
    assert lines[0] == "…"
    assert printed[-len(lines) + 1 :] == lines[1:]


@pytest.mark.parametrize(("command", "lines"), outputs("docs/inspect.md"), ids=lambda value: str(value)[:70])
def test_the_page_on_inspecting_shows_what_its_commands_print(command: str, lines: list[str]) -> None:
    printed = [line.strip() for line in fxpass(*shlex.split(command)[1:]).stdout.splitlines()]
    parts = [r"(.*\n)*?" if line == "…" else re.escape(line).replace("…", ".*") + r"\n" for line in lines]
    assert len(parts) > 6
    assert re.match("".join(parts), "".join(f"{line}\n" for line in printed))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_in_python_commands_exist(document: str) -> None:
    named = {name for line in commands(document) for name in re.findall(r"-m ((?:fxpass|benchmarks)[\w.]*)", line)}
    for name in named:
        path = ROOT.joinpath(*name.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_named_in_code_marks_exist(document: str) -> None:
    named = re.findall(r"`((?:fxpass|passes|runtime|models|tools|tests|benchmarks|docs)/[\w./]*)`", text_of(document))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("document", ["README.md", *PAGES])
def test_python_in_the_pages_compiles(document: str) -> None:
    for block in python_blocks(document):
        compile(block, document, "exec")


def test_names_in_the_readme_are_public() -> None:
    public = re.search(r"__all__ = (\[.*?\])", text_of("fxpass/__init__.py"), re.DOTALL)
    assert public is not None
    named = {name for block in python_blocks("README.md") for name in re.findall(r"\bfxpass\.(\w+)\(", block)}
    assert named
    assert all(f'"{name}"' in public.group(1) for name in named)


def test_the_page_on_exactness_names_every_class_that_is_tested_for_exactness() -> None:
    classes = set(re.findall(r"diffusers\.([A-Z]\w+)\(", text_of("models/small.py")))
    assert len(classes) > 10
    assert classes <= set(re.findall(r"`(\w+)`", text_of("docs/exactness.md")))


def test_the_design_lists_every_folder_once() -> None:
    packages = tomllib.loads(text_of("pyproject.toml"))["tool"]["setuptools"]["packages"]
    inner = ("fxpass.ir", "fxpass.capture", "fxpass.inspect", "fxpass.predict", "fxpass.report")
    names = [name.removeprefix("fxpass.") for name in packages if name not in ("fxpass", *inner)]
    folders = {
        "fxpass/",
        "benchmarks/",
        "examples/",
        "tests/",
        "docs/",
        *(f"{name.replace('.', '/')}/" for name in inner),
    }
    folders |= {f"{name.replace('.', '/')}/" for name in names}
    assert sorted(re.findall(r"^\| `([\w/]+/)` \|", text_of("docs/design.md"), re.MULTILINE)) == sorted(folders)


def test_contributing_quotes_a_rule_and_a_pass() -> None:
    files = {file for file, _ in quotations()}
    assert any(file.startswith("passes/rules/") for file in files)
    assert "passes/bucket.py" in files


@pytest.mark.parametrize(("file", "code"), quotations(), ids=lambda value: value.partition("\n")[0][:40])
def test_quoted_code_is_in_its_file(file: str, code: str) -> None:
    assert code.strip()
    assert textwrap.dedent(code).strip() in textwrap.dedent(text_of(file)) or code.rstrip() in text_of(file)
