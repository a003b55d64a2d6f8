# mypy: ignore-errors
"""The laws of LoRA-SB. Expected values are NumPy float64; none comes from an implementation under test.

Singular vectors have free signs, so A, R and B of the start are never compared themselves, only what does not depend on the
signs: A'A, BB', the singular values of R and the product. Factors that are not orthonormal have singular values in [0.5, 2].
"""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from loracle.oracle_tests.draws import assert_normal, assert_seeded
from loracle.oracle_tests.expected import assert_linear, core_sum, space_conditioning, truncated
from loracle.oracle_tests.law import assert_close, law, theorem
from loracle.oracle_tests.loading import Derivation
from loracle.oracle_tests.problems import LinearRegression, LogisticRegression, slope
from loracle.oracle_tests.strategies import Matrices, entries, leads, many_gradients, scalings, seeds, sides


class Layer(NamedTuple):
    """One adapted layer and what may come in from either side. A and B are well conditioned, never orthonormal."""

    x: np.ndarray  # (..., in)
    G: np.ndarray  # (out, in)
    W0: np.ndarray  # (out, in)
    A: np.ndarray  # (rank, in)
    R: np.ndarray  # (rank, rank)
    B: np.ndarray  # (out, rank)
    D: np.ndarray  # (rank, rank), a step of R
    scaling: float
    bias: np.ndarray  # (out,)
    rank: int
    lr: float
    seed: int


def _factor(matrices, long, short):
    """A matrix (long, short) with singular values in [0.5, 2]; small whole numbers: one in each column, times 1 or 2, and turned."""
    if matrices.entries == "normal":
        return matrices.with_spectrum(long, short, matrices.rng.uniform(0.5, 2, short))
    plain = np.zeros((long, short))
    plain[matrices.rng.permutation(long)[:short], np.arange(short)] = matrices.rng.choice([2.0, 1.0, -1.0, -2.0, 0.5], short)
    # The first column is added to half of the others: columns that are not orthogonal, so that a Gram matrix is not diagonal
    return plain + 0.5 * plain[:, :1] * (np.arange(short) > 0)


@st.composite
def layers(draw: st.DrawFn, low: int = 1, high: int = 7, full_rank: bool = False) -> Layer:
    out_features = draw(sides(low, high))
    in_features = out_features if full_rank else draw(sides(low, high))
    rank = out_features if full_rank else draw(st.integers(1, min(out_features, in_features)))
    lead = draw(leads())
    seed = draw(seeds())
    matrices = Matrices(seed, draw(entries()))
    return Layer(
        x=matrices(*lead, in_features),
        G=matrices(out_features, in_features),
        W0=matrices(out_features, in_features),
        A=_factor(matrices, in_features, rank).T,
        R=matrices(rank, rank),
        B=_factor(matrices, out_features, rank),
        D=matrices(rank, rank),
        scaling=draw(scalings()),
        bias=matrices(out_features),
        rank=rank,
        lr=draw(st.sampled_from([0.5, 0.125])),
        seed=seed,
    )


def _delta_weight(impl, A, R, B, scaling=1.0):
    """The columns of Delta W are what the layer adds to W0 = 0 for the unit vectors."""
    W0 = np.zeros((B.shape[0], A.shape[1]))
    return impl.forward(x=np.eye(A.shape[1]), W0=W0, A=A, R=R, B=B, scaling=scaling).T


delta_weight_from_forward = Derivation("delta_weight", needs=("forward",), compute=_delta_weight)


# The layer


@law(
    "lora_sb.L1a",
    says="The gradient of R is the slope of the loss along single entries of R.",
    formula=r"g^R = s\, B^\top G A^\top",
    needs=("gradients",),
    tolerance=8,
    cases=layers(),
)
def test_gradients(impl, case):
    got = impl.gradients(G=case.G, A=case.A, B=case.B, scaling=case.scaling)
    # G is the gradient of the merged weight: the loss near it is <G, W>, linear in R, so its slopes are those at 0
    want = slope(lambda R: np.sum(case.G * (case.scaling * case.B @ R @ case.A)), 0 * case.R)
    size = case.scaling * np.abs(case.B).T @ np.abs(case.G) @ np.abs(case.A).T
    assert_close(got, want, size=size, what="grad_R")


@law(
    "lora_sb.L1b",
    says="The output is the frozen layer's plus s times B, R and A one after the other on the input.",
    formula=r"y = x W_0^\top + b + s\, x A^\top R^\top B^\top",
    needs=("forward.bias",),
    tolerance=8,
    cases=layers(),
)
def test_forward(impl, case):
    options = {"W0": case.W0, "A": case.A, "R": case.R, "B": case.B, "scaling": case.scaling}
    delta, size = core_sum(case.A, case.R, case.B, case.scaling)
    for bias in (case.bias, 0 * case.bias):
        given = {"bias": bias} if bias.any() else {}
        y = impl.forward(x=case.x, **options, **given)
        assert_linear(y, case.x, case.W0 + delta, bias, size=np.abs(case.W0) + size)


@law(
    "lora_sb.L1c",
    says="The adapted layer is one linear layer whose weight is the merged weight.",
    formula=r"y = x W^\top + b, \quad W = \mathrm{merge}(W_0, A, R, B, s)",
    needs=("forward.bias", "merge"),
    tolerance=8,
    cases=layers(),
)
def test_forward_is_merged(impl, case):
    options = {"W0": case.W0, "A": case.A, "R": case.R, "B": case.B, "scaling": case.scaling}
    W, y = impl.merge(**options), impl.forward(x=case.x, bias=case.bias, **options)
    weights = np.abs(case.W0) + core_sum(case.A, case.R, case.B, case.scaling)[1]
    assert_linear(y, case.x, W, case.bias, size=weights)


@law(
    "lora_sb.L1d",
    says="The merged weight adds to the pretrained one each entry of R times the outer product of B's column and A's row.",
    formula=r"W = W_0 + s \sum_{kj} R_{kj} B_{:k} A_{j:}",
    needs=("merge",),
    tolerance=8,
    cases=layers(),
)
def test_merge(impl, case):
    W = impl.merge(W0=case.W0, A=case.A, R=case.R, B=case.B, scaling=case.scaling)
    delta, size = core_sum(case.A, case.R, case.B, case.scaling)
    assert_close(W, case.W0 + delta, size=np.abs(case.W0) + size, what="W")


