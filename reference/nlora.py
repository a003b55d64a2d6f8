r"""NLoRA: a small trainable matrix between the two factors, and a start that copies rows and columns of the weight.

Guo, Chang and Wu put an r x r matrix N between B and A (StructuredLoRA, SLoRA), start all three as the blocks of the weight from which
Nystroem's approximation is built, without any decomposition (NystroemLoRA, NLoRA), or train N alone (IntermediateTune, IntTune).
As published the start uses the block itself where Nystroem's formula has its inverse, and nothing is subtracted from the weight.

| here             | paper            | shape       | meaning                                            |
|------------------|------------------|-------------|----------------------------------------------------|
| `W0`             | W                | (out, in)   | pretrained weight                                  |
| `W_base`         | -                | (out, in)   | frozen weight: W0, or W0 - s B N A with `residual` |
| `A`, `B`         | A, B             | (rank, in), (out, rank) | factors; at the start rows and columns of W0 |
| `N`              | N                | (rank, rank) | middle factor; at the start the block where the two cross, or its inverse |
| `scaling`        | alpha / r        | number      | s, by `lora.scaling_factor`; 1 in the official runs |
| `rows`, `cols`   | 1..r             | (rank)      | landmarks, counted from 0; the first `rank` by default |
| `rcond`          | -                | number      | singular values of the block up to `rcond` times the largest count as zero |
| `G`              | -                | (out, in)   | dL/dW, W = W_base + s B N A                        |

Where paper and code differ (`TracyGuo2001/NLoRA`: `peft/src/peft/tuners/lora/layer.py`), and what is left open:

- The text derives Nystroem's approximation C K^+ R. Figure and code start N at the block K itself: `core="block"`, the default.
  `core="pinv"` is the approximation; the code holds it in a line that is commented out.
- Neither corrects the weight, so that training starts at W0 + s C K R. `residual=True` subtracts it, as PiSSA does.
- Landmarks are the first `rank` rows and columns; Nystroem's method samples them: pass `rows` and `cols`. With "block" their
  pairing matters, since k-th row and k-th column meet in N; with "pinv" it does not.
- SLoRA: the figure draws A from a Gaussian, the code uniformly; N is uniform within 1/sqrt(rank), in a comment normal of width 1/rank.
- A block that cannot be inverted is refused unless `rcond` says what to leave out.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from . import lora
from ._checks import check_choice, check_finite, check_rank, check_shapes
from ._linalg import working
from ._paper import Paper
from .lora import _drop, _rows, draw_mask, scaling_factor

PAPER = Paper(
    slug="nlora",
    name="NLoRA",
    title="NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models",
    authors=("Chenlu Guo", "Yi Chang", "Yuan Wu"),
    venue="Findings of EMNLP",
    year=2025,
    arxiv="2502.14482",
    official_code="TracyGuo2001/NLoRA",
    family="initialisation",
    bibtex_key="guo2025nlora",
)

RankIn = Float[Tensor, "rank in"]
RankRank = Float[Tensor, "rank rank"]
OutRank = Float[Tensor, "out rank"]
OutIn = Float[Tensor, "out in"]
Index = Int[Tensor, " rank"]

METHODS = ("nlora", "slora", "inttune")
CORES = ("block", "pinv")
DISTRIBUTIONS = ("kaiming", "gaussian")


class Factors(NamedTuple):
    """The three factors of the update, from the input side to the output side."""

    A: RankIn
    N: RankRank
    B: OutRank


class Weights(NamedTuple):
    """All weights of one layer."""

    W_base: OutIn
    A: RankIn
    N: RankRank
    B: OutRank


class Gradients(NamedTuple):
    """Gradients of the loss in the factors."""

    grad_A: RankIn
    grad_N: RankRank
    grad_B: OutRank


class Exported(NamedTuple):
    """Two factors of twice the rank, in LoRA's format."""

    A: Float[Tensor, "double in"]
    B: Float[Tensor, "out double"]


