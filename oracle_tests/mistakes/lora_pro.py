"""Plausible mistakes in LoRA-Pro. The functions keep the reference's parameters; what is not named stands in `options`."""

import math

import numpy as np
import torch

from loracle.oracle_tests.contract import Shape
from loracle.oracle_tests.mistakes import Observables, mistake
from loracle.oracle_tests.strategies import Matrices
from loracle.reference import lora_pro as right
from loracle.reference.lora import Factors, Gradients, gradients


def _B(case):
    """Of full rank; in the last case the last column is the sum of the others, exactly in every precision."""
    matrices, m, r = Matrices(case.number + 31), case.out, case.rank
    if case.number < 7:
        return _B_of_full_rank(case)
    columns = np.rint(16 * matrices.with_spectrum(m, r - 1, np.linspace(2, 1, r - 1))) / 16
    return np.hstack([columns, columns.sum(axis=1, keepdims=True)])


def _B_of_full_rank(case):
    """For the steps of AdamW: with a delta as small as the official one a B of lower rank turns rounding into what is compared."""
    return case.rounded(Matrices(case.number + 31).with_spectrum(case.out, case.rank, np.linspace(2, 1, case.rank)))


def _factors(case):
    return case.value(Shape("A", "rank in", "Float")), case.value(Shape("B", "out rank", "Float"))


def _gradient(case):
    return Matrices(case.number + 1)(case.out, case.sizes["in"])


def _grad_A(case):
    return case.rounded(case.scaling * _factors(case)[1].T @ _gradient(case))


def _grad_A_of_full_rank(case):
    return case.rounded(case.scaling * _B_of_full_rank(case).T @ _gradient(case))


def _grad_B(case):
    return case.rounded(case.scaling * _gradient(case) @ _factors(case)[0].T)


def _squares(name, dims):
    """Positive numbers, as mean squares are."""

    def value(case):
        shape = [case.sizes[dim] for dim in dims.split()]
        return case.rounded(Matrices(case.number + sum(name.encode())).rng.uniform(0.25, 4, shape))

    return value


OBSERVABLES = Observables(
    choices={"X": ("zero", "symmetry")},
    values={
        "B": _B,
        "grad_A": _grad_A,
        **{f"{function}.B": _B_of_full_rank for function in ("step", "step_efficient")},
        **{f"{function}.grad_A": _grad_A_of_full_rank for function in ("step", "step_efficient")},
        "grad_B": _grad_B,
        "moment2": _squares("moment2", "out in"),
        "moment2_A": _squares("moment2_A", "rank in"),
        "moment2_B": _squares("moment2_B", "out rank"),
        "t": 3,
        "beta1": 0.75,
        "beta2": 0.875,
        "delta": 0.5,
    },
)


# The equivalent gradient


@mistake("The equivalent gradient lacks the scaling.", replaces="equivalent_gradient", breaks=("lora_pro.L1a", "lora_pro.L1b"))
def equivalent_without_scaling(grad_A, grad_B, A, B, scaling):
    return right.equivalent_gradient(grad_A, grad_B, A, B, 1.0)


@mistake("The equivalent gradient is scaled twice.", replaces="equivalent_gradient", breaks=("lora_pro.L1a", "lora_pro.L1b"))
def equivalent_scaled_twice(grad_A, grad_B, A, B, scaling):
    return right.equivalent_gradient(grad_A, grad_B, A, B, scaling**2)


@mistake("The equivalent gradient leaves out what A moves.", replaces="equivalent_gradient", breaks=("lora_pro.L1a", "lora_pro.L1b"))
def equivalent_of_B_alone(grad_A, grad_B, A, B, scaling):
    return scaling * grad_B @ A


@mistake(
    "The equivalent gradient is the product of the two moves.", replaces="equivalent_gradient", breaks=("lora_pro.L1a", "lora_pro.L1b")
)
def equivalent_is_the_product(grad_A, grad_B, A, B, scaling):
    return scaling * grad_B @ grad_A


# The optimal pair


@mistake(
    "The pair lacks the factor 1/s^2.",
    replaces="optimal_gradients",
    breaks=("lora_pro.L2", "lora_pro.L3b", "lora_pro.L5", "lora_pro.L8", "lora_pro.L9"),
)
def optimal_without_scaling(grad_A, grad_B, A, B, scaling, *, X="sylvester", delta=0.0):
    return right.optimal_gradients(grad_A, grad_B, A, B, 1.0, X=X, delta=delta)


