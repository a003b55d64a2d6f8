"""What `reference/nlora.py` promises beside the laws: its layer, its errors, and that no factor is a view of the weight."""

import math
from types import SimpleNamespace

import torch
from torch import nn

from loracle.oracle_tests.promises import follows_the_global_generator, promise, refuses
from loracle.oracle_tests.promises.layers import check_dropout, check_merging, check_no_dropout, check_precise_factors, randn

# The set-up functions that read values, and of which arguments
FINITE = {
    "init": ("W0",),
    "init_slora": ("W0",),
    "landmark_blocks": ("W0",),
    "nystrom_approx": ("W0",),
    "nystrom_from_svd": ("W0",),
    "base_weight": ("W0", "A", "N", "B"),
    "merge": ("W_base", "A", "N", "B"),
    "unmerge": ("W", "A", "N", "B"),
    "fit_core": ("target", "A", "B"),
}


def _linear(W0, bias=None):
    # Without its own draw from the global generator
    linear = nn.utils.skip_init(nn.Linear, W0.shape[1], W0.shape[0], bias=bias is not None, dtype=W0.dtype)
    linear.weight.data.copy_(W0)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear


def layer_functions(module):
    """The contract by the start, forward, merge and autograd of the layer `SLoRALinear`."""

    def layer_of(W_base, A, N, B, scaling, bias=None, method="nlora"):
        # The start, which SLoRA draws, is overwritten
        options = {"method": method, "generator": torch.Generator()}
        layer = module.SLoRALinear(_linear(W_base, bias), rank=len(A), alpha=scaling * len(A), **options)
        for name, factor in (("A", A), ("N", N), ("B", B)):
            layer.get_parameter(name).data.copy_(factor)
        return layer

    def weights(layer):
        return tuple(tensor.detach() for tensor in (layer.base.weight, layer.A, layer.N, layer.B))

    def init(W0, scaling=1.0, *, rank, core="block", residual=False, rows=None, cols=None, rcond=None):
        options = {"core": core, "residual": residual, "rows": rows, "cols": cols, "rcond": rcond}
        return weights(module.SLoRALinear(_linear(W0), rank=rank, alpha=scaling * rank, **options))

    def init_slora(W0, *, rank, core="kaiming", generator=None):
        return weights(module.SLoRALinear(_linear(W0), rank=rank, alpha=rank, method="slora", core=core, generator=generator))[1:]

    def forward(x, W_base, A, N, B, scaling, *, bias=None):
        with torch.no_grad():
            return layer_of(W_base, A, N, B, scaling, bias)(x)

    def pulled(layer, G):
        """The layer with G as the gradient of its merged weight: its outputs for the unit vectors are the weight's columns."""
        layer(torch.eye(G.shape[1], dtype=G.dtype)).backward(G.mT)
        return layer

    def gradients(G, A, N, B, scaling):
        layer = pulled(layer_of(torch.zeros_like(G), A, N, B, scaling), G)
        return layer.A.grad, layer.N.grad, layer.B.grad

    def sgd_step(G, W_base, A, N, B, scaling, *, lr, method="nlora"):
        layer = pulled(layer_of(W_base, A, N, B, scaling, method=method), G)
        torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=lr).step()
        return weights(layer)

    def merge(W_base, A, N, B, scaling):
        layer = layer_of(W_base, A, N, B, scaling)
        layer.merge()
        return weights(layer)[0]

    def unmerge(W, A, N, B, scaling):
        layer = layer_of(W, A, N, B, scaling)
        layer.merged = True
        layer.unmerge()
        return weights(layer)[0]

    def num_trainable(W0, *, rank):
        return sum(p.numel() for p in module.SLoRALinear(_linear(W0), rank=rank, alpha=1.0).parameters() if p.requires_grad)

    return SimpleNamespace(
        init=init,
        init_slora=init_slora,
        forward=forward,
        gradients=gradients,
        sgd_step=sgd_step,
        merge=merge,
        unmerge=unmerge,
        num_trainable=num_trainable,
    )


