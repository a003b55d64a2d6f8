"""Run by test_full_engines.py, in one process or two: `full_ranks.py OUT ENGINE...` trains a tiny model in every case, and
stops runs and goes on with them where there are two."""

import contextlib
import dataclasses
import gc
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from loracle.toy_tasks.full_scale import checkpoints, training
from loracle.toy_tasks.full_scale.engine import Engine
from loracle.toy_tasks.full_scale.loop import Training
from loracle.toy_tasks.full_scale.settings import resolve

gc.freeze()  # every run collects garbage, and need not look for it in what was imported

out, engines = Path(sys.argv[1]), sys.argv[2:]
rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
STEPS = 3
CASES = json.loads((out / "cases.json").read_text())  # name -> keywords of `resolve`
RESUMED = json.loads((out / "resumed.json").read_text())  # the same


class Collectives(TorchDispatchMode):
    """What the processes exchange: for every call its name, and how many numbers its result has."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
            self.calls.append((func._schema.name.removeprefix("c10d::"), first.numel() if isinstance(first, torch.Tensor) else 0))
        return func(*args, **kwargs or {})


def gathered(tensor):
    """The whole of a tensor that may be sharded; every rank has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Tokenizer:
    pad_token_id = 0


def rows():
    """Rows of uneven length with uneven prompts: the ranks' token counts differ."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for i in range(24):
        ids = torch.randint(3, 40, (4 + 5 * i % 9,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (1 + i % 3) + ids[1 + i % 3 :]})
    return made


def tiny():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32
    )
    return LlamaForCausalLM(config).to(torch.float64)


def final_weights(kind, name, case):
    run = resolve("lora", engine=kind, steps=STEPS, **case["how"])
    engine = Engine(kind, cpu=True)
    folder = out / f"{kind}-{name}"
    # Another seed on the other rank: what is drawn there has to give way to what rank 0 drew
    drawn = run if rank == 0 else dataclasses.replace(run, seed=run.seed + 1)
    prepared = training.prepare(drawn, engine, rows(), tiny(), Tokenizer(), folder, resuming=False, report=training.silent)
    engine.shard(prepared.model, prepared.whole)
    if run.gradient_checkpointing:
        prepared.model.activation_checkpointing_enable()
    if kind == "fsdp":
        frozen = [p for block in prepared.model.model.layers for p in block.parameters() if p.dim() and p not in set(prepared.whole)]
        assert frozen, name
        assert all(isinstance(p, DTensor) and p.to_local().numel() * ranks == p.numel() for p in frozen), f"{name} is not sharded"
        assert not any(isinstance(p, DTensor) for p in prepared.whole), name
    optimizer = training.make_optimizer(run, prepared.method, prepared.model)
    scheduler = training.make_schedule(run, optimizer, STEPS)
    before = {key: gathered(value).detach().clone() for key, value in prepared.method.trained(prepared.model).items()}
    losses = []
    loop = Training(
        run, engine, prepared.model, rows(), padding=0, optimizer=optimizer, scheduler=scheduler, steps=STEPS,
        after_step=lambda step, loss, count: losses.append(loss),
    )  # fmt: skip
    with Collectives() if case.get("counted") else contextlib.nullcontext() as exchanged:
        loop.train()
    if exchanged and rank == 0:
        (out / f"{kind}-{name}-calls.json").write_text(json.dumps(exchanged.calls))
    # Seven rows of uneven length in batches of eight or less, which two ranks cannot share evenly
    held_out = torch.tensor(loop.mean_loss(rows()[:7]), dtype=torch.float64)
    weights = {key: gathered(value).detach() for key, value in checkpoints.tensors_of(prepared.model).items()}
    moved = torch.stack([(weights[key] - value).abs().max() for key, value in before.items()])
    return weights | {"losses": torch.tensor(losses, dtype=torch.float64), "moved": moved, "held_out": held_out}


class StoppedError(Exception):
    pass


def train_until(last, run, folder):
    """A run that is stopped in every rank once the checkpoint of step `last` is there; the steps of the checkpoints it wrote."""
    write, written = checkpoints.write, []

    def write_and_stop(folder, step, *rest, **named):
        write(folder, step, *rest, **named)
        written.append(step)
        if step == last:
            if ranks > 1:
                dist.barrier()
            raise StoppedError

    checkpoints.write = write_and_stop
    training.check_memory = lambda *given: None  # which costs as much as the steps
    try:
        training.train(run, folder, save_every=2, cpu=True)
    except StoppedError:
        return written
    finally:
        checkpoints.write = write
    raise AssertionError("the run was not stopped")


def resume(kind, name, case):
    run = resolve("lora", engine=kind, steps=4, **case["how"])
    assert train_until(4, run, out / f"{kind}-{name}-unbroken") == [2, 4]
    if ranks == 1:
        return
    assert train_until(2, run, out / f"{kind}-{name}-resumed") == [2]
    if rank == 0:
        shutil.copytree(out / f"{kind}-{name}-resumed", out / f"{kind}-{name}-handed")
    assert train_until(4, run, out / f"{kind}-{name}-resumed") == [4]


for kind in engines:
    for name, case in RESUMED.items():
        resume(kind, name, case)
    for name, case in CASES.items():
        found = final_weights(kind, name, case)
        # Gathering is over, so that a rank may be alone from here on
        save_file({key: value.clone().contiguous() for key, value in found.items()}, out / f"{kind}-{name}-{ranks}-{rank}.safetensors")
if ranks > 1:
    torch.distributed.destroy_process_group()
