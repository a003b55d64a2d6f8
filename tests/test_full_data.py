"""Data, batches, losses and evaluation of full-scale runs."""

import json
import math
import re
from importlib.resources import files

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("accelerate")
pytest.importorskip("peft")

import transformers

from loracle.cli import app
from loracle.toy_tasks import methods
from loracle.toy_tasks.config import CONFIGS, UsageError
from loracle.toy_tasks.full_scale import evaluation, measuring, small, training
from loracle.toy_tasks.full_scale.data import IGNORED, Order, collate, pack, read_examples, tokenise
from loracle.toy_tasks.full_scale.engine import Engine
from loracle.toy_tasks.full_scale.evaluation import count_tokens, exact_match, extract_answer, token_losses
from loracle.toy_tasks.full_scale.loop import Loop
from loracle.toy_tasks.full_scale.settings import ASSUMED, default_folder, resolve

ARITHMETIC = files("loracle.toy_tasks.full_scale") / "arithmetic.jsonl"


@pytest.fixture(scope="module")
def tiny(tiny_llama):
    return training.load_model(str(tiny_llama), torch.float64)


@pytest.fixture(scope="module")
def rows(tiny, tiny_llama):
    examples = read_examples(str(tiny_llama.parent / "data.jsonl"))
    return tokenise(examples, tiny[1], fields=("instruction", "response"), template="Q: {instruction}\nA: ", length=64)


def test_the_prompt_is_masked_and_the_end_is_learnt(tiny, rows):
    tokenizer = tiny[1]
    row = rows[0]
    learnt = [token for token in row["labels"] if token != IGNORED]
    assert tokenizer.decode(learnt[:-1]) == "0 and 0 make 0. #### 0"
    assert learnt[-1] == tokenizer.eos_token_id
    hidden = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORED]
    assert tokenizer.decode(hidden, skip_special_tokens=True) == "Q: 0 + 0 = ?\nA: "


def test_an_example_whose_response_is_cut_off_is_left_out(tiny):
    long = [{"instruction": "1 + " * 40, "response": "2"}, {"instruction": "1", "response": "2"}]
    assert len(tokenise(long, tiny[1], fields=("instruction", "response"), template="{instruction}", length=16)) == 1


def test_a_first_token_is_no_label():
    """By it the count of tokens is the same for the models of which transformers knows that they shift, and for others."""
    batch = collate([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 8, 9], "labels": [7, 8, 9]}], 0)
    assert batch["labels"].tolist() == [[IGNORED, 6, IGNORED], [IGNORED, 8, 9]]


def test_the_loss_is_that_of_transformers(tiny, rows):
    model = tiny[0].to(torch.float32)
    batch = collate(rows[:5], 0)
    ours = token_losses(model(input_ids=batch["input_ids"]).logits, batch["labels"]) / count_tokens(batch["labels"])
    torch.testing.assert_close(ours, model(**batch).loss, rtol=1e-5, atol=1e-6)
    model.to(torch.float64)


def test_the_mean_loss_is_that_of_numpy(tiny, rows):
    model, total, count = tiny[0], 0.0, 0
    # Unequal numbers of tokens: a mean of the rows' means would be another
    rows = [{key: values[: len(values) - 2 * (i % 3)] for key, values in row.items()} for i, row in enumerate(rows[:7])]
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].numpy()
        logits = logits - logits.max(axis=1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for at, label in enumerate(row["labels"][1:]):
            if label != IGNORED:
                total, count = total - logs[at, label], count + 1
    found = Loop(model, Engine("single", cpu=True), size=3, padding=0).mean_loss(rows)
    assert found == pytest.approx(total / count, rel=1e-12)
    assert evaluation.perplexity(found) == pytest.approx(math.exp(total / count))


def test_packed_examples_do_not_see_each_other(tiny, rows):
    model = tiny[0]
    packed = pack(rows[:9], 96)
    assert 1 < len(packed) < 9
    assert all(len(row["input_ids"]) <= 96 for row in packed)
    together = Loop(model, Engine("single", cpu=True), size=2, padding=0).mean_loss(packed)
    alone = Loop(model, Engine("single", cpu=True), size=1, padding=0).mean_loss(rows[:9])
    assert together == pytest.approx(alone, rel=1e-12)


def test_two_ranks_see_what_one_sees_and_resuming_goes_on():
    how = {"batch_size": 8, "steps": 7, "seed": 3}
    one = list(Order(21, micro_batch=4, **how))
    two = [list(Order(21, micro_batch=2, rank=rank, ranks=2, **how)) for rank in range(2)]
    assert [a + b for a, b in zip(*two, strict=True)] == [one[i] for i in range(14)]
    assert list(Order(21, micro_batch=4, first=3, **how)) == one[6:]
    assert len(Order(21, micro_batch=4, first=3, **how)) == 8
    epoch = [row for batch in one[:4] for row in batch]  # two steps of eight rows make an epoch of 21
    assert len(set(epoch)) == 16
    assert one[:4] != one[4:8]
    with pytest.raises(UsageError, match="5 rows and a batch 8"):
        Order(5, micro_batch=4, **how)


def test_the_domains_are_apart():
    old, new = small.old_domain(), small.new_domain()
    for split in (old, new):
        held_out = {json.dumps(example) for example in split.held_out}
        assert held_out
        assert len(split.train) > 5 * len(split.held_out)
    assert all(example["instruction"].lstrip().startswith("def ") for example in new.train)


# Answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3 and 4 are 7", "7"),
        ("first 5.\n#### 1,234", "1234"),
        ("#### -3", "-3"),
        ("it costs $12.50", "12.5"),
        ("#### 8.00", "8"),
        ("100", "100"),
        ("no number", None),
        ("5 is wrong\n#### none", None),
        ("#### 6 apples, not 7", "6"),
    ],
)
def test_answers_are_extracted(text, answer):
    assert extract_answer(text) == answer


