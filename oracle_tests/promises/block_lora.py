"""What `reference/block_lora.py` promises beside the laws of Block-LoRA: its layer, its errors, its costs, its defaults."""

import math

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from loracle.oracle_tests.promises import follows_the_global_generator, promise, refuses
from loracle.oracle_tests.promises.layers import randn

# The set-up functions that read values, and of which arguments
FINITE = {"init": ("W0",), "merge": ("W0", "A", "B"), "unmerge": ("W", "A", "B"), "fit_delta": ("D",)}


def _linear(in_features=7, out_features=6, bias=True):
    return nn.Linear(in_features, out_features, bias=bias, dtype=torch.float64)


def _layer(module, base=None, **options):
    """A small layer whose blocks are not zero, nor alike."""
    layer = module.BlockLoRALinear(base or _linear(), **{"rank": 6, "blocks": 3, "alpha": 3.0, **options})
    nn.init.normal_(layer.B)
    return layer


def _factors():
    return randn(2, 7), randn(3, 6, 2)


# Errors


def _refusal_of(call):
    """The message of the ValueError that a call raises; none if it goes well."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


@promise("A rank that the blocks do not divide is refused, and the message names its divisors.", of="_block_rank")
def divisors_are_named(module):
    W0 = randn(12, 13)
    calls = (
        lambda: module.init(W0, rank=12, blocks=5),
        lambda: module.fit_delta(W0, rank=12, blocks=5),
        lambda: module.num_trainable(W0, rank=12, blocks=5),
        lambda: module.mult_adds(W0, rank=12, blocks=5, tokens=1),
        lambda: module.scaling_factor(1.0, 12, blocks=5),
        lambda: module.generalization_bound(torch.tensor([(3, 4)]), rank=12, blocks=5, bits=16, num_samples=10, loss_sigma=1.0),
        lambda: module.BlockLoRALinear(_linear(13, 12), rank=12, blocks=5, alpha=1.0),
    )
    for call in calls:
        message = _refusal_of(call)
        assert "needed one of 1, 2, 3, 4, 6, 12" in message
        assert "blocks is 5 and rank is 12" in message


@promise(
    "Blocks, rows and samples are whole numbers of at least 1.",
    of=("_check_whole", "compact_settings", "mult_adds", "init", "generalization_bound"),
)
def numbers_are_whole(module):
    W0 = randn(6, 7)
    for bad in (0, -1, 2.0, True, "2"):
        refuses(module.init, "blocks", W0, rank=2, blocks=bad)
        refuses(module.fit_delta, "blocks", W0, rank=2, blocks=bad)
        refuses(module.num_trainable, "blocks", W0, rank=2, blocks=bad)
        refuses(module.scaling_factor, "blocks", 1.0, 2, blocks=bad)
        refuses(module.scaling_factor, "rank", 1.0, bad, blocks=1)
        refuses(module.compact_settings, "blocks", 0.1, blocks=bad)
        refuses(module.mult_adds, "tokens", W0, rank=2, blocks=1, tokens=bad)
        bound = {"rank": 2, "blocks": 1, "bits": 16, "num_samples": 10, "loss_sigma": 1.0}
        for name in ("rank", "blocks", "num_samples"):
            refuses(module.generalization_bound, name, torch.tensor([[3, 4]]), **{**bound, name: bad})
    assert module.mult_adds(W0, rank=1, blocks=1, tokens=1).multiplications == 13


@promise("The nominal rank goes from 1 to the smaller side.", of=("init", "fit_delta", "num_trainable", "mult_adds"))
def rank_is_in_range(module):
    for W0 in (randn(6, 7), randn(7, 6)):
        for function in (module.init, module.fit_delta, module.num_trainable, module.mult_adds):
            options = {"tokens": 2} if function is module.mult_adds else {}
            for bad in (0, -2, 8, 2.0, True):
                refuses(function, "rank", W0, rank=bad, blocks=1, **options)
            # Not even where a block of it would fit
            refuses(function, "rank", W0, rank=8, blocks=2, **options)
        for function in (module.init, module.fit_delta):
            A, B = function(W0, rank=6, blocks=2)
            assert A.shape == (3, W0.shape[1])
            assert B.shape == (2, W0.shape[0], 3)
        assert module.num_trainable(W0, rank=6, blocks=6) == 6 * len(W0) + W0.shape[1]


@promise("The bound needs weights with sides, and positive finite numbers.", of=("generalization_bound",))
def bound_refuses(module):
    good = {"rank": 4, "blocks": 2, "bits": 16, "num_samples": 1, "loss_sigma": 1.0}
    assert module.generalization_bound(torch.tensor([(1, 1)]), **good) > 0
    for shapes in ([[3, 4], [0, 4]], [[3, -1]], [3, 4], [[3, 4, 5]], [[3], [4]], [[3.0, 4.0]], [[[3, 4]]]):
        refuses(module.generalization_bound, "shapes", torch.tensor(shapes), **good)
    refuses(module.generalization_bound, "shapes", torch.ones(0, 2, dtype=torch.int64), **good)
    for name in ("bits", "loss_sigma"):
        for bad in (0.0, -1.0, math.nan, math.inf):
            refuses(module.generalization_bound, name, torch.tensor([[3, 4]]), **{**good, name: bad})


@promise("The scaling of an approximation is positive and finite.", of=("fit_delta",))
def scaling_is_positive(module):
    for bad in (0.0, -1.0, math.nan, math.inf):
        refuses(module.fit_delta, "scaling", randn(6, 7), bad, rank=2, blocks=2)


@promise("An order that does not exist is refused, with the nearest name.", of=("forward", "mult_adds", "BlockLoRALinear"))
def order_is_known(module):
    x, W0, (A, B) = randn(2, 7), randn(6, 7), _factors()
    for call in (
        lambda: module.forward(x, W0, A, B, 1.0, order="block_wise"),
        lambda: module.mult_adds(W0, rank=6, blocks=3, tokens=2, order="block_wise"),
        lambda: _layer(module, order="block_wise"),
    ):
        message = _refusal_of(call)
        assert "order is 'block_wise'" in message
        assert "did you mean 'blockwise'" in message


@promise("What is no matrix is refused as such.", of="init")
def weight_is_a_matrix(module):
    for bad in (torch.ones(()), torch.ones(3), torch.ones(2, 3, 4), torch.ones(3, 4, dtype=torch.int64)):
        refuses(module.init, "W0", bad, rank=1, blocks=1)


# Costs


def _adapter_flops(call, tokens):
    """Multiplications in matrix products that a call makes beside those of the frozen 6 x 7 layer."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2 - tokens * 6 * 7


