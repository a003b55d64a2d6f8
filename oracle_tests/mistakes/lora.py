"""Plausible mistakes in LoRA. The functions keep the reference's parameters; what is wrong is one line in each."""

import math

import torch

from loracle.oracle_tests.mistakes import Observables, mistake
from loracle.reference import lora as right

OBSERVABLES = Observables(choices={"distribution": ("gaussian",)})

# Scaling


@mistake("The merged weight lacks the scaling that the forward has.", replaces="merge", breaks=("lora.L2a", "lora.L2c"))
def merge_without_scaling(W0, A, B, scaling):
    return W0 + B @ A


@mistake("The forward lacks the scaling that the merged weight has.", replaces="forward", breaks=("lora.L2a",))
def forward_without_scaling(x, W0, A, B, scaling, *, bias=None, mask=None, p=0.0):
    return right.forward(x, W0, A, B, 1.0, bias=bias, mask=mask, p=p)


def _merge_scaled_twice(W0, A, B, scaling):
    return right.merge(W0, A, B, scaling**2)


def _unmerge_scaled_twice(W, A, B, scaling):
    return right.unmerge(W, A, B, scaling**2)


def _delta_weight_scaled_twice(A, B, scaling):
    return right.delta_weight(A, B, scaling**2)


@mistake(
    "The scaling is applied twice, inside B and outside, in the forward and in merging alike.",
    replaces="forward",
    also={"merge": _merge_scaled_twice, "unmerge": _unmerge_scaled_twice, "delta_weight": _delta_weight_scaled_twice},
    breaks=("lora.L2c", "lora.L2d", "lora.L8"),
)
def scaled_twice(x, W0, A, B, scaling, *, bias=None, mask=None, p=0.0):
    return right.forward(x, W0, A, B, scaling**2, bias=bias, mask=mask, p=p)


@mistake("The scaling multiplies the pretrained weight too.", replaces="merge", breaks=("lora.L2a", "lora.L2c"))
def merge_scales_the_base(W0, A, B, scaling):
    return scaling * (W0 + B @ A)


@mistake("The update lacks the scaling.", replaces="delta_weight", breaks=("lora.L2d", "lora.L11"))
def delta_without_scaling(A, B, scaling):
    return B @ A


@mistake("The scaling is alpha itself, not alpha / rank.", replaces="scaling_factor", breaks=("lora.L10a",))
def scaling_is_alpha(alpha, rank, *, rslora=False):
    return right.scaling_factor(alpha, rank, rslora=True) if rslora else alpha


@mistake("The option for rsLoRA is ignored: the scaling stays alpha / rank.", replaces="scaling_factor", breaks=("lora.L10b", "lora.L9b"))
def rslora_ignored(alpha, rank, *, rslora=False):
    return alpha / rank


@mistake("rsLoRA divides by the square of the rank, not by its root.", replaces="scaling_factor", breaks=("lora.L10b",))
def rslora_squares_the_rank(alpha, rank, *, rslora=False):
    return alpha / rank**2 if rslora else alpha / rank


@mistake("rsLoRA takes the root of alpha too.", replaces="scaling_factor", breaks=("lora.L10b",))
def rslora_roots_alpha(alpha, rank, *, rslora=False):
    return math.sqrt(alpha / rank) if rslora else alpha / rank


# Merging


@mistake("Unmerging adds the update again.", replaces="unmerge", breaks=("lora.L2b",))
def unmerge_adds(W, A, B, scaling):
    return W + scaling * (B @ A)


@mistake("Unmerging lacks the scaling.", replaces="unmerge", breaks=("lora.L2b",))
def unmerge_without_scaling(W, A, B, scaling):
    return W - B @ A


@mistake("The update is subtracted in merging.", replaces="merge", breaks=("lora.L2a", "lora.L2c"))
def merge_subtracts(W0, A, B, scaling):
    return W0 - scaling * (B @ A)


@mistake("Merging returns the update alone and drops the pretrained weight.", replaces="merge", breaks=("lora.L1b", "lora.L2a"))
def merge_drops_the_base(W0, A, B, scaling):
    return scaling * (B @ A)


@mistake("A small multiple of the identity is added to the update.", replaces="delta_weight", breaks=("lora.L5", "lora.L2d"))
def delta_with_jitter(A, B, scaling):
    return scaling * (B @ A) + 1e-4 * torch.eye(B.shape[0], A.shape[1], dtype=A.dtype, device=A.device)


