"""What goes wrong in a full-scale run says what came, what was needed and what to do, and damages nothing."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("accelerate")
pytest.importorskip("peft")

from loracle.cli import app
from loracle.toy_tasks.config import CONFIGS, ToyError, UsageError
from loracle.toy_tasks.full_scale import checkpoints, engine, training
from loracle.toy_tasks.full_scale.log import LOG, Log
from loracle.toy_tasks.full_scale.settings import resolve

SETTINGS = ["precision=float32", "batch_size=4", "rank=2", "alpha=4", "lr=1e-2", "sequence_length=40", "dropout=0", "weight_decay=0"]


@pytest.fixture
def attempt(tiny_llama, tmp_path):
    """The message of a run that fails, from the command line, and its exit code."""

    def attempt_(*words, **replaced):
        given = {"--model": str(tiny_llama), "--data": str(tiny_llama.parent / "data.jsonl"), "--out": str(tmp_path / "out"), **replaced}
        options = [word for pair in given.items() if pair[1] is not None for word in pair]
        sets = [word for setting in SETTINGS for word in ("--set", setting)]
        source = () if words and not words[0].startswith("--") else ("lora",)
        found = CliRunner().invoke(app, ["full", "run", *sets, *options, "--cpu", "--steps", "2", *source, *words], catch_exceptions=False)
        assert "Traceback" not in found.output
        return found.exit_code, " ".join(found.output.split())

    return attempt_


def write(path, *examples):
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return str(path)


def test_wrong_names(attempt, tmp_path):
    for words, said in [
        (("lroa",), "did you mean 'lora'"),
        (("lora", "--method", "peft"), "did you mean 'peft_lora'"),
        (("lora", "--set", "lerning_rate=1"), "--set lerning_rate: a run takes no such key of [full]"),
        (("lora", "--set", "seeds=3"), "a run has one, --seed"),
        (("lora", "--set", "data=my.jsonl"), "use --data"),
        (("lora", "--set", "source=mine"), "a run takes no such key"),
        (("lora", "--set", "rank=a"), "rank is 'a'; needed a whole number"),
        (("lora", "--set", "rank=0"), "rank is 0; needed a positive number"),
        (("lora", "--set", "precision=fp16"), "float16 would need gradient scaling"),
        (("lora", "--set", "optimizer=adam"), "optimizer is 'adam'; needed one of adamw, sgd"),
        (("lora", "--set", "schedule=cosines"), "did you mean 'cosine'"),
        (("lora", "--set", "options={gama=1}"), "lora has no option 'gama'"),
        (("lora", "--engine", "fsdp"), "there are 1 process(es); start one with `loracle full run` or --engine single, several with"),
        (("lora", "--engine", "zero"), "engine"),
        (("lora", "--micro-batch", "3"), "needed a multiple of micro-batch 3"),
        (("lora", "--steps", "0"), "--steps is 0"),
        (("lora", "--template", "Q:"), "lacks {instruction}"),
        (("lora", "--set", 'target_modules=["query"]'), "model.layers.0.self_attn.q_proj"),
        (("lora", "--set", "rank=99"), "rank is 99; needed a whole number from 1 to 24"),
        ((str(tmp_path / "none.toml"),), "does not exist"),
    ]:
        code, output = attempt(*words)
        assert code == 3, output
        assert said in output, output


@pytest.fixture
def launched(tiny_llama, tmp_path):
    """What `accelerate launch` with some options says, and how many processes ran."""

    def launch(*words):
        run = ["-m", "loracle.toy_tasks.full_scale", "lora", "--model", tiny_llama, "--data", tiny_llama.parent / "data.jsonl", "--cpu"]
        sets = [word for setting in SETTINGS for word in ("--set", setting)]
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *words,
            *run,
            "--steps",
            "1",
            "--out",
            tmp_path / "out",
            *sets,
        ]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200)
        report = tmp_path / "out" / training.REPORT
        return " ".join(done.stderr.split()), json.loads(report.read_text())["ranks"] if report.exists() else None

    return launch


def test_accelerate_that_starts_one_process_instead_of_several(launched):
    said, ranks = launched("--cpu", "--num_processes", "2")
    assert ranks is None
    assert "accelerate started one process, and it seems that several were asked for" in said, said
    assert "accelerate launch --multi_gpu --num_processes N -m loracle.toy_tasks.full_scale SLUG" in said


def test_one_process_that_was_asked_for_is_right(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as accelerate sets it; MASTER_ADDR only for several
    assert engine.Engine(cpu=True).ranks == 1
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert engine.Engine("single", cpu=True).ranks == 1
    with pytest.raises(UsageError, match="started one process"):
        engine.Engine(cpu=True)


def test_wrong_data(attempt, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"instruction": "a", "response": "b"}\n{"instruction": ')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    good = [{"instruction": str(i), "response": str(i)} for i in range(30)]
    for data, more, said in [
        (str(tmp_path / "none.jsonl"), (), "could not be read: No such file"),
        (str(broken), (), "line 2 is no JSON"),
        (str(empty), (), "has no examples"),
        (write(tmp_path / "list.jsonl", [1]), (), "line 1 is no JSON object"),
        (write(tmp_path / "fields.jsonl", {"a": "b", "c": "d"}), (), "has one example"),
        (write(tmp_path / "named.jsonl", *[{"a": "b", "c": "d"}] * 9), (), "has the fields a, c; say which"),
        (
            write(tmp_path / "good.jsonl", *good),
            ("--fields", "instruction,answer"),
            "no text in the field 'answer'; it has: instruction, response",
        ),
        (write(tmp_path / "number.jsonl", *good, {"instruction": "a", "response": 3}), (), "no text in the field 'response'"),
        (write(tmp_path / "few.jsonl", *good[:3]), (), "has 2 rows and a batch 4"),
    ]:
        code, output = attempt("lora", *more, **{"--data": data})
        assert code == 3, output
        assert said in output, output


def test_wrong_model(attempt, tmp_path):
    code, output = attempt(**{"--model": str(tmp_path)})
    assert code == 3
    assert "could not be" in output


@pytest.fixture
def no_network(monkeypatch):
    """A hub where nobody answers."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # as it was, afterwards


