"""The mutator and the measure of the oracle's strength."""

import ast
import json
import subprocess
import sys
import textwrap

import pytest
from typer.testing import CliRunner

from loracle.cli import app
from loracle.oracle_tests import strength
from loracle.oracle_tests.contract import UsageError, papers
from loracle.oracle_tests.law import laws_of
from loracle.oracle_tests.mutation import mutants_of, reach
from loracle.oracle_tests.promises import promises_of
from loracle.oracle_tests.strength import Subject, as_record, law_by_mistake, measure, probes_of, publish, read_reasons


def changes(source):
    """What the mutants of a function's body make of its statements."""
    tree = ast.parse("def f(a, b, c):\n" + textwrap.indent(textwrap.dedent(source).strip(), "    "))
    return {mutant.after for mutant in mutants_of(tree)}


@pytest.mark.parametrize(
    ("source", "mutants"),
    [
        ("return a @ b", {"return b @ a", "return a", "return b", "return -(a @ b)"}),
        ("return a + b", {"return a - b", "return a", "return b"}),
        ("return a - b", {"return a + b", "return b - a", "return a", "return b"}),
        ("return a * b", {"return a / b", "return a", "return b", "return -(a * b)"}),
        ("return a / b", {"return a * b", "return b / a", "return a", "return b", "return -(a / b)"}),
        ("return -a", {"return a"}),
        ("return a.mT", {"return a"}),
        ("return a.transpose(b, c)", {"return a", "return b", "return a.transpose(c, b)"}),
        ("return inv(a)", {"return a"}),
        ("return a, b", {"return (b, a)"}),
        ("return Pair(a=b, b=c)", {"return Pair(a=c, b=b)", "return Pair(b=c)", "return Pair(a=b)"}),
        ("return 0", {"return 1"}),
        ("return 2.5", {"return 3.5"}),
        ("return True", {"return False"}),
        ("return a < b", {"return a <= b"}),
        ("return a == b", {"return a != b"}),
        ("return a is b", {"return a is not b"}),
        ("return a in b", {"return a not in b"}),
        ("return a and b", {"return a or b", "return a", "return b"}),
        ("if a < b:\n    f(c)\nreturn c", {"if a <= b", "if not a < b", "pass", "c"} - {"c"}),
        ("a.copy_(b)\nreturn a", {"pass", "b"} - {"b"}),
        ("a += b\nreturn a", {"pass", "a -= b"}),
        ("a = f(b)\nreturn a", {"pass", "a = b"}),
        ("return a[1:]", {"return a[2:]", "return a[0:]"}),
        ("return a[:b]", {"return a[:b + 1]", "return a[:b - 1]"}),
        ("return g(a, b=c)", {"return g(a)", "return a"}),
        ("return g(a, b)", {"return g(b, a)", "return a"}),
        ("return check('out in')", {"return check('in out')", "return 'out in'"}),
        ("return ('x', 'y')[0]", {"return ('y',)[0]", "return ('x',)[0]", "return ('x', 'y')[1]"}),
    ],
)  # fmt: skip
def test_operators(source, mutants):
    assert changes(source) == mutants


def test_defaults_and_decorators():
    found = {m.after for m in mutants_of(ast.parse("@d\ndef f(a, b=0, *, c=None, e='x', g=False): pass"))}
    assert found == {
        "@lambda f: f def f(b=0, c=None, e='x', g=False)",
        "@d def f(b=1, c=None, e='x', g=False)",
        "@d def f(b=0, c=0, e='x', g=False)",
        "@d def f(b=0, c=None, e='', g=False)",
        "@d def f(b=0, c=None, e='x', g=True)",
    }


def test_what_is_exempt():
    source = '''
    """Docstring."""
    import math
    PAPER = Paper(year=2022)
    class Pair(NamedTuple):
        a: Float[Tensor, "out in"]
    def f(a: Float[Tensor, "out in"]) -> Float[Tensor, "in out"]:
        """Docstring."""
        if a:
            raise ValueError(f"{1 + 1} is" + " wrong")
        return f"{a + 1}"
    if __name__ == "__main__":
        print(1 + 1)
    '''
    assert [m.after for m in mutants_of(ast.parse(textwrap.dedent(source)))] == ["if not a", "pass"]


