"""What the pages of this site share: a page includes this file into a block that is run."""

import ast
import base64
import importlib
import importlib.resources
import inspect
import json
import pkgutil
import tempfile
import textwrap
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import loracle.reference
from loracle.toy_tasks.records import PUBLISHED, Results, read_results


# --8<-- [start:check]
def check(what: str, found: Any, expected: Any, limit: float = 1e-12) -> None:
    """Print the relative error of `found`, and stop the page if it is above `limit`."""
    found, expected = (
        torch.as_tensor(value, dtype=torch.float64) for value in (found, expected)
    )
    error = float((found - expected).norm() / expected.norm())
    print(f"{what}: relative error {error:.0e}")
    assert error <= limit
    # --8<-- [end:check]


def show(function: Callable[..., Any]) -> None:
    """Print the source of a reference function, without its docstring: the page explains."""
    lines, first = inspect.getsourcelines(function)
    node = ast.parse(textwrap.dedent("".join(lines))).body[0]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    if ast.get_docstring(node):
        del lines[node.body[0].lineno - 1 : node.body[0].end_lineno]
    path = function.__module__.removeprefix("loracle.").replace(".", "/") + ".py"
    print(f'```python title="{path}, line {first}"\n{"".join(lines).rstrip()}\n```')


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a Markdown table."""
    print(f"\n{_markdown(head, rows)}\n")


def folded(title: str, head: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table that opens when its title is clicked."""
    print(f'\n??? note "{title}"\n\n{textwrap.indent(_markdown(head, rows), "    ")}\n')


def _markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(head), *([str(cell).replace("|", r"\|") for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def papers() -> list[Any]:
    """The `PAPER` of every reference file: LoRA first, then by family, year and name."""
    names = [module.name for module in pkgutil.iter_modules(loracle.reference.__path__)]
    modules = [
        importlib.import_module(f"loracle.reference.{name}") for name in names if name[0] != "_"
    ]
    found = [module.PAPER for module in modules]
    return sorted(
        found, key=lambda paper: (paper.slug != "lora", paper.family, paper.year, paper.name)
    )


def header(paper: Any) -> None:
    """Print who wrote the paper, where it is and where its code is."""
    others = {1: "", 2: f" and {paper.authors[-1]}"}.get(len(paper.authors), " et al.")
    print(f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv}), ", end="")
    print(f"{paper.authors[0]}{others}, {paper.venue} {paper.year}.")
    if paper.official_code == "none":
        print("We found no code of the authors'.")
    else:
        print(
            f"Authors' code: [{paper.official_code}](https://github.com/{paper.official_code})."
        )


def strength(slug: str) -> dict[str, Any]:
    """The published strength of the oracle on a paper, or an empty dict."""
    return _published_json("strength", slug)


def conformance() -> list[dict[str, Any]]:
    """The published outcomes of all real libraries."""
    folder = importlib.resources.files("loracle.oracle_tests") / "adapters"
    names = sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".json"))
    return [_published_json("adapters", name) for name in names]


