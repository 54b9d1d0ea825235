"""A plan as plain data, and in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .predict.memory import weights_of

if TYPE_CHECKING:
    from .plan import Plan


def described(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, for JSON."""
    ranks = range(plan.world_size)
    displaced = plan.bytes_received_per_rank_displaced
    return {
        "ranks": plan.world_size,
        "processes": plan.placement.processes,
        "ranks_per_process": list(plan.placement.counts),
        "speeds": list(plan.relative_speeds),
        "mesh": [plan.mesh.groups, plan.mesh.patches],
        "stages": plan.stages,
        "strategy": plan.strategy.name,
        "target": plan.target.name,
        "fingerprint": plan.fingerprint,
        "cuts": {name: str(layout) for name, layout in plan.cuts.items()},
        "flops_total": plan.flops_total,
        "flops_per_rank": list(plan.flops_per_rank),
        "estimated": plan.estimated,
        "uncounted": plan.uncounted,
        "bound": plan.bound,
        "exchanges": [
            {"id": e.id, "role": e.role, "bytes": e.bytes, "messages": e.messages, "node": e.node, "path": e.path,
             "received": [e.received(rank) for rank in ranks],
             "received_displaced": [e.received(rank, exact=False) for rank in ranks],
             "reason": e.reason, "text": str(e.declared)}
            for e in plan.exchanges
        ],
        "bytes_received_per_rank": list(plan.bytes_received_per_rank),
        "bytes_received_per_rank_displaced": None if displaced is None else list(displaced),
        "padding_received_per_rank": [plan.padding_received(rank) for rank in ranks],
        "padding_received_per_rank_displaced": (
            None if displaced is None else [plan.padding_received(rank, exact=False) for rank in ranks]
        ),
        "state_bytes_per_rank": list(plan.state_bytes_per_rank),
        "state_bytes_by_channel": {kind: list(sizes) for kind, sizes in plan.state_bytes_by_channel.items()},
        "fallbacks": [
            {"exchanges": e.exchanges, "node": e.node, "path": e.path, "shapes": e.shapes, "bytes": e.bytes,
             "reason": e.reason}
            for e in plan.gathered
        ],
        "weights_per_process": [weights_of(plan.program, plan.graph, ranks) for ranks in plan.placement],
        "seconds": plan.seconds,
    }  # fmt: skip


def summary(plan: Plan) -> str:
    """The plan in a few lines."""
    roles = ", ".join(f"{role} {size / 1e6:.2f} MB" for role, size in plan.bytes_by_role.items())
    cuts = "; ".join(f"{name} {layout}" for name, layout in plan.cuts.items()) or "nothing"
    slowest = max(plan.placement.sums(plan.flops_per_rank), default=0)
    which = "process" if plan.placement.several else "rank"
    lines = [
        f"plan for {plan.arrangement}, strategy {plan.strategy.name}",
        f"  split      {cuts}",
        f"  work       {plan.flops_total / 1e9:.2f} GFLOP, slowest {which} {slowest / 1e9:.2f}"
        f" (at most {plan.bound:.2f} times as fast)",
        f"  exchanges  {len(plan.exchanges)}: {roles or 'none'}",
    ]
    lines += [f"  estimated  {count} x {name}, as matrix products" for name, count in plan.estimated.items()]
    lines += [f"  uncounted  {count} x {name}: its work is unknown" for name, count in plan.uncounted.items()]
    lines += [f"  fallback   {each}" for each in plan.gathered]
    lines += [f"  {e.node} in {e.path}: {e.reason}" for e in plan.seen_whole]
    return "\n".join(lines)
