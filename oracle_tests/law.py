"""What a law is: a statement with an id, a sentence, a formula and a property-based test of any implementation.

A test file of a paper reads

    @law("lora.L13", says="...", formula=r"...", needs=("num_trainable",), tolerance=0, cases=layers())
    def test_parameter_count(impl, case):
        assert_close(impl.num_trainable(W0=case.W0, rank=case.rank), ..., size=0)

`cases` is a Hypothesis strategy of one NamedTuple; the body calls the implementation with NumPy arrays and compares with
values that it computes in NumPy by another road. A theorem check is the same without an implementation.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from .arrays import EPS, round_to


@dataclass(frozen=True)
class Law:
    """One statement. `needs` names functions ("merge") and options of functions ("forward.mask"); empty for a theorem."""

    id: str
    says: str
    formula: str
    needs: tuple[str, ...]
    tolerance: float
    cases: Any  # hypothesis.strategies.SearchStrategy of a NamedTuple
    body: Callable[..., None]
    examples: int | None = None  # at most so many cases: for laws that draw thousands of numbers in each

    @property
    def paper(self) -> str:
        return self.id.partition(".")[0]

    @property
    def is_theorem(self) -> bool:
        return not self.needs


@dataclass
class Ledger:
    """What the comparisons of one law found. `shift` moves every expected value by so many tolerances: a law must notice."""

    law: Law
    eps: float
    factor: float = 1.0
    shift: float = 0.0
    compared: int = 0
    too_coarse: int = 0
    worst: float = 0.0  # in tolerances
    ratios: list[float] = field(default_factory=list)
    kept: list["Comparison"] | None = None  # if a list, comparisons are kept there and none fails: for vectors


class Comparison(NamedTuple):
    """One call of `assert_close`. `tolerance` is to be multiplied by eps; None where a law gives an absolute one, for draws."""

    got: Any
    want: np.ndarray
    tolerance: np.ndarray | None
    what: str


class TooCoarse(Exception):
    """The tolerance exceeds a tenth of the compared quantity: this case tells nothing at this precision."""


_ledger: ContextVar[Ledger] = ContextVar("ledger")


def law(
    id: str, *, says: str, formula: str, needs: tuple[str, ...], tolerance: float, cases: Any, examples: int | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a law of a test body `(impl, case)`. Under pytest the result is a test with the fixture `impl`.

    Args:
        id: "slug.Lnumber", never reused.
        says: the law in one sentence.
        formula: the law in LaTeX.
        needs: functions and options without which the law reads "missing".
        tolerance: the constant c in c * eps * conditioning * size.
        cases: Hypothesis strategy of a NamedTuple of NumPy arrays and numbers.
        examples: at most so many cases, whatever the profile.
    """

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        record = Law(id, says, formula, needs, tolerance, cases, body, examples)

        def test(impl: Any) -> None:
            from .plugin import run_law

            run_law(record, impl)

        return _named(test, body, record)

    return decorate


