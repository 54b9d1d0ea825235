"""The sweep of the zoo: kept results, reports of failures, and the measurements themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from fxpass.capture import Call
from fxpass.models.case import Case
from fxpass.models.zoo import zoo_case
from fxpass.models.zoo.classes import available
from fxpass.tools.sweeps import apart, zoo
from fxpass.tools.sweeps import zoo_case as measuring
from fxpass.tools.sweeps.zoo_case import Found, Split
from fxpass.tools.sweeps.zoo_report import report

GOOD = Found(
    "tiny", "k", "Tiny", "unets", "32 x 16", 10, 5, scale=1.0, change=1.0,
    splits={n: Split(1e-7, float(n), 1000) for n in measuring.RANKS}, displaced=1e-7, bf16=1.0,
)  # fmt: skip


def test_results_survive_json() -> None:
    found = replace(GOOD, read=(("mask", "model.py:3"),), splits={2: Split(0.5, 1.0, 3, (("mid", "no rule"),))})
    assert Found.of(json.loads(json.dumps(found.plain()))) == found


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"splits": {2: Split(1e-3, 2.0, 1)}}, "wrong by 1e-03 on 2 ranks"),
        ({"splits": {2: Split(float("nan"), 2.0, 1)}}, "wrong by nan on 2 ranks"),
        ({"splits": {2: Split(refused="WorldSizeError: too few rows")}}, "on 2 ranks: WorldSizeError: too few rows"),
        ({"splits": {2: Split(0.0, 2.0, 1, (("mid", "no rule for sort"),))}}, "no rule for sort (in mid)"),
        ({"displaced": 1e-2}, "displaced step off by 1e-02"),
        ({"displaced": float("nan")}, "displaced step off by nan"),
        ({"bf16": 3.0}, "3.0 times the unsplit model's error"),
        ({"change": 0.0}, "a blind test"),
        ({"scale": float("nan")}, "a blind test"),
        ({"blind": ("output 0 is nothing",)}, "a blind test: output 0 is nothing"),
        ({"refused": "CaptureError: no", "splits": {}}, "`tiny`): CaptureError: no"),
        ({"failed": "it took more than 3 seconds", "splits": {}}, "`tiny`): it took more than 3 seconds"),
    ],
)
def test_the_report_lists_every_problem(changes: dict[str, Any], told: str) -> None:
    assert told not in report([GOOD], [])
    assert told in report([replace(GOOD, **changes)], [])


def test_totals_count_classes_and_not_cases() -> None:
    bad = replace(GOOD, name="tiny_other", splits={2: Split(1e-3, 2.0, 1)})
    other = replace(GOOD, name="large", kind="Large")
    text = report([GOOD, bad, other], [])
    assert "3 cases of 2 classes" in text
    assert "| exact at 2 / 3 / 4 / 8 ranks in every case | 1 | 50.0% |" in text
    assert "| wrong on some number of ranks | 1 | 50.0% |" in text
    assert "Not measured since the last change: large" in report([GOOD], ["large"])


def test_inputs_that_models_read_are_listed_once_per_class() -> None:
    read = (("sizes.0.1, sizes.0.0", "model.py:3"), ("sizes.0.2", "model.py:5"), ("mask", "model.py:3"))
    text = report([replace(GOOD, read=read), replace(GOOD, name="other", read=read)], [])
    assert "- Tiny (`tiny`, `other`): `sizes` at model.py:3 / model.py:5; `mask` at model.py:3\n" in text


def test_a_case_over_a_limit_is_reported_and_measured_again_when_its_sources_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = zoo_case("vae_decode")
    zoo.sweep([case], tmp_path, 1, 0.01, 8)
    found = zoo.read(tmp_path, case.name)
    assert found is not None
    assert "more than 0 seconds" in found.failed
    assert zoo._is_current(tmp_path, case)
    monkeypatch.setattr(zoo, "key_of", lambda case: "another")
    assert not zoo._is_current(tmp_path, case)


@pytest.mark.parametrize("failed", ["MemoryError: ", "RuntimeError: DefaultCPUAllocator: can't allocate memory"])
def test_a_case_that_needs_too_much_memory_is_reported(
    failed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)
    apart._measure(lambda name, key: Found(name, key, failed=failed).plain(), "tiny", "k", tmp_path, 3)
    found = zoo.read(tmp_path, "tiny")
    assert found is not None
    assert found.failed == "it took more than 3 GB"


class Picky(nn.Module):
    """Reads one of its inputs as a Python value."""

    def forward(self, sample: Tensor, factor: Tensor) -> Tensor:
        return sample * 2 if factor.item() > 0.5 else sample


def test_inputs_are_fresh_except_those_that_the_program_has_read() -> None:
    given = {"sample": torch.randn(1, 3, 8, 8), "factor": torch.tensor(0.7)}
    fresh = {"sample": torch.randn(1, 3, 8, 8), "factor": torch.tensor(0.2)}
    subject = measuring.captured(Picky(), given, fresh)
    assert torch.equal(subject.call.tensors[0], fresh["sample"])
    assert torch.equal(subject.call.tensors[1], given["factor"])
    assert torch.equal(subject.expected[0], 2 * fresh["sample"])


def test_a_wrong_rank_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = zoo_case("vae_decode")
    module = case.build()
    given, fresh = (case.inputs(8, seed=seed, cols=8, module=module) for seed in (1, 7))
    subject = measuring.captured(module, given, fresh)
    assert measuring.split(subject, 2).exact
    wrong = replace(subject, expected=[1.001 * each for each in subject.expected])
    assert not measuring.split(wrong, 2).exact
    nothing = replace(subject, expected=[each * float("nan") for each in subject.expected])
    assert not measuring.split(nothing, 2).exact


NORMAL = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("found", "other", "told"),
    [
        (NORMAL, NORMAL.flip(0), ""),
        (NORMAL * 0, NORMAL, "output 0 is zero, or not finite"),
        (NORMAL / 0, NORMAL, "output 0 is zero, or not finite"),
        (NORMAL, NORMAL + 1e-5, "output 0 has 100% of its elements the same, whatever the inputs"),
        (NORMAL, NORMAL + 9 * (torch.arange(384).view(2, 3, 8, 8) < 4), "output 0 has 99% of its elements the same"),
        ((9 * NORMAL).clamp(-1, 1), NORMAL, "its elements at its smallest or largest value"),
    ],
)
def test_an_output_that_would_look_right_anyway_is_reported(found: Tensor, other: Tensor, told: str) -> None:
    reasons = list(measuring.blind([found], [other]))
    assert len(reasons) == bool(told)
    assert all(told in reason for reason in reasons)


class Faint(nn.Module):
    """A convolution that contributes a share of the output."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.conv, self.share = nn.Conv2d(3, 3, 3, padding=1), share

    def forward(self, sample: Tensor) -> Tensor:
        return sample + self.conv(sample * 2) * self.share


