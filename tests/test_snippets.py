"""The program in a failure's explanation: it runs without loracle, fails on the wrong code and ends well on the right code."""

import contextlib
import io
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from loracle.oracle_tests import check
from loracle.oracle_tests.contract import papers
from loracle.oracle_tests.explain import snippet
from loracle.oracle_tests.law import laws_of
from loracle.oracle_tests.loading import load
from loracle.oracle_tests.running import collect_cases

IMPLEMENTATIONS = Path(__file__).parent / "implementations"
NUMPY, JAX = IMPLEMENTATIONS / "numpy_lora.py", IMPLEMENTATIONS / "jax_lora.py"
LAWS = [law.id for law in laws_of("lora") if not law.is_theorem]

# What stands in for a function of the NumPy implementation, by the name of the mistake, and the laws that it breaks
MISTAKES = {
    "merge_adds_too_little": ("def merge(W0, A, B, scaling):\n    return W0 + 0.5 * scaling * B @ A", ["L2a", "L2b", "L2c"]),
    "merge_adds_a_constant": ("def merge(W0, A, B, scaling):\n    return W0 + scaling * B @ A + 1e-6", ["L1b"]),
    "unmerge_adds": ("def unmerge(W, A, B, scaling):\n    return W + scaling * B @ A", ["L2f"]),
    "delta_without_scaling": ("def delta_weight(A, B, scaling):\n    return B @ A", ["L2d", "L8", "L11"]),
    "delta_with_jitter": (
        "def delta_weight(A, B, scaling):\n    return scaling * B @ A + 1e-3 * np.eye(B.shape[0], A.shape[1])",
        ["L5"],
    ),
    "rows_of_A_normalised": (
        "def delta_weight(A, B, scaling):\n    return scaling * B @ (A / np.linalg.norm(A, axis=1, keepdims=True))",
        ["L6a"],
    ),
    "bias_is_left_out": ("def forward(x, W0, A, B, scaling, bias=None):\n    return x @ W0.T + scaling * x @ A.T @ B.T", ["L2g"]),
    "derived_delta": (
        "del delta_weight\ndef forward(x, W0, A, B, scaling, bias=None):\n    return x @ W0.T + x @ A.T @ B.T",
        ["L2d", "L2e"],
    ),
    "gradient_of_A_without_scaling": (
        "def gradients(G, A, B, scaling):\n    return B.T @ G, scaling * G @ A.T",
        ["L3a", "L7a"],
    ),
    "gradients_normalised": (
        "def gradients(G, A, B, scaling):\n    return B.T @ G / np.linalg.norm(B), G @ A.T / np.linalg.norm(A)",
        ["L6b"],
    ),
    "gradients_as_a_dict": (
        'def gradients(G, A, B, scaling):\n    return {"grad_B": G @ A.T, "grad_A": B.T @ G}',
        ["L3a"],
    ),
    "backward_without_the_adapter": (
        "_backward = backward\ndef backward(grad_y, x, W0, **more):\n    return grad_y @ W0, *_backward(grad_y, x, W0, **more)[1:]",
        ["L3b", "L3c"],
    ),
    "dropout_on_the_frozen_path": (
        "_forward = forward\ndef forward(x, mask=None, p=0.0, **more):\n    return _forward(_kept(x, mask, p), **more)",
        ["L12d", "L12b"],
    ),
    "dropout_not_rescaled": (
        "def forward(x, W0, A, B, scaling, bias=0.0, mask=True, p=0.0):\n    return x @ W0.T + scaling * (x * mask) @ A.T @ B.T + bias",
        ["L12a"],
    ),
    "step_upwards": (
        "_step = sgd_step\ndef sgd_step(G, lr, **more):\n    return _step(G=-G, lr=lr, **more)",
        ["L4", "L8", "L8b"],
    ),
    "one_after_the_other": (
        "def sgd_step(G, W0, A, B, scaling, lr):\n    A = A - lr * scaling * B.T @ G\n    return W0, A, B - lr * scaling * G @ A.T",
        ["L7b"],
    ),
    "decay_of_the_frozen_weight": (
        "_step = sgd_step\n"
        "def sgd_step(W0, lr, weight_decay=0.0, **more):\n"
        "    _, A, B = _step(W0=W0, lr=lr, weight_decay=weight_decay, **more)\n"
        "    return (1 - lr * weight_decay) * W0, A, B",
        ["L14"],
    ),
    "scaling_is_alpha": ("def scaling_factor(alpha, rank, rslora=False):\n    return alpha", ["L9b", "L10a", "L10b"]),
    "start_too_wide": (
        "_init = init\ndef init(W0, rank, generator, **more):\n    A, B = _init(W0, rank, generator, **more)\n    return 1.5 * A, B",
        ["L9a", "L9b", "L9d"],
    ),
    "generator_ignored": (
        "_init = init\ndef init(W0, rank, generator, **more):\n    return _init(W0, rank, np.random.default_rng(0), **more)",
        ["L9c"],
    ),
    "mask_keeps_with_p": ("def draw_mask(x, p, generator):\n    return generator.random(x.shape) < p", ["L12c"]),
    "one_factor_counted": ("def num_trainable(W0, rank):\n    return rank * W0.shape[0]", ["L13"]),
    # The contract
    "wrong_shape": ("def merge(W0, A, B, scaling):\n    return W0.ravel()", ["L2c"]),
    "wrong_dtype": ("def merge(W0, A, B, scaling):\n    return (W0 + scaling * B @ A).astype(np.float32)", ["L2c"]),
    "not_finite": ("def merge(W0, A, B, scaling):\n    return W0 * np.nan", ["L2c"]),
    "no_array": ("def merge(W0, A, B, scaling):\n    return (W0 + scaling * B @ A).tolist()", ["L2c"]),
    "nothing_returned": ("def merge(W0, A, B, scaling):\n    W0 + scaling * B @ A", ["L2c"]),
    "one_part_too_few": ("def gradients(G, A, B, scaling):\n    return scaling * B.T @ G", ["L3a"]),
    "part_of_wrong_shape": ("def gradients(G, A, B, scaling):\n    return scaling * B.T @ G, G", ["L3a"]),
    "wrong_keys": ('def gradients(G, A, B, scaling):\n    return {"A": G, "B": G}', ["L3a"]),
    "number_is_text": ('def scaling_factor(alpha, rank):\n    return f"{alpha / rank}"', ["L10a"]),
    "number_is_nothing": ("def scaling_factor(alpha, rank):\n    alpha / rank", ["L10a"]),
    "number_is_no_whole_one": ("def num_trainable(W0, rank):\n    return rank * (sum(W0.shape) + 0.5)", ["L13"]),
    "start_of_wrong_shape": ("def init(W0, rank, generator):\n    return np.ones((rank, rank)), np.ones(W0.shape)", ["L1a"]),
    "changes_its_input": ("def merge(W0, A, B, scaling):\n    W0 += scaling * B @ A\n    return W0", ["L2c"]),
    "prints": ('def merge(W0, A, B, scaling):\n    print("W0", W0)\n    return W0 + scaling * B @ A', ["L2c"]),
    "seeds_numpy": ("def merge(W0, A, B, scaling):\n    np.random.seed(0)\n    return W0 + scaling * B @ A", ["L2c"]),
    "draws_from_random": (
        "import random\ndef merge(W0, A, B, scaling):\n    random.random()\n    return W0 + scaling * B @ A",
        ["L2c"],
    ),
    "raises": ('def merge(W0, A, B, scaling):\n    raise ValueError("no")', ["L2c"]),
    "exits": ("import sys\ndef merge(W0, A, B, scaling):\n    sys.exit(0)", ["L2c"]),
}

