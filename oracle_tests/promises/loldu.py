"""What `reference/loldu.py` promises beside the laws of LoLDU: its layer, its errors, its defaults."""

import math

import torch
from torch import nn

from loracle.oracle_tests.promises import follows_the_global_generator, promise, refuses
from loracle.oracle_tests.promises.layers import randn

# The set-up functions that read values, and of which arguments
FINITE = {
    "ldu": ("W0",),
    "init": ("W0",),
    "merge": ("W_base", "U", "z", "L"),
    "unmerge": ("W", "U", "z", "L"),
    "restore": ("W_base", "U", "z", "L"),
    "fit_diagonal": ("target", "U", "L"),
}


def _linear(in_features=5, out_features=4):
    return nn.Linear(in_features, out_features, dtype=torch.float64)


def _noise(module, name, rank):
    """Noise for the starts that need some."""
    return randn(rank) if module.NOISE[name] else None


# Errors


@promise("A zero pivot is refused, with its position and the largest rank that can still be had.", of=("_factorise", "init", "ldu"))
def zero_pivot(module):
    whole = torch.tensor([[1.0, 2, 3, 4], [2, 4, 6, 1], [3, 6, 1, 1], [1, 2, 0, 5]], dtype=torch.float64)
    for message in (_message(module.ldu, whole), _message(module.init, whole, rank=2), _message(module.init, whole, rank=4)):
        assert "W0 has a zero pivot at position 2 of 4" in message
        assert "a rank of at most 1" in message
    for side in ((3, 5), (5, 3)):
        for message in (_message(module.ldu, torch.zeros(side)), _message(module.init, torch.zeros(side), rank=1)):
            assert "W0 has a zero pivot at position 1 of 3" in message
            assert "leave the layer out" in message
            assert "a rank of" not in message
    zeros = randn(5, 4)
    zeros[:, 2] = 0
    assert "position 3 of 4" in _message(module.ldu, zeros)
    assert "at most 2" in _message(module.ldu, zeros)
    thirds = torch.tensor([[1.0, 1e8 / 3], [1 / 7, 1e8 / 21]], dtype=torch.float64)
    for W0 in (thirds, -thirds):
        assert "a rank of at most 1" in _message(module.ldu, W0)
    for dtype, least in ((torch.float64, 1e-13), (torch.float32, 1e-4)):
        thin = (randn(6, 3) @ randn(3, 8)).to(dtype)
        assert "a rank of at most 3" in _message(module.init, thin, rank=5)
        wide = (randn(300, 150) @ randn(150, 300)).to(dtype)
        assert "a rank of at most 150" in _message(module.init, wide, rank=200)
        # Small is not zero: of a pivot that is well above rounding a row of U is made
        small = torch.tensor([[1.0, 2, 3], [0, least, 1]], dtype=dtype)
        assert torch.isfinite(module.ldu(small)[0]).all()


def _message(function, *args, **given):
    """What the ValueError of a call says."""
    try:
        function(*args, **given)
    except ValueError as error:
        return str(error)
    raise AssertionError("accepts a zero pivot")


@promise("Only the leading pivots have to be non-zero: what comes after them is never divided by.", of=("_factorise", "init"))
def later_pivots_may_be_zero(module):
    W0 = randn(5, 4)
    W0[:, 2] = 0
    for rank in (1, 2):
        weights = module.init(W0, 0.5, rank=rank)
        assert torch.allclose(module.merge(*weights, 0.5), W0)
    refuses(module.init, "W0", W0, rank=3)


@promise("The rank goes from 1 to the smaller side.", of=("init", "draw_noise", "num_trainable", "scaling_factor", "LoLDULinear"))
def rank_is_in_range(module):
    W = randn(4, 5)
    for bad in (0, -1, 5, 2.0, True):
        for function in (module.init, module.draw_noise, module.num_trainable):
            refuses(function, "rank", W, rank=bad)
    for bad in (0, -1, 5):
        refuses(module.LoLDULinear, "rank", _linear(), rank=bad)
    refuses(module.scaling_factor, "rank", 1.0, 0)
    assert module.scaling_factor(1.0, 1) == 1
    assert module.init(W, rank=4).z.shape == module.draw_noise(W, rank=4).shape == (4,)