@mistake(
    "The pair is divided by s, not by s^2.",
    replaces="optimal_gradients",
    breaks=("lora_pro.L2", "lora_pro.L3b", "lora_pro.L5", "lora_pro.L8"),
)
def optimal_scaled_once(grad_A, grad_B, A, B, scaling, *, X="sylvester", delta=0.0):
    return right.optimal_gradients(grad_A, grad_B, A, B, math.sqrt(scaling), X=X, delta=delta)


@mistake(
    "The scaling is fixed at 2, whatever the layer's is (the authors' DeepSpeed code).",
    replaces="optimal_gradients",
    breaks=("lora_pro.L2", "lora_pro.L3b", "lora_pro.L8"),
)
def optimal_scaling_fixed(grad_A, grad_B, A, B, scaling, *, X="sylvester", delta=0.0):
    return right.optimal_gradients(grad_A, grad_B, A, B, 2.0, X=X, delta=delta)


@mistake(
    "B's gradient is not projected: what both factors can do is counted twice.",
    replaces="optimal_gradients",
    breaks=("lora_pro.L2", "lora_pro.L3b", "lora_pro.L4", "lora_pro.L5", "lora_pro.L9"),
)
def optimal_without_projector(grad_A, grad_B, A, B, scaling, *, X="sylvester", delta=0.0):
    found = right.optimal_gradients(grad_A, grad_B, A, B, scaling, X=X, delta=delta)
    left, whole = right._grams(A, B)
    inside = B @ (left.inverse(delta) @ (B.mT @ grad_B)) @ whole.inverse(delta) / scaling**2
    return found._replace(grad_B=found.grad_B + inside)


@mistake(
    "Both gradients are preconditioned by the other factor's Gram matrix, without projection and free matrix (PEFT's Riemannian "
    "optimizer, which is no LoRA-Pro).",
    replaces="optimal_gradients",
    breaks=("lora_pro.L2", "lora_pro.L3b", "lora_pro.L4"),
)
def preconditioned_only(grad_A, grad_B, A, B, scaling, *, X="sylvester", delta=0.0):
    left, whole = right._grams(A, B)
    return Gradients(left.inverse(delta) @ grad_A, grad_B @ whole.inverse(delta))


@mistake(
    "The projector is the one on B's columns, where the one beside them is needed.",
    replaces="optimal_gradients",
    breaks=("lora_pro.L2", "lora_pro.L3b", "lora_pro.L4"),
)
def optimal_projects_inside(grad_A, grad_B, A, B, scaling, *, X="sylvester", delta=0.0):
    found = right.optimal_gradients(grad_A, grad_B, A, B, scaling, X=X, delta=delta)
    left, whole = right._grams(A, B)
    all_of_it = grad_B @ whole.inverse(delta) / scaling**2
    inside = B @ (left.inverse(delta) @ (B.mT @ all_of_it))
    return found._replace(grad_B=found.grad_B - all_of_it + 2 * inside)


@mistake(
    "The inverses are left out: the pair is back-propagation's own.",
    replaces="optimal_gradients",
    breaks=("lora_pro.L2", "lora_pro.L3b", "lora_pro.L7a", "lora_pro.L7b"),
)
def optimal_is_plain(grad_A, grad_B, A, B, scaling, *, X="sylvester", delta=0.0):
    return Gradients(grad_A.clone(), grad_B.clone())


@mistake("X A and B X come in with the same sign.", replaces="optimal_gradients", breaks=("lora_pro.L2", "lora_pro.L3b", "lora_pro.L7a"))
def optimal_signs_equal(grad_A, grad_B, A, B, scaling, *, X="sylvester", delta=0.0):
    found = right.optimal_gradients(grad_A, grad_B, A, B, scaling, X=X, delta=delta)
    without = right.optimal_gradients(grad_A, grad_B, A, B, scaling, X="zero", delta=delta)
    return found._replace(grad_B=2 * without.grad_B - found.grad_B)


@mistake("X reaches A only.", replaces="optimal_gradients", breaks=("lora_pro.L2", "lora_pro.L3b", "lora_pro.L5"))
def optimal_X_for_A_alone(grad_A, grad_B, A, B, scaling, *, X="sylvester", delta=0.0):
    found = right.optimal_gradients(grad_A, grad_B, A, B, scaling, X=X, delta=delta)
    without = right.optimal_gradients(grad_A, grad_B, A, B, scaling, X="zero", delta=delta)
    return found._replace(grad_B=without.grad_B)


@mistake("Without a choice X is zero.", replaces="optimal_gradients", breaks=("lora_pro.L6c",))
def optimal_default_is_zero(grad_A, grad_B, A, B, scaling, *, X="zero", delta=0.0):
    return right.optimal_gradients(grad_A, grad_B, A, B, scaling, X=X, delta=delta)


