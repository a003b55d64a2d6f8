"""The docs site: every code block is run or says why not, every numbered equation is checked, nothing comes from outside."""

import ast
import contextlib
import copy
import doctest
import importlib
import inspect
import io
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import markdown  # type: ignore[import-untyped]
import mkdocs.config
import pytest
import torch

import loracle.reference

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "tutorials").rglob("*.md"))
SLUGS = sorted(module.name for module in pkgutil.iter_modules(loracle.reference.__path__) if not module.name.startswith("_"))
SECONDS_PER_PAGE = 10
ROOMS = ("reference", "oracle_tests", "toy_tasks", "cli")
NOT_RUN = "not run here: "
FILE_NAME = r"[\w/-]+\.(py|toml|md)"

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "tutorials")))


class Block(NamedTuple):
    """A fenced block as superfences reads it: its options, its text in the page and its text with included files."""

    language: str
    options: dict[str, str]
    raw: str
    code: str


# Reading a page


def read_blocks(text: str) -> list[Block]:
    """All code blocks of a page in order. Raises ValueError if something looks like code but is not a fenced block."""
    opened = _count_openings(text)
    raw, pre = _superfences(text, snippets=False)
    if len(raw) != opened:
        raise ValueError(f"{opened} fences are opened, but {len(raw)} are read as blocks: a header is malformed or a fence is not closed")
    if pre:
        raise ValueError("a code block is indented instead of fenced, so that nothing says how it is checked")
    expanded, _ = _superfences(text, snippets=True)
    return [Block(language, options, body, full) for (language, options, body), (_, _, full) in zip(raw, expanded, strict=True)]


def _superfences(text: str, *, snippets: bool) -> tuple[list[tuple[str, dict[str, str], str]], bool]:
    """Blocks, found by the site's own Markdown extensions with a fence that records, and whether any other code is left."""
    found = []

    def validate(language: str, inputs: dict[str, str], options: dict[str, Any], attrs: dict[str, Any], md: markdown.Markdown) -> bool:
        options.update(inputs)
        return True

    def record(source: str, language: str, css_class: str, options: dict[str, Any], md: markdown.Markdown, **kwargs: Any) -> str:
        found.append((language, dict(options), source))
        return "<i></i>"

    config = mkdocs.config.load_config(str(ROOT / "mkdocs.yml"))
    extensions = [name for name in config.markdown_extensions if snippets or name != "pymdownx.snippets"]
    settings = copy.deepcopy({name: value for name, value in config.mdx_configs.items() if name in extensions})
    settings["pymdownx.superfences"] = {"custom_fences": [{"name": "*", "class": "", "validator": validate, "format": record}]}
    if snippets:
        settings["pymdownx.snippets"]["base_path"] = [str(ROOT)]
    page = markdown.Markdown(extensions=extensions, extension_configs=settings).convert(text)
    return found, "<pre" in page


def _count_openings(text: str) -> int:
    count, fence = 0, ""
    for line in text.splitlines():
        match = re.match(r"[\s>]*(`{3,}|~{3,})(.*)", line)
        if not match:
            continue
        if not fence:
            count, fence = count + 1, match[1]
        elif match[1].startswith(fence) and not match[2].strip():
            fence = ""
    return count


def block_class(block: Block) -> str:
    """How a block is checked. Raises ValueError unless exactly one way applies."""
    is_snippet = not re.sub(r'--8<-- "[^"]+"|--8<--\n.*?\n--8<--', "", block.raw, flags=re.S).strip()
    title = block.options.get("title", "")
    is_file = re.fullmatch(FILE_NAME, title) is not None and list(block.options) == ["title"]
    ways = {
        "markdown-exec": block.language == "python" and block.options.get("exec") == "true",
        "real file": bool(block.raw.strip()) and is_snippet and "exec" not in block.options,
        "file": is_file and not is_snippet,
        "no-run": title.startswith(NOT_RUN) and len(title) > len(NOT_RUN),
        "executed": block.language == "python" and not block.options and not is_snippet,
        "console": block.language == "console" and not block.options and not is_snippet,
    }
    found = [way for way, applies in ways.items() if applies]
    if len(found) != 1:
        raise ValueError(
            f"a block is in {len(found)} classes {found}, not in one of {list(ways)}: {block.language} {block.options}\n{block.raw}"
        )
    return found[0]


