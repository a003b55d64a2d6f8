# mypy: ignore-errors
"""The laws of LoLDU. Expected values are NumPy float64; none comes from an implementation under test, nor from a library's LU.

Weights are made backwards, from a lower triangle whose entries stay below 0.9, so that elimination with row pivoting has no tie:
pivots and U are then unique. With more rows than columns the rows that are never pivots may come in any order, so L and P are
compared as the product L[P], and L itself by its leading rows.
"""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from loracle.oracle_tests.draws import assert_normal, assert_seeded, assert_uniform
from loracle.oracle_tests.expected import assert_linear
from loracle.oracle_tests.law import assert_close, law, of, theorem
from loracle.oracle_tests.loading import Derivation
from loracle.oracle_tests.problems import LinearRegression, slope
from loracle.oracle_tests.strategies import Matrices, entries, leads, scalings, seeds, sides

DIAGONALS = ("lu", "ones", "zeros", "constant", "uniform", "normal", "s_uniform", "s_normal")


def _triangle(matrices, rows, columns):
    """A unit lower triangle (rows, columns) whose other entries stay below 0.9 in size."""
    if matrices.entries == "normal":
        below = matrices.rng.uniform(-0.9, 0.9, (rows, columns))
    else:
        below = matrices.rng.choice([0.5, -0.5, 0.25, 0.0], (rows, columns))
    return np.tril(below, -1) + np.eye(rows, columns)


def _pivots(matrices, count):
    """Numbers of both signs away from zero."""
    if matrices.entries == "normal":
        return matrices.rng.uniform(0.5, 2, count) * matrices.rng.choice([1.0, -1.0], count)
    return matrices.rng.choice([1.0, 2.0, -1.0, 4.0, -2.0, 0.5], count)


def _upper(matrices, rows, columns):
    """A unit upper triangle (rows, columns)."""
    if matrices.entries == "normal":
        right = matrices.rng.normal(0, 0.7, (rows, columns))
    else:
        right = matrices.rng.choice([1.0, -1.0, 2.0, 0.0], (rows, columns))
    return np.triu(right, 1) + np.eye(rows, columns)


def _weight(matrices, rows, columns):
    """A matrix whose elimination has no tie."""
    small = min(rows, columns)
    L, U = _triangle(matrices, rows, small), _upper(matrices, small, columns)
    return ((L * _pivots(matrices, small)) @ U)[matrices.rng.permutation(rows)]


class Factored:
    """What elimination by hand finds: U (small, in), D (small,), L (out, small) in pivot order, and the rows in that order."""

    def __init__(self, U, D, L, order, conditioning):
        self.U, self.D, self.L, self.order, self.conditioning = U, D, L, order, conditioning


def _eliminate(W0):
    """Elimination with row pivoting, written out: subtract one outer product after the other."""
    m, n = W0.shape
    rest, rows, U, D, columns = W0.copy(), list(range(m)), [], [], []
    order = []
    for j in range(min(m, n)):
        pivot = max(rows, key=lambda i: abs(rest[i, j]))
        rows.remove(pivot)
        order.append(pivot)
        D.append(rest[pivot, j])
        U.append(np.where(np.arange(n) < j, 0.0, rest[pivot]) / D[-1])
        column = np.zeros(m)
        column[[pivot, *rows]] = rest[[pivot, *rows], j] / D[-1]
        columns.append(column)
        rest = rest - D[-1] * np.multiply.outer(column, U[-1])
        rest[:, j] = 0.0
    order = np.array(order + rows)
    leading = [np.linalg.cond(W0[order[:j], :j]) for j in range(1, min(m, n) + 1)]
    return Factored(np.array(U), np.array(D), np.array(columns).T[order], order, max(leading))


def _rows_back(L, P):
    """P L: the rows of L, of which the i-th of the product is the P_i-th."""
    product = np.empty_like(L)
    for i, row in enumerate(P.astype(int)):
        product[i] = L[row]
    return product


def _sum(U, z, L, P, scaling):
    """sigma P L diag(z) U as a sum of outer products, and the size of what is summed."""
    terms = [z[i] * np.multiply.outer(_rows_back(L, P)[:, i], U[i]) for i in range(len(z))]
    return scaling * np.sum(terms, axis=0), abs(scaling) * np.sum(np.abs(terms), axis=0)


# The factorisation


class Weight(NamedTuple):
    """A weight to factor."""

    W0: np.ndarray
    seed: int


@st.composite
def weights(draw: st.DrawFn, low: int = 1, high: int = 7) -> Weight:
    rows, columns, seed = draw(sides(low, high)), draw(sides(low, high)), draw(seeds())
    return Weight(_weight(Matrices(seed, draw(entries())), rows, columns), seed)


@law(
    "loldu.L1",
    says="Lower triangle, diagonal and upper triangle multiply to the weight, after the rows are put back.",
    formula=r"W_0 = P L\, \mathrm{diag}(D)\, U",
    needs=("ldu",),
    tolerance=8,
    cases=weights(),
)
def test_reconstruction(impl, case):
    U, D, L, P = impl.ldu(W0=case.W0)
    got, _ = _sum(U, D, L, P, 1.0)
    # Elimination multiplies the sizes of the exact triangles
    found = _eliminate(case.W0)
    _, size = _sum(found.U, found.D, found.L, np.argsort(found.order), 1.0)
    assert_close(got, case.W0, size=np.max(size), what="P L diag(D) U")


@law(
    "loldu.L2",
    says="L is unit lower triangular with no entry above 1, U is unit upper triangular, and P holds each row once.",
    formula=r"L_{ii} = U_{ii} = 1, \quad L_{ij} = 0\ (i < j), \quad U_{ij} = 0\ (i > j), \quad |L_{ij}| \le 1",
    needs=("ldu",),
    tolerance=2,
    cases=weights(),
)
def test_structure(impl, case):
    U, _, L, P = impl.ldu(W0=case.W0)
    small = min(case.W0.shape)
    assert_close(np.triu(L), np.eye(*L.shape), size=0, what="L on and above its diagonal")
    assert_close(np.tril(U), np.eye(*U.shape), size=0, what="U on and below its diagonal")
    assert_close(np.sort(P), np.arange(len(case.W0)), size=0, what="P, sorted")
    assert_close(np.maximum(np.abs(L).max(), 1.0), 1.0, what="largest entry of L")
    assert len(U) == L.shape[1] == small, f"L has {L.shape[1]} columns and U {len(U)} rows; needed {small}"


