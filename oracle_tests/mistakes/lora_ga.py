"""Plausible mistakes in LoRA-GA. The functions keep the reference's parameters; what is not named stands in `options`."""

import math

import numpy as np
import torch

from loracle.oracle_tests.mistakes import Observables, mistake
from loracle.reference import lora_ga as right
from loracle.reference.lora import Factors


def _indices(case):
    order = np.random.default_rng(case.number).permutation(2 * case.rank)
    return order[: case.rank], order[case.rank :]


def _sketch(case):
    return np.random.default_rng(case.number).standard_normal((case.small, min(2 * case.rank + 1, case.small)))


def _batches(case):
    return np.split(np.arange(12), [2, 5])


def _gradient_of_a_batch(case):
    """The gradient of the logistic loss of some of twelve samples."""
    rng = np.random.default_rng(case.number)
    X, Y = rng.standard_normal((12, case.sizes["in"])), rng.choice([-1.0, 1.0], (12, case.out))
    return lambda W, rows: (-Y[rows] / (1 + np.exp(Y[rows] * (X[rows] @ W.T)))).T @ X[rows] / len(rows)


def _free_of_signs(case, factors):
    """A'A and BB', and which triplets are paired: the second-order term of the first step, G A'B'G, by its singular values."""
    A, B = factors
    pairs = np.linalg.svd(case.G @ A.T @ B.T @ case.G, compute_uv=False)
    return {"A'A": A.T @ A, "BB'": B @ B.T, "pairs": pairs[: case.rank]}


def _free_of_order(case, sets):
    """Which indices A has, B has, both have; and of A apart, since few draws show them: the first index, and pairs i, i + rank."""
    r, (in_A, in_B) = case.rank, (np.isin(np.arange(2 * case.rank + 1), half).astype(float) for half in sets)
    return {"A": in_A, "B": in_B, "both": in_A * in_B, "first": in_A[0], "partners": in_A[:r] @ in_A[r : 2 * r]}


OBSERVABLES = Observables(
    choices={"direction": ("A2rBr", "ArBr", "random"), "scale": ("unit", "gd", "weightS")},
    values={"indices": _indices, "sketch": _sketch, "niter": 1, "batches": _batches, "grad": _gradient_of_a_batch},
    gauge_free={"init": _free_of_signs, "index_sets": _free_of_order},
)


# The frozen weight


@mistake(
    "The frozen weight is not corrected: training starts at W0 + s B A (MyTransformers' default).",
    replaces="base_weight",
    breaks=("lora_ga.L1a", "lora_ga.L1b", "lora_ga.L1c"),
)
def base_not_corrected(W0, A, B, scaling):
    return W0.clone()


@mistake("The correction lacks the scaling.", replaces="base_weight", breaks=("lora_ga.L1a", "lora_ga.L1b", "lora_ga.L1c"))
def base_without_scaling(W0, A, B, scaling):
    return W0 - B @ A


@mistake("The correction is scaled twice.", replaces="base_weight", breaks=("lora_ga.L1a", "lora_ga.L1b", "lora_ga.L1c"))
def base_scaled_twice(W0, A, B, scaling):
    return W0 - scaling**2 * (B @ A)


@mistake("The correction is added.", replaces="base_weight", breaks=("lora_ga.L1a", "lora_ga.L1b", "lora_ga.L1c"))
def base_adds(W0, A, B, scaling):
    return W0 + scaling * (B @ A)


@mistake("The correction is computed in bfloat16.", replaces="base_weight", breaks=("lora_ga.L1a", "lora_ga.L1c"))
def base_in_bfloat16(W0, A, B, scaling):
    return W0 - (scaling * (B.bfloat16() @ A.bfloat16())).to(W0.dtype)


@mistake(
    "The correction is made with other factors than those that are trained: before or after a cast to bfloat16.",
    replaces="base_weight",
    breaks=("lora_ga.L1a", "lora_ga.L1c"),
)
def base_of_cast_factors(W0, A, B, scaling):
    return right.base_weight(W0, A.bfloat16().to(A.dtype), B.bfloat16().to(B.dtype), scaling)


@mistake("The correction is computed in float32 and cast back.", replaces="base_weight", breaks=("lora_ga.L1a", "lora_ga.L1c"))
def base_in_float32(W0, A, B, scaling):
    return right.base_weight(W0.float(), A.float(), B.float(), scaling).to(W0.dtype)


