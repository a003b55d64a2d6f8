r"""All methods on the same two tasks, at equal rank and with equally many trained parameters, each at its own best learning rate.

`layer`: a layer tanh(W x) must move its weight by a matrix of full rank. `digits`: the hidden layers of an MLP that knows
upright digits learn them turned by 90 degrees. Every method is put into the model by its file in `methods/` and trained by
its own optimizer. Every method gets the same tuning: the same learning rates, tried with the same seeds, which are none of the
reported ones; the best is the one with the lowest mean loss on held-out samples.
"""

import contextlib
import copy
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from .. import plotting
from ..config import UsageError, convert
from ..datasets import Split, draw_uneven, load_digits
from ..experiment import Measurements, Part, Quantity, Trial
from ..methods import Method, Setup, make, names
from ..models import Digits, Shift, Stack, make_mlp
from ..records import Claim, Difference, Results, as_text
from ..training import adam, train

QUESTION = "Which method learns most, and forgets least, when all are treated alike?"
BASELINE, REFERENCE = "lora", "full"
REFERENCE_ROOM = Method.__module__.replace("toy_tasks.methods", "reference")
EQUAL_COUNT = "equal_count"
FAR = 0.1  # numbers of trained parameters that differ by no more than this share count as equal


@dataclass(frozen=True)
class Config:
    """Settings, explained where their values stand: `configs/compare.toml`."""

    rank: int
    alpha_per_rank: float
    rates: tuple[int, ...]
    tuning_seeds: int
    first_tuning_seed: int
    layer_out: int
    layer_in: int
    layer_largest: float
    layer_decay: float
    layer_smallest_std: float
    layer_train: int
    layer_test: int
    layer_steps: int
    digits_hidden: int
    digits_pretrain_lr: float
    digits_pretrain_steps: int
    digits_train: int
    digits_validation: int
    digits_test: int
    digits_steps: int

    def __post_init__(self) -> None:
        largest = min(self.layer_out, self.layer_in, 64, self.digits_hidden) // 2
        if not 1 <= self.rank <= largest:
            raise ValueError(f"rank is {self.rank}; needed 1 to {largest}, half of the smallest side, since LoRA-GA takes twice the rank")
        if list(self.rates) != sorted(set(self.rates)) or not self.rates or self.rates[0] < 1:
            raise ValueError(f"rates are {list(self.rates)}; needed one or more whole numbers from 1, in increasing order")
        if self.tuning_seeds < 1:
            raise ValueError(f"tuning_seeds is {self.tuning_seeds}; needed 1 or more")
        if (digits := self.digits_train + self.digits_validation + self.digits_test) > 1797:
            raise ValueError(f"digits_train, digits_validation and digits_test are {digits} together; there are 1797")


QUANTITIES = {
    "loss": Quantity("test loss", 0.02),
    "turned": Quantity("accuracy", 0.03),
    "forgetting": Quantity("forgetting", 0.05),
    "rank": Quantity("rank", 0.0),
    "parameters": Quantity("trained numbers", 0.0),
    "lr": Quantity("learning rate", 1e-9),
    "runs": Quantity("tuning runs", 0.0),
}
CLAIMS: tuple[Claim, ...] = ()  # no paper's: what was found is the table


class Samples(NamedTuple):
    """Inputs (n, in) and targets."""

    x: Tensor
    y: Tensor


class Problem(NamedTuple):
    """A pretrained model for each seed, on the CPU, and what it must learn."""

    models: Sequence[nn.Module]
    pattern: str  # which layers are adapted
    error: Callable[[Tensor, Tensor], Tensor]  # mean over samples, of outputs and targets
    train: Sequence[Samples]
    held_out: Sequence[Samples]
    reported: tuple[str, ...]
    measure: Callable[[int, nn.Module], tuple[float, ...]]  # these of the i-th seed's trained model