@law(
    "lora_sb.L1e",
    says="The update is the sum over the entries of R, each times the outer product of B's column and A's row.",
    formula=r"\Delta W = s \sum_{kj} R_{kj} B_{:k} A_{j:}",
    needs=("delta_weight",),
    tolerance=8,
    cases=layers(),
)
def test_delta_weight(impl, case):
    want, size = core_sum(case.A, case.R, case.B, case.scaling)
    assert_close(impl.delta_weight(A=case.A, R=case.R, B=case.B, scaling=case.scaling), want, size=size, what="Delta W")


@law(
    "lora_sb.L2a",
    says="A step of R of any size changes the weight by the equivalent gradient of that step: the relation is exact.",
    formula=r"W(R + D) - W(R) = s\, B D A = \tilde g(D)",
    needs=("delta_weight", "equivalent_gradient"),
    tolerance=8,
    cases=layers(),
)
def test_equivalence_is_exact(impl, case):
    options = {"A": case.A, "B": case.B, "scaling": case.scaling}
    change = impl.delta_weight(R=case.R + case.D, **options) - impl.delta_weight(R=case.R, **options)
    got = impl.equivalent_gradient(grad_R=case.D, **options)
    size = core_sum(case.A, np.abs(case.R) + np.abs(case.D), case.B, case.scaling)[1]
    assert_close(change, got, size=size, what="change of the weight")


@law(
    "lora_sb.L2b",
    says="The equivalent gradient is what the weight moves along when R moves along a direction.",
    formula=r"\tilde g = s \sum_{kj} g_{kj} B_{:k} A_{j:}",
    needs=("equivalent_gradient",),
    tolerance=8,
    cases=layers(),
)
def test_equivalent_gradient(impl, case):
    got = impl.equivalent_gradient(grad_R=case.D, A=case.A, B=case.B, scaling=case.scaling)
    want, size = core_sum(case.A, case.D, case.B, case.scaling)
    assert_close(got, want, size=size, what="the equivalent gradient")


# The best step of R


def _large(case):
    """How large the rounding errors of the optimal gradient may be: the inverses of the Gram matrices have norms up to 4."""
    return np.linalg.norm(np.linalg.pinv(case.B), 2) ** 2 * np.linalg.norm(np.linalg.pinv(case.A), 2) ** 2 / case.scaling**2


def _summed(case):
    """How large the terms are that back-propagation's gradient sums."""
    return case.scaling * np.linalg.norm(np.abs(case.B).T @ np.abs(case.G) @ np.abs(case.A).T)


def _conditioning(case):
    """Condition of the two Gram matrices."""
    return np.linalg.cond(case.A) ** 2 + np.linalg.cond(case.B) ** 2


@law(
    "lora_sb.L3a",
    says="The optimal gradient of R is the least-squares solution: no other step of R moves the weight as nearly along G.",
    formula=r"g_\star = \arg\min_g \|s B g A - G\|_F = \tfrac{1}{s^2} (B^\top B)^{-1} g^R (A A^\top)^{-1}",
    needs=("optimal_gradient",),
    tolerance=12,
    cases=layers(),
)
def test_optimal_gradient(impl, case):
    grad_R = case.scaling * case.B.T @ case.G @ case.A.T
    got = impl.optimal_gradient(grad_R=grad_R, A=case.A, B=case.B, scaling=case.scaling)
    # Row by row: vec(s B g A) = s (B x A') vec(g)
    want = np.linalg.lstsq(case.scaling * np.kron(case.B, case.A.T), case.G.ravel(), rcond=None)[0].reshape(got.shape)
    # The rounding of the closed form, and of the least squares that it is compared with
    squares = np.linalg.norm(case.G) * np.linalg.norm(np.linalg.pinv(case.B), 2) * np.linalg.norm(np.linalg.pinv(case.A), 2)
    size = _large(case) * _summed(case) + squares / case.scaling
    assert_close(got, want, size=size, conditioning=_conditioning(case), what="the optimal gradient")


@law(
    "lora_sb.L3b",
    says="The equivalent gradient of the optimal one is G projected on B's column space and A's row space.",
    formula=r"s B g_\star A = P_B G P_A",
    needs=("gradients", "optimal_gradient", "equivalent_gradient"),
    tolerance=8,
    cases=layers(),
)
def test_optimum_is_a_projection(impl, case):
    options = {"A": case.A, "B": case.B, "scaling": case.scaling}
    best = impl.optimal_gradient(grad_R=impl.gradients(G=case.G, **options), **options)
    got = impl.equivalent_gradient(grad_R=best, **options)
    assert_close(got, _projected(case), size=np.linalg.norm(case.G), conditioning=_conditioning(case), what="the best equivalent gradient")


def _spaces(A, B):
    """The orthogonal projectors on B's column space and A's row space, by singular vectors."""
    left, right = np.linalg.svd(B, full_matrices=False)[0], np.linalg.svd(A, full_matrices=False)[2]
    return left @ left.T, right.T @ right


def _projected(case):
    P_B, P_A = _spaces(case.A, case.B)
    return P_B @ case.G @ P_A


@law(
    "lora_sb.L3c",
    says="The projected gradient by itself: G on the left singular vectors of B and the right ones of A.",
    formula=r"P_B G P_A",
    needs=("projected_gradient",),
    tolerance=8,
    cases=layers(),
)
def test_projected_gradient(impl, case):
    got = impl.projected_gradient(G=case.G, A=case.A, B=case.B)
    conditioning = np.linalg.cond(case.A) + np.linalg.cond(case.B)
    assert_close(got, _projected(case), size=np.linalg.norm(case.G), conditioning=conditioning, what="the projected gradient")


@law(
    "lora_sb.L4",
    says="To first order a step along the optimal gradient decreases the loss by lr times the square of the projected gradient.",
    formula=r"\langle g^R, g_\star \rangle = \|P_B G P_A\|_F^2",
    needs=("gradients", "optimal_gradient"),
    tolerance=12,
    cases=layers(),
)
def test_decrease(impl, case):
    options = {"A": case.A, "B": case.B, "scaling": case.scaling}
    grad_R = impl.gradients(G=case.G, **options)
    got = np.sum(grad_R * impl.optimal_gradient(grad_R=grad_R, **options))
    size = _summed(case) ** 2 * _large(case)
    assert_close(got, np.sum(_projected(case) ** 2), size=size, conditioning=_conditioning(case), what="<grad_R, optimal gradient>")