# The length of the factors


@mistake(
    "A's length has the fourth root of in, B's that of out.",
    replaces="init",
    breaks=("lora_ga.L2a", "lora_ga.L2b", "lora_ga.L3a", "lora_ga.L7a"),
)
def each_side_its_own_root(G, scaling, *, rank, **options):
    A, B = right.init(G, scaling, rank=rank, **options)
    return Factors((G.shape[1] / G.shape[0]) ** 0.25 * A, B)


@mistake(
    "The length of both factors has the fourth root of in: stable backwards, not forwards.",
    replaces="init",
    breaks=("lora_ga.L2a", "lora_ga.L3a", "lora_ga.L7a", "lora_ga.L7b"),
)
def root_of_in(G, scaling, *, rank, **options):
    A, B = right.init(G, scaling, rank=rank, **options)
    root = (G.shape[1] / G.shape[0]) ** 0.25
    return Factors(root * A, root * B)


@mistake(
    "gamma divides each factor, not its root: the misprint of the first arXiv versions.",
    replaces="factor_scale",
    breaks=("lora_ga.L2a", "lora_ga.L2c", "lora_ga.L6a", "lora_ga.L7a"),
)
def gamma_without_root(scaling, *, out_features, rank, gamma=16.0, scale="stable", W0=None):
    c = right.factor_scale(scaling, out_features=out_features, rank=rank, gamma=gamma, scale=scale, W0=W0)
    return c / math.sqrt(gamma) if scale == "stable" else c


@mistake(
    "Each factor has the length that belongs to their product, sqrt(out) / gamma.",
    replaces="factor_scale",
    breaks=("lora_ga.L2a", "lora_ga.L2c", "lora_ga.L6a", "lora_ga.L7a"),
)
def length_not_rooted(scaling, *, out_features, rank, gamma=16.0, scale="stable", W0=None):
    c = right.factor_scale(scaling, out_features=out_features, rank=rank, gamma=gamma, scale=scale, W0=W0)
    return c * c if scale == "stable" else c


@mistake(
    "The length has the square root of out, not the fourth.",
    replaces="factor_scale",
    breaks=("lora_ga.L2a", "lora_ga.L2c", "lora_ga.L7a", "lora_ga.L7b"),
)
def square_root_of_out(scaling, *, out_features, rank, gamma=16.0, scale="stable", W0=None):
    c = right.factor_scale(scaling, out_features=out_features, rank=rank, gamma=gamma, scale=scale, W0=W0)
    return c * out_features**0.25 if scale == "stable" else c


@mistake(
    "B is multiplied by its singular values and alone carries the scale, as in PEFT 0.21.2, whose random direction also uses one set "
    "of triplets for both factors.",
    replaces="init",
    breaks=("lora_ga.L2a", "lora_ga.L3a", "lora_ga.L4", "lora_ga.L5b", "lora_ga.L7a", "lora_ga.L10"),
)
def start_of_peft(G, scaling, *, rank, direction="ArB2r", scale="stable", generator=None, **options):
    U, values, Vh = torch.linalg.svd(G, full_matrices=False)
    named = "ArB2r" if direction == "random" else direction
    for_A, for_B = right.index_sets(rank=rank, direction=named)
    if direction == "random":
        for_A = for_B = torch.randperm(2 * rank, generator=generator)[:rank]
    if scale == "weightS":
        c = _first_column_as_long_as_the_weight(options["W0"], values[for_B])
    else:
        c = right.init(G, scaling, rank=rank, scale=scale, **options).A[0].norm()
    A = Vh[for_A] * (c if scale == "gd" else 1)
    return Factors(A, c * U[:, for_B] * values[for_B])


def _first_column_as_long_as_the_weight(W0, values):
    """What multiplies B, whose columns have these lengths, for the first of them to be that of the largest singular value of W0."""
    return torch.linalg.matrix_norm(W0, 2) / values[0]


@mistake(
    "The scale 'weightS' makes B's first column as long as the largest singular value of W0 and leaves the rows of A at length 1 "
    "(PEFT's `weight_svd`).",
    replaces="init",
    breaks=("lora_ga.L2b",),
)
def weight_scale_of_peft(G, scaling, *, rank, scale="stable", W0=None, indices=None, direction="ArB2r", generator=None, **options):
    if indices is None:
        indices = right.index_sets(rank=rank, direction=direction, generator=generator)
    A, B = right.init(G, scaling, rank=rank, scale="unit" if scale == "weightS" else scale, W0=W0, indices=indices, **options)
    if scale == "weightS":
        values = torch.linalg.svdvals(G)[indices[1]]
        B = B * values * _first_column_as_long_as_the_weight(W0, values)
    return Factors(A, B)


