"""`loracle toy`: list, run and verify the experiments. Imports torch only when an experiment runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..toy_tasks.experiment import Task
    from ..toy_tasks.records import Judged, Results

SEEDS, QUICK_SEEDS, COMPARED_SEEDS = 5, 3, 10
FAILED, NOTHING_CHECKED, WRONG_USAGE, INTERRUPTED = 1, 2, 3, 130

Device = Annotated[str, typer.Option(help="Where to compute: cpu or cuda. The random draws are the same on both.")]
Quick = Annotated[bool, typer.Option("--quick", help="A few seconds, to see it work; the numbers then mean nothing.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of configs/SLUG.toml; may be repeated.")
]
Out = Annotated[Path | None, typer.Option(help="Where to write.", show_default="runs/SLUG, or runs/SLUG-quick")]

app = typer.Typer(no_args_is_help=True, help="The experiments: one per paper, each under a minute on a laptop.")
console = Console()
errors = Console(stderr=True)


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn errors that the user can mend into a message and an exit code: 3 for wrong usage, 1 otherwise."""
    from ..toy_tasks.config import ToyError, UsageError

    try:
        yield
    except ToyError as error:
        errors.print(f"[bold]error:[/bold] {_plain(str(error))}", soft_wrap=True)
        raise typer.Exit(WRONG_USAGE if isinstance(error, UsageError) else FAILED) from None


def _plain(text: str) -> str:
    """Text whose square brackets rich does not take for markup."""
    from rich.markup import escape

    return escape(text)


@app.command("list")
def list_experiments() -> None:
    """List the experiments: slug, paper, and the question that each answers."""
    from ..toy_tasks.experiment import describe, find_slugs

    table = Table("slug", "paper", "question", title="Experiments", title_justify="left")
    for slug in find_slugs():
        title, question = describe(slug)
        table.add_row(slug, title or "all of them", question)
    console.print(table)
    console.print("Run one with [bold]loracle toy run SLUG[/bold].")


@app.command()
def run(
    slug: Annotated[str, typer.Argument(help="Which experiment; `loracle toy list` names them.", show_default=False)],
    device: Device = "cpu",
    seeds: Annotated[int | None, typer.Option(help="How many seeds, 0 to N-1; with --quick 3.", show_default=str(SEEDS))] = None,
    quick: Quick = False,
    settings: Settings = None,
    out: Out = None,
) -> None:
    """Run an experiment: measure, judge the paper's claims, write results.json and the figure.

    A claim is shown when the whole 95 % interval over seeds lies on the right side of its threshold.

    Ctrl-C keeps the parts that are finished; the same command goes on from there.

    \b
    Examples:
      loracle toy run lora
      loracle toy run lora --quick
      loracle toy run lora --seeds 10 --set digits_ranks=1,2 --set digits_lr=0.003 --out runs/narrow
    """
    count = seeds if seeds is not None else QUICK_SEEDS if quick else SEEDS
    _run(slug, _print_results, device, count, quick, settings, out)


@app.command()
def compare(
    device: Device = "cpu",
    seeds: Annotated[int | None, typer.Option(help="How many seeds, 0 to N-1; with --quick 3.", show_default=str(COMPARED_SEEDS))] = None,
    quick: Quick = False,
    settings: Settings = None,
    out: Out = None,
) -> None:
    """Compare all methods: the same two tasks, at equal rank and with equally many trained numbers, the learning rate tuned alike.

    Every method gets the same learning rates to choose from, tried with the same seeds, none of which is reported.

    \b
    Examples:
      loracle toy compare
      loracle toy compare --quick
      loracle toy compare --seeds 5 --set rank=2 --set rates=10,30,100,300 --out runs/rank-2
    """
    count = seeds if seeds is not None else QUICK_SEEDS if quick else COMPARED_SEEDS
    _run("compare", _print_comparison, device, count, quick, settings, out)


def _run(
    slug: str,
    show: Callable[[Task, Results], None],
    device: str,
    seeds: int,
    quick: bool,
    settings: list[str] | None,
    out: Path | None,
) -> None:
    """Run an experiment, `show` its results, and write them and the figure."""
    with _exit_codes():
        from ..toy_tasks.experiment import check_slug, load
        from ..toy_tasks.experiment import run as run_task

        check_slug(slug)
        out = out or Path("runs") / (f"{slug}-quick" if quick else slug)
        task, config = load(slug, quick=quick, overrides=settings or ())
        try:
            with _progress() as progress:
                report = _reporter(task, progress)
                results = run_task(task, config, seeds=range(seeds), out=out, device=device, quick=quick, report=report)
        except KeyboardInterrupt:
            errors.print(
                f"interrupted; finished parts are kept in {out / 'parts'}, and the same command goes on from there", soft_wrap=True
            )
            raise typer.Exit(INTERRUPTED) from None
        show(task, results)

        from ..toy_tasks.plotting import save

        save(task.figure(results), out / "figure.svg")
    console.print(f"\nresults: {out / 'results.json'}\nfigure:  {out / 'figure.svg'}", soft_wrap=True, highlight=False)


