"""Which known mistake a failing implementation makes: its functions are compared with those of every mistake of the paper.

This runs apart from shrinking, since on the smallest inputs many mistakes coincide with the truth or with each other: on
eight fixed generic cases (out != in, rank >= 2, scaling none of 0, 1, 2, rank; separated spectra; several positions).

- What is compared is a *probe*: one function with some of its options, and of the functions and options of a paper only
  those that the failing law looks at, so that a second mistake elsewhere does not hide the first.
- What a probe gives are *observables*: by default the parts of the result, else what `OBSERVABLES` of `mistakes/SLUG.py`
  makes of it, such as products that do not depend on a free sign. Where two seeds give the reference different values,
  statistics over seeds take the place of the value. An error and a broken contract are observables too.
- A mistake is named if it agrees in all observables of all cases, the truth does not, and no other mistake agrees; then
  the same up to one free factor for each observable. Several functions wrong at once are looked at one by one.
- Mistakes that these probes cannot tell apart are told apart by the other functions, if the implementation has them.
"""

import ast
import functools
import inspect
import math
import textwrap
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from types import CodeType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from .arrays import EPS, one_thread, random_states, restore_random_states, round_to
from .contract import Shape, contract
from .law import Law, laws_of
from .loading import ContractBroken, Implementation, MissingFunction, load
from .mistakes import Mistake, mistakes_of, observables_of, wrong
from .strategies import Matrices

TIME_LIMIT = 10.0  # seconds for the calls of the implementation in one diagnosis
COMPILING = 4  # times as many for JAX, which compiles anew for the shapes of each case
SEEDS = 24
# Largest relative difference that is rounding: wide enough for another road to the same values, such as eigenvectors of G'G
ROUNDING = {"float64": 1e-9, "float32": 2e-5, "float16": 2e-2, "bfloat16": 5e-2}
# out, in, rank, leading dimensions, scaling: 2 rank < min(out, in), and the logarithms of the numbers are independent
SIZES = (
    (6, 9, 2, (3,), 1.75),
    (9, 7, 3, (5,), 0.375),
    (8, 11, 3, (4,), 2.5),
    (11, 6, 2, (2, 3), 1.25),
    (9, 12, 4, (6,), 0.625),
    (5, 8, 2, (7,), 3.5),
    (13, 10, 4, (3, 2), 1.5),
    (10, 14, 3, (5,), 0.75),
)


# Generic cases


class NoValue(Exception):
    """There is no generic value for a parameter: `OBSERVABLES.values` of the paper's mistakes should give one."""


class GenericCase:
    """Arguments for every function of a paper. The same name means the same value in every function of the case.

    But for a function whose mistakes show on other values alone: `OBSERVABLES.values` may have one for it, by "function.name".
    """

    def __init__(self, number: int, paper: str, dtype: str) -> None:
        out, in_, rank, lead, scaling = SIZES[number]
        self.number, self.dtype = number, dtype
        self.sizes: dict[str, int] = {"out": out, "in": in_, "rank": rank, "out_features": out, "in_features": in_, "small": min(out, in_)}
        self.lead = lead
        self.declared = observables_of(paper).values
        numbers = {"scaling": scaling, "p": (0.25, 0.375)[number % 2], "alpha": 5.5 + 3.25 * number, "gamma": 20.0 + 7 * (number % 3)}
        self.values: dict[str, Any] = {**numbers, "lr": 0.375 - 0.03125 * (number % 4), "weight_decay": 0.25 + 0.0625 * (number % 5)}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in (known := {**self.sizes, **self.values}):
            raise AttributeError(name)
        return known[name]

    def value(self, shape: Shape, function: str = "") -> Any:
        """The value of one parameter, in the precision of the implementation; `function` may have one of its own."""
        own = f"{function}.{shape.name}"
        name = own if own in self.declared else shape.name
        if name not in self.values:
            self.values[name] = self._make(shape, name)
        return self.values[name]

    def _make(self, shape: Shape, name: str) -> Any:
        if name in self.declared:
            declared = self.declared[name]
            return declared(self) if callable(declared) else declared
        if shape.name == "generator":
            return 1000 * (self.number + 1)
        if shape.dims is not None:
            return self._array(shape)
        if shape.name in self.sizes:
            return self.sizes[shape.name]
        if shape.dtype.startswith("float"):
            return 0.3125 + 0.0625 * (sum(shape.name.encode()) % 7 + self.number)
        if shape.dtype.startswith("bool"):
            return True
        raise NoValue(shape.name)

    def _array(self, shape: Shape) -> np.ndarray:
        """An array of the right shape; a matrix has singular values that are well apart."""
        assert shape.dims is not None
        matrices = Matrices(7919 * self.number + sum(i * c for i, c in enumerate(shape.name.encode(), 1)))
        names = shape.dims.split()
        unknown = [n for n in names if n != "..." and n not in self.sizes and not n.isdigit()]
        if unknown or shape.dtype not in ("Float", "Bool"):
            raise NoValue(shape.name)
        sides = [side for n in names for side in (self.lead if n == "..." else [self.sizes.get(n) or int(n)])]
        if shape.dtype == "Bool":
            return matrices.rng.random(sides) < 0.625
        if len(sides) == 2 and "..." not in names:
            values = (1 + sum(shape.name.encode()) % 5 / 4) * np.linspace(2, 1, min(sides)) ** 2
            return self.rounded(matrices.with_spectrum(sides[0], sides[1], values))
        return self.rounded(matrices(*sides))

    def rounded(self, array: np.ndarray) -> np.ndarray:
        """The array as an implementation of this precision receives it."""
        return round_to(array, self.dtype)


