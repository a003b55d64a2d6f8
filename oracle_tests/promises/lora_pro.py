"""What `reference/lora_pro.py` promises beside the laws of LoRA-Pro: its optimizer, its errors, its defaults."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loracle.oracle_tests.promises import promise, refuses

NAN, INF = float("nan"), float("inf")


def optimizer_functions(module):
    """The steps of LoRA-Pro's contract, made by the optimizer `LoRAProAdamW` on a layer."""

    def run(mode, W0, A, B, scaling, grad_A, grad_B, moments, t, options):
        X = options.pop("X", "sylvester")
        layer = _layer_of(W0, A, B, scaling)
        optimizer = module.LoRAProAdamW([layer], mode=mode, X="zero" if isinstance(X, Tensor) else X, **options)
        optimizer.X = X  # a matrix too, as the functions take one
        layer.A.grad, layer.B.grad = grad_A.clone(), grad_B.clone()
        if t > 1 or any(m.any() for m in moments.values()):
            optimizer.state[layer.A].update(moments, t=t - 1)
        optimizer.step()
        kept = optimizer.state[layer.A]
        assert kept["t"] == t
        return layer, [kept[name] for name in moments]

    def step(grad_A, grad_B, W0, A, B, scaling, moment1, moment2, *, t, **options):
        layer, moments = run("full", W0, A, B, scaling, grad_A, grad_B, {"moment1": moment1, "moment2": moment2}, t, options)
        return layer.base.weight, layer.A.detach(), layer.B.detach(), *moments

    def step_efficient(grad_A, grad_B, A, B, scaling, moment1_A, moment1_B, moment2_A, moment2_B, *, t, **options):
        moments = {"moment1_A": moment1_A, "moment1_B": moment1_B, "moment2_A": moment2_A, "moment2_B": moment2_B}
        W0 = torch.ones(len(B), A.shape[1], dtype=A.dtype)
        layer, moments = run("efficient", W0, A, B, scaling, grad_A, grad_B, moments, t, options)
        assert torch.equal(layer.base.weight, W0), "the efficient mode changed the frozen weight"
        return layer.A.detach(), layer.B.detach(), *moments

    return SimpleNamespace(
        init_state=module.init_state, init_state_efficient=module.init_state_efficient, step=step, step_efficient=step_efficient
    )


NAMESPACES = {"LoRAProAdamW": optimizer_functions}


def _layer_of(W0, A, B, scaling):
    factors = {"A": nn.Parameter(A.clone()), "B": nn.Parameter(B.clone())}
    return SimpleNamespace(base=SimpleNamespace(weight=W0.clone()), scaling=scaling, **factors)


def _layer(B=None, dtype=torch.float64):
    """A small layer with gradients."""
    W0, A = torch.randn(4, 5, dtype=dtype), torch.randn(2, 5, dtype=dtype)
    layer = _layer_of(W0, A, torch.randn(4, 2, dtype=dtype) if B is None else B, 1.5)
    layer.A.grad, layer.B.grad = torch.randn(2, 5, dtype=dtype), torch.randn(4, 2, dtype=dtype)
    return layer


def _weights(layer):
    return [layer.base.weight.clone(), layer.A.detach().clone(), layer.B.detach().clone()]


def _same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Defaults


@promise(
    "Without options the optimizer is AdamW's: lr 1e-3, 0.9, 0.999, 1e-8, no decay, full mode, Sylvester, no delta.", of="LoRAProAdamW"
)
def optimizer_by_default(module):
    layer, other = _layer(), _layer()
    explicit = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "adam_eps": 1e-8, "weight_decay": 0.0}
    default = module.LoRAProAdamW([layer])
    assert {k: default.param_groups[0][k] for k in explicit} == explicit
    assert (default.mode, default.X, default.delta) == ("full", "sylvester", 0.0)
    assert default.defaults == module.LoRAProAdamW([other], **explicit).defaults


@promise("Moments in use keep the dtype and device of the factors.", of=("init_state", "init_state_efficient"))
def moments_like_the_factors(module):
    A, B = torch.ones(2, 5, dtype=torch.bfloat16, device="meta"), torch.ones(4, 2, dtype=torch.bfloat16, device="meta")
    for state in (module.init_state(A, B), module.init_state_efficient(A, B)):
        assert {(m.dtype, m.device.type) for m in state} == {(torch.bfloat16, "meta")}