@law(
    "loldu.L3",
    says="Pivots, U and the rows of L are those of elimination by hand; without a tie there are no others.",
    formula=r"D_j = \tilde W^{(j)}_{jj}, \quad U_{j:} = \tilde W^{(j)}_{j:} / D_j, \quad (P L)_{:j} = W^{(j)}_{:j} / D_j",
    needs=("ldu",),
    tolerance=8,
    cases=weights(),
)
def test_elimination(impl, case):
    found = impl.ldu(W0=case.W0)
    _assert_factors(found, _eliminate(case.W0), min(case.W0.shape))
    assert_close(found.D, _eliminate(case.W0).D, size=np.abs(found.D).max(), conditioning=_eliminate(case.W0).conditioning, what="D")


def _assert_factors(got, want, rank):
    """Assert that U, the product P L and the leading rows of L are those found by hand, as far as they are unique."""
    conditioning, small = want.conditioning, want.L.shape[1]
    assert_close(got.U, want.U[:rank], size=np.abs(want.U).max(), conditioning=conditioning, what="U")
    back = _rows_back(want.L, np.argsort(want.order))[:, :rank]
    assert_close(_rows_back(got.L, got.P), back, conditioning=conditioning, what="P L")
    head = min(small, len(want.L)) if rank == small else rank
    assert_close(got.L[:head], want.L[:head, :rank], conditioning=conditioning, what="leading rows of L")


@law(
    "loldu.L4",
    says="Products of the leading pivots are the leading minors of the weight with its rows in pivot order.",
    formula=r"\prod_{i \le j} D_i = \det \big( P^\top W_0 \big)_{1..j,\, 1..j}",
    needs=("ldu",),
    tolerance=8,
    cases=weights(high=5),
)
def test_minors(impl, case):
    _, D, _, P = impl.ldu(W0=case.W0)
    turned = case.W0[np.argsort(P)]
    conditioning = _eliminate(case.W0).conditioning
    for j in range(1, len(D) + 1):
        minor, size = _determinant(turned[:j, :j])
        assert_close(np.prod(D[:j]), minor, size=size + j * np.prod(np.abs(D[:j])), conditioning=conditioning, what=f"minor {j}")


def _determinant(M):
    """The determinant along the first row, and the same with all signs plus."""
    if len(M) == 0:
        return 1.0, 1.0
    value = size = 0.0
    for j, entry in enumerate(M[0]):
        minor, above = _determinant(np.delete(M[1:], j, axis=1))
        value, size = value + (-1) ** j * entry * minor, size + abs(entry) * above
    return value, size


@law(
    "loldu.L11",
    says="A positive factor of the weight goes to the pivots alone.",
    formula=r"W_0 \mapsto c\, W_0 \;\Rightarrow\; D \mapsto c\, D, \quad P, L, U \text{ stay}",
    needs=("ldu",),
    tolerance=8,
    cases=weights(),
)
def test_homogeneity(impl, case):
    conditioning, c = _eliminate(case.W0).conditioning, 3.0
    one, other = impl.ldu(W0=case.W0), impl.ldu(W0=c * case.W0)
    assert_close(other.U, one.U, size=np.abs(one.U).max(), conditioning=conditioning, what="U")
    assert_close(other.D, c * one.D, size=c * np.abs(one.D).max(), conditioning=conditioning, what="D")
    assert_close(_rows_back(other.L, other.P), _rows_back(one.L, one.P), conditioning=conditioning, what="P L")


@law(
    "loldu.L12",
    says="When the rows of the weight change places, pivots and U stay, and the rows of P L change places with them.",
    formula=r"W_0 \mapsto Q W_0 \;\Rightarrow\; P L \mapsto Q P L, \quad D, U \text{ stay}",
    needs=("ldu",),
    tolerance=8,
    cases=weights(),
)
def test_row_permutation(impl, case):
    conditioning, Q = _eliminate(case.W0).conditioning, np.random.default_rng(case.seed).permutation(len(case.W0))
    one, other = impl.ldu(W0=case.W0), impl.ldu(W0=case.W0[Q])
    assert_close(other.U, one.U, size=np.abs(one.U).max(), conditioning=conditioning, what="U")
    assert_close(other.D, one.D, size=np.abs(one.D).max(), conditioning=conditioning, what="D")
    assert_close(_rows_back(other.L, other.P), _rows_back(one.L, one.P)[Q], conditioning=conditioning, what="P L")


@law(
    "loldu.L13",
    says="Positive factors of the columns go to the pivots, and to U relative to its diagonal; P and L stay.",
    formula=r"W_0 \mapsto W_0\, \mathrm{diag}(c) \;\Rightarrow\; D_i \mapsto c_i D_i, \quad U_{ij} \mapsto U_{ij}\, c_j / c_i",
    needs=("ldu",),
    tolerance=8,
    cases=weights(),
)
def test_column_scaling(impl, case):
    c = np.random.default_rng(case.seed).choice([3.0, 0.7, 1.0, 1.9], case.W0.shape[1])
    one, other = impl.ldu(W0=case.W0), impl.ldu(W0=case.W0 * c)
    heads, conditioning = c[: len(one.D)], _eliminate(case.W0).conditioning
    size = np.abs(one.U).max() * c / heads[:, None]
    assert_close(other.U, one.U * c / heads[:, None], size=size, conditioning=conditioning, what="U")
    assert_close(other.D, heads * one.D, size=heads * np.abs(one.D).max(), conditioning=conditioning, what="D")
    assert_close(_rows_back(other.L, other.P), _rows_back(one.L, one.P), conditioning=conditioning, what="P L")


