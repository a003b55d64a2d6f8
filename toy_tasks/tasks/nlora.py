r"""NLoRA: what does its start do to the pretrained model, does it learn faster, and what does N alone do?

A frozen MLP that classifies Gaussian classes must do so for inputs that a fixed matrix has changed. `start`: how far every start
leaves the pretrained weights, and what is left of the old task before any training. `race`: loss and test accuracy of every
method. `large`: the same with larger pretrained weights. `rates`: methods at the best of several learning rates.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ...reference._adapters import replace_linears
from ...reference.lora import LoRALinear
from ...reference.nlora import SLoRALinear
from .. import plotting
from ..config import convert
from ..experiment import Measurements, Part, Quantity, Trial
from ..models import Params, Stack, make_mlp
from ..records import Claim, Results
from ..training import Trained, adam, train

QUESTION = "What does NLoRA's start do to the model, and does it learn faster?"


@dataclass(frozen=True)
class Config:
    """Settings, explained where their values stand: `configs/nlora.toml`."""

    features: int
    classes: int
    spread: float
    change: float
    gain: float
    pretrain_steps: int
    pretrain_batch: int
    pretrain_lr: float
    train_per_class: int
    test_per_class: int
    rank: int
    core_rank: int
    start_ranks: tuple[int, ...]
    steps: int
    early: int
    lr: float
    core_lr: float
    rates: tuple[int, ...]
    rates_steps: int

    def __post_init__(self) -> None:
        for rank in (self.rank, self.core_rank, *self.start_ranks):
            if not 1 <= rank <= self.features:
                raise ValueError(f"rank is {rank}; needed 1 to {self.features}, the side of the layers")
        if self.rank not in self.start_ranks:
            raise ValueError(f"start_ranks needs rank, {self.rank}, among its values")
        if not 0 <= self.early <= self.steps or self.early % 10:
            raise ValueError(f"early is {self.early}; needed a multiple of 10 from 0 to steps, {self.steps}")
        if not self.rates:
            raise ValueError("rates is empty; needed one value or more")


class Start(NamedTuple):
    """A method: its name in figures, and what its layer is told. `core_only`: N alone is trained."""

    label: str
    options: dict[str, Any]
    core_only: bool = False


METHODS = {
    "lora": Start("LoRA", {}),
    "slora": Start("SLoRA", {"method": "slora"}),
    "published": Start("NLoRA, published", {"method": "nlora"}),
    "corrected": Start("NLoRA, corrected", {"method": "nlora", "residual": True}),
    "pinv": Start("Nyström core, corrected", {"method": "nlora", "core": "pinv", "residual": True}),
    "pissa": Start("PiSSA", {}),
    "inttune": Start("IntTune, published", {"method": "inttune"}, True),
    "inttune_corrected": Start("IntTune, corrected", {"method": "inttune", "residual": True}, True),
    "xs": Start("singular vectors, N = 0", {"method": "inttune"}, True),
}
# Compared at the best learning rate of each
TUNED = ("lora", "slora", "published", "corrected", "pinv", "pissa")

QUANTITIES = {
    "parameters": Quantity("trained numbers", 0.0),
    "first": Quantity("loss before training", 0.01),
    "early": Quantity("loss early on", 0.01),
    "loss": Quantity("final loss", 0.01),
    "accuracy": Quantity("test accuracy", 0.01),
    "kept": Quantity("accuracy in the old task", 0.01),
    "moved": Quantity("|W - W0| / |W0| at the start", 1e-3),
    "predicted": Quantity("rank times variance of W0", 1e-3),
    "lr": Quantity("learning rate", 1e-9),
}

CLAIMS = (
    Claim(
        "nlora.T1",
        "With weights of He's size the published start damages the model: the first loss is at least 0.1 above that of LoRA.",
        "large.published.first",
        ">=",
        0.1,
        baseline="large.lora.first",
    ),
    Claim(
        "nlora.T2",
        "With weights of torch's own, smaller size it does so too.",
        "race.published.first",
        ">=",
        0.1,
        baseline="race.lora.first",
        expected=False,
    ),
    Claim(
        "nlora.T3",
        "The published start of rank 32 costs at least 5 points of accuracy in the old task, before any training.",
        "start.block_32.kept",
        "<=",
        -0.05,
        baseline="start.pretrained.kept",
    ),
    Claim(
        "nlora.T4",
        "At rank 4, where it moves the weights by 6 %, it costs less than a point.",
        "start.block_4.kept",
        ">=",
        -0.01,
        baseline="start.pretrained.kept",
    ),
    Claim(
        "nlora.T5",
        "NLoRA as published learns faster than LoRA: a lower loss after 50 steps, with the larger weights.",
        "large.published.early",
        "<=",
        0.0,
        baseline="large.lora.early",
        expected=False,
    ),
    Claim(
        "nlora.T6",
        "With the correction it does, with the larger weights.",
        "large.corrected.early",
        "<=",
        0.0,
        baseline="large.lora.early",
    ),
    Claim(
        "nlora.T7",
        "With the correction it does, with the smaller weights.",
        "race.corrected.early",
        "<=",
        0.0,
        baseline="race.lora.early",
        expected=False,
    ),
    Claim(
        "nlora.T8",
        "Nyström's own core, corrected, learns faster than LoRA, with the larger weights.",
        "large.pinv.early",
        "<=",
        0.0,
        baseline="large.lora.early",
    ),
    Claim(
        "nlora.T9",
        "It learns faster than PiSSA, with the larger weights.",
        "large.pinv.early",
        "<=",
        0.0,
        baseline="large.pissa.early",
        expected=False,
    ),
    Claim(
        "nlora.T10",
        "A trained matrix in the middle makes LoRA learn faster: SLoRA's loss after 50 steps is lower.",
        "race.slora.early",
        "<=",
        0.0,
        baseline="race.lora.early",
        expected=False,
    ),
    Claim(
        "nlora.T11",
        "SLoRA's test accuracy is higher than LoRA's.",
        "race.slora.accuracy",
        ">=",
        0.0,
        baseline="race.lora.accuracy",
        expected=False,
    ),
    Claim(
        "nlora.T12",
        "The test accuracy of NLoRA as published is higher than LoRA's.",
        "race.published.accuracy",
        ">=",
        0.0,
        baseline="race.lora.accuracy",
        expected=False,
    ),
    Claim(
        "nlora.T13",
        "IntTune with 512 trained numbers is as accurate as LoRA with 2048, within a point.",
        "race.inttune.accuracy",
        ">=",
        -0.01,
        baseline="race.lora.accuracy",
        expected=False,
    ),
    Claim(
        "nlora.T14",
        "IntTune learns: its loss ends at least 0.2 below the pretrained model's.",
        "race.inttune.loss",
        "<=",
        -0.2,
        baseline="race.lora.first",
    ),
    Claim(
        "nlora.T15",
        "Each at its best learning rate: the loss of NLoRA as published ends lower than LoRA's.",
        "rates.published.loss",
        "<=",
        0.0,
        baseline="rates.lora.loss",
        expected=False,
    ),
    Claim(
        "nlora.T16",
        "Each at its best learning rate: the loss of Nyström's own core, corrected, ends lower than LoRA's.",
        "rates.pinv.loss",
        "<=",
        0.0,
        baseline="rates.lora.loss",
        expected=False,
    ),
)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each seed's model."""
    chosen = logits.log_softmax(dim=-1).gather(-1, labels.unsqueeze(-1))
    return -chosen.mean(dim=(-2, -1))


