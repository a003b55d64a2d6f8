"""NLoRA, SLoRA and IntTune: a small matrix between the factors, which start as rows and columns of the weight."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ...reference._adapters import replace_linears
from ...reference.nlora import METHODS, SLoRALinear
from . import Change, Setup
from . import Method as Base


@dataclass(frozen=True)
class Method(Base):
    layer = SLoRALinear
    # As published the start is not the pretrained weight
    compared: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {},
        "residual": {"residual": True},
        "slora": {"method": "slora"},
        "inttune": {"method": "inttune"},
    }
    method: str = "nlora"
    core: str | None = None
    residual: bool = False
    rcond: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; needed one of {', '.join(METHODS)}")
        if self.method == "slora" and self.residual:
            raise ValueError("residual is true; SLoRA starts at the pretrained weight, so there is nothing to correct: leave it false")

    def attach(self, model: nn.Module, setup: Setup) -> list[str]:
        def adapt(linear: nn.Linear) -> SLoRALinear:
            return SLoRALinear(
                linear,
                rank=setup.rank,
                alpha=setup.alpha,
                method=self.method,
                core=self.core,
                residual=self.residual,
                rcond=self.rcond,
                dropout=setup.dropout,
                generator=setup.generator,
            )

        return replace_linears(model, setup.pattern, adapt)

    def change(self, layer: SLoRALinear) -> Change:
        return Change(layer.A.detach().clone(), layer.scaling * (layer.B @ layer.N).detach())

    @property
    def starts_inside(self) -> bool:
        return self.residual
