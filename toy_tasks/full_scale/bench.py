"""Speed and memory of the methods beside PEFT's LoRA, on random tokens; `loracle full bench`."""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import UsageError
from ..records import write_json
from .engine import Engine
from .evaluation import token_losses
from .memory import known_config, peak_memory, reset_peak_memory
from .settings import SMALL, Run, resolve
from .training import Report, attach, device_name, estimate_gradients, make_optimizer, silent, versions

BASELINE = "peft_lora"


@dataclasses.dataclass(frozen=True)
class Measured:
    """One method: times in seconds, sizes in bytes; ratios to PEFT's LoRA of the same round, medians over the rounds."""

    method: str
    trainable: int
    init_seconds: float  # gradients for the start included
    tokens_per_second: float
    relative_speed: float
    peak_memory_bytes: int
    relative_memory: float


@dataclasses.dataclass(frozen=True)
class Bench:
    """One run of the benchmark; the fields are the keys of its results file."""

    device: str
    versions: dict[str, str]
    shape: tuple[int, ...]
    rank: int
    precision: str
    rows: int
    sequence_length: int
    compile: bool
    steps: int
    rounds: int
    methods: tuple[Measured, ...]


class Ready(NamedTuple):
    """A method inside a model of its own."""

    step: Callable[[], None]
    trainable: int
    init_seconds: float


def runs(methods: Sequence[str] | None, *, rank: int, precision: str | None, sequence: int, rows: int, cpu: bool, **how: Any) -> list[Run]:
    """The runs to measure, PEFT's LoRA first: these methods, or all that there are, with the options of their configs."""
    from ..config import CONFIGS
    from ..methods import names

    precision = precision or ("bf16" if torch.cuda.is_available() and not cpu else "float32")
    overrides = [f"rank={rank}", f"alpha={2 * rank}", f"sequence_length={sequence}", f"batch_size={rows}", f"precision={precision}"]
    overrides += ["dropout=0", "weight_decay=0", "optimizer=adamw"]
    chosen = dict.fromkeys([BASELINE, *(methods or names())])
    known = {path.stem for path in CONFIGS.glob("*.toml")}
    # A baseline has no config of its own
    return [resolve(name if name in known else "lora", method=name, model=SMALL, overrides=overrides, **how) for name in chosen]


def build(run: Run, shape: Sequence[int], device: torch.device) -> Ready:
    """A Llama of that shape with random weights and the method inside, ready to step on one batch of random tokens."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    dtype = getattr(torch, run.dtype_name)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(known_config("shape", shape)).train()
    finally:
        torch.set_default_dtype(before)
    if run.gradient_checkpointing:
        model.activation_checkpointing_enable()
    tokens = torch.randint(shape[-1], (run.rows_at_once(), run.sequence_length), device=device)
    rows = [{"input_ids": row, "labels": row} for row in tokens.tolist()]
    synchronize(device)
    began = time.perf_counter()
    method, _, _ = attach(run, model, estimate_gradients(run, model, rows, 0))
    optimizer = make_optimizer(run, method, model)
    synchronize(device)
    seconds = time.perf_counter() - began
    if run.compile:
        model.compile()

    def step() -> None:
        (token_losses(model(input_ids=tokens, use_cache=False).logits, tokens) / tokens.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Ready(step, sum(p.numel() for p in model.parameters() if p.requires_grad), seconds)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_steps(ready: Ready, steps: int, device: torch.device) -> float:
    """Seconds per step."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        ready.step()
    synchronize(device)
    return (time.perf_counter() - began) / steps


def peak_alone(run: Run, shape: Sequence[int], *, steps: int = 2) -> int:
    """The peak on a CPU of building and training, in a process of its own, beyond what it has at the start."""
    with get_context("fork").Pool(1) as pool:
        return int(pool.apply(_peak, (run, shape, steps)))