NAMESPACES = {"SLoRALinear": layer_functions}


# Errors


@promise("The rank goes from 1 to the smaller side.", of=("init", "init_slora", "landmark_blocks", "num_trainable", "nystrom_approx"))
def rank_is_in_range(module):
    W0 = randn(4, 5)
    for bad in (0, -1, 5, 2.0, True):
        for name in ("init", "init_slora", "landmark_blocks", "num_trainable", "nystrom_approx", "nystrom_from_svd"):
            refuses(getattr(module, name), "rank", W0, rank=bad)
    assert module.init(W0, rank=4).N.shape == module.init_slora(W0, rank=4).N.shape == (4, 4)
    assert module.num_trainable(W0, rank=4) == 4 * 9 + 16


@promise("Landmarks are as many different whole numbers within the weight as the rank; anything else is refused by name.", of="_landmarks")
def landmarks_fit(module):
    W0 = randn(4, 6)
    bad = ([0], [0, 1, 2], [1, 1], [0, -1], [[0, 1]], [0.0, 1.0], [True, False], [0j, 1 + 0j])
    for name, outside in (("rows", 4), ("cols", 6)):
        for given in (*bad, [0, outside]):
            for function in (module.landmark_blocks, module.init, module.nystrom_approx):
                refuses(function, name, W0, rank=2, **{name: torch.tensor(given)})
        refuses(lambda name=name: module.init(W0, rank=2, **{name: [0, 1]}), name)
        for dtype in (torch.int64, torch.int32, torch.uint8):
            module.init(W0, rank=2, **{name: torch.tensor([0, outside - 1], dtype=dtype)})
    assert torch.equal(module.landmark_blocks(W0, rank=2, cols=torch.tensor([5, 4])).B, W0[:, [5, 4]])


@promise(
    "A landmark block that cannot be inverted is refused, its smallest singular value and the ways out in the message.",
    of=("_block_svd", "init", "nystrom_approx", "nystrom_from_svd", "SLoRALinear"),
)
def singular_block(module):
    W0 = randn(5, 6)
    W0[1, :2] = 2 * W0[0, :2]
    for function in (lambda **options: module.init(W0, core="pinv", **options), lambda **options: module.nystrom_approx(W0, **options)):
        try:
            function(rank=2)
        except ValueError as error:
            told = str(error)
        else:
            raise AssertionError("a singular block is accepted")
        smallest, largest = torch.linalg.svdvals(W0[:2, :2])[[1, 0]].tolist()
        for word in ("smallest", f"{smallest:.3g}", f"{largest:.3g}", "rows", "cols", "rcond", "block"):
            assert word in told, f"the message lacks {word!r}: {told}"
        function(rank=2, rcond=1e-12)
        function(rank=2, rows=torch.tensor([0, 3]))
    assert module.init(W0, rank=2).N.shape == (2, 2)
    refuses(module.nystrom_from_svd, "rcond", W0, rank=2)
    refuses(lambda: module.SLoRALinear(_linear(W0), rank=2, alpha=2.0, core="pinv"), "rcond")


@promise(
    "Unless told otherwise a block is singular below 1e-12 of its largest singular value in float64, 1e-6 in float32.", of="_block_svd"
)
def what_counts_as_singular(module):
    for dtype, cutoff in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        for largest in (1.0, 1e-3):
            for smallest, fine in ((1.5 * cutoff, True), (0.7 * cutoff, False)):
                W0 = torch.eye(3, 4, dtype=dtype) * largest
                W0[1, 1] = smallest * largest
                if fine:
                    assert torch.allclose(module.init(W0, rank=2, core="pinv").N @ W0[:2, :2], torch.eye(2, dtype=dtype))
                else:
                    refuses(module.init, "rcond", W0, rank=2, core="pinv")