def test_without_a_network_a_hub_id_is_given_up_at_once(attempt, no_network, tmp_path):
    start = time.monotonic()
    for words in ({"--model": "no/such"}, {"--data": "no/such"}):
        code, output = attempt(**words)
        assert code == 3
        assert re.search("no/such.*it is not here, the hub cannot be reached, and the hub's cache here lacks it", output), output
        assert "Retry" not in output
        assert "--shape" not in output  # which only plan and bench have
    found = CliRunner().invoke(app, ["full", "plan", "lora", "--model", "no/such"])
    assert "cannot be reached" in found.output
    assert "give --shape" in found.output
    assert time.monotonic() - start < 15  # 25 s of retries for each


def test_a_folder_without_a_tokenizer_says_all_that_was_tried(tiny_llama, tmp_path, attempt):
    shutil.copytree(tiny_llama, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    code, output = attempt(**{"--model": str(tmp_path / "bare")})
    assert code == 3
    assert "could not be loaded" in output
    assert not output.rstrip(". ").endswith(":"), output


def test_mixed_up_config_keys(attempt, tmp_path):
    text = (CONFIGS / "lora.toml").read_text()
    for old, new, said in [
        ("rank = 8", "lora_rank = 8", "has no key 'lora_rank'; did you mean 'rank'"),
        ("alpha = 16.0", 'alpha = "twice"', "alpha is 'twice'"),
        ("[full]", "[fulll]", "[full] lacks 'task', 'model', 'data'"),
        ("rslora = false", "gamma = 2.0", "lora has no option 'gamma'"),
    ]:
        path = tmp_path / "lora.toml"
        path.write_text(text.replace(old, new, 1))
        code, output = attempt(str(path))
        assert code == 3
        assert said in output, output


def test_a_model_too_large_for_the_device(attempt, monkeypatch):
    monkeypatch.setattr(training, "device_memory", lambda device: int(0.65 * 2**30))
    monkeypatch.setattr("loracle.toy_tasks.full_scale.memory.RUNTIME", 0.6 * 2**30)
    code, output = attempt("lora", "--set", "batch_size=4096")
    assert code == 3
    assert re.search(r"needs \d+\.\d GiB and cpu has 0\.6 GiB free; what would fit: --micro-batch \d+", output), output


def test_lora_pro_with_decay_in_bf16(tiny_llama, tmp_path):
    overrides = [*SETTINGS, "weight_decay=0.1", "precision=bf16"]
    run = resolve("lora", method="lora_pro", model=str(tiny_llama), data=str(tiny_llama.parent / "data.jsonl"), overrides=overrides)
    with pytest.raises(UsageError, match=r"rounds to nothing there; use --set precision=float32"):
        training.train(run, tmp_path, cpu=True)


# Checkpoints


@pytest.fixture
def unfinished(tiny_llama, tmp_path):
    """A run that was interrupted after step 4 of 6, with a checkpoint of step 4: its settings, and its folder."""
    data = str(tiny_llama.parent / "data.jsonl")

    def interrupt(stage, fraction, word=""):
        if stage == "training" and fraction > 0.8:
            raise KeyboardInterrupt

    def run(*overrides, **how):
        return resolve("lora", overrides=[*SETTINGS, *overrides], **{"model": str(tiny_llama), "data": data, "steps": 6, **how})

    with pytest.raises(KeyboardInterrupt):
        training.train(run(), tmp_path / "run", save_every=2, cpu=True, report=interrupt)
    return run, tmp_path / "run"


def test_a_checkpoint_of_another_run(unfinished):
    run, out = unfinished
    for other, said in [(run("rank=3"), "rank was 2 and is now 3"), (run(method="lora_ga"), "method was 'lora' and is now 'lora_ga'")]:
        with pytest.raises(UsageError, match=said):
            training.train(other, out, cpu=True)
        with pytest.raises(ToyError, match=said):
            checkpoints.read(checkpoints.find(out)[-1], other)
    # How it is computed may change
    assert training.train(run(micro_batch=2), out, cpu=True).steps == 6


def test_tensors_of_another_rank(unfinished):
    run, out = unfinished
    model, _ = training.load_model(run().model, torch.float32)
    training.attach(run("rank=3"), model, training.stand_in_gradients(model))
    saved = checkpoints.read(checkpoints.find(out)[-1], run())
    with pytest.raises(ToyError, match="it belongs to another method, rank or model"):
        checkpoints.restore_weights(saved, model)


@pytest.mark.parametrize("name", ["shard-*.safetensors", checkpoints.RUN, checkpoints.START])
def test_a_truncated_checkpoint(unfinished, name):
    run, out = unfinished
    [path] = out.glob(name) if name == checkpoints.START else checkpoints.find(out)[-1].glob(name)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ToyError, match="not whole"):
        training.train(run(), out, cpu=True)


