# mypy: ignore-errors
"""The laws of NLoRA, SLoRA and IntTune. Expected values are NumPy float64; none comes from an implementation under test.

The block in which the landmark rows and columns cross has singular values that the case chooses, from 1 down to 1 / condition;
what is inverted is compared to the condition times rounding. Factors of least-squares laws have singular values in [0.5, 2].
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from loracle.oracle_tests.draws import assert_normal, assert_seeded, assert_uniform
from loracle.oracle_tests.expected import assert_linear, core_sum
from loracle.oracle_tests.law import assert_close, law, of, theorem
from loracle.oracle_tests.loading import Derivation
from loracle.oracle_tests.problems import LogisticRegression, slope
from loracle.oracle_tests.strategies import Matrices, entries, leads, scalings, seeds, sides

METHODS = ("nlora", "slora", "inttune")


class Layer(NamedTuple):
    """One adapted layer and what may come in from either side."""

    x: np.ndarray  # (..., in)
    G: np.ndarray  # (out, in)
    W_base: np.ndarray  # (out, in)
    A: np.ndarray  # (rank, in)
    N: np.ndarray  # (rank, rank)
    B: np.ndarray  # (out, rank)
    A0: np.ndarray  # further factors, of the start
    N0: np.ndarray
    B0: np.ndarray
    scaling: float
    bias: np.ndarray  # (out,)
    mask: np.ndarray  # (..., in)
    p: float
    rank: int
    lr: float
    seed: int


@st.composite
def layers(draw: st.DrawFn, low: int = 1, high: int = 7) -> Layer:
    out_features, in_features = draw(sides(low, high)), draw(sides(low, high))
    rank = draw(st.integers(1, min(out_features, in_features)))
    lead = draw(leads())
    seed = draw(seeds())
    matrices = Matrices(seed, draw(entries()))
    return Layer(
        x=matrices(*lead, in_features),
        G=matrices(out_features, in_features),
        W_base=matrices(out_features, in_features),
        A=matrices(rank, in_features),
        N=matrices(rank, rank),
        B=matrices(out_features, rank),
        A0=matrices(rank, in_features),
        N0=matrices(rank, rank),
        B0=matrices(out_features, rank),
        scaling=draw(scalings()),
        bias=matrices(out_features),
        mask=matrices.mask(*lead, in_features),
        p=draw(st.sampled_from([0.5, 0.25])),
        rank=rank,
        lr=draw(st.sampled_from([0.5, 0.125])),
        seed=seed,
    )


def _delta_weight(impl, A, N, B, scaling=1.0):
    """The columns of Delta W are what the layer adds to W_base = 0 for the unit vectors."""
    W_base = np.zeros((B.shape[0], A.shape[1]))
    return impl.forward(x=np.eye(A.shape[1]), W_base=W_base, A=A, N=N, B=B, scaling=scaling).T


delta_weight_from_forward = Derivation("delta_weight", needs=("forward",), compute=_delta_weight)


# The layer


@law(
    "nlora.L2a",
    says="The output is the frozen layer's plus s times A, N and B one after the other on the input.",
    formula=r"y = x W_{base}^\top + b + s\, x A^\top N^\top B^\top",
    needs=("forward.bias",),
    tolerance=8,
    cases=layers(),
)
def test_forward(impl, case):
    options = of(case, "W_base", "A", "N", "B", "scaling")
    delta, size = core_sum(case.A, case.N, case.B, case.scaling)
    for bias in (case.bias, 0 * case.bias):
        given = {"bias": bias} if bias.any() else {}
        y = impl.forward(x=case.x, **options, **given)
        assert_linear(y, case.x, case.W_base + delta, bias, size=np.abs(case.W_base) + size)


@law(
    "nlora.L2b",
    says="The adapted layer is one linear layer whose weight is the merged weight.",
    formula=r"y = x W^\top + b, \quad W = \mathrm{merge}(W_{base}, A, N, B, s)",
    needs=("forward.bias", "merge"),
    tolerance=8,
    cases=layers(),
)
def test_forward_is_merged(impl, case):
    options = of(case, "W_base", "A", "N", "B", "scaling")
    W, y = impl.merge(**options), impl.forward(x=case.x, bias=case.bias, **options)
    weights = np.abs(case.W_base) + core_sum(case.A, case.N, case.B, case.scaling)[1]
    assert_linear(y, case.x, W, case.bias, size=weights)


@law(
    "nlora.L2c",
    says="The merged weight adds to the frozen one each entry of N times the outer product of B's column and A's row.",
    formula=r"W = W_{base} + s \sum_{kj} N_{kj} B_{:k} A_{j:}",
    needs=("merge",),
    tolerance=8,
    cases=layers(),
)
def test_merge(impl, case):
    W = impl.merge(**of(case, "W_base", "A", "N", "B", "scaling"))
    delta, size = core_sum(case.A, case.N, case.B, case.scaling)
    assert_close(W, case.W_base + delta, size=np.abs(case.W_base) + size, what="W")


@law(
    "nlora.L2d",
    says="Unmerging takes the update off again.",
    formula=r"W_{base} = W - s B N A",
    needs=("unmerge",),
    tolerance=8,
    cases=layers(),
)
def test_unmerge(impl, case):
    delta, size = core_sum(case.A, case.N, case.B, case.scaling)
    got = impl.unmerge(W=case.W_base + delta, **of(case, "A", "N", "B", "scaling"))
    assert_close(got, case.W_base, size=np.abs(case.W_base) + size, what="the frozen weight")


@law(
    "nlora.L2e",
    says="The update is the sum over the entries of N, each times the outer product of B's column and A's row.",
    formula=r"\Delta W = s \sum_{kj} N_{kj} B_{:k} A_{j:}",
    needs=("delta_weight",),
    tolerance=8,
    cases=layers(),
)
def test_delta_weight(impl, case):
    want, size = core_sum(case.A, case.N, case.B, case.scaling)
    assert_close(impl.delta_weight(**of(case, "A", "N", "B", "scaling")), want, size=size, what="Delta W")


@law(
    "nlora.L2f",
    says="Dropout drops entries of the adapter's input alone and divides the others by 1 - p; the frozen path and the bias see all of x.",
    formula=r"y = x W_{base}^\top + b + s \Big( \frac{x \odot \mathrm{mask}}{1 - p} \Big) A^\top N^\top B^\top",
    needs=("forward.mask", "forward.p", "forward.bias"),
    tolerance=8,
    cases=layers(),
)
def test_dropout(impl, case):
    y = impl.forward(**of(case, "x", "W_base", "A", "N", "B", "scaling", "bias", "mask", "p"))
    delta, size = core_sum(case.A, case.N, case.B, case.scaling)
    kept = np.where(case.mask, case.x, 0.0) / (1 - case.p)
    want = case.x @ case.W_base.T + case.bias + kept @ delta.T
    assert_close(y, want, size=np.abs(case.x) @ np.abs(case.W_base).T + np.abs(case.bias) + np.abs(kept) @ size.T, what="y")


@law(
    "nlora.L3a",
    says="The gradients of A, N and B are the slopes of the loss along their single entries.",
    formula=r"g_A = s (BN)^\top G, \quad g_N = s B^\top G A^\top, \quad g_B = s G (NA)^\top",
    needs=("gradients",),
    tolerance=8,
    cases=layers(),
)
def test_gradients(impl, case):
    got = impl.gradients(**of(case, "G", "A", "N", "B", "scaling"))
    A, N, B, G, s = case.A, case.N, case.B, case.G, case.scaling
    # G is the gradient of the merged weight: the loss near it is <G, W>, linear in each factor, so its slopes are those at 0
    want_A = slope(lambda M: np.sum(G * (s * B @ N @ M)), 0 * A)
    want_N = slope(lambda M: np.sum(G * (s * B @ M @ A)), 0 * N)
    want_B = slope(lambda M: np.sum(G * (s * M @ N @ A)), 0 * B)
    A, N, B, G = map(np.abs, (A, N, B, G))
    assert_close(got.grad_A, want_A, size=s * (B @ N).T @ G, what="grad_A")
    assert_close(got.grad_N, want_N, size=s * B.T @ G @ A.T, what="grad_N")
    assert_close(got.grad_B, want_B, size=s * G @ (N @ A).T, what="grad_B")


@law(
    "nlora.L3b",
    says="Neighbouring factors meet in the same matrix, so their gradients are balanced.",
    formula=r"B^\top g_B = g_N N^\top, \quad N^\top g_N = g_A A^\top",
    needs=("gradients",),
    tolerance=16,
    cases=layers(),
)
def test_balance(impl, case):
    g = impl.gradients(**of(case, "G", "A", "N", "B", "scaling"))
    A, N, B, G = map(np.abs, (case.A, case.N, case.B, case.G))
    size = case.scaling * B.T @ G @ (N @ A).T
    assert_close(case.B.T @ g.grad_B, g.grad_N @ case.N.T, size=size, what="B' grad_B")
    size = case.scaling * (B @ N).T @ G @ A.T
    assert_close(case.N.T @ g.grad_N, g.grad_A @ case.A.T, size=size, what="N' grad_N")


class Gauged(NamedTuple):
    """A layer, and other bases for both sides of N."""

    G: np.ndarray
    A: np.ndarray
    N: np.ndarray
    B: np.ndarray
    P: np.ndarray  # (rank, rank)
    Q: np.ndarray  # (rank, rank)
    scaling: float


@st.composite
def gauged(draw: st.DrawFn) -> Gauged:
    layer = draw(layers())
    matrices = Matrices(layer.seed + 1)
    P, Q = (matrices.invertible(layer.rank, draw(st.sampled_from([1.0, 4.0]))) for _ in range(2))
    return Gauged(layer.G, layer.A, layer.N, layer.B, P, Q, layer.scaling)


@law(
    "nlora.L13d",
    says="Other bases on both sides of N leave the update, and the gradients go along.",
    formula=r"(A, N, B) \mapsto (PA, Q N P^{-1}, B Q^{-1}) \;\Rightarrow\; \Delta W \mapsto \Delta W",
    needs=("delta_weight", "gradients"),
    tolerance=16,
    cases=gauged(),
)
def test_gauge(impl, case):
    inverse_P, inverse_Q = np.linalg.inv(case.P), np.linalg.inv(case.Q)
    plain = of(case, "A", "N", "B", "scaling")
    other = {"A": case.P @ case.A, "N": case.Q @ case.N @ inverse_P, "B": case.B @ inverse_Q, "scaling": case.scaling}
    condition = np.linalg.cond(case.P) * np.linalg.cond(case.Q)
    sizes = [np.linalg.norm(M) for M in (case.A, case.N, case.B)]
    size = case.scaling * np.prod(sizes)
    assert_close(impl.delta_weight(**other), impl.delta_weight(**plain), size=size, conditioning=condition, what="Delta W")
    g, moved = impl.gradients(G=case.G, **plain), impl.gradients(G=case.G, **other)
    size, condition = case.scaling * np.linalg.norm(case.G) * np.prod(sizes), condition**2
    for name, back in (
        ("grad_A", case.P.T @ moved.grad_A),
        ("grad_N", case.Q.T @ moved.grad_N @ inverse_P.T),
        ("grad_B", moved.grad_B @ inverse_Q.T),
    ):
        own = size / sizes[("grad_A", "grad_N", "grad_B").index(name)]
        assert_close(back, getattr(g, name), size=own, conditioning=condition, what=name)


@law(
    "nlora.L14a",
    says="With the identity in the middle it is LoRA.",
    formula=r"N = I \;\Rightarrow\; \Delta W = s B A, \; y = x W_{base}^\top + s\, x A^\top B^\top",
    needs=("forward", "delta_weight"),
    tolerance=8,
    cases=layers(),
)
def test_identity_is_lora(impl, case):
    options = {**of(case, "A", "B", "scaling"), "N": np.eye(case.rank)}
    want, size = case.scaling * case.B @ case.A, case.scaling * np.abs(case.B) @ np.abs(case.A)
    assert_close(impl.delta_weight(**options), want, size=size, what="Delta W")
    y = impl.forward(x=case.x, W_base=case.W_base, **options)
    size = np.abs(case.x) @ (np.abs(case.W_base) + size).T
    assert_close(y, case.x @ (case.W_base + want).T, size=size, what="y")


@law(
    "nlora.L14b",
    says="Folded into LoRA's format, with N in B, the update is the same.",
    formula=r"(A, B N): \quad s (BN) A = s B N A",
    needs=("export",),
    tolerance=8,
    cases=layers(),
)
def test_export(impl, case):
    A, B = impl.export(**of(case, "A", "N", "B"))
    want, size = core_sum(case.A, case.N, case.B, case.scaling)
    assert A.shape == case.A.shape, f"A has shape {A.shape}, not LoRA's {case.A.shape}"
    assert B.shape == case.B.shape, f"B has shape {B.shape}, not LoRA's {case.B.shape}"
    assert_close(case.scaling * B @ A, want, size=size, what="s B A")


@law(
    "nlora.L14c",
    says="Trained from a residual start, the exported adapter of twice the rank gives on the original weight what the layer is.",
    formula=r"W_0 + s\, [BN, -B_0 N_0] \begin{bmatrix} A \\ A_0 \end{bmatrix} = (W_0 - s B_0 N_0 A_0) + s B N A",
    needs=("export_residual", "base_weight", "merge"),
    tolerance=16,
    cases=layers(),
)
def test_export_of_a_residual_start(impl, case):
    W0, s = case.W_base, case.scaling
    A, B = impl.export_residual(**of(case, "A", "N", "B", "A0", "N0", "B0"))
    assert A.shape == (2 * case.rank, W0.shape[1]), f"A has shape {A.shape}, not twice the rank"
    W_base = impl.base_weight(W0=W0, A=case.A0, N=case.N0, B=case.B0, scaling=s)
    W = impl.merge(W_base=W_base, **of(case, "A", "N", "B", "scaling"))
    size = np.abs(W0) + core_sum(case.A, case.N, case.B, s)[1] + core_sum(case.A0, case.N0, case.B0, s)[1]
    assert_close(W0 + s * B @ A, W, size=size, what="W0 with the exported adapter")


@law(
    "nlora.L14d",
    says="The rank of the update is at most `rank`: all further singular values vanish.",
    formula=r"\sigma_{r+1}(s B N A) = 0",
    needs=("delta_weight",),
    tolerance=32,
    cases=layers(low=2),
)
def test_rank(impl, case):
    values = np.linalg.svd(impl.delta_weight(**of(case, "A", "N", "B", "scaling")), compute_uv=False)
    size = np.linalg.norm(core_sum(case.A, case.N, case.B, case.scaling)[1])
    assert_close(values[case.rank :], np.zeros(len(values) - case.rank), size=size, what="singular values beyond the rank")


@law(
    "nlora.L14e",
    says="All entries of A, N and B are trained, by IntTune those of N alone, by LoRA those of A and B.",
    formula=r"r(m + n) + r^2, \quad r^2, \quad r(m + n)",
    needs=("num_trainable.method",),
    tolerance=0,
    cases=layers(),
)
def test_parameter_count(impl, case):
    factors = case.A.size + case.B.size
    want = {"slora": factors + case.N.size, "nlora": factors + case.N.size, "inttune": case.N.size, "lora": factors}
    for method, count in want.items():
        got = impl.num_trainable(W0=case.W_base, rank=case.rank, method=method)
        assert_close(got, count, size=0, what=f"number of trainable parameters of {method}")
    got = impl.num_trainable(W0=case.W_base, rank=case.rank)
    assert_close(got, want["nlora"], size=0, what="number of trainable parameters without a method")


# Training


@law(
    "nlora.L15a",
    says="One step of gradient descent moves all three factors against their gradients at the old factors; the frozen weight stays.",
    formula=r"A \mapsto A - \eta g_A, \quad N \mapsto N - \eta g_N, \quad B \mapsto B - \eta g_B",
    needs=("sgd_step",),
    tolerance=8,
    cases=layers(),
)
def test_step(impl, case):
    A, N, B, G, s, lr = case.A, case.N, case.B, case.G, case.scaling, case.lr
    options = of(case, "G", "W_base", "A", "N", "B", "scaling", "lr")
    moved = (lr * s * (B @ N).T @ G, lr * s * B.T @ G @ A.T, lr * s * G @ (N @ A).T)
    a, n, b, g = map(np.abs, (A, N, B, G))
    sizes = (a + lr * s * (b @ n).T @ g, n + lr * s * b.T @ g @ a.T, b + lr * s * g @ (n @ a).T)
    for given in ({}, {"method": "nlora"}, {"method": "slora"}):
        after = impl.sgd_step(**options, **given)
        assert_close(after.W_base, case.W_base, size=0, what="the frozen weight")
        for name, before, step, size in zip("ANB", (A, N, B), moved, sizes, strict=True):
            assert_close(getattr(after, name), before - step, size=size, what=f"{name} after a step")


@law(
    "nlora.L15b",
    says="IntTune leaves A, B and the frozen weight bit for bit: the weight moves in their spaces, linearly in the step.",
    formula=r"\Delta(s B N A) = -\eta s^2 B B^\top G A^\top A",
    needs=("sgd_step.method",),
    tolerance=8,
    cases=layers(),
)
def test_step_of_inttune(impl, case):
    A, N, B, G, s, lr = case.A, case.N, case.B, case.G, case.scaling, case.lr
    after = impl.sgd_step(**of(case, "G", "W_base", "A", "N", "B", "scaling", "lr"), method="inttune")
    for name in ("W_base", "A", "B"):
        assert_close(getattr(after, name), getattr(case, name), size=0, what=f"{name} after a step")
    a, n, b, g = map(np.abs, (A, N, B, G))
    size = s * b @ (2 * n + lr * s * b.T @ g @ a.T) @ a
    assert_close(s * B @ (after.N - N) @ A, -lr * s**2 * B @ B.T @ G @ A.T @ A, size=size, what="change of the weight")


@law(
    "nlora.L15c",
    says="A step changes how far the factors are from balance by the square of the learning rate only: gradient flow keeps it.",
    formula=r"\Delta(B^\top B - N N^\top) = \eta^2 (g_B^\top g_B - g_N g_N^\top), \; \text{the same for } N \text{ and } A",
    needs=("sgd_step", "gradients"),
    tolerance=64,
    cases=layers(),
)
def test_step_keeps_the_balance(impl, case):
    g = impl.gradients(**of(case, "G", "A", "N", "B", "scaling"))
    after = impl.sgd_step(**of(case, "G", "W_base", "A", "N", "B", "scaling", "lr"))
    grads = {"A": g.grad_A, "N": g.grad_N, "B": g.grad_B}
    size = max(np.linalg.norm(getattr(case, name)) + case.lr * np.linalg.norm(grads[name]) for name in grads) ** 2

    def apart(A, N, B):
        return B.T @ B - N @ N.T, N.T @ N - A @ A.T

    before, then, want = apart(case.A, case.N, case.B), apart(after.A, after.N, after.B), apart(*(case.lr * grads[n] for n in "ANB"))
    for k, name in enumerate(("B'B - NN'", "N'N - AA'")):
        assert_close(then[k] - before[k], want[k], size=size, what=f"change of {name}")


# SLoRA's start


class Draw(NamedTuple):
    """A weight to start SLoRA on, whose input side is longer than the rank."""

    W0: np.ndarray
    G: np.ndarray
    rank: int
    scaling: float
    lr: float
    seed: int


@st.composite
def draws(draw: st.DrawFn, large: bool = False) -> Draw:
    seed = draw(seeds())
    matrices = Matrices(seed, draw(entries()))
    rank = draw(st.integers(22, 24) if large else st.integers(1, 4))
    shape = (draw(st.integers(rank, rank + 2)), draw(st.integers(rank + 3, rank + 7)))
    return Draw(matrices(*shape), matrices(*shape), rank, draw(scalings()), draw(st.sampled_from([0.5, 0.125])), seed)


@law(
    "nlora.L1a",
    says="SLoRA starts at the pretrained weight: B is zero, A and N are not.",
    formula=r"B = 0, \quad A \ne 0, \quad N \ne 0",
    needs=("init_slora",),
    tolerance=0,
    cases=draws(),
)
def test_start_of_slora(impl, case):
    A, N, B = impl.init_slora(W0=case.W0, rank=case.rank, generator=case.seed)
    assert_close(B, np.zeros((len(case.W0), case.rank)), size=0, what="B")
    assert np.all(A != 0), "A has entries that are zero"
    assert np.all(N != 0), "N has entries that are zero: with B = 0 no gradient is left"


@law(
    "nlora.L1b",
    says="At SLoRA's start only B has a gradient, and its first step moves the weight along G, seen through A and N.",
    formula=r"g_A = g_N = 0, \quad \Delta W = -\eta s^2\, G (NA)^\top N A",
    needs=("init_slora", "gradients"),
    tolerance=8,
    cases=draws(),
)
def test_first_step_of_slora(impl, case):
    A, N, B = impl.init_slora(W0=case.W0, rank=case.rank, generator=case.seed)
    g = impl.gradients(G=case.G, A=A, N=N, B=B, scaling=case.scaling)
    assert_close(g.grad_A, np.zeros_like(A), size=0, what="grad_A at the start")
    assert_close(g.grad_N, np.zeros_like(N), size=0, what="grad_N at the start")
    moved = case.scaling * (B - case.lr * g.grad_B) @ N @ A
    want = -case.lr * case.scaling**2 * case.G @ A.T @ N.T @ N @ A
    size = case.lr * case.scaling**2 * np.abs(case.G) @ np.abs(A).T @ np.abs(N).T @ np.abs(N) @ np.abs(A)
    assert_close(moved, want, size=size, what="Delta W after the first step")


@law(
    "nlora.L1c",
    says="Unless told otherwise A is uniform within one over the root of `in`, N within one over the root of the rank.",
    formula=r"A_{ij} \sim U(\pm 1/\sqrt n), \quad N_{ij} \sim U(\pm 1/\sqrt r)",
    needs=("init_slora.generator",),
    tolerance=2,
    cases=draws(large=True),
    examples=6,
)
def test_draws_of_slora(impl, case):
    A, N, _ = impl.init_slora(W0=case.W0, rank=case.rank, generator=case.seed)
    assert_uniform(A, 1 / np.sqrt(case.W0.shape[1]), "A")
    assert_uniform(N, 1 / np.sqrt(case.rank), "N")
    count = min(A.size, N.size)
    alike = np.corrcoef(A.ravel()[:count], N.ravel()[:count])[0, 1]
    assert abs(alike) < 7 / np.sqrt(count), f"A and N are drawn from the same numbers: their correlation is {alike:.2f}"


@law(
    "nlora.L1d",
    says="Each of A and N may be Gaussian instead, of width 1 / rank; a seed repeats both.",
    formula=r"A_{ij}, N_{ij} \sim \mathcal N(0, 1/r^2)",
    needs=("init_slora.generator", "init_slora.distribution", "init_slora.core"),
    tolerance=2,
    cases=draws(large=True),
    examples=6,
)
def test_gaussian_draws_of_slora(impl, case):
    for distribution, core in (("gaussian", "kaiming"), ("kaiming", "gaussian")):
        words = {"W0": case.W0, "rank": case.rank, "distribution": distribution, "core": core}
        A, N, _ = assert_seeded(lambda seed, words=words: impl.init_slora(generator=seed, **words), case.seed, "A", "N")
        if distribution == "gaussian":
            assert_normal(A, 1 / case.rank, "A")
            assert_uniform(N, 1 / np.sqrt(case.rank), "N")
        else:
            assert_uniform(A, 1 / np.sqrt(case.W0.shape[1]), "A")
            assert_normal(N, 1 / case.rank, "N")


# Landmarks: the blocks of the weight


class Landmarks(NamedTuple):
    """A weight, some of its rows and columns, and a block where these cross with chosen singular values, 1 to 1 / condition."""

    W0: np.ndarray  # (out, in)
    rows: np.ndarray  # (rank,) whole numbers
    cols: np.ndarray
    rank: int
    scaling: float
    seed: int


@st.composite
def landmarks(draw: st.DrawFn, first: bool = False, low: int = 1, condition: float | None = None, spare: int = 0) -> Landmarks:
    """`first`: the landmarks are the first ones. `spare`: so many rows and columns at least are no landmarks."""
    out_features, in_features = draw(sides(low + spare, 8)), draw(sides(low + spare, 8))
    rank = draw(st.integers(low, min(out_features, in_features) - spare))
    kind, seed = draw(entries()), draw(seeds())
    kappa = condition or draw(st.sampled_from([2.0, 30.0]))
    matrices = Matrices(seed, kind)
    W0 = matrices(out_features, in_features)
    rows, cols = (np.arange(rank) if first else matrices.rng.permutation(side)[:rank] for side in W0.shape)
    if kind == "normal":
        block = matrices.invertible(rank, kappa)
    else:
        # Triangular with ones, halves and a sign in each row: exact in every precision
        block = np.eye(rank) + 0.5 * np.eye(rank, k=1)
        block = block[matrices.rng.permutation(rank)] * matrices.rng.choice([1.0, -1.0, 2.0], rank)[:, None]
    W0[np.ix_(rows, cols)] = block
    return Landmarks(W0, rows, cols, rank, draw(scalings()), seed)


def _blocks(case):
    """The landmark rows, the block and the landmark columns, entry by entry."""
    R = np.array([case.W0[i] for i in case.rows])
    C = np.array([case.W0[:, j] for j in case.cols]).T
    return R, np.array([[case.W0[i, j] for j in case.cols] for i in case.rows]), C


def _large(case):
    """How large C, the inverse of the block and R are together, and the condition of the block."""
    R, K, C = _blocks(case)
    return np.linalg.norm(C, 2) * np.linalg.norm(R, 2) / np.linalg.norm(K, -2), np.linalg.cond(K)


def _given(case):
    return of(case, "W0", "rank", "rows", "cols")


@law(
    "nlora.L8a",
    says="As published: A is the first rows, B the first columns, N the block where they cross, and the weight stays as it is.",
    formula=r"A = W_0[{:}r, :], \quad N = W_0[{:}r, {:}r], \quad B = W_0[:, {:}r], \quad W_{base} = W_0",
    needs=("init",),
    tolerance=0,
    cases=landmarks(first=True),
)
def test_published_start(impl, case):
    start, (R, K, C) = impl.init(W0=case.W0, rank=case.rank), _blocks(case)
    for got, want, what in ((start.A, R, "A"), (start.N, K, "N"), (start.B, C, "B"), (start.W_base, case.W0, "the frozen weight")):
        assert_close(got, want, size=0, what=what)


@law(
    "nlora.L8e",
    says="Without given landmarks the blocks are those of the first rows and columns.",
    formula=r"W_0[{:}r, :], \quad W_0[{:}r, {:}r], \quad W_0[:, {:}r]",
    needs=("landmark_blocks",),
    tolerance=0,
    cases=landmarks(first=True),
)
def test_first_blocks(impl, case):
    got, wanted = impl.landmark_blocks(W0=case.W0, rank=case.rank), _blocks(case)
    for name, want in zip("ANB", wanted, strict=True):
        assert_close(getattr(got, name), want, size=0, what=f"the block for {name}")


@law(
    "nlora.L8b",
    says="With given landmarks the factors are these rows, these columns and the block where they cross, in the given order.",
    formula=r"A = W_0[I, :], \quad N = W_0[I, J], \quad B = W_0[:, J]",
    needs=("landmark_blocks.rows", "landmark_blocks.cols"),
    tolerance=0,
    cases=landmarks(),
)
def test_given_landmarks(impl, case):
    got, wanted = impl.landmark_blocks(**_given(case)), _blocks(case)
    for name, want in zip("ANB", wanted, strict=True):
        assert_close(getattr(got, name), want, size=0, what=f"the block for {name}")
    only_rows = impl.landmark_blocks(W0=case.W0, rank=case.rank, rows=case.rows)
    assert_close(only_rows.N, case.W0[case.rows][:, : case.rank], size=0, what="the block of given rows and the first columns")
    only_cols = impl.landmark_blocks(W0=case.W0, rank=case.rank, cols=case.cols)
    assert_close(only_cols.N, case.W0[: case.rank][:, case.cols], size=0, what="the block of the first rows and given columns")


@law(
    "nlora.L8c",
    says="The start takes the given landmarks with either core.",
    formula=r"N = K \;(\mathrm{block}), \quad N K = I \;(\mathrm{pinv}), \quad K = W_0[I, J]",
    needs=("init.core", "init.rows", "init.cols"),
    tolerance=64,
    cases=landmarks(),
)
def test_start_with_given_landmarks(impl, case):
    R, K, C = _blocks(case)
    for core, N in (("block", K), ("pinv", np.linalg.inv(K))):
        start = impl.init(core=core, **_given(case))
        for got, want, what in ((start.A, R, "A"), (start.B, C, "B"), (start.W_base, case.W0, "the frozen weight")):
            assert_close(got, want, size=0, what=f"{what} for {core}")
        if core == "block":
            assert_close(start.N, N, size=0, what="N for block")
        else:
            assert_close(start.N, N, size=1 / np.linalg.norm(K, -2), conditioning=np.linalg.cond(K), what="N for pinv")


@law(
    "nlora.L8f",
    says="A second start on the same weight has its own landmarks' block; the first one, asked for again, is what it was.",
    formula=r"N_1 = W_0[{:}r, {:}r], \quad N_2 = W_0[I, J], \quad N_3 = N_1",
    needs=("init.rows", "init.cols"),
    tolerance=0,
    cases=landmarks(),
)
def test_second_start(impl, case):
    first, (_, second, _) = case.W0[: case.rank][:, : case.rank], _blocks(case)
    for given, want, what in (({}, first, "first"), (of(case, "rows", "cols"), second, "second"), ({}, first, "third")):
        start = impl.init(W0=case.W0, rank=case.rank, **given)
        assert_close(start.N, want, size=0, what=f"N of the {what} start")


@law(
    "nlora.L8d",
    says="Without the correction training starts away from the pretrained weight, by s times columns, core and rows.",
    formula=r"W - W_0 = s\, W_0[:, J]\, N\, W_0[I, :], \quad N = K \text{ or } K^{-1}",
    needs=("init.core", "init.rows", "init.cols", "merge"),
    tolerance=16,
    cases=landmarks(),
)
def test_published_start_moves_the_weight(impl, case):
    R, K, C = _blocks(case)
    for core in ("block", "pinv"):
        start = impl.init(scaling=case.scaling, core=core, residual=False, **_given(case))
        moved = impl.merge(**start._asdict(), scaling=case.scaling) - case.W0
        want = case.scaling * (C @ K @ R if core == "block" else C @ np.linalg.solve(K, R))
        large, condition = _large(case)
        size = case.scaling * (np.linalg.norm(C, 2) * np.linalg.norm(R, 2) if core == "block" else large) + np.abs(case.W0).max()
        assert_close(moved, want, size=size, conditioning=1 if core == "block" else condition, what=f"W - W0 for {core}")


@law(
    "nlora.L7a",
    says="With the correction the layer starts at the pretrained weight, with either core and any landmarks and scaling.",
    formula=r"W_{base} + s B N A = W_0",
    needs=("init.residual", "init.scaling", "init.core", "init.rows", "init.cols"),
    tolerance=16,
    cases=landmarks(),
)
def test_residual_start(impl, case):
    for core in ("block", "pinv"):
        start = impl.init(scaling=case.scaling, core=core, residual=True, **_given(case))
        got = start.W_base + case.scaling * start.B @ start.N @ start.A
        size = np.abs(case.W0) + core_sum(start.A, start.N, start.B, case.scaling)[1]
        assert_close(got, case.W0, size=size, what=f"W_base + s B N A for {core}")
        # ... with the factors of the same start without it
        plain = impl.init(scaling=case.scaling, core=core, residual=False, **_given(case))
        for name in "ANB":
            assert_close(getattr(start, name), getattr(plain, name), size=0, what=f"{name} with and without the correction, for {core}")


@law(
    "nlora.L7c",
    says="Without a scaling the correction is made for s = 1.",
    formula=r"W_{base} + B N A = W_0",
    needs=("init.residual",),
    tolerance=16,
    cases=landmarks(),
)
def test_residual_start_without_a_scaling(impl, case):
    start = impl.init(W0=case.W0, rank=case.rank, residual=True)
    size = np.abs(case.W0) + core_sum(start.A, start.N, start.B, 1.0)[1]
    assert_close(start.W_base + start.B @ start.N @ start.A, case.W0, size=size, what="W_base + B N A")


@law(
    "nlora.L7b",
    says="The corrected weight lacks just the update of the given factors.",
    formula=r"W_{base} = W_0 - s \sum_{kj} N_{kj} B_{:k} A_{j:}",
    needs=("base_weight",),
    tolerance=8,
    cases=layers(),
)
def test_base_weight(impl, case):
    got = impl.base_weight(W0=case.W_base, **of(case, "A", "N", "B", "scaling"))
    delta, size = core_sum(case.A, case.N, case.B, case.scaling)
    assert_close(got, case.W_base - delta, size=np.abs(case.W_base) + size, what="W_base")


@law(
    "nlora.L9",
    says="A weight of another size: the update of a block start grows with its cube, that of a pinv start with itself.",
    formula=r"W_0 \mapsto c W_0: \quad B N A \mapsto c^3 B N A \;(\mathrm{block}), \quad c\, B N A \;(\mathrm{pinv})",
    needs=("init.core", "init.rows", "init.cols"),
    tolerance=32,
    cases=landmarks(),
)
def test_homogeneity(impl, case):
    R, _, C = _blocks(case)
    large, condition = _large(case)
    for core, power in (("block", 3), ("pinv", 1)):
        found = [impl.init(**{**_given(case), "W0": c * case.W0}, core=core) for c in (1.0, 4.0)]
        products = [start.B @ start.N @ start.A for start in found]
        size = 4.0**power * (np.linalg.norm(C, 2) * np.linalg.norm(R, 2) if core == "block" else large)
        conditioning = 1 if core == "block" else condition
        assert_close(products[1], 4.0**power * products[0], size=size, conditioning=conditioning, what=f"B N A of 4 W0 for {core}")


@law(
    "nlora.L13b",
    says="Landmarks in another order: with pinv any, with block one order for rows and columns leaves the update; else block notices.",
    formula=r"B N A \mapsto B N A, \quad \text{but } C[:, \pi]\, K[:, \pi]\, R \ne C K R",
    needs=("init.core", "init.rows", "init.cols"),
    tolerance=32,
    cases=landmarks(low=2),
)
def test_order_of_the_landmarks(impl, case):
    R, K, C = _blocks(case)
    large, condition = _large(case)
    turned = np.roll(np.arange(case.rank), 1)
    for core, size, conditioning in (("block", np.linalg.norm(C, 2) * np.linalg.norm(R, 2), 1), ("pinv", large, condition)):
        found = []
        for rows, cols in ((case.rows, case.cols), (case.rows[turned], case.cols[turned]), (case.rows, case.cols[turned])):
            _, A, N, B = impl.init(W0=case.W0, rank=case.rank, core=core, rows=rows, cols=cols)
            found.append(B @ N @ A)
        assert_close(found[1], found[0], size=size, conditioning=conditioning, what=f"B N A with both sets turned, for {core}")
        # Row k and column k meet in the block, not in its inverse
        want = C[:, turned] @ K[:, turned] @ R if core == "block" else found[0]
        assert_close(found[2], want, size=size, conditioning=conditioning, what=f"B N A with the columns turned, for {core}")


# Nystroem's approximation


@law(
    "nlora.L5a",
    says="The approximation reproduces the landmark rows and columns.",
    formula=r"\hat W[I, :] = W_0[I, :], \quad \hat W[:, J] = W_0[:, J]",
    needs=("nystrom_approx.rows", "nystrom_approx.cols"),
    tolerance=16,
    cases=landmarks(),
)
def test_interpolation(impl, case):
    got, (R, _, C), (size, condition) = impl.nystrom_approx(**_given(case)), _blocks(case), _large(case)
    assert_close(got[case.rows], R, size=size, conditioning=condition, what="the landmark rows")
    assert_close(got[:, case.cols], C, size=size, conditioning=condition, what="the landmark columns")


@law(
    "nlora.L5b",
    says="What the approximation misses are Schur complements: determinants with one more row and column over the block's own.",
    formula=r"(W_0 - \hat W)_{ij} = \det \begin{bmatrix} K & W_{Ij} \\ W_{iJ} & W_{ij} \end{bmatrix} / \det K",
    needs=("nystrom_approx.rows", "nystrom_approx.cols"),
    tolerance=16,
    cases=landmarks(spare=1),
)
def test_schur_complement(impl, case):
    missed = case.W0 - impl.nystrom_approx(**_given(case))
    (R, K, C), (size, condition) = _blocks(case), _large(case)
    bordered = [[np.block([[K, R[:, [j]]], [C[[i]], case.W0[i, j]]]) for j in range(R.shape[1])] for i in range(len(C))]
    want = np.linalg.det(np.array(bordered)) / np.linalg.det(K)
    assert_close(missed, want, size=size + np.abs(case.W0).max(), conditioning=condition, what="W0 minus its approximation")


@law(
    "nlora.L5c",
    says="Without given landmarks the approximation is made of the first rows and columns.",
    formula=r"\hat W = W_0[:, {:}r]\, W_0[{:}r, {:}r]^{-1}\, W_0[{:}r, :]",
    needs=("nystrom_approx",),
    tolerance=16,
    cases=landmarks(first=True),
)
def test_first_landmarks(impl, case):
    got, (R, K, C), (size, condition) = impl.nystrom_approx(W0=case.W0, rank=case.rank), _blocks(case), _large(case)
    assert_close(got, C @ np.linalg.solve(K, R), size=size, conditioning=condition, what="the approximation")


@law(
    "nlora.L5d",
    says="A badly conditioned block is inverted in full: no direction is cut off that is not asked for.",
    formula=r"\hat W[I, :] = W_0[I, :], \quad \kappa(K) = 10^3",
    needs=("nystrom_approx.rows", "nystrom_approx.cols", "init.core"),
    tolerance=32,
    cases=landmarks(low=2, condition=1000.0),
)
def test_no_cut_off(impl, case):
    got, (R, K, _), (size, condition) = impl.nystrom_approx(**_given(case)), _blocks(case), _large(case)
    assert_close(got[case.rows], R, size=size, conditioning=condition, what="the landmark rows")
    N = impl.init(core="pinv", **_given(case)).N
    assert_close(N @ K, np.eye(case.rank), size=np.linalg.norm(K, 2) / np.linalg.norm(K, -2), conditioning=condition, what="N K")


@law(
    "nlora.L6",
    says="The paper's derivation, which extends the block's singular vectors to all rows and columns, gives the same matrix.",
    formula=r"\hat U \Lambda \hat V^\top = C K^{-1} R, \quad \hat U = C H \Lambda^{-1}, \; \hat V = R^\top U \Lambda^{-1}",
    needs=("nystrom_from_svd.rows", "nystrom_from_svd.cols"),
    tolerance=16,
    cases=landmarks(),
)
def test_derivation_by_svd(impl, case):
    got, (R, K, C), (size, condition) = impl.nystrom_from_svd(**_given(case)), _blocks(case), _large(case)
    want = C @ np.linalg.solve(K, R)
    # Both extended sets of vectors carry an inverse of the singular values, of which the middle takes one back
    assert_close(got, want, size=size, conditioning=condition, what="the approximation")
    first = impl.nystrom_from_svd(
        W0=case.W0[case.rows.tolist() + _others(case, 0)][:, case.cols.tolist() + _others(case, 1)], rank=case.rank
    )
    want = want[case.rows.tolist() + _others(case, 0)][:, case.cols.tolist() + _others(case, 1)]
    assert_close(first, want, size=size, conditioning=condition, what="the approximation from the first rows and columns")


def _others(case, axis):
    """The rows or columns that are no landmarks."""
    return [k for k in range(case.W0.shape[axis]) if k not in (case.rows, case.cols)[axis]]


class LowRank(NamedTuple):
    """A weight of low rank whose landmark block has the same rank, smaller than its side or as large."""

    W0: np.ndarray
    rows: np.ndarray
    cols: np.ndarray
    rank: int


@st.composite
def low_rank(draw: st.DrawFn) -> LowRank:
    out_features, in_features = draw(sides(1, 8)), draw(sides(1, 8))
    rank = draw(st.integers(1, min(out_features, in_features)))
    true = draw(st.integers(1, rank))
    matrices = Matrices(draw(seeds()), draw(entries()))
    picked, sides_of = [], []
    for side in (out_features, in_features):
        index, factor = matrices.rng.permutation(side)[:rank], matrices(side, true)
        # The landmarks' part of both factors is well conditioned, and so is the block, but for its zeros
        if matrices.entries == "normal":
            factor[index] = matrices.with_spectrum(rank, true, matrices.rng.uniform(0.5, 2, true))
        else:
            factor[index] = np.eye(rank, true)[matrices.rng.permutation(rank)]
        picked.append(index)
        # On a grid, so that float32 holds the product, and with it the low rank, exactly
        sides_of.append(np.round(64 * factor) / 64)
    return LowRank(sides_of[0] @ sides_of[1].T, *picked, rank)


@law(
    "nlora.L4",
    says="A weight whose rank is that of the landmark block is reproduced exactly, also if the block is singular and cut off.",
    formula=r"\mathrm{rank}\, K = \mathrm{rank}\, W_0 \;\Rightarrow\; C K^+ R = W_0",
    needs=("nystrom_approx.rcond", "nystrom_from_svd.rcond", "init.rcond"),
    tolerance=16,
    cases=low_rank(),
)
def test_exactness(impl, case):
    R, K, C = _blocks(case)
    cut = 0.02  # the values that are there are at least 1/16 of the largest, the others rounding
    values = np.linalg.svd(K, compute_uv=False)
    smallest = values[values > cut * values[0]].min()
    size, condition = np.linalg.norm(C, 2) * np.linalg.norm(R, 2) / smallest, values[0] / smallest
    for function in (impl.nystrom_approx, impl.nystrom_from_svd):
        assert_close(function(rcond=cut, **_given(case)), case.W0, size=size, conditioning=condition**2, what="the approximation")
    start = impl.init(core="pinv", rcond=cut, **_given(case))
    assert_close(start.B @ start.N @ start.A, case.W0, size=size, conditioning=condition**2, what="B N A")


class Cut(NamedTuple):
    """A weight with a block of known singular values, and a cut-off between them."""

    W0: np.ndarray
    rank: int
    rcond: float
    kept: int


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    rank, seed = draw(st.integers(2, 4)), draw(seeds())
    matrices, kept = Matrices(seed), draw(st.integers(1, rank - 1))
    W0 = matrices(rank + draw(st.integers(0, 3)), rank + draw(st.integers(0, 3)))
    # A cut-off of the values themselves or of their squares, not of their quotients, would cut elsewhere
    values = np.concatenate([np.linspace(4.0, 1.6, kept), np.full(rank - kept, 0.8)])
    W0[:rank, :rank] = matrices.with_spectrum(rank, rank, values)
    return Cut(W0, rank, 0.3, kept)


@law(
    "nlora.L17",
    says="Singular values of the block up to `rcond` times the largest are left out, and the others inverted.",
    formula=r"N = \sum_{\sigma_i > \mathrm{rcond}\, \sigma_1} \sigma_i^{-1} v_i u_i^\top",
    needs=("init.rcond", "init.core", "nystrom_approx.rcond", "nystrom_from_svd.rcond"),
    tolerance=8,
    cases=cuts(),
)
def test_cut_off(impl, case):
    K = case.W0[: case.rank, : case.rank]
    # The pseudo-inverse of the block without these directions, by its eigenvectors: K+ = (K'K)+ K'
    values, vectors = np.linalg.eigh(K.T @ K)
    kept = vectors[:, case.rank - case.kept :]
    want = kept @ np.diag(1 / values[case.rank - case.kept :]) @ kept.T @ K.T
    got = impl.init(W0=case.W0, rank=case.rank, core="pinv", rcond=case.rcond)
    assert_close(got.N, want, conditioning=np.linalg.cond(K) ** 2, what="N")
    C, R = case.W0[:, : case.rank], case.W0[: case.rank]
    size = np.linalg.norm(C, 2) * np.linalg.norm(R, 2)
    for function in (impl.nystrom_approx, impl.nystrom_from_svd):
        found = function(W0=case.W0, rank=case.rank, rcond=case.rcond)
        assert_close(found, C @ want @ R, size=size, conditioning=np.linalg.cond(K) ** 2, what="the approximation")


@law(
    "nlora.L13a",
    says="Transposing the weight and exchanging rows and columns transposes the approximation.",
    formula=r"\hat W(W_0^\top; J, I) = \hat W(W_0; I, J)^\top",
    needs=("nystrom_approx.rows", "nystrom_approx.cols"),
    tolerance=16,
    cases=landmarks(),
)
def test_transpose(impl, case):
    there = impl.nystrom_approx(**_given(case))
    back = impl.nystrom_approx(W0=case.W0.T.copy(), rank=case.rank, rows=case.cols, cols=case.rows)
    size, condition = _large(case)
    assert_close(back.T, there, size=size, conditioning=condition, what="the approximation of the transpose, transposed")


# The best core


class Fit(NamedTuple):
    """Two factors with singular values in [0.5, 2], or with a row or column twice, and what s B N A should become."""

    target: np.ndarray
    A: np.ndarray
    B: np.ndarray
    scaling: float


@st.composite
def fits(draw: st.DrawFn, full_rank: bool = True) -> Fit:
    out_features, in_features = (draw(sides(1 if full_rank else 2, 6)) for _ in range(2))
    matrices = Matrices(draw(seeds()))
    rank = draw(st.integers(1 if full_rank else 2, min(out_features, in_features)))
    A, B = (matrices.with_spectrum(side, rank, matrices.rng.uniform(0.5, 2, rank)) for side in (in_features, out_features))
    if not full_rank:
        for factor in (A, B):
            factor[:, 1] = factor[:, 0]
    return Fit(matrices(out_features, in_features), A.T.copy(), B, draw(scalings()))


def _best_core(case, rcond=None):
    """Row by row: vec(s B N A) = s (B x A') vec(N)."""
    design = case.scaling * np.kron(case.B, case.A.T)
    solution = np.linalg.lstsq(design, case.target.ravel(), rcond=rcond)[0]
    values = np.linalg.svd(design, compute_uv=False)
    smallest = values[values > 1e-6 * values[0]].min()
    return solution.reshape(len(case.A), len(case.A)), np.linalg.norm(case.target) / smallest, values[0] / smallest


@law(
    "nlora.L10a",
    says="The best middle factor for frozen A and B is the least-squares solution over its entries.",
    formula=r"N_\star = \arg\min_N \|s B N A - T\|_F = \tfrac1s B^+ T A^+",
    needs=("fit_core",),
    tolerance=32,
    cases=fits(),
)
def test_best_core(impl, case):
    want, size, condition = _best_core(case)
    assert_close(impl.fit_core(**of(case, "target", "A", "B", "scaling")), want, size=size, conditioning=condition, what="the best N")


@law(
    "nlora.L10b",
    says="At the best middle factor the gradient of N vanishes.",
    formula=r"s B^\top (s B N_\star A - T) A^\top = 0",
    needs=("fit_core", "gradients"),
    tolerance=32,
    cases=fits(),
)
def test_gradient_at_the_best_core(impl, case):
    A, B, s = case.A, case.B, case.scaling
    N = impl.fit_core(**of(case, "target", "A", "B", "scaling"))
    g = impl.gradients(G=s * B @ N @ A - case.target, A=A, N=N, B=B, scaling=s)
    size = s * np.linalg.norm(A, 2) * np.linalg.norm(B, 2) * np.linalg.norm(case.target)
    condition = np.linalg.cond(A) * np.linalg.cond(B)
    assert_close(g.grad_N, np.zeros_like(N), size=size, conditioning=condition, what="the gradient of N at the best N")


@law(
    "nlora.L10c",
    says="If several middle factors are best, it is the smallest of them.",
    formula=r"A_{1:} = A_{2:},\; B_{:1} = B_{:2} \;\Rightarrow\; N_\star = \tfrac1s B^+ T A^+",
    needs=("fit_core",),
    tolerance=64,
    cases=fits(full_rank=False),
)
def test_smallest_best_core(impl, case):
    want, size, condition = _best_core(case, rcond=1e-6)
    assert_close(
        impl.fit_core(**of(case, "target", "A", "B", "scaling")), want, size=size, conditioning=condition, what="the smallest best N"
    )


@law(
    "nlora.L11a",
    says="Of what Nystroem's approximation misses, a part no core could have caught; the rest is how far its core is from the best.",
    formula=r"\|W_0 - C K^{-1} R\|_F^2 = \|W_0 - C N_\star R\|_F^2 + \|C (N_\star - K^{-1}) R\|_F^2",
    needs=("nystrom_approx.rows", "nystrom_approx.cols", "landmark_blocks.rows", "landmark_blocks.cols", "fit_core"),
    tolerance=16,
    cases=landmarks(spare=1),
)
def test_error_splits(impl, case):
    approximation = impl.nystrom_approx(**_given(case))
    R, _, C = impl.landmark_blocks(**_given(case))
    best = C @ impl.fit_core(target=case.W0, A=R, B=C, scaling=1.0) @ R
    size, condition = (_large(case)[0] + np.linalg.norm(case.W0)) ** 2, _large(case)[1]
    parts = np.sum((case.W0 - best) ** 2) + np.sum((best - approximation) ** 2)
    assert_close(np.sum((case.W0 - approximation) ** 2), parts, size=size, conditioning=condition, what="the squared error")


class Worked(NamedTuple):
    """The example of the page."""

    W0: np.ndarray


@law(
    "nlora.L16",
    says="A worked example of rank 1, exact in every precision.",
    formula=r"W_0 = (2, 4;\, 6, 8): \quad B N A = (8, 16;\, 24, 48), \quad \hat W = (2, 4;\, 6, 12)",
    needs=("init.core", "init.residual", "nystrom_approx"),
    tolerance=4,
    cases=st.builds(Worked, st.builds(lambda: np.array([[2.0, 4.0], [6.0, 8.0]]))),
    examples=1,
)
def test_worked_example(impl, case):
    start = impl.init(W0=case.W0, rank=1, residual=True)
    assert_close(start.B @ start.N @ start.A, [[8, 16], [24, 48]], size=48, what="B N A for block")
    assert_close(start.W_base, [[-6, -12], [-18, -40]], size=48, what="W_base for block")
    start = impl.init(W0=case.W0, rank=1, core="pinv", residual=True)
    assert_close(start.B @ start.N @ start.A, [[2, 4], [6, 12]], size=12, what="B N A for pinv")
    assert_close(start.W_base, [[0, 0], [0, -4]], size=12, what="W_base for pinv")
    assert_close(impl.nystrom_approx(W0=case.W0, rank=1), [[2, 4], [6, 12]], size=12, what="the approximation")


# Theorem checks: the mathematics itself


@theorem(
    "nlora.T1",
    says="Through a smooth loss the gradients of all three factors follow from that of the merged weight alone.",
    formula=r"\nabla_N L(W_{base} + sBNA) = s\, B^\top \nabla L(W)\, A^\top, \;\dots",
    tolerance=1e6,  # central differences with step 1e-4: h^2 plus eps / h, about 1e-8
    cases=layers(high=4),
)
def test_chain_rule(case):
    matrices, s, (m, n) = Matrices(case.seed + 3), case.scaling, case.G.shape
    problem = LogisticRegression(matrices(9, n), np.sign(matrices(9, m)))
    A, N, B = case.A, case.N, case.B
    G = problem.grad(case.W_base + s * B @ N @ A)
    largest = 1 + np.abs(problem.X).max() * s * np.prod([1 + np.linalg.norm(M) for M in (A, N, B)])
    for found, at, loss in (
        (s * (B @ N).T @ G, A, lambda M: problem.loss(case.W_base + s * B @ N @ M)),
        (s * B.T @ G @ A.T, N, lambda M: problem.loss(case.W_base + s * B @ M @ A)),
        (s * G @ (N @ A).T, B, lambda M: problem.loss(case.W_base + s * M @ N @ A)),
    ):
        assert_close(found, slope(loss, at, step=1e-4), size=largest**3, what="gradient")


@theorem(
    "nlora.T2",
    says="With N = 0 and B = 0 all three gradients vanish: such a start is never left.",
    formula=r"B = N = 0 \;\Rightarrow\; g_A = g_N = g_B = 0",
    tolerance=1,
    cases=layers(),
)
def test_zero_core_never_moves(case):
    A, N, B, G, s = case.A, 0 * case.N, 0 * case.B, case.G, case.scaling
    for g in (s * (B @ N).T @ G, s * B.T @ G @ A.T, s * G @ (N @ A).T):
        assert_close(g, np.zeros_like(g), size=0, what="gradient")


@theorem(
    "nlora.T3",
    says="What the approximation misses has just the rank that the weight has above an invertible block's (Guttman).",
    formula=r"\mathrm{rank}(W_0 - C K^{-1} R) = \mathrm{rank}\, W_0 - r",
    tolerance=64,
    cases=landmarks(condition=4.0, spare=1),
)
def test_exact_only_then(case):
    R, K, C = _blocks(case)
    missed = case.W0 - C @ np.linalg.solve(K, R)
    values, of_weight = np.linalg.svd(missed, compute_uv=False), np.linalg.svd(case.W0, compute_uv=False)
    size, condition = _large(case)
    above = np.sum(of_weight > 1e-9 * of_weight[0]) - case.rank
    assert_close(values[above:], np.zeros(len(values) - above), size=size + of_weight[0], conditioning=condition, what="singular values")
    assert above == 0 or values[above - 1] > 1e-9 * values[0], "the difference has a lower rank"


@theorem(
    "nlora.T4",
    says="Errors come in order: the best matrix of that rank, the best core for these rows and columns, Nystroem's core.",
    formula=r"\Big( \sum_{i > r} \sigma_i^2 \Big)^{1/2} \le \|W_0 - C N_\star R\|_F \le \|W_0 - C K^{-1} R\|_F",
    tolerance=64,
    cases=landmarks(),
)
def test_hierarchy(case):
    R, K, C = _blocks(case)
    best = C @ np.linalg.pinv(C) @ case.W0 @ np.linalg.pinv(R) @ R
    tail = np.sqrt(np.sum(np.linalg.svd(case.W0, compute_uv=False)[case.rank :] ** 2))
    errors = (tail, np.linalg.norm(case.W0 - best), np.linalg.norm(case.W0 - C @ np.linalg.solve(K, R)))
    size, condition = _large(case)
    for smaller, larger in pairwise(errors):
        what = "by how much the order is broken"
        assert_close(min(larger - smaller, 0.0), 0.0, size=size + np.linalg.norm(case.W0), conditioning=condition, what=what)


class Positive(NamedTuple):
    """A positive definite weight and an order of its rows."""

    W0: np.ndarray
    order: np.ndarray


@st.composite
def positive(draw: st.DrawFn) -> Positive:
    side, matrices = draw(sides(2, 8)), Matrices(draw(seeds()))
    F = matrices.with_spectrum(side, side, np.geomspace(1, draw(st.sampled_from([0.5, 0.1])), side))
    return Positive(F @ F.T, matrices.rng.permutation(side))


@theorem(
    "nlora.T5",
    says="Positive weight, the same landmarks on both sides: what is missed is positive, and its trace falls with each landmark.",
    formula=r"W_0 - C K^{-1} C^\top \succeq 0, \quad \mathrm{tr}\, \text{falls from } I \text{ to } I \cup \{i\}",
    tolerance=64,
    cases=positive(),
)
def test_positive_weight(case):
    before, trace = np.trace(case.W0), np.trace(case.W0)
    for rank in range(1, len(case.W0)):
        I = case.order[:rank]
        C, K = case.W0[:, I], case.W0[np.ix_(I, I)]
        missed = case.W0 - C @ np.linalg.solve(K, C.T)
        condition = np.linalg.cond(K)
        low = np.linalg.eigvalsh((missed + missed.T) / 2)[0]
        assert_close(min(low, 0.0), 0.0, size=trace, conditioning=condition, what="smallest eigenvalue of what is missed")
        assert_close(min(before - np.trace(missed), 0.0), 0.0, size=trace, conditioning=condition, what="fall of the trace")
        before = np.trace(missed)


class Noise(NamedTuple):
    """A weight of independent entries of one width."""

    seed: int
    rank: int
    width: float


@theorem(
    "nlora.T6",
    says="For independent entries the published start moves the weight by about s times the rank times the entries' variance, of its size.",
    formula=r"\|C K R\|_F / \|W_0\|_F \approx r \tau^2",
    tolerance=1,
    cases=st.builds(Noise, seeds(), st.sampled_from([16, 32]), st.sampled_from([0.02, 0.1])),
    examples=4,
)
def test_size_of_the_perturbation(case):
    W0 = case.width * Matrices(case.seed)(320, 480)
    r = case.rank
    moved = np.linalg.norm(W0[:, :r] @ W0[:r, :r] @ W0[:r]) / np.linalg.norm(W0)
    want = r * case.width**2
    assert_close(moved, want, within=0.3 * want, what="relative size of C K R")


@theorem(
    "nlora.T7",
    says="LLaMA-2-7B, seven projections in 32 layers: LoRA 319,815,680, NLoRA 323,485,696 and IntTune 3,670,016 numbers at rank 128.",
    formula=r"\sum_{\text{matrices}} r(m + n),\; r(m + n) + r^2,\; r^2",
    tolerance=1,
    cases=st.just(Noise(0, 128, 0.0)),
    examples=1,
)
def test_counts_of_a_large_model(case):
    shapes = 32 * [(4096, 4096)] * 4 + 32 * [(11008, 4096)] * 2 + 32 * [(4096, 11008)]
    r = case.rank
    for count, want in (
        (sum(r * (m + n) for m, n in shapes), 319_815_680),
        (sum(r * (m + n + r) for m, n in shapes), 323_485_696),
        (len(shapes) * r * r, 3_670_016),
        (len(shapes) * 256**2, 14_680_064),
        (len(shapes) * 64**2, 917_504),
    ):
        assert_close(count, want, size=0, what="number of trained numbers")
