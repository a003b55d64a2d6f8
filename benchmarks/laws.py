"""Time of every paper's laws at the default profile in one process, all imports included, on one core.

python benchmarks/laws.py
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from _results import promise, write

REFERENCE = Path(__file__).parents[1] / "reference"


def main() -> None:
    """Print every paper's time, and write them."""
    found = []
    for slug in sorted(file.stem for file in REFERENCE.glob("[!_]*.py")):
        start = time.perf_counter()
        command = [sys.executable, "-m", "loracle.cli", "check", f"loracle.reference.{slug}", "--paper", slug]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        found.append(promise(f"The laws of {slug}", time.perf_counter() - start, 8, " s"))
    write("laws", {"promises": found})


if __name__ == "__main__":
    main()
