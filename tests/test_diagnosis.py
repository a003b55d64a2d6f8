"""Diagnosis: every known mistake is named, correct code is not accused, and wrong code of other hands is understood."""

import functools
import importlib.util
import itertools
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loracle.oracle_tests import check, diagnosis
from loracle.oracle_tests.contract import contract, papers
from loracle.oracle_tests.diagnosis import Diagnosis, TooSlow, describe, diagnose, looked_at
from loracle.oracle_tests.law import laws_of
from loracle.oracle_tests.loading import load
from loracle.oracle_tests.mistakes import mistakes_of, wrong

# Mistakes that give the same observables, in whatever the laws that they break look at
TWINS: list[set[str]] = []
# The same in float32 alone, where a delta of 1e-8 is none
TWINS_IN_FLOAT32 = [{"adamw_ignores_delta", "step_delta_fixed"}, {"efficient_ignores_delta", "efficient_delta_fixed"}]
# Mistakes that float32 cannot show
NOT_IN_FLOAT32 = {
    "forward_in_float32",
    "base_in_float32",
    "init_in_float32",
    "inverse_in_float32",
    "optimum_in_float32",
    "optimal_delta_by_default",
    "step_delta_fixed",
    "efficient_delta_fixed",
    "symmetric_not_inverted_with_delta",
    "fit_in_float32",
    "norms_in_float32",
    "factored_in_float32",
    "delta_in_float32",
}

PAPERS = [p for p in papers() if importlib.util.find_spec(f"loracle.oracle_tests.mistakes.{p}")]
ALL = [pytest.param(m, id=f"{m.paper}-{m.name}") for paper in PAPERS for m in mistakes_of(paper) if not m.harmless]


def names(found: Diagnosis) -> set[str]:
    return {m.name for m in found.candidates}


def allowed(mistake, more=()) -> list[set[str]]:
    return [{mistake.name}, *(twins for twins in (*TWINS, *more) if mistake.name in twins)]


def needs_of(mistake, laws: int | None = None):
    """What the laws that the mistake breaks look at, each law alone; or just the first `laws` of them."""
    return {id: looked_at(law(id)) for id in mistake.breaks[:laws]}


def law(id: str):
    return next(law for law in laws_of(id.partition(".")[0]) if law.id == id)


def in_numpy(module, paper: str) -> SimpleNamespace:
    """The functions of a torch module as a NumPy implementation with random numbers of its own."""

    def wrapped(function):
        @functools.wraps(function)
        def call(**given):
            if "generator" in given:
                given["generator"] = torch.Generator().manual_seed(int(given["generator"].integers(2**31)))
            return outwards(function(**{k: inwards(v) for k, v in given.items()}))

        return call

    functions = {n: wrapped(getattr(module, n)) for n in contract(paper)}
    return SimpleNamespace(LORACLE={"arrays": "numpy"}, **functions)


def inwards(value):
    if isinstance(value, list):
        return [inwards(v) for v in value]
    if callable(value):
        return lambda *args: inwards(value(*(outwards(a) for a in args)))
    return torch.tensor(value) if isinstance(value, np.ndarray) else value


def outwards(value):
    if isinstance(value, tuple):
        return tuple(outwards(v) for v in value)
    return value.numpy() if isinstance(value, torch.Tensor) else value


# Known mistakes


@pytest.mark.parametrize("mistake", ALL)
def test_a_mistake_is_named_in_every_law_that_it_breaks(mistake):
    impl = load(wrong(mistake), paper=mistake.paper)
    for id, needs in needs_of(mistake).items():
        assert names(found := diagnose(impl, needs)) in allowed(mistake), f"{id}: {found}"


