"""How strong the oracle is: which mutants of a reference file the laws and promises kill, and which law kills which mistake.

Every mutant of the file (see `mutation`) is compiled and run in this process, and held against stored cases of the laws, then
against the promises, that can reach the mutated function, until one fails. Score = killed / all. Each survivor needs a reason in
`strength/SLUG.toml`: why no law can tell it from the reference. `strength/SLUG.json` holds the published numbers.
"""

import ast
import contextlib
import functools
import importlib
import json
import time
import tomllib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from ..arrays import one_thread
from ..contract import UsageError, check_paper
from ..files import write_atomically
from ..law import Law, laws_of
from ..loading import Implementation
from ..mistakes import mistakes_of, wrong
from ..mutation import Mutant, mutants_of, reach
from ..promises import Promise, namespaces_of, promises_of
from ..running import LawTimeout, collect_cases, limited, replay

HERE = Path(__file__).parent
CASES = 10
SECONDS = 10.0  # for one law or promise: a thousand times what one takes, so that only a hang is cut off
NEEDED = 0.95
DTYPES = ("float64", "bfloat16")  # the second for what is done in another precision, or lost on the way
SCHEMA = 1


class Subject:
    """A module under test and the implementations that it holds, each made when it is first asked for."""

    def __init__(self, module: Any, paper: str) -> None:
        self.module, self.paper = module, paper

    @functools.cache  # noqa: B019 - a subject lives as long as its mutant
    def implementation(self, namespace: str, dtype: str) -> Implementation:
        """Its functions (namespace ""), or those of a layer by name."""
        functions = namespaces_of(self.paper)[namespace](self.module) if namespace else self.module
        return Implementation(functions, paper=self.paper, name=self.paper, dtype=dtype)