def make_layer(config: Config, trial: Trial, *, tuning: bool) -> Problem:
    """Layers tanh(W x); other seeds have other layers, so that nothing needs to be kept apart for tuning."""
    shift = Shift(
        trial,
        out_features=config.layer_out,
        in_features=config.layer_in,
        spectrum=[config.layer_largest * config.layer_decay**i for i in range(min(config.layer_out, config.layer_in))],
        draw_inputs=partial(draw_uneven, config.layer_train + config.layer_test, config.layer_in, config.layer_smallest_std),
        activation=torch.tanh,
    )
    models = [nn.Sequential(layer, nn.Tanh()) for layer in shift.layers]
    samples = list(map(Samples, shift.x, shift.y))
    held_out = [Samples(x[config.layer_train :], y[config.layer_train :]) for x, y in samples]

    def error(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs - y).square().sum(dim=1).mean()

    @torch.no_grad()
    def measure(i: int, model: nn.Module) -> tuple[float, ...]:
        x, y = held_out[i]
        start = copy.deepcopy(models[i]).to(x.device)
        return ((error(model(x), y) / error(start(x), y)).item(),)

    training = [Samples(x[: config.layer_train], y[: config.layer_train]) for x, y in samples]
    return Problem(models, "0", error, training, held_out, ("loss",), measure)


def make_digits(config: Config, trial: Trial, *, tuning: bool) -> Problem:
    """MLPs that know upright digits. `tuning` holds out other images than those that are reported."""
    pool = load_digits(config.digits_train + config.digits_validation, config.digits_test, torch.Generator().manual_seed(0))
    generators = trial.generators()
    splits = []
    for generator in generators:
        order = torch.randperm(len(pool.train_labels), generator=generator)
        rows, rest = order[: config.digits_train], order[config.digits_train :]
        held_out = (pool.train_images[rest], pool.train_labels[rest]) if tuning else (pool.test_images, pool.test_labels)
        splits.append(Split(pool.train_images[rows], pool.train_labels[rows], *held_out))
    upright, turned = Digits(splits, 0, trial.device), Digits(splits, 1, trial.device)
    fresh = Stack([make_mlp((64, config.digits_hidden, config.digits_hidden, 10), g) for g in generators], trial.device)
    pretrained = train(
        partial(upright.loss, fresh), fresh.trainable, adam(config.digits_pretrain_lr), steps=config.digits_pretrain_steps, every=1000
    )
    before = upright.accuracy(fresh, pretrained.params)

    @torch.no_grad()
    def accuracy(digits: Digits, i: int, model: nn.Module) -> float:
        return float((model(digits.test_x[i]).argmax(dim=1) == digits.test_y[i]).double().mean())

    def measure(i: int, model: nn.Module) -> tuple[float, ...]:
        return accuracy(turned, i, model), before[i].item() - accuracy(upright, i, model)

    return Problem(
        fresh.models(pretrained.params),
        "[02]",
        nn.functional.cross_entropy,
        list(map(Samples, turned.train_x, turned.train_y)),
        list(map(Samples, turned.test_x, turned.test_y)),
        ("turned", "forgetting"),
        measure,
    )


class Entrant(NamedTuple):
    """What is compared: a method with its options."""

    label: str
    method: Method


def entrants() -> dict[str, Entrant]:
    """All that is compared, by name: LoRA, full fine-tuning, then every method as its `compared` says."""
    found = {}
    for slug in sorted(names(), key=lambda slug: (slug != BASELINE, slug != REFERENCE, slug)):
        # A method without a row need not have a paper
        title = "full fine-tuning" if slug == REFERENCE else ""
        for name, options in make(slug).compared.items():
            title = title or importlib.import_module(f"{REFERENCE_ROOM}.{slug}").PAPER.name
            label = f"{title} ({name.replace('_', ' ')})" if name else title
            found["_".join(filter(None, (slug, name)))] = Entrant(label, make(slug, options))
    return found


