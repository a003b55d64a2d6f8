"""Plausible mistakes in LoLDU. The functions keep the reference's parameters; what is not named stands in `options`."""

import numpy as np
import torch

from loracle.oracle_tests.mistakes import Observables, mistake
from loracle.reference import loldu as right
from loracle.reference.loldu import LDU, Gradients


def _order(case):
    """A permutation that is not its own inverse."""
    return np.roll(np.random.default_rng(case.number).permutation(case.out), 1)


def _diagonal(case):
    return right.DIAGONALS[case.number - 1]


def _unique(case, found):
    """What pivoting makes unique: U, the diagonal, P L, and the rows of L that are pivots."""
    U, D, L, P = found
    return {"U": U, "D": D, "PL": L[P.astype(int)], "L": L[: L.shape[1]]}


def _unique_of_weights(case, found):
    W_base, U, z, L, P = found
    return {"W_base": W_base, **_unique(case, (U, z, L, P))}


# Each case has one of the eight starts of the diagonal
OBSERVABLES = Observables(
    choices={"distribution": ("normal", "uniform"), "preserve": (True, False)},
    values={"P": _order, "diagonal": _diagonal, "train_scaling": True},
    gauge_free={"ldu": _unique, "init": _unique_of_weights},
)


# The factorisation, which `ldu` and `init` share


def _exact(W0, rank):
    return right._factorise(W0, rank)


@mistake(
    "The permutation is left out: P L is taken for L.",
    replaces="_factorise",
    breaks=("loldu.L1", "loldu.L3", "loldu.L5c", "loldu.L5d", "loldu.L6a", "loldu.L7"),
)
def permutation_left_out(W0, rank):
    U, D, L, P = _exact(W0, rank)
    return LDU(U, D, L, torch.arange(len(P)))


@mistake(
    "The permutation is transposed: the weight is W0[P] = L diag(D) U.",
    replaces="_factorise",
    breaks=("loldu.L1", "loldu.L3", "loldu.L5c", "loldu.L5d", "loldu.L6a", "loldu.L7"),
)
def permutation_transposed(W0, rank):
    U, D, L, P = _exact(W0, rank)
    return LDU(U, D, L, P.argsort())


@mistake(
    "LAPACK's list of row exchanges is taken for the permutation itself.",
    replaces="_factorise",
    breaks=("loldu.L1", "loldu.L2", "loldu.L3", "loldu.L5c", "loldu.L5d"),
)
def exchanges_for_a_permutation(W0, rank):
    U, D, L, P = _exact(W0, rank)
    exchanges = torch.linalg.lu_factor(right.working(W0))[1].long() - 1
    return LDU(U, D, L, torch.cat([exchanges, torch.arange(len(exchanges), len(P))]))


@mistake(
    "The upper triangle's columns are divided by the pivots, not its rows.",
    replaces="_factorise",
    breaks=("loldu.L1", "loldu.L3", "loldu.L5d"),
)
def columns_divided(W0, rank):
    U, D, L, P = _exact(W0, min(W0.shape))
    divisors = torch.ones(W0.shape[1], dtype=D.dtype)
    divisors[: len(D)] = D
    return LDU(((D[:, None] * U) / divisors)[:rank], D[:rank], L[:, :rank], P)


@mistake(
    "The upper triangle is not divided by the pivots, which then count twice.",
    replaces="_factorise",
    breaks=("loldu.L1", "loldu.L2", "loldu.L3", "loldu.L5d"),
)
def pivots_twice(W0, rank):
    U, D, L, P = _exact(W0, rank)
    return LDU(D[:, None] * U, D, L, P)


@mistake(
    "The pivots stay in U, and the diagonal is ones: an LU, not an LDU.",
    replaces="_factorise",
    breaks=("loldu.L2", "loldu.L3", "loldu.L4", "loldu.L5d"),
)
def pivots_stay_in_U(W0, rank):
    U, D, L, P = _exact(W0, rank)
    return LDU(D[:, None] * U, torch.ones_like(D), L, P)


