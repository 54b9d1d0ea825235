"""A part of a pipeline and the denoiser that takes its results, as one module.

Its forward calls the part, applies to the results what the pipeline has applied to them, and calls the denoiser. So a
step of both is one program: no result of the part is gathered, and one clock decides how fresh its exchanges are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...capture import passed
from ...capture.objects import flatten
from .deferred import DeferredTensor, Step


class Ref:
    """A value of a `Recipe`: a leaf of what the part returns, a result of a step, or a value that is given."""

    __slots__ = ("index", "kind", "place")

    def __init__(self, kind: str, index: int, place: int = 0) -> None:
        self.kind, self.index, self.place = kind, index, place

    def __repr__(self) -> str:
        return f"{self.kind}[{self.index}][{self.place}]"


class Recipe:
    """How the denoiser's arguments are made of the part's results.

    Recipes with the same text are equal, so that their calls share a program.

    Attributes:
        steps: functions with their arguments, in which each `Ref` stands for a tensor or a number.
        links: which leaf of the denoiser's arguments is which value.
        positional: names of the arguments that were passed by position, of the denoiser and of the part.
    """

    __slots__ = ("links", "positional", "steps", "text")

    def __init__(
        self,
        steps: Sequence[tuple[Callable[..., Any], Any, Any]],
        links: Mapping[int, Ref],
        positional: tuple[Sequence[str], Sequence[str]],
    ) -> None:
        self.steps = tuple(steps)
        self.links = tuple(links.items())
        self.positional = positional
        self.text = repr((self.steps, self.links, self.positional))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def values(self, found: Sequence[Any], given: Sequence[Any]) -> dict[int, Any]:
        """The values by the leaf of the denoiser's arguments that each one is.

        Args:
            found: the leaves of what the part returns.
            given: tensors and numbers that the pipeline has combined with the results.
        """
        made: list[list[Any]] = []

        def value(ref: Ref) -> Any:
            if ref.kind == "made":
                return made[ref.index][ref.place]
            return found[ref.index] if ref.kind == "found" else given[ref.index]

        for func, args, kwargs in self.steps:
            args, kwargs = pytree.tree_map_only(Ref, value, (args, kwargs))
            made.append(pytree.tree_leaves(func(*args, **kwargs)))
        return {leaf: value(ref) for leaf, ref in self.links}


class Joint(nn.Module):
    """A denoiser and a part that runs before it."""

    @staticmethod
    def of(denoiser: nn.Module, part: nn.Module) -> Joint:
        """Both modules; the class has a name that says which, for messages."""
        name = f"{type(denoiser).__name__} with {type(part).__name__}"
        return type(name, (Joint,), {})(denoiser, part)

    def __init__(self, denoiser: nn.Module, part: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.part = part
        self.training = False

    def forward(self, denoiser: dict[str, Any], part: dict[str, Any], recipe: Recipe, given: list[Any]) -> Any:
        """What the denoiser returns.

        Args:
            denoiser: its arguments by name, with any value in place of those that are made of the part's results.
            part: the arguments of the part, by name.
            given: see `Recipe.values`.
        """
        # the hooks of both run around the calls that the pipeline has made
        of_denoiser, of_part = recipe.positional
        args, kwargs = passed(part, of_part)
        found = flatten(type(self.part).forward(self.part, *args, **kwargs))[0]
        leaves, spec = pytree.tree_flatten(denoiser)
        for leaf, value in recipe.values(found, given).items():
            leaves[leaf] = value
        args, kwargs = passed(pytree.tree_unflatten(leaves, spec), of_denoiser)
        return type(self.denoiser).forward(self.denoiser, *args, **kwargs)


@dataclass(frozen=True)
class Written:
    """A recipe with the values that it is given now."""

    recipe: Recipe
    given: list[Any]


def write(
    links: Mapping[int, DeferredTensor],
    places: Sequence[int],
    combining: frozenset[Any],
    positional: tuple[Sequence[str], Sequence[str]],
) -> Written:
    """The recipe of some deferred tensors.

    Args:
        links: by the leaf of the denoiser's arguments.
        places: for each tensor that the part returns, which leaf it is.
        combining: functions whose numbers are given, because they may differ from call to call.
        positional: see `Recipe`.
    """
    steps: list[tuple[Callable[..., Any], Any, Any]] = []
    given: list[Any] = []
    known: dict[int, int] = {}

    def give(value: Any) -> Ref:
        given.append(value)
        return Ref("given", len(given) - 1)

    def index(step: Step) -> int:
        if id(step) not in known:
            free = (Tensor, int, float) if step.func in combining else (Tensor,)

            def ref(leaf: Any) -> Any:
                if isinstance(leaf, DeferredTensor):
                    return of(leaf)
                return give(leaf) if isinstance(leaf, free) and not isinstance(leaf, bool) else leaf

            args, kwargs = pytree.tree_map(ref, (step.args, step.kwargs))
            steps.append((step.func, args, kwargs))
            known[id(step)] = len(steps) - 1
        return known[id(step)]

    def of(deferred: DeferredTensor) -> Ref:
        if deferred.step is None:
            return Ref("found", places[deferred.place])
        return Ref("made", index(deferred.step), deferred.place)

    refs = {leaf: of(deferred) for leaf, deferred in links.items()}
    return Written(Recipe(steps, refs, positional), given)