@promise("What is not finite is told as that, before anything is computed from it.", of=("_factorise", "fit_diagonal", "merge", "unmerge"))
def not_finite(module):
    for bad in (math.nan, math.inf):
        spoiled = randn(4, 5)
        spoiled[1, 2] = bad
        for function, given in ((module.ldu, {}), (module.init, {"rank": 2})):
            assert "W0 has" in _message(function, spoiled, **given)
            assert "NaN or infinite" in _message(function, spoiled, **given)
        good = {"target": randn(4, 5), "U": randn(2, 5), "L": randn(4, 2)}
        for name, value in good.items():
            wrong = value.clone()
            wrong[0, 0] = bad
            assert f"{name} has 1 of" in _message(module.fit_diagonal, **{**good, name: wrong}, P=torch.arange(4), scaling=1.0)


@promise("The eight starts of the diagonal have the official code's names.", of=("DIAGONALS", "NOISE"))
def names_of_the_starts(module):
    assert module.DIAGONALS == ("lu", "uniform", "normal", "constant", "ones", "zeros", "s_uniform", "s_normal")
    assert {name for name, kind in module.NOISE.items() if kind == "normal"} == {"normal", "s_normal"}
    assert {name for name, kind in module.NOISE.items() if kind == "uniform"} == {"uniform", "s_uniform"}


@promise("The scaling of a start is positive and finite.", of=("init", "_start", "LoLDULinear"))
def scaling_is_positive(module):
    for bad in (0.0, -1.0, math.nan, math.inf):
        refuses(module.init, "scaling", randn(4, 5), bad, rank=2)
        refuses(module.LoLDULinear, "scaling", _linear(), rank=2, alpha=bad)


@promise("A random start asks for its noise, and says how to draw it; noise of another length is refused.", of=("init_diagonal", "init"))
def noise_is_needed(module):
    W0 = randn(4, 5)
    for name, kind in module.NOISE.items():
        if kind:
            for function, given in ((module.init_diagonal, randn(3)), (module.init, W0)):
                options = {} if function is module.init_diagonal else {"rank": 3}
                refuses(function, "noise", given, diagonal=name, **options)
                refuses(function, "draw_noise", given, diagonal=name, **options)
                refuses(function, kind, given, diagonal=name, **options)
                refuses(function, "noise", given, diagonal=name, noise=randn(2), **options)


@promise("A normal start has a width only from two pivots on.", of="init_diagonal")
def normal_needs_two_pivots(module):
    refuses(module.init_diagonal, "diagonal", randn(1), diagonal="normal", noise=randn(1))
    assert module.init_diagonal(randn(2), diagonal="normal", noise=randn(2)).isfinite().all()
    assert module.init_diagonal(randn(1), diagonal="uniform", noise=randn(1)).isfinite().all()


@promise("Weights whose factors leave the range of half precision are refused.", of=("ldu", "init", "_stored"))
def range_of_half_precision(module):
    W0 = torch.tensor([[1e-5, 1.0], [0.0, 1.0]], dtype=torch.float16)
    for function, given in ((module.ldu, {}), (module.init, {"rank": 1})):
        refuses(function, "U", W0, **given)
        refuses(function, "float16", W0, **given)
        function(W0.float(), **given)


@promise(
    "A P that lacks a row, or is of another length, device or kind, is refused where values may be read.",
    of=("merge", "unmerge", "restore"),
)
def merging_needs_a_permutation(module):
    W, U, z, L = randn(4, 5), randn(2, 5), randn(2), randn(4, 2)
    good = torch.tensor([1, 2, 3, 0])
    for bad in ([0, 0, 1, 2], [1, 2, 3, 4], [0, 1, 2], [0, 1, 2, 3, 4]):
        for function in (module.merge, module.unmerge, module.restore):
            refuses(function, "P", W, U, z, L, torch.tensor(bad), 1.0)
            function(W, U, z, L, good, 1.0)
    for bad in (good.int(), good.double(), good[:3], good[None], good.to("meta")):
        refuses(module.delta_weight, "P", U, z, L, bad, 1.0)
    # Elsewhere no value is read
    assert torch.equal(module.delta_weight(U, z, L, 0 * good, 1.0), module.delta_weight(U, z, L[:1].repeat(4, 1), good, 1.0))


