"""Plausible mistakes in RandLoRA. The functions keep the reference's parameters; what is not named stands in `options`."""

import math

import numpy as np
import torch

from loracle.oracle_tests.mistakes import Observables, mistake
from loracle.reference import randlora as right
from loracle.reference.randlora import Bases, Diagonals, Gradients


def _sizes(case):
    """Bases, rank, small and large of a case's weight."""
    return -(-case.small // case.rank), case.rank, case.small, max(case.out, case.sizes["in"])


def _drawn(*which):
    """A generic array of some of the four sizes."""

    def make(case):
        shape = tuple(_sizes(case)[i] for i in which)
        return case.rounded(np.random.default_rng([case.number, *which]).standard_normal(shape))

    return make


def _weights(case):
    """Two weights that share a pair: that of the case, and one with more outputs."""
    out, in_ = case.out, case.sizes["in"]
    return [np.zeros((out, in_)), np.zeros((max(out, in_) + 3, case.small))]


def _shared(large):
    """A or B of a pair that is larger than the case's weight."""

    def make(case):
        bases, rank, small, most = _sizes(case)
        return case.rounded(np.random.default_rng(case.number).standard_normal((most + 2, bases + 1, rank) if large else (rank, small + 1)))

    return make


def _beyond(case):
    """The case's weight, in two cases with both sides beyond 1024."""
    more = 1024 * (case.number in (3, 6))
    return np.broadcast_to(0.5, (case.out + more, case.sizes["in"] + more))


def _unit_interval(case):
    return case.rounded(np.random.default_rng(case.number).random((40,)))


def _pair(case, result):
    """Bases, which are compared by their moments, with what these do not show: the sides, and how unlike the terms' deviations are."""
    A, B = (np.asarray(base, float) for base in result)
    deviations = B.std(axis=(0, 2), ddof=1)
    return {"A": A, "B": B, "sides": np.array([*A.shape, *B.shape]), "terms": np.round(deviations.std() / deviations.mean(), 2)}


def _start(case, result):
    """The diagonals at the start, where of lambdas that were drawn it only shows that they vary: no two codes draw the same."""
    gammas, lambdas = (np.asarray(diagonal, float) for diagonal in result)
    vary = bool(np.ptp(lambdas))
    return {"gammas": gammas, "lambdas": 0 * lambdas if vary else lambdas, "vary": np.array(float(vary))}


OBSERVABLES = Observables(
    gauge_free={"draw_bases": _pair, "init": _start},
    choices={"zero": ("gammas",), "convention": ("peft", "vision"), "kind": ("normal", "sparse", "very_sparse")},
    values={
        "gammas": _drawn(0, 2),
        "A": _drawn(1, 2),
        "lambdas": _drawn(0, 1),
        "B": _drawn(3, 0, 1),
        "shared_A": _shared(large=False),
        "shared_B": _shared(large=True),
        "bases": lambda case: _sizes(case)[0] + 1,
        "weights": _weights,
        "num_bases.W0": _beyond,
        "num_trainable.W0": _beyond,
        "u": _unit_interval,
        "sparsity": lambda case: 2.25 + case.number,
    },
)


def _is_wide(W):
    return W.shape[0] < W.shape[1]


# The start


@mistake("The start is not zero: lambdas are normal.", replaces="init", breaks=("randlora.L1a", "randlora.L1c"))
def random_lambdas(W0, *, rank, zero="lambdas"):
    start = right.init(W0, rank=rank, zero=zero)
    noise = torch.sin(1 + torch.arange(start.lambdas.numel(), dtype=W0.dtype, device=W0.device)).view_as(start.lambdas)
    return start._replace(lambdas=start.lambdas + noise) if zero == "lambdas" else start


@mistake(
    "The start is not zero: lambdas are normal, drawn from the global generator (MyTransformers).",
    replaces="init",
    breaks=("randlora.L1a", "randlora.L1c"),
)
def random_lambdas_from_the_global_generator(W0, *, rank, zero="lambdas"):
    start = right.init(W0, rank=rank, zero=zero)
    return start._replace(lambdas=torch.randn_like(start.lambdas)) if zero == "lambdas" else start


@mistake("Both diagonals are zero: nothing is ever trained.", replaces="init", breaks=("randlora.L1a", "randlora.L1b"))
def both_zero(W0, *, rank, zero="lambdas"):
    start = right.init(W0, rank=rank)
    return Diagonals(0 * start.gammas, 0 * start.lambdas)


@mistake("Gammas start at one.", replaces="init", breaks=("randlora.L1a",))
def gammas_of_one(W0, *, rank, zero="lambdas"):
    start = right.init(W0, rank=rank, zero=zero)
    return start._replace(gammas=torch.ones_like(start.gammas)) if zero == "lambdas" else start


@mistake(
    "Gammas start at one over the larger side, as the official code writes before it overwrites it.",
    replaces="init",
    breaks=("randlora.L1a",),
)
def gammas_over_the_larger_side(W0, *, rank, zero="lambdas"):
    start = right.init(W0, rank=rank, zero=zero)
    return start._replace(gammas=torch.full_like(start.gammas, 1 / max(W0.shape))) if zero == "lambdas" else start


@mistake("Gammas start at one over the number of terms.", replaces="init", breaks=("randlora.L1a",))
def gammas_over_the_bases(W0, *, rank, zero="lambdas"):
    start = right.init(W0, rank=rank, zero=zero)
    return start._replace(gammas=torch.full_like(start.gammas, 1 / len(start.gammas))) if zero == "lambdas" else start


@mistake("Gammas start at one over the root of the smaller side.", replaces="init", breaks=("randlora.L1a",))
def gammas_over_a_root(W0, *, rank, zero="lambdas"):
    start = right.init(W0, rank=rank, zero=zero)
    return start._replace(gammas=torch.full_like(start.gammas, min(W0.shape) ** -0.5)) if zero == "lambdas" else start


@mistake(
    "The roles are exchanged without being asked: gammas are zero by default, as in the vision code.",
    replaces="init",
    breaks=("randlora.L1a",),
)
def vision_start_by_default(W0, *, rank, zero="gammas"):
    return right.init(W0, rank=rank, zero=zero)


@mistake("The choice of what is zero is ignored: always lambdas.", replaces="init", breaks=("randlora.L1b", "randlora.L7c"))
def choice_of_zero_ignored(W0, *, rank, zero="lambdas"):
    return right.init(W0, rank=rank)


@mistake("With gammas zero, lambdas start at one over the smaller side.", replaces="init", breaks=("randlora.L1b",))
def lambdas_over_the_smaller_side(W0, *, rank, zero="lambdas"):
    start = right.init(W0, rank=rank, zero=zero)
    return start._replace(lambdas=torch.full_like(start.lambdas, 1 / min(W0.shape))) if zero == "gammas" else start


@mistake("With gammas zero, lambdas start at one.", replaces="init", breaks=("randlora.L1b",))
def lambdas_of_one(W0, *, rank, zero="lambdas"):
    start = right.init(W0, rank=rank, zero=zero)
    return start._replace(lambdas=torch.ones_like(start.lambdas)) if zero == "gammas" else start


# How many


@mistake(
    "The number of terms is rounded down: if the rank does not divide the smaller side, the update cannot be of full rank.",
    replaces="num_bases",
    breaks=("randlora.L4a", "randlora.L4b"),
)
def bases_rounded_down(W0, *, rank):
    return min(W0.shape) // rank


@mistake(
    "One more than the quotient rounded down: a term too many where the rank divides the smaller side (official vision and NLG code).",
    replaces="num_bases",
    breaks=("randlora.L4a", "randlora.L4b", "randlora.L4c"),
)
def one_basis_too_many(W0, *, rank):
    return min(W0.shape) // rank + 1


@mistake("The terms fill the larger side.", replaces="num_bases", breaks=("randlora.L4a", "randlora.L4b"))
def bases_for_the_larger_side(W0, *, rank):
    return -(-max(W0.shape) // rank)


@mistake("The terms fill the input side, whichever is smaller.", replaces="num_bases", breaks=("randlora.L4a", "randlora.L4b"))
def bases_for_the_input_side(W0, *, rank):
    return -(-W0.shape[1] // rank)


@mistake("There are as many terms as the basis rank.", replaces="num_bases", breaks=("randlora.L4a", "randlora.L4b"))
def as_many_bases_as_the_rank(W0, *, rank):
    return rank


@mistake(
    "The number of terms is at most 1024 / rank: a layer with both sides beyond 1024 cannot reach full rank (MyTransformers).",
    replaces="num_bases",
    breaks=("randlora.L4d", "randlora.L4e"),
)
def bases_capped(W0, *, rank):
    return min(right.num_bases(W0, rank=rank), max(1024 // rank, 1))


@mistake("Only the gammas are counted.", replaces="num_trainable", breaks=("randlora.L4b", "randlora.L4c"))
def lambdas_not_counted(W0, *, rank):
    return right.num_bases(W0, rank=rank) * min(W0.shape)


@mistake("The gammas are counted on the larger side.", replaces="num_trainable", breaks=("randlora.L4b",))
def counted_on_the_larger_side(W0, *, rank):
    return right.num_bases(W0, rank=rank) * (rank + max(W0.shape))


@mistake("The bases are counted too, as if they were trained.", replaces="num_trainable", breaks=("randlora.L4b", "randlora.L4c"))
def bases_counted(W0, *, rank):
    bases = right.num_bases(W0, rank=rank)
    return right.num_trainable(W0, rank=rank) + rank * min(W0.shape) + max(W0.shape) * bases * rank


@mistake("What LoRA of that rank would train is counted.", replaces="num_trainable", breaks=("randlora.L4b", "randlora.L4c"))
def counted_as_lora(W0, *, rank):
    return rank * sum(W0.shape)


@mistake("One gamma for each term is counted, not one for each column.", replaces="num_trainable", breaks=("randlora.L4b", "randlora.L4c"))
def one_gamma_counted(W0, *, rank):
    return right.num_bases(W0, rank=rank) * (rank + 1)


# The scaling


@mistake("The root of the number of terms is left out.", replaces="scaling_factor", breaks=("randlora.L16a",))
def scaling_without_the_root(rank, bases, *, alpha=None, convention="paper"):
    s = right.scaling_factor(rank, bases, alpha=alpha, convention=convention)
    return s * math.sqrt(bases) if convention == "paper" else s


@mistake("The scaling divides by the number of terms, not by its root.", replaces="scaling_factor", breaks=("randlora.L16a",))
def scaling_over_the_bases(rank, bases, *, alpha=None, convention="paper"):
    s = right.scaling_factor(rank, bases, alpha=alpha, convention=convention)
    return s / math.sqrt(bases) if convention == "paper" else s


@mistake("PEFT's convention is the default.", replaces="scaling_factor", breaks=("randlora.L16a",))
def scaling_of_peft_by_default(rank, bases, *, alpha=None, convention="peft"):
    return right.scaling_factor(rank, bases, alpha=alpha, convention=convention)


@mistake("Every convention divides by the root of the number of terms.", replaces="scaling_factor", breaks=("randlora.L16b",))
def root_in_every_convention(rank, bases, *, alpha=None, convention="paper"):
    s = right.scaling_factor(rank, bases, alpha=alpha, convention=convention)
    return s if convention == "paper" else s / math.sqrt(bases)


@mistake("Without alpha every convention has alpha = 2 rank.", replaces="scaling_factor", breaks=("randlora.L16c",))
def alpha_of_the_paper_everywhere(rank, bases, *, alpha=None, convention="paper"):
    return right.scaling_factor(rank, bases, alpha=2.0 * rank if alpha is None else alpha, convention=convention)


@mistake(
    "The scaling is alpha over the root of the rank, as in rsLoRA.", replaces="scaling_factor", breaks=("randlora.L16a", "randlora.L16b")
)
def scaling_over_the_root_of_the_rank(rank, bases, *, alpha=None, convention="paper"):
    return right.scaling_factor(rank, bases, alpha=alpha, convention=convention) * math.sqrt(rank)


@mistake("A given alpha is ignored.", replaces="scaling_factor", breaks=("randlora.L16a", "randlora.L16b"))
def alpha_ignored(rank, bases, *, alpha=None, convention="paper"):
    return right.scaling_factor(rank, bases, convention=convention)


@mistake("The scaling is doubled.", replaces="scaling_factor", breaks=("randlora.L16a", "randlora.L16b"))
def scaling_doubled(rank, bases, *, alpha=None, convention="paper"):
    return 2 * right.scaling_factor(rank, bases, alpha=alpha, convention=convention)


# The bases


@mistake(
    "Each sign of a ternary base has probability 1 / q, twice what it should be.",
    replaces="ternarise",
    breaks=("randlora.L14a", "randlora.L14d"),
)
def signs_twice_as_likely(u, *, sparsity=3.0):
    return (u > 1 - 1 / sparsity).to(u.dtype) - (u < 1 / sparsity).to(u.dtype)


@mistake("The signs of ternary bases are exchanged.", replaces="ternarise", breaks=("randlora.L14a",))
def signs_exchanged(u, *, sparsity=3.0):
    return -right.ternarise(u, sparsity=sparsity)


@mistake("Ternary bases have no -1.", replaces="ternarise", breaks=("randlora.L14a", "randlora.L14d"))
def one_sign_only(u, *, sparsity=3.0):
    return right.ternarise(u, sparsity=sparsity).clamp_min(0)


@mistake("The sparsity is ignored: always a sixth for each sign.", replaces="ternarise", breaks=("randlora.L14a",))
def sparsity_ignored(u, *, sparsity=3.0):
    return right.ternarise(u)


@mistake("The default sparsity is 2: a quarter for each sign.", replaces="ternarise", breaks=("randlora.L14a",))
def default_sparsity(u, *, sparsity=2.0):
    return right.ternarise(u, sparsity=sparsity)


@mistake(
    "The base is multiplied by its standard deviation.", replaces="normalise", breaks=("randlora.L14b", "randlora.L14c", "randlora.L14d")
)
def multiplied_by_the_deviation(base):
    return base * base.std()


@mistake("The base is divided by its norm.", replaces="normalise", breaks=("randlora.L14b", "randlora.L14c", "randlora.L14d"))
def divided_by_the_norm(base):
    return base / base.norm()


@mistake("The base is divided by its variance.", replaces="normalise", breaks=("randlora.L14b", "randlora.L14c", "randlora.L14d"))
def divided_by_the_variance(base):
    return base / base.var()


@mistake("The base is divided by the biased standard deviation, over K and not K - 1.", replaces="normalise", breaks=("randlora.L14b",))
def biased_deviation(base):
    return base / base.std(correction=0)


@mistake("The mean is taken off the base as well.", replaces="normalise", breaks=("randlora.L14b",))
def mean_taken_off(base):
    return (base - base.mean()) / base.std()


@mistake(
    "The standard deviation is rounded to bfloat16 (PEFT draws and divides in half precision).",
    replaces="normalise",
    breaks=("randlora.L14b",),
)
def normalised_in_bfloat16(base):
    return (base.bfloat16() / base.bfloat16().std()).to(base.dtype)


@mistake("The bases are not normalised.", replaces="normalise", breaks=("randlora.L14b", "randlora.L14c", "randlora.L14d"))
def not_normalised(base):
    return base.clone()


def _draw(weights, rank, kind, generator, change):
    """The right pair, changed."""
    return Bases(*change(*right.draw_bases(weights, rank=rank, kind=kind, generator=generator)))


@mistake(
    "B is divided by the standard deviation of the normalised A, which is 1: it stays as drawn (MyTransformers).",
    replaces="draw_bases",
    breaks=("randlora.L14c", "randlora.L14d"),
)
def B_divided_by_the_deviation_of_A(weights, *, rank, kind="uniform", generator=None):
    raw = {"uniform": 3**-0.5, "normal": 0.97, "sparse": 3**-0.5, "very_sparse": 0.3}[kind]
    return _draw(weights, rank, kind, generator, lambda A, B: (A, raw * B))


@mistake("Each B_j is normalised by itself.", replaces="draw_bases", breaks=("randlora.L14c", "randlora.L14d"))
def each_term_normalised(weights, *, rank, kind="uniform", generator=None):
    return _draw(weights, rank, kind, generator, lambda A, B: (A, B / B.std(dim=(0, 2), keepdim=True)))


@mistake("The pair has the sides of the first layer only: larger layers do not fit.", replaces="draw_bases", breaks=("randlora.L15a",))
def sides_of_the_first_layer(weights, *, rank, kind="uniform", generator=None):
    return right.draw_bases(weights[:1], rank=rank, kind=kind, generator=generator)


@mistake(
    "A has the largest output and B the largest input (official `peft/` code): layers that all have out > in do not fit.",
    replaces="draw_bases",
    breaks=("randlora.L5a", "randlora.L15a"),
)
def sides_by_direction(weights, *, rank, kind="uniform", generator=None):
    out, in_ = (max(W.shape[side] for W in weights) for side in (0, 1))
    if out <= in_:
        return right.draw_bases(weights, rank=rank, kind=kind, generator=generator)
    A, B = right.draw_bases(weights, rank=rank, kind=kind, generator=generator)
    return Bases(B[:, 0].mT.contiguous(), A.mT[:, None].expand(-1, B.shape[1], -1).contiguous())


@mistake("All terms have the same B.", replaces="draw_bases", breaks=("randlora.L15c", "randlora.L5a"))
def same_B_in_every_term(weights, *, rank, kind="uniform", generator=None):
    return _draw(weights, rank, kind, generator, lambda A, B: (A, B[:, :1].expand_as(B) / B[:, :1].std()))


@mistake("The bases ignore the generator: every seed gives the same.", replaces="draw_bases", breaks=("randlora.L15c",))
def bases_ignore_the_generator(weights, *, rank, kind="uniform", generator=None):
    return right.draw_bases(weights, rank=rank, kind=kind, generator=torch.Generator(weights[0].device).manual_seed(0))


@mistake(
    "Sparse bases are drawn from the global generator, whatever seed is given (official vision and NLG code).",
    replaces="draw_bases",
    breaks=("randlora.L15d",),
)
def sparse_bases_from_the_global_generator(weights, *, rank, kind="uniform", generator=None):
    return right.draw_bases(weights, rank=rank, kind=kind, generator=generator if kind in ("uniform", "normal") else None)


@mistake("The kind is ignored: always uniform.", replaces="draw_bases", breaks=("randlora.L14d", "randlora.L14e"))
def kind_ignored(weights, *, rank, kind="uniform", generator=None):
    return right.draw_bases(weights, rank=rank, generator=generator)


@mistake("Normal bases are the default.", replaces="draw_bases", breaks=("randlora.L14c",))
def normal_by_default(weights, *, rank, kind="normal", generator=None):
    return right.draw_bases(weights, rank=rank, kind=kind, generator=generator)


@mistake("Uniform bases are drawn from [0, 1): they have a mean.", replaces="draw_bases", breaks=("randlora.L14c",))
def uniform_from_zero(weights, *, rank, kind="uniform", generator=None):
    if kind != "uniform":
        return right.draw_bases(weights, rank=rank, kind=kind, generator=generator)
    return _draw(weights, rank, kind, generator, lambda A, B: (A + 3**0.5, B + 3**0.5))


@mistake(
    "Very sparse bases have 1 / sqrt(d) for each sign, as PEFT's description (not its code) says: twice too many.",
    replaces="draw_bases",
    breaks=("randlora.L14d",),
)
def very_sparse_as_described(weights, *, rank, kind="uniform", generator=None):
    if kind != "very_sparse":
        return right.draw_bases(weights, rank=rank, kind=kind, generator=generator)

    def sparse(A, B):
        for base in (A, B):
            u = torch.rand(base.shape, generator=generator, dtype=base.dtype, device=base.device)
            yield right.normalise(right.ternarise(u, sparsity=math.sqrt(A.shape[1]) / 2))

    return _draw(weights, rank, kind, generator, sparse)


@mistake("A layer takes the trailing slices of the shared pair.", replaces="slice_bases", breaks=("randlora.L15b",))
def trailing_slices(W0, shared_A, shared_B):
    A, B = shared_A, shared_B
    small, large = sorted(W0.shape)
    return Bases(A[:, A.shape[1] - small :], B[len(B) - large :, B.shape[1] - right.num_bases(W0, rank=len(A)) :])


@mistake(
    "A layer keeps all terms of the shared pair, also those that it does not need (MyTransformers).",
    replaces="slice_bases",
    breaks=("randlora.L15b",),
)
def all_terms_kept(W0, shared_A, shared_B):
    small, large = sorted(W0.shape)
    return Bases(shared_A[:, :small], shared_B[:large])


@mistake("A layer normalises its slices again.", replaces="slice_bases", breaks=("randlora.L15b",))
def slices_normalised_again(W0, shared_A, shared_B):
    return Bases(*(base / (1e-3 + base.square().mean().sqrt()) for base in right.slice_bases(W0, shared_A, shared_B)))


@mistake("The slices are cut by direction: A by the input and B by the output.", replaces="slice_bases", breaks=("randlora.L15b",))
def slices_by_direction(W0, shared_A, shared_B):
    out, in_ = W0.shape
    return Bases(shared_A[:, :in_], shared_B[:out, : right.num_bases(W0, rank=len(shared_A))])


# The update


@mistake("The update of a wide layer is not transposed.", replaces="delta_weight", breaks=("randlora.L2a", "randlora.L2b"))
def not_transposed(gammas, A, lambdas, B, scaling, *, wide=False):
    return right.delta_weight(gammas, A, lambdas, B, scaling)


@mistake("The update lacks the scaling.", replaces="delta_weight", breaks=("randlora.L2a", "randlora.L13"))
def delta_without_scaling(gammas, A, lambdas, B, scaling, *, wide=False):
    return right.delta_weight(gammas, A, lambdas, B, 1.0, wide=wide)


@mistake("The scaling is applied twice.", replaces="delta_weight", breaks=("randlora.L2a", "randlora.L13"))
def delta_scaled_twice(gammas, A, lambdas, B, scaling, *, wide=False):
    return right.delta_weight(gammas, A, lambdas, B, scaling**2, wide=wide)


@mistake(
    "The sum is divided once more by the root of the number of terms.", replaces="delta_weight", breaks=("randlora.L2a", "randlora.L13")
)
def delta_over_the_root(gammas, A, lambdas, B, scaling, *, wide=False):
    return right.delta_weight(gammas, A, lambdas, B, scaling / math.sqrt(len(gammas)), wide=wide)


@mistake("The mean over the terms is taken, not the sum.", replaces="delta_weight", breaks=("randlora.L2a", "randlora.L2b", "randlora.L13"))
def mean_of_terms(gammas, A, lambdas, B, scaling, *, wide=False):
    return right.delta_weight(gammas, A, lambdas, B, scaling / len(gammas), wide=wide)


@mistake(
    "Each term has one gamma for all columns: the sum has only the rank of A.",
    replaces="delta_weight",
    breaks=("randlora.L2a", "randlora.L2b", "randlora.L5a", "randlora.L6"),
)
def one_gamma_per_term(gammas, A, lambdas, B, scaling, *, wide=False):
    return right.delta_weight(gammas[:, :1].expand_as(gammas), A, lambdas, B, scaling, wide=wide)


@mistake(
    "All terms have the gamma of the first.",
    replaces="delta_weight",
    breaks=("randlora.L2a", "randlora.L2b", "randlora.L5a", "randlora.L6"),
)
def gamma_of_the_first_term(gammas, A, lambdas, B, scaling, *, wide=False):
    return right.delta_weight(gammas[:1].expand_as(gammas), A, lambdas, B, scaling, wide=wide)


@mistake("The lambdas are left out.", replaces="delta_weight", breaks=("randlora.L2a", "randlora.L2b", "randlora.L6", "randlora.L13"))
def lambdas_left_out(gammas, A, lambdas, B, scaling, *, wide=False):
    return right.delta_weight(gammas, A, torch.ones_like(lambdas), B, scaling, wide=wide)


@mistake("The gammas are left out.", replaces="delta_weight", breaks=("randlora.L2a", "randlora.L2b", "randlora.L5a", "randlora.L13"))
def gammas_left_out(gammas, A, lambdas, B, scaling, *, wide=False):
    return right.delta_weight(torch.ones_like(gammas), A, lambdas, B, scaling, wide=wide)


@mistake("Only the first term is used.", replaces="delta_weight", breaks=("randlora.L2a", "randlora.L2b", "randlora.L5a", "randlora.L13"))
def first_term_only(gammas, A, lambdas, B, scaling, *, wide=False):
    return right.delta_weight(gammas[:1], A, lambdas[:1], B[:, :1], scaling, wide=wide)


@mistake("The last term is forgotten.", replaces="delta_weight", breaks=("randlora.L2a", "randlora.L2b", "randlora.L13"))
def last_term_forgotten(gammas, A, lambdas, B, scaling, *, wide=False):
    last = torch.ones_like(lambdas)
    last[-1] = 0 if len(lambdas) > 1 else 1
    return right.delta_weight(gammas, A, lambdas * last, B, scaling, wide=wide)


def _flattened_the_other_way(B):
    """B (large, bases, rank) read as if its columns were numbered by rank first (what pairs PEFT's columns with its rows)."""
    return B.reshape(len(B), B.shape[2], B.shape[1]).mT


@mistake(
    "The columns of B are numbered term by term and the rows of A rank by rank: the pairing of PEFT.",
    replaces="delta_weight",
    breaks=("randlora.L2a", "randlora.L8b", "randlora.L8c"),
)
def pairing_of_peft(gammas, A, lambdas, B, scaling, *, wide=False):
    return right.delta_weight(gammas, A, lambdas, _flattened_the_other_way(B), scaling, wide=wide)


@mistake("The update is computed in float32 and cast back.", replaces="delta_weight", breaks=("randlora.L2a",))
def delta_in_float32(gammas, A, lambdas, B, scaling, *, wide=False):
    return right.delta_weight(*(t.float() for t in (gammas, A, lambdas, B)), scaling, wide=wide).to(A.dtype)


# The layer


@mistake("The forward lacks the scaling.", replaces="forward", breaks=("randlora.L3a", "randlora.L3b", "randlora.L3e"))
def forward_without_scaling(x, W0, gammas, A, lambdas, B, scaling, **options):
    return right.forward(x, W0, gammas, A, lambdas, B, 1.0, **options)


@mistake("The forward applies the scaling twice.", replaces="forward", breaks=("randlora.L3a", "randlora.L3b", "randlora.L3e"))
def forward_scaled_twice(x, W0, gammas, A, lambdas, B, scaling, **options):
    return right.forward(x, W0, gammas, A, lambdas, B, scaling**2, **options)


@mistake("The bias is left out.", replaces="forward", breaks=("randlora.L3a", "randlora.L3b", "randlora.L1c"))
def forward_without_bias(x, W0, gammas, A, lambdas, B, scaling, *, bias=None, mask=None, p=0.0):
    return right.forward(x, W0, gammas, A, lambdas, B, scaling, mask=mask, p=p)


@mistake("The bias is scaled with the adapter.", replaces="forward", breaks=("randlora.L3a", "randlora.L3b", "randlora.L1c"))
def forward_scales_the_bias(x, W0, gammas, A, lambdas, B, scaling, *, bias=None, mask=None, p=0.0):
    bias = None if bias is None else scaling * bias
    return right.forward(x, W0, gammas, A, lambdas, B, scaling, bias=bias, mask=mask, p=p)


@mistake("The frozen path is dropped.", replaces="forward", breaks=("randlora.L3a", "randlora.L3b", "randlora.L1c"))
def forward_drops_the_base(x, W0, gammas, A, lambdas, B, scaling, **options):
    return right.forward(x, 0 * W0, gammas, A, lambdas, B, scaling, **options)


@mistake("The forward pairs B's columns and A's rows as PEFT does.", replaces="forward", breaks=("randlora.L3a", "randlora.L3b"))
def forward_with_the_pairing_of_peft(x, W0, gammas, A, lambdas, B, scaling, **options):
    return right.forward(x, W0, gammas, A, lambdas, _flattened_the_other_way(B), scaling, **options)


@mistake("The forward takes one gamma for all columns of a term.", replaces="forward", breaks=("randlora.L3a", "randlora.L3b"))
def forward_with_one_gamma(x, W0, gammas, A, lambdas, B, scaling, **options):
    return right.forward(x, W0, gammas[:, :1].expand_as(gammas), A, lambdas, B, scaling, **options)


@mistake("The layer computes in float32 inside and casts back.", replaces="forward", breaks=("randlora.L3a", "randlora.L3b"))
def forward_in_float32(x, W0, gammas, A, lambdas, B, scaling, *, bias=None, mask=None, p=0.0):
    short = [t.float() for t in (x, W0, gammas, A, lambdas, B)]
    return right.forward(*short, scaling, bias=None if bias is None else bias.float(), mask=mask, p=p).to(x.dtype)


@mistake("Dropout acts on the frozen path too.", replaces="forward", breaks=("randlora.L3e",))
def dropout_on_the_frozen_path(x, W0, gammas, A, lambdas, B, scaling, *, bias=None, mask=None, p=0.0):
    x = x if mask is None else x * mask / (1 - p)
    return right.forward(x, W0, gammas, A, lambdas, B, scaling, bias=bias)


@mistake("What dropout keeps is not divided by 1 - p.", replaces="forward", breaks=("randlora.L3e",))
def dropout_without_rescaling(x, W0, gammas, A, lambdas, B, scaling, *, bias=None, mask=None, p=0.0):
    return right.forward(x, W0, gammas, A, lambdas, B, scaling, bias=bias, mask=mask)


@mistake("The mask is ignored.", replaces="forward", breaks=("randlora.L3e",))
def mask_ignored(x, W0, gammas, A, lambdas, B, scaling, *, bias=None, mask=None, p=0.0):
    return right.forward(x, W0, gammas, A, lambdas, B, scaling, bias=bias)


@mistake("The mask says what is dropped, not what is kept.", replaces="forward", breaks=("randlora.L3e",))
def mask_inverted(x, W0, gammas, A, lambdas, B, scaling, *, bias=None, mask=None, p=0.0):
    return right.forward(x, W0, gammas, A, lambdas, B, scaling, bias=bias, mask=None if mask is None else ~mask, p=p)


@mistake("The merged weight lacks the scaling.", replaces="merge", breaks=("randlora.L3b", "randlora.L3c"))
def merge_without_scaling(W0, gammas, A, lambdas, B, scaling):
    return right.merge(W0, gammas, A, lambdas, B, 1.0)


@mistake("The update is subtracted in merging.", replaces="merge", breaks=("randlora.L3b", "randlora.L3c"))
def merge_subtracts(W0, gammas, A, lambdas, B, scaling):
    return right.merge(W0, -gammas, A, lambdas, B, scaling)


@mistake(
    "Merging leaves the weight as it is: the update is never added (the safe merge of the official `peft/` code).",
    replaces="merge",
    breaks=("randlora.L3b", "randlora.L3c"),
)
def merge_adds_nothing(W0, gammas, A, lambdas, B, scaling):
    return W0.clone()


@mistake("The merged weight is the update alone.", replaces="merge", breaks=("randlora.L3b", "randlora.L3c"))
def merge_drops_the_base(W0, gammas, A, lambdas, B, scaling):
    return right.merge(0 * W0, gammas, A, lambdas, B, scaling)


@mistake("Unmerging adds the update again.", replaces="unmerge", breaks=("randlora.L3d",))
def unmerge_adds(W, gammas, A, lambdas, B, scaling):
    return right.merge(W, gammas, A, lambdas, B, scaling)


@mistake("Unmerging lacks the scaling.", replaces="unmerge", breaks=("randlora.L3d",))
def unmerge_without_scaling(W, gammas, A, lambdas, B, scaling):
    return right.unmerge(W, gammas, A, lambdas, B, 1.0)


# Gradients


@mistake(
    "The base is repeated for every term before the custom backward, which sums over that axis: both gradients are N times too large "
    "(MyTransformers; Adam hides it).",
    replaces="gradients",
    breaks=("randlora.L7a",),
)
def gradients_times_the_bases(G, gammas, A, lambdas, B, scaling):
    return Gradients(*(len(gammas) * grad for grad in right.gradients(G, gammas, A, lambdas, B, scaling)))


@mistake("The gradients lack the scaling.", replaces="gradients", breaks=("randlora.L7a",))
def gradients_without_scaling(G, gammas, A, lambdas, B, scaling):
    return right.gradients(G, gammas, A, lambdas, B, 1.0)


@mistake("The gradients have the scaling squared.", replaces="gradients", breaks=("randlora.L7a",))
def gradients_scaled_twice(G, gammas, A, lambdas, B, scaling):
    return right.gradients(G, gammas, A, lambdas, B, scaling**2)


@mistake("The gradient of gamma forgets lambda.", replaces="gradients", breaks=("randlora.L7a", "randlora.L7b"))
def gradient_of_gamma_forgets_lambda(G, gammas, A, lambdas, B, scaling):
    found = right.gradients(G, gammas, A, torch.ones_like(lambdas), B, scaling)
    return found._replace(grad_lambdas=right.gradients(G, gammas, A, lambdas, B, scaling).grad_lambdas)


@mistake("The gradient of lambda forgets gamma.", replaces="gradients", breaks=("randlora.L7a", "randlora.L7b"))
def gradient_of_lambda_forgets_gamma(G, gammas, A, lambdas, B, scaling):
    found = right.gradients(G, torch.ones_like(gammas), A, lambdas, B, scaling)
    return found._replace(grad_gammas=right.gradients(G, gammas, A, lambdas, B, scaling).grad_gammas)


@mistake("Only lambdas get a gradient.", replaces="gradients", breaks=("randlora.L7a", "randlora.L7c"))
def gammas_not_trained(G, gammas, A, lambdas, B, scaling):
    found = right.gradients(G, gammas, A, lambdas, B, scaling)
    return found._replace(grad_gammas=0 * found.grad_gammas)


@mistake(
    "No gradient reaches the adapter (the in-projection of the vision code's attention is assigned through `.data`).",
    replaces="gradients",
    breaks=("randlora.L7a", "randlora.L7b"),
)
def no_gradient(G, gammas, A, lambdas, B, scaling):
    return Gradients(torch.zeros_like(gammas), torch.zeros_like(lambdas))


@mistake("The gradients have the wrong sign.", replaces="gradients", breaks=("randlora.L7a",))
def gradients_uphill(G, gammas, A, lambdas, B, scaling):
    return right.gradients(-G, gammas, A, lambdas, B, scaling)


@mistake("The gradient of gamma is the same for all terms.", replaces="gradients", breaks=("randlora.L7a",))
def gradient_of_gamma_summed(G, gammas, A, lambdas, B, scaling):
    found = right.gradients(G, gammas, A, lambdas, B, scaling)
    return found._replace(grad_gammas=found.grad_gammas.sum(dim=0, keepdim=True).expand_as(gammas).clone())


# Least squares and blocks


@mistake("The fit of gammas leaves the scaling out.", replaces="fit_gammas", breaks=("randlora.L9a",))
def fit_gammas_without_scaling(target, A, lambdas, B, scaling):
    return scaling * right.fit_gammas(target, A, lambdas, B, scaling)


@mistake("The fit of gammas takes the lambdas for one.", replaces="fit_gammas", breaks=("randlora.L9a",))
def fit_gammas_ignores_lambdas(target, A, lambdas, B, scaling):
    return right.fit_gammas(target, A, torch.ones_like(lambdas), B, scaling)


@mistake("The fit of gammas takes one gamma for a term.", replaces="fit_gammas", breaks=("randlora.L9a",))
def fit_gammas_averaged(target, A, lambdas, B, scaling):
    found = right.fit_gammas(target, A, lambdas, B, scaling)
    return found.mean(dim=1, keepdim=True).expand_as(found).clone()


@mistake("The fit of lambdas leaves the scaling out.", replaces="fit_lambdas", breaks=("randlora.L9b",))
def fit_lambdas_without_scaling(target, gammas, A, B, scaling):
    return scaling * right.fit_lambdas(target, gammas, A, B, scaling)


@mistake("The fit of lambdas takes the gammas for one.", replaces="fit_lambdas", breaks=("randlora.L9b",))
def fit_lambdas_ignores_gammas(target, gammas, A, B, scaling):
    return right.fit_lambdas(target, torch.ones_like(gammas), A, B, scaling)


@mistake(
    "The fit of lambdas projects each direction by itself, as if they were orthogonal.", replaces="fit_lambdas", breaks=("randlora.L9b",)
)
def fit_lambdas_one_by_one(target, gammas, A, B, scaling):
    M = target.mT if _is_wide(target) else target
    inner = torch.einsum("ojk,oi,ki,ji->jk", B, M, A, gammas)
    squares = torch.einsum("ojk,ki,ji->jk", B.square(), A.square(), gammas.square())
    return inner / (scaling * squares)


@mistake("Each block is divided by its largest singular value.", replaces="svd_blocks", breaks=("randlora.L10a", "randlora.L11"))
def blocks_of_norm_one(W0, *, rank):
    return torch.stack([block / torch.linalg.matrix_norm(block, 2) for block in right.svd_blocks(W0, rank=rank)])


@mistake("The blocks come in the order of rising singular values.", replaces="svd_blocks", breaks=("randlora.L10a", "randlora.L11"))
def blocks_in_reverse(W0, *, rank):
    return right.svd_blocks(W0, rank=rank).flip(0)


@mistake("The blocks take every N-th triplet, not consecutive ones.", replaces="svd_blocks", breaks=("randlora.L10a", "randlora.L11"))
def blocks_interleaved(W0, *, rank):
    U, S, Vh = torch.linalg.svd(W0, full_matrices=False)
    bases = right.num_bases(W0, rank=rank)
    return torch.stack([(U[:, j::bases] * S[j::bases]) @ Vh[j::bases] for j in range(bases)])


@mistake("The blocks are summed up to each: cumulative, not one by one.", replaces="svd_blocks", breaks=("randlora.L10a",))
def blocks_cumulative(W0, *, rank):
    return right.svd_blocks(W0, rank=rank).cumsum(0)


# Looks like a mistake


@mistake(
    "The factor s is applied to lambda beforehand, and not to the sum.",
    replaces="delta_weight",
    harmless="The sum is linear in lambda: the same up to rounding.",
)
def scaling_in_lambda(gammas, A, lambdas, B, scaling, *, wide=False):
    return right.delta_weight(gammas, A, scaling * lambdas, B, 1.0, wide=wide)


@mistake(
    "The input is scaled by gamma for each term, before A, instead of A itself.",
    replaces="forward",
    harmless="A diagonal matrix may be multiplied to either neighbour; it costs a product with x for every term.",
)
def gammas_on_the_input(x, W0, gammas, A, lambdas, B, scaling, *, bias=None, mask=None, p=0.0):
    return right.forward(x, W0, 2 * gammas, A / 2, lambdas, B, scaling, bias=bias, mask=mask, p=p)
