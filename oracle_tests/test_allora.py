# mypy: ignore-errors
"""The laws of ALLoRA. Expected values are NumPy float64; none comes from an implementation under test.

A is well conditioned (singular values in [0.5, 2]) but where a law says otherwise, so that a row of B A is small only where the
row of B is. Some rows of B are zero, as all are at the start.
"""

import itertools
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from loracle.oracle_tests.draws import assert_normal, assert_seeded, assert_uniform
from loracle.oracle_tests.expected import assert_linear, outer_sum
from loracle.oracle_tests.law import assert_close, law, of, theorem
from loracle.oracle_tests.loading import Derivation
from loracle.oracle_tests.problems import LogisticRegression, slope
from loracle.oracle_tests.strategies import Matrices, entries, leads, seeds, sides

# No 1, whose square and inverse are itself
ETAS = (2.0, 0.5, 8.0, 3.0)


class Layer(NamedTuple):
    """One adapted layer and what may come in from either side."""

    x: np.ndarray  # (..., in)
    grad_y: np.ndarray  # (..., out)
    G: np.ndarray  # (out, in)
    W0: np.ndarray  # (out, in)
    A: np.ndarray  # (rank, in)
    B: np.ndarray  # (out, rank)
    eta: float
    bias: np.ndarray  # (out,)
    rank: int
    lr: float
    seed: int


def _wide(matrices, rank, columns):
    """A matrix (rank, columns) with singular values in [0.5, 2] whose rows are not orthogonal."""
    if matrices.entries == "normal":
        return matrices.with_spectrum(rank, columns, matrices.rng.uniform(0.5, 2, rank))
    plain = np.zeros((rank, columns))
    plain[np.arange(rank), matrices.rng.permutation(columns)[:rank]] = matrices.rng.choice([2.0, 1.0, -1.0, -2.0], rank)
    # Half of the first row is added to the others: a Gram matrix that is not diagonal
    return plain + 0.5 * plain[:1] * (np.arange(rank) > 0)[:, None]


@st.composite
def layers(draw: st.DrawFn, low: int = 1, high: int = 7) -> Layer:
    out_features, in_features = draw(sides(low, high)), draw(sides(low, high))
    rank = draw(st.integers(1, min(out_features, in_features)))
    lead = draw(leads())
    empty = draw(st.integers(0, out_features - 1))
    seed = draw(seeds())
    matrices = Matrices(seed, draw(entries()))
    return Layer(
        x=matrices(*lead, in_features),
        grad_y=matrices(*lead, out_features),
        G=matrices(out_features, in_features),
        W0=matrices(out_features, in_features),
        A=_wide(matrices, rank, in_features),
        B=matrices(out_features, rank) * (matrices.rng.permutation(out_features) >= empty)[:, None],
        eta=draw(st.sampled_from(ETAS)),
        bias=matrices(out_features),
        rank=rank,
        lr=draw(st.sampled_from([0.5, 0.125])),
        seed=seed,
    )


# What the laws compare with


def _lengths(A, B):
    """The length of each row of B A, row by row."""
    return np.array([np.sqrt(sum(float(np.dot(row, column)) ** 2 for column in A.T)) for row in B])


def _d(A, B, eta):
    """The factor of each row of the gradient."""
    return np.array([1 / np.sqrt(length + 1 / eta**2) for length in _lengths(A, B)])


def _rough(A, B):
    """By how much rounding is larger than the row's own: what is summed for its square over the square; 1 for a zero row."""
    summed, squares = np.sum((np.abs(B) @ np.abs(A)) ** 2, axis=1), _lengths(A, B) ** 2
    return 1 + np.divide(summed, squares, out=np.zeros_like(squares), where=squares > 0)


def _matrix_d(A, B, eta):
    return np.full(len(B), 1 / np.sqrt(np.sqrt(np.sum(_lengths(A, B) ** 2)) + 1 / eta**2))


def _element_d(A, B, eta):
    return 1 / np.sqrt(np.abs([[sum(b * a for b, a in zip(row, column, strict=True)) for column in A.T] for row in B]) + 1 / eta**2)


def _by_rows(G, A, B, d):
    """Both gradients as sums over output rows, each with its factor, and the size of what is summed."""
    grad_A = sum(d[i] * np.multiply.outer(B[i], G[i]) for i in range(len(B)))
    grad_B = np.array([d[i] * np.array([np.dot(G[i], row) for row in A]) for i in range(len(B))])
    weight = d * _rough(A, B)
    return (grad_A, grad_B), ((np.abs(B) * weight[:, None]).T @ np.abs(G), weight[:, None] * (np.abs(G) @ np.abs(A).T))


def _assert_gradients(got, want, size):
    for name, one, right, scale in zip(("grad_A", "grad_B"), got, want, size, strict=True):
        assert_close(one, right, size=scale, what=name)


def _delta_weight(impl, A, B):
    """The columns of B A are what the layer adds to W0 = 0 for the unit vectors."""
    return impl.forward(x=np.eye(A.shape[1]), W0=np.zeros((B.shape[0], A.shape[1])), A=A, B=B).T


delta_weight_from_forward = Derivation("delta_weight", needs=("forward",), compute=_delta_weight)


# The row coefficient


class Pair(NamedTuple):
    """Two factors; rows of A may depend on each other, so that rows of B A nearly vanish while B's do not."""

    A: np.ndarray
    B: np.ndarray
    eta: float


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    out_features, in_features, rank = draw(sides(1, 6)), draw(sides(2, 7)), draw(st.integers(1, 4))
    matrices = Matrices(draw(seeds()), draw(entries()))
    A, B = matrices(rank, in_features), matrices(out_features, rank)
    if rank > 2 and draw(st.booleans()):
        # The last row of A is the sum of the others but for rounding, and rows of B take it away again
        A[-1] = (A[:-1] / 3).sum(axis=0)
        B = np.multiply.outer(matrices(out_features), np.array([1.0] * (rank - 1) + [-3.0]))
    return Pair(A, B, draw(st.sampled_from(ETAS)))


@law(
    "allora.L1a",
    says="The row norms are the lengths of the rows of the product B A, for any factors, also where a row cancels.",
    formula=r"\|(BA)_{i:}\|^2 = b_i (A A^\top) b_i^\top",
    needs=("row_norms",),
    tolerance=16,
    cases=pairs(),
)
def test_row_norms(impl, case):
    got = impl.row_norms(A=case.A, B=case.B)
    assert np.all(got >= 0), "a length is negative"
    # In squares, where the rounding of what is summed is the same whether the row cancels or not
    size = np.sum((np.abs(case.B) @ np.abs(case.A)) ** 2, axis=1)
    assert_close(got**2, _lengths(case.A, case.B) ** 2, size=size, what="squared row norm")


@law(
    "allora.L1b",
    says="The factor of a row is the inverse root of the row's length, not squared, plus 1 / eta^2.",
    formula=r"d_i = \big( \|(BA)_{i:}\|_2 + \eta^{-2} \big)^{-1/2}",
    needs=("row_scale",),
    tolerance=6,
    cases=layers(),
)
def test_row_scale(impl, case):
    want = _d(case.A, case.B, case.eta)
    assert_close(impl.row_scale(A=case.A, B=case.B, eta=case.eta), want, size=want * _rough(case.A, case.B), what="d")


