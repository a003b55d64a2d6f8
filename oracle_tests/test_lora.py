# mypy: ignore-errors
"""The laws of LoRA and rsLoRA. Expected values are NumPy float64; none comes from an implementation under test."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from loracle.oracle_tests.draws import assert_normal, assert_seeded, assert_uniform
from loracle.oracle_tests.expected import assert_linear, outer_sum
from loracle.oracle_tests.law import assert_close, law, theorem
from loracle.oracle_tests.loading import Derivation
from loracle.oracle_tests.problems import LogisticRegression, slope
from loracle.oracle_tests.strategies import Matrices, entries, leads, scaling_cases, scalings, seeds, sides


class Layer(NamedTuple):
    """One adapted layer and what may come in from either side."""

    x: np.ndarray  # (..., in)
    grad_y: np.ndarray  # (..., out)
    G: np.ndarray  # (out, in)
    W0: np.ndarray  # (out, in)
    A: np.ndarray  # (rank, in)
    B: np.ndarray  # (out, rank)
    scaling: float
    bias: np.ndarray  # (out,)
    mask: np.ndarray  # (..., in)
    p: float
    rank: int
    lr: float
    seed: int


@st.composite
def layers(draw: st.DrawFn, low: int = 1, high: int = 7, below_full_rank: bool = False) -> Layer:
    out_features, in_features = draw(sides(low, high)), draw(sides(low, high))
    rank = draw(st.integers(1, min(out_features, in_features) - below_full_rank))
    lead = draw(leads())
    seed = draw(seeds())
    matrices = Matrices(seed, draw(entries()))
    return Layer(
        x=matrices(*lead, in_features),
        grad_y=matrices(*lead, out_features),
        G=matrices(out_features, in_features),
        W0=matrices(out_features, in_features),
        A=matrices(rank, in_features),
        B=matrices(out_features, rank),
        scaling=draw(scalings()),
        bias=matrices(out_features),
        mask=matrices.mask(*lead, in_features),
        p=draw(st.sampled_from([0.5, 0.25])),
        rank=rank,
        lr=draw(st.sampled_from([0.5, 0.125])),
        seed=seed,
    )


def _delta_weight(impl, A, B, scaling):
    """The columns of Delta W are what the layer adds to W0 = 0 for the unit vectors."""
    return impl.forward(x=np.eye(A.shape[1]), W0=np.zeros((B.shape[0], A.shape[1])), A=A, B=B, scaling=scaling).T


delta_weight_from_forward = Derivation("delta_weight", needs=("forward",), compute=_delta_weight)


# At the start


@law(
    "lora.L1a",
    says="With the factors of the start the adapted layer is the frozen layer.",
    formula=r"B = 0 \;\Rightarrow\; y = x W_0^\top",
    needs=("init", "forward"),
    tolerance=8,
    cases=layers(),
)
def test_start_forward(impl, case):
    A, B = impl.init(W0=case.W0, rank=case.rank, generator=case.seed)
    assert_close(B, np.zeros_like(B), size=0, what="B at the start")
    y = impl.forward(x=case.x, W0=case.W0, A=A, B=B, scaling=case.scaling)
    assert_close(y, case.x @ case.W0.T, size=np.abs(case.x) @ np.abs(case.W0).T, what="y")


@law(
    "lora.L1b",
    says="With the factors of the start the merged weight is the pretrained weight, bit for bit.",
    formula=r"B = 0 \;\Rightarrow\; W = W_0",
    needs=("init", "merge"),
    tolerance=0,
    cases=layers(),
)
def test_start_merge(impl, case):
    A, B = impl.init(W0=case.W0, rank=case.rank, generator=case.seed)
    assert_close(impl.merge(W0=case.W0, A=A, B=B, scaling=case.scaling), case.W0, size=0, what="W")


# Forward and merge


@law(
    "lora.L2a",
    says="The adapted layer is one linear layer whose weight is the merged weight.",
    formula=r"y = x W^\top, \quad W = \mathrm{merge}(W_0, A, B, s)",
    needs=("forward", "merge"),
    tolerance=8,
    cases=layers(),
)
def test_forward_is_merged(impl, case):
    y = impl.forward(x=case.x, W0=case.W0, A=case.A, B=case.B, scaling=case.scaling)
    W = impl.merge(W0=case.W0, A=case.A, B=case.B, scaling=case.scaling)
    assert_linear(y, case.x, W, size=np.abs(case.W0) + case.scaling * np.abs(case.B) @ np.abs(case.A))


@law(
    "lora.L2b",
    says="Unmerging what was merged gives the pretrained weight back.",
    formula=r"\mathrm{unmerge}(\mathrm{merge}(W_0, A, B, s), A, B, s) = W_0",
    needs=("merge", "unmerge"),
    tolerance=4,
    cases=layers(),
)
def test_unmerge(impl, case):
    W = impl.merge(W0=case.W0, A=case.A, B=case.B, scaling=case.scaling)
    W0 = impl.unmerge(W=W, A=case.A, B=case.B, scaling=case.scaling)
    assert_close(W0, case.W0, size=np.abs(case.W0) + case.scaling * np.abs(case.B) @ np.abs(case.A), what="W0")


@law(
    "lora.L2f",
    says="Unmerging takes the scaled sum of the outer products of B's columns and A's rows off any weight.",
    formula=r"W_0 = W - s \sum_k B_{:k} A_{k:}",
    needs=("unmerge",),
    tolerance=8,
    cases=layers(),
)
def test_unmerge_any_weight(impl, case):
    W0 = impl.unmerge(W=case.W0, A=case.A, B=case.B, scaling=case.scaling)
    delta, size = outer_sum(case.A, case.B, case.scaling)
    assert_close(W0, case.W0 - delta, size=np.abs(case.W0) + size, what="W0")


@law(
    "lora.L2c",
    says="The merged weight adds to the pretrained one the scaled sum of the outer products of B's columns and A's rows.",
    formula=r"W = W_0 + s \sum_k B_{:k} A_{k:}",
    needs=("merge",),
    tolerance=8,
    cases=layers(),
)
def test_merge(impl, case):
    W = impl.merge(W0=case.W0, A=case.A, B=case.B, scaling=case.scaling)
    delta, size = outer_sum(case.A, case.B, case.scaling)
    assert_close(W, case.W0 + delta, size=np.abs(case.W0) + size, what="W")


@law(
    "lora.L2d",
    says="The update is the scaled sum of the outer products of B's columns and A's rows.",
    formula=r"\Delta W = s \sum_k B_{:k} A_{k:}",
    needs=("delta_weight",),
    tolerance=8,
    cases=layers(),
)
def test_delta_weight(impl, case):
    want, size = outer_sum(case.A, case.B, case.scaling)
    assert_close(impl.delta_weight(A=case.A, B=case.B, scaling=case.scaling), want, size=size, what="Delta W")


@law(
    "lora.L2e",
    says="The output is the frozen layer's plus, for each k, B's column k times s times A's row k seen by x.",
    formula=r"y = W_0 x + s \sum_k B_{:k} (A_{k:} \cdot x)",
    needs=("forward",),
    tolerance=8,
    cases=layers(),
)
def test_forward(impl, case):
    y = impl.forward(x=case.x, W0=case.W0, A=case.A, B=case.B, scaling=case.scaling)
    _check_forward(y, case, bias=0 * case.bias, kept=case.x)


@law(
    "lora.L2g",
    says="The bias is added to the output once, as it is.",
    formula=r"y = W_0 x + b + s \sum_k B_{:k} (A_{k:} \cdot x)",
    needs=("forward.bias",),
    tolerance=8,
    cases=layers(),
)
def test_forward_with_bias(impl, case):
    y = impl.forward(x=case.x, W0=case.W0, A=case.A, B=case.B, scaling=case.scaling, bias=case.bias)
    _check_forward(y, case, bias=case.bias, kept=case.x)


@law(
    "lora.L12d",
    says="Under a dropout mask the adapter path sees what is kept of x, divided by 1 - p; the frozen path sees x.",
    formula=r"y = W_0 x + s \sum_k B_{:k} \big(A_{k:} \cdot \tfrac{\mathrm{mask} \odot x}{1-p}\big)",
    needs=("forward.mask", "forward.p"),
    tolerance=8,
    cases=layers(),
)
def test_forward_with_dropout(impl, case):
    y = impl.forward(x=case.x, W0=case.W0, A=case.A, B=case.B, scaling=case.scaling, mask=case.mask, p=case.p)
    _check_forward(y, case, bias=0 * case.bias, kept=case.x * case.mask / (1 - case.p))


def _check_forward(y, case, bias, kept):
    """Compare outputs with sums over the rank, position by position; `kept` is what the adapter path sees of x."""
    want, size = np.zeros_like(y), np.zeros_like(y)
    for position in np.ndindex(y.shape[:-1]):
        hidden = [float(np.dot(case.A[k], kept[position])) for k in range(case.rank)]
        want[position] = case.W0 @ case.x[position] + bias + case.scaling * sum(h * case.B[:, k] for k, h in enumerate(hidden))
        hidden_size = np.abs(case.A) @ np.abs(kept[position])
        size[position] = np.abs(case.W0) @ np.abs(case.x[position]) + np.abs(bias) + case.scaling * np.abs(case.B) @ hidden_size
    assert_close(y, want, size=size, what="y")


# Gradients


@law(
    "lora.L3a",
    says="The factors' gradients are the slopes of the loss along single entries of A and of B.",
    formula=r"g_A = s B^\top G, \quad g_B = s G A^\top",
    needs=("gradients",),
    tolerance=8,
    cases=layers(),
)
def test_gradients(impl, case):
    grad_A, grad_B = impl.gradients(G=case.G, A=case.A, B=case.B, scaling=case.scaling)
    # G is the gradient of the merged weight: the loss near it is <G, W>, linear in A and in B, so its slopes are those at 0
    want_A = slope(lambda A: np.sum(case.G * (case.scaling * case.B @ A)), 0 * case.A)
    want_B = slope(lambda B: np.sum(case.G * (case.scaling * B @ case.A)), 0 * case.B)
    assert_close(grad_A, want_A, size=case.scaling * np.abs(case.B).T @ np.abs(case.G), what="grad_A")
    assert_close(grad_B, want_B, size=case.scaling * np.abs(case.G) @ np.abs(case.A).T, what="grad_B")


@law(
    "lora.L3b",
    says="The backward pass gives the slopes of <grad_y, y> along single entries of x, A and B.",
    formula=r"\partial L/\partial x = g_y (W_0 + s B A), \quad g_A = s B^\top G, \quad g_B = s G A^\top, \quad G = \sum_t g_{y,t} x_t^\top",
    needs=("backward",),
    tolerance=8,
    cases=layers(high=5),
)
def test_backward(impl, case):
    x, grad_y, W0, A, B, s = case.x, case.grad_y, case.W0, case.A, case.B, case.scaling
    got = impl.backward(grad_y=grad_y, x=x, W0=W0, A=A, B=B, scaling=s)
    _check_backward(got, x, grad_y, W0, A, B, s, keep=np.ones_like(x))


@law(
    "lora.L3c",
    says="With dropout the backward pass goes through the same mask: on the adapter path only, what is kept divided by 1 - p.",
    formula=r"y = x W_0^\top + s\,\tfrac{\mathrm{mask} \odot x}{1-p} A^\top B^\top",
    needs=("backward.mask", "backward.p"),
    tolerance=12,
    cases=layers(high=5),
)
def test_backward_with_dropout(impl, case):
    x, grad_y, W0, A, B, s = case.x, case.grad_y, case.W0, case.A, case.B, case.scaling
    got = impl.backward(grad_y=grad_y, x=x, W0=W0, A=A, B=B, scaling=s, mask=case.mask, p=case.p)
    _check_backward(got, x, grad_y, W0, A, B, s, keep=case.mask / (1 - case.p))


def _check_backward(got, x, grad_y, W0, A, B, s, keep):
    """Compare three gradients with slopes of <grad_y, y>: y is linear in each of x, A and B, so they are those at 0."""

    def adapter(x, A, B):
        return s * (x * keep @ A.T) @ B.T

    want_x = slope(lambda x: np.sum(grad_y * (x @ W0.T + adapter(x, A, B))), 0 * x)
    want_A = slope(lambda A: np.sum(grad_y * adapter(x, A, B)), 0 * A)
    want_B = slope(lambda B: np.sum(grad_y * adapter(x, A, B)), 0 * B)
    grad_x, grad_A, grad_B = got
    x, grad_y, W0, A, B = (np.abs(array) for array in (x, grad_y, W0, A, B))
    assert_close(grad_x, want_x, size=grad_y @ W0 + keep * (s * grad_y @ B @ A), what="grad_x")
    G = np.reshape(grad_y, (-1, len(W0))).T @ np.reshape(x * keep, (-1, W0.shape[1]))
    assert_close(grad_A, want_A, size=s * B.T @ G, what="grad_A")
    assert_close(grad_B, want_B, size=s * G @ A.T, what="grad_B")


# One step of gradient descent


@law(
    "lora.L4",
    says="The first step moves B only, and moves the weight by the gradient seen through A.",
    formula=r"\Delta W = -\eta s^2\, G A^\top A",
    needs=("init", "sgd_step"),
    tolerance=8,
    cases=layers(),
)
def test_first_step(impl, case):
    A, B = impl.init(W0=case.W0, rank=case.rank, generator=case.seed)
    _W0, new_A, new_B = impl.sgd_step(G=case.G, W0=case.W0, A=A, B=B, scaling=case.scaling, lr=case.lr)
    assert_close(new_A, A, size=0, what="A after the first step")
    eta_s2 = case.lr * case.scaling**2
    size = eta_s2 * np.abs(case.G) @ np.abs(A).T @ np.abs(A)
    assert_close(case.scaling * (new_B @ new_A - B @ A), -eta_s2 * case.G @ (A.T @ A), size=size, what="Delta W of the first step")


@law(
    "lora.L8",
    says="One step changes the product by two first-order terms and one of second order in the learning rate.",
    formula=r"\Delta(sBA) = -\eta s (B g_A + g_B A) + \eta^2 s\, g_B g_A",
    needs=("sgd_step", "delta_weight"),
    tolerance=8,
    cases=layers(),
)
def test_exact_step(impl, case):
    A, B, G, s, lr = case.A, case.B, case.G, case.scaling, case.lr
    _, new_A, new_B = impl.sgd_step(G=G, W0=case.W0, A=A, B=B, scaling=s, lr=lr)
    change = impl.delta_weight(A=new_A, B=new_B, scaling=s) - impl.delta_weight(A=A, B=B, scaling=s)
    # With g_A = s B'G and g_B = s G A', in terms of the two symmetric products
    BB, AA = B @ B.T, A.T @ A
    want = -lr * s**2 * (BB @ G + G @ AA) + lr**2 * s**3 * G @ (B @ A).T @ G
    # Rounding is relative to the larger factors after the step, whose product is subtracted
    larger_A, larger_B = np.abs(A) + lr * s * np.abs(B).T @ np.abs(G), np.abs(B) + lr * s * np.abs(G) @ np.abs(A).T
    assert_close(change, want, size=s * larger_B @ larger_A, what="change of s B A")


@law(
    "lora.L8b",
    says="Each factor moves down its own slope, both from the same point, after its own decay.",
    formula=r"A \mapsto (1 - \eta\lambda) A - \eta g_A, \quad B \mapsto (1 - \eta\lambda) B - \eta g_B",
    needs=("sgd_step.weight_decay",),
    tolerance=8,
    cases=layers(),
)
def test_step_of_each_factor(impl, case):
    A, B, s = case.A, case.B, case.scaling
    _, new_A, new_B = impl.sgd_step(G=case.G, W0=case.W0, A=A, B=B, scaling=s, lr=case.lr, weight_decay=0.25)
    want_A = 0.25 * case.lr * A + case.lr * slope(lambda A: np.sum(case.G * (s * B @ A)), 0 * A)
    want_B = 0.25 * case.lr * B + case.lr * slope(lambda B: np.sum(case.G * (s * B @ A)), 0 * B)
    assert_close(new_A, A - want_A, size=np.abs(A) + case.lr * s * np.abs(B).T @ np.abs(case.G), what="A after a step")
    assert_close(new_B, B - want_B, size=np.abs(B) + case.lr * s * np.abs(case.G) @ np.abs(A).T, what="B after a step")


@law(
    "lora.L14",
    says="The pretrained weight is never stepped nor decayed; decay acts on each factor, so twice on the product.",
    formula=r"G = 0 \;\Rightarrow\; W_0 \mapsto W_0, \quad BA \mapsto (1 - \eta\lambda)^2 BA",
    needs=("sgd_step.weight_decay",),
    tolerance=16,
    cases=layers(),
)
def test_weight_decay(impl, case):
    still = impl.sgd_step(G=0 * case.G, W0=case.W0, A=case.A, B=case.B, scaling=case.scaling, lr=case.lr, weight_decay=0.25)
    size = np.abs(case.B) @ np.abs(case.A)
    assert_close(still.B @ still.A, (1 - case.lr * 0.25) ** 2 * case.B @ case.A, size=size, what="B A after decay")
    moved = impl.sgd_step(G=case.G, W0=case.W0, A=case.A, B=case.B, scaling=case.scaling, lr=case.lr, weight_decay=0.25)
    assert_close(moved.W0, case.W0, size=0, what="W0 after a step")


# Structure


@law(
    "lora.L5",
    says="The update has rank at most `rank`.",
    formula=r"\sigma_{r+1}(\Delta W) = 0",
    needs=("delta_weight",),
    tolerance=16,
    cases=layers(low=2, below_full_rank=True),
)
def test_rank(impl, case):
    values = np.linalg.svd(impl.delta_weight(A=case.A, B=case.B, scaling=case.scaling), compute_uv=False)
    size = case.scaling * np.linalg.norm(case.A) * np.linalg.norm(case.B)
    assert_close(values[case.rank :], np.zeros_like(values[case.rank :]), size=size, what="singular values beyond the rank")


class GaugedLayer(NamedTuple):
    """A layer and an invertible change of basis M of the factors' common space."""

    G: np.ndarray
    A: np.ndarray
    B: np.ndarray
    M: np.ndarray  # (rank, rank)
    scaling: float
    condition: float


