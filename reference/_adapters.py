"""Put adapters into a model, and treat the many small ones that are alike together."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Item = TypeVar("Item")
ENTRIES_TOGETHER = 2**20  # about what fits a cache; to stack more costs more than it saves


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


def map_alike(
    function: Callable[[dict[str, Any]], dict[str, Tensor]], items: Iterable[Item], arguments: Callable[[Item], dict[str, Any]]
) -> Iterator[tuple[Item, dict[str, Tensor]]]:
    """Each item with `function(arguments(item))`, not in order: items of equal shapes and equal numbers in one `torch.vmap`.

    For small tensors a call costs more than its sums. Tensors too large for that are not stacked, which would copy them.
    """
    alike: dict[object, list[Item]] = {}
    sizes: dict[object, int] = {}
    for item in items:
        given = arguments(item)
        kind: object = tuple((k, (v.shape, v.dtype, v.device) if isinstance(v, Tensor) else v) for k, v in given.items())
        alike.setdefault(kind, []).append(item)
        sizes[kind] = sum(v.numel() for v in given.values() if isinstance(v, Tensor))
    for kind, group in alike.items():
        together = max(1, ENTRIES_TOGETHER // sizes[kind])
        for first in range(0, len(group), together):
            yield from _map_stacked(function, group[first : first + together], arguments)


def _map_stacked(
    function: Callable[[dict[str, Any]], dict[str, Tensor]], items: list[Item], arguments: Callable[[Item], dict[str, Any]]
) -> Iterator[tuple[Item, dict[str, Tensor]]]:
    """The same for items that are alike: one call for all, and no stacking of a single one."""
    given = [arguments(item) for item in items]
    if len(items) == 1:
        yield items[0], function(given[0])
        return
    numbers = {k: v for k, v in given[0].items() if not isinstance(v, Tensor)}
    stacked = {k: torch.stack([own[k] for own in given]) for k in given[0] if k not in numbers}
    results = torch.vmap(lambda tensors: function({**tensors, **numbers}))(stacked)
    for i, item in enumerate(items):
        yield item, {k: v[i] for k, v in results.items()}
