"""The experiments' machinery: settings, statistics, verdicts, files that survive interruption, training, command line."""

import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from loracle.cli import toy as command
from loracle.reference.lora import LoRALinear
from loracle.toy_tasks import experiment, models, plotting, records, training
from loracle.toy_tasks.config import ToyError, UsageError, load_config, load_full
from loracle.toy_tasks.datasets import DIGITS, load_digits
from loracle.toy_tasks.experiment import Measurements, Part, Quantity, Task, Trial
from loracle.toy_tasks.records import Claim, Metric, judge, read_results, write_atomically
from loracle.toy_tasks.statistics import interval, t_quantile

SLUGS = [slug for slug in experiment.find_slugs() if slug != "compare"]  # the comparison has tests of its own


# --- a task that costs nothing ---


@dataclasses.dataclass(frozen=True)
class Config:
    gain: float = 1.0


def measure(config: Config, trial: Trial) -> Measurements:
    measured = Measurements()
    tick = trial.counter(3)
    for _ in range(3):
        tick()
    own = torch.stack([torch.rand((), generator=generator) for generator in trial.generators()])
    measured.add("plain", score=own)
    measured.add("better", score=own + config.gain)
    measured.add_curve("plain", "score", [0, 1], torch.stack([own, own / 3], dim=1))
    return measured


def draw(results: records.Results) -> plotting.Figure:
    figure, (left, right) = plotting.make_figure(2, "Which is better?")
    plotting.draw_curve(left, results.curves["first.plain.score"], "plain", 0)
    plotting.draw_points(right, [1.0], [results.metrics["first.plain.score"]], "plain", 1)
    return figure


CLAIM = Claim("fake.T1", "Better is better.", "first.better.score", ">=", 0.5, baseline="first.plain.score")


def make_task(first=measure, second=measure) -> Task:
    parts = (Part("first", "First", first, "plain"), Part("second", "Second", second, None))
    return Task("fake", "Which?", Config, {"score": Quantity("score", 0.01)}, parts, (CLAIM,), draw)


@pytest.fixture
def results(tmp_path):
    return experiment.run(make_task(), Config(), seeds=range(3), out=tmp_path / "made")


# --- statistics ---


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)])
def test_student_quantiles_of_the_printed_table(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, abs=5e-5)


def test_interval_covers_the_mean_in_95_percent_of_draws():
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4000, 5))
    covered = sum(found.low <= 3.0 <= found.high for found in map(interval, draws.tolist()))
    assert abs(covered / 4000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_interval_of_a_diverged_seed_is_none_and_of_one_seed_an_error():
    assert interval([1.0, None, 2.0]) == (None, None, None)
    with pytest.raises(ValueError, match="needs two"):
        interval([1.0])


# --- settings ---


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int
    lr: float
    ranks: tuple[int, ...]
    label: str

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; needed 1 or more")


GOOD = '[toy]\nsteps = 5\nlr = 1\nranks = [1, 2]\nlabel = "x"\n[quick]\nsteps = 2\n'


def load(tmp_path, text=GOOD, **options):
    (tmp_path / "fake.toml").write_text(text)
    return load_config(Settings, "fake", folder=tmp_path, **options)


def test_settings_come_from_the_file_then_quick_then_the_command_line(tmp_path):
    assert load(tmp_path) == Settings(5, 1.0, (1, 2), "x")
    assert load(tmp_path, quick=True).steps == 2
    overrides = ["steps=7", "ranks=3,4", "label=y z", " lr = 1e-3"]
    assert load(tmp_path, quick=True, overrides=overrides) == Settings(7, 1e-3, (3, 4), "y z")
    assert load(tmp_path, overrides=["ranks=[8]"]).ranks == (8,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("steps = 5", "stepz = 5"), r"fake\.toml \[toy\] has no key 'stepz'; did you mean 'steps'\?"),
        (GOOD.replace("steps = 5", "steps = 5.5"), r"fake\.toml \[toy\]: steps is 5\.5; needed a whole number"),
        (GOOD.replace("steps = 5", "steps = true"), "steps is True; needed a whole number"),
        (GOOD.replace("steps = 5", "steps = 0"), r"fake\.toml \[toy\]: steps is 0; needed 1 or more"),
        (GOOD.replace("lr = 1", "lr = nan"), "lr is nan; needed a finite number"),
        (GOOD.replace("[1, 2]", '[1, "a"]'), r"ranks\[1\] is 'a'; needed a whole number"),
        (GOOD.replace("[1, 2]", "1"), "ranks is 1; needed a list of whole numbers"),
        (GOOD.replace("lr = 1\n", ""), r"fake\.toml \[toy\] lacks 'lr'"),
        (GOOD.replace("[quick]", "[quik]"), r"no table \[quik\]; did you mean 'quick'"),
        (GOOD.replace("[quick]\n", "[quick]\nstep = 1\n"), r"fake\.toml \[quick\] has no key 'step'; did you mean 'steps'"),
        (GOOD[:36], r"fake\.toml is not whole, valid TOML"),
    ],
)
def test_a_wrong_settings_file_is_named_with_its_key_and_the_nearest_valid_one(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        load(tmp_path, text, quick=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rank=1", "--set has no key 'rank'; did you mean 'ranks'"),
        ("steps=many", "--set: steps is 'many'; needed a whole number"),
        ("steps", "write it as key=value"),
        ("lr=inf", "needed a finite number"),
    ],
)
def test_a_wrong_override_is_explained(tmp_path, override, message):
    with pytest.raises(UsageError, match=message):
        load(tmp_path, overrides=[override])


