"""What a run leaves can be loaded elsewhere, and computes the same."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

pytest.importorskip("accelerate")
pytest.importorskip("peft")

import peft
import transformers

from loracle.cli import app
from loracle.toy_tasks import methods
from loracle.toy_tasks.config import UsageError
from loracle.toy_tasks.full_scale import checkpoints, exports, measuring, training
from loracle.toy_tasks.full_scale.settings import resolve

pytestmark = [
    # PEFT asks transformers by a name that is on its way out
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # It expects RandLoRA's bases once for each layer, though the layers share them
    pytest.mark.filterwarnings("ignore:Found missing adapter keys while loading the checkpoint. .'[^']*randlora_A:UserWarning"),
]

SETTINGS = ["batch_size=8", "rank=2", "alpha=4", "lr=2e-2", "sequence_length=40", "dropout=0", "precision=float32"]
# float32 and two layers: a sum of 40 products of another order, in logits of size 1
TOLERANCE = 2e-5


def runs():
    found = {method: (method, []) for method in methods.names()}
    return found | {"lora_pro with decay": ("lora_pro", ["weight_decay=0.5"])}


@pytest.fixture(scope="module")
def finished(tiny_llama, tmp_path_factory):
    """The folder of a finished run, by name; each is run once."""
    done = {}

    def finish(name):
        if name not in done:
            method, overrides = runs()[name]
            out = tmp_path_factory.mktemp("run")
            given = {"model": str(tiny_llama), "data": str(tiny_llama.parent / "data.jsonl"), "steps": 5}
            training.train(resolve("lora", method=method, overrides=[*SETTINGS, *overrides], **given), out, cpu=True)
            done[name] = out
        return done[name]

    return finish


def logits(model):
    ids = torch.arange(24).view(2, 12) + 3
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def pretrained(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("name", runs())
def test_trained_merged_and_reloaded_agree(finished, tiny_llama, tmp_path, name):
    out = finished(name)
    expected = logits(exports.load_trained(out).model)
    assert (expected - logits(pretrained(tiny_llama))).abs().max() > 100 * TOLERANCE  # training moved the model
    kind, why = exports.export(out, tmp_path / "export")
    if kind == "peft":
        reloaded = peft.PeftModel.from_pretrained(pretrained(tiny_llama), tmp_path / "export")
    else:
        assert why != "asked for"
        reloaded = pretrained(tmp_path / "export")
    torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=TOLERANCE)
    exports.export(out, tmp_path / "merged", "merged")
    torch.testing.assert_close(logits(pretrained(tmp_path / "merged")), expected, rtol=0, atol=TOLERANCE)
    assert {path.suffix for path in tmp_path.rglob("*.*") if path.is_file()} <= {".safetensors", ".json", ".jinja"}


@pytest.mark.parametrize(("name", "rank"), [("lora", 2), ("lora_ga", 4), ("lora_pro", 2), ("lora_sb", 2), ("peft_lora", 2)])
def test_the_rank_of_an_adapter(finished, tmp_path, name, rank):
    exports.export(finished(name), tmp_path / "export")
    config = json.loads((tmp_path / "export" / exports.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    assert {t.shape[0] for key, t in load_file(tmp_path / "export" / exports.ADAPTER).items() if "lora_A" in key} == {rank}


@pytest.mark.parametrize("name", ["full", "lora_pro with decay"])
def test_what_is_no_adapter_says_why(finished, tmp_path, name):
    with pytest.raises(UsageError, match=r"cannot be exported as an adapter: .*(trained|changed).*merged"):
        exports.export(finished(name), tmp_path / "export", "peft")


def test_an_export_overwrites_nothing(finished, tmp_path):
    with pytest.raises(UsageError, match="there already"):
        exports.export(finished("lora"), tmp_path)
    with pytest.raises(UsageError, match="no checkpoint"):
        exports.export(tmp_path, tmp_path / "export")
    with pytest.raises(UsageError, match="peft or merged"):
        exports.export(finished("lora"), tmp_path / "export", "gguf")


def test_a_randlora_that_peft_cannot_pair_says_why_and_is_merged(tiny_llama, tmp_path):
    """A key layer of half the width has half the terms."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tiny_llama, num_key_value_heads=1)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "model")
    given = {"model": str(tmp_path / "model"), "data": str(tiny_llama.parent / "data.jsonl"), "steps": 2}
    targets = 'target_modules=["q_proj", "k_proj"]'
    for rank, kind in ((5, "merged"), (1, "peft")):
        out, to = tmp_path / f"run{rank}", tmp_path / f"export{rank}"
        training.train(resolve("lora", method="randlora", overrides=[*SETTINGS, targets, f"rank={rank}"], **given), out, cpu=True)
        expected = logits(exports.load_trained(out).model)
        made, why = exports.export(out, to)
        assert made == kind
        if kind == "merged":
            assert "its layers have 3 and 5 terms" in why
            with pytest.raises(UsageError, match=r"3 and 5 terms.*use --kind merged"):
                exports.export(out, tmp_path / "adapter", "peft")
            reloaded = pretrained(to)
        else:  # the terms of rank 1 are in the same order for any number of them, and have scalings of their own
            reloaded = peft.PeftModel.from_pretrained(pretrained(tmp_path / "model"), to)
        torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("method", "kind"), [("lora_ga", "peft"), ("randlora", "peft"), ("lora", "merged")])
def test_eval_of_an_export_is_that_of_the_run(tiny_llama, tmp_path, method, kind):
    """With a template and a length that are not the defaults, which change the perplexity."""
    data, out, to = tiny_llama.parent / "data.jsonl", tmp_path / "run", tmp_path / "export"
    given = {"model": str(tiny_llama), "data": str(data), "steps": 2, "template": "What is {instruction} It is "}
    overrides = [*SETTINGS, "sequence_length=30"]
    training.train(resolve("lora", method=method, overrides=overrides, **given), out, cpu=True)
    exports.export(out, to, kind)

    def perplexity(target, *words):
        found = CliRunner().invoke(app, ["full", "eval", str(target), "--data", str(data), *words], catch_exceptions=False)
        assert found.exit_code == 0, found.output
        number, reading = re.fullmatch(r"perplexity ([\d.]+) \(.*\); (.*)\n", found.stdout).groups()
        return float(number), reading

    of_run, reading = perplexity(out)
    assert reading == "template 'What is {instruction} It is ', 30 tokens of a row"
    of_export, same = perplexity(to)
    assert same == reading
    assert of_export == pytest.approx(of_run, rel=1e-4)
    other, _ = perplexity(to, "--template", "Q: {instruction}")
    assert abs(other - of_run) > 1e-3 * of_run


def test_eval_of_an_adapter_without_its_base_says_where_it_looked(finished, tmp_path):
    exports.export(finished("lora"), tmp_path / "export")
    path = tmp_path / "export" / exports.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UsageError, match=r"is an adapter of '.*gone' \(adapter_config.json\).*could not be loaded"):
        measuring.load_any(str(tmp_path / "export"))


def test_the_bases_of_randlora_are_stored_once(finished, tmp_path):
    out = finished("randlora")
    exports.export(out, tmp_path / "export")
    for path in (out / checkpoints.START, tmp_path / "export" / exports.ADAPTER):
        shapes = [tuple(tensor.shape) for tensor in load_file(path).values()]
        assert sum(shape[-1] == 2 and len(shape) == 3 for shape in shapes) == 1, path  # B (large, terms, rank)
