"""Which GPUs the ranks of a network have."""

from __future__ import annotations

import pytest
import torch

from fxpass.runtime import network
from fxpass.runtime.network import OVERLAP, one_gpu_for_two


def test_two_ranks_on_one_gpu_are_named_with_what_to_do() -> None:
    assert one_gpu_for_two([("a", 0, "x"), ("a", 1, "y"), ("b", 0, "z")]) == ""
    assert one_gpu_for_two([("a", 0, "x"), ("a", 0, "y")]) == ""  # each sees one GPU only
    found = one_gpu_for_two([("a", 0, "x"), ("a", 1, "y"), ("a", 1, "y")])
    assert found.startswith("ranks 1 and 2 both have their model on one GPU (cuda:1)")
    assert 'set_device(int(os.environ["LOCAL_RANK"]))' in found


@pytest.mark.parametrize(
    ("cards", "peers", "maps"),
    [
        ([("a", 0, ""), ("a", 1, "")], True, True),
        ([("a", 0, ""), ("a", 1, "")], False, False),
        ([("a", 0, ""), ("b", 1, "")], True, False),
        ([("", 0, ""), ("", 1, "")], True, False),
        ([("a", 0, ""), ("a", 0, "")], True, False),
    ],
)
def test_gpus_map_each_other_on_one_machine_with_peer_access(
    cards: list[tuple[str, int, str]], peers: bool, maps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: peers)
    assert network._can_map(cards, torch.device("cuda:0")) == maps
    monkeypatch.setenv("FXPASS_SHM_DISABLE", "1")
    assert not network._can_map(cards, torch.device("cuda:0"))


def test_several_ranks_share_a_gpu_where_torch_is_told_to_allow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERLAP, "1")
    assert network._can_map([("a", 0, ""), ("a", 0, "")], torch.device("cuda:0"))