def test_a_checkpoint_without_one_of_its_files(unfinished):
    run, out = unfinished
    [path] = checkpoints.find(out)[-1].glob("shard-*.safetensors")
    path.unlink()
    with pytest.raises(ToyError, match=f"{path} is missing or not whole"):
        training.train(run(), out, cpu=True)


def test_another_file_of_tensors_in_a_checkpoint(unfinished):
    """torch's reader would take its tensors, of an earlier step for instance, in the place of the checkpoint's own."""
    run, out = unfinished
    [path] = checkpoints.find(out)[-1].glob("shard-*.safetensors")
    (path.parent / "mine.safetensors").write_bytes(path.read_bytes())
    (path.parent / "notes.txt").write_text("kept")
    with pytest.raises(ToyError, match=r"mine\.safetensors is no part of the checkpoint"):
        training.train(run(), out, cpu=True)
    (path.parent / "mine.safetensors").unlink()
    assert training.train(run(), out, cpu=True).steps == 6


@pytest.mark.parametrize("text", [None, ""])
def test_a_run_whose_log_is_gone(unfinished, text):
    run, out = unfinished
    (out / LOG).unlink()
    if text is not None:
        (out / LOG).write_text(text)
    with pytest.raises(ToyError, match=rf"{LOG} is missing or not whole"):
        training.train(run(), out, cpu=True)


@pytest.mark.parametrize("text", ["[]", "{}"])
def test_a_checkpoint_that_says_nothing_of_its_run(unfinished, text):
    run, out = unfinished
    (checkpoints.find(out)[-1] / checkpoints.RUN).write_text(text)
    with pytest.raises(ToyError, match="has schema None"):
        training.train(run(), out, cpu=True)


def test_a_part_of_a_checkpoint_on_another_machine(unfinished, monkeypatch):
    """As if another process had no disk in common with the first: what it wrote is not there."""
    run, out = unfinished
    kept, save = checkpoints.find(out), checkpoints.save

    def save_and_lose(tensors, storage_writer):
        save(tensors, storage_writer=storage_writer)
        next(Path(storage_writer.path).glob("*-00002-of-*")).unlink()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FILE_BYTES", 4_000)
        patch.setattr(checkpoints, "save", save_and_lose)
        with pytest.raises(ToyError, match=r"is not whole in .*on a disk that they share"):
            training.train(run(), out, cpu=True)
    assert checkpoints.find(out) == kept
    assert training.train(run(), out, cpu=True).steps == 6