@st.composite
def gauged_layers(draw: st.DrawFn) -> GaugedLayer:
    layer = draw(layers())
    condition = draw(st.sampled_from([1.0, 4.0, 50.0]))
    M = Matrices(layer.seed + 1).invertible(layer.rank, condition)
    return GaugedLayer(layer.G, layer.A, layer.B, M, layer.scaling, condition)


@law(
    "lora.L6a",
    says="The update does not depend on the basis in which the factors are written.",
    formula=r"(A, B) \mapsto (MA, BM^{-1}) \;\Rightarrow\; \Delta W \mapsto \Delta W",
    needs=("delta_weight",),
    tolerance=16,
    cases=gauged_layers(),
)
def test_gauge_of_the_update(impl, case):
    A, B, inverse = case.M @ case.A, case.B @ np.linalg.inv(case.M), np.linalg.inv(case.M)
    want = impl.delta_weight(A=case.A, B=case.B, scaling=case.scaling)
    size = case.scaling * np.linalg.norm(case.B) * np.linalg.norm(inverse, 2) * np.linalg.norm(case.A)
    assert_close(impl.delta_weight(A=A, B=B, scaling=case.scaling), want, size=size, what="Delta W in the new basis")


@law(
    "lora.L6b",
    says="The factors' gradients transform against the factors.",
    formula=r"(A, B) \mapsto (MA, BM^{-1}) \;\Rightarrow\; g_A \mapsto M^{-\top} g_A, \quad g_B \mapsto g_B M^\top",
    needs=("gradients",),
    tolerance=16,
    cases=gauged_layers(),
)
def test_gauge_of_the_gradients(impl, case):
    inverse = np.linalg.inv(case.M)
    old = impl.gradients(G=case.G, A=case.A, B=case.B, scaling=case.scaling)
    new = impl.gradients(G=case.G, A=case.M @ case.A, B=case.B @ inverse, scaling=case.scaling)
    size_A = case.scaling * np.linalg.norm(inverse, 2) * np.linalg.norm(case.B) * np.linalg.norm(case.G)
    assert_close(new.grad_A, inverse.T @ old.grad_A, size=size_A, what="grad_A in the new basis")
    size_B = case.scaling * np.linalg.norm(case.G) * np.linalg.norm(case.A)
    assert_close(new.grad_B, old.grad_B @ case.M.T, size=size_B, what="grad_B in the new basis")


