r"""ALLoRA: no scaling and no dropout; instead each output row's gradient shrinks as that row of B A grows.

Huang and Balestriero name three faults of LoRA in short trainings: dropout has no time to average out, B leaves zero slowly, and
the scaling factor couples layers. They drop dropout and scaling, and divide row i of the gradient that reaches A and B by the root
of ||(B A)_i|| + 1 / eta^2: the gradient is `eta` times as long while B A is zero, and less so later.

| here             | paper            | shape       | meaning                                            |
|------------------|------------------|-------------|----------------------------------------------------|
| `W0`             | W                | (out, in)   | pretrained weight, frozen                          |
| `A`, `B`         | A, B             | (rank, in), (out, rank) | trainable factors; the abstract writes A B for B A |
| `eta`            | eta              | number      | factor of the gradient where a row of B A is zero  |
| `G`              | gradient of W    | (out, in)   | dL/dW at the merged weight W0 + B A                |
| `grad_y`         | delta            | (..., out)  | dL/dy                                              |
| `kind`           | -                | name        | whose size divides the gradient: "row" is the method |

What rests on what: the authors published no code that we found, and the paper's text was not read. The row formula, whose norm is
not squared under the root, comes from two independent pieces of third-party code that name the paper. Where sources differ:

- `init` draws A as LoRA does (Kaiming); a third-party layer draws it normal with variance 1 / rank: `distribution="gaussian"`.
- The default eta = 2 of the layer is that of a third-party optimizer; the paper's is not known to us.
- The kinds other than "row" are our reading of the abstract's "weight-dependent / output-dependent" family.
- `escape` and `dropout_penalty` put the abstract's words into closed form; both are derived on the tutorial page.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import lora
from ._checks import check_choice, check_finite, check_positive, check_rank, check_shapes
from ._linalg import working
from ._paper import Paper
from .lora import BackwardGradients, Factors, Gradients

PAPER = Paper(
    slug="allora",
    name="ALLoRA",
    title="ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws",
    authors=("Hai Huang", "Randall Balestriero"),
    venue="arXiv",
    year=2024,
    arxiv="2410.09692",
    official_code="none",
    family="optimisation",
    bibtex_key="huang2024allora",
)

OF_WEIGHTS = ("row", "matrix", "element", "none")
KINDS = (*OF_WEIGHTS, "output")
DISTRIBUTIONS = ("kaiming", "gaussian")


class State(NamedTuple):
    """Adam's moments of the rescaled gradients."""

    moment1_A: Float[Tensor, "rank in"]
    moment1_B: Float[Tensor, "out rank"]
    moment2_A: Float[Tensor, "rank in"]
    moment2_B: Float[Tensor, "out rank"]


class Step(NamedTuple):
    """Factors and moments after a step of AdamW."""

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    moment1_A: Float[Tensor, "rank in"]
    moment1_B: Float[Tensor, "out rank"]
    moment2_A: Float[Tensor, "rank in"]
    moment2_B: Float[Tensor, "out rank"]


def init(W0: Float[Tensor, "out in"], *, rank: int, distribution: str = "kaiming", generator: torch.Generator | None = None) -> Factors:
    """Draw the factors at the start of training: A (rank, in) random, B (out, rank) zero.

    `distribution` is "kaiming" (default: LoRA's, uniform within 1/sqrt(in)) or "gaussian" (a third-party layer: standard
    deviation 1/sqrt(rank)). The factors have dtype and device of `W0`.

    Raises:
        ValueError: `rank` is not in 1..min(out, in), `W0` is not a finite floating-point matrix, or the distribution is
            unknown.
    """
    check_choice("distribution", distribution, DISTRIBUTIONS)
    A, B = lora.init(W0, rank=rank, generator=generator)
    return Factors(A, B) if distribution == "kaiming" else Factors(A.normal_(0, rank**-0.5, generator=generator), B)


def forward(
    x: Float[Tensor, "... in"],
    W0: Float[Tensor, "out in"],
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    *,
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "... out"]:
    """The adapted layer (..., in) -> (..., out), the same in training and after it. Raises ValueError if shapes do not fit."""
    check_shapes(x=(x, "... in"), W0=(W0, "out in"), A=(A, "rank in"), B=(B, "out rank"), bias=(bias, "out"))
    # y = W0 x + B A x + b: nothing multiplies the adapter and nothing is dropped
    return nn.functional.linear(x, W0, bias) + (x @ A.mT) @ B.mT


