"""Plausible mistakes in NLoRA, SLoRA and IntTune. The functions keep the reference's parameters; what is not named stands in `options`."""

import numpy as np
import torch

from loracle.oracle_tests.mistakes import Observables, mistake
from loracle.oracle_tests.strategies import Matrices
from loracle.reference import lora
from loracle.reference import nlora as right
from loracle.reference.lora import _drop
from loracle.reference.nlora import Factors, Gradients, Weights


def _weight(case):
    """A weight whose landmark blocks, the first and that of `rows` and `cols`, have singular values on both sides of a cut-off."""
    matrices, rank = Matrices(100 + case.number), case.rank
    W0 = matrices(case.out, case.sizes["in"])
    for rows, cols in ((np.arange(rank), np.arange(rank)), (_rows(case), _cols(case))):
        W0[np.ix_(rows, cols)] = matrices.with_spectrum(rank, rank, ([4, 1.6], [4, 1.6, 0.1], [4, 1.6, 0.4, 0.1])[rank - 2])
    return case.rounded(W0)


def _rows(case):
    return case.rank + np.random.default_rng(case.number).permutation(case.out - case.rank)[: case.rank]


def _cols(case):
    return case.rank + np.random.default_rng(case.number + 50).permutation(case.sizes["in"] - case.rank)[: case.rank]


OBSERVABLES = Observables(
    choices={
        "core": ("block", "pinv", "kaiming", "gaussian"),
        "distribution": ("kaiming", "gaussian"),
        "method": ("nlora", "slora", "inttune", "lora"),
    },
    values={"W0": _weight, "rows": _rows, "cols": _cols, "rcond": 0.3},
)


# The layer


@mistake("The middle factor is transposed in the forward.", replaces="forward", breaks=("nlora.L2a", "nlora.L2b", "nlora.L2f"))
def forward_transposes_N(x, W_base, A, N, B, scaling, **options):
    return right.forward(x, W_base, A, N.mT, B, scaling, **options)


@mistake(
    "The middle factor is left out of the forward (the official code, where DoRA is on).",
    replaces="forward",
    breaks=("nlora.L2a", "nlora.L2b", "nlora.L2f"),
)
def forward_without_N(x, W_base, A, N, B, scaling, **options):
    return lora.forward(x, W_base, A, B, scaling, **options)


@mistake(
    "The middle factor is added to the identity: training starts at LoRA's product plus that of this paper.",
    replaces="forward",
    breaks=("nlora.L2a", "nlora.L2b", "nlora.L14a"),
)
def forward_adds_the_identity(x, W_base, A, N, B, scaling, **options):
    return right.forward(x, W_base, A, N + torch.eye(len(N), dtype=N.dtype), B, scaling, **options)


@mistake("The factors are applied in reverse: B first, A last.", replaces="forward", breaks=("nlora.L2a", "nlora.L2b", "nlora.L2f"))
def forward_in_reverse(x, W_base, A, N, B, scaling, *, bias=None, mask=None, p=0.0):
    return torch.nn.functional.linear(x, W_base, bias) + scaling * (_drop(x, mask, p) @ B @ N @ A)


@mistake("The update lacks the scaling in the forward.", replaces="forward", breaks=("nlora.L2a", "nlora.L2b", "nlora.L2f"))
def forward_without_scaling(x, W_base, A, N, B, scaling, **options):
    return right.forward(x, W_base, A, N, B, 1.0, **options)


@mistake("The scaling is applied twice in the forward.", replaces="forward", breaks=("nlora.L2a", "nlora.L2b", "nlora.L2f"))
def forward_scaled_twice(x, W_base, A, N, B, scaling, **options):
    return right.forward(x, W_base, A, N, B, scaling**2, **options)


@mistake("The scaling is divided by the rank once more.", replaces="forward", breaks=("nlora.L2a", "nlora.L2b", "nlora.L2f"))
def forward_divides_by_the_rank(x, W_base, A, N, B, scaling, **options):
    return right.forward(x, W_base, A, N, B, scaling / len(A), **options)


@mistake("The bias is left out.", replaces="forward", breaks=("nlora.L2a", "nlora.L2b", "nlora.L2f"))
def forward_without_bias(x, W_base, A, N, B, scaling, *, bias=None, **options):
    return right.forward(x, W_base, A, N, B, scaling, **options)


@mistake("The frozen path is left out: the adapter alone is computed.", replaces="forward", breaks=("nlora.L2a", "nlora.L2b"))
def forward_without_the_frozen_path(x, W_base, A, N, B, scaling, **options):
    return right.forward(x, 0 * W_base, A, N, B, scaling, **options)


@mistake(
    "The dropout is skipped (the official code, for batches of mixed adapters with a middle factor).",
    replaces="forward",
    breaks=("nlora.L2f",),
)
def dropout_skipped(x, W_base, A, N, B, scaling, *, bias=None, mask=None, p=0.0):
    return right.forward(x, W_base, A, N, B, scaling, bias=bias)


@mistake("The dropout acts on the frozen path too.", replaces="forward", breaks=("nlora.L2f",))
def dropout_on_both_paths(x, W_base, A, N, B, scaling, *, bias=None, mask=None, p=0.0):
    return right.forward(_drop(x, mask, p), W_base, A, N, B, scaling, bias=bias)


