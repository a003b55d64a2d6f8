"""Plausible wrong implementations, each by name: what the oracle must kill, and what diagnosis compares a user's code with.

    @mistake("The merged weight lacks the scaling that the forward has.", replaces="merge", breaks=("lora.L2a",))
    def merge_without_scaling(W0, A, B, scaling):
        return W0 + B @ A

A mistake is the functions that differ from the reference. `wrong` puts them into a fresh copy of the reference module, so
that the module's own callers see them too.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


@dataclass(frozen=True, eq=False)
class Mistake:
    """One wrong implementation. `breaks`: laws that must fail; `harmless`: why none can, if so."""

    name: str
    paper: str
    says: str
    functions: Mapping[str, Callable[..., Any]]
    breaks: tuple[str, ...]
    harmless: str


@dataclass(frozen=True)
class Observables:
    """How diagnosis looks at a paper's functions; `OBSERVABLES` of the paper's file, where it differs from the default.

    choices: words that an option may be, beside its default ("distribution": ("gaussian",)); True and False for one that is on or off.
    values: for parameters that are neither floating-point arrays nor numbers (a closure, index sets), or are special: a value,
        or a function of the generic case that makes it; a case has the sizes `out`, `in`, `rank` and the values by name. The
        name of a function's parameter ("num_bases.W0") has its own where that function's mistakes show on no other.
    gauge_free: for functions whose result has a free sign or rotation: `(case, result)` to values without, by name; the name of
        an option ("init.indices") has its own where what is free depends on it.
    """

    choices: Mapping[str, tuple[str | bool, ...]] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    gauge_free: Mapping[str, Callable[[Any, Any], Mapping[str, Any]]] = field(default_factory=dict)


def mistake(
    says: str, *, replaces: str, breaks: tuple[str, ...] = (), also: Mapping[str, Callable[..., Any]] | None = None, harmless: str = ""
) -> Callable[[Callable[..., Any]], Mistake]:
    """Make a mistake of the function that stands in for the reference's `replaces`.

    Args:
        says: what is wrong, in one sentence that a user reads as "your code does this".
        replaces: name of the reference's function.
        breaks: ids of laws that must fail; at least one, unless the mistake is harmless.
        also: further functions that differ.
        harmless: why no law can tell the difference, for what looks like a mistake and is none.

    Raises:
        ValueError: it neither breaks a law nor says why it is harmless.
    """

    def decorate(function: Callable[..., Any]) -> Mistake:
        if bool(breaks) == bool(harmless):
            raise ValueError(f"{function.__name__}: name the laws that it breaks, or say why it is harmless")
        paper = function.__module__.rpartition(".")[2]
        return Mistake(function.__name__, paper, says, {replaces: function, **(also or {})}, breaks, harmless)

    return decorate


@functools.cache
def mistakes_of(paper: str) -> tuple[Mistake, ...]:
    """The mistakes of a paper, in the order of its file."""
    module = importlib.import_module(f"{__name__}.{paper}")
    return tuple(value for value in vars(module).values() if isinstance(value, Mistake))


@functools.cache
def observables_of(paper: str) -> Observables:
    """How diagnosis looks at the functions of a paper."""
    found: Observables = getattr(importlib.import_module(f"{__name__}.{paper}"), "OBSERVABLES", Observables())
    return found


def wrong(*mistakes: Mistake) -> ModuleType:
    """A fresh copy of the reference module in which the functions of these mistakes stand in for its own."""
    name = f"loracle.reference.{mistakes[0].paper}"
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for one in mistakes:
        vars(module).update(one.functions)
    module.__name__ = f"{name} with {' and '.join(m.name for m in mistakes)}"
    return module
