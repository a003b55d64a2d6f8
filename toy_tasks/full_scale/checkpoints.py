"""Whole checkpoints in safetensors: what training changed, the optimizer, and what the run is, in a folder that gets its name last.

A run's folder holds `start.safetensors` (everything that the method made or changed when it was put into the model: factors,
frozen bases, corrected base weights), and `checkpoint-STEP/` with what a step changes. The pretrained model is not copied.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import ToyError, UsageError, convert
from ..records import write_atomically
from .engine import gathered, spread_like
from .settings import Run, differences

START, STATE, RUN = "start.safetensors", "state.safetensors", "run.json"
LOCK = ".lock"  # held while a process writes into a run's folder
SCHEMA = 1

P = ParamSpec("P")
T = TypeVar("T")


class Saved(NamedTuple):
    """One checkpoint: the trained tensors by name, the optimizer's state, and the numbers beside them."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors whole or not at all, tensors that share memory each for itself.

    Raises:
        ToyError: the disk is full or cannot be written; what was there before is untouched.
    """
    draft = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_apart(tensors), draft)
        _flush(draft)
        os.replace(draft, path)
    except (OSError, SafetensorError) as error:
        raise ToyError(f"{path} could not be written: {error}. What was there before is untouched.") from error
    finally:
        draft.unlink(missing_ok=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them; only where two share memory the second is copied."""
    found, memory = {}, set()
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        place = here.untyped_storage().data_ptr()
        found[name] = here.clone() if place in memory else here
        memory.add(place)
    return found


def _flush(path: Path) -> None:
    """Wait until the bytes are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ToyError if it is missing or not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except (OSError, SafetensorError) as error:
        raise ToyError(f"{path} is missing or not whole: {error}. Delete the run's folder to start from the beginning.") from None


def alone(function: Callable[P, T]) -> Callable[P, T]:
    """A function (run, out, ...) that has the folder `out` for itself, and leaves none if it only refuses.

    Raises ToyError if another process writes there. A process that died holds nothing: the lock is the system's.
    """

    @functools.wraps(function)
    def held(*args: P.args, **kwargs: P.kwargs) -> T:
        out = kwargs.get("out", args[1] if len(args) > 1 else None)
        if int(os.environ.get("RANK", "0")) > 0:  # the first process holds it for all
            return function(*args, **kwargs)
        assert isinstance(out, Path)
        was_there, lock = out.exists(), FileLock(out / LOCK, timeout=0)
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise ToyError(f"another process is writing into {out}; wait for it, or give another --out") from None
        except OSError as error:
            raise ToyError(f"{out} cannot be written: {error.strerror}") from None
        try:
            return function(*args, **kwargs)
        except UsageError:
            if not was_there and not find(out):
                shutil.rmtree(out, ignore_errors=True)
            raise
        finally:
            (out / LOCK).unlink(missing_ok=True)
            lock.release()

    return held


def _collect(tensor: Tensor, found: dict[str, Tensor], name: str, *, main: bool) -> None:
    """Put the whole of a tensor that may be sharded among those `found` by `main`. One at a time, moved off the device, so
    that no device holds more than one whole: all of them may have no room there."""
    whole = gathered(tensor.detach())
    if main:
        found[name] = whole.cpu()


def flatten_optimizer(optimizer: torch.optim.Optimizer, *, main: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by name, gathered from all ranks by `main`, and JSON for the rest.

    (torch's `set_optimizer_state_dict` would not take it back where parameters have no state: all of SGD's, LoRA-Pro's B.)
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                _collect(value, tensors, f"optimizer.{index}.{key}", main=main)
            else:
                numbers[f"{index}.{key}"] = value
    return tensors, {"numbers": numbers, "param_groups": state["param_groups"]}


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: Saved) -> None:
    """Give an optimizer the state that `flatten_optimizer` took, sharded as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**saved.optimizer["tensors"], **saved.optimizer["numbers"]}.items():
        index, _, name = key.partition(".")
        if isinstance(value, Tensor) and value.shape == parameters[int(index)].shape:
            value = spread_like(value, parameters[int(index)])
        state.setdefault(int(index), {})[name] = value
    groups = saved.optimizer["param_groups"]
    for group in groups:  # JSON has no tuples
        group.update({key: tuple(value) for key, value in group.items() if key == "betas"})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def write(
    out: Path, step: int, run: Run, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, scheduler: Any, *, main: bool
) -> None:
    """Write `checkpoint-STEP` and delete the ones before it once it is whole. Every rank has to call it; `main` writes.

    Raises:
        ToyError: it could not be written; the checkpoint before it is untouched.
    """
    tensors, rest = flatten_optimizer(optimizer, main=main)
    for name, tensor in weights.items():
        _collect(tensor, tensors, f"model.{name}", main=main)
    if not main:
        return
    folder, draft = out / f"checkpoint-{step:06d}", out / f".checkpoint-{step:06d}.part"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        save_tensors(tensors, draft / STATE)
        numbers = {"schema": SCHEMA, "step": step, "run": dataclasses.asdict(run), "optimizer": rest, "scheduler": scheduler.state_dict()}
        write_atomically(draft / RUN, json.dumps(numbers))
        if folder.exists():
            shutil.rmtree(folder)
        draft.replace(folder)
    except OSError as error:
        raise ToyError(f"{folder} could not be written: {error}. The checkpoint before it is untouched.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for old in find(out):
        if old != folder:
            shutil.rmtree(old)


def find(out: Path) -> list[Path]:
    """The checkpoints in a run's folder, the oldest first."""
    return sorted(path for path in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{6}", path.name))


def read_run(folder: Path) -> tuple[Run, int, dict[str, Any]]:
    """What a checkpoint says of itself: its run, its step, and the numbers of optimizer and schedule.

    Raises ToyError if it is missing, not whole, or of another version.
    """
    path = folder / RUN
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ToyError(f"{path} is missing or not whole: {error}. Delete {folder} to start from the beginning.") from None
    if tree.get("schema") != SCHEMA:
        raise ToyError(f"{path} has schema {tree.get('schema')}; this version of loracle reads schema {SCHEMA}")
    return convert(tree["run"], Run, str(path)), tree["step"], tree


def read(folder: Path, run: Run) -> Saved:
    """A checkpoint of this run.

    Raises:
        ToyError: it is missing or not whole, or belongs to another method, rank or setting; the message lists them.
    """
    there, step, tree = read_run(folder)
    found = differences(there, run)
    if found:
        raise ToyError(f"{folder} is a checkpoint of another run: {'; '.join(found)}. Give another --out, or the settings it has.")
    tensors = load_tensors(folder / STATE)
    moments = {name.removeprefix("optimizer."): tensor for name, tensor in tensors.items() if name.startswith("optimizer.")}
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    return Saved(step, weights, {**tree["optimizer"], "tensors": moments}, tree["scheduler"])


@torch.no_grad()
def put(model: torch.nn.Module, weights: Mapping[str, Tensor], where: Path) -> None:
    """Put saved tensors into a model by name, in place.

    Raises:
        ToyError: a name or shape does not fit: the file belongs to another method, rank or model.
    """
    there = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in weights.items():
        if name not in there or there[name].shape != value.shape:
            found = f"{tuple(there[name].shape)}" if name in there else "no such tensor"
            raise ToyError(f"{where} has {name} {tuple(value.shape)} and the model {found}: it belongs to another method, rank or model")
        there[name].copy_(spread_like(value.to(there[name].dtype), there[name]))