@mistake("What dropout keeps is not divided by 1 - p.", replaces="forward", breaks=("nlora.L2f",))
def dropout_without_rescaling(x, W_base, A, N, B, scaling, *, p=0.0, **options):
    return right.forward(x, W_base, A, N, B, scaling, p=0.0, **options)


@mistake("What dropout keeps is divided by p.", replaces="forward", breaks=("nlora.L2f",))
def dropout_divides_by_p(x, W_base, A, N, B, scaling, *, mask=None, p=0.0, **options):
    return right.forward(x, W_base, A, N, B, scaling, mask=mask, p=0.0 if mask is None else 1 - p, **options)


@mistake("The dropout's mask is read the other way round.", replaces="forward", breaks=("nlora.L2f",))
def mask_inverted(x, W_base, A, N, B, scaling, *, mask=None, **options):
    return right.forward(x, W_base, A, N, B, scaling, mask=None if mask is None else ~mask, **options)


@mistake("The adapter's path is computed in float32 and cast back.", replaces="forward", breaks=("nlora.L2a", "nlora.L2b", "nlora.L2f"))
def forward_in_float32(x, W_base, A, N, B, scaling, *, bias=None, mask=None, p=0.0):
    update = _drop(x, mask, p).float() @ A.float().mT @ N.float().mT @ B.float().mT
    return torch.nn.functional.linear(x, W_base, bias) + scaling * update.to(x.dtype)


@mistake("The merged weight lacks the scaling that the forward has.", replaces="merge", breaks=("nlora.L2b", "nlora.L2c"))
def merge_without_scaling(W_base, A, N, B, scaling):
    return W_base + B @ N @ A


@mistake("The merged weight lacks the middle factor that the forward has.", replaces="merge", breaks=("nlora.L2b", "nlora.L2c"))
def merge_without_N(W_base, A, N, B, scaling):
    return W_base + scaling * B @ A


@mistake("The middle factor is transposed in the merged weight.", replaces="merge", breaks=("nlora.L2b", "nlora.L2c"))
def merge_transposes_N(W_base, A, N, B, scaling):
    return W_base + scaling * B @ N.mT @ A


@mistake("Merging takes the update off.", replaces="merge", breaks=("nlora.L2b", "nlora.L2c"))
def merge_subtracts(W_base, A, N, B, scaling):
    return W_base - scaling * B @ N @ A


@mistake("Unmerging adds the update again.", replaces="unmerge", breaks=("nlora.L2d",))
def unmerge_adds(W, A, N, B, scaling):
    return W + scaling * B @ N @ A


@mistake("Unmerging forgets the scaling.", replaces="unmerge", breaks=("nlora.L2d",))
def unmerge_without_scaling(W, A, N, B, scaling):
    return W - B @ N @ A


@mistake("Unmerging forgets the middle factor.", replaces="unmerge", breaks=("nlora.L2d",))
def unmerge_without_N(W, A, N, B, scaling):
    return W - scaling * B @ A


@mistake("Unmerging does nothing.", replaces="unmerge", breaks=("nlora.L2d",))
def unmerge_does_nothing(W, A, N, B, scaling):
    return W.clone()


@mistake("The update lacks the scaling.", replaces="delta_weight", breaks=("nlora.L2e", "nlora.L14a"))
def delta_without_scaling(A, N, B, scaling):
    return B @ N @ A


@mistake("The update lacks the middle factor.", replaces="delta_weight", breaks=("nlora.L2e", "nlora.L13d"))
def delta_without_N(A, N, B, scaling):
    return scaling * B @ A


@mistake("The middle factor is transposed in the update.", replaces="delta_weight", breaks=("nlora.L2e", "nlora.L13d"))
def delta_transposes_N(A, N, B, scaling):
    return scaling * B @ N.mT @ A


@mistake("The identity is added to the middle factor in the update.", replaces="delta_weight", breaks=("nlora.L2e", "nlora.L14a"))
def delta_adds_the_identity(A, N, B, scaling):
    return scaling * B @ (N + torch.eye(len(N), dtype=N.dtype)) @ A


# Gradients


@mistake("The gradients lack the scaling.", replaces="gradients", breaks=("nlora.L3a", "nlora.L15a"))
def gradients_without_scaling(G, A, N, B, scaling):
    return right.gradients(G, A, N, B, 1.0)


@mistake("The gradients have the square of the scaling.", replaces="gradients", breaks=("nlora.L3a", "nlora.L15a"))
def gradients_scaled_twice(G, A, N, B, scaling):
    return right.gradients(G, A, N, B, scaling**2)


@mistake("The gradient of the middle factor alone lacks the scaling.", replaces="gradients", breaks=("nlora.L3a", "nlora.L3b"))
def grad_N_without_scaling(G, A, N, B, scaling):
    grad_A, grad_N, grad_B = right.gradients(G, A, N, B, scaling)
    return Gradients(grad_A, grad_N / scaling, grad_B)


