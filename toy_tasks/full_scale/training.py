"""A run from its settings to its report: load, put the method in, train, evaluate."""

import dataclasses
import math
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import methods
from ..config import ToyError, UsageError
from ..methods import Method, Setup
from . import checkpoints, small
from .data import Row, Split, collate, find_fields, pack, read_examples, tokenise
from .engine import Engine
from .evaluation import count_tokens, generate, perplexity, token_losses
from .hub import no_hub, short
from .log import Log
from .memory import advise, device_memory, estimate, fits, known_config, peak_memory, reset_peak_memory
from .settings import ROWS_OF_ESTIMATE, SMALL, Run, differences

SMALL_FOLDER = Path("runs/small-llama")  # the small model, once it is built
REPORT = "report.json"
HELD_OUT_SHARE, HELD_OUT_MOST = 20, 200  # one in so many examples, at most so many
PROMPTS, NEW_TOKENS = 2, 48

Report = Callable[[str, float, str], None]  # stage, fraction done, a word about it


class Prepared(NamedTuple):
    """A model with its method inside, before the first step."""

    model: Any  # the transformers model, adapted in place
    tokenizer: Any
    method: Method
    whole: list[nn.Parameter]  # the parameters that the method added


class Texts(NamedTuple):
    """Rows to train on, held-out rows of the same domain, and of the domain before (none unless the model is the small one)."""

    train: list[Row]
    new: list[Row]
    old: list[Row]
    prompts: list[str]  # of held-out examples, to see the model write


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run measured; the fields are the keys of `report.json`."""

    run: dict[str, Any]
    ranks: int
    device: str
    versions: dict[str, str]
    parameters: int
    trainable: int
    steps: int
    tokens: int
    seconds: float
    setup_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    loss_before: float
    loss_after: float
    perplexity_after: float
    old_loss_before: float | None
    old_loss_after: float | None
    forgetting: float | None  # rise of the loss on the domain before
    texts: tuple[dict[str, str], ...]


def silent(stage: str, fraction: float, word: str = "") -> None:
    """Report nothing."""


def model_folder(run: Run, engine: Engine | None, report: Report = silent, cache: Path = SMALL_FOLDER) -> str:
    """Where transformers finds the model; the small one is built first, once, by rank 0."""
    if run.model != SMALL:
        return run.model
    if (engine is None or engine.is_main) and not cache.exists():
        report("building the small model", 0.0, "")
        small.build(cache, lambda fraction: report("building the small model", fraction, ""))
    if engine is not None:
        engine.wait()
    return str(cache)


def load_model(folder: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A causal language model, and its tokenizer.

    Raises:
        UsageError: neither a folder with a model nor a hub id that can be had.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    why = no_hub(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UsageError(f"the model {folder!r} could not be loaded: {why or short(error)}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def load_texts(run: Run, tokenizer: Any) -> Texts:
    """The rows of the run's data. Raises UsageError if a file or field is not there, or nothing is left to learn."""
    old: list[Row] = []
    if run.data == SMALL:
        split = small.new_domain()
        old = small.chunks(small.old_domain().held_out, tokenizer, run.sequence_length)
    else:
        examples = read_examples(run.data, samples=run.samples)
        if run.held_out is not None:
            split = Split(examples, read_examples(run.held_out))
        else:
            step = max(HELD_OUT_SHARE, math.ceil(len(examples) / HELD_OUT_MOST))
            split = Split([e for i, e in enumerate(examples) if i % step], examples[::step])
    if not split.train:
        raise UsageError(f"{run.data} has one example, which is held out; give more, or --held-out FILE")
    fields = find_fields(split.train, run.fields, run.data)
    find_fields(split.held_out, fields, run.held_out or run.data)
    train, new = (
        tokenise(part, tokenizer, fields=fields, template=run.template, length=run.sequence_length)
        for part in (split.train, split.held_out)
    )
    if not train or not new:
        raise UsageError(f"no example of {run.data} has a response within {run.sequence_length} tokens; raise sequence_length")
    prompts = [run.template.replace("{instruction}", e[fields[0]]) for e in split.held_out[:PROMPTS]] if len(fields) == 2 else []
    return Texts(pack(train, run.sequence_length) if run.packing else train, new, old, prompts)


