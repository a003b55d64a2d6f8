"""The comparison is fair: who takes part, what is tuned with which seeds, what is counted; and its table says what was measured."""

import copy
import dataclasses
import math
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from loracle.cli import toy as command
from loracle.toy_tasks import experiment, methods, records
from loracle.toy_tasks.config import UsageError
from loracle.toy_tasks.experiment import Trial
from loracle.toy_tasks.methods import lora
from loracle.toy_tasks.records import read_results
from loracle.toy_tasks.tasks import compare

QUICK = experiment.load("compare", quick=True)[1]
PARTS = ("layer", "digits")
ENTRANTS = compare.entrants()


@pytest.fixture(scope="module")
def published():
    return read_results(records.PUBLISHED / "compare.json")


@pytest.fixture(scope="module")
def layer():
    return compare.make_layer(QUICK, Trial((0, 1)), tuning=False)


def constant(results, name):
    """A metric that is the same for every seed."""
    (value,) = set(results.metrics[name].values)
    return value


# --- who takes part ---


def test_every_method_takes_part_but_lora_s_twin():
    present = {type(entrant.method).__module__.rpartition(".")[2] for entrant in ENTRANTS.values()}
    assert set(methods.names()) - present == {"peft_lora"}
    assert next(iter(ENTRANTS)) == "lora"
    assert len({entrant.label for entrant in ENTRANTS.values()}) == len(ENTRANTS)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("which", ["quick", "published"])
def test_every_entrant_is_measured_at_the_same_rank_and_once_more_where_its_count_differs(request, quick_run, part, which):
    results = quick_run("compare") if which == "quick" else request.getfixturevalue("published")
    variants = {name.split(".")[1] for name in results.metrics if name.startswith(f"{part}.")}
    assert {name.removesuffix("_equal_count") for name in variants} == set(ENTRANTS), "run `loracle toy compare` and publish its results"
    assert {constant(results, f"{part}.{name}.rank") for name in ENTRANTS} == {results.config["rank"]}
    wanted = constant(results, f"{part}.lora.parameters")
    for name in ENTRANTS:
        if f"{name}_equal_count" in variants:
            at_equal_rank, nearer = (constant(results, f"{part}.{variant}.parameters") for variant in (name, f"{name}_equal_count"))
            assert abs(nearer - wanted) < abs(at_equal_rank - wanted)
            assert nearer <= 1.1 * wanted or nearer < at_equal_rank


# --- what is tuned ---


@pytest.mark.parametrize("which", ["quick", "published"])
def test_every_row_gets_the_same_tuning_and_keeps_the_best(request, quick_run, which):
    results = quick_run("compare") if which == "quick" else request.getfixturevalue("published")
    config = results.config
    rows = [name.removesuffix(".lr") for name in results.metrics if name.endswith(".lr")]
    assert {constant(results, f"{row}.runs") for row in rows} == {len(config["rates"]) * config["tuning_seeds"]}
    assert {f"{row}.tuning" for row in rows} == set(results.curves)
    for row in rows:
        curve = results.curves[f"{row}.tuning"]
        assert curve.steps == tuple(config["rates"])
        assert len(curve.values) == config["tuning_seeds"]
        means = np.mean([[math.inf if v is None else v for v in values] for values in curve.values], axis=0)
        tried = dict(zip(curve.steps, means, strict=True))
        assert tried[round(constant(results, f"{row}.lr") * 10000)] == pytest.approx(min(means), rel=1e-5)


def test_no_published_row_is_best_at_the_edge_of_the_learning_rates(published):
    assert compare.find_edges(published) == []


def test_an_edge_is_found(published):
    metric = records.Metric((0.001,), 0.001, 0.001, 0.001, None)
    changed = dataclasses.replace(published, metrics=published.metrics | {"layer.lora.lr": metric})
    assert published.config["rates"][0] == 10
    assert compare.find_edges(changed) == ["layer.lora"]


def test_tuning_and_reporting_seeds_are_disjoint(published):
    tuned = range(published.config["first_tuning_seed"], published.config["first_tuning_seed"] + published.config["tuning_seeds"])
    assert not set(tuned) & set(published.seeds)
    assert len(published.seeds) >= 5
    config = dataclasses.replace(QUICK, first_tuning_seed=2)
    with pytest.raises(UsageError, match=r"seeds \[2, 3\] would be tuned on and reported"):
        compare.run_race(config, Trial(range(4)), compare.make_layer, 1)