@pytest.mark.parametrize("mistake", ALL)
def test_a_mistake_is_named_in_float32(mistake):
    if mistake.name in NOT_IN_FLOAT32:
        pytest.skip("float32 cannot show it")
    impl = load(wrong(mistake), paper=mistake.paper, dtype="float32")
    for id, needs in needs_of(mistake, 1).items():
        assert names(found := diagnose(impl, needs)) in allowed(mistake, TWINS_IN_FLOAT32), f"{id}: {found}"


@pytest.mark.parametrize("mistake", ALL)
def test_a_mistake_is_named_in_numpy(mistake):
    impl = load(in_numpy(wrong(mistake), mistake.paper), paper=mistake.paper)
    for id, needs in needs_of(mistake, 1).items():
        assert names(found := diagnose(impl, needs)) in allowed(mistake), f"{id}: {found}"


@pytest.mark.parametrize("paper", PAPERS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_correct_code_is_not_accused(paper, dtype):
    found = diagnose(load(f"loracle.reference.{paper}", paper=paper, dtype=dtype))
    assert not found.candidates
    assert "did well on 8 generic inputs" in found.note


@pytest.mark.parametrize("paper", PAPERS)
def test_correct_code_of_other_random_numbers_is_not_accused(paper):
    module = load(f"loracle.reference.{paper}", paper=paper).namespace
    found = diagnose(load(in_numpy(module, paper), paper=paper))
    assert not found.candidates
    assert "did well" in found.note


@pytest.mark.parametrize("paper", PAPERS)
def test_what_is_harmless_is_no_mistake(paper):
    for mistake in mistakes_of(paper):
        if mistake.harmless:
            assert not diagnose(load(wrong(mistake), paper=paper)).candidates


@pytest.mark.parametrize("paper", PAPERS)
def test_two_mistakes_are_never_taken_for_one(paper):
    pairs = [
        (a, b) for a, b in itertools.pairwise(mistakes_of(paper)) if not (a.harmless or b.harmless or a.functions.keys() & b.functions)
    ]
    assert pairs
    for a, b in pairs:
        # What both of them break
        needs = dict.fromkeys(need for m in (a, b) for need in needs_of(m)[m.breaks[0]])
        found = diagnose(load(wrong(a, b), paper=paper), needs)
        # Named as one only where the other does not show
        for name in names(found):
            assert name in {t for m in (a, b) for twins in allowed(m) for t in twins}, f"{a.name} and {b.name}: {found}"
        assert found.candidates or found.note.startswith("more than one is wrong"), f"{a.name} and {b.name}: {found}"


# Two mistakes, and mistakes that are not known


def lora(**functions):
    return load(functions | {"LORACLE": {"arrays": "numpy"}}, paper="lora")


def no_scaling(W0, A, B, scaling):
    return W0 + B @ A


def test_two_mistakes_in_one_function_are_not_known():
    def forward(x, W0, A, B, scaling, bias=None):  # neither scaled nor on the frozen path
        return (x @ A.T) @ B.T if bias is None else (x @ A.T) @ B.T + bias

    assert str(diagnose(lora(forward=forward), ["forward.bias"])) == "no known mistake"


def test_two_wrong_functions_are_diagnosed_one_by_one():
    def unmerge(W, A, B, scaling):
        return W + scaling * B @ A

    found = str(diagnose(lora(merge=no_scaling, unmerge=unmerge), ["merge", "unmerge"]))
    assert "merge: The merged weight lacks the scaling" in found
    assert "unmerge: Unmerging adds the update again" in found
    assert found.startswith("no known mistake; more than one is wrong")


def test_a_second_mistake_elsewhere_does_not_hide_the_first():
    def num_trainable(W0, rank):
        return rank * W0.shape[1]

    impl = lora(merge=no_scaling, num_trainable=num_trainable)
    assert names(diagnose(impl, ["merge"])) == {"merge_without_scaling"}
    assert names(diagnose(impl, ["num_trainable"])) == {"one_factor_counted"}


def test_a_wrong_option_does_not_hide_another():
    def forward(x, W0, A, B, scaling, bias=None, mask=None, p=0.0):
        kept = x if mask is None else x * mask  # not divided by 1 - p, and the bias forgotten
        return x @ W0.T + scaling * (kept @ A.T) @ B.T

    impl = lora(forward=forward)
    assert names(diagnose(impl, ["forward.bias"])) == {"forward_without_bias"}
    assert names(diagnose(impl, ["forward.mask", "forward.p"])) == {"dropout_without_rescaling"}


@pytest.mark.parametrize(
    ("factor", "power"),
    [
        (lambda A, s: s**-0.5, "scaling^(-1/2)"),
        (lambda A, s: 3.0, "3"),
        (lambda A, s: 2 * s * A.shape[0], "2 * rank * scaling"),
        (lambda A, s: A.shape[1] ** 0.25, "in^(1/4)"),
        (lambda A, s: 1 + np.sin(A[0, 0]) / 2, "a factor that depends on the input"),
    ],
)
def test_what_is_wrong_by_a_factor_is_told_the_factor(factor, power):
    impl = lora(delta_weight=lambda A, B, scaling: factor(A, scaling) * scaling * B @ A)
    assert str(diagnose(impl, ["delta_weight"])).startswith(f"no known mistake; delta_weight is the right one times {power}")


def test_a_mistake_with_another_size_is_recognised():
    def init(W0, rank, generator):  # both factors random, as in the known mistake, but B with another distribution
        A = generator.uniform(-1, 1, (rank, W0.shape[1])) / W0.shape[1] ** 0.5
        return A, 0.02 * generator.standard_normal((W0.shape[0], rank))

    found = diagnose(lora(init=init), ["init"])
    assert names(found) == {"start_all_random"}
    assert "size differs" in found.note


@pytest.mark.parametrize("rounded", [math.floor, math.ceil])
def test_a_mistake_of_large_layers_is_recognised(rounded):
    def num_bases(W0, rank):
        return min(-(-min(W0.shape) // rank), rounded(1024 / rank))

    [result] = check({"num_bases": num_bases, "LORACLE": {"arrays": "numpy"}}, paper="randlora", laws=["randlora.L4d"]).results
    assert result.outcome == "fails"
    assert "(bases_capped)" in result.explanation
    assert "W0 = np.full((1025, 1025), 0.5)" in result.explanation


def test_what_is_kept_from_the_first_start_is_recognised():
    kept = {}

    def init(W0, rank, scaling=1.0, rows=None, cols=None):
        I, J = (np.arange(rank) if k is None else k for k in (rows, cols))
        return W0, W0[I], kept.setdefault(W0.tobytes(), W0[np.ix_(I, J)]), W0[:, J]

    [result] = check({"init": init, "LORACLE": {"arrays": "numpy"}}, paper="nlora", laws=["nlora.L8f"]).results
    assert result.outcome == "fails"
    assert "(second_start_finds_the_first_N)" in result.explanation


def test_what_shows_only_in_special_inputs_is_said_to_be():
    def delta_weight(A, B, scaling):
        return scaling * B @ A + (len(A) == 1)

    assert str(diagnose(lora(delta_weight=delta_weight), ["delta_weight"])) == (
        "no known mistake; delta_weight did well on 8 generic inputs: see what is special about this one"
    )


def test_a_derived_function_is_looked_for_where_it_comes_from():
    def forward(x, W0, A, B, scaling):
        return x @ W0.T + (x @ A.T) @ B.T

    assert names(diagnose(lora(forward=forward), ["delta_weight"])) == {"forward_without_scaling"}


def test_mistakes_that_a_law_cannot_tell_apart_are_told_apart_by_other_functions():
    def sgd_step(G, W0, A, B, scaling, lr):
        return W0, A - lr * B.T @ G, B - lr * G @ A.T

    def gradients(G, A, B, scaling):
        return scaling * B.T @ G, scaling * G @ A.T

    assert names(diagnose(lora(sgd_step=sgd_step), ["sgd_step"])) == {"step_without_scaling", "gradients_without_scaling"}
    assert "one of: " in str(diagnose(lora(sgd_step=sgd_step), ["sgd_step"]))
    assert names(diagnose(lora(sgd_step=sgd_step, gradients=gradients), ["sgd_step"])) == {"step_without_scaling"}


# It never makes a run fail


def test_a_failing_diagnosis_says_so_and_the_run_goes_on(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("the machinery broke\nand said more")

    monkeypatch.setattr(diagnosis, "agree", broken)
    report = check({"merge": no_scaling, "LORACLE": {"arrays": "numpy"}}, paper="lora", laws=["lora.L2c"], profile="quick")
    assert [r.outcome for r in report.results] == ["fails"]
    assert "  diagnosis  no diagnosis: RuntimeError: the machinery broke\n" in report.results[0].explanation


def test_an_interrupt_passes(monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(diagnosis, "agree", stop)
    with pytest.raises(KeyboardInterrupt):
        describe(lora(merge=no_scaling), law("lora.L2c"))


def test_a_hanging_implementation_is_waited_for_once(monkeypatch):
    calls = []

    def merge(W0, A, B, scaling):
        calls.append(A)
        if len(A) > 2:
            while True:
                pass
        return W0 + B @ A

    monkeypatch.setattr(diagnosis, "TIME_LIMIT", 0.2)
    impl = lora(merge=merge, delta_weight=lambda A, B, scaling: B @ A)
    for _ in range(2):
        assert describe(impl, law("lora.L2c")) == "no diagnosis: merge takes too long"
    assert len(calls) == 2
    with pytest.raises(TooSlow):
        diagnose(impl, ["merge", "delta_weight"])
    assert names(diagnose(impl, ["delta_weight"])) == {"delta_without_scaling"}


def test_the_implementation_is_observed_once_for_all_laws():
    calls = []

    def merge(W0, A, B, scaling):
        calls.append(A)
        return W0 + B @ A

    impl = lora(merge=merge)
    first = diagnose(impl, ["merge"])
    seen = len(calls)
    assert diagnose(impl, ["merge"]) is first
    assert len(calls) == seen == len(diagnosis.SIZES)


def test_a_diagnosis_leaves_no_trace():
    impl = lora(forward=lambda x, W0, A, B, scaling: x @ W0.T)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    diagnose(impl, ["delta_weight"])
    assert impl.derived == set()
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])


@pytest.mark.parametrize("paper", PAPERS)
def test_the_generic_cases_are_generic(paper):
    for case in diagnosis.generic_cases(paper):
        out, in_, rank = (case.sizes[n] for n in ("out", "in", "rank"))
        assert out != in_
        assert 2 <= 2 * rank < min(out, in_)
        assert case.scaling not in (0, 1, 2, rank)


@pytest.mark.parametrize("paper", PAPERS)
def test_a_first_diagnosis_takes_little_time(paper):
    for cached in (diagnosis._truth, diagnosis._observed_mistake, diagnosis._wrong, diagnosis._differs):
        cached.cache_clear()
    diagnose(load(f"loracle.reference.{paper}", paper=paper))
    started = time.process_time()
    for one in laws_of(paper):
        if one.needs:
            diagnose(load(wrong(mistakes_of(paper)[0]), paper=paper), looked_at(one))
    # All mistakes of the paper are observed for all laws here, so this is the first diagnosis of a dozen users
    assert time.process_time() - started < 15


# Public code as it is, which makes several mistakes in one function


def _pair_with_delta(grad_A, grad_B, A, B, s, X):
    """The pair of the official code, whose inverses have 1e-8 on their diagonals."""
    left, right = (torch.linalg.pinv(gram + 1e-8 * torch.eye(len(A), dtype=A.dtype)) for gram in (B.T @ B, A @ A.T))
    best_A, best_B = left @ grad_A / s**2, (grad_B - B @ left @ B.T @ grad_B) @ right / s**2
    if X == "zero":
        return best_A, best_B
    (a, P), (b, Q) = torch.linalg.eigh(B.T @ B), torch.linalg.eigh(A @ A.T)
    free = P @ (P.T @ (-left @ grad_A @ A.T / s**2) @ Q / (a[:, None] + b)) @ Q.T
    if X == "symmetry":
        free = -left @ B.T @ grad_B @ (A @ A.T) / (2 * s**2)
    return best_A + free @ A, best_B - B @ free


def _adam(g, m, v, t, *, beta1=0.9, beta2=0.999, adam_eps=1e-8, squared=None, **_):
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * (g if squared is None else squared(g)) ** 2
    return m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + adam_eps), m, v


@pytest.mark.parametrize(("half", "name"), [(False, "step_of_deepspeed"), (True, "step_of_deepspeed_in_bfloat16")])
def test_a_port_of_the_official_step_of_lora_pro_is_told(half, name):
    def step(grad_A, grad_B, W0, A, B, scaling, moment1, moment2, *, t, lr, weight_decay=0.0, X="sylvester", delta=0.0, **adam):
        s = 16 / 8
        pair = _pair_with_delta(grad_A, grad_B, A, B, s, "zero")
        squared = (lambda g: g.bfloat16().to(g.dtype)) if half and t > 1 else None
        d, m, v = _adam(s * B @ pair[0] + s * pair[1] @ A, moment1, moment2, t + 1, squared=squared, **adam)
        for_A, for_B = _pair_with_delta(s * B.T @ d, s * d @ A.T, A, B, s, "sylvester")
        return W0, A - lr * for_A, B - lr * for_B, m, v

    impl = load(SimpleNamespace(step=step), paper="lora_pro")
    for id in ("lora_pro.L13b", "lora_pro.L13c", "lora_pro.L14a"):
        assert names(diagnose(impl, looked_at(law(id)))) == {name}


def test_a_port_of_the_efficient_step_of_my_transformers_is_told():
    def step_efficient(grad_A, grad_B, A, B, scaling, *moments, t, lr, weight_decay=0.0, X="sylvester", delta=0.0, **given):
        old_1A, old_1B, old_2A, old_2B = (given.pop(f"moment{i}_{factor}") for i in (1, 2) for factor in "AB")
        pair = _pair_with_delta(grad_A, grad_B, A, B, scaling, X)
        for_A, m_A, v_A = _adam(pair[0], old_1A, old_2A, t, **given)
        for_B, m_B, v_B = _adam(pair[1], old_1B, old_2B, t, **given)
        return (1 - weight_decay) * A - for_A, (1 - weight_decay) * B - for_B, m_A, m_B, v_A, v_B

    impl = load(SimpleNamespace(step_efficient=step_efficient), paper="lora_pro")
    assert names(diagnose(impl, looked_at(law("lora_pro.L17b")))) == {"efficient_of_mytransformers"}


@pytest.mark.parametrize("own_generator", [False, True])
def test_lambdas_that_are_drawn_are_told_whatever_draws_them(own_generator):
    def init(W0, *, rank, zero="lambdas"):
        small = min(W0.shape)
        bases = -(-small // rank)
        generator = torch.Generator().manual_seed(3) if own_generator else None
        if zero == "gammas":
            return torch.zeros(bases, small, dtype=W0.dtype), torch.full((bases, rank), 1 / max(bases, rank), dtype=W0.dtype)
        lambdas = torch.randn(bases, rank, dtype=W0.dtype, generator=generator)
        return torch.full((bases, small), 1 / max(bases, small), dtype=W0.dtype), lambdas

    found = diagnose(load(SimpleNamespace(init=init), paper="randlora"), looked_at(law("randlora.L1a")))
    assert names(found) == {"random_lambdas" if own_generator else "random_lambdas_from_the_global_generator"}
