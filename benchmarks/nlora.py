"""Time of NLoRA's start against PiSSA's decompositions, on square weights of several widths, and how each grows.

Rank 64, float32. "copies" are three slices, as in the official code; "block" and "pinv" are `nlora.init`, which also reads the
whole weight once to refuse what is not finite; "pinv, corrected" subtracts the product from the weight as well. PiSSA decomposes
the weight exactly, or by `torch.svd_lowrank` with four iterations; both are timed without PiSSA's own correction. Calls
alternate, and the fastest of several counts, since other work on a machine only adds time; the exact decompositions from 2048
on are timed once. Widths may be given: `python benchmarks/nlora.py 512 1024`; then nothing is written.
"""

import math
import os
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from _results import promise, write

from loracle.reference import nlora

RANK, WIDTHS, CALLS = 64, (512, 1024, 2048, 4096), 15
SLOW = "PiSSA, exact SVD"


def starts(W0: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    return {
        "copies": lambda: (W0[:RANK].clone(), W0[:RANK, :RANK].clone(), W0[:, :RANK].clone()),
        "block": lambda: nlora.init(W0, rank=RANK),
        "pinv": lambda: nlora.init(W0, rank=RANK, core="pinv"),
        "pinv, corrected": lambda: nlora.init(W0, rank=RANK, core="pinv", residual=True),
        "PiSSA, randomised SVD": lambda: torch.svd_lowrank(W0, q=RANK, niter=4),
        SLOW: lambda: torch.linalg.svd(W0, full_matrices=False),
    }


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(width: int) -> dict[str, float]:
    """The shortest time of each start for one width; the exact decomposition once from 2048 on."""
    W0 = torch.randn(width, width, generator=torch.Generator().manual_seed(width)) / math.sqrt(width)
    calls = starts(W0)
    once = {SLOW} if width >= 2048 else set()
    for name in calls.keys() - once:
        calls[name]()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(CALLS):
        for name in calls.keys() - once:
            times[name].append(seconds(calls[name]))
    for name in once:
        times[name].append(seconds(calls[name]))
    return {name: min(found) for name, found in times.items()}


def exponent(widths: tuple[int, ...], times: list[float]) -> float:
    """The power of the width with which a time grows: the slope in a plot with two logarithmic axes, by least squares."""
    return float(np.polyfit(np.log(widths), np.log(times), 1)[0])


def main(widths: tuple[int, ...], keep: bool) -> None:
    """Print the times and the exponents, and keep them."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    rows = []
    for width in widths:
        rows.append(measure(width))
        print(f"{width:5} " + "  ".join(f"{name} {1e3 * value:.3g} ms" for name, value in rows[-1].items()), flush=True)
    found = {name: [row[name] for row in rows] for name in rows[0]}
    exponents = {name: exponent(widths, times) for name, times in found.items()} if len(widths) > 1 else {}
    for name, power in exponents.items():
        print(f"{name:22} grows with the width to the power {power:.2f}")
    promises = []
    for other in (SLOW, "PiSSA, randomised SVD"):
        says = f"NLoRA's start (block), {widths[-1]} x {widths[-1]}, rank {RANK}, as a share of the time of {other}"
        promises.append(promise(says, found["block"][-1] / found[other][-1], 1.0))
    if keep:
        write("nlora", {"rank": RANK, "widths": widths, "seconds": found, "exponents": exponents, "promises": promises})


if __name__ == "__main__":
    chosen = tuple(map(int, sys.argv[1:]))
    main(chosen or WIDTHS, keep=not chosen)
