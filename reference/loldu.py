r"""LoLDU: factor the weight by LU with pivoting, and train only the diagonal between the triangles.

Shi et al. write W0 = P L diag(D) U (lower-diagonal-upper), keep the leading `rank` columns of L, pivots and rows of U, and train
only the diagonal, `rank` numbers. What the leading part does not hold stays in a frozen residual, so training starts at W0.

| here             | paper, code      | shape       | meaning                                            |
|------------------|------------------|-------------|----------------------------------------------------|
| `W0`             | W                | (out, in)   | pretrained weight                                  |
| `W_base`         | residual         | (out, in)   | frozen: W0 less the leading part at the start      |
| `U`              | U                | (rank, in)  | frozen, unit upper triangular                      |
| `z`              | `vector_z`       | (rank)      | the trained diagonal; `D` are the pivots           |
| `L`              | L                | (out, rank) | frozen, unit lower triangular in pivot order       |
| `P`              | P                | (out)       | whole numbers; P L is the matrix `L[P]`            |
| `scaling`        | sigma            | number      | alpha / rank, `scaling_factor`                     |
| `noise`          | -                | (rank)      | what random initialisations of `z` are made from   |

Where paper and code differ (`SKDDJ/LoLDU`), and what is left open:

- The official code subtracts the leading part with the start of z for `lu`, `uniform`, `normal` and `constant`, but with the
  pivots for `ones`, `zeros`, `s_uniform` and `s_normal`: there the model does not start at W0. Here the start is subtracted
  for every name (`preserve=True`), or the pivots (`preserve=False`), as the code does for those four.
- Official `disable` and `remove` leave the residual, not W0. `restore` gives W0 back; the layer here keeps it all along.
- A zero pivot gives NaN or infinity there; one that is zero but for rounding, huge factors. Both are errors here. Only the
  leading `rank` pivots have to be non-zero.
- sigma is a parameter there that the optimizer is not given. Here `train_scaling` chooses; the default is the same.
- The start by `lu` is the default of the code. That the paper's tables use it is an inference.
- The paper speaks of orthogonality. P is orthogonal; L and U are not.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ._checks import check_choice, check_finite, check_positive, check_rank, check_shapes
from ._linalg import working
from ._paper import Paper

PAPER = Paper(
    slug="loldu",
    name="LoLDU",
    title="LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
    authors=("Yiming Shi", "Jiwei Wei", "Yujia Wu", "Ran Ran", "Chengwei Sun", "Shiyuan He", "Yang Yang"),
    venue="arXiv",
    year=2024,
    arxiv="2410.13618",
    official_code="SKDDJ/LoLDU",
    family="structure",
    bibtex_key="shi2024loldu",
)

# The noise that an initialisation of the diagonal is made from, or none
NOISE: dict[str, str | None] = {"lu": None, "uniform": "uniform", "normal": "normal", "constant": None}
NOISE |= {"ones": None, "zeros": None, "s_uniform": "uniform", "s_normal": "normal"}
DIAGONALS = tuple(NOISE)


class LDU(NamedTuple):
    """The whole factorisation, from the input side to the output side; small is min(out, in)."""

    U: Float[Tensor, "small in"]
    D: Float[Tensor, " small"]
    L: Float[Tensor, "out small"]
    P: Int[Tensor, " out"]


class Weights(NamedTuple):
    """All weights of one layer; only z is trained."""

    W_base: Float[Tensor, "out in"]
    U: Float[Tensor, "rank in"]
    z: Float[Tensor, " rank"]
    L: Float[Tensor, "out rank"]
    P: Int[Tensor, " out"]


class Gradients(NamedTuple):
    """Gradients of the loss in what may be trained."""

    grad_z: Float[Tensor, " rank"]
    grad_scaling: Float[Tensor, ""]


def scaling_factor(alpha: float, rank: int) -> float:
    """The number sigma = alpha / rank that multiplies the leading part. The official layers are made with alpha = 1.

    Raises ValueError if `rank` is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank!r}; needed a whole number of at least 1")
    return alpha / rank


