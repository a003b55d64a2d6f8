r"""LoLDU: how far do a hundred diagonal entries go, do the LU factors matter, and does the start of the diagonal?

A small network was trained to tell ten Gaussian classes apart; then the sensor changes: features are scaled and mixed. All three
layers are adapted, biases there are none. `methods`: every method at the learning rate with which it does best on samples held
back, and its accuracy on others. `starts`: LoLDU at full rank with the eight starts of the diagonal, the pretrained weight
preserved or not.
"""

import copy
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ...reference import loldu
from ...reference._adapters import replace_linears
from ...reference.lora import LoRALinear
from .. import plotting
from ..config import convert
from ..datasets import draw_orthonormal
from ..experiment import Measurements, Part, Quantity, Trial
from ..models import Params, Stack, make_linear
from ..records import Claim, Results
from ..training import Trained, adam, train

QUESTION = "How far do a hundred diagonal entries go, and does it matter where they start?"


@dataclass(frozen=True)
class Config:
    """Settings, explained where their values stand: `configs/loldu.toml`."""

    features: int
    classes: int
    mean_std: float
    pretrain_samples: int
    pretrain_steps: int
    pretrain_lr: float
    gain_std: float
    mixing: float
    train_per_class: int
    held_back_per_class: int
    test_per_class: int
    steps: int
    early: int
    rates: tuple[float, ...]
    rank: int
    lora_ranks: tuple[int, ...]
    start_lr: float

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.lora_ranks):
            if not 1 <= rank <= self.features:
                raise ValueError(f"rank is {rank}; needed 1 to {self.features}, the width of the network")
        if not self.rates or not self.lora_ranks or self.classes > self.features:
            raise ValueError("rates and lora_ranks need one value or more, and classes at most features")
        if not 0 <= self.early <= self.steps:
            raise ValueError(f"early is {self.early}; needed 0 to steps, {self.steps}")


METHODS = {
    "low": "LoLDU, low rank",
    "ldu": "LoLDU, full rank",
    "svd": "diagonal in SVD factors",
    "random": "diagonal in random factors",
    "long": "random factors, as long as LU's",
    "lora": "LoRA",
    "full": "full fine-tuning",
}

QUANTITIES = {
    "accuracy": Quantity("test accuracy", 0.01),
    "loss": Quantity("final training loss", 0.03),
    "early": Quantity("training loss after the first steps", 0.03),
    "parameters": Quantity("trained numbers", 0.0),
    "lr": Quantity("learning rate", 1e-9),
    "share": Quantity("share of full fine-tuning's gain", 0.05),
    "start": Quantity("test accuracy at the start", 0.01),
    "deviation": Quantity("deviation of the weights at the start, relative", 1e-3),
    "apart": Quantity("|accuracy - that of the start by pivots|", 0.01),
}

CLAIMS = (
    Claim(
        "loldu.T1",
        "138 trained numbers regain more than half of what full fine-tuning gains.",
        "methods.ldu.share",
        ">=",
        0.5,
        expected=False,
    ),
    Claim(
        "loldu.T2",
        "LoLDU at full rank is within a point of LoRA of rank 8, which trains 19 times as many numbers.",
        "methods.ldu.accuracy",
        ">=",
        -0.01,
        baseline="methods.lora_8.accuracy",
        expected=False,
    ),
    Claim(
        "loldu.T3",
        "LoLDU at full rank is within a point of LoRA of rank 1, which trains more than twice as many numbers.",
        "methods.ldu.accuracy",
        ">=",
        -0.01,
        baseline="methods.lora_1.accuracy",
        expected=False,
    ),
    Claim(
        "loldu.T4",
        "The LU factors of the weight do it: random factors with as many trained numbers are at least a point worse.",
        "methods.ldu.accuracy",
        ">=",
        0.01,
        baseline="methods.random.accuracy",
        expected=False,
    ),
    Claim(
        "loldu.T5",
        "The LU factors do it: the SVD's factors with as many trained numbers are at least a point worse.",
        "methods.ldu.accuracy",
        ">=",
        0.01,
        baseline="methods.svd.accuracy",
        expected=False,
    ),
    Claim(
        "loldu.T6",
        "The LU factors converge faster: after the first steps the training loss is lower than with random factors.",
        "methods.ldu.early",
        "<=",
        0.0,
        baseline="methods.random.early",
    ),
    Claim(
        "loldu.T11",
        "They converge faster also than random factors whose terms are as long as theirs.",
        "methods.ldu.early",
        "<=",
        0.0,
        baseline="methods.long.early",
    ),
    Claim(
        "loldu.T7",
        "With the pretrained weight preserved the start of the diagonal makes no difference: of all eight none ends half a point apart.",
        "starts.kept.apart",
        "<=",
        0.005,
    ),
    Claim(
        "loldu.T8",
        "Without preserving it, a diagonal of ones starts at least 30 points below the pretrained network.",
        "starts.ones_off.start",
        "<=",
        -0.3,
        baseline="starts.lu_kept.start",
    ),
    Claim(
        "loldu.T9",
        "Training does not make up for it: a diagonal of ones that was not preserved ends at least 5 points lower.",
        "starts.ones_off.accuracy",
        "<=",
        -0.05,
        baseline="starts.lu_kept.accuracy",
    ),
    Claim(
        "loldu.T10",
        "At full rank a diagonal of zeros that was not preserved is a network of zeros, which never learns: it ends at chance.",
        "starts.zeros_off.accuracy",
        "<=",
        0.15,
        expected=False,
    ),
)


