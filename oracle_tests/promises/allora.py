"""What `reference/allora.py` promises beside the laws of ALLoRA: its layer, its errors, its memory, its defaults."""

import math
from types import SimpleNamespace

import torch
from torch import nn

from loracle.oracle_tests.promises import follows_the_global_generator, promise, refuses
from loracle.oracle_tests.promises.layers import Largest, check_merging, check_precise_factors, randn

# The set-up functions that read values, and of which arguments
FINITE = {"init": ("W0",), "merge": ("W0", "A", "B"), "unmerge": ("W", "A", "B")}
NAN, INF = math.nan, math.inf


def _linear(W0, bias=None):
    with torch.random.fork_rng(devices=[]):  # nn.Linear draws from the global generator
        linear = nn.Linear(W0.shape[1], W0.shape[0], bias=bias is not None, dtype=W0.dtype)
    linear.weight.data.copy_(W0)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear


def layer_functions(module):
    """The contract of ALLoRA by the forward, merge and autograd of the layer `ALLoRALinear`."""

    def build(W0, A, B, eta=2.0, kind="row", bias=None):
        with torch.random.fork_rng(devices=[]):
            layer = module.ALLoRALinear(_linear(W0, bias), rank=len(A), eta=eta, kind=kind)
        layer.A.data.copy_(A)
        layer.B.data.copy_(B)
        return layer

    def forward(x, W0, A, B, *, bias=None):
        return build(W0, A, B, bias=bias)(x).detach()

    def merged(W, A, B, method):
        layer = build(W, A, B)
        layer.merged = method == "unmerge"
        getattr(layer, method)()
        return layer.base.weight.detach()

    def backward(grad_y, x, W0, A, B, eta, *, kind="row"):
        layer, leaf = build(W0, A, B, eta, kind), x.clone().requires_grad_()
        return torch.autograd.grad(layer(leaf), [leaf, layer.A, layer.B], grad_y)

    def gradients(G, A, B, eta, *, kind="row"):
        layer = build(torch.zeros_like(G), A, B, eta, kind)
        return torch.autograd.grad(layer(torch.eye(G.shape[1], dtype=G.dtype)), [layer.A, layer.B], G.mT)

    def init(W0, *, rank, generator=None):
        layer = module.ALLoRALinear(_linear(W0), rank=rank, generator=generator)
        return layer.A.detach(), layer.B.detach()

    def num_trainable(W0, *, rank):
        layer = module.ALLoRALinear(_linear(W0), rank=rank, generator=torch.Generator().manual_seed(0))
        return sum(p.numel() for p in layer.parameters() if p.requires_grad)

    return SimpleNamespace(
        init=init,
        forward=forward,
        backward=backward,
        gradients=gradients,
        num_trainable=num_trainable,
        merge=lambda W0, A, B: merged(W0, A, B, "merge"),
        unmerge=lambda W, A, B: merged(W, A, B, "unmerge"),
    )


NAMESPACES = {"ALLoRALinear": layer_functions}


def _layer(module, **options):
    """A small layer whose B is not zero."""
    layer = module.ALLoRALinear(nn.Linear(5, 4, dtype=torch.float64), rank=2, **options)
    nn.init.normal_(layer.B)
    return layer


# Errors


@promise(
    "An eta that is not positive and finite is refused wherever it is taken.",
    of=("row_scale", "gradients", "backward", "sgd_step", "step", "ALLoRALinear"),
)
def eta_is_positive(module):
    G, A, B, x, y = randn(4, 5), randn(2, 5), randn(4, 2), randn(3, 5), randn(3, 4)
    state = module.init_state(A, B)
    for bad in (0.0, -2.0, NAN, INF):
        for kind in module.KINDS:
            refuses(module.backward, "eta", y, x, G, A, B, bad, kind=kind)
            refuses(module.ALLoRALinear, "eta", nn.Linear(5, 4), rank=2, eta=bad, kind=kind)
            if kind != "output":
                refuses(module.gradients, "eta", G, A, B, bad, kind=kind)
                refuses(module.sgd_step, "eta", G, A, B, bad, lr=0.1, kind=kind)
                refuses(module.step, "eta", G, A, B, *state, bad, t=1, lr=0.1, kind=kind)
        refuses(module.row_scale, "eta", A, B, bad)
    assert module.ALLoRALinear(nn.Linear(5, 4), rank=2, eta=1e-3).eta == 1e-3


