"""Capture a model as a program: run it once on fake tensors, and record its operators below autograd."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ..ir.garbage import collection_paused
from ..ir.nodes import append_copy
from ..ir.program import Guard, Program
from ..ir.progress import Task, progress
from .arguments import Arguments, results_of, writable_copy
from .call import Call
from .compare import alike, check_values
from .concrete import Reader, memory_of
from .draws import draws_given_back
from .errors import CaptureError, TooManyOperatorsError, raised_line
from .executed import Executed
from .guards import version
from .intercepts import Intercepts
from .left import State, outputs_of
from .model import check_model, names_of, unchanged_on_error
from .reads import Reads
from .recorder import Recorder
from .routing import Routing
from .rows import resolve
from .sharing import shared_among
from .survivors import refuse_survivors, release_survivors
from .unread import Watch, refuse_stand_ins
from .writes import functionalize

log = logging.getLogger("fxpass")


def capture(model: nn.Module, *args: Any, **kwargs: Any) -> Program:
    """Capture `model(*args, **kwargs)` as a `Program`. Weight-free (fake) models work.

    The model runs once eagerly, because some models build tables at their first call (weight-free models skip this),
    and once on fake tensors. Then the program runs once, and must return what the model returned. The model itself does
    not change.

    Raises `CaptureError` if the model is in training mode and behaves differently there, changes its own state,
    branches on activations, or uses Python that cannot be recorded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model is an nn.Module, not {type(model).__name__}: put the function into one's forward")
    return capture_call(model, Call.of(model, args, kwargs))


def capture_call(model: nn.Module, call: Call) -> Program:
    """`capture` of a call that is already bound."""
    with progress(f"capture {type(model).__name__}") as task:
        return _captured(model, call, task)


def _captured(model: nn.Module, call: Call, task: Task) -> Program:
    started = time.perf_counter()
    check_model(model)
    fake_mode = detect_fake_mode([*model.parameters(), *model.buffers(), *call.tensors])
    is_fake = any(isinstance(t, FakeTensor) for t in (*model.parameters(), *model.buffers(), *call.tensors))
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        _autocast_cache_off(),
        draws_given_back(call),
        unchanged_on_error(model) as (state, writes),
    ):
        lifted = frozenset(call.numbers)
        if not is_fake:
            task.say("run it once")
            with _naming_devices(model, call), Executed(state.begins), writes:
                expected, lifted = _warm_up(model, call, state)
        state.save()
        warm = time.perf_counter()
        mode = fake_mode if is_fake and fake_mode is not None else FakeTensorMode()
        task.say("record its operators")
        recording = _Recording(model, call, mode, state, is_fake)
        program = _trace_lifted(recording, lifted)
        recorded = time.perf_counter()
        if not is_fake:
            task.say("compare the program with the model")
            check_values(program, model, call, expected)
            state.shorten(program)
        constants = [program.constants[name] for name in program.versions if name not in program.attributes]
        program.reads = Reads(state, call.functions(), constants, program.changes)
    if call.method is not None:
        program.method = call.method.name
    program.fed, program.joined = call.fed, call.joined
    program.given = {program.inputs[i]: layout for i, layout in call.given}
    program.modules = {path: type(module).__name__ for path, module in model.named_modules()}
    program.seconds |= {
        "warm up": warm - started,
        "capture": recorded - warm,
        "compare": time.perf_counter() - recorded,
    }
    log.debug("captured %s in %.2f s: %s", type(model).__name__, time.perf_counter() - started, program)
    return program


@contextmanager
def _naming_devices(model: nn.Module, call: Call) -> Iterator[None]:
    """If the body fails, the error notes which inputs are on another device than the model: torch may not name it."""
    try:
        yield
    except Exception as error:
        home = next((weight.device for weight in model.parameters() if weight.ndim), None)
        for path, tensor in zip(call.paths, call.tensors, strict=True):
            if home is not None and tensor.ndim and tensor.device != home:
                error.add_note(f"input {path} is on {tensor.device}, the model on {home}")
        raise


