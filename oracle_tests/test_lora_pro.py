# mypy: ignore-errors
"""The laws of LoRA-Pro. Expected values are NumPy float64; none comes from an implementation under test.

The roads: least squares over all pairs at once, projectors from singular vectors, pseudo-inverses, and the Sylvester equation as
one linear system. Entries of G, A and B are multiples of powers of two with few digits, so that back-propagation's gradients
s B'G and s GA', which the implementation is given, exist exactly in single precision.
"""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from loracle.oracle_tests.law import assert_close, law, of, theorem
from loracle.oracle_tests.problems import LogisticRegression
from loracle.oracle_tests.strategies import Matrices, entries, scalings, seeds

NAMED = ("sylvester", "zero", "symmetry")


class Pull(NamedTuple):
    """A layer, the gradient of its weight, and what may be chosen."""

    G: np.ndarray  # (out, in)
    W0: np.ndarray  # (out, in)
    A: np.ndarray  # (rank, in)
    B: np.ndarray  # (out, rank)
    X: np.ndarray  # (rank, rank)
    M: np.ndarray  # (rank, rank), invertible
    scaling: float
    lr: float
    seed: int


def _grid(array, unit=0.0625):
    """The nearest array of multiples of a unit."""
    return np.rint(array / unit) * unit


def _of_full_rank(matrices, rows, columns):
    """A matrix whose singular values lie between about 0.4 and 2, or are 1, 2, ..."""
    if matrices.entries != "normal":
        return matrices.separated(rows, columns)
    return _grid(matrices.with_spectrum(rows, columns, matrices.rng.uniform(0.6, 2.0, min(rows, columns))))


@st.composite
def pulls(draw: st.DrawFn, beyond: tuple[int, ...] = (1, 2, 3), ranks: tuple[int, ...] = (1, 2, 3)) -> Pull:
    """`beyond`: by how much the smaller of out and in exceeds the rank."""
    rank = draw(st.sampled_from(ranks))
    smaller = rank + draw(st.sampled_from(beyond))
    larger = smaller + draw(st.sampled_from((1, 0, 2)))
    m, n = (smaller, larger) if draw(st.booleans()) else (larger, smaller)
    seed = draw(seeds())
    matrices = Matrices(seed, draw(entries()))
    return Pull(
        G=_grid(matrices(m, n), 0.125),
        W0=_grid(matrices(m, n), 0.125),
        A=_of_full_rank(matrices, rank, n),
        B=_of_full_rank(matrices, m, rank),
        X=_grid(matrices(rank, rank), 0.125),
        M=np.tril(matrices.rng.integers(-1, 2, (rank, rank)), -1) + np.diag(matrices.rng.choice([2.0, -1.0, 0.5], rank)),
        scaling=draw(scalings()),
        lr=draw(st.sampled_from([0.5, 0.125])),
        seed=seed,
    )


@st.composite
def orthonormal_pulls(draw: st.DrawFn) -> Pull:
    pull = draw(pulls())
    matrices, (m, n), rank = Matrices(pull.seed + 1), pull.G.shape, len(pull.A)
    return pull._replace(A=matrices.orthonormal(n, rank).T, B=matrices.orthonormal(m, rank))


def _back_propagated(G, A, B, scaling):
    """LoRA's own gradients of the factors."""
    return {"grad_A": scaling * B.T @ G, "grad_B": scaling * G @ A.T}


def _equivalent(grad_A, grad_B, A, B, scaling):
    """The direction in which the weight moves, to first order."""
    return scaling * (B @ grad_A + grad_B @ A)


def _projectors(A, B):
    """Orthogonal projectors on B's columns and A's rows, by singular vectors; values below a millionth are rounding."""
    found = []
    for columns in (B, A.T):
        U, values, _ = np.linalg.svd(columns, full_matrices=False)
        U = U[:, values > 1e-6 * values.max(initial=0.0)]
        found.append(U @ U.T)
    return found


def _nearest(G, A, B):
    """The equivalent gradient that is nearest to G."""
    P_B, P_A = _projectors(A, B)
    return G - (G - P_B @ G) @ (np.eye(len(P_A)) - P_A)


def _free_matrix(G, A, B, scaling, X):
    """The matrix that a name stands for: the Sylvester equation as one linear system, or halves of what both factors can do."""
    if not isinstance(X, str):
        return X
    r = len(A)
    if X == "sylvester":
        right = -np.linalg.pinv(B) @ G @ A.T / scaling
        both = np.kron(B.T @ B, np.eye(r)) + np.kron(np.eye(r), A @ A.T)
        return np.linalg.solve(both, right.ravel()).reshape(r, r)
    return -np.linalg.pinv(B) @ G @ np.linalg.pinv(A) / (2 * scaling) if X == "symmetry" else np.zeros((r, r))


def _pair(G, A, B, scaling, X="zero"):
    """The optimal pair: pseudo-inverses from singular values, and the free matrix."""
    P_B, _ = _projectors(A, B)
    X = _free_matrix(G, A, B, scaling, X)
    return np.linalg.pinv(B) @ G / scaling + X @ A, (G - P_B @ G) @ np.linalg.pinv(A) / scaling - B @ X


def _conditioning(*factors):
    """By how much inverting the Gram matrix of a factor magnifies errors: the square of its condition, on its range."""
    worst = 1.0
    for factor in factors:
        values = np.linalg.svd(factor, compute_uv=False)
        kept = values[values > 1e-6 * values.max(initial=0.0)]
        worst = max(worst, (kept.max(initial=1.0) / kept.min(initial=kept.max(initial=1.0))) ** 2)
    return worst


def _smallest(factor):
    """The smallest singular value."""
    return np.linalg.svd(factor, compute_uv=False).min()


def _pair_size(G, A, B, scaling, X):
    """What the rounding errors of a pair are relative to."""
    size = np.linalg.norm(G) / scaling
    return size / _smallest(B) + size / _smallest(A) + np.linalg.norm(X) * (np.linalg.norm(A) + np.linalg.norm(B))


def _as_option(X):
    """The option as a law passes it."""
    return {} if isinstance(X, str) and X == "sylvester" else {"X": X}


# The equivalent gradient


class Move(NamedTuple):
    """Factors, and a move of each."""

    grad_A: np.ndarray
    grad_B: np.ndarray
    A: np.ndarray
    B: np.ndarray
    scaling: float


@st.composite
def moves(draw: st.DrawFn) -> Move:
    m, n, rank = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    matrices = Matrices(draw(seeds()), draw(entries()))
    return Move(matrices(rank, n), matrices(m, rank), matrices(rank, n), matrices(m, rank), draw(scalings()))


@law(
    "lora_pro.L1a",
    says="The equivalent gradient is the slope of the weight along a move of both factors.",
    formula=r"\tilde g = \tfrac12 \big[ s (B + g^B)(A + g^A) - s (B - g^B)(A - g^A) \big]",
    needs=("equivalent_gradient",),
    tolerance=20,
    cases=moves(),
)
def test_slope_of_the_weight(impl, case):
    got = impl.equivalent_gradient(grad_A=case.grad_A, grad_B=case.grad_B, A=case.A, B=case.B, scaling=case.scaling)
    # The weight is a quadratic function of the step, so that the central difference of any step is its slope
    forward, backward = ((case.B + e * case.grad_B) @ (case.A + e * case.grad_A) for e in (1.0, -1.0))
    size = case.scaling * (np.abs(case.B) @ np.abs(case.grad_A) + np.abs(case.grad_B) @ np.abs(case.A))
    assert_close(got, case.scaling * (forward - backward) / 2, size=size, what="the equivalent gradient")


