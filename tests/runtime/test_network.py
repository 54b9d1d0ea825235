"""Which GPUs the ranks of a network have, and through which groups they send."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from fxpass.ir import comm
from fxpass.ir.merge import Reduce
from fxpass.ir.mesh import Axis, Mesh
from fxpass.ir.step import ChannelSpec
from fxpass.runtime import network
from fxpass.runtime.board import Board
from fxpass.runtime.groups import connect
from fxpass.runtime.network import OVERLAP, Network, one_gpu_for_two


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


MESH = Mesh(2, 2)
CPU = torch.device("cpu")


def total(axis: Axis | None, fresh: Any = "sync") -> ChannelSpec:
    """A channel on which the ranks of each line of an axis, or all four, add two numbers up."""
    reduce = Reduce("sum", (2,), torch.float32, 4 if axis is None else axis.size, axis=axis, fresh=fresh)
    return ChannelSpec("sum", "", (reduce,), late=False)


def total_of_two() -> ChannelSpec:
    return ChannelSpec("sum", "", (Reduce("sum", (2,), torch.float32, 2, fresh="stale"),), late=False)


def at_once(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(functions)) as pool:
        return [each.result(60) for each in [pool.submit(function) for function in functions]]


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> list[Network]:
    """Of four ranks, through gloo."""
    monkeypatch.setenv("FXPASS_SHM_DISABLE", "1")
    store = HashStore()
    return at_once([lambda rank=rank: connect(Board(store, rank, 4, 30.0), CPU, local=True) for rank in range(4)])


def summed(channel: Any) -> list[float]:
    """What this rank has once all ranks of its line have put their numbers: rank r puts r + 1."""
    rank, spec = channel.rank, channel.spec
    mine = torch.full((2,), rank + 1.0)
    channel.put([each.pack(spec.place(rank), mine) for each in spec.exchanges])
    (received,) = channel.get()
    return comm.unpack(mine, received, spec.exchanges[0], spec.place(rank)).tolist()


def test_ranks_of_a_line_wait_for_no_other_ranks(networks: list[Network]) -> None:
    """Ranks 2 and 3 put nothing."""
    spec = total(MESH.along_patches)
    channels: list[Any] = at_once([lambda each=each: each.open([spec], CPU)[0][0] for each in networks])
    assert at_once([lambda each=each: summed(each) for each in channels[:2]]) == [[3.0, 3.0]] * 2
    assert [channel.between.members for channel in channels] == [(0, 1), (0, 1), (2, 3), (2, 3)]


def test_each_of_many_messages_for_the_next_step_has_a_thread_that_carries_it(networks: list[Network]) -> None:
    """Else one of a few bytes waits for large ones."""
    groups = [[each.group, each._connect("group", (each.board.rank,))] for each in networks if each._connect]
    assert [[group.options._threads for group in both] for both in groups] == [[64, 64]] * 4


def test_ranks_of_several_machines_meet_on_the_interface_that_the_user_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXPASS_SHM_DISABLE", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = HashStore()
    networks = at_once([lambda rank=rank: connect(Board(store, rank, 2, 30.0), CPU) for rank in range(2)])
    channels: list[Any] = at_once([lambda each=each: each.open([total_of_two()], CPU)[0][0] for each in networks])
    assert at_once([lambda each=each: summed(each) for each in channels]) == [[3.0, 3.0]] * 2
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "missing0")
    with pytest.raises(RuntimeError, match="missing0"):
        connect(Board(HashStore(), 0, 1, 30.0), CPU)


def test_each_set_of_ranks_has_one_group_for_what_is_awaited_and_one_for_what_is_not(networks: list[Network]) -> None:
    axes = [MESH.along_patches, None, MESH.along_samples, MESH.along_patches, None]
    specs = [total(axis, fresh) for axis in axes for fresh in ("sync", "stale")]
    opened = at_once([lambda each=each: each.open(specs, CPU)[0] for each in networks])
    groups = {id(channel.between.group) for channel in opened[3]}
    assert len(groups) == 6
    assert [channel.between.members for channel in opened[3]][::2] == [
        (2, 3),
        (0, 1, 2, 3),
        (1, 3),
        (2, 3),
        (0, 1, 2, 3),
    ]
    found = at_once([lambda each=each: [summed(channel) for channel in each] for each in opened])
    for rank, sums in enumerate(found):
        lines = [channel.spec.members(rank) for channel in opened[rank]]
        assert sums == [[sum(member + 1.0 for member in line)] * 2 for line in lines]


def test_equal_messages_within_a_line_are_gathered_if_they_are_large(networks: list[Network]) -> None:
    spec = total(MESH.along_samples)
    large = Reduce("sum", (1 << 15,), torch.float32, 2, axis=MESH.along_samples)
    specs = [spec, ChannelSpec("sum", "", (large,), late=False)]
    opened = at_once([lambda each=each: each.open(specs, CPU)[0] for each in networks])
    assert [[channel.between.gather for channel in each] for each in opened] == [[False, True]] * 4
    found = at_once([lambda each=each: _large(each[1]) for each in opened])
    assert found == [4.0, 6.0, 4.0, 6.0]


def _large(channel: Any) -> float:
    rank, each = channel.rank, channel.spec.exchanges[0]
    mine = torch.full(each.shape, rank + 1.0)
    channel.put([each.pack(each.place(rank), mine)])
    (received,) = channel.get()
    (value,) = comm.unpack(mine, received, each, each.place(rank)).unique().tolist()
    return value


def test_stages_on_gpus_are_refused_before_anything_is_opened() -> None:
    """NCCL and symmetric memory expect all ranks at each channel."""
    mesh = Mesh(1, 1, 2)
    network = Network(None, None, False, Board(HashStore(), 0, 2, 5.0))
    for axis in (mesh.along_patches.among((0,)), Mesh(1, 1, 3).across((0, 1))):
        with pytest.raises(RuntimeError, match="give patches instead of stages"):
            network.open([total(axis)], torch.device("cuda"))
