"""Reports of a run: text for the terminal, JSON, Markdown."""

import json
import math
from dataclasses import asdict
from typing import Any

from .running import OUTCOMES, Report, Result

SCHEMA = 1
MARKS = {"holds": "+", "fails": "X", "missing": "-", "expected to fail": "x", "skipped": "s"}


def line(result: Result) -> str:
    """One law on one line."""
    notes = [result.message] if result.message else []
    if result.derived:
        notes.append("derived: " + ", ".join(result.derived))
    end = f"  ({'; '.join(notes)})" if notes else ""
    return f"{MARKS[result.outcome]} {result.law:<14} {result.outcome:<16} {result.says}{end}"


def summary(report: Report) -> str:
    """The count of every outcome, in a fixed order."""
    return f"{report.paper} of {report.implementation}: " + ", ".join(f"{report.count(o)} {o}" for o in OUTCOMES)


def options_line(report: Report) -> str:
    """Precision and tolerance of the run; a tolerance factor other than 1 is always said."""
    o = report.options
    return f"arrays {o['arrays']}, dtype {o['dtype']}, device {o['device']}, tolerance factor {o['tolerance']:g}"


def as_text(report: Report) -> str:
    """The whole report for a terminal: a line for each law, every failure explained once, the summary last."""
    explained = "".join(f"\n{text}\n" for text in _explanations(report))
    return "\n".join([*map(line, report.results), explained, options_line(report), summary(report), *hints(report)])


def hints(report: Report) -> list[str]:
    """What to do about a run that checked nothing."""
    if report.exit_code == 2:
        return ["Nothing was checked: fill in the functions that the laws need, or choose a dtype of higher precision."]
    return []


def _explanations(report: Report) -> list[str]:
    """One explanation for each different message: a wrong dtype, say, breaks every law alike."""
    first = {r.message: r.explanation for r in reversed(report.results) if r.outcome == "fails" and r.explanation}
    return list(reversed(first.values()))


def as_json(report: Report) -> str:
    """The whole report as JSON, with a schema version. `worst` is null where a law without tolerance fails: JSON has no infinity."""
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "paper": report.paper,
        "implementation": report.implementation,
        "options": report.options,
        "counts": {outcome: report.count(outcome) for outcome in OUTCOMES},
        "exit_code": report.exit_code,
        "results": [{**asdict(r), "worst": r.worst if math.isfinite(r.worst) else None} for r in report.results],
    }
    return json.dumps(content, indent=2, allow_nan=False)


def as_markdown(report: Report) -> str:
    """A table, and the explanation of every failure."""
    rows = [f"| {r.law} | {r.outcome} | {r.says} | {_cell(r)} |" for r in report.results]
    failures = [f"\n```text\n{text}\n```" for text in _explanations(report)]
    head = [f"# {summary(report)}", "", options_line(report), "", "| law | outcome | statement | note |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, *failures, ""])


def _cell(result: Result) -> str:
    derived = f"derived: {', '.join(result.derived)}" if result.derived else ""
    return "; ".join(note for note in (result.message, derived) if note).replace("|", "\\|")
