r"""LoRA: a frozen weight plus a trainable product of two thin matrices adapts a model.

Hu et al. freeze the pretrained weight W0 and train a rank-`rank` update s B A beside it; B starts at zero, so training
starts exactly at the pretrained function, and the update can be merged into W0 at no cost in inference.
Kalajdzievski (rsLoRA, arXiv 2312.03732) shows that s = alpha / sqrt(rank) keeps learning stable as the rank grows.

| here             | paper            | shape       | meaning                                            |
|------------------|------------------|-------------|----------------------------------------------------|
| `W0`             | W_0              | (out, in)   | pretrained weight, frozen                          |
| `A`, `B`         | A, B             | (rank, in), (out, rank) | trainable factors                      |
| `scaling`        | alpha / r        | number      | s, computed by `scaling_factor`                    |
| `W`              | W_0 + Delta W    | (out, in)   | effective, merged weight W0 + s B A                |
| `G`              | -                | (out, in)   | dL/dW, the gradient of the merged weight           |
| `x`, `y`         | x, h             | (..., in), (..., out) | input and output of the layer            |

Where paper and code differ: the paper draws A from a Gaussian of unstated width; `microsoft/LoRA` and `huggingface/peft`
draw it uniformly from (-1/sqrt(in), 1/sqrt(in)), the default here. PEFT's Gaussian of width 1/rank is
`distribution="gaussian"`. `loralib` merges by itself on `eval()`; here `merge()` is always called by hand.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ._checks import check_choice, check_finite, check_rank, check_shapes
from ._paper import Paper

PAPER = Paper(
    slug="lora",
    name="LoRA",
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    authors=(
        "Edward J. Hu",
        "Yelong Shen",
        "Phillip Wallis",
        "Zeyuan Allen-Zhu",
        "Yuanzhi Li",
        "Shean Wang",
        "Lu Wang",
        "Weizhu Chen",
    ),
    venue="ICLR",
    year=2022,
    arxiv="2106.09685",
    official_code="microsoft/LoRA",
    family="the method itself",
    bibtex_key="hu2022lora",
)


class Factors(NamedTuple):
    """The two trainable factors."""

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]


class Gradients(NamedTuple):
    """Gradients of the loss by the factors."""

    grad_A: Float[Tensor, "rank in"]
    grad_B: Float[Tensor, "out rank"]


class BackwardGradients(NamedTuple):
    """Gradients of the loss by the input and the factors."""

    grad_x: Float[Tensor, "... in"]
    grad_A: Float[Tensor, "rank in"]
    grad_B: Float[Tensor, "out rank"]


class Weights(NamedTuple):
    """One layer's weights after a step."""

    W0: Float[Tensor, "out in"]
    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]


