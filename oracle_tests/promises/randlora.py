"""What `reference/randlora.py` promises beside the laws of RandLoRA: its layer, one pair of bases, its errors, its defaults."""

import copy
import math
from types import SimpleNamespace

import torch
from torch import nn

from loracle.oracle_tests.promises import follows_the_global_generator, promise, refuses
from loracle.oracle_tests.promises.layers import Largest, check_dropout, check_merging, check_no_dropout

# The set-up functions that read values, and of which arguments
FINITE = {
    "init": ("W0",),
    "normalise": ("base",),
    "merge": ("W0", "gammas", "A", "lambdas", "B"),
    "unmerge": ("W", "gammas", "A", "lambdas", "B"),
    "fit_gammas": ("target", "A", "lambdas", "B"),
    "fit_lambdas": ("target", "gammas", "A", "B"),
    "svd_blocks": ("W0",),
}


def _randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def _linear(in_features=5, out_features=4):
    return nn.Linear(in_features, out_features, dtype=torch.float64)


def _layer(module, linear=None, rank=2, **options):
    """A small layer whose diagonals are not zero, with a pair that is larger than it needs."""
    linear = linear or _linear()
    small, large = sorted(linear.weight.shape)
    pair = module.BasePair(_randn(rank, small + 1), _randn(large + 2, -(-small // rank) + 1, rank))
    layer = module.RandLoRALinear(linear, pair, **options)
    nn.init.normal_(layer.gammas)
    nn.init.normal_(layer.lambdas)
    return layer


def _update(layer):
    """The update of a layer, from its own numbers."""
    out, in_ = layer.base.weight.shape
    small, large, bases = min(out, in_), max(out, in_), len(layer.lambdas)
    A, B = layer.pair.A[:, :small], layer.pair.B[:large, :bases]
    M = layer.scaling * sum(B[:, j] @ layer.lambdas[j].diag() @ A @ layer.gammas[j].diag() for j in range(bases))
    return M.T if out < in_ else M


def layer_functions(module):
    """The contract by the forward, merge and autograd of the layer `RandLoRALinear`: its hand-written backward above all."""

    def layer_of(W0, gammas, A, lambdas, B, scaling, bias=None):
        linear = nn.utils.skip_init(nn.Linear, W0.shape[1], W0.shape[0], bias=bias is not None, dtype=W0.dtype)
        linear.weight.data.copy_(W0)
        if bias is not None:
            linear.bias.data.copy_(bias)
        layer = module.RandLoRALinear(linear, module.BasePair(A, B), alpha=abs(scaling) * len(A), convention="peft")
        layer.gammas.data.copy_(gammas)
        layer.lambdas.data.copy_(math.copysign(1, scaling) * lambdas)
        return layer

    def init(W0, *, rank, zero="lambdas"):
        pair = module.BasePair(*module.draw_bases([W0], rank=rank, kind="normal", generator=torch.Generator().manual_seed(0)))
        linear = nn.utils.skip_init(nn.Linear, W0.shape[1], W0.shape[0], bias=False, dtype=W0.dtype)
        linear.weight.data.copy_(W0)
        layer = module.RandLoRALinear(linear, pair, zero=zero)
        return layer.gammas.detach(), layer.lambdas.detach()

    def forward(x, W0, gammas, A, lambdas, B, scaling, *, bias=None):
        return layer_of(W0, gammas, A, lambdas, B, scaling, bias)(x).detach()

    def gradients(G, gammas, A, lambdas, B, scaling):
        layer = layer_of(torch.zeros_like(G), gammas, A, lambdas, B, scaling)
        # The outputs for the unit vectors are the columns of the merged weight
        layer(torch.eye(G.shape[1], dtype=G.dtype)).backward(G.mT)
        return layer.gammas.grad, layer.lambdas.grad

    def merge(W0, gammas, A, lambdas, B, scaling):
        layer = layer_of(W0, gammas, A, lambdas, B, scaling)
        layer.merge()
        return layer.base.weight.detach()

    def unmerge(W, gammas, A, lambdas, B, scaling):
        layer = layer_of(W, gammas, A, lambdas, B, scaling)
        layer.merge()
        layer.base.weight.data.copy_(W)  # as if W had been the result of merging
        layer.unmerge()
        return layer.base.weight.detach()

    return SimpleNamespace(forward=forward, gradients=gradients, merge=merge, unmerge=unmerge)


NAMESPACES = {"RandLoRALinear": layer_functions}


# Errors


@promise("The basis rank goes from 1 to the smaller side.", of=("num_bases", "num_trainable", "init", "draw_bases", "svd_blocks"))
def rank_is_in_range(module):
    W0 = _randn(4, 6)
    for bad in (0, -1, 5, 6, 2.0, True):
        for function in (module.num_bases, module.num_trainable, module.init, module.svd_blocks):
            refuses(function, "rank", W0, rank=bad)
        refuses(module.draw_bases, "rank", [W0], rank=bad)
        refuses(module.draw_bases, "rank", [_randn(8, 9), W0], rank=bad)
    assert module.num_bases(W0, rank=4) == 1
    assert module.num_bases(W0, rank=1) == 4


@promise("The scaling needs counts of at least one, and an alpha that is positive and finite.", of="scaling_factor")
def scaling_refuses(module):
    for bad in (0, -1, 2.5, math.nan, True):
        refuses(module.scaling_factor, "rank", bad, 3)
        refuses(module.scaling_factor, "bases", 3, bad)
    for bad in (0.0, -1.0, math.inf, math.nan):
        refuses(module.scaling_factor, "alpha", 3, 3, alpha=bad)
    assert module.scaling_factor(1, 1) == 2.0


@promise("A sparsity below 1 would be more than all entries.", of="ternarise")
def sparsity_in_range(module):
    u = torch.tensor([0.0, 0.25, 0.5, 0.75])
    for bad in (0.5, 0.0, -3.0, math.inf, math.nan):
        refuses(module.ternarise, "sparsity", u, sparsity=bad)
    assert module.ternarise(u, sparsity=1.0).tolist() == [-1.0, -1.0, 0.0, 1.0]
    # 1 - 1 / 8.5 lies between two numbers of bfloat16, and would be rounded to the upper one
    assert module.ternarise(torch.tensor([0.87890625, 0.8828125], dtype=torch.bfloat16), sparsity=4.25).tolist() == [0.0, 1.0]


@promise("A base whose entries are all equal cannot be normalised.", of="normalise")
def base_without_spread(module):
    for base in (torch.ones(3, 2), torch.ones(1), torch.zeros(4)):
        refuses(module.normalise, "base", base)


@promise("Bases need a weight, and weights of one dtype and device.", of="draw_bases")
def weights_fit(module):
    refuses(module.draw_bases, "weights", [], rank=2)
    refuses(module.draw_bases, "weights", [_randn(4, 5), _randn(4, 5).float()], rank=2)
    refuses(module.draw_bases, "weights", [_randn(4, 5), _randn(4, 5).to("meta")], rank=2)
    refuses(module.draw_bases, "weights", [_randn(4)], rank=2)
    refuses(module.draw_bases, "W0", [_randn(4, 5), _randn(4, 5, 6)], rank=2)
    refuses(module.draw_bases, "kind", [_randn(4, 5)], rank=2, kind="ternary")


@promise(
    "Bases that are too small for a layer are refused, in each of their three sizes; just large enough ones are not.", of="slice_bases"
)
def bases_too_small(module):
    for W0 in (_randn(7, 4), _randn(4, 7)):
        for A, B in ((_randn(2, 3), _randn(7, 2, 2)), (_randn(2, 4), _randn(6, 2, 2)), (_randn(2, 4), _randn(7, 1, 2))):
            refuses(module.slice_bases, "shared_A", W0, A, B)
            refuses(module.slice_bases, "shared_B", W0, A, B)
        A, B = module.slice_bases(W0, _randn(2, 4), _randn(7, 2, 2))
        assert A.shape == (2, 4)
        assert B.shape == (7, 2, 2)
    refuses(module.slice_bases, "rank", _randn(3, 3), _randn(4, 9), _randn(9, 9, 4))


@promise("Slices are views of the pair, no copies, and so is the flattened B of the forward.", of="slice_bases")
def slices_are_views(module):
    pair = _randn(2, 6), _randn(9, 4, 2)
    for part, whole in zip(module.slice_bases(_randn(7, 5), *pair), pair, strict=True):
        assert part.data_ptr() == whole.data_ptr()
        assert part.flatten(1).data_ptr() == whole.data_ptr()


@promise(
    "Diagonals, bases and weight have to fit each other, whichever side is smaller.", of=("forward", "merge", "gradients", "fit_gammas")
)
def factors_fit(module):
    good = {"gammas": _randn(2, 3), "A": _randn(2, 3), "lambdas": _randn(2, 2), "B": _randn(5, 2, 2), "scaling": 1.0}
    for W in (_randn(3, 5), _randn(5, 3)):
        module.merge(W, **good)
        refuses(module.merge, "W0", _randn(5), **good)
        for wrong in (W[:, :2], W[:2], _randn(4, 4)):
            refuses(module.merge, "W0", wrong, **good)
            refuses(module.gradients, "G", wrong, **good)
            refuses(module.fit_gammas, "target", wrong, **{k: v for k, v in good.items() if k != "gammas"})
            refuses(module.forward, "W0", _randn(2, wrong.shape[1]), wrong, **good)


# Draws and defaults


@promise("Without a generator the bases are drawn from torch's own.", of="draw_bases")
def bases_from_the_global_generator(module):
    for kind in ("uniform", "normal", "sparse", "very_sparse"):
        for part in (0, 1):
            assert follows_the_global_generator(lambda kind=kind, part=part: module.draw_bases([_randn(30, 40)], rank=6, kind=kind)[part])


@promise("Bases have the weights' dtype; in half precision they are drawn and normalised in float32.", of=("draw_bases", "normalise"))
def bases_in_half_precision(module):
    for dtype in (torch.float16, torch.bfloat16):
        half = module.draw_bases([torch.ones(20, 30, dtype=dtype)], rank=4, generator=torch.Generator().manual_seed(0))
        single = module.draw_bases([torch.ones(20, 30)], rank=4, generator=torch.Generator().manual_seed(0))
        assert half.A.dtype == half.B.dtype == dtype
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(half, single, strict=True))
        base = torch.linspace(-1, 2, 1001, dtype=dtype)
        assert torch.equal(module.normalise(base), (base.float() / base.float().std()).to(dtype))
        W0 = _randn(6, 4).to(dtype)
        assert module.svd_blocks(W0, rank=2).dtype == dtype
        gammas, lambdas = torch.ones(2, 4, dtype=dtype), torch.ones(2, 2, dtype=dtype)
        A, B = _randn(2, 4).to(dtype), _randn(6, 2, 2).to(dtype)
        assert module.fit_gammas(W0, A, lambdas, B, 1.0).dtype == module.fit_lambdas(W0, gammas, A, B, 1.0).dtype == dtype


@promise("A start has dtype and device of the weight.", of="init")
def start_on_the_device(module):
    for zero in ("lambdas", "gammas"):
        start = module.init(torch.ones(4, 5, dtype=torch.float16), rank=2, zero=zero)
        assert start.gammas.dtype == start.lambdas.dtype == torch.float16


@promise("A mask without a probability drops entries and divides by nothing.", of="forward")
def probability_is_zero_by_default(module):
    x, W0, mask = _randn(6, 5), _randn(4, 5), torch.rand(6, 5) < 0.5
    gammas, A, lambdas, B = _randn(2, 4), _randn(2, 4), _randn(2, 2), _randn(5, 2, 2)
    delta = module.delta_weight(gammas, A, lambdas, B, 1.5, wide=True)
    assert torch.allclose(module.forward(x, W0, gammas, A, lambdas, B, 1.5, mask=mask), x @ W0.T + (x * mask) @ delta.T)


# The hand-written backward


def _tensors(wide):
    gammas, A, lambdas, B = _randn(2, 3), _randn(2, 3), _randn(2, 2), _randn(5, 2, 2)
    x, W0 = (_randn(4, 5), _randn(3, 5)) if wide else (_randn(4, 3), _randn(5, 3))
    return [t.requires_grad_() for t in (x, W0, gammas, A, lambdas, B)]


@promise(
    "The backward is right in every tensor, the bases too, once and twice, and mapped over a part of them.", of=("_ThroughBase", "forward")
)
def backward_is_right(module):
    for wide in (False, True):
        tensors = _tensors(wide)

        def call(*given):
            return module.forward(*given, 1.5)

        assert torch.autograd.gradcheck(call, tensors)
        assert torch.autograd.gradgradcheck(call, tensors)
        for i in range(len(tensors)):
            batch = torch.stack([tensors[i], 2 * tensors[i]]).detach()
            mapped = torch.vmap(call, in_dims=tuple(0 if j == i else None for j in range(6)))(
                *(batch if j == i else t.detach() for j, t in enumerate(tensors))
            )
            for part, one in zip(mapped, batch, strict=True):
                assert torch.allclose(part, call(*(one if j == i else t for j, t in enumerate(tensors))))


@promise("A backward without second derivatives gives the same as one with them, and leaves what is kept alone.", of="_ThroughBase")
def backward_in_place(module):
    for wide in (False, True):
        tensors = _tensors(wide)
        wanted = [tensors[i] for i in (0, 2, 4)]
        kept = [t.detach().clone() for t in tensors]
        y = module.forward(*tensors, 1.5)
        first = torch.autograd.grad(y.sin().sum(), wanted, retain_graph=True)
        again = torch.autograd.grad(y.sin().sum(), wanted, retain_graph=True)
        twice = torch.autograd.grad(y.sin().sum(), wanted, create_graph=True)
        for a, b, c in zip(first, again, twice, strict=True):
            assert torch.equal(a, b)
            assert torch.allclose(a, c)
        assert all(torch.equal(a, b) for a, b in zip(kept, tensors, strict=True))


@promise("Each tensor gets its gradient also where no other asks for one.", of="_ThroughBase")
def each_gradient_alone(module):
    for wide in (False, True):
        tensors = _tensors(wide)
        together = torch.autograd.grad(module.forward(*tensors, 1.5).sin().sum(), tensors)
        for i, want in enumerate(together):
            alone = [t.detach().requires_grad_(j == i) for j, t in enumerate(tensors)]
            assert torch.allclose(torch.autograd.grad(module.forward(*alone, 1.5).sin().sum(), alone[i])[0], want)


@promise(
    "Between forward and backward nothing is kept but the arguments and, for a wide layer, the input on B: no scaled base.",
    of=("_ThroughBase", "forward"),
)
def nothing_large_is_kept(module):
    for wide in (False, True):
        tensors = _tensors(wide)
        for i in (1, 3, 5):
            tensors[i].requires_grad_(False)
        own, found = {t.untyped_storage().data_ptr() for t in tensors}, {}

        def pack(tensor, own=own, found=found):
            if tensor.untyped_storage().data_ptr() not in own:
                found[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = module.forward(*tensors, 1.5)
        # (positions, bases rank) for a wide layer
        assert sorted(found.values()) == ([4 * 4] if wide else []), f"kept: {found}"
        y.sum().backward()
        assert tensors[3].grad is None


@promise("The layer makes no (out, in) matrix, in training or not.", of=("_ThroughBase", "forward"))
def no_matrix_of_the_weight(module):
    small, large, bases, rank = 4, 60, 2, 2
    for wide in (False, True):
        out, in_ = (small, large) if wide else (large, small)
        x, W0, grad_y = _randn(2, in_), _randn(out, in_), _randn(2, out)
        gammas, lambdas = _randn(bases, small).requires_grad_(), _randn(bases, rank).requires_grad_()
        A, B = _randn(rank, small), _randn(large, bases, rank)
        for train in (False, True):
            with torch.set_grad_enabled(train), Largest() as largest:
                y = module.forward(x, W0, gammas, A, lambdas, B, 1.5)
                if train:
                    y.backward(grad_y)
            assert 0 < largest.entries < out * in_, f"a tensor of {largest.entries} entries was made for a weight of {W0.numel()}"


# One pair in memory


def _model():
    return nn.Sequential(_linear(6, 4), nn.ReLU(), _linear(4, 9), nn.ReLU(), _linear(9, 3))


def _pairs(model):
    return [m.pair for m in model.modules() if hasattr(m, "pair")]


@promise(
    "All layers of a model share one pair, also after a cast, a copy, a save and a load.", of=("adapt_model", "BasePair", "RandLoRALinear")
)
def one_pair(module):
    model = _model()
    assert module.adapt_model(model, "[024]", rank=3) == ["0", "2", "4"]
    assert sum(b.numel() for b in model.buffers()) == 3 * 9 + 9 * 3 * 3
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.state_dict())
    for one in (model, copied, copy.deepcopy(model).float()):
        assert len({id(pair) for pair in _pairs(one)}) == 1
        assert len({pair.A.data_ptr() for pair in _pairs(one)} | {pair.B.data_ptr() for pair in _pairs(one)}) == 2
        assert len(list(one.buffers())) == 2
    x = _randn(5, 6)
    assert torch.equal(copied(x), model(x))


@promise("An adapted model starts as it was; only the diagonals are trained; the generator decides the bases.", of="adapt_model")
def adapted_model(module):
    x, plain = _randn(5, 6), _model()
    made = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(plain)
        module.adapt_model(model, "[024]", rank=3, kind="normal", generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(model(x), plain(x))
        made.append(_pairs(model)[0])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{i}.{name}" for i in (0, 2, 4) for name in ("gammas", "lambdas")}
    assert torch.equal(made[0].A, made[1].A)
    assert not torch.equal(made[0].A, made[2].A)
    single = module.draw_bases([plain[i].weight for i in (0, 2, 4)], rank=3, kind="normal", generator=torch.Generator().manual_seed(0))
    assert torch.equal(single.A, made[0].A)
    assert torch.equal(single.B, made[0].B)
    model = copy.deepcopy(plain)
    module.adapt_model(model, "[02]", rank=3, alpha=5.0, convention="peft", zero="gammas", dropout=0.25)
    assert model[0].scaling == 5 / 3
    assert model[2].dropout == 0.25
    assert not model[2].gammas.any()
    assert type(model[4]) is nn.Linear
    assert torch.equal(
        module.draw_bases([plain[0].weight], rank=2, generator=torch.Generator().manual_seed(7)).A, _of_seed(module, plain, 7)
    )


def _of_seed(module, plain, seed):
    """A of a model that was adapted without naming a kind."""
    model = copy.deepcopy(plain)
    module.adapt_model(model, "0", rank=2, generator=torch.Generator().manual_seed(seed))
    return model[0].pair.A


@promise("A pattern that matches no layer is refused and the names are told; a refused model stays as it was.", of="adapt_model")
def pattern_matches_nothing(module):
    model = _model()
    refuses(module.adapt_model, "0, 2, 4", model, "attention", rank=2)
    refuses(module.adapt_model, "rank", model, "[024]", rank=4)
    assert all(p.requires_grad for p in model.parameters())
    assert type(model[0]) is nn.Linear


@promise("A pair has to be finite.", of="BasePair")
def pair_is_finite(module):
    for name in ("A", "B"):
        pair = {"A": _randn(2, 4), "B": _randn(5, 2, 2)}
        pair[name][0] = math.nan
        refuses(module.BasePair, name, **pair)


# The layer


@promise("The layer is the frozen one plus the explicit sum, tall, square or wide.", of=("RandLoRALinear", "forward"))
def layer_computes(module):
    for shape in ((5, 4), (4, 5), (4, 4)):
        layer, x = _layer(module, _linear(*shape)), _randn(3, shape[0])
        assert torch.allclose(layer(x), layer.base(x) + x @ _update(layer).T)
        assert layer(x).shape == (3, shape[1])
        assert torch.allclose(layer(x[None]), layer(x)[None])


@promise("The scaling is the paper's unless told otherwise, for the layer's own number of terms.", of="RandLoRALinear")
def scaling_of_the_layer(module):
    assert abs(_layer(module).scaling - 2 / math.sqrt(2)) < 1e-12
    assert _layer(module, convention="peft").scaling == 20
    assert _layer(module, convention="vision").scaling == 0.5
    assert _layer(module, convention="peft", alpha=3.0).scaling == 1.5


@promise("Only the diagonals of the layer are trained, whatever was trained before; the start is that of `init`.", of="RandLoRALinear")
def only_diagonals_are_trained(module):
    linear = _linear()
    pair = module.BasePair(_randn(2, 4).requires_grad_(), _randn(5, 2, 2).requires_grad_())
    for zero in ("lambdas", "gammas"):
        layer = module.RandLoRALinear(linear, pair, zero=zero)
        assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["gammas", "lambdas"]
        start = module.init(linear.weight, rank=2, zero=zero)
        assert torch.equal(layer.gammas, start.gammas)
        assert torch.equal(layer.lambdas, start.lambdas)
    assert not module.RandLoRALinear(linear, pair).lambdas.any()
    assert not pair.A.requires_grad
    assert not pair.B.requires_grad
    assert set(layer.state_dict()) == {"gammas", "lambdas", "base.weight", "base.bias", "pair.A", "pair.B"}


@promise("A training step moves the diagonals alone.", of="RandLoRALinear")
def training_moves_diagonals_only(module):
    layer = _layer(module)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(_randn(7, 5)).square().sum().backward()
    torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1).step()
    assert {name for name, tensor in layer.state_dict().items() if not torch.equal(tensor, before[name])} == {"gammas", "lambdas"}


@promise("The layer refuses a dropout outside of [0, 1), a pair that is too small, and a weight that is not finite.", of="RandLoRALinear")
def layer_refuses(module):
    for dropout in (-0.1, 1.0, math.nan):
        refuses(lambda dropout=dropout: _layer(module, dropout=dropout), "dropout")
    refuses(module.RandLoRALinear, "too small", _linear(), module.BasePair(_randn(2, 3), _randn(5, 2, 2)))
    linear = _linear()
    linear.weight.data[0, 0] = math.nan
    refuses(module.RandLoRALinear, "W0", linear, module.BasePair(_randn(2, 4), _randn(5, 2, 2)))


@promise("In training each entry of the adapter's input is dropped with probability p, and the rest divided by 1 - p.", of="RandLoRALinear")
def layer_drops_in_training(module):
    layer = _layer(module, _linear(3, 4), dropout=0.25)
    check_dropout(layer, _update(layer))


@promise("Outside training, or with dropout 0, the layer drops nothing and draws nothing.", of="RandLoRALinear")
def layer_draws_nothing_otherwise(module):
    assert _layer(module).dropout == 0
    for layer in (_layer(module, dropout=0.5).eval(), _layer(module, dropout=0.0).train()):
        check_no_dropout(layer, _update(layer))


@promise("Merging and unmerging, each as often as one likes, leave the layer's function as it is.", of="RandLoRALinear")
def merging_keeps_the_function(module):
    layer, x = _layer(module).eval(), _randn(6, 5)
    before = layer(x)
    check_merging(layer, _update(layer))
    layer.merge()
    with torch.no_grad():
        layer.gammas.zero_()
    assert torch.allclose(layer(x), before), "a merged layer adds its update once more"


@promise("A fit needs a scaling that is positive and finite.", of=("fit_gammas", "fit_lambdas"))
def fits_need_a_scaling(module):
    W0, gammas, lambdas = _randn(6, 4), _randn(2, 4), _randn(2, 2)
    A, B = _randn(2, 4), _randn(6, 2, 2)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        refuses(lambda wrong=wrong: module.fit_gammas(W0, A, lambdas, B, wrong), "scaling")
        refuses(lambda wrong=wrong: module.fit_lambdas(W0, gammas, A, B, wrong), "scaling")


@promise("Float32 diagonals beside a bfloat16 weight are used in bfloat16, and trained and merged in float32.", of="RandLoRALinear")
def diagonals_more_precise_than_the_weight(module):
    layer, x = _layer(module).bfloat16(), _randn(3, 5).bfloat16()
    gammas, lambdas = layer.gammas.detach().float() * 1.001, layer.lambdas.detach().float() * 1.001
    layer.gammas.data, layer.lambdas.data = gammas, lambdas
    y = layer(x)
    y.float().sum().backward()
    A, B = module.slice_bases(layer.base.weight, layer.pair.A, layer.pair.B)
    factors = gammas.bfloat16(), A, lambdas.bfloat16(), B, layer.scaling
    assert torch.equal(y, module.forward(x, layer.base.weight, *factors, bias=layer.base.bias))
    assert layer.gammas.grad.dtype == layer.lambdas.grad.dtype == torch.float32
    weight = layer.base.weight.clone()
    exact = gammas, A.float(), lambdas, B.float(), layer.scaling
    layer.merge()
    assert torch.equal(layer.base.weight, module.merge(weight.float(), *exact).bfloat16())
    merged = layer.base.weight.clone()
    layer.unmerge()
    assert torch.equal(layer.base.weight, module.unmerge(merged.float(), *exact).bfloat16())
