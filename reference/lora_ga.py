r"""LoRA-GA: start the factors along the singular vectors of the gradient, so that the first step follows full fine-tuning.

Wang, Yu and Li take A and B from disjoint halves of the top 2 rank singular triplets of G = dL/dW: to first order, no
other start of that rank brings the first update of s B A closer to a multiple of G (Theorem 3.1). One common scale keeps
the adapter's output at the same size in every width and rank (Theorem 3.2), and W0 - s B A as frozen weight keeps the
model's function.

| here             | paper            | shape       | meaning                                            |
|------------------|------------------|-------------|----------------------------------------------------|
| `W0`             | W_0              | (out, in)   | pretrained weight                                  |
| `W_base`         | W_init           | (out, in)   | frozen weight W0 - s B A, for the initial A and B  |
| `A`, `B`         | A, B             | (rank, in), (out, rank) | trainable factors                      |
| `scaling`        | eta              | number      | s = alpha / sqrt(rank), by `scaling_factor`        |
| `G`              | gradient of W_0  | (out, in)   | dL/dW at W0; its SVD is U diag(S) Vh               |
| `gamma`          | gamma            | number      | hyperparameter of the scale, 16 by default         |
| `factor_scale`   | -                | number      | c, the size of each row of A and column of B       |
| `zeta`           | zeta             | number      | s^2 c^2: the first update is zeta times G's rank-2r part |
| `sketch`         | -                | (min(out, in), q) | Gaussian test matrix of the randomised SVD   |

Where paper and code differ (`Outsider565/LoRA-GA`: `peft/src/peft/tuners/lora/layer.py`, `reproduce/run_exp.py`):

- Both official files use a randomised SVD (q = 4 rank, 4 iterations), here an exact one unless `sketch` is given; the
  singular values of W0 in the scale "weightS" are always exact here.
- Scaling is the paper's alpha / sqrt(rank); the official configuration class leaves it at alpha / rank.
- The first arXiv versions print gamma in the factors' scale where Algorithm 1 and the code have sqrt(gamma); so here.
- `layer.py` computes the correction before the factors are cast to a lower precision, `run_exp.py` after; here after,
  from the factors that are trained. The direction "random" exists in `layer.py` only, the optional clipping not here.
- `huggingface/peft` multiplies singular values into B and lets "random" use one index set for both factors: another method.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import lora
from ._checks import check_choice, check_finite, check_positive, check_shapes
from ._linalg import randomised_svd, working
from ._paper import Paper
from .lora import Factors, LoRALinear

PAPER = Paper(
    slug="lora_ga",
    name="LoRA-GA",
    title="LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
    authors=("Shaowen Wang", "Linxi Yu", "Jian Li"),
    venue="NeurIPS",
    year=2024,
    arxiv="2407.05000",
    official_code="Outsider565/LoRA-GA",
    family="initialisation",
    bibtex_key="wang2024loraga",
)

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "unit", "gd", "weightS")

Batch = TypeVar("Batch")


class IndexSets(NamedTuple):
    """Which singular triplets of G, counted from 0, give the rows of A and the columns of B."""

    A: Int[Tensor, " rank"]
    B: Int[Tensor, " rank"]


def scaling_factor(alpha: float, rank: int) -> float:
    """The number s = alpha / sqrt(rank) that multiplies B A (Algorithm 1, after rsLoRA). Raises ValueError if `rank` is below 1."""
    return lora.scaling_factor(alpha, rank, rslora=True)


def index_sets(*, rank: int, direction: str = "ArB2r", generator: torch.Generator | None = None) -> IndexSets:
    """Split the triplets 0..2 rank - 1 into `rank` for A and `rank` for B (Theorem 3.1: any split is optimal).

    `direction` is "ArB2r" (default, Algorithm 1: first half for A), "A2rBr" (second half for A), "ArBr" (odd ones for A,
    even ones for B) or "random" (drawn with `generator`, in random order). Names and sets: official `layer.py`.

    Raises:
        ValueError: `rank` is no whole number of at least 1, or the direction is unknown.
    """
    check_choice("direction", direction, DIRECTIONS)
    _check_rank(rank, None)
    order = torch.arange(2 * rank)
    if direction == "random":
        order = torch.randperm(2 * rank, generator=generator, device=generator.device if generator else None)
    if direction == "ArBr":
        return IndexSets(A=order[1::2], B=order[0::2])
    if direction == "A2rBr":
        return IndexSets(A=order[rank:], B=order[:rank])
    return IndexSets(A=order[:rank], B=order[rank:])


def factor_scale(
    scaling: float,
    *,
    out_features: int,
    rank: int,
    gamma: float = 16.0,
    scale: str = "stable",
    W0: Float[Tensor, "out in"] | None = None,
) -> float:
    """The common size c of A's rows and B's columns (Theorem 3.2, Algorithm 1, official `layer.py`).

    `scale` is "stable" (default: out^(1/4) / sqrt(gamma)), "unit" (1), "gd" (1 / s, so that the first step is the gradient
    step's own rank-2r part) or "weightS" (mean of sqrt(sigma_i(W0) / s) over the top `rank`; needs `W0`).

    Raises:
        ValueError: `scaling` or `gamma` is not positive and finite, `rank` is below 1, the scale is unknown, `W0` is no
            floating-point matrix, or "weightS" lacks a finite one that is not zero.
    """
    check_choice("scale", scale, SCALES)
    _check_rank(rank, None)
    check_shapes(W0=(W0, "out in"))
    check_positive("scaling", scaling)
    check_positive("gamma", gamma)
    if scale == "unit":
        return 1.0
    if scale == "gd":
        return 1 / scaling
    if scale == "stable":
        # Algorithm 1: the fourth root of d_out over the square root of gamma, on each factor
        return math.sqrt(math.sqrt(out_features) / gamma)
    if W0 is None:
        raise ValueError('scale is "weightS", which reads the singular values of W0; pass W0, or use "stable"')
    check_finite(W0=W0)
    c = float((torch.linalg.svdvals(working(W0))[:rank] / scaling).sqrt().mean())
    if c == 0:
        raise ValueError('W0 is zero, so scale "weightS" gives zero factors, which never train; use "stable"')
    return c


def zeta(
    scaling: float,
    *,
    out_features: int,
    rank: int,
    gamma: float = 16.0,
    scale: str = "stable",
    W0: Float[Tensor, "out in"] | None = None,
) -> float:
    """The constant s^2 c^2 of Theorem 3.1: the first update is zeta times the best rank-2r approximation of G.

    For "stable" it is alpha^2 sqrt(out) / (gamma rank). Arguments and errors as in `factor_scale`.
    """
    # Theorem 3.1: c = sqrt(zeta) / s
    return math.pow(scaling * factor_scale(scaling, out_features=out_features, rank=rank, gamma=gamma, scale=scale, W0=W0), 2)


def draw_sketch(G: Float[Tensor, "out in"], *, rank: int, generator: torch.Generator | None = None) -> Float[Tensor, "small q"]:
    """Draw the Gaussian test matrix (min(out, in), q) of the randomised SVD, q = min(4 rank, out, in) (official `layer.py`)."""
    check_shapes(G=(G, "out in"))
    _check_rank(rank, G)
    small = min(G.shape)
    return torch.randn(small, min(4 * rank, small), generator=generator, dtype=G.dtype, device=G.device)


def init(
    G: Float[Tensor, "out in"],
    scaling: float,
    *,
    rank: int,
    gamma: float = 16.0,
    direction: str = "ArB2r",
    scale: str = "stable",
    W0: Float[Tensor, "out in"] | None = None,
    indices: Sequence[Tensor] | None = None,
    sketch: Float[Tensor, "small q"] | None = None,
    niter: int = 4,
    generator: torch.Generator | None = None,
) -> Factors:
    """The factors at the start of training, A (rank, in) and B (out, rank), from the gradient (Theorem 3.1, Algorithm 1).

    `direction` and `scale` as in `index_sets` and `factor_scale`; `W0` serves the scale "weightS" only, `generator` the
    direction "random" only. `indices`, a pair as from `index_sets`, takes the place of `direction`. The SVD is exact, or
    with a `sketch` (see `draw_sketch`) randomised with `niter` iterations. B A is not zero: `base_weight` goes with it.

    Raises:
        ValueError: 2 `rank` exceeds min(out, in), G is zero or not finite, shapes or dtypes do not fit, or an option is unusable.
    """
    check_shapes(G=(G, "out in"), W0=(W0, "out in"), sketch=(sketch, "small q"))
    _check_rank(rank, G)
    _check_gradient(G)
    c = factor_scale(scaling, out_features=G.shape[0], rank=rank, gamma=gamma, scale=scale, W0=W0)
    if indices is None:
        indices = index_sets(rank=rank, direction=direction, generator=generator)
    for_A, for_B = _check_indices(indices, rank)
    # Algorithm 1: U, S, V <- SVD(G); the singular values are not used, so the size of G does not matter
    U, Vh = _singular_vectors(working(G), sketch, rank, niter)
    # Theorem 3.1: A = sqrt(zeta) / s V_IA^T and B = sqrt(zeta) / s U_IB, with sqrt(zeta) / s = c
    return Factors(A=(c * Vh[for_A]).to(G.dtype), B=(c * U[:, for_B]).to(G.dtype))


def _singular_vectors(G: Tensor, sketch: Tensor | None, rank: int, niter: int) -> tuple[Tensor, Tensor]:
    """Leading left (out, q) and right (q, in) singular vectors of G: exact, or by subspace iteration from `sketch`."""
    if sketch is None:
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        return U, Vh
    small = min(G.shape)
    if sketch.shape[0] != small or not 2 * rank <= sketch.shape[1] <= small or niter < 0:
        raise ValueError(
            f"sketch has shape {tuple(sketch.shape)} and niter is {niter}; needed ({small}, q) with q from {2 * rank} to {small}, "
            "and niter of at least 0: use draw_sketch"
        )
    if G.shape[0] >= G.shape[1]:
        U, _, Vh = randomised_svd(G, sketch, niter=niter)
        return U, Vh
    V, _, Uh = randomised_svd(G.mT, sketch, niter=niter)
    return Uh.mT, V.mT


def base_weight(
    W0: Float[Tensor, "out in"], A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], scaling: float
) -> Float[Tensor, "out in"]:
    """The frozen weight W_base = W0 - s B A (out, in) for the initial factors (Algorithm 1), so that W_base + s B A = W0.

    Computed in at least float32 and rounded once to the dtype of `W0`: in bfloat16 the function is kept to 2^-8 of W_base.

    Raises:
        ValueError: shapes or dtypes do not fit, or an entry is NaN or infinite, in an argument or in the result.
    """
    check_shapes(W0=(W0, "out in"), A=(A, "rank in"), B=(B, "out rank"))
    # Algorithm 1: W_init <- W0 - eta B A
    W_base = torch.addmm(working(W0), working(B), working(A), alpha=-scaling).to(W0.dtype)
    if not math.isfinite(_largest(W_base)):
        check_finite(W0=W0, A=A, B=B)
        raise ValueError(f"W_base is too large for {W0.dtype}; use a larger gamma, or a dtype of wider range such as torch.bfloat16")
    return W_base


def first_order_update(
    G: Float[Tensor, "out in"], A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], scaling: float
) -> Float[Tensor, "out in"]:
    """The part of the first SGD step on s B A that is linear in the learning rate, divided by minus that rate (out, in).

    It is what Theorem 3.1 compares with zeta G. Raises ValueError if the shapes do not fit.
    """
    check_shapes(G=(G, "out in"), A=(A, "rank in"), B=(B, "out rank"))
    # Section 3.2: s^2 (B B^T G + G A^T A), each product through the rank
    return scaling**2 * (B @ (B.mT @ G) + (G @ A.mT) @ A)


def estimate_gradient(
    grad: Callable[[Tensor, Batch], Tensor], W0: Float[Tensor, "out in"], batches: Iterable[Batch]
) -> Float[Tensor, "out in"]:
    """The mean of `grad(W0, batch)` over a few microbatches (Algorithm 1), summed in at least float32, in the dtype of `W0`.

    `grad` gives the gradient (out, in) of the batch's mean loss. With microbatches of equal size this is the full batch's.

    Raises:
        ValueError: there is no batch, or a gradient has another shape or dtype than `W0`.
    """
    check_shapes(W0=(W0, "out in"))
    total, count = torch.zeros_like(working(W0)), 0
    for batch in batches:
        gradient = grad(W0, batch)
        check_shapes(W0=(W0, "out in"), gradient=(gradient, "out in"))
        total, count = total + gradient, count + 1
    if count == 0:
        raise ValueError("batches is empty; needed at least one (a generator that was read before gives nothing)")
    return (total / count).to(W0.dtype)


@torch.no_grad()
def adapt_linear(
    linear: nn.Linear,
    G: Float[Tensor, "out in"],
    *,
    rank: int,
    alpha: float,
    gamma: float = 16.0,
    direction: str = "ArB2r",
    scale: str = "stable",
    sketch: Float[Tensor, "small q"] | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> LoRALinear:
    """A LoRA layer with the initial factors and W_base of this paper, which computes what `linear` computes (Algorithm 1).

    `linear` stays as it is; the copy's weight becomes W_base. `G` may be more precise than the weight. Options and errors
    as in `init` and `LoRALinear`.
    """
    W0 = linear.weight
    # LoRALinear draws factors that are overwritten below: from a generator of its own, to leave the global one alone
    spare = torch.Generator(W0.device)
    layer = LoRALinear(copy.deepcopy(linear), rank=rank, alpha=alpha, rslora=True, dropout=dropout, generator=spare)
    factors = init(
        G, layer.scaling, rank=rank, gamma=gamma, direction=direction, scale=scale, W0=W0.to(G), sketch=sketch, generator=generator
    )
    layer.A.copy_(factors.A)
    layer.B.copy_(factors.B)
    # From the factors as they are stored, so that their rounding does not change the function
    layer.base.weight.copy_(base_weight(W0, layer.A, layer.B, layer.scaling))
    return layer


def _largest(tensor: Tensor) -> float:
    """Largest absolute entry, NaN if any is, in one pass: `isfinite` of every entry would take a tenth of `init`."""
    low, high = torch.aminmax(tensor)
    return max(-low, high).item()


def _check_rank(rank: int, G: Tensor | None) -> None:
    """Check that `rank` is a whole number of at least 1 and, for a gradient, that G has 2 `rank` singular triplets."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank is {rank!r}; needed a whole number of at least 1")
    if G is not None and 2 * rank > min(G.shape):
        raise ValueError(
            f"rank is {rank} and G is {tuple(G.shape)}; needed 2 * rank <= {min(G.shape)}, since A and B take different "
            "singular vectors: use a smaller rank, or plain LoRA for this layer"
        )