@promise(
    "The two orders really do the products that are counted for them; adding first is the default.",
    of=("forward", "mult_adds", "BlockLoRALinear"),
)
def orders_cost_what_is_counted(module):
    x, W0, (A, B) = randn(2, 5, 7), randn(6, 7), _factors()
    for options in ({"order": "blockwise"}, {"order": "add_first"}, {}):
        counted = module.mult_adds(W0, rank=6, blocks=3, tokens=10, **options).multiplications
        assert _adapter_flops(lambda options=options: module.forward(x, W0, A, B, 1.5, **options), 10) == counted
        layer = _layer(module, **options)
        assert _adapter_flops(lambda layer=layer: layer(x), 10) == counted


# Draws and defaults


@promise("Without a generator the start is drawn from torch's own.", of="init")
def start_from_the_global_generator(module):
    assert follows_the_global_generator(lambda: module.init(torch.ones(6, 7), rank=4, blocks=2).A)


@promise("Factors have the device and dtype of what they are made for.", of=("init", "fit_delta"))
def factors_follow_the_weight(module):
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        W0 = randn(6, 7).to(dtype)
        for factors in (module.init(W0, rank=4, blocks=2), module.fit_delta(W0, rank=4, blocks=2)):
            assert {factor.dtype for factor in factors} == {dtype}
    assert module.fit_delta(randn(6, 7), rank=4, blocks=2).A.dtype == torch.float64


@promise("An approximation owns its memory: the rest of the decomposition can be freed.", of="fit_delta")
def fit_owns_its_memory(module):
    for factor in module.fit_delta(randn(6, 7), rank=4, blocks=2):
        assert factor.is_contiguous()
        assert factor.untyped_storage().nbytes() == factor.numel() * factor.element_size()


