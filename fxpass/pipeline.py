"""Split the parts of a pipeline in place, and put everything back.

The parts stay the user's objects: their methods are attached (`runtime/calls/attached.py`). A `PipelineWatch` tells
them when a generation begins, and sees that calls of the pipeline reach them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .ir.advice import warn
from .models.pipelines import (
    Announcer,
    autoencoders,
    beside,
    denoisers,
    methods_of,
    modules_text,
    never_denoises,
    pipelines_in,
    split_parts,
)
from .one_rank import leave_to_first_again, plain_model, run_everywhere
from .runtime.calls.attached import attach, attach_again, attached_to, detach
from .runtime.calls.engine import Engine
from .runtime.calls.feeds import connect
from .runtime.calls.module import ParallelModule

#: the parallel modules of each pipeline, by its id, so that they outlive hooks that replace their methods
_parts: dict[int, list[ParallelModule]] = {}


def split_module(
    model: nn.Module, engine_of: Callable[[nn.Module], Engine], *, required: bool = True
) -> ParallelModule:
    """The parallel module of a model; a model that is parallel already gets another engine."""
    module = model if type(model) is ParallelModule else attached_to(model)
    if module is None:
        return ParallelModule(model, engine_of(model), methods_of(model), required=required)
    module._run_on(engine_of(module.unwrapped))
    return module


def split_pipeline(pipeline: Any, engine_of: Callable[[nn.Module], Engine]) -> None:
    """Let parts of a pipeline, and of the pipelines that it is made of, run on all ranks.

    These are denoisers, what runs beside them in each step, and autoencoders. The last two run unsplit, with a
    warning, where they cannot be split. A pipeline that never denoises may have autoencoders only.

    Raises:
        TypeError: there is no denoiser, and something that may be one, or no autoencoder either.
    """
    pipelines = pipelines_in(pipeline) if hasattr(pipeline, "__dict__") else []
    steps = [(each, name) for each in pipelines for name in denoisers(each)]
    if not steps and not (all(map(never_denoises, pipelines)) and any(map(autoencoders, pipelines))):
        held = f" (its modules: {modules_text(pipeline)})" if pipelines else ""
        raise TypeError(
            f"{type(pipeline).__name__} is neither an nn.Module nor a pipeline with a denoiser, whose forward "
            f"takes a timestep{held}; give parallelize the model itself"
        )
    if not steps:
        warn(
            f"{type(pipeline).__name__} has no denoiser, whose forward takes a timestep (its modules: "
            f"{modules_text(pipeline)}), so only its autoencoders are split"
        )
    needed = {id(plain_model(getattr(*place))) for place in steps}
    places = [(each, name) for each in pipelines for name in split_parts(each)]
    models = {id(plain_model(value)): value for value in (getattr(*place) for place in places)}
    engines = {key: engine_of(plain_model(model)) for key, model in models.items()}  # before anything changes
    for each in pipelines:
        _unwatch(each)
    modules: dict[int, ParallelModule] = {}
    for key, model in models.items():
        modules[key] = split_module(model, lambda _, key=key: engines[key], required=key in needed)
        if attached_to(plain_model(model)) is None:
            attach(modules[key])
    connect(
        (engines[key] for key in needed),
        (engines[id(plain_model(getattr(each, name)))] for each in pipelines for name in beside(each)),
    )
    for each, name in places:
        value = getattr(each, name)
        if type(value) is ParallelModule:
            setattr(each, name, plain_model(value))
    _watch(pipelines, modules)


def restore(module_or_pipeline: Any) -> Any:
    """Undo `parallelize`: end the workers, and give back the user's model, or the pipeline as it was.

    Of a pipeline, all parts are plain again, those that were replaced since, too, and the scheduler announces nothing.
    What is not parallel stays as it is.

    Raises:
        TypeError: the argument is neither a module nor a pipeline.
    """
    if isinstance(module_or_pipeline, nn.Module):
        return _plain(module_or_pipeline)
    if not hasattr(module_or_pipeline, "__dict__"):
        raise TypeError(f"restore takes an nn.Module or a pipeline, not {type(module_or_pipeline).__name__}")
    for pipeline in pipelines_in(module_or_pipeline):
        for module in _unwatch(pipeline):
            _end(module)
        for name, value in list(vars(pipeline).items()):
            if isinstance(value, nn.Module) and (model := _plain(value)) is not value:
                setattr(pipeline, name, model)
    return module_or_pipeline


def parallel(module: nn.Module) -> ParallelModule:
    """The parallel module that runs the calls of a part of a pipeline: it has `plan`, `traffic`, `close()`, ….

    Args:
        module: the part, for example `pipe.unet`; or what `parallelize` returned for a module, which is returned.

    Raises:
        ValueError: the module is not parallel.
    """
    found = module if type(module) is ParallelModule else attached_to(module)
    if found is None:
        raise ValueError(
            f"this {type(module).__name__} is not parallel: call fxpass.parallelize on it, or on its pipeline, first"
        )
    return found


def _plain(model: nn.Module) -> nn.Module:
    module = model if type(model) is ParallelModule else attached_to(model)
    if module is None:
        return model
    _end(module)
    return module.unwrapped


def _end(module: ParallelModule) -> None:
    detach(module)
    module.close()
    for modules in list(_parts.values()):
        if module in modules:
            modules.remove(module)


def _watch(pipelines: Sequence[Any], modules: dict[int, ParallelModule]) -> None:
    """Watch each pipeline. Of those that others are made of, which come first, only they call the parts."""
    heard: set[int] = set()
    for pipeline in pipelines:
        names = [name for name in split_parts(pipeline) if id(getattr(pipeline, name)) in modules]
        mine = {
            name: modules[id(getattr(pipeline, name))] for name in names if id(getattr(pipeline, name)) not in heard
        }
        heard |= {id(module.unwrapped) for module in mine.values()}
        if mine:
            PipelineWatch(pipeline, mine, [*denoisers(pipeline), *beside(pipeline)])
            _parts[id(pipeline)] = list(mine.values())
            weakref.finalize(pipeline, _parts.pop, id(pipeline), None)


def _unwatch(pipeline: Any) -> list[ParallelModule]:
    """Stop watching a pipeline; returns its parallel modules."""
    run_everywhere(pipeline)
    modules = _parts.pop(id(pipeline), [])
    for module in modules:
        for watch in list(module._watches):
            if isinstance(watch, PipelineWatch) and watch.pipeline() is pipeline:
                watch.stop()
    return modules


class PipelineWatch:
    """Announces the generations of a pipeline to its parallel modules.

    It keeps no module alive: schedulers refer to it.

    Args:
        modules: by the name that each has in the pipeline.
        denoisers: the names of those that each step of the pipeline should call.
    """

    def __init__(self, pipeline: Any, modules: dict[str, ParallelModule], denoisers: Sequence[str]) -> None:
        self.pipeline = weakref.ref(pipeline)
        self._modules = {name: weakref.ref(module) for name, module in modules.items()}
        self._denoisers = [name for name in denoisers if name in modules]
        self._calls: dict[str, int] = {}  # of the engines of the denoisers, when the generation began
        self._said = False
        for module in modules.values():
            module._watches.append(self)
        self._announcer = Announcer(pipeline, self._begin, self._end)

    def __call__(self) -> None:
        self._announcer()

    def closed(self) -> None:
        """Stop if none of the modules can run any more."""
        if not any(self._running().values()):
            self.stop()

    def stop(self) -> None:
        self._announcer.stop()
        for reference in self._modules.values():
            if (module := reference()) is not None and self in module._watches:
                module._watches.remove(self)

    def _running(self) -> dict[str, ParallelModule]:
        found = {name: reference() for name, reference in self._modules.items()}
        return {name: module for name, module in found.items() if module is not None and not module._engine.ended}

    def _begin(self, timesteps: Sequence[float]) -> None:
        running = self._running()
        for module in running.values():
            attach_again(module)
        for name in self._denoisers:
            if name in running:
                running[name].reset(timesteps)
                self._calls[name] = running[name]._engine.calls

    def _end(self) -> None:
        """Warn once if a denoiser was not called in a call of the pipeline: then nothing of it was split."""
        leave_to_first_again(self.pipeline())
        unused = [
            f"{name} ({type(module.unwrapped).__name__})"
            for name, module in self._running().items()
            if self._calls.pop(name, None) == module._engine.calls
        ]
        if unused and not self._said:
            self._said = True
            warn(
                f"{type(self.pipeline()).__name__} ran without a call of {', '.join(unused)}, so nothing there was "
                "split; if it has another module in that place now, call fxpass.parallelize again"
            )