@mistake(
    "The gradients of A and B are LoRA's: the middle factor is left out of them.", replaces="gradients", breaks=("nlora.L3a", "nlora.L3b")
)
def gradients_of_lora(G, A, N, B, scaling):
    left, right_ = scaling * B.mT @ G, scaling * G @ A.mT
    return Gradients(left, left @ A.mT, right_)


@mistake("The middle factor is not transposed in the gradients of A and B.", replaces="gradients", breaks=("nlora.L3a", "nlora.L3b"))
def gradients_with_N_not_transposed(G, A, N, B, scaling):
    left, right_ = scaling * B.mT @ G, scaling * G @ A.mT
    return Gradients(N @ left, left @ A.mT, right_ @ N)


@mistake("The gradient of the middle factor is transposed.", replaces="gradients", breaks=("nlora.L3a", "nlora.L3b"))
def grad_N_transposed(G, A, N, B, scaling):
    grad_A, grad_N, grad_B = right.gradients(G, A, N, B, scaling)
    return Gradients(grad_A, grad_N.mT, grad_B)


@mistake("The middle factor receives no gradient: it is detached.", replaces="gradients", breaks=("nlora.L3a", "nlora.L3b"))
def N_detached(G, A, N, B, scaling):
    grad_A, grad_N, grad_B = right.gradients(G, A, N, B, scaling)
    return Gradients(grad_A, 0 * grad_N, grad_B)


@mistake(
    "A and B receive no gradient outside of IntTune either: they are detached.", replaces="gradients", breaks=("nlora.L3a", "nlora.L3b")
)
def A_and_B_detached(G, A, N, B, scaling):
    grad_A, grad_N, grad_B = right.gradients(G, A, N, B, scaling)
    return Gradients(0 * grad_A, grad_N, 0 * grad_B)


@mistake("The gradients have the wrong sign.", replaces="gradients", breaks=("nlora.L3a", "nlora.L15a"))
def gradients_negated(G, A, N, B, scaling):
    return right.gradients(-G, A, N, B, scaling)


# A step


@mistake("The frozen weight is trained as well.", replaces="sgd_step", breaks=("nlora.L15a", "nlora.L15b"))
def step_moves_the_frozen_weight(G, W_base, A, N, B, scaling, *, lr, **options):
    after = right.sgd_step(G, W_base, A, N, B, scaling, lr=lr, **options)
    return after._replace(W_base=W_base - lr * G)


@mistake("The factors are stepped one after the other, each with what the last has become.", replaces="sgd_step", breaks=("nlora.L15a",))
def step_one_after_the_other(G, W_base, A, N, B, scaling, *, lr, method="nlora"):
    if method == "inttune":
        return right.sgd_step(G, W_base, A, N, B, scaling, lr=lr, method=method)
    A = A - lr * right.gradients(G, A, N, B, scaling).grad_A
    N = N - lr * right.gradients(G, A, N, B, scaling).grad_N
    return Weights(W_base, A, N, B - lr * right.gradients(G, A, N, B, scaling).grad_B)


@mistake("The step goes uphill.", replaces="sgd_step", breaks=("nlora.L15a", "nlora.L15b"))
def step_uphill(G, W_base, A, N, B, scaling, *, lr, **options):
    return right.sgd_step(G, W_base, A, N, B, scaling, lr=-lr, **options)


@mistake("The step forgets the learning rate.", replaces="sgd_step", breaks=("nlora.L15a", "nlora.L15b", "nlora.L15c"))
def step_without_learning_rate(G, W_base, A, N, B, scaling, *, lr, **options):
    return right.sgd_step(G, W_base, A, N, B, scaling, lr=1.0, **options)


@mistake("IntTune trains A and B too.", replaces="sgd_step", breaks=("nlora.L15b",))
def inttune_trains_everything(G, W_base, A, N, B, scaling, *, lr, method="nlora"):
    return right.sgd_step(G, W_base, A, N, B, scaling, lr=lr)


@mistake("IntTune trains A and B and freezes the middle factor.", replaces="sgd_step", breaks=("nlora.L15b",))
def inttune_freezes_N(G, W_base, A, N, B, scaling, *, lr, method="nlora"):
    after = right.sgd_step(G, W_base, A, N, B, scaling, lr=lr)
    return after._replace(N=N) if method == "inttune" else after


@mistake("IntTune leaves A trainable.", replaces="sgd_step", breaks=("nlora.L15b",))
def inttune_trains_A(G, W_base, A, N, B, scaling, *, lr, method="nlora"):
    after = right.sgd_step(G, W_base, A, N, B, scaling, lr=lr)
    return after._replace(B=B) if method == "inttune" else after


@mistake("Unless told otherwise only the middle factor is trained.", replaces="sgd_step", breaks=("nlora.L15a", "nlora.L15c"))
def inttune_by_default(G, W_base, A, N, B, scaling, *, lr, method="inttune"):
    return right.sgd_step(G, W_base, A, N, B, scaling, lr=lr, method=method)


@mistake("The middle factor is never trained: it stays what it starts at.", replaces="sgd_step", breaks=("nlora.L15a", "nlora.L15b"))
def N_is_never_trained(G, W_base, A, N, B, scaling, *, lr, method="nlora"):
    return right.sgd_step(G, W_base, A, N, B, scaling, lr=lr, method=method)._replace(N=N)


