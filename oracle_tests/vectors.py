"""Test vectors: cases with expected values in files that any language can read, safetensors and JSON.

A vector is one call of one function: arguments, and what some part of its result has to be. It is taken from a law, and only
where two things hold, which are found by running the law on the reference and on a wrong implementation beside it: the
arguments and the expected value do not depend on what the implementation returned. What is compared is a part of the result
itself or, where that is free up to a rotation or signs, one of its two Gram matrices.
"""

import ast
import contextlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from .arrays import one_thread, round_to
from .contract import contract
from .files import write_atomically
from .law import Comparison, Law, laws_of, measuring, new_ledger
from .loading import Implementation, load
from .mistakes import mistakes_of, wrong
from .mutation import reach
from .running import collect_cases

SCHEMA = 1
CASES = 8
LARGEST = 10_000  # entries of an argument: what is larger stands for its shape, and would make the files many times as large
DTYPE = "float32"  # arguments are rounded to it, so that an implementation of either precision receives the same numbers
OBSERVABLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "itself": lambda part: part,
    "transpose times itself": lambda part: part.T @ part,
    "itself times transpose": lambda part: part @ part.T,
}


class Call(NamedTuple):
    """One call of an implementation and the parts of its result by name."""

    function: str
    arguments: dict[str, Any]
    parts: dict[str, Any]


class Vector(NamedTuple):
    """One call and what a part of its result has to be, to within `tolerance` times eps of the precision."""

    law: str
    function: str
    arguments: dict[str, Any]
    part: str
    compare: str
    expected: np.ndarray
    tolerance: np.ndarray


def vectors_of(paper: str) -> list[Vector]:
    """The vectors of a paper, from the first cases of each law; the same ones every time."""
    right = load(f"loracle.reference.{paper}", paper=paper)
    return [v for law in laws_of(paper) if not law.is_theorem for v in _vectors(law, right, load(_disturbed(right), paper=paper))]


def _vectors(law: Law, right: Implementation, disturbed: Implementation) -> list[Vector]:
    found: list[Vector] = []
    for case in collect_cases(law, min(CASES, law.examples or CASES)):
        rounded = type(case)(*(round_to(v, DTYPE) if isinstance(v, np.ndarray) else v for v in case))
        calls, comparisons = _record(law, right, rounded)
        other_calls, other_comparisons = _record(law, disturbed, rounded)
        for comparison, other in zip(comparisons, other_comparisons, strict=False):
            if comparison.tolerance is not None and np.array_equal(comparison.want, other.want):
                for call, other_call in zip(calls, other_calls, strict=False):
                    if _same(call.arguments, other_call.arguments):
                        found += _matching(law, call, comparison)
    return found


def _matching(law: Law, call: Call, comparison: Comparison) -> list[Vector]:
    """The vector of this call, if what was compared is one of the observables of a part of its result."""
    assert comparison.tolerance is not None
    arrays = _flat(call.arguments).values()
    exists = all(v.size <= LARGEST and np.array_equal(v, round_to(v, DTYPE)) for v in arrays)
    if not exists or any(callable(v) for v in call.arguments.values()):
        return []
    for name, observe in OBSERVABLES.items():
        for part, value in call.parts.items():
            seen = comparison.got is value if name == "itself" else np.ndim(value) == 2 and np.array_equal(observe(value), comparison.got)
            if seen:
                tolerance = np.broadcast_to(comparison.tolerance, comparison.want.shape)
                return [Vector(law.id, call.function, call.arguments, part, name, comparison.want, tolerance)]
    return []


def _record(law: Law, impl: Implementation, case: Any) -> tuple[list[Call], list[Comparison]]:
    """The calls that a law makes on a case and the comparisons that it draws, whatever the implementation returns."""
    calls: list[Call] = []

    def called(function: str) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            result = impl.call(function, **arguments)
            spec = impl.contract[function]
            calls.append(
                Call(function, arguments, dict(zip([p.name for p in spec.returns], result if spec.result else [result], strict=True)))
            )
            return result

        return call

    ledger = new_ledger(law, impl)
    ledger.kept = []
    # A disturbed implementation may break the law's own arithmetic; what was kept before stands
    with measuring(ledger), contextlib.suppress(Exception):
        law.body(SimpleNamespace(**{name: called(name) for name in impl.contract}), case)
    return calls, ledger.kept