@law(
    "allora.L1c",
    says="Every factor is positive and at most eta, also where a row cancels up to rounding.",
    formula=r"0 < d_i \le \eta",
    needs=("row_scale",),
    tolerance=4,
    cases=pairs(),
)
def test_row_scale_is_bounded(impl, case):
    d = impl.row_scale(A=case.A, B=case.B, eta=case.eta)
    assert np.all(d > 0), "a factor is not positive"
    assert_close(np.maximum(d, case.eta), np.full_like(d, case.eta), size=case.eta, what="the larger of d and eta")


class Long(NamedTuple):
    """A layer so large that B A has more bytes than a process can address."""

    side: int
    eta: float


@law(
    "allora.L1d",
    says="Row norms and factors need no (out, in) matrix: they are found for a layer of a million inputs and outputs.",
    formula=r"\mathrm{diag}\big( B (A A^\top) B^\top \big), \quad m = n = 2^{20}",
    needs=("row_norms", "row_scale"),
    tolerance=4,
    cases=st.just(Long(side=2**20, eta=2.0)),
    examples=1,
)
def test_no_dense_product(impl, case):
    index = np.arange(case.side)
    A, B = (index % 3 - 1.0)[None], (index % 5 - 2.0)[:, None]
    some = slice(None, None, case.side // 100)
    want = np.abs(B[some, 0]) * np.sqrt(np.count_nonzero(A))
    assert_close(impl.row_norms(A=A, B=B)[some], want, size=want, what="row norm")
    want = 1 / np.sqrt(want + 1 / case.eta**2)
    assert_close(impl.row_scale(A=A, B=B, eta=case.eta)[some], want, size=want, what="d")


@law(
    "allora.L2a",
    says="Where B is zero every factor is eta.",
    formula=r"B = 0 \;\Rightarrow\; d_i = \eta",
    needs=("row_scale",),
    tolerance=4,
    cases=layers(),
)
def test_scale_at_the_start(impl, case):
    d = impl.row_scale(A=case.A, B=0 * case.B, eta=case.eta)
    assert_close(d, np.full_like(d, case.eta), size=case.eta, what="d at B = 0")


@law(
    "allora.L2b",
    says="At the start A gets no gradient at all, and B gets eta times LoRA's with s = 1.",
    formula=r"B = 0 \;\Rightarrow\; g_A = 0, \quad g_B = \eta\, G A^\top",
    needs=("init", "gradients"),
    tolerance=8,
    cases=layers(),
)
def test_gradients_at_the_start(impl, case):
    A, B = impl.init(W0=case.W0, rank=case.rank, generator=case.seed)
    grad_A, grad_B = impl.gradients(G=case.G, A=A, B=B, eta=case.eta)
    assert_close(grad_A, np.zeros_like(A), size=0, what="grad_A at B = 0")
    want = [[case.eta * np.dot(row, a) for a in A] for row in case.G]
    assert_close(grad_B, want, size=case.eta * np.abs(case.G) @ np.abs(A).T, what="grad_B at B = 0")


# Gradients


@law(
    "allora.L3a",
    says="The optimizer's gradients are sums over output rows, each row of G times its factor.",
    formula=r"g_A = \sum_i d_i\, b_i^\top G_{i:}, \quad (g_B)_{i:} = d_i\, G_{i:} A^\top",
    needs=("gradients",),
    tolerance=8,
    cases=layers(),
)
def test_gradients(impl, case):
    want, size = _by_rows(case.G, case.A, case.B, _d(case.A, case.B, case.eta))
    _assert_gradients(impl.gradients(G=case.G, A=case.A, B=case.B, eta=case.eta), want, size)


@law(
    "allora.L3b",
    says="A and B get slopes of a loss in which channel i of the adapter's output counts d_i times, d held fixed; x gets the true ones.",
    formula=r"\tilde y = x W_0^\top + d \odot (x A^\top B^\top), \quad d \text{ constant}",
    needs=("backward",),
    tolerance=8,
    cases=layers(high=5),
)
def test_backward(impl, case):
    x, grad_y, W0, A, B = case.x, case.grad_y, case.W0, case.A, case.B
    d = _d(A, B, case.eta)
    got = impl.backward(grad_y=grad_y, x=x, W0=W0, A=A, B=B, eta=case.eta)
    _check_backward(got, case, d, d * _rough(A, B))


def _check_backward(got, case, d, weight):
    """Compare with slopes of <grad_y, y>, linear in each of x, A and B; `d` (..., out) goes with the adapter's signal of A and B."""
    x, grad_y, W0, A, B = case.x, case.grad_y, case.W0, case.A, case.B
    want_x = slope(lambda x: np.sum(grad_y * (x @ W0.T + (x @ A.T) @ B.T)), 0 * x)
    want_A = slope(lambda A: np.sum(grad_y * d * ((x @ A.T) @ B.T)), 0 * A)
    want_B = slope(lambda B: np.sum(grad_y * d * ((x @ A.T) @ B.T)), 0 * B)
    x, grad_y, W0, A, B = (np.abs(array) for array in (x, grad_y, W0, A, B))
    assert_close(got.grad_x, want_x, size=grad_y @ W0 + (grad_y @ B) @ A, what="grad_x")
    G = np.reshape(grad_y * weight, (-1, len(W0))).T @ np.reshape(x, (-1, W0.shape[1]))
    assert_close(got.grad_A, want_A, size=B.T @ G, what="grad_A")
    assert_close(got.grad_B, want_B, size=G @ A.T, what="grad_B")


@law(
    "allora.L3c",
    says="A batch gives what its summed gradient of the weight gives: rescaling the output's gradient is rescaling rows of G.",
    formula=r"G = \sum_t g_{y,t} x_t^\top",
    needs=("backward", "gradients"),
    tolerance=12,
    cases=layers(),
)
def test_backward_is_gradients(impl, case):
    flat_y, flat_x = np.reshape(case.grad_y, (-1, len(case.W0))), np.reshape(case.x, (-1, case.W0.shape[1]))
    got = impl.backward(grad_y=case.grad_y, x=case.x, W0=case.W0, A=case.A, B=case.B, eta=case.eta)
    G = sum(np.multiply.outer(g, x) for g, x in zip(flat_y, flat_x, strict=True))
    want = impl.gradients(G=G, A=case.A, B=case.B, eta=case.eta)
    _, size = _by_rows(np.abs(flat_y).T @ np.abs(flat_x), case.A, case.B, _d(case.A, case.B, case.eta))
    _assert_gradients(got[1:], want, size)


# Forward and merge: no scaling


@law(
    "allora.L4a",
    says="The output is the frozen layer's plus B A on the input, with no factor: nothing is scaled and nothing dropped.",
    formula=r"y = x W_0^\top + b + x A^\top B^\top",
    needs=("forward.bias",),
    tolerance=8,
    cases=layers(),
)
def test_forward(impl, case):
    delta, size = outer_sum(case.A, case.B)
    for bias in (case.bias, 0 * case.bias):
        given = {"bias": bias} if bias.any() else {}
        y = impl.forward(x=case.x, W0=case.W0, A=case.A, B=case.B, **given)
        assert_linear(y, case.x, case.W0 + delta, bias, size=np.abs(case.W0) + size)


@law(
    "allora.L4b",
    says="Forward and the gradient of the input are those of one dense layer with the merged weight.",
    formula=r"y = x W^\top, \quad \partial L / \partial x = g_y W, \quad W = \mathrm{merge}(W_0, A, B)",
    needs=("forward", "backward", "merge"),
    tolerance=8,
    cases=layers(),
)
def test_dense_layer(impl, case):
    factors = {"W0": case.W0, "A": case.A, "B": case.B}
    W, weights = impl.merge(**factors), np.abs(case.W0) + outer_sum(case.A, case.B)[1]
    assert_linear(impl.forward(x=case.x, **factors), case.x, W, size=weights)
    grad_x = impl.backward(grad_y=case.grad_y, x=case.x, eta=case.eta, **factors).grad_x
    assert_close(grad_x, case.grad_y @ W, size=np.abs(case.grad_y) @ weights, what="grad_x")


@law(
    "allora.L4c",
    says="The update is the sum of the outer products of B's columns and A's rows, and merging adds it to the pretrained weight.",
    formula=r"\Delta W = \sum_k B_{:k} A_{k:}, \quad W = W_0 + \Delta W",
    needs=("merge", "delta_weight"),
    tolerance=8,
    cases=layers(),
)
def test_merge(impl, case):
    delta, size = outer_sum(case.A, case.B)
    assert_close(impl.delta_weight(A=case.A, B=case.B), delta, size=size, what="Delta W")
    assert_close(impl.merge(W0=case.W0, A=case.A, B=case.B), case.W0 + delta, size=np.abs(case.W0) + size, what="W")


@law(
    "allora.L4d",
    says="Unmerging takes the update off any weight.",
    formula=r"W_0 = W - \sum_k B_{:k} A_{k:}",
    needs=("unmerge",),
    tolerance=8,
    cases=layers(),
)
def test_unmerge(impl, case):
    delta, size = outer_sum(case.A, case.B)
    assert_close(impl.unmerge(W=case.W0, A=case.A, B=case.B), case.W0 - delta, size=np.abs(case.W0) + size, what="W0")


# Invariances


class Gauged(NamedTuple):
    """Factors of one product, written in two bases."""

    A: np.ndarray
    B: np.ndarray
    M: np.ndarray  # (rank, rank)
    eta: float


@st.composite
def gauged(draw: st.DrawFn) -> Gauged:
    layer = draw(layers())
    return Gauged(layer.A, layer.B, Matrices(layer.seed + 1).invertible(layer.rank, draw(st.sampled_from([1.0, 4.0]))), layer.eta)


@law(
    "allora.L5",
    says="The factors belong to the product B A, not to the basis in which it is written.",
    formula=r"(A, B) \mapsto (M A, B M^{-1}) \;\Rightarrow\; d \mapsto d",
    needs=("row_scale",),
    tolerance=4,
    cases=gauged(),
)
def test_gauge(impl, case):
    A, B = case.M @ case.A, case.B @ np.linalg.inv(case.M)
    got, want = impl.row_scale(A=A, B=B, eta=case.eta), impl.row_scale(A=case.A, B=case.B, eta=case.eta)
    size = want * (_rough(case.A, case.B) + _rough(A, B))
    assert_close(got, want, size=size, conditioning=np.linalg.cond(case.M), what="d in another basis")


@law(
    "allora.L6a",
    says="A row of B's gradient depends on no other row of B.",
    formula=r"(g_B)_{i:} = f(G_{i:}, A, b_i)",
    needs=("gradients",),
    tolerance=8,
    cases=layers(),
)
def test_rows_are_independent(impl, case):
    got = impl.gradients(G=case.G, A=case.A, B=case.B, eta=case.eta).grad_B
    size = _by_rows(case.G, case.A, case.B, _d(case.A, case.B, case.eta))[1][1]
    for i in range(len(case.B)):
        other = case.B + 3.0 * (np.arange(len(case.B)) != i)[:, None]
        alone = impl.gradients(G=case.G, A=case.A, B=other, eta=case.eta).grad_B[i]
        assert_close(alone, got[i], size=size[i], what=f"row {i} of grad_B with other rows of B")


@law(
    "allora.L6b",
    says="Output channels in another order give B's gradient in that order, and the same for A.",
    formula=r"(G, B) \mapsto (P G, P B) \;\Rightarrow\; g_A \mapsto g_A,\; g_B \mapsto P g_B",
    needs=("gradients",),
    tolerance=8,
    cases=layers(),
)
def test_permuted_outputs(impl, case):
    order = Matrices(case.seed + 1).rng.permutation(len(case.B))
    plain = impl.gradients(G=case.G, A=case.A, B=case.B, eta=case.eta)
    got = impl.gradients(G=case.G[order], A=case.A, B=case.B[order], eta=case.eta)
    size_A, size_B = _by_rows(case.G, case.A, case.B, _d(case.A, case.B, case.eta))[1]
    _assert_gradients(got, (plain.grad_A, plain.grad_B[order]), (size_A, size_B[order]))


@law(
    "allora.L7a",
    says="While eta^2 times a row's length is small the row's factor is eta: it falls short by at most half that product.",
    formula=r"0 \le 1 - d_i / \eta \le \tfrac12 \eta^2 \|(BA)_{i:}\|",
    needs=("row_scale",),
    tolerance=8,
    cases=layers(),
)
def test_small_rows(impl, case):
    for shrink in (1.0, 2.0**-8, 2.0**-16):
        B = shrink * case.B
        short = 1 - impl.row_scale(A=case.A, B=B, eta=case.eta) / case.eta
        bound = case.eta**2 * _lengths(case.A, B) / 2
        assert_close(np.clip(short, 0, bound), short, size=_rough(case.A, case.B), what="1 - d / eta")


@law(
    "allora.L7b",
    says="For a long row the factor is the inverse root of its length, without eta.",
    formula=r"d_i \|(BA)_{i:}\|^{1/2} \to 1",
    needs=("row_scale",),
    tolerance=8,
    cases=layers(),
)
def test_long_rows(impl, case):
    # So long that what is left of eta is below the rounding of every precision
    B = 2.0**60 * np.where(case.B == 0, 1.0, case.B)
    lengths = _lengths(case.A, B)
    got = impl.row_scale(A=case.A, B=B, eta=case.eta) * np.sqrt(lengths)
    # (1 + 1 / (eta^2 length))^(-1/2)
    assert_close(got, np.exp(-0.5 * np.log1p(1 / (case.eta**2 * lengths))), size=_rough(case.A, B), what="d times the root of the length")


# Descent?


@law(
    "allora.L8a",
    says="B's part of a step goes downhill always: its slope is the sum over rows of the factor times the squared true gradient.",
    formula=r"\langle g_B, G A^\top \rangle = \sum_i d_i \|(G A^\top)_{i:}\|^2 \ge 0",
    needs=("gradients",),
    tolerance=12,
    cases=layers(),
)
def test_B_descends(impl, case):
    true = np.array([[np.dot(row, a) for a in case.A] for row in case.G])
    got = np.sum(impl.gradients(G=case.G, A=case.A, B=case.B, eta=case.eta).grad_B * true)
    weight = _d(case.A, case.B, case.eta)
    size = np.sum((weight * _rough(case.A, case.B))[:, None] * (np.abs(case.G) @ np.abs(case.A).T) ** 2)
    assert_close(got, sum(weight[i] * np.dot(true[i], true[i]) for i in range(len(true))), size=size, what="<grad_B, G A'>")


class Uphill(NamedTuple):
    """The example in which a step goes uphill, with its rows in some order and sign."""

    flip: bool
    sign: float


@law(
    "allora.L8b",
    says="A's part may go uphill, and the whole step with it: the long row, whose true gradient is large, is held back.",
    formula=r"A = 0.1,\; B = (1000, 100)^\top,\; G = (0.001, -0.009)^\top,\; \eta = 10",
    needs=("gradients",),
    tolerance=64,
    cases=st.builds(Uphill, flip=st.booleans(), sign=st.sampled_from([1.0, -1.0])),
    examples=4,
)
def test_step_may_go_uphill(impl, case):
    order = [1, 0] if case.flip else [0, 1]
    A, B, G = np.array([[0.1]]), np.array([[1000.0], [100.0]])[order], case.sign * np.array([[0.001], [-0.009]])[order]
    grad_A, grad_B = impl.gradients(G=G, A=A, B=B, eta=10.0)
    # Rows of length 100 and 10: 1000 * 0.001 / sqrt(100.01) - 100 * 0.009 / sqrt(10.01)
    want = case.sign * (1 / 100.01**0.5 - 0.9 / 10.01**0.5)
    assert want * case.sign < 0, "the example does not go uphill"
    assert_close(grad_A, [[want]], size=0.4, what="grad_A, against a true gradient of the other sign")
    along = np.sum(grad_A * (B.T @ G)) + np.sum(grad_B * (G @ A.T))
    rest = 1e-8 / 100.01**0.5 + 81e-8 / 10.01**0.5
    assert_close(along, 0.1 * case.sign * want + rest, size=0.04, what="<step, true gradient>")


# Steps


@law(
    "allora.L14",
    says="A step of gradient descent moves both factors along the rescaled gradients of the same G, taken at the old factors.",
    formula=r"A \mapsto A - \mu\, g_A, \quad B \mapsto B - \mu\, g_B",
    needs=("sgd_step",),
    tolerance=8,
    cases=layers(),
)
def test_sgd_step(impl, case):
    after = impl.sgd_step(G=case.G, A=case.A, B=case.B, eta=case.eta, lr=case.lr)
    (grad_A, grad_B), (size_A, size_B) = _by_rows(case.G, case.A, case.B, _d(case.A, case.B, case.eta))
    assert_close(after.A, case.A - case.lr * grad_A, size=np.abs(case.A) + case.lr * size_A, what="A")
    assert_close(after.B, case.B - case.lr * grad_B, size=np.abs(case.B) + case.lr * size_B, what="B")


class Adam(NamedTuple):
    """A layer in the middle of a training with AdamW, and gradients for further steps."""

    gradients: np.ndarray  # (steps, out, in)
    A: np.ndarray
    B: np.ndarray
    moment1_A: np.ndarray
    moment1_B: np.ndarray
    moment2_A: np.ndarray
    moment2_B: np.ndarray
    eta: float
    t: int
    lr: float
    beta1: float
    beta2: float
    adam_eps: float
    weight_decay: float


@st.composite
def adams(draw: st.DrawFn) -> Adam:
    layer = draw(layers(high=5))
    matrices = Matrices(layer.seed + 1)
    return Adam(
        gradients=matrices(2, *layer.G.shape),
        A=layer.A,
        B=layer.B,
        moment1_A=matrices(*layer.A.shape),
        moment1_B=matrices(*layer.B.shape),
        # Well above zero: Adam's quotient does not magnify rounding
        moment2_A=matrices.rng.uniform(0.25, 4, layer.A.shape),
        moment2_B=matrices.rng.uniform(0.25, 4, layer.B.shape),
        eta=layer.eta,
        t=draw(st.integers(1, 4)),
        lr=0.125,
        beta1=draw(st.sampled_from([0.75, 0.5])),
        beta2=draw(st.sampled_from([0.5, 0.875])),
        adam_eps=draw(st.sampled_from([0.5, 0.125])),
        weight_decay=draw(st.sampled_from([0.5, 1.5])),
    )


def _adamw(case, factors, moments, G, t, d_of, *, lr, beta1=0.9, beta2=0.999, adam_eps=1e-8, weight_decay=0.0):
    """One step of AdamW, entry by entry, with the gradients of rows that `d_of(A, B, eta)` rescales."""
    grads = _by_rows(G, *factors, d_of(*factors, case.eta))[0]
    new_factors, new_moments = [], []
    for factor, g, (m, v) in zip(factors, grads, moments, strict=True):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        move = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + adam_eps)
        new_factors.append(factor - lr * weight_decay * factor - lr * move)
        new_moments.append((m, v))
    return new_factors, new_moments


