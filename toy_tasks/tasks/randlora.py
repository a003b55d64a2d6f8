r"""RandLoRA: when is a full-rank update from random bases worth more than a low-rank update of as many numbers?

A layer relu(W x) must move its weight by a change that is as large as the weight. `spectra`: the loss that LoRA and RandLoRA
leave at several budgets, each at the best of several learning rates, for a change with a flat, a Gaussian or a rank-4 spectrum.
`choices`: scalings, starts, kinds of bases, one large base, and two faults at one budget and learning rate, for the flat change.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ...reference import randlora
from ...reference.lora import LoRALinear
from .. import plotting
from ..config import convert
from ..experiment import Measurements, Part, Quantity, Trial
from ..models import Params, Shift, Stack
from ..records import Claim, Results
from ..training import Optimizer, Trained, adam, sgd, train

QUESTION = "Full rank or low rank, for the same number of trained numbers?"


@dataclass(frozen=True)
class Config:
    """Settings, explained where their values stand: `configs/randlora.toml`."""

    side: int
    samples: int
    low_rank: int
    lora_ranks: tuple[int, ...]
    ranks: tuple[int, ...]
    steps: int
    lora_rates: tuple[float, ...]
    rates: tuple[float, ...]
    rank: int
    lr: float
    sgd_lr: float
    choices_steps: int

    def __post_init__(self) -> None:
        for rank in (self.rank, self.low_rank, *self.ranks, *self.lora_ranks):
            if not 1 <= rank <= self.side:
                raise ValueError(f"rank is {rank}; needed 1 to {self.side}, the side of the layer")
        if len(self.lora_ranks) != len(self.ranks) or not self.ranks or not self.rates or not self.lora_rates:
            raise ValueError("lora_ranks and ranks need as many values as each other, rates and lora_rates one or more")


SPECTRA = {"flat": "flat spectrum", "gauss": "Gaussian", "low": "low rank"}

# What is compared at one rank: options of the layer and of the bases
CHOICES: dict[str, tuple[dict[str, str], str]] = {
    "paper": ({}, "uniform"),
    "peft": ({"convention": "peft"}, "uniform"),
    "vision": ({"convention": "vision"}, "uniform"),
    "gammas": ({"zero": "gammas"}, "uniform"),
    "normal": ({}, "normal"),
    "sparse": ({}, "sparse"),
    "very_sparse": ({}, "very_sparse"),
}

QUANTITIES = {
    "loss": Quantity("loss left, share of the start", 0.02),
    "parameters": Quantity("trained numbers", 0.0),
    "rank": Quantity("rank of the update", 1.0),
    "apart": Quantity("|loss - that of the paper's choice|", 0.02),
    "lr": Quantity("learning rate", 1e-9),
}

CLAIMS = (
    Claim(
        "randlora.T1",
        "For a change with a flat spectrum RandLoRA leaves less than LoRA at the largest budget, by 0.05 of the start or more.",
        "spectra.randlora_flat_3.loss",
        "<=",
        -0.05,
        baseline="spectra.lora_flat_3.loss",
    ),
    Claim(
        "randlora.T2",
        "So it does for a Gaussian change.",
        "spectra.randlora_gauss_3.loss",
        "<=",
        -0.05,
        baseline="spectra.lora_gauss_3.loss",
        expected=False,
    ),
    Claim(
        "randlora.T3",
        "So it does for a change of rank 4.",
        "spectra.randlora_low_3.loss",
        "<=",
        -0.05,
        baseline="spectra.lora_low_3.loss",
        expected=False,
    ),
    Claim(
        "randlora.T4",
        "More numbers help: from the smallest budget to the largest RandLoRA's loss falls by 0.3 of the start or more.",
        "spectra.randlora_flat_3.loss",
        "<=",
        -0.3,
        baseline="spectra.randlora_flat_0.loss",
    ),
    Claim("randlora.T5", "The trained update has full rank, up to two.", "spectra.randlora_flat_1.rank", ">=", 46.0),
    Claim(
        "randlora.T6",
        "Sparse ternary bases work as well as uniform ones: within 0.03 of the start.",
        "choices.sparse.apart",
        "<=",
        0.03,
        expected=False,
    ),
    Claim("randlora.T7", "Very sparse ones too.", "choices.very_sparse.apart", "<=", 0.03, expected=False),
    Claim(
        "randlora.T8",
        "The scaling does not matter: PEFT's ends within 0.03 of the paper's at the same learning rate.",
        "choices.peft.apart",
        "<=",
        0.03,
    ),
    Claim(
        "randlora.T9",
        "Nor does the start: with gammas zero the loss ends within 0.03.",
        "choices.gammas.apart",
        "<=",
        0.03,
    ),
    Claim(
        "randlora.T10",
        "Gammas must be trained: with lambdas alone the update keeps the rank of the base and leaves 0.1 more.",
        "choices.lambdas_alone.loss",
        ">=",
        0.1,
        baseline="choices.paper.loss",
    ),
    Claim(
        "randlora.T11",
        "Gradients that are N times too large do no harm under gradient descent either: the loss ends within 0.03.",
        "choices.sgd_times_bases.apart",
        "<=",
        0.03,
        expected=False,
    ),
    Claim(
        "randlora.T12",
        "Many small terms beat one term with large bases and as many trained numbers: they leave 0.03 less.",
        "choices.paper.loss",
        "<=",
        -0.03,
        baseline="choices.one_large.loss",
        expected=False,
    ),
)


def draw_spectrum(spectrum: str, config: Config, generator: torch.Generator) -> list[float]:
    """Singular values of the change, with the Frobenius norm that the weight has on average, the root of the side."""
    side = config.side
    values = {
        "flat": torch.ones(side),
        "gauss": torch.linalg.svdvals(torch.randn(side, side, generator=generator)),
        "low": (torch.arange(side) < config.low_rank).float(),
    }[spectrum]
    scaled: list[float] = (values * side**0.5 / values.norm()).tolist()
    return scaled


class OneLargeBase(nn.Module):
    """A frozen linear layer with one term, whose bases have a rank beyond the layer's sides: VeRA's update, at RandLoRA's start."""

    A: Tensor
    B: Tensor

    def __init__(self, base: nn.Linear, *, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), randlora.scaling_factor(rank, 1)
        small, large = sorted(base.weight.shape)
        for name, shape in (("A", (rank, small)), ("B", (large, 1, rank))):
            self.register_buffer(name, randlora.normalise(torch.empty(shape).uniform_(-1, 1, generator=generator)))
        self.gammas, self.lambdas = nn.Parameter(torch.full((1, small), 1 / small)), nn.Parameter(torch.zeros(1, rank))

    def forward(self, x: Tensor) -> Tensor:
        factors = (self.gammas, self.A, self.lambdas, self.B, self.scaling)
        return randlora.forward(x, self.base.weight, *factors, bias=self.base.bias)


