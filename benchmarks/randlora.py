"""Time and memory of our RandLoRA layer as ratios to PEFT's, in one process: forward, and forward with backward.

python benchmarks/randlora.py [--cuda]

Both layers have the same shape, basis rank and input. Calls alternate, and the ratio of times is the median of those of the rounds,
since clock rates drift: on a CPU of the processor time of the one thread, which other programs disturb little. *Peak* is the
most memory that tensors made during the call hold at once, gradients included; *kept* is what the graph keeps between forward
and backward beyond parameters, bases and the input. On a CPU both are counted storage by storage as operators make them; with a
GPU the peak is the allocator's. Numbers below 1 are in our favour.
"""

import sys
import time
import weakref
from collections.abc import Callable
from statistics import median
from typing import Any

import _results
import torch
from peft import RandLoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loracle.reference.randlora import BasePair, RandLoRALinear, draw_bases

# out, in: square, tall, wide
SHAPES, RANK, BATCH, ROUNDS = ((1024, 1024), (2048, 768), (768, 2048)), 32, 512, 80


class Live(TorchDispatchMode):
    """Counts the bytes of storages that operators make, while they live, and the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {a.untyped_storage()._cdata for a in tree_leaves((args, kwargs or {})) if isinstance(a, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known | given:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed() -> None:
            self.now -= size
            self.known.discard(key)

        weakref.finalize(storage, freed)


def layers(shape: tuple[int, int], device: str) -> tuple[nn.Module, nn.Module]:
    """Our layer and PEFT's, with diagonals that are not zero."""
    torch.manual_seed(0)
    out_features, in_features = shape
    linear = nn.Linear(in_features, out_features, device=device)
    ours: nn.Module = RandLoRALinear(linear, BasePair(*draw_bases([linear.weight], rank=RANK)))
    model = nn.Sequential(nn.Linear(in_features, out_features, device=device))
    theirs = get_peft_model(model, RandLoraConfig(r=RANK, target_modules=["0"])).base_model.model[0]
    for layer in (ours, theirs):
        for parameter in layer.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
    return ours, theirs


def seconds(*calls: Callable[[], None], device: str) -> list[list[float]]:
    """Seconds of each call in every round; the calls alternate, and so does which of them comes first."""
    times: list[list[float]] = [[] for _ in calls]
    for i in range(ROUNDS):
        for call, taken in list(zip(calls, times, strict=True))[:: (-1) ** i]:
            if device == "cuda":
                torch.cuda.synchronize()
            clock = time.perf_counter if device == "cuda" else time.thread_time
            start = clock()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(clock() - start)
    return times


def kept(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes of the storages that the graph of a forward keeps, without those of parameters, buffers and the input."""
    own = {t.untyped_storage()._cdata for t in (x, *layer.parameters(), *layer.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
        del y
    return sum(found.values())


def peak(call: Callable[[], None], device: str) -> int:
    """The most bytes that tensors made in the call hold at once."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with Live() as live:
        call()
    return live.peak


def compare(shape: tuple[int, int], input_gradient: bool, device: str) -> dict[str, Any]:
    """All ratios for one shape."""
    pair = layers(shape, device)
    x = torch.randn(BATCH, shape[1], device=device, requires_grad=input_gradient)
    grad_y = torch.randn(BATCH, shape[0], device=device)

    def forward(layer: nn.Module) -> Callable[[], None]:
        def call() -> None:
            with torch.no_grad():
                layer(x)

        return call

    def both(layer: nn.Module) -> Callable[[], None]:
        def call() -> None:
            layer.zero_grad(set_to_none=True)
            x.grad = None
            layer(x).backward(grad_y)

        return call

    times = {
        **({} if input_gradient else {"forward_seconds": seconds(*map(forward, pair), device=device)}),
        "forward_and_backward_seconds": seconds(*map(both, pair), device=device),
    }
    ratios = {name: _results.median_ratio(*rounds) for name, rounds in times.items()}
    measured: dict[str, list[float]] = {
        **{name: [median(taken) for taken in rounds] for name, rounds in times.items()},
        **({} if input_gradient else {"forward_peak_bytes": [peak(forward(layer), device) for layer in pair]}),
        "forward_and_backward_peak_bytes": [peak(both(layer), device) for layer in pair],
        "kept_bytes": [kept(layer, x) for layer in pair],
    }
    which = f"{shape[0]} x {shape[1]}, {'with' if input_gradient else 'without'} gradient of the input"
    promises = []
    for name, (ours, theirs) in measured.items():
        if ours or theirs:
            says = f"{name.rpartition('_')[0].replace('_', ' ')} of PEFT's, {which}"
            found, between = ratios.get(name, (ours / theirs if theirs else float("inf"), None))
            promises.append(_results.promise(says, found, 1.0, between=between))
    return {"shape": list(shape), "input_gradient": input_gradient, "ours_and_peft": measured, "promises": promises}


def main() -> None:
    """Measure, print and write."""
    device = "cuda" if "--cuda" in sys.argv else "cpu"
    torch.set_num_threads(1)
    rows = [compare(shape, input_gradient, device) for shape in SHAPES for input_gradient in (False, True)]
    promises = [one for row in rows for one in row.pop("promises")]
    _results.write("randlora", {"rank": RANK, "batch": BATCH, "rounds": ROUNDS, "rows": rows, "promises": promises}, device=device)


if __name__ == "__main__":
    main()
