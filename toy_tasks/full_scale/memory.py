"""Memory: what a run used, and what it will need."""

import copy
import math
import os
import resource
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import UsageError
from .engine import blocks
from .hub import no_hub, short
from .settings import FILE_BYTES, ROWS_OF_ESTIMATE, SMALL, Run


def reset_peak_memory(device: torch.device) -> None:
    """Start the measurement of the peak anew. On a CPU that is the whole process's, where the system lets it be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the highest resident size
    except OSError:
        return


def peak_memory(device: torch.device) -> int:
    """The peak in bytes since the reset: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# What a run will need

BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
# Python, torch and transformers themselves, which count on a CPU; so does the code that oneDNN writes for the products in
# bfloat16 (half a MiB for each new size of one, and no more for larger matrices), which a GPU does not need
RUNTIME = 0.6 * 2**30
DDP_SENT = 2 * 250 * 2**20  # torch's DDP sends the first process's tensors in such pieces, two on their way at a time
SAFE = 0.95  # of a device's memory; the rest goes to fragments and the libraries' own buffers


@dataclass(frozen=True)
class Plan:
    """Bytes that one device will need, by what they hold."""

    weights: int  # the pretrained ones, this device's part
    adapters: int  # what the method adds, trained or not
    gradients: int
    optimizer: int  # what it keeps from step to step
    activations: int  # of one micro-batch, with what its backward pass needs at its fullest
    gathered: int  # sharded weights put together while a block computes
    stepping: int  # what the optimizer's own computation needs, instead of the last two
    setup: int  # what is needed before training instead of the five before: gradients for a start, weights on their way
    saving: int  # what a checkpoint needs beside weights, adapters and optimizer
    trainable: int  # parameters, not bytes

    @property
    def total(self) -> int:
        """The peak in bytes: of training, of its preparation or of a checkpoint, whichever is highest."""
        training = self.gradients + self.optimizer + max(self.activations + self.gathered, self.stepping)
        return self.weights + self.adapters + max(training, self.setup, self.optimizer + self.saving)


class Counts(NamedTuple):
    """Numbers that a method adds to one layer."""

    trained: int
    frozen: int