@app.command()
def verify(
    slugs: Annotated[list[str] | None, typer.Argument(metavar="[SLUG]...", help="Which experiments; default: all published ones.")] = None,
) -> None:
    """Run experiments again and compare with the published results: same settings and verdicts, metrics within tolerance.

    Exit code 0: all agree; 1: some differ; 2: there was nothing to compare with; 3: wrong usage.

    \b
    Examples:
      loracle toy verify
      loracle toy verify lora
    """
    from tempfile import TemporaryDirectory

    with _exit_codes():
        from ..toy_tasks.experiment import check_slug, find_slugs, load
        from ..toy_tasks.experiment import run as run_task
        from ..toy_tasks.records import PUBLISHED, differences, read_results

        for slug in slugs or ():
            check_slug(slug)
        named = slugs or [slug for slug in find_slugs() if (PUBLISHED / f"{slug}.json").exists()]
        differing = 0
        for slug in named:
            published = read_results(PUBLISHED / f"{slug}.json")
            task, config = load(slug)
            with TemporaryDirectory() as folder, _progress() as progress:
                rerun = run_task(task, config, seeds=published.seeds, out=Path(folder), report=_reporter(task, progress))
            found = differences(published, rerun, {name: quantity.tolerance for name, quantity in task.quantities.items()})
            differing += bool(found)
            console.print(f"{slug}: {'differs' if found else 'agrees with the published results'}", highlight=False)
            for line in found:
                console.print(f"  {_plain(line)}", soft_wrap=True, highlight=False)
    if not named:
        errors.print("no published results to compare with")
        raise typer.Exit(NOTHING_CHECKED)
    raise typer.Exit(FAILED if differing else 0)


def _progress() -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(), transient=True
    )


def _reporter(task: Task, progress: Progress) -> Callable[[str, float], None]:
    """A bar for each part, moved by `report(part, fraction)`."""
    bars = {part.name: progress.add_task(part.title, total=1.0, start=False) for part in task.parts}

    def report(part: str, fraction: float) -> None:
        progress.start_task(bars[part])
        progress.update(bars[part], completed=fraction)

    return report


def _print_comparison(task: Task, results: Results) -> None:
    """One table: a section for each task and regime."""
    from rich.box import SIMPLE_HEAD

    from ..toy_tasks.tasks import compare as comparison

    table = Table(*comparison.HEADINGS, title="\nAll methods, treated alike", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for section in comparison.sections(results):
        table.add_row(f"[bold]{section.title}[/bold]")
        for row in section.rows:
            table.add_row(*row)
        table.add_section()
    console.print(table)
    for line in comparison.notes(results):
        console.print(line, highlight=False)
    _print_cost(results)
    if results.quick:
        console.print("A quick run is too short for its numbers to mean anything.")


def _print_cost(results: Results) -> None:
    """What the intervals are, how long it took and where."""
    seconds = sum(results.seconds.values())
    note = f"Mean ± half of the 95 % interval over {len(results.seeds)} seeds, unless below 0.0005. {seconds:.1f} s on {results.device}."
    console.print(note, highlight=False)


def _print_results(task: Task, results: Results) -> None:
    """One table for each part, then the claims with their verdicts."""
    from ..toy_tasks.records import as_text

    for part in task.parts:
        own = [name.split(".") for name in results.metrics if name.startswith(f"{part.name}.")]
        quantities = list(dict.fromkeys(quantity for _, _, quantity in own))
        headings = [task.quantities[quantity].label for quantity in quantities]
        if part.baseline:
            headings.insert(1, f"minus {part.baseline}")
        table = Table("", title=f"\n{part.title}", title_justify="left")
        for heading in headings:
            table.add_column(heading, justify="right")
        for variant in dict.fromkeys(variant for _, variant, _ in own):
            metrics = [results.metrics.get(f"{part.name}.{variant}.{quantity}") for quantity in quantities]
            cells = [as_text(metric) for metric in metrics]
            if part.baseline:
                cells.insert(1, as_text(metrics[0] and metrics[0].difference))
            table.add_row(variant.replace("_", " "), *cells)
        console.print(table)
    _print_cost(results)
    if not results.claims:
        return

    table = Table("verdict", "claim", "measured", title="\nClaims", title_justify="left", show_lines=True)
    for claim in results.claims:
        measured = f"{_range(claim)}\nneeded {claim.comparison} {claim.threshold:g}"
        table.add_row(_verdict(claim, results.quick), f"{claim.id}: {_plain(claim.sentence)}", measured)
    console.print(table)
    if results.quick:
        console.print("A quick run is too short for its verdicts to mean anything.")


def _range(claim: Judged) -> str:
    """What was measured, as an interval."""
    if claim.low is None or claim.high is None:
        return "-" if claim.verdict == "not measured" else "not finite"
    return f"{claim.low:.3g} to {claim.high:.3g}"


def _verdict(claim: Judged, quick: bool) -> str:
    style = "green" if claim.verdict == "shown" else "yellow"
    if quick or claim.verdict == "not measured":
        return f"[{style}]{claim.verdict}[/{style}]"
    return f"[{style}]{claim.verdict}[/{style}]\n" + ("as expected" if claim.as_expected else "[bold]not as expected[/bold]")