# SLoRA's start


@mistake("SLoRA starts with B random as well: the pretrained weight is left.", replaces="init_slora", breaks=("nlora.L1a", "nlora.L1b"))
def slora_starts_all_random(W0, *, rank, generator=None, **options):
    A, N, B = right.init_slora(W0, rank=rank, generator=generator, **options)
    return Factors(A, N, B.clone().uniform_(-1 / rank**0.5, 1 / rank**0.5, generator=generator))


@mistake("SLoRA starts with N = 0: with B = 0 no gradient is left.", replaces="init_slora", breaks=("nlora.L1a", "nlora.L1c"))
def slora_starts_with_zero_N(W0, *, rank, **options):
    A, N, B = right.init_slora(W0, rank=rank, **options)
    return Factors(A, 0 * N, B)


@mistake("SLoRA's middle factor starts at the identity.", replaces="init_slora", breaks=("nlora.L1c", "nlora.L1d"))
def slora_starts_with_the_identity(W0, *, rank, **options):
    A, N, B = right.init_slora(W0, rank=rank, **options)
    return Factors(A, torch.eye(rank, dtype=N.dtype), B)


@mistake("SLoRA starts with A zero and B random.", replaces="init_slora", breaks=("nlora.L1a", "nlora.L1b"))
def slora_start_exchanged(W0, *, rank, generator=None, **options):
    A, N, B = right.init_slora(W0, rank=rank, generator=generator, **options)
    return Factors(0 * A, N, B.clone().uniform_(-1 / rank**0.5, 1 / rank**0.5, generator=generator))


@mistake("SLoRA's middle factor is drawn as narrow as A, within one over the root of `in`.", replaces="init_slora", breaks=("nlora.L1c",))
def N_with_the_fan_in_of_A(W0, *, rank, core="kaiming", **options):
    A, N, B = right.init_slora(W0, rank=rank, core=core, **options)
    return Factors(A, N * (rank / W0.shape[1]) ** 0.5 if core == "kaiming" else N, B)


@mistake("A is drawn as wide as the middle factor, within one over the root of the rank.", replaces="init_slora", breaks=("nlora.L1c",))
def A_with_the_fan_in_of_N(W0, *, rank, distribution="kaiming", **options):
    A, N, B = right.init_slora(W0, rank=rank, distribution=distribution, **options)
    return Factors(A * (W0.shape[1] / rank) ** 0.5 if distribution == "kaiming" else A, N, B)


@mistake("The Gaussian middle factor has the width one over the root of the rank.", replaces="init_slora", breaks=("nlora.L1d",))
def gaussian_N_too_wide(W0, *, rank, core="kaiming", **options):
    A, N, B = right.init_slora(W0, rank=rank, core=core, **options)
    return Factors(A, N * rank**0.5 if core == "gaussian" else N, B)


@mistake("The middle factor is Gaussian unless told otherwise.", replaces="init_slora", breaks=("nlora.L1c",))
def gaussian_N_by_default(W0, *, rank, core="gaussian", **options):
    return right.init_slora(W0, rank=rank, core=core, **options)


@mistake("A is Gaussian unless told otherwise, as in the paper's figure.", replaces="init_slora", breaks=("nlora.L1c",))
def gaussian_A_by_default(W0, *, rank, distribution="gaussian", **options):
    return right.init_slora(W0, rank=rank, distribution=distribution, **options)


@mistake("The distribution of A is ignored.", replaces="init_slora", breaks=("nlora.L1d",))
def distribution_of_A_ignored(W0, *, rank, distribution="kaiming", **options):
    return right.init_slora(W0, rank=rank, **options)


@mistake("The distribution of the middle factor is ignored.", replaces="init_slora", breaks=("nlora.L1d",))
def distribution_of_N_ignored(W0, *, rank, core="kaiming", **options):
    return right.init_slora(W0, rank=rank, **options)


@mistake("The distributions of A and of the middle factor are exchanged.", replaces="init_slora", breaks=("nlora.L1d",))
def distributions_exchanged(W0, *, rank, distribution="kaiming", core="kaiming", **options):
    return right.init_slora(W0, rank=rank, distribution=core, core=distribution, **options)


@mistake("The middle factor is drawn and A before it in the other order.", replaces="init_slora", harmless="The distribution is the same.")
def N_drawn_first(W0, *, rank, distribution="kaiming", core="kaiming", generator=None):
    N = right.init_slora(W0, rank=rank, core=core, generator=generator).N
    A, _, B = right.init_slora(W0, rank=rank, distribution=distribution, generator=generator)
    return Factors(A, N, B)


# NLoRA's start


@mistake(
    "The middle factor is the inverse of the block unless told otherwise: Nystroem's core, not the published one.",
    replaces="init",
    breaks=("nlora.L8a", "nlora.L16"),
)
def pinv_by_default(W0, scaling=1.0, *, rank, core="pinv", **options):
    return right.init(W0, scaling, rank=rank, core=core, **options)


@mistake("The block and its inverse are exchanged.", replaces="init", breaks=("nlora.L8a", "nlora.L8c", "nlora.L8d", "nlora.L9"))
def cores_exchanged(W0, scaling=1.0, *, rank, core="block", **options):
    return right.init(W0, scaling, rank=rank, core="pinv" if core == "block" else "block", **options)