def test_a_missing_settings_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"fake\.toml does not exist"):
        load_config(Settings, "fake", folder=tmp_path)


# --- every experiment describes itself ---


@pytest.mark.parametrize("slug", SLUGS)
def test_an_experiment_is_whole(slug):
    task, config = experiment.load(slug)
    experiment.load(slug, quick=True)
    load_full(slug)
    assert all(experiment.describe(slug))
    assert experiment.describe(slug)[1] == task.question
    ids = [claim.id for claim in task.claims]
    assert len(set(ids)) == len(ids)
    assert all(id.startswith(f"{slug}.T") for id in ids)
    parts = {part.name for part in task.parts}
    for claim in task.claims:
        for name in filter(None, (claim.metric, claim.baseline)):
            part, _, quantity = name.split(".")
            assert part in parts
            assert quantity in task.quantities
    assert dataclasses.is_dataclass(config)


@pytest.mark.parametrize("slug", SLUGS)
def test_published_results_were_made_with_the_settings_of_today_and_five_seeds(slug):
    published = read_results(records.PUBLISHED / f"{slug}.json")
    task, config = experiment.load(slug)
    assert published.config == dataclasses.asdict(config)
    assert len(published.seeds) >= 5
    assert not published.quick
    own = [{field.name: getattr(claim, field.name) for field in dataclasses.fields(Claim)} for claim in published.claims]
    assert own == [dataclasses.asdict(claim) for claim in task.claims]
    assert [claim.id for claim in published.claims if not claim.as_expected] == []
    assert sum(published.seconds.values()) < 60


@pytest.mark.parametrize("slug", SLUGS)
def test_a_quick_run_is_repeated_bit_for_bit_within_three_seconds_and_drawn(tmp_path, quick_run, slug):
    first = quick_run(slug)
    task, config = experiment.load(slug, quick=True)
    started = time.process_time()  # of this process alone: a busy machine does not count
    again = experiment.run(task, config, seeds=range(3), out=tmp_path, quick=True)
    assert time.process_time() - started < 3
    assert again.metrics == first.metrics
    assert again.curves == first.curves
    task.figure(first)


def test_experiments_are_found_by_their_files_alone(tmp_path):
    for name in ("b.py", "a.py", "_shared.py", "__init__.py", "notes.txt"):
        (tmp_path / name).touch()
    assert experiment.find_slugs(tmp_path) == ["a", "b"]


# --- verdicts ---


def metric(*values):
    return Metric(values, *interval(values), None)


METRICS = {"p.a.q": metric(1.0, 1.1, 0.9), "p.b.q": metric(0.0, 0.2, 0.1), "p.wide.q": metric(-9.0, 9.0, 3.0), "p.nan.q": metric(1.0, None)}