@mistake(
    "The choice of X is ignored: it is always that of the Sylvester equation.",
    replaces="optimal_gradients",
    breaks=("lora_pro.L3b", "lora_pro.L11a", "lora_pro.L7b"),
)
def optimal_ignores_the_choice(grad_A, grad_B, A, B, scaling, *, X="sylvester", delta=0.0):
    return right.optimal_gradients(grad_A, grad_B, A, B, scaling, delta=delta)


@mistake("The two gradients come back in the wrong order.", replaces="optimal_gradients", breaks=("lora_pro.L2", "lora_pro.L3b"))
def optimal_exchanged(grad_A, grad_B, A, B, scaling, *, X="sylvester", delta=0.0):
    found = right.optimal_gradients(grad_A, grad_B, A, B, scaling, X=X, delta=delta)
    return found.grad_B, found.grad_A


@mistake("delta is ignored.", replaces="optimal_gradients", breaks=("lora_pro.L10a", "lora_pro.L10d"))
def optimal_ignores_delta(grad_A, grad_B, A, B, scaling, *, X="sylvester", delta=0.0):
    return right.optimal_gradients(grad_A, grad_B, A, B, scaling, X=X)


@mistake(
    "delta is 1e-8 without being asked for (the official code): the step is the nearest one only nearly.",
    replaces="optimal_gradients",
    breaks=("lora_pro.L3b", "lora_pro.L6c"),
)
def optimal_delta_by_default(grad_A, grad_B, A, B, scaling, *, X="sylvester", delta=1e-8):
    return right.optimal_gradients(grad_A, grad_B, A, B, scaling, X=X, delta=delta)


@mistake(
    "Plain inverses: factors of lower rank, B = 0 among them, are an error.",
    replaces="optimal_gradients",
    breaks=("lora_pro.L10a", "lora_pro.L10b"),
)
def optimal_by_plain_inverses(grad_A, grad_B, A, B, scaling, *, X="sylvester", delta=0.0):
    for gram in (B.mT @ B, A @ A.mT):
        torch.linalg.inv(gram + delta * torch.eye(len(A), dtype=A.dtype, device=A.device))
    if torch.linalg.matrix_rank(A) < len(A) or torch.linalg.matrix_rank(B) < len(A):
        raise ValueError("a factor has lower rank")
    return right.optimal_gradients(grad_A, grad_B, A, B, scaling, X=X, delta=delta)


# The free matrix


def _with_X(find):
    """`optimal_gradients` that takes the X of one name from another function."""

    def optimal_gradients(grad_A, grad_B, A, B, scaling, *, X="sylvester", delta=0.0):
        return right.optimal_gradients(grad_A, grad_B, A, B, scaling, X=find(grad_A, grad_B, A, B, scaling, X, delta), delta=delta)

    return optimal_gradients


def _sylvester(change):
    """A wrong solution of the Sylvester equation, for `sylvester_X`, and `optimal_gradients` that uses it."""

    def sylvester_X(grad_A, A, B, scaling, *, delta=0.0):
        return change(grad_A, A, B, scaling, delta)

    def choose(grad_A, grad_B, A, B, scaling, X, delta):
        return change(grad_A, A, B, scaling, delta) if isinstance(X, str) and X == "sylvester" else X

    return sylvester_X, {"optimal_gradients": _with_X(choose)}


def _solve(left, right_gram, C):
    """X with left X + X right = C, as one linear system."""
    eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
    both = torch.kron(left, eye) + torch.kron(eye, right_gram.mT.contiguous())
    return (torch.linalg.pinv(both) @ C.reshape(-1, 1)).reshape(C.shape)


def _opposite(grad_A, A, B, scaling, delta):
    return -right.sylvester_X(grad_A, A, B, scaling, delta=delta)


def _exchanged(grad_A, A, B, scaling, delta):
    left, _ = right._grams(A, B)
    return _solve(A @ A.mT, B.mT @ B, -left.inverse(delta) @ grad_A @ A.mT / scaling**2)


def _not_inverted(grad_A, A, B, scaling, delta):
    return _solve(B.mT @ B, A @ A.mT, -grad_A @ A.mT / scaling**2)


def _not_scaled(grad_A, A, B, scaling, delta):
    return right.sylvester_X(grad_A, A, B, 1.0, delta=delta)


def _with_delta_inside(grad_A, A, B, scaling, delta):
    left, _ = right._grams(A, B)
    more = delta * torch.eye(len(A), dtype=A.dtype, device=A.device)
    return _solve(B.mT @ B + more, A @ A.mT + more, -left.inverse(delta) @ grad_A @ A.mT / scaling**2)


