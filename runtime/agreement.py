"""Compare the ranks: their plans, weights and versions before a plan's first exchange (law 6), their inputs later."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from ..ir.merge import Merged
from ..ir.step import ChannelSpec
from .board import Board
from .errors import DisagreementError
from .executor import EXACT, PlanLike, Step
from .network import Network

WEIGHT_SAMPLES = 4096  #: elements compared per weight
REMEMBERED = 64  #: generations whose numbers on all ranks are kept
INPUT_SAMPLES = 64  #: elements compared per input
TOLERANCE = 1e-2  #: allowed difference of sampled inputs, relative to the largest: devices round differently


def agree(board: Board, number: int, plan: PlanLike, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Compare this rank with all others.

    Args:
        number: the plan's number in this executor, from 1.

    Raises:
        DisagreementError: on every rank; names the first difference.
        RankError: a rank did not arrive.
    """
    facts = _facts(plan, weights, inputs)
    text = json.dumps(facts)
    mine = {
        "digest": hashlib.sha256(text.encode()).hexdigest(),
        "inputs": {p: _sample(t, INPUT_SAMPLES) for p, t in zip(plan.program.input_paths, inputs, strict=True)},
    }
    prefix = f"plan/{number}"
    board.store.set(f"{prefix}/facts/{board.rank}", text)
    board.store.set(f"{prefix}/mine/{board.rank}", json.dumps(mine))
    what = f"the other ranks to come to the same call (plan {number})"
    first = json.loads(board.read(f"{prefix}/mine/0", what))
    for rank in range(1, board.world):
        other = json.loads(board.read(f"{prefix}/mine/{rank}", what))
        if other["digest"] != first["digest"]:
            ours, theirs = (json.loads(board.read(f"{prefix}/facts/{r}", what)) for r in (0, rank))
            raise DisagreementError(_first_difference(rank, ours, theirs))
        for path, sample in first["inputs"].items():
            if not _all_close(sample, other["inputs"][path]):
                raise DisagreementError(
                    f"rank {rank} was called with another value of `{path}` than rank 0; every rank must be given the "
                    "same whole inputs (does each seed its generator alike?)"
                )


class CallCheck:
    """Compares each call of a plan before any of its exchanges, and tells all ranks how rank 0 runs it (law 7).

    Ranks that diverge (a sampler with other seeds, a rank that left a picture early) would make a wrong picture. Every
    rank raises before anything is sent, so that the next call can succeed. On CUDA the host waits until the device has
    made the samples.

    Args:
        paths: the names of the inputs.
        inputs: those of one call; all calls have these shapes.
    """

    def __init__(
        self,
        network: Network,
        paths: Sequence[str],
        inputs: Sequence[Tensor],
        device: torch.device,
        traffic: Counter[str],
    ) -> None:
        self._device = device
        self._watched = [i for i, tensor in enumerate(inputs) if tensor.numel()]
        self._paths = [paths[i] for i in self._watched]
        self._counts = [len(_sample(inputs[i], INPUT_SAMPLES)) for i in self._watched]
        message = Merged("inputs", (len(astuple(EXACT)) + sum(self._counts),), torch.float64, network.board.world)
        spec = ChannelSpec("inputs", "", (message,), late=False)
        self._channel = network.open([spec], device)[0]
        self._rank = network.board.rank
        self._world = network.board.world
        self._received = message.received(self._rank)
        self._traffic = traffic
        self._numbers: dict[int, list[int]] = {}  #: of rank 0's generations: their numbers on all ranks

    def call(self, inputs: Sequence[Tensor], step: Step) -> Step:
        """Compare this call on all ranks; returns rank 0's step.

        Raises:
            DisagreementError: on every rank, if some rank has other inputs or is in another generation.
            RankError: a rank failed, ended, or did not answer in time.
        """
        samples = [x for i in self._watched for x in _sample(inputs[i], INPUT_SAMPLES)]
        mine = torch.tensor([*map(float, astuple(step)), *samples], dtype=torch.float64)
        payload = mine.to(self._device)
        self._channel.put([[None if dst == self._rank else payload for dst in range(self._world)]])
        self._traffic["inputs"] += self._received
        (received,) = self._channel.get()
        received[self._rank] = mine
        calls = [self._read(row) for row in received.cpu()]
        first, values = calls[0]
        if first.call == 1:  # ranks number generations alike until one of them leaves a picture early
            self._numbers[first.generation] = [other.generation for other, _ in calls]
            if len(self._numbers) > REMEMBERED:
                del self._numbers[next(iter(self._numbers))]
        for rank, (other, theirs) in enumerate(calls):
            numbers = self._numbers.get(first.generation)
            if other.call != first.call or (numbers and numbers[rank] != other.generation):
                raise DisagreementError(
                    f"rank {rank} is at call {other.call} of a generation, rank 0 at call {first.call}: a rank left "
                    "a picture early (an exception in a callback?), or calls this module more often; begin the next "
                    "picture on all ranks"
                )
            for path, one, another in zip(self._paths, values, theirs, strict=True):
                if not _all_close(one.tolist(), another.tolist()):
                    raise DisagreementError(
                        f"rank {rank} was called with another value of `{path}` than rank 0 at this call; every rank "
                        "must be given the same whole inputs (does each seed its generator alike?)"
                    )
        return first

    def _read(self, row: Tensor) -> tuple[Step, Sequence[Tensor]]:
        head, *samples = row.split([len(astuple(EXACT)), *self._counts])
        context, exact, pace, generation, call = head.tolist()
        return Step(int(context), bool(exact), pace, int(generation), int(call)), samples

    def close(self) -> None:
        """Wait for the message in flight."""
        self._channel.close()