@law(
    "lora_sb.L5",
    says="The best equivalent gradient is the same for every scaling.",
    formula=r"\tilde g_\star(s) = \tilde g_\star(0.3) = \tilde g_\star(4)",
    needs=("gradients", "optimal_gradient", "equivalent_gradient"),
    tolerance=8,
    cases=layers(),
)
def test_scaling_drops_out(impl, case):
    found = []
    for scaling in (case.scaling, 0.3, 4.0):
        options = {"A": case.A, "B": case.B, "scaling": scaling}
        best = impl.optimal_gradient(grad_R=impl.gradients(G=case.G, **options), **options)
        found.append(impl.equivalent_gradient(grad_R=best, **options))
    for scaling, other in zip((0.3, 4.0), found[1:], strict=True):
        size, conditioning = np.linalg.norm(case.G), _conditioning(case)
        assert_close(other, found[0], size=size, conditioning=conditioning, what=f"the best equivalent gradient for s = {scaling}")


class Gauged(NamedTuple):
    """A layer, and other bases of B's column space and A's row space."""

    G: np.ndarray
    A: np.ndarray
    B: np.ndarray
    M: np.ndarray  # (rank, rank)
    N: np.ndarray  # (rank, rank)
    scaling: float


@st.composite
def gauged(draw: st.DrawFn) -> Gauged:
    layer = draw(layers())
    matrices = Matrices(layer.seed + 1)
    M, N = (matrices.invertible(layer.rank, draw(st.sampled_from([1.0, 4.0]))) for _ in range(2))
    return Gauged(layer.G, layer.A, layer.B, M, N, layer.scaling)


@law(
    "lora_sb.L6",
    says="The best equivalent gradient depends on the two spaces alone, not on the bases that B and A are.",
    formula=r"(A, B) \mapsto (NA, BM) \;\Rightarrow\; \tilde g_\star \mapsto \tilde g_\star",
    needs=("gradients", "optimal_gradient", "equivalent_gradient"),
    tolerance=8,
    cases=gauged(),
)
def test_gauge(impl, case):
    found, conditions = [], []
    for A, B in ((case.A, case.B), (case.N @ case.A, case.B @ case.M)):
        options = {"A": A, "B": B, "scaling": case.scaling}
        best = impl.optimal_gradient(grad_R=impl.gradients(G=case.G, **options), **options)
        found.append(impl.equivalent_gradient(grad_R=best, **options))
        conditions.append(np.linalg.cond(A) ** 2 + np.linalg.cond(B) ** 2)
    size = np.linalg.norm(case.G)
    assert_close(found[1], found[0], size=size, conditioning=sum(conditions), what="the best equivalent gradient in other bases")


# The start


class Start(NamedTuple):
    """A first update to start from, with singular values that lie apart."""

    update: np.ndarray  # (out, in)
    W0: np.ndarray
    G: np.ndarray  # entries away from zero
    rank: int
    scaling: float
    lr: float
    adam_eps: float
    seed: int


@st.composite
def starts(draw: st.DrawFn, low: int = 1, full_rank: bool = False) -> Start:
    out_features = draw(sides(low, 8))
    in_features = out_features if full_rank else draw(sides(low, 8))
    smallest, seed = min(out_features, in_features), draw(seeds())
    matrices = Matrices(seed, draw(entries()))
    normal = matrices(out_features, in_features)
    return Start(
        update=matrices.separated(out_features, in_features) / 4,
        W0=matrices(out_features, in_features),
        G=np.sign(normal) * (0.25 + np.abs(normal)),
        rank=smallest if full_rank else draw(st.integers(1, smallest)),
        scaling=draw(scalings()),
        lr=draw(st.sampled_from([0.5, 0.125, 0.01])),
        adam_eps=draw(st.sampled_from([0.5, 0.125])),
        seed=seed,
    )


@law(
    "lora_sb.L7",
    says="At the start the columns of B and the rows of A are orthonormal, whatever the scaling.",
    formula=r"B^\top B = A A^\top = I_r",
    needs=("init",),
    tolerance=32,
    cases=starts(),
)
def test_orthonormal_factors(impl, case):
    A, _, B = impl.init(update=case.update, scaling=case.scaling, rank=case.rank)
    assert_close(A @ A.T, np.eye(case.rank), what="AA'")
    assert_close(B.T @ B, np.eye(case.rank), what="B'B")


@law(
    "lora_sb.L8a",
    says="B spans the leading left singular vectors of the first update, A the right ones, and s R has its leading singular values.",
    formula=r"B B^\top = U_{1..r} U_{1..r}^\top, \quad A^\top A = V_{1..r} V_{1..r}^\top, \quad \sigma_i(R) = S_i / s",
    needs=("init",),
    tolerance=32,
    cases=starts(),
)
def test_factors_of_the_start(impl, case):
    A, R, B = impl.init(update=case.update, scaling=case.scaling, rank=case.rank)
    U, values, Vt = np.linalg.svd(case.update)
    left, right = (space_conditioning(values, side, range(case.rank)) for side in case.update.shape)
    assert_close(A.T @ A, Vt[: case.rank].T @ Vt[: case.rank], conditioning=right, what="A'A")
    assert_close(B @ B.T, U[:, : case.rank] @ U[:, : case.rank].T, conditioning=left, what="BB'")
    size = values[0] / case.scaling
    assert_close(np.linalg.svd(R, compute_uv=False), values[: case.rank] / case.scaling, size=size, what="singular values of R")


@law(
    "lora_sb.L8b",
    says="The start is the best approximation of the first update of that rank, for every scaling: what it misses is the spectrum's tail.",
    formula=r"\|s B R A - \Delta W_1\|_F = \Big( \sum_{i > r} S_i^2 \Big)^{1/2}",
    needs=("init", "delta_weight"),
    tolerance=96,
    cases=starts(),
)
def test_start_is_the_best_approximation(impl, case):
    A, R, B = impl.init(update=case.update, scaling=case.scaling, rank=case.rank)
    start = impl.delta_weight(A=A, R=R, B=B, scaling=case.scaling)
    values = np.linalg.svd(case.update, compute_uv=False)
    size, what = np.linalg.norm(values), "distance of the start from the first update"
    assert_close(np.linalg.norm(start - case.update), np.linalg.norm(values[case.rank :]), size=size, what=what)
    assert_close(np.sum(start * case.update), np.sum(values[: case.rank] ** 2), size=size**2, what="<start, first update>")


