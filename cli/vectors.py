"""`loracle vectors`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Test vectors for implementations in other languages.")


@app.callback()
def vectors() -> None:
    """Test vectors for implementations in other languages."""


@app.command()
def export(
    papers: Annotated[list[str], typer.Argument(help="Slugs, for example lora lora_ga.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("vectors"),
) -> None:
    """Write cases with their expected values as safetensors with a JSON manifest.

    A reader needs nothing but these two formats; the manifest says how to compare. No expected value comes from an
    implementation.

    Example: loracle vectors export lora lora_ga --out vectors
    """
    from loracle.oracle_tests.contract import UsageError
    from loracle.oracle_tests.vectors import export as write

    for paper in papers:
        try:
            typer.echo(f"{write(paper, out)}")
        except UsageError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(3) from None
        except OSError as error:
            typer.echo(f"cannot write to {out}: {error}", err=True)
            raise typer.Exit(1) from None
