"""Compare the ranks: their plans, weights and versions before a plan's first exchange (law 6), their inputs later."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ir.merge import Merged
from ..ir.step import ChannelSpec, Step
from ..ir.versions import versions
from .board import Board
from .channels import Channel
from .errors import DisagreementError
from .executor import PlanLike, Question
from .network import Network

WEIGHT_SAMPLES = 4096  #: elements compared per weight
REMEMBERED = 64  #: generations whose numbers on all ranks are kept
INPUT_SAMPLES = 64  #: elements compared per input
TOLERANCE = 1e-2  #: allowed difference of sampled inputs, relative to the largest: devices round differently


def agree(
    board: Board,
    number: int,
    plan: PlanLike,
    weights: Sequence[Tensor],
    inputs: Sequence[Tensor],
    options: dict[str, str],
) -> None:
    """Compare this rank with all others.

    Args:
        number: the plan's number in this executor, from 1.
        options: what else must be equal, by name.

    Raises:
        DisagreementError: on every rank; names the first difference.
        RankError: a rank did not arrive.
    """
    facts = _facts(plan, weights, inputs) | options
    text = json.dumps(facts)
    mine = {
        "digest": hashlib.sha256(text.encode()).hexdigest(),
        "inputs": {p: sampled(t, INPUT_SAMPLES) for p, t in zip(plan.program.input_paths, inputs, strict=True)},
    }
    prefix = f"plan/{number}"
    board.set(f"{prefix}/facts/{board.rank}", text)
    board.set(f"{prefix}/mine/{board.rank}", json.dumps(mine))
    what = f"the other ranks to come to the same call (plan {number})"
    with board.meeting(f"the first call of {described(number, plan.program.input_paths)}"):
        first, *others = [json.loads(board.read(f"{prefix}/mine/{rank}", what)) for rank in range(board.world)]
    for rank, other in enumerate(others, 1):
        if other["digest"] != first["digest"]:
            ours, theirs = (json.loads(board.read(f"{prefix}/facts/{r}", what)) for r in (0, rank))
            raise DisagreementError(_first_difference(rank, ours, theirs))
        for (path, sample), x in zip(first["inputs"].items(), inputs, strict=True):
            if not all_close(sample, other["inputs"][path], exact=_is_whole(x)):
                raise DisagreementError(
                    f"rank {rank} was called with another value of `{path}` than rank 0; every rank must be given the "
                    "same whole inputs (does each seed its generator alike?)"
                )


def described(number: int, paths: Sequence[str]) -> str:
    """A plan, for messages."""
    return f"plan {number} (of {', '.join(paths[:3])}{', …' * (len(paths) > 3)})"


class CallCheck:
    """Compares each call of a plan before any of its exchanges, and lets rank 0 decide how it runs (law 7).

    Ranks that diverge (a sampler with other seeds, a rank that left a picture early) would make a wrong picture. Every
    rank raises before anything is sent, so that the next call can succeed. On CUDA the host waits once, for what all
    ranks know of the call.

    Args:
        number: of the plan in this executor.
        paths: the names of the inputs.
    """

    def __init__(
        self, network: Network, number: int, paths: Sequence[str], device: torch.device, traffic: Counter[str]
    ) -> None:
        self._network = network
        self._place = f"a call of {described(number, paths)}"
        self._paths = paths
        self._device = device
        self._traffic = traffic
        self._channel: Channel | None = None
        self._received = 0  #: bytes of a message
        self._numbers: dict[int, list[int]] = {}  #: of rank 0's generations: their numbers on all ranks

    def decide(self, inputs: Sequence[Tensor], question: Question) -> Step:
        """Compare a call on all ranks; returns the step that rank 0 decides.

        Args:
            inputs: as many elements in all calls.

        Raises:
            DisagreementError: on every rank, if some rank has other inputs or is in another generation.
            RankError: a rank failed, ended, or did not answer in time.
        """
        watched = {path: _strided(x, INPUT_SAMPLES) for path, x in zip(self._paths, inputs, strict=True) if x.numel()}
        samples = [(torch.view_as_real(x).flatten() if x.is_complex() else x).double() for x in watched.values()]
        board = self._network.board
        about = [question.generation, question.call, question.state, board.call, question.together, question.taken]
        head = torch.tensor(about, dtype=torch.float64)
        calls = self._gathered([head, *question.facts, *samples])
        numbers = [tuple(map(int, call[: len(head)].tolist())) for call in calls]
        self._check_generation(numbers)
        board.call = numbers[0][3]  # a rank whose last call failed before it met the others is ahead
        count = len(head) + sum(part.numel() for part in question.facts)
        parts = [call[count:].split([part.numel() for part in samples]) for call in calls]
        for rank, theirs in enumerate(parts):
            for (path, x), one, another in zip(watched.items(), parts[0], theirs, strict=True):
                if not all_close(one.tolist(), another.tolist(), exact=_is_whole(x)):
                    raise DisagreementError(
                        f"rank {rank} was called with another value of `{path}` than rank 0 at this call; every rank "
                        "must be given the same whole inputs (does each seed its generator alike?)"
                    )
        return question.decide(calls[0][len(head) : count].tolist())

    def _gathered(self, parts: Sequence[Tensor]) -> Tensor:
        """The numbers in some tensors [n], of all ranks, on the host."""
        board = self._network.board
        mine = torch.cat([_moved(part, self._device) for part in parts])
        if board.world == 1:
            return mine[None].cpu()
        if self._channel is None:
            message = Merged("inputs", (len(mine),), torch.float64, board.world)
            self._received = message.received(board.rank)
            spec = ChannelSpec("inputs", "", (message,), late=False)
            self._channel = self._network.open([spec], self._device)[0][0]
        self._channel.put([[None if dst == board.rank else mine for dst in range(board.world)]])
        self._traffic["inputs"] += self._received
        with board.meeting(self._place):
            (received,) = self._channel.get()
            received[board.rank] = mine
            self._network.settle(self._device)
        return received.cpu()

    def _check_generation(self, numbers: Sequence[tuple[int, ...]]) -> None:
        """Raises `DisagreementError` unless all ranks are at one call of one generation and take the same values."""
        generation, first, state, _, together, taken = numbers[0]
        if first == 1:  # ranks number generations alike until one of them leaves a picture early
            self._numbers[generation] = [number for number, *_ in numbers]
            if len(self._numbers) > REMEMBERED:
                del self._numbers[next(iter(self._numbers))]
        known = self._numbers.get(generation)
        for rank, (number, call, other, _, came, takes) in enumerate(numbers):
            if takes != taken:
                raise DisagreementError(
                    f"rank {rank} takes other values than rank 0 of those that earlier calls have left on the ranks: "
                    "on some ranks only was such a value used (printed on rank 0?); use it on all ranks or on none"
                )
            if came != together:
                raise DisagreementError(
                    f"rank {rank} runs {came} of the calls that run at once, rank 0 {together}: on some ranks only "
                    "was the result of a call used before the next call (printed on rank 0?); use such results on all "
                    "ranks or on none, or call fxpass.parallelize with cfg=1"
                )
            if call == first and other != state:
                raise DisagreementError(
                    f"rank {rank} has run other calls than rank 0 before this one (did one fail there, or come from "
                    "another thread?); both have forgotten them, so the next call can succeed"
                )
            if call != first or (known and known[rank] != number):
                raise DisagreementError(
                    f"rank {rank} is at call {call} of a generation, rank 0 at call {first}: a rank left a picture "
                    "early (an exception in a callback?), or calls this module more often; begin the next picture on "
                    "all ranks"
                )

    def close(self) -> None:
        """Wait for the message in flight."""
        if self._channel:
            self._channel.close()


def _moved(part: Tensor, device: torch.device) -> Tensor:
    """A small tensor on a device; the host does not wait for the device."""
    if part.device == device:
        return part
    return (part.pin_memory() if device.type == "cuda" and part.device.type == "cpu" else part).to(
        device, non_blocking=True
    )


def _facts(plan: PlanLike, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> dict[str, str]:
    facts: dict[str, str] = dict(zip(("version of fxpass", "version of torch"), versions(), strict=True))
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
    flat = _strided(tensor, WEIGHT_SAMPLES).cpu()
    if flat.is_complex():
        flat = torch.view_as_real(flat)
    return hashlib.sha256(flat.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _strided(tensor: Tensor, count: int) -> Tensor:
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // count)
    return flat[::step].resolve_conj().resolve_neg()


def sampled(tensor: Tensor, count: int) -> list[float]:
    return (
        torch.view_as_real(t).flatten().tolist() if (t := _strided(tensor, count)).is_complex() else t.double().tolist()
    )


def _is_whole(x: Tensor) -> bool:
    """Whether a tensor holds whole numbers, which no device rounds: a class, a number of frames."""
    return not x.is_floating_point() and not x.is_complex()


def all_close(a: list[float], b: list[float], *, exact: bool = False) -> bool:
    if exact:
        return a == b
    left, right = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    finite = left.isfinite()
    if not torch.equal(finite, right.isfinite()) or not torch.equal(
        left[~finite].nan_to_num(), right[~finite].nan_to_num()
    ):
        return False
    left, right = left[finite], right[finite]
    return not left.numel() or bool((left - right).abs().max() <= TOLERANCE * left.abs().max())
