"""Errors of ranks."""

from __future__ import annotations


class RankError(RuntimeError):
    """Another rank failed, ended, or did not answer in time.

    Attributes:
        rank: the rank that failed; None if it is not known.
        message: its error, with its traceback if there is one.
        hangs: its process is there, but does not answer.
    """

    def __init__(self, rank: int | None, message: str, *, hangs: bool = False) -> None:
        super().__init__(f"rank {rank} failed: {message}" if rank is not None else message)
        self.rank = rank
        self.message = message
        self.hangs = hangs


class DisagreementError(RuntimeError):
    """The ranks differ in versions, weights, inputs or plans. The message names the difference."""