@mistake(
    "The pivots go to L, and the diagonal is ones, as in Crout's elimination.",
    replaces="_factorise",
    breaks=("loldu.L2", "loldu.L3", "loldu.L4", "loldu.L5d"),
)
def pivots_go_to_L(W0, rank):
    U, D, L, P = _exact(W0, rank)
    return LDU(U, torch.ones_like(D), L * D, P)


@mistake(
    "Elimination runs without pivoting, and the entries of L grow without bound.", replaces="_factorise", breaks=("loldu.L3", "loldu.L5d")
)
def no_pivoting(W0, rank):
    rest, small = right.working(W0).clone(), min(W0.shape)
    U, D, L = [], [], []
    for j in range(small):
        D.append(rest[j, j])
        U.append(rest[j] / D[-1])
        L.append(rest[:, j] / D[-1])
        rest = rest - D[-1] * torch.outer(L[-1], U[-1])
    U, L = torch.stack(U).triu(), torch.stack(L, dim=1).tril()
    return LDU(U[:rank], torch.stack(D)[:rank], L[:, :rank], torch.arange(len(W0)))


@mistake(
    "Columns are pivoted, not rows: the transposed weight is factored, as the official convolution and embedding layers do.",
    replaces="_factorise",
    breaks=("loldu.L3", "loldu.L5d"),
)
def transposed_weight_factored(W0, rank):
    U, D, L, P = _exact(W0.mT, rank)
    return LDU(L[P].mT, D, U.mT, torch.arange(len(W0)))


@mistake(
    "The rows of L come back already permuted, and P besides.",
    replaces="_factorise",
    breaks=("loldu.L1", "loldu.L2", "loldu.L3", "loldu.L5d"),
)
def permuted_twice(W0, rank):
    U, D, L, P = _exact(W0, rank)
    return LDU(U, D, L[P], P)


@mistake(
    "P L comes back as one matrix with a P that does nothing: right as a product, but L is no triangle.",
    replaces="_factorise",
    breaks=("loldu.L2", "loldu.L3", "loldu.L5d"),
)
def permutation_inside_L(W0, rank):
    U, D, L, P = _exact(W0, rank)
    return LDU(U, D, L[P], torch.arange(len(P)))


@mistake(
    "The largest pivots are kept, not the leading ones, as if they were singular values.",
    replaces="_factorise",
    breaks=("loldu.L3", "loldu.L5d", "loldu.L6a", "loldu.L7"),
)
def largest_pivots(W0, rank):
    U, D, L, P = _exact(W0, min(W0.shape))
    chosen = D.abs().argsort(descending=True)[:rank]
    return LDU(U[chosen], D[chosen], L[:, chosen], P)


@mistake("The last pivots are kept, not the leading ones.", replaces="_factorise", breaks=("loldu.L5d", "loldu.L6a", "loldu.L7"))
def last_pivots(W0, rank):
    U, D, L, P = _exact(W0, min(W0.shape))
    return LDU(U[-rank:], D[-rank:], L[:, -rank:], P)


@mistake("The pivots lose their signs.", replaces="_factorise", breaks=("loldu.L1", "loldu.L3", "loldu.L4", "loldu.L5d"))
def pivots_without_signs(W0, rank):
    U, D, L, P = _exact(W0, rank)
    return LDU(U, D.abs(), L, P)


@mistake(
    "The weight is factored in float32 whatever its precision (the official code).",
    replaces="_factorise",
    breaks=("loldu.L1", "loldu.L3", "loldu.L5d"),
)
def factored_in_float32(W0, rank):
    U, D, L, P = _exact(W0.float(), rank)
    return LDU(U.to(W0), D.to(W0), L.to(W0), P)


# One convention all through, but the other one


def _inverse_forward(x, W_base, U, z, L, P, scaling, *, bias=None):
    return right.forward(x, W_base, U, z, L, P.argsort(), scaling, bias=bias)


def _inverse_delta(U, z, L, P, scaling):
    return right.delta_weight(U, z, L, P.argsort(), scaling)


def _inverse_gradients(G, U, z, L, P, scaling):
    return right.gradients(G, U, z, L, P.argsort(), scaling)


def _inverse_fit(target, U, L, P, scaling):
    return right.fit_diagonal(target, U, L, P.argsort(), scaling)


