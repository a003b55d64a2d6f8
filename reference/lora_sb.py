r"""LoRA-SB: train an r x r matrix between two frozen factors that hold the first step of full fine-tuning.

Ponkshe et al. give the step of R that moves W nearest to the full gradient: a closed form, the same move for every scaling,
and plain back-propagation if A and B are orthonormal and s = 1. Their start makes them so: the rank-`rank` SVD of the first
full fine-tuning update. Only R is trained, rank^2 numbers. W0 is not corrected: training starts one step ahead.

| here             | paper            | shape       | meaning                                            |
|------------------|------------------|-------------|----------------------------------------------------|
| `W0`             | W_0              | (out, in)   | pretrained weight, frozen as it is                 |
| `A`, `B`         | A, B             | (rank, in), (out, rank) | frozen factors                         |
| `R`              | R                | (rank, rank) | the trained matrix                                |
| `scaling`        | s                | number      | multiplies B R A; 1 here and in the official code  |
| `G`              | gradient of W    | (out, in)   | dL/dW                                              |
| `grad_R`         | g^R              | (rank, rank) | dL/dR, or any other step direction of R           |
| `update`         | Delta W_avg      | (out, in)   | first update of full fine-tuning, minus sign included |

Where paper and code differ (`RaghavSinghal10/lora-sb`), and what is left open:

- The official code decomposes by subspace iteration from exactly `rank` random vectors; here the SVD is exact unless a
  `sketch` is given. A sign matrix has a flat spectrum: the spaces of the two can differ a lot while the residuals nearly agree.
- The paper sums the gradient over samples, here it is the mean. AdamW's first update does not notice, gradient descent's does.
- The learning rate inside the start only sets the size of R. The code takes the first value of the warm-up, of a loader with
  another batch size; here it is an argument.
- `optimal_gradient` is not in the code, which needs it nowhere: A and B are orthonormal and s = 1.
- Freedom from s holds for gradient descent with the optimal gradient. AdamW undoes the factor 1 / s^2: there s acts as a
  factor of the learning rate. Hence the default s = 1.
- LoRA-XS, the baseline with the same layer, takes A and B from the SVD of W0, with a small random R (`init_xs`).
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ._checks import check_choice, check_finite, check_positive, check_rank, check_shapes
from ._linalg import randomised_svd, working
from ._paper import Paper

PAPER = Paper(
    slug="lora_sb",
    name="LoRA-SB",
    title="LoRA-SB: Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
    authors=("Kaustubh Ponkshe", "Raghav Singhal", "Eduard Gorbunov", "Alexey Tumanov", "Samuel Horvath", "Praneeth Vepakomma"),
    venue="arXiv",
    year=2024,
    arxiv="2411.19557",
    official_code="RaghavSinghal10/lora-sb",
    family="initialisation",
    bibtex_key="ponkshe2024lorasb",
)

OPTIMIZERS = ("adamw", "sgd")
GRADIENTS = ("optimal", "plain")

Batch = TypeVar("Batch")


class Factors(NamedTuple):
    """The three factors of the update, from the input side to the output side; only R is trained."""

    A: Float[Tensor, "rank in"]
    R: Float[Tensor, "rank rank"]
    B: Float[Tensor, "out rank"]


class Weights(NamedTuple):
    """All weights of one layer."""

    W0: Float[Tensor, "out in"]
    A: Float[Tensor, "rank in"]
    R: Float[Tensor, "rank rank"]
    B: Float[Tensor, "out rank"]


def first_step_update(G: Float[Tensor, "out in"], *, lr: float, optimizer: str = "adamw", adam_eps: float = 0.0) -> Float[Tensor, "out in"]:
    """What the first step of full fine-tuning adds to the weight (out, in), for the gradient `G` of its loss.

    `optimizer` is "adamw" (default: -lr G / (|G| + adam_eps), which is -lr sign(G) for the default `adam_eps` of 0; entries
    where G is 0 stay 0) or "sgd" (-lr G). Without weight decay, as in the official scripts. Source: the paper's section on
    the start, official `gradient_utils.py`.

    Raises:
        ValueError: G is zero or has an entry that is NaN or infinite, the optimizer is unknown, `lr` is not positive or
            `adam_eps` is negative.
    """
    check_shapes(G=(G, "out in"))
    check_choice("optimizer", optimizer, OPTIMIZERS)
    check_positive("lr", lr)
    if not 0 <= adam_eps < math.inf:
        raise ValueError(f"adam_eps is {adam_eps!r}; needed a finite number of at least 0")
    _check_nonzero("G", G)
    if optimizer == "sgd":
        return -lr * G
    # Step 1 of Adam has m_hat = G and v_hat = G^2, so -lr m_hat / (sqrt(v_hat) + eps); the sign is its limit for eps = 0
    return -lr * (G.sign() if adam_eps == 0 else G / (G.abs() + adam_eps))


def estimate_update(
    grad: Callable[[Tensor, Batch], Tensor],
    W0: Float[Tensor, "out in"],
    batches: Iterable[Batch],
    *,
    lr: float,
    optimizer: str = "adamw",
    adam_eps: float = 0.0,
) -> Float[Tensor, "out in"]:
    """The first update of full fine-tuning (out, in) from the mean of `grad(W0, batch)` over a few equal batches.

    `grad` gives the gradient (out, in) of a batch's mean loss. The mean is taken before the optimizer sees it, in at least
    float32; the update has the dtype of `W0`. Options as in `first_step_update`.

    Raises:
        ValueError: there is no batch, a gradient has another shape or dtype than `W0`, or the mean is zero or not finite.
    """
    check_shapes(W0=(W0, "out in"))
    total, count = torch.zeros_like(working(W0)), 0
    for batch in batches:
        gradient = grad(W0, batch)
        check_shapes(W0=(W0, "out in"), gradient=(gradient, "out in"))
        total, count = total + gradient, count + 1
    if count == 0:
        raise ValueError("batches is empty; needed at least one (a generator that was read before gives nothing)")
    return first_step_update(total / count, lr=lr, optimizer=optimizer, adam_eps=adam_eps).to(W0.dtype)


def draw_sketch(update: Float[Tensor, "out in"], *, rank: int, generator: torch.Generator | None = None) -> Float[Tensor, "in rank"]:
    """Draw the Gaussian test matrix (in, rank) of the official code's randomised SVD, without oversampling."""
    check_shapes(update=(update, "out in"))
    check_rank(rank, update)
    return torch.randn(update.shape[1], rank, generator=generator, dtype=update.dtype, device=update.device)