@law(
    "lora.L7a",
    says="Both gradients see the same product of the factors with the gradient.",
    formula=r"B^\top g_B = g_A A^\top",
    needs=("gradients",),
    tolerance=8,
    cases=layers(),
)
def test_balance_of_the_gradients(impl, case):
    grad_A, grad_B = impl.gradients(G=case.G, A=case.A, B=case.B, scaling=case.scaling)
    size = case.scaling * np.abs(case.B).T @ np.abs(case.G) @ np.abs(case.A).T
    assert_close(case.B.T @ grad_B, grad_A @ case.A.T, size=size, what="B' grad_B")


@law(
    "lora.L7b",
    says="A step changes the balance of the factors in second order of the learning rate only.",
    formula=r"\Delta(B^\top B - A A^\top) = \eta^2 (g_B^\top g_B - g_A g_A^\top)",
    needs=("sgd_step",),
    tolerance=8,
    cases=layers(),
)
def test_balance_of_a_step(impl, case):
    A, B, s, lr = case.A, case.B, case.scaling, case.lr
    _, new_A, new_B = impl.sgd_step(G=case.G, W0=case.W0, A=A, B=B, scaling=s, lr=lr)
    change = (new_B.T @ new_B - new_A @ new_A.T) - (B.T @ B - A @ A.T)
    # g_B'g_B = s^2 A G'G A' and g_A g_A' = s^2 B'G G'B
    want = (lr * s) ** 2 * (A @ case.G.T @ case.G @ A.T - B.T @ case.G @ case.G.T @ B)
    larger_A, larger_B = np.abs(A) + lr * s * np.abs(B).T @ np.abs(case.G), np.abs(B) + lr * s * np.abs(case.G) @ np.abs(A).T
    assert_close(change, want, size=larger_B.T @ larger_B + larger_A @ larger_A.T, what="change of B'B - AA'")


