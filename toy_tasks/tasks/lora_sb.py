r"""LoRA-SB: how good are r x r numbers between two frozen factors, where do the factors have to come from, and does s matter?

A layer tanh(W x) must move its weight by a matrix with six large singular values. `methods`: the final loss of every method
with AdamW. `spaces`: how much of the first gradient, and of the change that is needed, lies in the frozen spaces.
`scaling`: the final loss at several scalings, with gradient descent along the optimal or the plain gradient, with AdamW, and
with AdamW at a learning rate divided by the scaling. `rates`: every method at the best of several learning rates.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from ...reference import lora_sb
from ...reference.lora import LoRALinear
from .. import plotting
from ..config import convert
from ..datasets import draw_orthonormal, draw_uneven
from ..experiment import Measurements, Part, Quantity, Trial
from ..models import Params, Shift, Stack
from ..records import Claim, Results
from ..training import Optimizer, State, Trained, adam, sgd, train

QUESTION = "Which r x r numbers are worth training, and does their scaling matter?"


@dataclass(frozen=True)
class Config:
    """Settings, explained where their values stand: `configs/lora_sb.toml`."""

    out_features: int
    in_features: int
    samples: int
    smallest_std: float
    shift_largest: float
    shift_decay: float
    shift_count: int
    shift_rest: float
    gradient_samples: int
    init_lr: float
    steps: int
    full_lr: float
    lora_lr: float
    lr: float
    lora_ranks: tuple[int, ...]
    ranks: tuple[int, ...]
    rank: int
    scalings: tuple[float, ...]
    sgd_lr: float
    rates: tuple[int, ...]
    rates_steps: int

    def __post_init__(self) -> None:
        smallest = min(self.out_features, self.in_features)
        for rank in (self.rank, *self.ranks, *self.lora_ranks):
            if not 1 <= rank <= smallest:
                raise ValueError(f"rank is {rank}; needed 1 to {smallest}, the smaller side of the layer")
        if self.rank not in self.ranks or 1.0 not in self.scalings or not self.rates or not self.lora_ranks:
            raise ValueError("ranks needs rank among its values, scalings needs 1, rates and lora_ranks one value or more")
        if not 0 <= self.shift_count <= smallest:
            raise ValueError(f"shift_count is {self.shift_count}; needed 0 to {smallest}")
        if not 1 <= self.gradient_samples <= self.samples:
            raise ValueError(f"gradient_samples is {self.gradient_samples}; needed 1 to samples, {self.samples}")


# Where the frozen factors come from, and what R starts at
METHODS = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "xs": "LoRA-XS",
    "random": "random spaces",
    "sb": "LoRA-SB",
    "zero": "LoRA-SB, R = 0",
    "raw": "LoRA-SB, no sign",
}
FROZEN = ("xs", "random", "sb", "raw")
TUNED = {"lora_1": ("lora", 1), "lora_2": ("lora", 2), "xs_12": ("xs", 12), "sb_6": ("sb", 6), "sb_12": ("sb", 12), "raw_12": ("raw", 12)}

QUANTITIES = {
    "loss": Quantity("final loss", 0.02),
    "parameters": Quantity("trained numbers", 0.0),
    "apart": Quantity("|loss - LoRA-SB's|", 0.01),
    "gradient": Quantity("share of the gradient in the spaces", 1e-3),
    "shift": Quantity("share of the needed change in the spaces", 1e-3),
    "spread": Quantity("largest |loss - loss at s = 1|, share of the start", 1e-3),
    "lr": Quantity("learning rate", 1e-9),
}

CLAIMS = (
    Claim(
        "lora_sb.T1",
        "At rank 6, with 36 trained numbers each, LoRA-SB ends at least 1.5 below LoRA-XS.",
        "methods.sb_6.loss",
        "<=",
        -1.5,
        baseline="methods.xs_6.loss",
    ),
    Claim(
        "lora_sb.T2",
        "The spaces of the first update do it, not orthonormal factors as such: at rank 12 it ends 1.5 below random spaces.",
        "methods.sb_12.loss",
        "<=",
        -1.5,
        baseline="methods.random_12.loss",
    ),
    Claim(
        "lora_sb.T3",
        "LoRA-SB with 36 trained numbers ends lower than LoRA of rank 1 with 112.",
        "methods.sb_6.loss",
        "<=",
        0.0,
        baseline="methods.lora_1.loss",
    ),
    Claim(
        "lora_sb.T4",
        "LoRA-SB with 144 trained numbers ends lower than LoRA of rank 2 with 224.",
        "methods.sb_12.loss",
        "<=",
        0.0,
        baseline="methods.lora_2.loss",
        expected=False,
    ),
    Claim(
        "lora_sb.T5",
        "At the same rank, 6, LoRA-SB ends within 0.1 of LoRA.",
        "methods.sb_6.loss",
        "<=",
        0.1,
        baseline="methods.lora_6.loss",
        expected=False,
    ),
    Claim(
        "lora_sb.T6",
        "LoRA-SB of rank 24 ends within 0.1 of full fine-tuning.",
        "methods.sb_24.loss",
        "<=",
        0.1,
        baseline="methods.full.loss",
        expected=False,
    ),
    Claim(
        "lora_sb.T7",
        "Starting one step ahead matters: with R = 0 the loss ends elsewhere, by 0.05 or more.",
        "methods.zero_12.apart",
        ">=",
        0.05,
        expected=False,
    ),
    Claim(
        "lora_sb.T8",
        "AdamW's first step, the sign, gives spaces at least as good as those of the gradient itself.",
        "methods.sb_12.loss",
        "<=",
        0.0,
        baseline="methods.raw_12.loss",
        expected=False,
    ),
    Claim(
        "lora_sb.T9",
        "Gradient descent along the optimal gradient is the same at every scaling.",
        "scaling.optimal.spread",
        "<=",
        1e-3,
    ),
    Claim(
        "lora_sb.T10",
        "With AdamW the scaling does not matter either.",
        "scaling.adamw.spread",
        "<=",
        1e-3,
        expected=False,
    ),
    Claim(
        "lora_sb.T11",
        "With AdamW the scaling is a learning rate: divided by it, the learning rate gives the same loss at every scaling.",
        "scaling.divided.spread",
        "<=",
        1e-3,
    ),
    Claim(
        "lora_sb.T12",
        "Each at its best learning rate: at rank 12 LoRA-SB still ends at least 1.5 below LoRA-XS.",
        "rates.sb_12.loss",
        "<=",
        -1.5,
        baseline="rates.xs_12.loss",
    ),
    Claim(
        "lora_sb.T13",
        "Each at its best learning rate: LoRA-SB with 36 trained numbers still ends lower than LoRA of rank 1 with 112.",
        "rates.sb_6.loss",
        "<=",
        0.0,
        baseline="rates.lora_1.loss",
    ),
)


class _Race:
    """The layers tanh(W x) of every seed, what they must become, and the first updates that LoRA-SB starts from."""

    def __init__(self, config: Config, trial: Trial) -> None:
        self.config, self.trial = config, trial
        rest = [config.shift_rest] * (min(config.out_features, config.in_features) - config.shift_count)
        self.problem = Shift(
            trial,
            out_features=config.out_features,
            in_features=config.in_features,
            spectrum=[config.shift_largest * config.shift_decay**i for i in range(config.shift_count)] + rest,
            draw_inputs=partial(draw_uneven, config.samples, config.in_features, config.smallest_std),
            activation=torch.tanh,
        )
        sampled = torch.arange(config.gradient_samples)
        self.updates = {"sb": self.first_updates("adamw", sampled), "raw": self.first_updates("sgd", sampled)}

    def first_updates(self, optimizer: str, rows: Tensor) -> list[Tensor]:
        """The first update of full fine-tuning of each seed's layer, from some of its samples."""
        weights = [layer.weight.detach() for layer in self.problem.layers]
        gradient = self.problem.gradient
        return [
            lora_sb.estimate_update(partial(gradient, i), W0, [rows], lr=self.config.init_lr, optimizer=optimizer)
            for i, W0 in enumerate(weights)
        ]

    def factors(self, method: str, rank: int, scaling: float, i: int, generator: torch.Generator) -> lora_sb.Factors:
        """What the i-th seed's layer starts with under a method with frozen factors."""
        W0 = self.problem.layers[i].weight.detach()
        if method == "xs":
            return lora_sb.init_xs(W0, rank=rank, generator=generator)
        if method == "random":
            A, B = draw_orthonormal(W0.shape[1], rank, generator).T, draw_orthonormal(W0.shape[0], rank, generator)
            return lora_sb.Factors(A, torch.zeros(rank, rank), B)
        A, R, B = lora_sb.init(self.updates["raw" if method == "raw" else "sb"][i], scaling, rank=rank)
        return lora_sb.Factors(A, 0 * R if method == "zero" else R, B)

    def stack(self, method: str, rank: int, scaling: float = 1.0) -> Stack:
        """What a method trains, one model per seed."""
        models: list[nn.Module] = []
        for i, generator in enumerate(self.trial.generators(stream=1)):
            layer = self.problem.layers[i] if method == "full" else copy.deepcopy(self.problem.layers[i])
            if method == "full":
                models.append(layer)
            elif method == "lora":
                models.append(LoRALinear(layer, rank=rank, alpha=rank * scaling, generator=generator))
            else:
                models.append(lora_sb.LoRASBLinear(layer, *self.factors(method, rank, scaling, i, generator), scaling=scaling))
        return Stack(models, self.trial.device)

    def run(self, stack: Stack, optimizer: Optimizer, steps: int, tick: Callable[[], None]) -> Trained:
        """Train with all samples for a number of steps."""
        return train(partial(self.problem.loss, stack), stack.trainable, optimizer, steps=steps, every=5, tick=tick)


