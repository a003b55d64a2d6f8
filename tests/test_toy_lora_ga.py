"""LoRA-GA's experiment: its start and its numbers by another road, and claims that fail when they should."""

import math

import numpy as np
import pytest
import torch

from loracle.toy_tasks import experiment
from loracle.toy_tasks.experiment import Trial
from loracle.toy_tasks.models import Stack
from loracle.toy_tasks.tasks import lora_ga

GAMMA = 256.0


@pytest.fixture(scope="module")
def race():
    return lora_ga._Race(experiment.load("lora_ga")[1], Trial((0, 1)))


def as_numpy(tensor):
    return tensor.detach().double().numpy()


def loss(race, i, W, rows):
    """The loss of seed i at the weight W in float64, written out."""
    x, y = as_numpy(race.problem.x[i])[:rows], as_numpy(race.problem.y[i])[:rows]
    return np.mean(np.sum((np.tanh(x @ W.T) - y) ** 2, axis=1))


@pytest.mark.parametrize("i", [0, 1])
def test_the_layer_is_the_page_s(race, i):
    """Inputs fall from 1 to 0.3; the loss vanishes at W0 + D alone, with the singular values 3 * 0.75^i."""
    x, W0 = as_numpy(race.problem.x[i]), as_numpy(race.problem.layers[i].weight)
    np.testing.assert_allclose(x.std(axis=0), np.linspace(1, 0.3, 48), rtol=0.15)
    D = np.linalg.lstsq(x, np.arctanh(np.clip(as_numpy(race.problem.y[i]), -1 + 1e-7, 1 - 1e-7)), rcond=None)[0].T - W0
    np.testing.assert_allclose(np.linalg.svd(D)[1], 3 * 0.75 ** np.arange(32), atol=0.01)
    assert loss(race, i, W0 + D, 512) < 1e-4 * loss(race, i, W0, 512)


def test_the_gradient_is_that_of_the_first_64_samples_by_differences(race):
    W0, G = as_numpy(race.problem.layers[1].weight), as_numpy(race.sampled[1])
    direction = np.random.default_rng(0).normal(size=W0.shape)
    slope = (loss(race, 1, W0 + 1e-6 * direction, 64) - loss(race, 1, W0 - 1e-6 * direction, 64)) / 2e-6
    assert slope == pytest.approx(np.sum(G * direction), rel=1e-5)


@pytest.mark.parametrize("method", ["so", "lora_ga", "uncorrected"])
def test_factors_are_orthogonal_and_of_the_stable_size(race, method):
    c2 = math.sqrt(32) / GAMMA
    for model in race.models(method, GAMMA):
        assert model.scaling == 16 / math.sqrt(4)
        np.testing.assert_allclose(as_numpy(model.A @ model.A.T), c2 * np.eye(4), atol=1e-7)
        np.testing.assert_allclose(as_numpy(model.B.T @ model.B), c2 * np.eye(4), atol=1e-7)


@pytest.mark.parametrize("method", lora_ga.METHODS)
def test_every_method_starts_at_the_pretrained_function(race, method):
    stack = Stack(race.models(method, 16.0))
    expected = torch.stack([layer(x) for layer, x in zip(race.problem.layers, race.problem.x, strict=True)])
    scale = expected.abs().max().item()
    np.testing.assert_allclose(as_numpy(stack(stack.trainable, race.problem.x)) / scale, as_numpy(expected) / scale, atol=1e-6)


def test_without_the_correction_it_does_not(race):
    model = race.models("uncorrected", 16.0)[0]
    assert torch.equal(model.base.weight, race.problem.layers[0].weight)
    assert np.linalg.norm(as_numpy(model.B @ model.A)) > 0.1


def test_cosines_are_those_of_the_page_s_formulas(quick_run):
    """For LoRA-GA the square root of the energy in the top 2 rank singular values; for the others |M| / |G| likewise."""
    config = experiment.load("lora_ga", quick=True)[1]
    race = lora_ga._Race(config, Trial((0, 1, 2)))
    measured = quick_run("lora_ga").metrics
    for i, G in enumerate(map(as_numpy, race.sampled)):
        energy = np.linalg.svd(G)[1] ** 2
        assert measured["start.lora_ga.sampled"].values[i] == pytest.approx(math.sqrt(energy[:8].sum() / energy.sum()), abs=1e-5)
        for method in ("lora", "so"):
            model = race.models(method, GAMMA)[i]
            A, B = as_numpy(model.A), as_numpy(model.B)
            update = B @ B.T @ G + G @ A.T @ A
            cosine = np.sum(update * G) / np.linalg.norm(update) / np.linalg.norm(G)
            assert measured[f"start.{method}.sampled"].values[i] == pytest.approx(cosine, abs=1e-5)


def test_steps_are_counted_to_the_first_below_and_one_more_than_all_if_there_is_none():
    losses = torch.tensor([[8.0, 2.0, 1.9, 5.0], [8.0, 1.0, 1.0, 1.0], [8.0, 7.0, 6.0, 5.0], [8.0, math.nan, math.nan, math.nan]])
    assert lora_ga.count_steps(losses, 0.25).tolist() == [2.0, 1.0, 4.0, 4.0]


def test_a_race_at_a_learning_rate_of_zero_shows_nothing():
    task, _ = experiment.load("lora_ga")
    _, config = experiment.load("lora_ga", quick=True, overrides=["adamw_lr=0"])
    measured = next(part for part in task.parts if part.name == "adamw").run(config, Trial((0, 1)))
    assert set(measured.values["lora_ga.steps"]) == {config.steps + 1.0}
    assert set(measured.values["lora_ga.arrived"]) == {0.0}
    assert max(measured.values["lora_ga.gap"]) < 1e-5