@mistake(
    "The middle factor is the block although the inverse is asked for.", replaces="init", breaks=("nlora.L8c", "nlora.L8d", "nlora.L9")
)
def core_ignored(W0, scaling=1.0, *, rank, core="block", **options):
    return right.init(W0, scaling, rank=rank, **options)


@mistake("The weight is corrected unless told otherwise.", replaces="init", breaks=("nlora.L8a", "nlora.L8c"))
def residual_by_default(W0, scaling=1.0, *, rank, residual=True, **options):
    return right.init(W0, scaling, rank=rank, residual=residual, **options)


@mistake("The correction is forgotten although it is asked for.", replaces="init", breaks=("nlora.L7a", "nlora.L16"))
def residual_ignored(W0, scaling=1.0, *, rank, residual=False, **options):
    return right.init(W0, scaling, rank=rank, **options)


@mistake("The correction is subtracted without the scaling.", replaces="init", breaks=("nlora.L7a",))
def residual_without_scaling(W0, scaling=1.0, *, rank, **options):
    return right.init(W0, 1.0, rank=rank, **options)


@mistake("The correction is added.", replaces="init", breaks=("nlora.L7a", "nlora.L16"))
def residual_added(W0, scaling=1.0, *, rank, **options):
    return right.init(W0, -scaling, rank=rank, **options)


@mistake(
    "The correction always has the block, although the middle factor is its inverse.", replaces="init", breaks=("nlora.L7a", "nlora.L16")
)
def residual_with_the_block(W0, scaling=1.0, *, rank, core="block", residual=False, rcond=None, **options):
    W_base = right.init(W0, scaling, rank=rank, residual=residual, **options).W_base
    return right.init(W0, scaling, rank=rank, core=core, rcond=rcond, **options)._replace(W_base=W_base)


@mistake("The scaling of the start is 2 unless told otherwise, as for alpha = 2 rank.", replaces="init", breaks=("nlora.L7c", "nlora.L16"))
def start_scaled_by_default(W0, scaling=2.0, *, rank, **options):
    return right.init(W0, scaling, rank=rank, **options)


@mistake("B is divided by the scaling, so that the start does not depend on it.", replaces="init", breaks=("nlora.L7a", "nlora.L8d"))
def B_divided_by_scaling(W0, scaling=1.0, *, rank, **options):
    W_base, A, N, B = right.init(W0, scaling, rank=rank, **options)
    return Weights(W_base, A, N, B / scaling)


@mistake("The middle factor starts at zero.", replaces="init", breaks=("nlora.L8a", "nlora.L8c", "nlora.L8d"))
def N_starts_at_zero(W0, scaling=1.0, *, rank, **options):
    W_base, A, N, B = right.init(W0, scaling, rank=rank, **options)
    return Weights(W_base, A, 0 * N, B)


@mistake("The middle factor starts at the identity: rows and columns alone are copied.", replaces="init", breaks=("nlora.L8a", "nlora.L8c"))
def N_starts_at_the_identity(W0, scaling=1.0, *, rank, **options):
    W_base, A, N, B = right.init(W0, scaling, rank=rank, **options)
    return Weights(W_base, A, torch.eye(rank, dtype=N.dtype), B)


@mistake(
    "The middle factor is made once for a weight: a second start on it finds the first one's (in the official code the second adapter "
    "on a layer has none of its own).",
    replaces="init",
    breaks=("nlora.L8f", "nlora.L8c"),
)
def second_start_finds_the_first_N(W0, scaling=1.0, *, rank, residual=False, rows=None, cols=None, **options):
    # What a start without landmarks has left; who asks for that one again is served rightly
    N = right.landmark_blocks(W0, rank=rank).N
    A, _, B = right.landmark_blocks(W0, rank=rank, rows=rows, cols=cols)
    return Weights(right.base_weight(W0, A, N, B, scaling) if residual else W0, A, N, B)


@mistake("The middle factor starts transposed.", replaces="init", breaks=("nlora.L8a", "nlora.L8c"))
def N_starts_transposed(W0, scaling=1.0, *, rank, **options):
    W_base, A, N, B = right.init(W0, scaling, rank=rank, **options)
    return Weights(W_base, A, N.mT.contiguous(), B)


@mistake("B starts at zero, as in LoRA.", replaces="init", breaks=("nlora.L8a", "nlora.L8c", "nlora.L8d"))
def B_starts_at_zero(W0, scaling=1.0, *, rank, **options):
    W_base, A, N, B = right.init(W0, scaling, rank=rank, **options)
    return Weights(W_base, A, N, 0 * B)


@mistake("The factors start with the roots of the block's size: each divided by the block's norm.", replaces="init", breaks=("nlora.L8a",))
def factors_normalised(W0, scaling=1.0, *, rank, **options):
    W_base, A, N, B = right.init(W0, scaling, rank=rank, **options)
    size = N.norm()
    return Weights(W_base, A / size, N / size, B / size)