@promise(
    "An unknown kind is refused; `output`, which needs single samples, also by what sees G alone.",
    of=("gradients", "backward", "sgd_step", "step", "ALLoRALinear", "KINDS", "OF_WEIGHTS"),
)
def kind_is_known(module):
    assert set(module.KINDS) == {"row", "matrix", "element", "output", "none"}
    assert set(module.OF_WEIGHTS) == set(module.KINDS) - {"output"}
    G, A, B, x, y = randn(4, 5), randn(2, 5), randn(4, 2), randn(3, 5), randn(3, 4)
    state = module.init_state(A, B)
    for bad in ("rows", "", "Row", "output"):
        refuses(module.gradients, "kind", G, A, B, 2.0, kind=bad)
        refuses(module.sgd_step, "kind", G, A, B, 2.0, lr=0.1, kind=bad)
        refuses(module.step, "kind", G, A, B, *state, 2.0, t=1, lr=0.1, kind=bad)
        if bad != "output":
            refuses(module.backward, "kind", y, x, G, A, B, 2.0, kind=bad)
            refuses(module.ALLoRALinear, "kind", nn.Linear(5, 4), rank=2, kind=bad)


@promise("The rank goes from 1 to the smaller side.", of=("init", "num_trainable", "ALLoRALinear"))
def rank_is_in_range(module):
    for W0 in (randn(4, 5), randn(5, 4)):
        for bad in (0, -1, 5, 2.0, True):
            refuses(module.init, "rank", W0, rank=bad)
            refuses(module.num_trainable, "rank", W0, rank=bad)
            refuses(module.ALLoRALinear, "rank", _linear(W0), rank=bad)
        assert module.init(W0, rank=4).A.shape == (4, W0.shape[1])
        assert module.num_trainable(W0, rank=4) == 36


@promise("Factors whose ranks or sides do not fit are refused.", of=("row_norms", "row_scale", "gradients", "backward", "forward"))
def factors_fit(module):
    G, x, y = randn(4, 5), randn(3, 5), randn(3, 4)
    refuses(module.row_norms, "B", randn(2, 5), randn(4, 3))
    refuses(module.row_scale, "B", randn(2, 5), randn(4, 3), 2.0)
    for A, B, name in ((randn(2, 4), randn(4, 2), "A"), (randn(2, 5), randn(5, 2), "B"), (randn(2, 5), randn(4, 3), "B")):
        refuses(module.gradients, name, G, A, B, 2.0)
        refuses(module.backward, name, y, x, G, A, B, 2.0)
        refuses(module.forward, name, x, G, A, B)


@promise("Moments whose shapes do not fit the factors are refused.", of="step")
def moments_fit(module):
    G, A, B = randn(4, 5), randn(2, 5), randn(4, 2)
    for name in module.State._fields:
        state = module.init_state(A, B)._replace(**{name: randn(3, 3)})
        refuses(module.step, name, G, A, B, *state, 2.0, t=1, lr=0.1)
    for factor in ("A", "B"):
        both = {f"moment{i}_{factor}": torch.zeros(3, 3, dtype=G.dtype) for i in (1, 2)}
        refuses(module.step, f"moment1_{factor}", G, A, B, *module.init_state(A, B)._replace(**both), 2.0, t=1, lr=0.1)


@promise("The escape takes times from zero on, a positive finite growth and a positive eta, which may be infinite.", of="escape")
def escape_refuses(module):
    time = torch.tensor([0.0, 1.0])
    for bad in (0.0, -1.0, NAN, INF):
        refuses(module.escape, "growth", time, bad, 2.0)
    for bad in (0.0, -1.0, NAN):
        refuses(module.escape, "eta", time, 1.0, bad)
    for bad in (-1e-3, NAN, INF):
        refuses(module.escape, "time", torch.tensor([1.0, bad]), 1.0, 2.0)
    assert module.escape(time, 1.0, INF).isfinite().all()
    assert module.escape(time, 1e-3, 1e-3)[0] == 0


@promise("The penalty takes a probability from 0 to below 1.", of="dropout_penalty")
def probability(module):
    x, A, B = randn(3, 5), randn(2, 5), randn(4, 2)
    for bad in (-0.1, 1.0, 1.5, NAN):
        refuses(module.dropout_penalty, "p", x, A, B, 2.0, p=bad)
    assert not module.dropout_penalty(x, A, B, 2.0, p=0.0).any()


# Draws, memory and precision


@promise("Without a generator the start is drawn from torch's own.", of=("init", "ALLoRALinear"))
def start_from_the_global_generator(module):
    for distribution in module.DISTRIBUTIONS:
        assert follows_the_global_generator(lambda d=distribution: module.init(torch.ones(5, 6), rank=2, distribution=d).A)
    assert follows_the_global_generator(lambda: module.ALLoRALinear(nn.Linear(5, 4), rank=2).A.detach())


@promise("The factors at the start have dtype and device of the weight.", of="init")
def start_like_the_weight(module):
    A, B = module.init(torch.ones(4, 5, dtype=torch.bfloat16), rank=2, distribution="gaussian")
    assert A.dtype == B.dtype == torch.bfloat16