@mistake("The scale is put on B alone, A keeps rows of length 1.", replaces="init", breaks=("lora_ga.L2a", "lora_ga.L3a", "lora_ga.L7a"))
def scale_on_B_only(G, scaling, *, rank, **options):
    A, B = right.init(G, scaling, rank=rank, **options)
    return Factors(A / A.norm(dim=1, keepdim=True), B)


@mistake(
    "The columns of B are multiplied by their singular values.",
    replaces="init",
    breaks=("lora_ga.L2a", "lora_ga.L3a", "lora_ga.L4", "lora_ga.L8a", "lora_ga.L9", "lora_ga.L10"),
)
def singular_values_in_B(G, scaling, *, rank, **options):
    return _times_values(G, right.init(G, scaling, rank=rank, **options))


def _times_values(G, factors):
    """The factors with the columns of B times their singular values."""
    A, B = factors
    return Factors(A, B * (G.mT @ (B / B.norm(dim=0))).norm(dim=0))


@mistake(
    "Both factors are multiplied by the roots of their singular values, as in PiSSA.",
    replaces="init",
    breaks=("lora_ga.L2a", "lora_ga.L3a", "lora_ga.L10"),
)
def roots_of_singular_values(G, scaling, *, rank, **options):
    A, B = right.init(G, scaling, rank=rank, **options)
    rows, columns = (G @ A.mT).norm(dim=0) / A.norm(dim=1), (G.mT @ B).norm(dim=0) / B.norm(dim=0)
    return Factors(A * rows.sqrt()[:, None], B * columns.sqrt())


@mistake("gamma is ignored: it stays 16.", replaces="init", breaks=("lora_ga.L2a", "lora_ga.L3a", "lora_ga.L7a"))
def gamma_ignored(G, scaling, *, rank, gamma=16.0, **options):
    return right.init(G, scaling, rank=rank, **options)


@mistake("gamma divides the length of one factor only.", replaces="init", breaks=("lora_ga.L2a", "lora_ga.L3a", "lora_ga.L7a"))
def gamma_on_one_factor(G, scaling, *, rank, gamma=16.0, **options):
    A, B = right.init(G, scaling, rank=rank, gamma=gamma, **options)
    return Factors(math.sqrt(gamma) * A, B)


@mistake(
    "The scaling is divided out of the factors, as if B A were to be free of it.", replaces="init", breaks=("lora_ga.L2a", "lora_ga.L7a")
)
def scaling_divided_out(G, scaling, *, rank, **options):
    A, B = right.init(G, scaling, rank=rank, **options)
    return Factors(A / math.sqrt(scaling), B / math.sqrt(scaling))


@mistake("The option of the scale is ignored.", replaces="init", breaks=("lora_ga.L2b", "lora_ga.L12"))
def scale_ignored(G, scaling, *, rank, scale="stable", **options):
    return right.init(G, scaling, rank=rank, **options)


@mistake(
    "The scale 'gd' divides by a constant 16 where the scaling belongs (MyTransformers).",
    replaces="factor_scale",
    breaks=("lora_ga.L2b", "lora_ga.L2c", "lora_ga.L6b", "lora_ga.L12"),
)
def gd_by_sixteen(scaling, *, out_features, rank, gamma=16.0, scale="stable", W0=None):
    return 1 / 16 if scale == "gd" else right.factor_scale(scaling, out_features=out_features, rank=rank, gamma=gamma, scale=scale, W0=W0)


@mistake(
    "The scale 'gd' takes the root of the scaling.",
    replaces="factor_scale",
    breaks=("lora_ga.L2b", "lora_ga.L2c", "lora_ga.L6b", "lora_ga.L12"),
)
def gd_by_root(scaling, *, out_features, rank, gamma=16.0, scale="stable", W0=None):
    c = right.factor_scale(scaling, out_features=out_features, rank=rank, gamma=gamma, scale=scale, W0=W0)
    return math.sqrt(c) if scale == "gd" else c


