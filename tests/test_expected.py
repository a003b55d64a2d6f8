"""The expected values that laws share: right, and a single entry that is off is noticed."""

import numpy as np
import pytest

from loracle.oracle_tests.expected import assert_linear, core_sum, outer_sum
from loracle.oracle_tests.law import Law, Ledger, measuring
from loracle.oracle_tests.strategies import Matrices


def test_sums():
    matrices = Matrices(0)
    A, core, B = matrices(2, 5), matrices(2, 2), matrices(4, 2)
    for (value, size), middle in ((outer_sum(A, B, 1.5), np.eye(2)), (core_sum(A, core, B, 1.5), core)):
        np.testing.assert_allclose(value, 1.5 * B @ middle @ A)
        np.testing.assert_allclose(size, 1.5 * abs(B) @ abs(middle) @ abs(A))
    np.testing.assert_allclose(outer_sum(A, B)[0], B @ A)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("bias", [0.0, np.arange(4.0)], ids=["no bias", "bias"])
def test_linear(lead, bias):
    x, W = Matrices(0)(*lead, 5), Matrices(1)(4, 5)
    y, ledger = x @ W.T + bias, Ledger(Law("x.L1", "", "", ("f",), 8, None, lambda impl, case: None), eps=2.0**-52)
    with measuring(ledger):
        assert_linear(y, x, W, bias, size=np.abs(W))
        for position in np.ndindex(y.shape):
            wrong = y.copy()
            wrong[position] += 1e-13
            with pytest.raises(AssertionError, match="y"):
                assert_linear(wrong, x, W, bias, size=np.abs(W))
        with pytest.raises(AssertionError, match="shape"):
            assert_linear(y[..., None], x, W, bias, size=np.abs(W))
