"""LoRA: B starts at zero, A at random."""

from dataclasses import dataclass

from torch import nn

from ...reference._adapters import replace_linears
from ...reference.lora import LoRALinear
from . import Change, Setup
from . import Method as Base


@dataclass(frozen=True)
class Method(Base):
    layer = LoRALinear
    rslora: bool = False

    def attach(self, model: nn.Module, setup: Setup) -> list[str]:
        def adapt(linear: nn.Linear) -> LoRALinear:
            return LoRALinear(
                linear, rank=setup.rank, alpha=setup.alpha, rslora=self.rslora, dropout=setup.dropout, generator=setup.generator
            )

        return replace_linears(model, setup.pattern, adapt)

    def change(self, layer: LoRALinear) -> Change:
        return Change(layer.A.detach().clone(), layer.scaling * layer.B.detach())
