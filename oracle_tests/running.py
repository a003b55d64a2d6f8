"""Run laws against an implementation: the one road that pytest, `loracle check` and the Python call all take."""

import contextlib
import faulthandler
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Flaky
from hypothesis.internal.conjecture import providers

from .arrays import one_thread, random_states, restore_random_states
from .contract import UsageError, nearest
from .explain import explain
from .law import Law, laws_of, new_ledger, run_case
from .loading import Implementation, MissingFunction, load
from .settings import PROFILES

OUTCOMES = ("holds", "fails", "missing", "expected to fail", "skipped")


class LawTimeout(BaseException):
    """A law took too long. No Exception: Hypothesis would shrink it, and wait as long for each smaller case."""


class _Missing(BaseException):
    """A function turned out to be missing while a law ran. No Exception: there is nothing to shrink."""


@dataclass
class Result:
    """What became of one law. `worst` is the largest error in tolerances; `explanation` is the whole text of a failure."""

    law: str
    says: str
    outcome: str
    message: str = ""
    explanation: str = ""
    derived: tuple[str, ...] = ()
    cases: int = 0
    worst: float = 0.0
    seconds: float = 0.0


@dataclass
class Report:
    """All results of one run."""

    paper: str
    implementation: str
    options: dict[str, Any]
    results: list[Result] = field(default_factory=list)

    def count(self, outcome: str) -> int:
        """Number of results with this outcome."""
        return sum(r.outcome == outcome for r in self.results)

    @property
    def exit_code(self) -> int:
        """0 all that was checked holds, 1 some law fails, 2 nothing was checked."""
        if self.count("fails"):
            return 1
        return 0 if self.count("holds") + self.count("expected to fail") else 2


def evaluate(law: Law, impl: Implementation | None, *, profile: str = "default", time_limit: float = 30.0) -> Result:
    """Hold an implementation against one law (`None`: check a theorem), and explain a failure on its smallest case."""
    result, started = Result(law.id, law.says, "holds"), time.perf_counter()
    lacking = [need for need in law.needs if impl is None or not impl.provides(need)]
    if lacking:
        result.outcome, result.message = "missing", f"the implementation has no {', '.join(lacking)}"
        return result
    ledger = new_ledger(law, impl)
    last: dict[str, Any] = {}  # the case that runs, the last one that failed, and its error
    if impl is not None:
        impl.derived.clear()
        impl.trusted = False

    def one_case(case: Any) -> None:
        result.cases += 1
        last["running"] = case
        try:
            run_case(law, impl, case, ledger)
        except MissingFunction as error:
            raise _Missing(str(error)) from error
        except Exception as error:
            last["case"], last["error"] = case, error  # the smallest failing case is replayed last
            raise

    states = random_states()
    try:
        with limited(time_limit), one_thread(), _cases_of_their_own():
            count = min(PROFILES[profile], law.examples or PROFILES[profile])
            _settings(count, Phase.generate, Phase.shrink)(given(case=law.cases)(one_case))()
    except _Missing as error:
        result.outcome, result.message = "missing", f"the implementation has no {error}"
    except LawTimeout:
        slow = TimeoutError(f"took longer than {time_limit:g} seconds")
        # If a case failed before, the time went into making it smaller: the failure is what the user wants to know
        _fail(result, law, impl, last.get("case", last.get("running")), last.get("error", slow), time_limit)
    except Flaky as error:
        _fail(result, law, impl, last.get("case"), last.get("error", error), time_limit)
        result.message += " (not every time: a later call with the same input went well; a function keeps no state between calls)"
    except Exception as error:
        _fail(result, law, impl, last.get("case"), last.get("error", error), time_limit)
    else:
        if not ledger.compared and ledger.too_coarse:
            result.outcome, result.message = "skipped", f"precision of {impl.dtype if impl else 'float64'} is too low to tell in every case"
    restore_random_states(states)  # the oracle too leaves the global generators as they were
    result.worst = ledger.worst
    result.derived = tuple(sorted(impl.derived)) if impl is not None else ()
    result.seconds = time.perf_counter() - started
    return result


