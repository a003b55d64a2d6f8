"""The expected values that laws share: right, and a single entry that is off is noticed."""

import numpy as np
import pytest

from loracle.oracle_tests.expected import assert_linear, core_sum, outer_sum, space_conditioning, truncated
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


def test_leading_part():
    values = np.array([4.0, 3.0, 1.0])
    M = Matrices(0).with_spectrum(5, 3, values)
    np.testing.assert_allclose(np.linalg.svd(M - truncated(M, 2), compute_uv=False), [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(np.linalg.svd(truncated(M, 2), compute_uv=False), [4, 3, 0], atol=1e-12)
    # Of the three right singular vectors all are chosen; of the five left ones two more have the value 0
    assert [space_conditioning(values, side, range(3)) for side in (3, 5)] == [1.0, 4.0]
    assert [space_conditioning(values, 3, chosen) for chosen in ([0, 1], [0], [0, 2])] == [2.0, 4.0, 4.0]