@functools.cache
def generic_cases(paper: str, dtype: str = "float64") -> tuple[GenericCase, ...]:
    """The eight cases, with arrays that exist in `dtype`."""
    return tuple(GenericCase(k, paper, dtype) for k in range(len(SIZES)))


# Probes


class Probe(NamedTuple):
    """One function called with some of its options; `choice` is one value of an option that is a word."""

    function: str
    options: tuple[str, ...] = ()
    choice: tuple[tuple[str, str | bool], ...] = ()


def probes_for(paper: str, needs: Iterable[str]) -> tuple[Probe, ...]:
    """The calls that show what the functions and options in `needs` do: each alone, with its options, with each choice."""
    choices, wanted = observables_of(paper).choices, dict[str, list[str]]()
    for need in needs:
        function, _, option = need.partition(".")
        known = contract(paper)[function].parameters
        wanted.setdefault(function, []).extend([option] if option in known and not known[option].required else [])
    probes: dict[Probe, None] = {}
    for function, options in wanted.items():
        plain = tuple(sorted({o for o in options if o not in choices and o != "generator"}))
        picks = [((o, value),) for o in options for value in choices.get(o, ())]
        probes |= dict.fromkeys([Probe(function), Probe(function, plain), *(Probe(function, plain, pick) for pick in picks)])
    return tuple(probes)


@functools.cache
def looked_at(law: Law) -> tuple[str, ...]:
    """The functions and options that a law looks at: those that it needs, and those that it names where it calls.

    `needs` alone does not do: it leaves out options that every implementation should have.
    """
    found: dict[str, None] = dict.fromkeys(law.needs)
    todo, seen = [law.body], list[Any]()
    while todo:
        seen.append(function := todo.pop())
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "impl":
                found |= dict.fromkeys([node.func.attr, *(f"{node.func.attr}.{k.arg}" for k in node.keywords if k.arg)])
        called = inspect.getclosurevars(function).globals.values()
        todo += [f for f in called if inspect.isfunction(f) and f.__module__ == law.body.__module__ and f not in seen]
    return tuple(need for need in found if need.partition(".")[0] in contract(law.paper))


@functools.cache
def _all_probes(paper: str) -> tuple[Probe, ...]:
    return tuple(dict.fromkeys(p for law in laws_of(paper) if law.needs for p in probes_for(paper, looked_at(law))))


def _called_needs(impl: Implementation, needs: Iterable[str]) -> list[str]:
    """The needs, with each derived function replaced by what it is derived from: there the mistake is."""
    found: list[str] = []
    for need in needs:
        function = need.partition(".")[0]
        given = callable(getattr(impl.namespace, function, None))
        found += [need] if given or function not in impl.derivations else _called_needs(impl, impl.derivations[function].needs)
    return found


# Observing


class Draws(NamedTuple):
    """What many draws of one quantity look like."""

    repeats: bool  # the same seed gives the same
    varies: bool  # another seed gives another
    zero: bool
    moments: np.ndarray  # see _moments
    noise: np.ndarray  # standard error of the moments


Value = np.ndarray | Draws | str
Observation = dict[str, Value]  # by name; an error is the one value of the name ERROR
ERROR = "error"


