"""Run by test_full_engines.py, in one process or two: `full_ranks.py OUT ENGINE...` trains a tiny model in every case."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from loracle.toy_tasks.full_scale import training
from loracle.toy_tasks.full_scale.engine import Engine, gathered
from loracle.toy_tasks.full_scale.settings import resolve

out, engines = Path(sys.argv[1]), sys.argv[2:]
rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
STEPS = 3
CASES = json.loads((out / "cases.json").read_text())  # name -> keywords of `resolve`, and "decay"


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
    model = engine.prepare(prepared.model, prepared.whole)
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
    training.fit(
        run, engine, prepared, rows(), steps=STEPS, model=model, optimizer=optimizer, scheduler=scheduler,
        after_step=lambda step, loss, count: losses.append(loss),
    )  # fmt: skip
    weights = {key: gathered(value).detach() for key, value in training.tensors_of(prepared.model).items()}
    moved = torch.stack([(weights[key] - value).abs().max() for key, value in before.items()])
    return weights | {"losses": torch.tensor(losses, dtype=torch.float64), "moved": moved}


for kind in engines:
    for name, case in CASES.items():
        found = final_weights(kind, name, case)
        # Gathering is over, so that a rank may be alone from here on
        save_file({key: value.clone().contiguous() for key, value in found.items()}, out / f"{kind}-{name}-{ranks}-{rank}.safetensors")
if ranks > 1:
    torch.distributed.destroy_process_group()