def _check_gradient(G: Tensor) -> None:
    """Check that G is finite and not zero."""
    largest = _largest(G)
    if not math.isfinite(largest):
        raise ValueError(
            f"G has {int((~G.isfinite()).sum())} entries that are NaN or infinite, of {G.numel()}; leave out the batches that give them"
        )
    if largest == 0:
        raise ValueError("G is zero and has no directions; check that the loss depends on this layer, or use plain LoRA for it")


def _check_indices(indices: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """The two index sets, once it is clear that they split 0..2 `rank` - 1 into halves."""
    for_A, for_B = indices
    a, b = for_A.tolist(), for_B.tolist()
    if len(a) != rank or sorted(a + b) != list(range(2 * rank)):
        raise ValueError(
            f"indices are {a} and {b}; needed two sets of {rank} that share nothing and together are 0..{2 * rank - 1}: use index_sets"
        )
    return for_A, for_B


if __name__ == "__main__":
    x, y = torch.randn(64, 24), torch.randn(64, 16)
    W0 = torch.randn(16, 24) / 24**0.5
    G = estimate_gradient(lambda W, rows: (x[rows] @ W.mT - y[rows]).mT @ x[rows] / len(rows), W0, torch.arange(64).view(4, 16))
    s = scaling_factor(alpha=16, rank=4)
    for name, (A, B) in {"LoRA": lora.init(W0, rank=4), "LoRA-GA": init(G, s, rank=4)}.items():
        cosine = torch.cosine_similarity(first_order_update(G, A, B, s).flatten(), G.flatten(), dim=0)
        print(f"{name}: cosine of the first update with the gradient {cosine.item():.3f}")
    print("largest change of the weight at the start:", (base_weight(W0, A, B, s) + lora.delta_weight(A, B, s) - W0).abs().max().item())
