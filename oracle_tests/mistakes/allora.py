"""Plausible mistakes in ALLoRA. The functions keep the reference's parameters; what is not named stands in `options`.

Where the same slip is made in every function that needs the coefficient, the reference's private helper is replaced.
"""

import math

import numpy as np
import torch
from torch import nn

from loracle.oracle_tests.mistakes import Observables, mistake
from loracle.oracle_tests.strategies import Matrices
from loracle.reference import allora as right
from loracle.reference._linalg import working
from loracle.reference.lora import BackwardGradients, Factors, Gradients


def _time(case):
    return case.rounded(0.25 + np.random.default_rng(case.number).random(case.lead))


def _squares(name, dims):
    """Positive numbers, as mean squares are."""

    def value(case):
        shape = [case.sizes[dim] for dim in dims.split()]
        return case.rounded(Matrices(case.number + sum(name.encode())).rng.uniform(0.25, 4, shape))

    return value


OBSERVABLES = Observables(
    choices={"kind": ("matrix", "element", "output", "none"), "distribution": ("gaussian",)},
    values={
        "eta": lambda case: (1.75, 0.625, 2.5, 0.875, 1.375, 3.25, 0.75, 2.25)[case.number],
        "time": _time,
        "growth": lambda case: 0.75 + 0.375 * case.number,
        "moment2_A": _squares("moment2_A", "rank in"),
        "moment2_B": _squares("moment2_B", "out rank"),
        "t": 3,
        "beta1": 0.75,
        "beta2": 0.625,
        "adam_eps": 0.5,
    },
)


# The coefficient of a size


@mistake(
    "The norm is squared inside the root: invisible at B = 0, where it vanishes.",
    replaces="_scale",
    breaks=("allora.L1b", "allora.L3a", "allora.L7b", "allora.L10a"),
)
def norm_squared(size, eta):
    return (size.square() + 1 / eta**2).rsqrt()


@mistake(
    "The root is forgotten: the gradient is divided by the norm plus 1 / eta^2.", replaces="_scale", breaks=("allora.L1b", "allora.L2a")
)
def root_forgotten(size, eta):
    return 1 / (size + 1 / eta**2)


@mistake("eta^2 stands where 1 / eta^2 belongs.", replaces="_scale", breaks=("allora.L1b", "allora.L2a", "allora.L2b"))
def eta_not_inverted(size, eta):
    return (size + eta**2).rsqrt()


@mistake("1 / eta stands where 1 / eta^2 belongs.", replaces="_scale", breaks=("allora.L1b", "allora.L2a", "allora.L2b"))
def eta_not_squared(size, eta):
    return (size + 1 / eta).rsqrt()


@mistake("1 / eta stands outside of the root, as Adam's epsilon does.", replaces="_scale", breaks=("allora.L1b", "allora.L3a"))
def eta_outside_the_root(size, eta):
    return 1 / (size.sqrt() + 1 / eta)


@mistake("The gradient is multiplied by the root, not divided.", replaces="_scale", breaks=("allora.L1b", "allora.L2a"))
def multiplied_by_the_root(size, eta):
    return (size + 1 / eta**2).sqrt()


@mistake(
    "eta is a ceiling: the larger of the norm and 1 / eta^2 is taken, not their sum.",
    replaces="_scale",
    breaks=("allora.L1b", "allora.L3a"),
)
def eta_is_a_ceiling(size, eta):
    return size.clamp(min=1 / eta**2).rsqrt()


@mistake(
    "The factors are 1 at B = 0, relative to the start: eta is missing in front.", replaces="_scale", breaks=("allora.L1b", "allora.L2a")
)
def relative_to_the_start(size, eta):
    return (1 + eta**2 * size).rsqrt()


@mistake("eta is not passed on: it is always 2.", replaces="_scale", breaks=("allora.L1b", "allora.L2a", "allora.L2b"))
def eta_is_two(size, eta):
    return (size + 1 / 4).rsqrt()


# The norm of a row


@mistake(
    "The rows of B are measured, not those of B A.", replaces="_row_norms", breaks=("allora.L1a", "allora.L1b", "allora.L5", "allora.L3a")
)
def rows_of_B(A, B):
    return working(B).norm(dim=-1)


@mistake(
    "The norm of a row of B times that of the whole A stands for the norm of the product's row.",
    replaces="_row_norms",
    breaks=("allora.L1a", "allora.L1b", "allora.L5"),
)
def product_of_norms(A, B):
    return working(B).norm(dim=-1) * working(A).norm()


@mistake(
    "The rows of A are taken to be orthogonal: of the Gram matrix A A' only the diagonal is used.",
    replaces="_row_norms",
    breaks=("allora.L1a", "allora.L1b", "allora.L5"),
)
def diagonal_of_the_gram(A, B):
    return (working(B).square() @ working(A).square().sum(dim=-1)).sqrt()


