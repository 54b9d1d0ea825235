"""What a graph cannot hold is refused with the line or the name, and a refused capture changes nothing.

Every tensor of the model is the same object with the same values; the fixture in `conftest.py` checks each refusal
that a test in this folder provokes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload_with_hook
from diffusers.hooks import apply_layerwise_casting
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxpass
from fxpass.capture import CaptureError, capture
from tests.capture.test_soundness import Block
from tests.capture.unchanged import refused


def carry(m: Block, x: Tensor) -> Tensor:
    y = x + m.plain
    m.plain = y[0].detach()
    return y


def hoard(m: Block, x: Tensor) -> Tensor:
    m.kept.append(x.detach())
    return x + m.kept[0]


def step(m: Block, x: Tensor) -> Tensor:
    m.steps = getattr(m, "steps", 0) + 1  # pyright: ignore[reportArgumentType]
    return x * m.steps


SPARSE = torch.eye(6).to_sparse()


@torch.library.custom_op("fxpass_test::fill", mutates_args={"x"})
def fill(x: Tensor) -> None:
    x.fill_(1)


@torch.library.custom_op("fxpass_test::relu_", mutates_args={"self"})
def named_like_relu(self: Tensor) -> None:
    self.fill_(1)


def written_by_a_namesake(m: Block, x: Tensor) -> Tensor:
    y = x.clone()
    named_like_relu(y)
    return y


def several_written(m: Block, x: Tensor) -> Tensor:
    y, z = x.clone(), x.clone()
    torch._foreach_add_([y, z], 1)
    return y + z


def two_outputs(m: Block, x: Tensor) -> Tensor:
    values, places = torch.empty(6), torch.empty(6, dtype=torch.int64)
    torch.max(x, 0, out=(values, places))
    return x + values


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "buffer": (lambda m, x: m.count.add_(x[0]), "its own state in place: count"),
    "reassigned": (lambda m, x: (setattr(m, "count", m.count + 1), x + m.count)[1], "own state while it runs: count"),
    "carried": (carry, "plain is read, then replaced"),
    "kept": (hoard, "from call to call in kept"),
    "counted": (step, "counts from call to call: steps (1 before, 2 after)"),
    "branch": (lambda m, x: x if x.sum() > 0 else -x, "needs the value of an activation"),
    "mask": (lambda m, x: x[x > 0], "needs the value of an activation"),
    "random": (lambda m, x: x + torch.randn(6), "draws random numbers"),
    "dropout": (lambda m, x: F.dropout(x, 0.5, training=True), "training mode"),
    "attention dropout": (
        lambda m, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
        "attention with dropout",
    ),
    "batch norm": (lambda m, x: F.batch_norm(x, m.count, m.table, training=True), "training mode"),
    "strides": (lambda m, x: x.as_strided((3, 2), x.stride()), "depends on the order in memory"),
    "layout": (lambda m, x: torch.sparse.mm(SPARSE, x.T).T, "a tensor with layout torch.sparse_coo"),
    "resized": (lambda m, x: x.clone().unsqueeze_(0), "changes a tensor's shape in place"),
    "custom write": (lambda m, x: (fill(y := x.clone()), y)[1], "writes in place and has no functional form"),
    "write by a namesake": (written_by_a_namesake, "writes in place and has no functional form"),
    "several written": (several_written, "writes to several tensors at once"),
    "two outputs": (two_outputs, "writes to several tensors at once"),
    "windows": (lambda m, x: (y := x.clone(), y.unfold(1, 2, 2).mul_(2))[0], "which cannot be undone"),
    "other": (lambda m, x: x.undefined_attribute if torch.compiler.is_compiling() else x, "AttributeError"),
}


@pytest.mark.parametrize(("body", "message"), REFUSED.values(), ids=REFUSED)
def test_operations_that_a_graph_cannot_hold_are_refused_with_the_line_of_the_model(body: Any, message: str) -> None:
    text = refused(Block(body), torch.randn(4, 6))
    assert message in text
    assert "call" in text or "is read" in text or "test_refusals.py:" in text


def weights_in_place(m: Block, x: Tensor) -> Tensor:
    m.linear.weight.mul_(2)
    return m.linear(x)


def weights_by_data(m: Block, x: Tensor) -> Tensor:
    m.linear.weight.data[0] = 5
    return m.linear(x)


def replaced_weights(m: Block, x: Tensor) -> Tensor:
    m.linear.weight = nn.Parameter(m.linear.weight * 2)
    return m.linear(x)


def moved_weights(m: Block, x: Tensor) -> Tensor:
    m.linear.bias.data = m.linear.bias.data.to(torch.float64).float() + 1
    return m.linear(x)


def attributes(m: Any, x: Tensor) -> Tensor:
    m.plain.add_(1)
    m.kept.append(x)
    m.table = m.table * 2
    return x + m.plain + m.kept[0]


@pytest.mark.parametrize("body", [weights_in_place, weights_by_data, replaced_weights, moved_weights, attributes])
def test_weights_and_attributes_that_the_forward_changed_are_put_back(body: Any) -> None:
    refused(Block(body), torch.randn(4, 6))


def unet() -> tuple[nn.Module, tuple[Any, ...]]:
    model = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model.eval(), (torch.randn(1, 3, 8, 8), 1)


def offload_groups(model: Any) -> None:
    model.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize(
    ("switch", "words"),
    [
        (offload_groups, "group offloading"),
        (lambda model: cpu_offload_with_hook(model, torch.device("cpu")), "offloading of whole models"),
        (lambda model: apply_layerwise_casting(model, torch.bfloat16, torch.float32), "layerwise casting"),
    ],
    ids=["groups", "model", "casting"],
)
def test_hooks_that_move_weights_are_refused_before_anything_runs(switch: Any, words: str, called: bool) -> None:
    model, args = unet()
    switch(model)
    if called:
        with torch.no_grad():
            model(*args)

    def run(model: Any, *args: Any) -> None:
        module: Any = fxpass.parallelize(model, 2, executor="lockstep")
        module(*args)

    text = refused(model, *args, run=run)
    assert words in text
    assert "remove the hook" in text


def test_weights_on_the_meta_device_are_refused_by_name() -> None:
    with pytest.raises(CaptureError, match=r"0\.weight is on the meta device"):
        capture(nn.Sequential(nn.Linear(2, 2, device="meta")), torch.ones(1, 2))


def test_a_function_is_not_a_model() -> None:
    function: Any = torch.relu
    with pytest.raises(TypeError, match="put the function into one's forward"):
        capture(function, torch.randn(2))


class Sliced(Block):
    def forward(self, x: Tensor, rows: Tensor) -> Any:
        return super().forward(x)[: int(rows.item())]


def test_a_value_that_is_read_of_a_fake_input_is_refused_by_name() -> None:
    with FakeTensorMode():
        model, x, rows = Sliced(lambda m, x: x).eval(), torch.randn(4, 6), torch.empty((), dtype=torch.int64)
    with pytest.raises(CaptureError, match="needs the value of rows, which is fake; give a real tensor"):
        capture(model, x, rows)


def test_an_attribute_on_the_meta_device_is_refused_by_name() -> None:
    with FakeTensorMode():
        model, x = Block(lambda m, x: x + m.plain).eval(), torch.randn(4, 6)
    model.plain = torch.empty(6, device="meta")
    with pytest.raises(CaptureError, match="plain is on the meta device"):
        capture(model, x)


def test_a_refused_capture_gives_back_the_random_numbers_that_it_drew() -> None:
    class Drawing(nn.Module):
        def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
            return x + torch.randn(3) + torch.randn(3, generator=generator)

    model, generator = Drawing().eval(), torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    expected = model(torch.zeros(3), torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    with pytest.raises(CaptureError, match="random"):
        capture(model, torch.zeros(3), generator)
    assert torch.equal(model(torch.zeros(3), generator), expected)
