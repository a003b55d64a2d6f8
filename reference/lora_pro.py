r"""LoRA-Pro: adjust the gradients of both factors so that the weight moves as nearly as possible along the full gradient.

Wang et al. see a step of A and B as a step of the whole weight along a low-rank *equivalent gradient*, and give in closed
form the pair whose equivalent gradient is nearest to G = dL/dW (Theorem 1). Back-propagation's pair is all that it takes. A
free (rank, rank) matrix X remains, which to first order does not change the weight's step (Theorems 2 and 3).

| here                   | paper           | shape       | meaning                                                  |
|------------------------|-----------------|-------------|----------------------------------------------------------|
| `W0`                   | W_0             | (out, in)   | frozen weight; only weight decay changes it              |
| `A`, `B`               | A, B            | (rank, in), (out, rank) | trainable factors                            |
| `scaling`              | s               | number      | multiplies B A; `lora.scaling_factor`                    |
| `G`                    | g               | (out, in)   | dL/dW                                                    |
| `grad_A`, `grad_B`     | g^A, g^B        | (rank, in), (out, rank) | gradients of the factors: back-propagation's, or the adjusted ones |
| `X`                    | X               | (rank, rank) | free matrix, or how to choose it: "sylvester", "zero", "symmetry" |
| `moment1`, `moment2`   | m, v            | (out, in)   | Adam's running means of the equivalent gradient and of its square |
| `t`                    | t               | number      | number of the step, 1 for the first                      |
| `delta`                | -               | number      | added to the diagonal of B^T B and A A^T before they are inverted |

Where paper and code differ (`mrflogs/LoRA-Pro`: `peta/optim.py` of an early commit, now inside a modified DeepSpeed):

- The theorems ask for factors of full rank. Here inverses are pseudo-inverses, with which the weight's step is the nearest
  for factors of any rank, B = 0 included; the code adds `delta=1e-8` instead.
- The symmetric X has the inverse of A A^T; the code multiplies by A A^T itself. The Sylvester equation is solved by two
  symmetric eigendecompositions, in the code by a general solver.
- In the newer code Adam's first step counts as the second, s is fixed at 2, and there is no weight decay.
- "efficient" (code only): Adam on each adjusted gradient by itself. It needs little memory and is no longer the nearest step.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ._adapters import map_alike
from ._checks import check_choice, check_finite, check_shapes
from ._linalg import eigh_together, working
from ._paper import Paper
from .lora import Factors, Gradients, LoRALinear, gradients

PAPER = Paper(
    slug="lora_pro",
    name="LoRA-Pro",
    title="LoRA-Pro: Are Low-Rank Adapters Properly Optimized?",
    authors=("Zhengbo Wang", "Jian Liang", "Ran He", "Zilei Wang", "Tieniu Tan"),
    venue="ICLR",
    year=2025,
    arxiv="2407.18242",
    official_code="mrflogs/LoRA-Pro",
    family="optimisation",
    bibtex_key="wang2025lorapro",
)

RankIn = Float[Tensor, "rank in"]
OutRank = Float[Tensor, "out rank"]
OutIn = Float[Tensor, "out in"]
Square = Float[Tensor, "rank rank"]

CHOICES = ("sylvester", "zero", "symmetry")


class State(NamedTuple):
    """Adam's moments of the equivalent gradient."""

    moment1: OutIn
    moment2: OutIn


class Step(NamedTuple):
    """Weights and moments after a step."""

    W0: OutIn
    A: RankIn
    B: OutRank
    moment1: OutIn
    moment2: OutIn


class EfficientState(NamedTuple):
    """Adam's moments of the two adjusted gradients."""

    moment1_A: RankIn
    moment1_B: OutRank
    moment2_A: RankIn
    moment2_B: OutRank


class EfficientStep(NamedTuple):
    """Factors and moments after a step of the efficient mode."""

    A: RankIn
    B: OutRank
    moment1_A: RankIn
    moment1_B: OutRank
    moment2_A: RankIn
    moment2_B: OutRank


