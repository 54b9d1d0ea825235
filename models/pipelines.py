"""Adapters to diffusers pipelines: where they keep their denoisers, and how they announce a generation."""

from __future__ import annotations

import functools
import inspect
import re
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

MAIN = ("transformer", "unet", "transformer_2", "prior")  #: attributes that hold denoisers, the main one first
ENDING = "maybe_free_model_hooks"  #: the method that pipelines call last
HALVES = ("decode", "encode")  #: methods of an autoencoder
TILING = "use_tiling"  #: the attribute of an autoencoder that says whether it works tile by tile
TIMESTEP = re.compile(
    r"t|ts|r|times?|timesteps?|timestep_ratio|sigmas?|noise_(levels?|labels?|time)|decoder_noise_time"
)
BESIDE = re.compile(r"ControlNet|Adapter")  #: classes that work beside a denoiser
CALLED = re.compile(r"generate|get_\w+_features|check_\w+_safety")  #: what pipelines call of text encoders and checkers
PROGRESS = "_progress_bar_config"  #: the attribute of a pipeline that says how it shows its progress
PICTURE = re.compile(r"x|samples?|latents?|hidden_states|img|image")  #: what a forward may call its picture


def denoisers(pipeline: Any) -> list[str]:
    """Names of the attributes of `pipeline` that are denoisers, the main one first.

    A denoiser is a module whose forward takes a timestep, under whatever name it is kept, or one of `MAIN`.
    """
    modules = _modules(pipeline)
    found = [name for name in MAIN if name in modules]
    rest = [name for name, module in modules.items() if _takes_time(module) and not _is_beside(module)]
    return found + [name for name in rest if name not in found]


def beside(pipeline: Any) -> list[str]:
    """Names of the attributes of `pipeline` that run beside a denoiser in each step, as ControlNets do."""
    return [name for name, module in _modules(pipeline).items() if _takes_time(module) and _is_beside(module)]


def methods_of(module: nn.Module) -> list[str]:
    """The methods beside `forward` that are worth splitting: those of an autoencoder, `decode` and `encode`.

    A module is one if its class has both, or its decoding half if it has `decode` alone, and they take a tensor first.
    """
    held = [name for name in HALVES if hasattr(type(module), name)]
    taking = all(_takes_tensor(getattr(type(module), name)) for name in held)
    return held if taking and HALVES[0] in held else []


@contextmanager
def untiled(module: nn.Module) -> Iterator[None]:
    """Switch the tiling of an autoencoder off (what `enable_tiling` has switched on) while the context lasts."""
    tiled = vars(module).get(TILING, False)
    if tiled:
        setattr(module, TILING, False)
    try:
        yield
    finally:
        if tiled:
            setattr(module, TILING, tiled)


def autoencoders(pipeline: Any) -> list[str]:
    """Names of the attributes of `pipeline` that are autoencoders."""
    return [name for name, module in _modules(pipeline).items() if methods_of(module)]


def split_parts(pipeline: Any) -> list[str]:
    """Names of the attributes of `pipeline` that are split, the main denoiser first."""
    return list(dict.fromkeys([*denoisers(pipeline), *beside(pipeline), *autoencoders(pipeline)]))


def other_parts(pipeline: Any) -> list[str]:
    """Names of the attributes of `pipeline` that are modules, and left alone: text encoders, safety checkers."""
    split = split_parts(pipeline)
    return [name for name in _modules(pipeline) if name not in split]


def called_of(module: nn.Module) -> list[str]:
    """The methods beside `forward` that pipelines call of a part that is left alone."""
    return [name for name in dir(type(module)) if CALLED.fullmatch(name) and callable(getattr(type(module), name))]


def quiet(pipeline: Any) -> Callable[[], None]:
    """Show no progress of a pipeline in this process; returns what undoes it."""
    before = vars(pipeline).get(PROGRESS)
    ours = {**(before or {}), "disable": True}
    vars(pipeline)[PROGRESS] = ours
    reference = weakref.ref(pipeline)

    def undo() -> None:
        pipeline = reference()
        if pipeline is None or vars(pipeline).get(PROGRESS) is not ours:  # the user has set it since
            return
        del vars(pipeline)[PROGRESS]
        if before is not None:
            vars(pipeline)[PROGRESS] = before

    return undo


def _takes_tensor(method: Any) -> bool:
    if not callable(method):
        return False
    _, *parameters = inspect.signature(method).parameters.values()  # without `self`
    return bool(parameters) and (
        parameters[0].annotation is inspect.Parameter.empty or "Tensor" in _text(parameters[0])
    )


def _text(parameter: inspect.Parameter) -> str:
    return getattr(parameter.annotation, "__name__", None) or str(parameter.annotation)