@mistake(
    "P is the inverse everywhere: right within itself, but P L is L[argsort(P)] and not L[P].",
    replaces="_factorise",
    also={"forward": _inverse_forward, "delta_weight": _inverse_delta, "gradients": _inverse_gradients, "fit_diagonal": _inverse_fit},
    breaks=("loldu.L1", "loldu.L3", "loldu.L5d", "loldu.L8a", "loldu.L8c", "loldu.L8e", "loldu.L9a", "loldu.L10a"),
)
def inverse_everywhere(W0, rank):
    U, D, L, P = _exact(W0, rank)
    return LDU(U, D, L, P.argsort())


# The start of the diagonal


@mistake("Without a name the diagonal starts at ones.", replaces="init_diagonal", breaks=("loldu.L18a",))
def ones_by_default(D, *, diagonal="ones", noise=None):
    return right.init_diagonal(D, diagonal=diagonal, noise=noise)


@mistake("The constant start is the median of the pivots.", replaces="init_diagonal", breaks=("loldu.L18a", "loldu.L5d"))
def constant_is_the_median(D, *, diagonal="lu", noise=None):
    if diagonal == "constant":
        return D.median() * torch.ones_like(D)
    return right.init_diagonal(D, diagonal=diagonal, noise=noise)


@mistake("The constant start is the mean of the pivots' sizes.", replaces="init_diagonal", breaks=("loldu.L18a", "loldu.L5d"))
def constant_is_the_mean_size(D, *, diagonal="lu", noise=None):
    return right.init_diagonal(D.abs() if diagonal == "constant" else D, diagonal=diagonal, noise=noise)


@mistake("The constant start is the first pivot.", replaces="init_diagonal", breaks=("loldu.L18a", "loldu.L5d"))
def constant_is_the_first_pivot(D, *, diagonal="lu", noise=None):
    return right.init_diagonal(D[:1].expand_as(D) if diagonal == "constant" else D, diagonal=diagonal, noise=noise)


@mistake("The uniform start goes from -|mu| to |mu|, twice as far.", replaces="init_diagonal", breaks=("loldu.L18b", "loldu.L5d"))
def uniform_twice_as_wide(D, *, diagonal="lu", noise=None):
    z = right.init_diagonal(D, diagonal=diagonal, noise=noise)
    return 2 * z if diagonal == "uniform" else z


@mistake(
    "The uniform start lies around the mean of the pivots, not around zero.", replaces="init_diagonal", breaks=("loldu.L18b", "loldu.L5d")
)
def uniform_around_the_mean(D, *, diagonal="lu", noise=None):
    z = right.init_diagonal(D, diagonal=diagonal, noise=noise)
    return D.mean() + z if diagonal == "uniform" else z


@mistake("The normal start lies around zero.", replaces="init_diagonal", breaks=("loldu.L18b", "loldu.L5d"))
def normal_around_zero(D, *, diagonal="lu", noise=None):
    z = right.init_diagonal(D, diagonal=diagonal, noise=noise)
    return z - D.mean() if diagonal == "normal" else z


@mistake("The normal start's width divides by r, not by r - 1.", replaces="init_diagonal", breaks=("loldu.L18b", "loldu.L5d"))
def normal_with_biased_width(D, *, diagonal="lu", noise=None):
    if diagonal == "normal":
        return D.mean() + noise * D.std(correction=0)
    return right.init_diagonal(D, diagonal=diagonal, noise=noise)


@mistake("The normal start's width is the variance of the pivots.", replaces="init_diagonal", breaks=("loldu.L18b", "loldu.L5d"))
def normal_with_the_variance(D, *, diagonal="lu", noise=None):
    if diagonal == "normal":
        return D.mean() + noise * D.var()
    return right.init_diagonal(D, diagonal=diagonal, noise=noise)


@mistake("The standard starts are scaled by the mean of the pivots.", replaces="init_diagonal", breaks=("loldu.L18c", "loldu.L5d"))
def standard_starts_scaled(D, *, diagonal="lu", noise=None):
    z = right.init_diagonal(D, diagonal=diagonal, noise=noise)
    return z * D.mean() if diagonal in ("s_uniform", "s_normal") else z