def init(
    update: Float[Tensor, "out in"],
    scaling: float = 1.0,
    *,
    rank: int,
    sketch: Float[Tensor, "in columns"] | None = None,
    niter: int = 10,
) -> Factors:
    """The factors at the start, A (rank, in), R (rank, rank) and B (out, rank), from the first update: s B R A is its best
    approximation of that rank.

    B and A hold the leading singular vectors, R the singular values over s on its diagonal. The SVD is exact, or with a
    `sketch` (in, columns), columns >= rank (see `draw_sketch`), randomised with `niter` iterations as in the official code.

    Raises:
        ValueError: `rank` is not in 1..min(out, in), the update is zero or not finite, `scaling` is not positive, or the
            sketch does not fit, is zero or is not finite.
    """
    check_shapes(update=(update, "out in"), sketch=(sketch, "in columns"))
    check_rank(rank, update)
    check_positive("scaling", scaling)
    _check_nonzero("update", update)
    # Section on the start: U, S, V <- SVD(Delta W_avg); B = U_1:r, R = diag(S_1:r) / s, A = V_1:r^T
    U, S, Vh = _leading_triplets(working(update), sketch, rank, niter)
    A, R, B = Vh[:rank], torch.diag(S[:rank] / scaling), U[:, :rank]
    return Factors(A=_own(A, update.dtype), R=R.to(update.dtype), B=_own(B, update.dtype))