class _Race:
    """The layers relu(W x) of every seed, and what they must become."""

    def __init__(self, config: Config, trial: Trial, spectrum: str) -> None:
        self.config, self.trial = config, trial
        self.problem = Shift(
            trial,
            out_features=config.side,
            in_features=config.side,
            spectrum=draw_spectrum(spectrum, config, torch.Generator().manual_seed(0)),
            draw_inputs=lambda generator: torch.randn(config.samples, config.side, generator=generator),
            activation=torch.relu,
        )

    def stack(self, method: str, rank: int, *, kind: str = "uniform", **options: str) -> Stack:
        """What a method trains, one model per seed."""
        models: list[nn.Module] = []
        for layer, generator in zip(self.problem.layers, self.trial.generators(stream=1), strict=True):
            frozen = copy.deepcopy(layer)
            if method == "lora":
                models.append(LoRALinear(frozen, rank=rank, alpha=2 * rank, generator=generator))
            elif method == "one_large":
                budget = randlora.num_trainable(frozen.weight, rank=rank)
                models.append(OneLargeBase(frozen, rank=budget - self.config.side, generator=generator))
            else:
                pair = randlora.BasePair(*randlora.draw_bases([frozen.weight], rank=rank, kind=kind, generator=generator))
                models.append(randlora.RandLoRALinear(frozen, pair, **options))  # type: ignore[arg-type]
        return Stack(models, self.trial.device)

    def run(self, stack: Stack, optimizer: Optimizer, steps: int, tick: Callable[[], None]) -> Trained:
        """Train with all samples for a number of steps; losses as a share of the start."""
        run = train(partial(self.problem.loss, stack), stack.trainable, optimizer, steps=steps, every=5, tick=tick)
        return run._replace(losses=run.losses / run.losses[:, :1])

    def ranks(self, stack: Stack, params: Params) -> list[float]:
        """Singular values of the update above a thousandth of the largest; not a number where training diverged."""
        unit_vectors = torch.eye(self.config.side).expand(len(self.problem.layers), -1, -1)
        weights = stack(params, unit_vectors.to(self.problem.x)).mT.detach().cpu()
        updates = weights - torch.stack([layer.weight.detach() for layer in self.problem.layers])
        sound = updates.isfinite().all(dim=(1, 2))
        values = torch.linalg.svdvals(updates.double().where(sound[:, None, None], 0.0))
        found = (values > 1e-3 * values[:, :1]).sum(dim=1)
        return [float(n) for n in torch.where(sound, found.double(), torch.nan)]


