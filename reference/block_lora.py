r"""Block-LoRA: split the rank of LoRA into blocks, let all of them share one down-projection, and add up their up-projections.

Zhou et al. split B and A along the rank into `blocks` pairs and give all pairs the same A: fewer numbers to train, and b - 1
products that become one sum of matrices. The blocks enter through their sum alone, so the layer is LoRA of rank r / b with the same
s, trained with a learning rate of B that is b times as large (`to_compact_lora`, `compact_settings`; our derivation).

| here             | paper            | shape       | meaning                                            |
|------------------|------------------|-------------|----------------------------------------------------|
| `W0`             | W                | (out, in)   | pretrained weight, frozen (the paper writes x W)   |
| `rank`, `blocks` | r, n             | numbers     | nominal rank r, number of blocks b; b divides r    |
| `A`              | A_s              | (block_rank, in) | shared down-projection, block_rank = r / b    |
| `B`              | B_1 ... B_n      | (blocks, out, block_rank) | up-projections, one for each block   |
| `scaling`        | -                | number      | s, which multiplies the sum of all blocks          |
| `G`              | -                | (out, in)   | dL/dW, the gradient of the merged weight           |

No official code was found, and the paper is known here through secondary sources alone. So this is inferred:

- Blocks along the rank, as the paper's shapes, one shared A_s and its talk of "matrix additions" suggest: we hold that at
  about 80 %. The other reading, blocks along the features, is `delta_weight_features`; it stores as many numbers.
- The start (A as in LoRA, blocks zero) and the scaling are those of LoRA and of CLIP-LoRA, whose protocol the paper follows:
  about 75 %. The default is alpha / r with the nominal r, this project's; CLIP-LoRA has alpha / sqrt(r) (`rslora`). Whether the
  paper's r is the nominal one is unknown: `per_block` takes r / b. The authors' own r and b are unknown too.
- The bound is that of Zhu et al. 2024 (arXiv 2402.16842) for LoRA, with the parameters counted anew: about 75 %.
- Dropout, from CLIP-LoRA: one mask on the input of the shared A. A mask of its own for each block would undo the equivalence.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from . import lora
from ._checks import check_choice, check_finite, check_positive, check_rank, check_shapes
from ._linalg import working
from ._paper import Paper

PAPER = Paper(
    slug="block_lora",
    name="Block-LoRA",
    title="One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot Learning",
    authors=("Chunpeng Zhou", "Qianqian Shen", "Zhi Yu", "Jiajun Bu", "Haishuai Wang"),
    venue="arXiv",
    year=2025,
    arxiv="2501.16720",
    official_code="none",
    family="structure",
    bibtex_key="zhou2025blocklora",
)

ORDERS = ("add_first", "blockwise")


class Factors(NamedTuple):
    """The trainable factors."""

    A: Float[Tensor, "block_rank in"]
    B: Float[Tensor, "blocks out block_rank"]


class Gradients(NamedTuple):
    """Gradients of the loss in the factors."""

    grad_A: Float[Tensor, "block_rank in"]
    grad_B: Float[Tensor, "blocks out block_rank"]


class LoRAFactors(NamedTuple):
    """The factors of a plain LoRA that is the same layer."""

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]


class Settings(NamedTuple):
    """Learning rates and weight decays of two factors."""

    lr_A: float
    lr_B: float
    weight_decay_A: float
    weight_decay_B: float


class Operations(NamedTuple):
    """Scalar operations."""

    multiplications: int
    additions: int


def scaling_factor(alpha: float, rank: int, *, blocks: int, rslora: bool = False, per_block: bool = False) -> float:
    """The number s: alpha / rank, alpha / sqrt(rank) with `rslora` (CLIP-LoRA's), of the nominal rank or, `per_block`, of rank / blocks.

    Raises ValueError if `rank` or `blocks` is below 1, or `blocks` does not divide `rank`.
    """
    block_rank = _block_rank(rank, blocks)
    return lora.scaling_factor(alpha, block_rank if per_block else rank, rslora=rslora)


def init(W0: Float[Tensor, "out in"], *, rank: int, blocks: int, generator: torch.Generator | None = None) -> Factors:
    """The factors at the start: A (rank / blocks, in) uniform, |A_ij| <= 1 / sqrt(in), as in LoRA; all blocks of B zero.

    `rank` is the nominal one. The factors have dtype and device of `W0`. The start is inferred from CLIP-LoRA.

    Raises:
        ValueError: `rank` is not in 1..min(out, in), `blocks` does not divide it, or `W0` is not a finite matrix.
    """
    check_shapes(W0=(W0, "out in"))
    check_rank(rank, W0)
    A, B = lora.init(W0, rank=_block_rank(rank, blocks), generator=generator)
    # B_i = 0 for every i, so that W0 + s (sum_i B_i) A_s = W0
    return Factors(A, B.new_zeros(blocks, *B.shape))


def forward(
    x: Float[Tensor, "... in"],
    W0: Float[Tensor, "out in"],
    A: Float[Tensor, "block_rank in"],
    B: Float[Tensor, "blocks out block_rank"],
    scaling: float,
    *,
    bias: Float[Tensor, " out"] | None = None,
    mask: Bool[Tensor, "... in"] | None = None,
    p: float = 0.0,
    order: str = "add_first",
) -> Float[Tensor, "... out"]:
    """The adapted layer: (..., in) -> (..., out).

    `order` is "add_first" (default: the blocks are added once, then there is one product) or "blockwise" (a product for each
    block, then the sum): equal up to rounding, at different cost (`mult_adds`). `mask` and `p` are dropout on the input of A,
    one mask for all blocks, as in `lora.forward`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the order is unknown.
    """
    check_shapes(x=(x, "... in"), W0=(W0, "out in"), A=(A, "block_rank in"), B=(B, "blocks out block_rank"), bias=(bias, "out"))
    check_choice("order", order, ORDERS)
    frozen = nn.functional.linear(x, W0, bias)
    # z = A_s x, once for all blocks; under dropout with one mask
    hidden = (lora._drop(x, mask, p) @ A.mT).reshape(-1, A.shape[0])
    # y = W0 x + s (sum_i B_i) z with one sum of matrices for all rows of x, or y = W0 x + s sum_i (B_i z)
    y = frozen.reshape(-1, B.shape[1])
    for up in (B.sum(dim=0),) if order == "add_first" else B:
        y = torch.addmm(y, hidden, up.mT, alpha=scaling)
    return y.reshape(frozen.shape)


def delta_weight(A: Float[Tensor, "block_rank in"], B: Float[Tensor, "blocks out block_rank"], scaling: float) -> Float[Tensor, "out in"]:
    """The update Delta W = s (sum_i B_i) A_s (out, in), of rank at most rank / blocks. Raises ValueError if shapes do not fit."""
    check_shapes(A=(A, "block_rank in"), B=(B, "blocks out block_rank"))
    return scaling * (B.sum(dim=0) @ A)


def delta_weight_features(
    A: Float[Tensor, "rank in_block"], B: Float[Tensor, "blocks out_block rank"], scaling: float
) -> Float[Tensor, "out in"]:
    """The update (out, in) if blocks were cut along the features, the reading that is not the default here.

    Then B is the blocks one below the other, and the input is cut into as many pieces, which share A: Delta W is s times that tall
    matrix times a row of copies of A. It has rank up to `rank`, stores as many numbers as the default, and sees of x only the sum
    of its pieces.
    """
    check_shapes(A=(A, "rank in_block"), B=(B, "blocks out_block rank"))
    # out = blocks * out_block, in = blocks * in_block; A x = A_s sum_j x_j
    return scaling * (B.flatten(0, 1) @ A).repeat(1, B.shape[0])


def merge(
    W0: Float[Tensor, "out in"], A: Float[Tensor, "block_rank in"], B: Float[Tensor, "blocks out block_rank"], scaling: float
) -> Float[Tensor, "out in"]:
    """The merged weight W = W0 + s (sum_i B_i) A_s (out, in). Raises ValueError if shapes do not fit or an entry is not finite."""
    check_shapes(W0=(W0, "out in"), A=(A, "block_rank in"), B=(B, "blocks out block_rank"))
    check_finite(W0=W0, A=A, B=B)
    return W0 + scaling * (B.sum(dim=0) @ A)


def unmerge(
    W: Float[Tensor, "out in"], A: Float[Tensor, "block_rank in"], B: Float[Tensor, "blocks out block_rank"], scaling: float
) -> Float[Tensor, "out in"]:
    """The pretrained weight W0 = W - s (sum_i B_i) A_s (out, in), up to rounding. Raises like `merge`."""
    check_shapes(W=(W, "out in"), A=(A, "block_rank in"), B=(B, "blocks out block_rank"))
    check_finite(W=W, A=A, B=B)
    return W - scaling * (B.sum(dim=0) @ A)


def gradients(
    G: Float[Tensor, "out in"], A: Float[Tensor, "block_rank in"], B: Float[Tensor, "blocks out block_rank"], scaling: float
) -> Gradients:
    """Gradients of A (rank / blocks, in) and of every block (blocks, out, rank / blocks) from G = dL/dW: all blocks have the same.

    Raises ValueError if the shapes do not fit.
    """
    check_shapes(G=(G, "out in"), A=(A, "block_rank in"), B=(B, "blocks out block_rank"))
    # dL/dA_s = s (sum_i B_i)^T G, and dL/dB_i = s G A_s^T for every i
    return Gradients(grad_A=scaling * (B.sum(dim=0).mT @ G), grad_B=(scaling * (G @ A.mT)).repeat(B.shape[0], 1, 1))


def to_lora(A: Float[Tensor, "block_rank in"], B: Float[Tensor, "blocks out block_rank"]) -> LoRAFactors:
    """The LoRA of the nominal rank that is the same layer: A stacked `blocks` times (rank, in), the blocks side by side (out, rank).

    Raises ValueError if the shapes do not fit.
    """
    check_shapes(A=(A, "block_rank in"), B=(B, "blocks out block_rank"))
    # B A = [B_1 ... B_b] [A_s; ...; A_s] = sum_i B_i A_s
    return LoRAFactors(A.repeat(B.shape[0], 1), torch.cat(B.unbind(), dim=1))


def to_compact_lora(A: Float[Tensor, "block_rank in"], B: Float[Tensor, "blocks out block_rank"]) -> LoRAFactors:
    """The LoRA of rank rank / blocks that is the same layer: A as it is, and the sum of the blocks (out, rank / blocks).

    Trained with `compact_settings` and the same scaling it stays the same layer at every step. Raises ValueError if the shapes do not fit.
    """
    check_shapes(A=(A, "block_rank in"), B=(B, "blocks out block_rank"))
    return LoRAFactors(A.clone(), B.sum(dim=0))


def compact_settings(lr: float, *, blocks: int, weight_decay: float = 0.0) -> Settings:
    """With what learning rates and decays LoRA of rank r / b trains as Block-LoRA does with `lr` and `weight_decay`.

    Exact for every optimizer whose step treats entries one by one and is linear in the weights (SGD, momentum, Adam, AdamW), from
    any start; where decay enters the gradient of an adaptive optimizer (Adam with L2), from equal blocks. Not for clipping by the
    norm of all gradients, which counts that of B b times, nor for optimizers that look at a tensor's norm. Our derivation.

    Raises ValueError if `blocks` is no whole number of at least 1.
    """
    _check_whole("blocks", blocks)
    # All B_i step by -lr d, so their sum steps by -b lr d; each decays by 1 - lr lambda, and so does their sum
    return Settings(lr, blocks * lr, weight_decay, weight_decay / blocks)


def fit_delta(D: Float[Tensor, "out in"], scaling: float = 1.0, *, rank: int, blocks: int) -> Factors:
    """Factors whose update is as near to D (out, in) as any: its best part of rank r / b, not r. The blocks are equal.

    Raises:
        ValueError: `rank` is not in 1..min(out, in), `blocks` does not divide it, `D` is not finite, or `scaling` is not
            a positive finite number.
    """
    check_shapes(D=(D, "out in"))
    check_rank(rank, D)
    check_finite(D=D)
    check_positive("scaling", scaling)
    block_rank = _block_rank(rank, blocks)
    U, S, Vh = torch.linalg.svd(working(D), full_matrices=False)
    # Eckart-Young at rank r / b: A_s = V_h[:r/b], and blocks that sum to U S / s; equal ones have the least norm
    block = U[:, :block_rank] * S[:block_rank] / (scaling * blocks)
    A = Vh[:block_rank].to(D.dtype).clone(memory_format=torch.contiguous_format)
    return Factors(A, block.to(D.dtype).repeat(blocks, 1, 1))


def num_trainable(W0: Float[Tensor, "out in"], *, rank: int, blocks: int) -> int:
    """Number of stored trainable parameters beside `W0`: out * rank + in * rank / blocks. LoRA's with `blocks` = 1.

    Raises ValueError as `init` does.
    """
    check_shapes(W0=(W0, "out in"))
    check_rank(rank, W0)
    out_features, in_features = W0.shape
    return out_features * rank + in_features * _block_rank(rank, blocks)


def mult_adds(W0: Float[Tensor, "out in"], *, rank: int, blocks: int, tokens: int, order: str = "add_first") -> Operations:
    """Scalar multiplications and additions of the adapter's path for `tokens` rows of x; LoRA's with `blocks` = 1.

    Counted are the products and the sum of blocks, not the scaling and the addition to the frozen output: a dot product of
    length k is k multiplications and k - 1 additions. `order` as in `forward`.

    Raises ValueError as `init` does, if `tokens` is below 1, or if the order is unknown.
    """
    check_shapes(W0=(W0, "out in"))
    check_rank(rank, W0)
    _check_whole("tokens", tokens)
    check_choice("order", order, ORDERS)
    (m, n), short = W0.shape, _block_rank(rank, blocks)
    down = tokens * short * (n - 1)
    if order == "add_first":
        return Operations(tokens * short * (n + m), down + tokens * m * (short - 1) + (blocks - 1) * m * short)
    return Operations(tokens * (short * n + rank * m), down + blocks * tokens * m * (short - 1) + (blocks - 1) * tokens * m)


def generalization_bound(
    shapes: Int[Tensor, "weights 2"], *, rank: int, blocks: int, bits: float, num_samples: int, loss_sigma: float
) -> float:
    """Upper bound on the expected gap between test and training loss, LoRA's with `blocks` = 1.

    It counts stored bits: a trained adapter cannot know more of the data than the bits that it is written in. `shapes` holds
    out and in of every adapted weight (weights, 2), `bits` are those of one parameter; the loss is `loss_sigma`-sub-Gaussian.
    That Block-LoRA's is smaller says that it stores less, nothing of how much it can learn. Source: Zhu et al. 2024, counted
    anew (inferred).

    Raises:
        ValueError: `shapes` is not (weights, 2), is empty or has a side below 1, `blocks` does not divide `rank`, or a number is
            not positive.
    """
    block_rank = _block_rank(rank, blocks)
    _check_whole("num_samples", num_samples)
    check_positive("bits", bits)
    check_positive("loss_sigma", loss_sigma)
    if shapes.is_floating_point() or shapes.ndim != 2 or shapes.shape[1] != 2 or not shapes.numel() or shapes.min() < 1:
        raise ValueError(f"shapes is {shapes.tolist()}; needed whole numbers (weights, 2), out and in of each weight, at least 1")
    # |gen| <= sqrt(2 sigma^2 ln 2 / S * q * r sum_i (m_i + n_i / b))
    out_features, in_features = shapes.sum(dim=0).tolist()
    stored = rank * out_features + block_rank * in_features
    return math.sqrt(2 * loss_sigma**2 * math.log(2) / num_samples * bits * stored)


class BlockLoRALinear(nn.Module):
    """A frozen `nn.Linear` with a Block-LoRA adapter beside it: (..., in) -> (..., out).

    Only `A` (rank / blocks, in) and `B` (blocks, out, rank / blocks) are trained; `base` is frozen in place. `scaling` is that of
    `scaling_factor`, `order` as in `forward`. `dropout` (default 0) acts on the adapter's input, in training only. The factors may
    be made more precise than the weight, as those of `lora.LoRALinear`: used in the precision of x, trained and merged in their own.

    Raises:
        ValueError: `rank` does not fit the layer, `blocks` does not divide it, `order` is unknown, `dropout` is not in [0, 1), or
            the weight is not finite.
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int,
        blocks: int,
        alpha: float,
        rslora: bool = False,
        per_block: bool = False,
        dropout: float = 0.0,
        order: str = "add_first",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout!r}; needed a probability from 0 to below 1")
        check_choice("order", order, ORDERS)
        A, B = init(base.weight, rank=rank, blocks=blocks, generator=generator)
        self.base = base.requires_grad_(False)
        self.scaling = scaling_factor(alpha, rank, blocks=blocks, rslora=rslora, per_block=per_block)
        self.dropout, self.order, self.merged = dropout, order, False
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if self.merged:
            return nn.functional.linear(x, self.base.weight, self.base.bias)
        mask = lora.draw_mask(x, p=self.dropout) if self.training and self.dropout > 0 else None
        bias, p, A, B = self.base.bias, self.dropout, self.A.to(x.dtype), self.B.to(x.dtype)
        return forward(x, self.base.weight, A, B, self.scaling, bias=bias, mask=mask, p=p, order=self.order)

    @torch.no_grad()
    def merge(self) -> None:
        """Add s (sum_i B_i) A to the base weight, after which the layer costs what `base` costs. Merging twice does nothing."""
        if not self.merged:
            self.base.weight.copy_(merge(self.base.weight.to(self.A.dtype), self.A, self.B, self.scaling))
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take s (sum_i B_i) A out of the base weight again, up to rounding. Does nothing if the layer is not merged."""
        if self.merged:
            self.base.weight.copy_(unmerge(self.base.weight.to(self.A.dtype), self.A, self.B, self.scaling))
            self.merged = False


def _block_rank(rank: int, blocks: int) -> int:
    """The rank of one block, rank / blocks, after a check that both are whole numbers and blocks divides rank."""
    _check_whole("rank", rank)
    _check_whole("blocks", blocks)
    if rank % blocks:
        divisors = ", ".join(str(d) for d in range(1, rank + 1) if rank % d == 0)
        raise ValueError(f"blocks is {blocks} and rank is {rank}; blocks must divide rank: needed one of {divisors}")
    return rank // blocks


def _check_whole(name: str, value: int) -> None:
    """Check that a number is whole and at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; needed a whole number of at least 1")


if __name__ == "__main__":
    W0, target, x = torch.randn(16, 24), torch.randn(64, 16), torch.randn(64, 24)
    A, B = init(W0, rank=6, blocks=3)
    small, settings = to_compact_lora(A, B), compact_settings(0.02, blocks=3)
    print("stored:", num_trainable(W0, rank=6, blocks=3), "LoRA of rank 6:", num_trainable(W0, rank=6, blocks=1))
    for _ in range(100):
        G, G_small = ((x @ (W0 + delta).mT - target).mT @ x / 64 for delta in (delta_weight(A, B, 1.0), small.B @ small.A))
        step, grads = gradients(G, A, B, 1.0), lora.gradients(G_small, *small, 1.0)
        A, B = A - 0.02 * step.grad_A, B - 0.02 * step.grad_B
        small = LoRAFactors(small.A - settings.lr_A * grads.grad_A, small.B - settings.lr_B * grads.grad_B)
    apart = (delta_weight(A, B, 1.0) - small.B @ small.A).abs().max()
    print(f"after 100 steps LoRA of rank 2 with 3 times the learning rate of B is {apart.item():.0e} apart")