@law(
    "lora.L11",
    says="Factors taken from a target's singular value decomposition leave of it just the tail of its spectrum.",
    formula=r"A = V_r^\top,\; sB = U_r \Sigma_r \;\Rightarrow\; \|D - \Delta W\|_F^2 = \sum_{i>r} \sigma_i^2(D)",
    needs=("delta_weight",),
    tolerance=16,
    cases=layers(low=2),
)
def test_eckart_young(impl, case):
    U, values, Vt = np.linalg.svd(case.G)
    A, B = Vt[: case.rank], U[:, : case.rank] * values[: case.rank] / case.scaling
    rest = case.G - impl.delta_weight(A=A, B=B, scaling=case.scaling)
    tail = np.sum(values[case.rank :] ** 2)
    assert_close(np.sum(rest**2), tail, size=np.sum(values**2), what="squared distance to the target")


# Scaling and draws


@law(
    "lora.L10a",
    says="LoRA's scaling is alpha over the rank.",
    formula=r"s = \alpha / r",
    needs=("scaling_factor",),
    tolerance=4,
    cases=scaling_cases(),
)
def test_scaling(impl, case):
    scaling = impl.scaling_factor(alpha=case.alpha, rank=case.rank)
    assert_close(scaling, case.alpha / case.rank, size=case.alpha / case.rank, what="the scaling")


