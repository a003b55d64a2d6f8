"""Whole checkpoints in safetensors: what training changed, the optimizer, and what the run is, in a folder that gets its name last.

A run's folder holds `start.safetensors` (everything that the method made or changed when it was put into the model: factors,
frozen bases, corrected base weights), and `checkpoint-STEP/` with what a step changes. The pretrained model is not copied.

The loop decides when there is one. torch's distributed checkpoints write and read the tensors: every process its part of what
is sharded, whatever the number of processes was that wrote it.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..config import ToyError, UsageError, convert
from ..records import write_atomically
from .settings import FILE_BYTES, Run, differences

START, RUN = "start.safetensors", "run.json"
LOCK = ".lock"  # held while a process writes into a run's folder
SCHEMA = 2

P = ParamSpec("P")
T = TypeVar("T")


class Saved(NamedTuple):
    """One checkpoint, but for its tensors, which stay on disk until `restore_weights` and `restore_optimizer` read them."""

    folder: Path
    step: int
    optimizer: dict[str, Any]  # what is no tensor
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


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state: its tensors by name, and what JSON takes.

    (torch's `set_optimizer_state_dict` would not take it back where parameters have no state: all of SGD's, LoRA-Pro's B.)
    """
    state = optimizer.state_dict()
    flat = {f"{index}.{key}": value for index, values in state["state"].items() for key, value in values.items()}
    tensors = {f"optimizer.{key}": value for key, value in flat.items() if isinstance(value, Tensor)}
    numbers = {key: value for key, value in flat.items() if not isinstance(value, Tensor)}
    return tensors, {"numbers": numbers, "param_groups": state["param_groups"]}


def write(
    folder: Path, step: int, run: Run, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, scheduler: Any, *, main: bool
) -> None:
    """Write a checkpoint and delete the ones beside it once it is whole. Every rank has to call it.

    Raises:
        ToyError: it could not be written, or not by all ranks into one folder; the checkpoint before it is untouched.
    """
    tensors, rest = flatten_optimizer(optimizer)
    tensors |= {f"model.{name}": tensor.detach() for name, tensor in weights.items()}
    draft = folder.with_name(f".{folder.name}.part")
    if main:  # before any rank writes: the first thing that `save` does is to wait for all
        for left in folder.parent.glob(".checkpoint-*.part"):  # of this step or another
            shutil.rmtree(left, ignore_errors=True)
    try:
        with _by_torch():
            writer = HuggingFaceStorageWriter(str(draft), fqn_to_index_mapping=_files(tensors), save_distributed=True)
            save(tensors, storage_writer=writer)
        if main:
            _check_whole(draft, tensors)
            files = {path.name: path.stat().st_size for path in draft.iterdir()}
            numbers = {"schema": SCHEMA, "step": step, "run": dataclasses.asdict(run), "files": files}
            write_atomically(draft / RUN, json.dumps(numbers | {"optimizer": rest, "scheduler": scheduler.state_dict()}))
            if folder.exists():
                shutil.rmtree(folder)
            draft.replace(folder)
            for old in find(folder.parent):
                if old != folder:
                    shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        raise ToyError(f"{folder} could not be written: {error}. The checkpoint before it is untouched.") from error
    finally:
        if main:
            shutil.rmtree(draft, ignore_errors=True)