class Example(NamedTuple):
    """The page's worked example, times a power of two."""

    W0: np.ndarray
    factor: float


@law(
    "loldu.L17",
    says="The worked example comes out exactly: rows exchanged, pivots 4 and -1.5, one entry in the residual of rank 1.",
    formula=r"\begin{pmatrix} 2 & 1 \\ 4 & 5 \end{pmatrix} = P \begin{pmatrix} 1 & 0 \\ 0.5 & 1 \end{pmatrix}"
    r" \begin{pmatrix} 4 & \\ & -1.5 \end{pmatrix} \begin{pmatrix} 1 & 1.25 \\ 0 & 1 \end{pmatrix}",
    needs=("ldu", "init"),
    tolerance=0,
    cases=st.sampled_from([1.0, 2.0, 0.25]).map(lambda factor: Example(factor * np.array([[2.0, 1.0], [4.0, 5.0]]), factor)),
    examples=3,
)
def test_worked_example(impl, case):
    U, D, L, P = impl.ldu(W0=case.W0)
    assert_close(U, [[1, 1.25], [0, 1]], size=0, what="U")
    assert_close(D, case.factor * np.array([4, -1.5]), size=0, what="D")
    assert_close(L, [[1, 0], [0.5, 1]], size=0, what="L")
    assert_close(P, [1, 0], size=0, what="P")
    W_base = impl.init(W0=case.W0, scaling=1.0, rank=1).W_base
    assert_close(W_base, case.factor * np.array([[0, -1.5], [0, 0]]), size=0, what="the residual")


# The diagonal's start


class Diagonal(NamedTuple):
    """Leading pivots, and noise for the random starts."""

    D: np.ndarray
    noise: np.ndarray


@st.composite
def diagonals(draw: st.DrawFn) -> Diagonal:
    rank, matrices = draw(st.integers(2, 8)), Matrices(draw(seeds()), draw(entries()))
    return Diagonal(_pivots(matrices, rank), matrices(rank) / 4)


def _start(D, diagonal, noise):
    """The start of z as the page's table has it."""
    rank = len(D)
    mean = sum(D) / rank
    if diagonal == "normal":
        return mean + noise * np.sqrt(sum((D - mean) ** 2) / (rank - 1))
    table = {"lu": D, "constant": np.full(rank, mean), "ones": np.ones(rank), "zeros": np.zeros(rank)}
    return table[diagonal] if diagonal in table else noise * (abs(mean) / 2 if diagonal == "uniform" else 1)


@law(
    "loldu.L18a",
    says="Without noise the diagonal starts at the pivots (the default), their mean, ones or zeros.",
    formula=r"z_0 = D_r; \quad \mathrm{constant}:\ \mu = \tfrac1r \sum_i D_i; \quad 1; \quad 0",
    needs=("init_diagonal.diagonal", "init_diagonal.noise"),
    tolerance=4,
    cases=diagonals(),
)
def test_fixed_diagonals(impl, case):
    assert_close(impl.init_diagonal(D=case.D), case.D, size=0, what="z without a name")
    for name in ("lu", "ones", "zeros", "constant"):
        size = np.abs(case.D).mean() if name == "constant" else 0
        for given in ({}, {"noise": case.noise}):
            z = impl.init_diagonal(D=case.D, diagonal=name, **given)
            assert_close(z, _start(case.D, name, case.noise), size=size, what=f"z for {name!r}")


@law(
    "loldu.L18b",
    says="Two random starts take their width from the pivots: half their mean's size, or their standard deviation around their mean.",
    formula=r"\mathrm{uniform}:\ \tfrac12 |\mu|\, e, \quad \mathrm{normal}:\ \mu + e \Big( \tfrac{1}{r-1} \sum_i (D_i - \mu)^2 \Big)^{1/2}",
    needs=("init_diagonal.diagonal", "init_diagonal.noise"),
    tolerance=6,
    cases=diagonals(),
)
def test_random_diagonals_from_the_pivots(impl, case):
    size = np.abs(case.D).mean()
    for name in ("uniform", "normal"):
        z = impl.init_diagonal(D=case.D, diagonal=name, noise=case.noise)
        spread = size * (1 + np.abs(case.noise)) if name == "normal" else size * np.abs(case.noise)
        assert_close(z, _start(case.D, name, case.noise), size=spread, what=f"z for {name!r}")


@law(
    "loldu.L18c",
    says="The other two random starts are the standard noise itself, whatever the pivots.",
    formula=r"\mathrm{s\_uniform},\ \mathrm{s\_normal}:\ z_0 = e",
    needs=("init_diagonal.diagonal", "init_diagonal.noise"),
    tolerance=0,
    cases=diagonals(),
)
def test_standard_diagonals(impl, case):
    for name in ("s_uniform", "s_normal"):
        z = impl.init_diagonal(D=case.D, diagonal=name, noise=case.noise)
        assert_close(z, case.noise, size=0, what=f"z for {name!r}")


class Draw(NamedTuple):
    """A large weight, of which only the shape matters."""

    W0: np.ndarray
    rank: int
    seed: int


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    return Draw(np.ones((draw(st.sampled_from([500, 620])), 512)), draw(st.integers(460, 490)), draw(seeds()))


@law(
    "loldu.L18d",
    says="The noise has `rank` standard normal numbers, or uniform ones between -1 and 1; a seed repeats it.",
    formula=r"e_i \sim \mathcal N(0, 1) \text{ or } U(-1, 1)",
    needs=("draw_noise.distribution", "draw_noise.generator"),
    tolerance=0,
    cases=draws(),
    examples=5,
)
def test_noise(impl, case):
    for name, assert_drawn in (("normal", assert_normal), ("uniform", assert_uniform)):
        options = {"W0": case.W0, "rank": case.rank, "distribution": name}
        e = assert_seeded(lambda seed, options=options: impl.draw_noise(generator=seed, **options), case.seed, "noise")
        assert_drawn(e, 1.0, f"{name} noise")
    plain = impl.draw_noise(W0=case.W0, rank=case.rank, generator=case.seed)
    assert np.abs(plain).max() > 1, "without a name the noise is not normal"