@mistake("The start by pivots is their size.", replaces="init_diagonal", breaks=("loldu.L18a", "loldu.L5d", "loldu.L5e"))
def pivots_by_size(D, *, diagonal="lu", noise=None):
    return D.abs() if diagonal == "lu" else right.init_diagonal(D, diagonal=diagonal, noise=noise)


@mistake("Starts at ones and zeros are exchanged.", replaces="init_diagonal", breaks=("loldu.L18a", "loldu.L5d"))
def ones_for_zeros(D, *, diagonal="lu", noise=None):
    return right.init_diagonal(D, diagonal={"ones": "zeros", "zeros": "ones"}.get(diagonal, diagonal), noise=noise)


@mistake("The uniform noise goes from 0 to 1.", replaces="draw_noise", breaks=("loldu.L18d",))
def uniform_noise_from_zero(W0, *, rank, distribution="normal", generator=None):
    if distribution == "uniform":
        return W0.new_empty(rank).uniform_(0, 1, generator=generator)
    return right.draw_noise(W0, rank=rank, distribution=distribution, generator=generator)


@mistake("The uniform noise goes from -1/2 to 1/2.", replaces="draw_noise", breaks=("loldu.L18d",))
def uniform_noise_half_as_wide(W0, *, rank, distribution="normal", generator=None):
    e = right.draw_noise(W0, rank=rank, distribution=distribution, generator=generator)
    return e / 2 if distribution == "uniform" else e


@mistake("Normal and uniform noise are exchanged.", replaces="draw_noise", breaks=("loldu.L18d",))
def distributions_exchanged(W0, *, rank, distribution="normal", generator=None):
    other = "uniform" if distribution == "normal" else "normal"
    return right.draw_noise(W0, rank=rank, distribution=other, generator=generator)


@mistake("The noise is uniform by default.", replaces="draw_noise", breaks=("loldu.L18d",))
def uniform_noise_by_default(W0, *, rank, distribution="uniform", generator=None):
    return right.draw_noise(W0, rank=rank, distribution=distribution, generator=generator)


@mistake("The noise is drawn from the global generator, as the official code does.", replaces="draw_noise", breaks=("loldu.L18d",))
def noise_from_the_global_generator(W0, *, rank, distribution="normal", generator=None):
    return right.draw_noise(W0, rank=rank, distribution=distribution)


@mistake("The noise is the same for every seed.", replaces="draw_noise", breaks=("loldu.L18d",))
def noise_of_one_seed(W0, *, rank, distribution="normal", generator=None):
    return right.draw_noise(W0, rank=rank, distribution=distribution, generator=torch.Generator().manual_seed(0))


# The start of the layer


@mistake(
    "Nothing is subtracted: the leading part is in the weight twice.",
    replaces="init",
    breaks=("loldu.L5a", "loldu.L5b", "loldu.L5c", "loldu.L5e", "loldu.L6a", "loldu.L6b", "loldu.L17", "loldu.L20"),
)
def nothing_subtracted(W0, scaling=1.0, *, rank, **options):
    return right.init(W0, scaling, rank=rank, **options)._replace(W_base=W0.clone())


@mistake(
    "The leading part is added to the weight, not subtracted.",
    replaces="init",
    breaks=("loldu.L5a", "loldu.L5b", "loldu.L5c", "loldu.L5e", "loldu.L6a", "loldu.L6b"),
)
def leading_part_added(W0, scaling=1.0, *, rank, **options):
    weights = right.init(W0, scaling, rank=rank, **options)
    return weights._replace(W_base=2 * W0 - weights.W_base)


@mistake(
    "The leading part is subtracted without sigma.",
    replaces="init",
    breaks=("loldu.L5a", "loldu.L5b", "loldu.L5c", "loldu.L6b", "loldu.L20"),
)
def subtracted_without_scaling(W0, scaling=1.0, *, rank, **options):
    return right.init(W0, 1.0, rank=rank, **options)


@mistake(
    "Sigma is in the subtracted part twice.", replaces="init", breaks=("loldu.L5a", "loldu.L5b", "loldu.L5c", "loldu.L6b", "loldu.L20")
)
def subtracted_with_scaling_twice(W0, scaling=1.0, *, rank, **options):
    return right.init(W0, scaling**2, rank=rank, **options)


