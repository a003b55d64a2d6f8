"""Runs of a tiny model: methods, precision, resuming, loss, data."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("peft")

import torch._dynamo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaMLP

from loracle.toy_tasks import methods
from loracle.toy_tasks.full_scale import checkpoints, training
from loracle.toy_tasks.full_scale.data import Order, collate
from loracle.toy_tasks.full_scale.evaluation import count_tokens
from loracle.toy_tasks.full_scale.log import LOG, read_log
from loracle.toy_tasks.full_scale.settings import resolve

SETTINGS = ["precision=float32", "batch_size=4", "rank=2", "alpha=4", "lr=1e-2", "sequence_length=40", "dropout=0", "weight_decay=0"]


@pytest.fixture
def make_run(tiny_llama):
    """A run of the tiny model; keywords as of `resolve`, and overrides."""

    def make(method="lora", *overrides, **how):
        data = str(tiny_llama.parent / "data.jsonl")
        given = {"model": str(tiny_llama), "data": data, "steps": 4, **how}
        return resolve("lora", method=method, overrides=[*SETTINGS, *overrides], **given)

    return make


@pytest.fixture
def final_tensors(tensors_in):
    return lambda out: tensors_in(checkpoints.find(out)[-1])


@pytest.mark.parametrize("method", methods.names())
def test_a_method_lowers_the_loss(make_run, tmp_path, method):
    outcome = training.train(make_run(method, steps=8), tmp_path, cpu=True)
    assert outcome.loss_after < outcome.loss_before
    assert 0 < outcome.trainable < outcome.parameters or method == "full"
    assert outcome.tokens == sum(line.get("tokens", 0) for line in read_log(tmp_path)[-1:])
    report = json.loads((tmp_path / training.REPORT).read_text())
    assert report["run"]["method"] == method
    assert (tmp_path / "figure.svg").stat().st_size > 1000


@pytest.mark.parametrize("method", methods.names())
def test_adapters_are_float32_beside_a_bf16_base(make_run, tmp_path, method, final_tensors):
    run = make_run(method, "precision=bf16", steps=2)
    training.train(run, tmp_path, cpu=True)
    weights = {name: t for name, t in final_tensors(tmp_path).items() if name.startswith("model.")}
    assert weights
    assert {t.dtype for t in weights.values()} == ({torch.bfloat16} if method == "full" else {torch.float32})


def test_checkpointing_and_accumulation_change_no_weight_much(make_run, tmp_path, monkeypatch, final_tensors):
    passes = []
    forward = LlamaMLP.forward

    def counted(self, x):
        if self.training and not x.is_meta:  # without memory, the plan counts
            passes.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    training.train(make_run(), tmp_path / "plain", cpu=True)
    blocks, steps = 2, 4
    assert passes == [4] * blocks * steps
    passes.clear()
    training.train(make_run(micro_batch=1, gradient_checkpointing=True), tmp_path / "other", cpu=True)
    assert passes == [1] * blocks * steps * 4 * 2  # the backward pass computes each block once more
    for name, value in final_tensors(tmp_path / "plain").items():
        torch.testing.assert_close(final_tensors(tmp_path / "other")[name], value, rtol=1e-3, atol=1e-4)


def test_a_step_goes_down_the_gradient_of_transformers_own_loss(make_run, tmp_path, final_tensors):
    """By the rate times the gradient of the mean over all tokens of the step (in float32), in micro-batches of unequal numbers."""
    data = tmp_path / "uneven.jsonl"
    data.write_text("".join(json.dumps({"instruction": "1 + 2", "response": "3 " * (1 + i % 7)}) + "\n" for i in range(24)))
    overrides = ["precision=float64", "optimizer=sgd", "lr=0.5", "schedule=constant"]
    run = make_run("full", *overrides, data=str(data), steps=1, micro_batch=1)
    training.train(run, tmp_path, cpu=True)
    model, tokenizer = training.load_model(run.model, torch.float64)
    rows = training.load_texts(run, tokenizer).train
    [chosen] = Order(len(rows), batch_size=4, micro_batch=4, steps=1, seed=run.seed)
    batch = collate([rows[i] for i in chosen], 0)
    assert len({count_tokens(part) for part in batch["labels"].split(1)}) > 1
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    assert read_log(tmp_path)[1]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    weights = dict(model.named_parameters())
    for name, value in final_tensors(tmp_path).items():
        weight = weights[name.removeprefix("model.")]
        torch.testing.assert_close(value, (weight - 0.5 * weight.grad).detach(), rtol=0, atol=1e-6 * 0.5 * float(weight.grad.abs().max()))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU, and there is no g++")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # of the compiler's own modules
def test_a_compiled_run_is_the_plain_one(make_run, tmp_path, final_tensors):
    graphs = torch._dynamo.utils.counters["stats"]  # how many the compiler has taken over
    for name in ("plain", "compiled"):
        graphs.clear()
        overrides = ["optimizer=sgd", "lr=10", "schedule=constant_with_warmup", "warmup_ratio=0"]
        run = make_run("lora", *overrides, steps=1, compile=name == "compiled")
        training.train(run, tmp_path / name, cpu=True)
        assert (graphs["unique_graphs"] > 0) == run.compile
    for name, value in final_tensors(tmp_path / "plain").items():
        torch.testing.assert_close(final_tensors(tmp_path / "compiled")[name], value, rtol=1e-4, atol=1e-6)
        assert not name.endswith(".B") or value.abs().max() > 1e-4  # a hundred times the tolerance


def test_every_stage_tells_how_far_it_is(make_run, tmp_path):
    told = {}
    run = make_run("lora_ga", "options={gradient_samples=2}", micro_batch=1, steps=2)
    training.train(run, tmp_path, cpu=True, report=lambda stage, fraction, word="": told.setdefault(stage, []).append(fraction))
    assert list(told) == ["reading gradients", "evaluating before training", "training", "evaluating after training"]
    for stage, fractions in told.items():
        assert len(fractions) > 1, stage
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1


# Resuming

STEPS = 18


@pytest.fixture
def one_thread():
    """A forked process waits for ever for the threads of the one that it was forked from."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("method", methods.names())