# Running a page


def run_page(text: str, *, session: str, mutate: bool = False) -> list[str]:
    """Run a page's blocks in order: Python in one namespace, commands in an empty folder that receives the page's files.

    With `mutate`, return each changed formula that no check noticed, and run no commands.
    """
    shared: dict[str, Any] = {"__name__": "page"}
    survivors = []
    blocks = read_blocks(text)
    with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        if any(block.options.get("title", "").startswith("reference/") for block in blocks):
            copy_checkout(Path(folder))
        for number, block in enumerate(blocks, 1):
            way, title = block_class(block), block.options.get("title", "")
            if way in {"file", "real file"} and re.fullmatch(FILE_NAME, title):
                Path(folder, title).parent.mkdir(parents=True, exist_ok=True)
                Path(folder, title).write_text(block.code + "\n")
            if way == "console" and not mutate:
                run_console(block.code, Path(folder))
            if way not in {"markdown-exec", "executed"}:
                continue
            if block.options.get("session", session) != session:
                raise ValueError(
                    f"block {number} has session {block.options['session']!r}; a page has one, named like its file: {session!r}"
                )
            alone = way == "markdown-exec" and "session" not in block.options
            namespace = {"__name__": "page"} if alone else shared
            if mutate:
                survivors += _unnoticed(block.code, namespace)
            exec(compile(block.code, f"<block {number} of {session}>", "exec"), namespace)
    return survivors


