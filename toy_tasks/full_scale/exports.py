"""A finished or unfinished run as an adapter that PEFT loads, or as a merged model that transformers loads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import UsageError
from ..methods import Change, Method
from ..records import write_atomically
from . import checkpoints
from .settings import Run
from .training import SMALL_FOLDER, attach, load_model, model_folder, stand_in_gradients

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
READING = "loracle.json"  # beside an exported model: how the run read its examples, for `loracle full eval`


class Trained(NamedTuple):
    """What a run's last checkpoint holds, on the CPU, in evaluation mode."""

    run: Run
    model: Any
    tokenizer: Any
    method: Method
    names: list[str]  # of the adapted layers
    start: dict[str, Change]  # what each adapted layer added at the start, where that was taken out of the weight


def load_trained(out: Path, *, cache: Path | None = None) -> Trained:
    """The model of a run as its last checkpoint left it.

    Raises:
        UsageError: the folder has no checkpoint, or the pretrained model is gone.
        ToyError: a file is not whole.
    """
    found = checkpoints.find(out)
    if not found:
        raise UsageError(f"{out} has no checkpoint; give the folder of a run, such as runs/full/lora")
    run, _, _ = checkpoints.read_run(found[-1])
    model, tokenizer = load_model(model_folder(run, None, cache=cache or SMALL_FOLDER), getattr(torch, run.dtype_name))
    method, _, _ = attach(run, model, stand_in_gradients(model))
    start_file = out / checkpoints.START
    checkpoints.put(model, checkpoints.load_tensors(start_file), start_file)
    layers = method.layers(model)
    start = {name: method.change(layer) for name, layer in layers.items()} if method.starts_inside else {}
    checkpoints.restore_weights(checkpoints.read(found[-1], run), model)
    return Trained(run, model.eval(), tokenizer, method, list(layers), start)


@torch.no_grad()
def total_change(trained: Trained, name: str) -> Change:
    """What training added to a layer's pretrained weight, as factors: of rank r, or 2r where the start was taken out of it."""
    now = trained.method.change(trained.model.get_submodule(name))
    if name not in trained.start:
        return now
    before = trained.start[name]
    return Change(A=torch.cat([now.A, before.A]), B=torch.cat([now.B, -before.B], dim=1))


@torch.no_grad()
def merged_weight(layer: nn.Module, in_features: int) -> Tensor:
    """The weight (out, in) that a layer applies, read off its outputs for the identity, in at least float32."""
    working = torch.promote_types(next(layer.parameters()).dtype, torch.float32)
    layer = layer.to(working)
    zero = layer(torch.zeros(1, in_features, dtype=working))
    weight: Tensor = (layer(torch.eye(in_features, dtype=working)) - zero).T.contiguous()
    return weight


def export(out: Path, to: Path, kind: str | None = None, *, cache: Path | None = None) -> tuple[str, str]:
    """Export a run: kind "peft" or "merged" (default: an adapter if there can be one). Returns the kind and why it is that.

    Raises:
        UsageError: the kind is unknown, `to` is there already, or no adapter can say what this run trained.
    """
    if kind not in (None, "peft", "merged"):
        raise UsageError(f"the kind of export is {kind!r}; needed peft or merged")
    if to.exists():
        raise UsageError(f"{to} is there already; give another folder")
    trained = load_trained(out, cache=cache)
    own_format = trained.run.method == "randlora"
    obstacle = unpaired(trained) if own_format else trained.method.obstacle(weight_decay=trained.run.weight_decay)
    if kind == "peft" and obstacle:
        raise UsageError(f"{trained.run.method} cannot be exported as an adapter: {obstacle}; use --kind merged")
    if kind == "merged" or obstacle:
        write_merged(trained, to)
        made = "merged", obstacle or "asked for"
    else:
        made = "peft", (write_randlora if own_format else write_lora)(trained, to)
    run = trained.run
    write_atomically(to / READING, json.dumps({"template": run.template, "sequence_length": run.sequence_length}, indent=1))
    return made


def load_adapter(folder: Path) -> tuple[Any, Any]:
    """The model of a folder with PEFT's adapter, on the base model that it names, and that model's tokenizer.

    Raises:
        UsageError: the base model is not where the adapter says, or the adapter does not fit it.
    """
    from peft import PeftModel

    base = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    try:
        model, tokenizer = load_model(str(base), torch.float32)
    except UsageError as error:
        raise UsageError(f"{folder} is an adapter of {base!r} ({CONFIG}), from where it is loaded: {error}") from None
    try:
        return PeftModel.from_pretrained(model, folder), tokenizer
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"the adapter {folder} could not be put on {base!r}: {error}") from None