def test_the_shipped_problems_have_one_answer_each():
    examples = read_examples(str(ARITHMETIC))
    assert len(examples) == 20
    for example in examples:
        working, answer = example["answer"].split("\n#### ")
        assert extract_answer(working) == extract_answer(answer) == extract_answer(example["answer"]), example


def test_exact_match_counts_right_answers(tiny, monkeypatch):
    examples = read_examples(str(ARITHMETIC))
    asked = []

    def answer(model, tokenizer, prompts, *, max_new_tokens):
        asked.extend(prompts)
        said = {f"Q: {e['question']}\nA: ": e["answer"] for e in examples[:15]}
        return [said.get(prompt, "I do not know") + "\nQ: another? 99" for prompt in prompts]

    monkeypatch.setattr(evaluation, "generate", answer)
    found = exact_match(*tiny, examples, fields=("question", "answer"), template="Q: {instruction}\nA: ")
    assert len(asked) == len(found) == 20
    assert [match.found == match.needed for match in found] == [True] * 15 + [False] * 5


def test_generation_does_not_depend_on_what_stands_beside_it(tiny):
    prompts = ["1 + 2 = ?", "3"]
    both = evaluation.generate(*tiny, prompts, max_new_tokens=6)
    assert both == [evaluation.generate(*tiny, [prompt], max_new_tokens=6)[0] for prompt in prompts]


