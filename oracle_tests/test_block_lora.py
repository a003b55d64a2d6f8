# mypy: ignore-errors
"""The laws of Block-LoRA. Expected values are NumPy float64; none comes from an implementation under test.

The roads: sums over single entries, LoRA written out with concatenated factors, slopes, whole trainings of a smaller LoRA, scalar
operations counted one by one.
"""

import itertools
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from loracle.oracle_tests.draws import assert_seeded, assert_uniform
from loracle.oracle_tests.expected import assert_linear
from loracle.oracle_tests.law import assert_close, law, theorem
from loracle.oracle_tests.loading import Derivation
from loracle.oracle_tests.problems import LinearRegression, slope
from loracle.oracle_tests.strategies import Matrices, entries, leads, scalings, seeds, sides

ORDERS = ("add_first", "blockwise")


class Layer(NamedTuple):
    """One adapted layer and what may come in from either side."""

    x: np.ndarray  # (..., in)
    G: np.ndarray  # (out, in)
    W0: np.ndarray  # (out, in)
    A: np.ndarray  # (block_rank, in)
    B: np.ndarray  # (blocks, out, block_rank)
    C: np.ndarray  # (blocks, out, block_rank), zero in the sum over blocks
    scaling: float
    bias: np.ndarray  # (out,)
    mask: np.ndarray  # (..., in)
    p: float
    blocks: int
    block_rank: int
    seed: int


@st.composite
def layers(draw: st.DrawFn, beyond: int = 0, blocks: tuple[int, ...] = (2, 3, 1, 4)) -> Layer:
    """`beyond`: by how much both sides exceed the rank of a block at least."""
    count, short = draw(st.sampled_from(blocks)), draw(st.integers(1, 3))
    out_features, in_features = draw(sides(short + beyond, 6)), draw(sides(short + beyond, 6))
    lead = draw(leads())
    seed = draw(seeds())
    matrices = Matrices(seed, draw(entries()))
    C = matrices(count, out_features, short)
    C[-1] = -C[:-1].sum(axis=0)
    return Layer(
        x=matrices(*lead, in_features),
        G=matrices(out_features, in_features),
        W0=matrices(out_features, in_features),
        A=matrices(short, in_features),
        B=matrices(count, out_features, short),
        C=C,
        scaling=draw(scalings()),
        bias=matrices(out_features),
        mask=matrices.mask(*lead, in_features),
        p=draw(st.sampled_from([0.5, 0.25])),
        blocks=count,
        block_rank=short,
        seed=seed,
    )


def _delta(A, B, scaling):
    """s times the sum over blocks i and their columns k of B_i's column times A's row, and the size of what is summed."""
    terms = [np.multiply.outer(B[i, :, k], A[k]) for i, k in np.ndindex(len(B), len(A))]
    return scaling * np.sum(terms, axis=0), scaling * np.sum(np.abs(terms), axis=0)


def _delta_weight(impl, A, B, scaling):
    """The columns of Delta W are what the layer adds to W0 = 0 for the unit vectors."""
    return impl.forward(x=np.eye(A.shape[1]), W0=np.zeros((B.shape[1], A.shape[1])), A=A, B=B, scaling=scaling).T


delta_weight_from_forward = Derivation("delta_weight", needs=("forward",), compute=_delta_weight)


# At the start


class Start(NamedTuple):
    """A layer to start on."""

    W0: np.ndarray
    rank: int
    blocks: int
    scaling: float
    seed: int


@st.composite
def starts(draw: st.DrawFn, high: int = 7) -> Start:
    blocks, short = draw(st.sampled_from([2, 3, 1])), draw(st.sampled_from([1, 2]))
    rank, seed = blocks * short, draw(seeds())
    W0 = Matrices(seed, draw(entries()))(draw(sides(rank, high)), draw(sides(rank, high)))
    return Start(W0, rank, blocks, draw(scalings()), seed)


def _start(impl, case, i=0):
    return impl.init(W0=case.W0, rank=case.rank, blocks=case.blocks, generator=case.seed + i)


@law(
    "block_lora.L1a",
    says="At the start A has rank / blocks rows, and there are as many blocks as asked for, all zero.",
    formula=r"A_s \in \mathbb R^{r/b \times n}, \quad B_i = 0 \in \mathbb R^{m \times r/b}, \quad i = 1, \dots, b",
    needs=("init",),
    tolerance=0,
    cases=starts(),
)
def test_start(impl, case):
    A, B = _start(impl, case)
    (m, n), short = case.W0.shape, case.rank // case.blocks
    assert A.shape == (short, n), f"A has shape {A.shape}, expected {(short, n)}"
    assert np.any(A), "A is zero: with the blocks zero too nothing would ever be trained"
    assert_close(B, np.zeros((case.blocks, m, short)), size=0, what="B at the start")


@law(
    "block_lora.L1b",
    says="With the factors of the start the merged weight is the pretrained one, bit for bit.",
    formula=r"B_i = 0 \;\Rightarrow\; W = W_0",
    needs=("init", "merge"),
    tolerance=0,
    cases=starts(),
)
def test_start_merge(impl, case):
    A, B = _start(impl, case)
    assert_close(impl.merge(W0=case.W0, A=A, B=B, scaling=case.scaling), case.W0, size=0, what="W")


@law(
    "block_lora.L1c",
    says="With the factors of the start the adapted layer is the frozen layer.",
    formula=r"B_i = 0 \;\Rightarrow\; y = x W_0^\top",
    needs=("init", "forward"),
    tolerance=8,
    cases=starts(),
)
def test_start_forward(impl, case):
    A, B = _start(impl, case)
    x = Matrices(case.seed + 1)(3, case.W0.shape[1])
    y = impl.forward(x=x, W0=case.W0, A=A, B=B, scaling=case.scaling)
    assert_close(y, x @ case.W0.T, size=np.abs(x) @ np.abs(case.W0).T, what="y")


class Draws(NamedTuple):
    """A layer to start on, many times over."""

    W0: np.ndarray
    rank: int
    blocks: int
    seed: int


@st.composite
def draws(draw: st.DrawFn) -> Draws:
    seed = draw(seeds())
    return Draws(Matrices(seed)(draw(st.integers(12, 16)), draw(st.integers(12, 20))), 12, draw(st.sampled_from([2, 3])), seed)


