"""`loracle full`: the papers' methods on real language models. Imports torch and transformers only when something runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..toy_tasks.config import FullScale
    from ..toy_tasks.full_scale.settings import Run
    from ..toy_tasks.full_scale.training import Outcome

FAILED, WRONG_USAGE, INTERRUPTED = 1, 3, 130

app = typer.Typer(no_args_is_help=True, help="The same methods on real language models: train, plan, evaluate, export, measure.")
console = Console()
errors = Console(stderr=True)

Source = Annotated[
    str, typer.Argument(metavar="SLUG", help="A paper's slug, or a .toml file with a table [full] like its config.", show_default=False)
]
MethodName = Annotated[str | None, typer.Option(help="Another method than the config's, such as the baselines full and peft_lora.")]
ModelName = Annotated[
    str | None,
    typer.Option(help="A hub id, a folder, `paper` for the config's, or `small` for the one built here.", show_default="small"),
]
DataName = Annotated[str | None, typer.Option(help="A hub id, a JSONL file, or `paper` for the config's.", show_default="the model's")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of [full]; may be repeated.")]
MicroBatch = Annotated[int | None, typer.Option(help="Rows that one process puts through the model at once.", show_default="batch_size")]
Checkpointing = Annotated[bool, typer.Option("--checkpointing", help="Compute activations twice instead of keeping them.")]


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn errors that the user can mend into a message and an exit code: 3 for wrong usage, 1 otherwise."""
    from rich.markup import escape

    from ..toy_tasks.config import ToyError, UsageError

    try:
        _need_packages()
        yield
    except ToyError as error:
        errors.print(f"[bold]error:[/bold] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(WRONG_USAGE if isinstance(error, UsageError) else FAILED) from None


def _need_packages() -> None:
    from importlib.util import find_spec

    from ..toy_tasks.config import UsageError

    missing = [name for name in ("transformers", "accelerate", "datasets", "peft") if find_spec(name) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} not installed; full-scale runs need the extra `full`: pip install 'loracle[full]'")


@contextmanager
def _progress() -> Iterator[Callable[[str, float, str], None]]:
    """A bar for each stage, moved by `report(stage, fraction, word)`."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TextColumn("{task.fields[word]}"))
    with Progress(*columns, TimeElapsedColumn(), transient=True, console=errors) as progress:
        bars: dict[str, TaskID] = {}

        def report(stage: str, fraction: float, word: str = "") -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=1.0, word="")
            progress.update(bars[stage], completed=fraction, word=word)

        yield report


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Leave the progress bars to us."""
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in ("HF_HUB", "HF_DATASETS"):  # read when they are imported
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield


def _fields(text: str | None) -> tuple[str, ...] | None:
    return tuple(piece.strip() for piece in text.split(",")) if text else None


def run(
    source: Source,
    method: MethodName = None,
    model: ModelName = None,
    data: DataName = None,
    held_out: Annotated[str | None, typer.Option(help="A JSONL file to evaluate on.", show_default="a part of the data")] = None,
    fields: Annotated[
        str | None, typer.Option(help="The data's fields, as `instruction,response` or `text`.", show_default="found by name")
    ] = None,
    template: Annotated[str | None, typer.Option(help="The prompt, with {instruction} in it.")] = None,
    samples: Annotated[int | None, typer.Option(help="Only the first so many examples.", show_default="the config's for its data")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", show_default="by the config's epochs")] = None,
    micro_batch: MicroBatch = None,
    seed: Annotated[int, typer.Option(help="Of the data's order, the factors and dropout; a run has one.")] = 0,
    packing: Annotated[bool, typer.Option("--packing", help="Several examples in one row; they do not see each other.")] = False,
    checkpointing: Checkpointing = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the model.")] = False,
    engine: Annotated[str, typer.Option(help="auto, single, ddp or fsdp (base weights sharded).")] = "auto",
    cpu: Annotated[bool, typer.Option("--cpu", help="Compute on the CPU even if there is a GPU.")] = False,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.", show_default="a tenth of the run")] = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Where to write.", show_default="runs/full/METHOD-MODEL")] = None,
) -> None:
    """Train a language model with a paper's method, and report loss, forgetting, speed and memory.

    Without --model a small Llama is built and pretrained here, in about a minute and without a network, and learns to
    write Python. Ctrl-C or a crash keeps the last checkpoint; the same command goes on from there.

    \b
    Examples:
      loracle full run lora
      loracle full run lora --method peft_lora
      loracle full run lora_ga --model paper --micro-batch 4 --checkpointing
      loracle full run lora --model ./my-llama --data my.jsonl --fields question,answer --set rank=16
      accelerate launch --multi_gpu --num_processes 2 -m loracle.toy_tasks.full_scale lora_ga --model paper --engine fsdp
      accelerate launch --multi_gpu --num_processes 2 -m loracle.toy_tasks.full_scale lora --cpu

    \b
    Without --multi_gpu accelerate starts one process where it finds no more than one GPU.
    """
    with _exit_codes():
        from ..toy_tasks.full_scale.settings import default_folder, read, resolve

        _check_numbers(samples=samples, steps=steps, micro_batch=micro_batch, save_every=save_every)
        decided = resolve(
            source,
            method=method,
            model=model,
            data=data,
            overrides=settings or (),
            held_out=held_out,
            fields=_fields(fields),
            template=template,
            samples=samples,
            steps=steps,
            micro_batch=micro_batch,
            seed=seed,
            packing=packing,
            gradient_checkpointing=checkpointing,
            compile=compile,
            engine=engine,
        )
        folder = out or default_folder(decided)
        with _quiet_libraries():
            from ..toy_tasks.full_scale import training
        first = training.is_first_process()
        if first:
            _print_run(decided, source)
        try:
            with _progress() if first else _no_progress() as report:
                outcome = training.train(decided, folder, save_every=save_every, report=report, cpu=cpu)
        except KeyboardInterrupt:
            kept = f"the last checkpoint is kept in {folder}, and" if list(folder.glob("checkpoint-*")) else "there was no checkpoint yet;"
            errors.print(f"interrupted; {kept} the same command goes on from there", soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None
        if first:
            _print_outcome(outcome)
            if not {"model", "data"} & set(decided.changed):
                _print_aims(read(source)[0])
            console.print(f"\nreport:  {folder / 'report.json'}\nfigure:  {folder / 'figure.svg'}", soft_wrap=True, highlight=False)


app.command()(run)


Shape = Annotated[
    str | None,
    typer.Option(help="The model's shape: hidden,intermediate,layers,heads,vocabulary of a Llama.", show_default="the model's own"),
]


@app.command()
def plan(
    source: Source,
    method: MethodName = None,
    model: ModelName = None,
    shape: Shape = None,
    devices: Annotated[int, typer.Option(help="How many devices share the work.")] = 1,
    memory: Annotated[float | None, typer.Option(help="GiB of each device.", show_default="what is free here")] = None,
    micro_batch: MicroBatch = None,
    checkpointing: Checkpointing = False,
    engine: Annotated[str, typer.Option(help="auto (single or ddp) or fsdp.")] = "auto",
    cpu: Annotated[bool, typer.Option("--cpu", help="For the CPU even if there is a GPU.")] = False,
    settings: Settings = None,
) -> None:
    """Print the memory that a run will need on each device, and whether it fits; nothing is run.

    Exit code 0: it fits; 1: it does not, and what would is printed.

    \b
    Examples:
      loracle full plan lora --model paper --memory 80
      loracle full plan lora_ga --model paper --memory 24 --micro-batch 1 --checkpointing
      loracle full plan randlora --model any --shape 2048,8192,16,32,128256 --memory 24 --devices 4 --engine fsdp
    """
    with _exit_codes():
        from ..toy_tasks.config import UsageError
        from ..toy_tasks.full_scale.settings import read, resolve

        _check_numbers(devices=devices, micro_batch=micro_batch)
        sizes = _shape(shape)
        decided = resolve(
            source,
            method=method,
            model=model or ("shape" if sizes else None),
            data="none",  # a plan needs none
            overrides=settings or (),
            micro_batch=micro_batch,
            gradient_checkpointing=checkpointing,
            engine=engine,
        )
        with _quiet_libraries():
            import torch

            from ..toy_tasks.full_scale import memory as planning
        device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
        on_cpu = device.type == "cpu" and memory is None
        # The processes on one machine share the memory of its CPU
        available = memory * 2**30 if memory is not None else planning.device_memory(device) / (devices if on_cpu else 1)
        try:
            config = planning.known_config(decided.model, sizes)
        except UsageError as error:
            raise UsageError(f"{error}; give --shape") from None
        found = planning.estimate(decided, config, ranks=devices, cpu=on_cpu)
        table = Table("", "each device", title=f"Memory of {decided.method} on {decided.model}", title_justify="left")
        parts = {
            f"pretrained weights ({decided.precision})": found.weights,
            f"adapters ({found.trainable:,} parameters trained)": found.adapters,
            "gradients": found.gradients,
            f"optimizer ({decided.optimizer})": found.optimizer,
            f"activations ({decided.rows_at_once(devices)} rows of {decided.sequence_length} tokens)": found.activations,
            "sharded weights while they compute": found.gathered,
            "or, while the optimizer computes": found.stepping,
            "or, before training: gradients for the start, weights on their way": found.setup,
            "or, at a checkpoint: its files as they are put together": found.saving,
        }
        for name, size in parts.items():
            if size:
                table.add_row(name, format_bytes(size))
        table.add_row("[bold]peak[/bold]", f"[bold]{format_bytes(found.total)}[/bold]")
        console.print(table)
        if "model" not in decided.changed:
            _print_aims(read(source)[0])
        if planning.fits(found, available, cpu=on_cpu):
            console.print(f"It fits into {format_bytes(available)}.", highlight=False)
            return
        console.print(f"It does not fit into {format_bytes(available)}.", highlight=False)
        advice = planning.advise(decided, config, available, ranks=devices, cpu=on_cpu)
        for line in advice or ["nothing that this command knows of; take a smaller model"]:
            console.print(f"would fit: {line}", soft_wrap=True, highlight=False)
        raise typer.Exit(FAILED)


def _shape(text: str | None) -> list[int] | None:
    """Five whole numbers."""
    from ..toy_tasks.config import UsageError

    if text is None:
        return None
    pieces = text.split(",")
    if len(pieces) != 5 or not all(piece.strip().isdigit() and int(piece) > 0 for piece in pieces):
        raise UsageError(f"--shape is {text!r}; needed five whole numbers: hidden,intermediate,layers,heads,vocabulary")
    return [int(piece) for piece in pieces]


@app.command("eval")
def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="RUN", help="The folder of a run, a model or an adapter; or a hub id.", show_default=False)
    ],
    data: Annotated[str, typer.Option(help="A JSONL file or a hub id.")],
    kind: Annotated[str, typer.Option(help="perplexity, or exact_match of generated answers.")] = "perplexity",
    fields: Annotated[
        str | None, typer.Option(help="The data's fields, as `question,answer` or `text`.", show_default="found by name")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="The prompt, with {instruction} in it.", show_default="the run's, kept by export")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Only the first so many examples.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a row, or of an answer.", show_default="the run's, or 256")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the numbers, and every answer, as JSON.")] = None,
) -> None:
    """Measure a run or a model on held-out data.

    exact_match generates greedily and compares the number after the last "####", or else the last number, as GSM8K asks.

    \b
    Examples:
      loracle full eval runs/full/lora --data held_out.jsonl
      loracle full eval runs/full/lora_ga-Llama-2-7b-hf --data gsm8k_test.jsonl --kind exact_match --out gsm8k.json
    """
    with _exit_codes():
        _check_numbers(samples=samples, length=length)
        with _quiet_libraries():
            from ..toy_tasks.full_scale.measuring import measure
        with _progress() as report:
            found = measure(
                target, data, kind, fields=_fields(fields), template=template, samples=samples, length=length, out=out, report=report
            )
        console.print(found, highlight=False, markup=False, soft_wrap=True)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)],
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    kind: Annotated[str | None, typer.Option(help="peft or merged.", show_default="an adapter if there can be one")] = None,
) -> None:
    """Write what a run trained as an adapter that PEFT loads, or as a merged model that transformers loads.

    \b
    Examples:
      loracle full export runs/full/lora_ga --to lora_ga_adapter
      loracle full export runs/full/lora --to my_model --kind merged
    """
    with _exit_codes():
        with _quiet_libraries():
            from ..toy_tasks.full_scale import exports
        made, why = exports.export(folder, to, kind)
        console.print(f"{to}: {'a PEFT adapter' if made == 'peft' else 'a merged model'} ({why})", soft_wrap=True, highlight=False)