def test_an_exchange_that_hardly_changes_an_output_is_reported() -> None:
    given, fresh = ({"sample": torch.randn(1, 3, 16, 8)} for _ in range(2))
    assert not list(measuring.idle(measuring.captured(Faint(1.0).eval(), given, fresh)))
    (reason,) = measuring.idle(measuring.captured(Faint(1e-5).eval(), given, fresh))
    assert "noise in place of all halo" in reason


def test_ranks_that_disagree_at_a_displaced_step_stop_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    given, fresh = ({"sample": torch.randn(1, 3, 16, 8)} for _ in range(2))
    model = nn.Sequential(Faint(1.0), Faint(1.0)).eval()
    names = {"input": given["sample"]}, {"input": fresh["sample"]}
    subject = measuring.captured(model, *names)
    other = Call.of(model, (), names[0])
    assert measuring.displaced(subject, other) <= measuring.TOLERANCE
    runs = measuring.Subject.runs
    monkeypatch.setattr(
        measuring.Subject, "runs", lambda *given: ([[x + k for x in y] for k, y in enumerate(z)] for z in runs(*given))
    )
    with pytest.raises(AssertionError, match="different outputs"):
        measuring.displaced(subject, other)


def _of_the_future(layers: int) -> nn.Module:
    return diffusers.UNetOfTheFuture(layers)


def test_a_case_whose_class_diffusers_lacks_is_left_out() -> None:
    assert available(Case("known", lambda: diffusers.UNet2DModel(in_channels=4)))
    assert not available(Case("unknown", lambda: diffusers.UNetOfTheFuture(in_channels=4)))
    assert not available(Case("in a function that is called", lambda: nn.Sequential(_of_the_future(2))))
    assert not available(Case("nested", lambda: nn.Sequential(*[diffusers.UNetOfTheFuture() for _ in "ab"])))
    assert not available(Case("partial", partial(_of_the_future, 2)))
