"""`fxpass plan`, `fxpass dump` and `fxpass models`, on text."""

import ast
import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fxpass.inspect.store import from_json
from fxpass.inspect.text import text
from fxpass.ir.advice import FxpassWarning
from fxpass.tools.commands.app import app
from fxpass.tools.console import warning_text
from fxpass.tools.output import write
from tests.tools.command import fxpass

TOOLS = Path(__file__).resolve().parents[2] / "tools"
COMMANDS = sorted(str(path.relative_to(TOOLS)) for path in (TOOLS / "commands").glob("*.py"))
GOOD = "tests.tools.models:good"
KEYS = {"ranks", "flops_total", "flops_per_rank", "exchanges", "fallbacks", "seconds"}
KEYS |= {"bytes_received_per_rank", "bytes_received_per_rank_displaced", "state_bytes_per_rank"}


def test_plan_shows_cuts_work_and_received_bytes() -> None:
    text = fxpass("plan", "small:unet_sd", "-n", 2).stdout
    assert "small:unet_sd on 2 ranks, strategy sync" in text
    assert "32 rows, cut at 16" in text
    assert "at most 2.00 times as fast" in text
    for word in ("halo", "keys_values", "moments", "received", "no fallbacks", "captured in"):
        assert word in text


def test_plan_and_dump_divide_the_batch_among_groups_of_ranks() -> None:
    divided = ("small:unet_sd", "-n", 4, "--cfg", 2, "--batch", 2)
    text = fxpass("plan", *divided).stdout
    assert "on 4 ranks (2 groups of 2 patches)" in text
    assert "at most 4.00 times as fast" in text
    for stage in ("partition", "join"):
        shown = fxpass("dump", *divided, "--rank", 3, "--after", stage).stdout
        assert ("gather(B: 1 -> 2 of all groups)" in shown) == (stage == "join")


def test_plan_shows_displaced_steps_of_stale_strategies_only() -> None:
    exact = fxpass("plan", "small:unet_sd").stdout
    assert "an exact step" not in exact
    assert "a displaced step" not in exact
    stale = fxpass("plan", "small:unet_sd", "--strategy", "no_sync").stdout
    first, _, later = stale.partition("\na displaced step\n")
    assert "\nan exact step\n" in first
    always = re.search(r"^rank +work +(.*)\n0 +\S+ \S+ +(.*)$", first, re.MULTILINE)
    assert always
    assert always.group(0) in exact  # an exact step of a stale strategy is one of sync
    displaced = re.search(r"^rank +(.*)\n0 +(.*)$", later, re.MULTILINE)
    assert displaced
    assert displaced.group(1).split() == always.group(1).split()
    sizes = dict(zip(displaced.group(1).split(), re.findall(r"\S+ k?B", displaced.group(2)), strict=True))
    assert {role for role, size in sizes.items() if size != "0 B"} == {"output", "received"}  # the rest is frozen
    numbers = re.search(r"^exchanges +(.*)$", later, re.MULTILINE)
    assert numbers
    assert numbers.group(1).split().count("0") == len(sizes) - 2


def test_plan_as_json_has_the_bytes_of_a_displaced_step() -> None:
    assert json.loads(fxpass("plan", GOOD, "--json", "-").stdout)["bytes_received_per_rank_displaced"] is None
    data = json.loads(fxpass("plan", GOOD, "--strategy", "separate_gn", "--json", "-").stdout)
    exact, displaced = data["bytes_received_per_rank"], data["bytes_received_per_rank_displaced"]
    assert len(data["padding_received_per_rank"]) == len(data["padding_received_per_rank_displaced"]) == 2
    assert all(each.pop("moments") for each in exact)  # a displaced step uses each rank's own moments
    assert displaced == exact


def test_plan_as_json_has_all_keys_and_is_all_that_is_printed() -> None:
    data = json.loads(fxpass("plan", GOOD, "-n", 3, "--json", "-").stdout)
    assert data.keys() >= KEYS
    assert data["ranks"] == len(data["flops_per_rank"]) == len(data["bytes_received_per_rank"]) == 3
    assert {"role", "bytes", "messages", "node", "reason"} <= data["exchanges"][0].keys()
    assert data["seconds"].keys() >= {"capture", "plan"}
    assert data["fallbacks"] == []


def test_plan_json_goes_to_a_file_beside_the_table(tmp_path: Path) -> None:
    result = fxpass("plan", GOOD, "--json", tmp_path / "new" / "plan.json")
    assert "written to" in result.stdout
    received = json.loads((tmp_path / "new" / "plan.json").read_text())["bytes_received_per_rank"][0]
    assert set(received) >= {"halo", "moments"}


def test_plan_accepts_sizes() -> None:
    text = fxpass("plan", "small:unet_sd", "--height", 64, "--width", 16, "--batch", 2).stdout
    assert "64 rows, cut at 32" in text


