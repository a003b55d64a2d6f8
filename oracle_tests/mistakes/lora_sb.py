"""Plausible mistakes in LoRA-SB. The functions keep the reference's parameters; what is not named stands in `options`."""

import numpy as np
import torch

from loracle.oracle_tests.mistakes import Observables, mistake
from loracle.reference import lora_sb as right
from loracle.reference.lora_sb import Factors, Weights


def _gradient(case):
    """A gradient with an entry that is zero."""
    G = np.random.default_rng(case.number).standard_normal((case.out, case.sizes["in"]))
    G[0, 1] = 0
    return case.rounded(G)


def _sketch(case):
    return np.random.default_rng(case.number).standard_normal((case.sizes["in"], min(case.rank + 1, case.small)))


def _batches(case):
    return np.split(np.arange(12), [2, 5])


def _gradient_of_a_batch(case):
    """The gradient of the logistic loss of some of twelve samples, of which some weigh much more than others."""
    rng = np.random.default_rng(case.number)
    X, Y = rng.standard_normal((12, case.sizes["in"])), rng.choice([-1.0, 1.0], (12, case.out))
    size = 1.0 + np.arange(12)
    return lambda W, rows: (-Y[rows] / (1 + np.exp(Y[rows] * (X[rows] @ W.T)))).T @ (size[rows, None] * X[rows]) / len(rows)


def _free_of_signs(case, factors):
    """A'A, BB', the singular values of R, and the product: how the three are paired."""
    A, R, B = factors
    return {"A'A": A.T @ A, "BB'": B @ B.T, "R": np.linalg.svd(R, compute_uv=False), "product": B @ R @ A}


def _free_of_signs_with_weight(case, weights):
    W0, *factors = weights
    return {"W0": W0, **_free_of_signs(case, factors)}


def _spaces_and_draw(case, factors):
    """A'A, BB' and BA, and R apart, which is drawn."""
    A, R, B = factors
    return {"A'A": A.T @ A, "BB'": B @ B.T, "BA": B @ A, "R": R}


OBSERVABLES = Observables(
    choices={"optimizer": ("adamw", "sgd"), "gradient": ("optimal", "plain")},
    values={"sketch": _sketch, "niter": 1, "batches": _batches, "grad": _gradient_of_a_batch, "G": _gradient},
    gauge_free={"init": _free_of_signs, "init_weights": _free_of_signs_with_weight, "init_xs": _spaces_and_draw},
)


# The first update


@mistake(
    "The first update lacks its minus sign: training starts uphill.",
    replaces="first_step_update",
    breaks=("lora_sb.L10a", "lora_sb.L10b", "lora_sb.L11a", "lora_sb.L11b", "lora_sb.L8e"),
)
def update_without_minus(G, *, lr, **options):
    return -right.first_step_update(G, lr=lr, **options)


@mistake(
    "The first update is the raw gradient with a positive sign and without the learning rate (MyTransformers).",
    replaces="first_step_update",
    breaks=("lora_sb.L10a", "lora_sb.L10b", "lora_sb.L11a", "lora_sb.L11b", "lora_sb.L8e"),
)
def update_is_the_gradient(G, *, lr, **options):
    return G.clone()


@mistake(
    "The raw gradient stands where AdamW's first step has its sign.", replaces="first_step_update", breaks=("lora_sb.L10a", "lora_sb.L11a")
)
def raw_for_adamw(G, *, lr, optimizer="adamw", adam_eps=0.0):
    return -lr * G


@mistake(
    "The sign of the gradient stands where gradient descent has the gradient itself.",
    replaces="first_step_update",
    breaks=("lora_sb.L10b", "lora_sb.L11a", "lora_sb.L11b", "lora_sb.L11c"),
)
def sign_for_sgd(G, *, lr, optimizer="adamw", adam_eps=0.0):
    return right.first_step_update(G, lr=lr, adam_eps=adam_eps if optimizer == "adamw" else 0.0)


@mistake(
    "The two optimizers are exchanged.",
    replaces="first_step_update",
    breaks=("lora_sb.L10a", "lora_sb.L10b", "lora_sb.L11a", "lora_sb.L11b"),
)
def optimizers_exchanged(G, *, lr, optimizer="adamw", adam_eps=0.0):
    return right.first_step_update(G, lr=lr, optimizer="sgd" if optimizer == "adamw" else "adamw", adam_eps=adam_eps)


@mistake("Gradient descent is the default.", replaces="first_step_update", breaks=("lora_sb.L10a",))
def sgd_by_default(G, *, lr, optimizer="sgd", adam_eps=0.0):
    return right.first_step_update(G, lr=lr, optimizer=optimizer, adam_eps=adam_eps)


@mistake(
    "The learning rate is left out of the first update.",
    replaces="first_step_update",
    breaks=("lora_sb.L10a", "lora_sb.L10b", "lora_sb.L11a", "lora_sb.L11b"),
)
def update_without_learning_rate(G, *, lr, **options):
    return right.first_step_update(G, lr=1.0, **options)


