"""LoRA-SB: fixed factors from the first update of full fine-tuning; only the r x r matrix between them is trained."""

from dataclasses import dataclass

from torch import nn

from ...reference._adapters import replace_linears
from ...reference.lora_sb import LoRASBLinear, draw_sketch, first_step_update, init
from . import Change, Setup, linears
from . import Method as Base


@dataclass(frozen=True)
class Method(Base):
    layer = LoRASBLinear
    optimizer_of_the_start: str = "adamw"
    niter: int = 10
    gradient_samples: int = 50

    def attach(self, model: nn.Module, setup: Setup) -> list[str]:
        if setup.dropout:
            raise ValueError(f"dropout is {setup.dropout}; LoRA-SB has none: use 0")
        gradients, name_of = setup.gradients(self.gradient_samples), linears(model)
        scaling = setup.alpha / setup.rank

        def adapt(linear: nn.Linear) -> LoRASBLinear:
            G = gradients[name_of[id(linear)]].to(linear.weight.device)
            update = first_step_update(G, lr=setup.lr, optimizer=self.optimizer_of_the_start)
            sketch = draw_sketch(update, rank=setup.rank, generator=setup.generator)
            A, R, B = init(update, scaling, rank=setup.rank, sketch=sketch, niter=self.niter)
            dtype = linear.weight.dtype
            return LoRASBLinear(linear, A.to(dtype), R.to(dtype), B.to(dtype), scaling)

        return replace_linears(model, setup.pattern, adapt)

    def change(self, layer: LoRASBLinear) -> Change:
        return Change(layer.A.clone(), layer.scaling * layer.B @ layer.R.detach())
