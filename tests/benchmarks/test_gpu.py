"""One rank on a loopback: the same program, with messages of the declared sizes and the link's timing."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import fxpass
from benchmarks.gpu import LINKS, Link, Loopback, OneRank, main
from benchmarks.harness import DISPLACED
from fxpass.capture import Call
from fxpass.ir.step import EXACT
from fxpass.models.small import case


@pytest.mark.parametrize("rank", [0, 2])
@torch.no_grad()
def test_a_rank_runs_alone(rank: int) -> None:
    model: Any = case("unet_sd").build()
    given = case("unet_sd").inputs(rows=32, module=model)
    plan = fxpass.plan(fxpass.capture(model, **given), world_size=3, strategy="displaced")
    one = OneRank(plan, rank, model, Call.of(model, (), given), compiled=False)
    one.over(LINKS["nvlink"])
    shapes = [output.shape for output in one.step(EXACT)]
    assert shapes == [given["sample"].shape]
    assert [output.shape for output in one.step(DISPLACED)] == shapes


@torch.no_grad()
def test_the_ceiling_sends_nothing() -> None:
    model: Any = case("unet_sd").build()
    given = case("unet_sd").inputs(rows=32, module=model)
    plan = fxpass.plan(fxpass.capture(model, **given), world_size=3, strategy="displaced")
    one = OneRank(plan, 1, model, Call.of(model, (), given), compiled=False)
    ceiling = one.without_exchanges()
    sent = one.loopback.free
    assert [output.shape for output in ceiling()] == [given["sample"].shape]
    assert one.loopback.free == sent
    one.step(EXACT)
    assert one.loopback.free > sent


def test_messages_queue_on_the_link() -> None:
    loopback = Loopback(torch.device("cpu"), Link(bandwidth=1e5, latency=0.01))
    began = time.perf_counter()
    messages = []
    for sent, received in ((0, 1000), (4000, 1000), (500, 2000)):
        receive = torch.ones(received, dtype=torch.uint8)
        messages.append(loopback.alltoall_base(receive, torch.full((sent,), 7, dtype=torch.uint8), [], []))
        assert receive.tolist() == [7] * min(sent, received) + [0] * max(0, received - sent)
    assert not messages[-1].is_completed()
    messages[-1].wait()
    assert time.perf_counter() - began >= 0.07
    assert all(message.is_completed() for message in messages)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--models", "sdxxl"], "did you mean sdxl"),
        (["--size", "100"], "takes multiples of 8 pixels"),
        (["--ranks", "0"], "invalid choice: 0"),
        (["--strategy", "sync"], "invalid choice: 'sync'"),
    ],
)
def test_gpu_benchmark_reports_wrong_arguments(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu", *options])
    with pytest.raises(SystemExit):
        main()
    assert said in capsys.readouterr().err
