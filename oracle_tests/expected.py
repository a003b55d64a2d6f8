"""Expected values that the laws of several papers share, each by another road than an implementation takes."""

from collections.abc import Iterable

import numpy as np

from .law import assert_close


def outer_sum(A: np.ndarray, B: np.ndarray, scaling: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """s B A as the sum of the outer products of B's columns (out, rank) and A's rows (rank, in), and the size of what is summed."""
    terms = [np.multiply.outer(B[:, k], A[k]) for k in range(len(A))]
    return scaling * np.sum(terms, axis=0), scaling * np.sum(np.abs(terms), axis=0)


def core_sum(A: np.ndarray, core: np.ndarray, B: np.ndarray, scaling: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """s B C A as a sum over the entries of the core C (rank, rank), and the size of what is summed."""
    terms = [core[k, j] * np.multiply.outer(B[:, k], A[j]) for k, j in np.ndindex(*core.shape)]
    return scaling * np.sum(terms, axis=0), scaling * np.sum(np.abs(terms), axis=0)


def assert_linear(y: np.ndarray, x: np.ndarray, W: np.ndarray, bias: np.ndarray | float = 0.0, *, size: np.ndarray) -> None:
    """Assert that y (..., out) is what one linear layer makes of x (..., in), position by position.

    `size` (out, in): for each entry of W the size of what it is the sum of.
    """
    want, scale = np.zeros((*x.shape[:-1], len(W))), np.zeros((*x.shape[:-1], len(W)))
    for position in np.ndindex(x.shape[:-1]):
        want[position] = W @ x[position] + bias
        scale[position] = size @ np.abs(x[position]) + np.abs(bias)
    assert_close(y, want, size=scale, what="y")


def truncated(M: np.ndarray, rank: int) -> np.ndarray:
    """The matrix of that rank that is nearest to M: M on its leading right singular vectors."""
    V = np.linalg.svd(M)[2][:rank].T
    nearest: np.ndarray = M @ V @ V.T
    return nearest


def space_conditioning(values: np.ndarray, side: int, chosen: Iterable[int]) -> float:
    """Largest singular value over the smallest distance of a chosen one from the others: how far rounding turns their space.

    `side` is the length of the singular vectors. Those beyond the last singular value have the value 0.
    """
    values = np.append(values, np.zeros(side - len(values)))
    inside = np.isin(np.arange(side), list(chosen))
    return 1.0 if inside.all() else float(values[0] / np.min(np.abs(values[inside][:, None] - values[~inside])))
