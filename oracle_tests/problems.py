"""Losses of a weight matrix, in NumPy, with their gradients: what laws and theorem checks differentiate."""

from collections.abc import Callable
from typing import Any

import numpy as np


def slope(loss: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1.0) -> np.ndarray:
    """The gradient of `loss` at the matrix `at`, entry by entry, by central differences: exact if `loss` is quadratic there."""
    gradient = np.empty_like(at)
    for index in np.ndindex(at.shape):
        forward, backward = at.copy(), at.copy()
        forward[index] += step
        backward[index] -= step
        gradient[index] = (loss(forward) - loss(backward)) / (2 * step)
    return gradient


class LinearRegression:
    """Mean over samples of half the squared error, summed over outputs: W (out, in) on X (samples, in), Y (samples, out)."""

    def __init__(self, X: np.ndarray, Y: np.ndarray) -> None:
        self.X, self.Y = X, Y

    def loss(self, W: np.ndarray) -> float:
        return float(0.5 * np.sum((self.X @ W.T - self.Y) ** 2) / len(self.X))

    def grad(self, W: np.ndarray, rows: Any = slice(None)) -> np.ndarray:
        """The gradient of the mean loss of all samples, or of some."""
        X, Y = self.X[rows], self.Y[rows]
        gradient: np.ndarray = (X @ W.T - Y).T @ X / len(X)
        return gradient


class LogisticRegression:
    """Mean over samples of the logistic loss, summed over outputs: W (out, in), X (samples, in), labels Y (samples, out) of +-1."""

    def __init__(self, X: np.ndarray, Y: np.ndarray) -> None:
        self.X, self.Y = X, Y

    def loss(self, W: np.ndarray) -> float:
        return float(np.sum(np.logaddexp(0, -self.Y * (self.X @ W.T))) / len(self.X))

    def grad(self, W: np.ndarray, rows: Any = slice(None)) -> np.ndarray:
        """The gradient of the mean loss of all samples, or of some."""
        X, Y = self.X[rows], self.Y[rows]
        gradient: np.ndarray = (-Y / (1 + np.exp(Y * (X @ W.T)))).T @ X / len(X)
        return gradient