class DiagonalLinear(nn.Module):
    """A frozen linear layer plus a trained diagonal, zero at the start, between any two frozen factors."""

    U: Tensor
    L: Tensor
    P: Tensor

    def __init__(self, base: nn.Linear, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.z = nn.Parameter(torch.zeros(len(right)))
        self.register_buffer("U", right)
        self.register_buffer("L", left)
        self.register_buffer("P", torch.arange(len(left)))

    def forward(self, x: Tensor) -> Tensor:
        return loldu.forward(x, self.base.weight, self.U, self.z, self.L, self.P, 1.0)


class _Task:
    """Pretrained networks, one per seed, and the samples of the new sensor."""

    def __init__(self, config: Config, trial: Trial) -> None:
        self.config, self.trial = config, trial
        self.models: list[nn.Module] = []
        self.means, sensors = [], []
        generators = trial.generators()
        for generator in generators:
            self.means.append(config.mean_std * torch.randn(config.classes, config.features, generator=generator))
            sides = (config.features, config.features, config.features, config.classes)
            layers = [make_linear(n, m, generator, bias=False) for n, m in itertools.pairwise(sides)]
            self.models.append(nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]))
            gain = (config.gain_std * torch.randn(config.features, generator=generator)).exp()
            mixing = torch.randn(config.features, config.features, generator=generator) * config.mixing / config.features**0.5
            sensors.append((torch.eye(config.features) + mixing) * gain)
        self._pretrain(generators)
        draw = partial(self._draw, generators, sensors)
        self.train, self.held_back, self.test = (
            draw(count) for count in (config.train_per_class, config.held_back_per_class, config.test_per_class)
        )

    def _draw(self, generators: Iterable[torch.Generator], sensors: Iterable[Tensor], per_class: int) -> tuple[Tensor, Tensor]:
        """Inputs (seeds, samples, features) as the sensors show them, and classes (seeds, samples)."""
        classes = torch.arange(self.config.classes).repeat_interleave(per_class)
        inputs = [
            (means[classes] + torch.randn(len(classes), means.shape[1], generator=generator)) @ sensor.T
            for means, sensor, generator in zip(self.means, sensors, generators, strict=True)
        ]
        return torch.stack(inputs).to(self.trial.device), classes.expand(len(inputs), -1).to(self.trial.device)

    def _pretrain(self, generators: list[torch.Generator]) -> None:
        """Train the networks on fresh samples of the old sensor at every step."""
        stack, plain = Stack(self.models, self.trial.device), [torch.eye(self.config.features)] * len(generators)
        per_class = self.config.pretrain_samples // self.config.classes

        def loss(params: Params) -> Tensor:
            return self.loss(stack, self._draw(generators, plain, per_class), params)

        run = train(loss, stack.trainable, adam(self.config.pretrain_lr), steps=self.config.pretrain_steps)
        self.models = stack.models(run.params)

    @staticmethod
    def loss(stack: Stack, samples: tuple[Tensor, Tensor], params: Params) -> Tensor:
        """Mean cross-entropy of every network (seeds,)."""
        x, classes = samples
        own = stack(params, x).log_softmax(dim=-1).gather(-1, classes[..., None])
        return -own.mean(dim=(1, 2))

    @staticmethod
    @torch.no_grad()
    def accuracy(stack: Stack, samples: tuple[Tensor, Tensor], params: Params) -> Tensor:
        """Share of samples that every network gets right (seeds,)."""
        x, classes = samples
        return (stack(params, x).argmax(dim=-1) == classes).float().mean(dim=1).cpu()

    def stack(self, make: Callable[[nn.Linear, torch.Generator], nn.Module] | None) -> Stack:
        """The networks with every linear layer replaced by what `make` makes of it; None trains them whole."""
        models = [copy.deepcopy(model) for model in self.models]
        for model, generator in zip(models, self.trial.generators(stream=1), strict=True):
            if make is not None:
                replace_linears(model, ".*", lambda linear, generator=generator: make(linear, generator))  # type: ignore[misc]
        return Stack(models, self.trial.device)

    def run(self, stack: Stack, lr: float, tick: Callable[[], None]) -> Trained:
        """Train with all samples of the new sensor."""
        return train(partial(self.loss, stack, self.train), stack.trainable, adam(lr), steps=self.config.steps, every=5, tick=tick)