@mistake("The scale 'weightS' reads the gradient, not the pretrained weight.", replaces="init", breaks=("lora_ga.L2b",))
def weight_scale_of_the_gradient(G, scaling, *, rank, W0=None, **options):
    return right.init(G, scaling, rank=rank, W0=G, **options)


@mistake(
    "The scale 'weightS' takes the root of the mean singular value, not the mean root.",
    replaces="factor_scale",
    breaks=("lora_ga.L2b", "lora_ga.L2c", "lora_ga.L6b"),
)
def root_of_the_mean(scaling, *, out_features, rank, gamma=16.0, scale="stable", W0=None):
    if scale == "weightS":
        return math.sqrt(float(torch.linalg.svdvals(W0)[:rank].mean()) / scaling)
    return right.factor_scale(scaling, out_features=out_features, rank=rank, gamma=gamma, scale=scale, W0=W0)


@mistake(
    "The scale 'weightS' averages over all singular values of W0, not over the top ones.",
    replaces="factor_scale",
    breaks=("lora_ga.L2b", "lora_ga.L2c", "lora_ga.L6b"),
)
def mean_over_all_values(scaling, *, out_features, rank, gamma=16.0, scale="stable", W0=None):
    count = min(W0.shape) if scale == "weightS" else rank
    return right.factor_scale(scaling, out_features=out_features, rank=count, gamma=gamma, scale=scale, W0=W0)


@mistake("The scale 'weightS' lacks the scaling.", replaces="factor_scale", breaks=("lora_ga.L2b", "lora_ga.L2c", "lora_ga.L6b"))
def weight_scale_without_scaling(scaling, *, out_features, rank, gamma=16.0, scale="stable", W0=None):
    s = 1.0 if scale == "weightS" else scaling
    return right.factor_scale(s, out_features=out_features, rank=rank, gamma=gamma, scale=scale, W0=W0)


@mistake(
    "The decomposition is done in float32 and cast back.",
    replaces="init",
    breaks=("lora_ga.L2a", "lora_ga.L3a", "lora_ga.L5a", "lora_ga.L11"),
)
def init_in_float32(G, scaling, *, rank, W0=None, sketch=None, **options):
    short = {"W0": None if W0 is None else W0.float(), "sketch": None if sketch is None else sketch.float()}
    A, B = right.init(G.float(), scaling, rank=rank, **short, **options)
    return Factors(A.to(G.dtype), B.to(G.dtype))


@mistake("gamma is 64 by default, as in the command of the official README.", replaces="factor_scale", breaks=("lora_ga.L2e",))
def default_gamma_of_the_readme(scaling, *, out_features, rank, gamma=64.0, scale="stable", W0=None):
    return right.factor_scale(scaling, out_features=out_features, rank=rank, gamma=gamma, scale=scale, W0=W0)


@mistake("The start's gamma is 64 by default, as in the command of the official README.", replaces="init", breaks=("lora_ga.L2d",))
def default_gamma_of_the_start(G, scaling, *, rank, gamma=64.0, **options):
    return right.init(G, scaling, rank=rank, gamma=gamma, **options)


# Which singular vectors


@mistake(
    "A and B take the same triplets, the first r: the first step covers rank r only.",
    replaces="index_sets",
    breaks=("lora_ga.L3a", "lora_ga.L4", "lora_ga.L5a", "lora_ga.L5b", "lora_ga.L5d", "lora_ga.L8a", "lora_ga.L12"),
    also={"_check_indices": lambda indices, rank: tuple(indices)},
)
def same_triplets(*, rank, direction="ArB2r", generator=None):
    for_A, _ = right.index_sets(rank=rank, direction=direction, generator=generator)
    return right.IndexSets(A=for_A, B=for_A)


@mistake("A takes the triplets of B and B those of A.", replaces="index_sets", breaks=("lora_ga.L5a", "lora_ga.L5d", "lora_ga.L9"))
def halves_exchanged(*, rank, direction="ArB2r", generator=None):
    for_A, for_B = right.index_sets(rank=rank, direction=direction, generator=generator)
    return right.IndexSets(A=for_B, B=for_A)


@mistake(
    "A takes the left singular vectors of the transposed gradient: the gradient of a layer stored as (in, out).",
    replaces="init",
    breaks=("lora_ga.L2a", "lora_ga.L5a", "lora_ga.L9"),
)
def gradient_transposed(G, scaling, *, rank, W0=None, **options):
    A, B = right.init(G.mT, scaling, rank=rank, W0=None if W0 is None else W0.mT, **options)
    return Factors(B.mT, A.mT)