def delta_weight(A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"]) -> Float[Tensor, "out in"]:
    """The update Delta W = B A (out, in), without a scaling. Raises ValueError if the shapes do not fit."""
    check_shapes(A=(A, "rank in"), B=(B, "out rank"))
    return B @ A


def merge(W0: Float[Tensor, "out in"], A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"]) -> Float[Tensor, "out in"]:
    """The merged weight W = W0 + B A (out, in). Raises ValueError if shapes do not fit or an entry is NaN or infinite."""
    check_shapes(W0=(W0, "out in"), A=(A, "rank in"), B=(B, "out rank"))
    check_finite(W0=W0, A=A, B=B)
    return W0 + B @ A


def unmerge(W: Float[Tensor, "out in"], A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"]) -> Float[Tensor, "out in"]:
    """The pretrained weight W0 = W - B A (out, in) recovered from a merged one, up to rounding. Raises like `merge`."""
    check_shapes(W=(W, "out in"), A=(A, "rank in"), B=(B, "out rank"))
    check_finite(W=W, A=A, B=B)
    return W - B @ A


def row_norms(A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"]) -> Float[Tensor, " out"]:
    """The length of each row of B A (out), for any factors. No (out, in) matrix is made: the cost is rank^2 (out + in)."""
    check_shapes(A=(A, "rank in"), B=(B, "out rank"))
    return _row_norms(A, B).to(B.dtype)


def _row_norms(A: Tensor, B: Tensor) -> Tensor:
    """`row_norms` in working precision."""
    A, B = working(A), working(B)
    # ||(B A)_i||^2 = b_i (A A^T) b_i^T; rounding may leave a small negative number where the row cancels
    return ((B @ (A @ A.mT)) * B).sum(dim=1).clamp(min=0).sqrt()


def row_scale(A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], eta: float) -> Float[Tensor, " out"]:
    """The factor of each row of the gradient (out): `eta` where the row of B A is zero, less where it is not.

    Raises ValueError if shapes do not fit or `eta` is not positive and finite.
    """
    check_shapes(A=(A, "rank in"), B=(B, "out rank"))
    check_positive("eta", eta)
    return _scale(_row_norms(A, B), eta).to(B.dtype)


def _scale(size: Tensor, eta: float) -> Tensor:
    """The factor for a size of what is adapted."""
    # d = 1 / sqrt(size + 1 / eta^2), written such that it is just eta for size 0
    return eta / (1 + eta**2 * size).sqrt()


def gradients(
    G: Float[Tensor, "out in"], A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], eta: float, *, kind: str = "row"
) -> Gradients:
    """What the optimizer gets for A (rank, in) and B (out, rank), from the true G = dL/dW (out, in) at W0 + B A.

    `kind` is "row" (default: the method), "matrix" (one factor, from the Frobenius norm of B A), "element" (one for each entry
    of G) or "none" (LoRA's gradients). The factors are those of the `A` and `B` given here: compute them anew in each step.

    Raises:
        ValueError: shapes do not fit, `eta` is not positive and finite, or the kind is unknown or "output", which needs single
            samples: see `backward`.
    """
    check_shapes(G=(G, "out in"), A=(A, "rank in"), B=(B, "out rank"))
    check_choice("kind", kind, OF_WEIGHTS)
    check_positive("eta", eta)
    if kind == "element":
        G = G * _scale(working(B @ A).abs(), eta).to(G.dtype)
        return Gradients(grad_A=B.mT @ G, grad_B=G @ A.mT)
    d = _per_row(A, B, eta, kind)
    # g_A = B^T (D G) and g_B = (D G) A^T, with D on the thin side of each product
    return Gradients(grad_A=(d * B).mT @ G, grad_B=d * (G @ A.mT))


def _per_row(A: Tensor, B: Tensor, eta: float, kind: str) -> Tensor:
    """The diagonal of D as a column (out, 1), or one number for all rows."""
    norms = _row_norms(A, B)[:, None]
    if kind == "matrix":
        # ||B A||_F^2 is the sum of the squared rows
        norms = norms.square().sum().sqrt()
    return (torch.ones_like(norms) if kind == "none" else _scale(norms, eta)).to(B.dtype)


def backward(
    grad_y: Float[Tensor, "... out"],
    x: Float[Tensor, "... in"],
    W0: Float[Tensor, "out in"],
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    eta: float,
    *,
    kind: str = "row",
) -> BackwardGradients:
    """The true gradient of x, and what the optimizer gets for A and B, from that of the output, `grad_y` (..., out).

    `kind` as in `gradients`, or "output": each sample's signal of channel i is divided by the root of its own |(B A x)_i| + 1 /
    eta^2. Makes no (out, in) matrix, but for "element". Raises as `gradients`.
    """
    check_shapes(grad_y=(grad_y, "... out"), x=(x, "... in"), W0=(W0, "out in"), A=(A, "rank in"), B=(B, "out rank"))
    check_choice("kind", kind, KINDS)
    check_positive("eta", eta)
    # dL/dx = grad_y (W0 + B A): what goes on to the layers below is not rescaled
    grad_x = grad_y @ W0 + (grad_y @ B) @ A
    return BackwardGradients(grad_x, *_factor_gradients(grad_y, x, A, B, eta, kind))


def _factor_gradients(grad_y: Tensor, x: Tensor, A: Tensor, B: Tensor, eta: float, kind: str) -> Gradients:
    """What the optimizer gets for A and B."""
    signal, x = grad_y.reshape(-1, B.shape[0]), x.reshape(-1, A.shape[1])
    if kind == "element":
        # G = sum_t grad_y_t x_t^T over all positions t
        return gradients(signal.mT @ x, A, B, eta, kind=kind)
    hidden = x @ A.mT
    if kind == "output":
        signal, d = signal * _scale(working(hidden @ B.mT).abs(), eta).to(signal.dtype), torch.ones_like(B[:, :1])
    else:
        d = _per_row(A, B, eta, kind)
    # g_A = B^T D G = (grad_y D B)^T x and g_B = D G A^T = D grad_y^T (x A^T)
    return Gradients(grad_A=(signal @ (d * B)).mT @ x, grad_B=d * (signal.mT @ hidden))


def sgd_step(
    G: Float[Tensor, "out in"], A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], eta: float, *, lr: float, kind: str = "row"
) -> Factors:
    """One step of gradient descent on both factors from the same G; `kind` and errors as in `gradients`."""
    grad_A, grad_B = gradients(G, A, B, eta, kind=kind)
    return Factors(A - lr * grad_A, B - lr * grad_B)


def init_state(A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"]) -> State:
    """Adam's moments before the first step: zero, of the shapes of the factors."""
    check_shapes(A=(A, "rank in"), B=(B, "out rank"))
    return State(torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(A), torch.zeros_like(B))


def step(
    G: Float[Tensor, "out in"],
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    moment1_A: Float[Tensor, "rank in"],
    moment1_B: Float[Tensor, "out rank"],
    moment2_A: Float[Tensor, "rank in"],
    moment2_B: Float[Tensor, "out rank"],
    eta: float,
    *,
    t: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    adam_eps: float = 1e-8,
    weight_decay: float = 0.0,
    kind: str = "row",
) -> Step:
    """One step of AdamW, number `t` (1 for the first): the gradients are rescaled before the moments see them.

    Each factor decays by 1 - lr weight_decay. `kind` and errors as in `gradients`; moments have the shapes of the factors.
    """
    check_shapes(A=(A, "rank in"), moment1_A=(moment1_A, "rank in"), moment2_A=(moment2_A, "rank in"))
    check_shapes(B=(B, "out rank"), moment1_B=(moment1_B, "out rank"), moment2_B=(moment2_B, "out rank"))
    grads = gradients(G, A, B, eta, kind=kind)
    kept, moved = 1 - lr * weight_decay, []
    for factor, g, m, v in ((A, grads.grad_A, moment1_A, moment2_A), (B, grads.grad_B, moment1_B, moment2_B)):
        # Adam (Kingma and Ba, Algorithm 1), in working precision
        w, g, m, v = map(working, (factor, g, m, v))
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g.square()
        direction = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + adam_eps)
        moved.append([part.to(factor.dtype) for part in (kept * w - lr * direction, m, v)])
    (new_A, m_A, v_A), (new_B, m_B, v_B) = moved
    return Step(new_A, new_B, m_A, m_B, v_A, v_B)


def escape(time: Float[Tensor, "..."], growth: float, eta: float) -> Float[Tensor, "..."]:
    """How far one row of B is from zero along -G A^T under gradient flow, at each time (...), while A and G stay as they are.

    The row is -beta G A^T with G its own row of the gradient, and growth = ||G A^T A||, the length that a unit of beta gives to
    the row of B A. LoRA's beta (s = 1) is the time itself. `eta` may be infinite. Derived on the tutorial page.

    Raises:
        ValueError: a time is negative or not finite, or `growth` or `eta` is not positive (`growth` must be finite too).
    """
    check_shapes(time=(time, "..."))
    if not 0 < growth < math.inf or not eta > 0:
        raise ValueError(f"growth is {growth!r} and eta is {eta!r}; needed positive numbers, growth finite")
    if not ((time >= 0) & time.isfinite()).all():
        raise ValueError("time has an entry that is negative or not finite; needed times since the start, at B = 0")
    # beta = ((3/2 c t + eta^-3)^(2/3) - eta^-2) / c
    grown = 1.5 * growth * working(time)
    if math.isinf(eta):
        return (grown ** (2 / 3) / growth).to(time.dtype)
    # The same with eta^-2 in front, so that early times do not cancel
    return (((grown * eta**3).log1p() * (2 / 3)).expm1() / (growth * eta**2)).to(time.dtype)


def dropout_penalty(
    x: Float[Tensor, "... in"], A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], scaling: float, *, p: float
) -> Float[Tensor, "..."]:
    """What LoRA's dropout with probability `p` on `x` (..., in) adds to the expected squared error of each sample (...).

    It is 0 at B = 0, and reliable only when many masks have been averaged. Makes no (out, in) matrix. Derived on the tutorial page.

    Raises:
        ValueError: shapes do not fit, or `p` is not in [0, 1).
    """
    check_shapes(x=(x, "... in"), A=(A, "rank in"), B=(B, "out rank"))
    if not 0 <= p < 1:
        raise ValueError(f"p is {p!r}; needed a probability from 0 to below 1")
    wide, tall = working(A), working(B)
    # p / (1 - p) s^2 sum_j x_j^2 ||(B A)_:j||^2, where ||(B A)_:j||^2 = a_j^T (B^T B) a_j
    columns = ((tall.mT @ tall) @ wide * wide).sum(dim=-2)
    return (p / (1 - p) * scaling**2 * (working(x).square() @ columns)).to(x.dtype)


