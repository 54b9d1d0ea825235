"""Calls that draw random numbers from a generator among their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.capture import Draws
from fxpass.ir.advice import FxpassWarning
from fxpass.models.pipelines import methods_of
from fxpass.runtime.calls.module import ParallelModule

Numbers = Callable[[Tensor, Any], Tensor]


class Noisy(nn.Module):
    """An autoencoder that adds what a function draws."""

    def __init__(self, numbers: Numbers) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.numbers = numbers

    def encode(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def decode(self, z: Tensor, generator: Any = None) -> Tensor:
        return self.conv(z + self.numbers(z, generator))

    def forward(self, x: Tensor, generator: Any = None) -> Tensor:
        return self.decode(self.encode(x), generator=generator)


def normal(z: Tensor, generator: Any) -> Tensor:
    return torch.randn(z.shape, generator=generator, dtype=z.dtype)


def several(z: Tensor, generator: Any) -> Tensor:
    noise = torch.rand(z.shape[-1], generator=generator) + torch.randint(0, 9, z.shape, generator=generator)
    return noise + normal(z, generator)


def one_each(z: Tensor, generators: Any) -> Tensor:
    return torch.cat([normal(part, each) for part, each in zip(z.split(1), generators, strict=True)])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parallel(numbers: Numbers, executor: Any = "lockstep") -> ParallelModule:
    torch.manual_seed(0)
    model: Any = Noisy(numbers).eval()
    return fxpass.parallelize(model, 2, executor=executor)


def outputs(module: Any, method: str, generator: Any, calls: int = 2) -> list[Tensor]:
    """Results of some calls, and a number drawn afterwards from each generator."""
    z = torch.randn(2, 4, 16, 8, generator=seeded(7))
    with torch.no_grad():
        found = [getattr(module, method)(z, generator=generator) for _ in range(calls)]
    generators = generator if isinstance(generator, list) else [generator]
    return [*found, *(torch.rand(1, generator=each) for each in generators)]


def captures(module: ParallelModule) -> int:
    return len(list(module._engine.programs.all()))


@pytest.mark.parametrize("method", ["decode", "forward"])
@pytest.mark.parametrize("numbers", [normal, several])
def test_a_call_draws_what_the_unsplit_one_draws_and_is_captured_once(numbers: Numbers, method: str) -> None:
    with parallel(numbers) as module:
        for seed in (1, 2):
            expected = outputs(module.unwrapped, method, seeded(seed))
            for found, whole in zip(outputs(module, method, seeded(seed)), expected, strict=True):
                torch.testing.assert_close(found, whole)
        assert captures(module) == 1
        assert module.traffic["halo"] > 0


def test_each_sample_may_have_a_generator_of_its_own() -> None:
    with parallel(one_each) as module:
        for seeds in ((1, 2), (2, 2), (3, 1)):
            expected = outputs(module.unwrapped, "decode", list(map(seeded, seeds)))
            for found, whole in zip(outputs(module, "decode", list(map(seeded, seeds))), expected, strict=True):
                torch.testing.assert_close(found, whole)
        expected = outputs(module.unwrapped, "decode", [seeded(4)] * 2)  # one generator for both
        for found, whole in zip(outputs(module, "decode", [seeded(4)] * 2), expected, strict=True):
            torch.testing.assert_close(found, whole)


def test_the_numbers_of_a_call_on_worker_processes_are_drawn_once() -> None:
    with parallel(several, "spawn") as module:
        expected = outputs(module.unwrapped, "decode", seeded(1))
        for found, whole in zip(outputs(module, "decode", seeded(1)), expected, strict=True):
            torch.testing.assert_close(found, whole)
        assert module.traffic["halo"] > 0


def reading(z: Tensor, generator: Any) -> Tensor:
    return normal(z, generator) * (generator.initial_seed() + 1)


def of_a_tensor(z: Tensor, generator: Any) -> Tensor:
    return torch.bernoulli(z.sigmoid(), generator=generator)


def of_a_named_tensor(z: Tensor, generator: Any) -> Tensor:
    return torch.normal(mean=z, std=1.0, generator=generator)


def of_nobody(z: Tensor, generator: Any) -> Tensor:
    return normal(z, generator) + torch.randn(1)


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        (reading, "the model calls Generator.initial_seed"),
        (of_a_tensor, "bernoulli at .*draws random numbers that depend on a tensor"),
        (of_a_named_tensor, "normal at .*draws random numbers that depend on a tensor"),
        (of_nobody, "aten.randn.default draws random numbers"),
    ],
)
def test_what_cannot_be_drawn_beforehand_runs_unsplit_and_draws_once(numbers: Numbers, why: str) -> None:
    with parallel(numbers) as module:
        torch.manual_seed(5)
        expected = outputs(module.unwrapped, "decode", seeded(1), calls=3)
        torch.manual_seed(5)
        with pytest.warns(FxpassWarning, match=f"(?s)decode runs unsplit on every rank: .*{why}"):
            found = outputs(module, "decode", seeded(1), calls=3)
        assert all(map(torch.equal, found, expected))
        assert not module.traffic


def test_a_model_that_was_changed_may_draw_other_numbers() -> None:
    model: Any = Noisy(normal).eval()
    z = torch.randn(2, 4, 16, 8)
    with fxpass.parallelize(model, 2, executor="lockstep") as module, torch.no_grad():
        module.decode(z, generator=seeded(1))
        module.numbers = several
        expected = model.decode(z, generator=seeded(1))
        torch.testing.assert_close(module.decode(z, generator=seeded(1)), expected)
        assert captures(module) == 1


class Counting(nn.Module):
    """Draws as many numbers, and as large ones, as its arguments say."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, count: int, size: float, generator: Any = None) -> Tensor:
        for _ in range(count):
            x = x + torch.normal(0.0, size, (2, 4, 16, 8), generator=generator)
        return self.conv(x)

    def decode(self, z: Tensor, count: int, size: float, generator: Any = None) -> Tensor:
        return self(z, count, size, generator)