@law(
    "lora_sb.L8c",
    says="Without a scaling the start is made for s = 1.",
    formula=r"B R A = (\Delta W_1)_r",
    needs=("init",),
    tolerance=64,
    cases=starts(),
)
def test_start_without_a_scaling(impl, case):
    A, R, B = impl.init(update=case.update, rank=case.rank)
    values = np.linalg.svd(case.update, compute_uv=False)
    conditioning = space_conditioning(values, case.update.shape[1], range(case.rank))
    assert_close(B @ R @ A, truncated(case.update, case.rank), size=values[0], conditioning=conditioning, what="B R A")


@law(
    "lora_sb.L8d",
    says="The pretrained weight is not corrected: the layer starts at W0 plus the best part of the first update.",
    formula=r"W = W_0 + (\Delta W_1)_r",
    needs=("init_weights",),
    tolerance=64,
    cases=starts(),
)
def test_no_correction(impl, case):
    scaled = impl.init_weights(W0=case.W0, update=case.update, scaling=case.scaling, rank=case.rank)
    for scaling, start in ((case.scaling, scaled), (1.0, impl.init_weights(W0=case.W0, update=case.update, rank=case.rank))):
        assert_close(start.W0, case.W0, size=0, what="the frozen weight")
        values = np.linalg.svd(case.update, compute_uv=False)
        conditioning, size = space_conditioning(values, case.update.shape[1], range(case.rank)), values[0]
        want = truncated(case.update, case.rank)
        assert_close(scaling * start.B @ start.R @ start.A, want, size=size, conditioning=conditioning, what="s B R A")


@law(
    "lora_sb.L8e",
    says="For gradient descent the gradient of R at the start is diagonal in R's own basis: minus R over the learning rate, at s = 1.",
    formula=r"\Delta W_1 = -\eta G,\ s = 1 \;\Rightarrow\; g^R = -R / \eta",
    needs=("first_step_update", "init", "gradients"),
    tolerance=128,
    cases=starts(),
)
def test_gradient_at_the_start(impl, case):
    update = impl.first_step_update(G=case.update, lr=case.lr, optimizer="sgd")
    A, R, B = impl.init(update=update, scaling=1.0, rank=case.rank)
    grad_R = impl.gradients(G=case.update, A=A, B=B, scaling=1.0)
    assert_close(grad_R, -R / case.lr, size=np.linalg.norm(case.update, 2), what="grad_R at the start")


@law(
    "lora_sb.L9",
    says="For the orthonormal factors of the start the optimal gradient is back-propagation's over s^2; at s = 1 nothing has to be done.",
    formula=r"B^\top B = A A^\top = I \;\Rightarrow\; g_\star = g^R / s^2",
    needs=("init", "optimal_gradient"),
    tolerance=64,
    cases=starts(),
)
def test_orthonormal_case(impl, case):
    A, R, B = impl.init(update=case.update, scaling=case.scaling, rank=case.rank)
    direction = Matrices(case.seed + 1)(*R.shape)
    for scaling in (case.scaling, 1.0):
        got = impl.optimal_gradient(grad_R=direction, A=A, B=B, scaling=scaling)
        assert_close(got, direction / scaling**2, size=np.linalg.norm(direction) / scaling**2, what="the optimal gradient")


# The first update


def _adamw(grads, start, lr, adam_eps, beta1=0.9, beta2=0.999):
    """AdamW without weight decay, over a list of gradients: the point after each step."""
    m = v = np.zeros_like(start)
    points = [start]
    for t, g in enumerate(grads, start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        points.append(points[-1] - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + adam_eps))
    return points


@law(
    "lora_sb.L10a",
    says="For AdamW the first update is the one that AdamW makes at its first step; without its epsilon, minus lr times the sign.",
    formula=r"\Delta W_1 = -\eta\, G / (|G| + \epsilon), \quad \epsilon = 0:\ -\eta\, \mathrm{sign}(G)",
    needs=("first_step_update.optimizer", "first_step_update.adam_eps"),
    tolerance=16,
    cases=starts(),
)
def test_first_step_of_adamw(impl, case):
    got = impl.first_step_update(G=case.G, lr=case.lr, optimizer="adamw", adam_eps=case.adam_eps)
    want = _adamw([case.G], 0 * case.G, case.lr, case.adam_eps)[1]
    assert_close(got, want, size=case.lr, what="the first update with epsilon")
    for given in ({"optimizer": "adamw"}, {}):
        G = np.where(Matrices(case.seed + 1).mask(*case.G.shape) & (np.arange(case.G.size).reshape(case.G.shape) > 0), 0.0, case.G)
        got = impl.first_step_update(G=G, lr=case.lr, **given)
        assert_close(got, case.lr * ((G < 0).astype(float) - (G > 0)), size=case.lr, what="the first update")


@law(
    "lora_sb.L10b",
    says="For gradient descent the first update is minus lr times the gradient.",
    formula=r"\Delta W_1 = -\eta\, G",
    needs=("first_step_update.optimizer",),
    tolerance=4,
    cases=starts(),
)
def test_first_step_of_gradient_descent(impl, case):
    got = impl.first_step_update(G=case.G, lr=case.lr, optimizer="sgd")
    # Where the loss's linear model plus the price of the way, <G, dW> + |dW|^2 / (2 lr), is least
    want = np.linalg.solve(np.eye(len(case.G)) / case.lr, -case.G)
    assert_close(got, want, size=case.lr * np.abs(case.G), what="the first update")


class Samples(NamedTuple):
    """A regression problem in microbatches whose gradients have very different sizes, and signs that disagree."""

    X: np.ndarray  # (samples, in)
    Y: np.ndarray  # (samples, out)
    W0: np.ndarray
    batches: int
    lr: float
    adam_eps: float