def test_what_is_reported_has_no_say_in_the_choice_of_the_learning_rate():
    """Other reporting seeds: other results, the same tuning."""
    measured = [compare.run_race(QUICK, Trial(seeds), compare.make_layer, 2) for seeds in ((0, 1), (2, 3))]
    assert measured[0].curves == measured[1].curves
    for name in ENTRANTS:
        assert measured[0].values[f"{name}.lr"] == measured[1].values[f"{name}.lr"]
        assert measured[0].values[f"{name}.loss"] != measured[1].values[f"{name}.loss"]


def test_no_image_that_accuracy_is_reported_on_is_seen_before():
    """All images differ, so they can be told apart by their pixels."""
    tuning, reporting = (compare.make_digits(QUICK, Trial(seeds), tuning=tuning) for seeds, tuning in (((7, 8), True), ((0, 1), False)))

    def images(*samples):
        return {bytes(x.numpy()) for own in samples for x in own.x}

    tested = images(*reporting.held_out)
    assert len(tested) == QUICK.digits_test
    assert not tested & images(*reporting.train, *tuning.train, *tuning.held_out)
    for own in range(2):
        assert not images(tuning.train[own]) & images(tuning.held_out[own])
    assert images(tuning.train[0]) != images(tuning.train[1])


# --- what is counted ---