@law(
    "block_lora.L1d",
    says="At the start the entries of A fill the interval of half-width 1/sqrt(in), evenly, and never leave it; a seed repeats them.",
    formula=r"(A_s)_{ij} \sim U(-1/\sqrt n,\, 1/\sqrt n)",
    needs=("init",),
    tolerance=2,
    cases=draws(),
    examples=5,
)
def test_draw_of_the_start(impl, case):
    A = np.stack([_start(impl, case, i).A for i in range(20)])
    assert_uniform(A, 1 / np.sqrt(case.W0.shape[1]), "A")
    assert_seeded(lambda i: _start(impl, case, i), 0, "A")


# Forward and merge


def _check_forward(impl, case, *, bias=None, mask=None, **options):
    """Compare outputs with sums over blocks and rank, position by position."""
    given = {"bias": bias} if bias is not None else {}
    given |= {"mask": mask, "p": case.p} if mask is not None else {}
    y = impl.forward(x=case.x, W0=case.W0, A=case.A, B=case.B, scaling=case.scaling, **given, **options)
    kept = case.x if mask is None else case.x * mask / (1 - case.p)
    delta, size = _delta(case.A, case.B, case.scaling)
    bias = np.zeros(len(case.W0)) if bias is None else bias
    want = np.einsum("oi,...i->...o", case.W0, case.x) + np.einsum("oi,...i->...o", delta, kept) + bias
    scale = np.abs(case.x) @ np.abs(case.W0).T + np.abs(kept) @ size.T + np.abs(bias)
    assert_close(y, want, size=scale, what="y")


@law(
    "block_lora.L2a",
    says="The output is the frozen layer's plus s times every block's share, all blocks seeing the same A x.",
    formula=r"y = W_0 x + s \sum_{i=1}^b B_i A_s x",
    needs=("forward",),
    tolerance=8,
    cases=layers(),
)
def test_forward(impl, case):
    _check_forward(impl, case)


@law(
    "block_lora.L2b",
    says="The bias is added to the output once, as it is, in both orders.",
    formula=r"y = W_0 x + b + s \sum_i B_i A_s x",
    needs=("forward.bias",),
    tolerance=8,
    cases=layers(),
)
def test_forward_with_bias(impl, case):
    _check_forward(impl, case, bias=case.bias)


@law(
    "block_lora.L2c",
    says="Adding the blocks first and going block by block give the same output.",
    formula=r"z = A_s x: \quad \Big(\sum_i B_i\Big) z = \sum_i (B_i z)",
    needs=("forward.order", "forward.bias"),
    tolerance=8,
    cases=layers(),
)
def test_orders(impl, case):
    for order in ORDERS:
        _check_forward(impl, case, bias=case.bias, order=order)


@law(
    "block_lora.L2d",
    says="Under dropout all blocks see the same mask: what is kept of x, divided by 1 - p; the frozen path sees x.",
    formula=r"y = W_0 x + s \sum_i B_i A_s \tfrac{\mathrm{mask} \odot x}{1-p}",
    needs=("forward.mask", "forward.p"),
    tolerance=8,
    cases=layers(),
)
def test_forward_with_dropout(impl, case):
    _check_forward(impl, case, mask=case.mask)


@law(
    "block_lora.L2e",
    says="The adapted layer is one linear layer whose weight is the merged weight.",
    formula=r"y = x W^\top, \quad W = \mathrm{merge}(W_0, A_s, B, s)",
    needs=("forward", "merge"),
    tolerance=8,
    cases=layers(),
)
def test_forward_is_merged(impl, case):
    options = {"W0": case.W0, "A": case.A, "B": case.B, "scaling": case.scaling}
    W, y = impl.merge(**options), impl.forward(x=case.x, **options)
    weights = np.abs(case.W0) + _delta(case.A, case.B, case.scaling)[1]
    assert_linear(y, case.x, W, size=weights)


@law(
    "block_lora.L2f",
    says="The update is the scaled sum, over blocks and over their columns, of outer products with the rows of A.",
    formula=r"\Delta W = s \sum_i \sum_k (B_i)_{:k} (A_s)_{k:}",
    needs=("delta_weight",),
    tolerance=8,
    cases=layers(),
)
def test_delta_weight(impl, case):
    want, size = _delta(case.A, case.B, case.scaling)
    assert_close(impl.delta_weight(A=case.A, B=case.B, scaling=case.scaling), want, size=size, what="Delta W")


@law(
    "block_lora.L2g",
    says="The merged weight adds that sum to the pretrained weight.",
    formula=r"W = W_0 + s \sum_i \sum_k (B_i)_{:k} (A_s)_{k:}",
    needs=("merge",),
    tolerance=8,
    cases=layers(),
)
def test_merge(impl, case):
    want, size = _delta(case.A, case.B, case.scaling)
    W = impl.merge(W0=case.W0, A=case.A, B=case.B, scaling=case.scaling)
    assert_close(W, case.W0 + want, size=np.abs(case.W0) + size, what="W")


@law(
    "block_lora.L2h",
    says="Unmerging takes that sum off any weight.",
    formula=r"W_0 = W - s \sum_i \sum_k (B_i)_{:k} (A_s)_{k:}",
    needs=("unmerge",),
    tolerance=8,
    cases=layers(),
)
def test_unmerge(impl, case):
    want, size = _delta(case.A, case.B, case.scaling)
    W0 = impl.unmerge(W=case.W0, A=case.A, B=case.B, scaling=case.scaling)
    assert_close(W0, case.W0 - want, size=np.abs(case.W0) + size, what="W0")


# The same layer as a LoRA


@law(
    "block_lora.L3a",
    says="As a LoRA of the nominal rank the update is the same.",
    formula=r"s\,[B_1 \cdots B_b] \begin{bmatrix} A_s \\ \vdots \\ A_s \end{bmatrix} = \Delta W",
    needs=("to_lora", "delta_weight"),
    tolerance=8,
    cases=layers(),
)
def test_embedding(impl, case):
    A, B = impl.to_lora(A=case.A, B=case.B)
    rank = case.blocks * case.block_rank
    assert A.shape[0] == B.shape[1] == rank, f"the factors have rank {A.shape[0]} and {B.shape[1]}, expected the nominal {rank}"
    size = _delta(case.A, case.B, case.scaling)[1]
    got = impl.delta_weight(A=case.A, B=case.B, scaling=case.scaling)
    assert_close(got, case.scaling * B @ A, size=size, what="Delta W")


