# mypy: ignore-errors
"""The laws of LoRA-GA. Expected values are NumPy float64; none comes from an implementation under test.

Singular vectors have free signs, so A and B are never compared themselves, only what does not depend on the signs: A'A, BB',
and what the first step of gradient descent does. Every gradient has singular values that lie apart by construction.
"""

from itertools import combinations, product
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from loracle.oracle_tests.draws import assert_normal, assert_seeded
from loracle.oracle_tests.expected import outer_sum, space_conditioning, truncated
from loracle.oracle_tests.law import assert_close, law, theorem
from loracle.oracle_tests.problems import LinearRegression, LogisticRegression, slope
from loracle.oracle_tests.strategies import Matrices, entries, many_gradients, scaling_cases, scalings, seeds

# Values at which wrong formulas do not agree with right ones: no 1, no default, no root of a side
ALPHAS = (16.0, 3.0, 5.0)
GAMMAS = (5.0, 2.5, 40.0)
NAMED = ("ArB2r", "A2rBr", "ArBr")
DIRECTIONS = (*NAMED, "random")
SCALES = ("stable", "unit", "gd", "weightS")


class Start(NamedTuple):
    """A layer to start on, and what may be chosen."""

    G: np.ndarray  # (out, in)
    W0: np.ndarray  # (out, in)
    rank: int
    alpha: float
    scaling: float
    gamma: float
    kappa: float
    lr: float
    seed: int


@st.composite
def starts(draw: st.DrawFn, ranks: tuple[int, ...] = (1, 2, 3), beyond: tuple[int, ...] = (1, 2, 3, 0), low_rank: bool = False) -> Start:
    """`beyond`: by how much out or in, whichever is smaller, may exceed 2 rank.

    It never exceeds 4 rank: there the randomised SVD of public code, with 4 rank directions, is exact.
    """
    rank = draw(st.sampled_from(ranks))
    smaller = 2 * rank + min(draw(st.sampled_from(beyond)), 2 * rank)
    larger = smaller + draw(st.sampled_from((1, 2, 3, 0)))
    out_features, in_features = (smaller, larger) if draw(st.booleans()) else (larger, smaller)
    seed = draw(seeds())
    matrices = Matrices(seed, draw(entries()))
    return Start(
        G=matrices.separated(out_features, in_features, draw(st.integers(1, 2 * rank)) if low_rank else None),
        W0=2 * matrices.separated(out_features, in_features),
        rank=rank,
        alpha=draw(st.sampled_from(ALPHAS)),
        scaling=draw(scalings()),
        gamma=draw(st.sampled_from(GAMMAS)),
        kappa=draw(st.sampled_from([3.0, -0.7, 0.01])),
        lr=draw(st.sampled_from([0.5, 0.125])),
        seed=seed,
    )


def _square_of_the_scale(scale, scaling, gamma, W0, rank):
    """c^2: the square of the length of A's rows and B's columns."""
    if scale == "stable":
        return np.sqrt(len(W0)) / gamma
    if scale == "unit":
        return 1.0
    if scale == "gd":
        return 1 / scaling**2
    return np.mean(np.sqrt(np.linalg.svd(W0, compute_uv=False)[:rank])) ** 2 / scaling


def _first_step(G, A, B, scaling):
    """The change of s B A to first order in the learning rate, divided by minus that rate."""
    return scaling**2 * (B @ (B.T @ G) + (G @ A.T) @ A)


def _named_sets(direction, rank):
    """Which triplets, counted from 0, a named direction gives to A and to B."""
    first, second = np.arange(rank), np.arange(rank, 2 * rank)
    even, odd = np.arange(0, 2 * rank, 2), np.arange(1, 2 * rank, 2)
    return {"ArB2r": (first, second), "A2rBr": (second, first), "ArBr": (odd, even)}[direction]


def _assert_spaces(A, B, G, for_A, for_B, square):
    """Assert that A'A and BB' are c^2 times the projectors on the chosen singular vectors of G."""
    U, values, Vt = np.linalg.svd(G)
    right, left = space_conditioning(values, G.shape[1], for_A), space_conditioning(values, G.shape[0], for_B)
    assert_close(A.T @ A, square * Vt[for_A].T @ Vt[for_A], size=square, conditioning=right, what="A'A")
    assert_close(B @ B.T, square * U[:, for_B] @ U[:, for_B].T, size=square, conditioning=left, what="BB'")


# The model's function is kept


class Correction(NamedTuple):
    """A pretrained weight and any factors."""

    W0: np.ndarray
    A: np.ndarray
    B: np.ndarray
    scaling: float


@st.composite
def corrections(draw: st.DrawFn) -> Correction:
    out_features, in_features, rank = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(1, 4))
    matrices = Matrices(draw(seeds()), draw(entries()))
    # Thirds exist in no precision
    W0, A, B = matrices(out_features, in_features), matrices(rank, in_features) / 3, matrices(out_features, rank)
    return Correction(W0, A, B, draw(scalings()))


@law(
    "lora_ga.L1a",
    says="The frozen weight is the pretrained one minus the scaled sum of the outer products of B's columns and A's rows.",
    formula=r"W_{base} = W_0 - s \sum_k B_{:k} A_{k:}",
    needs=("base_weight",),
    tolerance=8,
    cases=corrections(),
)
def test_base_weight(impl, case):
    W_base = impl.base_weight(W0=case.W0, A=case.A, B=case.B, scaling=case.scaling)
    delta, size = outer_sum(case.A, case.B, case.scaling)
    assert_close(W_base, case.W0 - delta, size=np.abs(case.W0) + size, what="W_base")


@st.composite
def whole_corrections(draw: st.DrawFn) -> Correction:
    """W0 is s B A, rounded to eight bits: their difference is exact in every precision, s B A itself is not in bfloat16."""
    out_features, in_features, rank = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(2, 4))
    rng, scaling = Matrices(draw(seeds())).rng, draw(st.sampled_from([2.0, 0.5, 4.0]))
    A, B = (rng.integers(20, 40, shape).astype(float) for shape in ((rank, in_features), (out_features, rank)))
    product = scaling * B @ A
    unit = 2.0 ** (np.floor(np.log2(product)) - 7)
    return Correction(np.rint(product / unit) * unit, A, B, scaling)