for _name, _says, _change, _breaks in (
    ("sylvester_sign", "The right side of the Sylvester equation has the wrong sign.", _opposite, ("L6a", "L6b", "L10c", "L16")),
    ("sylvester_grams_exchanged", "The two Gram matrices of the Sylvester equation are exchanged.", _exchanged, ("L6a", "L6b")),
    ("sylvester_without_inverse", "The right side of the Sylvester equation lacks the inverse of B'B.", _not_inverted, ("L6a", "L6b")),
    ("sylvester_without_scaling", "The right side of the Sylvester equation lacks 1/s^2.", _not_scaled, ("L6a", "L6b", "L16")),
    ("sylvester_delta_inside", "delta is added to the left side of the Sylvester equation too.", _with_delta_inside, ("L10d",)),
):
    _function, _also = _sylvester(_change)
    _function.__name__ = _name
    globals()[_name] = mistake(_says, replaces="sylvester_X", also=_also, breaks=tuple(f"lora_pro.{law}" for law in _breaks))(_function)


def _symmetric_choice(grad_A, grad_B, A, B, scaling, X, delta):
    if isinstance(X, str) and X == "symmetry":
        left, _ = right._grams(A, B)
        return -left.inverse(delta) @ B.mT @ grad_B @ (A @ A.mT) / (2 * scaling**2)
    return X


@mistake(
    "The symmetric X is multiplied by A A' where its inverse is needed (public code).",
    replaces="symmetric_X",
    also={"optimal_gradients": _with_X(_symmetric_choice)},
    breaks=("lora_pro.L11b", "lora_pro.L11a"),
)
def symmetric_not_inverted(grad_B, A, B, scaling, *, delta=0.0):
    return _symmetric_choice(None, grad_B, A, B, scaling, "symmetry", delta)


def _official_pair(grad_A, grad_B, A, B, scaling, *, X="sylvester", delta=0.0):
    X = _symmetric_choice(grad_A, grad_B, A, B, scaling, X, 1e-8)
    return right.optimal_gradients(grad_A, grad_B, A, B, scaling, X=X, delta=1e-8)


@mistake(
    "The symmetric X is multiplied by A A' where its inverse is needed, and delta is 1e-8, whatever is given (public code as it is).",
    replaces="symmetric_X",
    also={"optimal_gradients": _official_pair},
    breaks=("lora_pro.L11b", "lora_pro.L11a"),
)
def symmetric_not_inverted_with_delta(grad_B, A, B, scaling, *, delta=0.0):
    return _symmetric_choice(None, grad_B, A, B, scaling, "symmetry", 1e-8)


@mistake("The symmetric X takes all of what both factors can do, not half.", replaces="symmetric_X", breaks=("lora_pro.L11b",))
def symmetric_takes_all(grad_B, A, B, scaling, *, delta=0.0):
    return 2 * right.symmetric_X(grad_B, A, B, scaling, delta=delta)


# The projection


@mistake(
    "Both projections are added: what both factors can do is counted twice.",
    replaces="projected_gradient",
    breaks=("lora_pro.L3a", "lora_pro.L4", "lora_pro.L9", "lora_pro.L10b"),
)
def projected_twice(G, A, B):
    left, whole = right._grams(A, B)
    return B @ left.inverse(0.0) @ B.mT @ G + G @ A.mT @ whole.inverse(0.0) @ A


@mistake(
    "The gradient is projected from both sides at once: what just one factor can do is lost.",
    replaces="projected_gradient",
    breaks=("lora_pro.L3a", "lora_pro.L4", "lora_pro.L9"),
)
def projected_from_both_sides(G, A, B):
    left, whole = right._grams(A, B)
    return B @ left.inverse(0.0) @ B.mT @ G @ A.mT @ whole.inverse(0.0) @ A


@mistake(
    "The inverses are left out of the projectors.", replaces="projected_gradient", breaks=("lora_pro.L3a", "lora_pro.L4", "lora_pro.L10b")
)
def projected_without_inverses(G, A, B):
    inside = B @ (B.mT @ G)
    return inside + (G - inside) @ A.mT @ A


# Gradient descent


@mistake(
    "B is stepped with the new A: the factors are updated one after the other.",
    replaces="sgd_step",
    breaks=("lora_pro.L12a", "lora_pro.L12b"),
)
def sgd_one_after_the_other(grad_A, grad_B, A, B, scaling, *, lr, X="sylvester", delta=0.0):
    new_A = right.sgd_step(grad_A, grad_B, A, B, scaling, lr=lr, X=X, delta=delta).A
    return Factors(new_A, right.sgd_step(grad_A, grad_B, new_A, B, scaling, lr=lr, X=X, delta=delta).B)