@mistake(
    "The rows of A are normalised in the update, as in weight normalisation.", replaces="delta_weight", breaks=("lora.L6a", "lora.L2d")
)
def delta_normalises_A(A, B, scaling):
    return scaling * (B @ (A / A.norm(dim=1, keepdim=True)))


# Forward


@mistake("The bias is left out.", replaces="forward", breaks=("lora.L2g",))
def forward_without_bias(x, W0, A, B, scaling, *, bias=None, mask=None, p=0.0):
    return right.forward(x, W0, A, B, scaling, mask=mask, p=p)


@mistake("The bias is scaled with the adapter.", replaces="forward", breaks=("lora.L2g",))
def forward_scales_the_bias(x, W0, A, B, scaling, *, bias=None, mask=None, p=0.0):
    return right.forward(x, W0, A, B, scaling, bias=None if bias is None else scaling * bias, mask=mask, p=p)


@mistake("The frozen path is dropped: the layer returns the adapter's output alone.", replaces="forward", breaks=("lora.L1a", "lora.L2a"))
def forward_drops_the_base(x, W0, A, B, scaling, *, bias=None, mask=None, p=0.0):
    return right.forward(x, 0 * W0, A, B, scaling, bias=bias, mask=mask, p=p)


@mistake("The layer computes in float32 inside and casts back.", replaces="forward", breaks=("lora.L1a", "lora.L2a"))
def forward_in_float32(x, W0, A, B, scaling, *, bias=None, mask=None, p=0.0):
    short = [t.float() for t in (x, W0, A, B)]
    return right.forward(*short, scaling, bias=None if bias is None else bias.float(), mask=mask, p=p).to(x.dtype)


@mistake(
    "The scaling multiplies A before the product.",
    replaces="forward",
    harmless="Multiplication is associative: only the rounding differs, by less than the tolerance.",
)
def forward_scales_A(x, W0, A, B, scaling, *, bias=None, mask=None, p=0.0):
    return right.forward(x, W0, scaling * A, B, 1.0, bias=bias, mask=mask, p=p)


# Start


@mistake("A starts at zero and B is random: the roles are exchanged.", replaces="init", breaks=("lora.L4", "lora.L9a"))
def start_exchanged(W0, *, rank, distribution="kaiming", generator=None):
    A, _ = right.init(W0, rank=rank, distribution=distribution, generator=generator)
    B = torch.empty(W0.shape[0], rank, dtype=W0.dtype, device=W0.device).uniform_(-0.5, 0.5, generator=generator)
    return 0 * A, B


@mistake("Both factors start at zero: nothing ever moves.", replaces="init", breaks=("lora.L9a", "lora.L9b"))
def start_all_zero(W0, *, rank, distribution="kaiming", generator=None):
    A, B = right.init(W0, rank=rank, distribution=distribution, generator=generator)
    return 0 * A, B


@mistake("Both factors start random: training does not start at the pretrained function.", replaces="init", breaks=("lora.L1a", "lora.L1b"))
def start_all_random(W0, *, rank, distribution="kaiming", generator=None):
    A, B = right.init(W0, rank=rank, distribution=distribution, generator=generator)
    return A, B.uniform_(-0.1, 0.1, generator=generator)


@mistake("The fan-in of A is read off the wrong side: the bound is 1/sqrt(rank).", replaces="init", breaks=("lora.L9a",))
def start_with_fan_in_rank(W0, *, rank, distribution="kaiming", generator=None):
    A, B = right.init(W0, rank=rank, distribution=distribution, generator=generator)
    return (A * math.sqrt(A.shape[1] / rank) if distribution == "kaiming" else A), B


@mistake("The bound of A is the standard deviation of He's rule, sqrt(2 / in).", replaces="init", breaks=("lora.L9a", "lora.L9b"))
def start_with_he_bound(W0, *, rank, distribution="kaiming", generator=None):
    A, B = right.init(W0, rank=rank, distribution=distribution, generator=generator)
    return (A * math.sqrt(2) if distribution == "kaiming" else A), B


@mistake("A is Gaussian with the variance of the uniform start: some entries leave its interval.", replaces="init", breaks=("lora.L9a",))
def start_gaussian_instead(W0, *, rank, distribution="kaiming", generator=None):
    A, B = right.init(W0, rank=rank, distribution="gaussian", generator=generator)
    return (A * rank / math.sqrt(3 * A.shape[1]) if distribution == "kaiming" else A), B


@mistake("The entries of A are drawn from the positive half of the interval.", replaces="init", breaks=("lora.L9a", "lora.L9b"))
def start_positive(W0, *, rank, distribution="kaiming", generator=None):
    A, B = right.init(W0, rank=rank, distribution=distribution, generator=generator)
    return (A.abs() if distribution == "kaiming" else A), B