def _check_steps(impl, case, d_of, options, **given):
    factors = [case.A, case.B]
    moments = [(case.moment1_A, case.moment2_A), (case.moment1_B, case.moment2_B)]
    state = of(case, "A", "B", "moment1_A", "moment1_B", "moment2_A", "moment2_B")
    biggest = (
        4 * (1 + case.eta) * (1 + np.abs(case.gradients).max()) * (1 + np.abs(case.A).max() + np.abs(case.B).max()) * max(case.B.shape)
    )
    for i, G in enumerate(case.gradients):
        after = impl.step(G=G, eta=case.eta, t=case.t + i, **state, **options, **given)
        factors, moments = _adamw(case, factors, moments, G, case.t + i, d_of, **options)
        want = dict(zip(("A", "B"), factors, strict=True))
        for name, (m, v) in zip(("A", "B"), moments, strict=True):
            want |= {f"moment1_{name}": m, f"moment2_{name}": v}
        state = after._asdict()
        for name, value in want.items():
            size = biggest if "1" in name else biggest**2 if "2" in name else 1 + biggest * case.lr
            assert_close(state[name], value, size=size, what=f"{name} after {i + 1} steps")


@law(
    "allora.L9a",
    says="AdamW keeps its moments of the rescaled gradients: the factors d come first, not after Adam's division.",
    formula=r"m \mapsto \beta_1 m + (1 - \beta_1) g, \quad v \mapsto \beta_2 v + (1 - \beta_2) g^2, \quad g = (B^\top D G,\; D G A^\top)",
    needs=("step.beta1", "step.beta2", "step.adam_eps"),
    tolerance=8,
    cases=adams(),
)
def test_adamw(impl, case):
    _check_steps(impl, case, _d, of(case, "lr", "beta1", "beta2", "adam_eps"))