def run_spectra(config: Config, trial: Trial) -> Measurements:
    """Both methods at every budget, each at the learning rate at which it ends lowest in the mean over seeds."""
    measured = Measurements()
    methods = {"lora": (config.lora_ranks, config.lora_rates), "randlora": (config.ranks, config.rates)}
    tick = trial.counter(len(SPECTRA) * len(config.ranks) * config.steps * (len(config.lora_rates) + len(config.rates)))
    for spectrum in SPECTRA:
        race = _Race(config, trial, spectrum)
        for method, (ranks, rates) in methods.items():
            for i, rank in enumerate(ranks):
                stack = race.stack(method, rank)
                tried = [(race.run(stack, adam(lr), config.steps, tick), lr) for lr in rates]
                best, lr = min(tried, key=lambda pair: pair[0].losses[:, -1].mean().nan_to_num(torch.inf).item())
                name, seeds = f"{method}_{spectrum}_{i}", len(trial.seeds)
                measured.add(name, loss=best.losses[:, -1], parameters=[stack.num_trainable()] * seeds, lr=[lr] * seeds)
                measured.add(name, rank=race.ranks(stack, best.params))
    return measured


def times_bases(optimizer: Optimizer, bases: int) -> Optimizer:
    """An optimizer that gets gradients which are `bases` times too large."""
    return Optimizer(
        optimizer.init_state, lambda params, grads, state: optimizer.step(params, {k: bases * g for k, g in grads.items()}, state)
    )


def lambdas_alone(optimizer: Optimizer) -> Optimizer:
    """An optimizer that leaves gammas as they are: every term keeps one gamma for all columns."""
    return Optimizer(
        optimizer.init_state,
        lambda params, grads, state: optimizer.step(params, {k: g * (k == "lambdas") for k, g in grads.items()}, state),
    )


def run_choices(config: Config, trial: Trial) -> Measurements:
    """Everything that can be chosen, one by one, at one rank and learning rate."""
    race, measured = _Race(config, trial, "flat"), Measurements()
    bases = -(-config.side // config.rank)
    runs: dict[str, tuple[dict[str, str], str, Optimizer]] = {
        name: (options, kind, adam(config.lr)) for name, (options, kind) in CHOICES.items()
    }
    runs["lambdas_alone"] = ({}, "uniform", lambdas_alone(adam(config.lr)))
    runs["times_bases"] = ({}, "uniform", times_bases(adam(config.lr), bases))
    runs["sgd"] = ({}, "uniform", sgd(config.sgd_lr))
    runs["sgd_times_bases"] = ({}, "uniform", times_bases(sgd(config.sgd_lr), bases))
    runs["one_large"] = ({}, "uniform", adam(config.lr))
    tick = trial.counter(len(runs) * config.choices_steps)
    losses: dict[str, Tensor] = {}
    for name, (options, kind, optimizer) in runs.items():
        stack = race.stack("one_large" if name == "one_large" else "randlora", config.rank, kind=kind, **options)
        run = race.run(stack, optimizer, config.choices_steps, tick)
        losses[name] = run.losses[:, -1]
        reference = "sgd" if name.startswith("sgd") else "paper"
        measured.add(name, loss=losses[name], apart=(losses[name] - losses[reference]).abs(), rank=race.ranks(stack, run.params))
        measured.add_curve(name, "loss", run.steps, run.losses)
    return measured


PARTS = (
    Part("spectra", "Loss left, at the best learning rate", run_spectra, baseline=None),
    Part("choices", "Choices and faults at one learning rate", run_choices, baseline="paper"),
)


def figure(results: Results) -> Figure:
    """Loss against trained numbers for three spectra; curves of the scalings and starts, of the bases, and of faults."""
    fig, axes = plotting.make_figure(3, QUESTION, rows=2)
    metrics, config = results.metrics, convert(results.config, Config, "config")
    for ax, (spectrum, title) in zip(axes[:3], SPECTRA.items(), strict=True):
        for i, (method, label) in enumerate((("lora", "LoRA"), ("randlora", "RandLoRA"))):
            names = [f"spectra.{method}_{spectrum}_{k}" for k in range(len(config.ranks))]
            numbers = [metrics[f"{name}.parameters"].mean or 0.0 for name in names]
            plotting.draw_points(ax, numbers, [metrics[f"{name}.loss"] for name in names], label, i)
        ax.set(title=f"Change: {title}", xlabel="trained numbers", ylabel="loss left", ylim=(0, 1))
        ax.legend(fontsize=8)
    panels = {
        "Scalings and starts": {"paper": "paper", "peft": "PEFT's scaling", "vision": "vision scaling", "gammas": "gammas zero"},
        "Kinds of bases": {
            "paper": "uniform",
            "normal": "normal",
            "sparse": "sparse",
            "very_sparse": "very sparse",
            "one_large": "one large pair",
        },
        "Faults": {
            "times_bases": "gradients x N, Adam",
            "sgd": "gradient descent",
            "sgd_times_bases": "gradients x N, same rate",
            "lambdas_alone": "gammas constant, Adam",
        },
    }
    for ax, (title, lines) in zip(axes[3:], panels.items(), strict=True):
        for i, (name, label) in enumerate(lines.items()):
            plotting.draw_curve(ax, results.curves[f"choices.{name}.loss"], label, i)
        ax.set(title=f"{title}, r = {config.rank}", xlabel="step", ylabel="loss left", ylim=(0, 1.5))
        ax.legend(fontsize=7.5)
    return fig