def pipelines_in(pipeline: Any) -> list[Any]:
    """The pipelines that a pipeline is made of, and itself. The former hold the same denoisers once more."""
    values = [value for value in vars(pipeline).values() if not isinstance(value, nn.Module)]
    return [*(value for value in values if hasattr(value, "scheduler") and hasattr(value, "__dict__")), pipeline]


def modules_text(pipeline: Any) -> str:
    """The modules of a pipeline and their classes, for messages. Says which of them look like denoisers."""

    def text(name: str, module: nn.Module) -> str:
        takes = ", ".join(inspect.signature(module.forward).parameters)
        note = f", which looks like a denoiser: its forward takes {takes}"
        return f"{name}: {type(module).__name__}{note if _is_alike(module) else ''}"

    return "; ".join(text(*each) for each in _modules(pipeline).items()) or "none"


def never_denoises(pipeline: Any) -> bool:
    """Whether a pipeline has no denoiser, and no module that looks like one, as one that only scales latents up."""
    return not denoisers(pipeline) and not any(map(_is_alike, _modules(pipeline).values()))


def _is_alike(module: nn.Module) -> bool:
    first, *more = [*inspect.signature(module.forward).parameters, ""]
    return bool(PICTURE.fullmatch(first)) and len(more) > 1 and not methods_of(module)


def _modules(pipeline: Any) -> dict[str, nn.Module]:
    return {name: value for name, value in vars(pipeline).items() if isinstance(value, nn.Module)}


def _takes_time(module: nn.Module) -> bool:
    return any(TIMESTEP.fullmatch(name) for name in inspect.signature(module.forward).parameters)


def _is_beside(module: nn.Module) -> bool:
    return bool(BESIDE.search(type(module).__name__))


class Announcer:
    """Says when a generation of a pipeline begins, and when a call of it ends.

    A generation begins whenever the scheduler gets its timesteps; a copy of the scheduler also says so. Called before
    each call of a denoiser, this object finds another scheduler that the user has set since: the generation that it
    started is announced then.

    Args:
        begin: called with the timesteps.
        end: called when the pipeline releases its models (`maybe_free_model_hooks`), as its last act.
    """

    def __init__(self, pipeline: Any, begin: Callable[[Sequence[float]], None], end: Callable[[], None]) -> None:
        self._pipeline = weakref.ref(pipeline)
        self._begin = begin
        self._undo: list[Callable[[], None]] = []
        self._follow()
        if isinstance(getattr(pipeline, ENDING, None), types.MethodType):
            self._undo.append(_override(pipeline, ENDING, lambda ended: end() if ended is self._pipeline() else None))

    def __call__(self) -> None:
        scheduler = self._follow()
        if scheduler is not None and getattr(scheduler, "timesteps", None) is not None:
            self._begin([float(each) for each in scheduler.timesteps])

    def stop(self) -> None:
        """Leave the schedulers and the pipeline as they were before."""
        while self._undo:
            self._undo.pop()()

    def _follow(self) -> Any:
        """The pipeline's scheduler if it is a new one."""
        scheduler = getattr(self._pipeline(), "scheduler", None)
        method = getattr(scheduler, "set_timesteps", None)
        if not isinstance(method, types.MethodType) or self._begin in getattr(method, "listeners", ()):
            return None

        begin = self._begin

        def heard(scheduler: Any) -> None:
            begin([float(each) for each in scheduler.timesteps])

        self._undo.append(_override(scheduler, "set_timesteps", heard, begin))
        return scheduler


def _override(owner: Any, name: str, heard: Callable[[Any], None], key: Any = None) -> Callable[[], None]:
    """Call `heard(owner)` after a method of an object; returns what undoes this.

    It is a bound method, so that a deep copy of the object binds it to itself.

    Args:
        key: an entry of the method's `listeners` until it is undone.
    """
    plain = getattr(owner, name)
    before = vars(owner).get(name)
    active = [True]

    @functools.wraps(plain.__func__)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = plain.__func__(self, *args, **kwargs)
        if active:
            heard(self)
        return result

    method.listeners = listeners = {key, *getattr(plain, "listeners", ())}
    method.layer = (active, before)
    bound = vars(owner)[name] = types.MethodType(method, owner)
    reference = weakref.ref(owner)

    def undo() -> None:
        active.clear()
        listeners.discard(key)
        owner = reference()
        if owner is not None and vars(owner).get(name) is bound:
            under = before
            while under is not None and not getattr(under, "layer", (True,))[0]:  # others have ended before this one
                under = under.layer[1]
            del vars(owner)[name]
            if under is not None:
                vars(owner)[name] = under

    return undo