@law(
    "allora.L9c",
    says="Each factor decays by itself, beside Adam's step and not through its moments.",
    formula=r"A \mapsto (1 - \mu \lambda) A - \mu\, \hat m / (\sqrt{\hat v} + \epsilon)",
    needs=("step.weight_decay",),
    tolerance=8,
    cases=adams(),
)
def test_decay(impl, case):
    _check_steps(impl, case, _d, {"lr": case.lr, "weight_decay": case.weight_decay})


@law(
    "allora.L9d",
    says="Without options the step is AdamW's with the usual means and epsilon, and no decay.",
    formula=r"\beta_1 = 0.9,\; \beta_2 = 0.999,\; \epsilon = 10^{-8},\; \lambda = 0",
    needs=("step",),
    tolerance=8,
    cases=adams(),
)
def test_adamw_by_default(impl, case):
    _check_steps(impl, case, _d, {"lr": case.lr})


@law(
    "allora.L9b",
    says="AdamW's first step from B = 0 is the same for every eta: a factor that all rows share drops out.",
    formula=r"\epsilon \to 0,\; B = 0,\; t = 1 \;\Rightarrow\; B \mapsto -\mu\, \mathrm{sign}(G A^\top)",
    needs=("init", "init_state", "step"),
    tolerance=8,
    cases=layers(),
)
def test_first_step_of_adamw(impl, case):
    A, B = impl.init(W0=case.W0, rank=case.rank, generator=case.seed)
    for factors in ((case.A, 1 + case.B), (A, B)):
        state = impl.init_state(A=factors[0], B=factors[1])
        for moment in state:
            assert_close(moment, np.zeros_like(moment), size=0, what="a moment before the first step")
    true = case.G @ A.T
    # Elsewhere the sign of the sum is up to rounding
    clear = np.abs(true) > 1e-1 * np.abs(case.G) @ np.abs(A).T
    for eta in ETAS:
        after = impl.step(G=case.G, A=A, B=B, eta=eta, t=1, lr=case.lr, adam_eps=1e-30, **state._asdict())
        assert_close(after.A, A, size=0, what="A after the first step")
        got, want = np.where(clear, after.B, 0.0), -case.lr * np.sign(true) * clear
        assert_close(got, want, size=case.lr, what=f"B after the first step with eta = {eta}")


