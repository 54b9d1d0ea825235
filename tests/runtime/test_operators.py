"""Operators that are not torch's, in worker processes: their modules are imported, or the call fails at once."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.runtime.errors import RankError
from fxpass.runtime.operators import origins, reference
from tests.runtime import fxpass_test_namesake
from tests.runtime.custom_kernels import doubled

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be split")
ROOT = Path(__file__).resolve().parents[2]


class Calls(nn.Module):
    def __init__(self, operator: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.operator(self.conv(x)))


def call(operator: Callable[[Tensor], Tensor]) -> None:
    """Compare a model that calls an operator with itself on two processes."""
    model, x = Calls(operator).eval(), torch.randn(1, 4, 16, 8)
    module: Any = fxpass.parallelize(model, 2, executor="spawn")
    with module, torch.no_grad():
        torch.testing.assert_close(module(x), model(x))


def test_workers_import_the_modules_that_define_an_operator_and_its_kernels() -> None:
    assert origins(torch.ops.fxpass_test.doubled.default) == [
        "tests.runtime.custom_operators",
        "tests.runtime.custom_kernels",
    ]
    call(doubled)


def test_workers_import_the_module_of_a_library() -> None:
    call(torch.ops.fxpass_test_library.tripled)


def test_workers_import_the_module_that_is_called_as_the_namespace_is() -> None:
    assert origins(fxpass_test_namesake.operator) == []
    call(fxpass_test_namesake.operator)


def test_another_thread_may_import_modules_while_an_operator_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    class Name(str):
        """Of a module; another one is imported while it is read."""

        __slots__ = ()

        def rpartition(self, sep: str, /) -> tuple[str, str, str]:
            monkeypatch.setitem(sys.modules, "fxpass_test_imported_meanwhile", sys)
            return super().rpartition(sep)

    monkeypatch.setitem(sys.modules, Name("fxpass_test_name"), sys)
    assert reference(torch.ops.aten.add.Tensor)[:2] == ("aten.add.Tensor", [])


@pytest.mark.usefixtures("new_processes")
@pytest.mark.parametrize(
    ("variable", "words"),
    [("FXPASS_TEST_RAISE", "(?s)rank 1 failed: .*no licence for this machine"), ("FXPASS_TEST_EXIT", "exit code 3")],
)
def test_a_worker_that_fails_while_it_loads_a_plan_is_heard_at_once(
    variable: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    start = time.monotonic()
    with pytest.raises(RankError, match=words):
        call(doubled)
    assert time.monotonic() - start < 100  # the timeout is 600 s


def test_an_operator_that_no_module_registers_is_named_at_once() -> None:
    torch.library.define("fxpass_test::nowhere", "(Tensor x) -> Tensor")
    torch.library.impl("fxpass_test::nowhere", "CompositeExplicitAutograd", lambda x: x + 1)
    torch.library.register_fake("fxpass_test::nowhere", torch.empty_like)
    start = time.monotonic()
    with pytest.raises(RankError, match=r"does not know the operator fxpass_test\.nowhere\.default.*custom_op"):
        call(torch.ops.fxpass_test.nowhere)
    assert time.monotonic() - start < 100


SCRIPT = """
import torch, fxpass

print("the script runs", flush=True)

@torch.library.custom_op("fxpass_script::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2

doubled.register_fake(torch.empty_like)

class Model(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return doubled(x)

module = fxpass.parallelize(Model().eval(), 2, executor="spawn")
try:
    module(torch.randn(1, 4, 16, 8))
except NotImplementedError as error:
    print(error)
print(len(module._engine.executor.processes))
"""


def test_an_operator_of_the_script_itself_is_refused_before_any_worker_starts(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        check=False, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    once, error, workers = result.stdout.splitlines()
    assert once == "the script runs"
    assert error.startswith("fxpass_script::doubled is registered by the script itself")
    assert workers == "0"