def scaling_factor(alpha: float, rank: int, *, rslora: bool = False) -> float:
    """The number s that multiplies B A: alpha / rank, or alpha / sqrt(rank) with `rslora`.

    `alpha` is set once and not retuned with the rank (paper, section 4.1). The second form is rsLoRA's (eq. 4).

    Raises:
        ValueError: `rank` is below 1, or `alpha` is not finite.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank!r}; needed a whole number of at least 1")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha!r}; needed a finite number")
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def init(
    W0: Float[Tensor, "out in"],
    *,
    rank: int,
    distribution: str = "kaiming",
    generator: torch.Generator | None = None,
) -> Factors:
    """Draw the factors at the start of training: A (rank, in) random, B (out, rank) zero (paper, section 4.1).

    `distribution` is "kaiming" (default; `loralib` and PEFT: uniform, |A_ij| <= 1/sqrt(in)) or "gaussian" (PEFT:
    standard deviation 1/rank). The factors have dtype and device of `W0`.

    Raises:
        ValueError: `rank` is not in 1..min(out, in), `W0` is not a finite floating-point matrix, or the distribution is
            unknown.
    """
    check_shapes(W0=(W0, "out in"))
    check_rank(rank, W0)
    check_choice("distribution", distribution, ("kaiming", "gaussian"))
    check_finite(W0=W0)
    out_features, in_features = W0.shape
    A = W0.new_empty(rank, in_features)
    if distribution == "kaiming":
        # kaiming_uniform_(a=sqrt(5)): gain sqrt(2 / (1 + 5)) times sqrt(3 / fan_in), with fan_in = in
        bound = 1 / math.sqrt(in_features)
        A.uniform_(-bound, bound, generator=generator)
    else:
        A.normal_(0, 1 / rank, generator=generator)
    # B = 0, so that W0 + s B A = W0
    B = W0.new_zeros(out_features, rank)
    return Factors(A, B)


def draw_mask(x: Float[Tensor, "... in"], *, p: float, generator: torch.Generator | None = None) -> Bool[Tensor, "... in"]:
    """Draw a dropout mask of the shape of `x`: True (keep) with probability 1 - p, independently for each entry.

    Raises ValueError if `x` is no floating-point tensor.
    """
    check_shapes(x=(x, "... in"))
    return torch.rand(x.shape, generator=generator, device=x.device) >= p


def forward(
    x: Float[Tensor, "... in"],
    W0: Float[Tensor, "out in"],
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    scaling: float,
    *,
    bias: Float[Tensor, " out"] | None = None,
    mask: Bool[Tensor, "... in"] | None = None,
    p: float = 0.0,
) -> Float[Tensor, "... out"]:
    """The adapted layer: (..., in) -> (..., out), paper eq. 3 with bias.

    `mask` (default: no dropout) keeps the entries of `x` that are True, for the adapter path only; what is kept is
    divided by 1 - `p`, so that the mean over masks is the layer without dropout.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_shapes(x=(x, "... in"), W0=(W0, "out in"), A=(A, "rank in"), B=(B, "out rank"), bias=(bias, "out"))
    frozen = nn.functional.linear(x, W0, bias)
    # Dropout acts on the input of the adapter path, never on the frozen path
    hidden = _drop(x, mask, p) @ A.mT
    # Eq. 3: h = W0 x + s B A x; addmm adds s times the product while it is formed, which saves one pass over y
    return torch.addmm(_rows(frozen), _rows(hidden), B.mT, alpha=scaling).reshape(frozen.shape)


def _rows(x: Tensor) -> Tensor:
    """(..., n) as a matrix (positions, n)."""
    return x.reshape(-1, x.shape[-1])