@mistake(
    "The squared norm is not rooted: row_norms gives squares.", replaces="_row_norms", breaks=("allora.L1a", "allora.L1b", "allora.L1d")
)
def norms_not_rooted(A, B):
    return right._row_norms(A, B).square()


@mistake("The l1 norm of a row is taken.", replaces="_row_norms", breaks=("allora.L1a", "allora.L1b"))
def l1_norm(A, B):
    return (working(B) @ working(A)).abs().sum(dim=-1)


@mistake("The largest entry of a row is taken.", replaces="_row_norms", breaks=("allora.L1a", "allora.L1b"))
def largest_entry(A, B):
    return (working(B) @ working(A)).abs().amax(dim=-1)


@mistake(
    "The root of the mean square of a row is taken: the norm over the root of the inputs.",
    replaces="_row_norms",
    breaks=("allora.L1a", "allora.L1b"),
)
def mean_square(A, B):
    return (working(B) @ working(A)).square().mean(dim=-1).sqrt()


@mistake("The columns of B A are measured, not its rows.", replaces="_row_norms", breaks=("allora.L1a", "allora.L1b", "allora.L3a"))
def columns_measured(A, B):
    return right._row_norms(B.mT, A.mT)


@mistake("The norms are computed in float32 and cast back.", replaces="_row_norms", breaks=("allora.L1a", "allora.L1b", "allora.L3a"))
def norms_in_float32(A, B):
    return right._row_norms(A.float(), B.float()).to(B.dtype)


# When, and of what


def _of_true(change):
    """Both roads to the gradients, with `change(true grad_A, true grad_B, A, B, eta)` in place of the row kind's."""

    def gradients(G, A, B, eta, *, kind="row"):
        true = right.gradients(G, A, B, eta, kind="none")
        return Gradients(*change(*true, A, B, eta)) if kind == "row" else right.gradients(G, A, B, eta, kind=kind)

    def factor_gradients(grad_y, x, A, B, eta, kind):
        true = right._factor_gradients(grad_y, x, A, B, eta, "none")
        return Gradients(*change(*true, A, B, eta)) if kind == "row" else right._factor_gradients(grad_y, x, A, B, eta, kind)

    return {"gradients": gradients, "_factor_gradients": factor_gradients}


@mistake(
    "The factors are computed once, at B = 0, and kept: they are eta for ever, and the method is LoRA at eta times the learning rate.",
    replaces="_per_row",
    breaks=("allora.L3a", "allora.L3b", "allora.L9a", "allora.L10a"),
)
def computed_once(A, B, eta, kind):
    return right._per_row(A, 0 * B, eta, kind)


def _own_rows(factor, eta):
    return right._scale(working(factor).norm(dim=-1, keepdim=True), eta).to(factor.dtype)


_each_itself = _of_true(lambda grad_A, grad_B, A, B, eta: (_own_rows(A, eta) * grad_A, _own_rows(B, eta) * grad_B))


@mistake(
    "Each parameter's gradient is divided by the norms of its own rows, A's and B's apart (the Automagic optimizers).",
    replaces="gradients",
    breaks=("allora.L3a", "allora.L3b", "allora.L9a", "allora.L10a"),
    also={"_factor_gradients": _each_itself["_factor_gradients"]},
)
def each_parameter_itself(G, A, B, eta, *, kind="row"):
    return _each_itself["gradients"](G, A, B, eta, kind=kind)


_each_once = _of_true(lambda grad_A, grad_B, A, B, eta: (_own_rows(A, eta) * grad_A, eta * grad_B))


@mistake(
    "Each parameter's gradient has the factors of its own rows at the start: for B the constant eta, for A one fixed number per rank "
    "index (the Automagic optimizers, which compute them once).",
    replaces="gradients",
    breaks=("allora.L3a", "allora.L3b", "allora.L9a", "allora.L10a"),
    also={"_factor_gradients": _each_once["_factor_gradients"]},
)
def each_parameter_once(G, A, B, eta, *, kind="row"):
    return _each_once["gradients"](G, A, B, eta, kind=kind)


_only_B = _of_true(lambda grad_A, grad_B, A, B, eta: (grad_A, right._per_row(A, B, eta, "row") * grad_B))


@mistake(
    "Only B's gradient is rescaled, after back-propagation: A's keeps the rows' sum as it was.",
    replaces="gradients",
    breaks=("allora.L3a", "allora.L3b", "allora.L8b", "allora.L9a"),
    also={"_factor_gradients": _only_B["_factor_gradients"]},
)
def only_B_rescaled(G, A, B, eta, *, kind="row"):
    return _only_B["gradients"](G, A, B, eta, kind=kind)


