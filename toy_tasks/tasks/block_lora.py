r"""Block-LoRA: is it a smaller LoRA with a larger learning rate, what does it cost in accuracy, and does its gap shrink with its bound?

A toy CLIP: an image tower W2 relu(W1 x) is trained until the cosine of its output with fixed text prototypes names the class,
then frozen. A target domain moves the inputs; adapters on both weights see a few samples of each class there. `training`: how
far Block-LoRA and the smaller LoRA are apart along a whole training, with four optimizers. `fewshot`: accuracy, gap and counts.
`rates`: the same layer, trained as Block-LoRA and as LoRA, at several learning rates.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from ...reference import block_lora
from ...reference.lora import LoRALinear
from .. import plotting
from ..config import convert
from ..experiment import Measurements, Part, Quantity, Trial
from ..models import Params, Stack, make_linear
from ..records import Claim, Results
from ..training import Optimizer, State, adam, train

QUESTION = "Is Block-LoRA a smaller LoRA with a larger learning rate?"
TEMPERATURE = 10.0  # what multiplies the cosine


@dataclass(frozen=True)
class Config:
    """Settings, explained where their values stand: `configs/block_lora.toml`."""

    features: int
    hidden: int
    embedding: int
    classes: int
    noise: float
    shift: float
    source_samples: int
    shots: int
    test_samples: int
    pretrain_steps: int
    pretrain_lr: float
    rank: int
    blocks: tuple[int, ...]
    lora_ranks: tuple[int, ...]
    cut: int
    lr: float
    steps: int
    training_rank: int
    training_blocks: tuple[int, ...]
    training_steps: int
    sgd_lr: float
    weight_decay: float
    rates: tuple[int, ...]

    def __post_init__(self) -> None:
        smallest = min(self.features, self.hidden, self.embedding)
        for rank in (self.rank, self.training_rank, *self.lora_ranks):
            if not 1 <= rank <= smallest:
                raise ValueError(f"rank is {rank}; needed 1 to {smallest}, the smallest side of a layer")
        sides = (self.rank, self.features, self.hidden, self.embedding)
        for blocks in self.blocks:
            if blocks < 1 or any(side % blocks for side in sides):
                raise ValueError(f"blocks is {blocks}; needed a divisor of rank, features, hidden and embedding, {sides}")
        if not self.training_blocks or any(b < 1 or self.training_rank % b for b in self.training_blocks):
            raise ValueError(f"training_blocks is {self.training_blocks}; needed divisors of training_rank, {self.training_rank}")
        if self.cut not in self.blocks or not self.rates or self.rank not in self.lora_ranks:
            raise ValueError("blocks needs cut among its values, lora_ranks needs rank among its, rates one value or more")
        if self.rank // self.cut not in self.lora_ranks:
            raise ValueError(f"lora_ranks needs {self.rank // self.cut}, the rank of one block, among its values")
        if min(self.shots, self.test_samples, self.source_samples, self.classes - 1) < 1:
            raise ValueError("shots, test_samples and source_samples need to be at least 1, classes at least 2")


OPTIMIZERS = {"sgd": "SGD", "momentum": "momentum", "adam": "Adam", "adamw": "AdamW"}

QUANTITIES = {
    "accuracy": Quantity("accuracy on the target, %", 1.5),
    "source": Quantity("accuracy on the source, %", 2.0),
    "gap": Quantity("training minus test accuracy, points", 1.5),
    "gap_share": Quantity("gap, as a multiple of LoRA's", 0.15),
    "loss_gap": Quantity("test minus training loss", 0.15),
    "parameters": Quantity("stored parameters", 0.0),
    "multiplications": Quantity("multiplications a row", 0.0),
    "apart": Quantity("largest |Delta W - LoRA's| / |Delta W|", 1e-8),
    "unequal": Quantity("at the end, with one learning rate for both", 0.3),
    "lr": Quantity("learning rate", 1e-9),
}

_EQUAL = "With {}, Block-LoRA is LoRA of rank r / b with b times the learning rate of B: at every step Delta W is the same."
CLAIMS = (
    *(
        Claim(f"block_lora.T{i}", _EQUAL.format(name), f"training.{key}.apart", "<=", 1e-9)
        for i, (key, name) in enumerate(OPTIMIZERS.items(), start=1)
    ),
    Claim(
        "block_lora.T5",
        "The same with AdamW where the blocks start different and not zero.",
        "training.any_start.apart",
        "<=",
        1e-9,
    ),
    Claim(
        "block_lora.T6",
        "The learning rate is what it takes: with Block-LoRA's own for both factors LoRA of rank r / b ends elsewhere, by 5 % or more.",
        "training.adam.unequal",
        ">=",
        0.05,
    ),
    Claim(
        "block_lora.T7",
        "With a quarter fewer stored parameters (r = 8, b = 2) Block-LoRA is at most 2 points less accurate than LoRA.",
        "fewshot.block_2.accuracy",
        ">=",
        -2.0,
        baseline="fewshot.lora_8.accuracy",
    ),
    Claim(
        "block_lora.T8",
        "With eight arms (r = 8, b = 8) it is at most 2 points less accurate too.",
        "fewshot.block_8.accuracy",
        ">=",
        -2.0,
        baseline="fewshot.lora_8.accuracy",
        expected=False,
    ),
    Claim(
        "block_lora.T9",
        "It is more accurate than plain LoRA with fewer stored parameters (r = 8, b = 4, against LoRA of rank 4).",
        "fewshot.block_4.accuracy",
        ">=",
        0.0,
        baseline="fewshot.lora_4.accuracy",
        expected=False,
    ),
    Claim(
        "block_lora.T10",
        "The bound is smaller, and so is the measured gap between training and test accuracy (b = 4).",
        "fewshot.block_4.gap",
        "<=",
        0.0,
        baseline="fewshot.lora_8.gap",
        expected=False,
    ),
    Claim(
        "block_lora.T11",
        "Each at its best learning rate, Block-LoRA (r = 8, b = 4) is more accurate than LoRA of rank 2, by half a point or more.",
        "rates.block.accuracy",
        ">=",
        0.5,
        baseline="rates.lora.accuracy",
        expected=False,
    ),
    Claim(
        "block_lora.T12",
        "Cut along the features, with as many stored parameters, it is at least as accurate (b = 4).",
        "fewshot.features_4.accuracy",
        ">=",
        0.0,
        baseline="fewshot.block_4.accuracy",
        expected=False,
    ),
)


class Tower(nn.Module):
    """Logits of an image tower: the cosines of W2 relu(W1 x) with the prototypes of the classes."""

    prototypes: Tensor

    def __init__(self, lower: nn.Module, upper: nn.Module, prototypes: Tensor) -> None:
        super().__init__()
        self.lower, self.upper = lower, upper
        self.register_buffer("prototypes", prototypes)

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.normalize(self.upper(torch.relu(self.lower(x))), dim=-1)
        return TEMPERATURE * out @ nn.functional.normalize(self.prototypes, dim=-1).mT


class FeaturesLinear(nn.Module):
    """A frozen linear layer with the update of the other reading: blocks along the features, of the nominal rank."""

    def __init__(self, base: nn.Linear, *, rank: int, blocks: int, generator: torch.Generator) -> None:
        super().__init__()
        out_features, in_features = base.weight.shape
        bound = in_features**-0.5
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(rank, in_features // blocks).uniform_(-bound, bound, generator=generator))
        self.B = nn.Parameter(torch.zeros(blocks, out_features // blocks, rank))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.base.weight + block_lora.delta_weight_features(self.A, self.B, 1.0))


Make = Callable[[nn.Linear, torch.Generator], nn.Module]


class _Clip:
    """The pretrained towers of all seeds, and their data: x (seeds, samples, features), labels y (seeds, samples)."""

    def __init__(self, config: Config, trial: Trial) -> None:
        self.config, self.trial = config, trial
        towers: list[nn.Module] = []
        drawn = []
        for generator in trial.generators():
            sizes = (config.features, config.hidden), (config.hidden, config.embedding)
            lower, upper = (make_linear(a, b, generator, bias=False) for a, b in sizes)
            towers.append(Tower(lower, upper, torch.randn(config.classes, config.embedding, generator=generator)))
            means = torch.randn(config.classes, config.features, generator=generator)
            P, Q = torch.randn(config.features, 2, generator=generator), torch.randn(2, config.features, generator=generator)
            move = torch.eye(config.features) + config.shift / config.features * P @ Q
            counts = (config.source_samples, config.shots, *[config.test_samples] * 3)
            sets = [self._draw(means, count, generator) for count in counts]
            drawn.append([x if i in (0, 3) else x @ move.mT for i, x in enumerate(sets)])
        stacked = (torch.stack(part).to(trial.device) for part in zip(*drawn, strict=True))
        self.source, self.x, self.test, self.source_test, self.held_back = stacked  # held_back: to choose settings on
        self.towers = self._pretrain(towers)

    def _draw(self, means: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """`count` samples of every class, class by class."""
        x = means.repeat_interleave(count, dim=0)
        return x + self.config.noise * torch.randn(x.shape, generator=generator)

    def _pretrain(self, towers: list[nn.Module]) -> list[nn.Module]:
        stack = Stack(towers, self.trial.device)
        optimizer = adam(self.config.pretrain_lr)
        run = train(partial(self.loss, stack, self.source), stack.trainable, optimizer, steps=self.config.pretrain_steps, every=1000)
        return stack.models(run.params)

    def labels(self, x: Tensor) -> Tensor:
        """The labels of samples that `_draw` made."""
        classes = torch.arange(self.config.classes, device=x.device)
        return classes.repeat_interleave(x.shape[1] // self.config.classes)

    def loss(self, stack: Stack, x: Tensor, params: Params) -> Tensor:
        """Cross entropy (seeds,)."""
        logits = stack(params, x)
        y = self.labels(x).expand(logits.shape[:2])
        return nn.functional.cross_entropy(logits.mT, y, reduction="none").mean(dim=1)

    def accuracy(self, stack: Stack, x: Tensor, params: Params) -> Tensor:
        """Share of the samples whose class is named, in % (seeds,)."""
        with torch.no_grad():
            return 100 * (stack(params, x).argmax(dim=-1) == self.labels(x)).double().mean(dim=1)

    def adapted(self, make: Make, dtype: torch.dtype = torch.float32, copies: int = 1) -> Stack:
        """The towers with both weights adapted, `copies` times: all seeds, then all again, with the same draws.

        The same seed draws the same numbers for every method of the same shapes.
        """
        models: list[nn.Module] = []
        for tower, generator in (pair for _ in range(copies) for pair in zip(self.towers, self.trial.generators(stream=1), strict=True)):
            assert isinstance(tower, Tower)
            new = copy.deepcopy(tower).requires_grad_(False)
            assert isinstance(new.lower, nn.Linear)
            assert isinstance(new.upper, nn.Linear)
            new.lower, new.upper = make(new.lower, generator), make(new.upper, generator)
            models.append(new.to(dtype))
        return Stack(models, self.trial.device)


@functools.lru_cache(maxsize=1)
def _clip(config: Config, seeds: tuple[int, ...], device: torch.device) -> _Clip:
    """The pretrained towers, which all parts of a run share."""
    return _Clip(config, Trial(seeds, device))


def lora(rank: int) -> Make:
    """LoRA with s = 1."""
    return lambda linear, generator: LoRALinear(linear, rank=rank, alpha=rank, generator=generator)


def blocked(rank: int, blocks: int, scaling: float = 1.0) -> Make:
    """Block-LoRA."""

    def make(linear: nn.Linear, generator: torch.Generator) -> nn.Module:
        return block_lora.BlockLoRALinear(linear, rank=rank, blocks=blocks, alpha=rank * scaling, generator=generator)

    return make


def along_features(rank: int, blocks: int) -> Make:
    """The other reading of the paper."""
    return lambda linear, generator: FeaturesLinear(linear, rank=rank, blocks=blocks, generator=generator)


# Optimizers with settings for each factor

Maker = Callable[[float, float], Optimizer]


def momentum(lr: float, weight_decay: float, *, beta: float = 0.9) -> Optimizer:
    """Gradient descent with momentum as torch has it; without, for a beta of zero."""

    def step(params: Params, grads: Params, state: State) -> tuple[Params, State]:
        state = {k: beta * state[k] + grads[k] + weight_decay * p for k, p in params.items()}
        return {k: p - lr * state[k] for k, p in params.items()}, state

    return Optimizer(lambda params: {k: torch.zeros_like(p) for k, p in params.items()}, step)


def per_factor(make: Maker, settings: block_lora.Settings) -> Optimizer:
    """An optimizer that steps the A of all layers with one learning rate and decay, and the B with others."""
    if (settings.lr_A, settings.weight_decay_A) == (settings.lr_B, settings.weight_decay_B):
        return make(settings.lr_A, settings.weight_decay_A)
    parts = {"A": make(settings.lr_A, settings.weight_decay_A), "B": make(settings.lr_B, settings.weight_decay_B)}

    def own(tensors: Params, factor: str) -> Params:
        return {name: tensor for name, tensor in tensors.items() if name.endswith(f".{factor}")}

    def step(params: Params, grads: Params, state: State) -> tuple[Params, State]:
        found: Params = {}
        after: State = {}
        for factor, part in parts.items():
            moved, after[factor] = part.step(own(params, factor), own(grads, factor), state[factor])
            found |= moved
        return {name: found[name] for name in params}, after

    return Optimizer(lambda params: {factor: part.init_state(own(params, factor)) for factor, part in parts.items()}, step)


def makers(config: Config) -> dict[str, tuple[Maker, float, float]]:
    """The optimizers that are compared: how one is made from a rate and a decay, and with which rate and decay."""
    return {
        "sgd": (partial(momentum, beta=0.0), config.sgd_lr, 0.0),
        "momentum": (momentum, config.sgd_lr / 5, 0.0),
        "adam": (_adam, config.lr, 0.0),
        "adamw": (_adam, config.lr, config.weight_decay),
    }


def _adam(lr: float, weight_decay: float) -> Optimizer:
    return adam(lr, weight_decay=weight_decay)


# Parts


def walk(loss: Callable[[Params], Tensor], params: Params, optimizer: Optimizer, steps: int) -> Iterator[Params]:
    """The parameters after every step of a training."""
    state = optimizer.init_state(params)
    for _ in range(steps):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
        grads = dict(zip(leaves, torch.autograd.grad(loss(leaves).sum(), list(leaves.values())), strict=True))
        with torch.no_grad():
            params, state = optimizer.step(leaves, grads, state)
        yield params


def updates(params: Params) -> Tensor:
    """The updates of both layers as one vector (seeds, entries); B has an axis of blocks or none."""
    found = []
    for layer in ("lower", "upper"):
        A, B = params[f"{layer}.A"], params[f"{layer}.B"]
        found.append(((B.sum(dim=1) if B.ndim == 4 else B) @ A).flatten(1))
    return torch.cat(found, dim=1)


def compare(clip: _Clip, key: str, blocks: int, tick: Callable[[], None], *, any_start: bool = False, compact: bool = True) -> Tensor:
    """How far Block-LoRA and LoRA of rank r / b are apart after every step (seeds, steps), as a share of Delta W.

    LoRA starts at the same A and the sum of the blocks, and has the compact settings, or Block-LoRA's own (`compact=False`).
    """
    config = clip.config
    make, lr, decay = makers(config)[key]
    big, small = (clip.adapted(m, torch.float64) for m in (blocked(config.training_rank, blocks), lora(config.training_rank // blocks)))
    start = dict(big.trainable)
    if any_start:
        generator = torch.Generator().manual_seed(0)
        start |= {k: (0.05 * torch.randn(p.shape, generator=generator).to(p)) for k, p in start.items() if k.endswith(".B")}
    same = {k: p.sum(dim=1) if k.endswith(".B") else p for k, p in start.items()}
    plain = block_lora.Settings(lr, lr, decay, decay)
    settings = block_lora.compact_settings(lr, blocks=blocks, weight_decay=decay) if compact else plain
    x, found = clip.x.double(), []
    paths = [
        walk(partial(clip.loss, stack, x), at, per_factor(make, own), config.training_steps)
        for stack, at, own in ((big, start, plain), (small, same, settings))
    ]
    for one, other in zip(*paths, strict=True):
        want = updates(one)
        found.append((updates(other) - want).norm(dim=1) / want.norm(dim=1))
        tick()
    return torch.stack(found, dim=1)


def run_training(config: Config, trial: Trial) -> Measurements:
    """The distance between Block-LoRA and the smaller LoRA along a training, in double precision: the worst over the blocks."""
    clip, measured = _clip(config, trial.seeds, trial.device), Measurements()
    tick = trial.counter((len(OPTIMIZERS) + 2) * len(config.training_blocks) * config.training_steps)
    every = max(1, config.training_steps // 50)
    steps = list(range(1, config.training_steps + 1))[::every]
    for key in (*OPTIMIZERS, "any_start"):
        kind = "adamw" if key == "any_start" else key
        found = {b: compare(clip, kind, b, tick, any_start=key == "any_start") for b in config.training_blocks}
        measured.add(key, apart=torch.stack([curve.amax(dim=1) for curve in found.values()]).amax(dim=0))
        measured.add_curve(key, "apart", steps, found[config.training_blocks[0]][:, ::every])
    found = {b: compare(clip, "adam", b, tick, compact=False) for b in config.training_blocks}
    measured.add("adam", unequal=torch.stack([curve[:, -1] for curve in found.values()]).amin(dim=0))
    measured.add_curve("adam", "unequal", steps, found[config.training_blocks[0]][:, ::every])
    return measured


def work(config: Config, rank: int, blocks: int) -> int:
    """Multiplications of both adapters for one row, the blocks added first."""
    weights = torch.empty(config.hidden, config.features), torch.empty(config.embedding, config.hidden)
    return sum(block_lora.mult_adds(W0, rank=rank, blocks=blocks, tokens=1).multiplications for W0 in weights)


def variants(config: Config) -> dict[str, tuple[Make, block_lora.Settings, int]]:
    """What is compared, by name: the layer, its learning rates, its multiplications for a row."""
    plain = block_lora.Settings(config.lr, config.lr, 0.0, 0.0)
    found = {f"lora_{rank}": (lora(rank), plain, work(config, rank, 1)) for rank in config.lora_ranks}
    for b in config.blocks:
        short, cost = config.rank // b, work(config, config.rank, b)
        found[f"block_{b}"] = blocked(config.rank, b), plain, cost
        if b == config.cut:
            found[f"same_{b}"] = lora(short), block_lora.compact_settings(config.lr, blocks=b), work(config, short, 1)
        # The shared A meets the sum of the pieces, then every block of outputs has a product
        rows = config.rank * ((config.features + config.hidden) // b + config.hidden + config.embedding)
        found[f"features_{b}"] = along_features(config.rank, b), plain, rows
    for name, options in (("root", {"rslora": True}), ("per_block", {"per_block": True})):
        scaling = block_lora.scaling_factor(config.rank, config.rank, blocks=config.cut, **options)
        found[name] = blocked(config.rank, config.cut, scaling), plain, work(config, config.rank, config.cut)
    return found


def run_fewshot(config: Config, trial: Trial) -> Measurements:
    """Every method on the few samples of the target domain, with Adam at one learning rate."""
    clip, measured = _clip(config, trial.seeds, trial.device), Measurements()
    zero_shot = Stack(clip.towers, trial.device)
    for name, x in (("accuracy", clip.test), ("source", clip.source_test)):
        measured.add("zero_shot", **{name: clip.accuracy(zero_shot, x, zero_shot.trainable)})
    measured.add("zero_shot", parameters=[0] * len(trial.seeds), multiplications=[0] * len(trial.seeds))
    methods = variants(config)
    tick = trial.counter(len(methods) * config.steps)
    gaps: dict[str, Tensor] = {}
    for name, (make, settings, cost) in methods.items():
        stack = clip.adapted(make)
        run = train(
            partial(clip.loss, stack, clip.x), stack.trainable, per_factor(_adam, settings), steps=config.steps, every=1000, tick=tick
        )
        accuracy, source = (clip.accuracy(stack, x, run.params) for x in (clip.test, clip.source_test))
        gaps[name] = clip.accuracy(stack, clip.x, run.params) - accuracy
        with torch.no_grad():
            loss_gap = clip.loss(stack, clip.test, run.params) - clip.loss(stack, clip.x, run.params)
        counts = {"parameters": [stack.num_trainable()] * len(trial.seeds), "multiplications": [cost] * len(trial.seeds)}
        measured.add(name, accuracy=accuracy, source=source, gap=gaps[name], loss_gap=loss_gap, **counts)
    for b in config.blocks:
        measured.add(f"block_{b}", gap_share=gaps[f"block_{b}"] / gaps[f"lora_{config.rank}"])
    return measured


def adam_of_each(rates: Tensor) -> Optimizer:
    """Adam with a learning rate for each of the stacked models."""
    unit = adam(1.0)

    def step(params: Params, grads: Params, state: State) -> tuple[Params, State]:
        # From zero, a step at rate 1 is the direction itself: Adam's does not depend on the parameters
        moves, state = unit.step({k: torch.zeros_like(p) for k, p in params.items()}, grads, state)
        return {k: p + rates.view(-1, *[1] * (p.ndim - 1)) * moves[k] for k, p in params.items()}, state

    return Optimizer(unit.init_state, step)


def run_rates(config: Config, trial: Trial) -> Measurements:
    """The layer of rank r / b, trained as Block-LoRA and as LoRA, and LoRA of rank r, at several learning rates and at the best.

    The best rate is that of the highest accuracy on samples held back; what is reported is the accuracy on the test samples.
    """
    clip, measured = _clip(config, trial.seeds, trial.device), Measurements()
    raced = {"block": blocked(config.rank, config.cut), "lora": lora(config.rank // config.cut), "large": lora(config.rank)}
    tick = trial.counter(len(raced) * config.steps)
    copies, seeds = len(config.rates), len(trial.seeds)
    x, test, held_back = (data.repeat(copies, 1, 1) for data in (clip.x, clip.test, clip.held_back))
    rates = torch.tensor([multiple / 1000 for multiple in config.rates], device=trial.device).repeat_interleave(seeds)
    for name, make in raced.items():
        stack = clip.adapted(make, copies=copies)
        run = train(partial(clip.loss, stack, x), stack.trainable, adam_of_each(rates), steps=config.steps, every=1000, tick=tick)
        tried = clip.accuracy(stack, test, run.params).view(copies, seeds)
        for multiple, accuracy in zip(config.rates, tried, strict=True):
            measured.add(f"{name}_x{multiple}", accuracy=accuracy, lr=[multiple / 1000] * seeds)
        best = int(clip.accuracy(stack, held_back, run.params).view(copies, seeds).mean(dim=1).argmax())
        measured.add(name, accuracy=tried[best], lr=[config.rates[best] / 1000] * seeds)
    return measured


PARTS = (
    Part("training", "Block-LoRA and the smaller LoRA along a training", run_training, baseline=None),
    Part("fewshot", "Few samples of a new domain, Adam", run_fewshot, baseline="lora_8"),
    Part("rates", "At several learning rates", run_rates, baseline="lora"),
)


def figure(results: Results) -> Figure:
    """Six panels: the distance along a training; accuracy against parameters and work; bound and gap; rates; what is unknown."""
    fig, (distance, stored, worked, bound, rates, unknown) = plotting.make_figure(3, QUESTION, rows=2)
    config: Config = convert(results.config, Config, "config")
    _draw_distance(distance, results, config)
    _draw_costs(stored, results, config, "parameters", "stored parameters")
    _draw_costs(worked, results, config, "multiplications", "multiplications a row, blocks added first")
    _draw_bound(bound, results, config)
    names = {"block": f"Block-LoRA, r = {config.rank}, b = {config.cut}", "lora": f"LoRA, r = {config.rank // config.cut}"}
    for i, (name, label) in enumerate((names | {"large": f"LoRA, r = {config.rank}"}).items()):
        found = [results.metrics[f"rates.{name}_x{multiple}.accuracy"] for multiple in config.rates]
        plotting.draw_points(rates, [multiple / 1000 for multiple in config.rates], found, label, i)
    rates.set(title="Learning rate", xlabel="learning rate", ylabel="accuracy on the target, %", xscale="log")
    rates.legend(fontsize=8)
    shown = {
        f"block_{config.cut}": "along the\nrank, s = 1",
        f"features_{config.cut}": "along the\nfeatures",
        "root": r"$s = \alpha / \sqrt{r}$",
        "per_block": r"$s = \alpha b / r$",
    }
    plotting.draw_bars(unknown, list(shown.values()), {"": [results.metrics[f"fewshot.{name}.accuracy"] for name in shown]})
    unknown.set(
        title=rf"What we cannot know, $r = \alpha = {config.rank}$, b = {config.cut}", ylabel="accuracy on the target, %", ylim=(0, 100)
    )
    unknown.tick_params(axis="x", labelsize=8)
    return fig


def _draw_distance(ax: Axes, results: Results, config: Config) -> None:
    """Relative distances along a training, on a logarithmic axis."""
    for i, (key, name) in enumerate(OPTIMIZERS.items()):
        plotting.draw_curve(ax, results.curves[f"training.{key}.apart"], f"{name}, rate of B times {config.training_blocks[0]}", i)
    plotting.draw_curve(ax, results.curves["training.adam.unequal"], "Adam, one rate for both", 4)
    ax.set(
        title=f"LoRA of rank {config.training_rank // config.training_blocks[0]} against b = {config.training_blocks[0]}",
        xlabel="step",
        ylabel="|difference| / |ΔW|",
    )
    ax.set(yscale="log", ylim=(1e-17, 1e2))
    ax.legend(fontsize=7.5, loc="center right")


def _draw_costs(ax: Axes, results: Results, config: Config, quantity: str, label: str) -> None:
    """Accuracy against what is stored or computed."""
    blocks = sorted(config.blocks, reverse=True)
    lines = {"LoRA, r = " + ", ".join(map(str, sorted(config.lora_ranks))): [f"lora_{r}" for r in sorted(config.lora_ranks)]}
    lines[f"Block-LoRA, r = {config.rank}, b = " + ", ".join(map(str, blocks))] = [f"block_{b}" for b in blocks]
    lines[f"LoRA, r = {config.rank // config.cut}, rate of B times {config.cut}"] = [f"same_{config.cut}"]
    for i, (name, shown) in enumerate(lines.items()):
        x = [results.metrics[f"fewshot.{method}.{quantity}"].mean or 0.0 for method in shown]
        plotting.draw_points(ax, x, [results.metrics[f"fewshot.{method}.accuracy"] for method in shown], name, i)
    ax.set(title="Accuracy", xlabel=label, ylabel="accuracy on the target, %", ylim=(55, None))
    ax.legend(fontsize=7.5, loc="lower right")


def _draw_bound(ax: Axes, results: Results, config: Config) -> None:
    """Bound and measured gap against the number of blocks, both as multiples of LoRA's."""
    shapes = torch.tensor([(config.hidden, config.features), (config.embedding, config.hidden)])
    samples, blocks = config.shots * config.classes, sorted(config.blocks)
    bounds = [
        block_lora.generalization_bound(shapes, rank=config.rank, blocks=b, bits=32, num_samples=samples, loss_sigma=1.0)
        for b in (1, *blocks)
    ]
    ax.plot([1, *blocks], [bound / bounds[0] for bound in bounds], label="bound", **plotting.line_style(0))
    plotting.draw_points(ax, blocks, [results.metrics[f"fewshot.block_{b}.gap_share"] for b in blocks], "measured gap", 1)
    ax.set(title=f"Gap, as a multiple of LoRA's of rank {config.rank}", xlabel="number of blocks b", ylim=(0, None))
    ax.legend(fontsize=8)