@mistake("AdamW's epsilon is ignored.", replaces="first_step_update", breaks=("lora_sb.L10a", "lora_sb.L11a"))
def epsilon_ignored(G, *, lr, optimizer="adamw", adam_eps=0.0):
    return right.first_step_update(G, lr=lr, optimizer=optimizer)


@mistake(
    "AdamW's epsilon stands under the root, beside the square of the gradient.",
    replaces="first_step_update",
    breaks=("lora_sb.L10a", "lora_sb.L11a"),
)
def epsilon_under_the_root(G, *, lr, optimizer="adamw", adam_eps=0.0):
    if optimizer == "sgd" or adam_eps == 0:
        return right.first_step_update(G, lr=lr, optimizer=optimizer)
    return -lr * G / (G.square() + adam_eps).sqrt()


@mistake(
    "AdamW's moments are not corrected for their start at zero: the first step is 3.16 times as long.",
    replaces="first_step_update",
    breaks=("lora_sb.L10a", "lora_sb.L11a"),
)
def moments_not_corrected(G, *, lr, optimizer="adamw", adam_eps=0.0):
    if optimizer == "sgd":
        return right.first_step_update(G, lr=lr, optimizer=optimizer)
    m, v = 0.1 * G, 0.001 * G.square()
    return torch.where(G == 0, G, -lr * m / (v.sqrt() + adam_eps))


@mistake("Entries where the gradient is zero move too, as if its sign were plus.", replaces="first_step_update", breaks=("lora_sb.L10a",))
def zero_has_a_sign(G, *, lr, optimizer="adamw", adam_eps=0.0):
    if optimizer == "sgd" or adam_eps > 0:
        return right.first_step_update(G, lr=lr, optimizer=optimizer, adam_eps=adam_eps)
    return lr * (1 - 2 * (G >= 0).to(G.dtype))


# The estimate of the gradient


def _batch_gradients(grad, W0, batches):
    return torch.stack([grad(W0, batch) for batch in batches])


@mistake(
    "The average of the batches' updates is taken, not the update of their average.", replaces="estimate_update", breaks=("lora_sb.L11a",)
)
def average_of_updates(grad, W0, batches, *, lr, **options):
    updates = [right.first_step_update(G, lr=lr, **options) for G in _batch_gradients(grad, W0, batches)]
    return torch.stack(updates).mean(dim=0)


@mistake(
    "The gradients are summed over the batches, not averaged.",
    replaces="estimate_update",
    breaks=("lora_sb.L11a", "lora_sb.L11b", "lora_sb.L11c"),
)
def gradients_summed(grad, W0, batches, *, lr, **options):
    return right.first_step_update(_batch_gradients(grad, W0, batches).sum(dim=0), lr=lr, **options)


@mistake(
    "The mean over the batches is divided by their number once more (the official code, where the sign hides it).",
    replaces="estimate_update",
    breaks=("lora_sb.L11a", "lora_sb.L11b", "lora_sb.L11c"),
)
def divided_twice(grad, W0, batches, *, lr, **options):
    gradients = _batch_gradients(grad, W0, batches)
    return right.first_step_update(gradients.mean(dim=0) / len(gradients), lr=lr, **options)


@mistake(
    "Only the last batch counts: the gradients are overwritten, not accumulated.",
    replaces="estimate_update",
    breaks=("lora_sb.L11a", "lora_sb.L11b", "lora_sb.L11c"),
)
def last_batch_only(grad, W0, batches, *, lr, **options):
    return right.first_step_update(_batch_gradients(grad, W0, batches)[-1], lr=lr, **options)


@mistake("Only the first batch is read.", replaces="estimate_update", breaks=("lora_sb.L11a", "lora_sb.L11b", "lora_sb.L11c"))
def first_batch_only(grad, W0, batches, *, lr, **options):
    return right.first_step_update(_batch_gradients(grad, W0, batches)[0], lr=lr, **options)


@mistake("The weight moves between the batches.", replaces="estimate_update", breaks=("lora_sb.L11a", "lora_sb.L11b"))
def weight_moves_between_batches(grad, W0, batches, *, lr, optimizer="adamw", adam_eps=0.0):
    W, gradients = W0, []
    for batch in batches:
        gradients.append(grad(W, batch))
        W = W - lr * gradients[-1]
    return right.first_step_update(torch.stack(gradients).mean(dim=0), lr=lr, optimizer=optimizer, adam_eps=adam_eps)


@mistake(
    "The options of the optimizer are ignored: it is always AdamW without epsilon.",
    replaces="estimate_update",
    breaks=("lora_sb.L11a", "lora_sb.L11b", "lora_sb.L11c"),
)
def estimate_ignores_the_optimizer(grad, W0, batches, *, lr, optimizer="adamw", adam_eps=0.0):
    return right.estimate_update(grad, W0, batches, lr=lr)


@mistake("The gradients are summed in bfloat16.", replaces="estimate_update", breaks=("lora_sb.L11a", "lora_sb.L11b", "lora_sb.L11c"))
def summed_in_bfloat16(grad, W0, batches, *, lr, **options):
    total = 0 * W0.bfloat16()
    gradients = _batch_gradients(grad, W0, batches)
    for G in gradients:
        total = total + G.bfloat16()
    return right.first_step_update(total.to(W0.dtype) / len(gradients), lr=lr, **options)