def _only_A_factors(grad_y, x, A, B, eta, kind):
    rescaled, true = (right._factor_gradients(grad_y, x, A, B, eta, k) for k in (kind, "none"))
    return Gradients(rescaled.grad_A, true.grad_B)


@mistake(
    "Only A's gradient is rescaled: B leaves zero as slowly as in LoRA.",
    replaces="gradients",
    breaks=("allora.L2b", "allora.L3a", "allora.L3b", "allora.L10a"),
    also={"_factor_gradients": _only_A_factors},
)
def only_A_rescaled(G, A, B, eta, *, kind="row"):
    return Gradients(right.gradients(G, A, B, eta, kind=kind).grad_A, right.gradients(G, A, B, eta, kind="none").grad_B)


def _through_d(G, A, B, eta):
    """The gradient of <D G, B A> with D differentiated too."""
    with torch.enable_grad():
        leaves = [factor.detach().clone().requires_grad_() for factor in (A, B)]
        # The root of a zero row has no slope: a little is added to its square
        squares = (leaves[1] @ leaves[0]).square().sum(dim=-1, keepdim=True)
        d = right._scale((squares + (squares == 0)).sqrt() * (squares > 0), eta)
        grads = torch.autograd.grad((d * G * (leaves[1] @ leaves[0])).sum(), leaves)
    return Gradients(*grads)


def _not_detached_factors(grad_y, x, A, B, eta, kind):
    G = grad_y.reshape(-1, B.shape[0]).mT @ x.reshape(-1, A.shape[1])
    return _through_d(G, A, B, eta) if kind == "row" else right._factor_gradients(grad_y, x, A, B, eta, kind)


@mistake(
    "The factors are not detached: the gradient also flows through the norms.",
    replaces="gradients",
    breaks=("allora.L3a", "allora.L3b", "allora.L8a", "allora.L9a"),
    also={"_factor_gradients": _not_detached_factors},
)
def not_detached(G, A, B, eta, *, kind="row"):
    return _through_d(G, A, B, eta) if kind == "row" else right.gradients(G, A, B, eta, kind=kind)


def _columns(A, B, eta):
    return right._scale(right._row_norms(B.mT, A.mT), eta).to(B.dtype)


def _columns_factors(grad_y, x, A, B, eta, kind):
    G = grad_y.reshape(-1, B.shape[0]).mT @ x.reshape(-1, A.shape[1])
    return (
        right._factor_gradients(grad_y, x, A, B, eta, kind)
        if kind != "row"
        else right.gradients(G * _columns(A, B, eta), A, B, eta, kind="none")
    )


@mistake(
    "The columns of the gradient are rescaled, by the columns of B A: inputs where outputs are meant.",
    replaces="gradients",
    breaks=("allora.L3a", "allora.L3b", "allora.L6a", "allora.L9a", "allora.L10a"),
    also={"_factor_gradients": _columns_factors},
)
def columns_rescaled(G, A, B, eta, *, kind="row"):
    return right.gradients(G, A, B, eta, kind=kind) if kind != "row" else right.gradients(G * _columns(A, B, eta), A, B, eta, kind="none")


@mistake(
    "The factors are divided by their mean: at the start they are 1, whatever eta.",
    replaces="_per_row",
    breaks=("allora.L2b", "allora.L3a", "allora.L3b", "allora.L6a"),
)
def factors_normalised(A, B, eta, kind):
    d = right._per_row(A, B, eta, kind)
    return d / d.mean()


@mistake("The rows of the merged weight are measured, not those of its update.", replaces="backward", breaks=("allora.L3b", "allora.L3c"))
def rows_of_the_merged_weight(grad_y, x, W0, A, B, eta, *, kind="row"):
    if kind != "row":
        return right.backward(grad_y, x, W0, A, B, eta, kind=kind)
    d = right._scale(working(W0 + B @ A).norm(dim=-1), eta).to(B.dtype)
    true = right.backward(grad_y, x, W0, A, B, eta, kind="none")
    return BackwardGradients(true.grad_x, *right._factor_gradients(grad_y * d, x, A, B, eta, "none"))


@mistake("The gradient of the input is rescaled too, as by a hook on the output.", replaces="backward", breaks=("allora.L3b", "allora.L4b"))
def input_rescaled_too(grad_y, x, W0, A, B, eta, *, kind="row"):
    _, grad_A, grad_B = right.backward(grad_y, x, W0, A, B, eta, kind=kind)
    signal = grad_y * right.row_scale(A, B, eta)
    return BackwardGradients(signal @ W0 + (signal @ B) @ A, grad_A, grad_B)