@law(
    "lora_ga.L1b",
    says="The correction is rounded once: where the frozen weight can be written exactly, it is exact, whatever B A would round to.",
    formula=r"W_{base} = W_0 - s B A \quad \text{bit for bit}",
    needs=("base_weight",),
    tolerance=0,
    cases=whole_corrections(),
)
def test_base_weight_is_rounded_once(impl, case):
    W_base = impl.base_weight(W0=case.W0, A=case.A, B=case.B, scaling=case.scaling)
    assert_close(W_base, case.W0 - case.scaling * case.B @ case.A, size=0, what="W_base")


@law(
    "lora_ga.L1c",
    says="With the factors of the start the corrected layer has the pretrained weight.",
    formula=r"W_{base} + s B A = W_0",
    needs=("init", "base_weight"),
    tolerance=6,
    cases=starts(),
)
def test_function_is_kept(impl, case):
    A, B = impl.init(G=case.G, scaling=case.scaling, rank=case.rank, gamma=case.gamma)
    W_base = impl.base_weight(W0=case.W0, A=A, B=B, scaling=case.scaling)
    size = np.abs(W_base).max() + case.scaling * np.abs(B @ A).max()
    assert_close(W_base + case.scaling * B @ A, case.W0, size=size, what="the weight at the start")


# The factors


@law(
    "lora_ga.L2a",
    says="A has orthogonal rows and B orthogonal columns, all of one length, which only out and gamma decide.",
    formula=r"A A^\top = B^\top B = \tfrac{\sqrt m}{\gamma} I",
    needs=("init",),
    tolerance=48,
    cases=starts(),
)
def test_orthogonal_factors(impl, case):
    A, B = impl.init(G=case.G, scaling=case.scaling, rank=case.rank, gamma=case.gamma)
    square = np.sqrt(len(case.G)) / case.gamma
    assert_close(A @ A.T, square * np.eye(case.rank), size=square, what="AA'")
    assert_close(B.T @ B, square * np.eye(case.rank), size=square, what="B'B")


@law(
    "lora_ga.L2b",
    says="Under each option of the scale the factors have the length that belongs to it.",
    formula=r"A A^\top = c^2 I, \quad c = m^{1/4} / \sqrt\gamma,\ 1,\ 1/s,\ \tfrac1r \sum_{i \le r} \sqrt{\sigma_i(W_0)/s}",
    needs=("init.scale", "init.W0"),
    tolerance=48,
    cases=starts(),
)
def test_length_of_the_factors(impl, case):
    for scale in SCALES[1:]:  # the first is the default, of L2a
        A, B = impl.init(G=case.G, scaling=case.scaling, rank=case.rank, gamma=case.gamma, scale=scale, W0=case.W0)
        square = _square_of_the_scale(scale, case.scaling, case.gamma, case.W0, case.rank)
        assert_close(A @ A.T, square * np.eye(case.rank), size=square, what=f"AA' for {scale}")
        assert_close(B.T @ B, square * np.eye(case.rank), size=square, what=f"B'B for {scale}")


@law(
    "lora_ga.L2c",
    says="The factors' length by itself: fourth root of out over root of gamma, 1, 1/s, or the mean root of W0's singular values over s.",
    formula=r"c^4 \gamma^2 = m, \quad c = 1, \quad c s = 1, \quad c \sqrt s = \tfrac1r \sum_{i \le r} \sqrt{\sigma_i(W_0)}",
    needs=("factor_scale",),
    tolerance=12.5,
    cases=starts(),
)
def test_factor_scale(impl, case):
    options = {"scaling": case.scaling, "out_features": len(case.W0), "rank": case.rank, "gamma": case.gamma}
    for scale in SCALES:
        c = impl.factor_scale(scale=scale, W0=case.W0, **options)
        square = _square_of_the_scale(scale, case.scaling, case.gamma, case.W0, case.rank)
        assert_close(c * abs(c), square, size=square, what=f"c^2 for {scale}")


@law(
    "lora_ga.L2d",
    says="Without options gamma is 16, and A takes the first r triplets, B the second r.",
    formula=r"A^\top A = \tfrac{\sqrt m}{16} V_{1..r} V_{1..r}^\top, \quad B B^\top = \tfrac{\sqrt m}{16} U_{r+1..2r} U_{r+1..2r}^\top",
    needs=("init",),
    tolerance=32,
    cases=starts(),
)
def test_defaults_of_the_start(impl, case):
    A, B = impl.init(G=case.G, scaling=case.scaling, rank=case.rank)
    for_A, for_B = _named_sets("ArB2r", case.rank)
    _assert_spaces(A, B, case.G, for_A, for_B, np.sqrt(len(case.G)) / 16)


@law(
    "lora_ga.L2e",
    says="Without options the factors' length is that of the stable scale with gamma 16, for zeta too.",
    formula=r"c^4 = m / 16^2, \quad \zeta = s^2 \sqrt m / 16",
    needs=("factor_scale", "zeta"),
    tolerance=10,
    cases=starts(),
)
def test_defaults_of_the_scale(impl, case):
    options = {"scaling": case.scaling, "out_features": len(case.W0), "rank": case.rank}
    c, zeta, square = impl.factor_scale(**options), impl.zeta(**options), np.sqrt(len(case.W0)) / 16
    assert_close(c * abs(c), square, size=square, what="c^2")
    assert_close(zeta, case.scaling**2 * square, size=case.scaling**2 * square, what="zeta")


# The first step


@law(
    "lora_ga.L3a",
    says="To first order the first step of gradient descent moves the weight along the best approximation of the gradient of rank 2r.",
    formula=r"s^2 (B B^\top G + G A^\top A) = \zeta\, G_{2r}, \quad \zeta = s^2 \sqrt m / \gamma",
    needs=("init",),
    tolerance=96,
    cases=starts(),
)
def test_first_step(impl, case):
    A, B = impl.init(G=case.G, scaling=case.scaling, rank=case.rank, gamma=case.gamma)
    zeta = case.scaling**2 * np.sqrt(len(case.G)) / case.gamma
    want = zeta * truncated(case.G, 2 * case.rank)
    assert_close(_first_step(case.G, A, B, case.scaling), want, size=zeta * np.linalg.norm(case.G, 2), what="the first step")


