"""Where measured times are kept, for the page of the site that shows them: results/NAME.json."""

import json
import math
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from loracle.oracle_tests.files import write_atomically

FOLDER = Path(__file__).parent / "results"


def write(name: str, measured: dict[str, Any], *, device: str = "cpu") -> None:
    """Write what a benchmark measured, with the machine that it was measured on."""
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    environment = {"device": device, "machine": machine, "threads": torch.get_num_threads(), "torch": torch.__version__}
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    write_atomically(path, json.dumps({"environment": environment, **measured}, indent=1) + "\n")
    print(f"written to {path}")


def promise(says: str, found: float, limit: float, unit: str = "", between: tuple[float, float] | None = None) -> dict[str, Any]:
    """One number that has a limit, printed and to be written; `between` is a 95 % interval of it, where the noise matters."""
    noise = f", between {between[0]:.4g} and {between[1]:.4g}" if between else ""
    print(f"{says}: {found:.3g}{unit}{noise} (at most {limit:g}{unit})")
    return {"says": says, "found": found, "limit": limit, "unit": unit, **({"between": between} if between else {})}


def median_ratio(ours: list[float], theirs: list[float]) -> tuple[float, tuple[float, float]]:
    """The median of ratios of times that were taken in pairs, and its 95 % interval, from the ratios' order alone."""
    ratios = sorted(one / other for one, other in zip(ours, theirs, strict=True))
    # As many ratios lie below the true median as heads in n throws: n / 2 with standard deviation sqrt(n) / 2
    first = max(1, math.floor(len(ratios) / 2 - 0.98 * math.sqrt(len(ratios))))
    return statistics.median(ratios), (ratios[first - 1], ratios[-first])