@promise("In half precision the decomposition is made in float32.", of="fit_delta")
def fit_in_half_precision(module):
    D = randn(6, 7).bfloat16()
    A, B = module.fit_delta(D, rank=4, blocks=2)
    exact_A, exact_B = module.fit_delta(D.float(), rank=4, blocks=2)
    assert torch.equal(A, exact_A.bfloat16())
    assert torch.equal(B, exact_B.bfloat16())


@promise("What comes back shares no memory with the arguments, nor blocks with each other.", of=("gradients", "to_compact_lora", "to_lora"))
def results_own_their_memory(module):
    A, B = _factors()
    grads = module.gradients(randn(6, 7), A, B, 1.5)
    grads.grad_B[0] += 1
    assert not torch.equal(grads.grad_B[0], grads.grad_B[1])
    for function in (module.to_lora, module.to_compact_lora):
        for one_block in (B, B[:1]):
            kept = A.clone(), one_block.clone()
            for factor in function(A, one_block):
                factor += 1
            assert torch.equal(A, kept[0])
            assert torch.equal(one_block, kept[1])


@promise("All blocks have the same gradient to the last bit, by formula and by autograd in both orders.", of=("gradients", "forward"))
def blocks_move_alike(module):
    x, W0, (A, B) = randn(9, 7), randn(6, 7), _factors()
    grad_B = module.gradients(randn(6, 7), A, B, 1.5).grad_B
    assert torch.equal(grad_B[0], grad_B[2])
    for order in module.ORDERS:
        leaf = B.clone().requires_grad_()
        module.forward(x, W0, A, leaf, 1.5, order=order).tanh().sum().backward()
        assert torch.equal(leaf.grad[0], leaf.grad[1])
        assert torch.equal(leaf.grad[0], leaf.grad[2])


# The layer


@promise("The layer is the frozen one plus s times the sum of its blocks, with alpha / rank for s.", of="BlockLoRALinear")
def layer_computes(module):
    for options in ({}, {"order": "blockwise"}):
        for base in (_linear(), _linear(bias=False)):
            layer, x = _layer(module, base, **options), randn(3, 7)
            assert torch.allclose(layer(x), base(x) + 0.5 * x @ layer.A.T @ (layer.B[0] + layer.B[1] + layer.B[2]).T)


@promise("The layer's scaling can be that of the root of the rank, of a block, or of both.", of="BlockLoRALinear")
def layer_scaling(module):
    assert _layer(module).scaling == 0.5
    assert _layer(module, per_block=True).scaling == 1.5
    assert math.isclose(_layer(module, rslora=True).scaling, 3 / math.sqrt(6))
    assert math.isclose(_layer(module, rslora=True, per_block=True).scaling, 3 / math.sqrt(2))


@promise("The layer starts as its base, from the factors that the generator gives.", of="BlockLoRALinear")
def layer_starts(module):
    base, x = _linear(), randn(3, 7)
    layers = [module.BlockLoRALinear(base, rank=6, blocks=3, alpha=3.0, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(layers[0].A, layers[1].A)
    assert torch.equal(layers[0](x), base(x))
    assert layers[0].B.shape == (3, 6, 2)


@promise("Only the factors of the layer are trained; what is saved are they and the base.", of="BlockLoRALinear")
def only_factors_are_trained(module):
    layer = _layer(module, _linear().requires_grad_())
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["A", "B"]
    assert set(layer.state_dict()) == {"A", "B", "base.weight", "base.bias"}
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == module.num_trainable(layer.base.weight, rank=6, blocks=3)


@promise("A training of the layer with torch's AdamW is that of LoRA with the compact form and the compact settings.", of="BlockLoRALinear")
def training_is_that_of_a_small_lora(module):
    x, target = randn(9, 7), randn(9, 6)
    layer = _layer(module)
    small = module.BlockLoRALinear(layer.base, rank=2, blocks=1, alpha=1.0)
    with torch.no_grad():
        A, B = module.to_compact_lora(layer.A, layer.B)
        small.A.copy_(A)
        small.B.copy_(B[None])
    found = module.compact_settings(0.01, blocks=3, weight_decay=0.3)
    groups = [
        {"params": [small.A], "lr": found.lr_A, "weight_decay": found.weight_decay_A},
        {"params": [small.B], "lr": found.lr_B, "weight_decay": found.weight_decay_B},
    ]
    small.scaling = layer.scaling
    runs = [(layer, torch.optim.AdamW([layer.A, layer.B], lr=0.01, weight_decay=0.3)), (small, torch.optim.AdamW(groups))]
    for _ in range(25):
        for model, optimizer in runs:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x).tanh(), target).backward()
            optimizer.step()
    assert torch.allclose(layer(x), small(x), rtol=1e-10)