@promise("Without decay the step returns W0 itself, not a copy.", of="step")
def frozen_weight_is_not_copied(module):
    layer = _layer()
    W0, A, B = _weights(layer)
    state = module.init_state(A, B)
    assert module.step(layer.A.grad, layer.B.grad, W0, A, B, 1.5, *state, t=1, lr=0.1).W0 is W0


@promise(
    "Rounding that leaves an eigenvalue a little above zero is not inverted.", of=("optimal_gradients", "projected_gradient", "sylvester_X")
)
def rounding_is_not_inverted(module):
    # Rank one up to rounding: an inverse of what rounding leaves would be 1e12 and more
    A, B, G = torch.randn(2, 5), torch.randn(40, 1).expand(40, 2) / 3, torch.randn(40, 5)
    B = torch.cat([B[:, :1], B[:, 1:] * (1 + 1e-7)], dim=1)
    grad_A, grad_B = 1.5 * B.mT @ G, 1.5 * G @ A.mT
    assert module.optimal_gradients(grad_A, grad_B, A, B, 1.5).grad_A.norm() < 100 * G.norm()
    assert module.projected_gradient(G, A, B).norm() < 1.1 * G.norm()
    assert module.sylvester_X(grad_A, A, B, 1.5).norm() < 100 * G.norm()
    # Two directions that differ by a hundredth are two directions
    B = torch.cat([B[:, :1], B[:, :1] + 0.01 * torch.randn(40, 1)], dim=1)
    assert torch.linalg.matrix_rank(module.projected_gradient(torch.randn(40, 5), torch.zeros(2, 5), B), rtol=1e-4) == 2


@promise(
    "A direction counts if its share of the Gram matrix is above ten times the rank times eps of the largest.", of="projected_gradient"
)
def cutoff_of_the_pseudo_inverse(module):
    G = torch.randn(3, 4, dtype=torch.float64)
    for scale in (1.0, 2.0):
        for share, seen in ((19.0, 1), (21.0, 2)):
            B = scale * torch.tensor([[1.0, 0.0], [0.0, math.sqrt(share * 2.0**-52)], [0.0, 0.0]], dtype=torch.float64)
            got = module.projected_gradient(G, torch.zeros(2, 4, dtype=torch.float64), B)
            assert torch.allclose(got[:seen], G[:seen])
            assert not got[seen:].any()


@promise("Factors that are both zero have a zero pair, with every X.", of=("optimal_gradients", "sylvester_X"))
def both_factors_zero(module):
    A, B = torch.zeros(2, 4), torch.zeros(3, 2)
    for X in ("sylvester", "zero", "symmetry"):
        assert not any(grad.any() for grad in module.optimal_gradients(A, B, A, B, 2.0, X=X))
    assert not module.sylvester_X(A, A, B, 2.0).any()


# Memory and calls


class _Made(TorchDispatchMode):
    """Remembers the entries of the largest tensor that an operation made, what was decomposed, and how many roots were taken."""

    def __init__(self):
        super().__init__()
        self.entries, self.decomposed, self.roots = 0, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.roots += "sqrt" in str(func)
        if "eigh" in str(func):
            self.decomposed.append(args[0])
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


def _most(call):
    """The entries of the largest tensor that a call made."""
    with _Made() as made:
        call()
    return made.entries


@promise(
    "No step makes an (out, out) or (in, in) matrix, nor does a pair a matrix of the weight's size.",
    of=("_adjusted", "_symmetric", "_sylvester", "optimal_gradients", "projected_gradient", "sgd_step", "step", "step_efficient"),
)
def no_square_of_a_side(module):
    for out, in_ in ((60, 3), (3, 60)):
        W0, A, B, grad_A, grad_B = (torch.randn(shape) for shape in ((out, in_), (2, in_), (out, 2), (2, in_), (out, 2)))
        given, state, own = (grad_A, grad_B, A, B, 1.5), module.init_state(A, B), module.init_state_efficient(A, B)
        assert 0 < _most(partial(module.projected_gradient, W0, A, B)) <= 3 * 60
        for X in ("sylvester", "zero", "symmetry"):
            # [B, grad_B] and [grad_A; A] of the equivalent gradient are (out, 2 rank) and (2 rank, in)
            assert 0 < _most(partial(module.step, grad_A, grad_B, W0, A, B, 1.5, *state, t=1, lr=0.1, X=X)) <= 4 * 60
            assert 0 < _most(partial(module.step_efficient, *given, *own, t=1, lr=0.1, X=X)) <= 2 * 60
            assert 0 < _most(partial(module.sgd_step, *given, lr=0.1, X=X)) <= 2 * 60