# The start


@mistake(
    "R holds the singular values, not divided by the scaling.",
    replaces="init",
    breaks=("lora_sb.L8a", "lora_sb.L8d", "lora_sb.L17a", "lora_sb.L17b", "lora_sb.L8b", "lora_sb.L13"),
)
def R_not_divided(update, scaling=1.0, *, rank, **options):
    A, R, B = right.init(update, scaling, rank=rank, **options)
    return Factors(A, scaling * R, B)


@mistake(
    "R is divided by the square of the scaling.", replaces="init", breaks=("lora_sb.L8a", "lora_sb.L8d", "lora_sb.L17a", "lora_sb.L17b")
)
def R_divided_twice(update, scaling=1.0, *, rank, **options):
    A, R, B = right.init(update, scaling, rank=rank, **options)
    return Factors(A, R / scaling, B)


@mistake(
    "The roots of the singular values go to A and B, and R is the identity over the scaling.",
    replaces="init",
    breaks=("lora_sb.L7", "lora_sb.L8a", "lora_sb.L17a", "lora_sb.L17b"),
)
def roots_in_the_factors(update, scaling=1.0, *, rank, **options):
    A, R, B = right.init(update, scaling, rank=rank, **options)
    roots = (scaling * R.diagonal()).sqrt()
    return Factors(roots[:, None] * A, torch.eye(rank, dtype=R.dtype, device=R.device) / scaling, B * roots)


@mistake(
    "The singular values go to B, as in LoRA-XS, and R is the identity over the scaling.",
    replaces="init",
    breaks=("lora_sb.L7", "lora_sb.L8a", "lora_sb.L17a", "lora_sb.L17b"),
)
def values_in_B(update, scaling=1.0, *, rank, **options):
    A, R, B = right.init(update, scaling, rank=rank, **options)
    return Factors(A, torch.eye(rank, dtype=R.dtype, device=R.device) / scaling, B * (scaling * R.diagonal()))


@mistake(
    "The singular values go to A, and R is the identity over the scaling.",
    replaces="init",
    breaks=("lora_sb.L7", "lora_sb.L8a", "lora_sb.L17a", "lora_sb.L17b"),
)
def values_in_A(update, scaling=1.0, *, rank, **options):
    A, R, B = right.init(update, scaling, rank=rank, **options)
    return Factors((scaling * R.diagonal())[:, None] * A, torch.eye(rank, dtype=R.dtype, device=R.device) / scaling, B)


@mistake(
    "R starts at zero: the subspaces are there, the first step is not.",
    replaces="init",
    breaks=("lora_sb.L8a", "lora_sb.L8c", "lora_sb.L8d", "lora_sb.L17a"),
)
def R_starts_at_zero(update, scaling=1.0, *, rank, **options):
    A, R, B = right.init(update, scaling, rank=rank, **options)
    return Factors(A, 0 * R, B)


@mistake(
    "R starts at the identity: the singular values are dropped.",
    replaces="init",
    breaks=("lora_sb.L8a", "lora_sb.L8c", "lora_sb.L8d", "lora_sb.L17a"),
)
def R_starts_at_the_identity(update, scaling=1.0, *, rank, **options):
    A, R, B = right.init(update, scaling, rank=rank, **options)
    return Factors(A, torch.eye(rank, dtype=R.dtype, device=R.device) / scaling, B)


@mistake(
    "R holds the squares of the singular values: an eigendecomposition of the Gram matrix without the root.",
    replaces="init",
    breaks=("lora_sb.L8a", "lora_sb.L8c", "lora_sb.L8d", "lora_sb.L17a"),
)
def squares_in_R(update, scaling=1.0, *, rank, **options):
    A, R, B = right.init(update, scaling, rank=rank, **options)
    return Factors(A, scaling * R @ R, B)


@mistake("The smallest singular triplets are taken.", replaces="init", breaks=("lora_sb.L8a", "lora_sb.L8c", "lora_sb.L8d", "lora_sb.L17a"))
def smallest_triplets(update, scaling=1.0, *, rank, **options):
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    return Factors(Vh[-rank:].contiguous(), torch.diag(S[-rank:] / scaling), U[:, -rank:].contiguous())


@mistake(
    "The decomposition is of the transposed update and is not turned back: A and B have each other's sides.",
    replaces="init",
    breaks=("lora_sb.L7", "lora_sb.L8a", "lora_sb.L8c", "lora_sb.L8d"),
)
def transpose_not_undone(update, scaling=1.0, *, rank, **options):
    return right.init(update.mT, scaling, rank=rank)


@mistake(
    "The singular values are in rising order in R, their vectors in falling order.",
    replaces="init",
    breaks=("lora_sb.L8c", "lora_sb.L8d", "lora_sb.L17a", "lora_sb.L17b"),
)
def values_in_reverse(update, scaling=1.0, *, rank, **options):
    A, R, B = right.init(update, scaling, rank=rank, **options)
    return Factors(A, R.flip(0).flip(1), B)


