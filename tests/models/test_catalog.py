"""The catalog builds published models at full size without memory, and they are captured."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from fxpass import capture
from fxpass.ir.program import shape_of
from fxpass.models.catalog import catalog, get, load

cheap = {"sd-vae-decode"}
usual = ("sd15", "sdxl", "dit-xl-512", "pixart-sigma", "sd35-medium", "flux-dev", "hunyuan-dit", "sana-1600m",
         "wan21-1.3b", "cogvideox-2b", "sd-vae-decode")  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in usual else pytest.mark.slow) for n in catalog])
def test_a_model_has_as_many_parameters_as_published_and_none_holds_memory(name: str) -> None:
    module, kwargs = load(name)
    assert sum(parameter.numel() for parameter in module.parameters()) == catalog[name].parameters
    assert all(isinstance(parameter, FakeTensor) for parameter in module.parameters())
    real = [x for x in tree_leaves(kwargs) if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)]
    assert sum(x.numel() for x in real) < 1e6, "masks of tokens have values"


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in cheap else pytest.mark.slow) for n in usual])
def test_a_model_is_captured_without_weights_and_returns_one_sample_per_input(name: str) -> None:
    module, kwargs = load(name)
    output = shape_of(capture(module, **kwargs).graph.find_nodes(op="output")[0].all_input_nodes[0])
    sample = next(iter(kwargs.values()))
    if name != "sd-vae-decode":
        assert output[0] == sample.shape[0]
        assert output[-2:] == sample.shape[-2:]
    else:
        assert output == (1, 3, 512, 512)


@pytest.mark.parametrize(
    ("name", "pixels", "latent"),
    [
        ("sd15", (1, 512, 768), (1, 64, 96)),
        ("sdxl", (1, 3840, 3840), (1, 480, 480)),
        ("sana-1600m", (1, 1024, 1024), (1, 32, 32)),
        ("wan21-1.3b", (81, 480, 832), (21, 60, 104)),
        ("cogvideox-2b", (49, 480, 720), (13, 60, 90)),
    ],
)
def test_pixels_and_frames_become_the_latent_of_the_pipeline(
    name: str, pixels: tuple[int, int, int], latent: tuple[int, int, int]
) -> None:
    frames, height, width = pixels
    assert get(name).latent(height, width, frames) == latent


def test_the_size_and_the_batch_can_be_chosen() -> None:
    _, kwargs = load("dit-xl-256", height=384, batch=3)
    assert kwargs["hidden_states"].shape == (3, 4, 48, 48)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("flux-dev", {"height": 1000, "width": 1024}, "multiples of 16 pixels, not 1000 x 1024"),
        ("dit-xl-256", {"height": 256, "width": 512}, "takes squares"),
        ("wan21-14b", {"frames": 80}, r"4 k \+ 1 frames, not 80"),
    ],
)
def test_a_size_that_the_model_does_not_take_is_refused_with_the_reason(
    name: str, size: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(name, **size)  # pyright: ignore[reportArgumentType]


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(LookupError, match=r"no model named 'sdxll' in the catalog; did you mean .*sdxl"):
        get("sdxll")
    with pytest.raises(LookupError, match="known are sd15, sd21, sdxl"):
        get("?")


def test_parameters_and_inputs_take_the_usual_precision_except_what_the_class_keeps_in_float32() -> None:
    module, kwargs = load("wan21-1.3b")
    assert kwargs["hidden_states"].dtype == torch.bfloat16
    assert module.get_parameter("proj_out.weight").dtype == torch.bfloat16
    assert module.get_parameter("scale_shift_table").dtype == torch.float32
    module, kwargs = load("wan21-1.3b", dtype=torch.float32)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


@pytest.mark.slow
def test_inputs_that_control_flow_reads_have_values() -> None:
    for name, pictured in (("hunyuan-video-15", False), ("hunyuan-video-15-i2v", True)):
        _, kwargs = load(name)
        assert not isinstance(kwargs["image_embeds"], FakeTensor)
        assert bool(kwargs["image_embeds"].any()) is pictured


def test_a_model_can_have_random_weights_instead() -> None:
    module, kwargs = load("sd-vae-decode", height=64, fake=False)
    with torch.no_grad():
        image = module(**kwargs)
    assert image.shape == (1, 3, 64, 64)
    assert image.isfinite().all()