def _random_layer(out, in_, rank, dtype=torch.float64):
    """A layer of these sizes, with gradients."""
    A, B = torch.randn(rank, in_, dtype=dtype), torch.randn(out, rank, dtype=dtype)
    layer = _layer_of(torch.randn(out, in_, dtype=dtype), A, B, 1.5)
    layer.A.grad, layer.B.grad = torch.randn(rank, in_, dtype=dtype), torch.randn(out, rank, dtype=dtype)
    return layer


@promise(
    "The Gram matrices of all layers that move are decomposed together, large layers' too: one call for each rank and precision.",
    of=("LoRAProAdamW", "_decomposed"),
)
def all_decomposed_together(module):
    for mode in ("full", "efficient"):
        layers = [_random_layer(*sizes) for sizes in ((4, 5, 2), (4, 5, 2), (3, 7, 2), (1100, 1000, 2), (4, 5, 3), (6, 5, 3))]
        layers += [_random_layer(4, 5, 2, torch.float32), *(_random_layer(4, 5, 2) for _ in range(2))]
        layers[-1].A.grad = layers[-2].B.grad = None
        wanted = {(torch.float64, 2): [], (torch.float64, 3): [], (torch.float32, 2): []}
        for layer in layers[:-2]:
            A, B = layer.A.detach(), layer.B.detach()
            wanted[A.dtype, len(A)] += [B.mT @ B, A @ A.mT]
        optimizer = module.LoRAProAdamW(layers, mode=mode)
        with _Made() as made:
            optimizer.step()
        assert len(made.decomposed) == 3, [given.shape for given in made.decomposed]
        for given in made.decomposed:
            torch.testing.assert_close(given.flatten(0, -3), torch.stack(wanted[given.dtype, given.shape[-1]]))


@promise("Small layers of equal shape are stepped together, large ones one by one: their moments are not copied.", of="LoRAProAdamW")
def small_layers_in_one_call(module):
    for mode, roots in (("full", 1), ("efficient", 2)):
        optimizer = module.LoRAProAdamW([_layer() for _ in range(3)], mode=mode)
        with _Made() as made:
            optimizer.step()
        assert made.roots == roots
    large = module.LoRAProAdamW([_random_layer(1100, 1000, 2, torch.float32) for _ in range(3)])
    assert _most(large.step) == 1100 * 1000


@promise(
    "A step of the optimizer reads no value itself: a GPU is waited for only where torch checks a decomposition, once for each rank.",
    of="LoRAProAdamW",
)
def no_value_is_read(module):
    for mode in ("full", "efficient"):
        layers = [_random_layer(*sizes) for sizes in ((4, 5, 2), (4, 5, 2), (3, 7, 2), (4, 5, 3))]
        optimizer = module.LoRAProAdamW(layers, mode=mode, weight_decay=0.1)
        for layer, group in zip(layers, optimizer.param_groups, strict=True):
            layer.base.weight = layer.base.weight.to("meta")
            # On this device a tensor has no values
            layer.A, layer.B = group["params"] = [nn.Parameter(factor.to("meta")) for factor in (layer.A, layer.B)]
            layer.A.grad, layer.B.grad = torch.empty_like(layer.A), torch.empty_like(layer.B)
        optimizer.step()
        assert all(optimizer.state[layer.A]["t"] == 1 for layer in layers)


# Errors