@pytest.mark.parametrize("steps", [4, 6])
def test_what_a_killed_save_left_is_no_part_of_the_next(unfinished, steps):
    """Two processes were about to write the checkpoint that one process writes after them, or one of another step."""
    run, out = unfinished
    [path] = checkpoints.find(out)[-1].glob("shard-*.safetensors")
    left = out / f".checkpoint-{steps}.part"
    left.mkdir()
    (left / path.name.replace("shard-00001", "shard-00002")).write_bytes(path.read_bytes())
    training.train(run(), out, cpu=True)
    [last] = checkpoints.find(out)
    assert sorted(file.name for file in last.iterdir()) == [checkpoints.RUN, path.name]
    assert not left.exists()


def test_ctrl_c_in_a_save_is_ctrl_c(unfinished, monkeypatch):
    """And it leaves the checkpoint before."""
    run, out = unfinished
    kept = checkpoints.find(out)

    def interrupt(*given, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            training.train(run(), out, save_every=1, cpu=True)
    assert checkpoints.find(out) == kept
    assert not list(out.glob(".*"))
    assert training.train(run(), out, cpu=True).steps == 6


def test_a_disk_that_is_full_leaves_the_checkpoint_before(unfinished):
    """A limit on the size of a file, set by the system, stops the writing halfway."""
    run, out = unfinished
    kept = checkpoints.find(out)[-1]
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(map(len, before.values())) // 2, limits[1]))
        with pytest.raises(ToyError, match=r"could not be written: .*File too large"):
            training.train(run(), out, save_every=1, cpu=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert checkpoints.find(out) == [kept]
    assert not list(out.glob(".*"))
    assert training.train(run(), out, cpu=True).steps == 6


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no file here that stands for a full disk")
def test_a_disk_that_is_full_for_the_log(unfinished, monkeypatch):
    """When a step is logged, and when the log is shortened to the steps of the checkpoint."""
    run, out = unfinished
    kept = checkpoints.find(out)
    with monkeypatch.context() as patch:
        patch.setattr(Log, "before", lambda self, *losses: None)
        patch.setattr(Log, "first_step", lambda self: setattr(self, "path", Path("/dev/full")))
        with pytest.raises(ToyError, match=r"could not be written: No space left on device\. The last checkpoint is untouched"):
            training.train(run(), out, cpu=True)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(ToyError, match=rf"{LOG} could not be written: No space left on device"):
            training.train(run(), out, cpu=True)
    assert checkpoints.find(out) == kept
    assert not list(out.glob(".*"))
    assert training.train(run(), out, cpu=True).steps == 6


def full(handle):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_refused_run_leaves_no_folder(attempt, tmp_path, tiny_llama):
    for words in (("--set", "options={gama=1}"), ("--set", "optimizer=adam"), ("--set", 'target_modules=["query"]')):
        code, output = attempt("lora", *words)
        assert code == 3, output
        assert not (tmp_path / "out").exists(), words
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert attempt("lora", "--set", "optimizer=adam")[0] == 3
    assert (tmp_path / "out" / "mine.txt").exists()


def test_two_processes_do_not_write_into_one_folder(unfinished):
    """The other one is alive, then killed."""
    run, out = unfinished
    program = (
        "import pathlib, sys, time\nfrom loracle.toy_tasks.full_scale import checkpoints\n"
        "@checkpoints.alone\ndef hold(run, out):\n    print('held', flush=True)\n    time.sleep(200)\n"
        "hold(None, pathlib.Path(sys.argv[1]))"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != checkpoints.LOCK}
        with pytest.raises(ToyError, match="another process is writing into"):
            training.train(run(), out, cpu=True)
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != checkpoints.LOCK} == before
    finally:
        other.kill()
        other.communicate()
    assert (out / checkpoints.LOCK).exists()  # the dead process could not take it away
    assert training.train(run(), out, cpu=True).steps == 6
    assert not (out / checkpoints.LOCK).exists()


def test_ctrl_c_says_how_to_go_on(attempt, monkeypatch):
    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    code, output = attempt()
    assert code == 130
    assert "the same command goes on from there" in output


def test_a_loss_that_is_not_finite(tiny_llama, tmp_path):
    data = str(tiny_llama.parent / "data.jsonl")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    tensors = checkpoints.load_tensors(broken / "model.safetensors")
    tensors["model.norm.weight"][:] = torch.inf
    from safetensors.torch import save_file

    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ToyError, match="lower the learning rate"):
        training.train(resolve("lora", model=str(broken), data=data, steps=2, overrides=SETTINGS), tmp_path / "out", cpu=True)