# The start of the layer


class Start(NamedTuple):
    """A weight to adapt, and noise for the random starts of its diagonal."""

    W0: np.ndarray
    rank: int
    scaling: float
    noise: np.ndarray


@st.composite
def starts(draw: st.DrawFn, low: int = 1) -> Start:
    rows, columns = draw(sides(low, 7)), draw(sides(low, 7))
    rank, matrices = draw(st.integers(1, min(rows, columns))), Matrices(draw(seeds()), draw(entries()))
    return Start(_weight(matrices, rows, columns), rank, draw(scalings()), matrices(rank) / 2)


def _each_start(case):
    """The arguments of `init` for every start of the diagonal, and the start; the noise only where it is looked at."""
    D = _eliminate(case.W0).D[: case.rank]
    for name in DIAGONALS:
        if name == "normal" and case.rank == 1:
            continue  # the width of one pivot is not defined
        noise = {"noise": case.noise} if name in ("uniform", "normal", "s_uniform", "s_normal") else {}
        given = {"W0": case.W0, "scaling": case.scaling, "rank": case.rank, "diagonal": name, **noise}
        yield given, _start(D, name, case.noise), f"with the diagonal {name!r}"


def _by_hand(case, z, found=None, scaling=None, rank=None):
    """sigma P L_r diag(z) U_r from elimination by hand, the size of its terms for this z and the pivots, and the conditioning."""
    found, scaling, rank = found or _eliminate(case.W0), scaling or case.scaling, rank or case.rank
    leading = found.U[:rank], found.L[:, :rank], np.argsort(found.order)
    part, _ = _sum(leading[0], z, *leading[1:], scaling)
    _, size = _sum(leading[0], np.abs(z) + np.abs(found.D[:rank]), *leading[1:], scaling)
    return part, np.max(np.abs(case.W0)) + np.max(size), found.conditioning


@law(
    "loldu.L5a",
    says="The layer starts at the pretrained weight, whatever the diagonal starts at.",
    formula=r"W_{res} + \sigma P L_r\, \mathrm{diag}(z_0)\, U_r = W_0",
    needs=("init.scaling", "init.diagonal", "init.noise"),
    tolerance=8,
    cases=starts(),
)
def test_start(impl, case):
    for given, _, named in _each_start(case):
        W_base, U, z, L, P = impl.init(**given)
        leading, terms = _sum(U, z, L, P, case.scaling)
        assert_close(W_base + leading, case.W0, size=np.abs(case.W0) + np.abs(W_base) + terms, what=f"W at the start {named}")


@law(
    "loldu.L5b",
    says="Without `preserve` the residual is made with the pivots, and the layer starts off by what the diagonal differs from them.",
    formula=r"W = W_0 + \sigma P L_r\, \mathrm{diag}(z_0 - D_r)\, U_r",
    needs=("init.scaling", "init.diagonal", "init.noise", "init.preserve"),
    tolerance=8,
    cases=starts(),
)
def test_start_without_preserve(impl, case):
    found = _eliminate(case.W0)
    D = found.D[: case.rank]
    leading, whole, conditioning = _by_hand(case, D, found)
    for given, z0, named in _each_start(case):
        W_base, U, z, L, P = impl.init(**given, preserve=False)
        off, size, _ = _by_hand(case, z0 - D, found)
        got = W_base + _sum(U, z, L, P, case.scaling)[0]
        assert_close(got, case.W0 + off, size=size, conditioning=conditioning, what=f"W at the start {named}")
        assert_close(W_base + leading, case.W0, size=whole, conditioning=conditioning, what=f"residual and leading part {named}")


@law(
    "loldu.L5c",
    says="The residual lacks sigma times the leading part at the start of the diagonal.",
    formula=r"W_{res} = W_0 - \sigma P L_r\, \mathrm{diag}(z_0)\, U_r",
    needs=("init.scaling", "init.diagonal", "init.noise"),
    tolerance=8,
    cases=starts(),
)
def test_residual(impl, case):
    found = _eliminate(case.W0)
    for given, z0, named in _each_start(case):
        leading, size, conditioning = _by_hand(case, z0, found)
        got = impl.init(**given).W_base
        assert_close(got + leading, case.W0, size=size, conditioning=conditioning, what=f"residual and leading part {named}")


@law(
    "loldu.L5d",
    says="The factors are the leading ones in the order of elimination, and the diagonal starts as its name says.",
    formula=r"U_r = U_{1..r,:}, \quad L_r = L_{:,1..r}, \quad z_0 = z_0(D_{1..r})",
    needs=("init.scaling", "init.diagonal", "init.noise"),
    tolerance=8,
    cases=starts(),
)
def test_leading_factors(impl, case):
    want = _eliminate(case.W0)
    size = np.abs(want.D).max() * (1 + np.abs(case.noise).max())
    for given, z0, named in _each_start(case):
        got = impl.init(**given)
        _assert_factors(got, want, case.rank)
        assert_close(got.z, z0, size=size, conditioning=want.conditioning, what=f"z {named}")
        assert_close(np.sort(got.P), np.arange(len(case.W0)), size=0, what="P, sorted")


@law(
    "loldu.L5e",
    says="Without further words the scaling is 1, the diagonal starts at the pivots, and the layer at the pretrained weight.",
    formula=r"\sigma = 1, \quad z_0 = D_r, \quad W_{res} = W_0 - P L_r\, \mathrm{diag}(D_r)\, U_r",
    needs=("init",),
    tolerance=8,
    cases=starts(),
)
def test_defaults(impl, case):
    D = _eliminate(case.W0).D[: case.rank]
    want, size, conditioning = _by_hand(case, D, scaling=1.0)
    got = impl.init(W0=case.W0, rank=case.rank)
    assert_close(got.W_base + want, case.W0, size=size, conditioning=conditioning, what="the residual and the leading part")
    assert_close(got.z, D, size=np.abs(D).max(), conditioning=conditioning, what="z")


