"""The reference files refuse unusable input by a ValueError that names it, and keep what else their docstrings promise."""

import importlib

import pytest
import torch

from loracle.oracle_tests.contract import papers
from loracle.oracle_tests.promises import bad_inputs, namespaces_of, promises_of, refuses
from loracle.oracle_tests.running import check


@pytest.mark.parametrize("paper", papers())
def test_promises(paper):
    # One test for all of a paper's: to list them the laws have to be run, which should not happen when tests are collected
    module, broken = importlib.import_module(f"loracle.reference.{paper}"), {}
    for promise in promises_of(paper):
        try:
            promise.check(module)
        except Exception as error:
            broken[promise.says] = f"{type(error).__name__}: {error}"
    assert not broken
    assert any("refuses" in promise.says for promise in promises_of(paper))


@pytest.mark.parametrize(("paper", "name"), [(paper, name) for paper in papers() for name in namespaces_of(paper)])
def test_layers_obey_the_laws(paper, name):
    """The layer of a reference file is an implementation like any other."""
    module = importlib.import_module(f"loracle.reference.{paper}")
    report = check(namespaces_of(paper)[name](module), paper=paper, profile="quick")
    assert report.count("fails") == 0
    assert report.count("holds") > 10


def test_every_array_of_every_function_is_spoiled():
    spoiled = {promise.says for promise in bad_inputs("lora", {})}
    assert "forward refuses bias with a longer out" in spoiled
    assert "forward refuses mask of another kind of number" in spoiled
    assert "backward refuses grad_y with one more axis" in spoiled
    assert "init refuses distribution that is no choice" in spoiled
    assert "init refuses rank of 0" in spoiled


def test_refusal_has_to_name_the_argument():
    def function(x):
        raise ValueError("the input is wrong")

    with pytest.raises(AssertionError, match="does not name x"):
        refuses(function, "x", x=torch.ones(2))
    with pytest.raises(AssertionError, match="accepts a wrong x"):
        refuses(lambda x: x, "x", x=torch.ones(2))