@mistake(
    "The gradient enters transposed, as that of a layer stored as (in, out), and the factors have each other's sides.",
    replaces="init",
    breaks=("lora_ga.L1c", "lora_ga.L2a", "lora_ga.L3a"),
)
def transposed_throughout(G, scaling, *, rank, W0=None, **options):
    c = right.init(G, scaling, rank=rank, W0=W0, **options).A.norm(dim=1)[0]
    A, B = right.init(G.mT, scaling, rank=rank, scale="unit", **{k: v for k, v in options.items() if k != "scale"})
    return Factors(c * A, c * B)


@mistake("The factors come back in the wrong order.", replaces="init", breaks=("lora_ga.L1c", "lora_ga.L2a", "lora_ga.L3a"))
def factors_exchanged(G, scaling, *, rank, **options):
    A, B = right.init(G, scaling, rank=rank, **options)
    return Factors(B, A)


@mistake(
    "'ArBr' gives the even places to both factors.",
    replaces="index_sets",
    breaks=("lora_ga.L5a", "lora_ga.L5b", "lora_ga.L5d"),
    also={"_check_indices": lambda indices, rank: tuple(indices)},
)
def both_even(*, rank, direction="ArB2r", generator=None):
    for_A, for_B = right.index_sets(rank=rank, direction=direction, generator=generator)
    return right.IndexSets(A=for_B if direction == "ArBr" else for_A, B=for_B)


@mistake(
    "'ArBr' counts the places from 0 where the paper counts from 1: A takes the first.",
    replaces="index_sets",
    breaks=("lora_ga.L5a", "lora_ga.L5d"),
)
def places_from_zero(*, rank, direction="ArB2r", generator=None):
    for_A, for_B = right.index_sets(rank=rank, direction=direction, generator=generator)
    return right.IndexSets(A=for_B, B=for_A) if direction == "ArBr" else right.IndexSets(A=for_A, B=for_B)


@mistake("The direction is ignored.", replaces="init", breaks=("lora_ga.L5a", "lora_ga.L5g", "lora_ga.L9"))
def direction_ignored(G, scaling, *, rank, direction="ArB2r", **options):
    return right.init(G, scaling, rank=rank, **options)


@mistake("The indices are counted from 1.", replaces="index_sets", breaks=("lora_ga.L5d", "lora_ga.L5e"))
def indices_from_one(*, rank, direction="ArB2r", generator=None):
    for_A, for_B = right.index_sets(rank=rank, direction=direction, generator=generator)
    return right.IndexSets(A=for_A + 1, B=for_B + 1)


@mistake(
    "B takes the last r triplets of the whole decomposition, not the second r.",
    replaces="init",
    breaks=("lora_ga.L3a", "lora_ga.L4", "lora_ga.L5a", "lora_ga.L9"),
)
def last_triplets(G, scaling, *, rank, **options):
    A, B = right.init(G, scaling, rank=rank, **options)
    U = torch.linalg.svd(G, full_matrices=False).U
    return Factors(A, B.norm(dim=0) * U[:, -rank:])


@mistake(
    "The smallest triplets are taken, as from an eigendecomposition in ascending order.",
    replaces="init",
    breaks=("lora_ga.L3a", "lora_ga.L4", "lora_ga.L5a", "lora_ga.L9"),
)
def ascending_order(G, scaling, *, rank, **options):
    A, B = right.init(G, scaling, rank=rank, **options)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return Factors(A.norm(dim=1)[:, None] * Vh.flip(0)[:rank], B.norm(dim=0) * U.flip(1)[:, rank : 2 * rank])


@mistake(
    "The factors are random orthonormal: the gradient is not used at all.",
    replaces="init",
    breaks=("lora_ga.L3a", "lora_ga.L4", "lora_ga.L5a", "lora_ga.L8a", "lora_ga.L11"),
)
def random_orthonormal(G, scaling, *, rank, **options):
    A, B = right.init(G, scaling, rank=rank, **options)
    own = torch.Generator().manual_seed(0)
    Q_in, Q_out = (torch.linalg.qr(torch.randn(n, rank, generator=own, dtype=torch.float64)).Q.to(G) for n in (A.shape[1], len(B)))
    return Factors(A.norm(dim=1)[:, None] * Q_in.mT, B.norm(dim=0) * Q_out)