@pytest.mark.parametrize(
    ("after", "has", "lacks"),
    [
        ("captured", "view(", "exchange"),
        ("normalize", "reshape(", "split:"),
        ("cuts", "split: sample [B, C, H/2, W], 16 rows, cut at 8", "halo("),
        ("partition", "for keys_values", "one message of"),
        ("trim", "for keys_values", "one message of"),
        ("bucket", "one message of 2 values", "view("),
    ],
)
def test_dump_stops_after_any_pass(after: str, has: str, lacks: str) -> None:
    text = fxpass("dump", GOOD, "-n", 2, "--after", after, "--unfold").stdout
    assert text.startswith(f"{GOOD}, rank 0 of 2, after {after}\n")
    assert has in text
    assert lacks not in text


def test_dump_shows_the_given_rank() -> None:
    first, last = (fxpass("dump", GOOD, "-n", 3, "--rank", rank).stdout for rank in (0, 2))
    assert "halo(H: 1 down, 1 zero up)" in first
    assert "halo(H: 1 up, 1 zero down)" in last
    assert "\nconv_out  Conv2d  (1 operator, " in first


def test_diff_shows_what_a_pass_changed() -> None:
    text = fxpass("dump", GOOD, "--diff", "normalize").stdout
    assert text.startswith("--- after captured\n+++ after normalize\n")
    assert "\n-  view_default" in text
    cuts = fxpass("dump", GOOD, "--diff", "cuts").stdout
    assert "+split: sample" in cuts


def test_dump_shows_the_chosen_modules_operators_or_exchanges_alone() -> None:
    module = fxpass("dump", GOOD, "--module", "conv_*").stdout
    assert "\nconv_in\n" in module
    assert "\nconv_out\n" in module
    assert "linear(" not in module
    operator = fxpass("dump", GOOD, "--op", "linear").stdout
    assert operator.count("linear(") == 3
    assert "convolution(" not in operator
    halos = fxpass("dump", GOOD, "--op", "halo").stdout
    assert halos.count("halo(") == 2
    assert "moments(" not in halos
    exchanges = fxpass("dump", GOOD, "--only", "exchanges").stdout
    assert all(f"{role}(" in exchanges for role in ("moments", "halo", "gather"))
    assert "convolution(" not in exchanges


def test_a_diff_shows_an_operator_that_only_one_side_has() -> None:
    text = fxpass("dump", GOOD, "--diff", "normalize", "--op", "view").stdout
    assert "\n-  view_default" in text
    assert "linear(" not in text


def test_a_diff_is_coloured_on_a_terminal_alone() -> None:
    command = ["dump", GOOD, "--diff", "bucket", "--only", "exchanges"]
    coloured = CliRunner().invoke(app, command, color=True).stdout
    assert re.search(r"\x1b\[32m\+  exchange_2  one message of 2 values.*\x1b\[0m\n", coloured)
    assert re.search(r"\x1b\[31m-.*x3\.0  getitem_3", coloured)
    assert "\x1b" not in fxpass(*command).stdout


def test_a_reader_that_closes_the_pipe_ends_the_command_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        with pytest.raises(SystemExit) as ended:
            app(["dump", GOOD])
        monkeypatch.undo()
    assert ended.value.code == 1
    assert "Traceback" not in capsys.readouterr().err


def test_json_that_dump_writes_loads_back(tmp_path: Path) -> None:
    fxpass("dump", GOOD, "-n", 3, "--rank", 1, "--format", "json", "--output", tmp_path / "new" / "dump.json")
    loaded = from_json((tmp_path / "new" / "dump.json").read_text())
    assert (loaded.model, loaded.world, loaded.rank, loaded.stage) == (GOOD, 3, 1, "schedule")
    assert f"{text(loaded)}\n" in fxpass("dump", GOOD, "-n", 3, "--rank", 1).stdout
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_an_interrupted_command_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dump.txt"
    path.write_text("old")

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(path, "new")
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["dump.txt"]


