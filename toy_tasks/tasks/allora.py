r"""ALLoRA: does B leave zero faster, what does eta do, and is anything left of it when every method may choose its learning rate?

A linear layer must move its weight by a matrix of rank 4 whose rows have very different sizes, from 256 noisy samples in
minibatches. `escape`: the test loss at one learning rate, gradient descent. `rates`: the test loss at many learning rates.
`law`: rows of B that leave zero with A and G fixed, against the closed form. `sgd`, `adamw`: every method at the learning rate
and the scaling or eta that were best on other seeds, all from equally many tuning runs. `ports`: what third-party code does.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ...reference import allora, lora
from .. import plotting
from ..config import convert
from ..datasets import draw_orthonormal
from ..experiment import Measurements, Part, Quantity, Trial
from ..models import Params
from ..records import Claim, Results
from ..training import Optimizer, adam, sgd

QUESTION = "Does rescaling rows of the gradient replace scaling, dropout or tuning?"

# Seeds from here on are for tuning alone
TUNING_SEEDS = 10_000


@dataclass(frozen=True)
class Config:
    """Settings, explained where their values stand: `configs/allora.toml`."""

    out_features: int
    in_features: int
    samples: int
    test_samples: int
    shift: tuple[float, ...]
    smallest_row: float
    noise: float
    batch: int
    rank: int
    steps: int
    early: int
    every: int
    dropout: float
    scalings: tuple[int, ...]
    etas: tuple[int, ...]
    escape_lr: float
    escape_etas: tuple[int, ...]
    multiples: tuple[int, ...]
    rates_unit: float
    rates: tuple[int, ...]
    tuning_seeds: int
    law_etas: tuple[int, ...]
    law_lr: float
    law_steps: int

    def __post_init__(self) -> None:
        smallest = min(self.out_features, self.in_features)
        if not 1 <= self.rank <= smallest or not 1 <= len(self.shift) <= smallest:
            raise ValueError(f"rank is {self.rank} and shift has {len(self.shift)} values; needed 1 to {smallest} each")
        if not 1 <= self.batch <= self.samples or not 0 < self.smallest_row <= 1 or not 0 <= self.dropout < 1:
            raise ValueError("needed batch from 1 to samples, smallest_row above 0 and up to 1, dropout from 0 to below 1")
        if not 0 < self.early <= self.steps or self.early % self.every or self.steps % self.every:
            raise ValueError("needed early from 1 to steps, and every to divide both")
        if len(self.scalings) != len(self.etas) or not self.scalings or self.tuning_seeds < 1:
            raise ValueError("scalings and etas need equally many values, one or more, and tuning_seeds one or more")
        if 1 not in self.scalings or not self.rates or not self.escape_etas or not self.law_etas:
            raise ValueError("scalings needs 1 among its values; rates, escape_etas and law_etas need one or more")


class Rule(NamedTuple):
    """How the gradients of A and B come about: LoRA with a number s and dropout, or ALLoRA with eta and a kind."""

    kind: str  # "lora", a kind of `allora.KINDS`, or "itself" for the rows of each parameter, computed once
    number: float  # s or eta
    p: float = 0.0


# What is tuned: every one with as many settings of its number and the same learning rates
FAMILIES = {
    "lora": "LoRA",
    "dropout": "LoRA, dropout",
    "row": "ALLoRA",
    "matrix": "kind matrix",
    "element": "kind element",
    "output": "kind output",
}
PORTS = {"plain": "ALLoRA", "gaussian": "A ~ N(0, 1/r)", "itself": "own rows, once", "lora": "LoRA, s = 1"}

QUANTITIES = {
    "early": Quantity("test loss after 30 steps", 0.5),
    "late": Quantity("test loss after 100 steps", 0.5),
    "early_of_lora": Quantity("test loss after 30 steps, share of LoRA's", 0.05),
    "late_of_lora": Quantity("test loss after 100 steps, share of LoRA's", 0.02),
    "early_of_row": Quantity("test loss after 30 steps, share of ALLoRA's", 0.05),
    "limit": Quantity("largest learning rate, log10, that ends below the start", 1e-6),
    "early_lr": Quantity("learning rate for 30 steps", 1e-9),
    "late_lr": Quantity("learning rate for 100 steps", 1e-9),
    "early_number": Quantity("s or eta for 30 steps", 1e-9),
    "late_number": Quantity("s or eta for 100 steps", 1e-9),
    "runs": Quantity("tuning runs", 0.0),
    "apart": Quantity("largest relative distance from the law", 1e-3),
    "length": Quantity("distance of a row from zero", 1e-2),
}

CLAIMS = (
    Claim(
        "allora.T1",
        "B leaves zero faster: at the same learning rate ALLoRA (eta = 8) has at most three quarters of LoRA's test loss (s = 1).",
        "escape.row_8.late_of_lora",
        "<=",
        0.75,
    ),
    Claim(
        "allora.T2",
        "It is faster than LoRA scaled by 2, too, at that learning rate.",
        "escape.row_8.late",
        "<=",
        0.0,
        baseline="escape.lora_2.late",
        expected=False,
    ),
    Claim(
        "allora.T3",
        "Dropout slows the escape: at that learning rate LoRA (s = 2) with dropout ends above LoRA without.",
        "escape.dropout_2.late",
        ">=",
        0.0,
        baseline="escape.lora_2.late",
    ),
    Claim(
        "allora.T4",
        "Rows of B that leave zero follow the closed form to 1 % (A and G fixed).",
        "law.all.apart",
        "<=",
        0.01,
    ),
    Claim(
        "allora.T5",
        "eta costs no stability: with eta = 32 the largest usable learning rate is at least LoRA's with s = 1.",
        "rates.row_32.limit",
        ">=",
        0.0,
        baseline="rates.lora_1.limit",
    ),
    Claim(
        "allora.T6",
        "Tuned on other seeds, gradient descent: ALLoRA has at most 0.95 of LoRA's test loss after 30 steps.",
        "sgd.row.early_of_lora",
        "<=",
        0.95,
        expected=False,
    ),
    Claim(
        "allora.T7",
        "The same after 100 steps.",
        "sgd.row.late_of_lora",
        "<=",
        0.95,
        expected=False,
    ),
    Claim(
        "allora.T8",
        "Tuned on other seeds, AdamW: ALLoRA has at most 0.95 of LoRA's test loss after 30 steps.",
        "adamw.row.early_of_lora",
        "<=",
        0.95,
        expected=False,
    ),
    Claim(
        "allora.T9",
        "The same after 100 steps.",
        "adamw.row.late_of_lora",
        "<=",
        0.95,
        expected=False,
    ),
    Claim(
        "allora.T10",
        "Dropout harms short trainings: tuned, gradient descent, after 100 steps LoRA with dropout has at least twice LoRA's test loss.",
        "sgd.dropout.late_of_lora",
        ">=",
        2.0,
    ),
    Claim(
        "allora.T11",
        "With AdamW at least one and a half times.",
        "adamw.dropout.late_of_lora",
        ">=",
        1.5,
    ),
    Claim(
        "allora.T12",
        "Rows are the best of the family: tuned, gradient descent, one factor for the whole matrix gives no lower loss after 30 steps.",
        "sgd.matrix.early_of_row",
        ">=",
        1.0,
        expected=False,
    ),
    Claim(
        "allora.T13",
        "Nor does one factor for each output of each sample.",
        "sgd.output.early_of_row",
        ">=",
        1.0,
        expected=False,
    ),
)


class _Problem:
    """The data of some seeds, the factors that all methods start with, and the minibatches and dropout masks of every step."""

    def __init__(self, config: Config, seeds: Sequence[int], trial: Trial) -> None:
        self.config, own = config, Trial(seeds, trial.device)
        m, n, r = config.out_features, config.in_features, len(config.shift)
        rows = torch.logspace(math.log10(config.smallest_row), 0, m)[:, None]
        parts: list[tuple[Tensor, ...]] = []
        for data, start, order in zip(own.generators(), own.generators(1), own.generators(2), strict=True):
            W0 = torch.randn(m, n, generator=data) / n**0.5
            U, V = (draw_orthonormal(side, r, data) for side in (m, n))
            W = W0 + rows * (U * torch.tensor(config.shift) @ V.T)
            x, test = (torch.randn(count, n, generator=data) for count in (config.samples, config.test_samples))
            y, test_y = (inputs @ W.T + config.noise * torch.randn(len(inputs), m, generator=data) for inputs in (x, test))
            A, B = allora.init(W0, rank=config.rank, generator=start)
            normal = allora.init(W0, rank=config.rank, distribution="gaussian", generator=start).A
            which = torch.randint(config.samples, (config.steps, config.batch), generator=order)
            kept = torch.rand(config.steps, config.batch, n, generator=order) >= config.dropout
            parts.append((W0, x, y, test, test_y, A, B, normal, which, kept))
        stacked = [torch.stack(part).to(trial.device) for part in zip(*parts, strict=True)]
        self.W0, self.x, self.y, self.test, self.test_y, self.A, self.B, self.normal, self.which, self.kept = stacked


class Losses(NamedTuple):
    """Test losses of a rule (rates, seeds, points) after `steps[i]` steps."""

    steps: list[int]
    values: Tensor

    def after(self, step: int) -> Tensor:
        """(rates, seeds); what is not a number is infinite."""
        return self.values[..., self.steps.index(step)].nan_to_num(nan=math.inf)


def train(
    problem: _Problem,
    rule: Rule,
    rates: Sequence[float],
    make: Callable[[float], Optimizer],
    tick: Callable[[], None],
    *,
    start: str = "A",
    points: Sequence[int] | None = None,
) -> Losses:
    """Train every seed with every learning rate at once; test losses after the steps `points` (default: every few)."""
    config, count = problem.config, len(rates)
    measured_at = set(points or range(0, config.steps + 1, config.every))

    def repeat(part: Tensor) -> Tensor:
        return part.repeat(count, *[1] * (part.ndim - 1))

    W0, test, test_y = repeat(problem.W0), repeat(problem.test), repeat(problem.test_y)
    lr = torch.tensor(rates, device=W0.device).repeat_interleave(len(problem.W0))[:, None, None]
    params: Params = {"A": repeat(getattr(problem, start)), "B": repeat(problem.B)}
    s = rule.number if rule.kind == "lora" else 1.0
    optimizer, gradients = make(1.0), _gradients(rule, params)
    state, steps, losses = optimizer.init_state(params), [], []
    for t in range(config.steps + 1):
        if t in measured_at:
            W = W0 + s * params["B"] @ params["A"]
            steps.append(t)
            losses.append((test @ W.mT - test_y).square().sum(dim=-1).mean(dim=-1))
        if t == config.steps:
            break
        which = problem.which[:, t, :, None]
        x, y = (repeat(torch.take_along_dim(part, which, dim=1)) for part in (problem.x, problem.y))
        kept = repeat(problem.kept[:, t]) if rule.p else None
        seen = x if kept is None else x * kept / (1 - rule.p)
        error = x @ W0.mT + s * (seen @ params["A"].mT) @ params["B"].mT - y
        grads = gradients(2 * error / config.batch, x, W0, params, kept)
        # The direction for a learning rate of 1, which each model then takes with its own
        moved, state = optimizer.step({name: torch.zeros_like(p) for name, p in params.items()}, grads, state)
        params = {name: p + lr * moved[name] for name, p in params.items()}
        tick()
    values = torch.stack(losses, dim=-1).reshape(count, len(problem.W0), -1)
    return Losses(steps, values.cpu())


def _gradients(rule: Rule, start: Params) -> Callable[[Tensor, Tensor, Tensor, Params, Tensor | None], Params]:
    """What the optimizer gets under a rule, for all models at once."""

    def of_lora(grad_y: Tensor, x: Tensor, W0: Tensor, params: Params, kept: Tensor | None) -> Params:
        given = (grad_y, x, W0, params["A"], params["B"])
        if kept is None:
            found = torch.vmap(partial(lora.backward, scaling=rule.number))(*given)
        else:
            found = torch.vmap(lambda grad_y, x, W0, A, B, mask: lora.backward(grad_y, x, W0, A, B, rule.number, mask=mask, p=rule.p))(
                *given, kept
            )
        return {"A": found.grad_A, "B": found.grad_B}

    def of_allora(grad_y: Tensor, x: Tensor, W0: Tensor, params: Params, kept: Tensor | None) -> Params:
        found = torch.vmap(partial(allora.backward, eta=rule.number, kind=rule.kind))(grad_y, x, W0, params["A"], params["B"])
        return {"A": found.grad_A, "B": found.grad_B}

    # The Automagic optimizers: the rows of each parameter itself, at the start, for ever
    once = {name: (p.norm(dim=-1, keepdim=True) + rule.number**-2).rsqrt() for name, p in start.items()}

    def of_itself(grad_y: Tensor, x: Tensor, W0: Tensor, params: Params, kept: Tensor | None) -> Params:
        found = torch.vmap(partial(lora.backward, scaling=1.0))(grad_y, x, W0, params["A"], params["B"])
        return {"A": once["A"] * found.grad_A, "B": once["B"] * found.grad_B}

    return {"lora": of_lora, "itself": of_itself}.get(rule.kind, of_allora)


def _add(measured: Measurements, name: str, losses: Losses, config: Config, base: Losses) -> None:
    """Record one learning rate's losses, also as shares of LoRA's."""
    early, late = (losses.after(step)[0] for step in (config.early, config.steps))
    of = [losses.after(step)[0] / base.after(step)[0] for step in (config.early, config.steps)]
    measured.add(name, early=early, late=late, early_of_lora=of[0], late_of_lora=of[1])
    measured.add_curve(name, "loss", losses.steps, losses.values[0])


def run_escape(config: Config, trial: Trial) -> Measurements:
    """Several rules at one learning rate, and LoRA at multiples of it."""
    problem, measured, lr = _Problem(config, trial.seeds, trial), Measurements(), config.escape_lr
    rules = {f"lora_{s}": (Rule("lora", s), lr) for s in config.scalings}
    rules |= {f"lora_1_x{k}": (Rule("lora", 1), k * lr) for k in config.multiples}
    rules |= {f"dropout_{s}": (Rule("lora", s, config.dropout), lr) for s in config.scalings if s == 2}
    rules |= {f"row_{eta}": (Rule("row", eta), lr) for eta in config.escape_etas}
    tick = trial.counter(len(rules) * config.steps)
    found = {name: train(problem, rule, [rate], sgd, tick) for name, (rule, rate) in rules.items()}
    for name, losses in found.items():
        _add(measured, name, losses, config, found["lora_1"])
    return measured


def run_rates(config: Config, trial: Trial) -> Measurements:
    """The test loss at every learning rate, for every scaling and eta; not used for tuning."""
    problem, measured = _Problem(config, trial.seeds, trial), Measurements()
    rates = [multiple * config.rates_unit for multiple in config.rates]
    rules = [Rule("lora", s) for s in config.scalings] + [Rule("row", eta) for eta in config.etas]
    tick = trial.counter(len(rules) * config.steps)
    for rule in rules:
        losses, name = train(problem, rule, rates, sgd, tick, points=(0, config.steps)), f"{rule.kind}_{rule.number:g}"
        for i, multiple in enumerate(config.rates):
            measured.add(f"{name}_x{multiple}", late=losses.after(config.steps)[i])
        usable = losses.after(config.steps) < losses.values[..., 0]
        measured.add(name, limit=(usable * torch.tensor(rates)[:, None]).amax(dim=0).log10())
    return measured


def run_law(config: Config, trial: Trial) -> Measurements:
    """Gradient descent on B from zero with A and one gradient held fixed: how far a row is, and how far from the law."""
    problem, measured = _Problem(config, trial.seeds, trial), Measurements()
    tick, worst = trial.counter(len(config.law_etas) * config.law_steps), []
    A, G = problem.A.double(), 2 * ((problem.x @ problem.W0.mT - problem.y).mT @ problem.x).double() / config.samples
    true = G @ A.mT
    growth, first = (true @ A).norm(dim=-1), true.norm(dim=-1)
    # The row that grows fastest, in units of its own gradient: c = 1 for all seeds
    row = growth.argmax(dim=1)
    G = torch.take_along_dim(G, row[:, None, None], dim=1) / growth.amax(dim=1)[:, None, None]
    true = G @ A.mT
    first = true.norm(dim=-1)[:, 0]
    step = torch.vmap(lambda G, A, B, eta: allora.gradients(G, A, B, eta).grad_B, in_dims=(0, 0, 0, None))
    times = torch.arange(config.law_steps + 1, dtype=torch.float64) * config.law_lr
    shown = range(0, config.law_steps + 1, max(1, config.law_steps // 40))
    for eta in config.law_etas:
        B, beta = torch.zeros_like(true), []
        for _ in times:
            beta.append(B.norm(dim=-1)[:, 0] / first)
            B = B - config.law_lr * step(G, A, B, float(eta))
            tick()
        measured_beta, law = torch.stack(beta, dim=1), allora.escape(times, 1.0, float(eta))
        # Relative to the law's own size at the end: the first steps are a few steps long
        worst.append(((measured_beta - law).abs().amax(dim=1)) / law[-1])
        measured.add(f"eta_{eta}", apart=worst[-1], length=measured_beta[:, -1])
        measured.add_curve(f"eta_{eta}", "beta", shown, measured_beta[:, list(shown)])
        measured.add_curve(f"law_{eta}", "beta", shown, law[list(shown)].expand(len(trial.seeds), -1))
    measured.add("all", apart=torch.stack(worst).amax(dim=0))
    return measured


def run_tuned(make: Callable[[float], Optimizer], config: Config, trial: Trial) -> Measurements:
    """Each family at what was best on the tuning seeds, for each horizon; the numbers are those of the other seeds."""
    tuning = _Problem(config, [TUNING_SEEDS + i for i in range(config.tuning_seeds)], trial)
    problem, measured = _Problem(config, trial.seeds, trial), Measurements()
    rates = [multiple * config.rates_unit for multiple in config.rates]
    tick = trial.counter(len(FAMILIES) * (len(config.etas) + 2) * config.steps)
    final: dict[str, dict[str, Tensor]] = {}
    for family in FAMILIES:
        of_lora = family in ("lora", "dropout")
        numbers = config.scalings if of_lora else config.etas
        rules = [Rule("lora" if of_lora else family, number, config.dropout if family == "dropout" else 0.0) for number in numbers]
        tried = [train(tuning, rule, rates, make, tick, points=(config.early, config.steps)) for rule in rules]
        final[family] = {}
        for horizon, step in (("early", config.early), ("late", config.steps)):
            scores = torch.stack([losses.after(step).mean(dim=1) for losses in tried])
            i, j = divmod(int(scores.argmin()), len(rates))
            losses = train(problem, rules[i], [rates[j]], make, tick, points=(step,))
            final[family][horizon] = losses.after(step)[0]
            count = len(trial.seeds)
            chosen = {f"{horizon}_lr": [rates[j]] * count, f"{horizon}_number": [rules[i].number] * count}
            measured.add(family, **{horizon: final[family][horizon]}, **chosen)
        measured.add(family, runs=[len(rules) * len(rates) * config.tuning_seeds] * len(trial.seeds))
    for family, found in final.items():
        shares = {f"{horizon}_of_lora": loss / final["lora"][horizon] for horizon, loss in found.items()}
        measured.add(family, early_of_row=found["early"] / final["row"]["early"], **shares)
    return measured


def run_ports(config: Config, trial: Trial) -> Measurements:
    """What third-party code does, at the learning rate of the escape and the same eta."""
    problem, measured, lr = _Problem(config, trial.seeds, trial), Measurements(), [config.escape_lr]
    eta = config.escape_etas[min(1, len(config.escape_etas) - 1)]
    tick = trial.counter(len(PORTS) * config.steps)
    found = {
        "plain": train(problem, Rule("row", eta), lr, sgd, tick),
        "gaussian": train(problem, Rule("row", eta), lr, sgd, tick, start="normal"),
        "itself": train(problem, Rule("itself", eta), lr, sgd, tick),
        "lora": train(problem, Rule("lora", 1), lr, sgd, tick),
    }
    for name, losses in found.items():
        _add(measured, name, losses, config, found["lora"])
    return measured


PARTS = (
    Part("escape", "One learning rate, gradient descent", run_escape, baseline="lora_1"),
    Part("rates", "Gradient descent at many learning rates", run_rates, baseline="lora_1"),
    Part("law", "Leaving zero, against the closed form", run_law, baseline=None),
    Part("sgd", "Tuned on other seeds, gradient descent", partial(run_tuned, sgd), baseline="lora"),
    Part("adamw", "Tuned on other seeds, AdamW", partial(run_tuned, adam), baseline="lora"),
    Part("ports", "What third-party code does", run_ports, baseline="plain"),
)


def figure(results: Results) -> Figure:
    """Six panels: the escape at one rate, losses at many rates, the law; both optimizers tuned; third-party code."""
    fig, (escape, rates, law, tuned_sgd, tuned_adamw, ports) = plotting.make_figure(3, QUESTION, rows=2)
    config: Config = convert(results.config, Config, "config")
    shown = {"lora_1": "LoRA, s = 1", "lora_2": "LoRA, s = 2", "dropout_2": f"LoRA, s = 2, dropout {config.dropout:g}"}
    shown |= {f"row_{eta}": f"ALLoRA, eta = {eta}" for eta in config.escape_etas[:3]}
    for i, (name, label) in enumerate(shown.items()):
        if f"escape.{name}.loss" in results.curves:
            plotting.draw_curve(escape, results.curves[f"escape.{name}.loss"], label, i)
    escape.set(title=f"Gradient descent, rate {config.escape_lr:g}", xlabel="step", ylabel="test loss", yscale="log")
    _draw_rates(rates, results, config)
    for i, eta in enumerate(config.law_etas):
        curve, exact = (results.curves[f"law.{kind}_{eta}.beta"] for kind in ("eta", "law"))
        line, (points, exact_points) = plotting.line_style(i), (np.array(one.values[0], dtype=float) for one in (curve, exact))
        law.plot([k * config.law_lr for k in exact.steps], exact_points, label=f"law, eta = {eta}", **(line | {"marker": ""}))
        at = slice(None, None, 5)
        law.plot([k * config.law_lr for k in curve.steps][at], points[at], **(line | {"linestyle": ""}))
    end = config.law_steps * config.law_lr
    law.plot([0, end], [0, end], color="grey", linewidth=1, label="LoRA, s = 1")
    law.set(title="A row leaves zero (points: measured)", xlabel="time", ylabel="distance in units of its gradient")
    for ax, part, title in ((tuned_sgd, "sgd", "Gradient descent"), (tuned_adamw, "adamw", "AdamW")):
        series = {
            f"{step} steps": [results.metrics[f"{part}.{family}.{horizon}"] for family in FAMILIES]
            for horizon, step in (("early", config.early), ("late", config.steps))
        }
        plotting.draw_bars(ax, [label.replace(", ", ",\n").replace("kind ", "kind\n") for label in FAMILIES.values()], series)
        ax.set(title=f"{title}, tuned on other seeds", ylabel="test loss", yscale="log", ylim=(0.2, 20))
        ax.set_yticks([0.3, 1, 3, 10], ["0.3", "1", "3", "10"])
        ax.minorticks_off()
        ax.tick_params(axis="x", labelsize=7.5)
        ax.legend(fontsize=8, ncols=2, loc="upper right")
    for i, (name, label) in enumerate(PORTS.items()):
        plotting.draw_curve(ports, results.curves[f"ports.{name}.loss"], label, i)
    ports.set(title="What third-party code does", xlabel="step", ylabel="test loss", yscale="log")
    for ax in (escape, law, ports):
        ax.legend(fontsize=7.5)
    return fig


def _draw_rates(ax: Axes, results: Results, config: Config) -> None:
    """The loss after all steps against the learning rate; what diverged leaves the panel."""
    lrs = [multiple * config.rates_unit for multiple in config.rates]
    names = {f"lora_{s}": f"LoRA, s = {s}" for s in config.scalings} | {f"row_{eta}": f"ALLoRA, eta = {eta}" for eta in config.etas}
    for i, (name, label) in enumerate(names.items()):
        plotting.draw_points(ax, lrs, [results.metrics[f"rates.{name}_x{multiple}.late"] for multiple in config.rates], label, i)
    ax.set(title=f"After {config.steps} steps of gradient descent", xlabel="learning rate", ylabel="test loss", xscale="log", yscale="log")
    ax.set_ylim(0.2, 200)
    ax.legend(fontsize=7.5)