@law(
    "lora_pro.L1b",
    says="Along back-propagation's own gradients the weight moves downhill by the squares of their lengths.",
    formula=r"\langle \tilde g_{lora}, G \rangle = \|g^A_{lora}\|^2 + \|g^B_{lora}\|^2",
    needs=("equivalent_gradient",),
    tolerance=4,
    cases=orthonormal_pulls(),
)
def test_slope_of_the_loss(impl, case):
    plain = _back_propagated(case.G, case.A, case.B, case.scaling)
    got = impl.equivalent_gradient(A=case.A, B=case.B, scaling=case.scaling, **plain)
    want = sum(np.sum(grad**2) for grad in plain.values())
    assert_close(np.sum(got * case.G), want, size=np.linalg.norm(want) + np.linalg.norm(got) * np.linalg.norm(case.G), what="the slope")


# Theorem 1: the nearest equivalent gradient


@law(
    "lora_pro.L2",
    says="No pair of moves has an equivalent gradient nearer to the gradient: it is the least-squares fit over all pairs.",
    formula=r"\tilde g^* = \arg\min \|s B g^A + s g^B A - G\|_F^2",
    needs=("optimal_gradients.X",),
    tolerance=36,
    cases=pulls(),
)
def test_least_squares(impl, case):
    m, n = case.G.shape
    columns = case.scaling * np.hstack([np.kron(case.B, np.eye(n)), np.kron(np.eye(m), case.A.T)])
    # The system has a null space of rank^2 dimensions, which the usual cut-off may miss
    best = (columns @ np.linalg.lstsq(columns, case.G.ravel(), rcond=1e-10)[0]).reshape(m, n)
    plain, conditioning = _back_propagated(case.G, case.A, case.B, case.scaling), _conditioning(case.A, case.B)
    for X in (*NAMED, case.X):
        pair = impl.optimal_gradients(A=case.A, B=case.B, scaling=case.scaling, X=X, **plain)
        got = _equivalent(*pair, case.A, case.B, case.scaling)
        size = np.linalg.norm(case.G) + case.scaling * np.linalg.norm(_free_matrix(case.G, case.A, case.B, case.scaling, X))
        assert_close(got, best, size=size, conditioning=conditioning, what="the equivalent gradient")


@law(
    "lora_pro.L3a",
    says="The nearest equivalent gradient is the gradient less its part outside of B's columns and A's rows.",
    formula=r"\tilde g^* = G - (I - P_B)\, G\, (I - P_A)",
    needs=("projected_gradient",),
    tolerance=6,
    cases=pulls(),
)
def test_projection(impl, case):
    got = impl.projected_gradient(G=case.G, A=case.A, B=case.B)
    want, size = _nearest(case.G, case.A, case.B), np.linalg.norm(case.G)
    assert_close(got, want, size=size, conditioning=_conditioning(case.A, case.B), what="the projected gradient")


@law(
    "lora_pro.L3b",
    says="The pair for each X: pseudo-inverses of the factors applied to the gradient, plus X A and minus B X.",
    formula=r"g^A = \tfrac1s B^+ G + X A, \quad g^B = \tfrac1s (I - P_B)\, G\, A^+ - B X",
    needs=("optimal_gradients.X",),
    tolerance=4,
    cases=pulls(),
)
def test_pair(impl, case):
    plain = _back_propagated(case.G, case.A, case.B, case.scaling)
    for X in (*NAMED, case.X):
        pair = impl.optimal_gradients(A=case.A, B=case.B, scaling=case.scaling, X=X, **plain)
        want_A, want_B = _pair(case.G, case.A, case.B, case.scaling, X)
        size = _pair_size(case.G, case.A, case.B, case.scaling, _free_matrix(case.G, case.A, case.B, case.scaling, X))
        conditioning = _conditioning(case.A, case.B)
        assert_close(pair.grad_A, want_A, size=size, conditioning=conditioning, what="the adjusted gradient of A")
        assert_close(pair.grad_B, want_B, size=size, conditioning=conditioning, what="the adjusted gradient of B")


@law(
    "lora_pro.L4",
    says="What is missed of the gradient is orthogonal to B's columns and to A's rows.",
    formula=r"B^\top (G - \tilde g^*) = 0, \quad (G - \tilde g^*) A^\top = 0",
    needs=("optimal_gradients", "projected_gradient"),
    tolerance=3,
    cases=pulls(),
)
def test_residual(impl, case):
    plain = _back_propagated(case.G, case.A, case.B, case.scaling)
    pair = impl.optimal_gradients(A=case.A, B=case.B, scaling=case.scaling, **plain)
    size, conditioning = np.linalg.norm(case.G), _conditioning(case.A, case.B)
    for got in (_equivalent(*pair, case.A, case.B, case.scaling), impl.projected_gradient(G=case.G, A=case.A, B=case.B)):
        left, right = case.B.T @ (case.G - got), (case.G - got) @ case.A.T
        assert_close(left, 0 * left, size=size * np.linalg.norm(case.B), conditioning=conditioning, what="what is missed, seen by B")
        assert_close(right, 0 * right, size=size * np.linalg.norm(case.A), conditioning=conditioning, what="what is missed, seen by A")


@law(
    "lora_pro.L5",
    says="Along the adjusted pair the loss falls, for every X, by the square of the projected gradient (Theorem 2).",
    formula=r"\langle g^A, g^A_{lora} \rangle + \langle g^B, g^B_{lora} \rangle = \|\tilde g^*\|_F^2",
    needs=("optimal_gradients.X",),
    tolerance=11,
    cases=pulls(),
)
def test_decrease(impl, case):
    plain = _back_propagated(case.G, case.A, case.B, case.scaling)
    want, conditioning = np.sum(_nearest(case.G, case.A, case.B) ** 2), _conditioning(case.A, case.B)
    for X in (*NAMED, case.X):
        pair = impl.optimal_gradients(A=case.A, B=case.B, scaling=case.scaling, X=X, **plain)
        got = np.sum(pair.grad_A * plain["grad_A"]) + np.sum(pair.grad_B * plain["grad_B"])
        chosen = np.linalg.norm(_free_matrix(case.G, case.A, case.B, case.scaling, X))
        size = np.sum(case.G**2) + case.scaling * chosen * np.linalg.norm(case.G) * np.linalg.norm(case.A) * np.linalg.norm(case.B)
        assert_close(got, want, size=size, conditioning=conditioning, what="the slope of the loss")


# Theorem 3: the free matrix


def _distance_system(A, B):
    """The linear map X -> (X A, -B X), by rows."""
    r = len(A)
    return np.vstack([np.kron(np.eye(r), A.T), -np.kron(B, np.eye(r))])


def _apart(plain, best):
    """By how much back-propagation's gradients differ from a pair, by rows."""
    return np.concatenate([(plain["grad_A"] - best[0]).ravel(), (plain["grad_B"] - best[1]).ravel()])


@law(
    "lora_pro.L6a",
    says="The Sylvester equation's X brings the pair nearest to back-propagation's: it is the least-squares fit over all X.",
    formula=r"X = \arg\min \|g^A - g^A_{lora}\|_F^2 + \|g^B - g^B_{lora}\|_F^2",
    needs=("sylvester_X",),
    tolerance=14,
    cases=pulls(),
)
def test_nearest_to_plain(impl, case):
    plain = _back_propagated(case.G, case.A, case.B, case.scaling)
    X = impl.sylvester_X(grad_A=plain["grad_A"], A=case.A, B=case.B, scaling=case.scaling)
    apart = _apart(plain, _pair(case.G, case.A, case.B, case.scaling))
    best = np.linalg.lstsq(_distance_system(case.A, case.B), apart, rcond=1e-10)[0].reshape(X.shape)
    size = np.linalg.norm(apart) / min(_smallest(case.A), _smallest(case.B))
    assert_close(X, best, size=size, conditioning=_conditioning(case.A, case.B), what="X")