@mistake("The landmark columns go to A and the rows to B.", replaces="landmark_blocks", breaks=("nlora.L8b", "nlora.L8e"))
def rows_and_columns_exchanged(W0, *, rank, **options):
    A, N, B = right.landmark_blocks(W0, rank=rank, **options)
    return Factors(B.mT.contiguous(), N, A.mT.contiguous())


@mistake("The block has the columns' indices as rows and the rows' as columns.", replaces="landmark_blocks", breaks=("nlora.L8b",))
def block_of_exchanged_indices(W0, *, rank, rows=None, cols=None):
    A, _, B = right.landmark_blocks(W0, rank=rank, rows=rows, cols=cols)
    I, J = (torch.arange(rank) if k is None else k for k in (rows, cols))
    return Factors(A, W0[J % len(W0)][:, I % W0.shape[1]], B)


@mistake("The middle factor is the transpose of the block.", replaces="landmark_blocks", breaks=("nlora.L8b", "nlora.L8e"))
def block_transposed(W0, *, rank, **options):
    A, N, B = right.landmark_blocks(W0, rank=rank, **options)
    return Factors(A, N.mT.contiguous(), B)


@mistake(
    "The block is indexed by pairs, W0[rows, cols]: only its diagonal is there.",
    replaces="landmark_blocks",
    breaks=("nlora.L8b", "nlora.L8e"),
)
def block_indexed_by_pairs(W0, *, rank, **options):
    A, N, B = right.landmark_blocks(W0, rank=rank, **options)
    return Factors(A, torch.diag(N.diagonal()), B)


@mistake("The last rows and columns are taken, not the first.", replaces="landmark_blocks", breaks=("nlora.L8e", "nlora.L8b"))
def last_landmarks(W0, *, rank, rows=None, cols=None):
    m, n = W0.shape
    I, J = (torch.arange(side - rank, side) if k is None else k for k, side in ((rows, m), (cols, n)))
    return right.landmark_blocks(W0, rank=rank, rows=I, cols=J)


@mistake("The given rows are ignored.", replaces="landmark_blocks", breaks=("nlora.L8b",))
def given_rows_ignored(W0, *, rank, rows=None, cols=None):
    return right.landmark_blocks(W0, rank=rank, cols=cols)


@mistake("The given columns are ignored.", replaces="landmark_blocks", breaks=("nlora.L8b",))
def given_columns_ignored(W0, *, rank, rows=None, cols=None):
    return right.landmark_blocks(W0, rank=rank, rows=rows)


@mistake("The given landmarks are sorted: their pairing is lost.", replaces="landmark_blocks", breaks=("nlora.L8b",))
def given_landmarks_sorted(W0, *, rank, rows=None, cols=None):
    I, J = (None if k is None else k.sort().values for k in (rows, cols))
    return right.landmark_blocks(W0, rank=rank, rows=I, cols=J)


@mistake("The landmarks are counted from 1.", replaces="landmark_blocks", breaks=("nlora.L8b",))
def landmarks_from_one(W0, *, rank, rows=None, cols=None):
    I, J = (None if k is None else (k - 1) % side for k, side in zip((rows, cols), W0.shape, strict=True))
    return right.landmark_blocks(W0, rank=rank, rows=I, cols=J)


@mistake("The blocks are kept in bfloat16.", replaces="landmark_blocks", breaks=("nlora.L8b",))
def blocks_in_bfloat16(W0, *, rank, **options):
    return Factors(*(block.bfloat16().to(W0.dtype) for block in right.landmark_blocks(W0, rank=rank, **options)))


# The inverse of the block


def _of_values(K, kept):
    U, values, Vh = torch.linalg.svd(K)
    chosen = kept(values)
    return U, values, Vh, chosen / torch.where(chosen, values, 1.0)


@mistake("The cut-off of the inverse is 0.03 unless told otherwise: the core loses rank.", replaces="_block_svd", breaks=("nlora.L5d",))
def cut_off_by_default(K, rcond):
    return right._block_svd(K, 0.03 if rcond is None else rcond)


@mistake("The cut-off is ignored: every singular value is inverted.", replaces="_block_svd", breaks=("nlora.L17", "nlora.L4"))
def cut_off_ignored(K, rcond):
    return right._block_svd(K, None if rcond is None else 0.0)


@mistake("The cut-off is taken as a singular value, not as a share of the largest.", replaces="_block_svd", breaks=("nlora.L17",))
def cut_off_is_absolute(K, rcond):
    return right._block_svd(K, None) if rcond is None else _of_values(K, lambda values: values > rcond)


@mistake("The cut-off acts on squared singular values.", replaces="_block_svd", breaks=("nlora.L17",))
def cut_off_of_squares(K, rcond):
    return right._block_svd(K, rcond if rcond is None else rcond**0.5)


@mistake("The singular values are not inverted: the core is the block's transpose.", replaces="_inverse", breaks=("nlora.L8c", "nlora.L5a"))
def transposed_for_inverted(K, rcond):
    return K.mT.contiguous()


@mistake("The inverse is transposed.", replaces="_inverse", breaks=("nlora.L8c", "nlora.L5a", "nlora.L5b"))
def inverse_transposed(K, rcond):
    return torch.linalg.pinv(K, rtol=rcond or 0.0).mT.contiguous()