@mistake("The generator is ignored: every start is the same.", replaces="init", breaks=("lora.L9c",))
def start_ignores_the_generator(W0, *, rank, distribution="kaiming", generator=None):
    return right.init(W0, rank=rank, distribution=distribution, generator=torch.Generator(W0.device).manual_seed(0))


@mistake("The start draws from the global generator.", replaces="init", breaks=("lora.L9c", "lora.L1a"))
def start_from_the_global_generator(W0, *, rank, distribution="kaiming", generator=None):
    return right.init(W0, rank=rank, distribution=distribution)


@mistake("The Gaussian start has standard deviation 1/sqrt(rank), not 1/rank.", replaces="init", breaks=("lora.L9d",))
def gaussian_too_wide(W0, *, rank, distribution="kaiming", generator=None):
    A, B = right.init(W0, rank=rank, distribution=distribution, generator=generator)
    return (A * math.sqrt(rank) if distribution == "gaussian" else A), B


@mistake("The Gaussian start is uniform with the right variance.", replaces="init", breaks=("lora.L9d",))
def gaussian_is_uniform(W0, *, rank, distribution="kaiming", generator=None):
    A, B = right.init(W0, rank=rank, generator=generator)
    return (A * math.sqrt(3 * A.shape[1]) / rank if distribution == "gaussian" else A), B


# Gradients


@mistake("The gradients lack the scaling.", replaces="gradients", breaks=("lora.L3a",))
def gradients_without_scaling(G, A, B, scaling):
    return right.gradients(G, A, B, 1.0)


@mistake("The gradient of A lacks the scaling, that of B has it.", replaces="gradients", breaks=("lora.L3a", "lora.L7a"))
def gradient_of_A_without_scaling(G, A, B, scaling):
    grad_A, grad_B = right.gradients(G, A, B, scaling)
    return grad_A / scaling, grad_B


@mistake("The gradient of the weight enters transposed.", replaces="gradients", breaks=("lora.L3a",))
def gradients_of_transposed_G(G, A, B, scaling):
    return scaling * (B.mT @ G.mT), scaling * (G.mT @ A.mT)


@mistake("The two gradients come back in the wrong order.", replaces="gradients", breaks=("lora.L3a",))
def gradients_exchanged(G, A, B, scaling):
    grad_A, grad_B = right.gradients(G, A, B, scaling)
    return grad_B, grad_A


@mistake("The gradients are divided by the norms of the other factor.", replaces="gradients", breaks=("lora.L3a", "lora.L6b"))
def gradients_preconditioned(G, A, B, scaling):
    grad_A, grad_B = right.gradients(G, A, B, scaling)
    return grad_A / B.norm(), grad_B / A.norm()


@mistake("The backward pass averages over positions where it should sum.", replaces="backward", breaks=("lora.L3b",))
def backward_averages(grad_y, x, W0, A, B, scaling, *, mask=None, p=0.0):
    grad_x, grad_A, grad_B = right.backward(grad_y, x, W0, A, B, scaling, mask=mask, p=p)
    positions = x[..., 0].numel()
    return grad_x, grad_A / positions, grad_B / positions


@mistake("The gradient of the input leaves the adapter path out.", replaces="backward", breaks=("lora.L3b",))
def backward_through_the_base_only(grad_y, x, W0, A, B, scaling, *, mask=None, p=0.0):
    _, grad_A, grad_B = right.backward(grad_y, x, W0, A, B, scaling, mask=mask, p=p)
    return grad_y @ W0, grad_A, grad_B


@mistake("The backward pass ignores the dropout mask.", replaces="backward", breaks=("lora.L3c",))
def backward_ignores_the_mask(grad_y, x, W0, A, B, scaling, *, mask=None, p=0.0):
    return right.backward(grad_y, x, W0, A, B, scaling)


@mistake("The gradient of the input does not go through the dropout mask.", replaces="backward", breaks=("lora.L3c",))
def backward_input_without_mask(grad_y, x, W0, A, B, scaling, *, mask=None, p=0.0):
    _, grad_A, grad_B = right.backward(grad_y, x, W0, A, B, scaling, mask=mask, p=p)
    return grad_y @ (W0 + scaling * (B @ A)), grad_A, grad_B


# Steps


@mistake("B is stepped with the new A: the factors are updated one after the other.", replaces="sgd_step", breaks=("lora.L8", "lora.L7b"))
def step_one_after_the_other(G, W0, A, B, scaling, *, lr, weight_decay=0.0):
    _, new_A, _ = right.sgd_step(G, W0, A, B, scaling, lr=lr, weight_decay=weight_decay)
    _, _, new_B = right.sgd_step(G, W0, new_A, B, scaling, lr=lr, weight_decay=weight_decay)
    return W0, new_A, new_B