@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_ends_as_the_unbroken_one(make_run, tmp_path, method, final_tensors):
    """Killed by SIGKILL at a random moment, resumed: the same bits in weights and moments."""
    overrides = ["dropout=0.1"] if method in ("lora", "lora_ga", "lora_pro", "block_lora", "nlora") else []
    run = make_run(method, *overrides, steps=STEPS)
    training.train(run, tmp_path / "unbroken", save_every=4, cpu=True)
    after = random.Random(method).randint(5, STEPS - 5)
    child = os.fork()
    if child == 0:
        try:
            training.train(run, tmp_path / "killed", save_every=4, cpu=True, report=lambda stage, fraction, word="": time.sleep(0.005))
        finally:
            os._exit(1)
    deadline = time.monotonic() + 120
    log = tmp_path / "killed" / LOG
    try:
        while not log.exists() or log.read_text().count("\n") <= after:
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    kept = checkpoints.find(tmp_path / "killed")
    assert len(kept) == 1
    assert int(kept[0].name.removeprefix("checkpoint-")) < STEPS
    resumed = training.train(run, tmp_path / "killed", save_every=4, cpu=True)
    whole, again = final_tensors(tmp_path / "unbroken"), final_tensors(tmp_path / "killed")
    assert whole.keys() == again.keys()
    for name, value in whole.items():
        assert torch.equal(again[name], value), name
    steps = [line["step"] for line in read_log(tmp_path / "killed")]
    assert steps == list(range(STEPS + 1))
    assert resumed.tokens == read_log(tmp_path / "unbroken")[-1]["tokens"]


def test_a_checkpoint_is_safetensors_and_json_in_files_of_a_size(make_run, tmp_path, final_tensors, monkeypatch):
    tensors = []
    for size, files in ((4_000, 5), (2**30, 1)):
        monkeypatch.setattr(checkpoints, "FILE_BYTES", size)
        training.train(make_run(), tmp_path / str(files), cpu=True)
        [folder] = checkpoints.find(tmp_path / str(files))
        names = sorted(path.name for path in folder.iterdir())
        assert names == [checkpoints.RUN, *(f"shard-00001-model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files))]
        tensors.append(final_tensors(tmp_path / str(files)))
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], value) for name, value in tensors[1].items())


def test_resuming_without_the_optimizer_would_be_noticed(make_run, tmp_path, final_tensors):
    run = make_run(steps=6)
    training.train(run, tmp_path / "whole", save_every=3, cpu=True)
    stop = KeyboardInterrupt

    def interrupt(stage, fraction, word=""):
        if stage == "training" and fraction > 0.6:
            raise stop

    with pytest.raises(stop):
        training.train(run, tmp_path / "cut", save_every=3, cpu=True, report=interrupt)
    [folder] = checkpoints.find(tmp_path / "cut")
    assert folder.name == "checkpoint-3"
    [path] = folder.glob("*.safetensors")
    tensors, kept = load_file(path), safe_open(path, framework="pt").metadata()
    moments = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name.endswith("exp_avg")}
    save_file(tensors | moments, path, metadata=kept)
    training.train(run, tmp_path / "cut", save_every=3, cpu=True)
    assert any(not torch.equal(final_tensors(tmp_path / "cut")[name], value) for name, value in final_tensors(tmp_path / "whole").items())