def attach(method: Method, problem: Problem, i: int, rank: int, lr: float, config: Config, generator: torch.Generator) -> nn.Module:
    """The i-th seed's model with a method in it, on the device of its samples."""
    x, y = problem.train[i]

    def gradients(samples: int) -> dict[str, Tensor]:
        model = copy.deepcopy(problem.models[i]).requires_grad_().to(x.device)
        linears = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        found = torch.autograd.grad(problem.error(model(x[:samples]), y[:samples]), list(linears.values()))
        return {name: G.cpu() for name, G in zip(linears, found, strict=True)}

    model = copy.deepcopy(problem.models[i])
    setup = Setup(problem.pattern, rank, config.alpha_per_rank * rank, lr, gradients, generator=generator)
    method.attach(model, setup)
    return model.to(x.device)


def num_trainable(method: Method, problem: Problem, rank: int, config: Config) -> int:
    """How many numbers a method trains. Raises ValueError if it has no such rank."""
    model = attach(method, problem, 0, rank, 1.0, config, torch.Generator().manual_seed(0))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def equal_count_rank(method: Method, problem: Problem, config: Config, wanted: int) -> int:
    """The rank whose number of trained parameters is nearest to `wanted` and not more than a tenth above, else the fewest above.

    Among equals the config's rank is preferred, then the smallest.
    """
    counts = {config.rank: num_trainable(method, problem, config.rank, config)}
    if counts[config.rank] != wanted:
        for rank in range(1, min(config.layer_out, config.layer_in, 64, config.digits_hidden) + 1):
            with contextlib.suppress(ValueError):  # not every method has every rank
                counts[rank] = num_trainable(method, problem, rank, config)
    return min(counts, key=lambda rank: (counts[rank] > (1 + FAR) * wanted, abs(counts[rank] - wanted)))


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, error: Callable[[Tensor, Tensor], Tensor], samples: Samples, steps: int
) -> bool:
    """Train with all samples at once; False if the loss, or a factorisation in the optimizer, was not finite."""
    for _ in range(steps):
        loss = error(model(samples.x), samples.y)
        if not loss.isfinite():
            return False
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        try:
            optimizer.step()
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # it is documented
            return False
    return True


class _Race:
    """One task: tuning and reporting seeds, and a count of the runs."""

    def __init__(self, config: Config, trial: Trial, make_problem: Callable[..., Problem], steps: int) -> None:
        tuning_seeds = range(config.first_tuning_seed, config.first_tuning_seed + config.tuning_seeds)
        if both := set(tuning_seeds) & set(trial.seeds):
            raise UsageError(f"seeds {sorted(both)} would be tuned on and reported; needed different ones: set first_tuning_seed higher")
        self.config, self.steps, self.reporting = config, steps, trial
        self.tuning = Trial(tuning_seeds, trial.device)
        self.problems = {trial: make_problem(config, trial, tuning=trial is self.tuning) for trial in (self.tuning, self.reporting)}

    def fit(self, method: Method, rank: int, lr: float, trial: Trial) -> Iterator[nn.Module | None]:
        """The trained model of every seed of a trial, None if its loss or a factorisation in its optimizer was not finite."""
        problem = self.problems[trial]
        for i, generator in enumerate(trial.generators(stream=1)):
            model = attach(method, problem, i, rank, lr, self.config, generator)
            yield model if _train(model, method.optimizer(model, lr=lr), problem.error, problem.train[i], self.steps) else None

    def tune(self, method: Method, rank: int, tick: Callable[[], None]) -> Tensor:
        """Held-out losses (tuning seeds, rates) after training; infinite where there is none."""
        problem = self.problems[self.tuning]
        columns = []
        for multiple in self.config.rates:
            column = []
            for i, model in enumerate(self.fit(method, rank, as_lr(multiple), self.tuning)):
                with torch.no_grad():
                    column.append(math.inf if model is None else problem.error(model(problem.held_out[i].x), problem.held_out[i].y).item())
                tick()
            columns.append(column)
        return torch.tensor(columns, dtype=torch.double).T.nan_to_num(nan=math.inf, posinf=math.inf)

    def report(self, method: Method, rank: int, lr: float, tick: Callable[[], None]) -> dict[str, list[float]]:
        """What is reported of a method, one number for each reporting seed; NaN where training failed."""
        problem = self.problems[self.reporting]
        rows = []
        for i, model in enumerate(self.fit(method, rank, lr, self.reporting)):
            rows.append(problem.measure(i, model) if model else (math.nan,) * len(problem.reported))
            tick()
        return {quantity: list(column) for quantity, column in zip(problem.reported, zip(*rows, strict=True), strict=True)}


