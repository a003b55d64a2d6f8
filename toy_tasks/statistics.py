"""Mean and 95 % interval over seeds. Needs no torch."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """Mean and 95 % confidence interval; all None if a value was not finite."""

    mean: float | None
    low: float | None
    high: float | None


def interval(values: Sequence[float | None]) -> Interval:
    """Student's 95 % interval of the mean of independent values, one per seed.

    Raises:
        ValueError: fewer than two values.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"{n} values given; an interval needs two or more")
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) < n:
        return Interval(None, None, None)
    mean = math.fsum(finite) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in finite) / (n - 1))
    half = t_quantile(n - 1) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t distribution, for a whole number of degrees of freedom.

    With t = sqrt(degrees) tan(theta) the density becomes proportional to cos(theta) ** (degrees - 1) on (-pi/2, pi/2), whose
    integral from 0 has the closed recursion used in `_cosine_integral`.
    """
    target = 0.95 * _cosine_integral(math.pi / 2, degrees - 1)  # between -t and t lies 0.95; by symmetry, of one half too
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _cosine_integral(middle, degrees - 1) < target else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _cosine_integral(theta: float, power: int) -> float:
    """Integral of cos ** power from 0 to theta: I_p = cos^(p-1) sin / p + (p - 1) / p I_(p-2)."""
    total = theta if power % 2 == 0 else math.sin(theta)
    for p in range(2 + power % 2, power + 1, 2):
        total = math.cos(theta) ** (p - 1) * math.sin(theta) / p + (p - 1) / p * total
    return total