@mistake(
    "The adapter's part of the input's gradient is rescaled, as by a hook on the adapter's output.",
    replaces="backward",
    breaks=("allora.L3b", "allora.L4b"),
)
def adapter_part_of_the_input_rescaled(grad_y, x, W0, A, B, eta, *, kind="row"):
    _, grad_A, grad_B = right.backward(grad_y, x, W0, A, B, eta, kind=kind)
    return BackwardGradients(grad_y @ W0 + (grad_y * right.row_scale(A, B, eta) @ B) @ A, grad_A, grad_B)


@mistake("The adapter sends no gradient to the input.", replaces="backward", breaks=("allora.L3b", "allora.L4b"))
def no_gradient_through_the_adapter(grad_y, x, W0, A, B, eta, *, kind="row"):
    _, grad_A, grad_B = right.backward(grad_y, x, W0, A, B, eta, kind=kind)
    return BackwardGradients(grad_y @ W0, grad_A, grad_B)


@mistake(
    "The batch's gradients are averaged over its samples, though the loss decides about that.",
    replaces="_factor_gradients",
    breaks=("allora.L3b", "allora.L3c"),
)
def batch_averaged(grad_y, x, A, B, eta, kind):
    count = grad_y[..., 0].numel()
    grad_A, grad_B = right._factor_gradients(grad_y, x, A, B, eta, kind)
    return Gradients(grad_A / count, grad_B / count)


# Forward and merge


@mistake("A scaling is still in the forward, alpha / rank = 2.", replaces="forward", breaks=("allora.L4a", "allora.L4b"))
def scaling_in_the_forward(x, W0, A, B, *, bias=None):
    return nn.functional.linear(x, W0, bias) + 2 * (x @ A.mT) @ B.mT


@mistake("Dropout is left on the adapter's path.", replaces="forward", breaks=("allora.L4a", "allora.L4b"))
def dropout_left_on(x, W0, A, B, *, bias=None):
    return nn.functional.linear(x, W0, bias) + (nn.functional.dropout(x, 0.1) @ A.mT) @ B.mT


@mistake("The bias is left out.", replaces="forward", breaks=("allora.L4a",))
def bias_left_out(x, W0, A, B, *, bias=None):
    return right.forward(x, W0, A, B)


@mistake("The adapter stands alone: the frozen layer's output is missing.", replaces="forward", breaks=("allora.L4a", "allora.L4b"))
def frozen_path_missing(x, W0, A, B, *, bias=None):
    y = (x @ A.mT) @ B.mT
    return y if bias is None else y + bias


@mistake("The merged weight has a scaling, alpha / rank = 2.", replaces="merge", breaks=("allora.L4b", "allora.L4c"))
def merge_scaled(W0, A, B):
    return W0 + 2 * B @ A


@mistake("The update has a scaling, alpha / rank = 2.", replaces="delta_weight", breaks=("allora.L4c",))
def delta_scaled(A, B):
    return 2 * B @ A


@mistake(
    "The merged weight is rescaled by the rows' factors, which concern gradients alone.",
    replaces="merge",
    breaks=("allora.L4b", "allora.L4c"),
)
def merge_rescaled(W0, A, B):
    return W0 + right.row_scale(A, B, 2.0)[:, None] * (B @ A)


@mistake("Unmerging adds the update again.", replaces="unmerge", breaks=("allora.L4d",))
def unmerge_adds(W, A, B):
    return W + B @ A


@mistake("Unmerging takes the update off with a scaling, alpha / rank = 2.", replaces="unmerge", breaks=("allora.L4d",))
def unmerge_scaled(W, A, B):
    return W - 2 * B @ A


# The family


@mistake(
    "One factor is shared by all rows, from the Frobenius norm: the kind `matrix` stands for `row`.",
    replaces="_per_row",
    breaks=("allora.L3a", "allora.L3b", "allora.L6a"),
)
def matrix_for_row(A, B, eta, kind):
    return right._per_row(A, B, eta, "matrix" if kind == "row" else kind)


@mistake(
    "Every entry of G has its own factor: the kind `element` stands for `row`.", replaces="gradients", breaks=("allora.L3a", "allora.L10a")
)
def element_for_row(G, A, B, eta, *, kind="row"):
    return right.gradients(G, A, B, eta, kind="element" if kind == "row" else kind)


@mistake("Every sample has its own factors: the kind `output` stands for `row`.", replaces="backward", breaks=("allora.L3b", "allora.L3c"))
def output_for_row(grad_y, x, W0, A, B, eta, *, kind="row"):
    return right.backward(grad_y, x, W0, A, B, eta, kind="output" if kind == "row" else kind)


@mistake(
    "The kind is ignored: it is always `row`.", replaces="gradients", breaks=("allora.L13a", "allora.L13b", "allora.L13d", "allora.L13f")
)
def kind_ignored(G, A, B, eta, *, kind="row"):
    return right.gradients(G, A, B, eta)