def _warm_up() -> None:
    """Import and start all that a run needs once and that would count as its memory."""
    from torch import _dynamo  # noqa: F401  # optimizers import it

    run = resolve("lora", method=BASELINE, overrides=["rank=1", "batch_size=1", "sequence_length=4"])
    build(run, (8, 8, 1, 1, 8), torch.device("cpu")).step()


def _peak(run: Run, shape: Sequence[int], steps: int) -> int:
    device = torch.device("cpu")
    _warm_up()
    gc.collect()
    reset_peak_memory(device)
    before = peak_memory(device)
    ready = build(run, shape, device)
    for _ in range(steps):
        ready.step()
    return peak_memory(device) - before


def measure(
    runs: Sequence[Run],
    shape: Sequence[int],
    *,
    steps: int,
    rounds: int,
    cpu: bool = False,
    out: Path | None = None,
    report: Report = silent,
) -> Bench:
    """Measure each run's method; one has to be `BASELINE` for the ratios.

    On a CPU all models are there at once and take turns, since the speed of a shared machine drifts; peaks are those of
    processes of their own. On a GPU one comes after the other, each alone.
    """
    device = Engine("single", cpu=cpu).device
    base = [run.method for run in runs].index(BASELINE)
    if device.type == "cuda":
        seconds, ready, peaks = _one_by_one(runs, shape, steps, rounds, device, report)
    else:
        peaks = []
        for run in runs:
            report("memory", len(peaks) / len(runs), run.method)
            peaks.append(peak_alone(run, shape))
        if not min(peaks):
            raise UsageError(f"--shape {','.join(map(str, shape))} is too small for its memory to be measured; give a larger one")
        seconds, ready = _in_turns(runs, shape, steps, rounds, device, report)
    tokens = runs[0].rows_at_once() * runs[0].sequence_length
    found = []
    for i, run in enumerate(runs):
        relative = statistics.median(b / own for b, own in zip(seconds[base], seconds[i], strict=True))
        found.append(
            Measured(
                method=run.method,
                trainable=ready[i].trainable,
                init_seconds=round(ready[i].init_seconds, 4),
                tokens_per_second=round(tokens / statistics.median(seconds[i]), 1),
                relative_speed=round(relative, 4),
                peak_memory_bytes=peaks[i],
                relative_memory=round(peaks[i] / peaks[base], 4),
            )
        )
    first = runs[0]
    result = Bench(
        device=device_name(device),
        versions=versions(),
        shape=tuple(shape),
        rank=first.rank,
        precision=first.precision,
        rows=first.rows_at_once(),
        sequence_length=first.sequence_length,
        compile=first.compile,
        steps=steps,
        rounds=rounds,
        methods=tuple(found),
    )
    if out is not None:
        write_json(out, result)
    return result


def _in_turns(
    runs: Sequence[Run], shape: Sequence[int], steps: int, rounds: int, device: torch.device, report: Report
) -> tuple[list[list[float]], list[Ready]]:
    ready = [build(run, shape, device) for run in runs]
    seconds: list[list[float]] = [[] for _ in runs]
    for one in ready:
        one.step()  # warm up, compile
    for turn in range(rounds):
        for i, one in enumerate(ready):
            report("speed", (turn * len(ready) + i) / (rounds * len(ready)), runs[i].method)
            seconds[i].append(time_steps(one, steps, device))
    return seconds, ready


def _one_by_one(
    runs: Sequence[Run], shape: Sequence[int], steps: int, rounds: int, device: torch.device, report: Report
) -> tuple[list[list[float]], list[Ready], list[int]]:
    seconds, done, peaks = [], [], []
    for i, run in enumerate(runs):
        report("methods", i / len(runs), run.method)
        gc.collect()
        torch.cuda.empty_cache()
        reset_peak_memory(device)
        one = build(run, shape, device)
        one.step()
        seconds.append([time_steps(one, steps, device) for _ in range(rounds)])
        peaks.append(peak_memory(device))
        done.append(one._replace(step=lambda: None))  # the model goes
        del one
    return seconds, done, peaks