def _drop(x: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Inverted dropout of `x` with a drawn mask."""
    if mask is None:
        return x
    if mask.shape != x.shape or mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}; needed torch.bool of the shape of x, {tuple(x.shape)}")
    return x * mask / (1 - p)


def delta_weight(A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], scaling: float) -> Float[Tensor, "out in"]:
    """The update Delta W = s B A (out, in), paper eq. 3. Raises ValueError if the shapes do not fit."""
    check_shapes(A=(A, "rank in"), B=(B, "out rank"))
    return scaling * (B @ A)


def merge(
    W0: Float[Tensor, "out in"], A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], scaling: float
) -> Float[Tensor, "out in"]:
    """The merged weight W = W0 + s B A (out, in), paper section 4.1 ("no additional inference latency").

    Raises:
        ValueError: shapes or dtypes do not fit, or an entry is NaN or infinite.
    """
    check_shapes(W0=(W0, "out in"), A=(A, "rank in"), B=(B, "out rank"))
    check_finite(W0=W0, A=A, B=B)
    return W0 + scaling * (B @ A)


def unmerge(
    W: Float[Tensor, "out in"], A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], scaling: float
) -> Float[Tensor, "out in"]:
    """The pretrained weight W0 = W - s B A (out, in) recovered from a merged one, up to rounding. Raises like `merge`."""
    check_shapes(W=(W, "out in"), A=(A, "rank in"), B=(B, "out rank"))
    check_finite(W=W, A=A, B=B)
    return W - scaling * (B @ A)


def gradients(G: Float[Tensor, "out in"], A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], scaling: float) -> Gradients:
    """Gradients of the factors, (rank, in) and (out, rank), from G = dL/dW (out, in), by the chain rule through eq. 3."""
    check_shapes(G=(G, "out in"), A=(A, "rank in"), B=(B, "out rank"))
    # dL = <G, s (dB A + B dA)>
    return Gradients(grad_A=scaling * (B.mT @ G), grad_B=scaling * (G @ A.mT))


def backward(
    grad_y: Float[Tensor, "... out"],
    x: Float[Tensor, "... in"],
    W0: Float[Tensor, "out in"],
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    scaling: float,
    *,
    mask: Bool[Tensor, "... in"] | None = None,
    p: float = 0.0,
) -> BackwardGradients:
    """Gradients of x, A and B from that of the output, `grad_y` (..., out). W0 and the bias receive none: they are frozen.

    `mask` and `p` as in `forward`. Never forms an (out, in) matrix.
    """
    check_shapes(grad_y=(grad_y, "... out"), x=(x, "... in"), W0=(W0, "out in"), A=(A, "rank in"), B=(B, "out rank"))
    x_kept = _drop(x, mask, p)
    hidden, grad_hidden = scaling * (x_kept @ A.mT), scaling * (grad_y @ B)
    # With G = sum_t grad_y_t x_t^T over all positions t: grad_A = s B^T G, grad_B = s G A^T
    grad_A = _rows(grad_hidden).mT @ _rows(x_kept)
    grad_B = _rows(grad_y).mT @ _rows(hidden)
    # dL/dx = grad_y (W0 + s B A), the second term through the mask
    grad_x = grad_y @ W0 + _drop(grad_hidden @ A, mask, p)
    return BackwardGradients(grad_x, grad_A, grad_B)


def sgd_step(
    G: Float[Tensor, "out in"],
    W0: Float[Tensor, "out in"],
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    scaling: float,
    *,
    lr: float,
    weight_decay: float = 0.0,
) -> Weights:
    """One step of gradient descent on both factors from the same G = dL/dW; W0 stays as it is.

    Each factor decays by 1 - lr * weight_decay, so the product decays by its square, towards W0 and not towards 0.
    """
    check_shapes(G=(G, "out in"), W0=(W0, "out in"))
    grad_A, grad_B = gradients(G, A, B, scaling)
    decay = 1 - lr * weight_decay
    return Weights(W0, A=decay * A - lr * grad_A, B=decay * B - lr * grad_B)


def num_trainable(W0: Float[Tensor, "out in"], *, rank: int) -> int:
    """Number of trainable parameters beside `W0`: rank * (out + in) instead of out * in (paper, section 4.2).

    Raises ValueError if `W0` is no floating-point matrix or `rank` is not in 1..min(out, in).
    """
    check_shapes(W0=(W0, "out in"))
    check_rank(rank, W0)
    out_features, in_features = W0.shape
    return rank * (out_features + in_features)


class LoRALinear(nn.Module):
    """A frozen `nn.Linear` with an adapter beside it: (..., in) -> (..., out).

    Only `A` (rank, in) and `B` (out, rank) are trained; weight and bias of `base` are frozen in place. `scaling` is
    alpha / rank, or alpha / sqrt(rank) with `rslora`. `dropout` (default 0) acts on the adapter's input, in training only.
    The factors may be made more precise than the weight, as in `layer.A.data = layer.A.data.float()` beside bfloat16: they
    are used in the precision of x, and trained and merged in their own.

    Raises:
        ValueError: `rank` does not fit the layer, `dropout` is not in [0, 1), or the weight is not finite.
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int,
        alpha: float,
        rslora: bool = False,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout!r}; needed a probability from 0 to below 1")
        self.base = base.requires_grad_(False)
        self.scaling = scaling_factor(alpha, rank, rslora=rslora)
        self.dropout = dropout
        self.merged = False
        A, B = init(base.weight, rank=rank, generator=generator)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if self.merged:
            return nn.functional.linear(x, self.base.weight, self.base.bias)
        mask = draw_mask(x, p=self.dropout) if self.training and self.dropout > 0 else None
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        return forward(x, self.base.weight, A, B, self.scaling, bias=self.base.bias, mask=mask, p=self.dropout)

    @torch.no_grad()
    def merge(self) -> None:
        """Add s B A to the base weight, after which the layer costs what `base` costs. Merging twice does nothing."""
        if not self.merged:
            self.base.weight.copy_(merge(self.base.weight.to(self.A.dtype), self.A, self.B, self.scaling))
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take s B A out of the base weight again, up to rounding. Does nothing if the layer is not merged."""
        if self.merged:
            self.base.weight.copy_(unmerge(self.base.weight.to(self.A.dtype), self.A, self.B, self.scaling))
            self.merged = False


if __name__ == "__main__":
    layer = LoRALinear(nn.Linear(6, 4), rank=2, alpha=4)
    print("trainable:", sum(p.numel() for p in layer.parameters() if p.requires_grad), "of", sum(p.numel() for p in layer.parameters()))
    nn.init.normal_(layer.B)
    x = torch.randn(3, 6)
    before = layer(x)
    layer.merge()
    print("largest change by merging:", (layer(x) - before).abs().max().item())
