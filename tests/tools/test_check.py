"""`fxpass check` reports exact and wrong models."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxpass.runtime.channels import RankChannel
from fxpass.tools.commands.check import differences, fresh, named_tensors, randomised
from tests.runtime.plans import block, inputs
from tests.tools.command import fxpass


def test_check_reports_exactness_for_every_world_size() -> None:
    result = fxpass("check", "tests.tools.models:good", "-n", 2, "-n", 3)
    assert result.exit_code == 0
    assert len(re.findall(r"^[23] +sample +2x4x16x8 +\S+e-0\d +yes", result.stdout, re.M)) == 2
    assert "yes: tests.tools.models:good is exact on 2, 3 ranks" in result.stdout
    assert "yes: small:unet_sd is exact on 2 ranks" in fxpass("check", "small:unet_sd", "-n", 2).stdout


def test_check_randomises_constant_parameters_and_says_so() -> None:
    said = "constant parameters were given random values"
    assert said in fxpass("check", "tests.tools.models:good", "-n", 2).stdout
    assert said not in fxpass("check", "tests.tools.models:good", "-n", 2, "--keep-weights").stdout
    model = block()
    assert randomised(model) == 2  # of the group norm
    assert randomised(model) == 0


def test_check_fails_when_an_exchange_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankChannel, "get", changed(lambda x: x * 1.01))
    result = fxpass("check", "tests.tools.models:good", "-n", 2)
    assert result.exit_code == 1
    assert "no: tests.tools.models:good is NOT exact on 2 ranks" in result.stdout


def test_check_fails_when_an_output_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankChannel, "get", changed(lambda x: x * torch.nan))
    assert differences(block(), inputs(), {}, [2])[0].value == float("inf")


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[RankChannel], list[Tensor]]:
    """A `get` whose receive buffers are changed."""
    get = RankChannel.get
    return lambda channel: [change(buffer) for buffer in get(channel)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sdxl",), "take its small sibling instead: small:unet_sdxl"),
        (("flux-dev",), "small:flux"),
        (("tests.tools.models:infinite",), "is not finite"),
        (("tests.tools.models:good", "-n", 64), "cannot be shared among 64 ranks"),
    ],
)
def test_check_refuses_models_that_it_cannot_compare(arguments: tuple[object, ...], message: str) -> None:
    result = fxpass("check", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_fresh_inputs_differ_within_the_same_range_and_masks_stay() -> None:
    mask = torch.tensor([1.0, 1.0, 0.0])
    given = {
        "x": torch.randn(4, 4),
        "t": torch.tensor([500]),
        "mask": mask,
        "flag": True,
        "labels": torch.tensor([0, 1]),
    }
    _, other = fresh((), given)
    assert not torch.equal(other["x"], given["x"])
    assert torch.equal(other["x"].flatten().sort().values, given["x"].flatten().sort().values)
    assert other["t"].item() == 250
    assert torch.equal(other["mask"], mask)
    assert torch.equal(other["labels"], given["labels"])
    assert other["flag"] is True


def test_outputs_have_the_names_of_the_models_output() -> None:
    x = torch.zeros(1)
    assert list(named_tensors({"sample": x, "more": (x, [x], None)})) == ["sample", "more.0", "more.1.0"]
    assert list(named_tensors(x)) == [""]