@mistake("The step goes up the gradient.", replaces="sgd_step", breaks=("lora.L4", "lora.L8"))
def step_upwards(G, W0, A, B, scaling, *, lr, weight_decay=0.0):
    return right.sgd_step(-G, W0, A, B, scaling, lr=lr, weight_decay=weight_decay)


@mistake("The step lacks the scaling.", replaces="sgd_step", breaks=("lora.L4", "lora.L8"))
def step_without_scaling(G, W0, A, B, scaling, *, lr, weight_decay=0.0):
    return right.sgd_step(G, W0, A, B, 1.0, lr=lr, weight_decay=weight_decay)


@mistake("Weight decay acts on the frozen weight too.", replaces="sgd_step", breaks=("lora.L14",))
def decay_of_the_frozen_weight(G, W0, A, B, scaling, *, lr, weight_decay=0.0):
    step = right.sgd_step(G, W0, A, B, scaling, lr=lr, weight_decay=weight_decay)
    return step._replace(W0=(1 - lr * weight_decay) * W0)


@mistake("The frozen weight is trained with the factors.", replaces="sgd_step", breaks=("lora.L14",))
def step_of_the_frozen_weight(G, W0, A, B, scaling, *, lr, weight_decay=0.0):
    step = right.sgd_step(G, W0, A, B, scaling, lr=lr, weight_decay=weight_decay)
    return step._replace(W0=W0 - lr * G)


@mistake("Weight decay acts once on the product, as if it were one weight.", replaces="sgd_step", breaks=("lora.L14",))
def decay_of_the_product(G, W0, A, B, scaling, *, lr, weight_decay=0.0):
    step = right.sgd_step(G, W0, A, B, scaling, lr=lr)
    decay = math.sqrt(1 - lr * weight_decay)
    return step._replace(A=step.A - (1 - decay) * A, B=step.B - (1 - decay) * B)


# Dropout


@mistake("Dropout acts on the frozen path too.", replaces="forward", breaks=("lora.L12b",))
def dropout_on_the_frozen_path(x, W0, A, B, scaling, *, bias=None, mask=None, p=0.0):
    return right.forward(x if mask is None else x * mask / (1 - p), W0, A, B, scaling, bias=bias)


@mistake("What dropout keeps is not divided by 1 - p.", replaces="forward", breaks=("lora.L12a",))
def dropout_without_rescaling(x, W0, A, B, scaling, *, bias=None, mask=None, p=0.0):
    return right.forward(x, W0, A, B, scaling, bias=bias, mask=mask)


@mistake("What dropout keeps is divided by p, as if p were the probability to keep.", replaces="forward", breaks=("lora.L12a",))
def dropout_divides_by_p(x, W0, A, B, scaling, *, bias=None, mask=None, p=0.0):
    return right.forward(x, W0, A, B, scaling, bias=bias, mask=mask, p=1 - p if mask is not None else 0.0)


@mistake("Dropout acts after A, on the hidden values, not on the input.", replaces="forward", breaks=("lora.L12b",))
def dropout_after_A(x, W0, A, B, scaling, *, bias=None, mask=None, p=0.0):
    hidden = x @ A.mT
    kept = hidden if mask is None else hidden * mask[..., : len(A)] / (1 - p)
    return right.forward(x, W0, A, 0 * B, scaling, bias=bias) + scaling * (kept @ B.mT)


@mistake("The mask keeps an entry with probability p, not 1 - p.", replaces="draw_mask", breaks=("lora.L12c",))
def mask_keeps_with_p(x, *, p, generator=None):
    return ~right.draw_mask(x, p=p, generator=generator)


@mistake("The mask is drawn once per column and shared by all positions.", replaces="draw_mask", breaks=("lora.L12c",))
def mask_shared_by_positions(x, *, p, generator=None):
    return right.draw_mask(x.reshape(-1, x.shape[-1])[0], p=p, generator=generator).expand(x.shape)


# Counting


@mistake("The frozen weight is counted, or left trainable.", replaces="num_trainable", breaks=("lora.L13",))
def frozen_weight_counted(W0, *, rank):
    return W0.numel() + right.num_trainable(W0, rank=rank)


@mistake("Only one factor is counted.", replaces="num_trainable", breaks=("lora.L13",))
def one_factor_counted(W0, *, rank):
    return rank * W0.shape[1]
