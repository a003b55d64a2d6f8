"""The plan of a run's memory against what processes really used, and what it advises."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("accelerate")
pytest.importorskip("peft")

from torch import nn

from loracle.cli import app
from loracle.toy_tasks import methods
from loracle.toy_tasks.config import UsageError
from loracle.toy_tasks.full_scale import memory
from loracle.toy_tasks.full_scale.settings import resolve

SHAPE = (192, 512, 3, 3, 4096)
WIDE = (512, 1408, 3, 8, 512)  # with few tokens: most of the memory is weights and what a method adds to them
GIB = 2**30
LORA = ("lora", "peft_lora")
CASES = {
    "lora": {},
    "full": {},
    **{f"{method}, few tokens": {"overrides": ["batch_size=2", "sequence_length=32"]} for method in methods.names() if method not in LORA},
    "lora with checkpointing": {"gradient_checkpointing": True},
    "lora in bf16": {"overrides": ["precision=bf16"]},
    "lora with fewer rows": {"micro_batch": 3},
}


def make_run(name, **more):
    how = {**CASES.get(name, {}), **more}
    overrides = ["batch_size=6", "sequence_length=256", *how.pop("overrides", [])]
    return resolve("lora", method=name.split()[0].strip(","), overrides=overrides, **how)


def shape_of(name):
    return WIDE if "few tokens" in name else SHAPE


@pytest.fixture(scope="module")
def measured():
    """Peaks of processes of their own, one for each case, in bytes."""
    program = (
        "import json, sys, torch._dynamo; "
        f"sys.path.append({os.path.dirname(__file__)!r}); from test_full_memory import CASES, make_run, shape_of; "
        "from loracle.toy_tasks.full_scale import bench; "
        "print(json.dumps([bench.peak_alone(make_run(name), shape_of(name), steps=2) for name in CASES]))"
    )
    # Freed memory goes back to the system at once, so that the process has what is in use and no more
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_what_was_measured(measured, name):
    planned = memory.estimate(make_run(name), memory.known_config("any", shape_of(name))).total
    assert 0.8 < planned / measured[name] < 1.2, (planned / 2**20, measured[name] / 2**20)


@pytest.mark.parametrize("method", methods.names())
def test_what_a_method_adds_is_counted(method):
    run = resolve("lora", method=method, overrides=["rank=4", "dropout=0"])
    model = nn.Sequential()
    for name, (inn, out) in {"q_proj": (24, 16), "k_proj": (16, 40)}.items():
        model.add_module(name, nn.Linear(inn, out, bias=False))
    before = list(model.parameters())  # kept, so that none gives its id to a new one
    from loracle.toy_tasks.full_scale import checkpoints, training

    training.attach(run, model, training.stand_in_gradients(model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    new = {
        t.data_ptr(): t.numel() for t in checkpoints.tensors_of(model).values() if not t.requires_grad and not any(t is p for p in before)
    }
    frozen = sum(new.values()) - (16 * 24 + 40 * 16 if method in BASE_IS_COPIED else 0)
    counts = [memory.added(method, *shape, 4, run.options) for shape in ((16, 24), (40, 16))]
    assert sum(count.trained for count in counts) == trained
    assert sum(count.frozen for count in counts) + memory.shared(method, [(16, 24), (40, 16)], 4) == frozen


BASE_IS_COPIED = ("lora_ga",)  # with the start taken out of it; the original is gone


def test_seven_billion_in_bf16():
    config = memory.known_config("meta-llama/Llama-2-7b-hf")
    run = resolve("lora_ga", method="lora", model="paper", micro_batch=1)
    plan = memory.estimate(run, config)
    assert plan.weights == 6_738_415_616 * 2
    assert plan.trainable == 32 * 8 * (4 * 8192 + 3 * (4096 + 11008))
    sharded = memory.estimate(dataclasses.replace(run, engine="fsdp"), config, ranks=4)
    assert sharded.weights == plan.weights // 4
    assert sharded.total >= plan.weights
    assert memory.fits(plan, 80 * GIB, cpu=False)
    assert not memory.fits(plan, 14 * GIB, cpu=False)


def test_advice_fits():
    config = memory.known_config("meta-llama/Llama-2-7b-hf")
    run = resolve("lora", model="paper", overrides=["sequence_length=1024"])
    for size in (2, 10):  # the weights alone are 12.6 GiB, and whole on every device until they are sharded
        assert memory.advise(run, config, size * GIB, cpu=False) == []
    for size in (14, 48):
        lines = memory.advise(run, config, size * GIB, cpu=False)
        assert lines, size
        assert any("--checkpointing" in line for line in lines)
    assert "fsdp" in memory.advise(run, config, 14 * GIB, cpu=False)[0]


@pytest.mark.parametrize(("engine", "ranks", "size"), [("ddp", 4, 48), ("ddp", 4, 20), ("fsdp", 4, 20), ("fsdp", 4, 15), ("single", 1, 48)])
def test_what_is_advised_can_be_had(engine, ranks, size):
    """Each line, taken as it stands with that number of devices, is a run that is accepted and fits."""
    config = memory.known_config("meta-llama/Llama-2-7b-hf")
    run = resolve("lora", model="paper", engine=engine, overrides=["sequence_length=1024"])
    lines = memory.advise(run, config, size * GIB, ranks=ranks, cpu=False)
    assert lines
    for line in lines:
        words, _, more = line.partition(" on ")
        devices = int(more.removesuffix(" devices") or ranks)
        taken = dataclasses.replace(
            run,
            micro_batch=int(re.search(r"--micro-batch (\d+)", words)[1]),
            gradient_checkpointing="--checkpointing" in words,
            engine="fsdp" if "--engine fsdp" in words else engine,
        )
        assert memory.fits(memory.estimate(taken, config, ranks=devices), size * GIB, cpu=False), line
    if lines[0].startswith("--micro-batch"):  # the largest that fits
        larger = dataclasses.replace(run, micro_batch=2 * int(lines[0].split()[1]))
        assert run.batch_size % (larger.micro_batch * ranks) or not memory.fits(
            memory.estimate(larger, config, ranks=ranks), size * GIB, cpu=False
        )


def test_processes_on_one_machine_share_its_memory():
    config = memory.known_config("any", (64, 176, 2, 4, 512))
    run = resolve("lora", model="paper", engine="ddp", overrides=["sequence_length=1024", "precision=float32", "batch_size=64"])
    four, eight = (memory.estimate(dataclasses.replace(run, micro_batch=n), config, ranks=4, cpu=True).total for n in (4, 8))
    [first, *_] = memory.advise(run, config, ((four + eight) / 2 + memory.RUNTIME) / memory.SAFE, ranks=4, cpu=True)
    assert first == "--micro-batch 4"  # of 16


def invoke(*words):
    return CliRunner().invoke(app, ["full", "plan", *words], catch_exceptions=False)


def test_the_command_says_whether_it_fits():
    fits = invoke("lora", "--model", "paper", "--memory", "80", "--micro-batch", "1")
    assert fits.exit_code == 0
    assert "It fits into 80.00 GiB" in fits.output
    assert re.search(r"GSM8K, accuracy in %.*42\.08 ", fits.output)
    assert re.search(r"GLUE average.*87\.2 \(from memory\)", fits.output)
    assert "figures" not in invoke("lora", "--memory", "80").output  # of the small model
    tight = invoke("lora", "--model", "paper", "--memory", "24", "--set", "sequence_length=1024")
    assert tight.exit_code == 1
    assert "would fit: " in tight.output
    assert invoke("lora", "--shape", "1,2,3").exit_code == 3
    assert invoke("randlora", "--shape", "64,128,2,2,256", "--memory", "1").exit_code == 0


def test_a_pattern_that_matches_nothing():
    with pytest.raises(UsageError, match=r"model\.layers.0.self_attn.q_proj"):
        memory.estimate(resolve("lora", overrides=['target_modules=["query"]']), memory.known_config("any", SHAPE))


def test_the_peak_is_that_since_the_reset():
    device = torch.device("cpu")
    memory.reset_peak_memory(device)
    before = memory.peak_memory(device)
    torch.ones(2**26)
    assert memory.peak_memory(device) - before > 2**27
    memory.reset_peak_memory(device)
    assert memory.peak_memory(device) - before < 2**27


def test_the_bench_command(tmp_path):
    out = tmp_path / "bench.json"
    sizes = ["--shape", "64,128,1,2,2048", "--sequence", "64", "--rows", "2", "--rank", "2", "--steps", "1", "--rounds", "1"]
    done = CliRunner().invoke(app, ["full", "bench", "lora", *sizes, "--cpu", "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert [one["method"] for one in found["methods"]] == ["peft_lora", "lora"]
    assert found["methods"][0]["relative_speed"] == found["methods"][0]["relative_memory"] == 1
    for one in found["methods"]:
        assert one["trainable"] == 2 * (4 * 128 + 3 * 192)
        assert min(one["tokens_per_second"], one["relative_speed"], one["peak_memory_bytes"], one["relative_memory"]) > 0
        assert one["method"] in done.output
