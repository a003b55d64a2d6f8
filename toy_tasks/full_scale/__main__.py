"""`accelerate launch -m loracle.toy_tasks.full_scale SLUG [options]`: `loracle full run` in every process that accelerate starts."""

import typer

from ...cli import full

if __name__ == "__main__":
    typer.BadParameter.__base__.exit_code = 3  # type: ignore[union-attr]
    typer.run(full.run)