@law(
    "lora.L10b",
    says="rsLoRA's scaling is alpha over the square root of the rank; at rank 1 both scalings are alpha.",
    formula=r"s_{rs} = \alpha / \sqrt r",
    needs=("scaling_factor.rslora",),
    tolerance=8,
    cases=scaling_cases(),
)
def test_rslora_scaling(impl, case):
    scaling = impl.scaling_factor(alpha=case.alpha, rank=case.rank, rslora=True)
    want = case.alpha * np.exp(-np.log(case.rank) / 2)
    assert_close(scaling, want, size=want, what="the scaling of rsLoRA")
    assert_close(scaling**2 * case.rank, case.alpha**2, size=case.alpha**2, what="squared scaling times rank")


class Draws(NamedTuple):
    """A layer to start on, many times over."""

    W0: np.ndarray
    rank: int
    seed: int


@st.composite
def draws(draw: st.DrawFn) -> Draws:
    """Layers whose starting A has at least 16 entries and 4 rows: a law needs few starts for many numbers."""
    rank, seed = draw(st.integers(4, 6)), draw(seeds())
    return Draws(Matrices(seed)(draw(st.integers(6, 12)), draw(st.integers(6, 12))), rank, seed)


def _start_factors(impl, case, count, **options):
    """A of `count` starts with consecutive seeds, (count, rank, in)."""
    return np.stack([impl.init(W0=case.W0, rank=case.rank, generator=case.seed + i, **options).A for i in range(count)])