@st.composite
def samples(draw: st.DrawFn) -> Samples:
    out_features, in_features, batches = draw(sides(1, 4)), draw(sides(1, 4)), draw(st.sampled_from([2, 4, 3]))
    matrices, count = Matrices(draw(seeds()), draw(entries())), batches * draw(st.integers(1, 3))
    size = np.repeat(2.0 ** np.arange(batches), count // batches)[:, None]
    X, Y = matrices(count, in_features), size * matrices(count, out_features)
    return Samples(X, Y, matrices(out_features, in_features) / 8, batches, draw(st.sampled_from([0.5, 0.125])), 0.25)


@law(
    "lora_sb.L11a",
    says="The first update comes from the gradient averaged over the batches, not from the average of each batch's update.",
    formula=r"\Delta W_1 = -\eta\, \bar G / (|\bar G| + \epsilon), \quad \bar G = \tfrac1K \sum_k \nabla L_k(W_0)",
    needs=("estimate_update",),
    tolerance=32,
    cases=samples(),
)
def test_estimated_update(impl, case):
    batches = list(np.arange(len(case.X)).reshape(case.batches, -1))
    problem = LinearRegression(case.X, case.Y)
    G = problem.grad(case.W0)
    size = (np.abs(case.X) @ np.abs(case.W0).T + np.abs(case.Y)).T @ np.abs(case.X) / len(case.X)
    options = {"grad": problem.grad, "W0": case.W0, "batches": batches, "lr": case.lr}
    got = impl.estimate_update(optimizer="sgd", **options)
    assert_close(got, -case.lr * G, size=case.lr * size, what="the update of gradient descent")
    # The sum of gradients that round apart may have another sign: an entry near zero is compared with epsilon only
    got = impl.estimate_update(optimizer="adamw", adam_eps=case.adam_eps, **options)
    want = _adamw([G], 0 * G, case.lr, case.adam_eps)[1]
    assert_close(got, want, size=case.lr * (1 + size / case.adam_eps), what="the update of AdamW with epsilon")
    if np.abs(G).min() > 1e-3 * size.max():
        got = impl.estimate_update(**options)
        assert_close(got, -case.lr * np.sign(G), size=case.lr, what="the update of AdamW")


@law(
    "lora_sb.L11b",
    says="Each batch counts the same, whatever its number of samples.",
    formula=r"\bar G = \tfrac1K \sum_k \mathrm{grad}(W_0, \mathrm{batch}_k)",
    needs=("estimate_update.optimizer",),
    tolerance=16,
    cases=samples(),
)
def test_unequal_batches(impl, case):
    batches = np.split(np.arange(len(case.X)), np.arange(1, case.batches))  # all but the last of one sample
    got = impl.estimate_update(grad=LinearRegression(case.X, case.Y).grad, W0=case.W0, batches=batches, lr=case.lr, optimizer="sgd")
    weights = np.concatenate([np.full((len(rows), 1), 1 / (len(batches) * len(rows))) for rows in batches])
    size = (weights * (np.abs(case.X) @ np.abs(case.W0).T + np.abs(case.Y))).T @ np.abs(case.X)
    want = -case.lr * (weights * (case.X @ case.W0.T - case.Y)).T @ case.X
    assert_close(got, want, size=case.lr * size, what="the update of gradient descent")


@law(
    "lora_sb.L11c",
    says="Many batches are summed in at least single precision: the sum does not stop growing.",
    formula=r"\bar G = \tfrac1K \sum_{k=1}^{K} G_k, \quad K = 768",
    needs=("estimate_update.optimizer",),
    tolerance=12,
    cases=many_gradients(),
    examples=1,
)
def test_many_batches(impl, case):
    G, lr = case.gradients, 0.3
    options = {"grad": lambda W, k: G[int(k)], "W0": 0 * G[0], "batches": list(range(len(G))), "lr": lr, "optimizer": "sgd"}
    assert_close(
        impl.estimate_update(**options), -np.sum(lr * G / len(G), axis=0), size=lr * G.mean(axis=0), what="the update of gradient descent"
    )


# Training


@law(
    "lora_sb.L12a",
    says="One step moves the weight by minus lr times the projected gradient, or with the plain gradient by what back-propagation gives.",
    formula=r"\Delta(s B R A) = -\eta\, P_B G P_A, \quad \text{else } -\eta s^2 B B^\top G A^\top A",
    needs=("sgd_step.gradient",),
    tolerance=8,
    cases=layers(),
)
def test_step(impl, case):
    A, R, B, s, lr = case.A, case.R, case.B, case.scaling, case.lr
    P_B, P_A = _spaces(A, B)
    plain = s**2 * B @ (B.T @ case.G @ A.T) @ A
    options = {"G": case.G, "W0": case.W0, "A": A, "R": R, "B": B, "scaling": s, "lr": lr}
    default, best, other = impl.sgd_step(**options), *(impl.sgd_step(gradient=name, **options) for name in ("optimal", "plain"))
    for after, want in ((default, P_B @ case.G @ P_A), (best, P_B @ case.G @ P_A), (other, plain)):
        size = s * np.linalg.norm(B, 2) * np.linalg.norm(R) * np.linalg.norm(A, 2) + lr * (np.linalg.norm(plain) + np.linalg.norm(case.G))
        what = "change of s B R A"
        assert_close(s * B @ (after.R - R) @ A, -lr * want, size=size, conditioning=_conditioning(case), what=what)


@law(
    "lora_sb.L12b",
    says="W0, A and B come back from a step bit for bit, and s B R A never leaves their spaces.",
    formula=r"s B R_t A = P_B (s B R_t A) P_A",
    needs=("sgd_step", "delta_weight"),
    tolerance=16,
    cases=layers(),
)
def test_frozen_weights(impl, case):
    A, R, B, s = case.A, case.R, case.B, case.scaling
    P_B, P_A = _spaces(A, B)
    for t in range(5):
        G = Matrices(case.seed + 2 + t)(*case.G.shape)
        after = impl.sgd_step(G=G, W0=case.W0, A=A, R=R, B=B, scaling=s, lr=case.lr)
        for name in ("W0", "A", "B"):
            assert_close(getattr(after, name), getattr(case, name), size=0, what=f"{name} after {t + 1} steps")
        R = after.R
        delta, size = impl.delta_weight(A=A, R=R, B=B, scaling=s), core_sum(A, R, B, s)[1].max()
        assert_close(delta, P_B @ delta @ P_A, size=size, conditioning=_conditioning(case), what="s B R A")


class Trained(NamedTuple):
    """A least-squares problem, and what training starts from."""

    X: np.ndarray  # (samples, in)
    Y: np.ndarray  # (samples, out)
    W0: np.ndarray
    rank: int
    other: float  # another scaling
    lr: float


@st.composite
def trained(draw: st.DrawFn, full_rank: bool = False) -> Trained:
    start = draw(starts(full_rank=full_rank))
    matrices, (out_features, in_features) = Matrices(start.seed + 1), start.update.shape
    # Inputs with X'X / samples between 0.25 and 1: gradient descent with lr = 1 does not grow
    X = np.sqrt(12) * matrices.with_spectrum(12, in_features, matrices.rng.uniform(0.5, 1, in_features))
    return Trained(X, matrices(12, out_features), start.W0 / 4, start.rank, draw(st.sampled_from([3.7, 0.3])), 0.5)


def _start_of(impl, case, scaling):
    """The factors from the first step of gradient descent on the problem, at W0."""
    G = LinearRegression(case.X, case.Y).grad(case.W0)
    update = impl.first_step_update(G=G, lr=case.lr, optimizer="sgd")
    return update, impl.init(update=update, scaling=scaling, rank=case.rank)


@law(
    "lora_sb.L13",
    says="Fifteen steps of gradient descent with the optimal gradient go through the same weights at every scaling.",
    formula=r"s B R_t A \text{ is the same for } s = 1 \text{ and } s = 3.7, \quad t = 0..15",
    needs=("first_step_update", "init", "sgd_step", "delta_weight"),
    tolerance=64,
    cases=trained(),
)
def test_trajectory_is_free_of_the_scaling(impl, case):
    problem, paths = LinearRegression(case.X, case.Y), []
    for scaling in (1.0, case.other):
        _, (A, R, B) = _start_of(impl, case, scaling)
        path = [impl.delta_weight(A=A, R=R, B=B, scaling=scaling)]
        for _ in range(15):
            G = problem.grad(case.W0 + path[-1])
            _, A, R, B = impl.sgd_step(G=G, W0=case.W0, A=A, R=R, B=B, scaling=scaling, lr=case.lr)
            path.append(impl.delta_weight(A=A, R=R, B=B, scaling=scaling))
        paths.append(np.array(path))
    size = 1 + np.linalg.norm(case.Y) + np.linalg.norm(case.W0)
    assert_close(paths[1], paths[0], size=size, what=f"s B R A along the training at s = {case.other}")


@law(
    "lora_sb.L14",
    says="At full rank training is full fine-tuning that has already made its first step.",
    formula=r"r = m = n \;\Rightarrow\; W_t = W^{full}_{t + 1}",
    needs=("first_step_update", "init_weights", "sgd_step", "merge"),
    tolerance=64,
    cases=trained(full_rank=True),
)
def test_full_rank(impl, case):
    problem = LinearRegression(case.X, case.Y)
    update = impl.first_step_update(G=problem.grad(case.W0), lr=case.lr, optimizer="sgd")
    weights = impl.init_weights(W0=case.W0, update=update, scaling=case.other, rank=case.rank)
    full, size = case.W0 - case.lr * problem.grad(case.W0), 1 + np.linalg.norm(case.Y) + np.linalg.norm(case.W0)
    for t in range(6):
        W = impl.merge(**weights._asdict(), scaling=case.other)
        assert_close(W, full, size=size, what=f"W after {t} steps")
        weights = impl.sgd_step(G=problem.grad(W), **weights._asdict(), scaling=case.other, lr=case.lr)
        full = full - case.lr * problem.grad(full)


@law(
    "lora_sb.L15",
    says="Just the entries of R are trained, however large the layer.",
    formula=r"r^2",
    needs=("num_trainable",),
    tolerance=0,
    cases=layers(),
)
def test_parameter_count(impl, case):
    assert_close(impl.num_trainable(W0=case.W0, rank=case.rank), case.R.size, size=0, what="number of trainable parameters")


# The baseline LoRA-XS


@law(
    "lora_sb.L16a",
    says="LoRA-XS starts with the leading singular triplets of the pretrained weight, the singular values in B.",
    formula=r"B A = (W_0)_r, \quad A A^\top = I, \quad B^\top B = \Sigma_r^2",
    needs=("init_xs",),
    tolerance=64,
    cases=starts(),
)
def test_factors_of_xs(impl, case):
    W0 = case.update  # with singular values that lie apart
    A, _, B = impl.init_xs(W0=W0, rank=case.rank, generator=case.seed)
    values = np.linalg.svd(W0, compute_uv=False)
    conditioning = space_conditioning(values, W0.shape[1], range(case.rank))
    assert_close(A @ A.T, np.eye(case.rank), what="AA'")
    assert_close(B.T @ B, np.diag(values[: case.rank] ** 2), size=values[0] ** 2, what="B'B")
    assert_close(B @ A, truncated(W0, case.rank), size=values[0], conditioning=conditioning, what="B A")


class Draw(NamedTuple):
    """A weight to start LoRA-XS on."""

    W0: np.ndarray
    rank: int
    sigma: float
    seed: int


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    seed = draw(seeds())
    return Draw(Matrices(seed)(26, 24), draw(st.integers(22, 24)), draw(st.sampled_from([0.02, 3.0])), seed)


@law(
    "lora_sb.L16b",
    says="LoRA-XS draws R normal with mean 0 and width sigma, 1e-5 by default; a seed repeats it.",
    formula=r"R_{ij} \sim \mathcal N(0, \sigma^2), \quad \sigma = 10^{-5}",
    needs=("init_xs.sigma", "init_xs.generator"),
    tolerance=0,
    cases=draws(),
    examples=5,
)
def test_draw_of_xs(impl, case):
    for sigma, given in ((case.sigma, {"sigma": case.sigma}), (1e-5, {})):
        options = {"W0": case.W0, "rank": case.rank, **given}
        start = assert_seeded(lambda seed, options=options: impl.init_xs(generator=seed, **options), case.seed, "R")
        assert_normal(start.R, sigma, "R")


# The randomised decomposition


class Sketched(NamedTuple):
    """A first update and the test matrix of a randomised decomposition of it."""

    update: np.ndarray
    sketch: np.ndarray  # (in, columns)
    rank: int
    scaling: float
    niter: int


@st.composite
def sketched(draw: st.DrawFn, full: bool = False) -> Sketched:
    start = draw(starts(low=3))
    smallest = min(start.update.shape)
    rank = min(start.rank, smallest - 1)
    width = smallest if full else draw(st.integers(rank, smallest - 1))
    matrices = Matrices(start.seed + 1)
    if full and smallest < start.update.shape[1]:
        # The test matrix must meet the whole row space: on the update's own right singular vectors, mixed
        sketch = np.linalg.svd(start.update)[2][:smallest].T @ matrices.orthonormal(smallest, smallest)
    else:
        sketch = matrices.orthonormal(start.update.shape[1], width)
    return Sketched(start.update, sketch, rank, start.scaling, draw(st.sampled_from((1, 2, 0))))


def _seen_by(sketch, M, niter):
    """M projected on the range that the iterations reach."""
    basis = np.linalg.svd(M @ sketch, full_matrices=False)[0]
    for _ in range(niter):
        basis = np.linalg.svd(M @ M.T @ basis, full_matrices=False)[0]
    return basis @ basis.T @ M


def _assert_start(factors, seen, case):
    """Assert that the factors are the leading triplets of what the sketch sees."""
    A, R, B = factors
    values = np.linalg.svd(seen, compute_uv=False)
    values[case.sketch.shape[1] :] = 0  # the rounding of zeros: there is no more than the sketch's columns
    assert_close(A @ A.T, np.eye(case.rank), what="AA'")
    assert_close(B.T @ B, np.eye(case.rank), what="B'B")
    size = values[0] / case.scaling
    assert_close(np.linalg.svd(R, compute_uv=False), values[: case.rank] / case.scaling, size=size, what="singular values of R")
    missed = np.linalg.norm(values[case.rank :])
    got = np.linalg.norm(case.scaling * B @ R @ A - seen)
    assert_close(got, missed, size=np.linalg.norm(values), what="distance of the start from what the sketch sees")


@law(
    "lora_sb.L17a",
    says="A sketch that meets the whole row space of the update loses nothing.",
    formula=r"\mathrm{range}(\Omega) = \mathrm{range}(\Delta W_1^\top) \;\Rightarrow\; s B R A = (\Delta W_1)_r",
    needs=("init.sketch",),
    tolerance=64,
    cases=sketched(full=True),
)
def test_full_sketch(impl, case):
    _assert_start(impl.init(update=case.update, scaling=case.scaling, rank=case.rank, sketch=case.sketch), case.update, case)


@law(
    "lora_sb.L17b",
    says="With a narrower sketch the start is made of the update projected on the range that the iterations reach.",
    formula=r"Q = \mathrm{orth}\big( (M M^\top)^{k} M\, \Omega \big), \quad U S V^\top = \mathrm{svd}(Q Q^\top M), \quad M = \Delta W_1",
    needs=("init.sketch", "init.niter"),
    tolerance=128,
    cases=sketched(),
)
def test_narrow_sketch(impl, case):
    factors = impl.init(update=case.update, scaling=case.scaling, rank=case.rank, sketch=case.sketch, niter=case.niter)
    _assert_start(factors, _seen_by(case.sketch, case.update, case.niter), case)


@law(
    "lora_sb.L17c",
    says="Without another number the randomised decomposition does ten iterations.",
    formula=r"Q = \mathrm{orth}\big( (M M^\top)^{10} M\, \Omega \big)",
    needs=("init.sketch",),
    tolerance=128,
    cases=sketched(),
)
def test_default_iterations(impl, case):
    factors = impl.init(update=case.update, scaling=case.scaling, rank=case.rank, sketch=case.sketch)
    _assert_start(factors, _seen_by(case.sketch, case.update, 10), case)


class SketchCase(NamedTuple):
    """An update to draw test matrices for."""

    update: np.ndarray
    seed: int


@st.composite
def sketch_cases(draw: st.DrawFn) -> SketchCase:
    seed = draw(seeds())
    return SketchCase(Matrices(seed)(draw(st.integers(16, 20)), draw(st.integers(40, 44))), seed)


@law(
    "lora_sb.L17d",
    says="The sketch has `rank` columns on the input side and standard normal entries, repeated by the same seed.",
    formula=r"\Omega \in \mathbb R^{n \times r}, \quad \Omega_{ij} \sim \mathcal N(0, 1)",
    needs=("draw_sketch",),
    tolerance=0,
    cases=sketch_cases(),
    examples=5,
)
def test_sketch(impl, case):
    for rank in (12, 16):
        sketch = assert_seeded(lambda seed, rank=rank: impl.draw_sketch(update=case.update, rank=rank, generator=seed), case.seed, "sketch")
        assert sketch.shape == (case.update.shape[1], rank), f"for rank {rank} the sketch has shape {sketch.shape}"
        assert_normal(sketch, 1.0, "the sketch")


# Theorem checks: the mathematics itself


@theorem(
    "lora_sb.T1",
    says="Through a smooth loss the gradient of R follows from the gradient of the merged weight alone (Lemma 1).",
    formula=r"\nabla_R L(W_0 + sBRA) = s\, B^\top \nabla L(W)\, A^\top",
    tolerance=1e7,  # central differences with step 1e-4: h^2 plus eps / h, about 1e-8
    cases=layers(high=5),
)
def test_chain_rule(case):
    matrices, s, (m, n) = Matrices(case.seed + 3), case.scaling, case.G.shape
    problem = LogisticRegression(matrices(9, n), np.sign(matrices(9, m)))
    slope_R = slope(lambda R: problem.loss(case.W0 + s * case.B @ R @ case.A), case.R, step=1e-4)
    G = problem.grad(case.W0 + s * case.B @ case.R @ case.A)
    largest = 1 + np.abs(problem.X).max() * s * (np.abs(case.A).max() + np.abs(case.B).max())
    assert_close(s * case.B.T @ G @ case.A.T, slope_R, size=largest**3, what="gradient of R")


@theorem(
    "lora_sb.T2",
    says="Every other step of R is farther from G, by just the square of how far its equivalent gradient is from the best (Theorem 2).",
    formula=r"\|s B g A - G\|_F^2 = \|G - P_B G P_A\|_F^2 + \|s B (g - g_\star) A\|_F^2",
    tolerance=64,
    cases=layers(),
)
def test_unique_minimum(case):
    A, B, s, G = case.A, case.B, case.scaling, case.G
    best = np.linalg.pinv(B) @ G @ np.linalg.pinv(A) / s
    for width in (1e-2, 1.0, 10.0):
        other = best + width * case.D
        got, tail = np.sum((s * B @ other @ A - G) ** 2), np.sum((G - _projected(case)) ** 2)
        apart = np.sum((s * B @ (other - best) @ A) ** 2)
        assert apart > 0, "another step of R gives the same equivalent gradient"
        size = np.sum(G**2) + apart
        assert_close(got, tail + apart, size=size, conditioning=_conditioning(case), what="squared distance from G")


@theorem(
    "lora_sb.T3",
    says="A small step along the optimal gradient decreases the loss, by lr times the squared projected gradient (Theorem 3).",
    formula=r"\frac{d}{d\eta} L(W_0 + s B (R - \eta g_\star) A) = -\|P_B G P_A\|_F^2 \le 0",
    tolerance=1e6,  # central differences in the step length
    cases=layers(high=5),
)
def test_loss_decreases(case):
    matrices, s, (m, n) = Matrices(case.seed + 3), case.scaling, case.G.shape
    problem = LogisticRegression(matrices(9, n), np.sign(matrices(9, m)))
    W = case.W0 + s * case.B @ case.R @ case.A
    P_B, P_A = _spaces(case.A, case.B)
    G = problem.grad(W)
    best = np.linalg.pinv(case.B) @ G @ np.linalg.pinv(case.A) / s
    step = 1e-4
    ahead, behind = (problem.loss(W - lr * s * case.B @ best @ case.A) for lr in (step, -step))
    want, size = -np.sum((P_B @ G @ P_A) ** 2), (1 + np.linalg.norm(G) * np.linalg.norm(problem.X)) ** 3
    assert_close((ahead - behind) / (2 * step), want, size=size, what="slope of the loss along the step")


@theorem(
    "lora_sb.T4",
    says="No other start of that rank is nearer to the first update, whatever its spaces.",
    formula=r"\min_{A, R, B} \|s B R A - \Delta W_1\|_F^2 = \sum_{i > r} S_i^2",
    tolerance=64,
    cases=starts(low=2),
)
def test_no_start_is_nearer(case):
    U, values, Vt = np.linalg.svd(case.update)
    tail, matrices = np.sum(values[case.rank :] ** 2), Matrices(case.seed + 2)
    for width in (0, 1e-2, 0.3, 10.0):
        B = U[:, : case.rank] + width * matrices(len(U), case.rank)
        A = Vt[: case.rank] + width * matrices(case.rank, len(Vt))
        P_B, P_A = _spaces(A, B)  # the best R for these spaces gives the projection
        excess = np.sum((case.update - P_B @ case.update @ P_A) ** 2) - tail
        if width == 0:
            assert_close(excess, 0.0, size=np.sum(values**2), what="how much farther the singular vectors are")
        assert_close(min(excess, 0.0), 0.0, size=np.sum(values**2), what="how much nearer another start is")


@theorem(
    "lora_sb.T5",
    says="Under AdamW the scaling is a learning rate: with a constant gradient the weight moves s times as far at every step.",
    formula=r"\Delta(s B R A) \propto s, \quad \epsilon \to 0",
    tolerance=4e6,  # of epsilon, 1e-12, against gradients of size 1e-2 and more
    cases=layers(),
)
def test_scaling_under_adamw(case):
    A, B, G = case.A, case.B, case.G
    plain = B.T @ G @ A.T
    keep = np.abs(plain) > 1e-2
    plain = np.where(keep, plain, 0.0)
    moved = {}
    for s in (1.0, 3.7):
        points = _adamw([s * plain] * 4, 0 * plain, case.lr, 1e-12)
        moved[s] = np.array([s * B @ point @ A for point in points[1:]])
        # Theorem 2's factor 1 / s^2 changes nothing: the gradient's size drops out
        again = _adamw([plain / s] * 4, 0 * plain, case.lr, 1e-12)
        assert_close([s * B @ point @ A for point in again[1:]], moved[s], size=1 + np.abs(moved[s]).max(), what="steps with g / s^2")
    assert_close(moved[3.7], 3.7 * moved[1.0], size=1 + np.abs(moved[3.7]).max(), what="change of s B R A")


@theorem(
    "lora_sb.T6",
    says="AdamW is free of the scaling if its moments are kept on g / s and its update is divided by s.",
    formula=r"R \mapsto R - \tfrac{\eta}{s}\, \mathrm{Adam}(g^R / s) \;\Rightarrow\; s B R_t A \text{ is free of } s",
    tolerance=64,
    cases=trained(),
)
def test_adamw_made_free_of_the_scaling(case):
    problem, matrices, paths = LinearRegression(case.X, case.Y), Matrices(case.rank), []
    A, B = matrices.orthonormal(case.W0.shape[1], case.rank).T, matrices.orthonormal(len(case.W0), case.rank)
    for s in (1.0, case.other):
        R = m = v = np.zeros((case.rank, case.rank))
        path = []
        for t in range(1, 6):
            g = B.T @ problem.grad(case.W0 + s * B @ R @ A) @ A.T  # back-propagation's gradient over s
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            R = R - 0.01 / s * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-2)
            path.append(s * B @ R @ A)
        paths.append(np.array(path))
    assert_close(paths[1], paths[0], size=1.0, what=f"s B R A under AdamW at s = {case.other}")