# Escape from zero


@law(
    "allora.L10a",
    says="With A and G fixed, descent from B = 0 keeps every row of B on a line, at the distance of a scalar recursion.",
    formula=r"b_i = -\beta_i G_{i:} A^\top,\; \beta_i \mapsto \beta_i + \mu (c_i \beta_i + \eta^{-2})^{-1/2},\; c_i = \|G_{i:} A^\top A\|",
    needs=("gradients",),
    tolerance=96,
    cases=layers(high=5),
)
def test_recursion_of_the_escape(impl, case):
    true = np.array([[np.dot(row, a) for a in case.A] for row in case.G])
    growth = np.array([np.linalg.norm(sum(t * a for t, a in zip(row, case.A, strict=True))) for row in true])
    B, beta, lr, steps = 0 * case.B, np.zeros(len(case.B)), case.lr / 8, 12
    for _ in range(steps):
        B = B - lr * impl.gradients(G=case.G, A=case.A, B=B, eta=case.eta).grad_B
        beta = beta + lr / np.sqrt(growth * beta + case.eta**-2)
    want = -beta[:, None] * true
    size = beta[:, None] * (np.abs(case.G) @ np.abs(case.A).T) * _rough(case.A, want)[:, None]
    assert_close(B, want, size=size, what=f"B after {steps} steps")


class Escape(NamedTuple):
    """Times at which the escape from zero is looked at."""

    time: np.ndarray
    growth: float
    eta: float


@st.composite
def escapes(draw: st.DrawFn) -> Escape:
    rng = Matrices(draw(seeds())).rng
    shape = draw(st.sampled_from([(1,), (4,), (2, 3)]))
    time = rng.uniform(0.25, 4, shape) * draw(st.sampled_from([1.0, 1e-2]))
    return Escape(time, draw(st.sampled_from([2.0, 0.5, 5.0])), draw(st.sampled_from((*ETAS, 16.0))))


def _time_to(beta, growth, floor):
    """How long gradient flow takes to beta: the integral of sqrt(growth b + floor) over b from 0 to beta, with b = beta u^3."""
    nodes, weights = np.polynomial.legendre.leggauss(80)
    u = (nodes + 1) / 2
    return np.sum(weights / 2 * np.sqrt(growth * beta[..., None] * u**3 + floor) * 3 * beta[..., None] * u**2, axis=-1)


@law(
    "allora.L10b",
    says="The escape from zero takes the time that the rescaled steps need: the integral of their inverse speed gives the time back.",
    formula=r"\dot\beta = (c \beta + \eta^{-2})^{-1/2}, \quad \beta(t) = \tfrac1c \big[ (\tfrac32 c t + \eta^{-3})^{2/3} - \eta^{-2} \big]",
    needs=("escape",),
    tolerance=32,
    cases=escapes(),
)
def test_escape(impl, case):
    beta = impl.escape(time=case.time, growth=case.growth, eta=case.eta)
    # The closed form as written subtracts eta^-2: what its rounding amounts to in time
    size = case.time + case.eta**-3 / case.growth
    assert_close(_time_to(beta, case.growth, case.eta**-2), case.time, size=size, what="time to beta(t)")
    start = impl.escape(time=np.zeros_like(case.time), growth=case.growth, eta=case.eta)
    assert_close(start, 0 * case.time, size=case.eta**-2 / case.growth, what="beta(0)")


@law(
    "allora.L10c",
    says="For an infinite eta the escape has a law of its own, without eta: the time to the power 2/3.",
    formula=r"\eta \to \infty: \quad \beta(t) = \tfrac1c (\tfrac32 c t)^{2/3}",
    needs=("escape",),
    tolerance=32,
    cases=escapes(),
)
def test_escape_without_a_bound(impl, case):
    beta = impl.escape(time=case.time, growth=case.growth, eta=np.inf)
    assert_close(_time_to(beta, case.growth, 0.0), case.time, size=case.time, what="time to beta(t)")


@law(
    "allora.L10d",
    says="Early the escape is eta times as fast as LoRA's, later slower: it is never ahead of either law.",
    formula=r"\beta(t) \le \min\big( \eta t,\; \tfrac1c (\tfrac32 c t)^{2/3} \big), \quad \beta(t) / (\eta t) \to 1",
    needs=("escape",),
    tolerance=16,
    cases=escapes(),
)
def test_early_and_late(impl, case):
    beta = impl.escape(time=case.time, growth=case.growth, eta=case.eta)
    bound = np.minimum(case.eta * case.time, (1.5 * case.growth * case.time) ** (2 / 3) / case.growth)
    assert_close(np.minimum(beta, bound), beta, size=bound + case.eta**-2 / case.growth, what="beta(t), at most its bounds")
    # At beta = eta t the speed has fallen by at most c eta^3 t / 2 of itself
    short = 1 - beta / (case.eta * case.time)
    size = 1 + 1 / (case.growth * case.eta**3 * case.time)
    assert_close(np.clip(short, 0, case.growth * case.eta**3 * case.time / 4), short, size=size, what="1 - beta(t) / (eta t)")


