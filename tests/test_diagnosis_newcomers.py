"""A newcomer's wrong LoRA-GA, written from the paper in NumPy or torch: the report says what is wrong with it.

Nothing here knows the mistakes of `mistakes/lora_ga.py`. Each newcomer has a correct version of everything but one thing.
"""

import math

import numpy as np
import pytest
import torch

from loracle.oracle_tests import check
from loracle.oracle_tests.diagnosis import diagnose
from loracle.oracle_tests.loading import load
from loracle.oracle_tests.mistakes import mistakes_of

# In NumPy


def scaling_factor(alpha, rank):
    return alpha / np.sqrt(rank)


def init(G, scaling, rank, gamma=16.0):
    U, _, Vt = np.linalg.svd(G, full_matrices=False)
    c = G.shape[0] ** 0.25 / math.sqrt(gamma)
    return c * Vt[:rank], c * U[:, rank : 2 * rank]


def base_weight(W0, A, B, scaling):
    return W0 - scaling * B @ A


def first_order_update(G, A, B, scaling):
    return scaling**2 * (B @ B.T @ G + G @ A.T @ A)


def singular_values_in_B(G, scaling, rank, gamma=16.0):
    U, S, Vt = np.linalg.svd(G, full_matrices=False)
    c = G.shape[0] ** 0.25 / math.sqrt(gamma)
    return c * Vt[:rank], c * (U * S)[:, rank : 2 * rank]


def singular_values_in_B_alone_scaled(G, scaling, rank, gamma=16.0):  # as PEFT does
    U, S, Vt = np.linalg.svd(G, full_matrices=False)
    c = G.shape[0] ** 0.25 / math.sqrt(gamma)
    return Vt[:rank], c * U[:, rank : 2 * rank] * S[rank : 2 * rank]


def same_indices(G, scaling, rank, gamma=16.0):
    U, _, Vt = np.linalg.svd(G, full_matrices=False)
    c = G.shape[0] ** 0.25 / math.sqrt(gamma)
    return c * Vt[:rank], c * U[:, :rank]


def same_indices_by_eigenvectors(G, scaling, rank, gamma=16.0):
    _, right = np.linalg.eigh(G.T @ G)
    _, left = np.linalg.eigh(G @ G.T)
    c = math.sqrt(math.sqrt(len(G)) / gamma)
    return c * right[:, -rank:].T, c * left[:, -rank:]


def no_root_of_gamma(G, scaling, rank, gamma=16.0):
    U, _, Vt = np.linalg.svd(G, full_matrices=False)
    c = G.shape[0] ** 0.25 / gamma
    return c * Vt[:rank], c * U[:, rank : 2 * rank]


def fourth_root_of_in(G, scaling, rank, gamma=16.0):
    U, _, Vt = np.linalg.svd(G, full_matrices=False)
    c = G.shape[1] ** 0.25 / math.sqrt(gamma)
    return c * Vt[:rank], c * U[:, rank : 2 * rank]


def divided_by_sqrt_rank(G, scaling, rank, gamma=16.0):  # a factor that nobody foresaw
    U, _, Vt = np.linalg.svd(G, full_matrices=False)
    c = G.shape[0] ** 0.25 / math.sqrt(gamma * rank)
    return c * Vt[:rank], c * U[:, rank : 2 * rank]


def transposed_gradient(G, scaling, rank, gamma=16.0):  # takes the layer for one of GPT-2's, which are stored as (in, out)
    U, _, Vt = np.linalg.svd(G.T, full_matrices=False)
    c = G.shape[0] ** 0.25 / math.sqrt(gamma)
    return c * Vt[:rank], c * U[:, rank : 2 * rank]


def scaling_of_lora(alpha, rank):
    return alpha / rank


def no_correction(W0, A, B, scaling):
    return W0.copy()


def correction_added(W0, A, B, scaling):
    return W0 + scaling * B @ A


def correction_without_scaling(W0, A, B, scaling):
    return W0 - B @ A


# In torch


def torch_init(G, scaling, *, rank, gamma=16.0):
    U, _, V = torch.svd(G)
    c = len(G) ** 0.25 / gamma**0.5
    return {"A": c * V.T[:rank], "B": c * U[:, rank : 2 * rank]}