@mistake("The step goes up the gradient.", replaces="sgd_step", breaks=("lora_pro.L12a", "lora_pro.L12b"))
def sgd_upwards(grad_A, grad_B, A, B, scaling, *, lr, X="sylvester", delta=0.0):
    return right.sgd_step(grad_A, grad_B, A, B, scaling, lr=-lr, X=X, delta=delta)


@mistake("The step is LoRA's own: the gradients are not adjusted.", replaces="sgd_step", breaks=("lora_pro.L12a", "lora_pro.L12b"))
def sgd_not_adjusted(grad_A, grad_B, A, B, scaling, *, lr, X="sylvester", delta=0.0):
    return Factors(A - lr * grad_A, B - lr * grad_B)


@mistake("The step ignores which X is asked for.", replaces="sgd_step", breaks=("lora_pro.L12a", "lora_pro.L12b"))
def sgd_ignores_the_choice(grad_A, grad_B, A, B, scaling, *, lr, X="sylvester", delta=0.0):
    return right.sgd_step(grad_A, grad_B, A, B, scaling, lr=lr, delta=delta)


@mistake("The step ignores delta.", replaces="sgd_step", breaks=("lora_pro.L12c",))
def sgd_ignores_delta(grad_A, grad_B, A, B, scaling, *, lr, X="sylvester", delta=0.0):
    return right.sgd_step(grad_A, grad_B, A, B, scaling, lr=lr, X=X)


# AdamW, full mode


@mistake("The moments start at one.", replaces="init_state", breaks=("lora_pro.L17a", "lora_pro.L13a", "lora_pro.L15"))
def moments_start_at_one(A, B):
    return right.State(*(part + 1 for part in right.init_state(A, B)))


def _composed(given, *, g=None, squared=None, back=None, X=None, scaling=None):
    """The reference's step with one part changed: the gradient g of the moments, what of it is squared, the way back, or options."""
    options = {"beta1": 0.9, "beta2": 0.999, "adam_eps": 1e-8, "weight_decay": 0.0, "X": "sylvester", "delta": 0.0} | given
    A, B, s = options["A"], options["B"], scaling or options["scaling"]
    plain = Gradients(options["grad_A"], options["grad_B"])
    best = right.optimal_gradients(*plain, A, B, s, X="zero", delta=options["delta"])
    g = right.equivalent_gradient(*best, A, B, s) if g is None else g
    adam = [options[name] for name in ("moment1", "moment2", "t", "beta1", "beta2", "adam_eps")]
    direction, moment1, moment2 = right._adam(g, *adam)
    if squared is not None:
        moment2, t = right._adam(squared(g), *adam)[2], options["t"]
        direction = moment1 / (1 - options["beta1"] ** t) / ((moment2 / (1 - options["beta2"] ** t)).sqrt() + options["adam_eps"])
    if back is None:
        virtual = Gradients(s * B.mT @ direction, s * direction @ A.mT)
        final = right.optimal_gradients(*virtual, A, B, s, X=X or options["X"], delta=options["delta"])
    else:
        final = back(direction)
    kept = 1 - options["lr"] * options["weight_decay"]
    new_A, new_B = (math.sqrt(kept) * factor - options["lr"] * grad for factor, grad in zip((A, B), final, strict=True))
    return right.Step(kept * options["W0"], new_A, new_B, moment1, moment2)


@mistake(
    "The moments are those of the factors' gradients, not of the weight's.",
    replaces="step",
    breaks=("lora_pro.L13a", "lora_pro.L13b", "lora_pro.L15"),
)
def moments_of_the_factors(grad_A, grad_B, W0, A, B, scaling, moment1, moment2, *, t, lr, beta1=0.9, beta2=0.999, adam_eps=1e-8, **options):
    r, weight_decay = len(A), options.pop("weight_decay", 0.0)
    best = right.optimal_gradients(grad_A, grad_B, A, B, scaling, **options)
    (for_A, *kept_A), (for_B, *kept_B) = (
        right._adam(g, m, v, t, beta1, beta2, adam_eps)
        for g, m, v in ((best.grad_A, moment1[:r], moment2[:r]), (best.grad_B, moment1[:, :r], moment2[:, :r]))
    )
    kept = [m.clone() for m in (moment1, moment2)]
    for m, rows, columns in zip(kept, kept_A, kept_B, strict=True):
        m[:r], m[:, :r] = rows, columns
    decay = 1 - lr * weight_decay
    return right.Step(decay * W0, math.sqrt(decay) * A - lr * for_A, math.sqrt(decay) * B - lr * for_B, *kept)