def num_trainable(W0: Float[Tensor, "out in"], *, rank: int) -> int:
    """Number of trainable parameters beside `W0`: rank * (out + in), as for LoRA.

    Raises ValueError if `W0` is no floating-point matrix or `rank` is not in 1..min(out, in).
    """
    check_shapes(W0=(W0, "out in"))
    check_rank(rank, W0)
    return rank * sum(W0.shape)


class _Adapter(torch.autograd.Function):
    """(x A^T) B^T, whose backward pass rescales what A and B get and leaves the gradient of x alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, A: Tensor, B: Tensor, eta: float, kind: str) -> Tensor:
        return (x @ A.mT) @ B.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what `backward` reads."""
        *tensors, ctx.eta, ctx.kind = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments of `forward`, None for those that are frozen or no tensors."""
        x, A, B = ctx.saved_tensors
        # d comes from the A and B of this very pass, as a constant: nothing is differentiated through it
        grad_A, grad_B = _factor_gradients(grad_y, x, A, B, ctx.eta, ctx.kind)
        return (grad_y @ B) @ A, grad_A, grad_B, None, None


class ALLoRALinear(nn.Module):
    """A frozen `nn.Linear` with an adapter beside it, whose `A` and `B` get rescaled gradients: (..., in) -> (..., out).

    Any optimizer will do. `eta` (default 2) and `kind` as in `backward`; both can be changed between steps. The factors may be
    made more precise than the weight, as in `layer.A.data = layer.A.data.float()` beside bfloat16: they are used in the precision
    of x, and trained and merged in their own.

    Raises:
        ValueError: `rank` does not fit the layer, `eta` is not positive and finite, the kind is unknown, or the weight is not
            finite.
    """

    def __init__(
        self, base: nn.Linear, *, rank: int, eta: float = 2.0, kind: str = "row", generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        check_choice("kind", kind, KINDS)
        check_positive("eta", eta)
        A, B = init(base.weight, rank=rank, generator=generator)
        self.base = base.requires_grad_(False)
        self.eta, self.kind, self.merged = eta, kind, False
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        y: Tensor = self.base(x)
        if self.merged:
            return y
        added: Tensor = _Adapter.apply(x, self.A.to(x.dtype), self.B.to(x.dtype), self.eta, self.kind)  # type: ignore[no-untyped-call]
        return y + added

    @torch.no_grad()
    def merge(self) -> None:
        """Add B A to the base weight, after which the layer costs what `base` costs. Merging twice does nothing."""
        if not self.merged:
            self.base.weight.copy_(merge(self.base.weight.to(self.A.dtype), self.A, self.B))
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take B A out of the base weight again, up to rounding. Does nothing if the layer is not merged."""
        if self.merged:
            self.base.weight.copy_(unmerge(self.base.weight.to(self.A.dtype), self.A, self.B))
            self.merged = False


if __name__ == "__main__":
    layer = ALLoRALinear(nn.Linear(6, 4), rank=2, eta=8.0)
    x, target = torch.randn(64, 6), torch.randn(64, 4)
    optimizer = torch.optim.SGD([layer.A, layer.B], lr=0.05)
    for t in range(31):
        d = row_scale(layer.A, layer.B, layer.eta).detach()
        if t % 10 == 0:
            print(f"step {t:2}: the rows' gradients are multiplied by", ", ".join(f"{number:.2f}" for number in d.tolist()))
        optimizer.zero_grad()
        (layer(x) - target).square().sum(dim=1).mean().backward()
        optimizer.step()
