"""The pytest plugin and the command, from an installed wheel in an empty folder; and the laws in a user's own suite."""

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loracle.cli import app
from loracle.oracle_tests.law import laws_of

ROOT = Path(__file__).parents[1]
NUMPY = ROOT / "tests" / "implementations" / "numpy_lora.py"
LAWS = [law for law in laws_of("lora") if not law.is_theorem]

# Four of the five outcomes under one roof; at this precision a law can be skipped too
MIXED = """
import numpy as np

LORACLE = {"arrays": "numpy", "dtype": "float32", "tolerance": 2}

def merge(W0, A, B, scaling):
    return W0 + B @ A

def forward(x, W0, A, B, scaling, bias=0.0):
    return x @ W0.T + np.float32(scaling) * (x @ A.T) @ B.T + bias

def gradients(G, A, B, scaling):
    return scaling * B.T @ G, scaling * G @ A.T
"""


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """A folder in which the wheel of this working tree is installed, without what it depends on: that is here already."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for room in ("reference", "oracle_tests", "toy_tasks", "cli"):
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    _run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist"), str(source), cwd=source)
    [wheel] = (source / "dist").glob("*.whl")
    _run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=source)
    return site


def _run(*arguments, cwd, site=None, code=0):
    """Run Python in another process; return what it said on standard output and standard error."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200", **({"PYTHONPATH": str(site)} if site else {})}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, f"exit code {done.returncode}, expected {code}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def _pytest(*arguments, **options):
    return _run("-m", "pytest", "-p", "no:cacheprovider", *arguments, **options)


LAWS_OF_WHEEL = ("--pyargs", "loracle.oracle_tests", "--law-profile", "quick")


def test_all_outcomes_are_counted(site, tmp_path):
    (tmp_path / "my_module.py").write_text(MIXED)
    (tmp_path / "pyproject.toml").write_text(
        '[tool.loracle.expected_failures]\n"lora.L2c" = "scaled elsewhere"\n[tool.loracle]\ntolerance = 3\n'
    )
    said = _pytest(*LAWS_OF_WHEEL, "--implementation", "lora=my_module", "--junitxml=report.xml", cwd=tmp_path, site=site, code=1)
    assert "lora of my_module (arrays numpy, dtype float32, tolerance factor 3)" in said
    counts = {outcome: int(n) for n, outcome in re.findall(r"(\d+) (holds|fails|missing|expected to fail|skipped)", said)}
    assert counts["fails"] == 1, said
    assert counts["expected to fail"] == 1
    assert counts["missing"] > 10
    assert sum(counts.values()) == len(LAWS)
    assert re.search(rf"1 failed, \d+ passed.*1 xfailed.*{counts['missing']} missing", said)
    assert "lora.L13 missing: the implementation has no num_trainable" in said
    assert "lora.L2c expected to fail: scaled elsewhere" in said
    assert "derived, as the implementation lacks it: delta_weight" in said
    assert "test_lora_ga" not in said, "only the paper that is named"
    cases = ElementTree.parse(tmp_path / "report.xml").findall(".//testcase")
    failure = next(case.find("failure") for case in cases if case.find("failure") is not None)
    assert "To reproduce it, run this program" in failure.text
    properties = {p.get("name"): p.get("value") for p in cases[0].findall(".//property")}
    assert properties["loracle.law"] == "lora.L1a"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["my_module.py", "pyproject.toml", "report.xml"]


@pytest.mark.parametrize("options", [(), ("--import-mode=importlib", "-n", "2")], ids=["plain", "importlib and two processes"])
def test_good_implementation_passes(site, tmp_path, options):
    shutil.copy(NUMPY, tmp_path / "my_module.py")
    said = _pytest(*LAWS_OF_WHEEL, "--implementation", "lora=my_module.py", *options, cwd=tmp_path, site=site)
    assert f"{len(LAWS)} holds, 0 fails, 0 missing, 0 expected to fail, 0 skipped" in said
    assert f"{len(LAWS)} passed" in said, "theorem checks call no implementation: they are not counted"


def test_nothing_checked(site, tmp_path):
    (tmp_path / "empty.py").write_text("def num_trainable(W0, rank):\n    raise NotImplementedError\n")
    said = _pytest(*LAWS_OF_WHEEL, "--implementation", "lora=empty", cwd=tmp_path, site=site, code=2)
    assert f"{len(LAWS)} missing" in said
    assert "Nothing was checked" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--implementation", "lorra=mine"], "there is no paper 'lorra'; did you mean 'lora'?"),
        (["--implementation", "mine"], "--implementation mine: needed PAPER=MODULE"),
        (["--implementation", "lora=absent.py", "-n", "2"], "there is no file absent.py"),
    ],
    ids=["paper", "form", "file"],
)
def test_wrong_usage(site, tmp_path, arguments, message):
    said = _pytest(*LAWS_OF_WHEEL, *arguments, cwd=tmp_path, site=site, code=3)
    assert message in said
    assert "Traceback" not in said


def test_unrelated_run_is_left_alone(site, tmp_path):
    """The plugin loads with every pytest run of an environment: it must cost nothing there and change nothing."""
    (tmp_path / "test_mine.py").write_text(
        "import sys, pytest\n"
        "def test_modules():\n"
        "    assert 'loracle.oracle_tests.plugin' in sys.modules\n"
        "    assert not {'torch', 'numpy', 'hypothesis', 'loracle.oracle_tests.running'} & set(sys.modules)\n"
        "def test_skip():\n    pytest.skip('missing: a database')\n"
    )
    # jaxtyping has a plugin too, which imports NumPy
    said = _pytest("-p", "no:jaxtyping", cwd=tmp_path, site=site)
    assert "1 passed, 1 skipped" in said, "a skip of somebody else's is no missing function"
    code = "import time, pytest; t = time.perf_counter(); import loracle.oracle_tests.plugin; print(time.perf_counter() - t)"
    assert float(_run("-c", code, cwd=tmp_path, site=site)) < 0.05