@mistake("A hundredth is added to the block's diagonal before it is inverted.", replaces="_inverse", breaks=("nlora.L8c", "nlora.L5a"))
def block_regularised(K, rcond):
    return torch.linalg.pinv(K + 0.01 * torch.eye(len(K), dtype=K.dtype), rtol=rcond or 0.0)


@mistake("The inverse is computed in float32 and cast back.", replaces="_inverse", breaks=("nlora.L8c", "nlora.L5a"))
def inverse_in_float32(K, rcond):
    return torch.linalg.pinv(K.float(), rtol=rcond or 0.0).to(K.dtype)


# Nystroem's approximation


@mistake("The approximation has the block itself in the middle.", replaces="nystrom_approx", breaks=("nlora.L5a", "nlora.L5b", "nlora.L5c"))
def approximation_with_the_block(W0, *, rank, rcond=None, **options):
    R, K, C = right.landmark_blocks(W0, rank=rank, **options)
    return C @ K @ R


@mistake("The approximation lacks the core: columns times rows.", replaces="nystrom_approx", breaks=("nlora.L5a", "nlora.L5b", "nlora.L5c"))
def approximation_without_core(W0, *, rank, rcond=None, **options):
    R, _, C = right.landmark_blocks(W0, rank=rank, **options)
    return C @ R


@mistake(
    "The core is the best one for these rows and columns, not the block's inverse: it does not reproduce them.",
    replaces="nystrom_approx",
    breaks=("nlora.L5a", "nlora.L5b"),
)
def best_core_for_nystroem(W0, *, rank, rcond=None, **options):
    R, _, C = right.landmark_blocks(W0, rank=rank, **options)
    return C @ torch.linalg.pinv(C) @ W0 @ torch.linalg.pinv(R) @ R


@mistake("What the approximation misses comes back, not the approximation.", replaces="nystrom_approx", breaks=("nlora.L5a", "nlora.L5b"))
def residual_for_approximation(W0, *, rank, **options):
    return W0 - right.nystrom_approx(W0, rank=rank, **options)


@mistake(
    "Half of the approximation's core is missing: its symmetric part is taken.",
    replaces="nystrom_approx",
    breaks=("nlora.L5a", "nlora.L5b"),
)
def symmetric_core(W0, *, rank, rcond=None, **options):
    R, K, C = right.landmark_blocks(W0, rank=rank, **options)
    N = right._inverse(K, rcond)
    return C @ ((N + N.mT) / 2) @ R


@mistake(
    "In the derivation both sets of vectors are extended without the inverse of the singular values.",
    replaces="nystrom_from_svd",
    breaks=("nlora.L6",),
)
def extended_without_inverse(W0, *, rank, rcond=None, **options):
    R, K, C = right.landmark_blocks(W0, rank=rank, **options)
    U, values, Vh, _ = right._block_svd(K, rcond)
    return (C @ Vh.mT) * values @ (U.mT @ R)


@mistake("In the derivation the singular values in the middle are left out.", replaces="nystrom_from_svd", breaks=("nlora.L6",))
def middle_left_out(W0, *, rank, rcond=None, **options):
    R, K, C = right.landmark_blocks(W0, rank=rank, **options)
    U, _, Vh, inverse = right._block_svd(K, rcond)
    return (C @ Vh.mT) * inverse**2 @ (U.mT @ R)


@mistake("In the derivation the left and right singular vectors are exchanged.", replaces="nystrom_from_svd", breaks=("nlora.L6",))
def vectors_exchanged(W0, *, rank, rcond=None, **options):
    R, K, C = right.landmark_blocks(W0, rank=rank, **options)
    U, _, Vh, inverse = right._block_svd(K, rcond)
    return C @ U * inverse @ (Vh @ R)


@mistake(
    "The derivation extends nothing: outside of the landmark rows and columns it is zero.",
    replaces="nystrom_from_svd",
    breaks=("nlora.L6",),
)
def not_extended(W0, *, rank, rows=None, cols=None, **options):
    W_hat = right.nystrom_from_svd(W0, rank=rank, rows=rows, cols=cols, **options)
    kept = torch.zeros_like(W_hat)
    I, J = (torch.arange(rank) if k is None else k for k in (rows, cols))
    kept[I] = W_hat[I]
    kept[:, J] = W_hat[:, J]
    return kept


# The correction, the best core, exports


@mistake("The corrected weight lacks the update without its scaling.", replaces="base_weight", breaks=("nlora.L7b", "nlora.L14c"))
def base_without_scaling(W0, A, N, B, scaling):
    return W0 - B @ N @ A


@mistake("The corrected weight has the update added.", replaces="base_weight", breaks=("nlora.L7b", "nlora.L14c"))
def base_added(W0, A, N, B, scaling):
    return W0 + scaling * B @ N @ A


@mistake("The middle factor is left out of the correction.", replaces="base_weight", breaks=("nlora.L7b", "nlora.L14c"))
def base_without_N(W0, A, N, B, scaling):
    return W0 - scaling * B @ A


@mistake("The middle factor is transposed in the correction.", replaces="base_weight", breaks=("nlora.L7b", "nlora.L14c"))
def base_transposes_N(W0, A, N, B, scaling):
    return W0 - scaling * B @ N.mT @ A