def init_slora(
    W0: OutIn, *, rank: int, distribution: str = "kaiming", core: str = "kaiming", generator: torch.Generator | None = None
) -> Factors:
    """SLoRA's start: A (rank, in) and N (rank, rank) random, B (out, rank) zero, so that the layer computes what it did.

    `distribution` is that of A, as in `lora.init`. `core` is that of N: "kaiming" (default, official: uniform, |N_ij| <=
    1/sqrt(rank)) or "gaussian" (a comment of the official code: standard deviation 1/rank). A is drawn first.

    Raises:
        ValueError: `rank` is not in 1..min(out, in), `W0` is not a finite floating-point matrix, or a choice is unknown.
    """
    check_choice("core", core, DISTRIBUTIONS)
    A, B = lora.init(W0, rank=rank, distribution=distribution, generator=generator)
    N = W0.new_empty(rank, rank)
    if core == "kaiming":
        # kaiming_uniform_(a=sqrt(5)) with fan_in = rank. N = 0 would never leave it: B = 0 as well, so all gradients vanish
        N.uniform_(-1 / math.sqrt(rank), 1 / math.sqrt(rank), generator=generator)
    else:
        N.normal_(0, 1 / rank, generator=generator)
    return Factors(A, N, B)


def landmark_blocks(W0: OutIn, *, rank: int, rows: Index | None = None, cols: Index | None = None) -> Factors:
    """Copies of the landmark rows (rank, in) of W0, of the block where they cross the landmark columns, and of these (out, rank).

    `rows` and `cols` are `rank` different indices each, counted from 0; the first ones by default (official code).

    Raises:
        ValueError: `rank` is not in 1..min(out, in), `W0` is not finite, or an index set has the wrong length, an index twice or
            one outside of the weight.
    """
    check_shapes(W0=(W0, "out in"))
    check_rank(rank, W0)
    check_finite(W0=W0)
    I, J = _landmarks("rows", rows, rank, W0, 0), _landmarks("cols", cols, rank, W0, 1)
    # Figure 3: R = W[I, :], K = W[I, J], C = W[:, J]. Indexing by a tensor copies: a slice would be a view of the frozen weight
    return Factors(A=W0[I], N=W0[I][:, J], B=W0[:, J])


def nystrom_approx(W0: OutIn, *, rank: int, rows: Index | None = None, cols: Index | None = None, rcond: float | None = None) -> OutIn:
    """Nystroem's approximation C K^+ R (out, in) of W0 from `rank` of its rows R and columns C and the block K where they cross.

    Errors and options as in `init` with `core="pinv"`.
    """
    R, K, C = map(working, landmark_blocks(W0, rank=rank, rows=rows, cols=cols))
    # W_hat = C K^+ R
    return (C @ (_inverse(K, rcond) @ R)).to(W0.dtype)


def nystrom_from_svd(W0: OutIn, *, rank: int, rows: Index | None = None, cols: Index | None = None, rcond: float | None = None) -> OutIn:
    """The same approximation as the paper derives it: the singular vectors of the block, extended to all rows and columns.

    Errors and options as in `nystrom_approx`.
    """
    R, K, C = map(working, landmark_blocks(W0, rank=rank, rows=rows, cols=cols))
    # W0 = [K E; F D], K = U L H^T; U_hat = [U; F H L^-1] = C H L^-1, V_hat = [H; E^T U L^-1] = R^T U L^-1
    U, L, Hh, inverse = _block_svd(K, rcond)
    U_hat, V_hat = C @ Hh.mT * inverse, R.mT @ U * inverse
    return (U_hat * L @ V_hat.mT).to(W0.dtype)


def init(
    W0: OutIn,
    scaling: float = 1.0,
    *,
    rank: int,
    core: str = "block",
    residual: bool = False,
    rows: Index | None = None,
    cols: Index | None = None,
    rcond: float | None = None,
) -> Weights:
    """All weights at the start of NLoRA and IntTune: A the landmark rows of W0, B its landmark columns, N from their block.

    `core` is "block" (default, official: N is the block itself) or "pinv" (N is its inverse: B N A approximates W0). With
    `residual=False` (default, official) `W_base` is `W0` itself, and the layer starts at W0 + s B N A. With True it is
    W0 - s B N A, and the layer starts at W0; a "pinv" start without it is useless, B N A being as large as W0 or larger.
    `rows` and `cols` as in `landmark_blocks`. `rcond`, for "pinv" only: singular values of the block up to `rcond` times the
    largest count as zero. Without it a block that has one, by a cut-off of 1e-12 in float64 and else 1e-6, is refused.

    Raises:
        ValueError: as in `landmark_blocks`, the block cannot be inverted, `core` is unknown, `rcond` is not in [0, 1), or the
            scaling is not finite.
    """
    check_choice("core", core, CORES)
    if not math.isfinite(scaling):
        raise ValueError(f"scaling is {scaling!r}; needed a finite number")
    A, N, B = landmark_blocks(W0, rank=rank, rows=rows, cols=cols)
    if core == "pinv":
        N = _inverse(working(N), rcond).to(W0.dtype)
    return Weights(base_weight(W0, A, N, B, scaling) if residual else W0, A, N, B)