def _disturbed(right: Implementation) -> SimpleNamespace:
    """An implementation whose every result is off: what a law expects must not move with it."""

    def off(value: Any) -> Any:
        if isinstance(value, tuple):
            return type(value)(*map(off, value))
        if isinstance(value, float) or getattr(value, "is_floating_point", bool)():
            return 1.375 * value + 0.0625
        return value.logical_not() if hasattr(value, "logical_not") else value + 1

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda **arguments: off(function(**arguments))

    return SimpleNamespace(**{name: wrapped(getattr(right.namespace, name)) for name in contract(right.paper)})


def _flat(arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays among arguments by name; those of a pair or a list are numbered, "indices.0"."""
    pairs = [(k, v) if isinstance(v, np.ndarray) else (f"{k}.{i}", w) for k, v in arguments.items() for i, w in _members(v)]
    return {name: value for name, value in pairs if isinstance(value, np.ndarray)}


def _members(value: Any) -> list[tuple[int, Any]]:
    return list(enumerate(value)) if isinstance(value, tuple | list) else [(0, value)]


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    arrays, others = _flat(one), _flat(other)
    if one.keys() != other.keys() or arrays.keys() != others.keys():
        return False
    return all(np.array_equal(arrays[k], others[k]) for k in arrays) and _numbers(one) == _numbers(other)


def _numbers(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that hold no array and can be written as JSON; not the seed, since any will do."""
    return {k: v for k, v in arguments.items() if k != "generator" and (v is None or isinstance(v, int | float | str))}


def _is_off(vector: Vector, impl: Implementation) -> bool:
    """Whether an implementation gives another value than the vector expects, in float64."""
    try:
        result = impl.call(vector.function, **vector.arguments)
        value = result if vector.part == "result" else getattr(result, vector.part)
        error = np.abs(OBSERVABLES[vector.compare](np.asarray(value, float)) - vector.expected)
        return bool(np.any(error > vector.tolerance * impl.eps))
    except Exception:
        return True


def export(paper: str, folder: Path) -> Path:
    """Write `PAPER.safetensors` and `PAPER.json` into `folder`, each atomically; returns the manifest's path.

    Tensors are named "INDEX.argument.NAME" ("INDEX.argument.NAME.0" for the members of a pair), "INDEX.expected" and
    "INDEX.tolerance". The manifest has the schema version and for each vector its law, function, arguments that are numbers,
    what to compare, and the mistakes that it kills.
    """
    with one_thread():
        vectors = vectors_of(paper)
        kills = _kills(paper, vectors)
    says = {law.id: law.says for law in laws_of(paper)}
    tensors: dict[str, np.ndarray] = {}
    for index, vector in enumerate(vectors):
        tensors |= {f"{index}.argument.{k}": np.ascontiguousarray(v) for k, v in _flat(vector.arguments).items()}
        tensors |= {f"{index}.{k}": np.array(v, order="C") for k, v in (("expected", vector.expected), ("tolerance", vector.tolerance))}
    manifest = {
        "schema": SCHEMA,
        "paper": paper,
        "tensors": f"{paper}.safetensors",
        "how": "call `function` with the arrays and numbers, take `part` of its result, form what `compare` says, and compare it with "
        "the tensor `expected`: no entry may be off by more than `tolerance` times eps, 2^-52 in float64 and 2^-23 in float32; "
        "where a function draws, any seed will do",
        "compare": list(OBSERVABLES),
        "vectors": [
            {
                "index": index,
                "law": vector.law,
                "says": says[vector.law],
                "function": vector.function,
                "arrays": sorted(_flat(vector.arguments)),
                "numbers": _numbers(vector.arguments),
                "part": vector.part,
                "compare": vector.compare,
                "kills": kills[index],
            }
            for index, vector in enumerate(vectors)
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{paper}.safetensors", save(tensors))
    write_atomically(folder / f"{paper}.json", (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode())
    return folder / f"{paper}.json"


def _kills(paper: str, vectors: list[Vector]) -> list[list[str]]:
    """For each vector the mistakes that give another value; only those that its function can reach are tried."""
    reaches = reach(ast.parse(inspect.getsource(load(f"loracle.reference.{paper}", paper=paper).namespace)))
    killed: list[list[str]] = [[] for _ in vectors]
    for mistake in mistakes_of(paper):
        if not mistake.harmless:
            impl = load(wrong(mistake), paper=paper)
            for vector, names in zip(vectors, killed, strict=True):
                if reaches[vector.function] & mistake.functions.keys() and _is_off(vector, impl):
                    names.append(mistake.name)
    return killed