@law(
    "lora_pro.L6b",
    says="X solves the Sylvester equation.",
    formula=r"B^\top B X + X A A^\top = -\tfrac{1}{s^2} (B^\top B)^{-1} g^A_{lora} A^\top",
    needs=("sylvester_X",),
    tolerance=3,
    cases=pulls(),
)
def test_sylvester_equation(impl, case):
    plain = _back_propagated(case.G, case.A, case.B, case.scaling)
    X = impl.sylvester_X(grad_A=plain["grad_A"], A=case.A, B=case.B, scaling=case.scaling)
    right = -np.linalg.pinv(case.B) @ case.G @ case.A.T / case.scaling
    grams = np.linalg.norm(case.B.T @ case.B) + np.linalg.norm(case.A @ case.A.T)
    size = np.linalg.norm(case.G) * np.linalg.norm(case.A) / case.scaling / _smallest(case.B) + grams * np.linalg.norm(X)
    got = case.B.T @ case.B @ X + X @ case.A @ case.A.T
    assert_close(got, right, size=size, conditioning=_conditioning(case.A, case.B), what="the left side of the equation")


@law(
    "lora_pro.L6c",
    says="Without a choice of X the pair is the one that is nearest to back-propagation's.",
    formula=r"g^A - g^A_{X=0} = X A, \quad X = \arg\min_X \|g^A - g^A_{lora}\|_F^2 + \|g^B - g^B_{lora}\|_F^2",
    needs=("optimal_gradients",),
    tolerance=2.2,
    cases=pulls(),
)
def test_default_pair(impl, case):
    plain = _back_propagated(case.G, case.A, case.B, case.scaling)
    pair = impl.optimal_gradients(A=case.A, B=case.B, scaling=case.scaling, **plain)
    best, system = _pair(case.G, case.A, case.B, case.scaling), _distance_system(case.A, case.B)
    X = np.linalg.lstsq(system, _apart(plain, best), rcond=1e-10)[0].reshape(case.X.shape)
    size = _pair_size(case.G, case.A, case.B, case.scaling, X)
    size += np.linalg.norm(_apart(plain, best))
    conditioning = _conditioning(case.A, case.B)
    assert_close(pair.grad_A, best[0] + X @ case.A, size=size, conditioning=conditioning, what="the adjusted gradient of A")
    assert_close(pair.grad_B, best[1] - case.B @ X, size=size, conditioning=conditioning, what="the adjusted gradient of B")


@law(
    "lora_pro.L11a",
    says="With the symmetric X both factors share evenly what both can do.",
    formula=r"s B g^A = P_B G - \tfrac12 P_B G P_A, \quad s g^B A = G P_A - \tfrac12 P_B G P_A",
    needs=("optimal_gradients.X",),
    tolerance=6,
    cases=pulls(),
)
def test_even_split(impl, case):
    plain = _back_propagated(case.G, case.A, case.B, case.scaling)
    pair = impl.optimal_gradients(A=case.A, B=case.B, scaling=case.scaling, X="symmetry", **plain)
    P_B, P_A = _projectors(case.A, case.B)
    shared, size, conditioning = P_B @ case.G @ P_A, np.linalg.norm(case.G), _conditioning(case.A) * _conditioning(case.B)
    by_A, by_B = case.scaling * case.B @ pair.grad_A, case.scaling * pair.grad_B @ case.A
    assert_close(by_A, P_B @ case.G - shared / 2, size=size, conditioning=conditioning, what="the part that A moves")
    assert_close(by_B, case.G @ P_A - shared / 2, size=size, conditioning=conditioning, what="the part that B moves")


@law(
    "lora_pro.L11b",
    says="The symmetric X takes half of what both factors can do from A and gives it to B.",
    formula=r"s B X A = -\tfrac12 P_B G P_A",
    needs=("symmetric_X",),
    tolerance=3,
    cases=pulls(),
)
def test_symmetric_matrix(impl, case):
    plain = _back_propagated(case.G, case.A, case.B, case.scaling)
    X = impl.symmetric_X(grad_B=plain["grad_B"], A=case.A, B=case.B, scaling=case.scaling)
    want = _free_matrix(case.G, case.A, case.B, case.scaling, "symmetry")
    size = np.linalg.norm(case.G) / case.scaling / _smallest(case.A) / _smallest(case.B)
    assert_close(X, want, size=size, conditioning=_conditioning(case.A) * _conditioning(case.B), what="X")


@law(
    "lora_pro.L16",
    says="For orthonormal factors the Sylvester equation's X is half of what both factors see of the gradient, with a minus.",
    formula=r"B^\top B = A A^\top = I \;\Rightarrow\; X = -\tfrac{1}{2s} B^\top G A^\top",
    needs=("sylvester_X",),
    tolerance=8,
    cases=orthonormal_pulls(),
)
def test_orthonormal_factors(impl, case):
    X = impl.sylvester_X(grad_A=case.scaling * case.B.T @ case.G, A=case.A, B=case.B, scaling=case.scaling)
    assert_close(X, -case.B.T @ case.G @ case.A.T / (2 * case.scaling), size=np.linalg.norm(case.G) / case.scaling, what="X")


# Invariances


@law(
    "lora_pro.L7a",
    says="Other factors of the same product have the same nearest equivalent gradient, for every choice of X by name.",
    formula=r"\tilde g^*(MA, BM^{-1}) = \tilde g^*(A, B)",
    needs=("optimal_gradients.X",),
    tolerance=2,
    cases=pulls(),
)
def test_gauge(impl, case):
    A, B = case.M @ case.A, case.B @ np.linalg.inv(case.M)
    conditioning = _conditioning(A, B)
    for X in NAMED:
        found = []
        for factors in ((case.A, case.B), (A, B)):
            plain = _back_propagated(case.G, *factors, case.scaling)
            pair = impl.optimal_gradients(A=factors[0], B=factors[1], scaling=case.scaling, X=X, **plain)
            found.append(_equivalent(*pair, *factors, case.scaling))
        size = np.linalg.norm(case.G) + case.scaling * np.linalg.norm(_free_matrix(case.G, A, B, case.scaling, X))
        assert_close(found[1], found[0], size=size, conditioning=conditioning, what="the equivalent gradient")


@law(
    "lora_pro.L7b",
    says="With X = 0 the pair itself turns with the factors.",
    formula=r"(g^A, g^B)(MA, BM^{-1}) = (M g^A, g^B M^{-1})",
    needs=("optimal_gradients.X",),
    tolerance=1.5,
    cases=pulls(),
)
def test_pair_turns(impl, case):
    inverse = np.linalg.inv(case.M)
    A, B = case.M @ case.A, case.B @ inverse
    plain, turned = (_back_propagated(case.G, *factors, case.scaling) for factors in ((case.A, case.B), (A, B)))
    first = impl.optimal_gradients(A=case.A, B=case.B, scaling=case.scaling, X="zero", **plain)
    other = impl.optimal_gradients(A=A, B=B, scaling=case.scaling, X="zero", **turned)
    size = _pair_size(case.G, A, B, case.scaling, 0 * case.X)
    conditioning = max(_conditioning(A, B), _conditioning(case.A, case.B) * _conditioning(case.M))
    assert_close(other.grad_A, case.M @ first.grad_A, size=size, conditioning=conditioning, what="the turned gradient of A")
    assert_close(other.grad_B, first.grad_B @ inverse, size=size, conditioning=conditioning, what="the turned gradient of B")


@law(
    "lora_pro.L8",
    says="The scaling does not change the nearest equivalent gradient.",
    formula=r"\tilde g^*(s) = \tilde g^*(s')",
    needs=("optimal_gradients",),
    tolerance=5,
    cases=pulls(),
)
def test_scale_independence(impl, case):
    want, conditioning = _nearest(case.G, case.A, case.B), _conditioning(case.A, case.B)
    for scaling in (0.25, case.scaling, 7.0):
        plain = _back_propagated(case.G, case.A, case.B, scaling)
        pair = impl.optimal_gradients(A=case.A, B=case.B, scaling=scaling, **plain)
        size = np.linalg.norm(case.G) + scaling * np.linalg.norm(_free_matrix(case.G, case.A, case.B, scaling, "sylvester"))
        got = _equivalent(*pair, case.A, case.B, scaling)
        assert_close(got, want, size=size, conditioning=conditioning, what="the equivalent gradient")