class Seen(NamedTuple):
    """What one probe gave on one case, and the eps of the narrowest dtype in which all its results exist."""

    values: Observation
    eps: float


class Observed:
    """What one probe of one implementation gives, case by case, called when asked for: most comparisons end with the first case."""

    def __init__(self, impl: Implementation, probe: Probe, dtype: str) -> None:
        self.impl, self.probe, self.cases = impl, probe, generic_cases(impl.paper, dtype)
        self.random = _random_names(impl.paper, dtype, probe)
        self.seen: dict[int, Seen] = {}

    def __getitem__(self, number: int) -> Seen:
        if number not in self.seen:
            self.impl.run(self._look, self.cases[number])
        return self.seen[number]

    def _look(self, impl: Implementation, case: GenericCase) -> None:
        widths: list[float] = []
        values = _observe_case(impl, self.probe, case, self.random, widths)
        self.seen[case.number] = Seen(values, min(widths, default=0.0))

    def all_cases(self) -> list[Observation]:
        """The observables of every case."""
        return [self[k].values for k in range(len(self.cases))]


@functools.cache
def _random_names(paper: str, dtype: str, probe: Probe) -> frozenset[str]:
    """The observables of the probe that the reference gives another value for another seed."""
    spec, found = contract(paper)[probe.function], set[str]()
    if "generator" not in spec.parameters:
        return frozenset()
    reference = _reference(paper)
    for case in generic_cases(paper, dtype):
        try:
            first, other = (_one_call(reference, probe, case, seed) for seed in (1, 2))
        except Exception:  # the reference refuses the generic arguments: see _truth
            return frozenset()
        found |= _unlike(first, other, dtype)
    return frozenset(found)


def observe(impl: Implementation, probe: Probe, dtype: str) -> Observed | None:
    """The observables of a probe on the generic cases; None where the implementation or the cases lack something."""
    observed = Observed(impl, probe, dtype)
    try:
        observed[0]
    except (MissingFunction, NoValue):
        return None
    return observed


def _observe_case(impl: Implementation, probe: Probe, case: GenericCase, random: frozenset[str], widths: list[float]) -> Observation:
    try:
        seed = case.value(Shape("generator", None, "int"))
        first = _one_call(impl, probe, case, seed, widths)
        if not impl.provides(f"{probe.function}.generator"):
            return dict(first)
        other = _one_call(impl, probe, case, seed + 1)
        if not (random or _unlike(first, other, case.dtype)):
            return dict(first)
        again, *more = (_one_call(impl, probe, case, seed + i) for i in (0, *range(2, SEEDS)))
        drawn = [first, other, *more]
        varying = random.union(*(_unlike(first, one, case.dtype) for one in drawn))
        return {name: _draws([d[name] for d in drawn], again[name]) if name in varying else value for name, value in first.items()}
    except (MissingFunction, NoValue):
        raise
    except ContractBroken as error:
        # Which global generator is changed depends on the library; the message names shapes and dtypes, which do not
        return {ERROR: str(error) if error.breach.kind == "result" else error.breach.kind}
    except Exception:
        return {ERROR: "raises"}


def _one_call(impl: Implementation, probe: Probe, case: GenericCase, seed: int, widths: list[float] | None = None) -> dict[str, np.ndarray]:
    """Call the probed function and make its result free of signs and rotations."""
    spec, chosen = impl.contract[probe.function], dict(probe.choice)
    names = [p.name for p in spec.parameters.values() if p.required or p.name in probe.options]
    arguments: dict[str, Any] = {name: case.value(spec.parameters[name], probe.function) for name in names} | chosen
    if impl.provides(f"{probe.function}.generator"):
        arguments["generator"] = seed
    result = impl.call(probe.function, **arguments)
    parts = dict(zip([p.name for p in spec.returns], result, strict=True)) if spec.result else {"result": result}
    if widths is not None:
        widths.extend(_narrowest(part) for part in parts.values() if isinstance(part, np.ndarray) and part.dtype.kind == "f" and part.any())
    known = observables_of(impl.paper).gauge_free
    gauge_free = next((known[n] for n in (*(f"{probe.function}.{o}" for o in probe.options), probe.function) if n in known), None)
    return {name: np.asarray(part) for name, part in (gauge_free(case, result) if gauge_free else parts).items()}