@theorem(
    "lora_sb.T7",
    says="A start from gradient descent's first step goes downhill; that from the sign has no such guarantee, its full matrix has.",
    formula=r"\langle (-\eta G)_r, G \rangle = -\tfrac1\eta \sum_{i \le r} S_i^2, \quad \langle -\mathrm{sign}\, G, G \rangle = -\|G\|_1",
    tolerance=64,
    cases=starts(),
)
def test_start_goes_downhill(case):
    G, lr = case.G, case.lr
    values = np.linalg.svd(-lr * G, compute_uv=False)
    want = -np.sum(values[: case.rank] ** 2) / lr
    assert want < 0
    assert_close(np.sum(truncated(-lr * G, case.rank) * G), want, size=np.sum(values**2) / lr, what="<start, G>")
    assert_close(np.sum(-lr * np.sign(G) * G), -lr * np.sum(np.abs(G)), size=lr * np.sum(np.abs(G)), what="<first update, G>")


class OneLargeEntry(NamedTuple):
    """A gradient of ones but for one entry."""

    side: int
    large: float


@theorem(
    "lora_sb.T8",
    says="The best rank-1 part of the sign's first update can go uphill: ones, but for one large entry of the other sign.",
    formula=r"G_{ij} = 1,\ G_{11} = -g \gg 1 \;\Rightarrow\; \langle (-\mathrm{sign}\, G)_1, G \rangle > 0",
    tolerance=16,
    cases=st.builds(OneLargeEntry, side=st.integers(4, 8), large=st.sampled_from([200.0, 1000.0])),
)
def test_sign_start_may_go_uphill(case):
    n, g = case.side, case.large
    G = np.ones((n, n))
    G[0, 0] = -g
    start = truncated(-np.sign(G), 1)
    assert np.sum(start * G) > 0, "the start goes downhill"
    # The sign matrix acts on vectors (a, b, ..., b): there it is [[-1, n - 1], [1, n - 1]] in (a, b), symmetric after a change of scale
    small = np.array([[-1.0, np.sqrt(n - 1)], [np.sqrt(n - 1), n - 1.0]])
    values, vectors = np.linalg.eigh(small)
    top = np.argmax(np.abs(values))
    a, b = vectors[0, top], vectors[1, top] / np.sqrt(n - 1)
    want = -values[top] * (-g * a * a + 2 * (n - 1) * a * b + (n - 1) ** 2 * b * b)
    assert_close(np.sum(start * G), want, size=np.abs(values[top]) * (g + n * n), what="<start, G>")
