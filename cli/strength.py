"""`loracle strength`: mutants of a reference file, and which of them the oracle kills."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

T = TypeVar("T")


class Format(StrEnum):
    """How the numbers are written."""

    text = "text"
    json = "json"


if TYPE_CHECKING:
    from rich.console import Console

    from ..oracle_tests.strength import Strength


def strength(
    paper: Annotated[str, typer.Argument(help="The paper's slug, for example lora.")],
    mistakes: Annotated[bool, typer.Option("--mistakes", help="Show which law kills which known mistake, and make no mutants.")] = False,
    publish: Annotated[
        bool, typer.Option("--publish", help="Write the numbers to oracle_tests/strength/PAPER.json, for the site.")
    ] = False,
    output: Annotated[Format, typer.Option("--format", help="text or json.")] = Format.text,
) -> None:
    """Measure how strong the oracle is on a paper: make small changes to its reference file and count those that are noticed.

    Every survivor needs a reason in oracle_tests/strength/PAPER.toml. The run ends with 1 if fewer than 95 % are killed, a
    survivor has no reason, or a reason belongs to no survivor; with 3 after wrong usage; else with 0.

    \b
    Examples:
      loracle strength lora
      loracle strength lora --mistakes
      loracle strength lora --publish
    """
    from rich.console import Console

    from loracle.oracle_tests.contract import UsageError
    from loracle.oracle_tests.strength import as_record, law_by_mistake, measure
    from loracle.oracle_tests.strength import publish as write

    console = Console(stderr=True)
    try:
        if mistakes:
            table = _tracked(console, f"mistakes of {paper}", lambda step: law_by_mistake(paper, on_mistake=step))
            _print_mistakes(table, output)
            return
        found = _tracked(console, f"mutants of {paper}", lambda step: measure(paper, on_mutant=step))
        if publish or output is Format.json:
            record = as_record(found, _tracked(console, f"mistakes of {paper}", lambda step: law_by_mistake(paper, on_mistake=step)))
    except UsageError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(3) from None
    if output is Format.json:
        sys.stdout.write(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    else:
        _print_strength(found)
    if publish:
        typer.echo(f"written to {write(record)}", err=True)
    raise typer.Exit(found.exit_code)


def _tracked(console: Console, title: str, work: Callable[[Callable[[int, int], None]], T]) -> T:
    """Do the work, which reports (done, all), under a progress bar."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(title, total=None)
        return work(lambda done, total: progress.update(bar, completed=done, total=total))


def _print_strength(found: Strength) -> None:
    from collections import Counter

    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    functions = Counter(o.mutant.function or "(module)" for o in found.outcomes)
    killed = Counter(o.mutant.function or "(module)" for o in found.outcomes if o.killer)
    table = Table("function", "mutants", "killed", title=f"reference/{found.paper}.py", title_justify="left")
    for name, count in functions.items():
        table.add_row(name, str(count), str(killed[name]))
    table.add_section()
    table.add_row("all", str(len(found.outcomes)), f"{found.killed} ({found.score:.1%})")
    table.add_row("by laws", "", f"{found.killed_by_laws}; the rest by what the file promises of errors, defaults and modules")
    console.print(table)
    for mutant in found.survivors:
        reason = found.reasons.get((mutant.function, mutant.change), "UNEXPLAINED")
        text = f"reference/{found.paper}.py:{mutant.line} {mutant.function}: {mutant.operator}\n  {mutant.change}\n  {reason}"
        console.print(text, markup=False)
    for function, change in found.stale:
        console.print(f"STALE: a reason is given for a change that is not among the survivors\n  {function}: {change}", markup=False)
    rate = len(found.outcomes) / max(found.seconds, 1e-9)
    console.print(f"{len(found.survivors)} survivors, {len(found.unexplained)} unexplained, {len(found.stale)} stale reasons", markup=False)
    console.print(f"{found.seconds:.1f} s of processor time, {rate:.0f} mutants a second")


def _print_mistakes(table: dict[str, dict[str, bool]], output: Format) -> None:
    if output is Format.json:
        sys.stdout.write(json.dumps(table, indent=1) + "\n")
        return
    for mistake, row in table.items():
        typer.echo(f"{mistake:<40} {' '.join(law for law, kills in row.items() if kills) or '(none)'}")