@law(
    "lora_pro.L9",
    says="At full rank the equivalent gradient is the gradient.",
    formula=r"r = \min(m, n) \;\Rightarrow\; \tilde g^* = G",
    needs=("optimal_gradients", "projected_gradient"),
    tolerance=5,
    cases=pulls(beyond=(0,)),
)
def test_full_rank(impl, case):
    plain = _back_propagated(case.G, case.A, case.B, case.scaling)
    pair = impl.optimal_gradients(A=case.A, B=case.B, scaling=case.scaling, **plain)
    size = np.linalg.norm(case.G) + case.scaling * np.linalg.norm(_free_matrix(case.G, case.A, case.B, case.scaling, "sylvester"))
    for got in (_equivalent(*pair, case.A, case.B, case.scaling), impl.projected_gradient(G=case.G, A=case.A, B=case.B)):
        assert_close(got, case.G, size=size, conditioning=_conditioning(case.A, case.B), what="the equivalent gradient")


# Factors of lower rank, and the official code's remedy


@law(
    "lora_pro.L10a",
    says="At the usual start B = 0 only B moves, as far as A lets it, with the pseudo-inverse and with the official code's 1e-8.",
    formula=r"B = 0 \;\Rightarrow\; g^A = 0, \quad g^B = \tfrac1s G A^\top (A A^\top + \delta I)^{-1}",
    needs=("optimal_gradients.X", "optimal_gradients.delta"),
    tolerance=6,
    cases=pulls(),
)
def test_zero_start(impl, case):
    B, gram = 0 * case.B, case.A @ case.A.T
    plain = _back_propagated(case.G, case.A, B, case.scaling)
    size, conditioning = np.linalg.norm(case.G) / case.scaling / _smallest(case.A), _conditioning(case.A)
    for X in NAMED:
        for delta in (0.0, 1e-8):
            pair = impl.optimal_gradients(A=case.A, B=B, scaling=case.scaling, X=X, delta=delta, **plain)
            want = np.linalg.solve(gram + delta * np.eye(len(gram)), case.A @ case.G.T).T / case.scaling
            assert_close(pair.grad_A, 0 * case.A, size=0, what="the adjusted gradient of A")
            assert_close(pair.grad_B, want, size=size, conditioning=conditioning, what="the adjusted gradient of B")


@st.composite
def deficient_pulls(draw: st.DrawFn) -> Pull:
    """Factors of rank 1 or 2 with 2 or 3 rows and columns; sometimes only one of them."""
    pull = draw(pulls(ranks=(2, 3)))
    matrices, rank = Matrices(pull.seed + 1), len(pull.A)
    lower = draw(st.integers(1, rank - 1))
    thin = np.hstack([np.eye(lower), matrices.rng.integers(-1, 2, (lower, rank - lower)).astype(float)])
    A, B = thin.T @ _grid(pull.A[:lower], 0.25), _grid(pull.B[:, :lower], 0.25) @ thin
    which = draw(st.sampled_from(["B", "A", "both"]))
    return pull._replace(A=pull.A if which == "B" else A, B=pull.B if which == "A" else B)


@law(
    "lora_pro.L10b",
    says="Factors of lower rank: with the pseudo-inverse the equivalent gradient is still the nearest one.",
    formula=r"\tilde g^* = G - (I - P_B)\, G\, (I - P_A) \quad \text{for } A, B \text{ of any rank}",
    needs=("optimal_gradients.X", "projected_gradient"),
    tolerance=2,
    cases=deficient_pulls(),
)
def test_lower_rank(impl, case):
    plain = _back_propagated(case.G, case.A, case.B, case.scaling)
    want, conditioning, size = _nearest(case.G, case.A, case.B), _conditioning(case.A, case.B), 4 * np.linalg.norm(case.G)
    for X in NAMED:
        pair = impl.optimal_gradients(A=case.A, B=case.B, scaling=case.scaling, X=X, **plain)
        got = _equivalent(*pair, case.A, case.B, case.scaling)
        assert_close(got, want, size=size, conditioning=conditioning, what="the equivalent gradient")
    projected = impl.projected_gradient(G=case.G, A=case.A, B=case.B)
    assert_close(projected, want, size=size, conditioning=conditioning, what="the projected gradient")


@law(
    "lora_pro.L10c",
    says="Factors of lower rank: the default X is the smallest of those that bring the pair nearest to back-propagation's.",
    formula=r"X = \arg\min \|g^A - g^A_{lora}\|_F^2 + \|g^B - g^B_{lora}\|_F^2 \text{ of least norm}",
    needs=("sylvester_X",),
    tolerance=20,
    cases=deficient_pulls(),
)
def test_free_matrix_of_lower_rank(impl, case):
    plain = _back_propagated(case.G, case.A, case.B, case.scaling)
    X = impl.sylvester_X(grad_A=plain["grad_A"], A=case.A, B=case.B, scaling=case.scaling)
    P_B, _ = _projectors(case.A, case.B)
    left, right = (np.linalg.pinv(factor, rcond=1e-6) for factor in (case.B, case.A))
    best = left @ case.G / case.scaling, (case.G - P_B @ case.G) @ right / case.scaling
    apart, system = _apart(plain, best), _distance_system(case.A, case.B)
    want = np.linalg.lstsq(system, apart, rcond=1e-6)[0].reshape(X.shape)
    size = np.linalg.norm(apart) * max(np.linalg.norm(left), np.linalg.norm(right))
    assert_close(X, want, size=size, conditioning=_conditioning(case.A) * _conditioning(case.B), what="X")


@law(
    "lora_pro.L10d",
    says="delta is added to both Gram matrices where they are inverted, and nowhere else.",
    formula=r"(B^\top B + \delta I)^{-1}, \quad (A A^\top + \delta I)^{-1}",
    needs=("optimal_gradients.delta", "optimal_gradients.X", "sylvester_X.delta", "symmetric_X.delta"),
    tolerance=2,
    cases=pulls(),
)
def test_delta(impl, case):
    delta, r, s = case.lr, len(case.A), case.scaling
    plain = _back_propagated(case.G, case.A, case.B, s)
    left, right = (np.linalg.inv(gram + delta * np.eye(r)) for gram in (case.B.T @ case.B, case.A @ case.A.T))
    both = np.kron(case.B.T @ case.B, np.eye(r)) + np.kron(np.eye(r), case.A @ case.A.T)
    sylvester = np.linalg.solve(both, -(left @ plain["grad_A"] @ case.A.T).ravel() / s**2).reshape(r, r)
    symmetric = -left @ case.B.T @ plain["grad_B"] @ right / (2 * s**2)
    options = {"A": case.A, "B": case.B, "scaling": s, "delta": delta}
    conditioning = _conditioning(case.A) * _conditioning(case.B)
    size = np.linalg.norm(case.G) / s / _smallest(case.A) / _smallest(case.B)
    found = impl.sylvester_X(grad_A=plain["grad_A"], **options)
    assert_close(found, sylvester, size=size, conditioning=conditioning, what="X of the Sylvester equation")
    found = impl.symmetric_X(grad_B=plain["grad_B"], **options)
    assert_close(found, symmetric, size=size, conditioning=conditioning, what="the symmetric X")
    best_A = left @ plain["grad_A"] / s**2
    best_B = (plain["grad_B"] - case.B @ left @ case.B.T @ plain["grad_B"]) @ right / s**2
    for choice, X in zip(NAMED, (sylvester, 0 * symmetric, symmetric), strict=True):
        pair = impl.optimal_gradients(X=choice, **plain, **options)
        size = _pair_size(case.G, case.A, case.B, s, X)
        assert_close(pair.grad_A, best_A + X @ case.A, size=size, conditioning=conditioning, what="the adjusted gradient of A")
        assert_close(pair.grad_B, best_B - case.B @ X, size=size, conditioning=conditioning, what="the adjusted gradient of B")