TORCH = "import torch\ndef merge(W0, A, B, scaling):\n    return W0 + scaling * (B @ A)\n"
TORCH_MISTAKES = {
    "torch_without_scaling": ("def merge(W0, A, B, scaling):\n    return W0 + B @ A", ["L2c"]),
    "torch_changes_its_input": ("def merge(W0, A, B, scaling):\n    return W0.add_(scaling * (B @ A))", ["L2c"]),
    "torch_draws": ("def merge(W0, A, B, scaling):\n    torch.rand(1)\n    return W0 + scaling * (B @ A)", ["L2c"]),
    "torch_dtype": ("def merge(W0, A, B, scaling):\n    return (W0 + scaling * (B @ A)).float()", ["L2c"]),
}

RUNNER = """
import contextlib, io, json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("loracle", "hypothesis", "pytest"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Blocked())
sys.dont_write_bytecode = True
ended = {}
for name, program in json.load(sys.stdin).items():
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(program, name, "exec"), {"__name__": "__main__"})
        ended[name] = "well"
    except BaseException as error:
        ended[name] = f"{type(error).__name__}: {error}"
json.dump(ended, sys.stdout)
"""


def _program(explanation):
    """The program in the text of a failure."""
    return textwrap.dedent(explanation.partition("it does not need loracle:\n")[2].split("\n(")[0]).strip() + "\n"


