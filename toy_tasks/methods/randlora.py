"""RandLoRA: diagonals around random bases, which all layers of a model share."""

from dataclasses import dataclass

from torch import nn

from ...reference.randlora import RandLoRALinear, adapt_model
from . import Method as Base
from . import Setup


@dataclass(frozen=True)
class Method(Base):
    layer = RandLoRALinear
    convention: str = "paper"
    kind: str = "uniform"
    zero: str = "lambdas"

    def attach(self, model: nn.Module, setup: Setup) -> list[str]:
        return adapt_model(
            model,
            setup.pattern,
            rank=setup.rank,
            kind=self.kind,
            generator=setup.generator,
            alpha=setup.alpha,
            convention=self.convention,
            zero=self.zero,
            dropout=setup.dropout,
        )

    def obstacle(self, *, weight_decay: float = 0.0) -> str | None:
        return "RandLoRA's change of a layer has full rank: no pair of factors of low rank holds it"
