"""`accelerate launch --multi_gpu -m loracle.toy_tasks.full_scale SLUG`: `loracle full run` in every process that it starts."""

import sys
from importlib.metadata import entry_points

if __name__ == "__main__":
    (command,) = entry_points(group="console_scripts", name="loracle")
    sys.argv[1:1] = ["full", "run"]
    command.load()()
