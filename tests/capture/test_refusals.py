"""A refused capture changes nothing: every tensor of the model is the object, and holds the values, that it was.

The fixture in `conftest.py` checks the same of every refusal that another test in this folder provokes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers.hooks import apply_layerwise_casting
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxpass
from fxpass.capture import CaptureError, capture
from tests.capture.test_soundness import Block
from tests.capture.unchanged import unchanged_if_refused


def refused(model: nn.Module, *args: Any, run: Callable[..., Any] = capture, **kwargs: Any) -> str:
    """The message."""
    with pytest.raises(CaptureError) as caught, unchanged_if_refused(model):
        run(model, *args, **kwargs)
    return str(caught.value)


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