def copy_checkout(folder: Path) -> None:
    """Copy what a new paper touches, with the package `loracle` as a folder of links, for pages that add files to a checkout."""
    unwanted = shutil.ignore_patterns("__pycache__", ".*")
    for name in (*ROOMS, "tutorials", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("mkdocs.yml", "pyproject.toml", "conftest.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "loracle").mkdir()
    for name in ROOMS:
        (folder / "loracle" / name).symlink_to(folder / name)


def run_console(code: str, folder: Path) -> None:
    """Run each `$ command` in a folder and compare what it prints with the lines below it; `...` stands for anything."""
    for part in re.split(r"^\$ ", code, flags=re.M)[1:]:
        command, _, expected = part.partition("\n")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = os.environ | {"PATH": path, "NO_COLOR": "1", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
        if (folder / "loracle").is_dir():  # of a copied checkout, in place of the installed one
            environment["PYTHONPATH"] = str(folder)
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120
        )
        if not doctest.OutputChecker().check_output(expected.rstrip() + "\n", done.stdout.rstrip() + "\n", doctest.ELLIPSIS):
            raise AssertionError(f"$ {command}\nprinted\n{done.stdout}\nbut the page says\n{expected}")


def marked_lines(code: str) -> dict[int, str]:
    """The lines of a block that compute a numbered equation: line number -> equation number."""
    return {line: match[1] for line, text in enumerate(code.splitlines(), 1) if (match := re.search(r"# \((\d+)\)$", text))}


def mutants(expression: ast.expr) -> Iterator[ast.expr]:
    """The expression changed in its sign or by a factor 2, in one sum, difference, product or quotient, or in one constant."""
    yield ast.UnaryOp(ast.USub(), expression)
    yield ast.BinOp(ast.Constant(2), ast.Mult(), expression)
    inside = {id(node) for subscript in ast.walk(expression) if isinstance(subscript, ast.Subscript) for node in ast.walk(subscript.slice)}
    for position, node in enumerate(ast.walk(expression)):
        for change in _changes(node) if id(node) not in inside else []:
            changed = copy.deepcopy(expression)
            holder = ast.Expression(changed)
            target = list(ast.walk(changed))[position]
            yield _replace(holder, target, change).body


def _changes(node: ast.AST) -> list[ast.expr]:
    double = ast.Constant(2)
    match node:
        case ast.BinOp(left, ast.Add() | ast.Sub() as op, right):
            other = ast.Sub() if isinstance(op, ast.Add) else ast.Add()
            return [
                ast.BinOp(left, other, right),
                ast.BinOp(ast.BinOp(double, ast.Mult(), left), op, right),
                ast.BinOp(left, op, ast.BinOp(double, ast.Mult(), right)),
            ]
        case ast.BinOp(_, ast.Mult(), right):
            return [right]
        case ast.BinOp(left, ast.Div(), _):
            return [left]
        case ast.Constant(int() | float() as value) if not isinstance(value, bool):
            return [ast.Constant(value + 1)]
    return []


def _replace(holder: ast.Expression, target: ast.AST, change: ast.expr) -> ast.Expression:
    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> Any:
            return copy.deepcopy(change) if node is target else self.generic_visit(node)

    changed = Replace().visit(holder)
    assert isinstance(changed, ast.Expression)
    return changed


def _unnoticed(code: str, namespace: dict[str, Any]) -> list[str]:
    """Change each marked formula of a block in each way, run the block; return the changes that raise no AssertionError."""
    survivors = []
    states = {name: value.get_state() for name, value in namespace.items() if isinstance(value, torch.Generator)}
    for line, number in marked_lines(code).items():
        tree = ast.parse(code)
        statements = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and node.lineno <= line <= (node.end_lineno or 0)]
        if len(statements) != 1:
            raise ValueError(f"({number}) marks a line that assigns nothing: {code.splitlines()[line - 1]}")
        (statement,) = statements
        for value in mutants(statement.value):
            original, statement.value = statement.value, value
            try:
                exec(compile(ast.fix_missing_locations(tree), f"<({number}) changed>", "exec"), dict(namespace))
            except AssertionError:
                pass
            else:
                survivors.append(f"({number}) {ast.unparse(statement)}")
            statement.value = original
            for name, state in states.items():
                namespace[name].set_state(state)
    return survivors


# The pages


@by_page
def test_every_block_is_checked_in_one_way(page: Path) -> None:
    assert all(block_class(block) for block in read_blocks(page.read_text()))


@by_page
def test_the_blocks_run(page: Path) -> None:
    text = page.read_text()
    start = time.perf_counter()
    run_page(text, session=page.stem)
    commands = sum(len(re.findall(r"^\$ ", block.code, flags=re.M)) for block in read_blocks(text) if block.language == "console")
    assert time.perf_counter() - start < SECONDS_PER_PAGE * (1 + commands)


@by_page
def test_a_changed_formula_is_noticed(page: Path) -> None:
    text = page.read_text()
    if r"\tag{" not in text:
        pytest.skip("this page has no numbered equation")
    survivors = run_page(text, session=page.stem, mutate=True)
    assert not survivors, "no check notices:\n" + "\n".join(survivors)


@by_page
def test_every_numbered_equation_has_its_line(page: Path) -> None:
    text = page.read_text()
    tags = re.findall(r"\\tag\{(\d+)\}", text)
    lines = [number for block in read_blocks(text) for number in marked_lines(block.code).values()]
    assert tags == [str(number) for number in range(1, len(tags) + 1)]
    assert sorted(lines, key=int) == tags


@pytest.mark.parametrize("slug", SLUGS)
def test_every_paper_has_its_pages(slug: str) -> None:
    assert (ROOT / "tutorials/papers" / f"{slug}.md").is_file()
    assert f"::: reference.{slug}\n" in (ROOT / "tutorials/api" / f"{slug}.md").read_text()


def test_every_parameter_is_in_the_notation_table() -> None:
    table = re.findall(r"^\| (`.*?) \|", (ROOT / "tutorials/notation.md").read_text(), flags=re.M)
    names = [name for cell in table for name in re.findall(r"`(\w+)`", cell)]
    assert len(names) == len(set(names)), "a name is in the table twice"
    missing = {name: user for slug in SLUGS for name, user in parameters(slug).items() if name not in names}
    assert not missing, f"not in tutorials/notation.md: {missing}"


def parameters(slug: str) -> dict[str, str]:
    """Parameter names of the public functions, classes and methods of a reference file, each with a function that has it."""
    module = importlib.import_module(f"loracle.reference.{slug}")
    found: dict[str, str] = {}
    for name, item in vars(module).items():
        if name.startswith("_") or getattr(item, "__module__", "") != module.__name__ or not callable(item) or hasattr(item, "_fields"):
            continue
        methods = [method for key, method in vars(item).items() if inspect.isfunction(method) and re.match("__init__$|[^_]", key)]
        for function in methods if inspect.isclass(item) else [item]:
            found |= {parameter: f"{slug}.{name}" for parameter in inspect.signature(function).parameters if parameter != "self"}
    return found


# The checks above can fail


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```\nplain\n```\n", "0 classes"),
        ("```python title='x'\nprint()\n```\n", "0 classes"),
        ("```bash\nls\n```\n", "0 classes"),
        ('```bash title="not run here: "\nls\n```\n', "0 classes"),
        ('```bash exec="true"\nls\n```\n', "0 classes"),
        ('```python exec="no"\nprint()\n```\n', "0 classes"),
        ('```python exec="true" title="not run here: slow"\nprint()\n```\n', "2 classes"),
        ("!!! note\n\n    ```bash\n    ls\n    ```\n", "0 classes"),
        ("- item\n\n    ```bash\n    ls\n    ```\n", "0 classes"),
        ("```python exec=\n1\n```\n", "1 fences are opened, but 0"),
        ("```python\n1\n", "1 fences are opened, but 0"),
        ("text\n\n    indented code\n", "indented"),
    ],
)
def test_an_unclassified_block_is_found(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        [block_class(block) for block in read_blocks(text)]


@pytest.mark.parametrize(
    ("text", "way"),
    [
        ("```python\nprint()\n```\n", "executed"),
        ('```python exec="true" source="above"\nprint()\n```\n', "markdown-exec"),
        ('```python exec="true"\n--8<--\ntutorials/_page.py\n--8<--\n```\n', "markdown-exec"),
        ("```python\n--8<--\ntutorials/_page.py:check\n--8<--\n```\n", "real file"),
        ('```text\n--8<-- "tutorials/assets/vendor/katex/LICENSE"\n```\n', "real file"),
        ('```bash title="not run here: needs a GPU"\nls\n```\n', "no-run"),
        ("```console\n$ python -c 'print(1)'\n1\n```\n", "console"),
        ('```python title="mine.py"\nprint()\n```\n', "file"),
    ],
)
def test_each_class_is_known(text: str, way: str) -> None:
    (block,) = read_blocks(text)
    assert block_class(block) == way


@pytest.mark.parametrize("text", ["```python\nassert False\n```\n", "```console\n$ python -c 'print(1)'\n2\n```\n"])
def test_a_block_that_fails_is_found(text: str) -> None:
    with pytest.raises(AssertionError):
        run_page(text, session="page")


def test_commands_find_the_files_of_their_page() -> None:
    text = '```python title="mine.py"\nprint(7)\n```\n\n```console\n$ python mine.py; ls | wc -l\n7\n{}\n```\n'
    assert run_page(text.format(1), session="page") == []
    with pytest.raises(AssertionError, match="but the page says"):
        run_page(text.format(2), session="page")


def test_a_check_that_checks_nothing_is_found() -> None:
    text = "```python\na = 3 + 4  # (1)\nassert {}\n```\n"
    assert run_page(text.format("a == 7"), session="page", mutate=True) == []
    assert "(1) a = -(3 + 4)" in run_page(text.format("a**2 == 49"), session="page", mutate=True)
    assert len(run_page(text.format("True"), session="page", mutate=True)) == 7


def test_the_blocks_of_a_page_share_a_namespace() -> None:
    text = '```python\na = 1\n```\n\n```python exec="true" session="page"\nassert a == {}\n```\n'
    assert run_page(text.format(1), session="page") == []
    with pytest.raises(AssertionError):
        run_page(text.format(2), session="page")
