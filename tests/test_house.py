"""The house: every paper's row is complete, and imports run one way."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("reference", "oracle_tests", "toy_tasks", "cli")
SLUGS = sorted(file.stem for file in (ROOT / "reference").glob("[!_]*.py"))
ROW = (
    "reference/{}.py",
    "oracle_tests/test_{}.py",
    "oracle_tests/mistakes/{}.py",
    "toy_tasks/tasks/{}.py",
    "toy_tasks/configs/{}.toml",
    "toy_tasks/results/{}.json",
    "tutorials/papers/{}.md",
)


@pytest.mark.parametrize("slug", SLUGS)
def test_row_is_complete(slug):
    assert [name.format(slug) for name in ROW if not (ROOT / name.format(slug)).is_file()] == [], "add these files"
    paper = importlib.import_module(f"loracle.reference.{slug}").PAPER
    assert paper.slug == slug
    assert all(paper), "every field of PAPER says something"


@pytest.mark.parametrize("pattern", ROW[1:])
def test_no_row_without_a_reference_file(pattern):
    folder, _, name = pattern.rpartition("/")
    before, after = name.split("{}")
    found = {file.name.removeprefix(before).removesuffix(after) for file in (ROOT / folder).glob(f"{before}[!_]*{after}")}
    assert found - {"index", "compare"} <= set(SLUGS)  # the comparison is no paper's


def _imports(file):
    """Dotted names of what a file imports, with whether that happens inside a function; relative names written out."""
    package = ["loracle", *file.relative_to(ROOT).parent.parts]
    tree = ast.parse(file.read_text("utf-8"))
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    # What is imported for type annotations only is not imported when the file runs
    for block in ast.walk(tree):
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            inside |= {id(n) for n in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
                if node.level
                else node.module
            )
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) in inside


def _files(room):
    return sorted((ROOT / room).rglob("*.py"))


def _rooms(file, **which):
    """The rooms of the house that a file imports from."""
    return {name.split(".")[1] for name, inside in _imports(file) if name.startswith("loracle.") and which.get("inside", inside) == inside}


@pytest.mark.parametrize("file", _files("reference"), ids=lambda file: file.stem)
def test_reference_knows_nobody(file):
    assert _rooms(file) <= {"reference"}
    outside = {name.partition(".")[0] for name, _ in _imports(file)} - {"loracle"}
    allowed = {
        "torch",
        "jaxtyping",
        "copy",
        "math",
        "typing",
        "collections",
        "re",
        "difflib",
        "dataclasses",
        "itertools",
        "functools",
        "__future__",
    }
    assert outside <= allowed, "a reference file imports torch and jaxtyping"
    # A paper's own mathematics stays in its file: what is shared is `lora` and the files with an underscore
    shared = {name.split(".")[2] for name, _ in _imports(file) if name.startswith("loracle.reference.")}
    assert all(name == "lora" or name.startswith("_") for name in shared), shared


# Those that meet a reference file: as one implementation among others, as its contract, or to make mistakes of
MEET_REFERENCE = {"contract.py", "mutation.py"}


@pytest.mark.parametrize("file", _files("oracle_tests"), ids=lambda file: file.stem)
def test_expected_values_never_come_from_the_reference(file):
    rooms = _rooms(file)
    if file.parent.name == "mistakes":
        rooms -= {"reference"}  # a mistake is the reference with one line wrong
    assert rooms <= {"oracle_tests"}
    if file.name.startswith("test_"):
        names = {
            node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not any("loracle.reference" in name for name in names)
        outside = {name.partition(".")[0] for name, _ in _imports(file)} - {"loracle"}
        assert "torch" not in outside, "expected values are NumPy float64"


@pytest.mark.parametrize("file", _files("toy_tasks"), ids=lambda file: file.stem)
def test_experiments_know_the_reference_only(file):
    assert _rooms(file) <= {"toy_tasks", "reference"}


@pytest.mark.parametrize("file", _files("cli"), ids=lambda file: file.stem)
def test_the_command_imports_rooms_only_where_it_needs_them(file):
    assert _rooms(file, inside=False) <= {"cli"}
    heavy = {name.partition(".")[0] for name, inside in _imports(file) if not inside}
    assert not heavy & {"torch", "numpy", "matplotlib", "hypothesis", "pytest"}


def test_every_room_is_shipped():
    import tomllib

    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {file.parent.relative_to(ROOT) for room in ROOMS for file in _files(room) if "__pycache__" not in file.parts}
    data = {
        file.parent.relative_to(ROOT) for room in ROOMS for kind in ("toml", "json", "npz") for file in (ROOT / room).rglob(f"*.{kind}")
    }
    assert {"loracle." + ".".join(folder.parts) for folder in folders | data} == set(setup["packages"])


def test_reference_files_are_short():
    """At most 250 lines of code, without docstrings, comments and blank lines; functions under 40."""
    for file in _files("reference"):
        tree = ast.parse(file.read_text())
        documented = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
                documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        lines = file.read_text().splitlines()
        code = {i for i, line in enumerate(lines, 1) if line.strip() and not line.strip().startswith("#") and i not in documented}
        assert len(code) <= 250, f"{file.name}: {len(code)} lines of code"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                length = len(code & set(range(node.body[0].lineno, node.end_lineno + 1)))
                assert length < 40, f"{file.name}: {node.name} has {length} lines of code"