@mistake(
    "The decomposition is done in float32 and cast back.",
    replaces="init",
    breaks=("lora_sb.L7", "lora_sb.L8a", "lora_sb.L8c", "lora_sb.L8d"),
)
def init_in_float32(update, scaling=1.0, *, rank, sketch=None, **options):
    short = {} if sketch is None else {"sketch": sketch.float()}
    A, R, B = right.init(update.float(), scaling, rank=rank, **short, **options)
    return Factors(A.to(update.dtype), R.to(update.dtype), B.to(update.dtype))


@mistake(
    "The factors are kept in bfloat16, as the official code casts them: they are no longer orthonormal.",
    replaces="init",
    breaks=("lora_sb.L7", "lora_sb.L8a", "lora_sb.L8c", "lora_sb.L8d"),
)
def factors_in_bfloat16(update, scaling=1.0, *, rank, **options):
    A, R, B = right.init(update, scaling, rank=rank, **options)
    return Factors(A.bfloat16().to(A.dtype), R, B.bfloat16().to(B.dtype))


@mistake("Without an argument the scaling of the start is 2, as for alpha = 2 rank.", replaces="init", breaks=("lora_sb.L8c",))
def default_scaling_of_the_start(update, scaling=2.0, *, rank, **options):
    return right.init(update, scaling, rank=rank, **options)


@mistake("W0 is corrected by what the start adds, as in LoRA-GA and PiSSA.", replaces="init_weights", breaks=("lora_sb.L8d", "lora_sb.L14"))
def base_corrected(W0, update, scaling=1.0, *, rank):
    _, A, R, B = right.init_weights(W0, update, scaling, rank=rank)
    return Weights(W0 - right.delta_weight(A, R, B, scaling), A, R, B)


@mistake("The whole first update is added to W0 as well: its best part counts twice.", replaces="init_weights", breaks=("lora_sb.L8d",))
def base_moved_along(W0, update, scaling=1.0, *, rank):
    _, A, R, B = right.init_weights(W0, update, scaling, rank=rank)
    return Weights(W0 + update, A, R, B)


@mistake("The part of the first update that the start misses is added to W0.", replaces="init_weights", breaks=("lora_sb.L8d",))
def base_takes_the_rest(W0, update, scaling=1.0, *, rank):
    _, A, R, B = right.init_weights(W0, update, scaling, rank=rank)
    return Weights(W0 + update - right.delta_weight(A, R, B, scaling), A, R, B)


@mistake("The start is made for s = 1 whatever the scaling.", replaces="init_weights", breaks=("lora_sb.L8d",))
def weights_ignore_the_scaling(W0, update, scaling=1.0, *, rank):
    return right.init_weights(W0, update, rank=rank)


# The randomised decomposition


@mistake("The randomised decomposition does no iterations.", replaces="init", breaks=("lora_sb.L17b", "lora_sb.L17c"))
def iterations_left_out(update, scaling=1.0, *, rank, sketch=None, niter=10):
    return right.init(update, scaling, rank=rank, sketch=sketch, niter=0)


@mistake("The randomised decomposition always does ten iterations.", replaces="init", breaks=("lora_sb.L17b",))
def iterations_ignored(update, scaling=1.0, *, rank, sketch=None, niter=10):
    return right.init(update, scaling, rank=rank, sketch=sketch)


@mistake("The randomised decomposition does two iterations by default, as torch.svd_lowrank.", replaces="init", breaks=("lora_sb.L17c",))
def two_iterations(update, scaling=1.0, *, rank, sketch=None, niter=2):
    return right.init(update, scaling, rank=rank, sketch=sketch, niter=niter)


@mistake("The sketch is ignored: the decomposition is exact.", replaces="init", breaks=("lora_sb.L17b", "lora_sb.L17c"))
def sketch_ignored(update, scaling=1.0, *, rank, sketch=None, niter=10):
    return right.init(update, scaling, rank=rank)


@mistake("The sketch has the output side.", replaces="draw_sketch", breaks=("lora_sb.L17d",))
def sketch_of_the_output_side(update, *, rank, generator=None):
    return right.draw_sketch(update.mT, rank=rank, generator=generator)


@mistake("The sketch is uniform.", replaces="draw_sketch", breaks=("lora_sb.L17d",))
def uniform_sketch(update, *, rank, generator=None):
    return 12**0.5 * (torch.rand(update.shape[1], rank, generator=generator, dtype=update.dtype, device=update.device) - 0.5)


@mistake("The sketch is divided by the root of the rank.", replaces="draw_sketch", breaks=("lora_sb.L17d",))
def sketch_over_root(update, *, rank, generator=None):
    return right.draw_sketch(update, rank=rank, generator=generator) / rank**0.5


@mistake("The sketch ignores its generator: every draw is the same.", replaces="draw_sketch", breaks=("lora_sb.L17d",))
def sketch_ignores_the_generator(update, *, rank, generator=None):
    return right.draw_sketch(update, rank=rank, generator=torch.Generator(update.device).manual_seed(0))


# The baseline LoRA-XS


