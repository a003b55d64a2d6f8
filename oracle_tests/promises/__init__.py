"""What the reference files promise beside their laws: an error for each unusable input, and how their modules behave.

A law must hold for any implementation. A promise is made by the docstrings of a reference file alone: that a wrong shape is
a ValueError which names the argument, that a layer drops nothing outside training. `promises/SLUG.py` holds those of a paper;
the errors for wrong shapes and dtypes are made here for every paper, from its contract.
"""

import functools
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..contract import Function, Shape, contract
from ..law import laws_of
from ..loading import Implementation
from ..running import collect_cases, replay

CASES = 10


@dataclass(frozen=True)
class Promise:
    """One sentence about some names of a reference module, and a function of the module that raises where it does not hold."""

    says: str
    of: tuple[str, ...]
    body: Callable[[Any], None]

    def check(self, module: Any) -> None:
        """Hold a module (the reference, or a mutant of it) to the promise, with the global generator seeded."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.body(module)


def promise(says: str, *, of: str | tuple[str, ...]) -> Callable[[Callable[[Any], None]], Promise]:
    """Make a promise about the names `of` from a function of the module that asserts it."""

    def decorate(body: Callable[[Any], None]) -> Promise:
        return Promise(says, (of,) if isinstance(of, str) else of, body)

    return decorate


@functools.cache
def promises_of(paper: str) -> tuple[Promise, ...]:
    """The paper's own promises, and the errors for wrong arguments that every paper promises."""
    own = _own(paper)
    listed = [value for value in vars(own).values() if isinstance(value, Promise)] if own else []
    return (*listed, *bad_inputs(paper, getattr(own, "FINITE", {})))


def namespaces_of(paper: str) -> dict[str, Callable[[Any], Any]]:
    """Further implementations in a reference module, by the name of their class: functions made of its layer, say."""
    return getattr(_own(paper), "NAMESPACES", {})


def _own(paper: str) -> ModuleType | None:
    name = f"{__name__}.{paper}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


# Wrong arguments


def bad_inputs(paper: str, finite: dict[str, tuple[str, ...]]) -> Iterator[Promise]:
    """For each function a good call, as a law makes it, with one argument spoiled at a time: a ValueError must name it.

    Args:
        paper: the slug.
        finite: the functions that read values, each with the parameters that must not hold NaN or infinity.
    """
    calls = recorded_calls(paper)
    for spec in contract(paper).values():
        for parameter in spec.parameters.values():
            # Where an array may be given by a name instead, a call with the array
            able = [
                c for c in calls.get(spec.name, []) if parameter.name in c and not (parameter.dims and isinstance(c[parameter.name], str))
            ]
            call = _richest(able)
            if call is not None:
                spoils = [*_spoils(spec, parameter, call), *_not_finite(parameter, call, finite.get(spec.name, ()))]
                for fault, value in spoils:
                    yield _refusal(spec.name, parameter.name, fault, {**call, parameter.name: value})


def refuses(function: Callable[..., Any], name: str, *args: Any, **arguments: Any) -> None:
    """Assert that the call is a ValueError whose message names `name`."""
    try:
        function(*args, **{k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()})
    except ValueError as error:
        message = str(error)
    else:
        raise AssertionError(f"accepts a wrong {name}")
    assert re.search(rf"\b{re.escape(name)}\b", message), f"the message does not name {name}: {message}"


def follows_the_global_generator(draw: Callable[[], Tensor]) -> bool:
    """Whether a draw is repeated by the same seed of torch's own generator, and changed by another."""
    draws = []
    for seed in (1, 1, 2):
        torch.default_generator.manual_seed(seed)
        draws.append(draw())
    return torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def _refusal(function: str, parameter: str, fault: str, arguments: dict[str, Any]) -> Promise:
    def body(module: Any) -> None:
        refuses(getattr(module, function), parameter, **arguments)

    return Promise(f"{function} refuses {parameter} {fault}", (function,), body)


def _spoils(spec: Function, parameter: Shape, call: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is wrong, and the wrong value, for one parameter of a good call."""
    value = call[parameter.name]
    if parameter.dims is None:
        if parameter.name == "rank":
            yield "of 0", 0
        if parameter.dtype == "str":
            yield "that is no choice", "nonsense"
        return
    others = [p for p in spec.parameters.values() if p.dims is not None and p is not parameter and isinstance(call.get(p.name), Tensor)]
    yield "of another kind of number", value.long() if parameter.dtype != "Int" else value.double()
    if parameter.dtype == "Float" and any(p.dtype == "Float" for p in others):
        yield "of another precision", value.float()
    shared = {d for p in others for d in (p.dims or "").split()}
    dims = parameter.dims.split()
    if "..." not in dims or "..." in shared:
        yield "with one more axis", value[None]
    for axis, dim in enumerate(reversed(dims), start=1):
        if dim in shared and dim != "...":
            yield f"with a longer {dim}", value.repeat_interleave(2, dim=-axis)


def _not_finite(parameter: Shape, call: dict[str, Any], finite: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    if parameter.name in finite:
        for number in (float("nan"), float("inf"), -float("inf")):
            value = call[parameter.name].clone(memory_format=torch.contiguous_format)
            value.view(-1)[-1] = number
            yield f"with an entry {number}", value


def _richest(calls: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The call with most arguments, and of these the one with most different sizes: there a wrong size shows."""

    def richness(call: dict[str, Any]) -> tuple[int, int]:
        sizes = {n for v in call.values() if isinstance(v, Tensor) for n in v.shape}
        return len(call), len(sizes)

    return max(calls, key=richness, default=None)


@functools.cache
def recorded_calls(paper: str) -> dict[str, list[dict[str, Any]]]:
    """The calls, by function, that the laws make of the reference file, with its own tensors."""
    module = importlib.import_module(f"loracle.reference.{paper}")
    calls: dict[str, list[dict[str, Any]]] = {}

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(**arguments: Any) -> Any:
            calls.setdefault(function.__name__, []).append(arguments)
            return function(**arguments)

        return call

    namespace = SimpleNamespace(**{name: recording(getattr(module, name)) for name in contract(paper)})
    impl = Implementation(namespace, paper=paper, name=paper)
    for law in laws_of(paper):
        if not law.is_theorem:
            replay(law, impl, collect_cases(law, min(CASES, law.examples or CASES)))
    return calls