@mistake("The backward pass ignores the kind.", replaces="backward", breaks=("allora.L13a", "allora.L13b", "allora.L13c", "allora.L13d"))
def kind_ignored_backwards(grad_y, x, W0, A, B, eta, *, kind="row"):
    return right.backward(grad_y, x, W0, A, B, eta)


@mistake("Of kind `matrix` the rows' lengths are added up, not their squares.", replaces="_per_row", breaks=("allora.L13a", "allora.L13f"))
def lengths_added(A, B, eta, kind):
    if kind != "matrix":
        return right._per_row(A, B, eta, kind)
    return right._scale(right._row_norms(A, B).sum(), eta).to(B.dtype).expand(len(B), 1)


@mistake("Of kind `matrix` the spectral norm is taken.", replaces="_per_row", breaks=("allora.L13a", "allora.L13f"))
def spectral_norm(A, B, eta, kind):
    if kind != "matrix":
        return right._per_row(A, B, eta, kind)
    return right._scale(torch.linalg.matrix_norm(working(B @ A), 2), eta).to(B.dtype).expand(len(B), 1)


@mistake(
    "Of kind `element` the entry's sign is kept: a negative one makes the factor larger than eta, or not a number.",
    replaces="gradients",
    breaks=("allora.L13b",),
)
def element_with_its_sign(G, A, B, eta, *, kind="row"):
    if kind != "element":
        return right.gradients(G, A, B, eta, kind=kind)
    return right.gradients(G * (B @ A + 1 / eta**2).rsqrt(), A, B, eta, kind="none")


def _with_outputs(outputs):
    """The backward pass whose kind `output` measures something else."""

    def backward(grad_y, x, W0, A, B, eta, *, kind="row"):
        if kind != "output":
            return right.backward(grad_y, x, W0, A, B, eta, kind=kind)
        true = right.backward(grad_y, x, W0, A, B, eta, kind="none")
        signal = grad_y * right._scale(outputs(x, W0, A, B), eta)
        return BackwardGradients(true.grad_x, *right._factor_gradients(signal, x, A, B, eta, "none"))

    return backward


@mistake(
    "Of kind `output` the whole layer's output is measured, not the adapter's.", replaces="backward", breaks=("allora.L13c", "allora.L13e")
)
def whole_output(grad_y, x, W0, A, B, eta, *, kind="row"):
    return _with_outputs(lambda x, W0, A, B: (x @ (W0 + B @ A).mT).abs())(grad_y, x, W0, A, B, eta, kind=kind)


@mistake("Of kind `output` a channel's mean over the batch is measured, not each sample's.", replaces="backward", breaks=("allora.L13c",))
def output_averaged(grad_y, x, W0, A, B, eta, *, kind="row"):
    def mean(x, W0, A, B):
        return (x @ A.mT @ B.mT).abs().reshape(-1, len(B)).mean(dim=0)

    return _with_outputs(mean)(grad_y, x, W0, A, B, eta, kind=kind)


@mistake(
    "Of kind `output` one factor is shared by all channels of a sample, from the length of its output.",
    replaces="backward",
    breaks=("allora.L13c", "allora.L13e"),
)
def output_of_all_channels(grad_y, x, W0, A, B, eta, *, kind="row"):
    return _with_outputs(lambda x, W0, A, B: (x @ A.mT @ B.mT).norm(dim=-1, keepdim=True))(grad_y, x, W0, A, B, eta, kind=kind)


@mistake("Of kind `none` the gradients are multiplied by eta.", replaces="_per_row", breaks=("allora.L13d", "allora.L13f"))
def none_times_eta(A, B, eta, kind):
    return right._per_row(A, B, eta, kind) * (eta if kind == "none" else 1)


# Steps


@mistake("The step goes uphill.", replaces="sgd_step", breaks=("allora.L14", "allora.L13f"))
def step_uphill(G, A, B, eta, *, lr, kind="row"):
    return right.sgd_step(G, A, B, eta, lr=-lr, kind=kind)


@mistake("B's gradient is taken at the new A.", replaces="sgd_step", breaks=("allora.L14", "allora.L13f"))
def one_after_the_other(G, A, B, eta, *, lr, kind="row"):
    new_A = right.sgd_step(G, A, B, eta, lr=lr, kind=kind).A
    return Factors(new_A, right.sgd_step(G, new_A, B, eta, lr=lr, kind=kind).B)


@mistake("The learning rate is multiplied by eta once more.", replaces="sgd_step", breaks=("allora.L14", "allora.L13f"))
def learning_rate_times_eta(G, A, B, eta, *, lr, kind="row"):
    return right.sgd_step(G, A, B, eta, lr=lr * eta, kind=kind)


