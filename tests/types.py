"""Run mypy over the installed names: `loracle.reference` is the folder `reference`, which mypy sees through links."""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

with tempfile.TemporaryDirectory() as folder:
    package = Path(folder, "loracle")
    package.mkdir()
    for room in ("reference", "oracle_tests", "toy_tasks", "cli"):
        (package / room).symlink_to(ROOT / room)
    command = ["mypy", "--config-file", str(ROOT / "pyproject.toml"), "--explicit-package-bases", "-p", "loracle"]
    sys.exit(subprocess.run([sys.executable, "-m", *command], cwd=folder, env={"MYPYPATH": folder}).returncode)