def added(method: str, out: int, inn: int, rank: int, options: Mapping[str, Any]) -> Counts:
    """What a method adds to a layer (out, in); bases that all layers share are counted by `shared`."""
    factors = rank * (out + inn)
    match method:
        case "full":
            return Counts(out * inn, 0)
        case "lora_sb":
            return Counts(rank * rank, factors)
        case "nlora":
            return Counts(factors + rank * rank, 0)
        case "loldu":
            rank = min(rank, out, inn)
            scalings = 2  # the one in use, which may be trained, and the one of the start
            more = int(bool(options.get("train_scaling", False)))
            return Counts(rank + more, rank * (out + inn) + out + rank + scalings - more)
        case "randlora":
            small = min(out, inn)
            return Counts(math.ceil(small / rank) * (rank + small), 0)
        case "block_lora":
            return Counts(rank * out + rank // int(options.get("blocks", 2)) * inn, 0)
        case _:
            return Counts(factors, 0)


def shared(method: str, shapes: Collection[tuple[int, int]], rank: int) -> int:
    """Numbers that all layers of a method share: RandLoRA's bases."""
    if method != "randlora":
        return 0
    small, large = sorted(max(shape[side] for shape in shapes) for side in (0, 1))
    return rank * small + math.ceil(small / rank) * rank * large


def estimate(run: Run, config: Any, *, ranks: int = 1, cpu: bool = False) -> Plan:
    """The memory that a run needs on each of `ranks` devices, for a model of this transformers config. Computes nothing large.

    With `cpu` the devices are processes on CPUs, which exchange by gloo, and the first of which needs most.

    Raises:
        UsageError: the target modules match no layer.
    """
    from ...reference._adapters import matching_linears
    from ..methods import make

    method, size, width = make(run.method, run.options), BYTES[run.dtype_name], max(4, BYTES[run.dtype_name])
    model = on_meta(config)
    try:
        shapes = [(layer.out_features, layer.in_features) for layer in matching_linears(model, run.pattern).values()]
    except ValueError as error:
        raise UsageError(str(error)) from None
    base = sum(p.numel() for p in model.parameters())
    adapted, largest = (of(out * inn for out, inn in shapes) for of in (sum, max))
    counts = [added(run.method, out, inn, run.rank, run.options) for out, inn in shapes]
    trained = sum(count.trained for count in counts)
    frozen = sum(count.frozen for count in counts) + shared(run.method, shapes, run.rank)
    full = run.method == "full"
    sharded = ranks if run.engine == "fsdp" else 1
    trained_whole = trained * (size if full else width)
    trained_bytes = trained_whole // (sharded if full else 1)
    moments, stepping, decayed = 0 if run.optimizer == "sgd" else 2 * trained_bytes, 0, 0
    if run.optimizer != "sgd" and getattr(method, "mode", "") == "full":  # LoRA-Pro keeps moments of the whole weight
        moments, stepping, decayed = 2 * width * adapted, 6 * width * largest, size * adapted if run.weight_decay else 0
    adapters = 0 if full else width * trained + size * frozen
    rows = run.rows_at_once(ranks)
    activations = activation_bytes(run, config, rows, full=full)
    gradients, gathered, setup = trained_bytes, 0, 0
    # In main memory, the bytes of a file twice as they are put together; of what all ranks have, each writes its share
    written = (trained_bytes + moments) // (1 if full and sharded > 1 else ranks) + decayed // ranks
    saving = 2 * min(written, FILE_BYTES) if cpu else 0
    if ranks > 1 and sharded == 1:
        gradients *= 2  # DDP's buckets
        saving += trained_bytes  # the same
        setup = min(size * base + adapters, DDP_SENT)
    elif ranks > 1:
        whole = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
        # One block computes while the next is fetched. Beside them are a block's gradients until they are spread, or, in
        # the forward pass, what gloo fetches a block into before it is copied to where it is asked for
        at_once = 3 if full or cpu else 2
        gathered = size * (at_once * max(whole) + base - sum(whole))
        setup = size * (base - base // ranks)  # every device has all weights until they are sharded
        if full and run.batch_size > rows * ranks:
            gradients = trained_whole  # not spread before the last of the accumulated passes
    if hasattr(method, "gradient_samples"):  # the sums of the weights' gradients besides
        sums = width * adapted + size * largest
        sums += activation_bytes(run, config, ROWS_OF_ESTIMATE, full=True, plain=True)
        setup = max(setup, sums + (size * (base - base // sharded)))
    return Plan(
        weights=size * base // sharded,
        adapters=adapters,
        gradients=gradients,
        optimizer=moments,
        activations=activations,
        gathered=gathered,
        setup=setup,
        stepping=stepping,
        saving=saving,
        trainable=trained,
    )


def on_meta(config: Any) -> Any:
    """A model without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def activation_bytes(run: Run, config: Any, rows: int, *, full: bool, plain: bool = False) -> int:
    """What one micro-batch keeps for its backward pass, and the logits' own peak: counted on models of one and two blocks
    that have no memory, which say what a block keeps. `plain` leaves checkpointing out."""
    one, two = (_saved(run, config, rows, blocks, full) for blocks in (1, 2))
    block, layers, size = two - one, int(config.num_hidden_layers), BYTES[run.dtype_name]
    tokens = rows * run.sequence_length
    width = max(4, size)
    # The logits, their copy in the loss's precision, and the gradient of each; the log-probabilities are among what is saved
    head = tokens * int(config.vocab_size) * (2 * width + (size if size < width else 0))
    if run.gradient_checkpointing and not plain:
        # A block's input each; beside them the logits' peak and later one block at a time
        return layers * tokens * int(config.hidden_size) * size + (one - block) + max(head, block)
    return one + (layers - 1) * block + head


class _Attention(torch.autograd.Function):
    """Attention that keeps what a fused kernel keeps: its inputs and its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError("this attention only counts what is kept; it has no gradient")


class _Adapted(nn.Module):
    """A layer with two factors beside it: what any adapter keeps is about what these keep."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device="meta"))
        self.B = nn.Parameter(torch.empty(base.out_features, rank, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        base: Tensor = self.base(x)
        return base + nn.functional.linear(nn.functional.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


def _saved(run: Run, config: Any, rows: int, layers: int, full: bool) -> int:
    """Bytes that the forward pass and the loss keep, of a model with so many blocks, weights left out."""
    from transformers import AttentionInterface

    from ...reference._adapters import matching_linears, replace_linears
    from .evaluation import token_losses

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, None]:
        return _Attention.apply(query, key, value).transpose(1, 2), None

    AttentionInterface.register("loracle_counting", attention)
    short = copy.deepcopy(config)
    short.num_hidden_layers = layers
    if getattr(short, "layer_types", None):
        short.layer_types = short.layer_types[:layers]
    short._attn_implementation = "loracle_counting"
    model = on_meta(short).to(getattr(torch, run.dtype_name)).train()
    if full:
        model.requires_grad_(False)
        for layer in matching_linears(model, run.pattern).values():
            layer.weight.requires_grad_(True)
    else:
        replace_linears(model, run.pattern, lambda linear: _Adapted(linear, run.rank))
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}  # storages, which stay alive so that none is counted under the number of another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    ids = torch.zeros(rows, run.sequence_length, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_losses(model(input_ids=ids, use_cache=False).logits, ids)
    return sum(storage.nbytes() for storage in kept.values())


def fits(plan: Plan, memory: float, *, cpu: bool) -> bool:
    """Whether a plan goes into so many bytes of a device."""
    return plan.total + (RUNTIME if cpu else 0) <= SAFE * memory


def advise(run: Run, config: Any, memory: float, *, ranks: int = 1, cpu: bool, most_devices: int = 64) -> list[str]:
    """What would fit into `memory` of each of `ranks` devices, the smallest change first: options of `loracle full run`, one
    line each. Empty if nothing found does. With `cpu` the devices are processes, and more of them share the same memory.
    """
    found: list[str] = []

    def try_(how: str, changed: Run, devices: int) -> None:
        own = memory * ranks / devices if cpu else memory
        if fits(estimate(changed, config, ranks=devices, cpu=cpu), own, cpu=cpu):
            found.append(how)

    rows = run.rows_at_once(ranks)
    halves = [rows >> k for k in range(1, rows.bit_length()) if rows % (1 << k) == 0]
    for size in halves:
        if not found:
            try_(f"--micro-batch {size}", replace(run, micro_batch=size), ranks)
    smallest = min(halves, default=rows)
    for size in (rows, *halves):
        if not any("--checkpointing" in how for how in found):
            try_(f"--checkpointing --micro-batch {size}", replace(run, micro_batch=size, gradient_checkpointing=True), ranks)
    devices = 2 * ranks if run.engine == "fsdp" or ranks == 1 else ranks
    while not found and devices <= most_devices:
        if run.batch_size % (smallest * devices) == 0:
            smaller = replace(run, micro_batch=smallest, gradient_checkpointing=True, engine="fsdp")
            try_(f"--engine fsdp --checkpointing --micro-batch {smallest} on {devices} devices", smaller, devices)
        devices *= 2
    return found


def device_memory(device: torch.device) -> int:
    """Bytes of a device that are free: of a GPU as its driver says, of a CPU as the system does."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return found[0] if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def known_config(model: str, shape: Sequence[int] | None = None) -> Any:
    """The transformers config of a model: from `shape` (hidden, intermediate, layers, heads, vocabulary), of the small
    model, of two well-known ones without a network, or as transformers finds it.

    Raises UsageError if there is none.
    """
    from transformers import AutoConfig, LlamaConfig, MistralConfig

    from . import small

    if shape is not None:
        hidden, intermediate, layers, heads, vocabulary = shape
        return LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            vocab_size=vocabulary,
        )
    if model == SMALL:
        return small.config()
    # The defaults of these classes are the shapes of these models
    for name, kind in (("meta-llama/Llama-2-7b-hf", LlamaConfig), ("mistralai/Mistral-7B-v0.1", MistralConfig)):
        if model == name:
            return kind()
    why = no_hub(model)
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UsageError(f"the shape of the model {model!r} could not be had: {why or short(error)}") from None