def _run(programs):
    done = subprocess.run([sys.executable, "-I", "-c", RUNNER], input=json.dumps(programs), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """By mistake and law: the program, and the same with the right implementation in place of the wrong one."""
    folder, found = tmp_path_factory.mktemp("wrong"), {}
    (folder / "torch_lora.py").write_text(TORCH)
    for right, mistakes in ((NUMPY, MISTAKES), (folder / "torch_lora.py", TORCH_MISTAKES)):
        for name, (code, laws) in mistakes.items():
            file = folder / f"{name}.py"
            file.write_text(f"{right.read_text()}\n\n{code}\n")
            report = check(str(file), paper="lora", laws=[f"lora.{law}" for law in laws], profile="quick")
            for result in report.results:
                assert result.outcome == "fails", (name, result)
                program = _program(result.explanation)
                # A file that imports what the wrong one lacked and so on: the path is all that differs
                found[f"{name} {result.law}"] = (program, program.replace(str(file), str(right)))
    return found


def test_every_law_has_a_program(programs):
    assert {name.split()[1] for name in programs} == set(LAWS)


def test_programs_fail_on_the_wrong_code_and_end_well_on_the_right(programs):
    ended = _run(
        {f"{name} {which}": program for name, pair in programs.items() for which, program in zip(("wrong", "right"), pair, strict=True)}
    )
    well = {name for name, how in ended.items() if how == "well"}
    assert {name: how for name, how in ended.items() if name.endswith("right") and how != "well"} == {}
    assert {name for name in well if name.endswith("wrong")} == set()
    # They fail for the law's reason, not for a mistake in the program
    odd = ("NameError", "AttributeError", "SyntaxError", "ImportError", "ModuleNotFoundError", "KeyError", "IndexError")
    assert {name: how for name, how in ended.items() if how.startswith(odd)} == {}
    reasons = {name: how.partition(":")[0] for name, how in ended.items() if name.endswith("wrong")}
    assert reasons.pop("raises lora.L2c wrong") == "ValueError"
    assert set(reasons.values()) <= {"AssertionError", "TypeError"}, reasons


def test_program_of_a_jax_implementation(tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text(JAX.read_text() + "\n\ndef merge(W0, A, B, scaling):\n    return W0 + B @ A\n")
    [result] = check(str(file), paper="lora", laws=["lora.L2c"], profile="quick").results
    program = _program(result.explanation)
    ended = _run({"wrong": program, "right": program.replace(str(file), str(JAX))})
    assert ended["right"] == "well"
    assert ended["wrong"].startswith("AssertionError")


def test_explanation_says_what_a_reader_needs(tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text(NUMPY.read_text() + "\n\ndef merge(W0, A, B, scaling):\n    return W0 + B @ A\n")
    [result] = check(str(file), paper="lora", laws=["lora.L2c"], profile="quick").results
    law = next(law for law in laws_of("lora") if law.id == "lora.L2c")
    for part in (law.says, law.formula, "W0 (1, 1)", "W[0, 0] is ", "times the tolerance", "papers/lora", str(file)):
        assert part in result.explanation
    assert max(map(len, _program(result.explanation).splitlines())) <= 160


@pytest.mark.parametrize("paper", papers())
def test_program_of_every_law_ends_well_on_the_reference(paper):
    implementation = load(f"loracle.reference.{paper}", paper=paper)
    for law in laws_of(paper):
        if law.is_theorem:
            continue
        implementation.derived = set()
        program = snippet(law, implementation, collect_cases(law, 3)[-1], AssertionError())
        needed, _, _ = program.partition("import loracle.reference")
        assert "loracle" not in needed + program.partition(" as mine\n")[2], f"{law.id} needs loracle"
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(program, law.id, "exec"), {"__name__": "__main__"})
        assert f"{law.id} holds on this input" in printed.getvalue()


def test_program_shows_only_the_fields_that_are_read():
    law = next(law for law in laws_of("nlora") if law.id == "nlora.L2c")
    program = snippet(law, load("loracle.reference.nlora", paper="nlora"), collect_cases(law, 3)[-1], AssertionError())
    shown = program.partition("class case:")[2].partition("\n\n")[0].splitlines()[1:]
    assert [line.split()[0] for line in shown] == ["W_base", "A", "N", "B", "scaling"]
