# mypy: ignore-errors
"""The laws of RandLoRA. Expected values are NumPy float64; none comes from an implementation under test.

In what follows `small` is the smaller side of the weight and `large` the larger; B has the terms in the middle, (large, bases, rank).
"""

import itertools
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from loracle.oracle_tests.draws import assert_seeded
from loracle.oracle_tests.expected import assert_linear
from loracle.oracle_tests.law import TooCoarse, assert_close, law, of, theorem
from loracle.oracle_tests.loading import Derivation
from loracle.oracle_tests.problems import LogisticRegression, slope
from loracle.oracle_tests.strategies import Matrices, entries, leads, scalings, seeds, sides


class Layer(NamedTuple):
    """One adapted layer and what may come in from either side."""

    x: np.ndarray  # (..., in)
    G: np.ndarray  # (out, in)
    W0: np.ndarray  # (out, in)
    gammas: np.ndarray  # (bases, small)
    A: np.ndarray  # (rank, small)
    lambdas: np.ndarray  # (bases, rank)
    B: np.ndarray  # (large, bases, rank)
    scaling: float
    bias: np.ndarray  # (out,)
    mask: np.ndarray  # (..., in)
    p: float
    rank: int
    seed: int


class Factors(NamedTuple):
    """What the update is made of."""

    gammas: np.ndarray
    A: np.ndarray
    lambdas: np.ndarray
    B: np.ndarray


def _make_layer(draw, out_features, in_features, rank):
    lead = draw(leads())
    seed = draw(seeds())
    matrices = Matrices(seed, draw(entries()))
    small, large = sorted((out_features, in_features))
    bases = int(np.ceil(small / rank))
    return Layer(
        x=matrices(*lead, in_features),
        G=matrices(out_features, in_features),
        W0=matrices(out_features, in_features),
        gammas=matrices(bases, small),
        A=matrices(rank, small),
        lambdas=matrices(bases, rank),
        B=matrices(large, bases, rank),
        scaling=draw(scalings()),
        bias=matrices(out_features),
        mask=matrices.mask(*lead, in_features),
        p=draw(st.sampled_from([0.5, 0.25])),
        rank=rank,
        seed=seed,
    )


@st.composite
def layers(draw: st.DrawFn, low: int = 1, high: int = 7, full_rank: bool = False) -> Layer:
    out_features, in_features = draw(sides(low, high)), draw(sides(low, high))
    smallest = min(out_features, in_features)
    return _make_layer(draw, out_features, in_features, smallest if full_rank else draw(st.integers(1, smallest)))


def _factors(case):
    return of(case, "gammas", "A", "lambdas", "B", "scaling")


def _is_wide(case):
    return case.W0.shape[0] < case.W0.shape[1]


def _sum(gammas, A, lambdas, B, scaling, wide):
    """The update as a sum of products with explicit diagonal matrices, and the size of what is summed."""
    M, size = np.zeros((len(B), A.shape[1])), np.zeros((len(B), A.shape[1]))
    for j in range(len(gammas)):
        M += B[:, j, :] @ np.diag(lambdas[j]) @ A @ np.diag(gammas[j])
        size += np.abs(B[:, j, :]) @ np.diag(np.abs(lambdas[j])) @ np.abs(A) @ np.diag(np.abs(gammas[j]))
    M, size = scaling * M, scaling * size
    return (M.T, size.T) if wide else (M, size)


def _update(case):
    return _sum(**_factors(case), wide=_is_wide(case))


def _delta_weight(impl, gammas, A, lambdas, B, scaling=1.0, wide=False):
    """The columns of Delta W are what the layer adds to W0 = 0 for the unit vectors."""
    large, small = len(B), A.shape[1]
    turned = wide and large > small
    W0 = np.zeros((small, large) if turned else (large, small))
    delta = impl.forward(x=np.eye(W0.shape[1]), W0=W0, gammas=gammas, A=A, lambdas=lambdas, B=B, scaling=scaling).T
    return delta.T if wide and not turned else delta


delta_weight_from_forward = Derivation("delta_weight", needs=("forward",), compute=_delta_weight)


# The start


@law(
    "randlora.L1a",
    says="At the start lambdas are zero and every gamma is one over the longer side of gammas.",
    formula=r"\lambda = 0, \quad \gamma_{ji} = 1 / \max(N, d)",
    needs=("init",),
    tolerance=1,
    cases=layers(),
)
def test_start(impl, case):
    start = impl.init(W0=case.W0, rank=case.rank)
    assert_close(start.gammas, np.full(case.gammas.shape, 1 / max(case.gammas.shape)), what="gammas")
    assert_close(start.lambdas, np.zeros_like(case.lambdas), size=0, what="lambdas")


@law(
    "randlora.L1b",
    says="In the vision code's start gammas are zero and every lambda is one over the longer side of lambdas.",
    formula=r"\gamma = 0, \quad \lambda_{jk} = 1 / \max(N, r)",
    needs=("init.zero",),
    tolerance=1,
    cases=layers(),
)
def test_other_start(impl, case):
    start = impl.init(W0=case.W0, rank=case.rank, zero="gammas")
    assert_close(start.lambdas, np.full(case.lambdas.shape, 1 / max(case.lambdas.shape)), what="lambdas")
    assert_close(start.gammas, np.zeros_like(case.gammas), size=0, what="gammas")


@law(
    "randlora.L1c",
    says="Training starts exactly at the pretrained layer.",
    formula=r"y = x W_0^\top + b",
    needs=("init", "forward.bias"),
    tolerance=8,
    cases=layers(),
)
def test_function_at_the_start(impl, case):
    start = impl.init(W0=case.W0, rank=case.rank)
    y = impl.forward(x=case.x, W0=case.W0, A=case.A, B=case.B, scaling=case.scaling, bias=case.bias, **start._asdict())
    size = np.abs(case.x) @ np.abs(case.W0).T + np.abs(case.bias)
    assert_close(y, case.x @ case.W0.T + case.bias, size=size, what="y at the start")


@law(
    "randlora.L1d",
    says="So it does with the other start, and asking for the default by name changes nothing.",
    formula=r"y = x W_0^\top",
    needs=("init.zero", "forward"),
    tolerance=8,
    cases=layers(),
)
def test_function_at_the_other_start(impl, case):
    for zero in ("lambdas", "gammas"):
        start = impl.init(W0=case.W0, rank=case.rank, zero=zero)
        y = impl.forward(x=case.x, W0=case.W0, A=case.A, B=case.B, scaling=case.scaling, **start._asdict())
        assert_close(y, case.x @ case.W0.T, size=np.abs(case.x) @ np.abs(case.W0).T, what="y at the start")
        assert np.any(start.gammas if zero == "lambdas" else start.lambdas), "both diagonals are zero: nothing would ever be trained"


# The layer