@mistake("The step of gradient descent ignores the kind.", replaces="sgd_step", breaks=("allora.L13f",))
def step_ignores_the_kind(G, A, B, eta, *, lr, kind="row"):
    return right.sgd_step(G, A, B, eta, lr=lr)


def _adam_of_none(G, A, B, eta, moments, options):
    return right.step(G, A, B, *moments, eta, **{**options, "kind": "none"})


@mistake(
    "The rows' factors multiply B's update after Adam's division, and A's own rows those of A; the moments see the true gradients "
    "(the Automagic optimizers).",
    replaces="step",
    breaks=("allora.L9a", "allora.L9b"),
)
def rescaled_after_adam(G, A, B, moment1_A, moment1_B, moment2_A, moment2_B, eta, *, kind="row", weight_decay=0.0, **options):
    plain = _adam_of_none(G, A, B, eta, (moment1_A, moment1_B, moment2_A, moment2_B), options)
    if kind == "none":
        return right.step(G, A, B, moment1_A, moment1_B, moment2_A, moment2_B, eta, kind=kind, weight_decay=weight_decay, **options)
    kept = 1 - options["lr"] * weight_decay
    new_A = kept * A + _own_rows(A, eta) * (plain.A - A)
    return plain._replace(A=new_A, B=kept * B + _own_rows(B, eta) * (plain.B - B))


@mistake(
    "B's update is multiplied by the rows' factors after Adam's division; the moments see the true gradients.",
    replaces="step",
    breaks=("allora.L9a", "allora.L9b"),
)
def factors_after_adam(G, A, B, moment1_A, moment1_B, moment2_A, moment2_B, eta, *, kind="row", weight_decay=0.0, **options):
    if kind == "none":
        return right.step(G, A, B, moment1_A, moment1_B, moment2_A, moment2_B, eta, kind=kind, weight_decay=weight_decay, **options)
    plain = _adam_of_none(G, A, B, eta, (moment1_A, moment1_B, moment2_A, moment2_B), options)
    kept = 1 - options["lr"] * weight_decay
    return plain._replace(A=plain.A - A + kept * A, B=kept * B + right._per_row(A, B, eta, kind) * (plain.B - B))


@mistake(
    "Adam's mean of squares is that of the true gradients, its mean that of the rescaled ones.",
    replaces="step",
    breaks=("allora.L9a", "allora.L9b"),
)
def squares_of_true_gradients(
    G, A, B, moment1_A, moment1_B, moment2_A, moment2_B, eta, *, t, lr, beta1=0.9, beta2=0.999, adam_eps=1e-8, weight_decay=0.0, kind="row"
):
    rescaled, true = right.gradients(G, A, B, eta, kind=kind), right.gradients(G, A, B, eta, kind="none")
    moved = []
    for w, g, h, m, v in ((A, rescaled[0], true[0], moment1_A, moment2_A), (B, rescaled[1], true[1], moment1_B, moment2_B)):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * h.square()
        move = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + adam_eps)
        moved.append(((1 - lr * weight_decay) * w - lr * move, m, v))
    (new_A, m_A, v_A), (new_B, m_B, v_B) = moved
    return right.Step(new_A, new_B, m_A, m_B, v_A, v_B)


@mistake("Adam's means are not corrected for their start at zero.", replaces="step", breaks=("allora.L9a", "allora.L9b"))
def means_not_corrected(G, A, B, moment1_A, moment1_B, moment2_A, moment2_B, eta, *, t, **options):
    return right.step(G, A, B, moment1_A, moment1_B, moment2_A, moment2_B, eta, t=10**6, **options)


@mistake("Steps are counted from 0: the correction of the first is that of none.", replaces="step", breaks=("allora.L9a", "allora.L9b"))
def counted_one_ahead(G, A, B, moment1_A, moment1_B, moment2_A, moment2_B, eta, *, t, **options):
    return right.step(G, A, B, moment1_A, moment1_B, moment2_A, moment2_B, eta, t=t + 1, **options)


@mistake("The decay is added to the gradient, before the moments.", replaces="step", breaks=("allora.L9c",))
def decay_in_the_gradient(
    G, A, B, moment1_A, moment1_B, moment2_A, moment2_B, eta, *, t, lr, beta1=0.9, beta2=0.999, adam_eps=1e-8, weight_decay=0.0, kind="row"
):
    grads = right.gradients(G, A, B, eta, kind=kind)
    moved = []
    for w, g, m, v in ((A, grads.grad_A, moment1_A, moment2_A), (B, grads.grad_B, moment1_B, moment2_B)):
        g = g + weight_decay * w
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g.square()
        moved.append((w - lr * m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + adam_eps), m, v))
    (new_A, m_A, v_A), (new_B, m_B, v_B) = moved
    return right.Step(new_A, new_B, m_A, m_B, v_A, v_B)