def variants(config: Config) -> dict[str, tuple[str, int]]:
    """What is compared, by name: a method and its rank."""
    found = {"full": ("full", 0)}
    found |= {f"lora_{rank}": ("lora", rank) for rank in config.lora_ranks}
    found |= {f"{method}_{rank}": (method, rank) for method in ("xs", "sb") for rank in config.ranks}
    return found | {f"{method}_{config.rank}": (method, config.rank) for method in ("random", "zero", "raw")}


def run_methods(config: Config, trial: Trial) -> Measurements:
    """Every method with AdamW, at the learning rate of its kind."""
    race, measured = _Race(config, trial), Measurements()
    rates = {"full": config.full_lr, "lora": config.lora_lr}
    tick = trial.counter(len(variants(config)) * config.steps)
    losses: dict[str, Tensor] = {}
    for name, (method, rank) in variants(config).items():
        stack = race.stack(method, rank)
        run = race.run(stack, adam(rates.get(method, config.lr)), config.steps, tick)
        losses[name] = run.losses[:, -1]
        measured.add(name, loss=losses[name], parameters=[stack.num_trainable()] * len(trial.seeds))
        measured.add_curve(name, "loss", run.steps, run.losses)
    for method in ("zero", "raw"):
        name = f"{method}_{config.rank}"
        measured.add(name, apart=(losses[name] - losses[f"sb_{config.rank}"]).abs())
    return measured


