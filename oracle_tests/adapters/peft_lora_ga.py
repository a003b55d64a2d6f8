"""LoRA-GA of Hugging Face PEFT, through its own `LoraConfig`, `LoraGAConfig`, `preprocess_loraga` and `get_peft_model`.

    loracle check loracle.oracle_tests.adapters.peft_lora_ga --paper lora_ga

PEFT reads the gradient off a backward pass: the layer is shown the unit vectors and the output's gradient is chosen so that
the weight's gradient is G. It decomposes in float32 by a randomised SVD with 4 iterations on 4 * rank directions, which is
exact to rounding when G has no more than these. PEFT corrects the base weight inside its initialisation, so `base_weight`
repeats the initialisation that gave A and B; for other factors PEFT has no such function.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model, preprocess_loraga
from torch import Tensor, nn

from ..loading import MissingFunction
from . import peft_lora

PAPER, LIBRARY = "lora_ga", "peft"
LORACLE = {"dtype": "float32"}
_LENGTHS = "the columns of B are multiplied by their singular values and carry the scale alone, the rows of A have length 1"
DEVIATIONS = {
    "lora_ga.L2a": f"{_LENGTHS}, so neither has the length c",
    "lora_ga.L2d": f"{_LENGTHS}; gamma is 16 by default, as it should be",
    "lora_ga.L3a": f"{_LENGTHS}: the first step is no multiple of the gradient's best approximation of rank 2r",
    "lora_ga.L4": f"{_LENGTHS}, so the first step misses more of the gradient than it has to",
    "lora_ga.L5a": f"{_LENGTHS}; the directions themselves are those that the names say",
    "lora_ga.L5b": "the random direction draws one set of triplets and uses it for both factors, so that r of the 2r are covered",
    "lora_ga.L7a": f"{_LENGTHS}: the size of the adapter's output depends on the gradient, the width and the rank",
    "lora_ga.L7b": f"{_LENGTHS}: so does the size of what goes back",
    "lora_ga.L8a": f"{_LENGTHS}: a whole step departs with its first order",
    "lora_ga.L9": f"{_LENGTHS}: the first gradient of A shows the squares of singular values",
    "lora_ga.L10": "B grows with the gradient: a loss summed over a batch instead of averaged gives another start",
    "lora_ga.L12": "even under the scale 'gd' the singular values in B keep the first step from being that of full fine-tuning",
}
SCALES = {"stable": "stable", "unit": "unit", "gd": "gd_scale"}  # PEFT's "weight_svd" is another formula than "weightS"

_last_start: dict[str, Any] = {}  # arguments and factors of the latest `init`


def _layer(W0: Tensor, backward: Callable[[nn.Module], None], *, rank: int, scaling: float, seed: int, **ga: Any) -> nn.Module:
    """PEFT's LoRA-GA layer on W0, after the gradients that `backward` accumulates in one or more backward passes."""
    config = LoraConfig(
        r=rank,
        lora_alpha=scaling * rank,  # PEFT declares int and divides; the oracle's scalings need a fraction
        target_modules=["linear"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(**ga),
    )
    with torch.random.fork_rng(devices=[]):  # PEFT's randomised SVD and its random direction draw from the global generator
        torch.manual_seed(seed)
        model = peft_lora.OneLayer(peft_lora.linear(W0))
        preprocess_loraga(model, config, lambda: backward(model.linear))
        return get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model.linear


def _show_gradient(linear: nn.Module, G: Tensor) -> None:
    """A backward pass after which the weight's gradient has grown by G: the outputs for the unit vectors are its columns."""
    unit_vectors = torch.eye(G.shape[1], dtype=G.dtype, device=G.device, requires_grad=True)  # PEFT counts passes by a hook on the input
    linear(unit_vectors).backward(G.mT)


def scaling_factor(alpha: float, rank: int) -> float:
    """PEFT's scaling with `use_rslora=True`, which LoRA-GA asks for."""
    return peft_lora.scaling_factor(alpha=alpha, rank=rank, rslora=True)


def init(
    G: Tensor,
    scaling: float,
    *,
    rank: int,
    gamma: float = 16.0,
    direction: str = "ArB2r",
    scale: str = "stable",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The factors that PEFT starts from."""
    if scale not in SCALES:
        raise MissingFunction(f"init with scale {scale!r}")
    start = {"rank": rank, "scaling": scaling, "seed": generator.initial_seed() if generator else 0}
    start |= {"direction": direction, "scale": SCALES[scale], "stable_gamma": gamma}
    layer = _layer(torch.zeros_like(G), lambda linear: _show_gradient(linear, G), **start)
    factors = tuple(layer.get_parameter(name).detach() for name in (peft_lora.A, peft_lora.B))
    _last_start.update(G=G.clone(), factors=factors, arguments=start)
    return factors[0].clone(), factors[1].clone()


def base_weight(W0: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The base weight that PEFT's initialisation leaves, of the start that gave these factors."""
    start = _last_start
    if not start or start["arguments"]["scaling"] != scaling or not all(map(torch.equal, start["factors"], (A, B))):
        raise MissingFunction("base_weight for given factors")
    layer = _layer(W0, lambda linear: _show_gradient(linear, start["G"]), **start["arguments"])
    return layer.get_parameter("base_layer.weight").detach()


def first_order_update(G: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Half the difference of PEFT's updates after a step down and one up its own gradients: what is linear in the step."""
    grad_A, grad_B = peft_lora.gradients(G=G, A=A, B=B, scaling=scaling)
    up = peft_lora.delta_weight(A=A + grad_A, B=B + grad_B, scaling=scaling)
    return (up - peft_lora.delta_weight(A=A - grad_A, B=B - grad_B, scaling=scaling)) / 2


def estimate_gradient(grad: Callable[[Tensor, Any], Tensor], W0: Tensor, batches: Sequence[Any]) -> Tensor:
    """The gradient that `preprocess_loraga` leaves on a layer after one backward pass for each batch."""
    config = LoraConfig(target_modules=["linear"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    model = peft_lora.OneLayer(peft_lora.linear(W0))

    def train_step() -> None:
        for batch in batches:
            _show_gradient(model.linear, grad(W0, batch))

    preprocess_loraga(model, config, train_step)
    return model.linear._peft_loraga_grad