@law(
    "lora.L9a",
    says="At the start the entries of A fill the interval of half-width 1/sqrt(in), evenly, and never leave it.",
    formula=r"|A_{ij}| \le 1/\sqrt n",
    needs=("init",),
    tolerance=2,
    cases=draws(),
    examples=5,
)
def test_support_of_the_start(impl, case):
    assert_uniform(_start_factors(impl, case, 20), 1 / np.sqrt(case.W0.shape[1]), "A")


@law(
    "lora.L9b",
    says="The expected first update is the gradient times eta alpha^2 / (3 n r); with rsLoRA the rank drops out.",
    formula=r"\mathbb E[s^2 G A^\top A] = \tfrac{s^2 r}{3n} G",
    needs=("init", "scaling_factor.rslora"),
    tolerance=0,
    cases=draws(),
    examples=3,
)
def test_scale_of_the_first_update(impl, case):
    n, alpha = case.W0.shape[1], 4.0
    rows = _start_factors(impl, case, 100).reshape(-1, n)
    products = np.einsum("rj,rk->rjk", rows, rows)
    # 400 or more independent rows, bounded by three standard deviations: seven standard errors, false alarm below 1e-8 an entry
    mean, error = case.rank * products.mean(axis=0), 7 * case.rank * products.std(axis=0, ddof=1) / np.sqrt(len(rows))
    plain = impl.scaling_factor(alpha=alpha, rank=case.rank) ** 2
    stable = impl.scaling_factor(alpha=alpha, rank=case.rank, rslora=True) ** 2
    assert_close(plain * mean, alpha**2 / (3 * n * case.rank) * np.eye(n), within=plain * error, what="mean of s^2 A'A with alpha/r")
    assert_close(stable * mean, alpha**2 / (3 * n) * np.eye(n), within=stable * error, what="mean of s^2 A'A with alpha/sqrt(r)")


@law(
    "lora.L9c",
    says="The start is repeated by the same seed and changed by another.",
    formula=r"A(\mathrm{seed}) = A(\mathrm{seed}), \quad A(\mathrm{seed}) \ne A(\mathrm{seed}+1)",
    needs=("init",),
    tolerance=0,
    cases=draws(),
    examples=5,
)
def test_seed_of_the_start(impl, case):
    assert_seeded(lambda seed: impl.init(W0=case.W0, rank=case.rank, generator=seed), case.seed, "A")


@law(
    "lora.L9d",
    says="With the Gaussian option the entries of A have mean 0 and standard deviation 1/rank, and some exceed twice that.",
    formula=r"A_{ij} \sim \mathcal N(0, 1/r^2)",
    needs=("init.distribution",),
    tolerance=0,
    cases=draws(),
    examples=5,
)
def test_gaussian_start(impl, case):
    assert_normal(_start_factors(impl, case, 40, distribution="gaussian"), 1 / case.rank, "A")


# Dropout


class DropoutCase(NamedTuple):
    """One input and all masks of its entries."""

    x: np.ndarray  # (in,)
    masks: np.ndarray  # (2^in, in)
    W0: np.ndarray
    A: np.ndarray
    B: np.ndarray
    scaling: float
    p: float


@st.composite
def dropout_cases(draw: st.DrawFn) -> DropoutCase:
    out_features, in_features = draw(sides(1, 4)), draw(sides(1, 4))
    rank = draw(st.integers(1, min(out_features, in_features)))
    matrices = Matrices(draw(seeds()), draw(entries()))
    masks = np.array(list(np.ndindex(*(2,) * in_features)), bool)
    return DropoutCase(
        x=matrices(in_features),
        masks=masks,
        W0=matrices(out_features, in_features),
        A=matrices(rank, in_features),
        B=matrices(out_features, rank),
        scaling=draw(scalings()),
        p=draw(st.sampled_from([0.5, 0.25])),
    )