def run_spaces(config: Config, trial: Trial) -> Measurements:
    """How much of the whole gradient and of the needed change of the weight lies in the frozen spaces, as a share of its square."""
    race, measured = _Race(config, trial), Measurements()
    everything = torch.arange(config.samples)
    for method in FROZEN:
        shares: list[tuple[float, float]] = []
        for i, generator in enumerate(trial.generators(stream=1)):
            A, _, B = race.factors(method, config.rank, 1.0, i, generator)
            G = race.problem.gradient(i, race.problem.layers[i].weight, everything)
            shares.append((_share(G, A, B), _share(race.problem.shifts[i], A, B)))
        gradient, shift = zip(*shares, strict=True)
        measured.add(f"{method}_{config.rank}", gradient=gradient, shift=shift)
    return measured


def _share(M: Tensor, A: Tensor, B: Tensor) -> float:
    """How much of the squared norm of M lies in the column space of B and the row space of A."""
    return float((lora_sb.projected_gradient(M, A, B).norm() / M.norm()).square())


def optimal_sgd(stack: Stack, scaling: float, lr: float) -> Optimizer:
    """Gradient descent on R along the optimal gradient, for all models at once."""
    A, B = stack.frozen["A"], stack.frozen["B"]
    improve = torch.vmap(partial(lora_sb.optimal_gradient, scaling=scaling))

    def step(params: Params, grads: Params, state: State) -> tuple[Params, State]:
        return {"R": params["R"] - lr * improve(grads["R"], A, B)}, state

    return Optimizer(lambda params: {}, step)


def at_scaling(maker: str, scaling: float) -> str:
    """The name of a run, in which no dot may stand."""
    return f"{maker}_s{scaling:g}".replace(".", "_")


def run_scaling(config: Config, trial: Trial) -> Measurements:
    """LoRA-SB at several scalings, all started at the same weight."""
    race, measured = _Race(config, trial), Measurements()
    makers: dict[str, Callable[[Stack, float], Optimizer]] = {
        "optimal": lambda stack, scaling: optimal_sgd(stack, scaling, config.sgd_lr),
        "plain": lambda stack, scaling: sgd(config.sgd_lr),
        "adamw": lambda stack, scaling: adam(config.lr),
        "divided": lambda stack, scaling: adam(config.lr / scaling),
    }
    tick = trial.counter(len(makers) * len(config.scalings) * config.steps)
    for maker, make in makers.items():
        losses: dict[float, Tensor] = {}
        for scaling in config.scalings:
            stack = race.stack("sb", config.rank, scaling)
            run = race.run(stack, make(stack, scaling), config.steps, tick)
            losses[scaling] = run.losses
            measured.add(at_scaling(maker, scaling), loss=run.losses[:, -1])
            measured.add_curve(at_scaling(maker, scaling), "loss", run.steps, run.losses)
        one = losses[1.0]
        apart = torch.stack([(other - one).abs().amax(dim=1) for other in losses.values()])
        measured.add(maker, spread=apart.amax(dim=0) / one[:, 0])
    return measured