@promise("An unknown name of X is refused.", of=("optimal_gradients", "sgd_step", "step", "step_efficient", "CHOICES", "LoRAProAdamW"))
def unknown_X(module):
    layer = _layer()
    W0, A, B = _weights(layer)
    grads = (layer.A.grad, layer.B.grad)
    for X in ("nonsense", "", "Zero"):
        refuses(lambda X=X: module.optimal_gradients(*grads, A, B, 1.5, X=X), "X")
        refuses(lambda X=X: module.sgd_step(*grads, A, B, 1.5, lr=0.1, X=X), "X")
        refuses(lambda X=X: module.step(*grads, W0, A, B, 1.5, *module.init_state(A, B), t=1, lr=0.1, X=X), "X")
        refuses(lambda X=X: module.step_efficient(*grads, A, B, 1.5, *module.init_state_efficient(A, B), t=1, lr=0.1, X=X), "X")
        refuses(lambda X=X: module.LoRAProAdamW([layer], X=X), "X")


@promise("The optimizer refuses a mode that there is not, and numbers out of their range.", of="LoRAProAdamW")
def unusable_options(module):
    layer = _layer()
    refuses(lambda: module.LoRAProAdamW([layer], mode="fast"), "mode")
    for name, values in {"lr": (-1e-3, NAN, INF), "beta1": (-0.1, 1.0), "beta2": (-0.1, 1.0), "adam_eps": (-1e-8, NAN)}.items():
        for value in values:
            refuses(lambda name=name, value=value: module.LoRAProAdamW([layer], **{name: value}), name)
    for name in ("weight_decay", "delta"):
        refuses(lambda name=name: module.LoRAProAdamW([layer], **{name: -0.1}), name)
    for mode in ("full", "efficient"):
        fine = module.LoRAProAdamW([layer], mode=mode, lr=0.0, beta1=0.0, beta2=0.0, adam_eps=0.0, weight_decay=2.0, delta=2.0)
        assert fine.mode == mode


@promise("The optimizer refuses factors that are not finite or of lower rank, but for B = 0, where training starts.", of="LoRAProAdamW")
def unusable_factors(module):
    for name in ("A", "B"):
        layer = _layer()
        with torch.no_grad():
            getattr(layer, name)[1, 1] = NAN
        refuses(lambda layer=layer: module.LoRAProAdamW([layer]), name)
        for dtype in (torch.float64, torch.bfloat16):
            layer = _layer(dtype=dtype)
            with torch.no_grad():
                factor = layer.A if name == "A" else layer.B.mT
                factor[1] = 2 * factor[0]
            refuses(lambda layer=layer: module.LoRAProAdamW([layer]), name)
            refuses(lambda layer=layer: module.LoRAProAdamW([layer]), "has rank 1; needed 2")
    zero = _layer()
    with torch.no_grad():
        zero.A.zero_()
    refuses(lambda: module.LoRAProAdamW([_layer(), zero]), "A")
    module.LoRAProAdamW([_layer(torch.zeros(4, 2, dtype=torch.float64))])


@promise("W0 and moments that agree with each other, but not with the factors, are refused.", of=("step", "step_efficient"))
def sizes_of_the_state(module):
    layer = _layer()
    _, A, B = _weights(layer)
    given = {"grad_A": layer.A.grad, "grad_B": layer.B.grad, "A": A, "B": B, "scaling": 1.5, "t": 1, "lr": 0.1}
    for wrong in (torch.randn(4, 6, dtype=A.dtype), torch.randn(5, 5, dtype=A.dtype)):
        refuses(module.step, "W0", W0=wrong, moment1=wrong, moment2=wrong, **given)
    for name in ("A", "B"):
        moments = module.init_state_efficient(A, B)._asdict()
        for number in (1, 2):
            moments[f"moment{number}_{name}"] = torch.zeros(5, 5, dtype=A.dtype)
        refuses(module.step_efficient, f"moment1_{name}", **given, **moments)


@promise("Gram matrices that are known already are refused if they are of another size or number.", of=("step", "step_efficient", "_grams"))
def sizes_of_the_grams(module):
    layer = _layer()
    W0, A, B = _weights(layer)
    given = {"grad_A": layer.A.grad, "grad_B": layer.B.grad, "A": A, "B": B, "scaling": 1.5, "t": 1, "lr": 0.1}
    ways = (
        partial(module.step, **given, W0=W0, **module.init_state(A, B)._asdict()),
        partial(module.step_efficient, **given, **module.init_state_efficient(A, B)._asdict()),
    )
    for way in ways:
        for values, vectors, name in (((2, 3), (2, 3, 3), "values"), ((2, 2), (2, 2, 1), "vectors"), ((3, 2), (2, 2, 2), "vectors")):
            refuses(way, name, grams=(torch.ones(values, dtype=A.dtype), torch.ones(vectors, dtype=A.dtype)))
        refuses(way, "", grams=(torch.ones(3, 2, dtype=A.dtype), torch.ones(3, 2, 2, dtype=A.dtype)))