def _check_whole(draft: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what lacks a part: a process on another machine may have written it there. Reads the heads of the files only."""
    found = HuggingFaceStorageReader(str(draft)).read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        content = found.get(name)
        chunks = content.chunks if isinstance(content, TensorStorageMetadata) else []
        if not chunks or sum(chunk.sizes.numel() for chunk in chunks) != tensor.numel():
            raise ToyError(f"{name} is not whole in {draft}: --out has to be one folder for all processes, on a disk that they share")


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Which file each tensor goes into, counted from one."""
    found, written = {}, 0
    for name, tensor in tensors.items():
        found[name] = 1 + written // FILE_BYTES
        written += tensor.numel() * tensor.element_size()
    return found


@contextmanager
def _by_torch() -> Iterator[None]:
    """Without its warning that there is one process; and of what goes wrong the error itself, not what it is wrapped in: Ctrl-C too."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized", category=UserWarning)
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def find(out: Path) -> list[Path]:
    """The checkpoints in a run's folder, the oldest first."""
    found = [path for path in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def read_run(folder: Path) -> tuple[Run, int, dict[str, Any]]:
    """What a checkpoint says of itself: its run, its step, and the numbers of optimizer and schedule.

    Raises ToyError if it is missing, not whole, or of another version.
    """
    path = folder / RUN
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ToyError(
            f"{path} is missing or not whole: {error}. Delete {folder} to go on from the one before it, or from the beginning."
        ) from None
    schema = tree.get("schema") if isinstance(tree, dict) else None
    if schema != SCHEMA:
        raise ToyError(f"{path} has schema {schema}; this version of loracle reads schema {SCHEMA}")
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
    for name, size in tree["files"].items():
        path = folder / name
        if not path.exists() or path.stat().st_size != size:
            raise ToyError(f"{path} is missing or not whole. Delete {folder} to go on from the one before it, or from the beginning.")
    for path in folder.glob("*.safetensors"):  # all of which are read
        if path.name not in tree["files"]:
            raise ToyError(f"{path} is no part of the checkpoint, and its tensors would be taken for such. Move it elsewhere.")
    return Saved(folder, step, tree["optimizer"], tree["scheduler"])


def restore_weights(saved: Saved, model: nn.Module) -> None:
    """Put a checkpoint's weights into a model, sharded or whole, in place.

    Raises:
        ToyError: a name or shape does not fit: the checkpoint belongs to another method, rank or model.
    """
    there = tensors_of(model)
    tensors = {}
    for key, content in _contents(saved).items():
        name = key.removeprefix("model.")
        if name != key:
            _check_fit(name, content.size, there, saved.folder)
            tensors[key] = there[name].detach()
    _fill(tensors, saved)


def restore_optimizer(saved: Saved, optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer the state that `flatten_optimizer` took, sharded as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = {}
    for key, content in _contents(saved).items():
        if key.startswith("optimizer."):
            parameter, dtype = parameters[int(key.split(".")[1])], content.properties.dtype
            like_it = content.size == parameter.shape
            tensors[key] = torch.empty_like(parameter, dtype=dtype) if like_it else torch.empty(content.size, dtype=dtype)
    _fill(tensors, saved)
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *((f"optimizer.{key}", value) for key, value in saved.optimizer["numbers"].items())]:
        _, index, name = key.split(".", 2)
        state.setdefault(int(index), {})[name] = value
    groups = saved.optimizer["param_groups"]
    for group in groups:  # JSON has no tuples
        group.update({key: tuple(value) for key, value in group.items() if key == "betas"})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _contents(saved: Saved) -> dict[str, TensorStorageMetadata]:
    """Shape and dtype of each tensor of a checkpoint, by name."""
    try:
        found = HuggingFaceStorageReader(str(saved.folder)).read_metadata().state_dict_metadata
    except (OSError, SafetensorError) as error:
        raise ToyError(f"{saved.folder} is not whole: {error}. Delete it to go on from the one before it, or from the beginning.") from None
    return {name: content for name, content in found.items() if isinstance(content, TensorStorageMetadata)}


def _fill(tensors: dict[str, Tensor], saved: Saved) -> None:
    """Read a checkpoint's tensors of these names, in place."""
    with _by_torch():
        load(tensors, storage_reader=HuggingFaceStorageReader(str(saved.folder)))


@torch.no_grad()
def put(model: nn.Module, weights: Mapping[str, Tensor], where: Path) -> None:
    """Put saved tensors into a model that is not sharded, by name, in place.

    Raises:
        ToyError: a name or shape does not fit: the file belongs to another method, rank or model.
    """
    there = tensors_of(model)
    for name, value in weights.items():
        _check_fit(name, value.shape, there, where)
        there[name].copy_(value)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _check_fit(name: str, shape: torch.Size, there: Mapping[str, Tensor], where: Path) -> None:
    if name not in there or there[name].shape != shape:
        found = f"{tuple(there[name].shape)}" if name in there else "no such tensor"
        raise ToyError(f"{where} has {name} {tuple(shape)} and the model {found}: it belongs to another method, rank or model")
