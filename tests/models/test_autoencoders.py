"""Autoencoders: `decode` and `encode` run on all ranks, exactly, or unsplit with a warning that says why."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.models.case import randomise_constants
from fxpass.models.pipelines import methods_of
from fxpass.models.zoo import zoo_case
from tests.tools.models import unsplittable

FAMILIES = ["kl", "vae_tiny", "vq", "dc", "vae_wan"]


def autoencoder(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A small autoencoder of the zoo with random weights, and inputs of its `decode` and `encode`."""
    if name == "kl":
        return kl(), {"decode": torch.randn(1, 4, 16, 8), "encode": torch.randn(1, 3, 32, 16)}
    decode, encode = (zoo_case(f"{name}_{half}") for half in ("decode", "encode"))
    wrapper: Any = decode.build()
    latent, sample = decode.inputs(16, module=wrapper)["latent"], encode.inputs(16, module=wrapper)["sample"]
    return wrapper.vae, {"decode": latent, "encode": sample}


def kl(**options: Any) -> Any:
    torch.manual_seed(0)
    config: dict[str, Any] = {  # the library's annotations are too narrow
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    }
    model = diffusers.AutoencoderKL(**config | options)
    return randomise_constants(model).eval().requires_grad_(False)


def tensor_of(output: Any) -> Tensor:
    first = output if isinstance(output, Tensor) else output[0]
    return first if isinstance(first, Tensor) else first.parameters