@mistake(
    "The moments are those of LoRA's own equivalent gradient, before the adjustment.",
    replaces="step",
    breaks=("lora_pro.L13a", "lora_pro.L13b"),
)
def moments_before_the_adjustment(**given):
    names = ("grad_A", "grad_B", "A", "B", "scaling")
    return _composed(given, g=right.equivalent_gradient(*(given[name] for name in names)))


@mistake(
    "The bias correction is one step late (the authors' DeepSpeed code).",
    replaces="step",
    breaks=("lora_pro.L13a", "lora_pro.L13c", "lora_pro.L15"),
)
def bias_correction_late(*, t, **given):
    return right.step(t=t + 1, **given)


@mistake("There is no bias correction.", replaces="step", breaks=("lora_pro.L13a", "lora_pro.L13c"))
def bias_correction_missing(*, t, **given):
    return right.step(t=10**6, **given)


@mistake("The two decay rates of the moments are exchanged.", replaces="step", breaks=("lora_pro.L13b", "lora_pro.L13d"))
def betas_exchanged(*, beta1=0.9, beta2=0.999, **given):
    return right.step(beta1=beta2, beta2=beta1, **given)


@mistake("The second mean decays by 0.99 where nothing else is asked for.", replaces="step", breaks=("lora_pro.L13d",))
def second_mean_too_short(*, beta2=0.99, **given):
    return right.step(beta2=beta2, **given)


@mistake("Adam's eps stands under the root.", replaces="step", breaks=("lora_pro.L13a", "lora_pro.L13c"))
def eps_under_the_root(*, adam_eps=1e-8, **given):
    beta2 = given.get("beta2", 0.999)
    # v + eps (1 - beta2^t), so that v_hat becomes v_hat + eps: the moments that come back are the right ones
    extra = adam_eps * (1 - beta2 ** given["t"]) / beta2
    moved = right.step(**{**given, "moment2": given["moment2"] + extra}, adam_eps=0.0)
    return moved._replace(moment2=right.step(**given).moment2)


@mistake("The moments that come back are the old ones.", replaces="step", breaks=("lora_pro.L13b", "lora_pro.L13e"))
def moments_not_handed_on(**given):
    return right.step(**given)._replace(moment1=given["moment1"].clone(), moment2=given["moment2"].clone())


@mistake(
    "On the way back from Adam's direction the scaling is left out of the virtual gradients.",
    replaces="step",
    breaks=("lora_pro.L13a", "lora_pro.L13c"),
)
def way_back_without_scaling(**given):
    A, B, s = given["A"], given["B"], given["scaling"]
    options = {name: given[name] for name in ("X", "delta") if name in given}
    return _composed(given, back=lambda d: right.optimal_gradients(B.mT @ d, d @ A.mT, A, B, s, **options))


@mistake(
    "Adam's direction goes back to the factors by the chain rule alone, without the adjustment.",
    replaces="step",
    breaks=("lora_pro.L13a", "lora_pro.L13c"),
)
def way_back_not_adjusted(**given):
    A, B, s = given["A"], given["B"], given["scaling"]
    return _composed(given, back=lambda d: (s * B.mT @ d, s * d @ A.mT))


@mistake("The final pair is the one with X = 0.", replaces="step", breaks=("lora_pro.L13c", "lora_pro.L13d", "lora_pro.L13e"))
def final_pair_with_zero(**given):
    return _composed(given, X="zero")


@mistake("The step's scaling is fixed at 2, whatever the layer's is.", replaces="step", breaks=("lora_pro.L13b", "lora_pro.L13c"))
def step_scaling_fixed(**given):
    return _composed(given, scaling=2.0)


@mistake("AdamW goes up the gradient.", replaces="step", breaks=("lora_pro.L13a", "lora_pro.L13c"))
def adamw_upwards(**given):
    moved = right.step(**given)
    plain = right.step(**{**given, "lr": 0.0})
    kept = math.sqrt(1 - given["lr"] * given.get("weight_decay", 0.0))
    return moved._replace(A=2 * kept * plain.A - moved.A, B=2 * kept * plain.B - moved.B)


@mistake("The step ignores delta.", replaces="step", breaks=("lora_pro.L13f",))
def adamw_ignores_delta(*, delta=0.0, **given):
    return right.step(**given)


@mistake("Each factor decays by 1 - lr weight_decay: the product decays twice.", replaces="step", breaks=("lora_pro.L14a", "lora_pro.L13c"))
def factors_decay_twice(**given):
    moved, kept = right.step(**given), 1 - given["lr"] * given.get("weight_decay", 0.0)
    more = kept - math.sqrt(kept)
    return moved._replace(A=moved.A + more * given["A"], B=moved.B + more * given["B"])