@mistake("In LoRA-XS the singular values stand in A, not in B.", replaces="init_xs", breaks=("lora_sb.L16a",))
def xs_values_in_A(W0, *, rank, **options):
    A, R, B = right.init_xs(W0, rank=rank, **options)
    values = B.norm(dim=0)
    return Factors(values[:, None] * A, R, B / values)


@mistake("In LoRA-XS both factors have the roots of the singular values.", replaces="init_xs", breaks=("lora_sb.L16a",))
def xs_roots(W0, *, rank, **options):
    A, R, B = right.init_xs(W0, rank=rank, **options)
    roots = B.norm(dim=0).sqrt()
    return Factors(roots[:, None] * A, R, B / roots)


@mistake("In LoRA-XS the singular values are dropped.", replaces="init_xs", breaks=("lora_sb.L16a",))
def xs_without_values(W0, *, rank, **options):
    A, R, B = right.init_xs(W0, rank=rank, **options)
    return Factors(A, R, B / B.norm(dim=0))


@mistake("In LoRA-XS R starts at zero.", replaces="init_xs", breaks=("lora_sb.L16b",))
def xs_at_zero(W0, *, rank, **options):
    A, R, B = right.init_xs(W0, rank=rank, **options)
    return Factors(A, 0 * R, B)


@mistake("In LoRA-XS sigma is the variance of R, not its width.", replaces="init_xs", breaks=("lora_sb.L16b",))
def xs_sigma_is_the_variance(W0, *, rank, sigma=1e-5, generator=None):
    return right.init_xs(W0, rank=rank, sigma=sigma**0.5, generator=generator)


@mistake("In LoRA-XS R is uniform.", replaces="init_xs", breaks=("lora_sb.L16a", "lora_sb.L16b"))
def xs_uniform(W0, *, rank, sigma=1e-5, generator=None):
    A, R, B = right.init_xs(W0, rank=rank, generator=torch.Generator(W0.device))
    return Factors(A, sigma * 12**0.5 * (torch.rand(rank, rank, generator=generator, dtype=R.dtype, device=R.device) - 0.5), B)


@mistake("In LoRA-XS the generator is ignored.", replaces="init_xs", breaks=("lora_sb.L16b",))
def xs_ignores_the_generator(W0, *, rank, sigma=1e-5, generator=None):
    return right.init_xs(W0, rank=rank, sigma=sigma, generator=torch.Generator(W0.device).manual_seed(0))


@mistake("In LoRA-XS sigma is 1e-2 by default.", replaces="init_xs", breaks=("lora_sb.L16b",))
def xs_default_sigma(W0, *, rank, sigma=1e-2, generator=None):
    return right.init_xs(W0, rank=rank, sigma=sigma, generator=generator)


# The layer


@mistake(
    "R enters the forward transposed: invisible at the start, where it is diagonal.",
    replaces="forward",
    breaks=("lora_sb.L1b", "lora_sb.L1c"),
)
def forward_with_R_transposed(x, W0, A, R, B, scaling, *, bias=None):
    return right.forward(x, W0, A, R.mT, B, scaling, bias=bias)


def _merge_transposed(W0, A, R, B, scaling):
    return right.merge(W0, A, R.mT, B, scaling)


def _delta_transposed(A, R, B, scaling):
    return right.delta_weight(A, R.mT, B, scaling)


@mistake(
    "R is transposed throughout: in forward, update and merged weight alike.",
    replaces="forward",
    also={"delta_weight": _delta_transposed, "merge": _merge_transposed},
    breaks=("lora_sb.L1b", "lora_sb.L1d", "lora_sb.L1e", "lora_sb.L2a"),
)
def R_transposed_throughout(x, W0, A, R, B, scaling, *, bias=None):
    return right.forward(x, W0, A, R.mT, B, scaling, bias=bias)


@mistake("R enters the update transposed.", replaces="delta_weight", breaks=("lora_sb.L1e", "lora_sb.L2a"))
def delta_with_R_transposed(A, R, B, scaling):
    return right.delta_weight(A, R.mT, B, scaling)


@mistake("R enters the merged weight transposed.", replaces="merge", breaks=("lora_sb.L1c", "lora_sb.L1d"))
def merge_with_R_transposed(W0, A, R, B, scaling):
    return right.merge(W0, A, R.mT, B, scaling)


@mistake("The forward lacks the scaling.", replaces="forward", breaks=("lora_sb.L1b", "lora_sb.L1c"))
def forward_without_scaling(x, W0, A, R, B, scaling, *, bias=None):
    return right.forward(x, W0, A, R, B, 1.0, bias=bias)


@mistake("The forward applies the scaling twice.", replaces="forward", breaks=("lora_sb.L1b", "lora_sb.L1c"))
def forward_scaled_twice(x, W0, A, R, B, scaling, *, bias=None):
    return right.forward(x, W0, A, R, B, scaling**2, bias=bias)


@mistake("The forward leaves R out, as if it were LoRA's.", replaces="forward", breaks=("lora_sb.L1b", "lora_sb.L1c"))
def forward_without_R(x, W0, A, R, B, scaling, *, bias=None):
    return right.forward(x, W0, A, torch.eye(len(R), dtype=R.dtype, device=R.device), B, scaling, bias=bias)


