"""Which device each rank of `spawn` is on, and what is said where that cannot be."""

from __future__ import annotations

from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fxpass.ir.code import Segment, StepCode
from fxpass.runtime.network import OVERLAP
from fxpass.runtime.spawn import _one_device
from fxpass.runtime.workers import Workers, devices_of

CPU = torch.device("cpu")


def cuda(*indices: int) -> list[torch.device]:
    return [torch.device("cuda", index) for index in indices]


def test_rank_0_is_where_the_model_is_and_the_others_take_the_other_devices_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv(OVERLAP, raising=False)
    assert devices_of(CPU, 3) == [CPU] * 3
    assert devices_of(cuda(0)[0], 4) == cuda(0, 1, 2, 3)
    assert devices_of(cuda(2)[0], 3) == cuda(2, 0, 1)


def test_too_few_devices_are_refused_with_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv(OVERLAP, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(ValueError, match=r"needs 3 CUDA devices.*sees 2 \(CUDA_VISIBLE_DEVICES=4,5\).*at most 2"):
        devices_of(cuda(0)[0], 3)
    with pytest.raises(NotImplementedError, match="this one is on mps"):
        devices_of(torch.device("mps"), 2)


def test_ranks_share_devices_if_the_test_of_one_gpu_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv(OVERLAP, "1")
    assert devices_of(cuda(1)[0], 3) == cuda(1, 0, 1)


def test_a_call_on_another_device_than_the_workers_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    several = Workers(2, 60)
    several.devices = cuda(0, 1)
    several.check(cuda(0)[0])
    with pytest.raises(ValueError, match=r"this call is on cpu, but the worker processes .* on cuda:0"):
        several.check(CPU)


def test_an_input_on_another_device_than_the_model_is_named_with_both() -> None:
    program: Any = SimpleNamespace(weights={"w": "conv.weight"}, input_paths=["sample", "timestep"])
    plan: Any = SimpleNamespace(program=program)
    with FakeTensorMode():
        weight, near, far = (torch.empty(2, device=f"cuda:{index}") for index in (0, 0, 1))
        time = torch.empty((), device="cpu")
    assert _one_device(plan, [weight], [near, time]) == weight.device
    with pytest.raises(ValueError, match=r"input sample is on cuda:1, but weight conv\.weight is on cuda:0"):
        _one_device(plan, [weight], [far, time])


def test_code_for_another_device_names_that_device_and_keeps_the_host() -> None:
    here, there = cuda(0, 1)
    segment = Segment("def segment(inputs): ...", (here, CPU, 3))
    table: dict[str, Any] = {"k0": here, "k1": CPU, "f2": torch.relu}
    code = StepCode(1, "exact", (), "", table, (), {}, {"s0": segment}, {})
    moved = code.on(there)
    assert moved.table == {"k0": there, "k1": CPU, "f2": torch.relu}
    assert moved.segments["s0"] == Segment(segment.source, (there, CPU, 3))
    assert code.table["k0"] == here
    assert code.on(CPU).table == table


def test_workers_compute_as_the_driving_process_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxpass.runtime.numerics import apply, numerics

    several, found = Workers(2, 60), []
    monkeypatch.setattr(Workers, "send", lambda self, message: found.append(message))
    before = numerics()
    several.share_numerics()
    several.share_numerics()
    assert found == [("numerics", before)]
    try:
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cudnn.benchmark = True
        several.share_numerics()
        chosen = found[-1][1]
        assert chosen == before | {
            "matmul": "medium",
            "cuda.matmul.fp32_precision": "tf32",
            "mkldnn.matmul.fp32_precision": "bf16",
            "deterministic": (True, False),
            "flash_sdp": False,
            "cudnn.benchmark": True,
        }
        apply(before)
        assert numerics() == before
        apply(chosen)
        assert numerics() == chosen
    finally:
        apply(before)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("cuda.matmul", "tf32"),
        ("cudnn.conv", "ieee"),
        ("cudnn.rnn", "ieee"),
        ("mkldnn.matmul", "bf16"),
        ("mkldnn.conv", "bf16"),
        ("mkldnn.rnn", "bf16"),
    ],
)
@pytest.mark.parametrize("older", ["highest", "medium"])
def test_workers_take_the_precision_of_each_kind_of_operator(kind: str, precision: str, older: str) -> None:
    from fxpass.runtime.numerics import apply, numerics

    before, settings = numerics(), attrgetter(kind)(torch.backends)
    try:
        torch.set_float32_matmul_precision(older)
        default = numerics()
        settings.fp32_precision = precision
        chosen = numerics()
        assert chosen[f"{kind}.fp32_precision"] == precision
        apply(default)
        assert numerics() == default
        assert settings.fp32_precision == default[f"{kind}.fp32_precision"]
        apply(chosen)
        assert settings.fp32_precision == precision
        assert numerics() == chosen
    finally:
        apply(before)