@mistake("The frozen weight does not decay.", replaces="step", breaks=("lora_pro.L14a",))
def frozen_weight_does_not_decay(**given):
    return right.step(**given)._replace(W0=given["W0"].clone())


@mistake("There is no weight decay, whatever is asked for (the authors' DeepSpeed code).", replaces="step", breaks=("lora_pro.L14a",))
def no_decay(**given):
    return right.step(**given | {"weight_decay": 0.0})


@mistake(
    "The moments are kept in bfloat16 (the authors' DeepSpeed code).",
    replaces="step",
    breaks=("lora_pro.L13b", "lora_pro.L13d"),
)
def moments_in_bfloat16(**given):
    moved = right.step(**given)
    return moved._replace(moment1=moved.moment1.bfloat16().to(moved.A.dtype), moment2=moved.moment2.bfloat16().to(moved.A.dtype))


@mistake(
    "The moments are rounded to bfloat16 and the step is taken with what is left of them (a port of the authors' DeepSpeed code).",
    replaces="step",
    breaks=("lora_pro.L13b", "lora_pro.L13d"),
)
def moments_used_in_bfloat16(*, t, lr, beta1=0.9, beta2=0.999, adam_eps=1e-8, X="sylvester", delta=0.0, weight_decay=0.0, **given):
    moved = right.step(t=t, lr=lr, beta1=beta1, beta2=beta2, adam_eps=adam_eps, X=X, delta=delta, weight_decay=weight_decay, **given)
    moment1, moment2 = (moment.bfloat16().to(moved.A.dtype) for moment in (moved.moment1, moved.moment2))
    direction = moment1 / (1 - beta1**t) / ((moment2 / (1 - beta2**t)).sqrt() + adam_eps)
    A, B, s = given["A"], given["B"], given["scaling"]
    final = right.optimal_gradients(*gradients(direction, A, B, s), A, B, s, X=X, delta=delta)
    kept = (1 - lr * weight_decay) ** 0.5
    return moved._replace(A=kept * A - lr * final.grad_A, B=kept * B - lr * final.grad_B, moment1=moment1, moment2=moment2)


@mistake(
    "From the second step on the gradient is rounded to bfloat16 before it is squared (the authors' DeepSpeed code, as it is now).",
    replaces="step",
    breaks=("lora_pro.L13b", "lora_pro.L13d"),
)
def squares_of_the_gradient_in_bfloat16(**given):
    return _composed(given, squared=_rounded(given))


def _rounded(given):
    return (lambda g: g.bfloat16().to(g.dtype)) if given["t"] > 1 else None


def _deepspeed(given, squared=None):
    changed = {"t": given["t"] + 1, "delta": 1e-8, "weight_decay": 0.0}
    return _composed(given | changed, scaling=2.0, X="sylvester", squared=squared)


@mistake("delta is 1e-8 in the step, whatever is given (the official code).", replaces="step", breaks=("lora_pro.L13f",))
def step_delta_fixed(**given):
    return right.step(**given | {"delta": 1e-8})


@mistake(
    "The step departs in four ways at once, as the authors' DeepSpeed code does: the scaling is fixed at 2, the bias correction is one "
    "step late, nothing decays, and delta is 1e-8.",
    replaces="step",
    breaks=("lora_pro.L13a", "lora_pro.L13b", "lora_pro.L13c", "lora_pro.L14a"),
)
def step_of_deepspeed(**given):
    return _deepspeed(given)


@mistake(
    "The step departs in five ways at once, as the authors' DeepSpeed code does: the scaling is fixed at 2, the bias correction is one "
    "step late, nothing decays, delta is 1e-8, and from the second step on the gradient is rounded to bfloat16 before it is squared.",
    replaces="step",
    breaks=("lora_pro.L13a", "lora_pro.L13b", "lora_pro.L13c", "lora_pro.L14a"),
)
def step_of_deepspeed_in_bfloat16(**given):
    return _deepspeed(given, squared=_rounded(given))


@mistake("Decay is not multiplied by the learning rate.", replaces="step", breaks=("lora_pro.L14a", "lora_pro.L13c"))
def decay_without_learning_rate(*, weight_decay=0.0, **given):
    return right.step(weight_decay=weight_decay / given["lr"], **given)


@mistake("Decay is added to the gradient, as in Adam before AdamW.", replaces="step", breaks=("lora_pro.L14a", "lora_pro.L13c"))
def decay_in_the_gradient(*, weight_decay=0.0, **given):
    s, A, B = given["scaling"], given["A"], given["B"]
    W = given["W0"] + s * B @ A
    more = {"grad_A": given["grad_A"] + weight_decay * s * B.mT @ W, "grad_B": given["grad_B"] + weight_decay * s * W @ A.mT}
    return right.step(**{**given, **more})