@law(
    "randlora.L2a",
    says="The update is the sum of B_j diag(lambda_j) A diag(gamma_j), transposed for a layer with more inputs than outputs.",
    formula=r"\Delta W = s \sum_j B_j \Lambda_j A \Gamma_j, \quad m < n:\ \Delta W = s \sum_j \Gamma_j A^\top \Lambda_j B_j^\top",
    needs=("delta_weight",),
    tolerance=12,
    cases=layers(),
)
def test_delta_weight(impl, case):
    want, size = _sum(**_factors(case), wide=False)
    assert_close(impl.delta_weight(**_factors(case)), want, size=size, what="Delta W")
    assert_close(impl.delta_weight(wide=True, **_factors(case)), want.T, size=size.T, what="Delta W of a wide layer")


@law(
    "randlora.L2b",
    says="A worked example in whole numbers, tall and wide.",
    formula=r"A = (1\ 2),\ B_1 = (1,0,1)^\top,\ B_2 = (0,1,-1)^\top:\ \Delta W = \begin{pmatrix} 2 & 2 \\ 3 & 2 \\ -1 & 0 \end{pmatrix}",
    needs=("delta_weight",),
    tolerance=0,
    cases=st.just(
        Factors(
            gammas=np.array([[1.0, 0.5], [3.0, 1.0]]),
            A=np.array([[1.0, 2.0]]),
            lambdas=np.array([[2.0], [1.0]]),
            B=np.array([[[1.0], [0.0]], [[0.0], [1.0]], [[1.0], [-1.0]]]),
        )
    ),
    examples=1,
)
def test_worked_example(impl, case):
    given = {"gammas": case.gammas, "A": case.A, "lambdas": case.lambdas, "B": case.B, "scaling": 1.0}
    want = np.array([[2.0, 2.0], [3.0, 2.0], [-1.0, 0.0]])
    assert_close(impl.delta_weight(**given), want, size=0, what="Delta W, tall")
    assert_close(impl.delta_weight(wide=True, **given), want.T, size=0, what="Delta W, wide")


@law(
    "randlora.L3a",
    says="The output is the frozen layer's plus the input through the explicit sum, position by position.",
    formula=r"y = x W_0^\top + b + x\, \Delta W^\top",
    needs=("forward.bias",),
    tolerance=8,
    cases=layers(),
)
def test_forward(impl, case):
    delta, size = _update(case)
    for bias in (case.bias, 0 * case.bias):
        given = {"bias": bias} if bias.any() else {}
        y = impl.forward(x=case.x, W0=case.W0, **_factors(case), **given)
        assert_linear(y, case.x, case.W0 + delta, bias, size=np.abs(case.W0) + size)


@law(
    "randlora.L3b",
    says="The adapted layer is one linear layer whose weight is the merged weight.",
    formula=r"y = x W^\top + b, \quad W = \mathrm{merge}(W_0, \ldots)",
    needs=("forward.bias", "merge"),
    tolerance=8,
    cases=layers(),
)
def test_forward_is_merged(impl, case):
    W = impl.merge(W0=case.W0, **_factors(case))
    y = impl.forward(x=case.x, W0=case.W0, bias=case.bias, **_factors(case))
    weights = np.abs(case.W0) + _update(case)[1]
    assert_linear(y, case.x, W, case.bias, size=weights)


@law(
    "randlora.L3c",
    says="The merged weight is the pretrained one plus the explicit sum.",
    formula=r"W = W_0 + \Delta W",
    needs=("merge",),
    tolerance=8,
    cases=layers(),
)
def test_merge(impl, case):
    delta, size = _update(case)
    W = impl.merge(W0=case.W0, **_factors(case))
    assert_close(W, case.W0 + delta, size=np.abs(case.W0) + size, what="W")


@law(
    "randlora.L3d",
    says="Unmerging gives the pretrained weight back.",
    formula=r"W - \Delta W = W_0",
    needs=("unmerge",),
    tolerance=8,
    cases=layers(),
)
def test_unmerge(impl, case):
    delta, size = _update(case)
    # G stands for any merged weight
    got = impl.unmerge(W=case.G, **_factors(case))
    assert_close(got, case.G - delta, size=np.abs(case.G) + size, what="W0")


@law(
    "randlora.L3e",
    says="Dropout acts on the adapter's input only: what is kept is divided by 1 - p, the frozen path sees all.",
    formula=r"y = x W_0^\top + \tfrac{1}{1 - p} (x \odot \mathrm{mask})\, \Delta W^\top",
    needs=("forward.mask", "forward.p"),
    tolerance=8,
    cases=layers(),
)
def test_dropout(impl, case):
    delta, size = _update(case)
    y = impl.forward(x=case.x, W0=case.W0, mask=case.mask, p=case.p, **_factors(case))
    kept = np.where(case.mask, case.x / (1 - case.p), 0.0)
    scale = np.abs(case.x) @ np.abs(case.W0).T + np.abs(kept) @ size.T
    assert_close(y, case.x @ case.W0.T + kept @ delta.T, size=scale, what="y")


# How many


@law(
    "randlora.L4a",
    says="There are just enough terms for full rank: one fewer would not do.",
    formula=r"(N - 1)\, r < \min(m, n) \le N r",
    needs=("num_bases",),
    tolerance=0,
    cases=layers(high=12),
)
def test_number_of_bases(impl, case):
    enough = next(bases for bases in range(1, 1 + min(case.W0.shape)) if bases * case.rank >= min(case.W0.shape))
    assert_close(impl.num_bases(W0=case.W0, rank=case.rank), enough, size=0, what="number of terms")


@law(
    "randlora.L4b",
    says="What is trained are the diagonals: as many numbers as both have entries at the start.",
    formula=r"P = N (r + \min(m, n))",
    needs=("num_trainable",),
    tolerance=0,
    cases=layers(high=12),
)
def test_parameter_count(impl, case):
    want = len(np.concatenate([case.gammas.ravel(), case.lambdas.ravel()]))
    assert_close(impl.num_trainable(W0=case.W0, rank=case.rank), want, size=0, what="number of trainable parameters")


@law(
    "randlora.L4c",
    says="A smaller basis rank trains more: along the divisors of the smaller side the number falls.",
    formula=r"r \mid d:\ P = d + d^2 / r",
    needs=("num_trainable",),
    tolerance=0,
    cases=layers(high=24),
)
def test_smaller_rank_trains_more(impl, case):
    small = min(case.W0.shape)
    counts = [impl.num_trainable(W0=case.W0, rank=rank) for rank in range(1, small + 1) if small % rank == 0]
    assert_close(counts, [small + small**2 / rank for rank in range(1, small + 1) if small % rank == 0], size=0, what="trained numbers")
    assert counts == sorted(counts, reverse=True)


class Beyond(NamedTuple):
    """A layer of the size that real ones have: both sides of the weight are beyond 1024."""

    W0: np.ndarray  # (out, in), one number seen from everywhere
    rank: int


def beyond() -> st.SearchStrategy[Beyond]:
    return st.builds(
        lambda out_features, in_features, rank: Beyond(np.broadcast_to(0.5, (out_features, in_features)), rank),
        st.integers(1025, 1060),
        st.integers(1025, 1060),
        st.sampled_from((1, 2, 3, 16, 30, 64, 500)),
    )