@law(
    "loldu.L6a",
    says="For sigma = 1 the residual is the Schur complement of the leading block: in pivot order its first rows and columns vanish.",
    formula=r"P^\top W_{res} = \begin{pmatrix} 0 & 0 \\ 0 & W_{22} - W_{21} W_{11}^{-1} W_{12} \end{pmatrix}",
    needs=("init",),
    tolerance=8,
    cases=starts(low=2),
)
def test_schur_complement(impl, case):
    W_base, r = impl.init(W0=case.W0, scaling=1.0, rank=case.rank).W_base, case.rank
    order, conditioning = _pivot_order(case)
    turned, want = case.W0[order], np.zeros_like(case.W0)
    want[r:, r:] = turned[r:, r:] - turned[r:, :r] @ np.linalg.solve(turned[:r, :r], turned[:r, r:])
    _, size, _ = _by_hand(case, np.zeros(r), scaling=1.0)
    assert_close(W_base[order], want, size=size, conditioning=conditioning, what="the residual in pivot order")


def _pivot_order(case):
    """The rows in the order of elimination, and the condition of the leading blocks."""
    found = _eliminate(case.W0)
    return found.order, found.conditioning


@law(
    "loldu.L6b",
    says="At full rank nothing is left over but 1 - sigma times the weight.",
    formula=r"r = \min(m, n) \;\Rightarrow\; W_{res} = (1 - \sigma) W_0",
    needs=("init",),
    tolerance=8,
    cases=starts(),
)
def test_full_rank(impl, case):
    rank = min(case.W0.shape)
    for scaling in (case.scaling, 1.0):
        W_base = impl.init(W0=case.W0, scaling=scaling, rank=rank).W_base
        _, size, _ = _by_hand(case, np.zeros(rank), rank=rank)
        assert_close(W_base, (1 - scaling) * case.W0, size=size, what=f"the residual at sigma = {scaling:g}")


@law(
    "loldu.L7",
    says="The leading part is a skeleton of the weight: leading columns, inverse of the leading block, leading pivot rows.",
    formula=r"P L_r\, \mathrm{diag}(D_r)\, U_r = W_{:,1..r}\, W_{11}^{-1}\, (P^\top W_0)_{1..r,:}",
    needs=("init", "delta_weight"),
    tolerance=8,
    cases=starts(low=2),
)
def test_skeleton(impl, case):
    _, U, z, L, P = impl.init(W0=case.W0, rank=case.rank)
    got, r = impl.delta_weight(U=U, z=z, L=L, P=P, scaling=1.0), case.rank
    order, conditioning = _pivot_order(case)
    want = case.W0[:, :r] @ np.linalg.solve(case.W0[order][:r, :r], case.W0[order][:r])
    _, size, _ = _by_hand(case, np.zeros(r), scaling=1.0)
    assert_close(got, want, size=size, conditioning=conditioning, what="the leading part")


# The layer


class Layer(NamedTuple):
    """One adapted layer and what may come in from either side."""

    x: np.ndarray  # (..., in)
    G: np.ndarray  # (out, in)
    W_base: np.ndarray  # (out, in)
    U: np.ndarray  # (rank, in), unit upper
    z: np.ndarray  # (rank,)
    L: np.ndarray  # (out, rank), unit lower
    P: np.ndarray  # (out,)
    scaling: float
    bias: np.ndarray  # (out,)
    rank: int


@st.composite
def layers(draw: st.DrawFn, low: int = 1, high: int = 7) -> Layer:
    out_features, in_features = draw(sides(low, high)), draw(sides(low, high))
    rank, lead = draw(st.integers(1, min(out_features, in_features))), draw(leads())
    matrices = Matrices(draw(seeds()), draw(entries()))
    return Layer(
        x=matrices(*lead, in_features),
        G=matrices(out_features, in_features),
        W_base=matrices(out_features, in_features),
        U=_upper(matrices, rank, in_features),
        z=_pivots(matrices, rank),
        L=_triangle(matrices, out_features, rank),
        P=matrices.rng.permutation(out_features),
        scaling=draw(scalings()),
        bias=matrices(out_features),
        rank=rank,
    )


def _factors(case):
    return of(case, "U", "z", "L", "P", "scaling")


def _delta_weight(impl, U, z, L, P, scaling):
    """The columns of the trained part are what the layer adds to W_base = 0 for the unit vectors."""
    W_base, x = np.zeros((len(L), U.shape[1])), np.eye(U.shape[1])
    return impl.forward(x=x, W_base=W_base, U=U, z=z, L=L, P=P, scaling=scaling).T


delta_weight_from_forward = Derivation("delta_weight", needs=("forward",), compute=_delta_weight)


@law(
    "loldu.L8a",
    says="The output is the residual's plus sigma times U, the diagonal, L and the permutation one after the other on the input.",
    formula=r"y = x W_{res}^\top + b + \sigma \big( (x U_r^\top) \odot z \big) (P L_r)^\top",
    needs=("forward.bias",),
    tolerance=8,
    cases=layers(),
)
def test_forward(impl, case):
    delta, size = _sum(case.U, case.z, case.L, case.P, case.scaling)
    for bias in (case.bias, 0 * case.bias):
        given = {"bias": bias} if bias.any() else {}
        y = impl.forward(x=case.x, W_base=case.W_base, **_factors(case), **given)
        assert_linear(y, case.x, case.W_base + delta, bias, size=np.abs(case.W_base) + size)