def _fail(result: Result, law: Law, impl: Implementation | None, case: Any, error: Exception, time_limit: float) -> None:
    """Write a failure down, and explain it if that does not take too long: the implementation may hang again."""
    result.outcome, result.message = "fails", _first_line(error)
    result.explanation = f"{law.id} fails: {law.says}\n{result.message}"
    try:
        with limited(time_limit):
            result.explanation = explain(law, impl, case, error)
    except LawTimeout:
        pass
    except Exception as trouble:  # the failure itself must not get lost
        result.explanation += f"\n(This could not be explained further: {type(trouble).__name__}: {trouble})"


def collect_cases(law: Law, count: int) -> list[Any]:
    """The first `count` cases of a law, the same ones every time."""
    cases: list[Any] = []

    def keep(case: Any) -> None:
        cases.append(case)

    with _cases_of_their_own():
        _settings(count, Phase.generate)(given(case=law.cases)(keep))()
    return cases


@contextlib.contextmanager
def _cases_of_their_own() -> Iterator[None]:
    """Keep Hypothesis from trying constants that it finds in the source code of whatever project it runs in.

    With them a law's cases would depend on the folder and on what else is imported, and the constants would be stored in a folder
    `.hypothesis` there. There is no setting for it; a version of Hypothesis without this method is left as it is.
    """
    provider: Any = providers.HypothesisProvider
    original = getattr(provider, "_maybe_draw_constant", None)
    if original is None:
        yield
        return
    provider._maybe_draw_constant = lambda self, *args, **kwargs: None
    try:
        yield
    finally:
        provider._maybe_draw_constant = original


