"""One process, DDP, or sharded base weights, behind the same few calls.

accelerate starts the processes, owns the device and wraps the model for DDP. It does not shard on a CPU, so "fsdp" calls
torch's `fully_shard` here: per decoder block, with the adapters left whole (`ignored_params`), their gradients averaged
over the ranks once per optimizer step.
"""

import os
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import vector_to_parameters

from ..config import UsageError

# Without --multi_gpu, or with its own --cpu, accelerate starts one process where it finds no more than one GPU
LAUNCH = (
    "start one with `loracle full run` or --engine single, several with "
    "`accelerate launch --multi_gpu --num_processes N -m loracle.toy_tasks.full_scale SLUG` (without GPUs too: --cpu behind SLUG)"
)


class Engine:
    """How a model is spread over the processes that accelerate has started.

    `kind` is "single", "ddp", "fsdp", or "auto": one process alone, several with DDP.

    Raises:
        UsageError: there are several processes and `kind` is "single", or one and it is another, or one where several were asked for.
    """

    def __init__(self, kind: str = "auto", *, cpu: bool = False) -> None:
        # Every rank holds the same buffers from the start: sending them again in every forward pass would be waste
        handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]
        self.accelerator = Accelerator(cpu=cpu, kwargs_handlers=handlers)
        self.ranks, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        # accelerate numbers the CPU of each of several processes; moved to "cpu:0", a model on "cpu" would be copied
        numbered, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.device = torch.device("cpu") if numbered.type == "cpu" else numbered
        self.whole: list[nn.Parameter] = []  # trained, and not sharded
        self.kind = ("ddp" if self.ranks > 1 else "single") if kind == "auto" else kind
        if (self.kind == "single") != (self.ranks == 1):
            raise UsageError(f"the engine is {kind!r} and there are {self.ranks} process(es); {LAUNCH}")
        # What accelerate's launcher leaves where it was asked for several and started one
        if kind == "auto" and self.ranks == 1 and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
            raise UsageError(f"accelerate started one process, and it seems that several were asked for; {LAUNCH}")

    def prepare(self, model: nn.Module, whole: Iterable[nn.Parameter]) -> nn.Module:
        """The model as it is called in training; `model` itself is changed in place (moved, or sharded but for `whole`)."""
        model.to(self.device)
        if self.kind == "fsdp":
            self.whole = list(whole)
            self._shard(model)
            return model
        with warnings.catch_warnings():
            # Its successor is not there in older versions of torch, and accelerate does not know it
            warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
            prepared: nn.Module = self.accelerator.prepare_model(model)
        return prepared

    def _shard(self, model: nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.ranks,))
        # A number cannot be sharded either
        ignored = {*self.whole, *(p for p in model.parameters() if p.dim() == 0)}
        for block in blocks(model):
            fully_shard(block, mesh=mesh, ignored_params=ignored)
        fully_shard(model, mesh=mesh, ignored_params=ignored)

    def last_backward(self, prepared: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around a backward pass: gradients meet those of the other ranks in the last one before an optimizer step only."""
        if self.kind == "fsdp":
            prepared.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext() if last else self.accelerator.no_sync(prepared)

    def average_gradients(self) -> None:
        """The mean over ranks of the gradients of what was left whole; DDP and FSDP take that of the rest."""
        if self.kind != "fsdp":
            return
        grads = [p.grad for p in self.whole if p.grad is not None]
        for dtype in {grad.dtype for grad in grads}:
            same = [grad for grad in grads if grad.dtype == dtype]
            mean: Tensor = self.accelerator.reduce(torch.cat([grad.flatten() for grad in same]), "mean")
            vector_to_parameters(mean, same)

    def sum(self, value: float) -> float:
        """The sum over ranks of one number of each."""
        if self.ranks == 1:
            return value
        return float(self.accelerator.reduce(torch.tensor(value, dtype=torch.float64, device=self.device), "sum"))

    def take_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Every rank gets rank 0's values, in place; a tensor that several layers share is sent once."""
        if self.ranks == 1:
            return
        sent = set()
        for tensor in tensors:
            if tensor.data_ptr() not in sent:
                sent.add(tensor.data_ptr())
                there = tensor.detach().to(self.device).contiguous()
                dist.broadcast(there, src=0)
                tensor.detach().copy_(there)

    def wait(self) -> None:
        """Until every rank is here."""
        self.accelerator.wait_for_everyone()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks of a transformers model. Raises UsageError if the model does not name their class."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in kinds]
    if not found:
        raise UsageError(f"{type(model).__name__} does not say what its decoder blocks are (_no_split_modules), so it cannot be sharded")
    return found


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every rank has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded if `like` is."""
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value.to(like.device)
