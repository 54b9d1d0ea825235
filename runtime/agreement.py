"""Compare the ranks: their plans, weights and versions before a plan's first exchange (law 6), their inputs later."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from ..ir.merge import Merged
from ..ir.step import ChannelSpec
from .board import Board
from .errors import DisagreementError
from .executor import PlanLike
from .network import Network

WEIGHT_SAMPLES = 4096  #: elements compared per weight
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


class InputCheck:
    """Compares the inputs of each call: ranks that diverge (a sampler with different seeds) make a wrong picture.

    The samples of a call are compared when the next call begins, or during a wait for an exchange, so that the check
    itself never makes a rank wait; those of the very last call may not be compared. On CUDA the host waits until the
    device has made the samples.

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
        samples = Merged("inputs", (sum(self._counts) + 1,), torch.float32, network.board.world)
        spec = ChannelSpec("inputs", "", (samples,), late=False)
        self._channel = network.open([spec], device)[0]
        self._rank = network.board.rank
        self._received = samples.received(self._rank)
        self._board = network.board
        self._traffic = traffic
        self._last: Tensor | None = None

    def call(self, inputs: Sequence[Tensor], exact: bool) -> None:
        """Compare the last call's inputs, and send samples of this call's.

        Raises:
            DisagreementError: on every rank, if some rank had other inputs at the last call.
            RankError: a rank failed, ended, or did not answer in time.
        """
        self._compare("at the call before this one")
        samples = [x for i in self._watched for x in _sample(inputs[i], INPUT_SAMPLES)]
        self._last = torch.tensor([*samples, float(exact)], dtype=torch.float32)
        payload = self._last.to(self._device)
        self._channel.put([[None if dst == self._rank else payload for dst in range(self._board.world)]])
        self._traffic["inputs"] += self._received
        self._board.check_more = self._check_now

    def close(self) -> None:
        """Wait for the message in flight."""
        if self._last is not None:
            self._last = None
            self._channel.close()

    def _check_now(self) -> None:
        """During a wait: compare this call's inputs as soon as all samples have arrived."""
        if self._last is not None and self._channel.ready():
            self._compare("at this call")

    def _compare(self, when: str) -> None:
        if self._last is None:
            return
        mine, self._last = self._last, None
        (samples,) = self._channel.get()
        samples[self._rank] = mine
        values = [part.split([*self._counts, 1]) for part in samples.cpu()]
        advice = "every rank must be given the same whole inputs (does each seed its generator alike?)"
        for rank, (*theirs, exact) in enumerate(values):
            for path, first, other in zip(self._paths, values[0], theirs, strict=False):
                if not _all_close(first.tolist(), other.tolist()):
                    raise DisagreementError(
                        f"rank {rank} was called with another value of `{path}` than rank 0 {when}; {advice}"
                    )
            if not torch.equal(exact, values[0][-1]):
                kinds = [("a displaced", "an exact")[int(each)] for each in (exact, values[0][-1])]
                raise DisagreementError(f"rank {rank} took {when} {kinds[0]} step, rank 0 {kinds[1]} one; {advice}")


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