def test_models_lists_the_catalog_and_the_small_models() -> None:
    text = fxpass("models").stdout
    assert "2,567 M" in text
    assert "small:unet_sd" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "sdx"), "'sdx': it is not in the catalog (see `fxpass models`), no folder, and not package.module"),
        (("plan", "sdx"), "did you mean sdxl"),
        (("plan", "unet_sd"), "did you mean small:unet_sd"),
        (("plan", GOOD, "--steps", "ten"), "'--steps'"),
        (("plan", GOOD, "--linc", "pcie4"), "--linc"),
        (("pln", GOOD), "'pln'"),
        (("--quite", "plan", GOOD), "No such option: --quite (Possible options: --quiet)"),
        (("dump", GOOD, "--link", "pcie5"), "did you mean pcie4?"),
        (("plan",), "MODEL"),
        (("plan", "small:unet_s"), "did you mean unet_sd"),
        (("plan", "small:unet_sd", "--strategy", "displced"), "did you mean 'displaced'?"),
        (("plan", "small:unet_sd", "--strategy", "ring"), "full_sync, auto"),
        (("plan", "small:unet_sd", "--strategy", "auot"), "did you mean 'auto'?"),
        (("plan", "small:unet_sd", "--target", "tpu"), "The targets are auto, cpu, gpu, "),
        (("plan", "small:unet_sd", "--target", "h10"), "did you mean H100?"),
        (("plan", "small:unet_sd", "--link", "nvlink"), "did you mean nvlink"),
        (("plan", "small:unet_sd", "--target", "none.toml"), "there is no file none.toml"),
        (("trace", "small:unet_sd", "-o", "-", "--target", "h10"), "did you mean H100?"),
        (("trace", "small:unet_sd", "-o", "tests"), "tests is a folder"),
        (("plan", GOOD, "--json", "tests"), "tests is a folder"),
        (("plan", "small:unet_sd", "-n", 4, "--cfg", 3), "4 ranks cannot be divided into cfg x data = 3 x 1 groups"),
        (("dump", "small:unet_sd", "--data", 3), "2 ranks cannot be divided into cfg x data = 1 x 3 groups"),
        (("plan", GOOD, "-n", 17), "cannot be shared among 17 ranks"),
        (("plan", "tests.tools.models:uncapturable"), "models.py:"),
        (
            ("plan", "tests.tools.models:without_inputs"),
            "do not fit forward() of Sequential: missing a required argument",
        ),
        (("plan", "json:loads"), "a factory is called without arguments, but missing a required argument: 's'"),
        (("plan", "tests.tools.models:god"), "did you mean good"),
        (("check", GOOD, "--tolerance", -1), "'--tolerance'"),
        (("calibrate", "-o", "this.toml", "--device", "meta"), "a CPU and CUDA devices can be measured, not 'meta'"),
        (("study", "--prompt-file", "nothing.txt"), "there is no file nothing.txt; --prompt-file names a text file"),
        (("study", "--pipeline", "nothing"), "there is no folder nothing"),
        (("dump", "small:unet_sd", "--after", "normalise"), "did you mean 'normalize'?"),
        (("dump", "small:unet_sd", "--rank", 2), "counted from 0 to 1"),
        (("dump", "small:unet_sd", "--rank", -1), "'--rank'"),
        (("dump", "small:unet_sd", "--diff", "captured"), "nothing comes before"),
        (("dump", "small:unet_sd", "--diff", "patition"), "did you mean 'partition'?"),
        (("dump", "small:unet_sd", "--diff", "trim", "--after", "trim"), "leave out --after"),
        (("dump", "small:unet_sd", "--diff", "trim", "--format", "json"), "--diff is text"),
        (("dump", "small:unet_sd", "--format", "jsn"), "did you mean 'json'?"),
        (("dump", "small:unet_sd", "--only", "halos"), "; there is: exchanges"),
        (("dump", GOOD, "--module", "con_in"), "no module matches 'con_in'; did you mean conv_in"),
        (("dump", GOOD, "--module", "zzz.*"), "`fxpass dump MODEL --unfold` shows the modules"),
        (("dump", GOOD, "--op", "convolutoin"), "did you mean convolution?"),
        (("dump", GOOD, "--diff", "trim", "--op", "convolutoin"), "did you mean convolution?"),
        (("dump", "small:unet_sd", "--output", "tests"), "tests is a folder"),
        (("dump", "small:unet_sd", "--output", "pyproject.toml/dump"), "pyproject.toml is no folder"),
    ],
)
def test_errors_of_the_user_are_one_line_and_exit_code_2(arguments: tuple[object, ...], message: str) -> None:
    result = fxpass(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not result.stdout


def test_a_batch_that_cannot_be_divided_is_said_in_one_line() -> None:
    for command in ("plan", "dump"):
        with pytest.warns(FxpassWarning, match="the batch is not divided among 2 groups of ranks") as found:
            fxpass(command, "small:unet_sd", "--cfg", 2)
        shown = warning_text(found[0].message, found[0].category, found[0].filename, found[0].lineno)
        assert shown.startswith("warning: the batch is not divided")
        assert len(shown.splitlines()) == 1
    assert "test.py:1: UserWarning: words" in warning_text("words", UserWarning, "test.py", 1)


def test_without_a_command_the_help_is_shown() -> None:
    result = fxpass()
    assert "COMMAND" in result.stdout
    assert not result.stderr


def test_tracebacks_are_shown_on_request_and_for_unexpected_errors() -> None:
    with pytest.raises(ValueError, match="no model"):
        fxpass("--traceback", "plan", "sdx")
    with pytest.raises(KeyError, match="a bug of the user's"):
        fxpass("plan", "tests.tools.models:faulty")


@pytest.mark.parametrize("file", ["cli.py", "console.py", "progress.py", "pictures.py", "demo/command.py", *COMMANDS])
def test_commands_import_slow_libraries_only_when_they_run(file: str) -> None:
    light = {"commands", "console", "checkout", "progress", *(Path(command).stem for command in COMMANDS)}
    for node in ast.parse((TOOLS / file).read_text()).body:
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & {"torch", "diffusers", "numpy", "PIL"}
        elif isinstance(node, ast.ImportFrom):
            inside = node.level > 0 and (node.module or "").split(".")[0] in light
            assert inside or (node.level == 0 and node.module not in ("torch", "rich.table")), ast.unparse(node)