@torch.no_grad()
@pytest.mark.parametrize("method", ["decode", "forward"])
def test_numbers_among_the_arguments_may_change_what_is_drawn(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Counting().eval()
    x = torch.randn(2, 4, 16, 8)
    ours, theirs = seeded(1), seeded(1)
    with fxpass.parallelize(model, 2, executor="lockstep") as module:
        for _ in range(2):
            for count, size in ((1, 1.0), (2, 1.0), (0, 1.0), (1, 0.5)):
                expected = getattr(model, method)(x, count, size, generator=theirs)
                torch.testing.assert_close(getattr(module, method)(x, count, size, generator=ours), expected)
                assert torch.equal(ours.get_state(), theirs.get_state())
            monkeypatch.setattr(Draws, "observed", None)  # each is known now
        assert captures(module) == 4
        assert module.traffic["halo"] > 0


@torch.no_grad()
def test_a_method_that_never_draws_the_same_runs_unsplit() -> None:
    counts = iter(range(1, 99))

    def growing(z: Tensor, generator: Any) -> Tensor:
        return torch.rand(next(counts), 1, 1, 1, generator=generator).sum()

    with parallel(growing) as module:
        z = torch.randn(2, 4, 16, 8)
        with pytest.warns(FxpassWarning, match="draws other random numbers than in an earlier call of the same kind"):
            module.decode(z, generator=seeded(1))


class Named(Noisy):
    """Has an argument of its own that is called `drawn`."""

    def forward(self, x: Tensor, drawn: float = 1.0, generator: Any = None) -> Tensor:
        return drawn * super().forward(x, generator)


@torch.no_grad()
def test_a_model_may_have_an_argument_that_is_called_drawn() -> None:
    model: Any = Named(normal).eval()
    x = torch.randn(2, 4, 16, 8)
    with fxpass.parallelize(model, 2, executor="lockstep") as module:
        for _ in range(2):
            found, expected = (each(x, drawn=0.5, generator=seeded(1)) for each in (module, model))
            torch.testing.assert_close(found, expected)


def test_a_call_that_is_refused_leaves_its_generator_as_it_was() -> None:
    with parallel(of_nobody) as module, torch.no_grad():
        generator = seeded(1)
        with pytest.raises(fxpass.CaptureError, match=r"randn.default draws random numbers"):
            module(torch.randn(2, 4, 16, 8), generator=generator)
        assert torch.equal(generator.get_state(), seeded(1).get_state())


def test_a_call_whose_generator_is_not_read_is_captured_once() -> None:
    runs = []

    def nothing(z: Tensor, generator: Any) -> Tensor:
        runs.append(generator)
        return torch.zeros(1)

    with parallel(nothing) as module:
        outputs(module, "decode", seeded(1))
        first = len(runs)
        outputs(module, "decode", seeded(2))
        outputs(module, "decode", seeded(3))
    assert len(runs) == first <= 3  # run once, recorded, compared


@torch.no_grad()
def test_models_keep_and_return_generators_of_the_caller() -> None:
    def kept(z: Tensor, generator: Any) -> Tensor:
        model.kept, model.all[0] = generator, generator
        return torch.zeros(1)

    class Returning(Noisy):
        def decode(self, z: Tensor, generator: Any = None) -> Any:
            return super().decode(z, generator), generator

    model: Any = Returning(kept).eval()
    model.kept, model.all = None, [None]
    z, own = torch.randn(2, 4, 16, 8), [seeded(1), seeded(2)]
    with fxpass.parallelize(model, 2, executor="lockstep") as module:
        for each in (own[0], own[1], own[0]):
            expected = model.conv(z)
            found, returned = module.decode(z, generator=each)
            torch.testing.assert_close(found, expected)
            assert returned is each
            assert all(any(held is one for one in (None, *own)) for held in (model.kept, *model.all))


@torch.no_grad()
def test_what_a_model_asks_of_a_generator_is_answered_as_it_is() -> None:
    def asked(z: Tensor, generator: Any) -> Tensor:
        kind = isinstance(generator, list) + 2 * (type(generator) is torch.Generator)
        return torch.full((1,), float(kind + generator.initial_seed()))

    with parallel(asked) as module:
        whole: Any = module.unwrapped
        z, own = torch.randn(2, 4, 16, 8), seeded(3)
        for seed, generator in ((3, own), (5, own), (3, seeded(3))):
            generator.manual_seed(seed)
            expected = whole.decode(z, generator=generator)
            torch.testing.assert_close(module.decode(z, generator=generator), expected)


def test_a_module_that_only_decodes_is_split_there() -> None:
    class Decoder(nn.Module):
        def decode(self, z: Tensor, generator: Any = None) -> Tensor:
            return z

    assert methods_of(Decoder()) == ["decode"]
    assert methods_of(Noisy(normal)) == ["decode", "encode"]
    assert methods_of(nn.Linear(1, 1)) == []
