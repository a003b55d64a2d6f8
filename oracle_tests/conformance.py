"""Conformance of real libraries: every adapter run against its paper's laws, and the published outcome of each law.

An adapter is a module in `adapters/` with `PAPER`, `LIBRARY` (the distribution's name) and `DEVIATIONS`: law id -> why the
library departs from it. A law that fails without a reason there, or holds in spite of one, is a difference.
"""

import importlib
import importlib.metadata
import json
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import adapters
from .files import write_atomically
from .running import Result, check

SCHEMA = 1
PUBLISHED = Path(adapters.__file__).parent


def names() -> list[str]:
    """The adapters, by file."""
    return sorted(module.name for module in pkgutil.iter_modules(adapters.__path__))


def measure(name: str, on_result: Callable[[Result], None] | None = None) -> dict[str, Any]:
    """Run an adapter against its paper's laws: library, version and the outcome of each law, in JSON's types."""
    module = importlib.import_module(f"{adapters.__name__}.{name}")
    report = check(module.__name__, paper=module.PAPER, expected_failures=module.DEVIATIONS, on_result=on_result)
    return {
        "schema": SCHEMA,
        "adapter": module.__name__,
        "library": module.LIBRARY,
        "version": importlib.metadata.version(module.LIBRARY),
        "paper": module.PAPER,
        "dtype": report.options["dtype"],
        "laws": {
            r.law: {"says": r.says, "outcome": r.outcome, "note": r.message if r.outcome != "holds" else "", "derived": list(r.derived)}
            for r in report.results
        },
    }


def published(name: str) -> dict[str, Any]:
    """The published outcome, or an empty dict."""
    path = PUBLISHED / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What changed since publication, and laws that fail without a stated reason; empty if all is as published."""
    said = [f"{key} was {old.get(key)!r}, is {new[key]!r}" for key in ("library", "version", "paper", "dtype") if old.get(key) != new[key]]
    before = old.get("laws", {})
    for law, result in new["laws"].items():
        if result["outcome"] == "fails":
            said.append(f"{law} fails, and the adapter gives no reason: {result['note']}")
        elif law not in before:
            said.append(f"{law} is not published; it {result['outcome']}")
        elif before[law] != result:
            said.append(f"{law} was {before[law]['outcome']!r} ({before[law]['note']}), is {result['outcome']!r} ({result['note']})")
    return said + [f"{law} is published but no longer there" for law in before.keys() - new["laws"].keys()]


def publish(name: str, result: dict[str, Any]) -> Path:
    """Write an outcome where the site reads it."""
    return write_atomically(PUBLISHED / f"{name}.json", json.dumps(result, indent=1) + "\n")
