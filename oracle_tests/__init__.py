"""The oracle: laws that hold for any implementation of a paper, and the machinery that checks them.

    from loracle.oracle_tests import check
    report = check("my_package.my_module", paper="lora")

Names are imported when they are first used, so that the pytest plugin costs nothing where it is not needed.
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "check": "running",
    "Report": "running",
    "Result": "running",
    "UsageError": "contract",
    "from_module": "objects",
    "parametrize_with_laws": "own_suite",
    "as_text": "report",
    "as_json": "report",
    "as_markdown": "report",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