def torch_halves_exchanged(G, scaling, *, rank, gamma=16.0):
    U, _, Vh = torch.linalg.svd(G)
    c = len(G) ** 0.25 / gamma**0.5
    return c * Vh[rank : 2 * rank], c * U[:, :rank]


def torch_singular_values_in_both(G, scaling, *, rank, gamma=16.0):
    U, S, Vh = torch.linalg.svd(G)
    c, root = len(G) ** 0.25 / gamma**0.5, S.sqrt()
    return c * root[:rank, None] * Vh[:rank], c * U[:, rank : 2 * rank] * root[rank : 2 * rank]


def newcomer(arrays="numpy", dtype="float64", **wrong):
    right = {"scaling_factor": scaling_factor, "base_weight": base_weight, "first_order_update": first_order_update}
    if arrays == "numpy":
        right["init"] = init
    return right | wrong | {"LORACLE": {"arrays": arrays, "dtype": dtype}}


WRONG = {
    "singular_values_in_B": {"init": singular_values_in_B},
    "start_of_peft": {"init": singular_values_in_B_alone_scaled},
    "same_triplets": {"init": same_indices},
    "root_of_in": {"init": fourth_root_of_in},
    "gamma_without_root": {"init": no_root_of_gamma},
    "transposed_throughout": {"init": transposed_gradient},
    "scaling_over_rank": {"scaling_factor": scaling_of_lora},
    "base_not_corrected": {"base_weight": no_correction},
    "base_adds": {"base_weight": correction_added},
    "base_without_scaling": {"base_weight": correction_without_scaling},
}


def in_torch(init, dtype="float64"):
    """Only what the newcomer has written: scaling and start."""
    return {"init": init, "LORACLE": {"arrays": "torch", "dtype": dtype}}


def diagnoses(implementation) -> dict[str, str]:
    """The line of diagnosis of every law that fails."""
    report = check(implementation, paper="lora_ga", profile="quick")
    lines = {r.law: [x for x in r.explanation.splitlines() if x.startswith("  diagnosis")] for r in report.results if r.outcome == "fails"}
    return {law: line[0].removeprefix("  diagnosis").strip() if line else "" for law, line in lines.items()}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", WRONG)
def test_the_report_of_a_newcomer_names_his_mistake(name, dtype):
    said = diagnoses(newcomer(dtype=dtype, **WRONG[name]))
    assert said, "no law fails"
    mistake = next(m for m in mistakes_of("lora_ga") if m.name == name)
    for law, line in said.items():
        assert line == f"{mistake.says.rstrip('.')} ({name})", law


def test_a_newcomer_in_torch():
    said = diagnoses(in_torch(torch_singular_values_in_both))
    assert said, "no law fails"
    assert all(line.endswith("(roots_of_singular_values)") for line in said.values()), said


def test_the_other_split_of_the_triplets_fails_the_law_of_the_default_only():
    said = diagnoses(in_torch(torch_halves_exchanged))
    assert said, "no law fails"
    assert all(line.endswith("(halves_exchanged)") for line in said.values()), said


def test_the_same_mistake_by_another_decomposition():
    said = diagnoses(newcomer(init=same_indices_by_eigenvectors))
    assert said
    assert all(line.endswith("(same_triplets)") for line in said.values()), said


def test_a_mistake_that_nobody_foresaw_is_described_by_its_factor():
    impl = load(newcomer(init=divided_by_sqrt_rank), paper="lora_ga")
    assert str(diagnose(impl, ["init", "init.gamma"])) == "no known mistake; A'A of init is the right one times rank^(-1)"


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("implementation", [newcomer, lambda dtype: in_torch(torch_init, dtype)])
def test_a_newcomer_who_is_right_is_told_nothing(implementation, dtype):
    assert diagnoses(implementation(dtype=dtype)) == {}
    impl = load(implementation(dtype=dtype), paper="lora_ga")
    assert not diagnose(impl).candidates


def test_a_printing_newcomer_is_told_just_that():
    def chatty(G, scaling, rank, gamma=16.0):
        print("decomposing")
        return init(G, scaling, rank, gamma)

    assert set(diagnoses(newcomer(init=chatty)).values()) == {""}
