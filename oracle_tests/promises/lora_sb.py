"""What `reference/lora_sb.py` promises beside the laws of LoRA-SB: its layer, its errors, its defaults."""

import math

import torch
from torch import nn

from loracle.oracle_tests.promises import follows_the_global_generator, promise, refuses
from loracle.oracle_tests.promises.layers import randn

# The set-up functions that read values, and of which arguments
FINITE = {
    "first_step_update": ("G",),
    "init": ("update",),
    "init_weights": ("W0", "update"),
    "init_xs": ("W0",),
    "merge": ("W0", "A", "R", "B"),
}


def _linear(in_features=5, out_features=4):
    return nn.Linear(in_features, out_features, dtype=torch.float64)


# Errors


@promise("A gradient that is all zero is refused: it has no directions.", of=("first_step_update", "estimate_update"))
def zero_gradient(module):
    for optimizer in ("adamw", "sgd"):
        refuses(module.first_step_update, "G is zero", torch.zeros(4, 5), lr=0.1, optimizer=optimizer)
    refuses(module.estimate_update, "G is zero", lambda W, batch: 0 * W, torch.ones(4, 5), [0, 1], lr=0.1)


@promise("An update, or for LoRA-XS a weight, that is all zero is refused.", of=("init", "init_weights", "init_xs"))
def zero_update(module):
    refuses(module.init, "update is zero", torch.zeros(4, 5), rank=2)
    refuses(module.init_weights, "update is zero", torch.ones(4, 5), torch.zeros(4, 5), rank=2)
    refuses(module.init_xs, "W0 is zero", torch.zeros(4, 5), rank=2)


@promise("A matrix with a single entry that is not zero is no zero matrix.", of=("init", "first_step_update"))
def one_entry_is_enough(module):
    update = torch.zeros(4, 5, dtype=torch.float64)
    update[3, 0] = -2.0
    A, R, B = module.init(module.first_step_update(update, lr=0.5, optimizer="sgd"), rank=1)
    assert torch.allclose(B @ R @ A, -0.5 * update)


@promise(
    "Numbers that have to be positive and finite are refused where they are not, and taken where they are.",
    of=("first_step_update", "init", "init_xs"),
)
def numbers_are_positive(module):
    G = randn(4, 5)
    for bad in (0.0, -1.0, math.nan, math.inf):
        refuses(module.first_step_update, "lr", G, lr=bad)
        refuses(module.init, "scaling", G, bad, rank=2)
        refuses(module.init_weights, "scaling", G, G, bad, rank=2)
        refuses(module.init_xs, "sigma", G, rank=2, sigma=bad)


@promise("AdamW's epsilon may be zero, but neither negative nor infinite nor NaN.", of="first_step_update")
def epsilon_is_not_negative(module):
    G = randn(4, 5)
    for bad in (-1e-8, math.nan, math.inf):
        refuses(module.first_step_update, "adam_eps", G, lr=0.1, adam_eps=bad)
    assert torch.isfinite(module.first_step_update(G, lr=0.1, adam_eps=0.0)).all()


@promise("The rank goes from 1 to the smaller side.", of=("init", "init_xs", "draw_sketch", "num_trainable"))
def rank_is_in_range(module):
    W = randn(4, 5)
    for bad in (0, -1, 5, 2.0, True):
        for function in (module.init, module.init_xs, module.draw_sketch, module.num_trainable):
            refuses(function, "rank", W, rank=bad)
    assert module.num_trainable(W, rank=4) == 16
    assert module.init(W, rank=4).R.shape == module.init_xs(W, rank=4).R.shape == (4, 4)
    assert module.draw_sketch(W, rank=4).shape == (5, 4)


@promise("A sketch has the input side's rows and from rank to min(out, in) columns, and no negative iterations.", of="init")
def sketch_fits(module):
    for update in (randn(6, 5), randn(5, 6)):
        side = update.shape[1]
        for shape in ((11 - side, 3), (side, 1), (side, 6), (side,), (side, 3, 1)):
            refuses(module.init, "sketch", update, rank=2, sketch=randn(*shape))
        refuses(module.init, "niter", update, rank=2, sketch=randn(side, 3), niter=-1)
        for columns in (2, 5):
            module.init(update, rank=2, sketch=randn(side, columns), niter=0)