def _unlike(first: dict[str, np.ndarray], other: dict[str, np.ndarray], dtype: str) -> set[str]:
    """The names of what differs by more than rounding."""
    return {n for n in first if not _same(first[n], other[n], ROUNDING[dtype], up_to_scale=False)}


def _narrowest(array: np.ndarray) -> float:
    """The eps of the narrowest dtype that has all entries: a result that was computed in float32 and cast back shows it."""
    return next(EPS[d] for d in ("bfloat16", "float32", "float64") if np.array_equal(round_to(array, d), array))


def _draws(drawn: list[np.ndarray], again: np.ndarray) -> Draws:
    stack = np.stack(drawn).astype(float)
    varies = any(not np.array_equal(one, drawn[0]) for one in drawn)
    noise = np.abs(_moments(stack[::2]) - _moments(stack[1::2])) / 2
    return Draws(np.array_equal(again, drawn[0]), varies, not stack.any(), _moments(stack), noise)


def _moments(stack: np.ndarray) -> np.ndarray:
    """Size, mean, largest value, fourth moment, spread of the means of rows, columns and entries; all but the first relative."""
    size = math.sqrt(np.mean(stack**2))
    if size == 0:
        return np.zeros(7)
    unit = stack.reshape(len(stack), -1, stack.shape[-1] if stack.ndim > 1 else 1) / size
    centred = unit - unit.mean()
    rows, columns, places = (math.sqrt(np.mean(centred.mean(axis=axis) ** 2)) for axis in (2, 1, 0))
    return np.array([math.log(size), unit.mean(), np.abs(unit).max(), np.mean(unit**4), rows, columns, places])


# How far the moments of two samples may lie apart: on one case, and in the mean over the cases (or four standard errors)
ON_ONE_CASE = np.array([0.6, 0.5, 3.0, 6.0, 0.4, 0.4, 0.4])
ON_AVERAGE = np.array([0.05, 0.05, 0.4, 0.4, 0.06, 0.06, 0.03])


# Comparing


def agree(ours: Observed, theirs: Observed, truth: Observed, dtype: str, *, up_to_scale: bool = False) -> bool:
    """Whether two implementations give the same observables in every case."""
    pairs = []
    for k in range(len(SIZES)):
        a, b = ours[k].values, theirs[k].values
        tolerance = _tolerance(ours[k].eps, theirs[k].eps, truth[k].eps, dtype)
        if a.keys() != b.keys() or not all(_same(a[n], b[n], tolerance, up_to_scale) for n in a):
            return False
        pairs.append((a, b))
    return up_to_scale or _same_on_average(pairs)


def _tolerance(ours: float, theirs: float, truth: float, dtype: str) -> float:
    """Two that both compute in one narrower precision, which the reference does not, share its rounding errors only in size."""
    narrow = max(ours, EPS[dtype])
    both = narrow == max(theirs, EPS[dtype]) > max(truth, EPS[dtype])
    return max(ROUNDING[d] for d, eps in EPS.items() if d == dtype or (both and eps == narrow))


def _same(a: Value, b: Value, tolerance: float, up_to_scale: bool) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and _same_array(a.astype(float), b.astype(float), tolerance, up_to_scale)
    if isinstance(a, Draws) and isinstance(b, Draws):
        if a[:3] != b[:3]:
            return False
        apart = np.abs(a.moments - b.moments)
        # The moments of a single draw, repeated, tell nothing; the mean stays comparable when the size is free
        return not a.varies or bool(np.all(apart[1:2] <= ON_ONE_CASE[1:2]) if up_to_scale else np.all(apart <= ON_ONE_CASE))
    return isinstance(a, str) and isinstance(b, str) and a == b


def _same_array(a: np.ndarray, b: np.ndarray, tolerance: float, up_to_scale: bool) -> bool:
    if up_to_scale and a.size > 1 and np.vdot(a, b) > 0:
        b = b * (np.vdot(a, b) / np.vdot(b, b))
    # The generic values are of size 1: what is far below is the rounding of a zero
    return bool(np.abs(a - b).max(initial=0) <= tolerance * max(np.abs(a).max(initial=0), np.abs(b).max(initial=0), 0.1))