def _warm_up(model: nn.Module, call: Call, state: State) -> tuple[list[Any], frozenset[int]]:
    """Run the model eagerly: what it returns, and the number arguments that may be tensors, whatever the numbers."""

    def run(tensors: Sequence[Any]) -> list[Any]:
        tensors = [writable_copy(each) if isinstance(each, Tensor) else each for each in tensors]
        state.save()
        try:
            results = results_of(lambda copies: call.run(model, copies), call, tensors)
        except Exception:
            state.undo()  # what a run that failed half-way has changed, and would have changed back
            raise
        state.settle()
        return results

    def alike(tensors: Sequence[Any], expected: list[Any]) -> bool:
        try:
            torch.testing.assert_close(run(tensors), expected)
        except Exception:
            return False  # the model may do anything with a tensor in place of a number
        return True

    def accepts(lifted: frozenset[int]) -> bool:
        if not alike(call.with_numbers(call.tensors, lifted), first):
            return False
        # a neutral number (a scale of 1) would hide that its tensor is ignored
        others = replace(call, numbers=call.numbers | {i: _other(call.numbers[i]) for i in lifted})
        try:
            expected = run(others.with_numbers(call.tensors))
        except Exception:
            return True  # the model does not take the other numbers
        tensors = [
            torch.as_tensor(others.numbers[i]).to(tensor) if i in lifted else tensor
            for i, tensor in enumerate(call.tensors)
        ]
        return alike(others.with_numbers(tensors, lifted), expected)

    first = run(call.with_numbers(call.tensors))
    lifted = frozenset(call.numbers)
    if not lifted or accepts(lifted):
        return first, lifted
    found: frozenset[int] = frozenset()
    for i in lifted if len(lifted) > 1 else ():
        if accepts(found | {i}):
            found |= {i}
    return first, found


def _other(number: float) -> float:
    """Another number of the same type; from 0 to 1 if the first one is a float from there."""
    if isinstance(number, float):
        return number / 2 + 0.25 if number != 0.5 else 0.75
    return number + (-1 if number > 0 else 1)


@dataclass(frozen=True)
class _Recording:
    """The arguments of every recorded run of a call."""

    model: nn.Module
    call: Call
    fake_mode: FakeTensorMode
    state: State
    is_fake: bool


def _trace_lifted(recording: _Recording, lifted: frozenset[int]) -> Program:
    """Record with the numbers `lifted` as tensors, or with the subset of them that can be recorded."""
    try:
        return _trace(recording, lifted)
    except TooManyOperatorsError:
        raise
    except CaptureError:
        if not lifted:
            raise
    program, found = _trace(recording, frozenset()), frozenset[int]()  # raises if the numbers are not the reason
    for i in lifted if len(lifted) > 1 else ():
        with suppress(CaptureError):
            program, found = _trace(recording, found | {i}), found | {i}
    return program


@collection_paused()
def _trace(recording: _Recording, lifted: frozenset[int]) -> Program:
    program, routing, routed = _record(recording, lifted)
    for empty in (0, 1) if routing.questions else ():
        expected = routed(empty)
        found, _, _ = _record(recording, lifted, empty)
        if not alike(found, expected):
            raise CaptureError(
                f"the model asks at {routing.questions[empty]} whether an activation selects any rows, and does "
                "something else where it does not; keep all rows and use torch.where, or pass the decision in"
            )
    return program