@mistake("AdamW's step ignores the kind.", replaces="step", breaks=("allora.L13f",))
def adamw_ignores_the_kind(G, A, B, moment1_A, moment1_B, moment2_A, moment2_B, eta, *, kind="row", **options):
    return right.step(G, A, B, moment1_A, moment1_B, moment2_A, moment2_B, eta, **options)


@mistake("The means of squares start at one.", replaces="init_state", breaks=("allora.L9b",))
def squares_start_at_one(A, B):
    return right.State(torch.zeros_like(A), torch.zeros_like(B), torch.ones_like(A), torch.ones_like(B))


# Escape from zero


@mistake("B leaves zero at a constant speed, eta times LoRA's.", replaces="escape", breaks=("allora.L10b", "allora.L10d"))
def constant_speed(time, growth, eta):
    return (min(eta, 1e6)) * time


@mistake("B leaves zero as in LoRA.", replaces="escape", breaks=("allora.L10b", "allora.L10c"))
def escape_of_lora(time, growth, eta):
    return time.clone()


@mistake("The power of the escape is 3/2, not 2/3.", replaces="escape", breaks=("allora.L10b", "allora.L10c"))
def escape_to_the_wrong_power(time, growth, eta):
    return ((1.5 * growth * time + eta**-3) ** 1.5 - eta**-4.5) / growth


@mistake("eta^-2 is not subtracted: the escape does not start at zero.", replaces="escape", breaks=("allora.L10b", "allora.L10d"))
def escape_from_elsewhere(time, growth, eta):
    return (1.5 * growth * time + eta**-3) ** (2 / 3) / growth


@mistake("The escape is not divided by the row's growth.", replaces="escape", breaks=("allora.L10b", "allora.L10c"))
def escape_not_divided(time, growth, eta):
    return growth * right.escape(time, growth, eta)


@mistake("The factor 3/2 of the integral is left out.", replaces="escape", breaks=("allora.L10b", "allora.L10c"))
def integral_without_its_factor(time, growth, eta):
    return right.escape(time / 1.5, growth, eta)


@mistake("The escape is that of a gradient divided by the norm without a root.", replaces="escape", breaks=("allora.L10b", "allora.L10c"))
def escape_without_the_root(time, growth, eta):
    return ((2 * growth * time + eta**-4).sqrt() - eta**-2) / growth


@mistake("1 / eta stands for eta in the escape.", replaces="escape", breaks=("allora.L10b",))
def escape_with_inverse_eta(time, growth, eta):
    return right.escape(time, growth, 1 / eta if math.isfinite(eta) else eta)


# Dropout


@mistake("The penalty has the factor p, not p / (1 - p).", replaces="dropout_penalty", breaks=("allora.L11a", "allora.L11b"))
def penalty_with_p(x, A, B, scaling, *, p):
    return (1 - p) * right.dropout_penalty(x, A, B, scaling, p=p)


@mistake(
    "The penalty has a mask's own variance, p (1 - p): what is kept is not divided by 1 - p.",
    replaces="dropout_penalty",
    breaks=("allora.L11a", "allora.L11b"),
)
def penalty_without_inversion(x, A, B, scaling, *, p):
    return (1 - p) ** 2 * right.dropout_penalty(x, A, B, scaling, p=p)


@mistake("The penalty has the scaling once, not squared.", replaces="dropout_penalty", breaks=("allora.L11a", "allora.L11b"))
def penalty_scaled_once(x, A, B, scaling, *, p):
    return right.dropout_penalty(x, A, B, scaling, p=p) / scaling


@mistake("The penalty is not weighted by the inputs: a plain ridge.", replaces="dropout_penalty", breaks=("allora.L11a", "allora.L11b"))
def plain_ridge(x, A, B, scaling, *, p):
    return right.dropout_penalty(torch.ones_like(x), A, B, scaling, p=p)


@mistake(
    "The penalty is weighted by the size of the inputs, not by their squares.",
    replaces="dropout_penalty",
    breaks=("allora.L11a", "allora.L11b"),
)
def weighted_by_size(x, A, B, scaling, *, p):
    return right.dropout_penalty(x.abs().sqrt(), A, B, scaling, p=p)


@mistake(
    "The penalty is that of dropout on the output of A, not on its input.",
    replaces="dropout_penalty",
    breaks=("allora.L11a", "allora.L11b"),
)
def dropout_after_A(x, A, B, scaling, *, p):
    return p / (1 - p) * scaling**2 * ((x @ A.mT).square() @ B.square().sum(dim=0))


