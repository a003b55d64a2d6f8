"""Time of LoRA-GA's initialisation, base correction included, against the same step in PEFT.

Both get the same 1024 x 1024 gradient and weight in float32 and run the randomised SVD with q = 4 rank and 4 iterations.
PEFT's time is that of its layer method alone, without wrapping the model. Calls alternate; medians are compared.
"""

import statistics
import time
from collections.abc import Callable

import torch
from _results import promise, write
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

from loracle.reference import lora_ga

SIZE, RANK, ALPHA, CALLS = 1024, 8, 16, 200


def peft_call(W0: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> tuple[Callable[[], None], torch.Tensor]:
    """PEFT's initialisation as a call that can be repeated, and the gradient that PEFT estimated for it."""
    model = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False))
    model[0].weight.data = W0.clone()
    options = LoraGAConfig()
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, use_rslora=True, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=options
    )
    # The input asks for a gradient only because PEFT's backward hook warns about inputs that do not
    preprocess_loraga(model, config, lambda: nn.functional.mse_loss(model(x.requires_grad_()), y).backward())
    G = model[0]._peft_loraga_grad
    layer = get_peft_model(model, config).base_model.model[0]

    def call() -> None:
        layer.base_layer.weight.data = W0
        layer.base_layer._peft_loraga_grad = G
        layer.lora_ga_init("default", options)

    return call, G


def seconds(call: Callable[[], None]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Print the ratio of the two medians, and write it."""
    torch.set_num_threads(2)
    W0, x, y = torch.randn(SIZE, SIZE) / SIZE**0.5, torch.randn(2048, SIZE), torch.randn(2048, SIZE)
    theirs, G = peft_call(W0, x, y)
    generator = torch.Generator().manual_seed(0)

    def ours() -> None:
        scaling = lora_ga.scaling_factor(ALPHA, RANK)
        A, B = lora_ga.init(G, scaling, rank=RANK, sketch=lora_ga.draw_sketch(G, rank=RANK, generator=generator))
        lora_ga.base_weight(W0, A, B, scaling)

    for _ in range(10):
        ours(), theirs()
    # Both are timed in every round, so that whatever else the machine does falls on both alike
    times = [(seconds(ours), seconds(theirs)) for _ in range(CALLS)]
    our_median, peft_median = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    print(f"loracle {our_median:.2f} ms, PEFT {peft_median:.2f} ms")
    says = f"LoRA-GA's start of a {SIZE} x {SIZE} layer at rank {RANK}, as a multiple of PEFT's time"
    write("lora_ga_init", {"promises": [promise(says, our_median / peft_median, 1.05)]})


if __name__ == "__main__":
    main()