@law(
    "block_lora.L3b",
    says="As a LoRA of the nominal rank A is stacked as often as there are blocks, and the blocks stand side by side.",
    formula=r"A = [A_s; \dots; A_s], \quad B = [B_1, \dots, B_b]",
    needs=("to_lora",),
    tolerance=0,
    cases=layers(),
)
def test_concatenation(impl, case):
    A, B = impl.to_lora(A=case.A, B=case.B)
    want_A, want_B = np.concatenate([case.A] * case.blocks, axis=0), np.concatenate(list(case.B), axis=1)
    assert_close(A, want_A, size=0, what="A of the nominal rank")
    assert_close(B, want_B, size=0, what="B of the nominal rank")


@law(
    "block_lora.L4",
    says="The layer is a LoRA whose rank is that of one block: the shared A and the sum of the blocks.",
    formula=r"\Delta W = s\,\bar B A_s, \quad \bar B = \sum_i B_i \in \mathbb R^{m \times r/b}",
    needs=("to_compact_lora",),
    tolerance=8,
    cases=layers(),
)
def test_compact_form(impl, case):
    A, B = impl.to_compact_lora(A=case.A, B=case.B)
    assert A.shape[0] == case.block_rank, f"A has rank {A.shape[0]}, expected that of one block, {case.block_rank}"
    assert_close(A, case.A, size=0, what="A of the compact form")
    assert_close(B, sum(case.B), size=np.abs(case.B).sum(axis=0), what="B of the compact form")


# Gradients


def _gradient_sizes(case):
    """What the rounding of both gradients is relative to."""
    s, G = case.scaling, np.abs(case.G)
    return s * np.abs(case.B).sum(axis=0).T @ G, s * np.broadcast_to(G @ np.abs(case.A).T, case.B.shape)


@law(
    "block_lora.L5a",
    says="The gradients of A and of every block are the slopes of the loss along their single entries.",
    formula=r"\nabla_{B_i} L = s\, G A_s^\top, \quad \nabla_{A_s} L = s \Big(\sum_i B_i\Big)^{\!\top} G",
    needs=("gradients",),
    tolerance=8,
    cases=layers(),
)
def test_gradients(impl, case):
    grad_A, grad_B = impl.gradients(G=case.G, A=case.A, B=case.B, scaling=case.scaling)
    # G is the gradient of the merged weight: the loss near it is <G, W>, linear in A and in B, so its slopes are those at 0
    want_A = slope(lambda A: np.sum(case.G * _delta(A, case.B, case.scaling)[0]), 0 * case.A)
    want_B = slope(lambda B: np.sum(case.G * _delta(case.A, B, case.scaling)[0]), 0 * case.B)
    size_A, size_B = _gradient_sizes(case)
    assert_close(grad_A, want_A, size=size_A, what="grad_A")
    assert_close(grad_B, want_B, size=size_B, what="grad_B")


@law(
    "block_lora.L5b",
    says="All blocks have the same gradient, whatever they are.",
    formula=r"\nabla_{B_1} L = \dots = \nabla_{B_b} L",
    needs=("gradients",),
    tolerance=4,
    cases=layers(blocks=(2, 3, 4)),
)
def test_blocks_move_alike(impl, case):
    grad_B = impl.gradients(G=case.G, A=case.A, B=case.B, scaling=case.scaling).grad_B
    assert_close(grad_B[1:], np.stack([grad_B[0]] * (case.blocks - 1)), size=_gradient_sizes(case)[1][1:], what="grad_B beside block 0's")


@law(
    "block_lora.L6",
    says="A's gradient is the sum of those of the tied copies in the LoRA of nominal rank; a block's is its columns of that LoRA's.",
    formula=r"\nabla_{A_s} = \sum_i \nabla_{A_i}, \quad \nabla_{B_i} = (\nabla_B)_{:,\,(i-1) r/b + 1 : i r/b}",
    needs=("gradients",),
    tolerance=8,
    cases=layers(),
)
def test_tied_chain_rule(impl, case):
    grad_A, grad_B = impl.gradients(G=case.G, A=case.A, B=case.B, scaling=case.scaling)
    stacked, wide = np.concatenate([case.A] * case.blocks), np.concatenate(list(case.B), axis=1)
    # LoRA's gradients with every factor free, then the copies of A tied
    untied_A, untied_B = case.scaling * wide.T @ case.G, case.scaling * case.G @ stacked.T
    size_A, size_B = _gradient_sizes(case)
    assert_close(grad_A, sum(np.split(untied_A, case.blocks)), size=size_A, what="grad_A")
    assert_close(grad_B, np.stack(np.split(untied_B, case.blocks, axis=1)), size=size_B, what="grad_B")


# The whole training


class Training(NamedTuple):
    """A regression, a start and an optimizer's settings."""

    X: np.ndarray  # (samples, in)
    Y: np.ndarray  # (samples, out)
    W0: np.ndarray
    A: np.ndarray  # (block_rank, in)
    B: np.ndarray  # (blocks, out, block_rank): zero, or any
    scaling: float
    lr: float
    weight_decay: float
    adam_eps: float
    blocks: int


STEPS = 15


@st.composite
def trainings(draw: st.DrawFn, any_start: bool = True) -> Training:
    """Blocks of zeros, or, with `any_start`, in half of the cases blocks that differ from each other."""
    blocks, short = draw(st.sampled_from([2, 3, 5, 8])), draw(st.integers(1, 2))
    m, n = draw(sides(short, 4)), draw(sides(short, 4))
    matrices = Matrices(draw(seeds()))
    from_zero = draw(st.booleans()) or not any_start
    X = matrices.orthonormal(n + 2, n) * np.sqrt(n + 2)  # X'X is samples times one: gradient descent's steps are known to converge
    return Training(
        X=X,
        Y=matrices(n + 2, m),
        W0=matrices(m, n) / 2,
        A=matrices.orthonormal(n, short).T,
        B=np.zeros((blocks, m, short)) if from_zero else 0.25 * matrices(blocks, m, short),
        scaling=draw(st.sampled_from([1.5, 0.75, 1.25])),
        lr=draw(st.sampled_from([0.125, 0.0625])) / blocks,  # B's part moves b times as fast
        weight_decay=draw(st.sampled_from([0.5, 0.25])),
        adam_eps=draw(st.sampled_from([0.25, 0.125])),
        blocks=blocks,
    )