# Dropout, as LoRA has it


class Dropped(NamedTuple):
    """A sample, its target, and the dropout that LoRA would use."""

    x: np.ndarray  # (samples, in)
    target: np.ndarray  # (samples, out)
    W0: np.ndarray
    A: np.ndarray
    B: np.ndarray
    scaling: float
    p: float


@st.composite
def dropped(draw: st.DrawFn, high: int = 4) -> Dropped:
    out_features, in_features, samples = draw(sides(1, 4)), draw(sides(1, high)), draw(sides(1, 3))
    rank = draw(st.integers(1, min(out_features, in_features)))
    matrices = Matrices(draw(seeds()), draw(entries()))
    return Dropped(
        x=matrices(samples, in_features),
        target=matrices(samples, out_features),
        W0=matrices(out_features, in_features),
        A=matrices(rank, in_features),
        B=matrices(out_features, rank),
        scaling=draw(st.sampled_from([2.0, 0.5, 3.0])),
        p=draw(st.sampled_from([0.5, 0.25])),
    )


def _masks(count, p):
    """All masks of `count` entries and the probability of each."""
    masks = np.array(list(itertools.product([0.0, 1.0], repeat=count)))
    return masks, np.prod(np.where(masks == 1, 1 - p, p), axis=1)


@law(
    "allora.L11a",
    says="Dropout adds to the expected squared error a ridge penalty weighted by the inputs: enumerated over all masks.",
    formula=r"\mathbb E\|y - \hat y\|^2 = \|y - \hat y_{p=0}\|^2 + \tfrac{p}{1-p} s^2 \sum_{ij} x_j^2 (BA)_{ij}^2",
    needs=("dropout_penalty",),
    tolerance=16,
    cases=dropped(),
)
def test_dropout_penalty(impl, case):
    masks, chances = _masks(case.x.shape[1], case.p)
    delta = case.scaling * outer_sum(case.A, case.B)[0]
    got = impl.dropout_penalty(x=case.x, A=case.A, B=case.B, scaling=case.scaling, p=case.p)
    rest = case.target - case.x @ case.W0.T
    losses = np.array([np.sum((rest - (case.x * mask / (1 - case.p)) @ delta.T) ** 2, axis=1) for mask in masks])
    want = chances @ losses - np.sum((rest - case.x @ delta.T) ** 2, axis=1)
    size = np.sum((np.abs(rest) + np.abs(case.x) @ (case.scaling * outer_sum(case.A, case.B)[1]).T / (1 - case.p)) ** 2, axis=1)
    assert_close(got, want, size=size, what="what dropout adds")


@law(
    "allora.L11b",
    says="The penalty is a sum over the entries of B A, each squared and weighted by its squared input; at the start there is none.",
    formula=r"\tfrac{p}{1-p} s^2 \sum_{ij} x_j^2 (BA)_{ij}^2, \quad B = 0:\ 0",
    needs=("dropout_penalty",),
    tolerance=8,
    cases=dropped(high=6),
)
def test_penalty_entry_by_entry(impl, case):
    factor = case.p / (1 - case.p) * case.scaling**2
    options = {"x": case.x, "A": case.A, "scaling": case.scaling}
    delta, size = (factor * case.x**2 @ (entry**2).sum(axis=0) for entry in outer_sum(case.A, case.B))
    assert_close(impl.dropout_penalty(B=case.B, p=case.p, **options), delta, size=size, what="what dropout adds")
    assert_close(impl.dropout_penalty(B=0 * case.B, p=case.p, **options), 0 * delta, size=0, what="what dropout adds at B = 0")


# The ablation family


@law(
    "allora.L13a",
    says="Of kind `matrix`: all rows share one factor, from the Frobenius norm of B A.",
    formula=r"d = \big( \|BA\|_F + \eta^{-2} \big)^{-1/2}",
    needs=("gradients.kind", "backward.kind"),
    tolerance=16,
    cases=layers(),
)
def test_kind_matrix(impl, case):
    d = _matrix_d(case.A, case.B, case.eta)
    want, size = _by_rows(case.G, case.A, case.B, d)
    size = [part * _rough(case.A, case.B).max() for part in size]
    _assert_gradients(impl.gradients(G=case.G, A=case.A, B=case.B, eta=case.eta, kind="matrix"), want, size)
    got = impl.backward(grad_y=case.grad_y, x=case.x, W0=case.W0, A=case.A, B=case.B, eta=case.eta, kind="matrix")
    _check_backward(got, case, d, d * _rough(case.A, case.B).max())


@law(
    "allora.L13b",
    says="Of kind `element`: every entry of G has its own factor, from the entry of B A.",
    formula=r"\tilde G_{ij} = G_{ij} \big( |(BA)_{ij}| + \eta^{-2} \big)^{-1/2}",
    needs=("gradients.kind", "backward.kind"),
    tolerance=12,
    cases=layers(),
)
def test_kind_element(impl, case):
    d = _element_d(case.A, case.B, case.eta)
    # Rounding of an entry, relative to itself and 1 / eta^2
    weight = d * (1 + outer_sum(case.A, case.B)[1] * d**2)
    flat_y, flat_x = np.reshape(case.grad_y, (-1, len(case.W0))), np.reshape(case.x, (-1, case.W0.shape[1]))
    sums = [np.multiply.outer(g, x) for g, x in zip(flat_y, flat_x, strict=True)]
    factors = {"A": case.A, "B": case.B, "eta": case.eta, "kind": "element"}
    batch = impl.backward(grad_y=case.grad_y, x=case.x, W0=case.W0, **factors)
    for got, G, size in (
        (impl.gradients(G=case.G, **factors), case.G, np.abs(case.G)),
        (batch[1:], np.sum(sums, axis=0), np.sum(np.abs(sums), axis=0)),
    ):
        want = ([[np.sum(b * column) for column in (d * G).T] for b in case.B.T], [[np.sum(row * a) for a in case.A] for row in d * G])
        size = (np.abs(case.B).T @ (weight * size), (weight * size) @ np.abs(case.A).T)
        _assert_gradients(got, [np.array(part) for part in want], size)


@law(
    "allora.L13c",
    says="Of kind `output`: every sample and channel has its own factor, from what the adapter adds to that output.",
    formula=r"\tilde g_{y,ti} = g_{y,ti} \big( |(BA x_t)_i| + \eta^{-2} \big)^{-1/2}",
    needs=("backward.kind",),
    tolerance=12,
    cases=layers(high=5),
)
def test_kind_output(impl, case):
    delta, size = outer_sum(case.A, case.B)
    d = 1 / np.sqrt(np.abs(case.x @ delta.T) + case.eta**-2)
    got = impl.backward(grad_y=case.grad_y, x=case.x, W0=case.W0, A=case.A, B=case.B, eta=case.eta, kind="output")
    _check_backward(got, case, d, d * (1 + (np.abs(case.x) @ size.T) * d**2))


