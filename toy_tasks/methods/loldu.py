"""LoLDU: only the diagonal between the LU factors of the weight is trained; the pretrained weight stays as it is."""

from dataclasses import dataclass

from torch import nn

from ...reference._adapters import replace_linears
from ...reference.loldu import LoLDULinear
from . import Change, Setup
from . import Method as Base


@dataclass(frozen=True)
class Method(Base):
    layer = LoLDULinear
    diagonal: str = "lu"
    preserve: bool = True
    train_scaling: bool = False

    def attach(self, model: nn.Module, setup: Setup) -> list[str]:
        if setup.dropout:
            raise ValueError(f"dropout is {setup.dropout}; LoLDU has none: use 0")

        def adapt(linear: nn.Linear) -> LoLDULinear:
            # The rank may exceed a layer's smaller side, as the official default of 768 does: then all of it is taken
            rank = min(setup.rank, *linear.weight.shape)
            options = {"diagonal": self.diagonal, "preserve": self.preserve, "train_scaling": self.train_scaling}
            return LoLDULinear(linear, rank=rank, alpha=setup.alpha, generator=setup.generator, **options)  # type: ignore[arg-type]

        return replace_linears(model, setup.pattern, adapt)

    def change(self, layer: LoLDULinear) -> Change:
        # W0 x + P L diag(sigma z - sigma_0 z_0) U x: the term beside the weight that is kept
        z = (layer.scaling * layer.z - layer.scaling0 * layer.z0).detach()
        return Change(layer.U.clone(), layer.L[layer.P] * z)
