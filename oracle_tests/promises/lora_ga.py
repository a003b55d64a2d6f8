"""What `reference/lora_ga.py` promises beside the laws of LoRA-GA: its errors, its defaults, and the layer it makes."""

import math

import torch
from torch import nn

from loracle.oracle_tests.promises import follows_the_global_generator, promise, refuses

# The set-up functions that read values, and of which arguments
FINITE = {"init": ("G",), "base_weight": ("W0", "A", "B")}

NAN, INF = float("nan"), float("inf")


def _matrix(rows=6, columns=5, **options):
    return torch.randn(rows, columns, dtype=torch.float64, **options)


def _same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Defaults and draws


@promise("Without options the scale is Algorithm 1's with gamma 16.", of=("factor_scale", "zeta"))
def scale_by_default(module):
    assert math.isclose(module.factor_scale(2.0, out_features=16, rank=2), 0.5)
    assert math.isclose(module.zeta(2.0, out_features=16, rank=2), 1.0)


@promise("Without options the factors are Algorithm 1's: stable scale, first half for A, four iterations with a sketch.", of="init")
def start_by_default(module):
    G = _matrix()
    explicit = {"gamma": 16.0, "direction": "ArB2r", "scale": "stable", "niter": 4}
    assert _same(module.init(G, 2.0, rank=2), module.init(G, 2.0, rank=2, **explicit))
    sketch = _matrix(5, 4)
    assert _same(module.init(G, 2.0, rank=2, sketch=sketch), module.init(G, 2.0, rank=2, sketch=sketch, **explicit))


@promise("Without a direction A takes the first half of the triplets.", of="index_sets")
def direction_by_default(module):
    assert _same(module.index_sets(rank=2), (torch.tensor([0, 1]), torch.tensor([2, 3])))


@promise("Without a generator random directions and sketches come from torch's own.", of=("index_sets", "init", "draw_sketch"))
def draws_from_the_global_generator(module):
    G = _matrix(20, 16)
    assert follows_the_global_generator(lambda: module.index_sets(rank=8, direction="random").A)
    assert follows_the_global_generator(lambda: module.init(G, 2.0, rank=8, direction="random").A)
    assert follows_the_global_generator(lambda: module.draw_sketch(G, rank=2))


@promise("A sketch lies on the device of the gradient.", of="draw_sketch")
def sketch_on_the_device(module):
    assert module.draw_sketch(torch.ones(6, 5, device="meta"), rank=2).device.type == "meta"


@promise("The scale is a Python number, whatever it is computed from.", of="factor_scale")
def scale_is_a_number(module):
    assert type(module.factor_scale(2.0, out_features=6, rank=2, scale="weightS", W0=_matrix())) is float


@promise("The factors are stored row by row, as trained parameters are.", of="init")
def factors_are_contiguous(module):
    for G in (_matrix(6, 5), _matrix(5, 6)):
        for sketch in (None, _matrix(5, 4)):
            for direction in ("ArB2r", "ArBr"):
                factors = module.init(G, 2.0, rank=2, sketch=sketch, direction=direction)
                assert all(factor.is_contiguous() for factor in factors)


# Errors


@promise("A rank is a whole number for which the gradient has twice as many triplets.", of=("index_sets", "init", "draw_sketch"))
def rank_fits(module):
    for rank in (True, 1.5):
        refuses(module.index_sets, "rank", rank=rank)
    refuses(module.init, "rank", _matrix(3, 7), 2.0, rank=2)
    refuses(module.draw_sketch, "rank", _matrix(3, 7), rank=2)
    module.init(_matrix(4, 7), 2.0, rank=2)


@promise("The scale needs positive finite numbers, and a weight that is finite and not zero where it reads one.", of="factor_scale")
def scale_is_usable(module):
    for number in (0.0, -1.0, INF, NAN):
        refuses(module.factor_scale, "scaling", number, out_features=6, rank=2)
        refuses(module.factor_scale, "gamma", 2.0, out_features=6, rank=2, gamma=number)
    for W0 in (None, torch.zeros(6, 5), torch.full((6, 5), NAN), torch.full((6, 5), INF)):
        refuses(module.factor_scale, "W0", 2.0, out_features=6, rank=2, scale="weightS", W0=W0)


@promise("A gradient of zero has no directions.", of="init")
def gradient_is_not_zero(module):
    refuses(module.init, "G", torch.zeros(6, 5), 2.0, rank=2)