def test_module_code_and_methods_take_part():
    found = mutants_of(ast.parse("SIZE = 3\nclass C:\n    def m(self):\n        self.x = 1\n"))
    assert [(m.function, m.unit, m.change) for m in found] == [
        ("SIZE", "SIZE", "SIZE = 3 -> SIZE = 4"),
        ("C.m", "C", "self.x = 1 -> pass"),
        ("C.m", "C", "self.x = 1 -> self.x = 2"),
    ]


def test_equal_statements_are_told_apart_by_number():
    found = mutants_of(ast.parse("def f(a):\n    if a:\n        g()\n    g()\n"))
    assert [m.change for m in found] == ["if a -> if not a", "g() -> pass", "g() -> pass (#2)"]


def test_tree_is_put_back_and_reasons_are_unambiguous():
    for paper in papers():
        tree = strength._parse(pytest.importorskip(f"loracle.reference.{paper}"))
        before = ast.dump(tree)
        mutants = mutants_of(tree)
        for mutant in mutants:
            with mutant.applied():
                assert ast.dump(mutant.owner)
        assert ast.dump(tree) == before
        assert len({(m.function, m.change) for m in mutants}) == len(mutants)
        # A reason must not outlive its mutant, nor published numbers the file that they are of
        assert read_reasons(paper).keys() <= {(m.function, m.change) for m in mutants}
        published = json.loads((strength.HERE / f"{paper}.json").read_text())
        assert published["mutants"] == len(mutants), f"run loracle strength {paper} --publish"
        assert {(s["function"], s["change"]) for s in published["survivors"]} == read_reasons(paper).keys()


def test_reach_follows_calls_constants_and_classes():
    source = "N = 1\ndef a(): return b()\ndef b(): return N\nclass C:\n    def m(self): return a()\ndef alone(): pass\n"
    calls = reach(ast.parse(source))
    assert calls["C"] == {"C", "a", "b", "N"}
    assert calls["alone"] == {"alone"}


# The run, on a module of a few lines


@pytest.fixture
def small(monkeypatch):
    """Measure the strength of some laws on `merge` of LoRA alone."""
    real = strength.mutants_of
    monkeypatch.setattr(strength, "mutants_of", lambda tree: [m for m in real(tree) if m.function == "merge"])
    return lambda *ids: measure("lora", probes=probes_of("lora", [law for law in laws_of("lora") if law.id in ids], []))


def test_fewer_laws_kill_fewer_mutants(small):
    strong, weak = small("lora.L2b", "lora.L2c"), small("lora.L1b")
    assert len(strong.outcomes) == len(weak.outcomes)
    assert strong.killed > weak.killed
    # Merging at the start, where B = 0, does not tell the sign
    sign = "return W0 + scaling * (B @ A) -> return W0 - scaling * (B @ A)"
    assert sign in {m.change for m in weak.survivors}
    assert sign not in {m.change for m in strong.survivors}
    assert weak.exit_code == 1
    assert weak.unexplained == weak.survivors


def test_run_is_deterministic(small):
    first, second = small("lora.L2b", "lora.L2c"), small("lora.L2b", "lora.L2c")
    assert as_record(first, {}) == as_record(second, {})


def test_hang_is_a_kill(monkeypatch):
    monkeypatch.setattr(strength, "SECONDS", 0.2)
    source = "import time\ndef merge(W0, A, B, scaling):\n    while True:\n        time.sleep(0.01)\n"
    namespace = {}
    exec(source, namespace)
    law = next(law for law in laws_of("lora") if law.id == "lora.L2c")
    (probe,) = [p for p in probes_of("lora", [law], []) if p.name == "lora.L2c"]
    module = type("Hangs", (), {"merge": staticmethod(namespace["merge"])})
    assert probe.fails(Subject(module, "lora")) == "took longer than 0.2 seconds"


