r"""RandLoRA: a full-rank update as a learned sum of low-rank random matrices, of which only diagonal scalings are trained.

Albert et al. sum N = ceil(min(out, in) / rank) terms B_j Lambda_j A Gamma_j. The random A and B_j are frozen and drawn once for
all layers; each layer trains the diagonals alone. A smaller basis rank trains more numbers, but for rounding.

| here         | paper       | shape                | meaning                                                                 |
|--------------|-------------|----------------------|-------------------------------------------------------------------------|
| `W0`         | W_0         | (out, in)            | pretrained weight, frozen                                               |
| `small`, `large` | d, D    | numbers              | smaller and larger side of the weight                                   |
| `bases`      | N, n        | number               | ceil(small / rank) terms                                                |
| `gammas`     | Gamma_j     | (bases, small)       | trained diagonals on the smaller side                                   |
| `A`          | A           | (rank, small)        | frozen random base, one for all terms and layers                        |
| `lambdas`    | Lambda_j    | (bases, rank)        | trained diagonals in the middle                                         |
| `B`          | B_j         | (large, bases, rank) | frozen random bases; `B[:, j]` is B_j                                   |
| `scaling`    | s           | number               | `scaling_factor`                                                        |
| `G`          | -           | (out, in)            | dL/dW                                                                   |

A wide layer (in > out) has the transposed sum, so that the diagonals always sit on the smaller side.

Where the public codes differ (`PaulAlbert31/RandLoRA` with four sub-projects, `huggingface/peft`), and what is the default:

- Scaling: "paper" alpha / (rank sqrt(bases)) with alpha = 2 rank (paper's table, `peft/` and `NLG/`; default), "peft" alpha / rank
  with alpha = 20 rank (PEFT: 640, for rank 32), "vision" alpha / rank with alpha = 1. The first author gave up sqrt(bases) (issue 1).
- Start: `lambdas` zero (default), or `gammas` zero (`vision_language/`).
- Bases: "uniform" (default), "normal" (vision code), "sparse" and "very_sparse" ternary. They are divided by their standard
  deviation as they are drawn, in at least float32; PEFT draws and divides in half precision.
- PEFT pairs the columns of B with the rows of A in another order: its B, read as (large, rank, bases), is ours transposed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ._adapters import matching_linears, replace_linears
from ._checks import check_choice, check_finite, check_positive, check_rank, check_shapes
from ._linalg import working
from ._paper import Paper
from .lora import _drop, _rows, draw_mask

PAPER = Paper(
    slug="randlora",
    name="RandLoRA",
    title="RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
    authors=(
        "Paul Albert",
        "Frederic Z. Zhang",
        "Hemanth Saratchandran",
        "Cristian Rodriguez-Opazo",
        "Anton van den Hengel",
        "Ehsan Abbasnejad",
    ),
    venue="ICLR",
    year=2025,
    arxiv="2502.00987",
    official_code="PaulAlbert31/RandLoRA",
    family="structure",
    bibtex_key="albert2025randlora",
)

OutIn = Float[Tensor, "out in"]
BasesSmall = Float[Tensor, "bases small"]
RankSmall = Float[Tensor, "rank small"]
BasesRank = Float[Tensor, "bases rank"]
LargeBasesRank = Float[Tensor, "large bases rank"]


class Bases(NamedTuple):
    """The frozen random matrices."""

    A: RankSmall
    B: LargeBasesRank


class Diagonals(NamedTuple):
    """The trained diagonals of one layer."""

    gammas: BasesSmall
    lambdas: BasesRank


class Gradients(NamedTuple):
    """Gradients of the loss in the diagonals."""

    grad_gammas: BasesSmall
    grad_lambdas: BasesRank


def num_bases(W0: OutIn, *, rank: int) -> int:
    """Number N of terms: the least with which N matrices of rank `rank` can add up to full rank (section 4).

    Raises ValueError if `W0` is no floating-point matrix or `rank` is not in 1..min(out, in).
    """
    check_shapes(W0=(W0, "out in"))
    check_rank(rank, W0)
    # N = ceil(d / r), in whole numbers
    return -(-min(W0.shape) // rank)


def num_trainable(W0: OutIn, *, rank: int) -> int:
    """Number of trainable parameters of a layer, N (rank + min(out, in)): falling in rank but for rounding. Raises as `num_bases`."""
    return num_bases(W0, rank=rank) * (rank + min(W0.shape))


def scaling_factor(rank: int, bases: int, *, alpha: float | None = None, convention: str = "paper") -> float:
    """The number s that multiplies the sum of `bases` terms.

    `convention` is "paper" (default: alpha / (rank sqrt(bases)), alpha 2 rank unless given), "peft" (alpha / rank, alpha
    20 rank) or "vision" (alpha / rank, alpha 1). Sources: paper's hyperparameter table, PEFT, `vision_language/`.

    Raises:
        ValueError: `rank` or `bases` is no whole number of at least 1, `alpha` is not positive and finite, or the convention is unknown.
    """
    check_choice("convention", convention, ("paper", "peft", "vision"))
    if not all(type(count) is int and count >= 1 for count in (rank, bases)):
        raise ValueError(f"rank is {rank!r} and bases {bases!r}; needed whole numbers of at least 1")
    alpha = {"paper": 2.0 * rank, "peft": 20.0 * rank, "vision": 1.0}[convention] if alpha is None else alpha
    check_positive("alpha", alpha)
    return alpha / rank / math.sqrt(bases) if convention == "paper" else alpha / rank


def ternarise(u: Float[Tensor, "..."], *, sparsity: float = 3.0) -> Float[Tensor, "..."]:
    """Entries -1, 0 and 1 from numbers `u` drawn uniformly from [0, 1): each sign with probability 1 / (2 sparsity).

    Source: the paper's section on sparse bases; `sparsity` 3 is "sparse", the root of `small` in `draw_bases` "very sparse".

    Raises:
        ValueError: `u` is not floating point, or `sparsity` is below 1.
    """
    check_shapes(u=(u, "..."))
    if not 1 <= sparsity < math.inf:
        raise ValueError(f"sparsity is {sparsity!r}; needed a finite number of at least 1")
    # Half precision would round the thresholds
    exact = working(u)
    return (exact > 1 - 1 / (2 * sparsity)).to(u.dtype) - (exact < 1 / (2 * sparsity)).to(u.dtype)


def normalise(base: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A base divided by the unbiased standard deviation of all its entries; its mean stays. Half precision is computed in float32.

    Raises:
        ValueError: `base` is not floating point, an entry is NaN or infinite, or all entries are equal.
    """
    check_shapes(base=(base, "..."))
    check_finite(base=base)
    deviation = working(base).std() if base.numel() > 1 else base.new_zeros(())
    if deviation == 0:
        raise ValueError(f"base {tuple(base.shape)} has no spread: all its entries are equal; draw more entries, or with another seed")
    return (working(base) / deviation).to(base.dtype)


