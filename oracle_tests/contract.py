"""The contract of a paper: the signatures of its reference file, read from that file."""

import functools
import importlib
import inspect
import pkgutil
from difflib import get_close_matches
from types import ModuleType
from typing import Any, NamedTuple, get_args, get_type_hints


class UsageError(Exception):
    """The user asked for something that cannot be done; the message says what came, what is needed, and the way out."""


class Shape(NamedTuple):
    """A named array (or number, where `dims` is None) that a function takes or returns."""

    name: str
    dims: str | None  # "out in", "... in"; None for what is no array
    dtype: str  # "Float", "Bool", "Int" for arrays; the type's name for numbers
    required: bool = True


class Function(NamedTuple):
    """One function of a paper's contract."""

    name: str
    parameters: dict[str, Shape]
    returns: tuple[Shape, ...]
    result: type | None  # the NamedTuple class, if several things come back
    signature: inspect.Signature
    doc: str

    def __str__(self) -> str:
        return f"{self.name}{describe_signature(self.signature)}"


def papers() -> list[str]:
    """The slugs of all papers that have a reference file and laws."""
    here = importlib.import_module("loracle.oracle_tests")
    reference = importlib.import_module("loracle.reference")
    with_laws = {m.name.removeprefix("test_") for m in pkgutil.iter_modules(here.__path__) if m.name.startswith("test_")}
    return sorted(m.name for m in pkgutil.iter_modules(reference.__path__) if m.name in with_laws)


def check_paper(slug: str) -> str:
    """`slug` itself if there is such a paper, else UsageError with the nearest name."""
    if slug not in papers():
        raise UsageError(f"there is no paper {slug!r}{nearest(slug, papers())}; known papers: {', '.join(papers())}")
    return slug


def nearest(word: str, known: Any) -> str:
    """ "; did you mean 'X'?" or nothing."""
    match = get_close_matches(word, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


@functools.cache
def contract(slug: str) -> dict[str, Function]:
    """The functions that an implementation of the paper may have, by name, in the reference file's order."""
    return read_contract(importlib.import_module(f"loracle.reference.{check_paper(slug)}"))


def read_contract(module: ModuleType) -> dict[str, Function]:
    """The public functions that `module` itself defines, as the contract reads them."""
    found = {}
    for name, function in vars(module).items():
        if inspect.isfunction(function) and not name.startswith("_") and function.__module__ == module.__name__:
            hints = get_type_hints(function)
            signature = inspect.signature(function)
            parameters = {p.name: _shape(p.name, hints[p.name], p.default is p.empty) for p in signature.parameters.values()}
            result = hints["return"]
            several = isinstance(result, type) and issubclass(result, tuple) and hasattr(result, "_fields")
            returns = tuple(_shape(k, v) for k, v in get_type_hints(result).items()) if several else (_shape("result", result),)
            found[name] = Function(name, parameters, returns, result if several else None, signature, inspect.getdoc(function) or "")
    return found


def _shape(name: str, annotation: Any, required: bool = True) -> Shape:
    """What a type annotation says: dimensions and dtype of a jaxtyping array, else the type's name."""
    for option in (annotation, *get_args(annotation)):
        if hasattr(option, "dim_str"):
            return Shape(name, option.dim_str.strip(), option.dtype.__name__, required)
    return Shape(name, None, getattr(annotation, "__name__", str(annotation)), required)


def describe_signature(signature: inspect.Signature) -> str:
    """A signature in which an array reads `W0 (out, in)`, for messages."""
    parts, star = [], False
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        shape = _shape(p.name, p.annotation)
        text = f"{p.name}: ({', '.join(shape.dims.split())})" if shape.dims is not None else f"{p.name}: {shape.dtype}"
        parts.append(text if p.default is p.empty else f"{text} = {p.default!r}")
    returns = signature.return_annotation
    shape = _shape("", returns)
    if shape.dims is not None:
        end = f"({', '.join(shape.dims.split())})"
    elif hasattr(returns, "_fields"):
        end = ", ".join(f"{f} ({', '.join(_shape(f, a).dims.split())})" for f, a in get_type_hints(returns).items())  # type: ignore[union-attr]
    else:
        end = shape.dtype
    return f"({', '.join(parts)}) -> {end}"