def write_lora(trained: Trained, to: Path) -> str:
    """An adapter in PEFT's LoRA format, scaling 1: alpha equals the rank, and the scaling is in B. Returns its rank in words."""
    from peft import LoraConfig

    changes = {name: total_change(trained, name) for name in trained.names}
    ranks = {name: change.A.shape[0] for name, change in changes.items()}
    rank = max(ranks.values())
    lower = {name: own for name, own in ranks.items() if own < rank}  # layers too small for the rank of the others
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=lower,
        alpha_pattern=lower,
        target_modules=list(changes),
        task_type="CAUSAL_LM",
        base_model_name_or_path=trained.model.name_or_path,
    )
    tensors = {f"model.{name}.lora_A.weight": change.A for name, change in changes.items()}
    tensors |= {f"model.{name}.lora_B.weight": change.B for name, change in changes.items()}
    _write_adapter(to, config, tensors)
    why = (
        "twice that of the run, since the factors of the start were taken out of the pretrained weight"
        if trained.start
        else "that of the run"
    )
    return f"LoRA of rank {rank}, {why}"


def unpaired(trained: Trained) -> str | None:
    """Why PEFT's RandLoRA cannot hold this one, or None if it can.

    PEFT flattens the columns of B term by term and meets them with the rows of A rank by rank, so that which two meet depends
    on the number of terms.
    """
    layers = trained.method.layers(trained.model).values()
    terms = sorted({len(layer.lambdas) for layer in layers})
    if len(terms) == 1 or trained.run.rank == 1:
        return None
    counts = " and ".join(map(str, terms))
    return f"its layers have {counts} terms, for which PEFT pairs the columns of the one B that they share in different orders"


@torch.no_grad()
def write_randlora(trained: Trained, to: Path) -> str:
    """An adapter in PEFT's RandLoRA format, with its bases, B in the order in which PEFT reads it. Returns its rank in words.

    PEFT itself writes the bases once more for each layer, and warns when they are not there. Its layers share one pair all the same.
    """
    from peft import RandLoraConfig

    layers = trained.method.layers(trained.model)
    first = next(iter(layers.values()))
    A, B, rank = first.pair.A, first.pair.B.clone(), trained.run.rank
    terms = max(len(layer.lambdas) for layer in layers.values())
    # Read as (large, rank, terms): column (j, k) of B stands where the row (k, j) of the scaled A is
    B[:, :terms] = B[:, :terms].mT.reshape(len(B), terms, rank)
    config = RandLoraConfig(
        r=rank,
        randlora_alpha=first.scaling * rank,  # PEFT divides it by the rank
        target_modules=list(layers),
        save_projection=True,
        task_type="CAUSAL_LM",
        base_model_name_or_path=trained.model.name_or_path,
    )
    # One scaling for all layers: what is particular to one goes into its diagonals
    tensors = {f"model.{name}.randlora_lambda": layer.lambdas.mT * (layer.scaling / first.scaling) for name, layer in layers.items()}
    tensors |= {f"model.{name}.randlora_gamma": layer.gammas for name, layer in layers.items()}
    _write_adapter(to, config, {**tensors, "randlora_A": A[:, None], "randlora_B": B})
    return f"RandLoRA of basis rank {rank}, with its bases once; PEFT warns that each layer's copy of them is missing, and needs none"


def _write_adapter(to: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    checkpoints.save_tensors({f"base_model.{name}": tensor for name, tensor in tensors.items()}, to / ADAPTER)
    config.inference_mode = True
    tree = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    write_atomically(to / CONFIG, json.dumps(tree, indent=1, default=str))


def write_merged(trained: Trained, to: Path) -> None:
    """The model with plain linear layers in the place of the adapted ones, in the run's precision, and its tokenizer."""
    model = trained.model
    for name in trained.names:
        layer = model.get_submodule(name)
        if type(layer) is nn.Linear:
            continue
        base = next(module for module in layer.modules() if type(module) is nn.Linear)
        out_features, in_features = base.weight.shape
        dtype, bias = base.weight.dtype, base.bias
        linear = nn.Linear(in_features, out_features, bias=bias is not None, dtype=dtype)
        linear.weight.data.copy_(merged_weight(layer, in_features))
        if bias is not None:
            linear.bias.data.copy_(bias)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    model.save_pretrained(to)
    trained.tokenizer.save_pretrained(to)