@promise("Without a best diagonal there is an error: a scaling of zero, or dependent factors.", of="fit_diagonal")
def fit_is_possible(module):
    target, U, L, P = randn(4, 5), randn(2, 5), randn(4, 2), torch.arange(4)
    for bad in (0.0, math.nan, math.inf):
        refuses(module.fit_diagonal, "scaling", target, U, L, P, bad)
    refuses(module.fit_diagonal, "U", target, 0 * U, L, P, 1.0)
    refuses(module.fit_diagonal, "L", target, U, L * torch.tensor([1.0, 0.0]), P, 1.0)
    # A term that is a multiple of another, or of the sum of others: the rounding of the Gram matrix hides it from a solver
    for dtype in (torch.float64, torch.float32):
        target, U, L, P = randn(9, 8).to(dtype), randn(3, 8).to(dtype), randn(9, 3).to(dtype), torch.arange(9)
        assert module.fit_diagonal(target, U, L, P, 1.0).isfinite().all()
        same_rows = torch.stack([U[0], -2.0 * U[0], 0.3 * U[0]])
        for column in (1.7 * L[:, 0], L[:, 0] + L[:, 1]):
            refuses(module.fit_diagonal, "L", target, same_rows, torch.stack([L[:, 0], L[:, 1], column], dim=1), P, 1.0)
        for _ in range(30):
            pairs = randn(3, 8).to(dtype), randn(9, 3).to(dtype)
            pairs[0][1], pairs[1][:, 1] = -2.0 * pairs[0][0], 0.7 * pairs[1][:, 0]
            refuses(module.fit_diagonal, "L", target, *pairs, P, 1.0)
        # Lengths that differ a lot are no dependence
        lengths = torch.tensor([1.0, 1e-4, 1e4], dtype=dtype)
        assert module.fit_diagonal(target, U * lengths[:, None], L, P, 1.0).isfinite().all()
    for bad in ([0, 0, *range(2, 9)], [*range(1, 10)]):
        refuses(module.fit_diagonal, "P", target, U, L, torch.tensor(bad), 1.0)


# Draws, precision and memory


@promise("Without a generator the noise is drawn from torch's own.", of=("draw_noise", "LoLDULinear"))
def draws_from_the_global_generator(module):
    for kind in ("normal", "uniform"):
        assert follows_the_global_generator(lambda kind=kind: module.draw_noise(_ones(), rank=3, distribution=kind))
    linear = _linear()
    assert follows_the_global_generator(lambda: module.LoLDULinear(linear, rank=3, diagonal="s_normal").z.detach())


def _ones(**options):
    return torch.ones(4, 5, **options)


@promise("The noise has the dtype of the weight.", of="draw_noise")
def noise_of_the_dtype(module):
    assert module.draw_noise(_ones(dtype=torch.float16), rank=2).dtype == torch.float16


@promise(
    "Half precision is factored in float32, and the rounding of the factors cancels in the residual.", of=("ldu", "init", "fit_diagonal")
)
def half_precision(module):
    W0 = randn(6, 7)
    for dtype in (torch.float16, torch.bfloat16):
        low = W0.to(dtype)
        for part in module.ldu(low)[:3]:
            assert part.dtype == dtype
        exact = module.ldu(low.float())
        assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(module.ldu(low), exact, strict=True))
        weights = module.init(low, 0.5, rank=4)
        assert {t.dtype for t in weights[:4]} == {dtype}
        W_base, U, z, L, P = (t if t.dtype == torch.int64 else t.double() for t in weights)
        assert torch.equal((low.double() - module.delta_weight(U, z, L, P, 0.5)).to(dtype), W_base.to(dtype))
        single = module.fit_diagonal(low.float(), weights.U.float(), weights.L.float(), P, 0.5)
        assert torch.equal(module.fit_diagonal(low, weights.U, weights.L, P, 0.5), single.to(dtype))