def assert_exact(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    one, other = tensor_of(found), tensor_of(expected)
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_decode_and_encode_of_an_autoencoder_are_split_and_exact(name: str, ranks: int) -> None:
    model, inputs = autoencoder(name)
    split: Any = fxpass.parallelize(model, ranks, executor="lockstep")
    for method, given in inputs.items():
        received = sum(split.traffic.values())
        with torch.no_grad():
            assert_exact(getattr(split, method)(given), getattr(model, method)(given))
        assert sum(split.traffic.values()) > received
        assert split.plan.bound > 1.2
    assert len(split._engine.programs) == 2


def test_only_methods_that_take_a_tensor_are_an_autoencoders() -> None:
    class Tokenizer(nn.Module):
        def encode(self, text: str) -> Tensor: ...
        def decode(self, tokens: Tensor) -> str: ...

    assert methods_of(kl()) == ["decode", "encode"]
    assert methods_of(Tokenizer()) == []
    assert methods_of(nn.Linear(2, 2)) == []


def said(action: Any, words: str) -> list[str]:
    """The warnings with these words that an action gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(each.message) for each in caught if words in str(each.message)]


@torch.no_grad()
@pytest.mark.parametrize("name", ["decode", "encode"])
def test_a_tiled_call_equals_the_unsplit_tiled_call_also_after_tiling_is_switched_on_and_off(name: str) -> None:
    model = kl(sample_size=32)
    model.tile_latent_min_size, model.tile_sample_min_size = 16, 32
    split: Any = fxpass.parallelize(model, 2, executor="lockstep")
    x = torch.randn(1, 4, 24, 24) if name == "decode" else torch.randn(1, 3, 48, 48)
    whole = getattr(model, name)(x)
    assert_exact(getattr(split, name)(x), whole)
    split.enable_tiling()
    tiled = getattr(model, name)(x)
    assert (tensor_of(tiled) - tensor_of(whole)).abs().max() > 1e-3 * tensor_of(whole).abs().max()
    assert_exact(getattr(split, name)(x), tiled)
    split.disable_tiling()
    assert_exact(getattr(split, name)(x), whole)


@torch.no_grad()
def test_a_sliced_decode_is_split_and_exact() -> None:
    model = kl()
    split: Any = fxpass.parallelize(model, 2, executor="lockstep")
    split.enable_slicing()
    z = torch.randn(3, 4, 16, 16)
    assert_exact(split.decode(z), model.decode(z))
    assert split.plan.bound > 1.9


@torch.no_grad()
def test_decodes_with_new_generators_share_one_program() -> None:
    model = kl()
    split: Any = fxpass.parallelize(model, 2, executor="lockstep")
    z = torch.randn(1, 4, 16, 16)
    for _ in range(4):
        assert_exact(split.decode(z, generator=torch.Generator()), model.decode(z))
    assert len(split._engine.programs) == 1
    assert split._engine.programs.in_a_row == 0


@torch.no_grad()
def test_a_call_of_more_operators_than_the_budget_runs_unsplit_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpass.runtime.calls.module.OPERATORS", 50)
    model = kl()
    split: Any = fxpass.parallelize(model, 2, executor="lockstep")
    z, generator = torch.randn(1, 4, 16, 16), torch.Generator()
    why = said(lambda: assert_exact(split.decode(z), model.decode(z)), "AutoencoderKL.decode runs unsplit")
    assert why == [
        "AutoencoderKL.decode runs unsplit on every rank: it runs more than 50 operators (a loop over frames or tiles?)"
    ]
    assert not said(lambda: split.decode(z), "unsplit")
    assert said(lambda: split.decode(z, generator=generator), "unsplit")
    assert not said(lambda: split.decode(z, generator=torch.Generator()), "unsplit")  # not captured again to find out
    assert not split.traffic
    with pytest.raises(fxpass.CaptureError, match="more than 50 operators"):
        fxpass.parallelize(model, 2, executor="lockstep", strict=True).decode(z)


@torch.no_grad()
def test_a_call_that_was_too_large_is_tried_again_when_the_model_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = kl(sample_size=32)
    model.tile_latent_min_size, model.tile_sample_min_size = 8, 16
    split: Any = fxpass.parallelize(model, 2, executor="lockstep")
    split.enable_tiling()
    monkeypatch.setattr("fxpass.runtime.calls.module.OPERATORS", 400)
    z = torch.randn(1, 4, 32, 32)
    assert not said(lambda: assert_exact(split.decode(z), model.decode(z)), "unsplit")
    assert not split.traffic  # each tile by itself
    split.disable_tiling()
    assert not said(lambda: assert_exact(split.decode(z), model.decode(z)), "unsplit")
    assert split.traffic


@torch.no_grad()
def test_tiles_are_split_one_by_one_also_where_blending_them_takes_most_operators(monkeypatch: Any) -> None:
    monkeypatch.setattr("fxpass.runtime.calls.module.OPERATORS", 600)
    model = kl(sample_size=32)
    model.tile_latent_min_size, model.tile_sample_min_size = 16, 32
    split: Any = fxpass.parallelize(model, 2, executor="lockstep")
    split.enable_tiling()
    z = torch.randn(1, 4, 24, 24)
    assert not said(lambda: assert_exact(split.decode(z), model.decode(z)), "unsplit")
    assert [*split._engine.loops._modules] == ["decoder", "post_quant_conv"]


@torch.no_grad()
def test_a_latent_without_a_row_for_each_rank_is_decoded_unsplit_and_a_warning_says_why() -> None:
    model = kl()
    split: Any = fxpass.parallelize(model, 8, executor="lockstep")
    z = torch.randn(1, 4, 1, 1)
    assert said(lambda: assert_exact(split.decode(z), model.decode(z)), "AutoencoderKL.decode runs unsplit")


@torch.no_grad()
def test_a_decoder_that_draws_random_numbers_from_a_generator_is_split() -> None:
    case = zoo_case("consistency_decoder_decode")
    wrapper: Any = case.build()
    z = case.inputs(16, module=wrapper)["latent"]
    split: Any = fxpass.parallelize(wrapper.vae, 2, executor="lockstep")

    def drawn(model: Any) -> Tensor:
        return tensor_of(model.decode(z, generator=torch.Generator().manual_seed(0)))

    assert_exact(drawn(split), drawn(wrapper.vae))
    assert split.traffic["output"] > 0


def test_a_decode_that_needs_gradients_or_is_in_training_mode_runs_unsplit() -> None:
    model = kl()
    split: Any = fxpass.parallelize(model, 2, executor="lockstep")
    z = torch.randn(1, 4, 16, 16, requires_grad=True)
    assert said(lambda: split.decode(z).sample.sum().backward(), "an input requires a gradient")
    assert z.grad is not None
    model.train()
    assert said(lambda: split.decode(z.detach()), "training mode")


@torch.no_grad()
def test_a_stale_strategy_keeps_decode_exact_and_does_not_speak_of_timesteps() -> None:
    model = kl()
    split: Any = fxpass.parallelize(model, 2, strategy="displaced", executor="lockstep")
    z = torch.randn(1, 4, 16, 16)
    assert not said(lambda: [assert_exact(split.decode(z + k), model.decode(z + k)) for k in range(3)], "timestep")
    assert split.plan.strategy.exact


@torch.no_grad()
def test_activations_of_decode_on_four_ranks_take_less_than_a_third_of_the_memory() -> None:
    model, z = kl(), torch.randn(1, 4, 64, 64)
    alone, split = (fxpass.parallelize(model, n, executor="lockstep") for n in (1, 4))
    assert_exact(split.decode(z), alone.decode(z))
    whole, part = (each._engine.plan.predict().memory.activations for each in (alone, split))
    assert part <= 0.32 * whole  # 0.265


@torch.no_grad()
def test_decode_and_encode_run_on_one_set_of_worker_processes() -> None:
    model = kl()
    z, x = torch.randn(1, 4, 16, 16), torch.randn(1, 3, 32, 32)
    with fxpass.parallelize(model, 2, executor="spawn", timeout=60) as split:
        assert_exact(split.decode(z), model.decode(z))
        assert_exact(split.encode(x), model.encode(x))
        assert len(split._engine.executor.processes) == 1


@torch.no_grad()
def test_a_loop_over_frames_that_is_too_long_is_recorded_once_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpass.runtime.calls.module.OPERATORS", 100)
    model, inputs = autoencoder("vae_wan")
    split: Any = fxpass.parallelize(model, 2, executor="lockstep")
    assert said(lambda: assert_exact(split.decode(inputs["decode"]), model.decode(inputs["decode"])), "over frames")
    monkeypatch.setattr("fxpass.runtime.calls.programs.capture_call", lambda *_: 1 / 0)
    assert_exact(split.decode(inputs["decode"]), model.decode(inputs["decode"]))  # its first run left a cache behind


@torch.no_grad()
def test_tiling_can_be_ignored_where_a_call_is_split_and_stays_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = kl(sample_size=32)
    model.tile_latent_min_size, model.tile_sample_min_size = 16, 32
    split: Any = fxpass.parallelize(model, 2, executor="lockstep", ignore_tiling=True)
    z = torch.randn(1, 4, 24, 24)
    whole = model.decode(z)
    split.enable_tiling()
    tiled = model.decode(z)
    for _ in range(2):
        assert_exact(split.decode(z), whole)
    assert split.use_tiling
    assert len(split._engine.programs) == 1
    assert split._engine.programs.in_a_row == 0
    monkeypatch.setattr("fxpass.runtime.calls.module.OPERATORS", 50)
    again: Any = fxpass.parallelize(model, 2, executor="lockstep", ignore_tiling=True)
    assert said(lambda: assert_exact(again.decode(z), tiled), "runs unsplit")
    assert again.use_tiling


@torch.no_grad()
def test_a_warning_of_a_method_points_to_the_users_call() -> None:
    model = kl()
    split: Any = fxpass.parallelize(model, 2, executor="lockstep")
    with pytest.warns(fxpass.FxpassWarning, match="decode runs unsplit") as warned:
        split.decode(torch.randn(1, 4, 1, 1))
    assert [each.filename for each in warned] == [__file__]


def test_a_warning_of_operators_that_cannot_be_split_points_to_the_users_call() -> None:
    model, args, kwargs = unsplittable()
    split: Any = fxpass.parallelize(model, 2, executor="lockstep")
    with pytest.warns(fxpass.FxpassWarning, match="cannot be split and run whole") as warned:
        split(*args, **kwargs)
    assert [each.filename for each in warned] == [__file__]