def base_weight(W0: OutIn, A: RankIn, N: RankRank, B: OutRank, scaling: float) -> OutIn:
    """The frozen weight W0 - s B N A (out, in) for the initial factors, so that W_base + s B N A = W0 (PiSSA's correction).

    Computed in at least float32 and rounded once to the dtype of `W0`.

    Raises:
        ValueError: shapes or dtypes do not fit, or an entry of an argument or of the result is NaN or infinite.
    """
    check_shapes(W0=(W0, "out in"), A=(A, "rank in"), N=(N, "rank rank"), B=(B, "out rank"))
    check_finite(W0=W0, A=A, N=N, B=B)
    if not math.isfinite(scaling):
        raise ValueError(f"scaling is {scaling!r}; needed a finite number")
    # W_base = W0 - s B N A; the difference has the wider of the two precisions
    W_base = (W0 - scaling * (working(B) @ working(N) @ working(A))).to(W0.dtype)
    check_finite(W_base=W_base)
    return W_base


def forward(
    x: Float[Tensor, "... in"],
    W_base: OutIn,
    A: RankIn,
    N: RankRank,
    B: OutRank,
    scaling: float,
    *,
    bias: Float[Tensor, " out"] | None = None,
    mask: Bool[Tensor, "... in"] | None = None,
    p: float = 0.0,
) -> Float[Tensor, "... out"]:
    """The adapted layer: (..., in) -> (..., out). `mask` and `p` are dropout on the adapter's input, as in `lora.forward`.

    Raises ValueError if shapes, dtypes or devices do not fit.
    """
    check_shapes(x=(x, "... in"), W_base=(W_base, "out in"), A=(A, "rank in"), N=(N, "rank rank"), B=(B, "out rank"), bias=(bias, "out"))
    frozen = nn.functional.linear(x, W_base, bias)
    # y = x W_base^T + s ((x A^T) N^T) B^T + b; addmm adds s times the last product while it is formed
    hidden = _drop(x, mask, p) @ A.mT @ N.mT
    return torch.addmm(_rows(frozen), _rows(hidden), B.mT, alpha=scaling).reshape(frozen.shape)


def delta_weight(A: RankIn, N: RankRank, B: OutRank, scaling: float) -> OutIn:
    """The update Delta W = s B N A (out, in). Raises ValueError if the shapes do not fit."""
    check_shapes(A=(A, "rank in"), N=(N, "rank rank"), B=(B, "out rank"))
    return scaling * (B @ N @ A)


def merge(W_base: OutIn, A: RankIn, N: RankRank, B: OutRank, scaling: float) -> OutIn:
    """The merged weight W = W_base + s B N A (out, in).

    Raises:
        ValueError: shapes or dtypes do not fit, or an entry is NaN or infinite.
    """
    check_shapes(W_base=(W_base, "out in"), A=(A, "rank in"), N=(N, "rank rank"), B=(B, "out rank"))
    check_finite(W_base=W_base, A=A, N=N, B=B)
    return W_base + scaling * (B @ N @ A)


def unmerge(W: OutIn, A: RankIn, N: RankRank, B: OutRank, scaling: float) -> OutIn:
    """The frozen weight W_base = W - s B N A (out, in) recovered from a merged one, up to rounding. Raises like `merge`."""
    check_shapes(W=(W, "out in"), A=(A, "rank in"), N=(N, "rank rank"), B=(B, "out rank"))
    check_finite(W=W, A=A, N=N, B=B)
    return W - scaling * (B @ N @ A)


def gradients(G: OutIn, A: RankIn, N: RankRank, B: OutRank, scaling: float) -> Gradients:
    """Gradients of the three factors from G = dL/dW (out, in). Raises ValueError if the shapes do not fit."""
    check_shapes(G=(G, "out in"), A=(A, "rank in"), N=(N, "rank rank"), B=(B, "out rank"))
    # dL = <G, s (dB N A + B dN A + B N dA)>; B^T G and G A^T are formed once
    left, right = scaling * (B.mT @ G), scaling * (G @ A.mT)
    return Gradients(grad_A=N.mT @ left, grad_N=left @ A.mT, grad_B=right @ N.mT)