@promise("Moments have the dtype and device of their factors.", of="init_state")
def moments_like_the_factors(module):
    state = module.init_state(torch.ones(2, 5, dtype=torch.bfloat16, device="meta"), torch.ones(4, 2, dtype=torch.bfloat16, device="meta"))
    assert {(m.dtype, m.device.type) for m in state} == {(torch.bfloat16, "meta")}
    assert [m.shape for m in state] == [(2, 5), (4, 2), (2, 5), (4, 2)]


@promise(
    "Neither the row norms nor the backward pass of a few samples make a matrix of the weight's size.",
    of=("row_norms", "row_scale", "backward", "_factor_gradients", "_per_row", "dropout_penalty", "_Adapter", "ALLoRALinear"),
)
def no_matrix_of_the_weight(module):
    out, in_, rank = 40, 50, 3
    W0, A, B = randn(out, in_), randn(rank, in_), randn(out, rank)
    x, grad_y = randn(2, in_), randn(2, out)
    layer = module.ALLoRALinear(_linear(W0), rank=rank)
    layer.B.data.copy_(B)

    def train():
        layer(x.clone().requires_grad_()).backward(grad_y)

    for call in (
        lambda: module.row_norms(A, B),
        lambda: module.row_scale(A, B, 2.0),
        lambda: module.dropout_penalty(x, A, B, 2.0, p=0.5),
        train,
        *(lambda kind=kind: module.backward(grad_y, x, W0, A, B, 2.0, kind=kind) for kind in ("row", "matrix", "output", "none")),
    ):
        with Largest() as largest:
            call()
        assert 0 < largest.entries <= rank * in_, f"a tensor of {largest.entries} entries was made for a weight of {W0.numel()}"


@promise(
    "In half precision sizes are computed in float32: the squares may be beyond it.",
    of=("row_norms", "row_scale", "dropout_penalty", "escape"),
)
def half_precision(module):
    for dtype in (torch.float16, torch.bfloat16):
        A, B = torch.full((2, 4), 60.0, dtype=dtype), torch.full((3, 2), 60.0, dtype=dtype)
        norms, d = module.row_norms(A, B), module.row_scale(A, B, 2.0)
        assert norms.dtype == d.dtype == dtype
        assert torch.equal(norms, torch.full((3,), 14400.0, dtype=torch.float32).to(dtype))
        assert torch.equal(d, torch.full((3,), (14400.25) ** -0.5, dtype=torch.float32).to(dtype))
        x = torch.full((1, 4), 300.0, dtype=dtype)
        assert torch.isfinite(module.dropout_penalty(x, A / 256, B / 256, 0.125, p=0.5)).all()
        time = torch.linspace(0.1, 3, 20).to(dtype)
        for eta in (2.0, INF):
            assert torch.equal(module.escape(time, 2.0, eta), module.escape(time.float(), 2.0, eta).to(dtype))


@promise(
    "In half precision the factors of every kind are those of float32, though eta^2 times a size be too large.",
    of=("gradients", "backward"),
)
def kinds_in_half_precision(module):
    A, B = torch.full((2, 4), 30.0, dtype=torch.float16), torch.full((3, 2), 30.0, dtype=torch.float16)
    G, x, y = torch.full((3, 4), 0.01), torch.full((1, 4), 0.5), torch.full((1, 3), 0.01)
    for kind in module.KINDS:
        if kind != "output":
            got, want = module.gradients(G.half(), A, B, 8.0, kind=kind), module.gradients(G, A.float(), B.float(), 8.0, kind=kind)
            assert all(torch.allclose(one.float(), other, rtol=1e-2) for one, other in zip(got, want, strict=True))
        given = (y, x, torch.zeros(3, 4), A, B)
        got = module.backward(*(t.half() for t in given), 8.0, kind=kind)
        want = module.backward(*(t.float() for t in given), 8.0, kind=kind)
        assert all(torch.allclose(one.float(), other, rtol=1e-2) for one, other in zip(got, want, strict=True))


@promise("In half precision a step of AdamW is computed in float32 and rounded once.", of="step")
def step_in_half_precision(module):
    G, A, B = randn(4, 5).bfloat16(), randn(2, 5).bfloat16(), randn(4, 2).bfloat16()
    state = [torch.rand_like(m) for m in module.init_state(A, B)]
    got = module.step(G, A, B, *state, 2.0, t=3, lr=0.1, beta1=0.7, beta2=0.7, weight_decay=0.5)
    assert {part.dtype for part in got} == {torch.bfloat16}
    grads = module.gradients(G, A, B, 2.0)
    for w, g, m, v, new in ((A, grads.grad_A, state[0], state[2], got.A), (B, grads.grad_B, state[1], state[3], got.B)):
        w, g, m, v = (t.float() for t in (w, g, m, v))
        m, v = 0.7 * m + (1 - 0.7) * g, 0.7 * v + (1 - 0.7) * g * g
        precise = (1 - 0.1 * 0.5) * w - 0.1 * (m / (1 - 0.7**3) / ((v / (1 - 0.7**3)).sqrt() + 1e-8))
        assert torch.equal(new, precise.bfloat16())