def attach(run: Run, model: nn.Module, gradients: Callable[[int], Mapping[str, Tensor]]) -> tuple[Method, list[nn.Parameter], list[str]]:
    """Put the method into the model: the method, the parameters that it added (at least float32), and the names of all
    tensors that it made or changed.

    Raises:
        UsageError: an option, the rank or the target modules do not fit.
    """
    method = methods.make(run.method, run.options)
    # A tensor that is still there with the same count of in-place changes is as it was before. (Not by its id alone: that of
    # a tensor that is gone may be given to a new one.)
    before = [(weakref.ref(tensor), tensor._version) for tensor in checkpoints.tensors_of(model).values()]
    setup = Setup(
        pattern=run.pattern,
        rank=run.rank,
        alpha=run.alpha,
        lr=run.lr,
        gradients=gradients,
        dropout=run.dropout,
        generator=torch.Generator().manual_seed(run.seed),
    )
    try:
        method.attach(model, setup)
    except ValueError as error:
        raise UsageError(f"{run.method} does not fit: {error}") from None
    untouched = {id(tensor) for reference, version in before if (tensor := reference()) is not None and tensor._version == version}
    touched = [name for name, tensor in checkpoints.tensors_of(model).items() if id(tensor) not in untouched]
    added = [p for p in model.parameters() if p.requires_grad and id(p) not in untouched]
    for parameter in added:
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return method, added, touched


def stand_in_gradients(model: nn.Module) -> Callable[[int], Mapping[str, Tensor]]:
    """Random matrices in the place of gradients, for a model whose saved tensors will be put over what is made of them."""

    class Random(dict[str, Tensor]):
        def __missing__(self, name: str) -> Tensor:
            shape = model.get_parameter(f"{name}.weight").shape
            return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    return lambda samples: Random()


def estimate_gradients(
    run: Run, model: nn.Module, rows: list[Row], padding: int, *, report: Report = silent
) -> Callable[[int], Mapping[str, Tensor]]:
    """The gradient of the mean loss of a few drawn rows in each adapted layer's weight, as methods ask for it.

    One layer's gradient at a time is moved off the weights and summed in at least float32, so that no more than the sums
    are kept.
    """

    def gradients(samples: int) -> Mapping[str, Tensor]:
        from ...reference._adapters import matching_linears

        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(run.seed)).tolist()[:samples]
        layers = matching_linears(model, run.pattern)
        sums = {
            name: torch.zeros_like(layer.weight, dtype=torch.promote_types(layer.weight.dtype, torch.float32))
            for name, layer in layers.items()
        }
        model.requires_grad_(False)
        hooks = []
        for name, layer in layers.items():
            layer.weight.requires_grad_(True)

            def take(weight: Tensor, name: str = name) -> None:
                assert weight.grad is not None
                sums[name] += weight.grad
                weight.grad = None

            hooks.append(layer.weight.register_post_accumulate_grad_hook(take))
        count = sum(count_tokens(collate([rows[i]], padding)["labels"]) for i in chosen)
        size, device = ROWS_OF_ESTIMATE, next(model.parameters()).device
        for start in range(0, len(chosen), size):
            batch = {key: value.to(device) for key, value in collate([rows[i] for i in chosen[start : start + size]], padding).items()}
            labels = batch.pop("labels")
            (token_losses(model(**batch, use_cache=False).logits, labels) / count).backward()
            report("reading gradients", min(1.0, (start + size) / len(chosen)), f"{len(chosen)} examples")
        for hook in hooks:
            hook.remove()
        model.requires_grad_(False)
        return sums

    return gradients


def prepare(
    run: Run, engine: Engine, rows: list[Row], model: Any, tokenizer: Any, out: Path, *, resuming: bool, report: Report
) -> Prepared:
    """Put the method in. Rank 0 makes the factors, bases and corrected weights, or reads them where a run is resumed, and every
    rank gets them; what the method made of stand-ins on the other ranks is written over.
    """
    model.train()
    start_file = out / checkpoints.START
    model.to(engine.device)
    if engine.is_main and not resuming:
        gradients = estimate_gradients(run, model, rows, tokenizer.pad_token_id, report=report)
    else:
        gradients = stand_in_gradients(model)
    method, added, touched = attach(run, model, gradients)
    if resuming and engine.is_main:
        checkpoints.put(model, checkpoints.load_tensors(start_file), start_file)
    there = checkpoints.tensors_of(model)
    start = {name: there[name] for name in touched}
    engine.take_from_first(start.values())
    if engine.is_main and not resuming:
        checkpoints.save_tensors(start, start_file)
    # Without `start`: what holds a weight that the method changed would hold the whole of it beside its shards
    return Prepared(model, tokenizer, method, added)