@promise(
    "In half precision everything is computed in float32 and rounded once.", of=("step", "step_efficient", "optimal_gradients", "sgd_step")
)
def half_precision_is_rounded_once(module):
    layer = _layer(dtype=torch.bfloat16)
    W0, A, B = _weights(layer)
    grads, numbers = {"grad_A": layer.A.grad, "grad_B": layer.B.grad}, {"scaling": 1.5}
    moments = {"moment1": torch.randn(4, 5).bfloat16(), "moment2": torch.rand(4, 5).bfloat16()}
    more = {"t": 3, "lr": 0.1, "weight_decay": 0.5, "beta1": 0.7, "beta2": 0.7}
    efficient = {f"{name}_{f}": torch.rand(w.shape).bfloat16() for name in moments for f, w in (("A", A), ("B", B))}
    for function, tensors, options in (
        (module.step, {"W0": W0, **moments}, more),
        (module.step_efficient, efficient, more),
        (module.optimal_gradients, {}, {}),
    ):
        given = {**grads, "A": A, "B": B, **tensors}
        got = function(**given, **numbers, **options)
        precise = function(**{name: value.float() for name, value in given.items()}, **numbers, **options)
        # W0 is only shrunk, by one number, in its own precision
        for name, one, other in zip(got._fields, got, precise, strict=True):
            assert name == "W0" or torch.equal(one, other.bfloat16()), name


# The optimizer


def _first_move(A, B, grad_A, grad_B, s, mode):
    """Adam's first directions of both factors, in NumPy: by pseudo-inverses, and the Sylvester equation as one linear system."""

    def pair(grad_A, grad_B):
        left, right, one = np.linalg.pinv(B.T @ B), np.linalg.pinv(A @ A.T), np.eye(len(A))
        best_A, best_B = left @ grad_A / s**2, (grad_B - B @ left @ B.T @ grad_B) @ right / s**2
        X = np.linalg.solve(np.kron(B.T @ B, one) + np.kron(one, A @ A.T), -(best_A @ A.T).ravel()).reshape(len(A), len(A))
        return best_A + X @ A, best_B - B @ X, s * (B @ best_A + best_B @ A)

    *factors, g = pair(grad_A, grad_B)
    if mode == "efficient":
        return [np.sign(grad) for grad in factors]
    return pair(s * B.T @ np.sign(g), s * np.sign(g) @ A.T)[:2]


@promise("Factors in half precision move as in double precision, rounded once.", of=("LoRAProAdamW", "_decomposed"))
def half_precision_in_the_optimizer(module):
    for mode in ("full", "efficient"):
        layers = [_layer(dtype=torch.bfloat16) for _ in range(2)]
        wanted = []
        for layer in layers:
            *factors, grad_A, grad_B = (w.detach().double().numpy() for w in (layer.A, layer.B, layer.A.grad, layer.B.grad))
            moves = _first_move(*factors, grad_A, grad_B, 1.5, mode)
            wanted.append([torch.tensor(factor - 0.1 * move).bfloat16() for factor, move in zip(factors, moves, strict=True)])
        module.LoRAProAdamW(layers, lr=0.1, mode=mode).step()
        for layer, moved in zip(layers, wanted, strict=True):
            torch.testing.assert_close([layer.A.detach(), layer.B.detach()], moved)


@promise("The layers may come from a generator, and a group added without its layer is an error.", of="LoRAProAdamW")
def layers_from_a_generator(module):
    layers = [_layer(), _layer()]
    before = [_weights(layer)[2] for layer in layers]
    optimizer = module.LoRAProAdamW(layer for layer in layers)
    optimizer.step()
    optimizer.step()
    assert not any(torch.equal(layer.B, old) for layer, old in zip(layers, before, strict=True))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    try:
        optimizer.step()
    except ValueError:
        return
    raise AssertionError("steps a group that has no layer")