class _Gram(NamedTuple):
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix B^T B or A A^T."""

    values: Tensor
    vectors: Tensor

    def inverse(self, delta: float) -> Tensor:
        """The inverse with `delta` on the diagonal; directions that vanish up to rounding have inverse 0."""
        values = self.values + delta
        kept = values > _cutoff(values)
        return (self.vectors * (kept / torch.where(kept, values, 1.0))) @ self.vectors.mT


def _cutoff(values: Tensor) -> Tensor:
    """Below this a number is rounding: ten times how many they are, times eps, of the last, which is the largest."""
    return 10 * values.shape[-1] * torch.finfo(values.dtype).eps * values[..., -1:]


def _grams(A: Tensor, B: Tensor, known: tuple[Tensor, Tensor] | None = None) -> tuple[_Gram, _Gram]:
    """B^T B on the left and A A^T on the right, decomposed; `known` is what `_decomposed` has for them, if it was asked."""
    if known is None:
        return _Gram(*torch.linalg.eigh(B.mT @ B)), _Gram(*torch.linalg.eigh(A @ A.mT))
    check_shapes(A=(A, "rank in"), values=(known[0], "both rank"), vectors=(known[1], "both rank rank"))
    left, right = map(_Gram, *known)
    return left, right


def _decomposed(factors: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """For each (A, B) the eigenvalues (2, rank) and eigenvectors (2, rank, rank) of B^T B and A A^T, by one call for all of equal rank.

    However large the layers are, these matrices are small, so that those of a whole model fit in one call.
    """
    return eigh_together([torch.stack([B.mT @ B, A @ A.mT]) for A, B in (map(working, pair) for pair in factors)])


def equivalent_gradient(grad_A: RankIn, grad_B: OutRank, A: RankIn, B: OutRank, scaling: float) -> OutIn:
    """The direction (out, in) in which W0 + s B A moves, to first order, when A and B move along `grad_A` and `grad_B` (section 3.1)."""
    check_shapes(grad_A=(grad_A, "rank in"), grad_B=(grad_B, "out rank"), A=(A, "rank in"), B=(B, "out rank"))
    # s B g^A + s g^B A, as one product through 2 rank
    return torch.hstack([B, grad_B]) @ (scaling * torch.vstack([grad_A, A]))


def sylvester_X(grad_A: RankIn, A: RankIn, B: OutRank, scaling: float, *, delta: float = 0.0) -> Square:
    """The X with which the adjusted gradients stay nearest to back-propagation's `grad_A` and grad_B (Theorem 3).

    grad_B is not needed: B^T grad_B = grad_A A^T. Where the solution is not unique (both factors of lower rank) it is the
    smallest one. `delta` as in `optimal_gradients`.
    """
    check_shapes(grad_A=(grad_A, "rank in"), A=(A, "rank in"), B=(B, "out rank"))
    grad_A_, A_, B_ = map(working, (grad_A, A, B))
    return _sylvester(grad_A_, A_, *_grams(A_, B_), scaling, delta).to(A.dtype)


def _sylvester(grad_A: Tensor, A: Tensor, left: _Gram, right: _Gram, scaling: float, delta: float) -> Tensor:
    # Theorem 3: B^T B X + X A A^T = -1/s^2 (B^T B)^-1 g^A A^T
    C = -(left.inverse(delta) @ (grad_A @ A.mT)) / scaling**2
    # In the eigenvectors of the two Gram matrices the equation is one division per entry
    sums = left.values[..., :, None] + right.values[..., None, :]
    # Where it would be by zero the right side is zero too, and so is the smallest solution
    sums = torch.where(sums > _cutoff(sums.flatten(-2))[..., None], sums, 1.0)
    return left.vectors @ (left.vectors.mT @ C @ right.vectors / sums) @ right.vectors.mT


def symmetric_X(grad_B: OutRank, A: RankIn, B: OutRank, scaling: float, *, delta: float = 0.0) -> Square:
    """The X with which both factors share evenly what both can do (official `peta/optim.py`, there with A A^T not inverted).

    `grad_B` is back-propagation's; `delta` as in `optimal_gradients`.
    """
    check_shapes(grad_B=(grad_B, "out rank"), A=(A, "rank in"), B=(B, "out rank"))
    grad_B_, A_, B_ = map(working, (grad_B, A, B))
    return _symmetric(grad_B_, B_, *_grams(A_, B_), scaling, delta).to(A.dtype)


def _symmetric(grad_B: Tensor, B: Tensor, left: _Gram, right: _Gram, scaling: float, delta: float) -> Tensor:
    # -1/(2 s^2) (B^T B)^-1 B^T g^B (A A^T)^-1
    return -(left.inverse(delta) @ (B.mT @ grad_B) @ right.inverse(delta)) / (2 * scaling**2)


def optimal_gradients(
    grad_A: RankIn, grad_B: OutRank, A: RankIn, B: OutRank, scaling: float, *, X: str | Square = "sylvester", delta: float = 0.0
) -> Gradients:
    """The pair whose equivalent gradient is nearest to G, from back-propagation's pair of the same G (Theorem 1).

    `X` is "sylvester" (default: nearest to the given pair), "zero", "symmetry", or a matrix (rank, rank). With `delta=0`
    factors of lower rank, B = 0 among them, are inverted on their range, and the equivalent gradient is still the nearest;
    the official code's choice is `delta=1e-8`.

    Raises:
        ValueError: shapes or dtypes do not fit, or X is unknown.
    """
    grad_A_, grad_B_, A_, B_ = _checked(grad_A, grad_B, A, B, X)
    found = _adjusted(grad_A_, grad_B_, A_, B_, *_grams(A_, B_), scaling, X, delta)
    return Gradients(*(grad.to(A.dtype) for grad in found))


def _adjusted(
    grad_A: Tensor, grad_B: Tensor, A: Tensor, B: Tensor, left: _Gram, right: _Gram, scaling: float, X: str | Tensor, delta: float
) -> Gradients:
    """Theorem 1 for Gram matrices B^T B and A A^T that are decomposed already."""
    inverse_left, inverse_right = left.inverse(delta), right.inverse(delta)
    # Theorem 1 with X = 0: 1/s^2 (B^T B)^-1 g^A and 1/s^2 [I - B (B^T B)^-1 B^T] g^B (A A^T)^-1
    best_A = inverse_left @ grad_A / scaling**2
    best_B = (grad_B - B @ (inverse_left @ (B.mT @ grad_B))) @ inverse_right / scaling**2
    if not isinstance(X, Tensor):
        if X == "zero":
            return Gradients(best_A, best_B)
        X = _symmetric(grad_B, B, left, right, scaling, delta) if X == "symmetry" else _sylvester(grad_A, A, left, right, scaling, delta)
    # ... + X A and ... - B X: to first order the weight does not notice
    return Gradients(best_A + working(X) @ A, best_B - B @ working(X))


def projected_gradient(G: OutIn, A: RankIn, B: OutRank) -> OutIn:
    """The equivalent gradient of the optimal pair (out, in): G less the part outside of both B's columns and A's rows (Theorem 1).

    It depends on no scaling, and on the factors only by the spaces that they span.
    """
    check_shapes(G=(G, "out in"), A=(A, "rank in"), B=(B, "out rank"))
    G_, A_, B_ = map(working, (G, A, B))
    left, right = (gram.inverse(0.0) for gram in _grams(A_, B_))
    # P_B G + (I - P_B) G P_A, each projector applied through the rank
    in_B = B_ @ (left @ (B_.mT @ G_))
    return (in_B + ((G_ - in_B) @ A_.mT) @ right @ A_).to(G.dtype)


def sgd_step(
    grad_A: RankIn, grad_B: OutRank, A: RankIn, B: OutRank, scaling: float, *, lr: float, X: str | Square = "sylvester", delta: float = 0.0
) -> Factors:
    """One step of gradient descent along the adjusted gradients, both taken at the old factors (Algorithm 1).

    `grad_A` and `grad_B` are back-propagation's; `X` and `delta` as in `optimal_gradients`.
    """
    best = optimal_gradients(grad_A, grad_B, A, B, scaling, X=X, delta=delta)
    return Factors(A=A - lr * best.grad_A, B=B - lr * best.grad_B)


def init_state(A: RankIn, B: OutRank) -> State:
    """Adam's moments before the first step: zero, of the weight's shape (Algorithm 2)."""
    check_shapes(A=(A, "rank in"), B=(B, "out rank"))
    return State(moment1=A.new_zeros(len(B), A.shape[1]), moment2=A.new_zeros(len(B), A.shape[1]))


def step(
    grad_A: RankIn,
    grad_B: OutRank,
    W0: OutIn,
    A: RankIn,
    B: OutRank,
    scaling: float,
    moment1: OutIn,
    moment2: OutIn,
    *,
    t: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    adam_eps: float = 1e-8,
    weight_decay: float = 0.0,
    X: str | Square = "sylvester",
    delta: float = 0.0,
    grams: tuple[Tensor, Tensor] | None = None,
) -> Step:
    """One AdamW step: moments of the weight's equivalent gradient, and a step of the factors nearest to Adam's (Algorithm 2).

    `t` is 1 in the first step. `X` and `delta` as in `optimal_gradients`. Weight decay shrinks W0 + s B A as a whole, so W0
    changes with it; without decay `W0` itself comes back. No (out, out) or (in, in) matrix is made. `grams` are the
    eigenvalues (2, rank) and eigenvectors (2, rank, rank) of B^T B and A A^T, if they are known: many layers' take one call.
    """
    check_shapes(A=(A, "rank in"), B=(B, "out rank"), W0=(W0, "out in"), moment1=(moment1, "out in"), moment2=(moment2, "out in"))
    grad_A_, grad_B_, A_, B_ = _checked(grad_A, grad_B, A, B, X)
    left, right = _grams(A_, B_, grams)
    # Any X gives the same equivalent gradient; X = 0 is the cheapest
    g = equivalent_gradient(*_adjusted(grad_A_, grad_B_, A_, B_, left, right, scaling, "zero", delta), A_, B_, scaling)
    direction, new_moment1, new_moment2 = _adam(g, moment1, moment2, t, beta1, beta2, adam_eps)
    # Adam's direction is of full rank: back to the factors, as if it were the gradient of the weight
    final = _adjusted(*gradients(direction, A_, B_, scaling), A_, B_, left, right, scaling, X, delta)
    # s B A shrinks by 1 - lr weight_decay if each factor shrinks by its root
    kept = 1 - lr * weight_decay
    new_A, new_B = math.sqrt(kept) * A_ - lr * final.grad_A, math.sqrt(kept) * B_ - lr * final.grad_B
    return Step(W0 if weight_decay == 0 else kept * W0, new_A.to(A.dtype), new_B.to(B.dtype), new_moment1, new_moment2)


def _adam(g: Tensor, moment1: Tensor, moment2: Tensor, t: int, beta1: float, beta2: float, adam_eps: float) -> tuple[Tensor, ...]:
    """Adam's direction for the gradient g (Kingma and Ba, arXiv 1412.6980, Algorithm 1), and the new moments."""
    # m <- beta1 m + (1 - beta1) g and v <- beta2 v + (1 - beta2) g^2
    m = torch.add(beta1 * working(moment1), g, alpha=1 - beta1)
    v = torch.addcmul(beta2 * working(moment2), g, g, value=1 - beta2)
    # m_hat / (sqrt(v_hat) + eps), with m_hat = m / (1 - beta1^t) and v_hat = v / (1 - beta2^t)
    root = v.sqrt() / math.sqrt(1 - beta2**t)
    return m / (root + adam_eps) / (1 - beta1**t), m.to(moment1.dtype), v.to(moment2.dtype)