def _stepping(kind, lr, case, weight_decay):
    """A function of a parameter and its gradient that makes the steps of an optimizer, one after the other."""
    state = {"t": 0, "m": 0.0, "v": 0.0}

    def step(parameter, gradient):
        if kind in ("sgd", "momentum"):
            gradient = gradient + weight_decay * parameter  # where torch's SGD has its decay
            state["m"] = gradient + (0.75 if kind == "momentum" else 0.0) * state["m"]
            return parameter - lr * state["m"]
        state["t"] += 1
        if kind == "adam_l2":
            gradient = gradient + weight_decay * parameter
        state["m"] = 0.75 * state["m"] + 0.25 * gradient
        state["v"] = 0.875 * state["v"] + 0.125 * gradient**2
        m, v = state["m"] / (1 - 0.75 ** state["t"]), state["v"] / (1 - 0.875 ** state["t"])
        decayed = (1 - lr * weight_decay) * parameter if kind == "adamw" else parameter
        return decayed - lr * m / (np.sqrt(v) + case.adam_eps)

    return step


def _train(case, kind, A, B, gradients, lrs, decays):
    """All updates Delta W of a training, and the last factors; B is summed over its blocks if it has some."""
    problem, visited = LinearRegression(case.X, case.Y), []
    step_A, step_B = (_stepping(kind, lr, case, decay) for lr, decay in zip(lrs, decays, strict=True))
    for _ in range(STEPS):
        up = B.sum(axis=0) if B.ndim == 3 else B
        visited.append(case.scaling * up @ A)
        grad_A, grad_B = gradients(problem.grad(case.W0 + visited[-1]), A, B)
        A, B = step_A(A, grad_A), step_B(B, grad_B)
    up = B.sum(axis=0) if B.ndim == 3 else B
    return np.array([*visited, case.scaling * up @ A]), B


def _small_lora(case, kind, lrs, decays):
    """The training of plain LoRA with the rank of one block from the sum of the blocks, its gradients written out."""
    s = case.scaling
    return _train(case, kind, case.A, sum(case.B), lambda G, A, B: (s * B.T @ G, s * G @ A.T), lrs, decays)[0]


def _block_lora(impl, case, kind, weight_decay):
    """The training of Block-LoRA with the implementation's gradients, and its last blocks."""

    def gradients(G, A, B):
        return impl.gradients(G=G, A=A, B=B, scaling=case.scaling)

    return _train(case, kind, case.A, case.B, gradients, (case.lr,) * 2, (weight_decay,) * 2)


def _check_training(impl, case, kind, decay=False):
    weight_decay = case.weight_decay if decay else 0.0
    got, _ = _block_lora(impl, case, kind, weight_decay)
    want = _small_lora(case, kind, (case.lr, case.blocks * case.lr), (weight_decay, weight_decay / case.blocks))
    # Entries of all updates are of this size; errors of earlier steps are carried along
    assert_close(got, want, size=1 + np.abs(want).max(), conditioning=STEPS, what="Delta W at all steps")


_TRAINING = r"\Delta W_t^{\text{Block}(r, b, \eta)} = \Delta W_t^{\text{LoRA}(r/b,\; \eta_A = \eta,\; \eta_B = b \eta)} \text{ for all } t"


@law(
    "block_lora.L7a",
    says="Under gradient descent every step of the training is LoRA's of rank r / b with b times the learning rate of B, from any start.",
    formula=_TRAINING,
    needs=("gradients",),
    tolerance=1,
    cases=trainings(),
)
def test_training_with_sgd(impl, case):
    _check_training(impl, case, "sgd")


@law(
    "block_lora.L7b",
    says="Under gradient descent with momentum too.",
    formula=_TRAINING,
    needs=("gradients",),
    tolerance=1,
    cases=trainings(),
)
def test_training_with_momentum(impl, case):
    _check_training(impl, case, "momentum")


@law(
    "block_lora.L7c",
    says="Under Adam too.",
    formula=_TRAINING,
    needs=("gradients",),
    tolerance=4,
    cases=trainings(),
)
def test_training_with_adam(impl, case):
    _check_training(impl, case, "adam")


@law(
    "block_lora.L7d",
    says="Under AdamW too, with the decay of B divided by b.",
    formula=r"\lambda_A = \lambda, \quad \lambda_B = \lambda / b, \quad \eta_A = \eta, \quad \eta_B = b \eta",
    needs=("gradients",),
    tolerance=4,
    cases=trainings(),
)
def test_training_with_adamw(impl, case):
    _check_training(impl, case, "adamw", decay=True)


@law(
    "block_lora.L7e",
    says="Blocks that start equal stay equal; blocks that do not keep their differences, which AdamW's decay alone shrinks.",
    formula=r"(B_i - B_j)_t = (1 - \eta\lambda)^t\, (B_i - B_j)_0",
    needs=("gradients",),
    tolerance=1,
    cases=trainings(),
)
def test_differences_of_blocks(impl, case):
    _, B = _block_lora(impl, case, "adamw", case.weight_decay)
    kept = (1 - case.lr * case.weight_decay) ** STEPS
    want = kept * (case.B - case.B[:1])
    assert_close(B - B[:1], want, size=np.abs(case.B).max() + STEPS * case.lr, conditioning=STEPS, what="B minus its first block")


@law(
    "block_lora.L7f",
    says="With the compact settings LoRA of rank r / b trains as Block-LoRA does, with SGD and AdamW; without decay unless asked for.",
    formula=r"(\eta, \lambda) \mapsto (\eta_A, \eta_B, \lambda_A, \lambda_B) = (\eta, b\eta, \lambda, \lambda / b)",
    needs=("compact_settings.weight_decay",),
    tolerance=1,
    cases=trainings(),
)
def test_compact_settings(impl, case):
    s, decay = case.scaling, case.weight_decay

    def tied(G, A, B):  # slopes by the LoRA of nominal rank
        grad_A, grad_B = s * np.concatenate(list(B), axis=1).T @ G, s * G @ np.concatenate([A] * len(B)).T
        return sum(np.split(grad_A, len(B))), np.stack(np.split(grad_B, len(B), axis=1))

    for kind, used in (("sgd", decay), ("adamw", decay), ("adamw", 0.0)):
        options = {"weight_decay": used} if used else {}
        found = impl.compact_settings(lr=case.lr, blocks=case.blocks, **options)
        lrs, decays = (found.lr_A, found.lr_B), (found.weight_decay_A, found.weight_decay_B)
        want, _ = _train(case, kind, case.A, case.B, tied, (case.lr,) * 2, (used,) * 2)
        got = _small_lora(case, kind, lrs, decays)
        assert_close(got, want, size=1 + np.abs(want).max(), conditioning=STEPS, what=f"Delta W at all steps of {kind}")