@pytest.mark.parametrize("name", ENTRANTS)
def test_trained_numbers_are_those_that_training_changes(name, layer):
    """Counted once more by comparing all tensors before and after some steps."""
    method = ENTRANTS[name].method
    model = compare.attach(method, layer, 0, QUICK.rank, 1e-2, QUICK, torch.Generator().manual_seed(0))
    before = copy.deepcopy(model.state_dict())
    optimizer = method.optimizer(model, lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        layer.error(model(layer.train[0].x), layer.train[0].y).backward()
        optimizer.step()
    changed = sum(int((tensor != before[key]).sum()) for key, tensor in model.state_dict().items())
    assert changed == compare.num_trainable(method, layer, QUICK.rank, QUICK)


def test_the_published_counts_of_lora_and_full_fine_tuning_are_those_of_their_shapes(published):
    config, rank = published.config, published.config["rank"]
    out, into, hidden = config["layer_out"], config["layer_in"], config["digits_hidden"]
    assert constant(published, "layer.lora.parameters") == rank * (out + into)
    assert constant(published, "digits.lora.parameters") == rank * (64 + 3 * hidden)
    assert constant(published, "layer.full.parameters") == out * into
    assert constant(published, "digits.full.parameters") == (64 + hidden) * hidden


@pytest.mark.parametrize(
    ("counts", "rank"),
    [
        ({2: 60, 5: 99, 6: 102}, 5),
        ({5: 93, 6: 105}, 6),
        ({5: 85, 6: 111}, 5),
        ({2: 300, 5: 120, 6: 111}, 6),
        ({5: 7, 6: 7}, 6),
        ({9: 100}, 9),
    ],
)
def test_equal_count_takes_the_nearest_up_to_a_tenth_above_and_else_the_least(layer, counts, rank, monkeypatch):
    def count(method, problem, rank, config):
        if rank not in counts and rank != QUICK.rank:
            raise ValueError("no such rank")
        return counts.get(rank, 1000)

    monkeypatch.setattr(compare, "num_trainable", count)
    assert compare.equal_count_rank(lora.Method(), layer, QUICK, 100) == rank


# --- what is measured ---


def test_results_of_the_layer_by_another_road(layer):
    """LoRA's training written out for one seed in NumPy, with AdamW's bias corrections and decay of zero."""
    lr, config = 0.02, dataclasses.replace(QUICK, layer_steps=20)
    race = compare._Race(config, Trial((0, 1)), compare.make_layer, config.layer_steps)
    found = race.report(lora.Method(), config.rank, lr, lambda: None)["loss"]
    for i in (0, 1):
        problem = race.problems[race.reporting]
        model = compare.attach(lora.Method(), problem, i, config.rank, lr, config, race.reporting.generators(stream=1)[i])
        W0, A, B = (t.detach().double().numpy() for t in (model[0].base.weight, model[0].A, model[0].B))
        x, y, test_x, test_y = (t.double().numpy() for t in (*problem.train[i], *problem.held_out[i]))
        moments = [[np.zeros_like(p), np.zeros_like(p)] for p in (A, B)]
        for t in range(1, config.layer_steps + 1):
            out = np.tanh(x @ (W0 + B @ A).T)
            G = 2 * ((out - y) * (1 - out**2)).T @ x / len(x)
            updated = []
            for p, g, moment in zip((A, B), (B.T @ G, G @ A.T), moments, strict=True):
                moment[:] = 0.9 * moment[0] + 0.1 * g, 0.999 * moment[1] + 0.001 * g * g
                updated.append(p - lr * moment[0] / (1 - 0.9**t) / (np.sqrt(moment[1] / (1 - 0.999**t)) + 1e-8))
            A, B = updated
        left = np.sum((np.tanh(test_x @ (W0 + B @ A).T) - test_y) ** 2) / np.sum((np.tanh(test_x @ W0.T) - test_y) ** 2)
        assert found[i] == pytest.approx(left, rel=1e-3)


def test_a_method_that_moves_nothing_scores_the_start(layer):
    start = layer.models[0]
    assert layer.measure(0, start) == (pytest.approx(1.0),)
    digits = compare.make_digits(QUICK, Trial((0, 1)), tuning=False)
    accuracy, forgetting = digits.measure(1, digits.models[1])
    assert forgetting == pytest.approx(0.0, abs=1e-7)
    x, y = digits.held_out[1]
    upright = torch.rot90(x.reshape(-1, 8, 8), -1, dims=(1, 2)).flatten(1)
    shares = [np.mean(digits.models[1](images).argmax(dim=1).numpy() == y.numpy()) for images in (x, upright)]
    assert accuracy == pytest.approx(shares[0])
    assert shares[1] > shares[0] + 0.2, "it knows the upright digits, and not the turned ones"


def test_gradients_that_a_method_starts_from_are_those_of_the_first_samples(layer):
    given = {}

    @dataclasses.dataclass(frozen=True)
    class Curious(lora.Method):
        def attach(self, model, setup):
            given.update(setup.gradients(20))
            return super().attach(model, setup)

    compare.attach(Curious(), layer, 1, QUICK.rank, 1e-2, QUICK, torch.Generator())
    x, y, W = (t.detach().double().numpy() for t in (*layer.train[1], layer.models[1][0].weight))
    out = np.tanh(x[:20] @ W.T)
    np.testing.assert_allclose(given["0"], 2 * ((out - y[:20]) * (1 - out**2)).T @ x[:20] / 20, rtol=1e-4, atol=1e-6)


def test_a_run_that_diverges_loses_its_learning_rate_and_is_reported_as_missing(monkeypatch):
    race = compare._Race(dataclasses.replace(QUICK, rates=(10, 20)), Trial((0, 1)), compare.make_layer, 8)

    def break_down(trial, steps, value):
        calls = iter(range(1000))

        def error(outputs, y):
            return outputs.sum() * (value if next(calls) < steps else 1.0)

        monkeypatch.setitem(race.problems, trial, race.problems[trial]._replace(error=error))

    break_down(race.tuning, 1, math.nan)
    method = lora.Method()
    losses = race.tune(method, 4, lambda: None)
    assert losses.isinf().tolist() == [[True, False], [False, False]]
    break_down(race.reporting, 1, -math.inf)
    assert list(map(math.isnan, race.report(method, 4, 1e-3, lambda: None)["loss"])) == [True, False]

    def fail(*args, **options):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    assert race.tune(method, 4, lambda: None).isinf().all()


# --- the table and the command ---


@pytest.mark.parametrize("which", ["quick", "published"])
def test_the_table_has_all_methods_in_four_sections_and_marks_what_is_not_equal(request, quick_run, which):
    results = quick_run("compare") if which == "quick" else request.getfixturevalue("published")
    sections = compare.sections(results)
    assert [section.title for section in sections] == [
        "Layer, equal rank",
        "Layer, equal count",
        "Digits, equal rank",
        "Digits, equal count",
    ]
    for section, part in zip(sections, ("layer", "layer", "digits", "digits"), strict=True):
        rows = [dict(zip(compare.HEADINGS, row, strict=True)) for row in section.rows]
        assert [row["method"] for row in rows] == [entrant.label for entrant in ENTRANTS.values()]
        wanted = constant(results, f"{part}.lora.parameters")
        for row in rows:
            count = int(row["trained"].replace(",", "").removesuffix("*"))
            assert row["trained"].endswith("*") == (not 0.9 * wanted <= count <= 1.1 * wanted)
            assert bool(row["minus LoRA"]) == (row["method"] != "LoRA")
            assert bool(row["forgets"]) == (part == "digits")


@pytest.mark.parametrize(
    ("difference", "good", "verdict"),
    [
        ((0.15, 0.1, 0.2), 1, "better"),
        ((0.15, 0.1, 0.2), -1, "worse"),
        ((-0.15, -0.2, -0.1), -1, "better"),
        ((0.05, -0.1, 0.2), 1, "-"),
        ((0.0002, 0.0001, 0.0003), 1, "-"),
        ((None, None, None), -1, "worse"),
    ],
)
def test_better_and_worse(difference, good, verdict):
    assert compare._verdict(records.Difference("x", *difference), good) == verdict


def test_a_quick_run_takes_less_than_ten_seconds_and_repeats_bit_for_bit(tmp_path, quick_run):
    first = quick_run("compare")
    started = time.process_time()
    again = experiment.run(*experiment.load("compare", quick=True), seeds=range(3), out=tmp_path, quick=True)
    assert time.process_time() - started < 10
    assert (again.metrics, again.curves) == (first.metrics, first.curves)


def test_the_command_prints_one_table_with_the_tuning_and_writes_results_and_figure(tmp_path, monkeypatch, quick_run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "console", Console(width=200))
    asked = []

    def run(task, config, *, seeds, **options):
        asked.append((config, list(seeds), options))
        return quick_run("compare")

    monkeypatch.setattr(experiment, "run", run)
    for arguments, seeds in (((), 10), (("--quick",), 3), (("--seeds", "4", "--set", "rank=2", "--out", "mine"), 4)):
        done = CliRunner().invoke(command.app, ["compare", *arguments])
        assert done.exit_code == 0, done.output
        assert asked[-1][1] == list(range(seeds))
    assert asked[-1][0].rank == 2
    assert os.listdir(tmp_path / "mine") == ["figure.svg"]
    assert [options["out"] for _, _, options in asked] == [Path("runs/compare"), Path("runs/compare-quick"), Path("mine")]
    for text in ("Layer, equal rank", "LoRA-SB", "Tuning runs of every row: 6, at the learning rates 0.001, 0.01, 0.1", "too short"):
        assert text in done.output
    assert len(re.findall("full fine-tuning", done.output)) == 4


def test_help_teaches_with_examples():
    done = CliRunner().invoke(command.app, ["compare", "--help"])
    assert done.exit_code == 0
    assert "loracle toy compare --quick" in done.output
    assert "0 to N-1; with --quick 3" in done.output


@pytest.mark.parametrize("override", ["rank=0", "rank=25", "rates=[]", "rates=100,10", "rates=0", "tuning_seeds=0", "digits_test=1798"])
def test_settings_that_do_not_fit_are_refused(override):
    with pytest.raises(UsageError):
        experiment.load("compare", overrides=[override])


# --- published ---


def test_published_results_were_made_with_the_settings_of_today(published):
    assert published.config == dataclasses.asdict(experiment.load("compare")[1])
    assert not published.quick


# The options of the rows in the published run, which its file does not hold. Where one changes: run, publish, and write it here
PUBLISHED_WITH = {
    "lora": {"rslora": False},
    "full": {},
    "allora": {"eta": 2.0, "kind": "row"},
    "block_lora": {"blocks": 2, "rslora": False, "per_block": False, "order": "add_first"},
    "loldu": {"diagonal": "lu", "preserve": True, "train_scaling": False},
    "lora_ga": {"rslora": True, "direction": "ArB2r", "scale": "stable", "gamma": 16.0, "gradient_samples": 32},
    "lora_ga_gamma_1000": {"rslora": True, "direction": "ArB2r", "scale": "stable", "gamma": 1000.0, "gradient_samples": 32},
    "lora_pro": {"rslora": False, "mode": "full", "X": "sylvester", "delta": 0.0},
    "lora_pro_efficient": {"rslora": False, "mode": "efficient", "X": "sylvester", "delta": 0.0},
    "lora_sb": {"optimizer_of_the_start": "adamw", "niter": 10, "gradient_samples": 50},
    "nlora": {"method": "nlora", "core": None, "residual": False, "rcond": None},
    "nlora_residual": {"method": "nlora", "core": None, "residual": True, "rcond": None},
    "nlora_slora": {"method": "slora", "core": None, "residual": False, "rcond": None},
    "nlora_inttune": {"method": "inttune", "core": None, "residual": False, "rcond": None},
    "randlora": {"convention": "paper", "kind": "uniform", "zero": "lambdas"},
}


def test_published_results_were_made_with_the_options_of_today():
    assert {name: dataclasses.asdict(entrant.method) for name, entrant in ENTRANTS.items()} == PUBLISHED_WITH


def test_what_the_page_says_in_words_was_measured(published):
    """Each bullet of "What we learn"; if one fails after a new run, the page has to say something else."""
    metrics = published.metrics

    def verdicts(part, regime):
        sign = compare.SHOWN[part][3]
        names = compare.find_labels(published)
        found = {name: f"{part}.{compare.find_variant(published, part, regime, name)}.{compare.SHOWN[part][1]}" for name in names}
        return {name: compare._verdict(metrics[key].difference, sign) for name, key in found.items() if name != "lora"}

    layer, digits = verdicts("layer", "equal count"), verdicts("digits", "equal count")
    assert {name for name, verdict in layer.items() if verdict == "better"} == {"full"}
    assert {name for name, verdict in digits.items() if verdict == "better"} == {"full", "lora_ga", "lora_pro", "lora_sb", "randlora"}
    assert {name for name, verdict in layer.items() if verdict == "-"} == {
        "allora", "lora_ga_gamma_1000", "lora_pro", "lora_pro_efficient", "nlora", "nlora_slora",
    }  # fmt: skip
    for name in ("lora_pro_efficient", "nlora_slora", "nlora_inttune"):
        assert digits[name] != "better"
    assert metrics["layer.nlora_inttune_equal_count.loss"].mean > 5 * metrics["layer.nlora.loss"].mean
    for lead in ("lora_ga", "lora_pro", "lora_sb_equal_count"):
        assert 0.04 < metrics[f"digits.{lead}.turned"].difference.mean < 0.06
    assert metrics["layer.lora_ga.loss"].mean > 3 * metrics["layer.lora.loss"].mean
    assert digits["lora_ga_gamma_1000"] == "-"
    assert layer["nlora_residual"] == "worse"
    assert metrics["layer.nlora_residual.loss"].difference.mean < 0.03
    assert digits["nlora"] == "worse"
    assert 0.45 < metrics["layer.lora_sb_equal_count.loss"].mean < 0.55
    assert metrics["layer.randlora_equal_count.loss"].mean > metrics["layer.lora_sb_equal_count.loss"].mean + 0.1
    assert constant(published, "layer.block_lora_equal_count.rank") == 8
    assert metrics["layer.loldu_equal_count.loss"].mean > 0.95
    assert constant(published, "digits.loldu_equal_count.parameters") * 16 == constant(published, "digits.lora.parameters")
    assert metrics["digits.loldu_equal_count.turned"].mean > 0.7
    told_apart = [
        name
        for name, m in metrics.items()
        if name.endswith("forgetting") and m.difference and not m.difference.low <= 0 <= m.difference.high
    ]
    assert told_apart == ["digits.loldu_equal_count.forgetting", "digits.lora_pro.forgetting"]
    assert [round(find(metrics["digits.lora.forgetting"].values), 1) for find in (min, max)] == [0.3, 0.9]