class Factors(NamedTuple):
    """A gradient and any factors."""

    G: np.ndarray
    A: np.ndarray
    B: np.ndarray
    scaling: float


@st.composite
def any_factors(draw: st.DrawFn) -> Factors:
    W0, A, B, scaling = draw(corrections())
    return Factors(W0, A, B, scaling)


@law(
    "lora_ga.L3b",
    says="For any factors, the first-order update is the sum of what each column of B and each row of A sees of the gradient.",
    formula=r"s^2 \sum_k \big( B_{:k} B_{:k}^\top G + G A_{k:}^\top A_{k:} \big)",
    needs=("first_order_update",),
    tolerance=8,
    cases=any_factors(),
)
def test_first_order_update(impl, case):
    G, A, B = case.G, case.A, case.B
    want = case.scaling**2 * (np.einsum("ik,jk,jl->il", B, B, G) + np.einsum("ij,kj,kl->il", G, A, A))
    size = case.scaling**2 * (np.abs(B) @ np.abs(B).T @ np.abs(G) + np.abs(G) @ np.abs(A).T @ np.abs(A))
    assert_close(impl.first_order_update(G=G, A=A, B=B, scaling=case.scaling), want, size=size, what="the first-order update")


@law(
    "lora_ga.L4",
    says="The first step misses of the gradient just the tail of its spectrum, and less is impossible (T1).",
    formula=r"\big\| \tfrac{s^2}{\zeta} (B B^\top G + G A^\top A) - G \big\|_F = \Big( \sum_{i > 2r} \sigma_i^2 \Big)^{1/2}",
    needs=("init",),
    tolerance=64,
    cases=starts(),
)
def test_residual(impl, case):
    A, B = impl.init(G=case.G, scaling=case.scaling, rank=case.rank, gamma=case.gamma)
    values = np.linalg.svd(case.G, compute_uv=False)
    rest = _first_step(case.G, A, B, case.scaling) * case.gamma / (case.scaling**2 * np.sqrt(len(case.G))) - case.G
    tail = np.linalg.norm(values[2 * case.rank :])
    assert_close(np.linalg.norm(rest), tail, size=np.linalg.norm(values), what="distance of the first step from the gradient")


# Which directions


@law(
    "lora_ga.L5a",
    says="A named direction gives A and B the singular vectors that its name says.",
    formula=r"A^\top A = c^2 V_{I_A} V_{I_A}^\top, \quad B B^\top = c^2 U_{I_B} U_{I_B}^\top",
    needs=("init.direction",),
    tolerance=32,
    cases=starts(),
)
def test_named_directions(impl, case):
    for direction in NAMED:
        A, B = impl.init(G=case.G, scaling=case.scaling, rank=case.rank, gamma=case.gamma, direction=direction)
        for_A, for_B = _named_sets(direction, case.rank)
        _assert_spaces(A, B, case.G, for_A, for_B, np.sqrt(len(case.G)) / case.gamma)


@law(
    "lora_ga.L5b",
    says="Every direction, the random one too, takes the same first step: each of the first 2r singular triplets once.",
    formula=r"I_A \cup I_B = \{1..2r\} \;\Rightarrow\; s^2 (B B^\top G + G A^\top A) = \zeta\, G_{2r}",
    needs=("init.direction", "init.generator"),
    tolerance=128,
    cases=starts(),
)
def test_every_direction(impl, case):
    zeta = case.scaling**2 * np.sqrt(len(case.G)) / case.gamma
    want, options = zeta * truncated(case.G, 2 * case.rank), {"scaling": case.scaling, "rank": case.rank, "gamma": case.gamma}
    for direction in DIRECTIONS[1:]:  # the first is the default, of L3a
        A, B = impl.init(G=case.G, direction=direction, generator=case.seed, **options)
        step = _first_step(case.G, A, B, case.scaling)
        assert_close(step, want, size=zeta * np.linalg.norm(case.G, 2), what=f"the first step with {direction}")


class Split(NamedTuple):
    """A gradient and a split of its first 2 rank triplets, in any order."""

    G: np.ndarray
    for_A: np.ndarray
    for_B: np.ndarray
    rank: int
    scaling: float
    gamma: float
    lr: float


@st.composite
def splits(draw: st.DrawFn) -> Split:
    start = draw(starts(ranks=(2, 3)))
    order = Matrices(start.seed + 1).rng.permutation(2 * start.rank)
    return Split(start.G, order[: start.rank], order[start.rank :], start.rank, start.scaling, start.gamma, start.lr)


@law(
    "lora_ga.L5c",
    says="Indices that are given take the place of a direction.",
    formula=r"A^\top A = c^2 V_{I_A} V_{I_A}^\top, \quad B B^\top = c^2 U_{I_B} U_{I_B}^\top",
    needs=("init.indices",),
    tolerance=32,
    cases=splits(),
)
def test_given_indices(impl, case):
    A, B = impl.init(G=case.G, scaling=case.scaling, rank=case.rank, gamma=case.gamma, indices=(case.for_A, case.for_B))
    _assert_spaces(A, B, case.G, case.for_A, case.for_B, np.sqrt(len(case.G)) / case.gamma)


class IndexCase(NamedTuple):
    """A rank and a seed."""

    rank: int
    seed: int