def _published_json(room: str, name: str) -> dict[str, Any]:
    path = importlib.resources.files("loracle.oracle_tests") / room / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def laws(slug: str) -> None:
    """Print the laws, the mistakes that they notice, then what is checked but is no law."""
    from loracle.oracle_tests.law import laws_of
    from loracle.oracle_tests.mistakes import mistakes_of

    measured = strength(slug).get("mistakes", {})
    stated = [law for law in laws_of(slug) if not law.is_theorem]
    rows = []
    for law in stated:
        formula = law.formula.replace(r"\|", r"\Vert ").replace("|", r"\vert ").strip()
        kills = sum(law.id in row["killed_by"] for row in measured.values())
        rows.append([f"`{law.id}`", f"{law.says}<br>${formula}$", kills if measured else "-"])
    table(["Law", "Statement", "Mistakes it notices"], rows)
    mistakes = [mistake for mistake in mistakes_of(slug) if not mistake.harmless]
    print(f"{len(stated)} laws, {len(mistakes)} mistakes.")
    if measured:
        wrong = [
            [mistake.says, ", ".join(f"`{law}`" for law in row["killed_by"])]
            for mistake in mistakes
            if (row := measured.get(mistake.name))
        ]
        folded("The mistakes, and the laws that notice each", ["Mistake", "Laws"], wrong)
    else:
        print("Which law notices which has not been measured yet.")
    if theorems := [law.says for law in laws_of(slug) if law.is_theorem]:
        print("\nTrue of the mathematics, so not counted:\n\n- " + "\n- ".join(theorems))
    if harmless := [
        f"{mistake.says} {mistake.harmless}"
        for mistake in mistakes_of(slug)
        if mistake.harmless
    ]:
        print("\nLooks like a mistake and is none:\n\n- " + "\n- ".join(harmless))


def figure(slug: str, alt: str) -> None:
    """Print the published experiment's figure as an image; for a block with `html="true"`."""
    from loracle.toy_tasks.experiment import load_task
    from loracle.toy_tasks.plotting import save

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "figure.svg")
        save(load_task(slug).figure(published(slug)), path)
        data = base64.b64encode(path.read_bytes()).decode()
    print(f'<p><img class="figure" alt="{alt}" src="data:image/svg+xml;base64,{data}"></p>')


def published(slug: str) -> Results:
    """The published run of an experiment."""
    return read_results(PUBLISHED / f"{slug}.json")


def verdicts(slug: str) -> None:
    """Print the claims that the experiment tested, what it measured, and each verdict."""
    results = published(slug)
    rows = []
    for claim in results.claims:
        measured = "not finite" if claim.low is None else f"{claim.low:.3g} to {claim.high:.3g}"
        needed = {"<=": "at most", ">=": "at least"}[claim.comparison] + f" {claim.threshold:g}"
        rows.append([f"**{claim.verdict}**", claim.sentence, needed, measured])
    table(
        ["Verdict", "Claim", "Needed", f"Measured, 95 % over {len(results.seeds)} seeds"], rows
    )


def full_scale(slug: str) -> None:
    """Print the settings of the full-scale run and the published figures to aim at."""
    path = Path(inspect.getfile(read_results)).with_name("configs") / f"{slug}.toml"
    full = tomllib.loads(path.read_text())["full"]
    full |= full.pop("options")
    aims, memory, source = full.pop("aims"), full.pop("from_memory"), full.pop("source")
    print(f"Settings from `toy_tasks/configs/{slug}.toml`. Source: {source}.")
    cells = (
        (key, ", ".join(value) if isinstance(value, list) else value)
        for key, value in full.items()
    )
    table(
        ["Setting", "Value"],
        (
            [f"`{key}`", f"{value}{' (from memory)' if key in memory else ''}"]
            for key, value in cells
        ),
    )
    print("Published figures to aim at:")
    table(
        ["Benchmark", "Method", "Value"],
        (
            [
                a["benchmark"],
                a["method"],
                f"{a['value']}{' (from memory)' if a['from_memory'] else ''}",
            ]
            for a in aims
        ),
    )


def bibtex(paper: Any) -> None:
    """Print the paper's BibTeX entry as a code block."""
    is_preprint = paper.venue == "arXiv"
    fields = {
        "title": paper.title,
        "author": " and ".join(paper.authors),
        "howpublished" if is_preprint else "booktitle": paper.venue,
        "year": paper.year,
        "eprint": paper.arxiv,
        "archiveprefix": "arXiv",
    }
    kind = "misc" if is_preprint else "inproceedings"
    body = "\n".join(f"  {key} = {{{value}}}," for key, value in fields.items())
    print(f"```bibtex\n@{kind}{{{paper.bibtex_key},\n{body}\n}}\n```")
