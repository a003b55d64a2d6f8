"""An implementation under test: found by name, held to the contract, and called by keyword only."""

import contextlib
import importlib
import importlib.util
import inspect
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import arrays as arr
from .contract import Function, Shape, UsageError, check_paper, contract, nearest

RECORD_KEYS = ("arrays", "dtype", "device", "generator", "tolerance")


@dataclass
class Breach:
    """One broken promise of the contract: which call, and the assertion (code over `result`) that it fails."""

    function: str
    arguments: dict[str, Any]
    kind: str  # "result", "printed", "generator", "changed", "exits"
    assertion: str

    def program(self, call: str) -> list[str]:
        """Lines that make the call and assert what it promised."""
        if self.kind == "printed":
            return ["with contextlib.redirect_stdout(io.StringIO()) as printed:", f"    {call}", "assert not printed.getvalue()"]
        if self.kind == "exits":
            return ["try:", f"    {call}", "except SystemExit:", f"    raise AssertionError('{self.function} calls sys.exit')"]
        if self.kind == "generator":
            state = {
                "torch": "torch.get_rng_state().tolist()",
                "torch.cuda": "torch.cuda.get_rng_state().tolist()",
                "random": "random.getstate()",
                "numpy.random": "str(np.random.get_state())",
            }[self.assertion]
            lines = [*([f"import {self.assertion}"] if self.assertion != "numpy.random" else []), f"before = {state}", call]
            return [*lines, f"assert {state} == before, 'the global generator of {self.assertion} changed'"]
        if self.kind == "changed":
            copied = f"np.array({self.assertion}.tolist())"
            return [f"before = {copied}", call, f"assert np.array_equal({copied}, before), '{self.assertion} was changed in place'"]
        return [f"result = {call}", self.assertion]


class ContractBroken(AssertionError):
    """The implementation was called rightly and broke the contract: wrong shape, dtype, NaN, a changed input, output, ..."""

    def __init__(self, message: str, breach: Breach) -> None:
        super().__init__(message)
        self.breach = breach


class MissingFunction(Exception):
    """The law needs a function or option that the implementation does not provide."""


class Derivation:
    """A function that mathematics gives from others, for implementations that lack it."""

    def __init__(self, name: str, needs: tuple[str, ...], compute: Callable[..., Any]) -> None:
        self.name, self.needs, self.compute = name, needs, compute


