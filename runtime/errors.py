"""What can go wrong between ranks."""

from __future__ import annotations


class RankError(RuntimeError):
    """Another rank failed, left, or did not answer in time.

    Attributes:
        rank: the rank that failed; None where nobody knows which.
        message: what it said, with its traceback where there is one.
    """

    def __init__(self, rank: int | None, message: str) -> None:
        super().__init__(f"rank {rank} failed: {message}" if rank is not None else message)
        self.rank = rank
        self.message = message


class DisagreementError(RuntimeError):
    """The ranks do not run the same thing: other versions, weights, inputs or plans. The message names what differs."""