@promise("Without a batch nothing is estimated, and a gradient that does not fit the weight is refused.", of="estimate_update")
def batches_are_there_and_fit(module):
    W0 = randn(4, 5)
    refuses(module.estimate_update, "batches", lambda W, batch: W, W0, [], lr=0.1)
    for bad in (W0[:3], W0.float()):
        refuses(module.estimate_update, "gradient", lambda W, batch, bad=bad: bad, W0, [0], lr=0.1)
    refuses(module.estimate_update, "G", lambda W, batch: W * math.nan, W0, [0], lr=0.1)


@promise("The weight and the first update must have the same shape and dtype.", of="init_weights")
def update_fits_the_weight(module):
    refuses(module.init_weights, "update", randn(4, 5), randn(5, 4), rank=2)
    refuses(module.init_weights, "update", randn(4, 5), randn(4, 5).float(), rank=2)


# Draws and defaults


@promise("Without a generator R of LoRA-XS and the sketch are drawn from torch's own.", of=("init_xs", "draw_sketch"))
def draws_from_the_global_generator(module):
    W0 = randn(4, 5)
    assert follows_the_global_generator(lambda: module.init_xs(W0, rank=2).R)
    assert follows_the_global_generator(lambda: module.draw_sketch(W0, rank=2))


@promise("Draws lie on the device and have the dtype of the weight.", of=("draw_sketch", "init_xs"))
def draws_on_the_device(module):
    assert module.draw_sketch(torch.ones(4, 5, device="meta", dtype=torch.float16), rank=2).device.type == "meta"
    assert module.draw_sketch(torch.ones(4, 5, dtype=torch.float16), rank=2).dtype == torch.float16
    assert module.init_xs(randn(4, 5).bfloat16(), rank=2).R.dtype == torch.bfloat16


@promise("Factors lie row by row in memory, free of the decomposition that they come from.", of=("init", "init_xs"))
def factors_own_their_memory(module):
    W0 = randn(4, 5)
    for A, _, B in (module.init(W0, rank=2), module.init_xs(W0, rank=2)):
        for factor in (A, B):
            assert factor.is_contiguous()
            assert factor.untyped_storage().nbytes() == factor.numel() * factor.element_size()


@promise(
    "In half precision the decomposition, the projections and the inverses are made in float32.",
    of=("init", "optimal_gradient", "projected_gradient"),
)
def half_precision(module):
    update = randn(6, 7)
    for dtype in (torch.float16, torch.bfloat16):
        A, R, B = module.init(update.to(dtype), rank=2)
        assert A.dtype == R.dtype == B.dtype == dtype
        assert module.optimal_gradient(R, A, B, 1.0).dtype == module.projected_gradient(update.to(dtype), A, B).dtype == dtype


# The layer


def _layer(module, scaling=1.5):
    return module.LoRASBLinear(_linear(), randn(2, 5), randn(2, 2), randn(4, 2), scaling)


@promise("The layer is the frozen one plus s B R A.", of="LoRASBLinear")
def layer_computes(module):
    layer, x = _layer(module), randn(3, 5)
    assert torch.allclose(layer(x), layer.base(x) + 1.5 * x @ layer.A.T @ layer.R.T @ layer.B.T)


@promise("A layer is not made with a scaling that is not positive, nor around a weight that is not finite.", of="LoRASBLinear")
def layer_has_numbers(module):
    for bad in (0.0, -1.0, math.nan, math.inf):
        refuses(_layer, "scaling", module, bad)
    spoiled = _linear()
    spoiled.weight.data[1, 2] = math.nan
    refuses(module.LoRASBLinear, "W0", spoiled, randn(2, 5), randn(2, 2), randn(4, 2))


@promise("A sketch that is zero or not finite is refused.", of=("init", "_leading_triplets"))
def sketch_is_usable(module):
    for bad in (0.0, math.nan, math.inf):
        refuses(module.init, "sketch", randn(4, 5), rank=2, sketch=torch.full((5, 2), bad, dtype=torch.float64))