def as_lr(multiple: int) -> float:
    """A learning rate from its multiple of 0.0001."""
    return multiple / 10000


def run_race(config: Config, trial: Trial, make_problem: Callable[..., Problem], steps: int) -> Measurements:
    """Tune every method, then measure it at its best learning rate: at the config's rank, and at the rank of equal count if another."""
    race, measured = _Race(config, trial, make_problem, steps), Measurements()
    problem = race.problems[trial]
    entered: dict[str, tuple[Method, int]] = {}
    wanted = 0
    for name, (_, method) in entrants().items():
        entered[name] = (method, config.rank)
        wanted = wanted or num_trainable(method, problem, config.rank, config)  # LoRA's: it is first
        rank = equal_count_rank(method, problem, config, wanted)
        if rank != config.rank:
            entered[f"{name}_{EQUAL_COUNT}"] = (method, rank)
    runs = len(config.rates) * config.tuning_seeds
    tick = trial.counter(len(entered) * (runs + len(trial.seeds)))
    for name, (method, rank) in entered.items():
        losses = race.tune(method, rank, tick)
        best = config.rates[int(losses.mean(dim=0).argmin())]
        constants = {"rank": rank, "parameters": num_trainable(method, problem, rank, config), "lr": as_lr(best), "runs": losses.numel()}
        measured.add(name, **race.report(method, rank, as_lr(best), tick), **{key: [x] * len(trial.seeds) for key, x in constants.items()})
        measured.add_curve(name, "tuning", config.rates, losses)
    return measured


PARTS = (
    Part("layer", "A layer that must change in all directions", lambda c, t: run_race(c, t, make_layer, c.layer_steps), baseline=BASELINE),
    Part("digits", "Digits turned by 90 degrees", lambda c, t: run_race(c, t, make_digits, c.digits_steps), baseline=BASELINE),
)


# --- the table and the figure ---

# By part: its name, what is compared, that in words, and which sign of a difference is good
SHOWN = {"layer": ("Layer", "loss", "test loss, share of the start", -1), "digits": ("Digits", "turned", "accuracy on turned digits", 1)}
REGIMES = ("equal rank", "equal count")
HEADINGS = ("method", "rank", "trained", "result", "minus LoRA", "", "forgets", "lr")


class Section(NamedTuple):
    """The rows of the table for one task in one regime, as texts under `HEADINGS`."""

    title: str
    rows: list[list[str]]


def sections(results: Results) -> list[Section]:
    """The table that the comparison is about."""
    return [
        Section(f"{task}, {regime}", [_cells(results, part, regime, name, label) for name, label in find_labels(results).items()])
        for part, (task, *_) in SHOWN.items()
        for regime in REGIMES
    ]


def find_labels(results: Results) -> dict[str, str]:
    """The labels of the entrants that were measured, by name."""
    found, measured = entrants(), dict.fromkeys(name.split(".")[1].removesuffix(f"_{EQUAL_COUNT}") for name in results.metrics)
    return {name: found[name].label if name in found else name for name in measured}