def theorem(
    id: str, *, says: str, formula: str, tolerance: float, cases: Any, examples: int | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a theorem check of a body `(case)`: the mathematics itself, without an implementation. Arguments as for `law`."""

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        record = Law(id, says, formula, (), tolerance, cases, body, examples)

        def test() -> None:
            from .plugin import run_law

            run_law(record, None)

        return _named(test, body, record)

    return decorate


def _named(test: Callable[..., None], body: Callable[..., None], record: Law) -> Callable[..., None]:
    test.__name__, test.__qualname__, test.__module__ = body.__name__, body.__qualname__, body.__module__
    test.__doc__ = record.says
    test.law = record  # type: ignore[attr-defined]
    return test


def assert_close(got: Any, want: Any, *, size: Any = 1.0, conditioning: float = 1.0, within: Any = None, what: str = "the result") -> None:
    """Assert that `got` is `want` up to the law's tolerance, c * eps(dtype) * conditioning * size.

    Args:
        got: array or number from the implementation.
        want: expected array or number, from another road.
        size: what the rounding errors are relative to, a number or an array of the shape of `want`; 0 asks for equality.
        conditioning: by how much the problem magnifies errors of its inputs.
        within: an absolute tolerance in place of the computed one, for draws (a number of standard errors).
        what: how the message calls the compared quantity.

    Raises:
        AssertionError: with the worst entry, its error and the error in tolerances.
    """
    ledger = _ledger.get()
    given, got, want = got, np.asarray(got, float), np.asarray(want, float)
    assert got.shape == want.shape, f"{what} has shape {got.shape}, expected {want.shape}"
    tolerance = np.broadcast_to(
        np.asarray(ledger.law.tolerance * ledger.eps * conditioning * ledger.factor * size if within is None else within, float), want.shape
    )
    if ledger.kept is not None:
        ledger.kept.append(Comparison(given, want, None if within is not None else tolerance / (ledger.eps * ledger.factor), what))
        return
    quantity = max(np.abs(want).max(initial=0.0), np.max(size) if not np.any(want) else 0.0)
    if within is None and tolerance.max(initial=0.0) > 0.1 * quantity:
        raise TooCoarse
    # Where equality is asked for, an expected value is moved by as many roundings
    error = np.abs(got - want - ledger.shift * np.where(tolerance > 0, tolerance, ledger.eps * (1 + np.abs(want))))
    ratio = np.divide(error, tolerance, out=np.where(error > 0, np.inf, 0.0), where=tolerance > 0)
    ratio = np.where(np.isfinite(error) & np.isfinite(tolerance), ratio, np.inf)  # comparing NaN is False: it would hold
    ledger.compared += 1
    if not error.size:
        return
    ledger.ratios.append(float(ratio.max()))
    ledger.worst = max(ledger.worst, ledger.ratios[-1])
    worst = np.unravel_index(np.argmax(ratio), ratio.shape)
    if ratio[worst] > 1:
        entry = f"{what}[{', '.join(str(i) for i in worst)}]" if worst else what
        raise AssertionError(
            f"{entry} is {got[worst]:.17g}, expected {want[worst]:.17g}: off by {error[worst]:.3g}, "
            f"which is {ratio[worst]:.3g} times the tolerance {tolerance[worst]:.3g}"
        )


def of(case: Any, *names: str) -> dict[str, Any]:
    """Some fields of a case, to be handed on as keywords. The text of a failure shows these fields only."""
    return {name: getattr(case, name) for name in names}


@contextlib.contextmanager
def measuring(ledger: Ledger) -> Iterator[Ledger]:
    """Within this context `assert_close` uses and fills `ledger`."""
    token = _ledger.set(ledger)
    try:
        yield ledger
    finally:
        _ledger.reset(token)


def run_case(law: Law, impl: Any, case: Any, ledger: Ledger) -> None:
    """Run a law's body on one case, whose arrays are first rounded to the implementation's dtype."""
    dtype = impl.dtype if impl is not None else "float64"
    rounded = type(case)(*(round_to(v, dtype) if isinstance(v, np.ndarray) else v for v in case))
    with measuring(ledger):
        try:
            if impl is None:
                law.body(rounded)
            else:
                impl.run(law.body, rounded)
        except TooCoarse:
            ledger.too_coarse += 1


def new_ledger(law: Law, impl: Any, shift: float = 0.0) -> Ledger:
    """An empty ledger with the precision and tolerance factor of `impl` (None: float64)."""
    return Ledger(law, EPS["float64"] if impl is None else impl.eps, 1.0 if impl is None else impl.tolerance_factor, shift)


def laws_module(paper: str) -> ModuleType:
    """The test file of a paper."""
    return importlib.import_module(f"loracle.oracle_tests.test_{paper}")


@functools.cache
def laws_of(paper: str) -> tuple[Law, ...]:
    """The laws and theorem checks of a paper, in the order of its test file."""
    return tuple(f.law for f in vars(laws_module(paper)).values() if isinstance(getattr(f, "law", None), Law))