def ldu(W0: Float[Tensor, "out in"]) -> LDU:
    """The factors of W0 = (L diag(D) U)[P]: U (small, in), D (small), L (out, small) and P (out), with small = min(out, in).

    L and U have ones on their diagonals, and no entry of L exceeds 1: rows are pivoted. Without ties the pivots D and U are
    unique. Half precision is factored in float32. Source: the paper's section on the method, official `loldu.py`.

    Raises:
        ValueError: W0 is no floating-point matrix, has an entry that is NaN or infinite, or a pivot is zero but for rounding.
    """
    check_shapes(W0=(W0, "out in"))
    U, D, L, P = _factorise(W0, min(W0.shape))
    return LDU(_stored("U", U, W0), _stored("D", D, W0), _stored("L", L, W0), P)


def _factorise(W0: Tensor, rank: int) -> LDU:
    """The leading part of the factorisation, in at least float32."""
    check_finite(W0=W0)
    swaps, L, upper = torch.linalg.lu(working(W0))  # W0 = swaps L upper, with |L| at most 1
    D = upper.diagonal()[:rank]
    # What is left of a column that depends on those before it is rounding
    rounding = 10 * max(W0.shape) * torch.finfo(upper.dtype).eps * upper.abs().max()
    if len(zero := (D.abs() <= rounding).nonzero()):
        others = f"a rank of at most {int(zero[0])}, " if zero[0] else ""
        raise ValueError(
            f"W0 has a zero pivot at position {int(zero[0]) + 1} of {min(W0.shape)}: but for rounding the column there depends on "
            f"those before it, and its row of U would be divided by zero; use {others}a method without pivots, or leave the layer out"
        )
    # The LU's upper triangle is diag(D) U: each row is divided by its pivot
    U = upper[:rank] / D[:, None]
    # Row i of `swaps` has its one in column P_i, so (swaps L)_i = L_{P_i}
    return LDU(U, D, L[:, :rank], swaps.argmax(dim=1))


def draw_noise(
    W0: Float[Tensor, "out in"], *, rank: int, distribution: str = "normal", generator: torch.Generator | None = None
) -> Float[Tensor, " rank"]:
    """Draw the `noise` (rank) of a random initialisation, in dtype and on the device of `W0`.

    `distribution` is "normal" (mean 0, standard deviation 1) or "uniform" (from -1 to 1); `NOISE` says which one an initialisation needs.

    Raises:
        ValueError: `rank` is not in 1..min(out, in), or the distribution is unknown.
    """
    check_shapes(W0=(W0, "out in"))
    check_rank(rank, W0)
    check_choice("distribution", distribution, ("normal", "uniform"))
    drawn = W0.new_empty(rank)
    return drawn.normal_(generator=generator) if distribution == "normal" else drawn.uniform_(-1, 1, generator=generator)


def init_diagonal(
    D: Float[Tensor, " rank"], *, diagonal: str = "lu", noise: Float[Tensor, " rank"] | None = None
) -> Float[Tensor, " rank"]:
    """The start of z (rank) from the leading pivots D (rank), under the eight names of the official code.

    With mu the mean of D: "lu" (default) D itself, "constant" mu, "ones", "zeros"; with the `noise` e of `draw_noise`, "uniform"
    e |mu| / 2, "normal" mu + e std(D) (unbiased), "s_uniform" and "s_normal" e. The other four do not look at `noise`.

    Raises:
        ValueError: the name is unknown, the noise that it needs is missing or does not fit, or "normal" has one pivot only.
    """
    check_shapes(D=(D, "rank"), noise=(noise, "rank"))
    check_choice("diagonal", diagonal, DIAGONALS)
    if not NOISE[diagonal]:
        starts: dict[str, Tensor | float] = {"lu": D, "constant": D.mean(), "ones": 1.0, "zeros": 0.0}
        return torch.ones_like(D) * starts[diagonal]
    if noise is None:
        raise ValueError(f"noise is missing; for the diagonal {diagonal!r} use draw_noise(..., distribution={NOISE[diagonal]!r})")
    if diagonal == "normal" and len(D) < 2:
        raise ValueError("diagonal is 'normal' and D has one pivot, whose width is not defined; use a rank of 2 or more")
    if diagonal == "normal":
        return D.mean() + noise * D.std()  # N(mu, std(D)^2)
    # U(-|mu|/2, |mu|/2), or the noise itself
    return noise * (D.mean().abs() / 2 if diagonal == "uniform" else 1.0)