@mistake(
    "The residual is always made with the pivots, so that starts other than theirs leave the pretrained weight (the official "
    "code for ones, zeros, s_uniform and s_normal).",
    replaces="init",
    breaks=("loldu.L5a", "loldu.L5c", "loldu.L20"),
)
def residual_always_with_pivots(W0, scaling=1.0, *, rank, diagonal="lu", noise=None, preserve=True):
    return right.init(W0, scaling, rank=rank, diagonal=diagonal, noise=noise, preserve=False)


@mistake(
    "The residual is made with the pivots for ones, zeros, s_uniform and s_normal, and with the start for the others, whatever is "
    "asked for: just what the official code does.",
    replaces="init",
    breaks=("loldu.L5a", "loldu.L5b", "loldu.L5c", "loldu.L20"),
)
def residual_as_the_official_code(W0, scaling=1.0, *, rank, diagonal="lu", noise=None, preserve=True):
    shared = diagonal in ("lu", "uniform", "normal", "constant")
    return right.init(W0, scaling, rank=rank, diagonal=diagonal, noise=noise, preserve=shared)


@mistake("`preserve` is not looked at: the layer always starts at the pretrained weight.", replaces="init", breaks=("loldu.L5b",))
def always_preserved(W0, scaling=1.0, *, rank, diagonal="lu", noise=None, preserve=True):
    return right.init(W0, scaling, rank=rank, diagonal=diagonal, noise=noise)


@mistake("`preserve` is off by default.", replaces="init", breaks=("loldu.L5a", "loldu.L5c", "loldu.L20"))
def not_preserved_by_default(W0, scaling=1.0, *, rank, diagonal="lu", noise=None, preserve=False):
    return right.init(W0, scaling, rank=rank, diagonal=diagonal, noise=noise, preserve=preserve)


@mistake(
    "Mean and width are taken over all pivots, not over the leading ones.", replaces="init", breaks=("loldu.L5b", "loldu.L5c", "loldu.L5d")
)
def statistics_of_all_pivots(W0, scaling=1.0, *, rank, diagonal="lu", noise=None, preserve=True):
    D = right._factorise(W0, min(W0.shape)).D
    padded = None if noise is None else torch.cat([noise, noise.new_zeros(len(D) - rank)]).to(D)
    z = right.init_diagonal(D, diagonal=diagonal, noise=padded)[:rank].to(W0)
    kept = right.init(W0, scaling, rank=rank)
    if not preserve:
        return kept._replace(z=z)
    return kept._replace(W_base=W0 - right.delta_weight(kept.U, z, kept.L, kept.P, scaling), z=z)


@mistake("Sigma goes into the diagonal as well, and counts twice.", replaces="init", breaks=("loldu.L5a", "loldu.L5b", "loldu.L5d"))
def scaling_inside_the_diagonal(W0, scaling=1.0, *, rank, **options):
    weights = right.init(W0, scaling, rank=rank, **options)
    return weights._replace(z=scaling * weights.z)


@mistake("Without a word the scaling is 1 / rank.", replaces="init", breaks=("loldu.L5e", "loldu.L7"))
def scaling_by_rank_by_default(W0, scaling=None, *, rank, **options):
    return right.init(W0, 1 / rank if scaling is None else scaling, rank=rank, **options)


@mistake("The scaling is alpha over the root of the rank.", replaces="scaling_factor", breaks=("loldu.L19",))
def scaling_by_the_root(alpha, rank):
    return alpha / rank**0.5


@mistake("The scaling is alpha itself.", replaces="scaling_factor", breaks=("loldu.L19",))
def scaling_is_alpha(alpha, rank):
    return float(alpha)


# The layer


@mistake("The forward lacks sigma.", replaces="forward", breaks=("loldu.L8a", "loldu.L8b"))
def forward_without_scaling(x, W_base, U, z, L, P, scaling, *, bias=None):
    return right.forward(x, W_base, U, z, L, P, 1.0, bias=bias)


@mistake("Sigma is in the forward twice.", replaces="forward", breaks=("loldu.L8a", "loldu.L8b"))
def forward_with_scaling_twice(x, W_base, U, z, L, P, scaling, *, bias=None):
    return right.forward(x, W_base, U, z, L, P, scaling**2, bias=bias)