def _leading_triplets(M: Tensor, sketch: Tensor | None, rank: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """Left singular vectors, singular values and transposed right vectors of M: exact, or by subspace iteration from `sketch`."""
    if sketch is None:
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        return U, S, Vh
    if not rank <= sketch.shape[1] <= min(M.shape) or niter < 0:
        raise ValueError(
            f"sketch has shape {tuple(sketch.shape)} and niter is {niter}; needed ({M.shape[1]}, columns) with {rank} to "
            f"{min(M.shape)} columns, and niter of at least 0: use draw_sketch"
        )
    _check_nonzero("sketch", sketch)
    return randomised_svd(M, sketch, niter=niter)


def init_weights(W0: Float[Tensor, "out in"], update: Float[Tensor, "out in"], scaling: float = 1.0, *, rank: int) -> Weights:
    """All weights at the start of training. W0 stays as it is, so the layer starts at W0 plus the best part of the update.

    Other than in LoRA-GA and PiSSA nothing is subtracted: the start is meant to be one step ahead of the pretrained model.
    Raises as `init`, and if `W0` does not fit the update or is not finite.
    """
    check_shapes(W0=(W0, "out in"), update=(update, "out in"))
    factors = init(update, scaling, rank=rank)
    check_finite(W0=W0)
    return Weights(W0, *factors)


def init_xs(W0: Float[Tensor, "out in"], *, rank: int, sigma: float = 1e-5, generator: torch.Generator | None = None) -> Factors:
    """The start of LoRA-XS: A and B from the leading singular triplets of W0, the values in B; R normal of width `sigma`.

    Source: official `find_and_initialize`, with an exact SVD in place of its randomised one.

    Raises:
        ValueError: `rank` is not in 1..min(out, in), `W0` is zero or not finite, or `sigma` is not positive.
    """
    check_shapes(W0=(W0, "out in"))
    check_rank(rank, W0)
    check_positive("sigma", sigma)
    _check_nonzero("W0", W0)
    U, S, Vh = torch.linalg.svd(working(W0), full_matrices=False)
    R = W0.new_empty(rank, rank).normal_(0, sigma, generator=generator)
    return Factors(A=_own(Vh[:rank], W0.dtype), R=R, B=_own(U[:, :rank] * S[:rank], W0.dtype))


def forward(
    x: Float[Tensor, "... in"],
    W0: Float[Tensor, "out in"],
    A: Float[Tensor, "rank in"],
    R: Float[Tensor, "rank rank"],
    B: Float[Tensor, "out rank"],
    scaling: float,
    *,
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "... out"]:
    """The adapted layer: (..., in) -> (..., out). Raises ValueError if shapes, dtypes or devices do not fit."""
    check_shapes(x=(x, "... in"), W0=(W0, "out in"), A=(A, "rank in"), R=(R, "rank rank"), B=(B, "out rank"), bias=(bias, "out"))
    frozen = nn.functional.linear(x, W0, bias)
    # y = W0 x + s B R A x, through the rank: the rows of x meet A^T, then R^T, then B^T
    hidden = ((x @ A.mT) @ R.mT).reshape(-1, R.shape[0])
    return torch.addmm(frozen.reshape(-1, B.shape[0]), hidden, B.mT, alpha=scaling).reshape(frozen.shape)


def delta_weight(
    A: Float[Tensor, "rank in"], R: Float[Tensor, "rank rank"], B: Float[Tensor, "out rank"], scaling: float
) -> Float[Tensor, "out in"]:
    """The update Delta W = s B R A (out, in). Raises ValueError if the shapes do not fit."""
    check_shapes(A=(A, "rank in"), R=(R, "rank rank"), B=(B, "out rank"))
    return scaling * (B @ R @ A)


def merge(
    W0: Float[Tensor, "out in"],
    A: Float[Tensor, "rank in"],
    R: Float[Tensor, "rank rank"],
    B: Float[Tensor, "out rank"],
    scaling: float,
) -> Float[Tensor, "out in"]:
    """The merged weight W = W0 + s B R A (out, in). Raises ValueError if shapes do not fit or an entry is not finite."""
    check_shapes(W0=(W0, "out in"), A=(A, "rank in"), R=(R, "rank rank"), B=(B, "out rank"))
    check_finite(W0=W0, A=A, R=R, B=B)
    return W0 + scaling * (B @ R @ A)


def gradients(
    G: Float[Tensor, "out in"], A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], scaling: float
) -> Float[Tensor, "rank rank"]:
    """The gradient of R (rank, rank) from G = dL/dW, as back-propagation gives it (Lemma 1). R itself does not matter."""
    check_shapes(G=(G, "out in"), A=(A, "rank in"), B=(B, "out rank"))
    # Lemma 1: g^R = s B^T G A^T
    return scaling * (B.mT @ G @ A.mT)


