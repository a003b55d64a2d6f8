"""Put adapters into a model: replace `nn.Linear` layers by name."""

import re
from collections.abc import Callable

from torch import nn


def matching_linears(model: nn.Module, pattern: str) -> dict[str, nn.Linear]:
    """Every `nn.Linear` whose dotted name fully matches the regular expression `pattern`, in the model's order.

    Raises:
        ValueError: no name matches; the message lists the names that exist.
    """
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    chosen = {name: linear for name, linear in linears.items() if name and re.fullmatch(pattern, name)}
    if not chosen:
        raise ValueError(f"no nn.Linear is named like {pattern!r}; the model has: {', '.join(linears) or 'none'}")
    return chosen


def replace_linears(model: nn.Module, pattern: str, make: Callable[[nn.Linear], nn.Module]) -> list[str]:
    """Replace, in place, every `nn.Linear` whose dotted name fully matches the regular expression `pattern`.

    `make(linear)` returns the layer that takes its place, for example
    `replace_linears(model, r".*\\.(q|v)_proj", lambda linear: LoRALinear(linear, rank=8, alpha=16))`.
    Everything else in the model is frozen first, so that afterwards just what `make` added is trained.

    Returns:
        The names of the replaced layers, in the model's order.

    Raises:
        ValueError: no name matches; the message lists the names that exist.
    """
    chosen = list(matching_linears(model, pattern))
    model.requires_grad_(False)
    for name in chosen:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(linear))
    return chosen
