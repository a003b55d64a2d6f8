"""What laws assert of drawn numbers: right ones pass for many seeds, and what is drawn otherwise does not."""

from types import SimpleNamespace

import numpy as np
import pytest

from loracle.oracle_tests.draws import assert_normal, assert_seeded, assert_uniform
from loracle.oracle_tests.law import Law, Ledger, measuring

COUNT = 960


@pytest.fixture(autouse=True)
def ledger():
    with measuring(Ledger(Law("x.L1", "", "", ("f",), 2, None, lambda impl, case: None), eps=2.0**-52)) as ledger:
        yield ledger


def uniform(seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, COUNT)


def normal(seed=0):
    return np.random.default_rng(seed).standard_normal(COUNT)


def test_right_draws_pass():
    for seed in range(500):
        assert_uniform(0.3 * uniform(seed)[:450], 0.3, "A")
        assert_normal(0.3 * normal(seed)[:450], 0.3, "A")
    np.testing.assert_array_equal(assert_seeded(uniform, 3, "A"), uniform(3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (1.01 * uniform(), "what A has beyond its bound 1"),
        (0.95 * uniform(), "is near its bound"),
        (np.where(uniform() < -0.9, 0.9, uniform()), "on one side the entries of A reach only"),
        (np.abs(uniform()), "on one side"),
        (np.where(uniform(1) < 0.3, np.abs(uniform()), uniform()), "mean of A over its bound"),
        (np.clip(normal() / 3, -1, 1), "mean square of A over its bound"),
        (np.sign(uniform()), "mean square of A over its bound"),
    ],
)
def test_what_is_not_uniform(values, message):
    with pytest.raises(AssertionError, match=message):
        assert_uniform(values, 1.0, "A")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (0.3 + normal(), "mean of A over its width"),
        (1.3 * normal(), "mean square of A over its width"),
        (np.sqrt(3) * uniform(), "no Gaussian"),
    ],
)
def test_what_is_not_normal(values, message):
    with pytest.raises(AssertionError, match=message):
        assert_normal(values, 1.0, "A")


def test_what_the_seed_does_not_decide():
    with pytest.raises(AssertionError, match="two seeds gave the same A; draw from the argument `generator`"):
        assert_seeded(lambda seed: uniform(), 3, "A")
    with pytest.raises(AssertionError, match="two seeds gave the same B"):
        assert_seeded(lambda seed: SimpleNamespace(A=uniform(seed), B=uniform()), 3, "A", "B")
    rng = np.random.default_rng()
    with pytest.raises(AssertionError, match="A from the same seed"):
        assert_seeded(lambda seed: rng.uniform(size=COUNT), 3, "A")