def sgd_step(G: OutIn, W_base: OutIn, A: RankIn, N: RankRank, B: OutRank, scaling: float, *, lr: float, method: str = "nlora") -> Weights:
    """One step of gradient descent from G = dL/dW: on all three factors, or for `method="inttune"` on N alone.

    What is not trained comes back as it is. Raises ValueError for another method than "nlora", "slora" and "inttune".
    """
    check_shapes(W_base=(W_base, "out in"), G=(G, "out in"))
    check_choice("method", method, METHODS)
    grad_A, grad_N, grad_B = gradients(G, A, N, B, scaling)
    if method == "inttune":
        return Weights(W_base, A, N - lr * grad_N, B)
    return Weights(W_base, A - lr * grad_A, N - lr * grad_N, B - lr * grad_B)


def fit_core(target: OutIn, A: RankIn, B: OutRank, scaling: float) -> RankRank:
    """The N for which s B N A is nearest to `target` in the Frobenius norm: the best that IntTune can do. The smallest, if several are.

    Raises:
        ValueError: shapes or dtypes do not fit, an entry is NaN or infinite, or the scaling is zero or not finite.
    """
    check_shapes(target=(target, "out in"), A=(A, "rank in"), B=(B, "out rank"))
    check_finite(target=target, A=A, B=B)
    if scaling == 0 or not math.isfinite(scaling):
        raise ValueError(f"scaling is {scaling!r}; needed a finite number that is not zero")
    # N = 1/s B^+ T A^+
    N: Tensor = torch.linalg.pinv(working(B)) @ working(target) @ torch.linalg.pinv(working(A)) / scaling
    return N.to(target.dtype)


def export(A: RankIn, N: RankRank, B: OutRank) -> lora.Factors:
    """The same update in LoRA's format, N folded into B: A as it is and B N. The frozen weight must be `W_base`."""
    check_shapes(A=(A, "rank in"), N=(N, "rank rank"), B=(B, "out rank"))
    return lora.Factors(A=A, B=B @ N)


def export_residual(A: RankIn, N: RankRank, B: OutRank, A0: RankIn, N0: RankRank, B0: OutRank) -> Exported:
    """What training from a residual start has added to W0, B N A - B0 N0 A0, as LoRA factors of twice the rank, for the same s."""
    check_shapes(A=(A, "rank in"), N=(N, "rank rank"), B=(B, "out rank"), A0=(A0, "rank in"), N0=(N0, "rank rank"), B0=(B0, "out rank"))
    return Exported(A=torch.cat([A, A0]), B=torch.cat([B @ N, -B0 @ N0], dim=1))


def num_trainable(W0: OutIn, *, rank: int, method: str = "nlora") -> int:
    """Number of trainable parameters beside `W0`: rank (out + in) + rank^2, for "inttune" rank^2, for "lora" rank (out + in).

    Raises ValueError if `W0` is no floating-point matrix, `rank` is not in 1..min(out, in), or the method is unknown.
    """
    check_choice("method", method, (*METHODS, "lora"))
    factors = lora.num_trainable(W0, rank=rank)
    return factors * (method != "inttune") + rank * rank * (method != "lora")