@promise("The optimizer calls the closure with gradients on, before it steps, and returns its value.", of="LoRAProAdamW")
def closure_is_called(module):
    layer, calls = _layer(), []

    def closure():
        calls.append((torch.is_grad_enabled(), layer.A.detach().clone()))
        return 3.5

    before = layer.A.detach().clone()
    optimizer = module.LoRAProAdamW([layer])
    assert optimizer.step(closure) == 3.5
    assert len(calls) == 1
    assert calls[0][0]
    assert torch.equal(calls[0][1], before)
    assert optimizer.step() is None
    assert not torch.equal(layer.A, before)


@promise("Layers that are alike move as each would by itself.", of="LoRAProAdamW")
def layers_together(module):
    for mode in ("full", "efficient"):
        layers = [_layer() for _ in range(5)]
        layers[3].scaling = 0.5
        layers.append(_layer_of(torch.randn(4, 3), torch.randn(2, 3), torch.randn(4, 2), 1.5))
        layers[5].A.grad, layers[5].B.grad = torch.randn(2, 3), torch.randn(4, 2)
        layers.append(_layer(dtype=torch.float32))
        alone = copy.deepcopy(layers)
        for mine, theirs in zip(layers, alone, strict=True):
            theirs.A.grad, theirs.B.grad = mine.A.grad.clone(), mine.B.grad.clone()
        options = {"lr": 0.1, "weight_decay": 0.1, "mode": mode, "delta": 0.1}
        optimizers = [module.LoRAProAdamW(layers, **options), *(module.LoRAProAdamW([layer], **options) for layer in alone)]
        optimizers[0].param_groups[1]["lr"] = optimizers[2].param_groups[0]["lr"] = 0.3
        for _ in range(2):
            for optimizer in optimizers:
                optimizer.step()
        for mine, theirs in zip(layers, alone, strict=True):
            for a, b in zip(_weights(mine), _weights(theirs), strict=True):
                torch.testing.assert_close(a, b)


@promise("A layer of which a factor has no gradient stays as it is, and its steps are not counted.", of="LoRAProAdamW")
def layers_without_gradient(module):
    for missing in ("A", "B"):
        still, moving = _layer(), _layer()
        getattr(still, missing).grad = None
        before, other = _weights(still), _weights(moving)
        optimizer = module.LoRAProAdamW([still, moving], weight_decay=0.1)
        optimizer.step()
        assert _same(_weights(still), before)
        assert not any(torch.equal(a, b) for a, b in zip(_weights(moving), other, strict=True))
        assert "t" not in optimizer.state[still.A]


@promise("Each layer is a group: a scheduler may change its learning rate and decay.", of="LoRAProAdamW")
def groups_have_their_own_options(module):
    layers = [_layer(), _layer()]
    before = [_weights(layer) for layer in layers]
    optimizer = module.LoRAProAdamW(layers, lr=0.0, weight_decay=0.0)
    optimizer.param_groups[1]["lr"] = 0.1
    optimizer.step()
    assert _same(_weights(layers[0]), before[0])
    assert not torch.equal(layers[1].B, before[1][2])
    assert math.isclose(layers[1].base.weight.norm(), before[1][0].norm())


@promise("A training that is saved and loaded goes on as if it had not been.", of="LoRAProAdamW")
def state_is_saved(module):
    for mode in ("full", "efficient"):
        layer = _layer()
        optimizer = module.LoRAProAdamW([layer], lr=0.1, mode=mode, weight_decay=0.1)
        optimizer.step()
        twin = _layer_of(layer.base.weight, layer.A.detach(), layer.B.detach(), 1.5)
        twin.A.grad, twin.B.grad = layer.A.grad.clone(), layer.B.grad.clone()
        other = module.LoRAProAdamW([twin], mode=mode)
        other.load_state_dict(optimizer.state_dict())
        for each in (optimizer, other):
            each.step()
        assert _same(_weights(twin), _weights(layer))


@promise("A frozen weight in another precision than the factors is decayed in its own.", of="LoRAProAdamW")
def frozen_weight_in_another_precision(module):
    layer = _layer()
    layer.base.weight = layer.base.weight.bfloat16()
    before = layer.base.weight.clone()
    module.LoRAProAdamW([layer], lr=0.5, weight_decay=0.5).step()
    assert layer.base.weight.dtype == torch.bfloat16
    assert torch.equal(layer.base.weight, (0.75 * before.double()).bfloat16())