# Structure


@law(
    "block_lora.L8",
    says="The rank of the update is that of one block, r / b, and no more.",
    formula=r"\operatorname{rank} \Delta W = r/b",
    needs=("delta_weight",),
    tolerance=16,
    cases=layers(beyond=1, blocks=(2, 3, 4)),
)
def test_rank(impl, case):
    values = np.linalg.svd(impl.delta_weight(A=case.A, B=case.B, scaling=case.scaling), compute_uv=False)
    size = np.full_like(values, case.scaling * np.linalg.norm(case.A) * np.sum(np.linalg.norm(case.B, axis=(1, 2))))
    # The singular values of a product of thin factors are those of the product of their triangular parts
    core = np.linalg.qr(sum(case.B))[1] @ np.linalg.qr(case.A.T)[1].T
    want = np.zeros_like(values)
    want[: case.block_rank] = case.scaling * np.linalg.svd(core, compute_uv=False)
    assert_close(values, want, size=size, what="singular values of Delta W")


class Target(NamedTuple):
    """An update to approximate."""

    D: np.ndarray  # (out, in)
    rank: int
    blocks: int
    scaling: float
    seed: int


@st.composite
def targets(draw: st.DrawFn) -> Target:
    start = draw(starts())
    D = Matrices(start.seed + 1, draw(entries())).separated(*start.W0.shape)
    return Target(D, start.rank, start.blocks, start.scaling, start.seed)


@law(
    "block_lora.L9a",
    says="The best approximation leaves the tail of the target's spectrum beyond r / b, not beyond r.",
    formula=r"\min_{A_s, B_i} \|D - s \textstyle\sum_i B_i A_s\|_F^2 = \sum_{j > r/b} \sigma_j(D)^2",
    needs=("fit_delta",),
    tolerance=64,
    cases=targets(),
)
def test_best_approximation(impl, case):
    A, B = impl.fit_delta(D=case.D, scaling=case.scaling, rank=case.rank, blocks=case.blocks)
    short = case.rank // case.blocks
    assert A.shape[0] == short, f"A has {A.shape[0]} rows, expected {short}"
    assert B.shape[0] == case.blocks, f"there are {B.shape[0]} blocks, expected {case.blocks}"
    U, values, Vt = np.linalg.svd(case.D)
    got = _delta(A, B, case.scaling)[0]
    assert_close(got, U[:, :short] * values[:short] @ Vt[:short], size=values[0], conditioning=len(values), what="Delta W")
    assert_close(np.sum((case.D - got) ** 2), np.sum(values[short:] ** 2), size=np.sum(values**2), what="squared distance to the target")


@law(
    "block_lora.L9b",
    says="Of all best approximations it has orthonormal rows of A, and blocks that are equal: the smallest that have this sum.",
    formula=r"A_s A_s^\top = I, \quad B_1 = \dots = B_b",
    needs=("fit_delta",),
    tolerance=32,
    cases=targets(),
)
def test_smallest_blocks(impl, case):
    A, B = impl.fit_delta(D=case.D, scaling=case.scaling, rank=case.rank, blocks=case.blocks)
    assert_close(A @ A.T, np.eye(len(A)), what="A A'")
    largest = np.linalg.norm(case.D, 2) / case.scaling
    # Any blocks with this sum have a squared norm of at least |sum|^2 / b
    assert_close(np.sum(B**2), np.sum(B.sum(axis=0) ** 2) / len(B), size=largest**2, what="squared norm of B")
    assert_close(B, np.broadcast_to(B.mean(axis=0), B.shape), size=largest, what="B beside the mean of its blocks")


@law(
    "block_lora.L9c",
    says="Without a scaling the approximation is for s = 1.",
    formula=r"s = 1",
    needs=("fit_delta",),
    tolerance=64,
    cases=targets(),
)
def test_scaling_of_the_fit(impl, case):
    A, B = impl.fit_delta(D=case.D, rank=case.rank, blocks=case.blocks)
    U, values, Vt = np.linalg.svd(case.D)
    short = case.rank // case.blocks
    want = U[:, :short] * values[:short] @ Vt[:short]
    assert_close(_delta(A, B, 1.0)[0], want, size=values[0], conditioning=len(values), what="Delta W")


@law(
    "block_lora.L10",
    says="What is added to one block and taken from another changes nothing: only the sum of the blocks is seen.",
    formula=r"\sum_i C_i = 0 \;\Rightarrow\; \Delta W(B + C) = \Delta W(B), \quad y(B + C) = y(B)",
    needs=("delta_weight", "forward.order"),
    tolerance=8,
    cases=layers(blocks=(2, 3, 4)),
)
def test_gauge(impl, case):
    size = _delta(case.A, np.abs(case.B) + np.abs(case.C), case.scaling)[1]
    want, got = (impl.delta_weight(A=case.A, B=B, scaling=case.scaling) for B in (case.B, case.B + case.C))
    assert_close(got, want, size=size, what="Delta W of other blocks with the same sum")
    for order in ORDERS:
        y = [impl.forward(x=case.x, W0=case.W0, A=case.A, B=B, scaling=case.scaling, order=order) for B in (case.B, case.B + case.C)]
        scale = np.abs(case.x) @ (np.abs(case.W0) + size).T
        assert_close(y[1], y[0], size=scale, what=f"y of other blocks with the same sum, {order}")


# Counting


@law(
    "block_lora.L11a",
    says="The number of trainable parameters is that of the entries of A and of all blocks; with one block it is LoRA's.",
    formula=r"P = m r + n\,r/b",
    needs=("num_trainable",),
    tolerance=0,
    cases=starts(),
)
def test_parameter_count(impl, case):
    (m, n), short = case.W0.shape, case.rank // case.blocks
    entries_of = sum(1 for _ in np.ndindex(short, n)) + sum(1 for _ in np.ndindex(case.blocks, m, short))
    assert_close(impl.num_trainable(W0=case.W0, rank=case.rank, blocks=case.blocks), entries_of, size=0, what="the number of parameters")
    assert_close(impl.num_trainable(W0=case.W0, rank=case.rank, blocks=1), case.rank * (m + n), size=0, what="the number for one block")


class Work(NamedTuple):
    """A batch that passes an adapter."""

    W0: np.ndarray
    rank: int
    blocks: int
    tokens: int
    seed: int


@st.composite
def works(draw: st.DrawFn) -> Work:
    start = draw(starts())
    return Work(start.W0, start.rank, start.blocks, draw(st.integers(1, 4)), start.seed)