@mistake("The bias is left out.", replaces="forward", breaks=("lora_sb.L1b", "lora_sb.L1c"))
def forward_without_bias(x, W0, A, R, B, scaling, *, bias=None):
    return right.forward(x, W0, A, R, B, scaling)


@mistake("The bias is scaled with the adapter.", replaces="forward", breaks=("lora_sb.L1b", "lora_sb.L1c"))
def forward_scales_the_bias(x, W0, A, R, B, scaling, *, bias=None):
    return right.forward(x, W0, A, R, B, scaling, bias=None if bias is None else scaling * bias)


@mistake("The frozen path is dropped.", replaces="forward", breaks=("lora_sb.L1b", "lora_sb.L1c"))
def forward_drops_the_base(x, W0, A, R, B, scaling, *, bias=None):
    return right.forward(x, 0 * W0, A, R, B, scaling, bias=bias)


@mistake("The layer computes in float32 inside and casts back.", replaces="forward", breaks=("lora_sb.L1b", "lora_sb.L1c"))
def forward_in_float32(x, W0, A, R, B, scaling, *, bias=None):
    short = [t.float() for t in (x, W0, A, R, B)]
    return right.forward(*short, scaling, bias=None if bias is None else bias.float()).to(x.dtype)


@mistake("The update lacks the scaling.", replaces="delta_weight", breaks=("lora_sb.L1e", "lora_sb.L2a", "lora_sb.L8b"))
def delta_without_scaling(A, R, B, scaling):
    return right.delta_weight(A, R, B, 1.0)


@mistake("The merged weight lacks the scaling.", replaces="merge", breaks=("lora_sb.L1c", "lora_sb.L1d"))
def merge_without_scaling(W0, A, R, B, scaling):
    return right.merge(W0, A, R, B, 1.0)


@mistake("The update is subtracted in merging.", replaces="merge", breaks=("lora_sb.L1c", "lora_sb.L1d"))
def merge_subtracts(W0, A, R, B, scaling):
    return W0 - right.delta_weight(A, R, B, scaling)


@mistake("The merged weight leaves R out: W0 + s B A.", replaces="merge", breaks=("lora_sb.L1c", "lora_sb.L1d"))
def merge_without_R(W0, A, R, B, scaling):
    return W0 + scaling * (B @ A)


@mistake("The merged weight is the update alone.", replaces="merge", breaks=("lora_sb.L1c", "lora_sb.L1d"))
def merge_drops_the_base(W0, A, R, B, scaling):
    return right.delta_weight(A, R, B, scaling)


# Gradients


@mistake("The gradient of R lacks the scaling.", replaces="gradients", breaks=("lora_sb.L1a", "lora_sb.L4", "lora_sb.L12a"))
def gradient_without_scaling(G, A, B, scaling):
    return right.gradients(G, A, B, 1.0)


@mistake("The gradient of R has the scaling squared.", replaces="gradients", breaks=("lora_sb.L1a", "lora_sb.L4", "lora_sb.L12a"))
def gradient_scaled_twice(G, A, B, scaling):
    return right.gradients(G, A, B, scaling**2)


@mistake("The gradient of R comes back transposed.", replaces="gradients", breaks=("lora_sb.L1a", "lora_sb.L4", "lora_sb.L12a"))
def gradient_transposed(G, A, B, scaling):
    return right.gradients(G, A, B, scaling).mT


@mistake("Only the diagonal of R gets a gradient.", replaces="gradients", breaks=("lora_sb.L1a", "lora_sb.L4", "lora_sb.L12a"))
def gradient_of_the_diagonal(G, A, B, scaling):
    return torch.diag(right.gradients(G, A, B, scaling).diagonal())


@mistake(
    "Back-propagation's gradient is already divided by the square of the scaling.",
    replaces="gradients",
    breaks=("lora_sb.L1a", "lora_sb.L4", "lora_sb.L12a"),
)
def gradient_already_divided(G, A, B, scaling):
    return right.gradients(G, A, B, scaling) / scaling**2


@mistake("The equivalent gradient lacks the scaling.", replaces="equivalent_gradient", breaks=("lora_sb.L2a", "lora_sb.L2b"))
def equivalent_without_scaling(grad_R, A, B, scaling):
    return right.equivalent_gradient(grad_R, A, B, 1.0)


@mistake("The equivalent gradient has the scaling squared.", replaces="equivalent_gradient", breaks=("lora_sb.L2a", "lora_sb.L2b"))
def equivalent_scaled_twice(grad_R, A, B, scaling):
    return right.equivalent_gradient(grad_R, A, B, scaling**2)


@mistake("The equivalent gradient divides by the scaling.", replaces="equivalent_gradient", breaks=("lora_sb.L2a", "lora_sb.L2b"))
def equivalent_divided(grad_R, A, B, scaling):
    return right.equivalent_gradient(grad_R, A, B, 1 / scaling)