def _all_outputs(impl, case):
    """The outputs under every mask (2^in, out), the probability of each mask (2^in, 1), and the outputs' rounding size."""
    x = np.tile(case.x, (len(case.masks), 1))
    y = impl.forward(x=x, W0=case.W0, A=case.A, B=case.B, scaling=case.scaling, mask=case.masks, p=case.p)
    kept = case.masks.sum(axis=1, keepdims=True)
    probability = (1 - case.p) ** kept * case.p ** (len(case.x) - kept)
    entries = np.abs(case.W0) + case.scaling / (1 - case.p) * np.abs(case.B) @ np.abs(case.A)
    return y, probability, entries @ np.abs(case.x)


@law(
    "lora.L12a",
    says="Averaged over all dropout masks the output is the output without dropout.",
    formula=r"\mathbb E[y] = (W_0 + s B A)\, x",
    needs=("forward.mask", "forward.p"),
    tolerance=8,
    cases=dropout_cases(),
)
def test_mean_over_masks(impl, case):
    y, probability, size = _all_outputs(impl, case)
    want = case.W0 @ case.x + case.scaling * case.B @ (case.A @ case.x)
    assert_close((probability * y).sum(axis=0), want, size=size, what="mean output")


@law(
    "lora.L12b",
    says="The covariance of the output over all dropout masks is that of noise on the adapter's input, before A.",
    formula=r"\mathrm{Cov}[y] = \tfrac{p}{1-p}\, s^2 B A\, \mathrm{diag}(x^2)\, A^\top B^\top",
    needs=("forward.mask", "forward.p"),
    tolerance=16,
    cases=dropout_cases(),
)
def test_covariance_over_masks(impl, case):
    y, probability, size = _all_outputs(impl, case)
    centred = y - (probability * y).sum(axis=0)
    delta = case.scaling * case.B @ case.A
    want = case.p / (1 - case.p) * (delta * case.x**2) @ delta.T
    assert_close(centred.T @ (probability * centred), want, size=np.multiply.outer(size, size), what="covariance of the output")


class MaskCase(NamedTuple):
    """An input to draw masks for."""

    x: np.ndarray
    p: float
    seed: int


@law(
    "lora.L12c",
    says="A drawn mask keeps each entry independently with probability 1 - p, and is repeated by the same seed.",
    formula=r"P(\mathrm{mask}_{ij} = 1) = 1 - p",
    needs=("draw_mask",),
    tolerance=0,
    cases=st.builds(MaskCase, x=st.builds(lambda seed: Matrices(seed)(60, 50), seeds()), p=st.sampled_from([0.5, 0.25, 0.1]), seed=seeds()),
    examples=5,
)
def test_mask(impl, case):
    mask = assert_seeded(lambda seed: impl.draw_mask(x=case.x, p=case.p, generator=seed), case.seed, "mask")
    assert mask.dtype == bool, f"the mask has dtype {mask.dtype}; needed boolean, True where the entry is kept"
    width = np.sqrt(case.p * (1 - case.p))
    assert_close(mask.mean(), 1 - case.p, within=6 * width / np.sqrt(mask.size), what="share of kept entries")
    # A mask drawn per row or per column would have rows or columns all alike: their shares would spread by the full width
    assert_close(mask.mean(axis=0), np.full(50, 1 - case.p), within=6.5 * width / np.sqrt(60), what="share kept in a column")
    assert_close(mask.mean(axis=1), np.full(60, 1 - case.p), within=6.5 * width / np.sqrt(50), what="share kept in a row")


@law(
    "lora.L13",
    says="Just the entries of the two factors are trained.",
    formula=r"r (m + n)",
    needs=("num_trainable",),
    tolerance=0,
    cases=layers(),
)
def test_parameter_count(impl, case):
    assert_close(impl.num_trainable(W0=case.W0, rank=case.rank), case.A.size + case.B.size, size=0, what="number of trainable parameters")


# Theorem checks: the mathematics itself


class ProblemCase(NamedTuple):
    """A classification problem and one adapted layer on it."""

    X: np.ndarray
    Y: np.ndarray
    W0: np.ndarray
    A: np.ndarray
    B: np.ndarray
    scaling: float
    rank: int
    seed: int


@st.composite
def problem_cases(draw: st.DrawFn) -> ProblemCase:
    layer = draw(layers(low=2, high=5, below_full_rank=True))
    matrices = Matrices(layer.seed + 1)
    out_features, in_features = layer.W0.shape
    labels = np.sign(matrices(9, out_features))
    return ProblemCase(matrices(9, in_features), labels, layer.W0, layer.A, layer.B, layer.scaling, layer.rank, layer.seed)