# Gradient descent


@law(
    "lora_pro.L12a",
    says="A step of gradient descent moves both factors along the adjusted pair of the old factors.",
    formula=r"A \leftarrow A - \eta g^A, \quad B \leftarrow B - \eta g^B",
    needs=("sgd_step.X",),
    tolerance=3,
    cases=pulls(),
)
def test_gradient_descent(impl, case):
    plain = _back_propagated(case.G, case.A, case.B, case.scaling)
    conditioning = _conditioning(case.A, case.B)
    for X in (*NAMED, case.X):
        A, B = impl.sgd_step(A=case.A, B=case.B, scaling=case.scaling, lr=case.lr, **plain, **_as_option(X))
        pair = _pair(case.G, case.A, case.B, case.scaling, X)
        size = _pair_size(case.G, case.A, case.B, case.scaling, _free_matrix(case.G, case.A, case.B, case.scaling, X))
        size = case.lr * size + np.abs(case.A).max() + np.abs(case.B).max()
        assert_close(A, case.A - case.lr * pair[0], size=size, conditioning=conditioning, what="A after the step")
        assert_close(B, case.B - case.lr * pair[1], size=size, conditioning=conditioning, what="B after the step")


@law(
    "lora_pro.L12b",
    says="The weight's step is the projected gradient and a term of second order, exactly.",
    formula=r"\Delta(sBA) = -\eta\, \tilde g^* + \eta^2 s\, g^B g^A",
    needs=("sgd_step.X",),
    tolerance=2.5,
    cases=pulls(),
)
def test_exact_step(impl, case):
    plain, s, lr = _back_propagated(case.G, case.A, case.B, case.scaling), case.scaling, case.lr
    for X in NAMED:
        A, B = impl.sgd_step(A=case.A, B=case.B, scaling=s, lr=lr, X=X, **plain)
        grad_A, grad_B = _pair(case.G, case.A, case.B, s, X)
        want = -lr * _nearest(case.G, case.A, case.B) + lr**2 * s * grad_B @ grad_A
        size = _pair_size(case.G, case.A, case.B, s, _free_matrix(case.G, case.A, case.B, s, X))
        size = s * (lr * size + np.linalg.norm(case.A)) * (lr * size + np.linalg.norm(case.B))
        conditioning = _conditioning(case.A, case.B)
        assert_close(s * (B @ A - case.B @ case.A), want, size=size, conditioning=conditioning, what="the weight's step")


@law(
    "lora_pro.L12c",
    says="The step's delta is that of its inverses.",
    formula=r"\text{step}(\delta) = (A, B) - \eta\, (g^A, g^B)(\delta)",
    needs=("sgd_step.delta", "optimal_gradients.delta"),
    tolerance=2.6,
    cases=pulls(),
)
def test_delta_of_gradient_descent(impl, case):
    plain = _back_propagated(case.G, case.A, case.B, case.scaling)
    options = {"A": case.A, "B": case.B, "scaling": case.scaling, "delta": 0.75}
    A, B = impl.sgd_step(lr=case.lr, **plain, **options)
    left, right = (np.linalg.inv(gram + 0.75 * np.eye(len(gram))) for gram in (case.B.T @ case.B, case.A @ case.A.T))
    best_A = left @ plain["grad_A"] / case.scaling**2
    best_B = (plain["grad_B"] - case.B @ left @ case.B.T @ plain["grad_B"]) @ right / case.scaling**2
    # X drops out of the equivalent gradient of the displacement
    got = _equivalent(case.A - A, case.B - B, case.A, case.B, case.scaling)
    want = case.lr * _equivalent(best_A, best_B, case.A, case.B, case.scaling)
    size = case.lr * np.linalg.norm(case.G) + case.scaling * np.linalg.norm(case.A) * np.linalg.norm(case.B)
    assert_close(got, want, size=size, conditioning=_conditioning(case.A, case.B), what="the weight's step to first order")


# AdamW, full mode


class Moments(NamedTuple):
    """A layer in the middle of a training."""

    G: np.ndarray
    W0: np.ndarray
    A: np.ndarray
    B: np.ndarray
    X: np.ndarray
    moment1: np.ndarray  # (out, in)
    moment2: np.ndarray  # (out, in), positive
    scaling: float
    lr: float
    t: int
    beta1: float
    beta2: float
    adam_eps: float
    weight_decay: float


@st.composite
def moments(draw: st.DrawFn) -> Moments:
    pull = draw(pulls())
    matrices = Matrices(pull.seed + 2)
    return Moments(
        *(pull.G, pull.W0, pull.A, pull.B, pull.X),
        moment1=_grid(matrices(*pull.G.shape), 0.125),
        moment2=_grid(matrices.rng.uniform(0.25, 4, pull.G.shape), 0.125),
        scaling=pull.scaling,
        lr=pull.lr,
        t=draw(st.integers(1, 5)),
        beta1=draw(st.sampled_from([0.75, 0.5])),
        beta2=draw(st.sampled_from([0.875, 0.5])),
        adam_eps=draw(st.sampled_from([0.25, 0.125])),
        weight_decay=draw(st.sampled_from([0.5, 0.25])),
    )


def _adam(g, moment1, moment2, t, beta1=0.9, beta2=0.999, adam_eps=1e-8):
    """Adam's direction and new moments, the bias corrections by the sums that they are the closed form of."""
    moment1 = beta1 * moment1 + (1 - beta1) * g
    moment2 = beta2 * moment2 + (1 - beta2) * g * g
    first, second = ((1 - beta) * sum(beta**k for k in range(t)) for beta in (beta1, beta2))
    return moment1 / first / (np.sqrt(moment2 / second) + adam_eps), moment1, moment2


def _options(case):
    return of(case, "beta1", "beta2", "adam_eps")


def _step_size(direction, A, B, scaling, lr, X):
    """What the rounding errors of the factors after a step are relative to."""
    return lr * _pair_size(direction, A, B, scaling, _free_matrix(direction, A, B, scaling, X)) + np.abs(A).max() + np.abs(B).max()


@law(
    "lora_pro.L13a",
    says="The first step of AdamW moves the weight along the projection of Adam's first direction, which is nearly the sign.",
    formula=r"\Delta(sBA) = -\eta \Big( P_B d + (I - P_B)\, d\, P_A \Big) + O(\eta^2), \quad d = \tilde g^* / (|\tilde g^*| + \epsilon)",
    needs=("init_state", "step.adam_eps"),
    tolerance=0.1,
    cases=moments(),
)
def test_first_adamw_step(impl, case):
    plain, start = _back_propagated(case.G, case.A, case.B, case.scaling), impl.init_state(A=case.A, B=case.B)
    layer = {"W0": case.W0, "A": case.A, "B": case.B, "scaling": case.scaling, "t": 1, "lr": case.lr, "adam_eps": case.adam_eps}
    after = impl.step(moment1=start.moment1, moment2=start.moment2, **layer, **plain)
    nearest, s = _nearest(case.G, case.A, case.B), case.scaling
    direction = nearest / (np.abs(nearest) + case.adam_eps)
    got = _equivalent(case.A - after.A, case.B - after.B, case.A, case.B, s)
    size = s * _step_size(direction, case.A, case.B, case.scaling, case.lr, "sylvester") * (np.linalg.norm(case.A) + np.linalg.norm(case.B))
    conditioning = _conditioning(case.A, case.B) * (1 + np.linalg.norm(case.G)) / case.adam_eps
    assert_close(got, case.lr * _nearest(direction, case.A, case.B), size=size, conditioning=conditioning, what="the weight's step")