@law(
    "lora_ga.L5d",
    says="The named index sets: first and second half, second and first, odd and even places (counted from 0).",
    formula=r"(\{0..r-1\}, \{r..2r-1\}), \quad (\{r..2r-1\}, \{0..r-1\}), \quad (\{1, 3, ..\}, \{0, 2, ..\})",
    needs=("index_sets.direction",),
    tolerance=0,
    cases=st.builds(IndexCase, rank=st.integers(1, 20), seed=st.just(0)),
)
def test_named_index_sets(impl, case):
    for direction in NAMED:
        for_A, for_B = impl.index_sets(rank=case.rank, direction=direction)
        want_A, want_B = _named_sets(direction, case.rank)
        assert_close(np.sort(for_A), want_A, size=0, what=f"the indices of A for {direction}")
        assert_close(np.sort(for_B), want_B, size=0, what=f"the indices of B for {direction}")
    default = impl.index_sets(rank=case.rank)
    assert_close(
        np.concatenate([np.sort(half) for half in default]), np.arange(2 * case.rank), size=0, what="the indices without a direction"
    )


@law(
    "lora_ga.L5e",
    says="Random index sets split the first 2r triplets into halves; a seed repeats them, other seeds change them.",
    formula=r"I_A \cup I_B = \{0..2r-1\}, \quad I_A \cap I_B = \emptyset",
    needs=("index_sets.direction", "index_sets.generator"),
    tolerance=0,
    cases=st.builds(IndexCase, rank=st.integers(6, 12), seed=seeds()),
    examples=10,
)
def test_random_index_sets(impl, case):
    drawn = [np.concatenate(impl.index_sets(rank=case.rank, direction="random", generator=case.seed + i)) for i in range(4)]
    for both in drawn:
        assert_close(np.sort(both), np.arange(2 * case.rank), size=0, what="the indices of A and B together")
    again = np.concatenate(impl.index_sets(rank=case.rank, direction="random", generator=case.seed))
    assert_close(again, drawn[0], size=0, what="the indices from the same seed")
    # One of at least 924 equally likely halves: three further draws give A the same half with probability below 2e-9
    halves = {tuple(np.sort(both[: case.rank])) for both in drawn}
    assert len(halves) > 1, "four seeds gave A the same half; draw from the argument `generator`"


@law(
    "lora_ga.L5f",
    says="Random index sets give A each index half the time, and each pair of indices as often as any other.",
    formula=r"P(i \in I_A) = \tfrac12, \quad P(i, j \in I_A) = \tfrac{r - 1}{2 (2r - 1)}",
    needs=("index_sets.direction", "index_sets.generator"),
    tolerance=0,
    cases=st.builds(IndexCase, rank=st.integers(3, 4), seed=seeds()),
    examples=1,
)
def test_frequencies_of_random_index_sets(impl, case):
    side, count = 2 * case.rank, 400
    chosen = np.zeros((count, side))
    for i in range(count):
        chosen[i, impl.index_sets(rank=case.rank, direction="random", generator=case.seed + i).A.astype(int)] = 1
    together = chosen.T @ chosen / count
    pair = (case.rank - 1) / (2 * (side - 1))
    want = np.where(np.eye(side) == 1, 0.5, pair)
    # Seven standard errors of a share of 400 draws: by the binomial's tails below 4e-9 an entry, below 1e-6 over all cases
    assert_close(together, want, within=7 * np.sqrt(want * (1 - want) / count), what="how often A has both indices")


@law(
    "lora_ga.L5g",
    says="The random direction of the start is repeated by the same seed and changed by others.",
    formula=r"A^\top A(\mathrm{seed}) = A^\top A(\mathrm{seed})",
    needs=("init.direction", "init.generator"),
    tolerance=0,
    cases=starts(),
    examples=2,
)
def test_seed_of_the_random_direction(impl, case):
    options = {"scaling": case.scaling, "rank": case.rank, "direction": "random"}
    # At rank 1 there are two halves: 22 further seeds all give that of the first with probability 2e-7
    drawn = [impl.init(G=case.G, generator=case.seed + i, **options).A for i in range(23)]
    again = impl.init(G=case.G, generator=case.seed, **options).A
    assert_close(again, drawn[0], size=0, what="A from the same seed")
    spaces = [A.T @ A for A in drawn]
    length = np.abs(spaces[0]).max()
    assert any(np.abs(space - spaces[0]).max() > 0.01 * length for space in spaces), "23 seeds chose the same half; draw from `generator`"


# Scalars


@law(
    "lora_ga.L6a",
    says="The first step follows zeta times the gradient; in terms of alpha, zeta is alpha^2 sqrt(out) / (gamma rank).",
    formula=r"\zeta = \alpha^2 \sqrt m / (\gamma r)",
    needs=("zeta", "scaling_factor"),
    tolerance=10,
    cases=starts(),
)
def test_zeta(impl, case):
    s = impl.scaling_factor(alpha=case.alpha, rank=case.rank)
    zeta = impl.zeta(scaling=s, out_features=len(case.G), rank=case.rank, gamma=case.gamma)
    want = case.alpha**2 * np.sqrt(len(case.G))
    assert_close(zeta * case.gamma * case.rank, want, size=want, what="zeta gamma rank")


@law(
    "lora_ga.L6b",
    says="Under each option of the scale zeta is the square of the scaling times the factors' length.",
    formula=r"\zeta = s^2 c^2",
    needs=("zeta.scale", "zeta.W0"),
    tolerance=12.5,
    cases=starts(),
)
def test_zeta_of_every_scale(impl, case):
    options = {"scaling": case.scaling, "out_features": len(case.W0), "rank": case.rank, "gamma": case.gamma}
    for scale in SCALES:
        zeta = impl.zeta(scale=scale, W0=case.W0, **options)
        want = case.scaling**2 * _square_of_the_scale(scale, case.scaling, case.gamma, case.W0, case.rank)
        assert_close(zeta, want, size=want, what=f"zeta for {scale}")


@law(
    "lora_ga.L6c",
    says="The scaling is rsLoRA's: squared, times the rank, it is alpha squared.",
    formula=r"s = \alpha / \sqrt r",
    needs=("scaling_factor",),
    tolerance=8,
    cases=scaling_cases(),
)
def test_scaling(impl, case):
    scaling = impl.scaling_factor(alpha=case.alpha, rank=case.rank)
    assert_close(scaling * abs(scaling) * case.rank, case.alpha**2, size=case.alpha**2, what="squared scaling times rank")


# Stability of the scale


