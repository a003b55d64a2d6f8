"""Whole runs in two processes, DDP and sharded: the plan of their memory against what each took, and compiled ones."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("peft")

from safetensors.torch import load_file

from loracle.toy_tasks.full_scale import memory
from loracle.toy_tasks.full_scale.checkpoints import START
from loracle.toy_tasks.full_scale.settings import resolve

DEEP = (256, 704, 8, 4, 512)  # where no block is much of it
WEIGHTS = (512, 1408, 2, 8, 512)  # with few tokens: most of the memory is weights and what a method adds to them
TOKENS = (192, 512, 3, 3, 4096)
SMALL = (8, 8, 1, 1, 512)
TINY = (24, 40, 1, 2, 512)
FEW = ["batch_size=2", "sequence_length=32"]
METHODS = {  # the model's shape, and settings
    "lora": (TOKENS, ["batch_size=6", "sequence_length=256"]),
    "full": (WEIGHTS, FEW),
    "lora_pro": (WEIGHTS, FEW),
    "randlora": (WEIGHTS, FEW),
}
CASES = {
    **{f"{engine}-{method}": METHODS[method] for engine in ("ddp", "fsdp") for method in METHODS},
    "fsdp-lora": (WEIGHTS, FEW),
    "fsdp-full-accumulated": (DEEP, ["batch_size=4", "sequence_length=32", "optimizer=sgd"]),
    "fsdp-lora_pro-decayed": (WEIGHTS, [*FEW, "weight_decay=0.1"]),
    "fsdp-lora_ga": (WEIGHTS, [*FEW, "options={gradient_samples=4}"]),
    **{f"{engine}-lora-bf16": (WEIGHTS, [*FEW, "precision=bf16"]) for engine in ("ddp", "fsdp")},
}


def make_run(name, folder):
    engine, method, *_ = name.split("-")
    shape, overrides = CASES[name]
    rows = 3 if shape == TOKENS else 1
    run = resolve("lora", method=method, overrides=overrides, engine=engine, steps=2, fields=("text",), micro_batch=rows)
    return with_model(run, shape, folder)


COMPILED = [f"{engine}-{method}-{how}" for engine in ("ddp", "fsdp") for method in ("lora", "randlora") for how in ("plain", "compiled")]


def compiled_run(name, folder):
    engine, method, how = name.split("-")
    overrides = ["batch_size=4", "rank=2", "lr=1e-2", "sequence_length=32"]
    more = {"engine": engine, "steps": 3, "fields": ("text",), "micro_batch": 1, "compile": how == "compiled"}
    return with_model(resolve("lora", method=method, overrides=overrides, **more), TINY, folder)


def with_model(run, shape, folder):
    return dataclasses.replace(run, model=str(folder / "x".join(map(str, shape))), data=str(folder / "texts.jsonl"))


def save_model(shape, tokenizer, folder):
    """A random Llama in bfloat16. Loaded in the run's own precision the file would be mapped, and its pages, which the system
    can take back at any time, would count as the process's memory as long as any weight is the file's."""
    from transformers import LlamaForCausalLM

    config = memory.known_config("any", shape)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    folder = folder / "x".join(map(str, shape))
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llama):
    """What full_pair.py leaves."""
    from transformers import AutoTokenizer

    out = tmp_path_factory.mktemp("pair")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for shape in (DEEP, WEIGHTS, TOKENS, SMALL, TINY):
        save_model(shape, tokenizer, out)
    text = " ".join(f"{a} + {b} = {a + b}" for a in range(20) for b in range(20))
    (out / "texts.jsonl").write_text("".join(json.dumps({"text": text[i:]}) + "\n" for i in range(24)))
    runs = {}
    for name in CASES:
        run = make_run(name, out)
        # In bfloat16 oneDNN keeps the code that it writes for every product of a new size: half a MiB, whatever the size, which
        # is much beside so small a model. So the same run goes before
        warm = run if run.precision == "bf16" else with_model(run, SMALL, out)
        runs.setdefault(f"{run.engine}-{run.precision}-warm", warm)
        runs[name] = run
    (out / "peaks.json").write_text(json.dumps({name: dataclasses.asdict(run) for name, run in runs.items()}))
    compiled = {name: dataclasses.asdict(compiled_run(name, out)) for name in COMPILED}
    (out / "compiled.json").write_text(json.dumps(compiled))
    # Freed memory goes back to the system at once, so that a process has what is in use and no more
    own = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "GLOO_SOCKET_IFNAME": "lo"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        own |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    command = [sys.executable, Path(__file__).with_name("full_pair.py"), out]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen(command, env=own | {"RANK": rank, "LOCAL_RANK": rank}, **pipes) for rank in "01"]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    return out


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_what_each_of_two_processes_took(folder, name):
    """Within a fifth, and closer where too little is planned; measured: from 0.90 to 1.13."""
    first, second = (json.loads((folder / f"peaks-{rank}.json").read_text())[name] for rank in range(2))
    run = make_run(name, folder)
    plan = memory.estimate(run, memory.known_config("any", CASES[name][0]), ranks=2, cpu=True)
    assert 0.85 < plan.total / first < 1.2, (plan, first / 2**20)
    # The second reads no gradients for a start, but it holds what stands in for them
    assert 0.85 < plan.total / second < (1.2 if run.method != "lora_ga" else 1.5), (plan, second / 2**20)


@pytest.mark.parametrize("method", ["lora", "randlora"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_compiled_run_is_the_plain_one(folder, tensors_in, engine, method):
    """After three steps of two accumulated passes each; measured: the same bits."""
    names = [f"{engine}-{method}-{how}" for how in ("plain", "compiled")]
    for rank in range(2):
        graphs = json.loads((folder / f"graphs-{rank}.json").read_text())
        assert [graphs[name] > 0 for name in names] == [False, True]
    start = load_file(folder / f"compiled-{names[0]}" / START)
    plain, compiled = (tensors_in(folder / f"compiled-{name}" / "checkpoint-3") for name in names)
    assert plain.keys() == compiled.keys()
    moved = [(value - start[key.removeprefix("model.")]).abs().max() for key, value in plain.items() if key.startswith("model.")]
    assert min(moved) > 1e-3  # a thousand times the tolerance
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-6, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
