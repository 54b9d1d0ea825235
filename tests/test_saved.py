"""Plans in files: a later start uses their cuts, and refuses what they do not fit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxpass
from fxpass.ir.strategy import Strategy
from fxpass.passes import cuts
from fxpass.saved import load
from tests.runtime.plans import Block, block, inputs


def saved(path: Path, strategy: str = "sync", rows: int = 16, model: nn.Module | None = None) -> fxpass.Plan:
    plan = fxpass.plan(model or block(), *inputs(rows), world_size=2, strategy=strategy)
    plan.save(path)
    return plan


def test_a_saved_plan_is_used_without_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = {rows: saved(tmp_path / "plans.json", "displaced", rows) for rows in (16, 24)}
    expected = fxpass.parallelize(block(), 2, strategy="displaced", executor="lockstep")
    wanted = {rows: expected(*inputs(rows))["sample"] for rows in plans}
    monkeypatch.setattr(cuts.Search, "run", lambda self: 1 / 0)
    module: Any = fxpass.parallelize(block(), plan=tmp_path / "plans.json", executor="lockstep")
    for rows, plan in plans.items():
        assert torch.equal(module(*inputs(rows))["sample"], wanted[rows])
        assert module.plan.fingerprint == plan.fingerprint
        assert module.plan.strategy == Strategy.of("displaced")


def test_a_file_keeps_its_plans_of_other_calls_and_replaces_those_of_the_same(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    for strategy, rows in (("sync", 16), ("pcpp", 16), ("sync", 24), ("sync", 16)):
        saved(path, strategy, rows)
    assert [(each.strategy.name, each.inputs[0]) for each in load(path)] == [
        ("pcpp", "sample (2, 4, 16, 8) torch.float32"),
        ("sync", "sample (2, 4, 24, 8) torch.float32"),
        ("sync", "sample (2, 4, 16, 8) torch.float32"),
    ]
    assert [each.name for each in tmp_path.iterdir()] == ["plans.json"]


def test_plans_that_are_saved_at_once_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    made = [fxpass.plan(block(), *inputs(rows), world_size=2) for rows in range(8, 40, 4)]
    with ThreadPoolExecutor(len(made)) as pool:
        list(pool.map(lambda each: each.save(path), made))
    assert len(load(path)) == len(made)


@pytest.mark.parametrize("ranks", [{"copies": 0}, {"copies": 4}, {"groups": "x"}, {"groups": 3}, {"world_size": 0}])
def test_numbers_of_ranks_that_cannot_be_are_damage(ranks: dict[str, Any], tmp_path: Path) -> None:
    saved(path := tmp_path / "plans.json")
    data = json.loads(path.read_text())
    data["plans"][0] |= ranks
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"is damaged: ValueError: .* ranks in .* groups"):
        load(path)


def test_groups_that_do_the_same_are_not_those_that_were_asked_for(tmp_path: Path) -> None:
    plan = saved(path := tmp_path / "plans.json")
    replace(plan, groups=2, copies=2).save(path)
    with pytest.raises(ValueError, match="several kinds of plans"):
        fxpass.parallelize(block(), plan=path, executor="lockstep")
    with pytest.raises(ValueError, match="no plan of this kind"):
        fxpass.parallelize(block(), plan=path, cfg=2, executor="lockstep")


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "plans.json")
    before = (tmp_path / "plans.json").read_text()

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path / "plans.json", "pcpp")
    assert (tmp_path / "plans.json").read_text() == before
    assert [each.name for each in tmp_path.iterdir()] == ["plans.json"]


class Other(Block):
    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        return {"sample": super().forward(sample, timestep)["sample"].relu()}


def of(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Changes the first plan of a file."""

    def changed(path: Path) -> None:
        data = json.loads(path.read_text())
        change(data["plans"][0])
        path.write_text(json.dumps(data))

    return changed


@pytest.mark.parametrize(
    ("damage", "model", "rows", "words"),
    [
        (None, block, 20, r"no saved plan is for inputs sample \(2, 4, 20, 8\).*plans for: sample \(2, 4, 16, 8\)"),
        (None, Other, 16, "the saved plan is of another model"),
        (of(lambda plan: plan.update(torch="1.0")), block, 16, "made by fxpass .* and torch 1.0, here are"),
        (of(lambda plan: plan.update(fxpass="0.0.1")), block, 16, "made by fxpass 0.0.1"),
        (of(lambda plan: plan.update(plan="0")), block, 16, "another plan than when they were saved"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_with_the_reason(
    damage: Any, model: Any, rows: int, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "plans.json"
    saved(path)
    if damage:
        damage(path)
    module: Any = fxpass.parallelize(model().eval(), plan=path, executor="lockstep")
    with pytest.raises(ValueError, match=f"(?s){words}"):
        module(*inputs(rows))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "holds no plans of fxpass"),
        ("[]", '"schema" is not "fxpass.plans"'),
        ('{"schema": "fxpass.plans", "version": 9}', "has version 9 of the schema; this fxpass reads 4"),
        ('{"schema": "fxpass.plans", "version": 4, "plans": [{}]}', "is damaged: KeyError"),
    ],
)
def test_a_file_without_plans_is_refused_when_it_is_read(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        fxpass.parallelize(block(), plan=path)
    with pytest.raises(ValueError, match=words):
        saved(path)
    assert path.read_text() == text


def test_world_size_and_strategy_choose_among_the_plans_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    for strategy in ("sync", "displaced"):
        saved(path, strategy)
    module: Any = fxpass.parallelize(block(), plan=path, strategy="sync", executor="lockstep")
    module(*inputs())
    assert module.plan.strategy == Strategy.of("sync")
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "several kinds of plans; say which"),
        ({"world_size": 3}, "no plan of this kind: it has world_size=2, strategy='displaced', world_size=2"),
        ({"strategy": "pcpp"}, "no plan of this kind"),
        ({"strategy": "displaced", "warmup_steps": 1}, "warmup_steps is part of the saved plan's strategy"),
    ]
    for options, words in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            fxpass.parallelize(block(), plan=path, **options)
    with pytest.raises(FileNotFoundError):
        fxpass.parallelize(block(), plan=tmp_path / "none.json")
