"""What laws assert of numbers that an implementation draws: where they lie, their moments, and that the seed decides them.

The assertions about numbers take 450 or more independent ones, and are wrong about right ones with a probability below 1e-8.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .law import assert_close


def assert_uniform(values: np.ndarray, bound: float, what: str) -> None:
    """Assert that numbers look uniform between -`bound` and `bound`; the bound itself may be rounded as the law's tolerance says."""
    u, beyond = values / bound, np.maximum(np.abs(values) - bound, 0)
    assert_close(beyond, 0 * values, size=bound, what=f"what {what} has beyond its bound {bound:.3g}")
    # With probability 1e-10 all of them stay below `edge` in size, or all on one side of 2 `edge` - 1, or of its negative
    edge = 1e-10 ** (1 / u.size)
    assert np.abs(u).max() > edge, f"none of the {u.size} entries of {what} is near its bound {bound:.3g}"
    reached = min(u.max(), -u.min())
    assert reached > 2 * edge - 1, f"on one side the entries of {what} reach only {reached:.3g} of the bound {bound:.3g}"
    # Standard errors of the mean and of the mean square of N such numbers: 1/sqrt(3N) and sqrt(4/45/N)
    assert_close(u.mean(), 0.0, within=6 / np.sqrt(3 * u.size), what=f"mean of {what} over its bound")
    assert_close((u**2).mean(), 1 / 3, within=7 * np.sqrt(4 / 45 / u.size), what=f"mean square of {what} over its bound")


def assert_normal(values: np.ndarray, width: float, what: str) -> None:
    """Assert that numbers look normal, with mean 0 and standard deviation `width`."""
    z = values / width
    # Standard errors of the mean and of the mean square of N such numbers: 1/sqrt(N) and sqrt(2/N)
    assert_close(z.mean(), 0.0, within=6 / np.sqrt(z.size), what=f"mean of {what} over its width")
    assert_close((z**2).mean(), 1.0, within=7 * np.sqrt(2 / z.size), what=f"mean square of {what} over its width")
    # All of 450 stay below two standard deviations with probability 8e-10; uniform numbers never leave 1.74
    assert np.abs(z).max() > 2, f"none of the {z.size} entries of {what} exceeds two standard deviations: no Gaussian"


def assert_seeded(draw: Callable[[int], Any], seed: int, *names: str) -> Any:
    """What `draw(seed)` returns, after asserting that the seed repeats it and that the next seed changes it.

    `names`: the parts of the result to look at; or, where it is one array, what to call that.
    """
    first, again, other = draw(seed), draw(seed), draw(seed + 1)
    for name in names:
        one, same, changed = (drawn if isinstance(drawn, np.ndarray) else getattr(drawn, name) for drawn in (first, again, other))
        assert_close(same, one, size=0, what=f"{name} from the same seed")
        assert np.any(changed != one), f"two seeds gave the same {name}; draw from the argument `generator`"
    return first