@mistake(
    "The equivalent gradient of the moments is taken from the pair with the Sylvester equation's X.",
    replaces="step",
    harmless="The equivalent gradient does not depend on X: only the rounding differs.",
)
def moments_with_another_X(**given):
    names = ("grad_A", "grad_B", "A", "B", "scaling")
    pair = right.optimal_gradients(*(given[name] for name in names), delta=given.get("delta", 0.0))
    return _composed(given, g=right.equivalent_gradient(*pair, *(given[name] for name in names[2:])))


# AdamW, efficient mode


@mistake(
    "In efficient mode the gradients are not adjusted: it is plain AdamW.",
    replaces="step_efficient",
    breaks=("lora_pro.L17b", "lora_pro.L17c"),
)
def efficient_not_adjusted(grad_A, grad_B, A, B, scaling, moment1_A, moment1_B, moment2_A, moment2_B, *, t, lr, **options):
    adam = [t, options.get("beta1", 0.9), options.get("beta2", 0.999), options.get("adam_eps", 1e-8)]
    for_A, new_1A, new_2A = right._adam(grad_A, moment1_A, moment2_A, *adam)
    for_B, new_1B, new_2B = right._adam(grad_B, moment1_B, moment2_B, *adam)
    kept = 1 - lr * options.get("weight_decay", 0.0)
    return right.EfficientStep(kept * A - lr * for_A, kept * B - lr * for_B, new_1A, new_1B, new_2A, new_2B)


@mistake("In efficient mode each factor decays by the root of 1 - lr weight_decay.", replaces="step_efficient", breaks=("lora_pro.L17b",))
def efficient_decays_by_the_root(**given):
    moved, kept = right.step_efficient(**given), 1 - given["lr"] * given.get("weight_decay", 0.0)
    more = math.sqrt(kept) - kept
    return moved._replace(A=moved.A + more * given["A"], B=moved.B + more * given["B"])


@mistake(
    "B's bias correction counts further than A's (MyTransformers: one counter for all layers).",
    replaces="step_efficient",
    breaks=("lora_pro.L17b", "lora_pro.L17c"),
)
def efficient_counts_B_further(*, t, **given):
    moved = right.step_efficient(t=t, **given)
    return moved._replace(B=right.step_efficient(t=2 * t, **given).B)


@mistake(
    "In efficient mode the learning rate is 1, whatever is given: every group of parameters has that of its own (MyTransformers, "
    "unless a scheduler sets it).",
    replaces="step_efficient",
    breaks=("lora_pro.L17b", "lora_pro.L17c", "lora_pro.L17d"),
)
def efficient_rate_of_one(*, lr, **given):
    return right.step_efficient(lr=1.0, **given)


@mistake("In efficient mode delta is 1e-8, whatever is given (the official code).", replaces="step_efficient", breaks=("lora_pro.L17d",))
def efficient_delta_fixed(**given):
    return right.step_efficient(**given | {"delta": 1e-8})


@mistake(
    "The efficient step departs in three ways at once, as in MyTransformers without a scheduler: the learning rate is 1, delta is 1e-8, "
    "and the symmetric X is multiplied by A A' where its inverse is needed.",
    replaces="step_efficient",
    breaks=("lora_pro.L17b", "lora_pro.L17c", "lora_pro.L17d"),
)
def efficient_of_mytransformers(*, X="sylvester", **given):
    X = _symmetric_choice(None, *(given[name] for name in ("grad_B", "A", "B", "scaling")), X, 1e-8)
    return right.step_efficient(X=X, **given | {"lr": 1.0, "delta": 1e-8})


@mistake("In efficient mode the bias correction is one step late.", replaces="step_efficient", breaks=("lora_pro.L17b", "lora_pro.L17c"))
def efficient_bias_correction_late(*, t, **given):
    return right.step_efficient(t=t + 1, **given)


@mistake("The efficient mode ignores which X is asked for.", replaces="step_efficient", breaks=("lora_pro.L17b",))
def efficient_ignores_the_choice(*, X="sylvester", **given):
    return right.step_efficient(**given)


@mistake("The efficient mode ignores delta.", replaces="step_efficient", breaks=("lora_pro.L17d",))
def efficient_ignores_delta(*, delta=0.0, **given):
    return right.step_efficient(**given)


@mistake("The moments of the efficient mode start at one.", replaces="init_state_efficient", breaks=("lora_pro.L17a", "lora_pro.L17d"))
def efficient_moments_start_at_one(A, B):
    return right.EfficientState(*(part + 1 for part in right.init_state_efficient(A, B)))
