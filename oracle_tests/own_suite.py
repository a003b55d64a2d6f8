"""The laws in a user's own pytest suite."""

from collections.abc import Callable
from typing import Any

import pytest

from .law import laws_of
from .loading import load
from .plugin import run_law


def parametrize_with_laws(implementation: Any, *, paper: str, **options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a test of one argument, `check_law`; it becomes one test for each law of the paper.

        @parametrize_with_laws(my_module, paper="lora", dtype="float32")
        def test_laws(check_law):
            check_law()

    Args:
        implementation: a module, object or dict of functions, or their name, as for `check`.
        paper: slug.
        options: arrays, dtype, device, generator, tolerance.

    Raises:
        UsageError: when the tests are collected, if the implementation does not fit the contract.
    """
    impl = load(implementation, paper=paper, **options)
    laws = [law for law in laws_of(paper) if not law.is_theorem]
    return pytest.mark.parametrize("check_law", [pytest.param(lambda law=law: run_law(law, impl), id=law.id) for law in laws])