def _version() -> str:
    try:
        return version("fxpass")
    except PackageNotFoundError:
        return "not installed"  # Python runs it from a checkout


def _facts(plan: PlanLike, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> dict[str, str]:
    facts = {"version of fxpass": _version(), "version of torch": torch.__version__}
    for path, tensor in zip(plan.program.input_paths, inputs, strict=True):
        facts[f"input {path}"] = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device.type}"
    for name, tensor in zip(plan.program.weights.values(), weights, strict=True):
        facts[f"weight {name}"] = f"{tuple(tensor.shape)} {tensor.dtype} {checksum(tensor)}"
    facts["plan"] = plan.fingerprint
    return facts


def _first_difference(rank: int, ours: dict[str, str], theirs: dict[str, str]) -> str:
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        if ours.get(key) != theirs.get(key):
            differing = sum(ours.get(k) != theirs.get(k) for k in {*ours, *theirs})
            more = f" ({differing} differences in all)" if differing > 1 else ""
            return (
                f"rank {rank} differs from rank 0 in the {key}: {theirs.get(key, 'none')}, "
                f"rank 0 has {ours.get(key, 'none')}{more}"
            )
    return f"rank {rank} differs from rank 0"


def checksum(tensor: Tensor) -> str:
    """A hash of up to 4096 elements spread over a tensor: cheap for any size, but one changed element can escape it."""
    flat = _strided(tensor, WEIGHT_SAMPLES)
    if flat.is_complex():
        flat = torch.view_as_real(flat)
    return hashlib.sha256(flat.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _strided(tensor: Tensor, count: int) -> Tensor:
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // count)
    return flat[::step].cpu()


def _sample(tensor: Tensor, count: int) -> list[float]:
    return (
        torch.view_as_real(t).flatten().tolist() if (t := _strided(tensor, count)).is_complex() else t.double().tolist()
    )


def _all_close(a: list[float], b: list[float]) -> bool:
    left, right = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    finite = left.isfinite()
    if not torch.equal(finite, right.isfinite()) or not torch.equal(
        left[~finite].nan_to_num(), right[~finite].nan_to_num()
    ):
        return False
    left, right = left[finite], right[finite]
    return not left.numel() or bool((left - right).abs().max() <= TOLERANCE * left.abs().max())
