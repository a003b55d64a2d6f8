r"""LoRA: how much does a low-rank update buy, and which power of the rank should scale it?

Three experiments. `tail`: fit a linear layer whose weight must move by a rank-4 matrix; with whitened inputs the best loss
of rank r is the Eckart-Young tail, the sum of the squared singular values beyond r. `rslora`: the same problem by plain
gradient descent, with s = alpha / r and with s = alpha / sqrt(r). `digits`: an MLP trained on upright handwritten digits
is adapted to the same digits turned by 90 degrees; the accuracy it loses on upright ones is what it forgets.
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure

from ...reference._adapters import replace_linears
from ...reference.lora import LoRALinear
from .. import plotting
from ..config import convert
from ..datasets import draw_whitened, load_digits
from ..experiment import Measurements, Part, Quantity, Trial
from ..models import Digits, Shift, Stack, make_mlp
from ..records import Claim, Results
from ..training import adam, sgd, train

QUESTION = "What changes with the rank?"


@dataclass(frozen=True)
class Config:
    """Settings, explained where their values stand: `configs/lora.toml`."""

    size: int
    samples: int
    spectrum: tuple[float, ...]
    tail_ranks: tuple[int, ...]
    tail_alpha_per_rank: float
    tail_lr: float
    tail_steps: int
    rslora_ranks: tuple[int, ...]
    rslora_alpha: float
    rslora_lr: float
    rslora_steps: int
    digits_train: int
    digits_test: int
    digits_hidden: int
    digits_pretrain_lr: float
    digits_pretrain_steps: int
    digits_ranks: tuple[int, ...]
    digits_alpha_per_rank: float
    digits_lr: float
    digits_full_lr: float
    digits_steps: int

    def __post_init__(self) -> None:
        if self.samples < self.size:
            raise ValueError(f"samples is {self.samples}; whitening needs at least size = {self.size} of them")
        if len(self.spectrum) > self.size:
            raise ValueError(f"spectrum has {len(self.spectrum)} values; there is room for size = {self.size}")
        for name, largest in (("tail_ranks", self.size), ("rslora_ranks", self.size), ("digits_ranks", min(10, self.digits_hidden))):
            ranks = getattr(self, name)
            if not ranks or min(ranks) < 1 or max(ranks) > largest:
                raise ValueError(f"{name} is {list(ranks)}; needed one or more ranks from 1 to {largest}")


QUANTITIES = {
    "loss": Quantity("final loss", 0.02),
    "tail": Quantity("Eckart-Young tail", 1e-4),
    "gap": Quantity("largest |loss - tail|", 0.02),
    "removed": Quantity("share of the loss removed, worst rank", 0.02),
    "turned": Quantity("turned digits, test accuracy", 0.03),
    "upright": Quantity("upright digits, test accuracy", 0.03),
    "forgetting": Quantity("forgetting of upright digits", 0.03),
    "parameters": Quantity("trainable parameters", 0.0),
}

# The loss of `tail` and `rslora` starts at 30 = 16 + 9 + 4 + 1
CLAIMS = (
    Claim(
        "lora.T1",
        "At every rank the trained loss reaches the Eckart-Young tail, the best that this rank can do (within 0.05).",
        "tail.all.gap",
        "<=",
        0.05,
    ),
    Claim(
        "lora.T2",
        "Once the rank is that of the needed change, 4, nothing is lost: the loss falls from 30 to below 0.05.",
        "tail.rank_4.loss",
        "<=",
        0.05,
    ),
    Claim(
        "lora.T3",
        "With alpha / rank learning collapses as the rank grows: at rank 64 less than a tenth of the loss, 30, is gone.",
        "rslora.lora_64.loss",
        ">=",
        27.0,
    ),
    Claim(
        "lora.T4",
        "With alpha / sqrt(rank) every rank removes at least nine tenths of the loss in the same steps.",
        "rslora.rslora_all.removed",
        ">=",
        0.9,
    ),
    Claim(
        "lora.T5",
        "With alpha / sqrt(rank) the speed does not depend on the rank: rank 64 ends within 0.1 of rank 16.",
        "rslora.rslora_64.loss",
        "<=",
        0.1,
        baseline="rslora.rslora_16.loss",
        expected=False,
    ),
    Claim(
        "lora.T6",
        "Adapters of rank 8 teach a network that knows upright digits the turned ones: at least 0.7 more of them recognised.",
        "digits.rank_8.turned",
        ">=",
        0.7,
        baseline="digits.frozen.turned",
    ),
    Claim(
        "lora.T7",
        "Rank 8 comes within 0.05 of the accuracy of full fine-tuning.",
        "digits.rank_8.turned",
        ">=",
        -0.05,
        baseline="digits.full.turned",
    ),
    Claim(
        "lora.T8",
        "Rank 1 is enough: it comes within 0.05 of the accuracy of full fine-tuning.",
        "digits.rank_1.turned",
        ">=",
        -0.05,
        baseline="digits.full.turned",
        expected=False,
    ),
    Claim(
        "lora.T9",
        "LoRA forgets less than full fine-tuning: rank 8 loses less accuracy on upright digits.",
        "digits.rank_8.forgetting",
        "<=",
        0.0,
        baseline="digits.full.forgetting",
        expected=False,
    ),
)


# --- tail and rslora: one linear layer ---


def make_shift(config: Config, trial: Trial) -> Shift:
    """The layers and whitened inputs, with which the loss is ||W - W0 - D||_F^2, since X^T X / N = I."""
    return Shift(
        trial,
        out_features=config.size,
        in_features=config.size,
        spectrum=config.spectrum,
        draw_inputs=partial(draw_whitened, config.samples, config.size),
    )


def add_adapters(problem: Shift, trial: Trial, **settings: Any) -> Stack:
    """The layers with fresh adapters beside them."""
    pairs = zip(problem.layers, trial.generators(stream=1), strict=True)
    return Stack([LoRALinear(copy.deepcopy(layer), generator=generator, **settings) for layer, generator in pairs], trial.device)


def run_tail(config: Config, trial: Trial) -> Measurements:
    """Adam on adapters of several ranks, and on the whole weight."""
    problem, measured = make_shift(config, trial), Measurements()
    tick = trial.counter((len(config.tail_ranks) + 1) * config.tail_steps)
    gaps = []
    for rank in (*config.tail_ranks, None):
        stack = (
            add_adapters(problem, trial, rank=rank, alpha=config.tail_alpha_per_rank * rank)
            if rank
            else Stack(problem.layers, trial.device)
        )
        trained = train(partial(problem.loss, stack), stack.trainable, adam(config.tail_lr), steps=config.tail_steps, every=10, tick=tick)
        final = trained.losses[:, -1]
        tail = sum(value**2 for value in sorted(config.spectrum, reverse=True)[rank:]) if rank else 0.0
        gaps.append((final - tail).abs())
        count = [stack.num_trainable()] * len(trial.seeds)
        measured.add(f"rank_{rank}" if rank else "full", loss=final, tail=[tail] * len(count), parameters=count)
    measured.add("all", gap=torch.stack(gaps).amax(dim=0))
    return measured


def run_rslora(config: Config, trial: Trial) -> Measurements:
    """Gradient descent on adapters of several ranks with both scalings."""
    problem, measured = make_shift(config, trial), Measurements()
    tick = trial.counter(2 * len(config.rslora_ranks) * config.rslora_steps)
    for scaling in ("lora", "rslora"):
        losses = []
        for rank in config.rslora_ranks:
            stack = add_adapters(problem, trial, rank=rank, alpha=config.rslora_alpha, rslora=scaling == "rslora")
            trained = train(partial(problem.loss, stack), stack.trainable, sgd(config.rslora_lr), steps=config.rslora_steps, tick=tick)
            losses.append(trained.losses[:, -1])
            measured.add(f"{scaling}_{rank}", loss=losses[-1])
            measured.add_curve(f"{scaling}_{rank}", "loss", trained.steps, trained.losses)
        worst = torch.stack(losses).amax(dim=0)
        measured.add(f"{scaling}_all", removed=1 - worst / trained.losses[:, 0])
    return measured


# --- digits: an MLP ---


def run_digits(config: Config, trial: Trial) -> Measurements:
    """Pretrain on upright digits, then adapt to turned ones: not at all, with adapters, and by full fine-tuning."""
    measured = Measurements()
    generators = trial.generators()
    splits = [load_digits(config.digits_train, config.digits_test, generator) for generator in generators]
    sizes = (64, config.digits_hidden, config.digits_hidden, 10)
    fresh = Stack([make_mlp(sizes, generator) for generator in generators], trial.device)
    tick = trial.counter(config.digits_pretrain_steps + (len(config.digits_ranks) + 1) * config.digits_steps)
    upright, turned = Digits(splits, 0, trial.device), Digits(splits, 1, trial.device)

    optimizer = adam(config.digits_pretrain_lr)
    pretrained = train(partial(upright.loss, fresh), fresh.trainable, optimizer, steps=config.digits_pretrain_steps, tick=tick)
    before = upright.accuracy(fresh, pretrained.params)
    measured.add("frozen", turned=turned.accuracy(fresh, pretrained.params), upright=before)
    for rank in (*config.digits_ranks, None):
        models = fresh.models(pretrained.params)
        if rank:
            for model, generator in zip(models, trial.generators(stream=1), strict=True):
                alpha = config.digits_alpha_per_rank * rank
                replace_linears(model, ".*", partial(LoRALinear, rank=rank, alpha=alpha, generator=generator))
        stack = Stack(models, trial.device)
        optimizer = adam(config.digits_lr if rank else config.digits_full_lr)
        trained = train(partial(turned.loss, stack), stack.trainable, optimizer, steps=config.digits_steps, every=5, tick=tick)
        variant = f"rank_{rank}" if rank else "full"
        after = upright.accuracy(stack, trained.params)
        measured.add(
            variant,
            turned=turned.accuracy(stack, trained.params),
            upright=after,
            forgetting=before - after,
            parameters=[stack.num_trainable()] * len(trial.seeds),
        )
        measured.add_curve(variant, "loss", trained.steps, trained.losses)
    return measured


PARTS = (
    Part("tail", "Fitting a rank-4 shift", run_tail, baseline="full"),
    Part("rslora", "Learning speed at every rank", run_rslora, baseline=None),
    Part("digits", "Digits turned by 90 degrees", run_digits, baseline="full"),
)


def figure(results: Results) -> Figure:
    """Four panels: final loss against the rank, accuracy on turned and upright digits, loss curves for either scaling."""
    fig, (tail, digits, slow, fast) = plotting.make_figure(2, QUESTION, rows=2)
    metrics = results.metrics
    config: Config = convert(results.config, Config, "config")

    ranks = config.tail_ranks
    plotting.draw_points(tail, ranks, [metrics[f"tail.rank_{rank}.loss"] for rank in ranks], "LoRA, trained", 1)
    tails = [metrics[f"tail.rank_{rank}.tail"].values[0] or 0.0 for rank in ranks]
    tail.plot(ranks, tails, color="black", linestyle=":", linewidth=3, label="Eckart-Young tail", zorder=1)
    tail.set(title="A rank-4 shift needs rank 4", xlabel="rank", ylabel="final loss")
    tail.legend()

    for ax, scaling, formula in ((slow, "lora", r"$\alpha\,/\,r$"), (fast, "rslora", r"$\alpha\,/\sqrt{r}$")):
        for i, rank in enumerate(config.rslora_ranks):
            plotting.draw_curve(ax, results.curves[f"rslora.{scaling}_{rank}.loss"], f"rank {rank}", i)
        ax.set(title=f"Scaled by {formula}", xlabel="step of gradient descent", ylabel="loss", ylim=(0, 32))
    fast.legend()

    variants = ["frozen", *(f"rank_{rank}" for rank in config.digits_ranks), "full"]
    series = {f"{kind} digits": [metrics[f"digits.{variant}.{kind}"] for variant in variants] for kind in ("turned", "upright")}
    plotting.draw_bars(digits, [variant.replace("rank_", "r = ") for variant in variants], series)
    digits.set(title="What is learnt and what is forgotten", ylabel="test accuracy", ylim=(0, 1.3), yticks=[0, 0.25, 0.5, 0.75, 1])
    digits.legend(ncols=2, loc="upper center")
    return fig
