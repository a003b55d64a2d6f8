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
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Mistake:
    """One wrong implementation. `breaks`: laws that must fail; `harmless`: why none can, if so."""

    name: str
    paper: str
    says: str
    functions: Mapping[str, Callable[..., Any]]
    breaks: tuple[str, ...]
    harmless: str


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