@pytest.fixture(scope="module")
def learnt(tiny_llama, tmp_path_factory):
    """A folder with a model that has learnt a few sums by heart, with questions of uneven length, and those examples."""
    model, tokenizer = training.load_model(str(tiny_llama), torch.float32)
    examples = [example | {"instruction": "and " * i + example["instruction"]} for i, example in enumerate(SUMS)]
    batch = collate(tokenise(examples, tokenizer, fields=("instruction", "response"), template=measuring.TEMPLATE, length=64), 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("learnt")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, examples


SUMS = [{"instruction": f"{a} + 5 = ?", "response": f"{a} and 5 make {a + 5}{' make' * a}. #### {a + 5}"} for a in range(5)]


def test_generation_takes_the_likeliest_token_each_time(learnt):
    """Of each prompt alone, without padding, cache or mask; some texts end by themselves and some are cut off."""
    model, tokenizer = training.load_model(str(learnt[0]), torch.float64)
    prompts = [measuring.TEMPLATE.replace("{instruction}", example["instruction"]) for example in learnt[1][::2]]
    prompts += ["5", "Q: 1 + 2 = ?", "1 + 2 + 3 + 4 + 5, 6 and 7 make what? " * 2]
    most, expected, ended = 10, [], 0
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids
        begin = len(ids)
        while len(ids) < begin + most and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        ended += ids[-1] == tokenizer.eos_token_id
        expected.append(tokenizer.decode(ids[begin:], skip_special_tokens=True))
    assert 0 < ended < len(prompts)
    assert len({len(tokenizer(prompt).input_ids) for prompt in prompts}) > 3
    assert len(set(expected)) == len(prompts)
    assert evaluation.generate(model, tokenizer, prompts, max_new_tokens=most) == expected
    assert tokenizer.padding_side == "right"


def test_the_command_counts_what_a_model_has_learnt(learnt, tmp_path):
    folder, examples = learnt
    wrong = [examples[i] | {"response": "#### 99"} for i in (0, 3)]
    data, out = tmp_path / "sums.jsonl", tmp_path / "numbers.json"
    data.write_text("".join(json.dumps(example) + "\n" for example in [*wrong, *examples, *examples]))
    words = ["full", "eval", str(folder), "--data", str(data), "--kind", "exact_match", "--length", "24", "--out", str(out)]
    found = CliRunner().invoke(app, words, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    assert "83.3 % (10 of 12)" in found.output
    answers = json.loads(out.read_text())["answers"]
    assert [answer["found"] for answer in answers] == ["5", "8", *[str(a + 5) for a in range(5)] * 2]
    assert [answer["needed"] for answer in answers[:2]] == ["99", "99"]
    assert answers[0]["text"] == "0 and 5 make 5. #### 5"


def test_the_command_measures_a_model(tiny_llama, tmp_path):
    def invoke(*words):
        return CliRunner().invoke(app, ["full", "eval", str(tiny_llama), "--data", *words], catch_exceptions=False)

    numbers = tmp_path / "numbers.json"
    found = invoke(str(ARITHMETIC), "--kind", "exact_match", "--samples", "3", "--length", "4", "--out", str(numbers))
    assert found.exit_code == 0, found.output
    assert "of 3)" in found.output
    written = json.loads(numbers.read_text())
    assert (written["examples"], len(written["answers"])) == (3, 3)
    assert "perplexity" in invoke(str(tiny_llama.parent / "data.jsonl"), "--samples", "4").output
    assert invoke(str(ARITHMETIC), "--kind", "bleu").exit_code == 3
    with pytest.raises(UsageError, match="needs a question and an answer"):
        measuring.measure(str(tiny_llama), str(ARITHMETIC), "exact_match", fields=("question",))


# Settings


GIVEN = "any/model"  # several papers do not say which
SLUGS = [slug for slug in methods.names() if (CONFIGS / f"{slug}.toml").exists()]


@pytest.mark.parametrize("slug", SLUGS)
def test_unknown_values_are_marked_and_no_other(slug):
    from loracle.toy_tasks.config import load_full

    full = load_full(slug)
    given = {"precision": "bf16"} if full.precision == "fp16" else {}  # which is refused, and the message says why
    run = resolve(slug, model=GIVEN, data=GIVEN, overrides=[f"{key}={value}" for key, value in given.items()])
    in_options = {"options"} if "unknown" in full.options.values() else set()
    assert set(run.assumed) == {key for key in ASSUMED if getattr(full, key) == "unknown"} | in_options
    # What stands in the place of an unknown option is the method's default
    assert methods.make(slug, run.options) == methods.make(slug, {key: value for key, value in full.options.items() if value != "unknown"})
    for key in ASSUMED:
        if key not in run.assumed and key not in given:
            assert getattr(run, key) == getattr(full, key), key
    assert in_options or run.options == full.options
    assert "lr" not in resolve(slug, model=GIVEN, data=GIVEN, overrides=["lr=1e-3", "precision=bf16"]).assumed
    assert resolve(slug).model == "small"


@pytest.mark.parametrize(
    ("slug", "command", "said"),
    [
        ("block_lora", "run", r"is image classification \(CLIP ViT-B/16.*give one with --model ID --data FILE.*precision \(fp16\)$"),
        ("block_lora", "plan", "only causal language models can be trained here"),
        ("loldu", "run", r"image classification \(google/vit.*such as target_modules \(query, value\)$"),
        ("loldu", "plan", "only causal language models can be trained here"),
        ("randlora", "run", "the data of this run is described in its config and not named: 'commonsense_170k, .*--data"),
        ("allora", "run", "the model of this run is unknown in its source; give one with --model"),
    ],
)
def test_a_paper_that_cannot_be_run_as_it_is_says_so_first(slug, command, said):
    found = CliRunner().invoke(app, ["full", command, slug, "--model", "paper"], catch_exceptions=False)
    assert found.exit_code == 3
    assert re.search(said, " ".join(found.output.split())), found.output


def test_runs_of_different_models_have_different_folders():
    folders = [default_folder(resolve("lora", **how)) for how in ({}, {"model": "paper"}, {"model": "./my llama/", "data": GIVEN})]
    assert [str(folder) for folder in folders] == ["runs/full/lora", "runs/full/lora-Llama-2-7b-hf", "runs/full/lora-myllama"]


def test_only_configs_of_a_paper_are_offered():
    with pytest.raises(UsageError, match="there is no config 'compare'; known: allora, block_lora, loldu") as caught:
        resolve("compare")
    assert "compare" not in str(caught.value).partition("known: ")[2]


def test_a_plan_needs_no_data(monkeypatch):
    from loracle.toy_tasks.full_scale import memory

    monkeypatch.setattr(memory, "known_config", lambda model, shape: small.config())
    found = CliRunner().invoke(app, ["full", "plan", "randlora", "--model", "paper", "--memory", "80"], catch_exceptions=False)
    assert found.exit_code == 0, found.output


def test_the_papers_number_of_samples_counts_for_its_data():
    papers = {slug: resolve(slug, model="paper").samples for slug in ("lora", "lora_ga", "lora_pro", "nlora", "lora_sb")}
    assert papers == {"lora": 100_000, "lora_ga": 100_000, "lora_pro": 100_000, "nlora": 100_000, "lora_sb": 50_000}
    assert resolve("lora", model=GIVEN, data="paper").samples == 100_000
    assert resolve("lora", model="paper", data="my.jsonl").samples is None
    assert resolve("lora").samples is None
    for how in ({"samples": 7}, {"overrides": ["samples=7"]}, {"overrides": ["samples=9"], "samples": 7}):
        run = resolve("lora", model="paper", **how)
        assert run.samples == 7
        assert "samples" in run.changed
    assert resolve("lora", model="paper", overrides=["samples=all"]).samples is None


def test_an_unknown_number_of_samples_is_all_and_marked(tmp_path):
    path = tmp_path / "lora.toml"
    path.write_text((CONFIGS / "lora.toml").read_text().replace("samples = 100_000", 'samples = "unknown"'))
    run = resolve(str(path))
    assert run.samples is None
    assert "samples" in run.assumed
    assert "samples" not in resolve(str(path), data="my.jsonl").assumed


@pytest.mark.parametrize("slug", SLUGS)
def test_a_papers_own_options_go_into_the_small_model(slug):
    from transformers import LlamaForCausalLM

    run, model = resolve(slug), LlamaForCausalLM(small.config())
    _, added, touched = training.attach(run, model, training.stand_in_gradients(model))
    assert len(added) >= len(run.target_modules) * small.LAYERS
    assert {id(p) for p in added} == {id(p) for p in model.parameters() if p.requires_grad}
    assert touched


def test_the_help_teaches():
    for command in ("run", "plan", "eval", "export", "bench"):
        found = CliRunner().invoke(app, ["full", command, "--help"])
        assert found.exit_code == 0
        assert f"loracle full {command}" in found.output


def test_the_papers_figures_stand_beside_the_result(tiny_llama, tmp_path):
    """At the end of a run on the config's own model and data, and of no other."""
    path, data = tmp_path / "lora.toml", str(tiny_llama.parent / "data.jsonl")
    text = (CONFIGS / "lora.toml").read_text()
    for old, new in {"meta-llama/Llama-2-7b-hf": str(tiny_llama), "meta-math/MetaMathQA": data, "bf16": "float32"}.items():
        text = text.replace(old, new)
    path.write_text(text)
    own = tmp_path / "own.jsonl"
    own.write_text((tiny_llama.parent / "data.jsonl").read_text())
    said = []
    for more in ((), ("--data", str(own))):
        words = ["full", "run", str(path), "--cpu", "--steps", "1", "--set", "batch_size=4", "--out", str(tmp_path / str(len(said))), *more]
        found = CliRunner().invoke(app, words, catch_exceptions=False)
        assert found.exit_code == 0, found.output
        said.append(found.output)
    assert "how many seeds is unknown" in said[0]
    assert re.search(r"GLUE average.*87\.2 \(from memory\)", said[0])
    assert re.search(r"GSM8K.*42\.08 +│", said[0])
    assert "42.08" not in said[1]


def test_the_smoke_path_learns_python_and_forgets(tmp_path, monkeypatch):
    """No model, no network, as a user types it; a much shorter pretraining and run than his."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(small, "STEPS", 6)
    found = CliRunner().invoke(app, ["full", "run", "lora", "--steps", "6", "--cpu"], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    for word in ("new domain", "old domain", "forgetting", "perplexity", "tokens/s", "peak memory", "prompt:"):
        assert word in found.output
    report = json.loads((tmp_path / "runs/full/lora/report.json").read_text())
    assert report["loss_after"] < report["loss_before"]
    assert report["forgetting"] == report["old_loss_after"] - report["old_loss_before"]
    again = CliRunner().invoke(app, ["full", "run", "lora", "--steps", "6", "--cpu"], catch_exceptions=False)
    assert again.exit_code == 3
    assert isinstance(transformers.AutoConfig.from_pretrained("runs/small-llama"), transformers.LlamaConfig)
