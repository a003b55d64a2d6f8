"""Two processes with half of the batch each give the weights of one with the whole batch: DDP and sharded, every method."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("peft")

from safetensors.torch import load_file

from loracle.toy_tasks import methods
from loracle.toy_tasks.full_scale import training
from loracle.toy_tasks.full_scale.checkpoints import START
from loracle.toy_tasks.full_scale.log import read_log
from loracle.toy_tasks.full_scale.settings import resolve

# Sums of a few hundred float64 terms in another order differ by about 1e-15 of their size. Adam divides by the root of a
# squared gradient, which enlarges that where the gradient is small. What is measured is 5e-16; what is trained moves by 1e-9
# at least.
TOLERANCE = 1e-12
SETTINGS = ["precision=float64", "batch_size=8", "rank=2", "alpha=4", "dropout=0", "schedule=constant_with_warmup", "warmup_ratio=0"]


COUNTED = [("lora", "sgd"), ("full", "sgd")]
STEPS, BLOCKS, HIDDEN, INTERMEDIATE, VOCABULARY = 3, 2, 16, 24, 40  # of full_ranks.py
RESUMED = {
    "lora": {"gradient_checkpointing": True, "overrides": ["dropout=0.1"]},
    "lora_pro": {"overrides": ["weight_decay=0.1"]},
    "randlora": {"overrides": []},
    "full": {"overrides": ["weight_decay=0.1"]},
}


def cases():
    """Every method with SGD and with AdamW (or its own optimizer); one with accumulation, one with checkpointing."""
    found = {}
    for method in methods.names():
        for optimizer, lr in (("sgd", 1e1), ("adamw", 1e-2)):
            overrides = [*SETTINGS, f"optimizer={optimizer}", f"lr={lr}"]
            how = {"method": method, "overrides": overrides, "micro_batch": 2}
            found[f"{method}-{optimizer}"] = {"how": how, "counted": (method, optimizer) in COUNTED}
    # A micro-batch that is each rank's share: their starts have to agree bit for bit even so
    for method in ("lora_ga", "lora_sb"):
        overrides = [*SETTINGS, "optimizer=sgd", "lr=1e1"]
        found[f"{method}-share"] = {"how": {"method": method, "overrides": overrides}}
    decay = [*SETTINGS, "optimizer=adamw", "lr=1e-2", "weight_decay=0.1"]
    found["lora_pro-decay"] = {"how": {"method": "lora_pro", "overrides": decay, "micro_batch": 4}}
    found["lora-checkpointing"] = {"how": {"method": "lora", "overrides": decay, "micro_batch": 4, "gradient_checkpointing": True}}
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(ranks, engines, out):
    """The processes, all at once."""
    command = [sys.executable, Path(__file__).with_name("full_ranks.py"), out, *engines]
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        own |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    by_rank = [own | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else own for rank in range(ranks)]
    return [subprocess.Popen(command, env=environment, **pipes) for environment in by_rank]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llama):
    """What full_ranks.py leaves: one process alone, two with DDP, two sharded."""
    out = tmp_path_factory.mktemp("ranks")
    (out / "cases.json").write_text(json.dumps(cases()))
    sizes = ["precision=float32", "batch_size=4", "rank=2", "alpha=4", "lr=1e-2", "sequence_length=40"]
    given = {"model": str(tiny_llama), "data": str(tiny_llama.parent / "data.jsonl"), "micro_batch": 1}
    resumed = {method: {"how": {"method": method, **given, **how}} for method, how in RESUMED.items()}
    for case in resumed.values():
        case["how"]["overrides"] = [*sizes, *case["how"]["overrides"]]
    (out / "resumed.json").write_text(json.dumps(resumed))
    for processes in (start(1, ["single"], out), start(2, ["ddp", "fsdp"], out)):
        said = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return out


@pytest.fixture(scope="module")
def weights(folder):
    """`weights(kind, case, rank)` after three steps, or at the `start`."""
    counts = {"single": 1, "ddp": 2, "fsdp": 2}

    def load(kind, case, rank=0, start=False):
        return load_file(folder / f"{kind}-{case}" / START if start else folder / f"{kind}-{case}-{counts[kind]}-{rank}.safetensors")

    return load


@pytest.mark.parametrize("case", cases())
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_give_the_weights_of_one(weights, kind, case):
    alone, first, second = weights("single", case), weights(kind, case), weights(kind, case, 1)
    assert alone.keys() == first.keys() == second.keys()
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
        if name != "losses":
            assert torch.equal(first[name], second[name]), f"{name} differs between the ranks"


@pytest.mark.parametrize("case", ["lora_ga-share", "lora_sb-share"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_start_is_the_same_bits_for_any_number_of_ranks(weights, kind, case):
    alone, two = weights("single", case, start=True), weights(kind, case, start=True)
    assert alone.keys() == two.keys()
    for name, value in alone.items():
        assert torch.equal(two[name], value), name


@pytest.mark.parametrize("case", cases())
def test_training_moved_every_weight(weights, case):
    assert weights("single", case)["moved"].min() > 1e3 * TOLERANCE


def calls(folder, kind, case):
    """How many numbers each exchange of a kind brought, by kind, in the order of the calls."""
    found = {}
    for name, size in json.loads((folder / f"{kind}-{case}-calls.json").read_text()):
        found.setdefault(name, []).append(size)
    return found


@pytest.mark.parametrize("counted", COUNTED)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_are_averaged_once_per_step(folder, kind, counted):
    """With two micro-batches a step: the gradients, and the loss. Sharded weights have theirs averaged by block, adapters
    beside sharded weights one by one, DDP's together."""
    found = calls(folder, kind, "-".join(counted))
    by_block = (kind, counted[0]) == ("fsdp", "full")
    factors = BLOCKS * (11 * [2 * HIDDEN] + 3 * [2 * INTERMEDIATE])  # of the seven linear layers of a block, at rank 2
    linears = 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE
    gradients = {"ddp-lora": [sum(factors)], "ddp-full": [BLOCKS * linears], "fsdp-lora": factors, "fsdp-full": []}
    assert Counter(found["allreduce_"]) == Counter(STEPS * [*gradients[f"{kind}-{counted[0]}"], 1])
    assert found.get("_reduce_scatter_base_", []) == (STEPS * BLOCKS * [linears // 2] if by_block else [])


def test_one_block_at_a_time_is_whole(folder):
    block, rest = 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN, 2 * VOCABULARY * HIDDEN + HIDDEN
    for method, optimizer in COUNTED:
        assert set(calls(folder, "fsdp", f"{method}-{optimizer}")["_allgather_base_"]) == {block, rest}


@pytest.mark.parametrize("method", [method for method in RESUMED if method != "lora"])  # which draws its dropout by rank
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_whole_run_of_two_ranks_gives_the_weights_of_one(folder, tensors_in, kind, method):
    """In float32; with the loss measured before the first step, from which on accelerate must still wrap the model."""
    alone, two = (tensors_in(folder / f"{name}-{method}-unbroken" / "checkpoint-4") for name in ("single", kind))
    assert alone.keys() == two.keys()
    for name, value in alone.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    logs = (read_log(folder / f"{name}-{method}-unbroken") for name in ("single", kind))
    for one, other in zip(*logs, strict=True):
        for key in {"loss", "held_out_loss"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=1e-4), key


@pytest.mark.parametrize("method", RESUMED)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_go_on_from_a_checkpoint(folder, tensors_in, kind, method):
    """The same bits in weights and moments as in the run that was not stopped."""
    unbroken, resumed = (tensors_in(folder / f"{kind}-{method}-{how}" / "checkpoint-4") for how in ("unbroken", "resumed"))
    assert unbroken.keys() == resumed.keys()
    assert any(name.startswith("optimizer.") for name in unbroken)
    assert any(name.endswith("base.weight") for name in unbroken) == (method == "lora_pro")
    for name, value in unbroken.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize("method", [method for method in RESUMED if method != "lora"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_rank_goes_on_from_a_checkpoint_of_two(folder, tensors_in, kind, method):
    """In float32; the tolerance of a whole run of two ranks."""
    handed = folder / f"{kind}-{method}-handed"
    parts = len(list(handed.glob("checkpoint-2/*.safetensors")))
    how = json.loads((folder / "resumed.json").read_text())[method]["how"]
    training.train(resolve("lora", steps=4, **how), handed, cpu=True)
    alone, gone_on = (tensors_in(out / "checkpoint-4") for out in (folder / f"single-{method}-unbroken", handed))
    assert parts == 2
    assert alone.keys() == gone_on.keys()
    for name, value in alone.items():
        torch.testing.assert_close(gone_on[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_the_command_under_accelerate_launch(tiny_llama, tmp_path):
    """As a user starts several processes. (Without a GPU, `--cpu --num_processes 2` would start one process only.) His launcher's
    precision is not the run's."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--num_processes=2"]
    launch += ["--mixed_precision=bf16", "--dynamo_backend=no", "--main_process_ip=127.0.0.1", f"--main_process_port={free_port()}"]
    command = ["-m", "loracle.toy_tasks.full_scale", "lora", "--cpu", "--engine=fsdp", "--steps=2", f"--out={tmp_path / 'out'}"]
    command += [f"--model={tiny_llama}", f"--data={tiny_llama.parent / 'data.jsonl'}", "--fields=response"]
    for setting in ("precision=float32", "batch_size=4", "rank=2", "lr=1e-2", "sequence_length=40"):
        command += ["--set", setting]
    own = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([*launch, *command], env=own, start_new_session=True, **pipes) as process:
        try:
            said, _ = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher and what it has started
            raise
    assert process.returncode == 0, said
    report = json.loads((tmp_path / "out" / training.REPORT).read_text())
    assert (report["ranks"], report["run"]["engine"], report["steps"]) == (2, "fsdp", 2)
    assert report["loss_after"] < report["loss_before"]
    assert [line["step"] for line in read_log(tmp_path / "out")] == [0, 1, 2]
    assert said.count("report.json") == 1  # one process speaks