def _settings(count: int, *phases: Phase) -> settings:
    """Settings chosen now: a profile that is loaded after import has no effect on a finished test."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )


def replay(law: Law, impl: Implementation | None, cases: list[Any]) -> Exception | None:
    """Run a law on given cases without Hypothesis; the first failure, or None. For mistakes, mutants and diagnosis."""
    ledger = new_ledger(law, impl)
    for case in cases:
        try:
            run_case(law, impl, case, ledger)
        except Exception as error:
            return error
    return None


def _first_line(error: BaseException) -> str:
    kind = "" if isinstance(error, AssertionError | TimeoutError) else f"{type(error).__name__}: "
    return kind + (str(error).strip().splitlines() or [""])[0]


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise LawTimeout inside this context after so many seconds (POSIX, main thread; elsewhere without effect)."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signum: int, frame: Any) -> None:
        raise LawTimeout

    previous, started = signal.signal(signal.SIGALRM, ring), time.monotonic()
    # It rings again and again, as Python swallows what is raised in a callback of the garbage collector, for instance
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if left:  # somebody else's alarm, of pytest-timeout for instance, goes on
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3))


def check(
    implementation: Any,
    *,
    paper: str,
    laws: list[str] | None = None,
    profile: str = "default",
    expected_failures: dict[str, str] | None = None,
    time_limit: float = 30.0,
    isolate: bool = False,
    on_result: Callable[[Result], None] | None = None,
    **options: Any,
) -> Report:
    """Hold an implementation against the laws of a paper.

    Args:
        implementation: "package.module", "file.py", either with ":object"; or a module, object or dict of functions.
        paper: slug, for example "lora".
        laws: ids to run (default: all of the paper).
        profile: "quick" (10 cases a law), "default" (50) or "deep" (1000).
        expected_failures: law id -> reason; such a law has to fail.
        time_limit: seconds a law may take.
        isolate: run each law in a process of its own, which ends hangs inside compiled code too; needs a name, no object.
        on_result: called with each result as it comes.
        options: arrays, dtype, device, generator, tolerance: override the implementation's `LORACLE` record.

    Raises:
        UsageError: the implementation, paper, law, profile or option is unknown or unusable.
    """
    if profile not in PROFILES:
        raise UsageError(f"there is no profile {profile!r}{nearest(profile, PROFILES)}; known: {', '.join(PROFILES)}")
    impl = load(implementation, paper=paper, **options)
    chosen = [law for law in laws_of(paper) if not law.is_theorem]
    check_laws(paper, [*(laws or []), *(id for id in expected_failures or {} if id.partition(".")[0] == paper)])
    if laws is not None:
        chosen = [law for law in chosen if law.id in laws]
    if isolate and not isinstance(implementation, str):
        raise UsageError("isolate needs the implementation's name or file, which another process can load, not an object")
    report = Report(paper, impl.name, describe(impl))
    for law in chosen:
        if isolate:
            result = _evaluate_isolated(implementation, law, profile, time_limit, options)
        else:
            result = evaluate(law, impl, profile=profile, time_limit=time_limit)
        report.results.append(expect_failure(result, expected_failures or {}))
        if on_result:
            on_result(report.results[-1])
    return report


def check_laws(paper: str, ids: list[str]) -> None:
    """Raise UsageError if one of `ids` is no law of the paper; a theorem check is none: it calls no implementation."""
    known = [law.id for law in laws_of(paper) if not law.is_theorem]
    for id in ids:
        if id not in known:
            raise UsageError(f"there is no law {id!r}{nearest(id, known)}; laws of {paper}: {', '.join(known)}")


def describe(impl: Implementation) -> dict[str, Any]:
    """The options under which an implementation runs, for reports."""
    return {
        "arrays": impl.arrays,
        "dtype": impl.dtype,
        "device": impl.device,
        "generator": impl.generator,
        "tolerance": impl.tolerance_factor,
    }


def expect_failure(result: Result, expected: dict[str, str]) -> Result:
    """Turn a failure that the user expects into that outcome, and one that no longer happens into a failure."""
    if result.law not in expected:
        return result
    if result.outcome == "fails":
        result.outcome, result.message = "expected to fail", expected[result.law]
    elif result.outcome == "holds":
        result.outcome = "fails"
        result.message = f"holds, but is listed in expected_failures ({expected[result.law]}): take it off the list"
        result.explanation = f"{result.law} {result.message}"
    return result


RESULT = "loracle result: "


def _evaluate_isolated(spec: str, law: Law, profile: str, time_limit: float, options: dict[str, Any]) -> Result:
    """`evaluate` in another process, which is ended when it hangs."""
    task = json.dumps({"spec": spec, "law": law.id, "profile": profile, "time_limit": time_limit, "options": options})
    command = [sys.executable, "-c", "from loracle.oracle_tests.running import _child; _child()"]
    try:
        # The child ends itself; this limit is for an implementation that hangs while it is imported
        done = subprocess.run(command, input=task, capture_output=True, text=True, timeout=3 * time_limit + 60)
    except subprocess.TimeoutExpired:
        return Result(law.id, law.says, "fails", f"its process did not end within {3 * time_limit + 60:g} seconds and was ended")
    for text in reversed(done.stdout.splitlines()):
        if text.startswith(RESULT):
            content = json.loads(text.removeprefix(RESULT))
            return Result(**{**content, "derived": tuple(content["derived"])})
    said = done.stderr.strip().splitlines() or ["nothing"]
    if any(text.startswith("Timeout (") for text in said):
        where = next((text.strip() for text in said if text.strip().startswith("File ")), "an unknown place")
        return Result(law.id, law.says, "fails", f"hangs outside Python, at {where}: its process was ended")
    return Result(law.id, law.says, "fails", f"its process ended with code {done.returncode} and said: {said[-1]}")


def _child() -> None:
    """The other process: a task as JSON on standard input, the result as JSON on a line of standard output."""
    task = json.loads(sys.stdin.read())
    paper, time_limit = task["law"].partition(".")[0], task["time_limit"]
    impl = load(task["spec"], paper=paper, **task["options"])
    law = next(law for law in laws_of(paper) if law.id == task["law"])
    # A thread of C, which ends the process even if compiled code never gives control back. Running and explaining may each take
    # the time limit, which ends what hangs in Python with a better message.
    faulthandler.dump_traceback_later(2 * time_limit + 2, exit=True)
    result = evaluate(law, impl, profile=task["profile"], time_limit=time_limit)
    faulthandler.cancel_dump_traceback_later()
    print("\n" + RESULT + json.dumps(asdict(result)))