@law(
    "allora.L13d",
    says="Of kind `none`: LoRA's gradients with s = 1, without eta.",
    formula=r"g_A = B^\top G, \quad g_B = G A^\top",
    needs=("gradients.kind", "backward.kind"),
    tolerance=8,
    cases=layers(),
)
def test_kind_none(impl, case):
    want, size = _by_rows(case.G, case.A, case.B, np.ones(len(case.B)))
    _assert_gradients(impl.gradients(G=case.G, A=case.A, B=case.B, eta=case.eta, kind="none"), want, size)
    got = impl.backward(grad_y=case.grad_y, x=case.x, W0=case.W0, A=case.A, B=case.B, eta=case.eta, kind="none")
    _check_backward(got, case, np.ones(len(case.B)), _rough(case.A, case.B))


@law(
    "allora.L13e",
    says="The kinds meet where they must: for one output, for one input, and for a sample that is a unit vector.",
    formula=r"m = 1: \text{matrix} = \text{row}; \; n = 1: \text{element} = \text{row}; \; x = e_j: \text{output} = \text{element}",
    needs=("gradients.kind", "backward.kind"),
    tolerance=24,
    cases=layers(),
)
def test_where_the_kinds_meet(impl, case):
    weight = _rough(case.A, case.B).max()
    G, A, B = case.G, case.A, case.B
    lone = {"G": G[:1], "A": A[:1], "B": B[-1:, :1], "eta": case.eta}
    size = _by_rows(lone["G"], lone["A"], lone["B"], _d(lone["A"], lone["B"], case.eta))[1]
    _assert_gradients(impl.gradients(kind="matrix", **lone), impl.gradients(kind="row", **lone), size)
    # One column of A, of rank 1, which cannot cancel
    lone = {"G": G[:, :1], "A": 1 + np.abs(A[:1, :1]), "B": B[:, :1], "eta": case.eta}
    size = _by_rows(lone["G"], lone["A"], lone["B"], _d(lone["A"], lone["B"], case.eta))[1]
    _assert_gradients(impl.gradients(kind="element", **lone), impl.gradients(**lone), size)
    grad_y = np.reshape(case.grad_y, (-1, len(B)))[:1]
    for unit in np.eye(A.shape[1]):
        lone = {"grad_y": grad_y, "x": unit[None], "W0": case.W0, "A": A, "B": B, "eta": case.eta}
        size = _by_rows(np.multiply.outer(grad_y[0], unit), A, B, np.full(len(B), case.eta * weight * (1 + case.eta**2)))[1]
        one, other = (impl.backward(kind=kind, **lone) for kind in ("output", "element"))
        _assert_gradients(one[1:], other[1:], size)


@law(
    "allora.L13f",
    says="Steps take the kind too.",
    formula=r"g = g(\text{kind})",
    needs=("sgd_step.kind", "step.kind"),
    tolerance=16,
    cases=adams(),
)
def test_steps_of_a_kind(impl, case):
    options = of(case, "lr", "beta1", "beta2", "adam_eps", "weight_decay")
    for kind, d_of in (("matrix", _matrix_d), ("none", lambda A, B, eta: np.ones(len(B)))):
        _check_steps(impl, case, d_of, options, kind=kind)
        after = impl.sgd_step(G=case.gradients[0], A=case.A, B=case.B, eta=case.eta, lr=case.lr, kind=kind)
        grads, size = _by_rows(case.gradients[0], case.A, case.B, d_of(case.A, case.B, case.eta))
        weight = case.lr * _rough(case.A, case.B).max()
        for name, old, grad, scale in zip(("A", "B"), (case.A, case.B), grads, size, strict=True):
            assert_close(getattr(after, name), old - case.lr * grad, size=np.abs(old) + weight * scale, what=name)


# The start, and counting


class Start(NamedTuple):
    """A weight to start on."""

    W0: np.ndarray
    rank: int
    seed: int


@st.composite
def starts(draw: st.DrawFn) -> Start:
    seed = draw(seeds())
    return Start(Matrices(seed)(draw(st.integers(20, 24)), draw(st.integers(40, 44))), draw(st.integers(16, 20)), seed)


@law(
    "allora.L16a",
    says="Training starts at B = 0 with A drawn as LoRA's: uniform within 1/sqrt(in), of mean square 1/(3 in); a seed repeats it.",
    formula=r"B = 0, \quad A_{ij} \sim \mathcal U(-n^{-1/2}, n^{-1/2})",
    needs=("init",),
    tolerance=2,
    cases=starts(),
    examples=5,
)
def test_start(impl, case):
    A, B = assert_seeded(lambda seed: impl.init(W0=case.W0, rank=case.rank, generator=seed), case.seed, "A")
    assert_close(B, np.zeros((len(case.W0), case.rank)), size=0, what="B at the start")
    assert_uniform(A, 1 / np.sqrt(A.shape[1]), "A")


@law(
    "allora.L16b",
    says="With the distribution `gaussian` A is normal of variance 1/rank, as a third-party layer draws it.",
    formula=r"A_{ij} \sim \mathcal N(0, 1/r)",
    needs=("init.distribution",),
    tolerance=0,
    cases=starts(),
    examples=5,
)
def test_gaussian_start(impl, case):
    options = {"W0": case.W0, "rank": case.rank, "distribution": "gaussian"}
    A, B = assert_seeded(lambda seed: impl.init(generator=seed, **options), case.seed, "A")
    assert_close(B, np.zeros((len(case.W0), case.rank)), size=0, what="B at the start")
    assert_normal(A, 1 / np.sqrt(case.rank), "A")


@law(
    "allora.L15",
    says="Just the entries of the two factors are trained.",
    formula=r"r (m + n)",
    needs=("num_trainable",),
    tolerance=0,
    cases=layers(),
)
def test_parameter_count(impl, case):
    want = case.A.size + case.B.size
    assert_close(impl.num_trainable(W0=case.W0, rank=case.rank), want, size=0, what="number of trainable parameters")


# Theorem checks: the mathematics itself


@theorem(
    "allora.T1",
    says="Through any smooth loss: the layer whose adapter signal is multiplied by d, held fixed, has ALLoRA's gradients.",
    formula=r"\nabla_{A,B} L\big( W_0 + (BA)_0 + \mathrm{diag}(d) (BA - (BA)_0) \big) = (B^\top D G,\; D G A^\top)",
    tolerance=1e7,  # central differences with step 1e-4: h^2 plus eps / h, about 1e-8
    cases=layers(high=5),
)
def test_surrogate(case):
    matrices, (m, n) = Matrices(case.seed + 3), case.G.shape
    problem = LogisticRegression(matrices(9, n), np.sign(matrices(9, m)))
    A, B, d = case.A, case.B, _d(case.A, case.B, case.eta)
    held = case.W0 + B @ A

    def loss(A, B):
        return problem.loss(held + d[:, None] * (B @ A - case.B @ case.A))

    want, _ = _by_rows(problem.grad(held), A, B, d)
    largest = (1 + np.abs(problem.X).max() * case.eta * (np.abs(A).max() + np.abs(B).max())) ** 3
    assert_close(slope(lambda A: loss(A, case.B), A, step=1e-4), want[0], size=largest, what="grad_A")
    assert_close(slope(lambda B: loss(case.A, B), B, step=1e-4), want[1], size=largest, what="grad_B")