def equivalent_gradient(
    grad_R: Float[Tensor, "rank rank"], A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], scaling: float
) -> Float[Tensor, "out in"]:
    """The direction (out, in) in which W moves when R moves along `grad_R`: exact for steps of any size (Lemma 1)."""
    check_shapes(grad_R=(grad_R, "rank rank"), A=(A, "rank in"), B=(B, "out rank"))
    # Lemma 1: a step of R along g^R is a step of W along s B g^R A
    return scaling * (B @ grad_R @ A)


def optimal_gradient(
    grad_R: Float[Tensor, "rank rank"], A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], scaling: float
) -> Float[Tensor, "rank rank"]:
    """The step direction of R whose equivalent gradient is nearest to G, from back-propagation's `grad_R` (Theorem 2).

    For orthonormal A and B and s = 1 it is `grad_R` itself. B needs full column rank and A full row rank, which is not
    checked here (this runs in every step): torch's LinAlgError tells that they lack it, but rounding may hide it, and the
    entries then mean nothing.
    """
    check_shapes(grad_R=(grad_R, "rank rank"), A=(A, "rank in"), B=(B, "out rank"))
    short, wide, tall = working(grad_R), working(A), working(B)
    # Theorem 2: g = (1 / s^2) (B^T B)^-1 g^R (A A^T)^-1
    left = torch.linalg.solve(tall.mT @ tall, short)
    best: Tensor = torch.linalg.solve(wide @ wide.mT, left, left=False) / scaling**2
    return best.to(grad_R.dtype)