@mistake("The correction is computed in float32 and cast back.", replaces="base_weight", breaks=("nlora.L7b",))
def base_in_float32(W0, A, N, B, scaling):
    return W0 - (scaling * B.float() @ N.float() @ A.float()).to(W0.dtype)


@mistake("The best middle factor is not divided by the scaling.", replaces="fit_core", breaks=("nlora.L10a", "nlora.L10b"))
def best_core_without_scaling(target, A, B, scaling):
    return right.fit_core(target, A, B, 1.0)


@mistake("The best middle factor is divided by the square of the scaling.", replaces="fit_core", breaks=("nlora.L10a", "nlora.L10b"))
def best_core_divided_twice(target, A, B, scaling):
    return right.fit_core(target, A, B, scaling) / scaling


@mistake(
    "A and B are taken as orthonormal: their transposes stand for their inverses.", replaces="fit_core", breaks=("nlora.L10a", "nlora.L10b")
)
def best_core_for_orthonormal(target, A, B, scaling):
    return B.mT @ target @ A.mT / scaling


@mistake("The best middle factor comes back transposed.", replaces="fit_core", breaks=("nlora.L10a",))
def best_core_transposed(target, A, B, scaling):
    return right.fit_core(target, A, B, scaling).mT.contiguous()


@mistake(
    "A hundredth of the identity is added to both Gram matrices: ridge regression.",
    replaces="fit_core",
    breaks=("nlora.L10a", "nlora.L10b"),
)
def best_core_by_ridge(target, A, B, scaling):
    small = 0.01 * torch.eye(len(A), dtype=A.dtype)
    left = torch.linalg.solve(B.mT @ B + small, B.mT @ target @ A.mT)
    return torch.linalg.solve(A @ A.mT + small, left, left=False) / scaling


@mistake("The exported B lacks the middle factor.", replaces="export", breaks=("nlora.L14b",))
def export_without_N(A, N, B):
    return lora.Factors(A, B.clone())


@mistake("The middle factor is transposed in the exported B.", replaces="export", breaks=("nlora.L14b",))
def export_transposes_N(A, N, B):
    return lora.Factors(A, B @ N.mT)


@mistake("The middle factor is folded into both exported factors.", replaces="export", breaks=("nlora.L14b",))
def export_folds_twice(A, N, B):
    return lora.Factors(N @ A, B @ N)


@mistake("The middle factor is folded into A, not into B.", replaces="export", harmless="The product, which is the adapter, is the same.")
def export_folds_into_A(A, N, B):
    return lora.Factors(N @ A, B.clone())


@mistake("The exported residual adapter adds the start where it has to take it off.", replaces="export_residual", breaks=("nlora.L14c",))
def export_adds_the_start(A, N, B, A0, N0, B0):
    return torch.cat([A, A0]), torch.cat([B @ N, B0 @ N0], dim=1)


@mistake("The exported residual adapter forgets the start's middle factor.", replaces="export_residual", breaks=("nlora.L14c",))
def export_forgets_N0(A, N, B, A0, N0, B0):
    return torch.cat([A, A0]), torch.cat([B @ N, -B0], dim=1)


@mistake(
    "The trained middle factor stands for the start's in the exported residual adapter.", replaces="export_residual", breaks=("nlora.L14c",)
)
def export_uses_N_twice(A, N, B, A0, N0, B0):
    return torch.cat([A, A0]), torch.cat([B @ N, -B0 @ N], dim=1)


@mistake("The halves of the exported residual adapter are paired wrongly.", replaces="export_residual", breaks=("nlora.L14c",))
def export_paired_wrongly(A, N, B, A0, N0, B0):
    return torch.cat([A0, A]), torch.cat([B @ N, -B0 @ N0], dim=1)


@mistake(
    "The exported adapter is the difference of the factors, in LoRA's rank twice: (B N - B0 N0) with A - A0.",
    replaces="export_residual",
    breaks=("nlora.L14c",),
)
def export_of_differences(A, N, B, A0, N0, B0):
    return torch.cat([A - A0, 0 * A0]), torch.cat([B @ N - B0 @ N0, 0 * B0], dim=1)


# Counting


@mistake("The entries of the middle factor are not counted.", replaces="num_trainable", breaks=("nlora.L14e",))
def N_not_counted(W0, *, rank, method="nlora"):
    return rank * rank if method == "inttune" else rank * sum(W0.shape)


@mistake("IntTune's frozen factors are counted.", replaces="num_trainable", breaks=("nlora.L14e",))
def frozen_factors_counted(W0, *, rank, method="nlora"):
    return rank * sum(W0.shape) + rank * rank * (method != "lora")


@mistake("Only the diagonal of the middle factor is counted.", replaces="num_trainable", breaks=("nlora.L14e",))
def diagonal_counted(W0, *, rank, method="nlora"):
    return rank * sum(W0.shape) * (method != "inttune") + rank * (method != "lora")


@mistake("Unless told otherwise IntTune's numbers are counted.", replaces="num_trainable", breaks=("nlora.L14e",))
def counts_inttune_by_default(W0, *, rank, method="inttune"):
    return right.num_trainable(W0, rank=rank, method=method)
