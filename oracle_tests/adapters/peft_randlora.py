"""RandLoRA of Hugging Face PEFT, through its own `RandLoraConfig` and `get_peft_model`.

    loracle check loracle.oracle_tests.adapters.peft_randlora --paper randlora

What a law chooses is written into PEFT's parameters and shared buffers; all that comes back is computed by PEFT's layer.

PEFT keeps lambda as (rank, bases), A as (rank, 1, small) and B as (large, bases, rank). It flattens the columns of B term by term
and the rows of the scaled A rank by rank, so that its layer computes the paper's sum for the bases that are read off B as
(large, rank, bases). With that reading, in both directions, it is the paper's sum; the pairing itself is the known mistake
`pairing_of_peft`, harmless where the columns of B are drawn independently.
"""

import warnings

import torch
from peft import RandLoraConfig, get_peft_model
from torch import Tensor, nn

from ..loading import MissingFunction
from . import peft_lora

PAPER, LIBRARY = "randlora", "peft"
LORACLE = {"dtype": "float32"}  # in which PEFT keeps its bases
DEVIATIONS = {
    "randlora.L14c": "dense bases are drawn and divided by their standard deviation in bfloat16: it is 1 up to some thousandths only",
    "randlora.L16a": "the scaling is alpha / rank, without the root of the number of terms (`convention='peft'` here)",
    "randlora.L16c": "alpha is 640 unless given, whatever the rank: 20 times the rank, as the description advises, for rank 32 only",
}
NAME = "default"  # PEFT's name for the only adapter


class Model(nn.Module):
    """Layers that PEFT adapts together, with one pair of bases."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


def build(weights: list[Tensor], *, rank: int, seed: int = 0, bias: Tensor | None = None, **options) -> Model:
    """PEFT's RandLoRA around layers with these weights; its `layers` are PEFT's, with the shared pair in each."""
    model = Model([peft_lora.linear(W0) for W0 in weights])
    if bias is not None:
        model.layers[0].bias = nn.Parameter(bias.clone())
    config = RandLoraConfig(r=rank, target_modules=r"layers\.\d+", projection_prng_key=seed, **options)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model


def layer_of(W0: Tensor, gammas: Tensor, A: Tensor, lambdas: Tensor, B: Tensor, scaling: float, bias: Tensor | None = None) -> nn.Module:
    """PEFT's layer with the diagonals and bases that a law chose; its A and B stand where PEFT reads them."""
    rank, bases = len(A), len(lambdas)
    layer = build([W0], rank=rank, bias=bias, randlora_alpha=scaling * rank).layers[0]
    layer.randlora_lambda[NAME].data = lambdas.mT.contiguous().clone()
    layer.randlora_gamma[NAME].data = gammas.clone()
    layer.randlora_A[NAME] = A[:, None].clone()
    # Read as (large, rank, bases): column (j, k) of B stands where the row (k, j) of the scaled A is
    layer.randlora_B[NAME] = B.mT.reshape(len(B), bases, rank).clone()
    return layer.eval()


def num_bases(W0: Tensor, *, rank: int) -> int:
    """The number of terms that PEFT's layer has."""
    return build([W0], rank=rank).layers[0].num_bases


def num_trainable(W0: Tensor, *, rank: int) -> int:
    """What PEFT leaves trainable."""
    return sum(p.numel() for p in build([W0], rank=rank).parameters() if p.requires_grad)


def scaling_factor(rank: int, bases: int, *, alpha: float | None = None, convention: str = "paper") -> float:
    """PEFT's one scaling, asked by the convention that is PEFT's or by none; with its own alpha for its own default rank of 32."""
    if convention == "vision":
        raise MissingFunction(f"scaling_factor with convention {convention!r}")
    given = {} if alpha is None else {"randlora_alpha": alpha}
    return build([torch.zeros(rank, rank)], rank=rank, **given).layers[0].scaling[NAME]


def init(W0: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """The diagonals that PEFT starts from."""
    layer = build([W0], rank=rank).layers[0]
    return layer.randlora_gamma[NAME].detach(), layer.randlora_lambda[NAME].detach().mT.contiguous()


def draw_bases(
    weights: list[Tensor], *, rank: int, kind: str = "uniform", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """The pair that PEFT draws for a model of these layers, read as it uses it."""
    if kind == "normal":
        raise MissingFunction(f"draw_bases with kind {kind!r}")
    chosen = {} if kind == "uniform" else {kind: True}
    seed = generator.initial_seed() if generator is not None else 0
    layer = build(weights, rank=rank, seed=seed, **chosen).layers[0]
    A, B = (base[NAME].to(weights[0].dtype) for base in (layer.randlora_A, layer.randlora_B))
    return A[:, 0].clone(), B.reshape(len(B), rank, -1).mT.clone()


def forward(
    x: Tensor,
    W0: Tensor,
    gammas: Tensor,
    A: Tensor,
    lambdas: Tensor,
    B: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """PEFT's forward."""
    layer = layer_of(W0, gammas, A, lambdas, B, scaling, bias)
    if mask is not None:
        layer.randlora_dropout[NAME] = _FixedMask(mask, p)
    with torch.no_grad():
        return layer(x)


class _FixedMask(nn.Module):
    """In place of the layer's dropout: the mask and the probability that a law chose."""

    def __init__(self, mask: Tensor, p: float) -> None:
        super().__init__()
        self.mask, self.p = mask, p

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask / (1 - self.p)


def delta_weight(gammas: Tensor, A: Tensor, lambdas: Tensor, B: Tensor, scaling: float, *, wide: bool = False) -> Tensor:
    """PEFT's own `get_delta_weight`."""
    small, large = A.shape[1], len(B)
    if wide and small == large:  # of a square layer PEFT, too, has one form
        return delta_weight(gammas, A, lambdas, B, scaling).mT
    W0 = A.new_zeros((small, large) if wide else (large, small))
    return layer_of(W0, gammas, A, lambdas, B, scaling).get_delta_weight(NAME).detach()


def gradients(G: Tensor, gammas: Tensor, A: Tensor, lambdas: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """What PEFT's backward leaves on its diagonals: the outputs for the unit vectors are the weight's columns."""
    layer = layer_of(torch.zeros_like(G), gammas, A, lambdas, B, scaling)
    layer(torch.eye(G.shape[1], dtype=G.dtype, device=G.device)).backward(G.mT)
    return layer.randlora_gamma[NAME].grad, layer.randlora_lambda[NAME].grad.mT.contiguous()


def merge(W0: Tensor, gammas: Tensor, A: Tensor, lambdas: Tensor, B: Tensor, scaling: float) -> Tensor:
    """PEFT's merge, the safe one, which must give the same as the other."""
    layer = layer_of(W0, gammas, A, lambdas, B, scaling)
    layer.merge(safe_merge=True)
    return layer.get_parameter("base_layer.weight").detach()


def unmerge(W: Tensor, gammas: Tensor, A: Tensor, lambdas: Tensor, B: Tensor, scaling: float) -> Tensor:
    """PEFT's unmerge."""
    layer = layer_of(W, gammas, A, lambdas, B, scaling)
    layer.merge()
    layer.get_parameter("base_layer.weight").data.copy_(W)  # as if W had been the result of merging
    layer.unmerge()
    return layer.get_parameter("base_layer.weight").detach()
