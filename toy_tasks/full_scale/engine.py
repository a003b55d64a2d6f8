"""One process, DDP, or sharded base weights, behind the same few calls.

accelerate starts the processes and owns the device; transformers' loop wraps the model for DDP. They do not shard on a CPU,
so "fsdp" calls torch's `fully_shard` here: per decoder block, with the adapters left whole (`ignored_params`).
"""

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

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
        state = PartialState(cpu=cpu)
        self.ranks, self.rank, self.is_main = state.num_processes, state.process_index, state.is_main_process
        # accelerate numbers the CPU of each of several processes; moved to "cpu:0", a model on "cpu" would be copied
        self.device = torch.device("cpu") if state.device.type == "cpu" else state.device
        self.kind = ("ddp" if self.ranks > 1 else "single") if kind == "auto" else kind
        if (self.kind == "single") != (self.ranks == 1):
            raise UsageError(f"the engine is {kind!r} and there are {self.ranks} process(es); {LAUNCH}")
        # What accelerate's launcher leaves where it was asked for several and started one
        if kind == "auto" and self.ranks == 1 and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys():
            raise UsageError(f"accelerate started one process, and it seems that several were asked for; {LAUNCH}")

    def shard(self, model: Any, whole: Iterable[nn.Parameter]) -> None:
        """Spread the model's weights over the ranks, in place, but for `whole`; nothing unless the engine is "fsdp"."""
        if self.kind != "fsdp":
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from transformers.distributed.configuration_utils import DistributedConfig

        mesh = init_device_mesh(self.device.type, (self.ranks,))
        # A number cannot be sharded either
        ignored = {*whole, *(p for p in model.parameters() if p.dim() == 0)}
        for block in blocks(model):
            fully_shard(block, mesh=mesh, ignored_params=ignored)
        fully_shard(model, mesh=mesh, ignored_params=ignored)
        model.config.distributed_config = DistributedConfig(fsdp_size=self.ranks)  # by which the library's loop knows it

    def sum(self, value: float) -> float:
        """The sum over ranks of one number of each."""
        if self.ranks == 1:
            return value
        return float(reduce(torch.tensor(value, dtype=torch.float64, device=self.device), "sum"))

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
        PartialState().wait_for_everyone()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks of a transformers model. Raises UsageError if the model does not name their class."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in kinds]
    if not found:
        raise UsageError(f"{type(model).__name__} does not say what its decoder blocks are (_no_split_modules), so it cannot be sharded")
    return found