@promise(
    "Factors lie row by row in memory, free of the factorisation that they come from and of each other.",
    of=("init", "ldu", "init_diagonal"),
)
def factors_own_their_memory(module):
    D = randn(3)
    for found in (f for W0 in (randn(4, 5), randn(5, 4), randn(4, 4)) for f in (module.ldu(W0), module.init(W0, rank=2))):
        for part in found[:-1]:
            assert part.is_contiguous()
            assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
    for name in module.DIAGONALS:
        noise = _noise(module, name, 3)
        z = module.init_diagonal(D, diagonal=name, noise=noise)
        assert z.data_ptr() not in {D.data_ptr(), noise is not None and noise.data_ptr()}


# The layer


def _layer(module, **options):
    """A layer whose diagonal has moved."""
    layer = module.LoLDULinear(_linear(), **{"rank": 3, "alpha": 2.0, "diagonal": "ones", **options})
    with torch.no_grad():
        layer.z += randn(3)
        if options.get("train_scaling"):
            layer.scaling += 0.7
    return layer


@promise("The layer starts bit for bit at the pretrained one for every diagonal.", of="LoLDULinear")
def layer_starts_at_the_pretrained_one(module):
    x = randn(3, 5)
    for name in module.DIAGONALS:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            layer = module.LoLDULinear(_linear().to(dtype), rank=3, diagonal=name, alpha=2.0)
            assert torch.equal(layer(x.to(dtype)), layer.base(x.to(dtype)))


@promise("The layer is the paper's: the residual of `init` plus the trained part, with every option.", of="LoLDULinear")
def layer_computes(module):
    linear, x = _linear(), randn(3, 5)
    for name in module.DIAGONALS:
        for preserve in (True, False):
            layer = module.LoLDULinear(
                linear, rank=3, alpha=2.0, diagonal=name, preserve=preserve, generator=torch.Generator().manual_seed(1)
            )
            kind, noise = module.NOISE[name], None
            if kind:
                noise = module.draw_noise(linear.weight, rank=3, distribution=kind, generator=torch.Generator().manual_seed(1))
            weights = module.init(linear.weight.detach(), 2 / 3, rank=3, diagonal=name, noise=noise, preserve=preserve)
            assert torch.equal(layer.z, weights.z)
            assert torch.allclose(layer(x), module.forward(x, *weights, 2 / 3, bias=linear.bias))
            with torch.no_grad():
                layer.z += 0.5
                layer.scaling += 0.25
            W = weights.W_base + module.delta_weight(weights.U, weights.z + 0.5, weights.L, weights.P, 2 / 3 + 0.25)
            assert torch.allclose(layer(x), x @ W.T + linear.bias)


@promise(
    "The layer's scaling is alpha / rank, with alpha 1 unless told otherwise, and its diagonal starts at the pivots.", of="LoLDULinear"
)
def layer_defaults(module):
    layer = module.LoLDULinear(_linear(), rank=4)
    assert float(layer.scaling) == 0.25
    assert torch.equal(layer.z, module.ldu(layer.base.weight.detach()).D)
    assert torch.equal(layer.z0, layer.z)
    assert abs(float(module.LoLDULinear(_linear(), rank=4, alpha=6.0).scaling) - 1.5) < 1e-15