@promise("The cut-off is a number from 0 to below 1; what lies just on it is left out.", of="_block_svd")
def cut_off_is_a_share(module):
    W0 = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    for bad in (-0.1, 1.0, 2.0, math.nan, math.inf):
        refuses(module.init, "rcond", W0, rank=2, core="pinv", rcond=bad)
        refuses(module.nystrom_approx, "rcond", W0, rank=2, rcond=bad)
    found = {rcond: module.init(W0, rank=3, core="pinv", rcond=rcond).N.diagonal().tolist() for rcond in (0.0, 0.25, 0.4)}
    assert found == {0.0: [0.25, 0.5, 1.0], 0.25: [0.25, 0.5, 0.0], 0.4: [0.25, 0.5, 0.0]}
    assert not module.init(0 * W0, rank=2, core="pinv", rcond=0.0).N.any()


@promise("The scaling of a correction is finite, that of a best core not zero either.", of=("base_weight", "fit_core", "init"))
def scaling_is_a_number(module):
    W0, A, N, B = randn(4, 5), randn(2, 5), randn(2, 2), randn(4, 2)
    for bad in (math.nan, math.inf, -math.inf):
        refuses(module.base_weight, "scaling", W0, A, N, B, bad)
        for core in ("block", "pinv"):
            refuses(module.init, "scaling", W0, bad, rank=2, core=core, residual=True)
            refuses(module.init, "scaling", W0, bad, rank=2, core=core)
        refuses(module.fit_core, "scaling", W0, A, B, bad)
    refuses(module.fit_core, "scaling", W0, A, B, 0.0)
    assert torch.equal(module.base_weight(W0, A, N, B, 0.0), W0)
    assert module.fit_core(W0, A, B, -1.0).isfinite().all()


@promise("A layer asks for a core that there is for its method, also where its name is empty, and for a finite alpha.", of="SLoRALinear")
def layer_is_asked_well(module):
    W0 = randn(4, 5)
    for method, bad in (("nlora", ""), ("inttune", "kaiming"), ("slora", ""), ("slora", "pinv")):
        refuses(lambda method=method, bad=bad: module.SLoRALinear(_linear(W0), rank=2, alpha=2.0, method=method, core=bad), "core")
    for bad in (math.nan, math.inf, -math.inf):
        refuses(lambda bad=bad: module.SLoRALinear(_linear(W0), rank=2, alpha=bad), "alpha")


@promise("A correction that overflows the weight's precision is refused.", of="base_weight")
def correction_overflows(module):
    A, N, B = torch.ones(2, 5).half(), 300 * torch.ones(2, 2).half(), 300 * torch.ones(4, 2).half()
    refuses(module.base_weight, "W_base", torch.ones(4, 5).half(), A, N, B, 1.0)


@promise("No parameter of another shape, precision or method is taken by a step.", of="sgd_step")
def step_refuses(module):
    good = {"G": randn(4, 5), "W_base": randn(4, 5), "A": randn(2, 5), "N": randn(2, 2), "B": randn(4, 2)}
    refuses(module.sgd_step, "G", **{**good, "W_base": randn(3, 5)}, scaling=1.0, lr=0.1)
    refuses(module.sgd_step, "method", **good, scaling=1.0, lr=0.1, method="lora")


# Copies, draws, precision


@promise("A, N and B are copies: to change them does not change the weight, with any landmarks and core.", of=("init", "landmark_blocks"))
def factors_are_copies(module):
    starts = (module.landmark_blocks, lambda W, **o: module.init(W, **o)[1:], lambda W, **o: module.init(W, core="pinv", **o)[1:])
    some = {"rows": torch.tensor([2, 0]), "cols": torch.tensor([1, 3])}
    for options in ({"rank": 2}, {"rank": 2, **some}, {"rank": 2, "rows": torch.tensor([0, 1])}, {"rank": 4}):
        for start in starts:
            W0 = randn(4, 5)
            before = W0.clone()
            for factor in start(W0, **options):
                assert factor.untyped_storage().data_ptr() != W0.untyped_storage().data_ptr(), "a factor is a view of the weight"
                assert factor.is_contiguous()
                factor.add_(1)
            assert torch.equal(W0, before)


