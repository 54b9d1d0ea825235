"""MODEL strings of the command line: what they resolve to, and errors of those that do not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from fxpass.models.resolve import Options, ResolveError, resolve
from fxpass.models.small import case, output_tensors

real = Options(fake=False)


def save_pipeline(folder: Path, part: str, module: Any, levels: int = 3, tokens: int = 11) -> Path:
    """Write a pipeline folder with one real part, and the configurations of an autoencoder and a tokenizer."""
    module.save_pretrained(folder / part)
    index = {"_class_name": "SomePipeline", part: ["diffusers", type(module).__name__], "safety_checker": [None, None]}
    files = {
        "model_index.json": index,
        "vae/config.json": {"block_out_channels": [8] * levels},
        "tokenizer/tokenizer_config.json": {"model_max_length": tokens},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def test_a_catalog_name_is_a_model_without_weights() -> None:
    resolved = resolve("dit-xl-256", Options(height=128, batch=1))
    assert isinstance(next(resolved.module.parameters()), FakeTensor)
    assert resolved.kwargs["hidden_states"].shape == (1, 4, 16, 16)


def test_a_pipeline_folder_is_its_denoiser_with_the_scale_of_its_autoencoder_and_the_length_of_its_tokenizer(
    tmp_path: Path,
) -> None:
    unet = case("unet_sdxl").build()
    folder = save_pipeline(tmp_path / "pipe", "unet", unet)
    resolved = resolve(str(folder), Options(height=128, width=64, fake=False))
    assert resolved.name == "pipe/unet"
    assert resolved.kwargs["sample"].shape == (2, 4, 32, 16)
    assert resolved.kwargs["encoder_hidden_states"].shape == (2, 11, 24)
    with torch.no_grad():
        outputs = [output_tensors(module(**resolved.kwargs))[0] for module in (unet, resolved.module)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_a_pipeline_folder_can_be_resolved_without_its_weights(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "pipe", "transformer", case("sd3").build())
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    resolved = resolve(str(folder))
    assert isinstance(next(resolved.module.parameters()), FakeTensor)
    assert resolved.kwargs["hidden_states"].shape == (2, 4, 32, 32)


@pytest.mark.parametrize(
    "name",
    [
        "unet_sd",
        "unet_2d_resnet",
        "unet_3d",
        "dit",
        "pixart_sigma",
        "flux",
        "hunyuan_dit",
        "sana",
        "wan",
        "cogvideox_5b",
    ],
)
def test_the_example_inputs_of_a_model_folder_fit_the_model(name: str, tmp_path: Path) -> None:
    module: Any = case(name).build()
    module.save_pretrained(tmp_path)
    width = 256 if name == "dit" else 128  # it takes squares only
    resolved = resolve(str(tmp_path), Options(height=256, width=width, frames=5, fake=False))
    with torch.no_grad():
        assert output_tensors(resolved.module(**resolved.kwargs))[0].isfinite().all()


def test_an_autoencoder_folder_is_its_decoder(tmp_path: Path) -> None:
    wrapped: Any = case("vae_decode").build()
    wrapped.vae.save_pretrained(tmp_path)
    resolved = resolve(str(tmp_path), Options(height=64, fake=False))
    with torch.no_grad():
        assert resolved.module(**resolved.kwargs).shape == (1, 3, 64, 64)


def test_a_folder_that_holds_no_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ResolveError, match=r"no config.json \(a model\) and no model_index.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditonModel"}')
    with pytest.raises(ResolveError, match="does not have; did you mean UNet2DConditionModel"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ResolveError, match="is not valid JSON"):
        resolve(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKL"]}')
    with pytest.raises(ResolveError, match="pipeline without `transformer` or `unet`: it has vae"):
        resolve(str(tmp_path))


def test_a_size_that_is_no_multiple_of_the_scale_is_refused(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "pipe", "unet", case("unet_sd").build())
    with pytest.raises(ValueError, match="multiples of 4 pixels, not 130 x 130"):
        resolve(str(folder), Options(height=130))


# ------------------------------------------------------------------------------------------------ factories

factories = """
import torch
from torch import nn
from fxpass.models.small import case

def pair():
    return nn.Linear(3, 4), {"input": torch.ones(2, 3)}

def triple():
    return nn.Linear(3, 4), (torch.ones(2, 3),), {}

def known():
    return case("unet_sd").build()

def unknown():
    return nn.Linear(3, 4)

def number():
    return 3

def fails():
    raise ZeroDivisionError

linear = nn.Linear(3, 4)
"""


@pytest.fixture
def module_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "some_factories.py").write_text(factories)
    (tmp_path / "needs_more.py").write_text("import a_module_that_is_not_there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "some_factories"


@pytest.mark.parametrize("name", ["pair", "triple"])
def test_a_factory_returns_a_module_with_its_arguments(name: str, module_name: str) -> None:
    resolved = resolve(f"{module_name}:{name}")
    assert isinstance(resolved.module, nn.Linear)
    assert resolved.module(*resolved.args, **resolved.kwargs).shape == (2, 4)


def test_a_factory_may_return_only_a_module_whose_inputs_are_known(module_name: str) -> None:
    resolved = resolve(f"{module_name}:known", Options(height=128, width=256, batch=1))
    assert resolved.kwargs["sample"].shape == (1, 4, 16, 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("some_factories:unknown", r"no example inputs are known for Linear; write a factory that returns"),
        ("some_factories:number", r"returned \(int\); it must return a module"),
        ("some_factories:triples", "has no 'triples'; did you mean triple"),
        ("some_factories:linear", "linear is a Linear, not a callable"),
        ("some_factorys:pair", "there is no module 'some_factorys' to import"),
        (":pair", "'' is no dotted module path"),
        ("sdx", "not in the catalog .* did you mean sdxl"),
        ("./sdxl-bas", "has no such folder; did you mean sdxl-base"),
    ],
)
def test_an_unknown_model_is_refused_with_the_reason_and_the_nearest_name(
    text: str, message: str, module_name: str, tmp_path: Path
) -> None:
    (tmp_path / "sdxl-base").mkdir()
    text = str(tmp_path / text[2:]) if text.startswith("./") else text
    with pytest.raises(ResolveError, match=message):
        resolve(text)


def test_a_size_is_refused_for_a_factory_that_returns_inputs(module_name: str) -> None:
    with pytest.raises(ResolveError, match="sizes and batch are chosen there"):
        resolve(f"{module_name}:pair", Options(height=64))


def test_errors_inside_a_factory_or_its_module_are_not_hidden(module_name: str) -> None:
    with pytest.raises(ZeroDivisionError):
        resolve(f"{module_name}:fails")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        resolve("needs_more:anything")
