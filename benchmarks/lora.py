"""The times that LoRA and the command line promise, as ratios to what they are measured against.

python benchmarks/lora.py
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _results import promise, write
from peft import LoraConfig, get_peft_model
from torch import nn

from loracle.reference.lora import LoRALinear

SIZE, RANK, BATCH, CALLS = 1024, 16, 512, 100


def quickest(*calls: Callable[[], None], rounds: int) -> list[float]:
    """Least seconds of each call. The calls alternate, and the least is what the machine's other work disturbs least."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, seconds in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return [min(seconds) for seconds in times]


def layer_against_peft(input_gradient: bool) -> float:
    """Forward and backward of one adapted layer, float32."""
    torch.manual_seed(0)
    mine = LoRALinear(nn.Linear(SIZE, SIZE), rank=RANK, alpha=RANK)
    model = nn.Sequential(nn.Linear(SIZE, SIZE))
    peft = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])).base_model.model[0]
    x, grad_y = torch.randn(BATCH, SIZE, requires_grad=input_gradient), torch.randn(BATCH, SIZE)

    def step(layer: nn.Module) -> Callable[[], None]:
        def call() -> None:
            layer(x).backward(grad_y)

        return call

    ours, theirs = quickest(step(mine), step(peft), rounds=CALLS)
    return ours / theirs


def process(*arguments: str) -> Callable[[], None]:
    """A new Python with these arguments."""

    def call() -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    return call


def pytest_run(folder: str, *options: str) -> Callable[[], None]:
    """pytest on one empty test, away from this repository."""
    return process("-m", "pytest", "-q", "--rootdir", folder, "-p", "no:cacheprovider", *options, f"{folder}/test_nothing.py")


def main() -> None:
    """Print every promise with what was measured, and write it."""
    torch.set_num_threads(2)
    found = []
    for input_gradient in (False, True):
        ratio, which = layer_against_peft(input_gradient), "with" if input_gradient else "without"
        found.append(promise(f"LoRA's layer, forward and backward {which} input gradient, as a multiple of PEFT's time", ratio, 1.0))
    bare, reference = quickest(process("-c", "import torch"), process("-c", "import loracle.reference.lora"), rounds=7)
    found.append(promise("`import loracle.reference.lora`, beyond torch's own", 1000 * (reference - bare), 50, " ms"))
    (shown,) = quickest(process("-m", "loracle.cli", "--help"), rounds=7)
    found.append(promise("`loracle --help`", shown, 0.5, " s"))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_nothing.py").write_text("def test_nothing():\n    assert True\n")
        without, with_plugin = quickest(pytest_run(folder, "-p", "no:loracle"), pytest_run(folder), rounds=9)
    found.append(promise("What the installed plugin adds to a pytest run elsewhere", 1000 * (with_plugin - without), 50, " ms"))
    write("lora", {"promises": found})


if __name__ == "__main__":
    main()