def notes(results: Results) -> list[str]:
    """What the reader of the table has to know, a sentence or two each."""
    config: Config = convert(results.config, Config, "config")
    runs = {metric.values[0] for name, metric in results.metrics.items() if name.endswith(".runs")}
    edges = [name.replace("_", " ").replace(".", ": ") for name in find_edges(results)]
    return [
        *(f"{title}: the result is {result}." for title, _, result, _ in SHOWN.values()),
        f"* differs from LoRA in the number of trained parameters by more than {FAR:.0%}; under equal count no rank comes nearer.",
        "better, worse: the whole 95 % interval of the paired difference to LoRA lies on that side, and is not 0.000.",
        f"Tuning runs of every row: {' and '.join(f'{count:.0f}' for count in sorted(map(float, filter(None, runs))))}, "
        f"at the learning rates {', '.join(f'{as_lr(rate):g}' for rate in config.rates)}.",
        f"Best at the smallest or largest learning rate: {', '.join(edges) or 'none'}.",
    ]


def find_variant(results: Results, part: str, regime: str, name: str) -> str:
    """The name under which an entrant was measured in a regime."""
    other = f"{name}_{EQUAL_COUNT}"
    return other if regime != REGIMES[0] and f"{part}.{other}.rank" in results.metrics else name


def is_far(results: Results, part: str, variant: str) -> bool:
    """Whether a variant trains more or fewer numbers than LoRA by more than the share `FAR`."""
    own, wanted = (results.metrics[f"{part}.{name}.parameters"].values[0] or 0 for name in (variant, BASELINE))
    return abs(own - wanted) > FAR * wanted


def find_edges(results: Results) -> list[str]:
    """The variants whose best learning rate is the smallest or largest that was tried."""
    rates = convert(results.config, Config, "config").rates
    edges = {as_lr(rates[0]), as_lr(rates[-1])}
    return [name.removesuffix(".lr") for name, metric in results.metrics.items() if name.endswith(".lr") and metric.values[0] in edges]


def _cells(results: Results, part: str, regime: str, name: str, label: str) -> list[str]:
    """One row of the table."""
    variant = find_variant(results, part, regime, name)
    own = {quantity: results.metrics.get(f"{part}.{variant}.{quantity}") for quantity in QUANTITIES}
    lr = results.metrics[f"{part}.{variant}.lr"].values[0]
    result = own[SHOWN[part][1]]
    difference = result.difference if result else None
    return [
        label,
        "" if name == REFERENCE else as_text(own["rank"]),
        as_text(own["parameters"]) + ("*" if is_far(results, part, variant) else ""),
        as_text(result),
        as_text(difference),
        _verdict(difference, SHOWN[part][3]),
        as_text(own["forgetting"]),
        f"{lr:g}",
    ]


def _verdict(difference: Difference | None, good: int) -> str:
    """Whether the whole interval of a difference lies on one side of zero, and the difference is not zero in three digits."""
    if difference is None:
        return ""
    if difference.mean is None or difference.low is None or difference.high is None:
        return "worse"  # some seed has no finite result
    if difference.low <= 0 <= difference.high or abs(difference.mean) < 0.0005:
        return "-"
    return "better" if difference.mean * good > 0 else "worse"


def figure(results: Results) -> Figure:
    """Three panels, a line for each method: test loss of the layer, accuracy on turned digits, forgetting of upright ones."""
    labels = find_labels(results)
    panels = [(part, quantity, title) for part, (_, quantity, title, _) in SHOWN.items()]
    panels.append(("digits", "forgetting", "forgetting of upright digits"))
    fig, axes = plotting.make_figure(3, QUESTION, height=1.4 + 0.34 * len(labels))
    for ax, (part, quantity, title) in zip(axes, panels, strict=True):
        variants = {regime: [find_variant(results, part, regime, name) for name in labels] for regime in REGIMES}
        groups = {regime: [results.metrics[f"{part}.{name}.{quantity}"] for name in names] for regime, names in variants.items()}
        plotting.draw_rows(ax, list(labels.values()) if ax is axes[0] else [""] * len(labels), groups)
        for name, style in ((BASELINE, "-"), (REFERENCE, "--")):
            mean = results.metrics[f"{part}.{name}.{quantity}"].mean
            if mean is not None:
                ax.axvline(mean, color="black", linestyle=style, linewidth=0.8, zorder=0)
        ax.set(xlabel=title)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig
