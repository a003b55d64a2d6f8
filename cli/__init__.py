"""The console command `loracle`. Subcommands import torch, hypothesis and the rooms only when they run."""

import typer

from . import conformance, full, oracle, strength, toy, vectors

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reference implementation and test oracle for low-rank adaptation (LoRA).",
)
app.add_typer(toy.app, name="toy")
app.add_typer(full.app, name="full")
app.add_typer(vectors.app, name="vectors")
app.command()(oracle.check)
app.command()(oracle.adapter)
app.command()(conformance.conformance)
app.command()(strength.strength)


def main() -> None:
    """Entry point of the console command."""
    # Wrong usage ends with code 3 in every command; the parser's own 2 would read as "nothing was checked"
    typer.BadParameter.__base__.exit_code = 3  # type: ignore[union-attr]
    app()