@mistake("Half the penalty, as for half the squared error.", replaces="dropout_penalty", breaks=("allora.L11a", "allora.L11b"))
def half_the_penalty(x, A, B, scaling, *, p):
    return right.dropout_penalty(x, A, B, scaling, p=p) / 2


@mistake(
    "The penalty is what dropout adds if the whole output B A x is dropped: the inputs' products are counted.",
    replaces="dropout_penalty",
    breaks=("allora.L11a", "allora.L11b"),
)
def products_of_inputs(x, A, B, scaling, *, p):
    return p / (1 - p) * scaling**2 * (x @ A.mT @ B.mT).square().sum(dim=-1)


# The start, and counting


@mistake("Both factors start at zero: nothing is ever trained.", replaces="init", breaks=("allora.L16a", "allora.L16b"))
def both_zero(W0, *, rank, distribution="kaiming", generator=None):
    A, B = right.init(W0, rank=rank, distribution=distribution, generator=generator)
    return Factors(0 * A, B)


@mistake("B starts like A: the model does not start where it was.", replaces="init", breaks=("allora.L16a", "allora.L16b"))
def B_random(W0, *, rank, distribution="kaiming", generator=None):
    A, _ = right.init(W0, rank=rank, distribution=distribution, generator=generator)
    return Factors(A, right.init(W0.mT, rank=rank, distribution=distribution, generator=generator).A.mT.clone())


@mistake("A starts at zero and B is random.", replaces="init", breaks=("allora.L16a", "allora.L16b"))
def factors_exchanged(W0, *, rank, distribution="kaiming", generator=None):
    B, A = right.init(W0.mT, rank=rank, distribution=distribution, generator=generator)
    return Factors(A.mT.clone(), B.mT.clone())


@mistake("A's bound is 1 / sqrt(rank), not 1 / sqrt(in).", replaces="init", breaks=("allora.L16a",))
def bound_from_the_rank(W0, *, rank, distribution="kaiming", generator=None):
    A, B = right.init(W0, rank=rank, distribution=distribution, generator=generator)
    return Factors(A * (W0.shape[1] / rank) ** 0.5 if distribution == "kaiming" else A, B)


@mistake("A is normal of variance 1 / rank by default, as in a third-party layer.", replaces="init", breaks=("allora.L16a",))
def gaussian_by_default(W0, *, rank, distribution="gaussian", generator=None):
    return right.init(W0, rank=rank, distribution=distribution, generator=generator)


@mistake("The Gaussian start has standard deviation 1 / rank, as PEFT's, not 1 / sqrt(rank).", replaces="init", breaks=("allora.L16b",))
def gaussian_of_peft(W0, *, rank, distribution="kaiming", generator=None):
    A, B = right.init(W0, rank=rank, distribution=distribution, generator=generator)
    return Factors(A / rank**0.5 if distribution == "gaussian" else A, B)


@mistake("The distribution is ignored.", replaces="init", breaks=("allora.L16b",))
def distribution_ignored(W0, *, rank, distribution="kaiming", generator=None):
    return right.init(W0, rank=rank, generator=generator)


@mistake("The generator is ignored: a seed repeats nothing.", replaces="init", breaks=("allora.L16a", "allora.L16b"))
def generator_ignored(W0, *, rank, distribution="kaiming", generator=None):
    return right.init(W0, rank=rank, distribution=distribution, generator=torch.Generator().manual_seed(torch.Generator().seed()))


@mistake("Only one factor is counted.", replaces="num_trainable", breaks=("allora.L15",))
def one_factor_counted(W0, *, rank):
    return rank * W0.shape[1]


@mistake("The factors of the rows are counted as if they were trained.", replaces="num_trainable", breaks=("allora.L15",))
def row_factors_counted(W0, *, rank):
    return right.num_trainable(W0, rank=rank) + len(W0)


# No mistakes


@mistake(
    "The coefficient is written as in the paper, 1 / sqrt(norm + 1 / eta^2).",
    replaces="_scale",
    harmless="The same number but for rounding: at B = 0 it may miss eta by the last digit.",
)
def coefficient_as_written(size, eta):
    return 1 / (size + 1 / eta**2).sqrt()


@mistake(
    "The row norms come from the triangular factor of A' instead of a Gram matrix.",
    replaces="_row_norms",
    harmless="b A has the length of b R' if A' = Q R with orthonormal columns of Q. It makes no (out, in) matrix either.",
)
def norms_by_qr(A, B):
    return (working(B) @ torch.linalg.qr(working(A).mT).R.mT).norm(dim=-1)


@mistake(
    "The escape is written with eta^-2 subtracted.",
    replaces="escape",
    harmless="The same number, but early times lose digits, which the laws allow for.",
)
def escape_as_written(time, growth, eta):
    return ((1.5 * growth * time + eta**-3) ** (2 / 3) - eta**-2) / growth