@law(
    "randlora.L4d",
    says="So it is for large layers: whatever the size, the terms are enough for full rank.",
    formula=r"\min(m, n) > 1024: \quad (N - 1)\, r < \min(m, n) \le N r",
    needs=("num_bases",),
    tolerance=0,
    cases=beyond(),
    examples=10,
)
def test_number_of_bases_of_a_large_layer(impl, case):
    groups = len(range(0, min(case.W0.shape), case.rank))
    assert_close(impl.num_bases(W0=case.W0, rank=case.rank), groups, size=0, what="number of terms")


@law(
    "randlora.L4e",
    says="And as many numbers are trained as so many terms have.",
    formula=r"\min(m, n) > 1024: \quad P = N (r + \min(m, n))",
    needs=("num_trainable",),
    tolerance=0,
    cases=beyond(),
    examples=10,
)
def test_parameter_count_of_a_large_layer(impl, case):
    want = sum(case.rank + min(case.W0.shape) for _ in range(0, min(case.W0.shape), case.rank))
    assert_close(impl.num_trainable(W0=case.W0, rank=case.rank), want, size=0, what="number of trainable parameters")


# Rank


class Drawn(NamedTuple):
    """A layer whose bases the implementation draws."""

    W0: np.ndarray
    gammas: np.ndarray
    lambdas: np.ndarray
    scaling: float
    rank: int
    seed: int


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    out_features, in_features = draw(st.integers(4, 9)), draw(st.integers(4, 9))
    small, seed = min(out_features, in_features), draw(seeds())
    rank = draw(st.integers(1, small))
    matrices, bases = Matrices(seed), int(np.ceil(small / rank))
    signs = matrices.rng.choice([1.0, -1.0], (bases, small))
    return Drawn(
        W0=matrices(out_features, in_features),
        gammas=signs * matrices.rng.uniform(0.5, 2, (bases, small)),
        lambdas=matrices.rng.uniform(0.5, 2, (bases, rank)),
        scaling=draw(scalings()),
        rank=rank,
        seed=seed,
    )


def _assert_rank(delta, expected, rank, largest, what):
    """Assert that the singular values beyond `rank` are rounding and the one before them is what it should be."""
    values, sound = np.linalg.svd(delta, compute_uv=False), np.linalg.svd(expected, compute_uv=False)[rank - 1]
    assert_close(values[rank:], np.zeros(len(values) - rank), size=largest, what=f"singular values beyond {rank} of {what}")
    if sound < 1e-4 * values[0]:
        raise TooCoarse  # nearly singular by chance
    assert_close(np.sum(values > sound / 2), rank, size=0, what=f"number of singular values of {what} above {sound / 2:.3g}")


@law(
    "randlora.L5a",
    says="The update has full rank; its first k terms alone have k times the basis rank.",
    formula=r"\mathrm{rank}\, \Delta W = \min(m, n), \quad \lambda_{j > k} = 0:\ \min(m, n, k r)",
    needs=("draw_bases", "delta_weight"),
    tolerance=64,
    cases=drawn(),
)
def test_full_rank(impl, case):
    small, wide, smallest = min(case.W0.shape), case.W0.shape[0] < case.W0.shape[1], []
    for i in range(4):
        A, B = impl.draw_bases(weights=[case.W0], rank=case.rank, generator=case.seed + i)
        delta = impl.delta_weight(gammas=case.gammas, A=A, lambdas=case.lambdas, B=B, scaling=case.scaling, wide=wide)
        assert_close(delta.shape, case.W0.shape, size=0, what="shape of Delta W")
        values = np.linalg.svd(delta, compute_uv=False)
        smallest.append(values[-1] / values[0])
    # One draw in a thousand or so is this near to a lower rank; four of four are never
    assert max(smallest) > 1e-5, f"of four draws none has rank {small}: the smallest singular values are {smallest} of the largest"
    size = np.linalg.norm(_sum(case.gammas, A, case.lambdas, B, case.scaling, wide)[1])
    for k in range(1, len(case.lambdas)):
        lambdas = case.lambdas * (np.arange(len(case.lambdas)) < k)[:, None]
        delta = impl.delta_weight(gammas=case.gammas, A=A, lambdas=lambdas, B=B, scaling=case.scaling, wide=wide)
        expected = _sum(case.gammas, A, lambdas, B, case.scaling, wide)[0]
        _assert_rank(delta, expected, k * case.rank, size, f"the sum of the first {k} terms")


@law(
    "randlora.L5b",
    says="With the same gamma in every column of a term the sum collapses to the rank of A.",
    formula=r"\Gamma_j = c_j I \;\Rightarrow\; \mathrm{rank}\, \Delta W \le r",
    needs=("draw_bases", "delta_weight"),
    tolerance=64,
    cases=drawn(),
)
def test_constant_gammas_collapse(impl, case):
    A, B = impl.draw_bases(weights=[case.W0], rank=case.rank, generator=case.seed)
    gammas, wide = np.repeat(case.gammas[:, :1], case.gammas.shape[1], axis=1), case.W0.shape[0] < case.W0.shape[1]
    delta = impl.delta_weight(gammas=gammas, lambdas=case.lambdas, A=A, B=B, scaling=case.scaling, wide=wide)
    size = np.linalg.norm(_sum(gammas, A, case.lambdas, B, case.scaling, wide)[1])
    expected = _sum(gammas, A, case.lambdas, B, case.scaling, wide)[0]
    _assert_rank(delta, expected, case.rank, size, "a sum with constant gammas")


@st.composite
def small_drawn(draw: st.DrawFn) -> Layer:
    """A layer of generic normal entries, small enough for a Jacobian."""
    out_features, in_features = draw(sides(2, 6)), draw(sides(2, 6))
    layer = _make_layer(draw, out_features, in_features, draw(st.integers(1, min(out_features, in_features))))
    matrices = Matrices(layer.seed + 1)
    return layer._replace(**{name: matrices(*getattr(layer, name).shape) for name in ("gammas", "A", "lambdas", "B")})


def _jacobian(delta, gammas, lambdas):
    """Columns: how the update moves with each entry of both diagonals. It is linear in each, so differences are exact."""
    columns = []
    for which, other in ((0, lambdas), (1, gammas)):
        at = (gammas, lambdas)[which]
        for index in np.ndindex(at.shape):
            moved = []
            for step in (1.0, -1.0):
                there = at.copy()
                there[index] += step
                moved.append(delta(there, other) if which == 0 else delta(other, there))
            columns.append((moved[0] - moved[1]).ravel() / 2)
    return np.array(columns).T


@law(
    "randlora.L6",
    says="The updates that diagonals can reach form a family of N (r + d - 1) dimensions: each term has one scale too many.",
    formula=r"\mathrm{rank}\ \partial \Delta W / \partial(\lambda, \gamma) = N (r + d - 1)",
    needs=("delta_weight",),
    tolerance=12,
    cases=small_drawn(),
    examples=25,
)
def test_dimension_of_the_family(impl, case):
    def delta(gammas, lambdas):
        return impl.delta_weight(gammas=gammas, A=case.A, lambdas=lambdas, B=case.B, scaling=case.scaling)

    def expected(gammas, lambdas):
        return _sum(gammas, case.A, lambdas, case.B, case.scaling, False)[0]

    jacobian, (bases, small) = _jacobian(delta, case.gammas, case.lambdas), case.gammas.shape
    dimension = bases * (case.rank + small - 1)
    # The differences have the rounding of the update itself
    size = _sum(np.abs(case.gammas) + 1, case.A, np.abs(case.lambdas) + 1, case.B, case.scaling, False)[1].sum()
    _assert_rank(jacobian, _jacobian(expected, case.gammas, case.lambdas), dimension, size, "the Jacobian")