@law(
    "lora_ga.L7a",
    says="Inputs of unit size give adapter outputs of mean square alpha^2 / gamma^2, whatever the width and the rank.",
    formula=r"\tfrac1m \mathbb E \|s B A x\|^2 = s^2 c^4 \tfrac rm = \alpha^2 / \gamma^2",
    needs=("init", "scaling_factor"),
    tolerance=48,
    cases=starts(),
)
def test_size_of_the_output(impl, case):
    s = impl.scaling_factor(alpha=case.alpha, rank=case.rank)
    A, B = impl.init(G=case.G, scaling=s, rank=case.rank, gamma=case.gamma)
    # All inputs of entries +-1: independent, of mean 0 and mean square 1
    x = 2.0 * (np.arange(2 ** case.G.shape[1])[:, None] >> np.arange(case.G.shape[1]) & 1) - 1
    want = (case.alpha / case.gamma) ** 2
    assert_close(np.mean((s * x @ A.T @ B.T) ** 2), want, size=want, what="mean square of the adapter's output")


@law(
    "lora_ga.L7b",
    says="Backwards the mean square is that times out / in: both ways stable for square layers only.",
    formula=r"\tfrac1n \mathbb E \|s A^\top B^\top g\|^2 = s^2 c^4 \tfrac rn = \tfrac{\alpha^2}{\gamma^2} \tfrac mn",
    needs=("init", "scaling_factor"),
    tolerance=48,
    cases=starts(),
)
def test_size_of_the_input_gradient(impl, case):
    s = impl.scaling_factor(alpha=case.alpha, rank=case.rank)
    A, B = impl.init(G=case.G, scaling=s, rank=case.rank, gamma=case.gamma)
    grad_y = 2.0 * (np.arange(2 ** len(case.G))[:, None] >> np.arange(len(case.G)) & 1) - 1
    want = (case.alpha / case.gamma) ** 2 * len(case.G) / case.G.shape[1]
    assert_close(np.mean((s * grad_y @ B @ A) ** 2), want, size=want, what="mean square of the gradient at the input")


# The first step in full


def _exact_step(G, A, B, scaling, lr):
    """The change of s B A in one step of gradient descent."""
    new_A, new_B = A - lr * scaling * B.T @ G, B - lr * scaling * G @ A.T
    return scaling * (new_B @ new_A - B @ A)


@law(
    "lora_ga.L8a",
    says="One step moves the weight along the approximation of rank 2r, apart from a term of second order in the learning rate.",
    formula=r"\tfrac12 \big( \Delta_{\lambda} - \Delta_{-\lambda} \big) (sBA) = -\lambda \zeta\, G_{2r}",
    needs=("init",),
    tolerance=96,
    cases=starts(),
)
def test_odd_part_of_the_step(impl, case):
    G, s, lr = case.G, case.scaling, case.lr
    A, B = impl.init(G=G, scaling=s, rank=case.rank, gamma=case.gamma)
    odd = (_exact_step(G, A, B, s, lr) - _exact_step(G, A, B, s, -lr)) / 2
    zeta, largest = s**2 * np.sqrt(len(G)) / case.gamma, np.linalg.norm(G, 2)
    want = -lr * zeta * truncated(G, 2 * case.rank)
    assert_close(odd, want, size=lr * zeta * largest, what="the part of the step that is odd in the learning rate")


@law(
    "lora_ga.L8b",
    says="The term of second order pairs the triplets of A and B in their order.",
    formula=r"\mathrm{sv}\, \tfrac12 (\Delta_{\lambda} + \Delta_{-\lambda}) (sBA) = \lambda^2 s^3 c^2\, \sigma_{I_A(k)} \sigma_{I_B(k)}",
    needs=("init.indices",),
    tolerance=32,
    cases=splits(),
)
def test_even_part_of_the_step(impl, case):
    G, s, lr = case.G, case.scaling, case.lr
    A, B = impl.init(G=G, scaling=s, rank=case.rank, gamma=case.gamma, indices=(case.for_A, case.for_B))
    even = (_exact_step(G, A, B, s, lr) + _exact_step(G, A, B, s, -lr)) / 2
    values, square = np.linalg.svd(G, compute_uv=False), np.sqrt(len(G)) / case.gamma
    want = np.sort(lr**2 * s**3 * square * values[case.for_A] * values[case.for_B])[::-1]
    got = np.linalg.svd(even, compute_uv=False)[: case.rank]
    # Rounding is relative to the factors before the step, too, which are subtracted
    size = lr**2 * s**3 * square * values[0] ** 2 + s * square
    assert_close(got, want, size=size, what="singular values of the part of the step that is even in the learning rate")


@law(
    "lora_ga.L9",
    says="The first gradient of A has rows as long as the singular values that went to B, and the other way round.",
    formula=r"\|(g_A)_{k:}\| = s c\, \sigma_{I_B(k)}, \quad \|(g_B)_{:k}\| = s c\, \sigma_{I_A(k)}",
    needs=("init.direction",),
    tolerance=24,
    cases=starts(),
)
def test_first_gradients(impl, case):
    s = case.scaling
    values = s * np.sqrt(np.sqrt(len(case.G)) / case.gamma) * np.linalg.svd(case.G, compute_uv=False)
    for direction in NAMED:
        A, B = impl.init(G=case.G, scaling=s, rank=case.rank, gamma=case.gamma, direction=direction)
        rows, columns = np.linalg.norm(s * B.T @ case.G, axis=1), np.linalg.norm(s * case.G @ A.T, axis=0)
        for_A, for_B = _named_sets(direction, case.rank)
        assert_close(np.sort(rows)[::-1], values[for_B], size=values[0], what=f"lengths of the rows of grad_A for {direction}")
        assert_close(np.sort(columns)[::-1], values[for_A], size=values[0], what=f"lengths of the columns of grad_B for {direction}")


# Symmetries