@law(
    "loldu.L8b",
    says="The adapted layer is one linear layer whose weight is the merged weight.",
    formula=r"y = x W^\top + b, \quad W = \mathrm{merge}(W_{res}, U, z, L, P, \sigma)",
    needs=("forward.bias", "merge"),
    tolerance=8,
    cases=layers(),
)
def test_forward_is_merged(impl, case):
    W = impl.merge(W_base=case.W_base, **_factors(case))
    y = impl.forward(x=case.x, W_base=case.W_base, bias=case.bias, **_factors(case))
    sizes = np.abs(case.W_base) + _sum(case.U, case.z, case.L, case.P, case.scaling)[1]
    assert_linear(y, case.x, W, case.bias, size=sizes)


@law(
    "loldu.L8c",
    says="The merged weight adds to the residual sigma times the sum of the outer products, each times its entry of the diagonal.",
    formula=r"W = W_{res} + \sigma \sum_i z_i\, (P L)_{:i}\, U_{i:}",
    needs=("merge",),
    tolerance=8,
    cases=layers(),
)
def test_merge(impl, case):
    delta, size = _sum(case.U, case.z, case.L, case.P, case.scaling)
    W = impl.merge(W_base=case.W_base, **_factors(case))
    assert_close(W, case.W_base + delta, size=np.abs(case.W_base) + size, what="W")


@law(
    "loldu.L8d",
    says="Unmerging takes just that off again, which gives the residual and not the pretrained weight.",
    formula=r"\mathrm{unmerge}(W) = W - \sigma \sum_i z_i\, (P L)_{:i}\, U_{i:}",
    needs=("unmerge",),
    tolerance=8,
    cases=layers(),
)
def test_unmerge(impl, case):
    delta, size = _sum(case.U, case.z, case.L, case.P, case.scaling)
    got = impl.unmerge(W=case.W_base, **_factors(case))
    assert_close(got, case.W_base - delta, size=np.abs(case.W_base) + size, what="the residual")


@law(
    "loldu.L20",
    says="Without the adapter the layer is the pretrained one: the residual and the leading part at the start, not the residual alone.",
    formula=r"W_0 = W_{res} + \sigma P L_r\, \mathrm{diag}(z_0)\, U_r \ne W_{res}",
    needs=("init.scaling", "init.diagonal", "init.noise", "restore"),
    tolerance=8,
    cases=starts(),
)
def test_restored_weight(impl, case):
    for given, _, named in _each_start(case):
        W_base, U, z, L, P = impl.init(**given)
        got = impl.restore(W_base=W_base, U=U, z=z, L=L, P=P, scaling=case.scaling)
        _, terms = _sum(U, z, L, P, case.scaling)
        assert_close(got, case.W0, size=np.abs(case.W0) + np.abs(W_base) + terms, what=f"W0 {named}")


@law(
    "loldu.L8e",
    says="The trained part is sigma times the sum of the outer products, each times its entry of the diagonal.",
    formula=r"\sigma P L\, \mathrm{diag}(z)\, U = \sigma \sum_i z_i\, (P L)_{:i}\, U_{i:}",
    needs=("delta_weight",),
    tolerance=8,
    cases=layers(),
)
def test_delta_weight(impl, case):
    want, size = _sum(case.U, case.z, case.L, case.P, case.scaling)
    assert_close(impl.delta_weight(**_factors(case)), want, size=size, what="the trained part")


@law(
    "loldu.L9a",
    says="The gradient of the diagonal is the slope of the loss along its single entries.",
    formula=r"\partial L / \partial z_i = \sigma\, \ell_i^\top G\, u_i^\top",
    needs=("gradients",),
    tolerance=8,
    cases=layers(),
)
def test_gradient_of_the_diagonal(impl, case):
    got = impl.gradients(G=case.G, **_factors(case)).grad_z
    # G is the gradient of the merged weight: the loss near it is <G, W>, linear in z
    want = slope(lambda z: np.sum(case.G * _sum(case.U, z, case.L, case.P, case.scaling)[0]), 0 * case.z)
    PL = np.abs(_rows_back(case.L, case.P))
    size = case.scaling * np.einsum("mr,mn,rn->r", PL, np.abs(case.G), np.abs(case.U))
    assert_close(got, want, size=size, what="grad_z")


@law(
    "loldu.L9b",
    says="The gradient of the scaling is the slope of the loss along it, with the residual held fixed.",
    formula=r"\partial L / \partial \sigma = \sum_i z_i\, \ell_i^\top G\, u_i^\top",
    needs=("gradients",),
    tolerance=8,
    cases=layers(),
)
def test_gradient_of_the_scaling(impl, case):
    got = impl.gradients(G=case.G, **_factors(case)).grad_scaling
    W = [case.W_base + _sum(case.U, case.z, case.L, case.P, case.scaling + step)[0] for step in (0.5, -0.5)]
    _, size = _sum(case.U, case.z, case.L, case.P, 1.0)
    assert_close(got, np.sum(case.G * (W[0] - W[1])), size=np.sum(np.abs(case.G) * size), what="grad_scaling")


@law(
    "loldu.L10a",
    says="The best diagonal is the least-squares solution over the rank-one terms.",
    formula=r"\big[ \sigma^2 (L^\top L) \odot (U U^\top) \big] z = \sigma\, (\ell_i^\top T u_i^\top)_i",
    needs=("fit_diagonal",),
    tolerance=8,
    cases=layers(),
)
def test_best_diagonal(impl, case):
    got = impl.fit_diagonal(target=case.G, U=case.U, L=case.L, P=case.P, scaling=case.scaling)
    columns = _columns(case)
    want = np.linalg.lstsq(columns, case.G.ravel(), rcond=None)[0]
    size = np.linalg.norm(case.G) * np.linalg.norm(np.linalg.pinv(columns), 2)
    assert_close(got, want, size=size, conditioning=np.linalg.cond(columns) ** 2, what="z")


def _columns(case):
    """The rank-one terms sigma l_i u_i, each as a column."""
    PL = _rows_back(case.L, case.P)
    return case.scaling * np.stack([np.multiply.outer(PL[:, i], case.U[i]).ravel() for i in range(case.rank)], axis=1)


