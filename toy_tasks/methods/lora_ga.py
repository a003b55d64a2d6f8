"""LoRA-GA: factors from the gradient of a few samples, their product taken out of the weight, the scaling of rsLoRA."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ...reference._adapters import replace_linears
from ...reference.lora import LoRALinear
from ...reference.lora_ga import adapt_linear, draw_sketch
from . import Setup, linears, lora


@dataclass(frozen=True)
class Method(lora.Method):
    # With the larger gamma what is taken out of the weight is a sixtieth: less capacity is spent on putting it back
    compared: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {}, "gamma_1000": {"gamma": 1000.0}}
    rslora: bool = True
    direction: str = "ArB2r"
    scale: str = "stable"
    gamma: float = 16.0
    gradient_samples: int = 32

    def __post_init__(self) -> None:
        if not self.rslora:
            raise ValueError("rslora is false; LoRA-GA divides alpha by the root of the rank: leave it true")

    def attach(self, model: nn.Module, setup: Setup) -> list[str]:
        gradients, name_of = setup.gradients(self.gradient_samples), linears(model)

        def adapt(linear: nn.Linear) -> LoRALinear:
            G = gradients[name_of[id(linear)]].to(linear.weight.device)
            return adapt_linear(
                linear,
                G,
                rank=setup.rank,
                alpha=setup.alpha,
                gamma=self.gamma,
                direction=self.direction,
                scale=self.scale,
                sketch=draw_sketch(G, rank=setup.rank, generator=setup.generator),
                dropout=setup.dropout,
                generator=setup.generator,
            )

        return replace_linears(model, setup.pattern, adapt)

    @property
    def starts_inside(self) -> bool:
        return True