@mistake("The indices that are given are ignored.", replaces="init", breaks=("lora_ga.L5c", "lora_ga.L8b"))
def given_indices_ignored(G, scaling, *, rank, indices=None, **options):
    return right.init(G, scaling, rank=rank, **options)


@mistake("The given indices of A go to B and those of B to A.", replaces="init", breaks=("lora_ga.L5c",))
def given_indices_exchanged(G, scaling, *, rank, indices=None, **options):
    return right.init(G, scaling, rank=rank, indices=None if indices is None else (indices[1], indices[0]), **options)


@mistake("The given indices are sorted: their pairing is lost.", replaces="init", breaks=("lora_ga.L8b",))
def given_indices_sorted(G, scaling, *, rank, indices=None, **options):
    ordered = None if indices is None else tuple(half.sort().values for half in indices)
    return right.init(G, scaling, rank=rank, indices=ordered, **options)


@mistake(
    "The random direction draws one set for both factors (PEFT 0.21.2).",
    replaces="index_sets",
    breaks=("lora_ga.L5b", "lora_ga.L5e"),
    also={"_check_indices": lambda indices, rank: tuple(indices)},
)
def random_same_set(*, rank, direction="ArB2r", generator=None):
    for_A, for_B = right.index_sets(rank=rank, direction=direction, generator=generator)
    return right.IndexSets(A=for_A, B=for_A if direction == "random" else for_B)


@mistake(
    "The random direction draws the set of B without regard to that of A.",
    replaces="index_sets",
    breaks=("lora_ga.L5b", "lora_ga.L5e"),
    also={"_check_indices": lambda indices, rank: tuple(indices)},
)
def random_overlap(*, rank, direction="ArB2r", generator=None):
    for_A, for_B = right.index_sets(rank=rank, direction=direction, generator=generator)
    if direction == "random":
        for_B = right.index_sets(rank=rank, direction=direction, generator=generator).B
    return right.IndexSets(A=for_A, B=for_B)


@mistake("The random direction draws from all triplets, not from the first 2r.", replaces="init", breaks=("lora_ga.L5b",))
def random_from_all(G, scaling, *, rank, direction="ArB2r", generator=None, **options):
    A, B = right.init(G, scaling, rank=rank, direction=direction, generator=generator, **options)
    if direction != "random":
        return Factors(A, B)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    order = torch.randperm(len(Vh), generator=generator, device=generator.device if generator else None)
    return Factors(A.norm(dim=1)[:, None] * Vh[order[:rank]], B.norm(dim=0) * U[:, order[rank : 2 * rank]])


@mistake("The random direction ignores the generator.", replaces="index_sets", breaks=("lora_ga.L5e", "lora_ga.L5f", "lora_ga.L5g"))
def generator_ignored(*, rank, direction="ArB2r", generator=None):
    return right.index_sets(rank=rank, direction=direction, generator=torch.Generator().manual_seed(0))


@mistake("The random direction draws from the global generator.", replaces="index_sets", breaks=("lora_ga.L5e", "lora_ga.L5g"))
def global_generator(*, rank, direction="ArB2r", generator=None):
    return right.index_sets(rank=rank, direction=direction)


@mistake(
    "The random direction tosses a coin for each pair (i, i + r): most halves never come.", replaces="index_sets", breaks=("lora_ga.L5f",)
)
def coin_for_each_pair(*, rank, direction="ArB2r", generator=None):
    for_A, for_B = right.index_sets(rank=rank, direction="ArB2r" if direction == "random" else direction)
    if direction == "random":
        toss = torch.rand(rank, generator=generator) < 0.5
        for_A, for_B = torch.where(toss, for_B, for_A), torch.where(toss, for_A, for_B)
    return right.IndexSets(A=for_A, B=for_B)


@mistake("The random direction keeps the first triplet for A.", replaces="index_sets", breaks=("lora_ga.L5f",))
def first_triplet_to_A(*, rank, direction="ArB2r", generator=None):
    for_A, for_B = right.index_sets(rank=rank, direction=direction, generator=generator)
    return right.IndexSets(A=for_B, B=for_A) if direction == "random" and 0 in for_B else right.IndexSets(A=for_A, B=for_B)


# Scalars


