"""What one rank of torchrun does for all: rank 0 runs parts of a pipeline for the others, and shows its progress."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from .models.pipelines import called_of, other_parts, pipelines_in, quiet, split_parts
from .runtime.calls.first_rank import FirstRankPart
from .runtime.calls.module import ParallelModule
from .runtime.calls.turn import Turn
from .runtime.distributed import DistributedExecutor

#: of each pipeline, by its id: those of its parts that run on rank 0, and what shows its progress again
_parts: dict[int, list[FirstRankPart]] = {}
_shown: dict[int, Callable[[], None]] = {}


def chosen_parts(pipeline: Any, chosen: bool | str | Collection[str]) -> dict[str, nn.Module]:
    """The parts of a pipeline, and of those that it is made of, that are to run on rank 0 alone, by name.

    Args:
        chosen: their names, or True: all that are not split.

    Raises:
        ValueError: it is something else, or a name is not that of a part that is not split.
    """
    if chosen is False:
        return {}
    if isinstance(pipeline, nn.Module):
        raise ValueError("on_first_rank names parts of a pipeline (its text encoders); a module alone has none")
    found = _by_name(pipeline, other_parts)
    if chosen is True:
        return _told_apart(found)
    names = [chosen] if isinstance(chosen, str) else list(chosen) if isinstance(chosen, Collection) else [chosen]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"on_first_rank is True, False, a name or names of parts, not {chosen!r}")
    wrong = [name for name in names if name not in found]
    if wrong:
        split = _by_name(pipeline, split_parts)
        why = [f"{name!r} (which runs on all ranks)" if name in split else repr(name) for name in wrong]
        known = ", ".join(f"{name} ({type(module).__name__})" for name, (module, *_) in found.items()) or "none"
        raise ValueError(
            f"on_first_rank has {', '.join(why)}, but these are the parts of this {type(pipeline).__name__} that can "
            f"run on rank 0 alone: {known}"
        )
    return _told_apart({name: found[name] for name in names})


def _by_name(pipeline: Any, names: Callable[[Any], Collection[str]]) -> dict[str, list[nn.Module]]:
    """Parts of a pipeline, then of those that it is made of, each once. Several may have one name there."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for each in reversed(pipelines_in(pipeline)):
        for name in names(each):
            module = plain_model(getattr(each, name))
            found.setdefault(id(module), (name, module))
    parts: dict[str, list[nn.Module]] = {}
    for name, module in found.values():
        parts.setdefault(name, []).append(module)
    return parts


def _told_apart(parts: dict[str, list[nn.Module]]) -> dict[str, nn.Module]:
    """The parts by names of their own: the second one of a name has a number."""
    each = [(name, i, module) for name, modules in parts.items() for i, module in enumerate(modules, 1)]
    return {name if i == 1 else f"{name} ({i})": module for name, i, module in each}


def send_weights(model_or_pipeline: Any, alone: dict[str, nn.Module], executor: DistributedExecutor) -> None:
    """Give all ranks rank 0's weights of a module, or of all modules of a pipeline that do not run on rank 0 alone."""
    if isinstance(model_or_pipeline, nn.Module):
        held = {"": plain_model(model_or_pipeline)}
    else:
        every = _by_name(model_or_pipeline, lambda each: [*split_parts(each), *other_parts(each)])
        left = set(map(id, alone.values()))
        held = {name: module for name, module in _told_apart(every).items() if id(module) not in left}
    executor.send_weights(held)


def plain_model(module: nn.Module) -> nn.Module:
    """The user's model, of what is parallel, too."""
    return module.unwrapped if type(module) is ParallelModule else module


def leave_to_first(pipeline: Any, parts: dict[str, nn.Module], executor: DistributedExecutor, turn: Turn) -> None:
    """Let parts run on rank 0 alone, and rank 0 alone show the progress of a pipeline."""
    made = {
        id(module): FirstRankPart(module, name, called_of(module), executor.share(), turn)
        for name, module in parts.items()
    }
    for each in pipelines_in(pipeline):
        held = {id(plain_model(getattr(each, name))) for name in other_parts(each)}
        _parts[id(each)] = [part for key, part in made.items() if key in held]
        weakref.finalize(each, _parts.pop, id(each), None)
        if not executor.first:
            _shown[id(each)] = quiet(each)
            weakref.finalize(each, _shown.pop, id(each), None)


def leave_to_first_again(pipeline: Any) -> None:
    """Let them run there also after hooks were set again."""
    for part in _parts.get(id(pipeline), ()):
        part.attach_again()


def run_everywhere(pipeline: Any) -> None:
    """Undo `leave_to_first`."""
    for part in _parts.pop(id(pipeline), ()):
        part.detach()
    if (show := _shown.pop(id(pipeline), None)) is not None:
        show()
