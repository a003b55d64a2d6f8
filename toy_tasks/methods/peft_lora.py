"""PEFT's LoRA, the other baseline: its layers in the place of ours, everything else the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ...reference._adapters import matching_linears
from . import Change, Setup
from . import Method as Base

ADAPTER = "default"


@dataclass(frozen=True)
class Method(Base):
    compared: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # the same method as `lora`, from a library that need not be installed
    rslora: bool = False

    def attach(self, model: nn.Module, setup: Setup) -> list[str]:
        from peft import LoraConfig, inject_adapter_in_model

        # PEFT draws from the global generator
        seed = int(torch.randint(2**62, (), generator=setup.generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = LoraConfig(
                r=setup.rank,
                lora_alpha=setup.alpha,  # type: ignore[arg-type]  # any number will do
                lora_dropout=setup.dropout,
                use_rslora=self.rslora,
                target_modules=list(matching_linears(model, setup.pattern)),
            )
            inject_adapter_in_model(config, model, ADAPTER)
        return list(self.layers(model))

    def layers(self, model: nn.Module) -> dict[str, Any]:
        from peft.tuners.lora import LoraLayer

        return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}

    def change(self, layer: Any) -> Change:
        A, B = (factors[ADAPTER].weight.detach() for factors in (layer.lora_A, layer.lora_B))
        return Change(A.clone(), layer.scaling[ADAPTER] * B)
