"""Run by test_full_processes.py in each of two processes: `full_pair.py OUT` does whole runs with DDP and sharded, and writes
what each process's memory was at its peak, then compiled ones beside plain ones."""

import functools
import gc
import json
import os
import sys
from pathlib import Path

import torch
import torch._dynamo  # which optimizers import

from loracle.toy_tasks.config import convert
from loracle.toy_tasks.full_scale import memory, report, training
from loracle.toy_tasks.full_scale.settings import Run

out, rank = Path(sys.argv[1]), os.environ["RANK"]
PEAKS, COMPILED = (json.loads((out / f"{name}.json").read_text()) for name in ("peaks", "compiled"))  # runs by name


def train(run, name):
    training.train(run, out / name, cpu=True, save_every=run.steps)


def peak(run, name):
    """Bytes that a whole run takes at its fullest beyond what the process has at its start."""
    device = torch.device("cpu")
    gc.collect()
    memory.reset_peak_memory(device)
    before = memory.peak_memory(device)
    train(run, name)
    return memory.peak_memory(device) - before


training.check_memory = lambda *given: None  # the plan, which the test computes
report.write_report = lambda *given: None  # the figure
gc.freeze()  # of the libraries there is nothing to collect
peaks = {name: peak(convert(run, Run, name), f"peak-{name}") for name, run in PEAKS.items()}
(out / f"peaks-{rank}.json").write_text(json.dumps(peaks))

# What traces the model, its hooks and its backward pass is the whole of the compiler but the last stage, which writes code for
# a rank's own tensors, as in one process, and takes most of the time
torch.compile = functools.partial(torch.compile, backend="aot_eager")
graphs = {}
for name, run in COMPILED.items():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train(convert(run, Run, name), f"compiled-{name}")
    graphs[name] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
(out / f"graphs-{rank}.json").write_text(json.dumps(graphs))
torch.distributed.destroy_process_group()