@pytest.mark.parametrize(
    ("name", "comparison", "threshold", "baseline", "verdict"),
    [
        ("p.a.q", ">=", 0.7, None, "shown"),
        ("p.a.q", ">=", 0.9, None, "not shown"),  # the mean is above, but not the whole interval
        ("p.a.q", "<=", 1.3, None, "shown"),
        ("p.a.q", "<=", 1.0, None, "not shown"),
        ("p.a.q", ">=", 0.5, "p.b.q", "shown"),
        ("p.a.q", "<=", 0.5, "p.b.q", "not shown"),
        ("p.wide.q", ">=", 0.0, None, "not shown"),
        ("p.nan.q", ">=", 0.0, None, "not shown"),
        ("p.absent.q", ">=", 0.0, None, "not measured"),
        ("p.a.q", ">=", 0.0, "p.absent.q", "not measured"),
    ],
)
@pytest.mark.parametrize("expected", [True, False])
def test_verdicts(name, comparison, threshold, baseline, verdict, expected):
    judged = judge(Claim("fake.T1", "", name, comparison, threshold, baseline, expected), METRICS)
    assert judged.verdict == verdict
    assert judged.as_expected == (verdict == ("shown" if expected else "not shown"))


def test_a_paired_difference_is_taken_seed_by_seed(results):
    difference = results.metrics["first.better.score"].difference
    assert (difference.mean, difference.low) == (pytest.approx(1.0), pytest.approx(1.0))  # though the scores themselves vary
    assert results.metrics["first.better.score"].low < difference.low + results.metrics["first.plain.score"].mean - 0.01
    assert results.metrics["first.plain.score"].difference is None
    assert results.metrics["second.better.score"].difference is None


def test_a_claim_falsified_by_the_settings_reads_not_shown(tmp_path, results):
    assert results.claims[0].verdict == "shown"
    assert experiment.run(make_task(), Config(gain=0.0), seeds=range(3), out=tmp_path).claims[0].verdict == "not shown"


def test_a_diverged_run_is_recorded_as_null_in_strict_json(tmp_path):
    results = experiment.run(make_task(), Config(gain=1e39), seeds=range(3), out=tmp_path)
    assert results.claims[0].verdict == "not shown"
    tree = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert tree["metrics"]["first.better.score"]["values"] == [None] * 3


# --- files ---