@promise("Dropout acts in training only, with one mask for all blocks, and only on the adapter.", of="BlockLoRALinear")
def layer_dropout(module):
    layer, x = _layer(module, dropout=0.5), randn(40, 7)
    layer.eval()
    assert torch.equal(layer(x), _no_dropout(module, layer, x))
    layer.train()
    torch.default_generator.manual_seed(3)
    mask = torch.rand(x.shape) >= 0.5
    torch.default_generator.manual_seed(3)
    assert torch.allclose(layer(x), layer.base(x) + 0.5 * (2 * x * mask) @ layer.A.T @ layer.B.sum(dim=0).T)
    layer.dropout = 0.0
    before = torch.get_rng_state()
    assert torch.equal(layer(x), _no_dropout(module, layer, x))
    assert torch.equal(torch.get_rng_state(), before)


def _no_dropout(module, layer, x):
    return module.forward(x, layer.base.weight, layer.A, layer.B, layer.scaling, bias=layer.base.bias)


@promise("Without an argument there is no dropout, and outside [0, 1) there can be none.", of="BlockLoRALinear")
def layer_dropout_is_a_probability(module):
    assert _layer(module).dropout == 0
    assert _layer(module, dropout=0).dropout == 0
    for bad in (-0.1, 1.0, 1.5, math.nan):
        refuses(_layer, "dropout", module, dropout=bad)


@promise("A mask without a probability drops entries and divides by nothing.", of="forward")
def probability_is_zero_by_default(module):
    x, W0, (A, B) = randn(5, 7), randn(6, 7), _factors()
    mask = torch.rand(5, 7) < 0.5
    got = module.forward(x, W0, A, B, 1.5, mask=mask)
    assert torch.allclose(got, x @ W0.T + 1.5 * (x * mask) @ A.T @ B.sum(dim=0).T)


@promise("Merging moves the update into the base weight once, unmerging takes it out once.", of="BlockLoRALinear")
def layer_merges(module):
    layer, x = _layer(module), randn(3, 7)
    weight, before = layer.base.weight.clone(), layer(x)
    assert not layer.merged
    layer.unmerge()
    assert torch.equal(layer.base.weight, weight)
    for _ in range(2):
        layer.merge()
        assert layer.merged
        assert torch.allclose(layer.base.weight, weight + 0.5 * layer.B.sum(dim=0) @ layer.A)
        assert torch.allclose(layer(x), before)
        assert torch.allclose(layer(x), layer.base(x))
    for _ in range(2):
        layer.unmerge()
        assert not layer.merged
        assert torch.allclose(layer.base.weight, weight)
        assert torch.allclose(layer(x), before)
    assert not layer.base.weight.requires_grad


@promise("Factors in float32 beside a bfloat16 weight are used in bfloat16, and trained and merged in float32.", of="BlockLoRALinear")
def factors_of_higher_precision(module):
    layer, x = _layer(module, _linear().bfloat16()), randn(5, 7).bfloat16()
    layer.A.data, layer.B.data = layer.A.data.float(), layer.B.data.float()
    y, weight = layer(x), layer.base.weight.clone()
    assert torch.equal(y, module.forward(x, weight, layer.A.bfloat16(), layer.B.bfloat16(), 0.5, bias=layer.base.bias))
    y.sum().backward()
    assert {layer.A.grad.dtype, layer.B.grad.dtype} == {torch.float32}
    layer.merge()
    merged = (weight.float() + 0.5 * layer.B.sum(dim=0) @ layer.A).bfloat16()
    assert torch.equal(layer.base.weight, merged)
    layer.unmerge()
    assert torch.equal(layer.base.weight, (merged.float() - 0.5 * layer.B.sum(dim=0) @ layer.A).bfloat16())
