"""The papers' methods put into models: what `loracle toy compare` and the trainer for real models share.

`methods/SLUG.py` holds a frozen dataclass `Method`, whose fields are the method's own options (the keys of `options` in the
table [full] of its config) with their defaults. It puts the layers, initialisers and optimizers of `reference/SLUG.py` into
a model; it contains no mathematics of its own. To add a paper, subclass `Method` below and override what differs from LoRA.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn

from ..config import UsageError, convert, nearest


@dataclass(frozen=True)
class Setup:
    """What every method is told when it is put into a model.

    `gradients(samples)` gives, for each `nn.Linear` that `pattern` matches, by its name, the gradient (out, in) of the mean
    loss of so many training samples, at the pretrained weights. It costs a pass over these samples: ask only if needed.
    """

    pattern: str  # a regular expression that a layer's dotted name matches fully
    rank: int
    alpha: float
    lr: float
    gradients: Callable[[int], Mapping[str, Tensor]]
    dropout: float = 0.0
    generator: torch.Generator = field(default_factory=torch.Generator)


class Change(NamedTuple):
    """A term B A of a layer's weight, scaling included."""

    A: Tensor  # (rank, in)
    B: Tensor  # (out, rank)


@dataclass(frozen=True)
class Method:
    """One paper's method and its options."""

    layer: ClassVar[type[nn.Module]]  # what `attach` puts in the place of a linear layer
    # Its rows in `loracle toy compare`: a word for the row's name, and the options changed for it
    compared: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {}}

    def attach(self, model: nn.Module, setup: Setup) -> list[str]:
        """Put the adapters into the model, in place; afterwards just what they train requires a gradient.

        Returns the names of the replaced layers. Raises ValueError if the pattern matches nothing or an option does not fit.
        """
        raise NotImplementedError

    def optimizer(self, model: nn.Module, *, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        """AdamW on everything that is trained; a paper with an optimizer of its own gives that."""
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)

    def trained(self, model: nn.Module, *, weight_decay: float = 0.0) -> dict[str, Tensor]:
        """The tensors that a step of the optimizer changes, by name: what a checkpoint has to hold."""
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def layers(self, model: nn.Module) -> dict[str, Any]:
        """The adapted layers by name, in the model's order."""
        return {name: module for name, module in model.named_modules() if isinstance(module, self.layer)}

    def change(self, layer: Any) -> Change:
        """What a layer adds to its `base.weight` now, in tensors of its own, scaling in B; only where `obstacle` is None."""
        raise NotImplementedError

    @property
    def starts_inside(self) -> bool:
        """Whether `attach` took the first `change` out of `base.weight`: then the total change is the difference of two."""
        return False

    def obstacle(self, *, weight_decay: float = 0.0) -> str | None:
        """Why the trained layer is not the pretrained one plus a low-rank term, or None if it is."""
        return None


def names() -> list[str]:
    """The slugs of the papers that have a method, and the baselines."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def make(slug: str, options: Mapping[str, Any] | None = None) -> Method:
    """The method of a paper with some options changed from their defaults.

    Raises:
        UsageError: there is no such method or option, or an option has another type.
    """
    if slug not in names():
        raise UsageError(f"there is no method {slug!r}; {nearest(slug, names())}")
    kind: type[Method] = importlib.import_module(f"{__name__}.{slug}").Method
    known = {option.name for option in fields(kind)}
    for key in options or {}:
        if key not in known:
            raise UsageError(f"{slug} has no option {key!r}; {nearest(key, known)}")
    kinds = get_type_hints(kind)
    return kind(**{key: convert(value, kinds[key], f"option {key} of {slug}") for key, value in (options or {}).items()})


def linears(model: nn.Module) -> dict[int, str]:
    """The name of each module of a model by its `id`, for the function that `replace_linears` calls with a layer."""
    return {id(module): name for name, module in model.named_modules()}