def test_laws_in_an_own_suite(site, tmp_path):
    shutil.copy(NUMPY, tmp_path / "my_lora.py")
    (tmp_path / "loracle.toml").write_text('profile = "quick"\n[expected_failures]\n"lora.L2c" = "not yet"\n')
    (tmp_path / "test_mine.py").write_text(
        "import my_lora\n"
        "from loracle.oracle_tests import parametrize_with_laws\n"
        "right = {name: getattr(my_lora, name) for name in ('merge', 'unmerge', 'LORACLE')}\n"
        "wrong = {**right, 'merge': lambda W0, A, B, scaling: W0 + B @ A}\n"
        "@parametrize_with_laws(wrong, paper='lora', dtype='float32')\n"
        "def test_laws(check_law):\n    check_law()\n"
        "def test_other():\n    pass\n"
    )
    said = _pytest("-v", cwd=tmp_path, site=site, code=1)
    assert "test_laws[lora.L2b] FAILED" in said
    assert "test_laws[lora.L2c] XFAIL" in said
    assert "test_laws[lora.L13] MISSING" in said
    assert "test_other PASSED" in said
    assert "lora.L2b fails for dict" in said
    assert "mine = ...  # put your implementation here" in said


def test_experiment_runs_from_the_wheel(site, tmp_path):
    said = _run("-m", "loracle.cli", "toy", "run", "lora", "--quick", cwd=tmp_path, site=site)
    assert "lora" in said
    assert list(tmp_path.rglob("results.json"))


def test_wheel_is_complete(site):
    """What is read at run time is in the wheel, and it is the wheel that these tests ran."""
    for name in ("oracle_tests/py.typed", "toy_tasks/configs/lora.toml", "toy_tasks/results/lora.json", "toy_tasks/data/digits.npz"):
        assert (site / "loracle" / name).is_file(), name
    assert not (site / "tests").exists()
    code = "import loracle.reference._paper as p, loracle.oracle_tests as o; print(p.__file__, o.__file__)"
    assert all(Path(file).is_relative_to(site) for file in _run("-c", code, cwd=site.parent, site=site).split())


# The command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run `loracle ...` in an empty folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.stdout, done.stderr

    return run


CHECK = ("check", NUMPY, "--paper", "lora", "--profile", "quick", "--law", "lora.L2c")


def test_check_formats_and_files(command, tmp_path):
    code, out, _ = command(*CHECK)
    assert (code, out.splitlines()[-1]) == (0, f"lora of {NUMPY}: 1 holds, 0 fails, 0 missing, 0 expected to fail, 0 skipped")
    code, out, _ = command(*CHECK, "--format", "json", "--dtype", "float32", "--tolerance", "2")
    assert json.loads(out)["options"] == {"arrays": "numpy", "dtype": "float32", "device": "cpu", "generator": "numpy", "tolerance": 2.0}
    code, out, _ = command(*CHECK, "--format", "markdown", "--out", "report.md")
    assert (tmp_path / "report.md").read_text().startswith("# lora of")
    assert "written to report.md" in out


def test_check_exit_codes(command, tmp_path):
    (tmp_path / "wrong.py").write_text(MIXED)
    assert command("check", "wrong.py", *CHECK[2:])[0] == 1
    assert command("check", "wrong.py", *CHECK[2:-1], "lora.L13")[0] == 2
    (tmp_path / "loracle.toml").write_text('[expected_failures]\n"lora.L2c" = "known"\n')
    assert command("check", "wrong.py", *CHECK[2:])[0] == 0
    code, out, _ = command(*CHECK)
    assert code == 1
    assert "take it off the list" in out


def test_check_of_the_settings_and_several_reports(command, tmp_path):
    settings = f'profile = "quick"\n[implementations]\nlora = "{NUMPY}"\n'
    (tmp_path / "loracle.toml").write_text(settings)
    code, out, _ = command("check", "--law", "lora.L2c")
    assert (code, "1 holds" in out) == (0, True)
    code, _, err = command("check", "--paper", "lora_ga")
    assert (code, "no implementation of lora_ga is named in the settings; they name: lora" in err) == (3, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check",), "name an implementation"),
        (("check", NUMPY), "name the paper: --paper lora"),
        (("check", NUMPY, "--paper", "lorra"), "no paper 'lorra'; did you mean 'lora'?"),
        (("check", "absent.py", "--paper", "lora"), "there is no file absent.py"),
        ((*CHECK, "--dtype", "flaot32"), "did you mean 'float32'?"),
        ((*CHECK, "--tolerance", "20"), "above 0 and at most 10"),
        ((*CHECK, "--out", "absent/report.md"), "cannot write the report to absent/report.md"),
        (("adapter", "lorra"), "no paper 'lorra'; did you mean 'lora'?"),
    ],
    ids=["nothing", "no paper", "paper", "file", "dtype", "tolerance", "out", "adapter"],
)
def test_check_wrong_usage(command, arguments, message):
    code, out, err = command(*arguments)
    assert (code, out) == (3, "")
    assert message in err


def test_unknown_option_is_wrong_usage_too(tmp_path):
    said = _run("-m", "loracle.cli", "check", "--profle", "quick", cwd=tmp_path, code=3)
    assert "--profile" in said


def test_adapter_prints_a_stub(command):
    code, out, _ = command("adapter", "lora")
    assert code == 0
    compile(out, "stub", "exec")
    assert out.startswith('"""My implementation of lora')