@theorem(
    "lora.T1",
    says="Through a smooth loss the factors' gradients follow from the gradient of the merged weight alone.",
    formula=r"\nabla_A L(W_0 + sBA) = s B^\top \nabla L(W), \quad \nabla_B L = s \nabla L(W) A^\top",
    tolerance=1e7,  # central differences with step 1e-4: h^2 plus eps / h, about 1e-8
    cases=problem_cases(),
)
def test_chain_rule(case):
    problem = LogisticRegression(case.X, case.Y)
    G = problem.grad(case.W0 + case.scaling * case.B @ case.A)
    slope_A = slope(lambda A: problem.loss(case.W0 + case.scaling * case.B @ A), case.A, step=1e-4)
    slope_B = slope(lambda B: problem.loss(case.W0 + case.scaling * B @ case.A), case.B, step=1e-4)
    largest = 1 + np.abs(case.X).max() * case.scaling * (np.abs(case.A).max() + np.abs(case.B).max())
    assert_close(case.scaling * case.B.T @ G, slope_A, size=largest**3)
    assert_close(case.scaling * G @ case.A.T, slope_B, size=largest**3)


@theorem(
    "lora.T2",
    says="No matrix of rank r is nearer to a target than the truncated singular value decomposition.",
    formula=r"\min_{\mathrm{rank}\, X \le r} \|D - X\|_F^2 = \sum_{i>r} \sigma_i^2(D)",
    tolerance=16,
    cases=problem_cases(),
)
def test_best_low_rank(case):
    # Any other column space: the best X in it is the projection, found by least squares
    matrices, values = Matrices(case.seed + 2), np.linalg.svd(case.W0, compute_uv=False)
    tail = np.sum(values[case.rank :] ** 2)
    U = np.linalg.svd(case.W0)[0][:, : case.rank]
    for width in (1e-3, 1e-1, 1.0, 10.0):
        columns = U + width * matrices(*U.shape)
        best, *_ = np.linalg.lstsq(columns, case.W0, rcond=None)
        excess = np.sum((case.W0 - columns @ best) ** 2) - tail
        assert_close(min(excess, 0.0), 0.0, size=np.sum(values**2), what="how much nearer another matrix of rank r is")
    best, *_ = np.linalg.lstsq(U, case.W0, rcond=None)
    assert_close(np.sum((case.W0 - U @ best) ** 2), tail, size=np.sum(values**2), conditioning=4, what="distance of the truncation")


@theorem(
    "lora.T3",
    says="Gradient flow conserves the balance of the factors.",
    formula=r"\tfrac{d}{dt}(B^\top B - A A^\top) = 0",
    tolerance=1e9,  # fourth-order Runge-Kutta over ten steps of 0.01
    cases=problem_cases(),
    examples=20,
)
def test_gradient_flow(case):
    problem = LogisticRegression(case.X, case.Y)
    A, B, s = case.A / 4, case.B / 4, case.scaling

    def velocity(A, B):
        G = problem.grad(case.W0 + s * B @ A)
        return -s * B.T @ G, -s * G @ A.T

    start, moved, h = B.T @ B - A @ A.T, 0.0, 0.01
    for _ in range(10):
        k1 = velocity(A, B)
        k2 = velocity(A + h / 2 * k1[0], B + h / 2 * k1[1])
        k3 = velocity(A + h / 2 * k2[0], B + h / 2 * k2[1])
        k4 = velocity(A + h * k3[0], B + h * k3[1])
        A = A + h / 6 * (k1[0] + 2 * k2[0] + 2 * k3[0] + k4[0])
        B = B + h / 6 * (k1[1] + 2 * k2[1] + 2 * k3[1] + k4[1])
        moved += h * np.linalg.norm(k1[0])
    assert_close(B.T @ B - A @ A.T, start, size=1 + np.abs(start).max(), what="B'B - AA' after a flow")
    assert moved > 0, "nothing moved: the check says nothing"


class PowerCase(NamedTuple):
    """Two ranks, a width and an exponent of the rank in s = alpha / r^q."""

    n: int
    low: int
    high: int
    q: float


@theorem(
    "lora.T4",
    says="Of all powers s = alpha / r^q, the expected first update is free of the rank for q = 1/2 only.",
    formula=r"s^2\, \mathbb E[A^\top A] = \alpha^2 \tfrac{r^{1-2q}}{3n} I",
    tolerance=16,
    cases=st.builds(
        PowerCase, n=st.integers(1, 9), low=st.integers(1, 8), high=st.integers(16, 64), q=st.sampled_from([0.5, 1.0, 0.0, 0.25, 2.0])
    ),
)
def test_only_the_square_root(case):
    # E[A_ij^2] by Gauss-Legendre quadrature on (-1/sqrt(n), 1/sqrt(n)), exact for polynomials
    nodes, weights = np.polynomial.legendre.leggauss(4)
    second_moment = np.sum(weights / 2 * (nodes / np.sqrt(case.n)) ** 2)
    assert_close(second_moment, 1 / (3 * case.n), size=1 / case.n, what="mean square of an entry of A")
    low, high = (rank ** (-2 * case.q) * rank * second_moment for rank in (case.low, case.high))
    assert_close(
        high / low, (case.high / case.low) ** (1 - 2 * case.q), size=(case.high / case.low) ** (1 - 2 * case.q), what="ratio of scales"
    )
    assert (abs(np.log(high / low)) < 1e-9) == (case.q == 0.5), f"with q = {case.q} the scale changes from {low} to {high}"
