"""Settings of the experiments: one TOML file per paper, read into frozen dataclasses. Needs no torch."""

import dataclasses
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

CONFIGS = Path(__file__).parent / "configs"

T = TypeVar("T")
Unknown = Literal["unknown"]


class ToyError(Exception):
    """Something that the user can mend; the message is all he needs, so no traceback is shown."""


class UsageError(ToyError):
    """A command, name or setting that does not exist or does not fit."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """A hint for a wrong name: the nearest valid one, and all of them."""
    known = sorted(choices)
    near = get_close_matches(name, known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(known) or 'none'}"


def convert(value: Any, kind: Any, where: str) -> Any:
    """`value`, as TOML or JSON gave it, as the type `kind`; `where` names it in errors.

    Kinds: bool, int, float (a whole number will do, NaN and infinity will not), str, None, `Literal`, unions,
    `tuple[X, ...]`, `dict[str, X]` and dataclasses of these, whose keys must all be there and no other.

    Raises:
        UsageError: the value does not have that type; the message names the key and the nearest valid one.
    """
    origin, args = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _convert_fields(value, kind, where)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(convert(item, args[0], f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: convert(item, args[1], f"{where}.{key}") for key, item in value.items()}
    if origin in (UnionType, Union):
        for choice in args:
            try:
                return convert(value, choice, where)
            except UsageError:
                continue
    if origin is Literal and value in args:
        return value
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind in (bool, int, str, NoneType) and type(value) is kind:
        return value
    raise UsageError(f"{where} is {value!r}; needed {_describe(kind)}")


def _convert_fields(value: Any, kind: type[T], where: str) -> T:
    """The dataclass `kind` from a table with exactly its keys."""
    if not isinstance(value, dict):
        raise UsageError(f"{where} is {value!r}; needed a table of keys")
    kinds = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in value:
        if key not in names:
            raise UsageError(f"{where} has no key {key!r}; {nearest(key, names)}")
    missing = [name for name in names if name not in value]
    if missing:
        raise UsageError(f"{where} lacks {', '.join(map(repr, missing))}")
    fields = {name: convert(value[name], kinds[name], f"{where}: {name}") for name in names}
    try:
        return kind(**fields)
    except ValueError as error:  # the dataclass's own check of its values
        raise UsageError(f"{where}: {error}") from error


def _describe(kind: Any) -> str:
    """A type in words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple:
        return f"a list of {_describe(args[0]).removeprefix('a ')}s"
    if origin is dict or dataclasses.is_dataclass(kind):
        return "a table of keys"
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (UnionType, Union):
        return " or ".join(map(_describe, args))
    return {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", NoneType: "nothing"}[kind]


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises UsageError, with the file's name, if it is missing, truncated or no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not whole, valid TOML: {error}") from error


def load_config(kind: type[T], slug: str, *, quick: bool = False, overrides: Sequence[str] = (), folder: Path = CONFIGS) -> T:
    """The settings of one experiment: table `[toy]` of `configs/SLUG.toml`, with `[quick]` laid over it if `quick`.

    `overrides` are texts `key=value` laid over both, as `--set` takes them; values are TOML, and the brackets of a list
    may be left out (`ranks=1,2`).

    Raises:
        UsageError: a file, key, type or value is wrong; the message names the file, the key and the nearest valid key.
    """
    path = folder / f"{slug}.toml"
    tables = read_toml(path)
    for table in tables:
        if table not in ("toy", "quick", "full"):
            raise UsageError(f"{path} has no table [{table}]; {nearest(table, ('toy', 'quick', 'full'))}")
    values = dict(_table(tables, "toy", path))
    config: T = convert(values, kind, f"{path} [toy]")
    if quick:
        values |= _table(tables, "quick", path)
        config = convert(values, kind, f"{path} [quick]")
    if overrides:
        config = convert(values | parse_overrides(overrides, kind), kind, "--set")
    return config


def _table(tables: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    table = tables.get(name)
    if not isinstance(table, dict):
        raise UsageError(f"{path} lacks the table [{name}]")
    return table


def parse_overrides(overrides: Sequence[str], kind: type) -> dict[str, Any]:
    """`key=value` texts as values of the types that TOML has."""
    kinds = get_type_hints(kind)
    values = {}
    for text in overrides:
        key, equals, value = (piece.strip() for piece in text.partition("="))
        if not equals:
            raise UsageError(f"--set {text!r} has no '='; write it as key=value")
        if get_origin(kinds.get(key)) is tuple and not value.startswith("["):
            value = f"[{value}]"
        try:
            values[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            values[key] = value  # a text without quotes; the type check decides whether a text will do
    return values


@dataclasses.dataclass(frozen=True)
class Aim:
    """One figure of a paper to aim at in a full-scale run."""

    benchmark: str
    method: str
    value: float
    from_memory: bool  # not checked against the paper's text


@dataclasses.dataclass(frozen=True)
class FullScale:
    """Table `[full]`: one full-scale run, and the paper's figures. "unknown" stands where the source does not say."""

    task: Literal["causal language model", "image classification"] | Unknown  # only the first can be run here
    model: str | Unknown
    data: str | Unknown  # a hub id or a JSONL file can be run, a description cannot
    samples: int | Literal["all"] | Unknown  # the first so many of these data
    target_modules: tuple[str, ...]
    rank: int | Unknown
    alpha: float | Unknown
    dropout: float | Unknown
    optimizer: str | Unknown
    lr: float | Unknown
    weight_decay: float | Unknown
    schedule: str | Unknown
    warmup_ratio: float | Unknown
    batch_size: int | Unknown
    epochs: float | Unknown
    sequence_length: int | Unknown
    precision: str | Unknown
    seeds: int | Unknown  # how many the paper's figures are means of; a run here has one
    options: dict[str, bool | int | float | str]  # of the method itself, such as gamma
    source: str
    from_memory: tuple[str, ...]  # keys of this table or of its options whose values were not checked against the paper's text
    aims: tuple[Aim, ...]

    def __post_init__(self) -> None:
        names = [*(field.name for field in dataclasses.fields(self)), *self.options]
        for name in self.from_memory:
            if name not in names:
                raise ValueError(f"from_memory names {name!r}; {nearest(name, names)}")


def load_full(slug: str, *, folder: Path = CONFIGS) -> FullScale:
    """Table `[full]` of `configs/SLUG.toml`. Raises UsageError as `load_config` does."""
    path = folder / f"{slug}.toml"
    return convert(_table(read_toml(path), "full", path), FullScale, f"{path} [full]")  # type: ignore[no-any-return]