def init(
    W0: Float[Tensor, "out in"],
    scaling: float = 1.0,
    *,
    rank: int,
    diagonal: str = "lu",
    noise: Float[Tensor, " rank"] | None = None,
    preserve: bool = True,
) -> Weights:
    """All weights at the start: W_base (out, in), U (rank, in), z (rank), L (out, rank), P (out).

    The factors are the leading ones in the order of elimination, not those with the largest pivots. `diagonal` and `noise` as
    in `init_diagonal`. With `preserve` (default) the layer starts at W0 for every diagonal. Without, the residual is made with
    the pivots instead of z, as in the official code for "ones", "zeros", "s_uniform" and "s_normal".

    Raises:
        ValueError: `rank` is not in 1..min(out, in), W0 is not finite, a leading pivot is zero but for rounding, `scaling` is not
            positive, or as `init_diagonal`.
    """
    (U, subtracted, L, P), z = _start(W0, scaling, rank, diagonal, noise, preserve)
    # W_res = W0 - sigma P L_r diag(z_0) U_r, with the factors as they are stored, so that their rounding cancels
    leading = delta_weight(working(U), working(subtracted), working(L), P, scaling)
    return Weights(_stored("W_base", W0 - leading, W0), U, z, L, P)


def _start(W0: Tensor, scaling: float, rank: int, diagonal: str, noise: Tensor | None, preserve: bool) -> tuple[LDU, Tensor]:
    """The leading factors, with the diagonal that the residual is made with in place of D, and the start of z; as stored."""
    check_positive("scaling", scaling)
    check_shapes(W0=(W0, "out in"), noise=(noise, "rank"))
    check_rank(rank, W0)
    U, D, L, P = _factorise(W0, rank)
    z = init_diagonal(D, diagonal=diagonal, noise=None if noise is None else noise.to(D))
    D = z if preserve else D
    return LDU(_stored("U", U, W0), _stored("D", D, W0), _stored("L", L, W0), P), _stored("z", z, W0)


def forward(
    x: Float[Tensor, "... in"],
    W_base: Float[Tensor, "out in"],
    U: Float[Tensor, "rank in"],
    z: Float[Tensor, " rank"],
    L: Float[Tensor, "out rank"],
    P: Int[Tensor, " out"],
    scaling: float,
    *,
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "... out"]:
    """The adapted layer: (..., in) -> (..., out). Raises ValueError if shapes, dtypes or devices do not fit."""
    check_shapes(x=(x, "... in"), W_base=(W_base, "out in"), U=(U, "rank in"), z=(z, "rank"), L=(L, "out rank"), bias=(bias, "out"))
    _check_index(P, L)
    # y = W_res x + sigma P L_r diag(z) U_r x, through the rank: rows of x meet U^T, then z, then (P L)^T
    return nn.functional.linear(x, W_base, bias) + ((x @ U.mT) * (scaling * z)) @ L[P].mT


def delta_weight(
    U: Float[Tensor, "rank in"], z: Float[Tensor, " rank"], L: Float[Tensor, "out rank"], P: Int[Tensor, " out"], scaling: float
) -> Float[Tensor, "out in"]:
    """The trained part sigma P L diag(z) U (out, in). It is not zero at the start. Raises ValueError if the shapes do not fit."""
    check_shapes(U=(U, "rank in"), z=(z, "rank"), L=(L, "out rank"))
    _check_index(P, L)
    return (L[P] * (scaling * z)) @ U


def merge(
    W_base: Float[Tensor, "out in"],
    U: Float[Tensor, "rank in"],
    z: Float[Tensor, " rank"],
    L: Float[Tensor, "out rank"],
    P: Int[Tensor, " out"],
    scaling: float,
) -> Float[Tensor, "out in"]:
    """The merged weight W = W_res + sigma P L diag(z) U (out, in).

    Raises:
        ValueError: shapes or dtypes do not fit, an entry is NaN or infinite, or P does not hold each row once.
    """
    check_shapes(W_base=(W_base, "out in"), U=(U, "rank in"), L=(L, "out rank"))
    _check_index(P, L, values=True)
    check_finite(W_base=W_base, U=U, z=z, L=L)
    return W_base + delta_weight(U, z, L, P, scaling)


def unmerge(
    W: Float[Tensor, "out in"],
    U: Float[Tensor, "rank in"],
    z: Float[Tensor, " rank"],
    L: Float[Tensor, "out rank"],
    P: Int[Tensor, " out"],
    scaling: float,
) -> Float[Tensor, "out in"]:
    """The residual W_base = W - sigma P L diag(z) U (out, in) from a merged weight, up to rounding. Raises as `merge`."""
    check_shapes(W=(W, "out in"), U=(U, "rank in"), L=(L, "out rank"))
    _check_index(P, L, values=True)
    check_finite(W=W, U=U, z=z, L=L)
    return W - delta_weight(U, z, L, P, scaling)


