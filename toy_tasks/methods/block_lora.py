"""Block-LoRA: the rank is cut into blocks that share one A. The authors' own rank and number of blocks are unknown."""

from dataclasses import dataclass

from torch import nn

from ...reference._adapters import replace_linears
from ...reference.block_lora import BlockLoRALinear, to_compact_lora
from . import Change, Setup
from . import Method as Base


@dataclass(frozen=True)
class Method(Base):
    layer = BlockLoRALinear
    blocks: int = 2
    rslora: bool = False
    per_block: bool = False
    order: str = "add_first"

    def attach(self, model: nn.Module, setup: Setup) -> list[str]:
        def adapt(linear: nn.Linear) -> BlockLoRALinear:
            return BlockLoRALinear(
                linear,
                rank=setup.rank,
                blocks=self.blocks,
                alpha=setup.alpha,
                rslora=self.rslora,
                per_block=self.per_block,
                dropout=setup.dropout,
                order=self.order,
                generator=setup.generator,
            )

        return replace_linears(model, setup.pattern, adapt)

    def change(self, layer: BlockLoRALinear) -> Change:
        A, B = to_compact_lora(layer.A.detach(), layer.B.detach())
        return Change(A, layer.scaling * B)