@law(
    "lora_ga.L10",
    says="The size and the sign of the gradient do not matter.",
    formula=r"G \mapsto \kappa G \;\Rightarrow\; A^\top A \mapsto A^\top A, \quad B B^\top \mapsto B B^\top",
    needs=("init",),
    tolerance=48,
    cases=starts(),
)
def test_size_of_the_gradient(impl, case):
    options = {"scaling": case.scaling, "rank": case.rank, "gamma": case.gamma}
    A, B = impl.init(G=case.G, **options)
    other_A, other_B = impl.init(G=case.kappa * case.G, **options)
    values, square = np.linalg.svd(case.G, compute_uv=False), np.sqrt(len(case.G)) / case.gamma
    for_A, for_B = _named_sets("ArB2r", case.rank)
    right, left = space_conditioning(values, case.G.shape[1], for_A), space_conditioning(values, len(case.G), for_B)
    assert_close(other_A.T @ other_A, A.T @ A, size=square, conditioning=right, what="A'A for kappa G")
    assert_close(other_B @ other_B.T, B @ B.T, size=square, conditioning=left, what="BB' for kappa G")


class Turned(NamedTuple):
    """A gradient and a change of orthonormal basis on either side."""

    G: np.ndarray
    Q_out: np.ndarray  # (out, out)
    Q_in: np.ndarray  # (in, in)
    rank: int
    scaling: float
    gamma: float


@st.composite
def turned(draw: st.DrawFn) -> Turned:
    start = draw(starts())
    matrices, (out_features, in_features) = Matrices(start.seed + 1), start.G.shape
    Q_out, Q_in = matrices.orthonormal(out_features, out_features), matrices.orthonormal(in_features, in_features)
    return Turned(start.G, Q_out, Q_in, start.rank, start.scaling, start.gamma)


@law(
    "lora_ga.L11",
    says="The factors turn with the gradient: there is no preferred basis of inputs or outputs.",
    formula=r"G \mapsto Q_1 G Q_2^\top \;\Rightarrow\; A^\top A \mapsto Q_2 A^\top A\, Q_2^\top,\ B B^\top \mapsto Q_1 B B^\top Q_1^\top",
    needs=("init",),
    tolerance=48,
    cases=turned(),
)
def test_turned_gradient(impl, case):
    # Rounded to a lower precision the matrices are not quite orthogonal; the QR decomposition makes them so
    Q_out, Q_in = np.linalg.qr(case.Q_out)[0], np.linalg.qr(case.Q_in)[0]
    options = {"scaling": case.scaling, "rank": case.rank, "gamma": case.gamma}
    A, B = impl.init(G=case.G, **options)
    turned_A, turned_B = impl.init(G=Q_out @ case.G @ Q_in.T, **options)
    values = np.linalg.svd(case.G, compute_uv=False)
    for_A, for_B = _named_sets("ArB2r", case.rank)
    right, left = space_conditioning(values, case.G.shape[1], for_A), space_conditioning(values, len(case.G), for_B)
    # Relative to what the implementation's own factors measure: their right length is another law's matter
    size_A, size_B = np.linalg.norm(A, 2) ** 2, np.linalg.norm(B, 2) ** 2
    assert_close(turned_A.T @ turned_A, Q_in @ A.T @ A @ Q_in.T, size=size_A, conditioning=right, what="A'A for the turned gradient")
    assert_close(turned_B @ turned_B.T, Q_out @ B @ B.T @ Q_out.T, size=size_B, conditioning=left, what="BB' for the turned gradient")


@law(
    "lora_ga.L12",
    says="For a gradient of rank at most 2r and the scale 'gd' the first step is that of full fine-tuning.",
    formula=r"\mathrm{rank}\, G \le 2r,\; c = 1/s \;\Rightarrow\; s^2 (B B^\top G + G A^\top A) = G",
    needs=("init.scale",),
    tolerance=48,
    cases=starts(low_rank=True),
)
def test_gradient_of_low_rank(impl, case):
    A, B = impl.init(G=case.G, scaling=case.scaling, rank=case.rank, scale="gd")
    assert_close(_first_step(case.G, A, B, case.scaling), case.G, size=np.linalg.norm(case.G, 2), what="the first step")


# The gradient's estimate


class Samples(NamedTuple):
    """A classification problem in equal microbatches of whole samples."""

    X: np.ndarray  # (samples, in)
    Y: np.ndarray  # (samples, out), +-1
    W0: np.ndarray
    batches: int


@st.composite
def samples(draw: st.DrawFn) -> Samples:
    out_features, in_features, batches = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(2, 5))
    matrices, count = Matrices(draw(seeds()), draw(entries())), batches * draw(st.integers(2, 4))
    Y = np.sign(matrices(count, out_features))
    return Samples(matrices(count, in_features), Y, matrices(out_features, in_features), batches)


@law(
    "lora_ga.L13a",
    says="The gradient averaged over equal microbatches is that of all samples, at the pretrained weight.",
    formula=r"\tfrac1K \sum_k \nabla L_k(W_0) = \nabla L(W_0)",
    needs=("estimate_gradient",),
    tolerance=8,
    cases=samples(),
)
def test_equal_microbatches(impl, case):
    X, Y, problem = case.X, case.Y, LogisticRegression(case.X, case.Y)
    got = impl.estimate_gradient(grad=problem.grad, W0=case.W0, batches=list(np.arange(len(X)).reshape(case.batches, -1)))
    size = (1 / (1 + np.exp(Y * (X @ case.W0.T)))).T @ np.abs(X) / len(X)
    assert_close(got, problem.grad(case.W0), size=size, what="the estimated gradient")


@law(
    "lora_ga.L13b",
    says="Each microbatch counts the same, whatever its number of samples.",
    formula=r"G = \tfrac1K \sum_k \mathrm{grad}(W_0, \mathrm{batch}_k)",
    needs=("estimate_gradient",),
    tolerance=8,
    cases=samples(),
)
def test_unequal_microbatches(impl, case):
    X, Y = case.X, case.Y
    batches = np.split(np.arange(len(X)), np.arange(1, case.batches))  # all but the last of one sample
    got = impl.estimate_gradient(grad=LinearRegression(X, Y).grad, W0=case.W0, batches=batches)
    weights = np.concatenate([np.full((len(rows), 1), 1 / (len(batches) * len(rows))) for rows in batches])
    size = (weights * (np.abs(X) @ np.abs(case.W0).T + np.abs(Y))).T @ np.abs(X)
    assert_close(got, (weights * (X @ case.W0.T - Y)).T @ X, size=size, what="the estimated gradient")