@law(
    "lora_pro.L13b",
    says="The moments are running means of the equivalent gradient and of its square, entry by entry of the weight.",
    formula=r"m \leftarrow \beta_1 m + (1 - \beta_1)\, \tilde g^*, \quad v \leftarrow \beta_2 v + (1 - \beta_2)\, \tilde g^{*2}",
    needs=("step.beta1", "step.beta2"),
    tolerance=3,
    cases=moments(),
)
def test_moments(impl, case):
    layer = {"W0": case.W0, "A": case.A, "B": case.B, "scaling": case.scaling, "t": case.t, "lr": case.lr}
    state = {"moment1": case.moment1, "moment2": case.moment2, "beta1": case.beta1, "beta2": case.beta2}
    after = impl.step(**_back_propagated(case.G, case.A, case.B, case.scaling), **layer, **state)
    g, size, conditioning = _nearest(case.G, case.A, case.B), np.linalg.norm(case.G), _conditioning(case.A, case.B)
    mean = case.beta1 * case.moment1 + (1 - case.beta1) * g
    square = case.beta2 * case.moment2 + (1 - case.beta2) * g**2
    assert_close(after.moment1, mean, size=np.abs(mean).max() + size, conditioning=conditioning, what="the mean")
    assert_close(after.moment2, square, size=np.abs(square).max() + size**2, conditioning=conditioning, what="the mean square")


@law(
    "lora_pro.L13c",
    says="From any moments, AdamW moves the factors along the optimal pair for Adam's direction, by the X that is chosen.",
    formula=r"(A, B) \leftarrow \sqrt{1 - \eta\lambda}\,(A, B) - \eta\,(g^A, g^B)(d), \quad d = \hat m / (\sqrt{\hat v} + \epsilon)",
    needs=("step.beta1", "step.beta2", "step.adam_eps", "step.weight_decay", "step.X"),
    tolerance=1,
    cases=moments(),
)
def test_any_adamw_step(impl, case):
    plain, g = _back_propagated(case.G, case.A, case.B, case.scaling), _nearest(case.G, case.A, case.B)
    direction, *_ = _adam(g, case.moment1, case.moment2, case.t, **_options(case))
    layer = {"W0": case.W0, "A": case.A, "B": case.B, "scaling": case.scaling, "t": case.t, "lr": case.lr}
    state = {"moment1": case.moment1, "moment2": case.moment2, "weight_decay": case.weight_decay}
    kept, conditioning = np.sqrt(1 - case.lr * case.weight_decay), _conditioning(case.A, case.B) * (1 + np.linalg.norm(case.G))
    for X in (*NAMED, case.X):
        after = impl.step(**plain, **layer, **state, **_options(case), **_as_option(X))
        pair, size = _pair(direction, case.A, case.B, case.scaling, X), _step_size(direction, case.A, case.B, case.scaling, case.lr, X)
        assert_close(after.A, kept * case.A - case.lr * pair[0], size=size, conditioning=conditioning, what="A after the step")
        assert_close(after.B, kept * case.B - case.lr * pair[1], size=size, conditioning=conditioning, what="B after the step")


@law(
    "lora_pro.L13d",
    says="Without options the means decay by 0.9 and 0.999, eps is 1e-8, nothing decays, and X is that of the Sylvester equation.",
    formula=r"\beta_1 = 0.9, \quad \beta_2 = 0.999, \quad \epsilon = 10^{-8}, \quad \lambda = 0",
    needs=("step",),
    tolerance=6,
    cases=moments(),
)
def test_defaults_of_adamw(impl, case):
    plain, g = _back_propagated(case.G, case.A, case.B, case.scaling), _nearest(case.G, case.A, case.B)
    direction, mean, square = _adam(g, case.moment1, case.moment2 / 16, case.t)
    layer = {"W0": case.W0, "A": case.A, "B": case.B, "scaling": case.scaling, "t": case.t, "lr": case.lr}
    after = impl.step(moment1=case.moment1, moment2=case.moment2 / 16, **plain, **layer)
    pair, size = (
        _pair(direction, case.A, case.B, case.scaling, "sylvester"),
        _step_size(direction, case.A, case.B, case.scaling, case.lr, "sylvester"),
    )
    conditioning = _conditioning(case.A, case.B) * (1 + np.linalg.norm(case.G))
    assert_close(after.A, case.A - case.lr * pair[0], size=size, conditioning=conditioning, what="A after the step")
    assert_close(after.B, case.B - case.lr * pair[1], size=size, conditioning=conditioning, what="B after the step")
    assert_close(after.moment1, mean, size=np.abs(mean).max(), conditioning=conditioning, what="the mean")
    assert_close(after.moment2, square, size=np.abs(square).max(), conditioning=conditioning, what="the mean square")
    assert_close(after.W0, case.W0, size=0, what="W0 without decay")


