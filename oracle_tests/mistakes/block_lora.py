"""Plausible mistakes in Block-LoRA. The functions keep the reference's parameters; what is not named stands in `options`.

No official code was found. What public code of its relatives does otherwise is named: CLIP-LoRA's scaling, the weighted heads of
HydraLoRA.
"""

import math

import numpy as np
import torch

from loracle.oracle_tests.mistakes import Observables, mistake
from loracle.oracle_tests.strategies import Matrices
from loracle.reference import block_lora as right
from loracle.reference.block_lora import Factors, Gradients, LoRAFactors, Operations, Settings

# Nominal rank and number of blocks of each generic case: blocks, rank / blocks and their product all differ where that is possible
CUTS = ((6, 3), (6, 2), (8, 4), (6, 3), (8, 2), (4, 2), (10, 5), (9, 3))


def _rank(case):
    return CUTS[case.number][0]


def _blocks(case):
    return CUTS[case.number][1]


def _A(case):
    rank, blocks = CUTS[case.number]
    return case.rounded(Matrices(101 * case.number + 1)(rank // blocks, case.sizes["in"]))


def _B(case):
    rank, blocks = CUTS[case.number]
    return case.rounded(Matrices(101 * case.number + 2)(blocks, case.out, rank // blocks))


def _free_of_signs(case, factors):
    """What does not depend on the signs of A's rows: A'A, the squared sizes of the blocks' columns, every block's product with A."""
    A, B = factors
    return {"A'A": A.T @ A, "squares": np.sum(B**2, axis=1), "products": B @ A}


OBSERVABLES = Observables(
    choices={"order": ("add_first", "blockwise")},
    values={
        "rank": _rank,
        "blocks": _blocks,
        "A": _A,
        "B": _B,
        "tokens": lambda case: 3 + 2 * case.number,
        "shapes": lambda case: np.array([(case.out, case.sizes["in"]), (7, 3 + case.number)]),
        "num_samples": lambda case: 50 + 31 * case.number,
    },
    gauge_free={"fit_delta": _free_of_signs},
)


# The start


@mistake("The blocks start random, like A: the base function is changed.", replaces="init", breaks=("block_lora.L1a", "block_lora.L1b"))
def blocks_start_random(W0, *, rank, blocks, generator=None):
    A, B = right.init(W0, rank=rank, blocks=blocks, generator=generator)
    return Factors(A, B.normal_(0, 0.02, generator=generator))


@mistake(
    "The blocks start random with a sum of zero: the base function stays, and nothing is gained, since only the sum is trained.",
    replaces="init",
    breaks=("block_lora.L1a",),
)
def blocks_start_with_zero_sum(W0, *, rank, blocks, generator=None):
    A, B = right.init(W0, rank=rank, blocks=blocks, generator=generator)
    B.normal_(0, 0.02, generator=generator)
    return Factors(A, B - B.mean(dim=0))


@mistake("A keeps the nominal rank while the blocks have rank / blocks columns.", replaces="init", breaks=("block_lora.L1a",))
def start_with_A_of_nominal_rank(W0, *, rank, blocks, generator=None):
    A, _ = right.init(W0, rank=rank, blocks=1, generator=generator)
    return Factors(A, W0.new_zeros(blocks, W0.shape[0], rank // blocks))


@mistake("Every block keeps the nominal rank: more is stored than in LoRA.", replaces="init", breaks=("block_lora.L1a",))
def start_with_blocks_of_nominal_rank(W0, *, rank, blocks, generator=None):
    A, _ = right.init(W0, rank=rank, blocks=1, generator=generator)
    return Factors(A, W0.new_zeros(blocks, W0.shape[0], rank))


@mistake("A has as many rows as there are blocks, each block as many columns.", replaces="init", breaks=("block_lora.L1a",))
def start_with_blocks_for_rank(W0, *, rank, blocks, generator=None):
    A, _ = right.init(W0, rank=blocks, blocks=1, generator=generator)
    return Factors(A, W0.new_zeros(rank // blocks, W0.shape[0], blocks))


@mistake("A starts at zero as well: nothing is ever trained.", replaces="init", breaks=("block_lora.L1a", "block_lora.L1d"))
def start_all_zero(W0, *, rank, blocks, generator=None):
    A, B = right.init(W0, rank=rank, blocks=blocks, generator=generator)
    return Factors(0 * A, B)


@mistake("A is bounded by 1 / sqrt(rank / blocks): Kaiming with the wrong fan-in.", replaces="init", breaks=("block_lora.L1d",))
def start_bounded_by_rank(W0, *, rank, blocks, generator=None):
    A, B = right.init(W0, rank=rank, blocks=blocks, generator=generator)
    return Factors(A * math.sqrt(W0.shape[1] / len(A)), B)


@mistake("A is larger by the root of the number of blocks.", replaces="init", breaks=("block_lora.L1d",))
def start_larger_for_more_blocks(W0, *, rank, blocks, generator=None):
    A, B = right.init(W0, rank=rank, blocks=blocks, generator=generator)
    return Factors(A * math.sqrt(blocks), B)


@mistake("A is Gaussian, of the width that the uniform numbers have.", replaces="init", breaks=("block_lora.L1d",))
def start_gaussian(W0, *, rank, blocks, generator=None):
    A, B = right.init(W0, rank=rank, blocks=blocks, generator=generator)
    return Factors(A.normal_(0, 1 / math.sqrt(3 * W0.shape[1]), generator=generator), B)


@mistake("The generator is ignored.", replaces="init", breaks=("block_lora.L1d",))
def start_ignores_the_generator(W0, *, rank, blocks, generator=None):
    return right.init(W0, rank=rank, blocks=blocks, generator=torch.Generator(W0.device).manual_seed(0))


# The layer. What a wrong layer makes of the factors, and right.forward does the rest


def _mean_blocks(A, B, scaling):
    return right.delta_weight(A, B, scaling / len(B))


def _merge_mean(W0, A, B, scaling):
    return W0 + _mean_blocks(A, B, scaling)


def _unmerge_mean(W, A, B, scaling):
    return W - _mean_blocks(A, B, scaling)


def _gradients_of_the_mean(G, A, B, scaling):
    return right.gradients(G, A, B, scaling / len(B))


@mistake(
    "The blocks are averaged, not summed, throughout: as with heads of equal weight in HydraLoRA.",
    replaces="forward",
    also={"delta_weight": _mean_blocks, "merge": _merge_mean, "unmerge": _unmerge_mean, "gradients": _gradients_of_the_mean},
    breaks=("block_lora.L2a", "block_lora.L2f", "block_lora.L3a", "block_lora.L5a", "block_lora.L7a", "block_lora.L14"),
)
def averaged_throughout(x, W0, A, B, scaling, **options):
    return right.forward(x, W0, A, B, scaling / len(B), **options)


@mistake(
    "The forward averages the blocks.",
    replaces="forward",
    breaks=("block_lora.L2a", "block_lora.L2b", "block_lora.L2c", "block_lora.L2d", "block_lora.L2e"),
)
def forward_averages(x, W0, A, B, scaling, **options):
    return right.forward(x, W0, A, B, scaling / len(B), **options)


@mistake("Block by block, the output is averaged.", replaces="forward", breaks=("block_lora.L2c",))
def blockwise_averages(x, W0, A, B, scaling, *, order="add_first", **options):
    return right.forward(x, W0, A, B, scaling / len(B) if order == "blockwise" else scaling, order=order, **options)


@mistake("Block by block, the last block overwrites the others.", replaces="forward", breaks=("block_lora.L2c", "block_lora.L10"))
def blockwise_overwrites(x, W0, A, B, scaling, *, order="add_first", **options):
    return right.forward(x, W0, A, B[-1:] if order == "blockwise" else B, scaling, order=order, **options)


@mistake("Block by block, the first block is left out.", replaces="forward", breaks=("block_lora.L2c", "block_lora.L10"))
def blockwise_skips_the_first(x, W0, A, B, scaling, *, order="add_first", **options):
    if order == "blockwise":
        B = torch.cat([0 * B[:1], B[1:]])
    return right.forward(x, W0, A, B, scaling, order=order, **options)


@mistake("Block by block, the bias is added with every block.", replaces="forward", breaks=("block_lora.L2c",))
def blockwise_repeats_the_bias(x, W0, A, B, scaling, *, bias=None, order="add_first", **options):
    if bias is not None and order == "blockwise":
        bias = len(B) * bias
    return right.forward(x, W0, A, B, scaling, bias=bias, order=order, **options)


@mistake("Block by block, the frozen layer's output is added with every block.", replaces="forward", breaks=("block_lora.L2c",))
def blockwise_repeats_the_base(x, W0, A, B, scaling, *, bias=None, order="add_first", **options):
    if order == "blockwise":
        W0, bias = len(B) * W0, None if bias is None else len(B) * bias
    return right.forward(x, W0, A, B, scaling, bias=bias, order=order, **options)


@mistake("Added first, the blocks are scaled each and the sum again.", replaces="forward", breaks=("block_lora.L2a", "block_lora.L2e"))
def added_first_and_scaled_twice(x, W0, A, B, scaling, *, order="add_first", **options):
    return right.forward(x, W0, A, B, scaling**2 if order == "add_first" else scaling, order=order, **options)


@mistake("Only the first block enters the output.", replaces="forward", breaks=("block_lora.L2a", "block_lora.L2e"))
def forward_of_the_first_block(x, W0, A, B, scaling, **options):
    return right.forward(x, W0, A, B[:1], scaling, **options)


@mistake(
    "Only the last block enters the output: it overwrites the others.", replaces="forward", breaks=("block_lora.L2a", "block_lora.L2e")
)
def forward_of_the_last_block(x, W0, A, B, scaling, **options):
    return right.forward(x, W0, A, B[-1:], scaling, **options)


@mistake("The forward lacks the scaling.", replaces="forward", breaks=("block_lora.L2a", "block_lora.L2b", "block_lora.L2e"))
def forward_without_scaling(x, W0, A, B, scaling, **options):
    return right.forward(x, W0, A, B, 1.0, **options)


@mistake("The forward applies the scaling twice.", replaces="forward", breaks=("block_lora.L2a", "block_lora.L2b", "block_lora.L2e"))
def forward_scaled_twice(x, W0, A, B, scaling, **options):
    return right.forward(x, W0, A, B, scaling**2, **options)


@mistake("The scaling is multiplied by the number of blocks.", replaces="forward", breaks=("block_lora.L2a", "block_lora.L2e"))
def forward_scaled_by_blocks(x, W0, A, B, scaling, **options):
    return right.forward(x, W0, A, B, scaling * len(B), **options)


@mistake("The frozen path is dropped.", replaces="forward", breaks=("block_lora.L1c", "block_lora.L2a", "block_lora.L2e"))
def forward_drops_the_base(x, W0, A, B, scaling, **options):
    return right.forward(x, 0 * W0, A, B, scaling, **options)


@mistake("The bias is left out.", replaces="forward", breaks=("block_lora.L2b", "block_lora.L2c"))
def forward_without_bias(x, W0, A, B, scaling, *, bias=None, **options):
    return right.forward(x, W0, A, B, scaling, **options)


@mistake("The bias is scaled with the adapter.", replaces="forward", breaks=("block_lora.L2b", "block_lora.L2c"))
def forward_scales_the_bias(x, W0, A, B, scaling, *, bias=None, **options):
    return right.forward(x, W0, A, B, scaling, bias=None if bias is None else scaling * bias, **options)


@mistake("The bias is added once for each block.", replaces="forward", breaks=("block_lora.L2b", "block_lora.L2c"))
def forward_repeats_the_bias(x, W0, A, B, scaling, *, bias=None, **options):
    return right.forward(x, W0, A, B, scaling, bias=None if bias is None else len(B) * bias, **options)


@mistake("The dropout mask is ignored.", replaces="forward", breaks=("block_lora.L2d",))
def dropout_ignored(x, W0, A, B, scaling, *, mask=None, p=0.0, **options):
    return right.forward(x, W0, A, B, scaling, **options)


@mistake("What dropout keeps is not divided by 1 - p.", replaces="forward", breaks=("block_lora.L2d",))
def dropout_without_rescaling(x, W0, A, B, scaling, *, mask=None, p=0.0, **options):
    return right.forward(x, W0, A, B, scaling, mask=mask, **options)


@mistake("Dropout acts on the frozen path too.", replaces="forward", breaks=("block_lora.L2d",))
def dropout_on_the_frozen_path(x, W0, A, B, scaling, *, mask=None, p=0.0, **options):
    if mask is not None:
        x = x * mask / (1 - p)
    return right.forward(x, W0, A, B, scaling, **options)


@mistake("The mask keeps what it should drop.", replaces="forward", breaks=("block_lora.L2d",))
def dropout_mask_reversed(x, W0, A, B, scaling, *, mask=None, p=0.0, **options):
    return right.forward(x, W0, A, B, scaling, mask=None if mask is None else ~mask, p=p, **options)


@mistake(
    "Each block has a mask of its own, here the given one moved on by one place a block.", replaces="forward", breaks=("block_lora.L2d",)
)
def dropout_of_each_block(x, W0, A, B, scaling, *, mask=None, p=0.0, **options):
    if mask is None:
        return right.forward(x, W0, A, B, scaling, **options)
    frozen = right.forward(x, W0, A, 0 * B, scaling, **options)
    shares = [right.forward(x, 0 * W0, A, B_i[None], scaling, mask=mask.roll(i, -1), p=p) for i, B_i in enumerate(B)]
    return frozen + sum(shares)


@mistake("The layer computes in float32 inside and casts back.", replaces="forward", breaks=("block_lora.L2a", "block_lora.L2b"))
def forward_in_float32(x, W0, A, B, scaling, *, bias=None, **options):
    short = [t.float() for t in (x, W0, A, B)]
    return right.forward(*short, scaling, bias=None if bias is None else bias.float(), **options).to(x.dtype)


@mistake("The update averages the blocks.", replaces="delta_weight", breaks=("block_lora.L2f", "block_lora.L3a", "block_lora.L8"))
def delta_averages(A, B, scaling):
    return _mean_blocks(A, B, scaling)


@mistake("The update lacks the scaling.", replaces="delta_weight", breaks=("block_lora.L2f", "block_lora.L3a", "block_lora.L14"))
def delta_without_scaling(A, B, scaling):
    return right.delta_weight(A, B, 1.0)


@mistake("The update has the scaling squared.", replaces="delta_weight", breaks=("block_lora.L2f", "block_lora.L3a"))
def delta_scaled_twice(A, B, scaling):
    return right.delta_weight(A, B, scaling**2)


@mistake("Only the first block enters the update.", replaces="delta_weight", breaks=("block_lora.L2f", "block_lora.L3a", "block_lora.L10"))
def delta_of_the_first_block(A, B, scaling):
    return right.delta_weight(A, B[:1], scaling)


@mistake(
    "The blocks are joined by a reshape that does not move the axis of blocks first, so that rows of different blocks are mixed.",
    replaces="delta_weight",
    breaks=("block_lora.L2f", "block_lora.L3a", "block_lora.L10"),
)
def delta_reshaped(A, B, scaling):
    blocks, m, short = B.shape
    return scaling * B.reshape(m, blocks * short) @ A.repeat(blocks, 1)


@mistake(
    "Every block has its own rows of A: the factors are those of a LoRA of nominal rank whose A is not the same in all blocks.",
    replaces="delta_weight",
    breaks=("block_lora.L2f", "block_lora.L3a", "block_lora.L8", "block_lora.L10"),
)
def delta_of_full_rank(A, B, scaling):
    return scaling * sum(B_i @ A.roll(i, dims=1) for i, B_i in enumerate(B))


@mistake("The merged weight lacks the scaling.", replaces="merge", breaks=("block_lora.L2e", "block_lora.L2g"))
def merge_without_scaling(W0, A, B, scaling):
    return right.merge(W0, A, B, 1.0)


@mistake("The merged weight has the scaling squared.", replaces="merge", breaks=("block_lora.L2e", "block_lora.L2g"))
def merge_scaled_twice(W0, A, B, scaling):
    return right.merge(W0, A, B, scaling**2)


@mistake("The merged weight averages the blocks.", replaces="merge", breaks=("block_lora.L2e", "block_lora.L2g"))
def merge_averages(W0, A, B, scaling):
    return _merge_mean(W0, A, B, scaling)


@mistake("Only the first block is merged.", replaces="merge", breaks=("block_lora.L2e", "block_lora.L2g"))
def merge_of_the_first_block(W0, A, B, scaling):
    return right.merge(W0, A, B[:1], scaling)


@mistake(
    "The base is added once for each block in merging.", replaces="merge", breaks=("block_lora.L1b", "block_lora.L2e", "block_lora.L2g")
)
def merge_repeats_the_base(W0, A, B, scaling):
    return right.merge(len(B) * W0, A, B, scaling)


@mistake("The update is subtracted in merging.", replaces="merge", breaks=("block_lora.L2e", "block_lora.L2g"))
def merge_subtracts(W0, A, B, scaling):
    return right.unmerge(W0, A, B, scaling)


@mistake("The merged weight is the update alone.", replaces="merge", breaks=("block_lora.L1b", "block_lora.L2e", "block_lora.L2g"))
def merge_drops_the_base(W0, A, B, scaling):
    return right.delta_weight(A, B, scaling)


@mistake("Unmerging adds the update again.", replaces="unmerge", breaks=("block_lora.L2h",))
def unmerge_adds(W, A, B, scaling):
    return right.merge(W, A, B, scaling)


@mistake("Unmerging lacks the scaling.", replaces="unmerge", breaks=("block_lora.L2h",))
def unmerge_without_scaling(W, A, B, scaling):
    return right.unmerge(W, A, B, 1.0)


@mistake("Unmerging takes off the mean of the blocks.", replaces="unmerge", breaks=("block_lora.L2h",))
def unmerge_averages(W, A, B, scaling):
    return _unmerge_mean(W, A, B, scaling)


@mistake("Unmerging takes off the first block only.", replaces="unmerge", breaks=("block_lora.L2h",))
def unmerge_of_the_first_block(W, A, B, scaling):
    return right.unmerge(W, A, B[:1], scaling)


# Gradients

_TRAININGS = ("block_lora.L7a", "block_lora.L7b", "block_lora.L7c", "block_lora.L7d")


@mistake(
    "A's gradient comes through the first block only: the others are detached.",
    replaces="gradients",
    breaks=("block_lora.L5a", "block_lora.L6", *_TRAININGS),
)
def gradient_through_one_block(G, A, B, scaling):
    return Gradients(right.gradients(G, A, B[:1], scaling).grad_A, right.gradients(G, A, B, scaling).grad_B)


@mistake(
    "A's gradient is the mean over the blocks, not their sum.",
    replaces="gradients",
    breaks=("block_lora.L5a", "block_lora.L6", *_TRAININGS),
)
def gradient_of_A_averaged(G, A, B, scaling):
    grad_A, grad_B = right.gradients(G, A, B, scaling)
    return Gradients(grad_A / len(B), grad_B)


@mistake(
    "A gets no gradient: the blocks are summed, or A is read, without a graph.",
    replaces="gradients",
    breaks=("block_lora.L5a", "block_lora.L6", *_TRAININGS),
)
def gradient_of_A_lost(G, A, B, scaling):
    grad_A, grad_B = right.gradients(G, A, B, scaling)
    return Gradients(0 * grad_A, grad_B)


@mistake(
    "A's gradient goes through all blocks side by side in the wrong order: a block's rows meet another block's.",
    replaces="gradients",
    breaks=("block_lora.L5a", "block_lora.L6"),
)
def gradient_of_A_reshaped(G, A, B, scaling):
    blocks, m, short = B.shape
    mixed = B.reshape(m, blocks, short).sum(dim=1)
    return Gradients(scaling * mixed.mT @ G, right.gradients(G, A, B, scaling).grad_B)


@mistake(
    "The gradient is shared out among the blocks: each gets one b-th of it, which undoes the larger learning rate.",
    replaces="gradients",
    breaks=("block_lora.L5a", "block_lora.L6", "block_lora.L7a", "block_lora.L7b"),
)
def gradient_shared_out(G, A, B, scaling):
    grad_A, grad_B = right.gradients(G, A, B, scaling)
    return Gradients(grad_A, grad_B / len(B))


@mistake(
    "Every block gets the gradient b times.",
    replaces="gradients",
    breaks=("block_lora.L5a", "block_lora.L6", "block_lora.L7a", "block_lora.L7b"),
)
def gradient_of_blocks_multiplied(G, A, B, scaling):
    grad_A, grad_B = right.gradients(G, A, B, scaling)
    return Gradients(grad_A, grad_B * len(B))


@mistake(
    "Only the first block gets a gradient: the layer is LoRA of rank r / b with idle blocks beside it.",
    replaces="gradients",
    breaks=("block_lora.L5a", "block_lora.L5b", "block_lora.L6", *_TRAININGS, "block_lora.L7e"),
)
def gradient_of_the_first_block_only(G, A, B, scaling):
    grad_A, grad_B = right.gradients(G, A, B, scaling)
    return Gradients(grad_A, torch.cat([grad_B[:1], 0 * grad_B[1:]]))


@mistake("Both gradients lack the scaling.", replaces="gradients", breaks=("block_lora.L5a", "block_lora.L6", *_TRAININGS))
def gradients_without_scaling(G, A, B, scaling):
    return right.gradients(G, A, B, 1.0)


@mistake("Both gradients have the scaling squared.", replaces="gradients", breaks=("block_lora.L5a", "block_lora.L6", *_TRAININGS))
def gradients_scaled_twice(G, A, B, scaling):
    return right.gradients(G, A, B, scaling**2)


@mistake("Both gradients have the wrong sign.", replaces="gradients", breaks=("block_lora.L5a", "block_lora.L6", *_TRAININGS))
def gradients_uphill(G, A, B, scaling):
    return right.gradients(-G, A, B, scaling)


# The same layer as a LoRA


@mistake(
    "A's rows are repeated one by one, while the blocks stand side by side: the wrong rows meet.",
    replaces="to_lora",
    breaks=("block_lora.L3a", "block_lora.L3b"),
)
def rows_repeated_one_by_one(A, B):
    return LoRAFactors(A.repeat_interleave(len(B), dim=0), right.to_lora(A, B).B)


@mistake(
    "The blocks are joined by a reshape that does not move the axis of blocks first.",
    replaces="to_lora",
    breaks=("block_lora.L3a", "block_lora.L3b"),
)
def joined_by_reshape(A, B):
    blocks, m, short = B.shape
    return LoRAFactors(right.to_lora(A, B).A, B.reshape(m, blocks * short))


@mistake(
    "The columns of all blocks are interleaved, and so are A's rows: the same product, in another order.",
    replaces="to_lora",
    breaks=("block_lora.L3b",),
)
def interleaved(A, B):
    return LoRAFactors(A.repeat_interleave(len(B), dim=0), B.permute(1, 2, 0).flatten(1))


@mistake("Each copy of A is divided by the number of blocks.", replaces="to_lora", breaks=("block_lora.L3a", "block_lora.L3b"))
def copies_shared_out(A, B):
    big_A, big_B = right.to_lora(A, B)
    return LoRAFactors(big_A / len(B), big_B)


@mistake("The compact form is given in place of the one of nominal rank.", replaces="to_lora", breaks=("block_lora.L3a", "block_lora.L3b"))
def compact_for_nominal(A, B):
    return right.to_compact_lora(A, B)


@mistake("The form of nominal rank is given in place of the compact one.", replaces="to_compact_lora", breaks=("block_lora.L4",))
def nominal_for_compact(A, B):
    return right.to_lora(A, B)


@mistake("The compact B is the mean of the blocks.", replaces="to_compact_lora", breaks=("block_lora.L4",))
def compact_averages(A, B):
    return LoRAFactors(A.clone(), B.mean(dim=0))


@mistake("The compact B is the first block.", replaces="to_compact_lora", breaks=("block_lora.L4",))
def compact_of_the_first_block(A, B):
    return LoRAFactors(A.clone(), B[0].clone())


@mistake("The compact form shares the factor b between A and B.", replaces="to_compact_lora", breaks=("block_lora.L4",))
def compact_shares_the_factor(A, B):
    return LoRAFactors(A * math.sqrt(len(B)), B.sum(dim=0) / math.sqrt(len(B)))


@mistake("The learning rate of B stays as it is.", replaces="compact_settings", breaks=("block_lora.L7f",))
def rate_of_B_kept(lr, *, blocks, weight_decay=0.0):
    return Settings(lr, lr, weight_decay, weight_decay / blocks)


@mistake("The learning rate of B is divided by the number of blocks.", replaces="compact_settings", breaks=("block_lora.L7f",))
def rate_of_B_divided(lr, *, blocks, weight_decay=0.0):
    return Settings(lr, lr / blocks, weight_decay, weight_decay / blocks)


@mistake(
    "The learning rate of B is multiplied by the root of the number of blocks, as for gradients of independent heads.",
    replaces="compact_settings",
    breaks=("block_lora.L7f",),
)
def rate_of_B_by_the_root(lr, *, blocks, weight_decay=0.0):
    return Settings(lr, math.sqrt(blocks) * lr, weight_decay, weight_decay / blocks)


@mistake("The learning rate of A is multiplied too.", replaces="compact_settings", breaks=("block_lora.L7f",))
def both_rates_multiplied(lr, *, blocks, weight_decay=0.0):
    return Settings(blocks * lr, blocks * lr, weight_decay, weight_decay / blocks)


@mistake("The learning rate of A is multiplied in place of B's.", replaces="compact_settings", breaks=("block_lora.L7f",))
def rate_of_A_multiplied(lr, *, blocks, weight_decay=0.0):
    return Settings(blocks * lr, lr, weight_decay / blocks, weight_decay)


@mistake(
    "The decay of B is not divided: the sum of the blocks decays b times as fast.", replaces="compact_settings", breaks=("block_lora.L7f",)
)
def decay_of_B_kept(lr, *, blocks, weight_decay=0.0):
    return Settings(lr, blocks * lr, weight_decay, weight_decay)


@mistake("The decay of both factors is divided.", replaces="compact_settings", breaks=("block_lora.L7f",))
def both_decays_divided(lr, *, blocks, weight_decay=0.0):
    return Settings(lr, blocks * lr, weight_decay / blocks, weight_decay / blocks)


@mistake("The weight decay is forgotten.", replaces="compact_settings", breaks=("block_lora.L7f",))
def decay_forgotten(lr, *, blocks, weight_decay=0.0):
    return Settings(lr, blocks * lr, 0.0, 0.0)


@mistake("Weight decay is 0.01 by default, as in torch's AdamW.", replaces="compact_settings", breaks=("block_lora.L7f",))
def decay_by_default(lr, *, blocks, weight_decay=0.01):
    return right.compact_settings(lr, blocks=blocks, weight_decay=weight_decay)


# The best approximation


@mistake(
    "The whole update of rank r / b stands in every block: the sum is b times too large.",
    replaces="fit_delta",
    breaks=("block_lora.L9a", "block_lora.L9c"),
)
def fit_in_every_block(D, scaling=1.0, *, rank, blocks):
    A, B = right.fit_delta(D, scaling, rank=rank, blocks=blocks)
    return Factors(A, B * blocks)


@mistake(
    "The update stands in the first block, the others are zero: nothing is lost, but they are not the smallest.",
    replaces="fit_delta",
    breaks=("block_lora.L9b",),
)
def fit_in_the_first_block(D, scaling=1.0, *, rank, blocks):
    A, B = right.fit_delta(D, scaling, rank=rank, blocks=blocks)
    return Factors(A, torch.cat([B.sum(dim=0)[None], 0 * B[1:]]))


@mistake(
    "Each block takes the next singular directions, as if it had an A of its own: rank r is claimed.",
    replaces="fit_delta",
    breaks=("block_lora.L9a", "block_lora.L9b", "block_lora.L9c"),
)
def fit_of_nominal_rank(D, scaling=1.0, *, rank, blocks):
    A, B = right.fit_delta(D, scaling, rank=rank, blocks=1)
    # One choice of the free signs: they do not drop out where a block meets another's rows
    signs = A.gather(1, A.abs().argmax(dim=1, keepdim=True)).sign()
    A, B = signs * A, B[0] * signs.mT
    return Factors(A[: rank // blocks].clone(), torch.stack(B.split(rank // blocks, dim=1)))


@mistake("The fit does not divide by the scaling.", replaces="fit_delta", breaks=("block_lora.L9a",))
def fit_without_scaling(D, scaling=1.0, *, rank, blocks):
    return right.fit_delta(D, rank=rank, blocks=blocks)


@mistake("The fit multiplies by the scaling.", replaces="fit_delta", breaks=("block_lora.L9a",))
def fit_times_scaling(D, scaling=1.0, *, rank, blocks):
    return right.fit_delta(D, 1 / scaling, rank=rank, blocks=blocks)


@mistake("The scaling of the fit is 2 by default.", replaces="fit_delta", breaks=("block_lora.L9c",))
def fit_default_scaling(D, scaling=2.0, *, rank, blocks):
    return right.fit_delta(D, scaling, rank=rank, blocks=blocks)


@mistake("The roots of the singular values stand in both factors.", replaces="fit_delta", breaks=("block_lora.L9b",))
def fit_shares_singular_values(D, scaling=1.0, *, rank, blocks):
    A, B = right.fit_delta(D, scaling, rank=rank, blocks=blocks)
    root = B.sum(dim=0).norm(dim=0).sqrt()
    return Factors(A * root[:, None], B / root)


@mistake("The singular values are left out.", replaces="fit_delta", breaks=("block_lora.L9a", "block_lora.L9c"))
def fit_without_singular_values(D, scaling=1.0, *, rank, blocks):
    A, B = right.fit_delta(D, scaling, rank=rank, blocks=blocks)
    return Factors(A, B / (B.norm(dim=1, keepdim=True) * scaling * blocks))


@mistake("The smallest singular directions are taken.", replaces="fit_delta", breaks=("block_lora.L9a", "block_lora.L9c"))
def fit_of_the_smallest(D, scaling=1.0, *, rank, blocks):
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    short = rank // blocks
    return Factors(Vh[-short:].clone(), (U[:, -short:] * S[-short:] / scaling / blocks).repeat(blocks, 1, 1))


@mistake("The decomposition is made in float32.", replaces="fit_delta", breaks=("block_lora.L9a", "block_lora.L9b"))
def fit_in_float32(D, scaling=1.0, *, rank, blocks):
    A, B = right.fit_delta(D.float(), scaling, rank=rank, blocks=blocks)
    return Factors(A.to(D.dtype), B.to(D.dtype))


# Counting


@mistake("LoRA's parameters of the nominal rank are counted.", replaces="num_trainable", breaks=("block_lora.L11a",))
def counts_as_lora(W0, *, rank, blocks):
    return rank * sum(W0.shape)


@mistake("The wrong factor is shared, or the sides are exchanged: n r + m r / b.", replaces="num_trainable", breaks=("block_lora.L11a",))
def counts_a_shared_B(W0, *, rank, blocks):
    return right.num_trainable(W0.mT, rank=rank, blocks=blocks)


@mistake(
    "The effective parameters are counted, those of LoRA of rank r / b, not the stored ones.",
    replaces="num_trainable",
    breaks=("block_lora.L11a",),
)
def counts_effective_parameters(W0, *, rank, blocks):
    return rank // blocks * sum(W0.shape)


@mistake("Every block is counted at the nominal rank.", replaces="num_trainable", breaks=("block_lora.L11a",))
def counts_blocks_of_nominal_rank(W0, *, rank, blocks):
    return blocks * rank * W0.shape[0] + rank // blocks * W0.shape[1]


@mistake("The shared A is not counted.", replaces="num_trainable", breaks=("block_lora.L11a",))
def counts_no_A(W0, *, rank, blocks):
    return rank * W0.shape[0]


@mistake("The sum of the blocks is counted for every row of x.", replaces="mult_adds", breaks=("block_lora.L11b", "block_lora.L11c"))
def sum_counted_for_every_row(W0, *, rank, blocks, tokens, order="add_first"):
    found = right.mult_adds(W0, rank=rank, blocks=blocks, tokens=tokens, order=order)
    extra = (tokens - 1) * (blocks - 1) * W0.shape[0] * (rank // blocks) if order == "add_first" else 0
    return Operations(found.multiplications, found.additions + extra)


@mistake("The sum of the blocks is not counted.", replaces="mult_adds", breaks=("block_lora.L11b", "block_lora.L11c"))
def sum_not_counted(W0, *, rank, blocks, tokens, order="add_first"):
    found = right.mult_adds(W0, rank=rank, blocks=blocks, tokens=tokens, order=order)
    extra = (blocks - 1) * W0.shape[0] * (rank // blocks) if order == "add_first" else 0
    return Operations(found.multiplications, found.additions - extra)


@mistake("Block by block, adding up the outputs is not counted.", replaces="mult_adds", breaks=("block_lora.L11b",))
def sum_of_outputs_not_counted(W0, *, rank, blocks, tokens, order="add_first"):
    found = right.mult_adds(W0, rank=rank, blocks=blocks, tokens=tokens, order=order)
    extra = (blocks - 1) * W0.shape[0] * tokens if order == "blockwise" else 0
    return Operations(found.multiplications, found.additions - extra)


@mistake("Block by block, the shared down-projection is counted for every block.", replaces="mult_adds", breaks=("block_lora.L11b",))
def down_counted_for_every_block(W0, *, rank, blocks, tokens, order="add_first"):
    found = right.mult_adds(W0, rank=rank, blocks=blocks, tokens=tokens, order=order)
    times = (blocks - 1) * tokens * (rank // blocks) if order == "blockwise" else 0
    return Operations(found.multiplications + times * W0.shape[1], found.additions + times * (W0.shape[1] - 1))


@mistake("A dot product of length k is counted with k additions.", replaces="mult_adds", breaks=("block_lora.L11b", "block_lora.L11c"))
def one_addition_too_many(W0, *, rank, blocks, tokens, order="add_first"):
    found = right.mult_adds(W0, rank=rank, blocks=blocks, tokens=tokens, order=order)
    products = tokens * (rank // blocks + W0.shape[0] * (1 if order == "add_first" else blocks))
    return Operations(found.multiplications, found.additions + products)


@mistake("The two orders are exchanged.", replaces="mult_adds", breaks=("block_lora.L11b", "block_lora.L11c"))
def orders_exchanged(W0, *, rank, blocks, tokens, order="add_first"):
    other = "blockwise" if order == "add_first" else "add_first"
    return right.mult_adds(W0, rank=rank, blocks=blocks, tokens=tokens, order=other)


@mistake("Block by block is the default of the count.", replaces="mult_adds", breaks=("block_lora.L11c",))
def blockwise_by_default(W0, *, rank, blocks, tokens, order="blockwise"):
    return right.mult_adds(W0, rank=rank, blocks=blocks, tokens=tokens, order=order)


@mistake(
    "The cost of LoRA of nominal rank is given, whatever the blocks.", replaces="mult_adds", breaks=("block_lora.L11b", "block_lora.L11c")
)
def counts_work_of_lora(W0, *, rank, blocks, tokens, order="add_first"):
    return right.mult_adds(W0, rank=rank, blocks=1, tokens=tokens, order=order)


@mistake("Multiplications and additions are exchanged.", replaces="mult_adds", breaks=("block_lora.L11b", "block_lora.L11c"))
def operations_exchanged(W0, *, rank, blocks, tokens, order="add_first"):
    found = right.mult_adds(W0, rank=rank, blocks=blocks, tokens=tokens, order=order)
    return Operations(found.additions, found.multiplications)


# The bound


@mistake("The bound takes bits for nats: ln 2 is missing.", replaces="generalization_bound", breaks=("block_lora.L12a",))
def bound_in_bits(shapes, *, rank, blocks, bits, num_samples, loss_sigma):
    return right.generalization_bound(
        shapes, rank=rank, blocks=blocks, bits=bits / math.log(2), num_samples=num_samples, loss_sigma=loss_sigma
    )


@mistake("The root is missing.", replaces="generalization_bound", breaks=("block_lora.L12a", "block_lora.L12b"))
def bound_without_root(shapes, **options):
    return right.generalization_bound(shapes, **options) ** 2


@mistake("The factor 2 is missing.", replaces="generalization_bound", breaks=("block_lora.L12a",))
def bound_without_two(shapes, **options):
    return right.generalization_bound(shapes, **options) / math.sqrt(2)


@mistake("Sigma stands in the bound unsquared.", replaces="generalization_bound", breaks=("block_lora.L12a",))
def bound_with_sigma_unsquared(shapes, *, loss_sigma, **options):
    return right.generalization_bound(shapes, loss_sigma=math.sqrt(loss_sigma), **options)


@mistake("The number of blocks is ignored: LoRA's bound.", replaces="generalization_bound", breaks=("block_lora.L12a", "block_lora.L12b"))
def bound_of_lora(shapes, *, blocks, **options):
    return right.generalization_bound(shapes, blocks=1, **options)


@mistake(
    "Both sides are divided by the number of blocks: the effective parameters, not the stored ones.",
    replaces="generalization_bound",
    breaks=("block_lora.L12a", "block_lora.L12b"),
)
def bound_of_effective_parameters(shapes, *, rank, blocks, **options):
    return right.generalization_bound(shapes, rank=rank // blocks, blocks=1, **options)


@mistake(
    "The outputs are divided by the number of blocks, not the inputs.",
    replaces="generalization_bound",
    breaks=("block_lora.L12a", "block_lora.L12b"),
)
def bound_divides_the_outputs(shapes, **options):
    return right.generalization_bound(shapes.flip(1), **options)


@mistake("The bits of a parameter are left out.", replaces="generalization_bound", breaks=("block_lora.L12a",))
def bound_without_bits(shapes, *, bits, **options):
    return right.generalization_bound(shapes, bits=1.0, **options)


@mistake("Only the first adapted weight is counted.", replaces="generalization_bound", breaks=("block_lora.L12a", "block_lora.L12b"))
def bound_of_one_weight(shapes, **options):
    return right.generalization_bound(shapes[:1], **options)


@mistake(
    "The bound falls with the samples, not with their root.", replaces="generalization_bound", breaks=("block_lora.L12a", "block_lora.L12b")
)
def bound_falls_too_fast(shapes, *, num_samples, **options):
    return right.generalization_bound(shapes, num_samples=num_samples**2, **options)


# The scaling


@mistake(
    "The scaling is alpha / sqrt(rank) by default, as in the code of CLIP-LoRA.", replaces="scaling_factor", breaks=("block_lora.L15a",)
)
def root_by_default(alpha, rank, *, blocks, rslora=True, per_block=False):
    return right.scaling_factor(alpha, rank, blocks=blocks, rslora=rslora, per_block=per_block)


@mistake(
    "The scaling is that of the rank of one block by default: b times as large.",
    replaces="scaling_factor",
    breaks=("block_lora.L15a", "block_lora.L15b"),
)
def per_block_by_default(alpha, rank, *, blocks, rslora=False, per_block=True):
    return right.scaling_factor(alpha, rank, blocks=blocks, rslora=rslora, per_block=per_block)


@mistake("The scaling knows no root.", replaces="scaling_factor", breaks=("block_lora.L15b", "block_lora.L15c"))
def no_root(alpha, rank, *, blocks, rslora=False, per_block=False):
    return right.scaling_factor(alpha, rank, blocks=blocks, per_block=per_block)


@mistake("Alpha stands under the root.", replaces="scaling_factor", breaks=("block_lora.L15b", "block_lora.L15c"))
def alpha_under_the_root(alpha, rank, *, blocks, rslora=False, per_block=False):
    found = right.scaling_factor(alpha, rank, blocks=blocks, per_block=per_block)
    return math.sqrt(found) if rslora else found


@mistake("The scaling is divided by the number of blocks.", replaces="scaling_factor", breaks=("block_lora.L15a", "block_lora.L15b"))
def scaling_divided_by_blocks(alpha, rank, *, blocks, rslora=False, per_block=False):
    return right.scaling_factor(alpha / blocks, rank, blocks=blocks, rslora=rslora, per_block=per_block)


@mistake("Asked for per block, the scaling still has the nominal rank.", replaces="scaling_factor", breaks=("block_lora.L15c",))
def per_block_ignored(alpha, rank, *, blocks, rslora=False, per_block=False):
    return right.scaling_factor(alpha, rank, blocks=blocks, rslora=rslora)


# The other reading


@mistake(
    "Along the features, each block of outputs sees only its own piece of the input.",
    replaces="delta_weight_features",
    breaks=("block_lora.L16a", "block_lora.L16b"),
)
def features_block_diagonal(A, B, scaling):
    return scaling * torch.block_diag(*(B_i @ A for B_i in B))


@mistake(
    "Along the features, the columns of A are repeated one by one.",
    replaces="delta_weight_features",
    breaks=("block_lora.L16a", "block_lora.L16b"),
)
def features_interleaved(A, B, scaling):
    return scaling * (B.flatten(0, 1) @ A).repeat_interleave(len(B), dim=1)


@mistake(
    "Along the features, the pieces of the input are averaged.",
    replaces="delta_weight_features",
    breaks=("block_lora.L16a", "block_lora.L16b"),
)
def features_averaged(A, B, scaling):
    return right.delta_weight_features(A, B, scaling / len(B))


@mistake("Along the features, the scaling is left out.", replaces="delta_weight_features", breaks=("block_lora.L16a", "block_lora.L16b"))
def features_without_scaling(A, B, scaling):
    return right.delta_weight_features(A, B, 1.0)


@mistake(
    "Along the features, every block of outputs has the first block.",
    replaces="delta_weight_features",
    breaks=("block_lora.L16a", "block_lora.L16b"),
)
def features_of_the_first_block(A, B, scaling):
    return right.delta_weight_features(A, B[:1].expand_as(B), scaling)


# What looks like a mistake and is none


@mistake(
    "The blocks are added up in another order.",
    replaces="to_compact_lora",
    harmless="A sum does not depend on the order of its terms, up to rounding.",
)
def compact_in_another_order(A, B):
    return LoRAFactors(A.clone(), B.flip(0).sum(dim=0))


@mistake(
    "The forward multiplies out A and B before it meets the input.",
    replaces="forward",
    harmless="The output is the same up to rounding; only the cost differs, which no value shows.",
)
def forward_through_the_update(x, W0, A, B, scaling, *, bias=None, mask=None, p=0.0, order="add_first"):
    kept = x if mask is None else x * mask / (1 - p)
    y = x @ W0.mT + kept @ right.delta_weight(A, B, scaling).mT
    return y if bias is None else y + bias


@mistake(
    "The approximation takes the right singular vectors from a decomposition of D' D.",
    replaces="fit_delta",
    harmless="For the leading directions of a spectrum that lies apart it gives the same space, up to signs and rounding.",
)
def fit_by_eigenvectors(D, scaling=1.0, *, rank, blocks):
    short = rank // blocks
    A = torch.linalg.eigh(D.mT @ D).eigenvectors.flip(1)[:, :short].mT.contiguous()
    return Factors(A, (D @ A.mT / scaling / blocks).repeat(blocks, 1, 1))