@mistake("The forward lacks the permutation.", replaces="forward", breaks=("loldu.L8a", "loldu.L8b"))
def forward_without_permutation(x, W_base, U, z, L, P, scaling, *, bias=None):
    return right.forward(x, W_base, U, z, L, torch.arange(len(P)), scaling, bias=bias)


@mistake("The forward has the permutation transposed.", replaces="forward", breaks=("loldu.L8a", "loldu.L8b"))
def forward_with_transposed_permutation(x, W_base, U, z, L, P, scaling, *, bias=None):
    return right.forward(x, W_base, U, z, L, P.argsort(), scaling, bias=bias)


@mistake(
    "The permutation is applied to the whole output, the residual's part and the bias with it.",
    replaces="forward",
    breaks=("loldu.L8a", "loldu.L8b"),
)
def whole_output_permuted(x, W_base, U, z, L, P, scaling, *, bias=None):
    return right.forward(x, W_base, U, z, L, torch.arange(len(P)), scaling, bias=bias)[..., P]


@mistake("The forward lacks the residual: only the trained part is computed.", replaces="forward", breaks=("loldu.L8a", "loldu.L8b"))
def forward_without_residual(x, W_base, U, z, L, P, scaling, *, bias=None):
    return right.forward(x, 0 * W_base, U, z, L, P, scaling, bias=bias)


@mistake("The forward lacks the diagonal.", replaces="forward", breaks=("loldu.L8a", "loldu.L8b"))
def forward_without_diagonal(x, W_base, U, z, L, P, scaling, *, bias=None):
    return right.forward(x, W_base, U, torch.ones_like(z), L, P, scaling, bias=bias)


@mistake("The bias is left out.", replaces="forward", breaks=("loldu.L8a", "loldu.L8b"))
def forward_without_bias(x, W_base, U, z, L, P, scaling, *, bias=None):
    return right.forward(x, W_base, U, z, L, P, scaling)


@mistake("Sigma multiplies the bias too.", replaces="forward", breaks=("loldu.L8a", "loldu.L8b"))
def scaled_bias(x, W_base, U, z, L, P, scaling, *, bias=None):
    return right.forward(x, W_base, U, z, L, P, scaling, bias=None if bias is None else scaling * bias)


@mistake("The forward computes in float32.", replaces="forward", breaks=("loldu.L8a", "loldu.L8b"))
def forward_in_float32(x, W_base, U, z, L, P, scaling, *, bias=None):
    low = [t.float() for t in (x, W_base, U, z, L)]
    return right.forward(*low, P, scaling, bias=None if bias is None else bias.float()).to(x)


@mistake("The trained part lacks sigma.", replaces="delta_weight", breaks=("loldu.L8c", "loldu.L8d", "loldu.L8e"))
def delta_without_scaling(U, z, L, P, scaling):
    return right.delta_weight(U, z, L, P, 1.0)


@mistake("The trained part lacks the permutation.", replaces="delta_weight", breaks=("loldu.L8c", "loldu.L8d", "loldu.L8e", "loldu.L5c"))
def delta_without_permutation(U, z, L, P, scaling):
    return right.delta_weight(U, z, L, torch.arange(len(P)), scaling)


@mistake(
    "The trained part has the permutation transposed.", replaces="delta_weight", breaks=("loldu.L8c", "loldu.L8d", "loldu.L8e", "loldu.L5c")
)
def delta_with_transposed_permutation(U, z, L, P, scaling):
    return right.delta_weight(U, z, L, P.argsort(), scaling)


@mistake("The trained part lacks the diagonal.", replaces="delta_weight", breaks=("loldu.L8c", "loldu.L8d", "loldu.L8e", "loldu.L15b"))
def delta_without_diagonal(U, z, L, P, scaling):
    return right.delta_weight(U, torch.ones_like(z), L, P, scaling)


@mistake("Merging gives the trained part alone.", replaces="merge", breaks=("loldu.L8b", "loldu.L8c"))
def merge_without_residual(W_base, U, z, L, P, scaling):
    return right.merge(0 * W_base, U, z, L, P, scaling)


