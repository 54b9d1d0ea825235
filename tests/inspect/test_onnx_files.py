"""Files of ONNX models: what they hold, and what is refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxpass.extras import MissingExtraError
from fxpass.inspect import onnx_pieces
from fxpass.inspect.errors import OnnxError
from fxpass.inspect.store import from_json
from fxpass.make_plan import plan
from fxpass.models.small import case
from fxpass.passes.lower_comm import StepPrograms
from tests.inspect.onnx_ranks import as_array
from tests.inspect.plans import planned
from tests.runtime.plans import block, inputs
from tests.tools.command import fxpass


def scopes(node: onnx.NodeProto) -> str:
    return next(each.value for each in node.metadata_props if each.key == "pkg.torch.onnx.name_scopes")


def test_a_file_is_a_valid_model_with_weights_and_state_as_inputs(tmp_path: Path) -> None:
    made = planned("displaced", 3)
    made.to_onnx(tmp_path / "new" / "rank1.onnx", 1, "steady")
    loaded = onnx.load(tmp_path / "new" / "rank1.onnx")
    onnx.checker.check_model(loaded, full_check=True)
    assert {each.domain: each.version for each in loaded.opset_import}[""] == 23
    names = [each.name for each in loaded.graph.input]
    assert {"sample", "timestep", "pace", "down.weight"} <= set(names)
    state = [name for name in names if name.startswith("state_")]
    outputs = [each.name for each in loaded.graph.output]
    assert state
    assert outputs == ["output_0", *(f"{name}.new" for name in state), "token"]


def test_modules_are_metadata_by_which_viewers_group_nodes(tmp_path: Path) -> None:
    planned().to_onnx(tmp_path / "model.onnx")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    (strided,) = [node for node in nodes if node.op_type == "Conv" and "'down'" in scopes(node)]
    namespace = next(each.value for each in strided.metadata_props if each.key == "namespace")
    assert namespace.startswith(": Block/down: Conv2d/")
    assert any(node.op_type == "Put" and scopes(node).startswith("['', 'down', ") for node in nodes)


def test_puts_and_gets_have_an_order_and_say_what_they_carry(tmp_path: Path) -> None:
    planned().to_onnx(tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    messages = [node for node in graph.node if node.domain == "fxpass"]
    assert [node.input[0] for node in messages] == ["", *(node.output[0] for node in messages[:-1])]
    assert messages[-1].output[0] == graph.output[-1].name
    halo = next(node for node in messages if node.op_type == "Put" and "'conv_out'" in scopes(node))
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in halo.attribute}
    assert attributes["exchanges"] == [b"x3.0 0>1"]
    assert attributes["roles"] == [b"halo"]
    assert attributes["bytes"] == [1024]


def test_the_metadata_of_a_file_is_the_dump_without_nodes(tmp_path: Path) -> None:
    planned("displaced").to_onnx(tmp_path / "model.onnx", 1, "first")
    metadata = {each.key: each.value for each in onnx.load(tmp_path / "model.onnx").metadata_props}
    held, snapshot = from_json(metadata["fxpass.dump"]), planned("displaced").snapshot(1)
    assert (held.exchanges, held.messages, held.rank) == (snapshot.exchanges, snapshot.messages, 1)
    assert metadata["fxpass.mode"] == StepPrograms(planned("displaced").graph, 1).canonical("first")


def test_all_ranks_share_one_file_of_weights(tmp_path: Path) -> None:
    model = block()
    made = plan(model, *inputs(), world_size=1)
    made.to_onnx(tmp_path / "a.onnx", model=model)
    evaluator = ReferenceEvaluator(str(tmp_path / "a.onnx"))
    sample, timestep = inputs(seed=3)
    feeds = {"sample": as_array(sample), "timestep": as_array(timestep), "pace": torch.tensor(0.0).double().numpy()}
    outputs: Any = evaluator.run(None, feeds)
    found = torch.from_numpy(outputs[0])
    with torch.no_grad():
        torch.testing.assert_close(found, model(sample, timestep)["sample"])
    (weights,) = tmp_path.glob("weights-*.bin")
    shared = weights.read_bytes()
    made = plan(model, *inputs(), world_size=2)
    for rank in (0, 1):
        made.to_onnx(tmp_path / f"{rank}.onnx", rank, model=model)
        assert weights.read_bytes() == shared
    assert sorted(each.name for each in tmp_path.iterdir()) == ["0.onnx", "1.onnx", "a.onnx", weights.name]


def test_models_with_other_weights_lie_in_one_folder(tmp_path: Path) -> None:
    models = [block(), block(seed=1)]
    for i, model in enumerate(models):
        plan(model, *inputs(), world_size=1).to_onnx(tmp_path / f"{i}.onnx", model=model)
    sample, timestep = inputs(seed=3)
    feeds = {"sample": as_array(sample), "timestep": as_array(timestep), "pace": torch.tensor(0.0).double().numpy()}
    for i, model in enumerate(models):
        outputs: Any = ReferenceEvaluator(str(tmp_path / f"{i}.onnx")).run(None, feeds)
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(outputs[0]), model(sample, timestep)["sample"])


def test_a_model_without_weights_has_them_as_inputs_only(tmp_path: Path) -> None:
    with FakeTensorMode():
        model, given = block(), inputs()
    made = plan(model, *given, world_size=2)
    made.to_onnx(tmp_path / "model.onnx")
    assert "conv_in.weight" in [each.name for each in onnx.load(tmp_path / "model.onnx").graph.input]
    with pytest.raises(ValueError, match="have no values"):
        made.to_onnx(tmp_path / "other.onnx", model=model)


# -- errors ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fxpass_onnx_test::odd", mutates_args=())
def odd(x: Tensor) -> Tensor:
    return x * 3


odd.register_fake(torch.empty_like)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner = nn.Conv2d(4, 4, 3, padding=1), Calls()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.inner(self.conv(sample)) * timestep


class Calls(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return odd(x)


def test_an_operator_without_an_onnx_form_is_named_in_one_line(tmp_path: Path) -> None:
    made = plan(Odd().eval(), *inputs(), world_size=2)
    with pytest.raises(
        OnnxError, match=r"^fxpass_onnx_test.odd.default has no ONNX form: .*\(odd_default in inner\)$"
    ) as error:
        made.to_onnx(tmp_path / "model.onnx")
    assert len(str(error.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_operator_whose_onnx_form_has_a_subgraph_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = onnx_pieces._exported

    def branching(forms: Any) -> ir.Model:
        model = exported(forms)
        (conv,) = (node for node in model.graph if node.op_type == "Conv")
        conv.attributes["then_branch"] = ir.AttrGraph("then_branch", ir.Graph([], [], nodes=[]))
        return model

    monkeypatch.setattr(onnx_pieces, "_exported", branching)
    made = plan(nn.Sequential(nn.Conv2d(4, 4, 1)).eval(), inputs()[0], world_size=2)
    with pytest.raises(
        OnnxError, match=r"^aten.convolution.default has no ONNX form: .* Conv with a subgraph \(.* in 0\)$"
    ):
        made.to_onnx(tmp_path / "model.onnx")


def test_an_interrupted_export_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: str) -> None:
        assert Path(path).exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx.checker, "check_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        planned().to_onnx(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["folder/weights.bin", "/weights.bin", "..", "", "model.onnx"])
def test_weights_that_a_model_could_not_find_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights"):
        planned().to_onnx(tmp_path / "model.onnx", model=block(), weights=name)
    assert not list(tmp_path.iterdir())


def test_weights_of_a_folder_are_those_that_lie_in_it_and_the_model_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any) -> None:
        raise AssertionError("the model runs")

    monkeypatch.setattr(sys.modules["fxpass.capture.capture"], "_warm_up", run)
    model: Any = case("dit").build()
    model.save_pretrained(tmp_path / "dit")
    file = tmp_path / "model.onnx"
    result = fxpass("dump", tmp_path / "dit", "-n", 1, "-f", "onnx", "-o", file, "--weights", "w.bin")
    assert result.exit_code == 0, result.stderr
    held = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(file).graph.initializer}
    for name, value in model.named_parameters():
        if name in held:
            torch.testing.assert_close(torch.from_numpy(held[name].astype("float32")), value.detach())
    assert len([name for name, _ in model.named_parameters() if name in held]) > 10


def test_an_unknown_mode_or_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no mode 'stedy' of a step; there is: exact, first, steady"):
        planned().to_onnx(tmp_path / "model.onnx", mode="stedy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no rank 2"):
        planned().to_onnx(tmp_path / "model.onnx", 2)


@pytest.mark.parametrize("module", ["onnx", "onnxscript"])
def test_without_onnx_the_message_says_what_to_install(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf'{module} is not installed; run: pip install "fxpass\[onnx\]"'):
        planned().to_onnx(tmp_path / "model.onnx")
    result = fxpass("dump", "no-such-model", "--format", "onnx", "-o", tmp_path / "model.onnx")
    assert (result.exit_code, result.stderr) == (
        2,
        f'error: {module} is not installed; run: pip install "fxpass[onnx]"\n',
    )


def test_the_command_writes_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    made = ("dump", "tests.tools.models:good", "-n", 3, "--rank", 2, "--strategy", "displaced")
    assert fxpass(*made, "--format", "onnx", "--mode", "steady", "-o", file, "--weights", "w.bin").stdout == ""
    metadata = {each.key: each.value for each in onnx.load(file).metadata_props}
    assert metadata["fxpass.mode"].startswith("steady")
    assert from_json(metadata["fxpass.dump"]).rank == 2
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.onnx", "w.bin"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-f", "onnx"), "give --output FILE"),
        (("-f", "onnx", "-o", "-"), "give --output FILE"),
        (("-f", "onnx", "-o", "m.onnx", "--mode", "stedy"), "did you mean 'steady'?"),
        (("-f", "onnx", "-o", "m.onnx", "--op", "linear"), "leave out --after"),
        (("-f", "onnx", "-o", "m.onnx", "--unfold"), "leave out --after"),
        (("--mode", "steady"), "are for --format onnx"),
        (("-f", "json", "--weights", "w.bin"), "are for --format onnx"),
        (("-f", "onnx", "-o", "m.onnx", "--weights", "folder/w.bin"), "give the name of a file, not 'folder/w.bin'"),
        (("-f", "onnx", "-o", "m.onnx", "--weights", "m.onnx"), "the model and its weights cannot both be the file"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_captured(words: tuple[str, ...], message: str) -> None:
    result = fxpass("dump", "no-such-model", *words)
    assert result.exit_code == 2
    assert re.search(re.escape(message), result.stderr)
    assert len(result.stderr.strip().splitlines()) == 1