def _same_on_average(pairs: list[tuple[Observation, Observation]]) -> bool:
    """Whether draws agree in the mean over the cases, which is sharper than each case alone."""
    for name in pairs[0][0]:
        values = [(a[name], b[name]) for a, b in pairs if name in a]  # a case may give an error in its place
        drawn = [(a, b) for a, b in values if isinstance(a, Draws) and isinstance(b, Draws) and a.varies]
        if drawn:
            apart = np.mean([a.moments - b.moments for a, b in drawn], axis=0)
            error = np.sqrt(np.sum([a.noise**2 + b.noise**2 for a, b in drawn], axis=0)) / len(drawn)
            if np.any(np.abs(apart) > np.maximum(ON_AVERAGE, 4 * error)):
                return False
    return True


# The mistakes' side, computed once


@functools.cache
def _reference(paper: str) -> Implementation:
    return load(f"loracle.reference.{paper}", paper=paper)


@functools.cache
def _wrong(mistake: Mistake) -> Implementation:
    return load(wrong(mistake), paper=mistake.paper)


@functools.cache
def _truth(paper: str, probe: Probe, dtype: str) -> Observed | None:
    """What the reference gives; None if it refuses the generic arguments, which then tell nothing."""
    seen = observe(_reference(paper), probe, dtype)
    return seen if seen and not any(ERROR in values for values in seen.all_cases()) else None


@functools.cache
def _observed_mistake(mistake: Mistake, probe: Probe, dtype: str) -> Observed | None:
    """What a mistake gives; the reference's values where the probed function never calls one that the mistake replaces."""
    if not _reached(mistake.paper, probe.function) & mistake.functions.keys():
        return _truth(mistake.paper, probe, dtype)
    return observe(_wrong(mistake), probe, dtype)


@functools.cache
def _reached(paper: str, function: str) -> frozenset[str]:
    """The names that a function of the reference file uses, directly or through other functions of the file."""
    module, found, todo = _reference(paper).namespace, set[str](), [function]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            value = vars(module).get(name)
            todo += _names(value.__code__) if inspect.isfunction(value) else []
    return frozenset(found)


def _names(code: CodeType) -> list[str]:
    return [*code.co_names, *(n for inner in code.co_consts if isinstance(inner, CodeType) for n in _names(inner))]


@functools.cache
def _differs(mistake: Mistake, probe: Probe, dtype: str, up_to_scale: bool = False) -> bool:
    """Whether the probe can tell the mistake from the truth."""
    theirs, truth = _observed_mistake(mistake, probe, dtype), _truth(mistake.paper, probe, dtype)
    return (
        theirs is not truth and theirs is not None and truth is not None and not agree(theirs, truth, truth, dtype, up_to_scale=up_to_scale)
    )


# The verdict


