"""RandLoRA's experiment: its problems and starts by another road, and claims that fail when they should."""

import numpy as np
import pytest
import torch

from loracle.toy_tasks import experiment
from loracle.toy_tasks.config import UsageError
from loracle.toy_tasks.experiment import Trial
from loracle.toy_tasks.tasks import randlora


@pytest.fixture(scope="module")
def config():
    return experiment.load("randlora", quick=True)[1]


def as_numpy(tensor):
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("spectrum", ["flat", "gauss", "low"])
def test_the_change_is_the_page_s(config, spectrum):
    """As large as a weight of variance 1 / 48, with the spectrum of its name; the loss vanishes at W0 + D."""
    race = randlora._Race(config, Trial((0, 1)), spectrum)
    for i in (0, 1):
        x, W0, D = as_numpy(race.problem.x[i]), as_numpy(race.problem.layers[i].weight), as_numpy(race.problem.shifts[i])
        values = np.linalg.svd(D, compute_uv=False)
        assert np.linalg.norm(D) == pytest.approx(48**0.5, rel=1e-4)
        if spectrum == "flat":
            np.testing.assert_allclose(values, 1, rtol=1e-4)
        if spectrum == "low":
            np.testing.assert_allclose(values, [12**0.5] * 4 + [0] * 44, atol=1e-4)
        np.testing.assert_allclose(np.maximum(x @ (W0 + D).T, 0), as_numpy(race.problem.y[i]), atol=1e-4)


@pytest.mark.parametrize(("method", "options"), [("lora", {}), ("randlora", {}), ("randlora", {"zero": "gammas", "convention": "peft"})])
def test_training_starts_at_the_layer(config, method, options):
    race = randlora._Race(config, Trial((0, 1)), "flat")
    stack = race.stack(method, 6, **options)
    outputs = as_numpy(stack(stack.trainable, race.problem.x))
    for i in (0, 1):
        expected = as_numpy(race.problem.x[i]) @ as_numpy(race.problem.layers[i].weight).T
        np.testing.assert_allclose(outputs[i], expected, atol=1e-4)


def test_only_the_diagonals_are_trained_and_lora_has_the_larger_budget(config):
    race = randlora._Race(config, Trial((0, 1)), "flat")
    for rank, lora_rank in zip(config.ranks, config.lora_ranks, strict=True):
        ours, lora = race.stack("randlora", rank), race.stack("lora", lora_rank)
        bases = -(-48 // rank)
        assert {name: tuple(t.shape) for name, t in ours.trainable.items()} == {"gammas": (2, bases, 48), "lambdas": (2, bases, rank)}
        assert ours.num_trainable() == bases * (48 + rank) <= lora.num_trainable() == 96 * lora_rank


def test_one_large_base_trains_as_many_numbers(config):
    """One term of rank 384 in place of eight of rank 6: 384 + 48 numbers; by numpy, s B diag(lambda) A diag(gamma) with s = 2."""
    race = randlora._Race(config, Trial((0, 1)), "flat")
    stack = race.stack("one_large", 6)
    assert {name: tuple(t.shape) for name, t in stack.trainable.items()} == {"gammas": (2, 1, 48), "lambdas": (2, 1, 384)}
    assert stack.num_trainable() == race.stack("randlora", 6).num_trainable()
    params = {name: t + torch.arange(t[0].numel()).view(t[0].shape) / t[0].numel() for name, t in stack.trainable.items()}
    outputs = as_numpy(stack(params, race.problem.x))
    for i, model in enumerate(stack.models(params)):
        A, B, gammas, lambdas = (as_numpy(t) for t in (model.A, model.B[:, 0], model.gammas[0], model.lambdas[0]))
        update = 2.0 * B @ np.diag(lambdas) @ A @ np.diag(gammas)
        expected = as_numpy(race.problem.x[i]) @ (as_numpy(race.problem.layers[i].weight) + update).T
        np.testing.assert_allclose(outputs[i], expected, rtol=1e-3, atol=1e-2)


def test_lambdas_alone_keep_the_rank_of_the_base(quick_run):
    metrics = quick_run("randlora").metrics
    assert set(metrics["choices.lambdas_alone.rank"].values) == {6.0}
    assert metrics["choices.paper.rank"].mean > 12


def test_adam_does_not_see_the_size_of_gradients(quick_run):
    metrics = quick_run("randlora").metrics
    assert metrics["choices.times_bases.apart"].mean < 1e-3
    assert metrics["choices.sgd_times_bases.apart"].mean > 0.01


def test_a_race_at_a_learning_rate_of_zero_shows_nothing():
    task, config = experiment.load("randlora", quick=True, overrides=["rates=0.0,", "lora_rates=0.0,", "lr=0", "sgd_lr=0"])
    for part in task.parts:
        measured = part.run(config, Trial((0, 1)))
        losses = [values for name, values in measured.values.items() if name.endswith(".loss")]
        assert losses
        assert all(value == pytest.approx(1.0) for values in losses for value in values)


@pytest.mark.parametrize("override", ["rank=49", "rank=0", "ranks=24,6", "low_rank=49", "lora_ranks=2,5,9"])
def test_settings_that_do_not_fit_are_refused(override):
    with pytest.raises(UsageError):
        experiment.load("randlora", overrides=[override])