@law(
    "loldu.L10b",
    says="What the layer can make is fitted exactly: the diagonal comes back.",
    formula=r"T = \sigma P L\, \mathrm{diag}(z)\, U \;\Rightarrow\; \mathrm{fit}(T) = z",
    needs=("delta_weight", "fit_diagonal"),
    tolerance=8,
    cases=layers(),
)
def test_fit_undoes_the_product(impl, case):
    target = impl.delta_weight(**_factors(case))
    got = impl.fit_diagonal(target=target, U=case.U, L=case.L, P=case.P, scaling=case.scaling)
    columns = _columns(case)
    _, terms = _sum(case.U, case.z, case.L, case.P, case.scaling)
    size = np.linalg.norm(terms) * np.linalg.norm(np.linalg.pinv(columns), 2)
    assert_close(got, case.z, size=size, conditioning=np.linalg.cond(columns) ** 2, what="z")


@law(
    "loldu.L15a",
    says="Just the diagonal is trained, and one more number where the scaling is.",
    formula=r"r, \quad r + 1",
    needs=("num_trainable.train_scaling",),
    tolerance=0,
    cases=layers(),
)
def test_parameter_count(impl, case):
    for given, one in (({}, 0), ({"train_scaling": False}, 0), ({"train_scaling": True}, 1)):
        got = impl.num_trainable(W0=case.W_base, rank=case.rank, **given)
        assert_close(got, case.z.size + one, size=0, what="number of trainable parameters")


@law(
    "loldu.L15b",
    says="The trained part has as many non-zero singular values as the diagonal has non-zero entries.",
    formula=r"\mathrm{rank}\big( \sigma P L\, \mathrm{diag}(z)\, U \big) = \#\{ i : z_i \ne 0 \}",
    needs=("delta_weight",),
    tolerance=16,
    cases=layers(),
)
def test_rank(impl, case):
    keep = np.arange(case.rank) >= case.rank // 2
    for z in (case.z, np.where(keep, case.z, 0.0)):
        count = np.count_nonzero(z)
        values = np.linalg.svd(impl.delta_weight(**{**_factors(case), "z": z}), compute_uv=False)
        # The smallest value of a product of full-rank factors is at least the product of their smallest ones
        used = z != 0
        floors = [np.linalg.svd(M, compute_uv=False)[-1] for M in (case.L[:, used], case.U[used])]
        floor = case.scaling * np.abs(z[used]).min() * np.prod(floors)
        assert_close(np.sum(values > 0.5 * floor), count, size=0, what=f"number of singular values above {0.5 * floor:.3g}")
        beyond = np.zeros(len(values) - count)
        if len(beyond):
            size = np.linalg.norm(_sum(case.U, case.z, case.L, case.P, case.scaling)[1])
            assert_close(values[count:], beyond, size=size, what="further singular values")


class Sizes(NamedTuple):
    """What a scaling is made from."""

    alpha: float
    rank: int


@law(
    "loldu.L19",
    says="The scaling is alpha over the rank.",
    formula=r"\sigma = \alpha / r",
    needs=("scaling_factor",),
    tolerance=2,
    cases=st.builds(Sizes, alpha=st.sampled_from([1.0, 8.0, 0.3]), rank=st.sampled_from([1, 2, 7, 768])),
)
def test_scaling_factor(impl, case):
    got = impl.scaling_factor(alpha=case.alpha, rank=case.rank)
    assert_close(got * case.rank, case.alpha, size=case.alpha, what="rank sigma")


# Theorem checks: the mathematics itself


@theorem(
    "loldu.T1",
    says="The truncated part misses at least what the best matrix of its rank misses (Eckart-Young); elimination is not the SVD.",
    formula=r"\|W_0 - P L_r\, \mathrm{diag}(D_r)\, U_r\|_F^2 \ge \sum_{i > r} \sigma_i^2(W_0)",
    tolerance=64,
    cases=starts(low=2),
)
def test_never_better_than_the_svd(case):
    D = _eliminate(case.W0).D[: case.rank]
    leading, size, conditioning = _by_hand(case, D, scaling=1.0)
    missed = np.sum((case.W0 - leading) ** 2)
    tail = np.sum(np.linalg.svd(case.W0, compute_uv=False)[case.rank :] ** 2)
    assert_close(min(missed - tail, 0.0), 0.0, size=size**2, conditioning=conditioning, what="how much less is missed")


class Large(NamedTuple):
    """A Gaussian matrix."""

    W0: np.ndarray


@theorem(
    "loldu.T2",
    says="L and U are not orthogonal: of a 64 x 64 Gaussian matrix two columns of L, and two rows of U, are far from a right angle.",
    formula=r"\max_{i \ne j} |\cos(L_{:i}, L_{:j})| > \tfrac12, \quad P^\top P = I",
    tolerance=0,
    cases=st.integers(0, 2**32 - 1).map(lambda seed: Large(Matrices(seed)(64, 64))),
    examples=5,
)
def test_factors_are_not_orthogonal(case):
    found = _eliminate(case.W0)
    for M in (found.L.T, found.U):
        unit = M / np.linalg.norm(M, axis=1, keepdims=True)
        cosines = np.abs(unit @ unit.T - np.eye(len(unit)))
        assert cosines.max() > 0.5, f"the largest cosine is {cosines.max():.2f}"
    P = np.eye(64)[np.argsort(found.order)]
    assert_close(P.T @ P, np.eye(64), size=0, what="P'P")


@theorem(
    "loldu.T3",
    says="The Gram matrix of the rank-one terms is the entrywise product of those of L and U, and positive definite.",
    formula=r"\langle \ell_i u_i, \ell_j u_j \rangle = (L^\top L)_{ij} (U U^\top)_{ij}, "
    r"\quad \lambda_{min} \ge \lambda_{min}(L^\top L) \min_i (U U^\top)_{ii} > 0",
    tolerance=16,
    cases=layers(),
)
def test_gram_matrix(case):
    columns = _columns(case) / case.scaling
    gram = (case.L.T @ case.L) * (case.U @ case.U.T)
    assert_close(columns.T @ columns, gram, size=np.abs(gram).max(), what="Gram matrix of the terms")
    floor = np.linalg.eigvalsh(case.L.T @ case.L)[0] * np.min(np.sum(case.U**2, axis=1))  # Schur's product theorem
    assert floor > 0
    least = np.linalg.eigvalsh(gram)[0]
    assert_close(min(least - floor, 0.0), 0.0, size=np.abs(gram).max(), what="how far below the bound the smallest eigenvalue is")