@dataclass(frozen=True)
class Diagnosis:
    """The mistakes that explain a failure; several are twins that cannot be told apart. `note` says more, or says it instead."""

    candidates: tuple[Mistake, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        named = [f"{m.says.rstrip('.')} ({m.name})" for m in self.candidates]
        said = "one of: " + "; or ".join(named) if len(named) > 1 else named[0] if named else "no known mistake"
        return said + (f"; {self.note}" if self.note else "")


class _Patient:
    """What has been observed of one implementation, and which of its functions took too long: nobody waits for them twice."""

    def __init__(self) -> None:
        self.seen: dict[Probe, Observed | None] = {}
        self.diagnoses: dict[tuple[str, ...], Diagnosis] = {}
        self.too_slow: set[str] = set()


_patients: WeakKeyDictionary[Implementation, _Patient] = WeakKeyDictionary()


class TooSlow(Exception):
    """The implementation took too long."""


def diagnose(impl: Implementation, needs: Iterable[str] | None = None) -> Diagnosis:
    """Compare an implementation with the known mistakes of its paper.

    Args:
        impl: the implementation under test.
        needs: functions ("merge") and options ("forward.mask") to look at; default: all that the laws of the paper look at.

    Raises:
        TooSlow: its functions take longer than `TIME_LIMIT`.
    """
    patient = _patients.setdefault(impl, _Patient())
    wanted = tuple(_called_needs(impl, needs)) if needs is not None else ("",)
    if wanted not in patient.diagnoses:
        derived, states = set(impl.derived), random_states()
        probes = _all_probes(impl.paper) if needs is None else probes_for(impl.paper, wanted)
        with warnings.catch_warnings(), np.errstate(all="ignore"), one_thread():
            warnings.simplefilter("ignore")
            try:
                patient.diagnoses[wanted] = _Comparison(impl, patient).diagnose(probes)
            finally:  # there are mistakes that draw from the global generators
                impl.derived = derived
                restore_random_states(states)
    return patient.diagnoses[wanted]


class _Comparison:
    """One implementation against the mistakes of its paper."""

    def __init__(self, impl: Implementation, patient: _Patient) -> None:
        self.impl, self.patient, self.dtype = impl, patient, impl.dtype
        self.mistakes = [m for m in mistakes_of(impl.paper) if not m.harmless]
        self.right: dict[tuple[Probe, bool], bool] = {}  # which probes agree with the reference

    def diagnose(self, probes: tuple[Probe, ...]) -> Diagnosis:
        self._observe(probes)
        probes = tuple(p for p in probes if self._is_there(p))
        wrong_ones = [p for p in probes if not self._agrees(p, None)]
        if not probes:
            return Diagnosis(note="there is nothing to compare")
        if not wrong_ones:
            right = " and ".join(dict.fromkeys(p.function for p in probes))
            return Diagnosis(note=f"{right} did well on {len(SIZES)} generic inputs: see what is special about this one")
        if found := self._explain(probes):
            return Diagnosis(found)
        if found := self._explain(probes, up_to_scale=True):
            return Diagnosis(found, note="the size differs from that as well")
        functions = tuple(dict.fromkeys(p.function for p in wrong_ones))
        return self._one_by_one(probes, functions) if len(functions) > 1 else Diagnosis(note=self._size(wrong_ones))

    def _observe(self, probes: Iterable[Probe]) -> None:
        """Make the calls that have not been made yet, within the time limit."""
        from .running import LawTimeout, limited  # running needs this module, through explain

        todo = [p for p in probes if p not in self.patient.seen and _truth(self.impl.paper, p, self.dtype) is not None]
        current = None
        try:
            with limited(TIME_LIMIT * (COMPILING if self.impl.arrays == "jax" else 1)):
                for current in todo:
                    if current.function in self.patient.too_slow:
                        raise LawTimeout
                    if seen := observe(self.impl, current, self.dtype):
                        seen.all_cases()
                    self.patient.seen[current] = seen
        except LawTimeout:
            assert current is not None
            self.patient.too_slow.add(current.function)
            raise TooSlow(f"{current.function} takes too long") from None

    def _is_there(self, probe: Probe) -> bool:
        """Whether the implementation can do this; a word that an option refuses in every case is one that it does not know."""
        ours = self._ours(probe)
        return ours is not None and not (probe.choice and all(values.get(ERROR) == "raises" for values in ours.all_cases()))

    def _ours(self, probe: Probe) -> Observed | None:
        return self.patient.seen.get(probe)

    def _agrees(self, probe: Probe, mistake: Mistake | None, up_to_scale: bool = False) -> bool:
        """Whether the implementation does on this probe what a mistake (None: the reference) does."""
        ours, truth = self._ours(probe), _truth(self.impl.paper, probe, self.dtype)
        theirs = truth if mistake is None else _observed_mistake(mistake, probe, self.dtype)
        if ours is None or theirs is None or truth is None:
            return False
        if theirs is truth:  # asked again for every mistake of other functions
            key = (probe, up_to_scale)
            if key not in self.right:
                self.right[key] = agree(ours, truth, truth, self.dtype, up_to_scale=up_to_scale)
            return self.right[key]
        return agree(ours, theirs, truth, self.dtype, up_to_scale=up_to_scale)

    def _explain(self, probes: Iterable[Probe], up_to_scale: bool = False) -> tuple[Mistake, ...]:
        """The mistakes that agree with the implementation in every probe, and differ from the truth in one."""
        # What is wrong first, where most mistakes drop out, and what is drawn many times last
        ordered = sorted(probes, key=lambda p: (self._agrees(p, None), bool(_random_names(self.impl.paper, self.dtype, p))))
        found = []
        for mistake in self.mistakes:
            if all(self._explains(mistake, p, up_to_scale) for p in ordered):
                # Both agree with ours: if neither differs from the truth, the mistake explains nothing
                found += [mistake] if any(_differs(mistake, p, self.dtype, up_to_scale) for p in ordered) else []
        return self._narrowed(found) if len(found) > 1 else tuple(found)

    def _explains(self, mistake: Mistake, probe: Probe, up_to_scale: bool) -> bool:
        """Whether the implementation does what the mistake does; the size is free only in what the mistake is about."""
        if self._agrees(probe, mistake):
            return True
        return up_to_scale and self._agrees(probe, mistake, True) and _differs(mistake, probe, self.dtype, True)

    def _narrowed(self, found: list[Mistake]) -> tuple[Mistake, ...]:
        """Of mistakes that agree in what the law needs, those that agree best in all other functions."""
        telling = [p for p in _all_probes(self.impl.paper) if any(_differs(m, p, self.dtype) for m in found)]
        try:
            self._observe(telling)
        except TooSlow:
            return tuple(found)
        agreeing = {m.name: sum(self._agrees(p, m) for p in telling) for m in found}
        return tuple(m for m in found if agreeing[m.name] == max(agreeing.values()))

    def _one_by_one(self, probes: tuple[Probe, ...], functions: tuple[str, ...]) -> Diagnosis:
        """Several functions are wrong, and no mistake explains them all: look at each alone."""
        said = []
        for function in functions:
            own = [p for p in probes if p.function == function]
            found = self._explain(own)
            said.append(f"{function}: {Diagnosis(found, note='' if found else self._size(own))}")
        return Diagnosis(note="more than one is wrong: " + "; ".join(said))

    def _size(self, probes: Iterable[Probe]) -> str:
        """What can be said of a function that is right but for a factor: the factor, as a law in the numbers that it takes."""
        for probe in probes:
            ours, truth = self._ours(probe), _truth(self.impl.paper, probe, self.dtype)
            if ours is None or truth is None or self._agrees(probe, None):
                continue
            for name in truth[0].values:
                if factors := _factors(ours, truth, name, ROUNDING[self.dtype]):
                    law = _factor_law(self.impl, probe, factors, ROUNDING[self.dtype])
                    part = probe.function if name == "result" else f"{name} of {probe.function}"
                    return f"{part} is the right one times {law}"
        return ""


def _factors(ours: Observed, truth: Observed, name: str, tolerance: float) -> list[float]:
    """By which positive factor ours is the truth in each case; empty if it is not in one, or is the truth in all."""
    factors = []
    for mine, right in zip(ours.all_cases(), truth.all_cases(), strict=True):
        a, b = mine.get(name), right[name]
        if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray) or a.shape != b.shape or np.vdot(a, b) <= 0:
            return []
        a, b = a.astype(float), b.astype(float)
        factors.append(float(np.vdot(a, b) / np.vdot(b, b)))
        if not _same_array(a, factors[-1] * b, tolerance, False):
            return []
    return factors if any(abs(f - 1) > 10 * tolerance for f in factors) else []