def _check_numbers(**numbers: int | None) -> None:
    from ..toy_tasks.config import UsageError

    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; needed a whole number of at least 1")


@contextmanager
def _no_progress() -> Iterator[Callable[[str, float, str], None]]:
    def report(stage: str, fraction: float, word: str = "") -> None:
        pass

    yield report


def _print_run(run: Run, source: str) -> None:
    """What is about to run, and which of its settings are not the paper's."""
    console.print(f"[bold]{run.method}[/bold] on {run.model}, data {run.data}{_samples(run)}", highlight=False)
    for heading, keys in (("not as in the config", run.changed), ("unknown in the source, ours here", run.assumed)):
        values = [f"{key}={getattr(run, key) or 'all' if key == 'samples' else getattr(run, key)}" for key in keys]
        if values:
            console.print(f"{heading}: {', '.join(values)}", soft_wrap=True, highlight=False)
    if run.model == "small":
        console.print(f"The small model shows that all works, not what the paper measured; --model paper takes what {source} names.")


def _samples(run: Run) -> str:
    return f", its first {run.samples:,} samples" if run.samples else ""


def _print_outcome(outcome: Outcome) -> None:
    table = Table("", "before", "after", title="\nMean loss per token, held out", title_justify="left")
    table.add_row("new domain", f"{outcome.loss_before:.3f}", f"{outcome.loss_after:.3f}")
    if outcome.old_loss_before is not None and outcome.old_loss_after is not None:
        table.add_row("old domain", f"{outcome.old_loss_before:.3f}", f"{outcome.old_loss_after:.3f}")
    console.print(table)
    if outcome.forgetting is not None:
        console.print(f"forgetting: {outcome.forgetting:+.3f} (rise of the loss on the old domain)", highlight=False)
    console.print(
        f"perplexity {outcome.perplexity_after:.2f}; {outcome.trainable:,} of {outcome.parameters:,} parameters trained; "
        f"{outcome.steps} steps, "
        f"{outcome.tokens:,} tokens, {outcome.tokens_per_second:,.0f} tokens/s, peak memory {format_bytes(outcome.peak_memory_bytes)}, "
        f"{outcome.setup_seconds + outcome.seconds:.1f} s on {outcome.device}",
        soft_wrap=True,
        highlight=False,
    )
    for written in outcome.texts:
        console.print(f"\n[dim]prompt:[/dim] {_plain(written['prompt'].strip())}\n{_plain(written['text'])}", highlight=False)