def init_state_efficient(A: RankIn, B: OutRank) -> EfficientState:
    """Adam's moments of the efficient mode before the first step: zero, of the shapes of the factors."""
    check_shapes(A=(A, "rank in"), B=(B, "out rank"))
    return EfficientState(torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(A), torch.zeros_like(B))


def step_efficient(
    grad_A: RankIn,
    grad_B: OutRank,
    A: RankIn,
    B: OutRank,
    scaling: float,
    moment1_A: RankIn,
    moment1_B: OutRank,
    moment2_A: RankIn,
    moment2_B: OutRank,
    *,
    t: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    adam_eps: float = 1e-8,
    weight_decay: float = 0.0,
    X: str | Square = "sylvester",
    delta: float = 0.0,
    grams: tuple[Tensor, Tensor] | None = None,
) -> EfficientStep:
    """One step of ordinary AdamW on each adjusted gradient by itself (official `peta/optim.py`, mode "efficient").

    Each factor decays by 1 - lr weight_decay, W0 stays. Options as in `step`.
    """
    check_shapes(A=(A, "rank in"), moment1_A=(moment1_A, "rank in"), moment2_A=(moment2_A, "rank in"))
    check_shapes(B=(B, "out rank"), moment1_B=(moment1_B, "out rank"), moment2_B=(moment2_B, "out rank"))
    grad_A_, grad_B_, A_, B_ = _checked(grad_A, grad_B, A, B, X)
    best = _adjusted(grad_A_, grad_B_, A_, B_, *_grams(A_, B_, grams), scaling, X, delta)
    # AdamW, twice; its normalisation per entry is what undoes the optimality
    for_A, new_1A, new_2A = _adam(best.grad_A, moment1_A, moment2_A, t, beta1, beta2, adam_eps)
    for_B, new_1B, new_2B = _adam(best.grad_B, moment1_B, moment2_B, t, beta1, beta2, adam_eps)
    kept = 1 - lr * weight_decay
    new_A, new_B = kept * A_ - lr * for_A, kept * B_ - lr * for_B
    return EfficientStep(new_A.to(A.dtype), new_B.to(B.dtype), new_1A, new_1B, new_2A, new_2B)