def test_results_come_back_from_disk_as_they_were(tmp_path, results):
    assert read_results(tmp_path / "made" / "results.json") == results
    assert sorted(os.listdir(tmp_path / "made")) == ["results.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "not whole, valid JSON"),
        (lambda text: "", "not whole, valid JSON"),
        (lambda text: text.replace('"threads"', '"treads"'), "no key 'treads'; did you mean 'threads'"),
        (lambda text: text.replace('"quick": false', '"quick": NaN'), "NaN is no JSON number"),
        (lambda text: text.replace('"quick": false', '"quick": 3'), "quick is 3; needed true or false"),
        (lambda text: text.replace('"schema": 1', '"schema": 99'), "schema 99; this version of loracle reads schema 1"),
        (lambda text: text.replace('"slug": "fake",\n', ""), "lacks 'slug'"),
    ],
)
def test_a_damaged_results_file_is_a_clear_error(tmp_path, results, change, message):
    path = tmp_path / "made" / "results.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ToyError, match=message) as caught:
        read_results(path)
    assert str(path) in str(caught.value)
    assert not isinstance(caught.value, UsageError)


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize(("error", "seen"), [(no_space, ToyError), (KeyboardInterrupt, KeyboardInterrupt)])
def test_writing_that_fails_leaves_the_old_file_whole_and_no_other(tmp_path, monkeypatch, call, error, seen):
    path = tmp_path / "results.json"
    write_atomically(path, "old")

    def fail(*args):
        raise KeyboardInterrupt if error is KeyboardInterrupt else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(records.os, call, fail)
    with pytest.raises(seen) as caught:
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.json"]
    if seen is ToyError:
        assert "No space left on device" in str(caught.value)
        assert "untouched" in str(caught.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_a_disk_that_is_full_for_the_data_itself(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_atomically(path, "old")
    monkeypatch.setattr(records, "open", lambda name, mode: open("/dev/full", mode), raising=False)  # noqa: SIM115 (the writer closes it)
    with pytest.raises(ToyError, match="No space left on device"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_an_interrupted_run_goes_on_after_its_last_finished_part(tmp_path, results):
    calls = []

    def first(config, trial):
        calls.append("first")
        return measure(config, trial)

    def interrupt(config, trial):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.run(make_task(first, interrupt), Config(), seeds=range(3), out=tmp_path)
    assert os.listdir(tmp_path / "parts") == ["first.json"]
    assert not (tmp_path / "results.json").exists()

    resumed = experiment.run(make_task(first), Config(), seeds=range(3), out=tmp_path)
    assert calls == ["first"]
    assert resumed.metrics == results.metrics
    assert resumed.curves == results.curves
    assert not (tmp_path / "parts").exists()


def test_a_stranger_s_file_in_the_folder_of_parts_is_left_alone(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "mine.txt").touch()
    experiment.run(make_task(), Config(), seeds=range(2), out=tmp_path)
    assert os.listdir(tmp_path / "parts") == ["mine.txt"]


@pytest.mark.parametrize("change", ["config", "seeds", "damage"])
def test_a_finished_part_is_not_reused_once_anything_that_it_depends_on_has_changed(tmp_path, change):
    def interrupt(config, trial):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.run(make_task(measure, interrupt), Config(), seeds=range(3), out=tmp_path)
    calls = []

    def first(config, trial):
        calls.append("first")
        return measure(config, trial)

    if change == "damage":
        (tmp_path / "parts" / "first.json").write_text("{")
    config, seeds = Config(2.0 if change == "config" else 1.0), range(4 if change == "seeds" else 3)
    experiment.run(make_task(first), config, seeds=seeds, out=tmp_path)
    assert calls == ["first"]


def test_a_part_finished_before_the_disk_was_full_is_kept(tmp_path, monkeypatch):
    replace = os.replace

    def full_for_results(source, target):
        if Path(target).name == "results.json":
            no_space()
        replace(source, target)

    monkeypatch.setattr(records.os, "replace", full_for_results)
    with pytest.raises(ToyError, match=r"results\.json could not be written: No space left"):
        experiment.run(make_task(), Config(), seeds=range(3), out=tmp_path)
    assert sorted(os.listdir(tmp_path / "parts")) == ["first.json", "second.json"]


def test_a_run_computes_on_one_thread_and_puts_the_number_back(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert experiment.run(make_task(), Config(), seeds=range(2), out=tmp_path).threads == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# --- draws, models, training ---


def test_generators_repeat_for_a_seed_and_differ_between_seeds_and_streams():
    def draws(stream):
        return [torch.rand(4, generator=generator) for generator in Trial((0, 1)).generators(stream)]

    first, again, other = draws(0), draws(0), draws(1)
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_models_are_drawn_without_touching_the_global_generator():
    before = torch.get_rng_state()
    model = models.make_mlp((5, 4, 3), torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(bool(p.abs().max() <= p_bound) for p, p_bound in zip(model.parameters(), (5**-0.5, 5**-0.5, 0.5, 0.5), strict=True))


def adapted_mlp(seed):
    generator = torch.Generator().manual_seed(seed)
    model = models.make_mlp((6, 5, 3), generator).double()
    model[0] = LoRALinear(model[0], rank=2, alpha=4.0, generator=generator)
    return model


def test_training_many_models_at_once_equals_training_each_by_autograd_and_torchs_optimizer():
    """float64; the other road is a plain loop over modules, with torch's own AdamW."""
    generator = torch.Generator().manual_seed(9)
    x, y = torch.randn(3, 20, 6, generator=generator, dtype=torch.double), torch.randn(3, 20, 3, generator=generator, dtype=torch.double)
    stack = models.Stack([adapted_mlp(seed) for seed in range(3)])
    trained = training.train(
        lambda params: (stack(params, x) - y).square().mean(dim=(1, 2)),
        stack.trainable,
        training.adam(0.01, weight_decay=0.1),
        steps=30,
        every=7,
    )
    assert trained.steps == [0, 7, 14, 21, 28, 30]
    assert sorted(stack.frozen) == ["0.base.bias", "0.base.weight"]
    assert stack.num_trainable() == 2 * (6 + 5) + 5 * 3 + 3

    for seed in range(3):
        model = adapted_mlp(seed)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
        losses = []
        for _ in range(31):
            loss = (model(x[seed]) - y[seed]).square().mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            if len(losses) <= 30:
                optimizer.step()
        np.testing.assert_allclose(trained.losses[seed], [losses[t] for t in trained.steps], rtol=1e-11)
        assert losses[-1] < 0.8 * losses[0]
        copies = stack.models(trained.params)
        for (name, own), other in zip(copies[seed].named_parameters(), model.parameters(), strict=True):
            np.testing.assert_allclose(own.detach(), other.detach(), rtol=1e-9, atol=1e-12, err_msg=name)


def test_sgd_is_gradient_descent():
    params = {"w": torch.tensor([[2.0], [3.0]])}
    trained = training.train(lambda p: p["w"].square().sum(dim=1), params, training.sgd(0.25), steps=2)
    assert torch.equal(trained.params["w"], params["w"] / 4)
    assert torch.equal(trained.losses, torch.tensor([[4.0, 1.0, 0.25], [9.0, 2.25, 0.5625]]))


def test_digits_are_split_into_disjoint_parts_with_their_origin_beside_them():
    split = load_digits(1000, 797, torch.Generator().manual_seed(0))
    images = torch.cat([split.train_images, split.test_images])
    assert images.shape == (1797, 8, 8)
    with np.load(DIGITS) as file:  # together the parts are the whole, each image once
        whole = file["images"].reshape(1797, 64)
    assert sorted(map(bytes, (images * 16).byte().reshape(1797, 64).numpy())) == sorted(map(bytes, whole))
    with pytest.raises(ValueError, match="there are 1797"):
        load_digits(1797, 1, torch.Generator())
    assert "CC BY 4.0" in DIGITS.with_name("DIGITS.txt").read_text()


# --- figures ---


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_figure_has_the_same_bytes_each_time(tmp_path, results, suffix):
    for name in ("a", "b"):
        plotting.save(draw(results), tmp_path / f"{name}.{suffix}")
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_lines_and_bars_differ_in_more_than_colour():
    shapes = [(style["linestyle"], style["marker"]) for style in map(plotting.line_style, range(7))]
    assert len({str(linestyle) for linestyle, _ in shapes}) == len({marker for _, marker in shapes}) == 7
    assert len(set(plotting.HATCHES)) == len(plotting.BAR_COLOURS)


# --- command line ---


@pytest.fixture
def cli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "console", Console(width=200))  # tables whose cells are not broken into lines
    monkeypatch.setattr(command, "errors", Console(width=200, stderr=True))

    def invoke(*arguments):
        return CliRunner().invoke(command.app, list(arguments))

    return invoke


@pytest.fixture
def fake(monkeypatch):
    """Let the command line find the task that costs nothing."""

    def use(task, config=None):
        monkeypatch.setattr(experiment, "find_slugs", lambda: ["fake"])
        monkeypatch.setattr(experiment, "load", lambda slug, **options: (task, config or Config()))

    use(make_task())
    return use


def test_run_prints_tables_and_verdicts_and_writes_results_and_figure(cli, fake, tmp_path):
    done = cli("run", "fake", "--seeds", "3")
    assert done.exit_code == 0, done.output
    for text in ("better", "minus plain", "1.000", "fake.T1: Better is better.", "shown", "as expected", "runs/fake/results.json"):
        assert text in done.output
    assert sorted(os.listdir(tmp_path / "runs" / "fake")) == ["figure.svg", "results.json"]
    assert read_results(tmp_path / "runs" / "fake" / "results.json").seeds == (0, 1, 2)


def test_quick_writes_elsewhere_and_says_that_its_verdicts_mean_nothing(cli, fake, tmp_path):
    done = cli("run", "fake", "--quick")
    assert done.exit_code == 0
    assert "too short" in done.output
    assert os.listdir(tmp_path / "runs") == ["fake-quick"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "loar"), "there is no experiment 'loar'; did you mean 'lora'?"),
        (("verify", "loar"), "there is no experiment 'loar'; did you mean 'lora'?"),
        (("run", "lora", "--set", "tail_step=1"), "--set has no key 'tail_step'; did you mean 'tail_steps'?"),
        (("run", "lora", "--set", "digits_ranks=11"), "digits_ranks is [11]; needed one or more ranks from 1 to 10"),
        (("run", "lora", "--seeds", "1"), "needed two or more"),
        (("run", "lora", "--device", "gpu"), "device 'gpu' cannot be used"),
    ],
)
def test_wrong_usage_has_exit_code_3_and_a_hint(cli, arguments, message):
    done = cli(*arguments)
    assert done.exit_code == 3
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_an_error(cli):
    done = cli("run", "lora", "--device", "cuda")
    assert done.exit_code == 3
    assert "no CUDA device" in done.output


def test_a_full_disk_keeps_the_previous_results_and_fails(cli, fake, tmp_path, monkeypatch):
    assert cli("run", "fake").exit_code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "runs" / "fake").iterdir()}
    monkeypatch.setattr(records.os, "fsync", no_space)
    done = cli("run", "fake")
    assert done.exit_code == 1
    assert "No space left on device" in done.output
    assert {path: path.read_bytes() for path in (tmp_path / "runs" / "fake").iterdir() if path.is_file()} == before


