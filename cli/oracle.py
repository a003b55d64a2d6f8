"""`loracle check` and `loracle adapter`."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Format(StrEnum):
    """How a report is written."""

    text = "text"
    json = "json"
    markdown = "markdown"


def check(
    implementation: Annotated[
        str | None, typer.Argument(help="package.module, file.py, or either with :object; default: those of \\[tool.loracle]")
    ] = None,
    paper: Annotated[str | None, typer.Option(help="The paper's slug, for example lora.")] = None,
    law: Annotated[list[str] | None, typer.Option(help="Run this law only (may be repeated), for example lora.L3a.")] = None,
    profile: Annotated[str | None, typer.Option(help="quick, default or deep: 10, 50 or 1000 cases a law.")] = None,
    arrays: Annotated[str | None, typer.Option(help="torch, numpy or jax: what the functions take and return.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float64, float32, float16 or bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda, for torch.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Factor on every tolerance, at most 10; the report shows it.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds a law may take (default 30).")] = None,
    isolate: Annotated[bool, typer.Option(help="Run each law in its own process: ends hangs inside compiled code too.")] = False,
    output: Annotated[Format, typer.Option("--format", help="How the report is written.")] = Format.text,
    out: Annotated[Path | None, typer.Option(help="Write the report to this file instead of the terminal.")] = None,
) -> None:
    """Hold an implementation against the laws of a paper.

    An implementation is a module, file or object with some of the functions of the paper's reference file; they are called by
    keyword. What it lacks reads "missing". `loracle adapter PAPER` writes a stub with every signature.

    Examples:

      loracle check my_package.my_lora --paper lora

      loracle check my_lora.py --paper lora --dtype float32 --format json --out report.json

    Exit code: 0 all that was checked holds, 1 a law fails, 2 nothing was checked, 3 wrong usage.
    """
    from loracle.oracle_tests.contract import UsageError
    from loracle.oracle_tests.settings import load_settings

    try:
        settings = load_settings(Path.cwd())
        runs = _runs(implementation, paper, settings.implementations)
        if out is not None:
            _check_writable(out)
        chosen = {"arrays": arrays, "dtype": dtype, "device": device, "tolerance": tolerance}
        options = settings.options() | {key: value for key, value in chosen.items() if value is not None}
        limit = settings.time_limit if time_limit is None else time_limit
        reports = [
            _check(spec, slug, law, profile or settings.profile, settings.expected_failures, limit, isolate, options) for slug, spec in runs
        ]
        _write(reports, output, out)
    except UsageError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(3) from None
    codes = {report.exit_code for report in reports}
    raise typer.Exit(1 if 1 in codes else 0 if 0 in codes else 2)


def _runs(implementation: str | None, paper: str | None, configured: dict[str, str]) -> list[tuple[str, str]]:
    """Pairs of slug and implementation."""
    from loracle.oracle_tests.contract import UsageError, check_paper

    if implementation is None:
        if not configured:
            raise UsageError("name an implementation, or list some under [tool.loracle.implementations] in pyproject.toml")
        if paper is not None and check_paper(paper) not in configured:
            raise UsageError(f"no implementation of {paper} is named in the settings; they name: {', '.join(configured)}")
        return [(slug, spec) for slug, spec in configured.items() if paper in (None, slug)]
    if paper is None:
        raise UsageError("name the paper: --paper lora")
    return [(check_paper(paper), implementation)]


def _check(
    spec: str,
    slug: str,
    laws: list[str] | None,
    profile: str,
    expected: dict[str, str],
    time_limit: float,
    isolate: bool,
    options: dict[str, Any],
) -> Any:
    from rich.console import Console
    from rich.progress import track

    from loracle.oracle_tests.law import laws_of
    from loracle.oracle_tests.running import check as run

    count = len(laws) if laws else sum(not law.is_theorem for law in laws_of(slug))
    console = Console(stderr=True)
    steps = iter(track(range(count), description=f"{slug} of {spec}", console=console, transient=True, disable=not console.is_terminal))
    next(steps, None)

    def advance(result: object) -> None:
        next(steps, None)

    return run(
        spec,
        paper=slug,
        laws=laws,
        profile=profile,
        expected_failures=expected,
        time_limit=time_limit,
        isolate=isolate,
        on_result=advance,
        **options,
    )


def _check_writable(out: Path) -> None:
    """Raise UsageError, before the work, if the report could not be written after it."""
    from loracle.oracle_tests.contract import UsageError

    try:
        with out.open("a"):
            pass
    except OSError as error:
        raise UsageError(f"cannot write the report to {out}: {error.strerror}; name a file in a folder that exists") from error


def _write(done: list[Any], output: Format, out: Path | None) -> None:
    """The reports on the terminal or in a file; as JSON one object, or a list of them where several papers were checked."""
    from loracle.oracle_tests import report as reports

    form = {"text": reports.as_text, "json": reports.as_json, "markdown": reports.as_markdown}[output]
    texts = [form(report).rstrip("\n") for report in done]
    text = f"[{', '.join(texts)}]" if output is Format.json and len(texts) > 1 else "\n\n".join(texts)
    if out is None:
        sys.stdout.write(text + "\n")
        return
    from loracle.oracle_tests.files import write_atomically

    write_atomically(out, text + "\n")
    typer.echo("\n".join([*map(reports.summary, done), f"written to {out}"]))


def adapter(paper: Annotated[str, typer.Argument(help="The paper's slug, for example lora.")]) -> None:
    """Print a stub with every function of a paper: signature, shapes, and the laws that need it.

    Example: loracle adapter lora > my_adapter.py
    """
    from loracle.oracle_tests.contract import UsageError
    from loracle.oracle_tests.stub import stub

    try:
        sys.stdout.write(stub(paper))
    except UsageError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(3) from None
