"""ALLoRA: LoRA's layer without scaling and dropout; the gradients of A and B are rescaled on the way back."""

from dataclasses import dataclass

from torch import nn

from ...reference._adapters import replace_linears
from ...reference.allora import ALLoRALinear
from . import Change, Setup
from . import Method as Base


@dataclass(frozen=True)
class Method(Base):
    layer = ALLoRALinear
    eta: float = 2.0
    kind: str = "row"

    def attach(self, model: nn.Module, setup: Setup) -> list[str]:
        if setup.dropout:
            raise ValueError(f"dropout is {setup.dropout}; ALLoRA has none: use 0")

        def adapt(linear: nn.Linear) -> ALLoRALinear:
            # No alpha: nothing multiplies the adapter, and eta takes over its part
            return ALLoRALinear(linear, rank=setup.rank, eta=self.eta, kind=self.kind, generator=setup.generator)

        return replace_linears(model, setup.pattern, adapt)

    def change(self, layer: ALLoRALinear) -> Change:
        return Change(layer.A.detach().clone(), layer.B.detach().clone())