def test_a_folder_that_cannot_be_made_is_an_error_before_any_work(cli, fake, tmp_path):
    (tmp_path / "taken").touch()
    fake(make_task(pytest.fail))
    done = cli("run", "fake", "--out", "taken")
    assert done.exit_code == 1
    assert "taken cannot hold results" in done.output


def test_ctrl_c_says_how_to_go_on(cli, fake, tmp_path):
    def interrupt(config, trial):
        raise KeyboardInterrupt

    fake(make_task(measure, interrupt))
    done = cli("run", "fake")
    assert done.exit_code == 130
    assert "the same command goes on from there" in done.output
    assert (tmp_path / "runs" / "fake" / "parts" / "first.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for a single process")
def test_a_real_sigint_keeps_what_is_finished(tmp_path):
    arguments = ["run", "lora", "--quick", "--set", "tail_steps=2", "--set", "digits_steps=1000000", "--out", str(tmp_path)]
    code = "import sys; from loracle.cli.toy import app; app(sys.argv[1:])"
    # What a shell starts in the background ignores the signal, and so does what that starts: the tests may run so
    own, ours = (
        {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
        signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], **own)
    signal.signal(signal.SIGINT, ours)
    deadline = time.monotonic() + 300
    while not (tmp_path / "parts" / "rslora.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "interrupted" in output
    assert "Traceback" not in output
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["rslora.json", "tail.json"]
    assert not (tmp_path / "results.json").exists()


def test_verify_compares_settings_verdicts_and_metrics(cli, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PUBLISHED", tmp_path)
    nothing = cli("verify")
    assert nothing.exit_code == 2
    assert "no published results" in nothing.output

    experiment.run(make_task(), Config(), seeds=range(4), out=tmp_path)
    (tmp_path / "results.json").rename(tmp_path / "fake.json")
    agrees = cli("verify")
    assert (agrees.exit_code, agrees.output.strip()) == (0, "fake: agrees with the published results")

    fake(make_task(), Config(gain=0.4))
    differs = cli("verify", "fake")
    assert differs.exit_code == 1
    assert "setting gain: published 1.0, now 0.4" in differs.output
    assert "claim fake.T1: published 'shown', now 'not shown'" in differs.output
    assert "metric first.better.score: published" in differs.output
    assert "plain" not in differs.output

    (tmp_path / "fake.json").write_text("{")
    damaged = cli("verify", "fake")
    assert damaged.exit_code == 1
    assert "not whole, valid JSON" in damaged.output


def test_verify_notices_a_metric_that_came_or_went(results):
    fewer = dataclasses.replace(results, metrics={k: v for k, v in results.metrics.items() if "second" not in k})
    tolerances = {"score": 0.01}
    assert records.differences(results, results, tolerances) == []
    assert "no longer measured" in records.differences(results, fewer, tolerances)[0]
    assert "not published" in records.differences(fewer, results, tolerances)[0]


def test_list_names_every_experiment_with_its_paper(cli):
    done = cli("list")
    assert done.exit_code == 0
    for slug in SLUGS:
        assert slug in done.output
        assert experiment.describe(slug)[0][:30] in done.output


def test_help_teaches_with_examples(cli):
    done = cli("run", "--help")
    assert done.exit_code == 0
    assert "loracle toy run lora --seeds 10 --set digits_ranks=1,2" in done.output
    assert "0 to N-1; with --quick 3" in done.output


@pytest.mark.parametrize("statement", ["import loracle.cli", "from loracle.cli.toy import app; app(['list'], standalone_mode=False)"])
def test_the_command_line_starts_without_torch(statement):
    code = f"{statement}; import sys; print([m for m in ('torch', 'numpy', 'matplotlib', 'hypothesis') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