@mistake("Merging lacks sigma, which the forward has.", replaces="merge", breaks=("loldu.L8b", "loldu.L8c"))
def merge_without_scaling(W_base, U, z, L, P, scaling):
    return right.merge(W_base, U, z, L, P, 1.0)


@mistake("Merging lacks the permutation.", replaces="merge", breaks=("loldu.L8b", "loldu.L8c"))
def merge_without_permutation(W_base, U, z, L, P, scaling):
    return right.merge(W_base, U, z, L, torch.arange(len(P)), scaling)


@mistake("Unmerging adds the trained part once more.", replaces="unmerge", breaks=("loldu.L8d",))
def unmerge_adds(W, U, z, L, P, scaling):
    return right.merge(W, U, z, L, P, scaling)


@mistake("Unmerging lacks sigma.", replaces="unmerge", breaks=("loldu.L8d",))
def unmerge_without_scaling(W, U, z, L, P, scaling):
    return right.unmerge(W, U, z, L, P, 1.0)


@mistake("Unmerging leaves the merged weight as it is.", replaces="unmerge", breaks=("loldu.L8d",))
def unmerge_does_nothing(W, U, z, L, P, scaling):
    return W.clone()


@mistake(
    "Disabling or removing the adapter leaves the residual, not the pretrained weight (the official code).",
    replaces="restore",
    breaks=("loldu.L20",),
)
def disabling_leaves_the_residual(W_base, U, z, L, P, scaling):
    return W_base.clone()


@mistake("Disabling the adapter puts the leading part back without sigma.", replaces="restore", breaks=("loldu.L20",))
def restored_without_scaling(W_base, U, z, L, P, scaling):
    return right.restore(W_base, U, z, L, P, 1.0)


# Gradients and the best diagonal


@mistake("The gradient of the diagonal lacks sigma.", replaces="gradients", breaks=("loldu.L9a",))
def gradient_without_scaling(G, U, z, L, P, scaling):
    found = right.gradients(G, U, z, L, P, scaling)
    return Gradients(found.grad_z / scaling, found.grad_scaling)


@mistake("The gradient of the diagonal has sigma twice.", replaces="gradients", breaks=("loldu.L9a",))
def gradient_with_scaling_twice(G, U, z, L, P, scaling):
    found = right.gradients(G, U, z, L, P, scaling)
    return Gradients(scaling * found.grad_z, found.grad_scaling)


@mistake("The gradients lack the permutation.", replaces="gradients", breaks=("loldu.L9a", "loldu.L9b"))
def gradients_without_permutation(G, U, z, L, P, scaling):
    return right.gradients(G, U, z, L, torch.arange(len(P)), scaling)


@mistake("The gradients have the permutation transposed.", replaces="gradients", breaks=("loldu.L9a", "loldu.L9b"))
def gradients_with_transposed_permutation(G, U, z, L, P, scaling):
    return right.gradients(G, U, z, L, P.argsort(), scaling)


@mistake("The gradient of sigma lacks the diagonal.", replaces="gradients", breaks=("loldu.L9b",))
def scaling_gradient_without_diagonal(G, U, z, L, P, scaling):
    found = right.gradients(G, U, z, L, P, scaling)
    return Gradients(found.grad_z, found.grad_z.sum() / scaling)


@mistake("The gradient of sigma has sigma as a factor.", replaces="gradients", breaks=("loldu.L9b",))
def scaling_gradient_with_scaling(G, U, z, L, P, scaling):
    found = right.gradients(G, U, z, L, P, scaling)
    return Gradients(found.grad_z, scaling * found.grad_scaling)


@mistake("The gradient of sigma is zero: it is always frozen.", replaces="gradients", breaks=("loldu.L9b",))
def scaling_without_gradient(G, U, z, L, P, scaling):
    found = right.gradients(G, U, z, L, P, scaling)
    return Gradients(found.grad_z, 0 * found.grad_scaling)


@mistake("The gradient of the diagonal has the diagonal as a factor.", replaces="gradients", breaks=("loldu.L9a",))
def gradient_with_diagonal(G, U, z, L, P, scaling):
    found = right.gradients(G, U, z, L, P, scaling)
    return Gradients(z * found.grad_z, found.grad_scaling)


