"""What `reference/lora.py` promises beside the laws of LoRA: its layer, its errors, its defaults."""

import math

import torch
from torch import nn

from loracle.oracle_tests.objects import from_module
from loracle.oracle_tests.promises import follows_the_global_generator, promise, refuses
from loracle.oracle_tests.promises.layers import check_dropout, check_merging, check_no_dropout, check_precise_factors

# The set-up functions that read values, and of which arguments
FINITE = {"init": ("W0",), "merge": ("W0", "A", "B"), "unmerge": ("W", "A", "B")}


def layer_functions(module):
    """The contract of LoRA by the forward, merge and autograd of the layer `LoRALinear`."""

    def build(linear, *, rank, alpha, rslora=False):
        return module.LoRALinear(linear, rank=rank, alpha=alpha, rslora=rslora)

    return from_module(build)


NAMESPACES = {"LoRALinear": layer_functions}


def _layer(module, **options):
    """A small layer whose B is not zero."""
    layer = module.LoRALinear(nn.Linear(3, 4, dtype=torch.float64), rank=2, alpha=3.0, **options)
    nn.init.normal_(layer.B)
    return layer


def _update(layer):
    return layer.scaling * layer.B @ layer.A


# Draws and defaults


@promise("Without a generator the start is drawn from torch's own.", of="init")
def start_from_the_global_generator(module):
    assert follows_the_global_generator(lambda: module.init(torch.ones(5, 6), rank=2).A)


@promise("Without a generator a mask is drawn from torch's own.", of="draw_mask")
def mask_from_the_global_generator(module):
    assert follows_the_global_generator(lambda: module.draw_mask(torch.ones(5, 6), p=0.5))


@promise("A mask lies on the device of the input.", of="draw_mask")
def mask_on_the_device(module):
    assert module.draw_mask(torch.ones(5, 6, device="meta"), p=0.5).device.type == "meta"


@promise("With probability 0 nothing is dropped, not even where the number drawn is 0.", of="draw_mask")
def mask_keeps_all(module):
    # Of 2^24 numbers one is 0; this seed gives it among the first 20,000
    assert module.draw_mask(torch.ones(20_000), p=0.0, generator=torch.Generator().manual_seed(146)).all()


@promise("A mask without a probability drops entries and divides by nothing.", of=("forward", "backward"))
def probability_is_zero_by_default(module):
    x, grad_y, W0, A, B = (torch.randn(*shape) for shape in ((5, 3), (5, 4), (4, 3), (2, 3), (4, 2)))
    mask = torch.rand(5, 3) < 0.5
    assert torch.allclose(module.forward(x, W0, A, B, 2.0, mask=mask), x @ W0.T + 2.0 * (x * mask) @ A.T @ B.T, atol=1e-5)
    got = module.backward(grad_y, x, W0, A, B, 2.0, mask=mask).grad_x
    assert torch.allclose(got, grad_y @ W0 + 2.0 * (grad_y @ B @ A) * mask, atol=1e-5)


# The layer


@promise("The layer's scaling is alpha / rank unless told otherwise.", of="LoRALinear")
def plain_scaling_by_default(module):
    assert _layer(module).scaling == 1.5


@promise("An alpha that is not finite is refused.", of="scaling_factor")
def alpha_is_finite(module):
    for bad in (math.nan, math.inf, -math.inf):
        for rslora in (False, True):
            refuses(module.scaling_factor, "alpha", bad, 2, rslora=rslora)
            refuses(module.LoRALinear, "alpha", nn.Linear(3, 4), rank=2, alpha=bad, rslora=rslora)


@promise("The layer starts from the factors that the generator gives.", of="LoRALinear")
def layer_draws_from_the_generator(module):
    first, second = (_layer(module, generator=torch.Generator().manual_seed(1)).A for _ in range(2))
    assert torch.equal(first, second)


@promise("Only the two factors of the layer are trained, whatever was trained before.", of="LoRALinear")
def only_factors_are_trained(module):
    assert [name for name, p in _layer(module).named_parameters() if p.requires_grad] == ["A", "B"]


@promise("The layer refuses a dropout outside of [0, 1).", of="LoRALinear")
def dropout_is_a_probability(module):
    for dropout in (-0.1, 1.0, 1.5):
        refuses(lambda dropout=dropout: _layer(module, dropout=dropout), "dropout")
    assert _layer(module, dropout=0.0).dropout == 0.0


@promise("In training each entry of the adapter's input is dropped with probability p, and the rest divided by 1 - p.", of="LoRALinear")
def layer_drops_in_training(module):
    layer = _layer(module, dropout=0.25)
    check_dropout(layer, _update(layer))


@promise("Outside training, or with dropout 0, the layer drops nothing and draws nothing.", of="LoRALinear")
def layer_draws_nothing_otherwise(module):
    for layer in (_layer(module, dropout=0.5).eval(), _layer(module, dropout=0.0).train()):
        check_no_dropout(layer, _update(layer))


@promise("Merging and unmerging, each as often as one likes, leave the layer's function as it is.", of="LoRALinear")
def merging_keeps_the_function(module):
    layer = _layer(module).eval()
    check_merging(layer, _update(layer))


@promise("Float32 factors beside a bfloat16 weight are used in bfloat16, and trained and merged in float32.", of="LoRALinear")
def factors_may_be_more_precise(module):
    layer = module.LoRALinear(nn.Linear(3, 4, dtype=torch.bfloat16), rank=2, alpha=3.0)
    check_precise_factors(layer, "AB", _update)