def make_optimizer(run: Run, method: Method, model: nn.Module) -> torch.optim.Optimizer:
    """Gradient descent if the run says "sgd", else what the method takes: AdamW, or its own.

    Raises:
        UsageError: the optimizer is unknown, or does not go with the method or the precision.
    """
    known = ("adamw", "sgd", "lora_pro_adamw")
    if run.optimizer not in known:
        raise UsageError(f"optimizer is {run.optimizer!r}; needed one of {', '.join(known)}")
    if run.optimizer == "sgd":
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=run.lr, weight_decay=run.weight_decay)
    shrinks_base = method.trained(model, weight_decay=run.weight_decay).keys() - method.trained(model).keys()
    if shrinks_base and torch.finfo(getattr(torch, run.dtype_name)).bits < 32:
        raise UsageError(
            f"weight_decay is {run.weight_decay} and the base weights are {run.dtype_name}: {run.method} shrinks them by a factor of "
            f"1 - {run.lr * run.weight_decay:g} a step, which rounds to nothing there; use --set precision=float32, or weight_decay=0"
        )
    try:
        return method.optimizer(model, lr=run.lr, weight_decay=run.weight_decay)
    except ValueError as error:
        raise UsageError(f"the optimizer of {run.method} does not fit: {error}") from None


def make_schedule(run: Run, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The learning rate by step: transformers' schedule of that name."""
    from transformers import get_scheduler

    warmup = math.ceil(run.warmup_ratio * steps) if run.schedule != "constant" else 0
    return get_scheduler(run.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def count_steps(run: Run, rows: int) -> int:
    """Optimizer steps of the whole run: batches are full, what is left over in an epoch is not trained on."""
    return run.steps if run.steps is not None else max(1, math.floor(run.epochs * (rows // run.batch_size)))


@checkpoints.alone
def train(
    run: Run, out: Path, *, save_every: int | None = None, report: Report = silent, cpu: bool = False, cache: Path | None = None
) -> Outcome:
    """Do a run, or go on with it from its last checkpoint, and write its report into `out`.

    Raises:
        ToyError: a file could not be read or written, or `out` holds another run.
        UsageError: a setting, model or data set is wrong.
    """
    from .loop import Training

    engine = Engine(run.engine, cpu=cpu)
    run.rows_at_once(engine.ranks)
    said = report if engine.is_main else silent
    log = Log(out, engine)
    reset_peak_memory(engine.device)
    found = checkpoints.find(out)
    _check_folder(out, run, found)
    saved = checkpoints.read(found[-1], run) if found else None
    folder = model_folder(run, engine, said, cache or SMALL_FOLDER)
    check_memory(run, engine, folder)
    model, tokenizer = load_model(folder, getattr(torch, run.dtype_name))
    texts = load_texts(run, tokenizer)
    if saved is None:
        log.start()
    prepared = prepare(run, engine, texts.train, model, tokenizer, out, resuming=saved is not None, report=said)
    if run.gradient_checkpointing:
        model.activation_checkpointing_enable()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = model.num_parameters()
    engine.shard(model, prepared.whole)
    if saved:
        checkpoints.restore_weights(saved, model)
    optimizer = make_optimizer(run, prepared.method, model)
    steps = count_steps(run, len(texts.train))
    scheduler = make_schedule(run, optimizer, steps)
    if saved:
        checkpoints.restore_optimizer(saved, optimizer)
        scheduler.load_state_dict(saved.scheduler)
        log.resume(saved.step)

    def losses(when: str) -> tuple[float, float | None]:
        return (
            loop.mean_loss(texts.new, lambda fraction: said(f"evaluating {when} training", fraction, "")),
            loop.mean_loss(texts.old, lambda fraction: said(f"forgetting {when} training", fraction, "")) if texts.old else None,
        )

    def before_steps() -> None:
        if saved is None:
            log.before(*losses("before"))
        log.first_step()

    def after_step(step: int, loss: float, count: int) -> None:
        if not math.isfinite(loss):
            raise ToyError(f"the loss of step {step} is {loss}; lower the learning rate ({run.lr:g}) with --set lr=...")
        log.step(step, loss, optimizer.param_groups[0]["lr"], count)
        said("training", step / steps, f"step {step}/{steps}, loss {loss:.3f}, {log.tokens / log.seconds:,.0f} tokens/s")

    def save(folder: Path, step: int) -> None:
        weights = prepared.method.trained(model, weight_decay=run.weight_decay)
        checkpoints.write(folder, step, run, weights, optimizer, scheduler, main=engine.is_main)
        log.saved()

    loop = Training(
        run,
        engine,
        model,
        texts.train,
        padding=tokenizer.pad_token_id,
        optimizer=optimizer,
        scheduler=scheduler,
        steps=steps,
        first=saved.step if saved else 0,
        before_steps=before_steps,
        after_step=after_step,
        out=out,
        save_every=save_every or math.ceil(steps / 10),
        save=save,
    )
    loop.train()
    after, old_after = losses("after")
    written = generate(model, tokenizer, texts.prompts, max_new_tokens=NEW_TOKENS) if texts.prompts else []
    outcome = Outcome(
        run=dataclasses.asdict(run),
        ranks=engine.ranks,
        device=device_name(engine.device),
        versions=versions(),
        parameters=parameters,
        trainable=trainable,
        steps=steps,
        tokens=log.tokens,
        seconds=round(log.seconds, 3),
        setup_seconds=round(log.setup_seconds, 3),
        tokens_per_second=round(log.tokens / log.seconds, 1) if log.seconds else 0.0,
        peak_memory_bytes=peak_memory(engine.device),
        loss_before=log.loss,
        loss_after=after,
        perplexity_after=perplexity(after),
        old_loss_before=log.old_loss,
        old_loss_after=old_after,
        forgetting=None if old_after is None or log.old_loss is None else old_after - log.old_loss,
        texts=tuple({"prompt": prompt, "text": text} for prompt, text in zip(texts.prompts, written, strict=True)),
    )
    if engine.is_main:
        from .report import write_report

        write_report(out, outcome)
    engine.wait()
    return outcome


def check_memory(run: Run, engine: Engine, folder: str) -> None:
    """Refuse a run that the device has no room for, before anything is loaded. Raises UsageError with what would fit."""
    cpu, free = engine.device.type == "cpu", device_memory(engine.device)
    config = known_config(folder)
    plan = estimate(run, config, ranks=engine.ranks, cpu=cpu)
    own = free / (engine.ranks if cpu else 1)  # the processes on one machine share the memory of its CPU
    if not fits(plan, own, cpu=cpu):
        would = "; or ".join(advise(run, config, own, ranks=engine.ranks, cpu=cpu)) or "a smaller model"
        raise UsageError(
            f"this run needs {plan.total / 2**30:.1f} GiB and {engine.device} has {free / 2**30:.1f} GiB free; what would fit: {would}"
        )


def _check_folder(out: Path, run: Run, found: list[Path]) -> None:
    """Refuse a folder with another run, or with this one finished."""
    if (out / REPORT).exists():
        raise UsageError(f"{out} holds a finished run; give another --out, or delete it to run again")
    if found:
        there, _, _ = checkpoints.read_run(found[-1])
        apart = differences(there, run)
        if apart:
            raise UsageError(
                f"{out} holds an unfinished run with other settings: {'; '.join(apart)}. Give another --out, or those settings."
            )


def is_first_process() -> bool:
    """Whether this is the process that reports, by what accelerate's launcher tells it."""
    return int(os.environ.get("RANK", "0")) == 0


def device_name(device: torch.device) -> str:
    """The accelerator's name, or "cpu" with the number of threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"


def versions() -> dict[str, str]:
    """What ran."""
    import importlib.metadata
    import platform

    names = ("loracle", "torch", "transformers", "accelerate", "safetensors", "peft")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