class SLoRALinear(nn.Module):
    """A frozen `nn.Linear` with s B N A beside it: (..., in) -> (..., out), s = alpha / rank.

    `method` is "nlora" (default), "slora" or "inttune": how the factors start and whether A and B are trained. `core`, by default
    "block", is the one of `init` or, for "slora" (by default "kaiming"), of `init_slora`; `generator` is for "slora" alone,
    `residual`, `rows`, `cols` and `rcond` are for the others. The weight of `base` is frozen in place, and corrected in place with
    `residual=True`. `dropout` (default 0) acts on the adapter's input, in training only. The factors
    may be made more precise than the weight, as in `lora.LoRALinear`: used in the precision of x, trained and merged in their own.

    Raises:
        ValueError: as in `init` or `init_slora`, `method` is unknown, or `dropout` is not in [0, 1).
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int,
        alpha: float,
        method: str = "nlora",
        core: str | None = None,
        residual: bool = False,
        rows: Tensor | None = None,
        cols: Tensor | None = None,
        rcond: float | None = None,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_choice("method", method, METHODS)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout!r}; needed a probability from 0 to below 1")
        self.base, self.scaling, self.dropout, self.merged = base.requires_grad_(False), scaling_factor(alpha, rank), dropout, False
        W0 = base.weight
        if method == "slora":
            start = Weights(W0, *init_slora(W0, rank=rank, core="kaiming" if core is None else core, generator=generator))
        else:
            options = {"residual": residual, "rows": rows, "cols": cols, "rcond": rcond}
            start = init(W0, self.scaling, rank=rank, core="block" if core is None else core, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            base.weight.copy_(start.W_base)
        self.A = nn.Parameter(start.A, requires_grad=method != "inttune")
        self.N = nn.Parameter(start.N)
        self.B = nn.Parameter(start.B, requires_grad=method != "inttune")

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if self.merged:
            return nn.functional.linear(x, self.base.weight, self.base.bias)
        mask = draw_mask(x, p=self.dropout) if self.training and self.dropout > 0 else None
        A, N, B = (factor.to(x.dtype) for factor in (self.A, self.N, self.B))
        return forward(x, self.base.weight, A, N, B, self.scaling, bias=self.base.bias, mask=mask, p=self.dropout)

    @torch.no_grad()
    def merge(self) -> None:
        """Add s B N A to the base weight, after which the layer costs what `base` costs. Merging twice does nothing."""
        if not self.merged:
            self.base.weight.copy_(merge(self.base.weight.to(self.A.dtype), self.A, self.N, self.B, self.scaling))
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take s B N A out of the base weight again, up to rounding. Does nothing if the layer is not merged."""
        if self.merged:
            self.base.weight.copy_(unmerge(self.base.weight.to(self.A.dtype), self.A, self.N, self.B, self.scaling))
            self.merged = False


def _block_svd(K: Tensor, rcond: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U, singular values, V^T of the landmark block, and the inverses of the values, 0 for those that count as zero."""
    if rcond is not None and not 0 <= rcond < 1:
        raise ValueError(f"rcond is {rcond!r}; needed a number from 0 to below 1, or None to refuse a singular block")
    U, values, Vh = torch.linalg.svd(K)
    cutoff = (1e-12 if K.dtype == torch.float64 else 1e-6) if rcond is None else rcond
    kept = values > cutoff * values[0]
    if rcond is None and not kept.all():
        raise ValueError(
            f"W0 has a landmark block that cannot be inverted: its smallest singular value is {values[-1].item():.3g}, its largest "
            f'{values[0].item():.3g}; choose other rows or cols, leave such directions out with rcond={cutoff:g}, or use core="block"'
        )
    return U, values, Vh, kept / torch.where(kept, values, 1.0)


def _inverse(K: Tensor, rcond: float | None) -> Tensor:
    """The inverse of the landmark block, or its pseudo-inverse with the cut-off `rcond`."""
    U, _, Vh, inverse = _block_svd(K, rcond)
    return Vh.mT * inverse @ U.mT


def _landmarks(name: str, given: Tensor | None, rank: int, W0: Tensor, axis: int) -> Tensor:
    """An index set on the device of W0, once it is clear that it holds `rank` different indices of that axis."""
    size = W0.shape[axis]
    if given is None:
        return torch.arange(rank, device=W0.device)
    whole = isinstance(given, Tensor) and not given.is_floating_point() and not given.is_complex() and given.dtype != torch.bool
    if not whole or given.shape != (rank,) or len(set(given.tolist()) & set(range(size))) != rank:
        raise ValueError(f"{name} is {given!r}; needed a tensor of {rank} different whole numbers from 0 to {size - 1}")
    return given.to(W0.device, torch.int64)  # torch takes uint8 for a mask


if __name__ == "__main__":
    W0 = torch.randn(16, 24) / 24**0.5
    for core in CORES:
        for residual in (False, True):
            weights = init(W0, rank=4, core=core, residual=residual)
            moved = (merge(*weights, 1.0) - W0).norm() / W0.norm()
            print(f'core="{core}", residual={residual}: the weight starts {100 * moved.item():.1f} % away from W0')
    print("trainable:", {method: num_trainable(W0, rank=4, method=method) for method in ("lora", *METHODS)})