@mistake(
    "The best diagonal projects on each rank-one term alone, as if L and U were orthogonal.",
    replaces="fit_diagonal",
    breaks=("loldu.L10a", "loldu.L10b"),
)
def fit_as_if_orthogonal(target, U, L, P, scaling):
    sizes = L.square().sum(dim=0) * U.square().sum(dim=1)
    return ((L[P].mT @ target) * U).sum(dim=1) / sizes / scaling


@mistake("The best diagonal is that of L^+ T U^+, which is not the least-squares one.", replaces="fit_diagonal", breaks=("loldu.L10a",))
def fit_by_pseudoinverses(target, U, L, P, scaling):
    left, right_ = (torch.linalg.pinv(right.working(M)) for M in (L[P], U))
    return ((left @ right.working(target) @ right_).diagonal() / scaling).to(target)


@mistake("The fit lacks sigma.", replaces="fit_diagonal", breaks=("loldu.L10a", "loldu.L10b"))
def fit_without_scaling(target, U, L, P, scaling):
    return right.fit_diagonal(target, U, L, P, 1.0)


@mistake("The fit multiplies by sigma.", replaces="fit_diagonal", breaks=("loldu.L10a", "loldu.L10b"))
def fit_times_scaling(target, U, L, P, scaling):
    return right.fit_diagonal(target, U, L, P, 1 / scaling)


@mistake("The fit lacks the permutation.", replaces="fit_diagonal", breaks=("loldu.L10a", "loldu.L10b"))
def fit_without_permutation(target, U, L, P, scaling):
    return right.fit_diagonal(target, U, L, torch.arange(len(P)), scaling)


# The count


@mistake("The frozen triangles are counted, and trained.", replaces="num_trainable", breaks=("loldu.L15a",))
def triangles_counted(W0, *, rank, train_scaling=False):
    return rank * (1 + sum(W0.shape)) + train_scaling


@mistake("The diagonal counts as a matrix, rank^2.", replaces="num_trainable", breaks=("loldu.L15a",))
def diagonal_counted_as_a_matrix(W0, *, rank, train_scaling=False):
    return rank * rank + train_scaling


@mistake("All pivots are counted, whatever the rank.", replaces="num_trainable", breaks=("loldu.L15a",))
def all_pivots_counted(W0, *, rank, train_scaling=False):
    return min(W0.shape) + train_scaling


@mistake("A trained sigma is not counted.", replaces="num_trainable", breaks=("loldu.L15a",))
def scaling_not_counted(W0, *, rank, train_scaling=False):
    return rank


@mistake("Sigma is counted, and trained, by default.", replaces="num_trainable", breaks=("loldu.L15a",))
def scaling_trained_by_default(W0, *, rank, train_scaling=True):
    return rank + train_scaling


# What looks like a mistake and is none


def _same_product(W0, rank):
    """Rows of L that are never pivots, in another order."""
    U, D, L, P = right._factorise(W0, rank)
    small = min(W0.shape)
    order = torch.cat([torch.arange(small), torch.arange(small, len(P)).flip(0)])
    return LDU(U, D, L[order], order.argsort()[P])


@mistake(
    "Rows of L that are never pivots come in another order.",
    replaces="_factorise",
    harmless="P turns them back: only the order of the pivot rows is fixed by elimination.",
)
def other_order_of_the_rest(W0, rank):
    return _same_product(W0, rank)


@mistake(
    "The permutation is applied to the output's columns, not to the rows of L.",
    replaces="forward",
    harmless="Both are the same sum. For few positions the output is smaller than L.",
)
def output_permuted(x, W_base, U, z, L, P, scaling, *, bias=None):
    hidden = (x @ U.mT) * (scaling * z)
    return torch.nn.functional.linear(x, W_base, bias) + (hidden @ L.mT)[..., P]


@mistake(
    "Without `preserve` the residual of the start by pivots is made with the pivots.",
    replaces="init",
    harmless="For this start they are the diagonal itself, and the layer starts at the pretrained weight either way.",
)
def pivots_for_pivots(W0, scaling=1.0, *, rank, diagonal="lu", noise=None, preserve=True):
    return right.init(W0, scaling, rank=rank, diagonal=diagonal, noise=noise, preserve=preserve and diagonal != "lu")