@mistake("zeta lacks the square.", replaces="zeta", breaks=("lora_ga.L6a", "lora_ga.L6b"))
def zeta_not_squared(scaling, *, out_features, rank, gamma=16.0, scale="stable", W0=None):
    return scaling * right.factor_scale(scaling, out_features=out_features, rank=rank, gamma=gamma, scale=scale, W0=W0)


@mistake("zeta lacks the scaling: it is the square of the factors' length.", replaces="zeta", breaks=("lora_ga.L6a", "lora_ga.L6b"))
def zeta_without_scaling(scaling, *, out_features, rank, gamma=16.0, scale="stable", W0=None):
    return right.factor_scale(scaling, out_features=out_features, rank=rank, gamma=gamma, scale=scale, W0=W0) ** 2


@mistake("zeta ignores the option of the scale.", replaces="zeta", breaks=("lora_ga.L6b",))
def zeta_always_stable(scaling, *, out_features, rank, gamma=16.0, scale="stable", W0=None):
    return right.zeta(scaling, out_features=out_features, rank=rank, gamma=gamma)


@mistake(
    "The scaling is alpha / rank: the official configuration's default, not the paper's.",
    replaces="scaling_factor",
    breaks=("lora_ga.L6a", "lora_ga.L6c", "lora_ga.L7a", "lora_ga.L7b"),
)
def scaling_over_rank(alpha, rank):
    return alpha / rank


@mistake("The scaling takes the root of alpha too.", replaces="scaling_factor", breaks=("lora_ga.L6a", "lora_ga.L6c", "lora_ga.L7a"))
def scaling_roots_alpha(alpha, rank):
    return math.sqrt(alpha / rank)


# The first update


@mistake(
    "The first-order update has the term of A only, as in LoRA, where B is zero.", replaces="first_order_update", breaks=("lora_ga.L3b",)
)
def update_through_A_only(G, A, B, scaling):
    return scaling**2 * (G @ A.mT @ A)


@mistake("The first-order update has the scaling once.", replaces="first_order_update", breaks=("lora_ga.L3b",))
def update_scaled_once(G, A, B, scaling):
    return right.first_order_update(G, A, B, scaling) / scaling


@mistake("The first-order update has the sign of the step.", replaces="first_order_update", breaks=("lora_ga.L3b",))
def update_with_the_step_sign(G, A, B, scaling):
    return -right.first_order_update(G, A, B, scaling)


@mistake(
    "The first-order update includes the term of second order, at learning rate 1.", replaces="first_order_update", breaks=("lora_ga.L3b",)
)
def update_with_second_order(G, A, B, scaling):
    return right.first_order_update(G, A, B, scaling) - scaling**3 * (G @ A.mT @ B.mT @ G)


@mistake(
    "The first-order update projects: the factors' products are taken as projectors.",
    replaces="first_order_update",
    breaks=("lora_ga.L3b",),
)
def update_projects(G, A, B, scaling):
    return scaling**2 * (B @ torch.linalg.pinv(B) @ G + G @ torch.linalg.pinv(A) @ A)


# The gradient's estimate


@mistake(
    "The microbatches' gradients are summed, not averaged.",
    replaces="estimate_gradient",
    breaks=("lora_ga.L13a", "lora_ga.L13b", "lora_ga.L13c"),
)
def gradient_summed(grad, W0, batches):
    return sum(grad(W0, batch) for batch in batches)


@mistake(
    "Only the last microbatch counts: its gradient overwrites the others.",
    replaces="estimate_gradient",
    breaks=("lora_ga.L13a", "lora_ga.L13b", "lora_ga.L13c"),
)
def last_microbatch(grad, W0, batches):
    return grad(W0, list(batches)[-1])


@mistake("The microbatches are weighted by their numbers of samples.", replaces="estimate_gradient", breaks=("lora_ga.L13b",))
def weighted_microbatches(grad, W0, batches):
    batches = list(batches)
    sizes = [batch.numel() if isinstance(batch, torch.Tensor) else 1 for batch in batches]
    return sum(size * grad(W0, batch) for size, batch in zip(sizes, batches, strict=True)) / sum(sizes)


@mistake("The weight is stepped from microbatch to microbatch.", replaces="estimate_gradient", breaks=("lora_ga.L13a", "lora_ga.L13b"))
def weight_moves(grad, W0, batches):
    W, total, count = W0.clone(), torch.zeros_like(W0), 0
    for batch in batches:
        gradient = grad(W, batch)
        W, total, count = W - 0.01 * gradient, total + gradient, count + 1
    return total / count


