"""Argument checks that every reference file shares: they read shapes and dtypes, and values only where named so."""

import math

import torch
from torch import Tensor


def check_shapes(**tensors: tuple[Tensor | None, str]) -> None:
    """Check that named floating-point tensors agree in their dimensions, dtype and device.

    Each keyword is `name=(tensor, "out in")`; a dimension name stands for one size throughout the call, and a
    leading `...` for any number of dimensions, the same ones wherever it stands. `None` is left out. No value is read.

    Raises:
        ValueError: a tensor is not floating point, has another shape than its names ask for, or another dtype or
            device than the first. The message names both tensors.
    """
    sizes: dict[str, tuple[object, str]] = {}
    first_name, first = "", None
    for name, (tensor, names) in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; a floating-point tensor is needed: call {name}.float() or .double()")
        if first is None:
            first_name, first = name, tensor
        elif tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device} but {first_name} is {first.dtype} on {first.device}; "
                f"move one to the other: {name}.to({first_name})"
            )
        shape: tuple[object, ...] = tuple(tensor.shape)
        dims = names.split()
        if dims[0] == "..." and len(shape) >= len(dims) - 1:
            lead = len(shape) - len(dims) + 1
            shape = (shape[:lead], *shape[lead:])
        if len(shape) != len(dims):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; needed ({', '.join(dims)})")
        for size, dim in zip(shape, dims, strict=True):
            known, source = sizes.setdefault(dim, (size, name))
            if known != size:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; needed ({', '.join(dims)}) with {dim} = {known}, as in {source}")


def check_rank(rank: int, W0: Tensor) -> None:
    """Check that `rank` is a whole number between 1 and min(out, in) of `W0`, else raise ValueError."""
    largest = min(W0.shape)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= largest:
        raise ValueError(f"rank is {rank!r}; needed a whole number from 1 to {largest}, the smaller side of W0 {tuple(W0.shape)}")


def check_finite(**tensors: Tensor) -> None:
    """Check that no entry is NaN or infinite, else raise ValueError. Reads every value: for set-up functions only."""
    for name, tensor in tensors.items():
        low, high = torch.aminmax(tensor)  # NaN is passed on; a tenth of the time of isfinite().all()
        if not (low.isfinite() and high.isfinite()):
            bad = int((~tensor.isfinite()).sum())
            raise ValueError(f"{name} has {bad} of {tensor.numel()} entries that are NaN or infinite; repair it before adapting the model")


def check_positive(name: str, value: float) -> None:
    """Check that the number `name` is positive and finite, else raise ValueError."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; needed a positive finite number")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Check that the option `name` has one of the named values, else raise ValueError with the nearest name."""
    if value not in choices:
        from difflib import get_close_matches

        near = get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} is {value!r}; needed one of {', '.join(map(repr, choices))}{hint}")