def _lora(rank: int, linear: nn.Linear, generator: torch.Generator) -> nn.Module:
    return LoRALinear(linear, rank=rank, alpha=rank, generator=generator)


def _ldu(linear: nn.Linear, generator: torch.Generator, rank: int, diagonal: str = "lu", preserve: bool = True) -> nn.Module:
    """LoLDU with sigma = 1; a smaller rank where the layer has no more."""
    rank = min(rank, *linear.weight.shape)
    return loldu.LoLDULinear(linear, rank=rank, alpha=rank, diagonal=diagonal, preserve=preserve, generator=generator)


def _svd(linear: nn.Linear, generator: torch.Generator) -> nn.Module:
    U, _, Vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    return DiagonalLinear(linear, U, Vh)


def _random(linear: nn.Linear, generator: torch.Generator) -> nn.Module:
    count = min(linear.weight.shape)
    left, right = (draw_orthonormal(features, count, generator) for features in (linear.out_features, linear.in_features))
    return DiagonalLinear(linear, left, right.T)


def _long(linear: nn.Linear, generator: torch.Generator) -> nn.Module:
    """Random factors whose rank-one terms are as long as those of the LU factors: only the directions differ."""
    layer, factors = _random(linear, generator), loldu.ldu(linear.weight.detach())
    layer.get_buffer("U").mul_((factors.L.norm(dim=0) * factors.U.norm(dim=1))[:, None])
    return layer


def variants(config: Config) -> dict[str, Callable[[nn.Linear, torch.Generator], nn.Module] | None]:
    """What is compared, by name."""
    found: dict[str, Callable[[nn.Linear, torch.Generator], nn.Module] | None] = {
        "low": partial(_ldu, rank=config.rank),
        "ldu": partial(_ldu, rank=config.features),
        "svd": _svd,
        "random": _random,
        "long": _long,
    }
    return found | {f"lora_{rank}": partial(_lora, rank) for rank in config.lora_ranks} | {"full": None}


def run_methods(config: Config, trial: Trial) -> Measurements:
    """Every method at the learning rate with which it does best, in the mean over seeds, on the samples held back."""
    task, measured = _Task(config, trial), Measurements()
    tick = trial.counter(len(variants(config)) * len(config.rates) * config.steps)
    gains: dict[str, Tensor] = {}
    frozen = task.stack(None)
    before = task.accuracy(frozen, task.test, frozen.trainable)
    measured.add("none", accuracy=before, parameters=[0] * len(trial.seeds))
    for name, make in variants(config).items():
        stack = task.stack(make)
        tried = [(lr, task.run(stack, lr, tick)) for lr in config.rates]
        lr, run = max(tried, key=lambda pair: task.accuracy(stack, task.held_back, pair[1].params).mean().item())
        accuracy = task.accuracy(stack, task.test, run.params)
        gains[name] = accuracy - before
        early = run.losses[:, next(i for i, step in enumerate(run.steps) if step >= config.early)]
        measured.add(name, accuracy=accuracy, loss=run.losses[:, -1], early=early)
        measured.add(name, parameters=[stack.num_trainable()] * len(trial.seeds), lr=[lr] * len(trial.seeds))
        measured.add_curve(name, "loss", run.steps, run.losses)
    for name, gain in gains.items():
        measured.add(name, share=gain / gains["full"])
    return measured


def run_starts(config: Config, trial: Trial) -> Measurements:
    """LoLDU at full rank and one learning rate, with every start of the diagonal, the pretrained weight preserved or not."""
    task, measured = _Task(config, trial), Measurements()
    tick = trial.counter(2 * len(loldu.DIAGONALS) * config.steps)
    apart = []
    for preserve, suffix in ((True, "kept"), (False, "off")):
        for diagonal in loldu.DIAGONALS:
            stack = task.stack(partial(_ldu, rank=config.features, diagonal=diagonal, preserve=preserve))
            start = task.accuracy(stack, task.test, stack.trainable)
            run = task.run(stack, config.start_lr, tick)
            accuracy, name = task.accuracy(stack, task.test, run.params), f"{diagonal}_{suffix}"
            measured.add(name, start=start, accuracy=accuracy, loss=run.losses[:, -1], deviation=_deviations(stack))
            measured.add_curve(name, "loss", run.steps, run.losses)
            if preserve:
                apart.append(accuracy)
    measured.add("kept", apart=(torch.stack(apart) - apart[0]).abs().amax(dim=0))
    return measured