class Implementation:
    """The functions of one implementation of one paper; `impl.forward(x=..., ...)` calls one with NumPy arrays.

    Arguments become arrays of the implementation's library, dtype and device; results come back as NumPy float64, several
    of them as the reference's NamedTuple. Every call checks the contract and raises ContractBroken where it is broken.

    Args:
        namespace: module or object that has some of the paper's functions; its `LORACLE` record is read.
        paper: the slug.
        name: how reports call it.
        options: override the record: arrays, dtype, device, generator, tolerance.

    Raises:
        UsageError: it has none of the functions, a function has other parameter names, or an option is unknown.
    """

    def __init__(
        self, namespace: Any, *, paper: str, name: str, by_name: bool = False, derivations: tuple[Derivation, ...] = (), **options: Any
    ) -> None:
        self.namespace, self.paper, self.name = namespace, check_paper(paper), name
        self.by_name = by_name  # whether another process can load it by its name
        self.contract = contract(paper)
        record = _checked_record(name, getattr(namespace, "LORACLE", {}), {k: v for k, v in options.items() if v is not None})
        self.arrays: str = record.get("arrays", "torch")
        self.dtype: str = record.get("dtype", "float64")
        self.device: str = record.get("device", "cpu")
        self.generator: str = record.get("generator", self.arrays)
        self.tolerance_factor = float(record.get("tolerance", 1.0))
        self.eps = arr.EPS[self.dtype]
        self.derivations = {d.name: d for d in derivations}
        self.watching = False
        self.trusted = False  # whether a whole case has been watched call by call since this was last set
        self.derived: set[str] = set()  # what was derived since this set was last emptied
        self._functions = {n: f for n in self.contract if callable(f := getattr(namespace, n, None))}
        if not self._functions:
            has = [n for n in dir(namespace) if not n.startswith("_") and callable(getattr(namespace, n, None))]
            raise UsageError(
                f"{name} has none of the functions of {paper}: {', '.join(self.contract)}. It has: {', '.join(has) or 'nothing callable'}."
                f" Rename them, or write an adapter: loracle adapter {paper} > my_adapter.py"
            )
        self._options = {n: _accepted(name, self.contract[n], f) for n, f in self._functions.items()}
        self._try_arrays()

    def _try_arrays(self) -> None:
        """Make one array and one generator, so that a missing library or device is said once and not by every law."""
        try:
            with arr.precision(self.arrays, self.dtype):
                arr.to_arrays(np.zeros(1), self.arrays, self.dtype, self.device)
                arr.make_generator(0, self.generator, self.device)
        except Exception as error:
            said = (str(error).strip().splitlines() or [""])[0]
            hint = "" if self.device in (known := ("cpu", "cuda", "mps")) else nearest(self.device, known)
            raise UsageError(
                f"{self.name}: no {self.dtype} array of {self.arrays} can be made on device {self.device!r}{hint}"
                f" ({type(error).__name__}: {said})"
            ) from error
        if self.arrays != "torch" and self.device != "cpu":
            raise UsageError(f"{self.name}: device is {self.device!r}; it can be chosen for torch only, leave it out for {self.arrays}")

    def __getattr__(self, function: str) -> Callable[..., Any]:
        if function.startswith("_") or function not in self.contract:
            raise AttributeError(f"{function!r} is not in the contract of {self.paper}")
        return lambda **arguments: self.call(function, **arguments)

    def provides(self, need: str) -> bool:
        """Whether a function ("merge"), or one with an option ("forward.mask"), is there or can be derived."""
        function, _, option = need.partition(".")
        if function in self._functions:
            return not option or option in self._options[function]
        return not option and function in self.derivations and all(map(self.provides, self.derivations[function].needs))

    def call(self, function: str, **arguments: Any) -> Any:
        """Call a function by keyword, derive it where it is missing, and hold the result to the contract."""
        spec = self.contract[function]
        if function not in self._functions:
            if not self.provides(function):
                raise MissingFunction(function)
            self.derived.add(function)
            return self.derivations[function].compute(self, **arguments)
        for option in arguments.keys() - self._options[function]:
            raise MissingFunction(f"{function}.{option}")
        with arr.precision(self.arrays, self.dtype):
            given = {k: self._send(k, v) for k, v in arguments.items()}
            # A generator is meant to move; JAX's is an array
            before = {k: np.array(arr.to_numpy(v)) for k, v in given.items() if arr.is_array(v) and k != "generator"}
            with self._quiet(spec, arguments) if self.watching else contextlib.nullcontext():
                try:
                    result = self._functions[function](**given)
                except NotImplementedError as error:
                    raise MissingFunction(f"{function}: it raises NotImplementedError({str(error)!r})") from error
                except SystemExit as error:
                    raise ContractBroken(f"{function} calls sys.exit({error.code!r})", Breach(function, arguments, "exits", "")) from error
            for name, old in before.items():
                if not np.array_equal(arr.to_numpy(given[name]), old, equal_nan=True):
                    message = f"{spec.name} changed its argument {name} in place; return a new array"
                    raise ContractBroken(message, Breach(spec.name, arguments, "changed", name))
            return self._receive(spec, result, arguments)

    def _send(self, name: str, value: Any) -> Any:
        if name == "generator":
            return arr.make_generator(value, self.generator, self.device)
        if isinstance(value, list | tuple):
            return [self._send("", v) for v in value]
        if callable(value):  # a closure of the problem: it too speaks the implementation's arrays
            return lambda *args: self._send("", value(*(arr.to_numpy(a) if arr.is_array(a) else a for a in args)))
        return arr.to_arrays(value, self.arrays, self.dtype, self.device)

    def run(self, body: Callable[..., None], case: Any) -> None:
        """Run a law's body on a case; raise ContractBroken if a call in it prints or touches a global generator.

        Each call is watched in a law's first case only, which sees what is done just once. After that it is looked at once for
        the whole case, which costs a third of a call; if something is found, the case is run again from the same states of the
        generators (who seeds them a second time changes nothing) and each call watched, to tell which it was.
        """
        if not self.trusted:
            self._watch(body, case)
            self.trusted = True
            return
        arr.advance_random_states()
        states, printed = arr.random_states(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            body(self, case)
        if printed.getvalue() or any(state != states.get(name, state) for name, state in arr.random_states().items()):
            arr.restore_random_states(states)
            self._watch(body, case)

    def _watch(self, body: Callable[..., None], case: Any) -> None:
        self.watching = True
        try:
            body(self, case)
        finally:
            self.watching = False

    @contextlib.contextmanager
    def _quiet(self, spec: Function, arguments: dict[str, Any]) -> Iterator[None]:
        """Raise ContractBroken if the call inside prints or touches a global generator."""
        arr.advance_random_states()
        states, printed = arr.random_states(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield
        if printed.getvalue():
            message = f"{spec.name} printed {printed.getvalue()[:80]!r}; a function of the contract prints nothing"
            raise ContractBroken(message, Breach(spec.name, arguments, "printed", ""))
        for library, state in arr.random_states().items():
            if state != states.get(library, state):
                message = f"{spec.name} changed the global generator of {library}; seed nothing, draw from `generator`"
                raise ContractBroken(message, Breach(spec.name, arguments, "generator", library))

    def _receive(self, spec: Function, result: Any, arguments: dict[str, Any]) -> Any:
        """The result as NumPy, its parts in the contract's order, each of the right shape and dtype and finite."""
        sizes = _sizes(spec, arguments)
        if spec.result is None:
            return self._part(spec, spec.returns[0], result, sizes, arguments, "result")
        names = [part.name for part in spec.returns]
        keys: list[Any] = list(range(len(names)))
        if isinstance(result, Mapping):
            keys = names
            if set(names) - result.keys():
                message = f"{spec.name} returned a dict with keys {sorted(map(str, result))}; needed {names}"
                raise ContractBroken(
                    message, Breach(spec.name, arguments, "result", f"assert not isinstance(result, dict) or set(result) >= {set(names)!r}")
                )
        elif not isinstance(result, tuple | list) or len(result) != len(names):
            message = f"{spec.name} returned {_describe(result)}; needed ({', '.join(names)}) as a tuple, dict or NamedTuple"
            check = f"assert isinstance(result, (tuple, list)) and len(result) == {len(names)}"
            raise ContractBroken(message, Breach(spec.name, arguments, "result", check))
        parts = zip(spec.returns, keys, strict=True)
        return spec.result(*(self._part(spec, part, result[key], sizes, arguments, f"result[{key!r}]") for part, key in parts))

    def _part(self, spec: Function, part: Shape, value: Any, sizes: dict[str, Any], arguments: dict[str, Any], code: str) -> Any:
        """One part of a result; `code` is how a program gets at it."""
        where = spec.name if part.name == "result" else f"{part.name} of {spec.name}"

        def broken(message: str, assertion: str) -> ContractBroken:
            return ContractBroken(f"{where} {message}", Breach(spec.name, arguments, "result", f"assert {assertion}"))

        if part.dims is None:
            return _number(part.dtype, value, broken, code)
        dims = f"({', '.join(part.dims.split())})"
        if not arr.is_array(value):
            raise broken(f"is {_describe(value)}; needed an array {dims}", f"hasattr({code}, 'dtype')")
        needed = tuple(n for d in part.dims.split() for n in (sizes.get(d, (d,)) if d == "..." else (sizes.get(d, d),)))
        fits = len(needed) == len(value.shape) and all(n == g or isinstance(n, str) for n, g in zip(needed, value.shape, strict=True))
        if not fits:
            told = [f"{code}.shape[{i}] == {n}" for i, n in enumerate(needed) if not isinstance(n, str)]
            check = (
                f"tuple({code}.shape) == {needed!r}"
                if len(told) == len(needed)
                else " and ".join([f"len({code}.shape) == {len(needed)}", *told])
            )
            raise broken(f"has shape {tuple(value.shape)}; needed {dims} = {needed}", check)
        dtype = arr.dtype_name(value)
        if part.dtype == "Float" and dtype != self.dtype:
            message = f"has dtype {dtype} for arguments of dtype {self.dtype}; keep the arguments' dtype"
            raise broken(message, f"str({code}.dtype).removeprefix('torch.') == {self.dtype!r}")
        array = arr.to_numpy(value)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            raise broken(f"has {count} of {array.size} entries NaN or infinite", f"np.isfinite(np.array({code}.tolist())).all()")
        return array


def load(spec: Any, *, paper: str, **options: Any) -> Implementation:
    """The implementation that `spec` names: "package.module", "file.py", either with ":object", or an object itself.

    Raises:
        UsageError: it cannot be imported, or does not fit the contract.
    """
    from .law import laws_module

    derivations = tuple(v for v in vars(laws_module(check_paper(paper))).values() if isinstance(v, Derivation))
    if not isinstance(spec, str):
        name = getattr(spec, "__name__", type(spec).__name__)
        return Implementation(_namespace(spec), paper=paper, name=name, derivations=derivations, **options)
    place, _, attribute = spec.partition(":") if not Path(spec).exists() else (spec, "", "")
    namespace = _import(place)
    for part in attribute.split(".") if attribute else ():
        if not hasattr(namespace, part):
            raise UsageError(f"{place} has no {attribute!r}{nearest(part, dir(namespace))}")
        namespace = getattr(namespace, part)
    return Implementation(_namespace(namespace), paper=paper, name=spec, by_name=True, derivations=derivations, **options)


def _namespace(value: Any) -> Any:
    return SimpleNamespace(**value) if isinstance(value, Mapping) else value


def _import(place: str) -> Any:
    """Import a module by dotted name or by file, with the folder on the path that `python -m` or `python` would have there."""
    path = Path(place).resolve() if place.endswith(".py") else None
    if path is not None and not path.exists():
        raise UsageError(f"there is no file {place}")
    folder = str(path.parent if path is not None else Path.cwd())
    sys.path.insert(0, folder)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a module prints while it is imported is no part of a report
            return importlib.import_module(place) if path is None else _execute(path)
    except (Exception, SystemExit) as error:  # a script without a main guard may end by sys.exit
        hint = ""
        if isinstance(error, ModuleNotFoundError) and path is None and f"{place}.".startswith(f"{error.name}."):
            hint = "; give a dotted module name that python can import from this folder, or a path that ends in .py"
        raise UsageError(f"cannot import {place}: {type(error).__name__}: {error}{hint}") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _execute(path: Path) -> Any:
    """The module in a file, under a name that no installed module has: a user's file may well be called lora.py or random.py."""
    name = f"{path.stem} ({path.parent})"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _checked_record(name: str, record: Mapping[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The LORACLE record with the user's options over it, each key and value known."""
    merged = {**record, **options}
    for key in merged.keys() - set(RECORD_KEYS):
        raise UsageError(f"{name}: LORACLE has no key {key!r}{nearest(key, RECORD_KEYS)}; known: {', '.join(RECORD_KEYS)}")
    for key, known in (("arrays", arr.ARRAYS), ("dtype", tuple(arr.EPS)), ("generator", arr.GENERATORS)):
        if key in merged and merged[key] not in known:
            raise UsageError(f"{name}: {key} is {merged[key]!r}{nearest(str(merged[key]), known)}; needed one of {', '.join(known)}")
    if not 0 < float(merged.get("tolerance", 1)) <= 10:
        raise UsageError(
            f"{name}: tolerance is {merged['tolerance']!r}; it is a factor on every law's own tolerance, above 0 and at most 10"
        )
    if merged.get("arrays") == "numpy" and merged.get("dtype") == "bfloat16":
        raise UsageError(f"{name}: NumPy has no bfloat16; use float32 or float16")
    return merged


def _accepted(name: str, spec: Function, function: Callable[..., Any]) -> set[str]:
    """The contract's parameters that `function` takes by keyword; UsageError if it cannot be called after the contract."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a compiled function does not tell
        return set(spec.parameters)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return set(spec.parameters)
    by_keyword = {n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    lacks = [p.name for p in spec.parameters.values() if p.required and p.name not in by_keyword]
    extra = [n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and n not in spec.parameters]
    if lacks or extra:
        said = "; ".join(([f"lacks {', '.join(lacks)}"] if lacks else []) + ([f"asks for {', '.join(extra)}"] if extra else []))
        raise UsageError(
            f"{spec.name} of {name} {said}. It is called by keyword and should read\n    {spec}\nwhile it reads\n"
            f"    {spec.name}{inspect.signature(function)}"
        )
    return by_keyword & set(spec.parameters)


def _sizes(spec: Function, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The size of each named dimension, read from the arguments; "..." stands for a tuple of sizes."""
    sizes: dict[str, Any] = {}
    for name, value in arguments.items():
        dims = spec.parameters[name].dims
        if isinstance(value, int) and not isinstance(value, bool):
            sizes.setdefault(name, value)
        if dims is not None and isinstance(value, np.ndarray):
            names, shape = dims.split(), value.shape
            if names and names[0] == "...":
                lead = len(shape) - len(names) + 1
                sizes.setdefault("...", shape[:lead])
                names, shape = names[1:], shape[lead:]
            sizes.update(zip(names, shape, strict=True))
    return sizes


def _number(kind: str, value: Any, broken: Callable[[str, str], ContractBroken], code: str) -> Any:
    """A Python number from a number or an array of one entry; anything that is neither array nor number is passed on."""
    if kind not in ("float", "int", "bool"):
        return value
    if arr.is_array(value) and arr.to_numpy(value).size == 1:
        value = arr.to_numpy(value).item()
    if isinstance(value, bool) != (kind == "bool") or not isinstance(value, int | float):
        kinds = "b" if kind == "bool" else "iuf"
        raise broken(
            f"is {_describe(value)}; needed a number ({kind})", f"np.size({code}) == 1 and np.asarray({code}).dtype.kind in {kinds!r}"
        )
    if not np.isfinite(value) or (kind == "int" and value != int(value)):
        raise broken(
            f"is {value!r}; needed a finite {'whole ' if kind == 'int' else ''}number", f"np.isfinite({code}) and {code} == {kind}({code})"
        )
    return value


def _describe(value: Any) -> str:
    return "None (is the return statement missing?)" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"