@promise("Without the correction the frozen weight is the given tensor itself.", of="init")
def weight_is_kept(module):
    W0 = randn(4, 5)
    assert module.init(W0, rank=2).W_base is W0
    assert module.init(W0, rank=2, residual=True).W_base is not W0


@promise("Without a generator SLoRA's start is drawn from torch's own, in the dtype of the weight.", of="init_slora")
def draws_from_the_global_generator(module):
    W0 = randn(5, 6)
    for core in ("kaiming", "gaussian"):
        for name in ("A", "N"):
            assert follows_the_global_generator(lambda core=core, name=name: getattr(module.init_slora(W0, rank=3, core=core), name))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert {factor.dtype for factor in module.init_slora(W0.to(dtype), rank=2)} == {dtype}


@promise(
    "In half precision inverses, corrections and fits are made in float32 and rounded once.",
    of=("init", "base_weight", "fit_core", "nystrom_approx", "nystrom_from_svd"),
)
def half_precision(module):
    for dtype in (torch.float16, torch.bfloat16):
        W0 = randn(6, 7).to(dtype)
        A, N, B = module.landmark_blocks(W0, rank=2)
        wide = module.init(W0.float(), rank=2, core="pinv")
        assert torch.equal(module.init(W0, rank=2, core="pinv").N, wide.N.to(dtype))
        assert torch.equal(module.base_weight(W0, A, N, B, 1.5), module.base_weight(*(t.float() for t in (W0, A, N, B)), 1.5).to(dtype))
        assert torch.equal(module.fit_core(W0, A, B, 1.5), module.fit_core(W0.float(), A.float(), B.float(), 1.5).to(dtype))
        for function in (module.nystrom_approx, module.nystrom_from_svd):
            assert torch.equal(function(W0, rank=2), function(W0.float(), rank=2).to(dtype))


@promise("A mask without a probability drops entries and divides by nothing.", of="forward")
def probability_is_zero_by_default(module):
    x, W, A, N, B = (randn(*shape) for shape in ((7, 3), (4, 3), (2, 3), (2, 2), (4, 2)))
    mask = torch.rand(7, 3) < 0.5
    assert torch.allclose(module.forward(x, W, A, N, B, 2.0, mask=mask), x @ W.T + 2.0 * (x * mask) @ A.T @ N.T @ B.T)


# The layer


def _layer(module, **options):
    return module.SLoRALinear(_linear(randn(4, 5), randn(4)), **{"rank": 2, "alpha": 3.0, **options})


def _update(layer):
    return layer.scaling * layer.B @ layer.N @ layer.A


@promise("The layer is the frozen one plus s B N A, s = alpha / rank.", of="SLoRALinear")
def layer_computes(module):
    for method in ("nlora", "slora", "inttune"):
        layer, x = _layer(module, method=method), randn(3, 5)
        nn.init.normal_(layer.B)
        assert layer.scaling == 1.5
        assert torch.allclose(layer(x), layer.base(x) + 1.5 * x @ layer.A.T @ layer.N.T @ layer.B.T)


@promise(
    "Unless told otherwise the layer starts as published: blocks of the weight, no correction; SLoRA with a uniform N.", of="SLoRALinear"
)
def layer_starts_as_published(module):
    W0 = randn(4, 5)
    for method in ("nlora", "inttune"):
        layer = module.SLoRALinear(_linear(W0), rank=2, alpha=3.0, method=method)
        for got, want in zip((layer.base.weight, layer.A, layer.N, layer.B), (W0, W0[:2], W0[:2, :2], W0[:, :2]), strict=True):
            assert torch.equal(got, want)
    assert torch.equal(module.SLoRALinear(_linear(W0), rank=2, alpha=3.0).N, W0[:2, :2])
    options = {"rank": 4, "generator": torch.Generator().manual_seed(1)}
    A, N, B = module.init_slora(W0, **options)
    options["generator"].manual_seed(1)
    layer = module.SLoRALinear(_linear(W0), alpha=3.0, method="slora", **options)
    assert torch.equal(layer.A, A)
    assert torch.equal(layer.N, N)
    assert torch.equal(layer.B, B)


