"""One rank on a loopback: the same program, with messages of the declared sizes and the link's timing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fxpass
from benchmarks import gpu
from benchmarks.gpu import main
from benchmarks.harness import DISPLACED
from benchmarks.loopback import LINKS, Link, Loopback, OneRank
from fxpass.capture import Call
from fxpass.ir.step import EXACT
from fxpass.models.small import case


def one_rank(rank: int, link: Link | None) -> tuple[OneRank, torch.Size]:
    model: Any = case("unet_sd").build()
    given = case("unet_sd").inputs(rows=32, module=model)
    plan = fxpass.plan(fxpass.capture(model, **given), world_size=3, strategy="displaced")
    return OneRank(plan, rank, model, Call.of(model, (), given), link), given["sample"].shape


@pytest.mark.parametrize("link", [LINKS["nvlink"], None], ids=["link", "no link"])
@pytest.mark.parametrize("rank", [0, 2])
@torch.no_grad()
def test_a_rank_runs_alone(rank: int, link: Link | None) -> None:
    one, shape = one_rank(rank, link)
    for step in (EXACT, DISPLACED, DISPLACED, EXACT):
        assert [output.shape for output in one.step(step)] == [shape]


@torch.no_grad()
def test_a_step_takes_as_long_as_the_link_but_no_longer_where_messages_travel_meanwhile() -> None:
    one, _ = one_rank(1, Link(bandwidth=1e12, latency=0.02))
    one.step(EXACT)
    (memory,) = {channel.memory for channel in one.runner.channels(0)}
    assert isinstance(memory, Loopback)
    channels = len(one.runner.specs)
    began = time.perf_counter()
    one.step(EXACT)
    assert time.perf_counter() - began >= 0.02 * (channels - 1)
    assert set(memory._arrived) == set(range(channels))


@pytest.mark.parametrize("link", [LINKS["nvlink"], None], ids=["link", "no link"])
@torch.no_grad()
def test_a_rank_of_a_mesh_runs_alone_and_hears_only_its_group_and_the_output(link: Link | None) -> None:
    model: Any = case("unet_sd").build()
    inputs = branches(case("unet_sd").inputs(rows=32, module=model))
    plan = fxpass.plan(fxpass.capture(model, **inputs), world_size=4, strategy="displaced", cfg=2)
    one = OneRank(plan, 3, model, Call.of(model, (), inputs), link)
    for step in (EXACT, DISPLACED, DISPLACED, EXACT):
        assert [output.shape for output in one.step(step)] == [inputs["sample"].shape]
    if link is not None:
        (memory,) = {channel.memory for channel in one.runner.channels(0)}
        assert isinstance(memory, Loopback)
        assert sum(memory._sizes) == pytest.approx(sum(plan.bytes_received_per_rank[3].values()), rel=0.02)


def branches(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a call for both guidance branches."""
    return {
        name: torch.cat([each, each]) if isinstance(each, torch.Tensor) and each.ndim else each
        for name, each in inputs.items()
    }


@pytest.mark.parametrize(("cfg", "meshes"), [(["1"], ["2 ranks"]), (["1", "2"], ["2 ranks", "2 x 1 ranks"])])
def test_guidance_groups_are_measured_beside_patches(
    cfg: list[str], meshes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = case("unet_sd").build()
    inputs = branches(case("unet_sd").inputs(rows=32, module=model))
    monkeypatch.setattr(gpu, "published", lambda *_: (model, inputs))
    options = ["--models", "sdxl", "--ranks", "2", "--steps", "1", "--cfg", *cfg, "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["gpu", *options])
    main()
    rows = json.loads((tmp_path / "sdxl-1024-displaced-float32-CPU.json").read_text())
    assert list(rows) == ["whole, eager", *(f"{each}, nvlink, eager" for each in meshes)]


def test_results_are_kept_and_written_as_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = case("unet_sd").build()
    monkeypatch.setattr(gpu, "published", lambda *_: (model, case("unet_sd").inputs(rows=32, module=model)))
    options = ["--models", "sdxl", "--ranks", "1", "2", "--links", "nvlink", "--steps", "1", "--exact"]
    monkeypatch.setattr("sys.argv", ["gpu", *options, "--out", str(tmp_path)])
    main()
    rows = json.loads((tmp_path / "sdxl-1024-displaced-float32-CPU.json").read_text())
    assert list(rows) == ["whole, eager", "1 ranks, no link, eager", "2 ranks, nvlink, eager"]
    assert all(rows["2 ranks, nvlink, eager"][column] > 0 for column in ("exact", "steady", "ceiling", "state GB"))
    assert "all ranks alike: True" in capsys.readouterr().out
    assert len((tmp_path / "sdxl-1024-displaced-float32-CPU.md").read_text().splitlines()) == 5
    monkeypatch.setattr(gpu, "milliseconds", lambda *_: 1 / 0)  # nothing is measured again
    main()
    assert json.loads((tmp_path / "sdxl-1024-displaced-float32-CPU.json").read_text()) == rows


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