# Gradients


@law(
    "randlora.L7a",
    says="The gradients of the diagonals are the slopes of the loss along their single entries.",
    formula=r"\partial L/\partial \lambda_{jk} = \sum_i g_{jki} A_{ki} \gamma_{ji}, \quad g_{jki} = s\, (B_j^\top G)_{ki}",
    needs=("gradients",),
    tolerance=8,
    cases=layers(),
)
def test_gradients(impl, case):
    wide = _is_wide(case)
    got = impl.gradients(G=case.G, **_factors(case))
    fixed = {"A": case.A, "B": case.B, "scaling": case.scaling, "wide": wide}
    # G is the gradient of the merged weight: the loss near it is <G, W>, linear in each diagonal, so its slopes are those at 0
    for name, other in (("gammas", "lambdas"), ("lambdas", "gammas")):
        at = getattr(case, name)

        def loss(value, name=name, other=other):
            return np.sum(case.G * _sum(**{name: value, other: getattr(case, other)}, **fixed)[0])

        def size(value, name=name, other=other):
            return np.sum(np.abs(case.G) * _sum(**{name: value, other: getattr(case, other)}, **fixed)[1])

        want, scale = slope(loss, 0 * at), np.zeros_like(at)
        for index in np.ndindex(at.shape):
            unit = 0 * at
            unit[index] = 1.0
            scale[index] = size(unit)
        assert_close(getattr(got, f"grad_{name}"), want, size=scale, what=f"grad_{name}")


def _assert_trained(impl, case, start, zero):
    """Assert that of a start just the diagonals that are zero have a gradient."""
    other = {"lambdas": "gammas", "gammas": "lambdas"}[zero]
    got = impl.gradients(G=case.G, A=case.A, B=case.B, scaling=case.scaling, **start._asdict())
    rest = getattr(got, f"grad_{other}")
    assert_close(rest, np.zeros_like(rest), size=0, what=f"grad_{other}")
    # The slope along all entries at once
    along = {zero: np.ones_like(getattr(case, zero)), other: getattr(start, other), "A": case.A, "B": case.B, "scaling": case.scaling}
    delta, size = _sum(**along, wide=_is_wide(case))
    size = np.sum(np.abs(case.G) * size) + np.sum(np.abs(case.G)) * 1e-300
    assert_close(np.sum(getattr(got, f"grad_{zero}")), np.sum(case.G * delta), size=size, what=f"sum of grad_{zero}")


@law(
    "randlora.L7b",
    says="At the start lambdas alone have a gradient: that of gammas is exactly zero.",
    formula=r"\lambda = 0 \;\Rightarrow\; \partial L / \partial \gamma = 0",
    needs=("init", "gradients"),
    tolerance=8,
    cases=layers(),
)
def test_gradients_at_the_start(impl, case):
    _assert_trained(impl, case, impl.init(W0=case.W0, rank=case.rank), "lambdas")


@law(
    "randlora.L7c",
    says="At the other start gammas alone have one.",
    formula=r"\gamma = 0 \;\Rightarrow\; \partial L / \partial \lambda = 0",
    needs=("init.zero", "gradients"),
    tolerance=8,
    cases=layers(),
)
def test_gradients_at_the_other_start(impl, case):
    _assert_trained(impl, case, impl.init(W0=case.W0, rank=case.rank, zero="gammas"), "gammas")


# Invariances


@law(
    "randlora.L8a",
    says="Each term's scale can move from lambda to gamma without changing the update.",
    formula=r"(\lambda_j, \gamma_j) \mapsto (c_j \lambda_j, \gamma_j / c_j) \;\Rightarrow\; \Delta W \mapsto \Delta W",
    needs=("delta_weight",),
    tolerance=8,
    cases=layers(),
)
def test_gauge(impl, case):
    c = Matrices(case.seed + 1).rng.choice([3.0, -0.7, 5.0], (len(case.gammas), 1))
    options = {"A": case.A, "B": case.B, "scaling": case.scaling}
    one = impl.delta_weight(gammas=case.gammas, lambdas=case.lambdas, **options)
    other = impl.delta_weight(gammas=case.gammas / c, lambdas=c * case.lambdas, **options)
    assert_close(other, one, size=_sum(**_factors(case), wide=False)[1], what="Delta W after moving scales")


@law(
    "randlora.L8b",
    says="The order of the terms does not matter, if diagonals and bases are put in the same order.",
    formula=r"j \mapsto \pi(j) \;\Rightarrow\; \Delta W \mapsto \Delta W",
    needs=("delta_weight",),
    tolerance=8,
    cases=layers(),
)
def test_order_of_terms(impl, case):
    order = Matrices(case.seed + 1).rng.permutation(len(case.gammas))
    options = {"A": case.A, "scaling": case.scaling}
    one = impl.delta_weight(gammas=case.gammas, lambdas=case.lambdas, B=case.B, **options)
    other = impl.delta_weight(gammas=case.gammas[order], lambdas=case.lambdas[order], B=case.B[:, order], **options)
    assert_close(other, one, size=_sum(**_factors(case), wide=False)[1], what="Delta W in another order")


@law(
    "randlora.L8c",
    says="So with the same order within a term, and with any partner of a term's columns of B and rows of A: k meets k.",
    formula=r"k \mapsto \pi(k) \text{ in } B_j, \lambda_j, A \;\Rightarrow\; \Delta W \mapsto \Delta W",
    needs=("delta_weight",),
    tolerance=8,
    cases=layers(),
)
def test_order_within_a_term(impl, case):
    order = Matrices(case.seed + 1).rng.permutation(case.rank)
    one = impl.delta_weight(**_factors(case))
    other = impl.delta_weight(
        gammas=case.gammas, A=case.A[order], lambdas=case.lambdas[:, order], B=case.B[:, :, order], scaling=case.scaling
    )
    assert_close(other, one, size=_sum(**_factors(case), wide=False)[1], what="Delta W in another order")


# Least squares


@st.composite
def fitted(draw: st.DrawFn) -> Layer:
    """A layer with many more equations than unknowns, both ways, and generic entries."""
    small = draw(sides(1, 4))
    large = small + draw(st.integers(4, 7))
    shape = (small, large) if draw(st.booleans()) else (large, small)
    layer = _make_layer(draw, *shape, draw(st.integers(1, small)))
    matrices = Matrices(layer.seed + 1)
    given = {name: matrices(*getattr(layer, name).shape) for name in ("A", "B", "G")}
    for name in ("gammas", "lambdas"):
        given[name] = matrices.rng.uniform(0.5, 1.5, getattr(layer, name).shape)
    return layer._replace(**given)