class LoRAProAdamW(torch.optim.Optimizer):
    """AdamW for LoRA layers by `step`, or in mode "efficient" by `step_efficient`; options as there.

    `layers` are `LoRALinear` or anything with `base.weight`, `A`, `B` and `scaling`. Each is one group of parameters, so that
    learning-rate schedulers work. With weight decay the mode "full" changes `base.weight` too, which is frozen otherwise.
    The Gram matrices of all layers are decomposed together; the rest is done together for small layers of equal shape.

    Raises:
        ValueError: no layer, an option is unusable, an entry of A or B is not finite, A has lower rank, or B has lower rank
            and is not zero: some directions of the factors would never be trained.
    """

    def __init__(
        self,
        layers: Iterable[LoRALinear],
        *,
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        adam_eps: float = 1e-8,
        weight_decay: float = 0.0,
        mode: str = "full",
        X: str = "sylvester",
        delta: float = 0.0,
    ) -> None:
        self.layers, self.mode, self.X, self.delta = list(layers), mode, X, delta
        check_choice("mode", mode, ("full", "efficient"))
        check_choice("X", X, CHOICES)
        defaults = {"lr": lr, "beta1": beta1, "beta2": beta2, "adam_eps": adam_eps, "weight_decay": weight_decay}
        for name, value in {**defaults, "delta": delta}.items():
            end = 1.0 if name.startswith("beta") else math.inf
            if not 0 <= value < end:
                raise ValueError(f"{name} is {value!r}; needed a number of at least 0 and below {end:g}")
        for layer in self.layers:
            _check_rank(layer.A, layer.B)
        self.varied = tuple(defaults)  # what a group may have of its own; from here on torch puts more into `defaults`
        super().__init__([{"params": [layer.A, layer.B]} for layer in self.layers], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every layer whose factors both have a gradient; returns what `closure` does, which is called first if given."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        moving = [pair for pair in zip(self.layers, self.param_groups, strict=True) if all(p.grad is not None for p in pair[1]["params"])]
        items = [(*pair, *own) for pair, own in zip(moving, _decomposed(group["params"] for _, group in moving), strict=True)]
        for (layer, *_), moved in map_alike(self._move, items, lambda item: self._arguments(*item)):
            for name, weight in (("A", layer.A), ("B", layer.B), ("W0", layer.base.weight)):
                weight.copy_(moved.pop(name, weight))
            self.state[layer.A].update(moved, t=self.state[layer.A].get("t", 0) + 1)
        return loss

    def _move(self, given: dict[str, Any]) -> dict[str, Tensor]:
        grams, move = (given.pop("values"), given.pop("vectors")), step if self.mode == "full" else step_efficient
        return move(**given, grams=grams)._asdict()

    def _arguments(self, layer: LoRALinear, group: dict[str, Any], values: Tensor, vectors: Tensor) -> dict[str, Any]:
        A, B, full = layer.A, layer.B, self.mode == "full"
        kept = self.state[A] or {"t": 0, **(init_state(A, B) if full else init_state_efficient(A, B))._asdict()}
        more = {"t": kept["t"] + 1, "scaling": layer.scaling, "X": self.X, "delta": self.delta, **{k: group[k] for k in self.varied}}
        given = {"grad_A": A.grad, "grad_B": B.grad, "A": A, "B": B, "values": values, "vectors": vectors, **kept, **more}
        return given | {"W0": layer.base.weight.to(A.dtype)} if full else given


def _checked(grad_A: Tensor, grad_B: Tensor, A: Tensor, B: Tensor, X: str | Tensor) -> Iterator[Tensor]:
    """The first four in working precision, once it is clear that they fit and X is a known choice or a matrix that fits too."""
    check_shapes(grad_A=(grad_A, "rank in"), grad_B=(grad_B, "out rank"), A=(A, "rank in"), B=(B, "out rank"))
    if isinstance(X, Tensor):
        check_shapes(A=(A, "rank in"), X=(X, "rank rank"))
    else:
        check_choice("X", X, CHOICES)
    return map(working, (grad_A, grad_B, A, B))


def _check_rank(A: Tensor, B: Tensor) -> None:
    """Check that A has full row rank, and B full column rank unless it is zero. Reads values: for set-up only."""
    check_finite(A=A, B=B)
    for name, factor in (("A", A), ("B", B)):
        found = torch.linalg.matrix_rank(working(factor))
        if found < len(A) and (name == "A" or found > 0):
            raise ValueError(
                f"{name} {tuple(factor.shape)} has rank {found}; needed {len(A)}, else some of its directions are never trained: "
                "start from lora.init, with a rank of at most min(out, in), or use optimal_gradients, which inverts what can be inverted"
            )


if __name__ == "__main__":
    A, B, G = torch.randn(2, 8), torch.randn(6, 2), torch.randn(6, 8)
    plain = gradients(G, A, B, 2.0)
    for name, pair in {"LoRA": plain, "LoRA-Pro": optimal_gradients(*plain, A, B, 2.0)}.items():
        cosine = torch.cosine_similarity(equivalent_gradient(*pair, A, B, 2.0).flatten(), G.flatten(), dim=0)
        print(f"{name}: cosine of the weight's step with the gradient {cosine.item():.3f}")