@law(
    "lora_ga.L13c",
    says="Many microbatches are summed in at least single precision: the sum does not stop growing.",
    formula=r"G = \tfrac1K \sum_{k=1}^{K} G_k, \quad K = 768",
    needs=("estimate_gradient",),
    tolerance=12,
    cases=many_gradients(),
    examples=1,
)
def test_many_microbatches(impl, case):
    gradients = case.gradients
    got = impl.estimate_gradient(grad=lambda W, k: gradients[int(k)], W0=0 * gradients[0], batches=list(range(len(gradients))))
    assert_close(got, gradients.mean(axis=0), size=gradients.mean(axis=0), what="the estimated gradient")


# The randomised decomposition


class Sketched(NamedTuple):
    """A gradient and the test matrix of a randomised decomposition of it."""

    G: np.ndarray
    sketch: np.ndarray  # (min(out, in), q)
    rank: int
    scaling: float
    gamma: float
    niter: int


@st.composite
def sketched(draw: st.DrawFn, full: bool = False) -> Sketched:
    start = draw(starts(beyond=(2, 3)))
    small = min(start.G.shape)
    width = small if full else small - draw(st.sampled_from((1, 2)))
    sketch = Matrices(start.seed + 1).orthonormal(small, width)
    return Sketched(start.G, sketch, start.rank, start.scaling, start.gamma, draw(st.sampled_from((1, 2, 0))))


@law(
    "lora_ga.L14a",
    says="A sketch as wide as the gradient's smaller side loses nothing.",
    formula=r"q = \min(m, n) \;\Rightarrow\; A^\top A = c^2 V_{I_A} V_{I_A}^\top, \quad B B^\top = c^2 U_{I_B} U_{I_B}^\top",
    needs=("init.sketch",),
    tolerance=80,
    cases=sketched(full=True),
)
def test_full_sketch(impl, case):
    A, B = impl.init(G=case.G, scaling=case.scaling, rank=case.rank, gamma=case.gamma, sketch=case.sketch)
    for_A, for_B = _named_sets("ArB2r", case.rank)
    _assert_spaces(A, B, case.G, for_A, for_B, np.sqrt(len(case.G)) / case.gamma)


@law(
    "lora_ga.L14b",
    says="With a narrower sketch the factors come from the gradient projected on the range that the iterations reach.",
    formula=r"Q = \mathrm{orth}\big( (G G^\top)^{k} G\, \Omega \big), \quad U \Sigma V^\top = \mathrm{svd}(Q Q^\top G)",
    needs=("init.sketch", "init.niter"),
    tolerance=96,
    cases=sketched(),
)
def test_narrow_sketch(impl, case):
    A, B = impl.init(G=case.G, scaling=case.scaling, rank=case.rank, gamma=case.gamma, sketch=case.sketch, niter=case.niter)
    for_A, for_B = _named_sets("ArB2r", case.rank)
    _assert_spaces(A, B, _seen_by(case.sketch, case.G, case.niter), for_A, for_B, np.sqrt(len(case.G)) / case.gamma)


def _seen_by(sketch, G, niter):
    """G projected on the range that the iterations reach, which is taken on the longer side."""
    tall = G if G.shape[0] >= G.shape[1] else G.T
    basis = np.linalg.svd(tall @ sketch, full_matrices=False)[0]
    for _ in range(niter):
        basis = np.linalg.svd(tall @ tall.T @ basis, full_matrices=False)[0]
    return basis @ basis.T @ G if tall is G else G @ basis @ basis.T


@law(
    "lora_ga.L14c",
    says="Without another number the randomised decomposition does four iterations.",
    formula=r"Q = \mathrm{orth}\big( (G G^\top)^4 G\, \Omega \big)",
    needs=("init.sketch",),
    tolerance=96,
    cases=sketched(),
)
def test_default_iterations(impl, case):
    A, B = impl.init(G=case.G, scaling=case.scaling, rank=case.rank, gamma=case.gamma, sketch=case.sketch)
    for_A, for_B = _named_sets("ArB2r", case.rank)
    _assert_spaces(A, B, _seen_by(case.sketch, case.G, 4), for_A, for_B, np.sqrt(len(case.G)) / case.gamma)


class SketchCase(NamedTuple):
    """A gradient to draw test matrices for."""

    G: np.ndarray
    seed: int


@st.composite
def sketch_cases(draw: st.DrawFn) -> SketchCase:
    seed = draw(seeds())
    return SketchCase(Matrices(seed)(draw(st.integers(30, 44)), draw(st.integers(30, 44))), seed)


@law(
    "lora_ga.L14d",
    says="The sketch has min(4 rank, out, in) columns on the shorter side and standard normal entries, repeated by the same seed.",
    formula=r"\Omega \in \mathbb R^{\min(m, n) \times \min(4r, m, n)}, \quad \Omega_{ij} \sim \mathcal N(0, 1)",
    needs=("draw_sketch",),
    tolerance=0,
    cases=sketch_cases(),
    examples=5,
)
def test_sketch(impl, case):
    small = min(case.G.shape)
    for rank, width in ((4, 16), (12, small)):
        sketch = assert_seeded(lambda seed, rank=rank: impl.draw_sketch(G=case.G, rank=rank, generator=seed), case.seed, "sketch")
        assert sketch.shape == (small, width), f"for rank {rank} the sketch has shape {sketch.shape}; needed {(small, width)}"
        assert_normal(sketch, 1.0, "the sketch")


# Theorem checks: the mathematics itself


