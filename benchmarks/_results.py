"""Where measured times are kept, for the page of the site that shows them: results/NAME.json."""

import json
import platform
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


def promise(says: str, found: float, limit: float, unit: str = "") -> dict[str, Any]:
    """One number that has a limit, printed and to be written."""
    print(f"{says}: {found:.3g}{unit} (at most {limit:g}{unit})")
    return {"says": says, "found": found, "limit": limit, "unit": unit}