@theorem(
    "allora.T2",
    says="B's gradient can be rescaled after back-propagation; A's cannot: gradients that give it the same true one give it others.",
    formula=r"N^\top B = 0 \;\Rightarrow\; B^\top (G + N) = B^\top G, \quad B^\top D (G + N) \ne B^\top D G",
    tolerance=64,
    cases=layers(low=3),
)
def test_A_cannot_be_rescaled_afterwards(case):
    rank = min(case.rank, 2)
    # A column of B that is not an eigenvector of D, and what is orthogonal to it
    B = np.sign(case.B[:, :rank] + 0.5) * (1 + np.arange(len(case.B)))[:, None]
    A, outside = case.A[:rank], np.linalg.svd(B)[0][:, rank:]
    d = _d(A, B, case.eta)
    N = outside @ Matrices(case.seed + 1)(outside.shape[1], case.G.shape[1])
    if np.linalg.norm(outside.T @ (d[:, None] * B)) < 1e-3:
        return  # d happens to be constant on B's columns
    assert_close(B.T @ (case.G + N), B.T @ case.G, size=np.linalg.norm(B) * np.linalg.norm(N), what="true gradient of A")
    moved = (d[:, None] * B).T @ N
    assert np.linalg.norm(moved) > 1e-9, "the rescaled gradient of A is the same"


class Plane(NamedTuple):
    """One output, two inputs, rank 1."""

    a: np.ndarray
    b: np.ndarray
    G: np.ndarray
    eta: float


@st.composite
def planes(draw: st.DrawFn) -> Plane:
    rng = Matrices(draw(seeds())).rng
    angle, turn = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 2.5)  # G is never parallel to a
    a, G = (np.array([np.cos(t), np.sin(t)]) for t in (angle, angle + turn))
    return Plane(rng.uniform(0.5, 2) * a, rng.uniform(0.5, 2, 1), rng.uniform(0.5, 2) * G, draw(st.sampled_from(ETAS)))


@theorem(
    "allora.T3",
    says="The rescaled gradients are in general the gradient of no function: their Jacobian is not symmetric, even where G is constant.",
    formula=r"\partial_b g_a - \partial_a g_b = b\, d' \big( \|a\| G - \tfrac{G \cdot a}{\|a\|} a \big), \quad d' = -\tfrac12 d^3",
    tolerance=1e7,  # central differences with step 1e-5
    cases=planes(),
)
def test_no_potential(case):
    a, b, G, length = case.a, case.b, case.G, np.linalg.norm(case.a)

    def d(a, b):
        return (np.abs(b[0]) * np.linalg.norm(a) + case.eta**-2) ** -0.5

    by_b = slope(lambda b: d(a, b) * b[0], b, step=1e-5)[0] * G
    by_a = slope(lambda a: d(a, b) * np.dot(G, a), a, step=1e-5)
    want = -0.5 * d(a, b) ** 3 * b[0] * (length * G - np.dot(G, a) / length * a)
    assert np.linalg.norm(want) > 1e-4, "the Jacobian is symmetric"
    assert_close(by_b - by_a, want, size=(1 + case.eta) ** 3, what="how far the Jacobian is from symmetric")


@theorem(
    "allora.T4",
    says="Steps of gradient descent follow the law of the escape: ahead of it, by at most a step times the fall of the speed.",
    formula=r"0 \le \beta_k - \beta(k \mu) \le \mu \big( \dot\beta(0) - \dot\beta(k \mu) \big), \quad \mu c\, \eta^3 \le 2",
    tolerance=64,
    cases=escapes(),
)
def test_descent_follows_the_escape(case):
    c, eta = case.growth, case.eta
    lr, beta = min(0.02, 2 / (c * eta**3)), 0.0
    for k in range(1, 101):
        beta += lr / np.sqrt(c * beta + eta**-2)
        exact = ((1.5 * c * lr * k + eta**-3) ** (2 / 3) - eta**-2) / c
        bound = lr * (eta - (c * exact + eta**-2) ** -0.5)
        assert_close(np.clip(beta - exact, 0, bound), beta - exact, size=beta + eta**-2 / c, what=f"beta after {k} steps, less the law")


@theorem(
    "allora.T5",
    says="The gradient averaged over T dropout masks still has a T-th of one mask's variance: enumerated over all pairs of masks.",
    formula=r"\mathrm{Var}\big[ \tfrac1T \sum_{t=1}^T g(\mathrm{mask}_t) \big] = \tfrac1T \mathrm{Var}[g(\mathrm{mask})], \quad T = 2",
    tolerance=64,
    cases=dropped(high=3),
)
def test_dropout_averages_out_slowly(case):
    masks, chances = _masks(case.x.shape[1], case.p)

    def gradient(mask):  # of B, for half the squared error
        kept = case.x * mask / (1 - case.p)
        rest = case.x @ case.W0.T + case.scaling * kept @ case.A.T @ case.B.T - case.target
        return case.scaling * rest.T @ (kept @ case.A.T)

    single = np.array([gradient(mask) for mask in masks])
    mean = np.einsum("k,kij->ij", chances, single)
    variance = np.einsum("k,kij->ij", chances, (single - mean) ** 2)
    averages = (single[:, None] + single[None]) / 2
    pairs = np.einsum("k,l,klij->ij", chances, chances, (averages - mean) ** 2)
    assert_close(pairs, variance / 2, size=1 + np.abs(single).max() ** 2, what="variance of the average over two masks")


class Deep(NamedTuple):
    """The layers of a linear network and their updates."""

    W: np.ndarray  # (layers, side, side)
    D: np.ndarray
    scaling: float


@st.composite
def deep(draw: st.DrawFn) -> Deep:
    matrices, depth, side = Matrices(draw(seeds())), draw(st.integers(2, 4)), draw(st.integers(1, 3))
    return Deep(matrices(depth, side, side), matrices(depth, side, side), draw(st.sampled_from([2.0, 0.5, 4.0])))


@theorem(
    "allora.T6",
    says="In a linear network a scaling on every update makes interactions of k layers carry its k-th power.",
    formula=r"\prod_l (W_l + s D_l) = \sum_{S \subseteq \{1..L\}} s^{|S|} \prod_l (D_l \text{ if } l \in S \text{ else } W_l)",
    tolerance=64,
    cases=deep(),
)
def test_scaling_and_depth(case):
    whole, want, size = np.eye(case.W.shape[1]), 0.0, 0.0
    for W, D in zip(case.W, case.D, strict=True):
        whole = (W + case.scaling * D) @ whole
    for chosen in itertools.product([False, True], repeat=len(case.W)):
        term, large = np.eye(case.W.shape[1]), np.eye(case.W.shape[1])
        for W, D, is_in in zip(case.W, case.D, chosen, strict=True):
            term, large = (D if is_in else W) @ term, np.abs(D if is_in else W) @ large
        want, size = want + case.scaling ** sum(chosen) * term, size + case.scaling ** sum(chosen) * large
    assert_close(whole, want, size=size, what="the network")
