"""Run by test_full_processes.py in each of two processes: `full_pair.py OUT` does whole runs with DDP and sharded, and writes
what each process's memory was at its peak, then compiled ones beside plain ones."""

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
PEAKS = json.loads((out / "peaks.json").read_text())  # a list of runs; the first of each engine only warms up


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
torch.distributed.destroy_process_group()