@mistake("The equivalent gradient has the step of R transposed.", replaces="equivalent_gradient", breaks=("lora_sb.L2a", "lora_sb.L2b"))
def equivalent_transposed(grad_R, A, B, scaling):
    return right.equivalent_gradient(grad_R.mT, A, B, scaling)


# The optimal gradient


@mistake(
    "The optimal gradient divides by s, not by its square.",
    replaces="optimal_gradient",
    breaks=("lora_sb.L3a", "lora_sb.L4", "lora_sb.L9", "lora_sb.L12a", "lora_sb.L3b", "lora_sb.L5", "lora_sb.L13"),
)
def optimum_over_s(grad_R, A, B, scaling):
    return scaling * right.optimal_gradient(grad_R, A, B, scaling)


@mistake(
    "The optimal gradient lacks the scaling.",
    replaces="optimal_gradient",
    breaks=("lora_sb.L3a", "lora_sb.L4", "lora_sb.L9", "lora_sb.L12a", "lora_sb.L5"),
)
def optimum_without_scaling(grad_R, A, B, scaling):
    return right.optimal_gradient(grad_R, A, B, 1.0)


@mistake(
    "The optimal gradient multiplies by the square of s.",
    replaces="optimal_gradient",
    breaks=("lora_sb.L3a", "lora_sb.L4", "lora_sb.L9", "lora_sb.L12a"),
)
def optimum_times_square(grad_R, A, B, scaling):
    return right.optimal_gradient(grad_R, A, B, 1 / scaling)


@mistake(
    "The two inverse Gram matrices are exchanged.",
    replaces="optimal_gradient",
    breaks=("lora_sb.L3a", "lora_sb.L4", "lora_sb.L12a", "lora_sb.L3b", "lora_sb.L6"),
)
def grams_exchanged(grad_R, A, B, scaling):
    return torch.linalg.inv(A @ A.mT) @ grad_R @ torch.linalg.inv(B.mT @ B) / scaling**2


@mistake(
    "Both inverse Gram matrices stand on the left.",
    replaces="optimal_gradient",
    breaks=("lora_sb.L3a", "lora_sb.L4", "lora_sb.L12a", "lora_sb.L6"),
)
def grams_on_one_side(grad_R, A, B, scaling):
    return torch.linalg.inv(B.mT @ B) @ torch.linalg.inv(A @ A.mT) @ grad_R / scaling**2


@mistake(
    "Only B's Gram matrix is inverted, A's is left out.", replaces="optimal_gradient", breaks=("lora_sb.L3a", "lora_sb.L4", "lora_sb.L12a")
)
def gram_of_A_left_out(grad_R, A, B, scaling):
    return torch.linalg.inv(B.mT @ B) @ grad_R / scaling**2


@mistake(
    "Only A's Gram matrix is inverted, B's is left out.", replaces="optimal_gradient", breaks=("lora_sb.L3a", "lora_sb.L4", "lora_sb.L12a")
)
def gram_of_B_left_out(grad_R, A, B, scaling):
    return grad_R @ torch.linalg.inv(A @ A.mT) / scaling**2


@mistake(
    "The Gram matrices are left out, as if every A and B were orthonormal.",
    replaces="optimal_gradient",
    breaks=("lora_sb.L3a", "lora_sb.L4", "lora_sb.L12a", "lora_sb.L6"),
)
def grams_left_out(grad_R, A, B, scaling):
    return grad_R / scaling**2


@mistake(
    "Back-propagation's gradient is taken for the optimal one, whatever A, B and s.",
    replaces="optimal_gradient",
    breaks=("lora_sb.L3a", "lora_sb.L4", "lora_sb.L9", "lora_sb.L12a"),
)
def optimum_is_back_propagation(grad_R, A, B, scaling):
    return grad_R.clone()


@mistake(
    "The Gram matrices multiply, not their inverses.", replaces="optimal_gradient", breaks=("lora_sb.L3a", "lora_sb.L4", "lora_sb.L12a")
)
def grams_not_inverted(grad_R, A, B, scaling):
    return (B.mT @ B) @ grad_R @ (A @ A.mT) / scaling**2


@mistake(
    "The Gram matrices get 1e-4 on their diagonals before they are inverted.",
    replaces="optimal_gradient",
    breaks=("lora_sb.L3a", "lora_sb.L4", "lora_sb.L9", "lora_sb.L12a"),
)
def grams_with_jitter(grad_R, A, B, scaling):
    jitter = 1e-4 * torch.eye(len(grad_R), dtype=A.dtype, device=A.device)
    return torch.linalg.inv(B.mT @ B + jitter) @ grad_R @ torch.linalg.inv(A @ A.mT + jitter) / scaling**2


@mistake(
    "The Gram matrices are inverted in float32.",
    replaces="optimal_gradient",
    breaks=("lora_sb.L3a", "lora_sb.L4", "lora_sb.L9", "lora_sb.L12a"),
)
def optimum_in_float32(grad_R, A, B, scaling):
    return right.optimal_gradient(grad_R.float(), A.float(), B.float(), scaling).to(grad_R.dtype)