def test_reference_that_fails_is_no_measure(monkeypatch):
    law = next(law for law in laws_of("lora") if law.id == "lora.L2c")
    monkeypatch.setattr(strength, "replay", lambda *_: AssertionError("wrong"))
    with pytest.raises(UsageError, match=r"the reference itself fails lora\.L2c: AssertionError: wrong"):
        probes_of("lora", [law], [])


def test_stale_and_missing_reasons_are_errors(small, monkeypatch):
    monkeypatch.setattr(strength, "read_reasons", lambda paper: {})
    found = small("lora.L2b", "lora.L2c")
    found.reasons = {(m.function, m.change): "because" for m in found.survivors}
    assert found.unexplained == found.stale == []
    found.reasons["merge", "return W0 -> return 1"] = "of a line that is gone"
    assert found.stale == [("merge", "return W0 -> return 1")]
    assert found.exit_code == 1
    killed = next(o.mutant for o in found.outcomes if o.killer)
    found.reasons = {(killed.function, killed.change): "of a mutant that is killed"}
    assert found.stale == [(killed.function, killed.change)]


@pytest.mark.parametrize("entry", ["reason = ' '", "because = 'x'", ""])
def test_reason_that_says_nothing(tmp_path, entry):
    (tmp_path / "lora.toml").write_text(f"[[survivor]]\nfunction = 'f'\nchange = 'a -> b'\n{entry}\n")
    with pytest.raises(UsageError, match="needed function, change and reason"):
        read_reasons("lora", tmp_path)


def test_reason_given_twice(tmp_path):
    (tmp_path / "lora.toml").write_text("[[survivor]]\nfunction = 'f'\nchange = 'a -> b'\nreason = 'x'\n" * 2)
    with pytest.raises(UsageError, match="twice"):
        read_reasons("lora", tmp_path)


def test_law_by_mistake(monkeypatch):
    some = [m for m in strength.mistakes_of("lora") if m.name in ("merge_without_scaling", "forward_scales_A")]
    monkeypatch.setattr(strength, "mistakes_of", lambda paper: some)
    table = law_by_mistake("lora")
    row = table["merge_without_scaling"]
    assert row["lora.L2c"]
    assert not row["lora.L1b"]  # reached, but B is zero there
    assert "lora.L3a" not in row  # gradients know nothing of merging
    assert not any(table["forward_scales_A"].values())


def test_published_numbers_are_whole_and_hold_no_times(tmp_path, small):
    record = as_record(small("lora.L2c"), {"merge_without_scaling": {"lora.L2c": True, "lora.L1b": False}})
    path = publish(record, tmp_path)
    assert json.loads(path.read_text()) == record
    assert [p.name for p in tmp_path.iterdir()] == ["lora.json"]
    assert record["mistakes"]["merge_without_scaling"]["killed_by"] == ["lora.L2c"]
    assert "seconds" not in record


def test_command(monkeypatch):
    real = strength.mutants_of
    monkeypatch.setattr(strength, "mutants_of", lambda tree: [m for m in real(tree) if m.function == "scaling_factor"])
    few = [law for law in laws_of("lora") if law.id in ("lora.L10a", "lora.L10b")]
    monkeypatch.setattr(strength, "laws_of", lambda paper: few)
    monkeypatch.setattr(strength, "promises_of", lambda paper: [p for p in promises_of(paper) if p.of == ("scaling_factor",)])
    monkeypatch.setattr(strength, "read_reasons", lambda paper: {("scaling_factor", "gone"): "x"})
    done = CliRunner().invoke(app, ["strength", "lora"])
    assert done.exit_code == 1
    assert "STALE" in done.output
    assert "20 (100.0%)" in done.output
    monkeypatch.setattr(strength, "read_reasons", lambda paper: {})
    assert CliRunner().invoke(app, ["strength", "lora"]).exit_code == 0
    assert CliRunner().invoke(app, ["strength", "no_such"]).exit_code == 3


def test_help_needs_no_torch():
    code = "import sys; from loracle.cli import app; assert 'torch' not in sys.modules and 'hypothesis' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
