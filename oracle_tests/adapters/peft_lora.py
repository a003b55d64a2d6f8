"""LoRA of Hugging Face PEFT, through its own `LoraConfig` and `get_peft_model`.

    loracle check loracle.oracle_tests.adapters.peft_lora --paper lora

The factors that a law chooses are written into PEFT's parameters; all that comes back is computed by PEFT's layer.
PEFT merges in place and keeps no function for the update alone, so `delta_weight` is its own `get_delta_weight`.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ..objects import from_module

PAPER, LIBRARY = "lora", "peft"
DEVIATIONS: dict[str, str] = {}

NAME = "default"  # PEFT's name for the only adapter
A, B = f"lora_A.{NAME}.weight", f"lora_B.{NAME}.weight"


class OneLayer(nn.Module):
    """The smallest model that PEFT can adapt."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear


def build(linear: nn.Linear, *, rank: int, alpha: float, rslora: bool = False, distribution: str = "kaiming") -> nn.Module:
    """PEFT's LoRA layer around `linear`."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # PEFT declares int and divides; the oracle's scalings need a fraction
        target_modules=["linear"],
        use_rslora=rslora,
        init_lora_weights="gaussian" if distribution == "gaussian" else True,
    )
    # autocast_adapter_dtype would keep half-precision factors in float32
    model = get_peft_model(OneLayer(linear), config, autocast_adapter_dtype=False)
    return model.base_model.model.linear


def _set_dropout(layer: nn.Module, replacement: nn.Module) -> None:
    layer.lora_dropout[NAME] = replacement


_functions = from_module(
    build,
    A=A,
    B=B,
    weight="base_layer.weight",
    scaling=lambda layer: layer.scaling[NAME],
    set_dropout=_set_dropout,
)
scaling_factor, init, forward, backward = _functions.scaling_factor, _functions.init, _functions.forward, _functions.backward
gradients, sgd_step, num_trainable = _functions.gradients, _functions.sgd_step, _functions.num_trainable
merge, unmerge = _functions.merge, _functions.unmerge


def linear(W0: Tensor) -> nn.Linear:
    """A layer without bias whose weight is a copy of W0; nothing is drawn."""
    layer = nn.utils.skip_init(nn.Linear, W0.shape[1], W0.shape[0], bias=False, dtype=W0.dtype, device=W0.device)
    layer.weight.data.copy_(W0)
    return layer


def delta_weight(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """PEFT's own `get_delta_weight` of a layer with these factors."""
    with torch.random.fork_rng(devices=[]):  # PEFT draws starting factors from the global generator
        layer = build(linear(B @ A), rank=len(A), alpha=scaling * len(A))
    layer.get_parameter(f"lora_A.{NAME}.weight").data.copy_(A)
    layer.get_parameter(f"lora_B.{NAME}.weight").data.copy_(B)
    return layer.get_delta_weight(NAME).detach()