@mistake(
    "Pseudo-inverses stand in for the inverses.",
    replaces="optimal_gradient",
    harmless="B of full column rank and A of full row rank have invertible Gram matrices, whose pseudo-inverse is the inverse.",
)
def optimum_by_pseudo_inverse(grad_R, A, B, scaling):
    B_inv, A_inv = torch.linalg.pinv(B), torch.linalg.pinv(A)
    return B_inv @ B_inv.mT @ grad_R @ A_inv.mT @ A_inv / scaling**2


@mistake("The projected gradient has BB' and A'A where it needs projectors.", replaces="projected_gradient", breaks=("lora_sb.L3c",))
def projected_without_grams(G, A, B):
    return B @ (B.mT @ G @ A.mT) @ A


@mistake("The gradient is projected on B's column space only.", replaces="projected_gradient", breaks=("lora_sb.L3c",))
def projected_on_the_left(G, A, B):
    return B @ torch.linalg.pinv(B) @ G


@mistake("The gradient is projected on A's row space only.", replaces="projected_gradient", breaks=("lora_sb.L3c",))
def projected_on_the_right(G, A, B):
    return G @ torch.linalg.pinv(A) @ A


@mistake("What the projection leaves of the gradient is returned.", replaces="projected_gradient", breaks=("lora_sb.L3c",))
def what_is_left_of_the_gradient(G, A, B):
    return G - right.projected_gradient(G, A, B)


@mistake(
    "The projections of LoRA's tangent space are used: what either space holds, not what both do.",
    replaces="projected_gradient",
    breaks=("lora_sb.L3c",),
)
def projected_on_the_tangent_space(G, A, B):
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    return P_B @ G + G @ P_A - P_B @ G @ P_A


# The step


@mistake("A and B are trained too.", replaces="sgd_step", breaks=("lora_sb.L12b",))
def factors_are_trained(G, W0, A, R, B, scaling, *, lr, gradient="optimal"):
    after = right.sgd_step(G, W0, A, R, B, scaling, lr=lr, gradient=gradient)
    A_new, B_new = A - lr * scaling * R.mT @ B.mT @ G, B - lr * scaling * G @ A.mT @ R.mT
    return Weights(W0, A_new, after.R, B_new)


@mistake("The pretrained weight is stepped too.", replaces="sgd_step", breaks=("lora_sb.L12b",))
def base_is_trained(G, W0, A, R, B, scaling, *, lr, gradient="optimal"):
    after = right.sgd_step(G, W0, A, R, B, scaling, lr=lr, gradient=gradient)
    return Weights(W0 - lr * G, A, after.R, B)


@mistake("The step climbs.", replaces="sgd_step", breaks=("lora_sb.L12a", "lora_sb.L14"))
def step_climbs(G, W0, A, R, B, scaling, *, lr, gradient="optimal"):
    return right.sgd_step(G, W0, A, R, B, scaling, lr=-lr, gradient=gradient)


@mistake(
    "The step goes along back-propagation's gradient even where the optimal one is asked for.",
    replaces="sgd_step",
    breaks=("lora_sb.L12a", "lora_sb.L13"),
)
def step_never_optimal(G, W0, A, R, B, scaling, *, lr, gradient="optimal"):
    return right.sgd_step(G, W0, A, R, B, scaling, lr=lr, gradient="plain")


@mistake(
    "The step goes along the optimal gradient even where back-propagation's is asked for.", replaces="sgd_step", breaks=("lora_sb.L12a",)
)
def step_always_optimal(G, W0, A, R, B, scaling, *, lr, gradient="optimal"):
    return right.sgd_step(G, W0, A, R, B, scaling, lr=lr)


@mistake("The step goes along back-propagation's gradient by default.", replaces="sgd_step", breaks=("lora_sb.L12a",))
def step_plain_by_default(G, W0, A, R, B, scaling, *, lr, gradient="plain"):
    return right.sgd_step(G, W0, A, R, B, scaling, lr=lr, gradient=gradient)


@mistake("The learning rate is multiplied by the scaling.", replaces="sgd_step", breaks=("lora_sb.L12a",))
def step_scaled_once_more(G, W0, A, R, B, scaling, *, lr, gradient="optimal"):
    return right.sgd_step(G, W0, A, R, B, scaling, lr=scaling * lr, gradient=gradient)


@mistake("R decays with the step, as with AdamW's default weight decay of 0.01.", replaces="sgd_step", breaks=("lora_sb.L12a",))
def step_decays(G, W0, A, R, B, scaling, *, lr, gradient="optimal"):
    return right.sgd_step(G, W0, A, (1 - 0.01 * lr) * R, B, scaling, lr=lr, gradient=gradient)


# Counting


@mistake("The entries of A and B are counted, as for LoRA.", replaces="num_trainable", breaks=("lora_sb.L15",))
def counts_as_lora(W0, *, rank):
    return rank * sum(W0.shape)


@mistake("All three factors are counted.", replaces="num_trainable", breaks=("lora_sb.L15",))
def counts_all_factors(W0, *, rank):
    return rank * (rank + sum(W0.shape))


@mistake("Only the diagonal of R is counted.", replaces="num_trainable", breaks=("lora_sb.L15",))
def counts_the_diagonal(W0, *, rank):
    return rank