def _print_aims(full: FullScale) -> None:
    """The paper's figures, to be compared with what `eval` measures."""
    if not full.aims:
        return
    seeds = {"unknown": "how many seeds is unknown", 1: "one seed"}.get(full.seeds, f"means over {full.seeds} seeds")
    table = Table("benchmark", "method", title=f"\nThe paper's figures ({seeds}); `loracle full eval` measures yours", title_justify="left")
    table.add_column("value", justify="right")
    for aim in full.aims:
        table.add_row(aim.benchmark, aim.method, f"{aim.value:g}{' (from memory)' if aim.from_memory else ''}")
    console.print(table)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def format_bytes(count: float) -> str:
    """A size as people read it."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


@app.command()
def bench(
    methods: Annotated[list[str] | None, typer.Argument(metavar="[METHOD]...", help="Which; default: all, and PEFT's LoRA.")] = None,
    shape: Annotated[
        str, typer.Option(help="hidden,intermediate,layers,heads,vocabulary of a Llama; Llama 2 7B is 4096,11008,32,32,32000.")
    ] = "256,688,4,4,2048",
    rank: Annotated[int, typer.Option(help="Of every method.")] = 8,
    precision: Annotated[
        str | None, typer.Option(help="Of the base weights: bf16 or float32.", show_default="bf16 on a GPU, else float32")
    ] = None,
    sequence: Annotated[int, typer.Option(help="Tokens of a row.")] = 128,
    rows: Annotated[int, typer.Option(help="Rows of a step.")] = 4,
    steps: Annotated[int, typer.Option(help="Steps of a round.")] = 5,
    rounds: Annotated[int, typer.Option(help="Rounds; ratios are medians over them.")] = 7,
    checkpointing: Checkpointing = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the models.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="On the CPU even if there is a GPU.")] = False,
    out: Annotated[Path, typer.Option(help="The results file.")] = Path("runs/full/bench.json"),
) -> None:
    """Measure speed, peak memory and the time of the start of each method beside PEFT's LoRA, in one run.

    The weights and tokens are random: nothing is downloaded.

    \b
    Examples:
      loracle full bench
      loracle full bench lora lora_ga --compile
      loracle full bench --shape 4096,11008,32,32,32000 --sequence 1024 --rows 1 --out llama_2_7b.json
    """
    with _exit_codes():
        _check_numbers(rank=rank, sequence=sequence, rows=rows, steps=steps, rounds=rounds)
        with _quiet_libraries():
            from ..toy_tasks.full_scale import bench as benching
        how = {"gradient_checkpointing": checkpointing, "compile": compile}
        runs = benching.runs(methods, rank=rank, precision=precision, sequence=sequence, rows=rows, cpu=cpu, **how)
        with _progress() as report:
            found = benching.measure(runs, _shape(shape) or [], steps=steps, rounds=rounds, cpu=cpu, out=out, report=report)
        table = Table("method", title=f"Beside PEFT's LoRA, {found.device}", title_justify="left")
        for heading in ("trained", "start, s", "tokens/s", "speed", "peak", "memory"):
            table.add_column(heading, justify="right")
        for one in found.methods:
            speed, memory = (f"{ratio:.2f}" for ratio in (one.relative_speed, one.relative_memory))
            peak = format_bytes(one.peak_memory_bytes)
            table.add_row(one.method, f"{one.trainable:,}", f"{one.init_seconds:.2f}", f"{one.tokens_per_second:,.0f}", speed, peak, memory)
        console.print(table)
        console.print(f"results: {out}", soft_wrap=True, highlight=False)