def restore(
    W_base: Float[Tensor, "out in"],
    U: Float[Tensor, "rank in"],
    z: Float[Tensor, " rank"],
    L: Float[Tensor, "out rank"],
    P: Int[Tensor, " out"],
    scaling: float,
) -> Float[Tensor, "out in"]:
    """The pretrained weight W0 (out, in), up to rounding, from the residual and the diagonal `z` that it was made with.

    That is the start of z, or the pivots without `preserve`; the scaling is the one of the start. Disabling or removing the adapter
    has to give this, not the residual. Raises ValueError as `merge` does, for NaN and infinite entries too.
    """
    return merge(W_base, U, z, L, P, scaling)


def gradients(
    G: Float[Tensor, "out in"],
    U: Float[Tensor, "rank in"],
    z: Float[Tensor, " rank"],
    L: Float[Tensor, "out rank"],
    P: Int[Tensor, " out"],
    scaling: float,
) -> Gradients:
    """Gradients of z (rank) and of the scaling (one number, the residual held fixed) from G = dL/dW (out, in)."""
    check_shapes(G=(G, "out in"), U=(U, "rank in"), z=(z, "rank"), L=(L, "out rank"))
    _check_index(P, L)
    # l_i^T G u_i^T for every i, with l_i the columns of P L and u_i the rows of U
    inner = ((L[P].mT @ G) * U).sum(dim=1)
    # dL/dz_i = sigma l_i^T G u_i^T; dL/dsigma = sum_i z_i l_i^T G u_i^T
    return Gradients(grad_z=scaling * inner, grad_scaling=(z * inner).sum())


def fit_diagonal(
    target: Float[Tensor, "out in"],
    U: Float[Tensor, "rank in"],
    L: Float[Tensor, "out rank"],
    P: Int[Tensor, " out"],
    scaling: float,
) -> Float[Tensor, " rank"]:
    """The diagonal z (rank) for which sigma P L diag(z) U is nearest to `target` (out, in) in the Frobenius norm.

    Raises:
        ValueError: shapes do not fit, an entry is not finite, P does not hold each row once, `scaling` is zero or not finite, or the
            terms depend on each other but for rounding, so that there is no one best diagonal.
    """
    check_shapes(target=(target, "out in"), U=(U, "rank in"), L=(L, "out rank"))
    _check_index(P, L, values=True)
    check_finite(target=target, U=U, L=L)
    right, left, wanted = working(U), working(L)[P], working(target)
    # sigma^2 [(L^T L) o (U U^T)] z = sigma (l_i^T T u_i^T)_i; the Gram matrix is positive definite
    gram, inner = (left.mT @ left) * (right @ right.mT), ((left.mT @ wanted) * right).sum(dim=1)
    z = torch.linalg.solve_ex(scaling**2 * gram, scaling * inner).result
    # Of terms of unit length the eigenvalues say how nearly one depends on the others; one that is zero has no finite z already
    lengths, rounding = gram.diagonal().sqrt(), 10 * len(gram) * torch.finfo(gram.dtype).eps
    if not z.isfinite().all() or torch.linalg.eigvalsh(gram / lengths / lengths[:, None])[0] <= rounding:
        raise ValueError(f"no best diagonal for scaling {scaling!r}, U and L; needed a finite scaling, not zero, and factors of full rank")
    return _stored("z", z, target)


def num_trainable(W0: Float[Tensor, "out in"], *, rank: int, train_scaling: bool = False) -> int:
    """Number of trainable parameters beside the frozen ones: rank, and one more if the scaling is trained.

    Raises ValueError if `W0` is no floating-point matrix or `rank` is not in 1..min(out, in).
    """
    check_shapes(W0=(W0, "out in"))
    check_rank(rank, W0)
    return rank + train_scaling