def _columns_in_gammas(case):
    """For each column of M on the smaller side, the matrix (large, bases) that gives it from that column of gammas."""
    terms = [case.scaling * case.B[:, j] @ np.diag(case.lambdas[j]) @ case.A for j in range(len(case.gammas))]
    return [np.stack([term[:, i] for term in terms], axis=1) for i in range(case.A.shape[1])]


def _columns_in_lambdas(case):
    """The matrix that gives vec(M) from all lambdas."""
    terms = [
        case.scaling * np.multiply.outer(case.B[:, j, k], case.A[k] * case.gammas[j]).ravel() for j, k in np.ndindex(*case.lambdas.shape)
    ]
    return np.stack(terms, axis=1)


def _tall(case, M):
    return M.T if _is_wide(case) else M


@law(
    "randlora.L9a",
    says="For given lambdas the nearest gammas are found by least squares, column by column; a reachable target is reached.",
    formula=r"\gamma = \arg\min \|\Delta W(\lambda, \gamma) - T\|_F",
    needs=("fit_gammas",),
    tolerance=32,
    cases=fitted(),
)
def test_fit_gammas(impl, case):
    options = {"A": case.A, "lambdas": case.lambdas, "B": case.B, "scaling": case.scaling}
    designs = _columns_in_gammas(case)
    conditioning = max(np.linalg.cond(design) for design in designs)
    inverse = max(np.linalg.norm(np.linalg.pinv(design), 2) for design in designs)
    reachable, size = _update(case)
    got = impl.fit_gammas(target=reachable, **options)
    assert_close(got, case.gammas, size=np.linalg.norm(size) * inverse, conditioning=conditioning, what="gammas of a reachable target")
    got = impl.fit_gammas(target=case.G, **options)
    columns = zip(designs, _tall(case, case.G).T, strict=True)
    want = np.stack([np.linalg.lstsq(design, column, rcond=None)[0] for design, column in columns], axis=1)
    size = np.linalg.norm(case.G) * inverse
    assert_close(got, want, size=size, conditioning=conditioning**2, what="gammas nearest to any target")


@law(
    "randlora.L9b",
    says="For given gammas the nearest lambdas are found by least squares; a reachable target is reached.",
    formula=r"\lambda = \arg\min \|\Delta W(\lambda, \gamma) - T\|_F",
    needs=("fit_lambdas",),
    tolerance=32,
    cases=fitted(),
)
def test_fit_lambdas(impl, case):
    options = {"gammas": case.gammas, "A": case.A, "B": case.B, "scaling": case.scaling}
    design = _columns_in_lambdas(case)
    conditioning, inverse = np.linalg.cond(design), np.linalg.norm(np.linalg.pinv(design), 2)
    reachable, size = _update(case)
    got = impl.fit_lambdas(target=reachable, **options)
    assert_close(got, case.lambdas, size=np.linalg.norm(size) * inverse, conditioning=conditioning, what="lambdas of a reachable target")
    got = impl.fit_lambdas(target=case.G, **options)
    want = np.linalg.lstsq(design, _tall(case, case.G).ravel(), rcond=None)[0].reshape(case.lambdas.shape)
    size = np.linalg.norm(case.G) * inverse
    assert_close(got, want, size=size, conditioning=conditioning**2, what="lambdas nearest to any target")


# The theorem's blocks


class Spectral(NamedTuple):
    """A matrix with singular values that lie apart, and the rank of its blocks."""

    W0: np.ndarray
    rank: int
    seed: int


@st.composite
def spectral(draw: st.DrawFn) -> Spectral:
    out_features, in_features, seed = draw(sides(1, 9)), draw(sides(1, 9)), draw(seeds())
    small = min(out_features, in_features)
    rank = draw(st.integers(1, small))
    return Spectral(Matrices(seed, draw(entries())).separated(out_features, in_features), rank, seed)


@law(
    "randlora.L10a",
    says="Block j of a matrix is its part on the j-th group of `rank` left singular vectors; all blocks sum to it.",
    formula=r"W = \sum_j U_j \Sigma_j V_j^\top, \quad U_j \Sigma_j V_j^\top = U_j U_j^\top W",
    needs=("svd_blocks",),
    tolerance=128,
    cases=spectral(),
)
def test_blocks(impl, case):
    blocks = impl.svd_blocks(W0=case.W0, rank=case.rank)
    U, values, _ = np.linalg.svd(case.W0)
    size = values[0]
    assert_close(np.sum(blocks, axis=0), case.W0, size=size, what="sum of the blocks")
    assert len(blocks) == np.ceil(min(case.W0.shape) / case.rank), f"there are {len(blocks)} blocks"
    # The singular values are at least half of their mean distance apart
    for j, block in enumerate(blocks):
        U_j = U[:, j * case.rank : min((j + 1) * case.rank, len(values))]
        assert_close(block, U_j @ U_j.T @ case.W0, size=size, conditioning=size, what=f"block {j}")


@law(
    "randlora.L11",
    says="The first block alone misses the tail of the spectrum: what LoRA of that rank must miss too.",
    formula=r"\|W - U_1 \Sigma_1 V_1^\top\|_F^2 = \sum_{i > r} \sigma_i^2",
    needs=("svd_blocks",),
    tolerance=64,
    cases=spectral(),
)
def test_first_block(impl, case):
    first = impl.svd_blocks(W0=case.W0, rank=case.rank)[0]
    values = np.linalg.svd(case.W0, compute_uv=False)
    size = np.sum(values**2)
    assert_close(np.sum((case.W0 - first) ** 2), np.sum(values[case.rank :] ** 2), size=size, what="squared error of the first block")
    assert_close(np.sum(first**2), np.sum(values[: case.rank] ** 2), size=size, what="squared norm of the first block")


@law(
    "randlora.L12",
    says="With the largest basis rank there is one term, VeRA's form: entry by entry a double sum.",
    formula=r"N = 1:\ \Delta W_{oi} = s \sum_k B_{ok} \lambda_k A_{ki} \gamma_i",
    needs=("delta_weight",),
    tolerance=8,
    cases=layers(full_rank=True),
)
def test_one_term(impl, case):
    got = impl.delta_weight(**_factors(case))
    want, size = np.zeros(got.shape), np.zeros(got.shape)
    for o, i in np.ndindex(got.shape):
        terms = [case.B[o, 0, k] * case.lambdas[0, k] * case.A[k, i] * case.gammas[0, i] for k in range(case.rank)]
        want[o, i], size[o, i] = case.scaling * np.sum(terms), case.scaling * np.sum(np.abs(terms))
    assert_close(got, want, size=size, what="Delta W")


@st.composite
def tiny(draw: st.DrawFn) -> Layer:
    """A layer whose bases of signs can be enumerated."""
    shape, rank = draw(st.sampled_from([((2, 2), 1), ((2, 3), 1), ((2, 2), 2), ((3, 1), 1), ((4, 1), 1)]))
    return _make_layer(draw, *shape, rank)