# The layer


@promise("By default eta is 2 and the kind is `row`; the layer keeps what it is told.", of="ALLoRALinear")
def layer_by_default(module):
    layer = module.ALLoRALinear(nn.Linear(5, 4), rank=2)
    assert (layer.eta, layer.kind, layer.merged) == (2.0, "row", False)
    layer = module.ALLoRALinear(nn.Linear(5, 4), rank=2, eta=8.0, kind="matrix")
    assert (layer.eta, layer.kind) == (8.0, "matrix")


@promise("The layer starts as the layer that it adapts, from the factors that the generator gives.", of="ALLoRALinear")
def layer_starts_where_it_was(module):
    first, second = (module.ALLoRALinear(nn.Linear(5, 4), rank=2, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first.A, second.A)
    x = torch.randn(3, 5)
    assert torch.equal(first(x), first.base(x))


@promise("Only the two factors of the layer are trained, whatever was trained before.", of="ALLoRALinear")
def only_factors_are_trained(module):
    assert [name for name, p in _layer(module).named_parameters() if p.requires_grad] == ["A", "B"]


@promise("The backward pass uses the factors and the eta of its own step: after a step the rows' factors are new ones.", of="ALLoRALinear")
def layer_computes_anew(module):
    layer, x, grad_y = _layer(module, eta=3.0), randn(7, 5), randn(7, 4)
    for eta in (3.0, 3.0, 0.5):
        layer.eta = eta
        before = [factor.detach().clone() for factor in (layer.A, layer.B)]
        want = module.backward(grad_y, x, layer.base.weight, *before, eta)
        layer.zero_grad()
        layer(x).backward(grad_y)
        assert torch.allclose(layer.A.grad, want.grad_A)
        assert torch.allclose(layer.B.grad, want.grad_B)
        torch.optim.SGD([layer.A, layer.B], lr=0.1).step()


@promise("Training goes the way of the pure step: five of them with torch's own optimizer.", of=("ALLoRALinear", "sgd_step", "step"))
def layer_trains(module):
    for make in (torch.optim.SGD, torch.optim.AdamW):
        layer, x, target = _layer(module, eta=3.0), randn(9, 5), randn(9, 4)
        A, B = layer.A.detach().clone(), layer.B.detach().clone()
        state = module.init_state(A, B)
        optimizer = make([layer.A, layer.B], lr=0.01, weight_decay=0.0)
        for t in range(1, 6):
            G = 2 * (x @ (layer.base.weight + B @ A).T + layer.base.bias - target).T @ x
            if make is torch.optim.SGD:
                A, B = module.sgd_step(G, A, B, 3.0, lr=0.01)
            else:
                A, B, *state = module.step(G, A, B, *state, 3.0, t=t, lr=0.01)
            optimizer.zero_grad()
            (layer(x) - target).square().sum().backward()
            optimizer.step()
            assert torch.allclose(layer.A, A)
            assert torch.allclose(layer.B, B)


@promise("Merging and unmerging, each as often as one likes, leave the layer's function as it is.", of="ALLoRALinear")
def merging_keeps_the_function(module):
    layer = _layer(module)
    check_merging(layer, layer.B @ layer.A)


@promise("Float32 factors beside a bfloat16 weight are used in bfloat16, and trained and merged in float32.", of="ALLoRALinear")
def factors_may_be_more_precise(module):
    layer = module.ALLoRALinear(nn.Linear(5, 4, dtype=torch.bfloat16), rank=2)
    check_precise_factors(layer, "AB", lambda layer: layer.B @ layer.A)


@promise("Layers stacked by vmap get the gradients that each gets alone.", of=("_Adapter", "ALLoRALinear"))
def layers_under_vmap(module):
    for kind in module.KINDS:
        layers = [_layer(module, eta=3.0, kind=kind) for _ in range(3)]
        params, _ = torch.func.stack_module_state(layers)
        x, grad_y = randn(3, 7, 5), randn(3, 7, 4)
        torch.vmap(lambda own, x: torch.func.functional_call(layers[0], own, (x,)))(params, x).backward(grad_y)  # noqa: B023
        for i, layer in enumerate(layers):
            want = module.backward(grad_y[i], x[i], layer.base.weight, layer.A.detach(), layer.B.detach(), 3.0, kind=kind)
            assert torch.allclose(params["A"].grad[i], want.grad_A)
            assert torch.allclose(params["B"].grad[i], want.grad_B)