@promise("Only z is trained, and the scaling where asked for; all else is saved with the layer.", of="LoLDULinear")
def only_the_diagonal_is_trained(module):
    for options, trained in (({}, {"z"}), ({"train_scaling": False}, {"z"}), ({"train_scaling": True}, {"z", "scaling"})):
        layer = module.LoLDULinear(_linear(), rank=3, **options)
        assert {name for name, p in layer.named_parameters() if p.requires_grad} == trained
        assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == module.num_trainable(layer.base.weight, rank=3, **options)
        assert set(layer.state_dict()) == {"base.weight", "base.bias", "U", "z", "L", "P", "z0", "scaling", "scaling0"}
        assert not any(buffer.requires_grad for buffer in layer.buffers())
        assert all(p.is_leaf for p in layer.parameters())
        other = module.LoLDULinear(_linear(), rank=3)
        other.load_state_dict(layer.state_dict())
        x = randn(2, 5)
        assert torch.equal(other(x), layer(x))


@promise("A training step moves what is trained as the page's gradients say, and nothing else.", of="LoLDULinear")
def training_moves_the_diagonal(module):
    for train_scaling in (False, True):
        layer, x, target = _layer(module, train_scaling=train_scaling), randn(7, 5), randn(7, 4)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        scaling = layer.scaling.item()
        torch.nn.functional.mse_loss(layer(x), target, reduction="sum").div(2).backward()
        G = (layer(x) - target).detach().T @ x
        found = module.gradients(G, layer.U, layer.z.detach(), layer.L, layer.P, scaling)
        assert torch.allclose(layer.z.grad, found.grad_z)
        if train_scaling:
            assert torch.allclose(layer.scaling.grad, found.grad_scaling)
        torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1).step()
        moved = {name for name, tensor in layer.state_dict().items() if not torch.equal(tensor, before[name])}
        assert moved == ({"z", "scaling"} if train_scaling else {"z"})


@promise(
    "Disabled, the layer is the pretrained one bit for bit, also after training and merging; enabled, it is as before.", of="LoLDULinear"
)
def disabling_restores(module):
    linear, x = _linear(), randn(3, 5)
    weight, pretrained = linear.weight.detach().clone(), linear(x).detach().clone()
    for preserve in (True, False):
        layer = module.LoLDULinear(linear, rank=3, alpha=2.0, diagonal="ones", preserve=preserve)
        with torch.no_grad():
            layer.z += 1
        adapted = layer(x)
        assert not torch.allclose(adapted, pretrained)
        for merged in (False, True, False):
            layer.merge() if merged else layer.unmerge()
            layer.disable()
            layer.disable()
            assert torch.equal(layer(x), pretrained)
            layer.enable()
            assert torch.allclose(layer(x), adapted)
        assert torch.equal(layer.base.weight, weight)


@promise("Merging keeps the layer's function and costs one linear layer; unmerging leaves no rounding behind.", of="LoLDULinear")
def merging_keeps_the_function(module):
    layer, x = _layer(module), randn(3, 5)
    before, state = layer(x), {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for _ in range(2):
        layer.merge()
    assert torch.allclose(layer(x), before)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.merged, layer.base.bias))
    assert not layer.merged.requires_grad
    assert set(layer.state_dict()) == set(state)
    for _ in range(2):
        layer.unmerge()
    assert torch.equal(layer(x), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
    layer.merge()
    assert layer.float()(x.float()).dtype == torch.float32


@promise("A float32 diagonal beside a bfloat16 weight is used in bfloat16, and trained in float32.", of="LoLDULinear")
def diagonal_may_be_more_precise(module):
    layer, x = module.LoLDULinear(_linear().bfloat16(), rank=3), randn(3, 5).bfloat16()
    layer.z.data = layer.z.data.float()
    assert torch.equal(layer(x), layer.base(x))
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.z.grad.dtype == torch.float32
    layer.merge()
    assert layer.merged.dtype == torch.bfloat16
    assert torch.equal(layer(x), layer.base(x))


@promise("The layer refuses an unknown diagonal and a weight that it cannot factor.", of="LoLDULinear")
def layer_refuses(module):
    refuses(module.LoLDULinear, "diagonal", _linear(), rank=2, diagonal="unifrom")
    linear = _linear()
    with torch.no_grad():
        linear.weight[:, 0] = 0
    refuses(module.LoLDULinear, "W0", linear, rank=2)