class LoLDULinear(nn.Module):
    """A frozen `nn.Linear` with a trained diagonal between its LU factors: (..., in) -> (..., out). Only `z` (rank) is trained.

    Computes W0 x + P L diag(sigma z - sigma_0 z_0) U x, which is the paper's form with the residual written out (z_0 is D with
    `preserve=False`). So `base` keeps W0, nothing ever changes it, and `disable()` and `unmerge()` restore it bit for bit.
    `scaling` starts at alpha / rank and is a second parameter with `train_scaling`. The other options as in `init`; the noise is
    drawn with `generator`. The factors may be made more precise than the weight, as in `layer.z.data = layer.z.data.float()`
    beside bfloat16: they are used in the precision of x, and trained and merged in that of z.

    Raises:
        ValueError: as `init`.
    """

    U: Tensor
    L: Tensor
    P: Tensor
    z0: Tensor
    scaling0: Tensor
    merged: Tensor | None

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int,
        alpha: float = 1.0,
        diagonal: str = "lu",
        preserve: bool = True,
        train_scaling: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        W0, scaling = base.weight.detach(), scaling_factor(alpha, rank)
        kind = NOISE.get(diagonal)
        noise = draw_noise(W0, rank=rank, distribution=kind, generator=generator) if kind else None
        (U, z0, L, P), z = _start(W0, scaling, rank, diagonal, noise, preserve)
        self.base = base.requires_grad_(False)
        self.scaling = nn.Parameter(W0.new_tensor(scaling), requires_grad=train_scaling)
        self.z = nn.Parameter(z)
        for name, factor in {"U": U, "L": L, "P": P, "z0": z0, "scaling0": self.scaling.detach().clone()}.items():
            self.register_buffer(name, factor)
        self.register_buffer("merged", None, persistent=False)
        self.enabled = True

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        W = self.merged if self.enabled else self.base.weight
        if W is not None:
            return nn.functional.linear(x, W, self.base.bias)
        U, change, L = (factor.to(x.dtype) for factor in (self.U, self._change(), self.L))
        return forward(x, self.base.weight, U, change, L, self.P, 1.0, bias=self.base.bias)

    def _change(self) -> Tensor:
        """The diagonal that is added to W0's own, scaling included; exactly zero at the start with `preserve`."""
        return self.scaling * self.z - self.scaling0 * self.z0.to(self.z.dtype)

    def disable(self) -> None:
        """Compute the pretrained layer W0 x + b, whatever was trained or merged, until `enable()`."""
        self.enabled = False

    def enable(self) -> None:
        """Use the adapter again."""
        self.enabled = True

    @torch.no_grad()
    def merge(self) -> None:
        """Keep the merged weight beside W0, after which the layer costs what `base` costs. Training goes on after `unmerge()`."""
        W0, U, change, L = (t.to(self.z.dtype) for t in (self.base.weight, self.U, self._change(), self.L))
        self.merged = merge(W0, U, change, L, self.P, 1.0).to(self.base.weight.dtype)

    def unmerge(self) -> None:
        """Drop the merged weight: the layer is W0 and the factors again, without any rounding."""
        self.merged = None


def _stored(name: str, tensor: Tensor, W0: Tensor) -> Tensor:
    """A result in the dtype of W0, row by row in memory of its own; an error where that dtype cannot hold it."""
    stored = tensor.to(W0.dtype).clone(memory_format=torch.contiguous_format)
    if not stored.isfinite().all():
        raise ValueError(f"{name} is beyond the range of {W0.dtype}: W0 has a pivot close to zero; use a smaller rank or W0.float()")
    return stored


def _check_index(P: Tensor, L: Tensor, *, values: bool = False) -> None:
    """Check dtype, shape and device of P, and with `values`, for set-up functions only, that it holds each row once."""
    if P.dtype != torch.int64 or P.shape != L.shape[:1] or P.device != L.device:
        raise ValueError(f"P is {P.dtype} {tuple(P.shape)} on {P.device}; needed torch.int64 ({len(L)},), as L has rows, on {L.device}")
    if values and not torch.equal(P.sort().values, torch.arange(len(P), device=P.device)):
        raise ValueError(f"P is no permutation; needed each of 0..{len(P) - 1} once, such that P L = L[P]")


if __name__ == "__main__":
    layer = LoLDULinear(nn.Linear(24, 16), rank=8)
    W0 = layer.base.weight.detach()
    print("trainable:", sum(p.numel() for p in layer.parameters() if p.requires_grad), "instead of", W0.numel())
    weights = init(W0, 1 / 8, rank=8, diagonal="ones", preserve=False)
    print(f"start at ones without `preserve`: off by {(merge(*weights, 1 / 8) - W0).norm() / W0.norm():.0%}")