@mistake(
    "The gradient is divided by the number of microbatches plus one.", replaces="estimate_gradient", breaks=("lora_ga.L13a", "lora_ga.L13c")
)
def one_microbatch_too_many(grad, W0, batches):
    batches = list(batches)
    return right.estimate_gradient(grad, W0, batches) * len(batches) / (len(batches) + 1)


@mistake("Each microbatch's gradient is divided by its norm.", replaces="estimate_gradient", breaks=("lora_ga.L13a", "lora_ga.L13b"))
def gradients_normalised(grad, W0, batches):
    gradients = [grad(W0, batch) for batch in batches]
    return sum(g / g.norm() for g in gradients) / len(gradients)


@mistake("The gradients are summed in bfloat16.", replaces="estimate_gradient", breaks=("lora_ga.L13a", "lora_ga.L13b", "lora_ga.L13c"))
def summed_in_bfloat16(grad, W0, batches):
    gradients = [grad(W0, batch).bfloat16() for batch in batches]
    return (sum(gradients) / len(gradients)).to(W0.dtype)


@mistake(
    "The start uses the sum of the microbatches' gradients.",
    replaces="init",
    harmless="Only the gradient's directions enter the factors (L10), so its size changes nothing.",
)
def init_of_the_sum(G, scaling, *, rank, **options):
    return right.init(8 * G, scaling, rank=rank, **options)


@mistake(
    "The signs of the singular vectors are chosen: the largest entry of each is positive.",
    replaces="init",
    harmless="Signs are free; B A and W_base change, but neither the start nor, to first order, the first step.",
)
def signs_chosen(G, scaling, *, rank, **options):
    A, B = right.init(G, scaling, rank=rank, **options)
    rows = A.gather(1, A.abs().argmax(dim=1, keepdim=True)).sign()
    columns = B.gather(0, B.abs().argmax(dim=0, keepdim=True)).sign()
    return Factors(rows * A, columns * B)


# The randomised decomposition


@mistake("The sketch is ignored: the decomposition is exact.", replaces="init", breaks=("lora_ga.L14b",))
def sketch_ignored(G, scaling, *, rank, sketch=None, niter=4, **options):
    return right.init(G, scaling, rank=rank, **options)


@mistake("The number of iterations is ignored.", replaces="init", breaks=("lora_ga.L14b",))
def niter_ignored(G, scaling, *, rank, niter=4, **options):
    return right.init(G, scaling, rank=rank, **options)


@mistake("One iteration too few is done.", replaces="init", breaks=("lora_ga.L14b", "lora_ga.L14c"))
def iteration_too_few(G, scaling, *, rank, niter=4, **options):
    return right.init(G, scaling, rank=rank, niter=max(niter - 1, 0), **options)


@mistake("Of the sketch only the first 2 rank columns are used.", replaces="init", breaks=("lora_ga.L14a", "lora_ga.L14b"))
def sketch_cut(G, scaling, *, rank, sketch=None, **options):
    return right.init(G, scaling, rank=rank, sketch=None if sketch is None else sketch[:, : 2 * rank].contiguous(), **options)


@mistake("The sketch has twice the rank columns, with no oversampling.", replaces="draw_sketch", breaks=("lora_ga.L14d",))
def sketch_without_oversampling(G, *, rank, generator=None):
    return right.draw_sketch(G, rank=rank, generator=generator)[:, : 2 * rank].contiguous()


@mistake("The sketch is not cut to the smaller side (MyTransformers).", replaces="draw_sketch", breaks=("lora_ga.L14d",))
def sketch_not_capped(G, *, rank, generator=None):
    return torch.randn(min(G.shape), 4 * rank, generator=generator, dtype=G.dtype, device=G.device)


@mistake("The sketch has uniform entries.", replaces="draw_sketch", breaks=("lora_ga.L14d",))
def sketch_uniform(G, *, rank, generator=None):
    return torch.empty_like(right.draw_sketch(G, rank=rank, generator=generator)).uniform_(-(3**0.5), 3**0.5, generator=generator)


@mistake("The sketch ignores the generator.", replaces="draw_sketch", breaks=("lora_ga.L14d",))
def sketch_ignores_the_generator(G, *, rank, generator=None):
    return right.draw_sketch(G, rank=rank, generator=torch.Generator(G.device).manual_seed(0))