def draw_bases(weights: Sequence[Tensor], *, rank: int, kind: str = "uniform", generator: torch.Generator | None = None) -> Bases:
    """Draw one pair of bases for all layers: A (rank, small) and B (large, bases, rank), each of standard deviation 1.

    `weights` are the weights (out, in) of all layers that will share the pair; only their shapes, dtype and device are read.
    `small` is the smaller of the largest out and the largest in, `large` the larger, `bases` ceil(small / rank).
    `kind` is "uniform" (default), "normal", "sparse" (ternary, a sixth for each sign) or "very_sparse" (1 / (2 sqrt(small)) for
    each sign; columns of A may be all zero). Source: paper, section 4; official `_init_randlora_A_randlora_B`.

    Raises:
        ValueError: there is no weight, the weights differ in dtype or device or are no matrices, `rank` exceeds a side of
            one, or the kind is unknown.
    """
    if not weights:
        raise ValueError("weights is empty; needed the weight of every layer that shares the bases")
    check_choice("kind", kind, ("uniform", "normal", "sparse", "very_sparse"))
    for W0 in weights:
        check_shapes(weights=(weights[0], "first_out first_in"), W0=(W0, "out in"))
        check_rank(rank, W0)
    small, large = sorted(max(W0.shape[side] for W0 in weights) for side in (0, 1))
    drawn = []
    for shape in ((rank, small), (large, -(-small // rank), rank)):
        base = working(weights[0]).new_empty(shape)
        # Kaiming's bound drops out with the division by the standard deviation
        base = base.normal_(generator=generator) if kind == "normal" else base.uniform_(-1, 1, generator=generator)
        if kind in ("sparse", "very_sparse"):
            base = ternarise((base + 1) / 2, sparsity=3.0 if kind == "sparse" else math.sqrt(small))
        drawn.append(normalise(base).to(weights[0].dtype))
    return Bases(*drawn)


def slice_bases(
    W0: OutIn, shared_A: Float[Tensor, "rank shared_small"], shared_B: Float[Tensor, "shared_large shared_bases rank"]
) -> Bases:
    """The part of the shared bases that a layer uses: their leading slices, as views (section 4, official `layer.py`).

    Raises:
        ValueError: the bases are too small for the layer, or shapes or dtypes do not fit.
    """
    check_shapes(W0=(W0, "out in"), shared_A=(shared_A, "rank shared_small"), shared_B=(shared_B, "shared_large shared_bases rank"))
    (small, large), bases = sorted(W0.shape), num_bases(W0, rank=len(shared_A))
    if shared_A.shape[1] < small or shared_B.shape[0] < large or shared_B.shape[1] < bases:
        raise ValueError(f"shared_A and shared_B are too small for W0 {tuple(W0.shape)}; needed a pair that draw_bases made for it too")
    return Bases(shared_A[:, :small], shared_B[:large, :bases])


def init(W0: OutIn, *, rank: int, zero: str = "lambdas") -> Diagonals:
    """The diagonals at the start: `gammas` (bases, small) and `lambdas` (bases, rank), one of them zero, so the update is zero.

    `zero` is "lambdas" (default; gammas are 1 / max(bases, small)) or "gammas" (vision code; lambdas are 1 / max(bases, rank)).

    Raises:
        ValueError: `rank` is not in 1..min(out, in), `W0` is not a finite floating-point matrix, or `zero` is unknown.
    """
    check_choice("zero", zero, ("lambdas", "gammas"))
    bases = num_bases(W0, rank=rank)
    check_finite(W0=W0)
    start = Diagonals(W0.new_zeros(bases, min(W0.shape)), W0.new_zeros(bases, rank))
    # The official code divides by the longer side of the diagonals' own shape
    other = start.gammas if zero == "lambdas" else start.lambdas
    other.fill_(1 / max(other.shape))
    return start


class _ThroughBase(torch.autograd.Function):
    """s x A~^T or, `turned`, s x A~, where the rows of A~ (bases rank, small) are lambda_jk A_k gamma_j.

    Only x, gammas, A and lambdas are kept for the backward, which makes A~ again: it is as large as a square weight.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gammas: Tensor, A: Tensor, lambdas: Tensor, scaling: float, turned: bool) -> Tensor:
        stacked = _stacked(gammas, A, lambdas, scaling)
        return x @ (stacked if turned else stacked.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what `backward` reads."""
        ctx.save_for_backward(*inputs[:4])
        ctx.scaling, ctx.turned = inputs[4:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments of `forward`, None for those that are frozen or no tensors."""
        (x, gammas, A, lambdas), (grad_z,) = ctx.saved_tensors, grads
        grad_x = _ThroughBase.forward(grad_z, gammas, A, lambdas, ctx.scaling, not ctx.turned) if ctx.needs_input_grad[0] else None
        g = (x.mT @ grad_z if ctx.turned else grad_z.mT @ x).view(*lambdas.shape, -1)
        scaled = ctx.scaling * lambdas
        # The base is frozen in training
        grad_A = torch.einsum("jki,jk,ji->ki", g, scaled, gammas) if ctx.needs_input_grad[2] else None
        # g may be overwritten, unless this backward is to be differentiated itself
        grad_gammas, grad_lambdas = _of_diagonals(g * A if torch.is_grad_enabled() else g.mul_(A), gammas, scaled)
        return grad_x, grad_gammas, grad_A, ctx.scaling * grad_lambdas, None, None


def _stacked(gammas: Tensor, A: Tensor, lambdas: Tensor, scaling: float = 1.0) -> Tensor:
    """s A~ (bases rank, small): the rows s lambda_jk A_k gamma_j, term by term."""
    return (scaling * lambdas[:, :, None] * A * gammas[:, None, :]).flatten(0, 1)


def _of_diagonals(product: Tensor, gammas: Tensor, lambdas: Tensor) -> Gradients:
    """The gradients of the diagonals from the gradient of A~ times A, entry by entry (bases, rank, small)."""
    # dL/dgamma_ji = sum_k g_jki A_ki lambda_jk and dL/dlambda_jk = sum_i g_jki A_ki gamma_ji
    return Gradients((lambdas[:, None, :] @ product).squeeze(1), (product @ gammas[:, :, None]).squeeze(2))


def forward(
    x: Float[Tensor, "... in"],
    W0: OutIn,
    gammas: BasesSmall,
    A: RankSmall,
    lambdas: BasesRank,
    B: LargeBasesRank,
    scaling: float,
    *,
    bias: Float[Tensor, " out"] | None = None,
    mask: Bool[Tensor, "... in"] | None = None,
    p: float = 0.0,
) -> Float[Tensor, "... out"]:
    """The adapted layer: (..., in) -> (..., out). Delta W is not made; A~, which is about (small, small), is.

    `mask` (default: no dropout) keeps the entries of `x` that are True, for the adapter path only; what is kept is divided by
    1 - `p`. The bases are those of the layer, see `slice_bases`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_shapes(x=(x, "... in"), W0=(W0, "out in"), bias=(bias, "out"))
    wide = _check_factors(gammas, A, lambdas, B, W0=W0)
    rows, columns = _rows(_drop(x, mask, p)), B.flatten(1)
    # Without a graph the plain function is enough
    through: Callable[..., Tensor] = _ThroughBase.apply if torch.is_grad_enabled() else _ThroughBase.forward
    if wide:
        # y = W0 x + s A~^T B~^T x; in this order of the two paths the least memory is held at once
        turned = through(rows @ columns, gammas, A, lambdas, scaling, True)
        return nn.functional.linear(x, W0, bias) + turned.view(*x.shape[:-1], len(W0))
    frozen = nn.functional.linear(x, W0, bias)
    hidden = through(rows, gammas, A, lambdas, scaling, False)
    # y = W0 x + s B~ A~ x; addmm adds the product while it is formed, which saves one pass over y
    return torch.addmm(_rows(frozen), hidden, columns.mT).view_as(frozen)


def delta_weight(gammas: BasesSmall, A: RankSmall, lambdas: BasesRank, B: LargeBasesRank, scaling: float, *, wide: bool = False) -> OutIn:
    """The update Delta W of a tall or square layer (large, small), or with `wide` of a layer with in > out (small, large).

    Raises ValueError if the shapes do not fit.
    """
    check_shapes(gammas=(gammas, "bases small"), A=(A, "rank small"), lambdas=(lambdas, "bases rank"), B=(B, "large bases rank"))
    # M = sum_j B_j Lambda_j A Gamma_j, as the product B~ A~; Delta W = s M, or s M^T
    M = B.flatten(1) @ _stacked(gammas, A, lambdas)
    return scaling * (M.mT if wide else M)


def merge(W0: OutIn, gammas: BasesSmall, A: RankSmall, lambdas: BasesRank, B: LargeBasesRank, scaling: float) -> OutIn:
    """The merged weight W = W0 + Delta W (out, in).

    Raises:
        ValueError: shapes or dtypes do not fit, or an entry is NaN or infinite.
    """
    wide = _check_factors(gammas, A, lambdas, B, W0=W0)
    check_finite(W0=W0, gammas=gammas, A=A, lambdas=lambdas, B=B)
    return W0 + delta_weight(gammas, A, lambdas, B, scaling, wide=wide)


def unmerge(W: OutIn, gammas: BasesSmall, A: RankSmall, lambdas: BasesRank, B: LargeBasesRank, scaling: float) -> OutIn:
    """The pretrained weight W0 = W - Delta W (out, in) recovered from a merged one, up to rounding. Raises as `merge`."""
    wide = _check_factors(gammas, A, lambdas, B, W=W)
    check_finite(W=W, gammas=gammas, A=A, lambdas=lambdas, B=B)
    return W - delta_weight(gammas, A, lambdas, B, scaling, wide=wide)


def gradients(G: OutIn, gammas: BasesSmall, A: RankSmall, lambdas: BasesRank, B: LargeBasesRank, scaling: float) -> Gradients:
    """Gradients of the diagonals from G = dL/dW (out, in). Raises ValueError if the shapes do not fit."""
    wide = _check_factors(gammas, A, lambdas, B, G=G)
    # g_jki = s (B_j^T G)_ki, with G transposed for wide layers
    g = scaling * (B.flatten(1).mT @ (G.mT if wide else G)).view(*lambdas.shape, -1)
    return _of_diagonals(g * A, gammas, lambdas)


def fit_gammas(target: OutIn, A: RankSmall, lambdas: BasesRank, B: LargeBasesRank, scaling: float) -> BasesSmall:
    """The `gammas` (bases, small) with which Delta W is nearest to `target` (out, in), for given `lambdas`: least squares.

    Each column on the smaller side is a problem by itself, of `large` equations in `bases` unknowns.

    Raises:
        ValueError: shapes or dtypes do not fit, an entry is NaN or infinite, or `scaling` is not positive.
    """
    check_positive("scaling", scaling)
    check_finite(target=target, A=A, lambdas=lambdas, B=B)
    wide = _check_factors(None, A, lambdas, B, target=target)
    A_, lambdas_, B_, M = map(working, (A, lambdas, B, target.mT if wide else target))
    # M_oi = s sum_j (B_j Lambda_j A)_oi gamma_ji
    found: Tensor = torch.linalg.lstsq(scaling * torch.einsum("ojk,jk,ki->ioj", B_, lambdas_, A_), M.mT[:, :, None]).solution
    return found.squeeze(2).mT.to(target.dtype)


def fit_lambdas(target: OutIn, gammas: BasesSmall, A: RankSmall, B: LargeBasesRank, scaling: float) -> BasesRank:
    """The `lambdas` (bases, rank) with which Delta W is nearest to `target` (out, in), for given `gammas`: least squares.

    One problem of out in equations in bases rank unknowns. Raises as `fit_gammas`.
    """
    check_positive("scaling", scaling)
    check_finite(target=target, gammas=gammas, A=A, B=B)
    wide = _check_factors(gammas, A, None, B, target=target)
    gammas_, A_, B_, M = map(working, (gammas, A, B, target.mT if wide else target))
    # M = s sum_jk lambda_jk (column k of B_j) times (row k of A Gamma_j)
    terms = scaling * torch.einsum("ojk,ki,ji->oijk", B_, A_, gammas_).flatten(2).flatten(0, 1)
    found: Tensor = torch.linalg.lstsq(terms, M.reshape(-1, 1)).solution
    return found.view(B.shape[1:]).to(target.dtype)


def svd_blocks(W0: OutIn, *, rank: int) -> Float[Tensor, "bases out in"]:
    """A matrix as the sum of parts with `rank` consecutive singular triplets each, the last with what is left (Theorem 1).

    Raises:
        ValueError: `rank` is not in 1..min(out, in), or `W0` is not finite.
    """
    starts = range(0, num_bases(W0, rank=rank) * rank, rank)
    check_finite(W0=W0)
    U, S, Vh = torch.linalg.svd(working(W0), full_matrices=False)
    # U_j Sigma_j V_j^T
    return torch.stack([(U[:, k : k + rank] * S[k : k + rank]) @ Vh[k : k + rank] for k in starts]).to(W0.dtype)


class BasePair(nn.Module):
    """One pair of bases in memory, for any number of layers. A module, so that it is still one after `model.to(...)` or a copy."""

    A: Tensor
    B: Tensor

    def __init__(self, A: RankSmall, B: LargeBasesRank) -> None:
        super().__init__()
        check_finite(A=A, B=B)
        self.register_buffer("A", A.detach())
        self.register_buffer("B", B.detach())


class RandLoRALinear(nn.Module):
    """A frozen `nn.Linear` with a full-rank update beside it: (..., in) -> (..., out).

    Only `gammas` (bases, small) and `lambdas` (bases, rank) are trained. `pair` holds the bases, of which the layer uses the
    leading slices. `alpha`, `convention` and `zero` as in `scaling_factor` and `init`; `dropout` (default 0; the official
    commonsense scripts have 0.05) acts on the adapter's input, in training only.
    The diagonals may be made more precise than the weight, as in `layer.gammas.data = layer.gammas.data.float()` beside
    bfloat16: they are used in the precision of x, and trained and merged in their own.

    Raises:
        ValueError: the bases do not fit the layer, `dropout` is not in [0, 1), or the weight is not finite.
    """

    def __init__(
        self,
        base: nn.Linear,
        pair: BasePair,
        *,
        alpha: float | None = None,
        convention: str = "paper",
        zero: str = "lambdas",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout!r}; needed a probability from 0 to below 1")
        slice_bases(base.weight, pair.A, pair.B)
        self.base, self.pair = base.requires_grad_(False), pair
        self.dropout, self.merged = dropout, False
        gammas, lambdas = init(base.weight, rank=len(pair.A), zero=zero)
        self.scaling = scaling_factor(len(pair.A), len(lambdas), alpha=alpha, convention=convention)
        self.gammas, self.lambdas = nn.Parameter(gammas), nn.Parameter(lambdas)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """gammas, A, lambdas, B and the scaling, as the functions of this file take them, all in one precision."""
        A, B = slice_bases(self.base.weight, self.pair.A, self.pair.B)
        return self.gammas.to(dtype), A.to(dtype), self.lambdas.to(dtype), B.to(dtype), self.scaling

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if self.merged:
            return nn.functional.linear(x, self.base.weight, self.base.bias)
        mask = draw_mask(x, p=self.dropout) if self.training and self.dropout > 0 else None
        return forward(x, self.base.weight, *self.factors(x.dtype), bias=self.base.bias, mask=mask, p=self.dropout)

    @torch.no_grad()
    def merge(self) -> None:
        """Add Delta W to the base weight, after which the layer costs what `base` costs. Merging twice does nothing."""
        if not self.merged:
            dtype = self.gammas.dtype
            self.base.weight.copy_(merge(self.base.weight.to(dtype), *self.factors(dtype)))
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take Delta W out of the base weight again, up to rounding. Does nothing if the layer is not merged."""
        if self.merged:
            dtype = self.gammas.dtype
            self.base.weight.copy_(unmerge(self.base.weight.to(dtype), *self.factors(dtype)))
            self.merged = False


def adapt_model(
    model: nn.Module, pattern: str, *, rank: int, kind: str = "uniform", generator: torch.Generator | None = None, **options: Any
) -> list[str]:
    """Replace, in place, the linear layers named by `pattern` by RandLoRA layers that share one pair of bases; freeze the rest.

    `kind` as in `draw_bases`; `options` are those of `RandLoRALinear`. Returns the names, in the model's order.

    Raises:
        ValueError: no layer's name matches, or as `draw_bases` and `RandLoRALinear` do.
    """
    found = matching_linears(model, pattern).values()
    pair = BasePair(*draw_bases([m.weight for m in found], rank=rank, kind=kind, generator=generator))
    return replace_linears(model, pattern, lambda linear: RandLoRALinear(linear, pair, **options))


def _check_factors(gammas: Tensor | None, A: Tensor, lambdas: Tensor | None, B: Tensor, **weight: Tensor) -> bool:
    """Check that diagonals, bases and a weight (out, in), given by its name, fit each other; return whether the layer is wide."""
    ((name, W),) = weight.items()
    check_shapes(**{name: (W, "out in")})
    wide = W.shape[0] < W.shape[1]
    sides = {name: (W, "small large" if wide else "large small")}
    check_shapes(gammas=(gammas, "bases small"), A=(A, "rank small"), lambdas=(lambdas, "bases rank"), B=(B, "large bases rank"), **sides)
    return wide


if __name__ == "__main__":
    W0 = torch.randn(24, 16)
    for rank in (1, 4, 16):
        print(f"basis rank {rank}: {num_bases(W0, rank=rank)} terms, {num_trainable(W0, rank=rank)} trained numbers")