def run_rates(config: Config, trial: Trial) -> Measurements:
    """Methods at several learning rates; then each at the one with which it ends lowest, in the mean over seeds."""
    race, measured = _Race(config, trial), Measurements()
    tick = trial.counter(len(TUNED) * len(config.rates) * config.rates_steps)
    for name, (method, rank) in TUNED.items():
        tried = []
        for multiple in config.rates:
            lr = multiple / 1000
            loss = race.run(race.stack(method, rank), adam(lr), config.rates_steps, tick).losses[:, -1]
            lrs = [lr] * len(trial.seeds)
            measured.add(f"{name}_x{multiple}", loss=loss, lr=lrs)
            tried.append((loss, lrs))
        loss, lrs = min(tried, key=lambda pair: pair[0].mean().item())
        measured.add(name, loss=loss, lr=lrs)
    return measured


PARTS = (
    Part("methods", "Final loss with AdamW", run_methods, baseline="sb_12"),
    Part("spaces", "What the frozen spaces hold", run_spaces, baseline="sb_12"),
    Part("scaling", "Does the scaling matter?", run_scaling, baseline="optimal"),
    Part("rates", "AdamW at the best learning rate", run_rates, baseline="sb_12"),
)


def figure(results: Results) -> Figure:
    """Six panels: loss curves, final loss against trained numbers, what the spaces hold; the scaling with three optimizers."""
    fig, (curves, count, held, *scalings) = plotting.make_figure(3, QUESTION, rows=2)
    metrics = results.metrics
    config: Config = convert(results.config, Config, "config")

    shown = (f"lora_{config.lora_ranks[0]}", *(f"{method}_{config.rank}" for method in ("xs", "random", "sb", "raw")))
    for i, name in enumerate(shown):
        method, _, rank = name.partition("_")
        plotting.draw_curve(curves, results.curves[f"methods.{name}.loss"], f"{METHODS[method]}, r = {rank}", i)
    curves.set(title="AdamW", xlabel="step", ylabel="loss", ylim=(0, None))
    curves.legend(fontsize=7.5, ncols=2, loc="lower center")

    for i, (method, ranks) in enumerate((("lora", config.lora_ranks), ("xs", config.ranks), ("sb", config.ranks))):
        found = [metrics[f"methods.{method}_{rank}.loss"] for rank in ranks]
        numbers = [metrics[f"methods.{method}_{rank}.parameters"].mean or 0.0 for rank in ranks]
        plotting.draw_points(count, numbers, found, METHODS[method], i)
    count.set(title="Loss against trained numbers", xlabel="trained numbers", ylabel="final loss", ylim=(0, None), xscale="log")
    ticks = sorted({round(metrics[f"methods.{name}.parameters"].mean or 0) for name in variants(config) if name != "full"})
    count.set_xticks(ticks, [str(tick) for tick in ticks], rotation=60)
    count.minorticks_off()
    count.legend(fontsize=8)

    labels = [METHODS[method].replace(", ", ",\n") for method in FROZEN]
    series = {
        label: [metrics[f"spaces.{method}_{config.rank}.{quantity}"] for method in FROZEN]
        for label, quantity in (("gradient of all samples", "gradient"), ("needed change", "shift"))
    }
    plotting.draw_bars(held, labels, series)
    held.set(title=f"Share held by the spaces, r = {config.rank}", ylim=(0, 1))
    held.tick_params(axis="x", labelsize=7.5)
    held.legend(fontsize=8)

    titles = {"optimal": "Gradient descent, optimal gradient", "plain": "Gradient descent, plain gradient", "adamw": "AdamW"}
    for ax, (maker, title) in zip(scalings, titles.items(), strict=True):
        _draw_scalings(ax, results, maker, config.scalings)
        ax.set(title=title, xlabel="step", ylabel="loss", ylim=(0, None))
    return fig


def _draw_scalings(ax: Axes, results: Results, maker: str, scalings: Sequence[float]) -> None:
    """The loss curves of one optimizer, one for each scaling."""
    for i, scaling in enumerate(scalings):
        plotting.draw_curve(ax, results.curves[f"scaling.{at_scaling(maker, scaling)}.loss"], f"s = {scaling:g}", i)
    ax.legend(fontsize=8)