@promise("Index sets are two halves of the leading triplets.", of="init")
def indices_are_halves(module):
    for for_A, for_B in (([0, 1], [1, 2]), ([0], [1, 2, 3]), ([0, 1], [2, 4]), ([0, 1, 2], [3, 4, 5])):
        refuses(module.init, "indices", _matrix(), 2.0, rank=2, indices=(torch.tensor(for_A), torch.tensor(for_B)))


@promise("A sketch has min(out, in) rows and from 2 rank to min(out, in) columns; iterations are not negative.", of="init")
def sketch_fits(module):
    for rows, columns in ((4, 4), (6, 4), (5, 3), (5, 6)):
        refuses(module.init, "sketch", _matrix(), 2.0, rank=2, sketch=_matrix(rows, columns))
    refuses(module.init, "niter", _matrix(), 2.0, rank=2, sketch=_matrix(5, 4), niter=-1)


@promise("A frozen weight beyond the range of its dtype is refused.", of="base_weight")
def base_weight_is_finite(module):
    W0, A, B = (torch.full(shape, 300.0, dtype=torch.float16) for shape in ((6, 5), (2, 5), (6, 2)))
    refuses(module.base_weight, "W_base", W0, A, B, 2.0)


@promise("A mean of gradients needs at least one, each of the weight's shape and dtype.", of="estimate_gradient")
def gradients_fit(module):
    W0 = _matrix()
    refuses(module.estimate_gradient, "batches", lambda W, batch: W, W0, [])
    for wrong in (W0[:, :1], W0.float()):
        refuses(module.estimate_gradient, "gradient", lambda W, batch, wrong=wrong: wrong, W0, [0])
    assert torch.equal(module.estimate_gradient(lambda W, batch: batch * W, W0, [3]), 3 * W0)


# The layer


def _adapted(module, dtype=torch.float64, **options):
    """A linear layer, a gradient for it, and the adapted layer."""
    linear, G = nn.Linear(5, 6, dtype=dtype), _matrix()
    return linear, G, module.adapt_linear(linear, G, rank=2, alpha=3.0, **options)


@promise("The adapted layer computes what the linear layer computes, which stays as it is.", of="adapt_linear")
def adapting_keeps_the_function(module):
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        state = torch.get_rng_state()
        linear, _, layer = _adapted(module, dtype)
        again = nn.Linear(5, 6, dtype=dtype)
        x = torch.randn(7, 5, dtype=dtype)
        assert torch.allclose(layer(x), linear(x), rtol=0, atol=close)
        assert linear.weight.requires_grad, "the layer that was given is frozen"
        assert layer.base is not linear
        assert not torch.allclose(layer.base.weight, linear.weight), "the frozen weight is not corrected"
        torch.set_rng_state(state)
        assert torch.equal(nn.Linear(5, 6, dtype=dtype).weight, linear.weight), "the weight that was given has changed"
        _matrix()
        assert torch.equal(nn.Linear(5, 6, dtype=dtype).weight, again.weight), "the global generator has moved"


@promise("The adapted layer's factors, scaling and dropout are those of the options.", of="adapt_linear")
def adapting_follows_the_options(module):
    s = 3.0 / math.sqrt(2)
    for options in (
        {},
        {"gamma": 9.0},
        {"direction": "A2rBr"},
        {"scale": "gd"},
        {"scale": "weightS"},
        {"sketch": _matrix(5, 4)},
        {"dropout": 0.25},
    ):
        linear, G, layer = _adapted(module, **options)
        start = {key: value for key, value in options.items() if key != "dropout"}
        A, B = module.init(G, s, rank=2, W0=linear.weight.detach(), **start)
        assert math.isclose(layer.scaling, s)
        assert layer.dropout == options.get("dropout", 0.0)
        assert torch.equal(layer.A, A)
        assert torch.equal(layer.B, B)
        assert torch.allclose(layer.base.weight, linear.weight - s * B @ A)
        assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["A", "B"]


@promise(
    "The weight may be less precise than the gradient; a random direction comes from the generator, or torch's own.", of="adapt_linear"
)
def adapting_in_lower_precision(module):
    linear, G, layer = _adapted(module, torch.float32, scale="weightS", direction="random", generator=torch.Generator().manual_seed(5))
    weight = linear.weight.detach().double()
    options = {"W0": weight, "scale": "weightS", "direction": "random", "generator": torch.Generator().manual_seed(5)}
    A, B = module.init(G, 3.0 / math.sqrt(2), rank=2, **options)
    assert torch.equal(layer.A, A.float())
    assert torch.equal(layer.B, B.float())
    random = {"rank": 2, "alpha": 3.0, "direction": "random"}
    assert follows_the_global_generator(lambda: torch.cat([module.adapt_linear(linear, G, **random).A for _ in range(8)]).detach())