def _deviations(stack: Stack) -> list[float]:
    """How far the weights of every network lie from the pretrained ones at the start, over their size, both over all layers."""
    found = []
    for model in stack.models(stack.trainable):
        squares = torch.zeros(2)
        for layer in model.modules():
            if isinstance(layer, loldu.LoLDULinear):
                W0, W = layer.base.weight, layer.base.weight + _change(layer)
                squares += torch.stack([(W - W0).square().sum(), W0.square().sum()]).detach()
        found.append(float((squares[0] / squares[1]).sqrt()))
    return found


def _change(layer: loldu.LoLDULinear) -> Tensor:
    """What a layer adds to its pretrained weight."""
    z = layer.scaling * layer.z - layer.scaling0 * layer.z0
    return loldu.delta_weight(layer.U, z, layer.L, layer.P, 1.0)


PARTS = (
    Part("methods", "Test accuracy, every method at its best learning rate", run_methods, baseline="ldu"),
    Part("starts", "LoLDU with eight starts of the diagonal", run_starts, baseline="lu_kept"),
)


def figure(results: Results) -> Figure:
    """Four panels: accuracy against trained numbers and loss curves; where a start without `preserve` begins, and how it goes on."""
    fig, (count, curves, off, goes_on) = plotting.make_figure(2, QUESTION, rows=2)
    metrics = results.metrics
    config: Config = convert(results.config, Config, "config")

    groups = {
        "low": ["low"],
        "ldu": ["ldu"],
        "svd": ["svd"],
        "random": ["random"],
        "long": ["long"],
        "lora": [f"lora_{r}" for r in config.lora_ranks],
    }
    for i, (method, names) in enumerate({**groups, "full": ["full"]}.items()):
        numbers = [metrics[f"methods.{name}.parameters"].mean or 1.0 for name in names]
        # Four methods train equally many numbers: side by side
        shifted = [number * {"svd": 1.15, "random": 0.87, "long": 1.32}.get(method, 1.0) for number in numbers]
        plotting.draw_points(count, shifted, [metrics[f"methods.{name}.accuracy"] for name in names], METHODS[method], i)
    count.axhline(metrics["methods.none.accuracy"].mean or 0.0, color="grey", linewidth=1)
    count.annotate(
        "no training", (0.98, metrics["methods.none.accuracy"].mean or 0.0), (0, 3), ("axes fraction", "data"), "offset points", ha="right"
    )
    count.set(title="Accuracy on the new sensor", xlabel="trained numbers", ylabel="test accuracy", xscale="log", ylim=(0.55, 0.95))
    count.legend(fontsize=6.3, loc="lower right", ncols=2)

    for i, name in enumerate(("low", "ldu", "svd", "random", "long", f"lora_{config.lora_ranks[0]}")):
        label = METHODS.get(name, f"LoRA, r = {config.lora_ranks[0]}")
        plotting.draw_curve(curves, results.curves[f"methods.{name}.loss"], label, i)
    curves.set(title="Training, each at its best learning rate", xlabel="step", ylabel="training loss", ylim=(0, None))
    curves.legend(fontsize=7.5)

    breaks = {
        "uniform": "uni-\nform",
        "normal": "nor-\nmal",
        "constant": "con-\nstant",
        "s_uniform": "s_uni-\nform",
        "s_normal": "s_nor-\nmal",
    }
    far = [metrics[f"starts.{name}_off.deviation"].mean or 0.0 for name in loldu.DIAGONALS]
    # Names of two lines, then how far off the weights are
    labels = [f"{breaks.get(name, name + chr(10))}\n{off_by:.1f}" for name, off_by in zip(loldu.DIAGONALS, far, strict=True)]
    series = {
        "at the start": [metrics[f"starts.{name}_off.start"] for name in loldu.DIAGONALS],
        "after training": [metrics[f"starts.{name}_off.accuracy"] for name in loldu.DIAGONALS],
    }
    plotting.draw_bars(off, labels, series)
    off.set(title="Not preserved: where each start begins", ylabel="test accuracy", ylim=(0, 1))
    off.set_xlabel("start of the diagonal, and |W - W0| / |W0| there")
    off.tick_params(axis="x", labelsize=7.5)
    off.legend(fontsize=7.5)

    shown = {"lu_kept": "pivots", "ones_kept": "ones, preserved", "ones_off": "ones, not preserved"}
    shown |= {"zeros_off": "zeros, not preserved", "s_uniform_off": "s_uniform, not preserved"}
    for i, (name, label) in enumerate(shown.items()):
        plotting.draw_curve(goes_on, results.curves[f"starts.{name}.loss"], label, i)
    goes_on.set(title="What becomes of them", xlabel="step", ylabel="training loss", yscale="log", ylim=(None, 1e7))
    goes_on.legend(fontsize=7.5, loc="upper center", ncols=2)
    return fig
