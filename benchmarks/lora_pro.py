"""Time of LoRA-Pro's AdamW step at 4096 x 4096 and rank 8, as multiples of the moment update that it contains.

The yardstick is the same update of m x n moments and Adam's direction, for a gradient that is there already, in the same
unfused torch. Beside it: torch's fused AdamW on the dense weight, and the (rank, rank) work alone. Then the optimizer on
several layers of equal shape, together and one by one. Calls alternate, and medians are compared. A number of another size may
be given: `python benchmarks/lora_pro.py 2048`.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from _results import promise, write

from loracle.reference import _adapters, lora, lora_pro

RANK, SCALING, CALLS = 8, 2.0, 15
LAYERS = ((32, 4, 28), (64, 8, 28), (512, 8, 8), (1024, 8, 8))  # side, rank, how many


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def layers_together(side: int, rank: int, layers: int) -> dict[str, object]:
    """Time of the optimizer's step with all layers in one call, as a multiple of that with one by one."""
    chosen, times = _adapters.ENTRIES_TOGETHER, {1: [], 2**62: []}  # type: int, dict[int, list[float]]
    adapted = [lora.LoRALinear(torch.nn.Linear(side, side), rank=rank, alpha=rank) for _ in range(layers)]
    for layer in adapted:
        layer.A.grad, layer.B.grad = torch.randn_like(layer.A), torch.randn_like(layer.B)
    optimizer = lora_pro.LoRAProAdamW(adapted)
    optimizer.step()
    for _ in range(CALLS):
        for _adapters.ENTRIES_TOGETHER, found in times.items():
            found.append(seconds(optimizer.step))
    _adapters.ENTRIES_TOGETHER = chosen
    ratio = statistics.median(times[2**62]) / statistics.median(times[1])
    entries = 3 * side**2 + 4 * side * rank  # moments and weight, factors and their gradients
    together = chosen // entries
    word = "all together" if together >= layers else f"{together} at a time" if together > 1 else "one by one"
    print(f"{layers} layers of {side} x {side}, rank {rank}: all together takes {ratio:.2f} of one by one; the optimizer takes them {word}")
    return {"side": side, "rank": rank, "layers": layers, "together": ratio, "chosen": word}


def main(size: int) -> None:
    """Print the ratios of the medians."""
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    W0, G, A, B = torch.randn(size, size), torch.randn(size, size), torch.randn(RANK, size), torch.randn(size, RANK)
    grads, state = lora.gradients(G, A, B, SCALING), lora_pro.State(torch.randn(size, size), torch.rand(size, size))
    dense = torch.nn.Parameter(W0.clone())
    dense.grad = G
    fused = torch.optim.AdamW([dense], fused=True)

    def moments() -> object:
        return lora_pro._adam(G, *state, 3, 0.9, 0.999, 1e-8)

    def step() -> object:
        return lora_pro.step(*grads, W0, A, B, SCALING, *state, t=3, lr=1e-3)

    def small() -> object:
        left, right = lora_pro._grams(A, B)
        for _ in range(2):
            left.inverse(0.0), right.inverse(0.0)
        return lora_pro._sylvester(grads.grad_A, A, left, right, SCALING, 0.0)

    calls = {"LoRA-Pro's step": step, "moment update": moments, "fused dense AdamW": fused.step, "rank x rank work": small}
    for call in calls.values():
        call()
    times = {name: [] for name in calls}  # type: dict[str, list[float]]
    for _ in range(CALLS):
        for name, call in calls.items():
            times[name].append(seconds(call))
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, median in medians.items():
        print(f"{name:20} {1e3 * median:8.2f} ms")
    whole = medians["LoRA-Pro's step"]
    where = f"{size} x {size}, rank {RANK}"
    found = [
        promise(f"LoRA-Pro's AdamW step, {where}, as a multiple of the moment update", whole / medians["moment update"], 2.5),
        promise(f"Share of the rank x rank work in LoRA-Pro's step, {where}", medians["rank x rank work"] / whole, 0.05),
    ]
    print(f"a fused dense AdamW step takes {medians['fused dense AdamW'] / whole:.2f} of it")
    layers = [layers_together(*given) for given in LAYERS]
    milliseconds = {name: 1e3 * x for name, x in medians.items()}
    write("lora_pro", {"size": size, "rank": RANK, "milliseconds": milliseconds, "layers": layers, "promises": found})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4096)
