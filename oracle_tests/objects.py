"""Turn an object, such as a layer of a library, into the functions of a paper's contract."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .contract import UsageError, nearest


class FixedMask(nn.Module):
    """In place of a layer's dropout: the mask and the probability that the oracle chose."""

    def __init__(self, mask: Tensor, p: float) -> None:
        super().__init__()
        self.mask, self.p = mask, p

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask / (1 - self.p)


def from_module(
    build: Callable[..., nn.Module],
    *,
    A: str = "A",
    B: str = "B",
    weight: str = "base.weight",
    scaling: Callable[[nn.Module], float] = lambda layer: layer.scaling,  # type: ignore[assignment,return-value]
    set_dropout: Callable[[nn.Module, nn.Module], None] | None = None,
    has_merge: bool = True,
) -> SimpleNamespace:
    """The functions of LoRA's contract, each computed by the module's own forward, merge and autograd.

    Args:
        build: `build(linear, rank=..., alpha=..., **options)` wraps an `nn.Linear`; options are `rslora` and `distribution`
            where the module has them (name them as keywords of `build`).
        A, B, weight: dotted names of the factors and of the frozen weight in the module.
        scaling: reads the number s off the module.
        set_dropout: `set_dropout(layer, replacement)` puts a module in the place of the layer's dropout.
        has_merge: whether the module has `merge()` and `unmerge()`.

    Returns:
        A namespace for `check`; what the module lacks is left out and reads "missing".

    Raises:
        UsageError: the module has no parameter or method of that name.
    """
    A_name, B_name, weight_name = A, B, weight
    options = set(inspect.signature(build).parameters)

    def wrap(W0: Tensor, rank: int, alpha: float, bias: Tensor | None = None, seed: int = 0, **chosen: Any) -> nn.Module:
        # Modules draw from the global generator when they are made: seed it, and put it back as it was
        with torch.random.fork_rng(devices=[]):
            # On the CPU its own generator is seeded alone: `torch.manual_seed` takes a millisecond to note it for every device
            (torch.default_generator if W0.device.type == "cpu" else torch).manual_seed(seed)
            linear = nn.Linear(W0.shape[1], W0.shape[0], bias=bias is not None, dtype=W0.dtype, device=W0.device)
            linear.weight.data.copy_(W0)
            if bias is not None:
                linear.bias.data.copy_(bias)
            return build(linear, rank=rank, alpha=alpha, **chosen).eval()

    def layer_of(W0: Tensor, A: Tensor, B: Tensor, s: float, bias: Tensor | None = None) -> nn.Module:
        """The module with given factors; alpha = s * rank makes its scaling s."""
        layer = wrap(W0, len(A), s * len(A), bias)
        layer.get_parameter(A_name).data.copy_(A)
        layer.get_parameter(B_name).data.copy_(B)
        return layer

    def masked(layer: nn.Module, mask: Tensor | None, p: float) -> nn.Module:
        if mask is not None and set_dropout is not None:
            set_dropout(layer, FixedMask(mask, p))
        return layer

    def scaling_factor(alpha: float, rank: int, **chosen: Any) -> float:
        return scaling(wrap(torch.zeros(rank, rank), rank, alpha, **chosen))

    def init(W0: Tensor, *, rank: int, generator: torch.Generator, **chosen: Any) -> tuple[Tensor, Tensor]:
        layer = wrap(W0, rank, 1.0, seed=generator.initial_seed(), **chosen)
        return layer.get_parameter(A_name).detach(), layer.get_parameter(B_name).detach()

    def forward(
        x: Tensor,
        W0: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: float,
        *,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        p: float = 0.0,
    ) -> Tensor:
        with torch.no_grad():
            return masked(layer_of(W0, A, B, scaling, bias), mask, p)(x)  # type: ignore[no-any-return]

    def backward(
        grad_y: Tensor, x: Tensor, W0: Tensor, A: Tensor, B: Tensor, scaling: float, *, mask: Tensor | None = None, p: float = 0.0
    ) -> tuple[Tensor | None, ...]:
        layer, x = masked(layer_of(W0, A, B, scaling), mask, p), x.clone().requires_grad_()
        layer(x).backward(grad_y)
        return x.grad, *factor_gradients(layer)

    def factor_gradients(layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        return layer.get_parameter(A_name).grad, layer.get_parameter(B_name).grad

    def pull(layer: nn.Module, G: Tensor) -> nn.Module:
        """Back-propagate G as the gradient of the merged weight: the outputs for the unit vectors are its columns."""
        layer(torch.eye(G.shape[1], dtype=G.dtype, device=G.device)).backward(G.mT)
        return layer

    def gradients(G: Tensor, A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor | None, Tensor | None]:
        return factor_gradients(pull(layer_of(torch.zeros_like(G), A, B, scaling), G))

    def sgd_step(
        G: Tensor, W0: Tensor, A: Tensor, B: Tensor, scaling: float, *, lr: float, weight_decay: float = 0.0
    ) -> tuple[Tensor, ...]:
        layer = pull(layer_of(W0, A, B, scaling), G)
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        torch.optim.SGD(trained, lr=lr, weight_decay=weight_decay).step()
        return tuple(layer.get_parameter(name).detach() for name in (weight_name, A_name, B_name))

    def merge(W0: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        layer = layer_of(W0, A, B, scaling)
        layer.merge()  # type: ignore[operator]
        return layer.get_parameter(weight_name).detach()

    def unmerge(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        layer = layer_of(W, A, B, scaling)
        layer.merge()  # type: ignore[operator]
        layer.get_parameter(weight_name).data.copy_(W)  # as if W had been the result of merging
        layer.unmerge()  # type: ignore[operator]
        return layer.get_parameter(weight_name).detach()

    def num_trainable(W0: Tensor, *, rank: int) -> int:
        return sum(p.numel() for p in wrap(W0, rank, 1.0).parameters() if p.requires_grad)

    _check_names(wrap(torch.zeros(2, 2), 1, 1.0), (A, B, weight), ("merge", "unmerge") if has_merge else ())
    dropout = {"mask", "p"} if set_dropout else set()
    functions: dict[str, Any] = {
        "scaling_factor": _taking(scaling_factor, {"alpha", "rank", *options & {"rslora"}}),
        "init": _taking(init, {"W0", "rank", "generator", *options & {"distribution"}}),
        "forward": _taking(forward, {"x", "W0", "A", "B", "scaling", "bias"} | dropout),
        "backward": _taking(backward, {"grad_y", "x", "W0", "A", "B", "scaling"} | dropout),
        "gradients": gradients,
        "sgd_step": sgd_step,
        "num_trainable": num_trainable,
    }
    if has_merge:
        functions |= {"merge": merge, "unmerge": unmerge}
    return SimpleNamespace(**functions)


def _check_names(layer: nn.Module, parameters: tuple[str, ...], methods: tuple[str, ...]) -> None:
    """Raise UsageError if the module lacks one of these: once, where it is plugged in, and not in every law."""
    have = [name for name, _ in layer.named_parameters()]
    for name in parameters:
        if name not in have:
            raise UsageError(f"{type(layer).__name__} has no parameter {name!r}{nearest(name, have)}; it has: {', '.join(have)}")
    for name in methods:
        if not callable(getattr(layer, name, None)):
            raise UsageError(f"{type(layer).__name__} has no method {name!r}; give has_merge=False if it cannot merge")


def _taking(function: Callable[..., Any], parameters: set[str]) -> Callable[..., Any]:
    """`function` with a signature that tells the oracle just which options the module really has."""
    kept = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in sorted(parameters)]
    function.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]
    return function
