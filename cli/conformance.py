"""`loracle conformance`."""

from typing import Annotated

import typer


def conformance(
    libraries: Annotated[list[str] | None, typer.Argument(help="Adapters, for example peft_lora; default: all.")] = None,
    publish: Annotated[bool, typer.Option(help="Write what was measured to where the site reads it.")] = False,
) -> None:
    """Run the libraries that have adapters against the laws, and compare with what is published.

    Example: loracle conformance peft_lora

    Exit code: 0 as published, 1 something differs, 3 wrong usage.
    """
    from rich.console import Console
    from rich.table import Table

    from loracle.oracle_tests import conformance as room
    from loracle.oracle_tests.contract import nearest

    different = False
    for name in libraries or room.names():
        if name not in room.names():
            typer.echo(f"there is no adapter {name!r}{nearest(name, room.names())}; known: {', '.join(room.names())}", err=True)
            raise typer.Exit(3)
        console = Console(stderr=True)
        with console.status(name) as status:
            result = room.measure(name, on_result=lambda r, name=name, status=status: status.update(f"{name}: {r.law}"))  # type: ignore[misc]
        table = Table("law", "outcome", "note", title=f"{result['paper']} of {result['library']} {result['version']}")
        for law, row in result["laws"].items():
            table.add_row(law, row["outcome"], row["note"])
        Console().print(table)
        said = room.differences(room.published(name), result)
        if publish and not any(row["outcome"] == "fails" for row in result["laws"].values()):
            typer.echo(f"written to {room.publish(name, result)}")
        elif said:
            different = True
            typer.echo("\n".join(said))
    raise typer.Exit(1 if different else 0)