@theorem(
    "loldu.T4",
    says="The weight is affine in the diagonal, so least squares is convex in it: no chord lies below the curve.",
    formula=r"L(\tfrac12 z + \tfrac12 z') = \tfrac12 L(z) + \tfrac12 L(z') - \tfrac{1}{8N} \|\sigma P L\,(z - z') \odot U X^\top\|^2",
    tolerance=64,
    cases=layers(),
)
def test_convex_in_the_diagonal(case):
    matrices, (m, n) = Matrices(7), case.G.shape
    problem = LinearRegression(matrices(9, n), matrices(9, m))
    ends = case.z, matrices(case.rank)
    weights = [case.W_base + _sum(case.U, z, case.L, case.P, case.scaling)[0] for z in (*ends, (ends[0] + ends[1]) / 2)]
    losses = [problem.loss(W) for W in weights]
    apart = _sum(case.U, ends[0] - ends[1], case.L, case.P, case.scaling)[0]
    bend = np.sum((problem.X @ apart.T) ** 2) / (8 * 9)
    assert bend > 0
    assert_close(losses[2], (losses[0] + losses[1]) / 2 - bend, size=sum(losses) + bend, what="loss half-way")


class Dependent(NamedTuple):
    """A weight one of whose columns is a sum of those before it."""

    W0: np.ndarray
    column: int


@st.composite
def dependent(draw: st.DrawFn) -> Dependent:
    rows, columns = draw(sides(2, 6)), draw(sides(2, 6))
    column, rng = draw(st.integers(0, min(rows, columns) - 1)), np.random.default_rng(draw(seeds()))
    W0 = _weight(Matrices(draw(seeds()), "small whole numbers"), rows, columns)
    W0[:, column] = W0[:, :column] @ rng.choice([1.0, -1.0, 2.0], column)
    return Dependent(W0, column)


@theorem(
    "loldu.T5",
    says="A column that depends on those before it has no pivot: elimination leaves nothing of it, and U does not exist.",
    formula=r"W_{:j} \in \mathrm{span}(W_{:1}, \dots, W_{:j-1}) \;\Rightarrow\; D_j = 0",
    tolerance=16,
    cases=dependent(),
)
def test_dependent_columns(case):
    found = _eliminate(case.W0[:, : case.column]) if case.column else None
    order = found.order if found else np.arange(len(case.W0))
    turned, j = case.W0[order], case.column
    left = turned[j:, j] - turned[j:, :j] @ np.linalg.solve(turned[:j, :j], turned[:j, j])
    conditioning = found.conditioning if found else 1.0
    assert_close(
        left, np.zeros(len(left)), size=np.abs(case.W0).max() * (j + 1), conditioning=conditioning, what="what is left of the column"
    )


@theorem(
    "loldu.T6",
    says="Without pivoting the factors can be as large as one likes: a small first entry, and L has its inverse.",
    formula=r"\begin{pmatrix} \epsilon & 1 \\ 1 & 1 \end{pmatrix} = \begin{pmatrix} 1 & 0 \\ 1/\epsilon & 1 \end{pmatrix}"
    r" \begin{pmatrix} \epsilon & 1 \\ 0 & 1 - 1/\epsilon \end{pmatrix}; \quad \text{with pivoting } |L| \le 1",
    tolerance=8,
    cases=st.sampled_from([2.0**-10, 2.0**-20, 2.0**-30]).map(lambda tiny: Large(np.array([[tiny, 1.0], [1.0, 1.0]]))),
    examples=3,
)
def test_pivoting_bounds_the_factors(case):
    tiny = case.W0[0, 0]
    plain = np.array([[1.0, 0.0], [1 / tiny, 1.0]])
    assert_close(plain @ np.array([[tiny, 1.0], [0.0, 1 - 1 / tiny]]), case.W0, size=1 / tiny, what="the product without pivoting")
    found = _eliminate(case.W0)
    assert np.abs(found.L).max() == 1
    assert_close(found.L[1, 0], tiny, size=1.0, what="the one entry below the diagonal")


@theorem(
    "loldu.T7",
    says="With the pretrained weight preserved the start of the diagonal drops out: descent goes through the same weights from each.",
    formula=r"W_t = W_0 + \sigma P L\, \mathrm{diag}(z_t - z_0)\, U, \quad z_t - z_0 \text{ free of } z_0",
    tolerance=512,
    cases=layers(),
)
def test_the_start_drops_out(case):
    matrices, (m, n) = Matrices(11), case.G.shape
    problem = LinearRegression(matrices.orthonormal(9, n) * 3, matrices(9, m))
    PL, paths = _rows_back(case.L, case.P), []
    lr = 0.5 / np.linalg.norm(_columns(case), 2) ** 2
    for z0 in (case.z, 0 * case.z, 10 * matrices(case.rank)):
        z, path, residual = z0, [], case.W_base - _sum(case.U, z0, case.L, case.P, case.scaling)[0]
        for _ in range(10):
            path.append(residual + _sum(case.U, z, case.L, case.P, case.scaling)[0])
            z = z - lr * case.scaling * np.einsum("mr,mn,rn->r", PL, problem.grad(path[-1]), case.U)
        paths.append(np.array(path))
    size = 10 * np.abs(np.array(paths)).max() + 30 * _sum(case.U, np.ones(case.rank), case.L, case.P, case.scaling)[1].max()
    for path in paths[1:]:
        assert_close(path, paths[0], size=size, what="weights along the training from another start")
