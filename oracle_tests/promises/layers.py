"""What the layers of several papers promise alike: a check takes a layer and the update that it adds to its frozen weight.

`Largest` watches what any code makes.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def randn(*shape):
    """Normal numbers of double precision from the global generator."""
    return torch.randn(*shape, dtype=torch.float64)


def check_dropout(layer, update):
    """A layer of three inputs and any outputs drops each with probability 0.25 in training, and divides the rest by 0.75."""
    x = randn(3)
    masks = torch.tensor([[i >> k & 1 for k in range(3)] for i in range(8)], dtype=torch.float64)
    possible = layer.base(x) + (x * masks / 0.75) @ update.T
    with torch.no_grad():
        drawn = layer.train()(x.expand(4000, 3))
    which = (drawn[:, None] - possible).abs().amax(dim=-1)
    assert which.min(dim=1).values.max() < 1e-9, "an output belongs to no mask"
    # Seven standard errors of the share of 12,000 kept entries
    kept = masks[which.argmin(dim=1)].mean().item()
    assert abs(kept - 0.75) < 7 * (0.75 * 0.25 / 12_000) ** 0.5, f"a share of {kept} is kept"


def check_no_dropout(layer, update):
    """The layer as it is drops nothing and draws nothing."""
    x = randn(5, layer.base.in_features)
    state = torch.get_rng_state()
    y = layer(x)
    assert torch.equal(torch.get_rng_state(), state), "the global generator has moved"
    assert torch.allclose(y, layer.base(x) + x @ update.T)


def check_merging(layer, update):
    """Merging and unmerging, each as often as one likes, leave the layer's function as it is."""
    x = randn(5, layer.base.in_features)
    before, weight = layer(x), layer.base.weight.clone()
    assert not layer.merged
    for merged in (False, True, True, False, False, True, False):
        layer.merge() if merged else layer.unmerge()
        assert layer.merged == merged
        assert torch.allclose(layer(x), before)
        assert torch.allclose(layer.base.weight, weight + merged * update)
        assert not layer.base.weight.requires_grad, "the frozen weight is a part of autograd's graph"


def check_precise_factors(layer, names, update):
    """Float32 factors of these names beside a bfloat16 weight; `update(layer)` is what they add to it."""
    x = randn(5, layer.base.in_features).bfloat16()
    factors = [getattr(layer, name) for name in names]
    for factor in factors:
        factor.data = torch.randn(factor.shape)
    y, weight, change = layer(x), layer.base.weight.clone(), update(layer)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert {factor.grad.dtype for factor in factors} == {torch.float32}
    layer.merge()
    assert torch.equal(layer.base.weight, (weight + change).bfloat16())
    merged = layer.base.weight.clone()
    layer.unmerge()
    assert torch.equal(layer.base.weight, (merged - change).bfloat16())


class Largest(TorchDispatchMode):
    """Remembers the entries of the largest tensor that an operation made, other than a view of one of its arguments."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            if result.untyped_storage().data_ptr() not in given:
                self.entries = max(self.entries, result.numel())
        return result