class _Number:
    """A number that counts what is done with it."""

    def __init__(self, value, counts):
        self.value, self.counts = value, counts

    def __mul__(self, other):
        self.counts["multiplications"] += 1
        return _Number(self.value * other.value, self.counts)

    def __add__(self, other):
        self.counts["additions"] += 1
        return _Number(self.value + other.value, self.counts)


def _counted(W0, order, *, rank, blocks, tokens, seed):
    """The adapter's path done number by number: how many multiplications and additions that took."""
    counts, matrices = {"multiplications": 0, "additions": 0}, Matrices(seed)
    (m, n), short = W0.shape, rank // blocks
    x, A, B = matrices(tokens, n), matrices(short, n), matrices(blocks, m, short)

    def numbers(array):
        return [numbers(part) if array.ndim > 1 else _Number(part, counts) for part in array]

    def total(terms):
        first, *rest = terms
        for term in rest:
            first = first + term
        return first

    def times(matrix, vector):
        return [total([a * v for a, v in zip(row, vector, strict=True)]) for row in matrix]

    hidden = [times(numbers(A), row) for row in numbers(x)]
    ups = numbers(B)
    if order == "add_first":
        up = [[total([block[o][k] for block in ups]) for k in range(short)] for o in range(m)]
        y = [times(up, z) for z in hidden]
    else:
        y = [[total(column) for column in zip(*(times(block, z) for block in ups), strict=True)] for z in hidden]
    found = np.array([[number.value for number in row] for row in y])
    assert np.allclose(found, x @ _delta(A, B, 1.0)[0].T), "what was counted is not the adapter"
    return counts


@law(
    "block_lora.L11b",
    says="The counts of multiplications and additions are those of the adapter done number by number; with one block, LoRA's.",
    formula=r"N \tfrac rb (n + m), \quad N \tfrac rb (n - 1) + N m (\tfrac rb - 1) + (b - 1) m \tfrac rb",
    needs=("mult_adds.order",),
    tolerance=0,
    cases=works(),
)
def test_operations(impl, case):
    for blocks, order in itertools.product((case.blocks, 1), ORDERS):
        got = impl.mult_adds(W0=case.W0, rank=case.rank, blocks=blocks, tokens=case.tokens, order=order)
        want = _counted(case.W0, order, rank=case.rank, blocks=blocks, tokens=case.tokens, seed=case.seed)
        assert_close(got.multiplications, want["multiplications"], size=0, what=f"multiplications, {order}, {blocks} blocks")
        assert_close(got.additions, want["additions"], size=0, what=f"additions, {order}, {blocks} blocks")


@law(
    "block_lora.L11c",
    says="Unless told otherwise the blocks are added first: N r / b (n + m) multiplications, as for LoRA of rank r / b.",
    formula=r"N \tfrac rb (n + m)",
    needs=("mult_adds",),
    tolerance=0,
    cases=works(),
)
def test_operations_by_default(impl, case):
    got = impl.mult_adds(W0=case.W0, rank=case.rank, blocks=case.blocks, tokens=case.tokens)
    short = case.rank // case.blocks
    # LoRA of rank r / b, one product after the other
    small = _counted(case.W0, "blockwise", rank=short, blocks=1, tokens=case.tokens, seed=case.seed)
    assert_close(got.multiplications, small["multiplications"], size=0, what="multiplications")
    extra = sum(1 for _ in np.ndindex(case.blocks - 1, len(case.W0), short))  # one sum of matrices, for all rows of x together
    assert_close(got.additions, small["additions"] + extra, size=0, what="additions")


class Bounded(NamedTuple):
    """A set of adapted weights, and what the bound knows of the training."""

    shapes: np.ndarray  # (weights, 2), whole numbers
    rank: int
    blocks: int
    bits: float
    num_samples: int
    loss_sigma: float


@st.composite
def bounded(draw: st.DrawFn, blocks: tuple[int, ...] = (2, 3, 1, 8)) -> Bounded:
    count = draw(st.sampled_from(blocks))
    return Bounded(
        shapes=np.array(draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=3))),
        rank=count * draw(st.integers(1, 3)),
        blocks=count,
        bits=draw(st.sampled_from([16.0, 32.0, 3.5])),
        num_samples=draw(st.sampled_from([10, 1000, 7])),
        loss_sigma=draw(st.sampled_from([0.5, 2.0])),
    )


def _bounded(case):
    """The arguments of the bound."""
    sizes = {"shapes": case.shapes, "rank": case.rank, "blocks": case.blocks}
    return {**sizes, "bits": case.bits, "num_samples": case.num_samples, "loss_sigma": case.loss_sigma}


