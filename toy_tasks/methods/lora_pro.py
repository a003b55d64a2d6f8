"""LoRA-Pro: LoRA's layers under an optimizer of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...reference.lora_pro import LoRAProAdamW
from . import lora


@dataclass(frozen=True)
class Method(lora.Method):
    compared: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {}, "efficient": {"mode": "efficient"}}
    mode: str = "full"
    X: str = "sylvester"
    delta: float = 0.0

    def optimizer(self, model: nn.Module, *, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        layers = self.layers(model).values()
        return LoRAProAdamW(layers, lr=lr, weight_decay=weight_decay, mode=self.mode, X=self.X, delta=self.delta)

    def trained(self, model: nn.Module, *, weight_decay: float = 0.0) -> dict[str, Tensor]:
        found = super().trained(model)
        if self.mode == "full" and weight_decay > 0:
            found |= {f"{name}.base.weight": layer.base.weight for name, layer in self.layers(model).items()}
        return found

    def obstacle(self, *, weight_decay: float = 0.0) -> str | None:
        if self.mode == "full" and weight_decay > 0:
            return "the weight decay of LoRA-Pro's full AdamW has changed the pretrained weight itself"
        return None