@theorem(
    "lora_ga.T1",
    says="No other pair of factors of that rank brings the first step nearer to a multiple of the gradient (Theorem 3.1).",
    formula=r"\min_{A, B} \|B B^\top G + G A^\top A - G\|_F = \Big( \sum_{i > 2r} \sigma_i^2 \Big)^{1/2}",
    tolerance=56,
    cases=starts(),
)
def test_no_pair_does_better(case):
    G, rank, matrices = case.G, case.rank, Matrices(case.seed + 2)
    U, values, Vt = np.linalg.svd(G)
    best_A, best_B, tail, size = Vt[:rank], U[:, rank : 2 * rank], np.linalg.norm(values[2 * rank :]), np.linalg.norm(values)
    assert_close(np.linalg.norm(_first_step(G, best_A, best_B, 1.0) - G), tail, size=size, what="distance for the singular vectors")
    for width in (1e-3, 1e-2, 0.1, 0.3, 1.0, 10.0):
        for _ in range(3):
            A, B = best_A + width * matrices(*best_A.shape), best_B + width * matrices(*best_B.shape)
            step = _first_step(G, A, B, 1.0)
            # Both terms have rank r at most, so their sum has rank 2r: the reason why nothing is nearer than G_2r
            beyond = np.linalg.svd(step, compute_uv=False)[2 * rank :]
            assert_close(beyond, np.zeros_like(beyond), size=np.linalg.norm(step), what="singular values beyond 2r")
            multiple = max(np.sum(step * G) / np.sum(step**2), 0.0)
            excess = np.linalg.norm(multiple * step - G) - tail
            assert_close(min(excess, 0.0), 0.0, size=size, what="how much nearer another pair is")


@theorem(
    "lora_ga.T2",
    says="Every split of the first 2r triplets takes the same first step, and no overlapping choice does.",
    formula=r"I_A \cup I_B = \{1..2r\} \iff V_{I_A}, U_{I_B} \text{ give } G_{2r}",
    tolerance=32,
    cases=starts(ranks=(1, 2)),
    examples=25,
)
def test_every_split(case):
    U, values, Vt = np.linalg.svd(case.G)
    want = truncated(case.G, 2 * case.rank)
    halves = [list(half) for half in combinations(range(2 * case.rank), case.rank)]
    for for_A, for_B in product(halves, halves):
        step = _first_step(case.G, Vt[for_A], U[:, for_B], 1.0)
        if set(for_A) & set(for_B):
            shared = np.linalg.norm(step - want)
            assert shared > 0.5 * values[2 * case.rank - 1], f"{for_A} and {for_B} overlap and are only {shared} away"
        else:
            assert_close(step, want, size=values[0], what="the first step")


class Widths(NamedTuple):
    """The sides and the rank of a layer."""

    out_features: int
    in_features: int
    rank: int
    gamma: float
    alpha: float
    seed: int


@theorem(
    "lora_ga.T3",
    says="For factors along random directions the adapter's output has mean square s^2 c^4 r / m, its input gradient s^2 c^4 r / n.",
    formula=r"\tfrac1m \mathbb E \|s B A x\|^2 = s^2 c^4 \tfrac rm, \quad \tfrac1n \mathbb E \|s A^\top B^\top g\|^2 = s^2 c^4 \tfrac rn",
    tolerance=0,
    cases=st.builds(
        Widths,
        out_features=st.sampled_from([8, 16, 64, 128]),
        in_features=st.sampled_from([8, 16, 32, 64]),
        rank=st.sampled_from([2, 4, 8]),
        gamma=st.sampled_from(GAMMAS),
        alpha=st.sampled_from(ALPHAS),
        seed=seeds(),
    ),
    examples=20,
)
def test_stable_scale(case):
    m, n, r, s = case.out_features, case.in_features, case.rank, case.alpha / np.sqrt(case.rank)
    matrices, square, count = Matrices(case.seed), np.sqrt(m) / case.gamma, 4000
    A, B = np.sqrt(square) * matrices.orthonormal(n, r).T, np.sqrt(square) * matrices.orthonormal(m, r)
    for inputs in (matrices(count, n), Matrices(case.seed + 1).rng.uniform(-np.sqrt(3), np.sqrt(3), (count, n))):
        squares = np.sum((s * inputs @ A.T @ B.T) ** 2, axis=1) / m
        # 4000 independent squares of at least two terms: eight standard errors leave a false alarm below 1e-8 a comparison
        error = 8 * s**2 * square**2 * np.sqrt(2 * r) / m / np.sqrt(count)
        assert_close(squares.mean(), (case.alpha / case.gamma) ** 2, within=error, what="mean square of the output")
    squares = np.sum((s * matrices(count, m) @ B @ A) ** 2, axis=1) / n
    want, error = (case.alpha / case.gamma) ** 2 * m / n, 8 * s**2 * square**2 * np.sqrt(2 * r) / n / np.sqrt(count)
    assert_close(squares.mean(), want, within=error, what="mean square of the gradient at the input")


@theorem(
    "lora_ga.T4",
    says="The step of gradient descent through a smooth loss changes s B A by the first-order update, then by terms of second order.",
    formula=r"\Delta(sBA) = -\lambda s^2 (B B^\top G + G A^\top A) + \lambda^2 s^3 G A^\top B^\top G",
    tolerance=1e8,  # central differences with step 1e-4: h^2 plus eps / h, about 1e-8, times a third derivative
    cases=starts(ranks=(1, 2)),
)
def test_step_through_a_loss(case):
    matrices, s, (m, n) = Matrices(case.seed + 3), case.scaling, case.G.shape
    A, B = matrices(case.rank, n) / 2, matrices(m, case.rank) / 2
    problem = LogisticRegression(matrices(9, n), np.sign(matrices(9, m)))
    # The factors' gradients by differences of the loss, not by the chain rule
    grad_A = slope(lambda A: problem.loss(case.W0 + s * B @ A), A, step=1e-4)
    grad_B = slope(lambda B: problem.loss(case.W0 + s * B @ A), B, step=1e-4)
    forward, backward = (s * ((B - lr * grad_B) @ (A - lr * grad_A) - B @ A) for lr in (case.lr, -case.lr))
    G, largest = problem.grad(case.W0 + s * B @ A), (1 + s) ** 3
    assert_close((forward - backward) / 2, -case.lr * _first_step(G, A, B, s), size=largest, what="the odd part of the step")
    assert_close((forward + backward) / 2, case.lr**2 * s**3 * G @ A.T @ B.T @ G, size=largest, what="the even part of the step")
