"""What Block-LoRA's two orders cost, counted and measured, beside LoRA of the nominal rank and of the rank of one block.

python benchmarks/block_lora.py

Counts are those of `mult_adds`. Two times are measured on one thread, float32, forward only: of the adapter's path alone, written
out below as the reference has it (and compared with the reference), and of the whole layer. It is processor time of that thread,
so that other programs count less; calls alternate, and the least time of each counts. The results are kept in results/block_lora.json,
and shown on Block-LoRA's page.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from _results import promise, write
from torch import Tensor

from loracle.reference import block_lora

RANK, BLOCKS, SCALING = 8, 4, 1.5
TOKENS, WIDTHS, SECONDS = (1, 16, 256, 1024), (256, 768, 1536), 0.4
VARIANTS = {  # rank, blocks, order
    "LoRA r": (RANK, 1, "add_first"),
    "blockwise": (RANK, BLOCKS, "blockwise"),
    "add_first": (RANK, BLOCKS, "add_first"),
    "LoRA r / b": (RANK // BLOCKS, 1, "add_first"),
}


def path(x: Tensor, y: Tensor, A: Tensor, B: Tensor, order: str) -> Tensor:
    """The lines of `block_lora.forward` after the frozen layer; LoRA has one block, which nothing has to be added to."""
    hidden = x @ A.mT
    if len(B) == 1:
        ups: tuple[Tensor, ...] | Tensor = (B[0],)
    else:
        ups = (B.sum(dim=0),) if order == "add_first" else B
    for up in ups:
        y = torch.addmm(y, hidden, up.mT, alpha=SCALING)
    return y


def quickest(calls: list[Callable[[], object]]) -> list[float]:
    """Least seconds of processor time of each call; the calls alternate for a while."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + SECONDS * len(calls)
    while time.perf_counter() < end or len(times[0]) < 7:
        for call, seconds in zip(calls, times, strict=True):
            start = time.thread_time()
            call()
            seconds.append(time.thread_time() - start)
    return [min(seconds) for seconds in times]


def measure(tokens: int, width: int) -> list[dict[str, Any]]:
    """The counts and times of every variant for one batch and one square weight."""
    generator = torch.Generator().manual_seed(0)
    x, W0 = torch.randn(tokens, width, generator=generator), torch.randn(width, width, generator=generator)
    frozen = x @ W0.mT
    paths: list[Callable[[], object]] = []
    layers: list[Callable[[], object]] = []
    for rank, blocks, order in VARIANTS.values():
        A, _ = block_lora.init(W0, rank=rank, blocks=blocks, generator=generator)
        B = torch.randn(blocks, width, rank // blocks, generator=generator)

        def alone(A: Tensor = A, B: Tensor = B, order: str = order) -> Tensor:
            return path(x, frozen, A, B, order)

        def layer(A: Tensor = A, B: Tensor = B, order: str = order) -> Tensor:
            return block_lora.forward(x, W0, A, B, SCALING, order=order)

        torch.testing.assert_close(alone(), layer(), rtol=1e-4, atol=1e-3)
        paths.append(alone)
        layers.append(layer)
    *alone_times, _ = quickest([*paths, lambda: None])
    *layer_times, frozen_time = quickest([*layers, lambda: torch.nn.functional.linear(x, W0)])
    found: list[dict[str, Any]] = []
    for (name, (rank, blocks, order)), one, whole in zip(VARIANTS.items(), alone_times, layer_times, strict=True):
        counted = block_lora.mult_adds(W0, rank=rank, blocks=blocks, tokens=tokens, order=order)
        times = {"adapter_us": round(1e6 * one, 2), "layer_us": round(1e6 * whole, 2), "frozen_us": round(1e6 * frozen_time, 2)}
        found.append({"tokens": tokens, "width": width, "variant": name, **counted._asdict(), **times})
    return found


@torch.no_grad()
def main() -> None:
    """Measure, print a table, and write the results."""
    torch.set_num_threads(1)
    rows = [row for width in WIDTHS for tokens in TOKENS for row in measure(tokens, width)]
    print(f"{'width':>6} {'tokens':>6} {'variant':>11} {'multiplications':>16} {'additions':>12} {'adapter':>11} {'layer':>11}")
    for row in rows:
        print(
            f"{row['width']:>6} {row['tokens']:>6} {row['variant']:>11} {row['multiplications']:>16,} {row['additions']:>12,} "
            f"{row['adapter_us']:>8} us {row['layer_us']:>8} us"
        )
    times = {row["variant"]: row["layer_us"] for row in rows if (row["width"], row["tokens"]) == (768, 256)}
    says = f"Block-LoRA's layer, 768 x 768, rank {RANK}, {BLOCKS} blocks added first, forward of 256 rows, as a multiple of LoRA's time"
    found = promise(says, times["add_first"] / times["LoRA r"], 1.05)
    write("block_lora", {"promises": [found], "rank": RANK, "blocks": BLOCKS, "rows": rows})


if __name__ == "__main__":
    main()