@promise("Without an argument the layer's scaling is 1.", of=("LoRASBLinear", "adapt_linear"))
def layer_is_not_scaled(module):
    assert module.LoRASBLinear(_linear(), randn(2, 5), randn(2, 2), randn(4, 2)).scaling == 1
    assert module.adapt_linear(_linear(), randn(4, 5), rank=2).scaling == 1


@promise("Only R of the layer is trained; A and B are saved with it; its numbers are its own.", of="LoRASBLinear")
def only_R_is_trained(module):
    A, R, B = (randn(*shape).requires_grad_() for shape in ((2, 5), (2, 2), (4, 2)))
    layer = module.LoRASBLinear(_linear(), A, R, B)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["R"]
    assert set(layer.state_dict()) == {"A", "R", "B", "base.weight", "base.bias"}
    assert not layer.A.requires_grad
    assert not layer.B.requires_grad
    assert layer.R.is_leaf
    kept = [layer.A.clone(), layer.R.detach().clone(), layer.B.clone()]
    with torch.no_grad():
        for given in (A, R, B):
            given += 1
    assert all(torch.equal(a, b) for a, b in zip(kept, (layer.A, layer.R, layer.B), strict=True))


@promise("A training step moves R as the page's formula says, and leaves A, B and the frozen weight bit for bit.", of="LoRASBLinear")
def training_moves_R_only(module):
    layer, x, target = _layer(module), randn(7, 5), randn(7, 4)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    W = layer.base.weight + 1.5 * layer.B @ layer.R @ layer.A
    G = (x @ W.T + layer.base.bias - target).T @ x
    torch.nn.functional.mse_loss(layer(x), target, reduction="sum").div(2).backward()
    assert torch.allclose(layer.R.grad, 1.5 * layer.B.T @ G @ layer.A.T)
    torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1).step()
    assert [name for name, tensor in layer.state_dict().items() if not torch.equal(tensor, before[name])] == ["R"]


@promise("Float32 factors beside a bfloat16 weight are used in bfloat16, and trained in float32.", of="LoRASBLinear")
def factors_may_be_more_precise(module):
    layer, x = module.LoRASBLinear(*(part.bfloat16() for part in (_linear(), randn(2, 5), randn(2, 2), randn(4, 2)))), randn(3, 5)
    for name in ("A", "R", "B"):
        getattr(layer, name).data = getattr(layer, name).float()
    y = layer(x.bfloat16())
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.R.grad.dtype == torch.float32


@promise("The layer refuses factors that do not fit it or are not finite.", of="LoRASBLinear")
def layer_refuses(module):
    good = {"A": randn(2, 5), "R": randn(2, 2), "B": randn(4, 2)}
    for name, misfit in {"A": randn(2, 4), "R": randn(3, 3), "B": randn(5, 2)}.items():
        refuses(module.LoRASBLinear, name, _linear(), **{**good, name: misfit})
        refuses(module.LoRASBLinear, name, _linear(), **{**good, name: good[name] * math.nan})
    refuses(module.LoRASBLinear, "A", _linear(), **{name: factor.float() for name, factor in good.items()})


@promise("An adapted layer starts one approximated step ahead of the layer that it copies, which stays as it is.", of="adapt_linear")
def adapted_layer(module):
    linear, update, x = _linear(), randn(4, 5), randn(3, 5)
    weight = linear.weight.detach().clone()
    for scaling in (1.0, 3.0):
        layer = module.adapt_linear(linear, update, rank=4, scaling=scaling)
        assert layer.scaling == scaling
        assert layer.base is not linear
        assert torch.allclose(layer(x), linear(x) + x @ update.T)
    assert torch.equal(linear.weight, weight)
    assert linear.weight.requires_grad


@promise(
    "The first update may be more precise than the layer: the factors take the layer's dtype after the decomposition.", of="adapt_linear"
)
def adapted_layer_of_low_precision(module):
    update = randn(4, 5)
    layer = module.adapt_linear(_linear().bfloat16(), update, rank=2)
    assert {layer.A.dtype, layer.R.dtype, layer.B.dtype} == {torch.bfloat16}
    exact = module.init(update, rank=2)
    assert torch.equal(layer.R, exact.R.bfloat16())
