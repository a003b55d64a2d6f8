"""Full fine-tuning, the baseline: the layers stay what they are, and their weights are trained."""

from dataclasses import dataclass

from torch import nn

from ...reference._adapters import matching_linears
from . import Method as Base
from . import Setup


@dataclass(frozen=True)
class Method(Base):
    layer = nn.Linear

    def attach(self, model: nn.Module, setup: Setup) -> list[str]:
        chosen = matching_linears(model, setup.pattern)
        model.requires_grad_(False)
        for linear in chosen.values():
            linear.weight.requires_grad_(True)
        return list(chosen)

    def obstacle(self, *, weight_decay: float = 0.0) -> str | None:
        return "every entry of the weights was trained"
