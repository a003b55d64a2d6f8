"""Hypothesis strategies and seeded matrices from which papers build their cases.

A case is drawn as a few small numbers and a seed; its matrices come from the seed. Shapes are small first and entries are
small whole numbers first, so that the smallest failing case can be read.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

ENTRIES = ("small whole numbers", "normal")
# Values at which wrong formulas do not agree with right ones: no 1, and no square of another
SCALINGS = (2.0, 0.5, 3.0, 1.25)


@functools.cache  # composite strategies ask for it with every case
def sides(low: int = 1, high: int = 8) -> st.SearchStrategy[int]:
    """A side of a matrix."""
    return st.integers(low, high)


@functools.cache
def seeds() -> st.SearchStrategy[int]:
    """A seed for `matrices` or for a generator."""
    return st.integers(0, 2**32 - 1)


@functools.cache
def entries() -> st.SearchStrategy[str]:
    """Which kind of entries `matrices` makes."""
    return st.sampled_from(ENTRIES)


@functools.cache
def scalings() -> st.SearchStrategy[float]:
    """The number s of a layer."""
    return st.sampled_from(SCALINGS)


@functools.cache
def leads() -> st.SearchStrategy[tuple[int, ...]]:
    """What stands before the features in the shape of a layer's input: one sample, some, or a batch of sequences."""
    return st.sampled_from([(), (3,), (2, 2)])


class Matrices:
    """Matrices drawn one after the other from one seed, by NumPy's PCG64.

    Args:
        seed: the seed.
        entries: "small whole numbers" (-3 to 3, no zero) or "normal" (mean 0, width 1).
    """

    def __init__(self, seed: int, entries: str = "normal") -> None:
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.entries = entries

    def __call__(self, *shape: int) -> np.ndarray:
        """An array of the given shape."""
        if self.entries == "normal":
            return self.rng.standard_normal(shape)
        return self.rng.choice([1.0, 2.0, 3.0, -1.0, -2.0, -3.0], size=shape)

    def mask(self, *shape: int) -> np.ndarray:
        """A boolean array, each entry True or False with equal probability."""
        return self.rng.random(shape) < 0.5

    def orthonormal(self, rows: int, columns: int) -> np.ndarray:
        """A matrix with orthonormal columns (rows >= columns), uniformly distributed."""
        q, r = np.linalg.qr(self.rng.standard_normal((rows, columns)))
        return q * np.where(np.diag(r) < 0, -1.0, 1.0)

    def with_spectrum(self, rows: int, columns: int, singular_values: Any) -> np.ndarray:
        """A matrix with the given singular values and random singular vectors; missing values are zero."""
        values = np.asarray(singular_values, float)
        matrix: np.ndarray = (self.orthonormal(rows, len(values)) * values) @ self.orthonormal(columns, len(values)).T
        return matrix

    def separated(self, rows: int, columns: int, count: int | None = None) -> np.ndarray:
        """A matrix of rank `count` (full rank by default) whose singular values lie apart, at least half of the mean distance.

        With small whole numbers the singular values are 1, 2, ..., each the only entry of its row and column.
        """
        count = min(rows, columns) if count is None else count
        values = np.arange(count, 0, -1.0)
        if self.entries == "normal":
            return self.with_spectrum(rows, columns, values + self.rng.random(count) / 2)
        matrix = np.zeros((rows, columns))
        matrix[self.rng.permutation(rows)[:count], self.rng.permutation(columns)[:count]] = values * self.rng.choice([1.0, -1.0], count)
        return matrix

    def invertible(self, side: int, condition: float) -> np.ndarray:
        """A square matrix with singular values spread from 1 to 1 / `condition`."""
        return self.with_spectrum(side, side, np.geomspace(1, 1 / condition, side))


class ScalingCase(NamedTuple):
    """What a scaling is made from."""

    alpha: float
    rank: int


def scaling_cases() -> st.SearchStrategy[ScalingCase]:
    """An alpha and a rank."""
    return st.builds(ScalingCase, alpha=st.sampled_from([1.0, 8.0, 16.0, 0.3]), rank=st.integers(1, 512))


class Gradients(NamedTuple):
    """The gradients of some batches."""

    gradients: np.ndarray  # (batches, out, in)


@st.composite
def many_gradients(draw: st.DrawFn) -> Gradients:
    """So many gradients of whole numbers that a sum of low precision stops growing."""
    rng = Matrices(draw(seeds())).rng
    return Gradients(rng.integers(1, 100, (768, draw(st.integers(2, 3)), draw(st.integers(2, 3)))).astype(float))