def _bound(case):
    """By the information in all stored bits: each is worth ln 2 nats, and the gap is at most sigma sqrt(2 nats / S)."""
    stored = sum(np.zeros((case.rank, m)).size + np.zeros((case.rank // case.blocks, n)).size for m, n in case.shapes)
    nats = -case.bits * stored * np.log(0.5)
    return case.loss_sigma * np.exp(0.5 * (np.log(2 * nats) - np.log(case.num_samples)))


@law(
    "block_lora.L12a",
    says="The bound on the generalization gap is that of a message of as many bits as are stored.",
    formula=r"|\mathrm{gen}| \le \sqrt{\tfrac{2\sigma^2 \ln 2}{S}\, q\, r \textstyle\sum_i (m_i + n_i / b)}",
    needs=("generalization_bound",),
    tolerance=32,
    cases=bounded(),
)
def test_bound(impl, case):
    got = impl.generalization_bound(**_bounded(case))
    assert_close(got, _bound(case), size=_bound(case), what="the bound")


@law(
    "block_lora.L12b",
    says="The bound is LoRA's times the root of the share of parameters that is stored; and falls with the root of the samples.",
    formula=r"\frac{\beta_b^2}{\beta_1^2} = \frac{\sum_i (m_i + n_i / b)}{\sum_i (m_i + n_i)} < 1, \quad \propto S^{-1/2}",
    needs=("generalization_bound",),
    tolerance=32,
    cases=bounded(blocks=(2, 3, 8)),
)
def test_ratio_of_bounds(impl, case):
    options = _bounded(case)
    got, plain = impl.generalization_bound(**options), impl.generalization_bound(**{**options, "blocks": 1})
    share = sum(m + n / case.blocks for m, n in case.shapes) / sum(m + n for m, n in case.shapes)
    assert_close(got**2, share * plain**2, size=plain**2, what="square of the bound")
    assert got < plain, "the bound is not smaller than LoRA's"
    more = impl.generalization_bound(**{**options, "num_samples": 9 * case.num_samples})
    assert_close(3 * more, got, size=got, what="three times the bound for nine times the samples")


@law(
    "block_lora.L13",
    says="With one block the layer and its gradients are LoRA's.",
    formula=r"b = 1: \quad y = W_0 x + s B_1 A_s x, \quad g_A = s B_1^\top G, \quad g_B = s G A_s^\top",
    needs=("forward.order", "gradients"),
    tolerance=8,
    cases=layers(blocks=(1,)),
)
def test_one_block_is_lora(impl, case):
    s, A, B = case.scaling, case.A, case.B[0]
    size = np.abs(case.x) @ (np.abs(case.W0) + s * np.abs(B) @ np.abs(A)).T
    for order in ORDERS:
        y = impl.forward(x=case.x, W0=case.W0, A=A, B=case.B, scaling=s, order=order)
        assert_close(y, case.x @ case.W0.T + s * (case.x @ A.T) @ B.T, size=size, what=f"y, {order}")
    grad_A, grad_B = impl.gradients(G=case.G, A=A, B=case.B, scaling=s)
    size_A, size_B = _gradient_sizes(case)
    assert_close(grad_A, s * B.T @ case.G, size=size_A, what="grad_A")
    assert_close(grad_B[0], s * case.G @ A.T, size=size_B[0], what="grad_B")


class Example(NamedTuple):
    """The worked example, each factor times a power of two."""

    power: int


@law(
    "block_lora.L14",
    says="The worked example of the tutorial comes out to the last bit.",
    formula=r"A_s = (1, 2),\ B_1 = (1, 0)^\top,\ B_2 = (1, 1)^\top,\ s = \tfrac12: \ \Delta W = (1, \tfrac12)^\top (1, 2)",
    needs=("delta_weight",),
    tolerance=0,
    cases=st.builds(Example, power=st.integers(0, 7)),
)
def test_worked_example(impl, case):
    A, B = 2.0**case.power * np.array([[1.0, 2.0]]), np.array([[[1.0], [0.0]], [[1.0], [1.0]]])
    got = impl.delta_weight(A=A, B=B, scaling=0.5)
    assert_close(got, 2.0**case.power * np.array([[1.0, 2.0], [0.5, 1.0]]), size=0, what="Delta W")


class ScalingCase(NamedTuple):
    """An alpha, a nominal rank and how it is cut."""

    alpha: float
    rank: int
    blocks: int


@st.composite
def scaling_cases(draw: st.DrawFn) -> ScalingCase:
    blocks = draw(st.integers(2, 8))
    return ScalingCase(draw(st.sampled_from([1.0, 8.0, 16.0, 0.3])), blocks * draw(st.integers(2, 32)), blocks)


@law(
    "block_lora.L15a",
    says="The scaling is alpha over the nominal rank.",
    formula=r"s = \alpha / r",
    needs=("scaling_factor",),
    tolerance=4,
    cases=scaling_cases(),
)
def test_scaling(impl, case):
    got = impl.scaling_factor(alpha=case.alpha, rank=case.rank, blocks=case.blocks)
    assert_close(got * case.rank, case.alpha, size=case.alpha, what="s times the rank")


@law(
    "block_lora.L15b",
    says="CLIP-LoRA's scaling is alpha over the root of the rank.",
    formula=r"s = \alpha / \sqrt r",
    needs=("scaling_factor.rslora",),
    tolerance=8,
    cases=scaling_cases(),
)
def test_rslora_scaling(impl, case):
    got = impl.scaling_factor(alpha=case.alpha, rank=case.rank, blocks=case.blocks, rslora=True)
    assert_close(got**2 * case.rank, case.alpha**2, size=case.alpha**2, what="squared s times the rank")


@law(
    "block_lora.L15c",
    says="Per block both scalings have the rank of one block in the place of the nominal one.",
    formula=r"s = \alpha b / r, \quad s_{rs} = \alpha \sqrt{b / r}",
    needs=("scaling_factor.per_block", "scaling_factor.rslora"),
    tolerance=8,
    cases=scaling_cases(),
)
def test_scaling_per_block(impl, case):
    options = {"alpha": case.alpha, "rank": case.rank, "blocks": case.blocks, "per_block": True}
    short = case.rank / case.blocks
    assert_close(impl.scaling_factor(**options) * short, case.alpha, size=case.alpha, what="s times the rank of a block")
    got = impl.scaling_factor(**options, rslora=True) ** 2 * short
    assert_close(got, case.alpha**2, size=case.alpha**2, what="squared s times the rank of a block")


# The other reading: blocks along the features


class Features(NamedTuple):
    """Factors whose blocks are cut along the features."""

    x: np.ndarray  # (in,)
    A: np.ndarray  # (rank, in_block)
    B: np.ndarray  # (blocks, out_block, rank)
    scaling: float


@st.composite
def features(draw: st.DrawFn) -> Features:
    blocks, rank = draw(st.sampled_from([2, 3, 1])), draw(st.integers(1, 3))
    out_block, in_block = draw(sides(1, 3)), draw(sides(1, 3))
    matrices = Matrices(draw(seeds()), draw(entries()))
    A, B = matrices(rank, in_block), matrices(blocks, out_block, rank)
    return Features(matrices(blocks * in_block), A, B, draw(scalings()))


@law(
    "block_lora.L16a",
    says="With blocks along the features each block of outputs sees, through the shared A, the sum of the pieces of the input.",
    formula=r"(\Delta W x)_i = s\, B_i A_s \sum_j x_j",
    needs=("delta_weight_features",),
    tolerance=8,
    cases=features(),
)
def test_features(impl, case):
    delta = impl.delta_weight_features(A=case.A, B=case.B, scaling=case.scaling)
    pieces = np.split(case.x, len(case.B))
    want = np.concatenate([case.scaling * B_i @ (case.A @ sum(pieces)) for B_i in case.B])
    sizes = [case.scaling * np.abs(B_i) @ np.abs(case.A) @ sum(np.abs(pieces)) for B_i in case.B]
    assert_close(delta @ case.x, want, size=np.concatenate(sizes), what="Delta W x")


@law(
    "block_lora.L16b",
    says="So the update repeats itself along the input, and its block row i is that block's product with A.",
    formula=r"\Delta W = s \begin{bmatrix} B_1 A_s & \cdots & B_1 A_s \\ \vdots & & \vdots \\ B_b A_s & \cdots & B_b A_s \end{bmatrix}",
    needs=("delta_weight_features",),
    tolerance=8,
    cases=features(),
)
def test_features_repeat(impl, case):
    delta = impl.delta_weight_features(A=case.A, B=case.B, scaling=case.scaling)
    rows = [[_delta(case.A, B_i[None], case.scaling) for _ in case.B] for B_i in case.B]
    want, size = (np.block([[cell[part] for cell in row] for row in rows]) for part in (0, 1))
    assert_close(delta, want, size=size, what="Delta W")


# Theorem checks: the mathematics itself


@theorem(
    "block_lora.T1",
    says="No other factors come nearer to a target than the tail of its spectrum beyond r / b, whatever the blocks.",
    formula=r"\|D - s \textstyle\sum_i B_i A_s\|_F^2 \ge \sum_{j > r/b} \sigma_j(D)^2",
    tolerance=64,
    cases=targets(),
)
def test_nothing_is_nearer(case):
    (m, n), short, matrices = case.D.shape, case.rank // case.blocks, Matrices(case.seed + 2)
    U, values, Vt = np.linalg.svd(case.D)
    tail = np.sum(values[short:] ** 2)
    for width in (0.0, 1e-2, 0.3, 10.0):
        A, B = matrices(short, n), matrices(case.blocks, m, short)
        A = Vt[:short] + width * A
        B = U[:, :short] * values[:short] / case.scaling / case.blocks + width * B
        excess = np.sum((case.D - _delta(A, B, case.scaling)[0]) ** 2) - tail
        if width == 0:
            assert_close(excess, 0.0, size=np.sum(values**2), what="how much farther the singular vectors are")
        assert_close(min(excess, 0.0), 0.0, size=np.sum(values**2), what="how much nearer other factors are")


@theorem(
    "block_lora.T2",
    says="The share of LoRA's parameters that is stored is (1 + 1/b) / 2 for a square weight: never below one half.",
    formula=r"\frac{m r + n r / b}{(m + n) r} = \tfrac12 (1 + \tfrac1b) > \tfrac12 \quad (m = n)",
    tolerance=8,
    cases=st.builds(ScalingCase, alpha=st.just(1.0), rank=st.just(840), blocks=st.integers(1, 8)),
)
def test_share_of_parameters(case):
    side = 17
    stored, plain = side * case.rank + side * case.rank // case.blocks, 2 * side * case.rank
    assert 2 * stored > plain
    assert_close(stored / plain, (1 + 1 / case.blocks) / 2, what="share of LoRA's parameters")


class Reading(NamedTuple):
    """Both readings of the block structure at the same sizes."""

    blocks: int
    seed: int


@theorem(
    "block_lora.T3",
    says="Both readings of the block structure store the same number of parameters; they differ in the rank that they reach.",
    formula=r"m r + n\,r/b: \quad \operatorname{rank} \Delta W \le r/b \text{ or } \le r",
    tolerance=64,
    cases=st.builds(Reading, blocks=st.integers(2, 3), seed=seeds()),
)
def test_both_readings_store_alike(case):
    blocks, short, side = case.blocks, 2, 12
    rank, matrices = blocks * short, Matrices(case.seed)
    A, B = matrices(short, side), matrices(blocks, side, short)
    A_f, B_f = matrices(rank, side // blocks), matrices(blocks, side // blocks, rank)
    assert A.size + B.size == A_f.size + B_f.size == side * rank + side * short
    along_rank, along_features = B.sum(axis=0) @ A, np.tile(np.concatenate(list(B_f)) @ A_f, (1, blocks))
    for delta, reached in ((along_rank, short), (along_features, min(rank, side // blocks))):
        values = np.linalg.svd(delta, compute_uv=False)
        assert values[reached - 1] > 1e-9 * values[0]
        assert_close(values[reached:], 0 * values[reached:], size=values[0], what="singular values beyond the rank")


@theorem(
    "block_lora.T4",
    says="Clipping by the norm of all gradients breaks the equivalence, unless LoRA's norm counts the gradient of B b times.",
    formula=r"\|g_A\|^2 + \textstyle\sum_i \|g_{B_i}\|^2 = \|g_A\|^2 + b\,\|g_{\bar B}\|^2",
    tolerance=16,
    cases=trainings(),
)
def test_clipping(case):
    s, limit = case.scaling, 0.5

    def clipped(weight):
        def gradients(G, A, B):
            grad_A, grad_B = s * (B.sum(axis=0) if B.ndim == 3 else B).T @ G, s * G @ A.T
            if B.ndim == 3:
                grad_B = np.stack([grad_B] * len(B))
            norm = np.sqrt(np.sum(grad_A**2) + weight * np.sum(grad_B**2))
            return limit / norm * grad_A, limit / norm * grad_B

        return gradients

    rates = (case.lr, case.blocks * case.lr)
    want, _ = _train(case, "sgd", case.A, case.B, clipped(1), (case.lr,) * 2, (0, 0))
    got, _ = _train(case, "sgd", case.A, sum(case.B), clipped(case.blocks), rates, (0, 0))
    naive, _ = _train(case, "sgd", case.A, sum(case.B), clipped(1), rates, (0, 0))
    assert_close(got, want, size=1 + np.abs(want).max(), conditioning=STEPS, what="Delta W at all steps")
    assert np.abs(naive - want).max() > 1e-4 * np.abs(want).max(), "clipping each by its own norm makes no difference"


@theorem(
    "block_lora.T5",
    says="Adam with the decay inside the gradient is LoRA's of rank r / b too if all blocks start equal.",
    formula=r"g_i = \nabla_{B_i} L + \lambda B_i = \nabla_{\bar B} L + \tfrac{\lambda}{b} \bar B",
    tolerance=4,
    cases=trainings(any_start=False),
)
def test_adam_with_l2(case):
    s, decay = case.scaling, case.weight_decay

    def gradients(G, A, B):
        return s * B.sum(axis=0).T @ G, np.stack([s * G @ A.T] * len(B))

    want, _ = _train(case, "adam_l2", case.A, case.B, gradients, (case.lr,) * 2, (decay,) * 2)
    got = _small_lora(case, "adam_l2", (case.lr, case.blocks * case.lr), (decay, decay / case.blocks))
    assert_close(got, want, size=1 + np.abs(want).max(), conditioning=STEPS, what="Delta W at all steps")