def projected_gradient(G: Float[Tensor, "out in"], A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"]) -> Float[Tensor, "out in"]:
    """The part of G in B's column space and A's row space (out, in): what the optimal step moves W along (Theorems 2 to 4).

    B needs full column rank and A full row rank, which is not checked here: else a direction outside of them is counted.
    """
    check_shapes(G=(G, "out in"), A=(A, "rank in"), B=(B, "out rank"))
    left, right = torch.linalg.qr(working(B)).Q, torch.linalg.qr(working(A).mT).Q
    # Theorem 2: P_B G P_A, through the rank
    seen: Tensor = left @ (left.mT @ working(G) @ right) @ right.mT
    return seen.to(G.dtype)


def sgd_step(
    G: Float[Tensor, "out in"],
    W0: Float[Tensor, "out in"],
    A: Float[Tensor, "rank in"],
    R: Float[Tensor, "rank rank"],
    B: Float[Tensor, "out rank"],
    scaling: float,
    *,
    lr: float,
    gradient: str = "optimal",
) -> Weights:
    """One step of gradient descent on R alone; W0, A and B come back as they are.

    `gradient` is "optimal" (default, Theorem 2: s B R A moves by -lr P_B G P_A, whatever s) or "plain" (back-propagation's, as
    in the official code, where the two agree). Raises ValueError for another word, or if shapes or dtypes do not fit.
    """
    check_shapes(W0=(W0, "out in"), A=(A, "rank in"), R=(R, "rank rank"), B=(B, "out rank"))
    check_choice("gradient", gradient, GRADIENTS)
    grad_R = gradients(G, A, B, scaling)
    return Weights(W0, A, R - lr * (optimal_gradient(grad_R, A, B, scaling) if gradient == "optimal" else grad_R), B)


def num_trainable(W0: Float[Tensor, "out in"], *, rank: int) -> int:
    """Number of trainable parameters beside `W0`: rank^2, whatever its sides (C1).

    Raises ValueError if `W0` is no floating-point matrix or `rank` is not in 1..min(out, in).
    """
    check_shapes(W0=(W0, "out in"))
    check_rank(rank, W0)
    return rank * rank


class LoRASBLinear(nn.Module):
    """A frozen `nn.Linear` with the product s B R A beside it: (..., in) -> (..., out). Only `R` (rank, rank) is trained.

    The factors are those of `init`, `init_xs` or any others; `base`, `A` and `B` are frozen.

    Raises:
        ValueError: a factor does not fit the layer, the weight or a factor is not finite, or `scaling` is not positive.
    """

    A: Tensor
    B: Tensor

    def __init__(self, base: nn.Linear, A: Tensor, R: Tensor, B: Tensor, scaling: float = 1.0) -> None:
        super().__init__()
        check_shapes(W0=(base.weight, "out in"), A=(A, "rank in"), R=(R, "rank rank"), B=(B, "out rank"))
        check_finite(W0=base.weight, A=A, R=R, B=B)
        check_positive("scaling", scaling)
        self.base = base.requires_grad_(False)
        self.scaling = scaling
        self.register_buffer("A", A.detach().clone())
        self.R = nn.Parameter(R.clone())
        self.register_buffer("B", B.detach().clone())

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        # The factors may be more precise than the weight: they are used in the precision of x
        A, R, B = (factor.to(x.dtype) for factor in (self.A, self.R, self.B))
        return forward(x, self.base.weight, A, R, B, self.scaling, bias=self.base.bias)


def adapt_linear(linear: nn.Linear, update: Float[Tensor, "out in"], *, rank: int, scaling: float = 1.0) -> LoRASBLinear:
    """A LoRA-SB layer around a copy of `linear`, started from the first update of full fine-tuning; `linear` stays as it is.

    `update` may be more precise than the weight. Errors as in `init`.
    """
    A, R, B = (factor.to(linear.weight.dtype) for factor in init(update, scaling, rank=rank))
    return LoRASBLinear(copy.deepcopy(linear), A, R, B, scaling)


def _own(part: Tensor, dtype: torch.dtype) -> Tensor:
    """A part of a decomposition, row by row in memory of its own, so that the rest can be freed."""
    return part.to(dtype).clone(memory_format=torch.contiguous_format)


def _check_nonzero(name: str, tensor: Tensor) -> None:
    """Check that a matrix is finite and has an entry that is not zero."""
    check_finite(**{name: tensor})
    if not tensor.any():
        raise ValueError(f"{name} is zero and has no directions; check that the loss depends on this layer, or leave the layer out")


if __name__ == "__main__":
    x, y = torch.randn(64, 24), torch.randn(64, 16)
    W0 = torch.randn(16, 24) / 24**0.5
    rows = torch.arange(64).view(4, 16)
    update = estimate_update(lambda W, i: (x[i] @ W.mT - y[i]).mT @ x[i] / len(i), W0, rows, lr=1e-2)
    weights, G = init_weights(W0, update, rank=4), (x @ W0.mT - y).mT @ x / 64
    print("trainable:", num_trainable(W0, rank=4), "instead of", W0.numel())
    for name, (A, _, B) in {"LoRA-XS": init_xs(W0, rank=4), "LoRA-SB": weights[1:]}.items():
        seen = projected_gradient(G, A, B).norm() / G.norm()
        print(f"{name}: share of the gradient that a step of R can follow {seen.item():.3f}")