@dataclass(frozen=True)
class Probe:
    """A law in one setting, or a promise. `reaches`: what it may run; `rank`: cheap and likely ones come first."""

    name: str
    reaches: frozenset[str]
    rank: tuple[int, ...]
    run: Callable[[Subject], BaseException | None]
    is_law: bool = True

    def fails(self, subject: Subject) -> str:
        """Why the subject fails it, or nothing."""
        try:
            with limited(SECONDS):
                error = self.run(subject)
        except LawTimeout:
            return f"took longer than {SECONDS:g} seconds"
        except Exception as raised:
            error = raised
        return "" if error is None else f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: the probe that killed it, or nothing, and whether that is a law."""

    mutant: Mutant
    killer: str
    by_law: bool = False


@dataclass
class Strength:
    """The outcomes of all mutants of a paper, and the reasons given for survivors."""

    paper: str
    outcomes: list[Outcome] = field(default_factory=list)
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)
    seconds: float = 0.0  # of this process; other programs on the machine do not count

    @property
    def killed(self) -> int:
        return sum(bool(o.killer) for o in self.outcomes)

    @property
    def killed_by_laws(self) -> int:
        """Those that a law kills; a promise is asked only where no law does."""
        return sum(o.by_law for o in self.outcomes)

    @property
    def score(self) -> float:
        return self.killed / len(self.outcomes) if self.outcomes else 0.0

    @property
    def survivors(self) -> list[Mutant]:
        return [o.mutant for o in self.outcomes if not o.killer]

    @property
    def unexplained(self) -> list[Mutant]:
        """Survivors for which no reason is given."""
        return [m for m in self.survivors if (m.function, m.change) not in self.reasons]

    @property
    def stale(self) -> list[tuple[str, str]]:
        """Reasons for mutants that do not exist, or do not survive."""
        return sorted(self.reasons.keys() - {(m.function, m.change) for m in self.survivors})

    @property
    def exit_code(self) -> int:
        """0 strong enough and every survivor explained, else 1."""
        return int(self.score < NEEDED or bool(self.unexplained) or bool(self.stale))


# Probes


def probes_of(paper: str, laws: Iterable[Law] | None = None, promises: Iterable[Promise] | None = None) -> list[Probe]:
    """All laws, as functions, in low precision and through the paper's layers, and all promises; or the ones that are given.

    Raises:
        UsageError: the reference itself fails one, so that no mutant could be judged by it.
    """
    reference = importlib.import_module(f"loracle.reference.{paper}")
    subject, calls = Subject(reference, paper), reach(_parse(reference))
    chosen = [law for law in (laws_of(paper) if laws is None else laws) if not law.is_theorem]
    probes = [probe for law in chosen for probe in _law_probes(law, subject, calls)]
    for i, one in enumerate(promises_of(paper) if promises is None else promises):
        probes.append(Probe(one.says, _reached(one.of, calls), (1, 0, i), lambda s, one=one: one.check(s.module), False))  # type: ignore[misc]
    with _quiet():
        for probe in probes:
            if reason := probe.fails(subject):
                raise UsageError(f"the reference itself fails {probe.name}: {reason}")
    return sorted(probes, key=lambda probe: probe.rank)


def _law_probes(law: Law, subject: Subject, calls: dict[str, frozenset[str]]) -> list[Probe]:
    cases = collect_cases(law, min(CASES, law.examples or CASES))
    functions = _reached([need.partition(".")[0] for need in law.needs], calls)
    slow = law.examples is not None
    settings = [("", dtype, law.id + ("" if dtype == "float64" else f" in {dtype}"), functions) for dtype in DTYPES]
    settings += [(name, "float64", f"{law.id} of {name}", _reached([name], calls)) for name in namespaces_of(subject.paper)]
    probes = []
    for stage, (namespace, dtype, name, reaches) in enumerate(settings):

        def run(subject: Subject, namespace: str = namespace, dtype: str = dtype) -> BaseException | None:
            return replay(law, subject.implementation(namespace, dtype), cases)

        # A law of few functions comes first: it is the nearest to the one that was changed
        if all(map(subject.implementation(namespace, dtype).provides, law.needs)):
            probes.append(Probe(name, reaches, (2 * stage, slow, len(reaches)), run))
    return probes


def _reached(names: Iterable[str], calls: dict[str, frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*(calls.get(name, frozenset()) for name in names))


def _parse(module: ModuleType) -> ast.Module:
    return ast.parse(Path(str(module.__file__)).read_text())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Mutants provoke warnings that say nothing to the reader."""
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# The run


def measure(paper: str, *, probes: list[Probe] | None = None, on_mutant: Callable[[int, int], None] | None = None) -> Strength:
    """Make every mutant of a paper's reference file and look for a probe that kills it.

    Args:
        paper: the slug.
        probes: what mutants are held against (default: all laws and promises of the paper).
        on_mutant: called with the number of mutants done and of all.

    Raises:
        UsageError: the paper is unknown, or its reference file fails a law or promise itself.
    """
    probes = probes_of(check_paper(paper)) if probes is None else probes
    reference = importlib.import_module(f"loracle.reference.{paper}")
    tree = _parse(reference)
    mutants = mutants_of(tree)
    result, started = Strength(paper, reasons=read_reasons(paper)), time.process_time()
    kills: Counter[tuple[str, str]] = Counter()
    law_names = {probe.name for probe in probes if probe.is_law}
    with _quiet():
        for mutant in mutants:
            with mutant.applied():
                killer = _killer(mutant, tree, reference, paper, probes, kills)
            kills[mutant.unit, killer] += 1
            result.outcomes.append(Outcome(mutant, killer, killer in law_names))
            if on_mutant:
                on_mutant(len(result.outcomes), len(mutants))
    result.seconds = time.process_time() - started
    return result


def _killer(
    mutant: Mutant, tree: ast.Module, reference: ModuleType, paper: str, probes: list[Probe], kills: Counter[tuple[str, str]]
) -> str:
    """The name of the first probe that fails: laws before promises, and first those that killed mutants of the same function."""
    try:
        subject = Subject(_execute(tree, reference), paper)
    except Exception:
        return "import"
    reaching = [p for p in probes if mutant.unit in p.reaches or not mutant.unit]
    for probe in sorted(reaching, key=lambda p: (not p.is_law, -kills[mutant.unit, p.name])):
        if probe.fails(subject):
            return probe.name
    return ""