def _accuracies(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=-1) == labels).float().mean(dim=-1)


class _Classes:
    """Gaussian classes of every seed, the models pretrained on them, and the task with changed inputs."""

    def __init__(self, config: Config, trial: Trial, gain: float = 1.0) -> None:
        self.config, self.trial = config, trial
        self.generators = trial.generators()
        shape = (config.classes, config.features)
        self.centres = torch.stack([config.spread * torch.randn(*shape, generator=g) for g in self.generators]).to(trial.device)
        square = (config.features, config.features)
        changes = torch.stack([torch.eye(config.features) + config.change * torch.randn(*square, generator=g) for g in self.generators])
        self.change = changes.to(trial.device)
        models = [make_mlp([config.features] * 3 + [config.classes], g) for g in self.generators]
        with torch.no_grad():
            for model in models:
                for layer in ("0", "2"):
                    model.get_submodule(layer).get_parameter("weight").mul_(gain)
        stack = Stack(models, trial.device)

        def loss(params: Params) -> Tensor:
            x, labels = self.draw(config.pretrain_batch // config.classes)
            return _losses(stack(params, x), labels)

        run = train(loss, stack.trainable, adam(config.pretrain_lr), steps=config.pretrain_steps)
        self.models = stack.models(run.params)
        self.old_x, self.labels = self.draw(config.test_per_class)
        self.test_x = self.old_x @ self.change.mT
        x, self.train_labels = self.draw(config.train_per_class)
        self.train_x = x @ self.change.mT

    def draw(self, per_class: int) -> tuple[Tensor, Tensor]:
        """New samples of the old task for every seed (seeds, samples, features), and their labels (seeds, samples)."""
        count = per_class * self.config.classes
        noise = torch.stack([torch.randn(count, self.config.features, generator=g) for g in self.generators])
        labels = torch.arange(self.config.classes, device=self.trial.device).repeat(len(self.generators), per_class)
        means = self.centres.gather(1, labels.unsqueeze(-1).expand(-1, -1, self.config.features))
        return means + noise.to(self.trial.device), labels

    def stack(self, name: str, rank: int, options: dict[str, Any]) -> Stack:
        """A method put into copies of the pretrained models: its layers in place of the first two weights, s = 1."""
        models: list[nn.Module] = []
        for model, generator in zip(self.models, self.trial.generators(stream=1), strict=True):
            adapted = copy.deepcopy(model)
            replace_linears(adapted, "[02]", partial(self._adapt, name, rank, options, generator))
            models.append(adapted)
        return Stack(models, self.trial.device)

    @torch.no_grad()
    def _adapt(self, name: str, rank: int, options: dict[str, Any], generator: torch.Generator, linear: nn.Linear) -> nn.Module:
        if name == "lora":
            return LoRALinear(linear, rank=rank, alpha=rank, generator=generator)
        U, values, Vh = torch.linalg.svd(linear.weight) if name in ("pissa", "xs") else (None, None, None)
        if U is None or values is None or Vh is None:
            return SLoRALinear(linear, rank=rank, alpha=rank, generator=generator, **options)
        if name == "pissa":  # the leading singular triplets, taken out of the weight
            layer = LoRALinear(linear, rank=rank, alpha=rank, generator=generator)
            root = values[:rank].sqrt()
            layer.A.copy_(root[:, None] * Vh[:rank])
            layer.B.copy_(U[:, :rank] * root)
            linear.weight -= layer.B @ layer.A
            return layer
        core = SLoRALinear(linear, rank=rank, alpha=rank, **options)
        core.A.copy_(Vh[:rank])
        core.B.copy_(U[:, :rank] * values[:rank])
        core.N.zero_()
        return core

    def run(self, stack: Stack, lr: float, steps: int, tick: Callable[[], None]) -> Trained:
        """Train on the changed inputs with the full batch."""
        return train(
            lambda params: _losses(stack(params, self.train_x), self.train_labels),
            stack.trainable,
            adam(lr),
            steps=steps,
            every=10,
            tick=tick,
        )


def run_start(config: Config, trial: Trial) -> Measurements:
    """Where each start leaves the weights and the old task."""
    task, measured = _Classes(config, trial), Measurements()
    pretrained = Stack(task.models, trial.device)
    kept = _accuracies(pretrained(pretrained.trainable, task.old_x), task.labels)
    measured.add("pretrained", kept=kept)
    cases: dict[str, tuple[int, dict[str, Any]]] = {f"block_{rank}": (rank, {"core": "block"}) for rank in config.start_ranks}
    cases[f"pinv_{config.rank}"] = (config.rank, {"core": "pinv"})
    cases |= {f"{core}_{config.rank}_corrected": (config.rank, {"core": core, "residual": True}) for core in ("block", "pinv")}
    for name, (rank, options) in cases.items():
        stack = task.stack("nlora", rank, options)
        moved, predicted = [], []
        for adapted, model in zip(stack.models({}), task.models, strict=True):
            shares = [_moved(adapted.get_submodule(layer), model.get_submodule(layer)) for layer in ("0", "2")]
            weights = [model.get_submodule(layer).get_parameter("weight").detach() for layer in ("0", "2")]
            moved.append(sum(shares) / 2)
            predicted.append(sum(rank * float(W.square().mean()) for W in weights) / 2)
        kept = _accuracies(stack(stack.trainable, task.old_x), task.labels)
        measured.add(name, kept=kept, moved=moved, predicted=predicted)
    return measured


@torch.no_grad()
def _moved(layer: nn.Module, linear: nn.Module) -> float:
    """How far a layer's weight is from the pretrained one, as a share of that."""
    assert isinstance(layer, SLoRALinear)
    layer.merge()
    W0 = linear.get_parameter("weight")
    return float((layer.base.weight - W0).norm() / W0.norm())


def run_race(config: Config, trial: Trial, *, large: bool = False) -> Measurements:
    """Every method at the learning rate of its kind; `large`: with pretrained weights that started `gain` times as large."""
    task, measured = _Classes(config, trial, config.gain if large else 1.0), Measurements()
    tick = trial.counter(len(METHODS) * config.steps)
    for name, start in METHODS.items():
        stack = task.stack(name, config.core_rank if start.core_only else config.rank, start.options)
        run = task.run(stack, config.core_lr if start.core_only else config.lr, config.steps, tick)
        at = run.losses[:, run.steps.index(config.early)]
        accuracy = _accuracies(stack(run.params, task.test_x), task.labels)
        numbers = [stack.num_trainable()] * len(trial.seeds)
        measured.add(name, parameters=numbers, first=run.losses[:, 0], early=at, loss=run.losses[:, -1], accuracy=accuracy)
        measured.add_curve(name, "loss", run.steps, run.losses)
    return measured


def run_rates(config: Config, trial: Trial) -> Measurements:
    """Methods at several learning rates; then each at the one with which its loss ends lowest, in the mean over seeds."""
    task, measured = _Classes(config, trial), Measurements()
    tick = trial.counter(len(TUNED) * len(config.rates) * config.rates_steps)
    for name in TUNED:
        tried = []
        for multiple in config.rates:
            lr = multiple / 1000
            run = task.run(task.stack(name, config.rank, METHODS[name].options), lr, config.rates_steps, tick)
            lrs = [lr] * len(trial.seeds)
            measured.add(f"{name}_x{multiple}", loss=run.losses[:, -1], lr=lrs)
            tried.append((run.losses[:, -1], lrs))
        loss, lrs = min(tried, key=lambda pair: pair[0].mean().item())
        measured.add(name, loss=loss, lr=lrs)
    return measured


PARTS = (
    Part("start", "What the start leaves of the model", run_start, baseline="pretrained"),
    Part("race", "Adapting to changed inputs", run_race, baseline="lora"),
    Part("large", "The same with larger weights", partial(run_race, large=True), baseline="lora"),
    Part("rates", "At the best learning rate", run_rates, baseline="lora"),
)


def figure(results: Results) -> Figure:
    """Six panels: the old task before training, first losses, loss curves for both sizes of weights and for N alone, best rates."""
    fig, (damage, curves, larger, first, cores, best) = plotting.make_figure(3, QUESTION, rows=2)
    metrics = results.metrics
    config: Config = convert(results.config, Config, "config")

    ranks = list(config.start_ranks)
    series = {"kept": "old task, accuracy", "moved": r"$\|W - W_0\| / \|W_0\|$", "predicted": r"rank $\times$ variance of $W_0$"}
    for i, (quantity, label) in enumerate(series.items(), start=1):
        plotting.draw_points(damage, ranks, [metrics[f"start.block_{rank}.{quantity}"] for rank in ranks], label, i)
    damage.axhline(metrics["start.pretrained.kept"].mean or 0.0, color="black", linewidth=1, label="pretrained, accuracy")
    damage.set(title="Published start, before training", xlabel="rank", ylim=(0, None), xscale="log")
    damage.set_xticks(ranks, [str(rank) for rank in ranks])
    damage.minorticks_off()
    damage.legend(fontsize=8)

    panels = ((curves, "race", False, "smaller weights"), (larger, "large", False, "larger weights"), (cores, "race", True, "N alone"))
    for ax, part, alone, what in panels:
        for i, name in enumerate(name for name, start in METHODS.items() if start.core_only == alone):
            plotting.draw_curve(ax, results.curves[f"{part}.{name}.loss"], METHODS[name].label, i)
        ax.set(title=f"{what}, r = {config.core_rank if alone else config.rank}".capitalize(), xlabel="step", ylabel="loss", yscale="log")
        ax.legend(fontsize=7)

    shown = {"lora": "pretrained, or corrected", "published": "NLoRA, published", "inttune": "IntTune, published"}
    labels = [
        f"{label.replace(', ', chr(10), 1)}, r = {config.core_rank if name == 'inttune' else config.rank}" for name, label in shown.items()
    ]
    bars = {size: [metrics[f"{part}.{name}.first"] for name in shown] for part, size in (("race", "smaller weights"), ("large", "larger"))}
    plotting.draw_bars(first, labels, bars)
    first.set(title="Loss before the first step", ylabel="loss")
    first.tick_params(axis="x", labelsize=7)
    first.legend(fontsize=8)

    plotting.draw_bars(
        best, [METHODS[name].label.replace(", ", ",\n") for name in TUNED], {"": [metrics[f"rates.{n}.loss"] for n in TUNED]}
    )
    best.set(title=f"Best learning rate, {config.rates_steps} steps", ylabel="final loss", ylim=(0, None))
    best.tick_params(axis="x", labelsize=7, labelrotation=25)
    return fig