@law(
    "lora_pro.L13e",
    says="Five steps in a row: the moments are handed on, and each step is the one for its number and for the factors of its time.",
    formula=r"m_t = (1 - \beta_1) \sum_{k \le t} \beta_1^{t-k} \tilde g^*_k, \quad v_t \text{ likewise of } \tilde g^{*2}_k",
    needs=("init_state", "step.beta1", "step.beta2", "step.adam_eps"),
    tolerance=0.1,
    cases=moments(),
    examples=20,
)
def test_five_adamw_steps(impl, case):
    A, B, lr = case.A, case.B, case.lr / 32
    state, seen = impl.init_state(A=A, B=B), []
    for t in range(1, 6):
        G = np.roll(case.G, t, axis=1) * (-1) ** (t // 2)
        given = {**_back_propagated(G, A, B, case.scaling), "W0": case.W0, "A": A, "B": B, "scaling": case.scaling}
        after = impl.step(**given, moment1=state.moment1, moment2=state.moment2, t=t, lr=lr, **_options(case))
        seen.append(_nearest(G, A, B))
        mean, square = ((1 - b) * sum(b ** (t - k) * g**p for k, g in enumerate(seen, 1)) for b, p in ((case.beta1, 1), (case.beta2, 2)))
        root = np.sqrt(square / (1 - case.beta2**t))
        direction = mean / (1 - case.beta1**t) / (root + case.adam_eps)
        pair, size = _pair(direction, A, B, case.scaling, "sylvester"), _step_size(direction, A, B, case.scaling, case.lr, "sylvester")
        conditioning = _conditioning(A, B) * (1 + np.linalg.norm(G)) / case.adam_eps
        assert_close(after.A, A - lr * pair[0], size=size, conditioning=conditioning, what=f"A after step {t}")
        assert_close(after.B, B - lr * pair[1], size=size, conditioning=conditioning, what=f"B after step {t}")
        A, B, state = after.A, after.B, after


@law(
    "lora_pro.L13f",
    says="The step's delta is that of its inverses, for the equivalent gradient and for the way back.",
    formula=r"m = (1 - \beta_1)\, \tilde g(\delta)",
    needs=("init_state", "step.delta", "step.adam_eps"),
    tolerance=1,
    cases=moments(),
)
def test_delta_of_adamw(impl, case):
    s, start = case.scaling, impl.init_state(A=case.A, B=case.B)
    plain = _back_propagated(case.G, case.A, case.B, s)
    layer = {"W0": case.W0, "A": case.A, "B": case.B, "scaling": s, "t": 1, "lr": case.lr, "adam_eps": case.adam_eps}
    after = impl.step(moment1=start.moment1, moment2=start.moment2, delta=0.75, **layer, **plain)
    left, right = (np.linalg.inv(gram + 0.75 * np.eye(len(gram))) for gram in (case.B.T @ case.B, case.A @ case.A.T))

    def seen(G):  # the equivalent gradient, which X does not change
        return case.B @ left @ case.B.T @ G + (G - case.B @ left @ case.B.T @ G) @ case.A.T @ right @ case.A

    g, size = seen(case.G), np.linalg.norm(case.G)
    direction = g / (np.abs(g) + case.adam_eps)
    conditioning = _conditioning(case.A, case.B)
    assert_close(after.moment1, 0.1 * g, size=size, conditioning=conditioning, what="the mean")
    got = _equivalent(case.A - after.A, case.B - after.B, case.A, case.B, s)
    size = s * _step_size(direction, case.A, case.B, case.scaling, case.lr, "sylvester") * (np.linalg.norm(case.A) + np.linalg.norm(case.B))
    assert_close(got, case.lr * seen(direction), size=size, conditioning=conditioning / case.adam_eps, what="the weight's step")


@law(
    "lora_pro.L14a",
    says="Without a gradient, decay shrinks the whole weight, the frozen one included.",
    formula=r"W_0 + sBA \leftarrow (1 - \eta\lambda)\,(W_0 + sBA)",
    needs=("init_state", "step.weight_decay"),
    tolerance=6,
    cases=moments(),
)
def test_decay(impl, case):
    start = impl.init_state(A=case.A, B=case.B)
    layer = {"W0": case.W0, "A": case.A, "B": case.B, "scaling": case.scaling, "t": 1, "lr": case.lr}
    still = {"grad_A": 0 * case.A, "grad_B": 0 * case.B, "moment1": start.moment1, "moment2": start.moment2}
    after = impl.step(**still, **layer, weight_decay=case.weight_decay)
    kept, size = 1 - case.lr * case.weight_decay, np.abs(case.W0) + case.scaling * np.abs(case.B) @ np.abs(case.A)
    before = case.W0 + case.scaling * case.B @ case.A
    assert_close(after.W0 + case.scaling * after.B @ after.A, kept * before, size=size, what="the weight")
    assert_close(after.W0, kept * case.W0, size=np.abs(case.W0), what="W0")
    assert_close(after.A, np.exp(np.log(kept) / 2) * case.A, size=np.abs(case.A).max(), what="A")


@law(
    "lora_pro.L15",
    says="At full rank three steps are those of AdamW on the weight itself, to first order.",
    formula=r"r = \min(m, n) \;\Rightarrow\; s B g^A + s g^B A = d_t",
    needs=("init_state", "step"),
    tolerance=3,
    cases=pulls(beyond=(0,)),
    examples=30,
)
def test_full_rank_adamw(impl, case):
    rng, s, lr = np.random.Generator(np.random.PCG64(case.seed + 3)), case.scaling, case.lr / 8
    A, B, state = case.A, case.B, impl.init_state(A=case.A, B=case.B)
    m, v = 0 * case.G, 0 * case.G
    for t in range(1, 4):
        # No entry is near zero, where Adam's direction would jump
        G = _grid(rng.uniform(1, 3, case.G.shape), 0.125) * np.where(rng.random(case.G.shape) < 0.5, -1, 1)
        given = {"W0": case.W0, "A": A, "B": B, "scaling": s, "moment1": state.moment1, "moment2": state.moment2, "t": t}
        after = impl.step(**_back_propagated(G, A, B, s), **given, lr=lr)
        direction, m, v = _adam(G, m, v, t)
        got = _equivalent(A - after.A, B - after.B, A, B, s)
        moved = lr * _pair_size(direction, A, B, s, _free_matrix(direction, A, B, s, "sylvester"))
        size = s * (moved + np.abs(A).max() + np.abs(B).max()) * (np.linalg.norm(A) + np.linalg.norm(B))
        conditioning = _conditioning(A, B)
        assert_close(got, lr * direction, size=size, conditioning=conditioning, what=f"the weight's step {t}")
        A, B, state = after.A, after.B, after


@law(
    "lora_pro.L17a",
    says="Before the first step all moments are zero: of the weight's shape in full mode, of the factors' shapes in efficient mode.",
    formula=r"m_0 = v_0 = 0",
    needs=("init_state", "init_state_efficient"),
    tolerance=0,
    cases=pulls(),
)
def test_start_of_the_moments(impl, case):
    for part in impl.init_state(A=case.A, B=case.B):
        assert_close(part, 0 * case.G, size=0, what="a moment of the weight")
    wanted = (case.A, case.B, case.A, case.B)
    for part, factor in zip(impl.init_state_efficient(A=case.A, B=case.B), wanted, strict=True):
        assert_close(part, 0 * factor, size=0, what="a moment of a factor")


# AdamW, efficient mode


class FactorMoments(NamedTuple):
    """A layer in the middle of a training in efficient mode."""

    G: np.ndarray
    A: np.ndarray
    B: np.ndarray
    X: np.ndarray
    moment1_A: np.ndarray
    moment1_B: np.ndarray
    moment2_A: np.ndarray
    moment2_B: np.ndarray
    scaling: float
    lr: float
    t: int
    beta1: float
    beta2: float
    adam_eps: float
    weight_decay: float


@st.composite
def factor_moments(draw: st.DrawFn) -> FactorMoments:
    case = draw(moments())
    matrices, shapes = Matrices(int(8 * np.sum(np.abs(case.G)))), (case.A.shape, case.B.shape)
    means = [_grid(matrices(*shape), 0.125) for shape in shapes]
    squares = [_grid(matrices.rng.uniform(0.25, 4, shape), 0.125) for shape in shapes]
    numbers = (case.scaling, case.lr, case.t, case.beta1, case.beta2, case.adam_eps, case.weight_decay)
    return FactorMoments(case.G, case.A, case.B, case.X, *means, *squares, *numbers)


def _efficient(impl, case, X, decay, **options):
    """One step of the efficient mode, and what is expected of it with what its rounding errors are relative to."""
    state = {"moment1_A": case.moment1_A, "moment1_B": case.moment1_B, "moment2_A": case.moment2_A, "moment2_B": case.moment2_B}
    layer = {"A": case.A, "B": case.B, "scaling": case.scaling, "t": case.t, "lr": case.lr}
    after = impl.step_efficient(**_back_propagated(case.G, case.A, case.B, case.scaling), **layer, **state, **options, **_as_option(X))
    known = {name: options[name] for name in ("beta1", "beta2", "adam_eps") if name in options}
    wanted, sizes = [], []
    pair = _pair(case.G, case.A, case.B, case.scaling, X)
    kept, size = (
        1 - case.lr * decay,
        _pair_size(case.G, case.A, case.B, case.scaling, _free_matrix(case.G, case.A, case.B, case.scaling, X)),
    )
    means, squares = (case.moment1_A, case.moment1_B), (case.moment2_A, case.moment2_B)
    for factor, g, m, v in zip((case.A, case.B), pair, means, squares, strict=True):
        direction, mean, square = _adam(g, m, v, case.t, **known)
        wanted.append((kept * factor - case.lr * direction, mean, square))
        # Where the mean square is small, Adam's direction is as steep in the gradient as one over its root
        steep = 1 + size / np.sqrt(square.min())
        sizes.append((np.abs(factor).max() + np.abs(direction).max() * steep, np.abs(m).max() + size, np.abs(v).max() + size**2))
    order = [(i, part) for part in range(3) for i in range(2)]  # A, B, then their means, then their mean squares
    return after, [wanted[i][part] for i, part in order], [sizes[i][part] for i, part in order]


@law(
    "lora_pro.L17b",
    says="In efficient mode AdamW acts on each adjusted gradient by itself; each factor decays by 1 - lr weight_decay.",
    formula=r"A \leftarrow (1 - \eta\lambda) A - \eta\, d(g^A), \quad B \leftarrow (1 - \eta\lambda) B - \eta\, d(g^B)",
    needs=(
        *("step_efficient.beta1", "step_efficient.beta2", "step_efficient.adam_eps"),
        *("step_efficient.weight_decay", "step_efficient.X"),
    ),
    tolerance=2,
    cases=factor_moments(),
)
def test_efficient_step(impl, case):
    conditioning = _conditioning(case.A, case.B)
    for X in (*NAMED, case.X):
        options = {**_options(case), "weight_decay": case.weight_decay}
        after, wanted, sizes = _efficient(impl, case, X, case.weight_decay, **options)
        for name, got, want, size in zip(after._fields, after, wanted, sizes, strict=True):
            assert_close(got, want, size=size, conditioning=conditioning, what=f"{name} after the step")


@law(
    "lora_pro.L17c",
    says="The defaults of the efficient mode are those of the full one.",
    formula=r"\beta_1 = 0.9, \quad \beta_2 = 0.999, \quad \epsilon = 10^{-8}, \quad \lambda = 0",
    needs=("step_efficient",),
    tolerance=8,
    cases=factor_moments(),
)
def test_defaults_of_the_efficient_step(impl, case):
    after, wanted, sizes = _efficient(impl, case, "sylvester", 0.0)
    conditioning = _conditioning(case.A, case.B)
    for name, got, want, size in zip(after._fields, after, wanted, sizes, strict=True):
        assert_close(got, want, size=size, conditioning=conditioning, what=f"{name} after the step")


@law(
    "lora_pro.L17d",
    says="At the usual start, where B = 0, the efficient mode leaves A alone, and B takes Adam's first step, for any small delta.",
    formula=r"A \leftarrow A, \quad B \leftarrow -\eta\, g / (|g| + \epsilon), \quad g = \tfrac1s G A^\top (A A^\top + \delta I)^{-1}",
    needs=("init_state_efficient", "step_efficient.delta", "step_efficient.adam_eps"),
    tolerance=1,
    cases=moments(),
)
def test_start_of_the_efficient_mode(impl, case):
    B, gram = 0 * case.B, case.A @ case.A.T
    start = impl.init_state_efficient(A=case.A, B=B)._asdict()
    layer = {"A": case.A, "B": B, "scaling": case.scaling, "t": 1, "lr": case.lr, "adam_eps": case.adam_eps}
    for delta in (0.0, 0.75):
        after = impl.step_efficient(**_back_propagated(case.G, case.A, B, case.scaling), **layer, **start, delta=delta)
        g = np.linalg.solve(gram + delta * np.eye(len(gram)), case.A @ case.G.T).T / case.scaling
        size = case.lr * (1 + np.linalg.norm(case.G) / case.scaling / _smallest(case.A)) / case.adam_eps
        assert_close(after.A, case.A, size=0, what="A after the step")
        want = -case.lr * g / (np.abs(g) + case.adam_eps)
        assert_close(after.B, want, size=size, conditioning=_conditioning(case.A), what="B after the step")


# Theorem checks: the mathematics itself


@theorem(
    "lora_pro.T1",
    says="Two pairs have the same equivalent gradient just if they differ by X A and -B X: the free matrix has rank^2 entries.",
    formula=r"s B u + s v A = 0 \iff u = X A,\; v = -B X",
    tolerance=8,
    cases=pulls(),
)
def test_null_space(case):
    (m, n), r = case.G.shape, len(case.A)
    columns = np.hstack([np.kron(case.B, np.eye(n)), np.kron(np.eye(m), case.A.T)])
    values = np.linalg.svd(columns, compute_uv=False)
    assert np.sum(values > 1e-8 * values[0]) == columns.shape[1] - r * r, "the null space has another dimension than rank^2"
    X = case.X / 3  # exists in no precision
    moved = _equivalent(X @ case.A, -case.B @ X, case.A, case.B, 1.0)
    assert_close(moved, 0 * moved, size=np.linalg.norm(case.A) * np.linalg.norm(case.B) * np.linalg.norm(case.X), what="the move")


@theorem(
    "lora_pro.T2",
    says="Through a smooth loss, the slope along the adjusted pair is minus the square of the projected gradient (Theorem 2).",
    formula=r"\tfrac{d}{d\eta} L\big(W_0 + s (B - \eta g^B)(A - \eta g^A)\big) \big|_{\eta = 0} = -\|\tilde g^*\|_F^2 \le 0",
    tolerance=8e5,  # central differences with step 1e-5: h^2 plus eps / h
    cases=pulls(),
)
def test_decrease_through_a_loss(case):
    matrices, s, (m, n) = Matrices(case.seed + 3), case.scaling, case.G.shape
    problem = LogisticRegression(matrices(9, n), np.sign(matrices(9, m)))
    G = problem.grad(case.W0 + s * case.B @ case.A)
    for X in (*NAMED, case.X):
        grad_A, grad_B = _pair(G, case.A, case.B, s, X)
        after, before = (problem.loss(case.W0 + s * (case.B - e * grad_B) @ (case.A - e * grad_A)) for e in (1e-5, -1e-5))
        size = (1 + np.linalg.norm(grad_A) + np.linalg.norm(grad_B)) ** 3 * (1 + s) ** 2
        assert_close((after - before) / 2e-5, -np.sum(_nearest(G, case.A, case.B) ** 2), size=size, what="the slope of the loss")


@theorem(
    "lora_pro.T3",
    says="Any other X brings the pair farther from back-propagation's (Theorem 3).",
    formula=r"\|g^A(X) - g^A_{lora}\|_F^2 + \|g^B(X) - g^B_{lora}\|_F^2 \ge \text{its value at the Sylvester equation's } X",
    tolerance=6,
    cases=pulls(),
)
def test_no_other_is_nearer(case):
    plain = _back_propagated(case.G, case.A, case.B, case.scaling)
    X = _free_matrix(case.G, case.A, case.B, case.scaling, "sylvester")
    least, size = np.sum(_apart(plain, _pair(case.G, case.A, case.B, case.scaling, X)) ** 2), 0.0
    for width in (1e-3, 0.1, 1.0):
        other = np.sum(_apart(plain, _pair(case.G, case.A, case.B, case.scaling, X + width * case.X)) ** 2)
        # The distance is a quadratic function of X, so the excess is the square of the move
        excess = width**2 * (np.sum((case.X @ case.A) ** 2) + np.sum((case.B @ case.X) ** 2))
        size = least + excess + np.sum(_apart(plain, (0.0, 0.0)) ** 2) + np.sum(case.G**2)
        assert_close(other - least, excess, size=size, conditioning=_conditioning(case.A, case.B), what="how much farther another X is")


@theorem(
    "lora_pro.T4",
    says="For orthonormal factors and s = 1 LoRA's own step counts what both factors can do twice.",
    formula=r"B^\top B = A A^\top = I,\; s = 1 \;\Rightarrow\; \tilde g_{lora} = \tilde g^* + P_B G P_A",
    tolerance=14,
    cases=orthonormal_pulls(),
)
def test_counted_twice(case):
    plain = _back_propagated(case.G, case.A, case.B, 1.0)
    P_B, P_A = _projectors(case.A, case.B)
    want = _nearest(case.G, case.A, case.B) + P_B @ case.G @ P_A
    assert_close(_equivalent(*plain.values(), case.A, case.B, 1.0), want, size=np.linalg.norm(case.G), what="LoRA's equivalent gradient")


@theorem(
    "lora_pro.T5",
    says="From B = 0, A moves in the second step by an amount that the learning rate does not make small.",
    formula=r"B_1 = -\eta h \;\Rightarrow\; \eta\, \tfrac1s B_1^+ G_1 = -\tfrac1s h^+ G_1 \text{ for every } \eta",
    tolerance=20,
    cases=pulls(),
)
def test_second_step_from_zero(case):
    G1 = Matrices(case.seed + 4)(*case.G.shape)
    h = (case.G @ np.linalg.pinv(case.A)) / case.scaling
    size = np.linalg.norm(G1) / case.scaling / _smallest(h)
    moved = [lr * _pair(G1, case.A, -lr * h, case.scaling)[0] for lr in (1.0, 1e-3, 1e-6)]
    for other in moved[1:]:
        assert_close(other, moved[0], size=size, conditioning=_conditioning(h), what="how far A moves")
    assert np.linalg.norm(moved[0]) > 0, "nothing moved: the check says nothing"