def _execute(tree: ast.Module, reference: ModuleType) -> ModuleType:
    """A module of its own with the reference's name and the tree's code."""
    module = ModuleType(reference.__name__)
    module.__package__, module.__file__ = reference.__package__, reference.__file__
    exec(compile(tree, str(reference.__file__), "exec"), vars(module))
    return module


def read_reasons(paper: str, folder: Path = HERE) -> dict[tuple[str, str], str]:
    """Why each known survivor survives, by function and change.

    Raises:
        UsageError: an entry lacks a part, says nothing, or stands there twice.
    """
    path = folder / f"{paper}.toml"
    reasons: dict[tuple[str, str], str] = {}
    for entry in tomllib.loads(path.read_text()).get("survivor", []) if path.exists() else []:
        if entry.keys() != {"function", "change", "reason"} or not entry["reason"].strip():
            raise UsageError(f"{path}: needed function, change and reason in {entry}")
        key = (entry["function"], entry["change"])
        if key in reasons:
            raise UsageError(f"{path}: {key} stands there twice")
        reasons[key] = entry["reason"].strip()
    return reasons


# Law x mistake


def law_by_mistake(paper: str, *, cases: int = CASES, on_mistake: Callable[[int, int], None] | None = None) -> dict[str, dict[str, bool]]:
    """For each mistake of a paper the laws that reach what it changes, and whether they kill it."""
    calls = reach(_parse(importlib.import_module(f"loracle.reference.{check_paper(paper)}")))
    laws = [law for law in laws_of(paper) if not law.is_theorem]
    stored = {law.id: collect_cases(law, min(cases, law.examples or cases)) for law in laws}
    needed = {law.id: _reached([need.partition(".")[0] for need in law.needs], calls) for law in laws}
    table: dict[str, dict[str, bool]] = {}
    with _quiet():
        for mistake in mistakes_of(paper):
            impl = Implementation(wrong(mistake), paper=paper, name=mistake.name)
            reaching = [law for law in laws if needed[law.id] & mistake.functions.keys()]
            table[mistake.name] = {law.id: _kills(law, impl, stored[law.id]) for law in reaching}
            if on_mistake:
                on_mistake(len(table), len(mistakes_of(paper)))
    return table


def _kills(law: Law, impl: Implementation, cases: list[Any]) -> bool:
    try:
        with limited(SECONDS):
            return replay(law, impl, cases) is not None
    except LawTimeout:
        return True


# What is published


def as_record(strength: Strength, mistakes: dict[str, dict[str, bool]]) -> dict[str, Any]:
    """All numbers of a run, the same ones every time."""
    operators = Counter(o.mutant.operator for o in strength.outcomes)
    dead = Counter(o.mutant.operator for o in strength.outcomes if o.killer)
    says = {mistake.name: mistake.says for mistake in mistakes_of(strength.paper)}
    return {
        "schema": SCHEMA,
        "paper": strength.paper,
        "mutants": len(strength.outcomes),
        "killed": strength.killed,
        "killed_by_laws": strength.killed_by_laws,
        "score": round(strength.score, 4),
        "operators": {name: {"mutants": operators[name], "killed": dead[name]} for name in sorted(operators)},
        "first_kills": dict(sorted(Counter(o.killer for o in strength.outcomes if o.killer).items())),
        "survivors": [
            {"function": m.function, "line": m.line, "change": m.change, "reason": strength.reasons.get((m.function, m.change), "")}
            for m in strength.survivors
        ],
        "mistakes": {name: {"says": says[name], "killed_by": [k for k, v in row.items() if v]} for name, row in mistakes.items()},
    }


def publish(record: dict[str, Any], folder: Path = HERE) -> Path:
    """Write the record beside the reasons, whole or not at all."""
    return write_atomically(folder / f"{record['paper']}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