def _record(
    recording: _Recording, lifted: frozenset[int], empty: int | None = None
) -> tuple[Program, Routing, Callable[[int | None], Program]]:
    """Run and record the model: the program, the questions about rows, and a function that returns the program in which
    every even or odd question is answered "no rows"."""
    model, call = recording.model, recording.call
    most = None if call.method is None else call.method.most
    recorder = Recorder(recording.fake_mode, call.modules() | names_of(model), most)
    reader = Reader(recorder)
    recorder.read = reader
    recorder.routing = routing = Routing(recorder, reader, empty)
    inputs, output, copies, arguments, changes = _run(recording, recorder, reader, routing, lifted)
    left = outputs_of(changes, recorder, reader, not recording.is_fake)
    del changes
    noted, entries = arguments.changes()
    noted, entries = noted + [change for change, _ in left], entries + [new for _, new in left]
    leaves, spec = arguments.flatten(output, entries)
    refuse_stand_ins(leaves)
    memory = {m for write in recorder.writes for m in memory_of(write.meta["val"])}
    written = [i for i, n in enumerate(inputs) if i not in call.numbers and memory & set(memory_of(n.meta["val"]))]
    results = [recorder.node(recorder.fake(leaf)) for leaf in leaves if isinstance(leaf, Tensor)]
    shared = shared_among([node.meta["val"] for node in results])
    results += [inputs[i] for i in written]
    out_leaves = tuple(... if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    del output, copies, arguments, left, entries, leaves
    refuse_survivors(recorder)
    guards = list(reader.guards)
    given = call.numbers.keys() - lifted
    guards += [_number_guard(str(inputs[i].target), call.paths[i], call.tensors[i]) for i in sorted(given)]
    routing.check()
    functional, results = functionalize(recorder, results)
    names_of_inputs = [str(n.target) for n in inputs]

    def routed(empty: int | None) -> Program:
        final, outputs = resolve(functional, results, empty)
        program = _program(final, outputs, names_of_inputs, call, spec, out_leaves, tuple(guards))
        return replace(program, written=tuple(written), changes=tuple(noted), shared=shared)

    return routed(None), routing, routed


def _run(recording: _Recording, recorder: Recorder, reader: Reader, routing: Routing, lifted: frozenset[int]) -> Any:
    """Run the model on fake tensors and undo its changes of Python state.

    Returns the input nodes, the output, the arguments before and after, and the changes.
    """
    model, call, state = recording.model, recording.call, recording.state
    fakes = [recorder.add_input(tensor, path) for tensor, path in zip(call.tensors, call.paths, strict=True)]
    inputs = [recorder.node(fake) for fake in fakes]
    device = next((t.device.type for t in (*model.parameters(), *call.tensors) if t.ndim), "cpu")
    watch = Watch()
    copies = call.rebuild(call.with_numbers(fakes, lifted), watch)
    arguments = Arguments(call, copies)
    try:
        with ExitStack() as stack:
            stack.enter_context(_compiling())
            stack.enter_context(_module_paths(model, recorder))
            stack.enter_context(torch._C._AutoDispatchBelowAutograd())
            stack.enter_context(Intercepts(recorder, reader, routing, device))
            stack.enter_context(recorder)
            if recording.is_fake:
                stack.enter_context(Executed(state.begins))
            stack.enter_context(watch)
            output = call.run(model, copies)
    except Exception as error:
        state.undo()
        release_survivors(recorder)
        if isinstance(error, CaptureError):
            raise
        raise CaptureError(
            f"the model cannot be captured: {type(error).__name__} at {raised_line(error)}: {error}"
        ) from error
    return inputs, output, copies, arguments, state.undo()


def _program(
    recorder: Recorder,
    results: list[fx.Node],
    inputs: list[str],
    call: Call,
    spec: Any,
    leaves: tuple[Any, ...],
    guards: tuple[Guard, ...],
) -> Program:
    """Build the program: weights, constants and inputs first, without dead code."""
    old = recorder.graph
    live = set(results)
    for node in reversed(old.nodes):
        if node in live:
            live.update(node.all_input_nodes)
    order = {"weight": 0, "constant": 1, "fresh": 1, "input": 2}
    by_name = {str(node.target): node for node in recorder.origins}
    placeholders = [n for n in recorder.origins if n in live and recorder.origins[n].kind != "input"]
    placeholders = sorted(placeholders, key=lambda n: order[recorder.origins[n].kind]) + [
        by_name[name] for name in inputs
    ]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in [*placeholders, *(n for n in old.nodes if n.op == "call_function" and n in live)]:
        copies[node] = append_copy(graph, node, copies.__getitem__)
        if node.op == "placeholder":
            copies[node].name = str(node.target)
    graph.output(tuple(copies[node] for node in results))
    origins = {str(n.target): recorder.origins[n] for n in placeholders}
    weights = {name: origin.name for name, origin in origins.items() if origin.kind == "weight"}
    fakes = {str(n.target): n.meta["val"] for n in placeholders}
    constants = {
        name: fakes[name] if origin.real is None else origin.real
        for name, origin in origins.items()
        if origin.kind in ("constant", "fresh")
    }
    attributes = {name: origin.name for name, origin in origins.items() if origin.kind == "constant" and origin.name}
    versions = {name: version(constants[name]) for name, origin in origins.items() if origin.kind == "constant"}
    return Program(
        graph, weights, constants, tuple(inputs), call.paths, spec, leaves,
        guards=guards, attributes=attributes, versions=versions,
    )  # fmt: skip


def _number_guard(placeholder: str, path: str, value: Tensor) -> Guard:
    """Guard a number that was recorded as a Python number: the program holds for this value only."""
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ops.aten._local_scalar_dense.default, (graph.placeholder(placeholder),)))
    return Guard(path, value.item(), "the call: the model does not take a tensor there", graph)


@contextmanager
def _module_paths(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Set `recorder.path` to the module that runs, by torch's global hooks. The model's own hooks stay unchanged."""
    paths = {id(module): name for name, module in model.named_modules()}
    stack: list[str] = []

    def enter(module: nn.Module, args: Any) -> None:
        if id(module) in paths:
            stack.append(recorder.path)
            recorder.path = paths[id(module)]
            recorder.runs.enter(recorder.path, stack)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in paths and stack:
            recorder.path = stack.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _compiling() -> Iterator[None]:
    """Make `torch.compiler.is_compiling()` true, because models then skip checks of values."""
    flags = [name for name in ("_is_compiling_flag", "_is_exporting_flag") if hasattr(torch.compiler, name)]
    before = {name: getattr(torch.compiler, name) for name in flags}
    for name in flags:
        setattr(torch.compiler, name, True)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(torch.compiler, name, value)


@contextmanager
def _autocast_cache_off() -> Iterator[None]:
    """Switch autocast's cache off: it would keep fake weights for the user's next call."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
        torch.clear_autocast_cache()