@law(
    "randlora.L13",
    says="Over bases of independent entries with mean 0 and variance 1, the mean squared size of the update: all bases of signs.",
    formula=r"\mathbb E \|\Delta W\|_F^2 = s^2 D \sum_j \|\lambda_j\|^2 \|\gamma_j\|^2",
    needs=("delta_weight",),
    tolerance=16,
    cases=tiny(),
    examples=8,
)
def test_second_moment(impl, case):
    squares = []
    for signs in itertools.product((1.0, -1.0), repeat=case.A.size + case.B.size):
        A, B = np.array(signs[: case.A.size]).reshape(case.A.shape), np.array(signs[case.A.size :]).reshape(case.B.shape)
        squares.append(np.sum(impl.delta_weight(gammas=case.gammas, A=A, lambdas=case.lambdas, B=B, scaling=case.scaling) ** 2))
    want = len(case.B) * case.scaling**2 * np.sum(np.sum(case.lambdas**2, axis=1) * np.sum(case.gammas**2, axis=1))
    size = case.scaling**2 * case.B.size * np.sum(np.abs(case.lambdas)) ** 2 * np.sum(case.gammas**2)
    assert_close(np.mean(squares), want, size=size, what="mean squared norm of Delta W")


# The bases


class Numbers(NamedTuple):
    """Numbers in [0, 1), whole 64ths, and a sparsity with thresholds between them."""

    u: np.ndarray
    sparsity: float


@law(
    "randlora.L14a",
    says="Ternary entries: the lowest part of the unit interval gives -1, the highest 1, each of length 1 / (2 q), the rest 0.",
    formula=r"u < \tfrac{1}{2q}: -1, \quad u > 1 - \tfrac{1}{2q}: 1, \quad q = 3 \text{ by default}",
    needs=("ternarise.sparsity",),
    tolerance=0,
    cases=st.builds(
        lambda seed, q: Numbers(np.append(np.random.default_rng(seed).permutation(64) / 64, 63 / 64).reshape(5, 13), q),
        seeds(),
        st.sampled_from([3.0, 5.0, 1.1, 10.3]),
    ),
)
def test_ternary(impl, case):
    for given, q in (({"sparsity": case.sparsity}, case.sparsity), ({}, 3.0)):
        got = impl.ternarise(u=case.u, **given)
        want = np.array([[-1.0 if u < 0.5 / q else 1.0 if 1 - u < 0.5 / q else 0.0 for u in row] for row in case.u])
        assert_close(got, want, size=0, what=f"ternary entries for q = {q:g}")


class Raw(NamedTuple):
    """Entries of a base, as drawn."""

    base: np.ndarray


@st.composite
def raws(draw: st.DrawFn) -> Raw:
    shape = draw(st.sampled_from([(3,), (2, 3), (3, 2, 2), (5, 4)]))
    raw = Matrices(draw(seeds()), draw(entries()))(*shape)
    raw.flat[:2] = 1.0, -2.0  # not all equal
    return Raw(raw * draw(st.sampled_from([1.0, 0.01])) + draw(st.sampled_from([0.0, 0.005])))


@law(
    "randlora.L14b",
    says="A base is divided by its own unbiased standard deviation; its mean is not taken off.",
    formula=r"b \mapsto b \,/ \sqrt{\tfrac{1}{K - 1} \sum_i (b_i - \bar b)^2}",
    needs=("normalise",),
    tolerance=16,
    cases=raws(),
)
def test_normalise(impl, case):
    base = case.base.ravel()
    pairs = np.subtract.outer(base, base)
    # The variance as half of the mean squared difference of two entries
    deviation = np.sqrt(np.sum(pairs**2) / (2 * base.size * (base.size - 1)))
    size = np.abs(case.base) / deviation * (1 + np.abs(base).max() / deviation)
    assert_close(impl.normalise(base=case.base), case.base / deviation, size=size, what="the base")


class Shapes(NamedTuple):
    """Weights that share one pair of bases."""

    first: np.ndarray
    second: np.ndarray
    third: np.ndarray
    A: np.ndarray  # of a pair that serves all three
    B: np.ndarray
    rank: int
    seed: int