@promise("With the correction the layer starts at what it wraps, with any core, landmarks and alpha.", of="SLoRALinear")
def layer_with_correction(module):
    W0, x, rows, cols = randn(4, 5), randn(3, 5), torch.tensor([3, 1]), torch.tensor([4, 0])
    for core in ("block", "pinv"):
        layer = module.SLoRALinear(_linear(W0), rank=2, alpha=3.0, core=core, residual=True, rows=rows, cols=cols, rcond=0.0)
        assert torch.allclose(layer(x), x @ W0.T)
        assert torch.equal(layer.A, W0[rows])
        assert torch.equal(layer.B, W0[:, cols])
    assert torch.allclose(layer.N @ W0[rows][:, cols], torch.eye(2, dtype=W0.dtype))
    W0[1, :2] = W0[0, :2]
    assert torch.linalg.matrix_rank(module.SLoRALinear(_linear(W0), rank=2, alpha=2.0, core="pinv", rcond=1e-9).N) == 1


@promise("All three factors of the layer are trained, by IntTune the middle one alone, whatever was trained before.", of="SLoRALinear")
def what_is_trained(module):
    for method, names in (("nlora", "ANB"), ("slora", "ANB"), ("inttune", "N")):
        layer = _layer(module, method=method)
        assert [name for name, p in layer.named_parameters() if p.requires_grad] == list(names)
        assert set(layer.state_dict()) == {"A", "N", "B", "base.weight", "base.bias"}
        assert all(p.is_leaf for p in layer.parameters())


@promise("A training step changes what is trained and nothing else: the factors are no views of the base weight.", of="SLoRALinear")
def training_leaves_the_base(module):
    for method in ("nlora", "inttune"):
        layer, x, target = _layer(module, method=method), randn(7, 5), randn(7, 4)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        nn.functional.mse_loss(layer(x), target).backward()
        torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1).step()
        changed = {name for name, tensor in layer.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == ({"N"} if method == "inttune" else {"A", "N", "B"})


@promise("Merging and unmerging, each as often as one likes, leave the layer's function as it is.", of="SLoRALinear")
def merging_keeps_the_function(module):
    layer = _layer(module).eval()
    check_merging(layer, _update(layer))


@promise("The layer refuses an unknown method or core, and a dropout outside of [0, 1).", of="SLoRALinear")
def layer_refuses(module):
    refuses(lambda: _layer(module, method="lora"), "method")
    refuses(lambda: _layer(module, method="slora", core="block"), "core")
    refuses(lambda: _layer(module, core="kaiming"), "core")
    for dropout in (-0.1, 1.0, 1.5):
        refuses(lambda dropout=dropout: _layer(module, dropout=dropout), "dropout")
    assert _layer(module, dropout=0.0).dropout == 0.0
    assert _layer(module).dropout == 0.0


@promise("In training each entry of the adapter's input is dropped with probability p, and the rest divided by 1 - p.", of="SLoRALinear")
def layer_drops_in_training(module):
    layer = module.SLoRALinear(_linear(randn(4, 3)), rank=2, alpha=3.0, dropout=0.25)
    check_dropout(layer, _update(layer))


@promise("Outside training, or with dropout 0, the layer drops nothing and draws nothing.", of="SLoRALinear")
def layer_draws_nothing_otherwise(module):
    for layer in (_layer(module, dropout=0.5).eval(), _layer(module, dropout=0.0).train()):
        check_no_dropout(layer, _update(layer))


@promise("Float32 factors beside a bfloat16 weight are used in bfloat16, and trained and merged in float32.", of="SLoRALinear")
def factors_may_be_more_precise(module):
    layer = module.SLoRALinear(_linear(randn(4, 3).bfloat16()), rank=2, alpha=3.0)
    check_precise_factors(layer, "ANB", _update)