def _factor_law(impl: Implementation, probe: Probe, factors: list[float], tolerance: float) -> str:
    """ "scaling^2 rank^-1/2": powers of the numbers that the function takes, in quarters; else the range of the factor."""
    cases, spec = generic_cases(impl.paper, impl.dtype), impl.contract[probe.function]
    numbers = [n for n in spec.parameters if isinstance(cases[0].values.get(n), float)]
    sides = ["out", "in", "rank"] if any(p.dims for p in spec.parameters.values()) else ["rank"]
    names = [*sides, *numbers]
    logs = np.array([[math.log(getattr(case, n)) for n in names] + [1.0] for case in cases])
    if len(names) + 1 < len(cases):
        powers, *_ = np.linalg.lstsq(logs, np.log(factors), rcond=None)
        quarters = np.round(4 * powers[:-1]) / 4
        rest = np.log(factors) - logs[:, :-1] @ quarters
        if np.ptp(rest) < 100 * tolerance:
            constant = math.exp(rest.mean())
            terms = [] if abs(constant - 1) < 100 * tolerance else [f"{constant:.6g}"]
            terms += [n if q == 1 else f"{n}^{_fraction(q)}" for n, q in zip(names, quarters, strict=True) if q]
            return " * ".join(terms)
    return f"a factor that depends on the input, {min(factors):.3g} to {max(factors):.3g}"


def _fraction(quarters: float) -> str:
    top, bottom = quarters.as_integer_ratio()
    return f"({top}/{bottom})" if bottom > 1 else f"({top})" if top < 0 else str(top)


def describe(impl: Implementation, law: Law) -> str:
    """The diagnosis as one line of text, whatever happens: a diagnosis that fails never makes the run fail."""
    try:
        return str(diagnose(impl, looked_at(law)))
    except Exception as error:
        return f"no diagnosis: {error if isinstance(error, TooSlow) else f'{type(error).__name__}: {error}'}".splitlines()[0]