@st.composite
def shapes(draw: st.DrawFn) -> Shapes:
    shape, seed = [(draw(sides(2, 9)), draw(sides(2, 9))) for _ in range(3)], draw(seeds())
    rank = draw(st.integers(1, min(min(one) for one in shape)))
    matrices = Matrices(seed)
    small, large = sorted(max(one[side] for one in shape) for side in (0, 1))
    weights = [matrices(*one) for one in shape]
    return Shapes(*weights, A=matrices(rank, small), B=matrices(large, -(-small // rank), rank), rank=rank, seed=seed)


@law(
    "randlora.L15a",
    says="One pair serves all layers: as large as the largest output and input ask for, with enough terms for both.",
    formula=r"d = \min(\max m, \max n), \quad D = \max(\max m, \max n), \quad N = \lceil d / r \rceil",
    needs=("draw_bases",),
    tolerance=0,
    cases=shapes(),
)
def test_shapes_of_the_pair(impl, case):
    weights = [case.first, case.second, case.third]
    for count in (1, 2, 3):
        A, B = impl.draw_bases(weights=weights[:count], rank=case.rank, generator=case.seed)
        m, n = (max(W.shape[side] for W in weights[:count]) for side in (0, 1))
        small, large = min(m, n), max(m, n)
        bases = sum(1 for start in range(0, small, case.rank))
        assert_close(A.shape, (case.rank, small), size=0, what="shape of A")
        assert_close(B.shape, (large, bases, case.rank), size=0, what="shape of B")


@law(
    "randlora.L15b",
    says="A layer uses the leading slices of the shared pair, in a layer's own sizes.",
    formula=r"A_{:,\, 1..d}, \quad B_{1..D,\, 1..N}",
    needs=("slice_bases",),
    tolerance=0,
    cases=shapes(),
)
def test_slices(impl, case):
    for W0 in (case.first, case.second, case.third):
        own = impl.slice_bases(W0=W0, shared_A=case.A, shared_B=case.B)
        small, large = min(W0.shape), max(W0.shape)
        assert_close(own.A, case.A[:, :small], size=0, what="A of the layer")
        assert_close(own.B, case.B[:large, : int(np.ceil(small / case.rank))], size=0, what="B of the layer")


class Draw(NamedTuple):
    """What bases are drawn for: large enough for their moments to show."""

    W0: np.ndarray
    rank: int
    seed: int


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    return Draw(np.zeros((draw(st.integers(60, 62)), draw(st.integers(64, 66)))), draw(st.sampled_from([24, 30])), draw(seeds()))


def _assert_pair(draw, seed):
    """Assert that a seed repeats a pair, another changes it, and that its parts are drawn one after the other."""
    A, B = assert_seeded(draw, seed, "A", "B")
    for order in (B.ravel(), B.transpose(1, 0, 2).ravel(), B.transpose(0, 2, 1).ravel()):
        same = np.mean(np.sign(order[: A.size]) == np.sign(A.ravel()))
        assert same < 0.95, "A and B begin with the same numbers"
    terms = [B[:, j].ravel() for j in range(B.shape[1])]
    assert not any(np.array_equal(terms[0], term) for term in terms[1:]), "all terms have the same B"


@law(
    "randlora.L15c",
    says="A seed repeats the pair, another gives another, and A is not a part of B.",
    formula=r"(A, B) = f(\text{seed})",
    needs=("draw_bases.generator",),
    tolerance=0,
    cases=draws(),
    examples=4,
)
def test_seeds_of_bases(impl, case):
    _assert_pair(lambda seed: impl.draw_bases(weights=[case.W0], rank=case.rank, generator=seed), case.seed)


@law(
    "randlora.L15d",
    says="So it is for ternary bases.",
    formula=r"(A, B) = f(\text{seed})",
    needs=("draw_bases.generator", "draw_bases.kind"),
    tolerance=0,
    cases=draws(),
    examples=4,
)
def test_seeds_of_ternary_bases(impl, case):
    for kind in ("sparse", "very_sparse"):
        _assert_pair(lambda seed, kind=kind: impl.draw_bases(weights=[case.W0], rank=case.rank, kind=kind, generator=seed), case.seed)


def _assert_moments(base, fourth, what):
    """Assert mean 0, and a fourth moment, of K independent entries scaled to standard deviation 1; false alarm below 1e-6."""
    K = base.size
    assert_close(base.std(ddof=1), 1.0, size=8 * np.sqrt(K), what=f"standard deviation of {what}")
    assert_close(base.mean(), 0.0, within=6 / np.sqrt(K), what=f"mean of {what}")
    assert_close(np.mean(base**4), fourth, within=8 * fourth * np.sqrt((8 if fourth > 2.5 else 1) / K), what=f"fourth moment of {what}")


@law(
    "randlora.L14c",
    says="Uniform bases, the default, fill about [-1.73, 1.73], with standard deviation 1.",
    formula=r"\mathrm{std} = 1, \quad \mathbb E b^4 = 9/5",
    needs=("draw_bases.generator",),
    tolerance=8,
    cases=draws(),
    examples=4,
)
def test_uniform_bases(impl, case):
    pair = impl.draw_bases(weights=[case.W0], rank=case.rank, generator=case.seed)
    for name, base in pair._asdict().items():
        _assert_moments(base, 1.8, name)
        # Of 1,440 normal numbers none beyond 2.2 in one of 10^17 cases; uniform ones end at 1.73 times about 1.02
        assert np.abs(base).max() < 2.2, f"{name} has the entry {np.abs(base).max()}"


@law(
    "randlora.L14e",
    says="Normal bases have normal tails, with standard deviation 1; the default can be asked for by its name.",
    formula=r"\mathrm{std} = 1, \quad \mathbb E b^4 = 3 \text{ or } 9/5",
    needs=("draw_bases.kind", "draw_bases.generator"),
    tolerance=8,
    cases=draws(),
    examples=4,
)
def test_normal_bases(impl, case):
    for kind, fourth in (("normal", 3.0), ("uniform", 1.8)):
        pair = impl.draw_bases(weights=[case.W0], rank=case.rank, generator=case.seed, kind=kind)
        for name, base in pair._asdict().items():
            _assert_moments(base, fourth, f"{name}, {kind}")
            assert (np.abs(base).max() > 2.2) == (kind == "normal"), f"{name}, {kind}, has the largest entry {np.abs(base).max()}"


@law(
    "randlora.L14d",
    says="Ternary bases have three values -v, 0 and v, each sign with its frequency: a sixth, or 1 / (2 sqrt(d)).",
    formula=r"P(\pm v) = \tfrac{1}{2q}, \quad q = 3 \text{ or } \sqrt d, \quad v \approx \sqrt q",
    needs=("draw_bases.kind", "draw_bases.generator"),
    tolerance=8,
    cases=draws(),
    examples=4,
)
def test_ternary_bases(impl, case):
    for kind, q in (("sparse", 3.0), ("very_sparse", np.sqrt(min(case.W0.shape)))):
        pair = impl.draw_bases(weights=[case.W0], rank=case.rank, kind=kind, generator=case.seed)
        for name, base in pair._asdict().items():
            what = f"{name}, {kind}"
            v, K, each = np.abs(base).max(), base.size, 1 / (2 * q)
            assert np.all((base == 0) | (np.abs(base) == v)), f"{what} has more than three values"
            assert_close(base.std(ddof=1), 1.0, size=8 * np.sqrt(K), what=f"standard deviation of {what}")
            for value in (v, -v):
                share = np.mean(base == value)
                assert_close(share, each, within=6 * np.sqrt(each * (1 - each) / K), what=f"share of {value:.3f} in {what}")


# The scaling


class Scaled(NamedTuple):
    """What the scaling is made of."""

    alpha: float
    rank: int
    bases: int


@law(
    "randlora.L16a",
    says="The paper's scaling, the default, divides alpha by the rank and by the root of the number of terms; alpha is twice the rank.",
    formula=r"s = \alpha / (r \sqrt N), \quad \alpha = 2 r",
    needs=("scaling_factor",),
    tolerance=12,
    cases=st.builds(Scaled, alpha=st.sampled_from([3.0, 0.7, 20.0]), rank=st.integers(1, 40), bases=st.integers(1, 40)),
)
def test_scaling_of_the_paper(impl, case):
    for given in ({}, {"convention": "paper"}):
        got = impl.scaling_factor(rank=case.rank, bases=case.bases, alpha=case.alpha, **given)
        assert_close((got * case.rank) ** 2 * case.bases, case.alpha**2, size=case.alpha**2, what="(s r)^2 N")
        got = impl.scaling_factor(rank=case.rank, bases=case.bases, **given)
        assert_close(got**2 * case.bases, 4.0, size=4.0, what="s^2 N without alpha")
        assert got > 0


@law(
    "randlora.L16b",
    says="PEFT's scaling leaves the root out.",
    formula=r"s = \alpha / r",
    needs=("scaling_factor.convention", "scaling_factor.alpha"),
    tolerance=4,
    cases=st.builds(Scaled, alpha=st.sampled_from([3.0, 0.7, 20.0]), rank=st.integers(1, 40), bases=st.integers(1, 40)),
)
def test_scaling_of_peft(impl, case):
    got = impl.scaling_factor(rank=case.rank, bases=case.bases, alpha=case.alpha, convention="peft")
    assert_close(got * case.rank, case.alpha, size=case.alpha, what="s r")


@law(
    "randlora.L16c",
    says="Without alpha PEFT's scaling is 20, whatever the rank.",
    formula=r"\alpha = 20 r",
    needs=("scaling_factor.convention",),
    tolerance=4,
    cases=st.builds(Scaled, alpha=st.sampled_from([3.0, 0.7, 20.0]), rank=st.integers(1, 40), bases=st.integers(1, 40)),
)
def test_alpha_of_peft(impl, case):
    got = impl.scaling_factor(rank=case.rank, bases=case.bases, convention="peft")
    assert_close(got, 20.0, size=20.0, what="s without alpha")


@law(
    "randlora.L16d",
    says="The vision code's scaling leaves the root out too; without alpha it is one over the rank.",
    formula=r"s = \alpha / r, \quad \alpha = 1",
    needs=("scaling_factor.convention", "scaling_factor.alpha"),
    tolerance=4,
    cases=st.builds(Scaled, alpha=st.sampled_from([3.0, 0.7, 20.0]), rank=st.integers(1, 40), bases=st.integers(1, 40)),
)
def test_scaling_of_the_vision_code(impl, case):
    got = impl.scaling_factor(rank=case.rank, bases=case.bases, alpha=case.alpha, convention="vision")
    assert_close(got * case.rank, case.alpha, size=case.alpha, what="s r")
    assert_close(impl.scaling_factor(rank=case.rank, bases=case.bases, convention="vision") * case.rank, 1.0, what="s r without alpha")


# Theorem checks: the mathematics itself


@theorem(
    "randlora.T1",
    says="If each block is approximated within epsilon, the sum is within N epsilon (the paper's theorem, second part).",
    formula=r"\|W_j - M_j\|_F \le \epsilon \;\Rightarrow\; \|W - \textstyle\sum_j M_j\|_F \le N \epsilon",
    tolerance=64,
    cases=spectral(),
)
def test_theorem(case):
    U, values, Vt = np.linalg.svd(case.W0)
    matrices, bases, total = Matrices(case.seed + 1), -(-min(case.W0.shape) // case.rank), np.zeros_like(case.W0)
    for epsilon in (1e-3, 1.0):
        total = 0 * total
        for j in range(bases):
            part = slice(j * case.rank, min((j + 1) * case.rank, len(values)))
            error = matrices(*case.W0.shape)
            total += U[:, part] * values[part] @ Vt[part] + epsilon * error / np.linalg.norm(error)
        excess = np.linalg.norm(case.W0 - total) - bases * epsilon
        assert_close(max(excess, 0.0), 0.0, size=np.linalg.norm(values) + bases * epsilon, what="how far beyond N epsilon")


@theorem(
    "randlora.T2",
    says="Its premise is an assumption: with fewer numbers than entries alternating least squares stops short of a random target.",
    formula=r"N (r + d - 1) < D d \;\Rightarrow\; \min_{\lambda, \gamma} \|\Delta W - T\|_F > 0",
    tolerance=64,
    cases=fitted(),
    examples=25,
)
def test_premise_is_an_assumption(case):
    bases, small = case.gammas.shape
    large = len(case.B)
    # A family of fewer dimensions than there are entries has measure zero: alternating least squares stops above zero
    too_few = bases * (case.rank + small - 1) < large * small
    target, found = _tall(case, case.G), case
    for _ in range(10):
        designs = _columns_in_gammas(found)
        gammas = np.stack([np.linalg.lstsq(d, c, rcond=None)[0] for d, c in zip(designs, target.T, strict=True)], axis=1)
        found = found._replace(gammas=gammas)
        lambdas = np.linalg.lstsq(_columns_in_lambdas(found), target.ravel(), rcond=None)[0]
        found = found._replace(lambdas=lambdas.reshape(case.lambdas.shape))
    missed = np.linalg.norm(_sum(**_factors(found), wide=False)[0] - target) / np.linalg.norm(target)
    assert_close(missed > 1e-6, too_few, size=0, what=f"whether a random target, reached up to {missed:.1e}, is out of reach")


@theorem(
    "randlora.T3",
    says="No matrix of rank r is nearer than the first block (Eckart and Young): what LoRA of rank r can do.",
    formula=r"\min_{\mathrm{rank} X \le r} \|W - X\|_F^2 = \sum_{i > r} \sigma_i^2",
    tolerance=64,
    cases=spectral(),
)
def test_eckart_young(case):
    _, values, Vt = np.linalg.svd(case.W0)
    tail, matrices = np.sum(values[case.rank :] ** 2), Matrices(case.seed + 2)
    for width in (0, 1e-2, 0.3, 10.0):
        # The best matrix with these rows: W projected on their space
        rows = Vt[: case.rank] + width * matrices(case.rank, len(Vt))
        right = np.linalg.svd(rows, full_matrices=False)[2]
        excess = np.sum((case.W0 - case.W0 @ right.T @ right) ** 2) - tail
        if width == 0:
            assert_close(excess, 0.0, size=np.sum(values**2), what="how much farther the singular vectors are")
        assert_close(min(excess, 0.0), 0.0, size=np.sum(values**2), what="how much nearer another matrix is")


@theorem(
    "randlora.T4",
    says="Through a smooth loss the gradients of the diagonals follow from that of the merged weight alone.",
    formula=r"\nabla_{\lambda, \gamma} L(W_0 + \Delta W(\lambda, \gamma)) \text{ from } G = \nabla L(W)",
    tolerance=1e7,  # central differences with step 1e-4: h^2 plus eps / h, about 1e-8
    cases=layers(high=4),
)
def test_chain_rule(case):
    wide, (m, n) = _is_wide(case), case.W0.shape
    matrices = Matrices(case.seed + 3)
    problem = LogisticRegression(matrices(9, n) / 16, np.sign(matrices(9, m)))
    fixed = {"A": case.A, "B": case.B, "scaling": case.scaling, "wide": wide}
    G = problem.grad(case.W0 + _update(case)[0])
    Gt = G.T if wide else G
    largest = 1 + np.abs(problem.X).max() * case.scaling * max(np.abs(v).max() for v in case[3:7]) ** 3 * case.rank

    def loss(gammas, lambdas):
        return problem.loss(case.W0 + _sum(gammas=gammas, lambdas=lambdas, **fixed)[0])

    g = case.scaling * np.einsum("ojk,oi->jki", case.B, Gt)
    want = slope(lambda v: loss(v, case.lambdas), case.gammas, step=1e-4)
    assert_close(np.einsum("jki,ki,jk->ji", g, case.A, case.lambdas), want, size=largest**3, what="gradient of gammas")
    want = slope(lambda v: loss(case.gammas, v), case.lambdas, step=1e-4)
    assert_close(np.einsum("jki,ki,ji->jk", g, case.A, case.gammas), want, size=largest**3, what="gradient of lambdas")


@theorem(
    "randlora.T5",
    says="The first step of gradient descent from the default start moves the weight along a matrix that never points uphill.",
    formula=r"\langle \Delta W_1, G \rangle = -\eta \|\nabla_\lambda L\|^2 \le 0",
    tolerance=64,
    cases=layers(),
)
def test_first_step_goes_downhill(case):
    wide, lr = _is_wide(case), 0.1
    gammas, G = np.full(case.gammas.shape, 1 / max(case.gammas.shape)), case.G.T if wide else case.G
    slopes = case.scaling * np.einsum("ojk,oi,ki,ji->jk", case.B, G, case.A, gammas)
    step = _sum(gammas, case.A, -lr * slopes, case.B, case.scaling, wide)
    assert_close(np.sum(step[0] * case.G), -lr * np.sum(slopes**2), size=np.sum(step[1] * np.abs(case.G)), what="<first step, G>")
