"""LoRA-SB's experiment: its starts and numbers by another road, and claims that fail when they should."""

import numpy as np
import pytest

from loracle.toy_tasks import experiment
from loracle.toy_tasks.config import UsageError
from loracle.toy_tasks.experiment import Trial
from loracle.toy_tasks.tasks import lora_sb


@pytest.fixture(scope="module")
def race():
    return lora_sb._Race(experiment.load("lora_sb")[1], Trial((0, 1)))


def as_numpy(tensor):
    return tensor.detach().double().numpy()


def gradient(race, i, rows):
    """The gradient of seed i's loss on its first samples at W0, written out."""
    x, y, W = as_numpy(race.problem.x[i])[:rows], as_numpy(race.problem.y[i])[:rows], as_numpy(race.problem.layers[i].weight)
    z = np.tanh(x @ W.T)
    return 2 * ((z - y) * (1 - z**2)).T @ x / rows


@pytest.mark.parametrize("i", [0, 1])
def test_the_layer_is_the_page_s(race, i):
    """Inputs fall from 1 to 0.3; the loss vanishes at W0 + D, with singular values 3 * 0.8^i and 0.05."""
    x, W0, D = as_numpy(race.problem.x[i]), as_numpy(race.problem.layers[i].weight), as_numpy(race.problem.shifts[i])
    np.testing.assert_allclose(x.std(axis=0), np.linspace(1, 0.3, 64), rtol=0.15)
    np.testing.assert_allclose(np.linalg.svd(D)[1], [*(3 * 0.8 ** np.arange(6)), *[0.05] * 42], atol=1e-5)
    np.testing.assert_allclose(np.tanh(x @ (W0 + D).T), as_numpy(race.problem.y[i]), atol=1e-5)


@pytest.mark.parametrize("i", [0, 1])
def test_the_first_updates_are_adamw_s_and_gradient_descent_s(race, i):
    G = gradient(race, i, 96)
    np.testing.assert_allclose(as_numpy(race.updates["raw"][i]), -1e-3 * G, atol=1e-8)
    clear = np.abs(G) > 1e-5
    np.testing.assert_allclose(as_numpy(race.updates["sb"][i])[clear], -1e-3 * np.sign(G)[clear], atol=1e-9)


@pytest.mark.parametrize("method", ["full", "lora", "xs", "random", "zero", "sb", "raw"])
def test_where_every_method_starts(race, method):
    """LoRA-SB one approximated step ahead of W0; all others at W0, LoRA-XS up to its small draw."""
    scaling = 1.0 if method == "full" else 1.7
    stack = race.stack(method, 6, scaling)
    outputs = as_numpy(stack(stack.trainable, race.problem.x))
    for i in (0, 1):
        update = np.zeros((48, 64))
        if method in race.updates:
            U, S, Vt = np.linalg.svd(as_numpy(race.updates[method][i]))
            update = U[:, :6] * S[:6] @ Vt[:6]
        expected = as_numpy(race.problem.x[i]) @ (as_numpy(race.problem.layers[i].weight) + update).T
        np.testing.assert_allclose(outputs[i], expected, atol=5e-4 if method == "xs" else 1e-5)


@pytest.mark.parametrize("method", ["xs", "random", "zero", "sb", "raw"])
def test_only_r_squared_numbers_are_trained(race, method):
    assert {name: tensor.shape for name, tensor in race.stack(method, 6).trainable.items()} == {"R": (2, 6, 6)}


def test_the_optimal_gradient_ends_where_least_squares_says(race):
    """In a linear layer the floor is known: among all R the one that least squares finds."""
    _, config = experiment.load("lora_sb", overrides=["samples=128", "gradient_samples=96"])
    linear = lora_sb._Race(config, Trial((0, 1)))
    linear.problem.activation = lambda z: z
    stack = linear.stack("sb", 6, 2.5)
    final = linear.run(stack, lora_sb.optimal_sgd(stack, 2.5, 0.2), 600, lambda: None).losses[:, -1]
    for i in (0, 1):
        x, y, W0 = (as_numpy(t) for t in (linear.problem.x[i], linear.problem.y[i], linear.problem.layers[i].weight))
        A, B = as_numpy(stack.frozen["A"][i]), as_numpy(stack.frozen["B"][i])
        rest = y - x @ W0.T  # x A' R' B'
        best = np.linalg.lstsq(x @ A.T, rest @ B, rcond=None)[0]
        floor = np.mean(np.sum((rest - x @ A.T @ best @ B.T) ** 2, axis=1))
        assert final[i].item() == pytest.approx(floor, rel=1e-3)


def test_shares_are_those_of_the_projections(quick_run):
    config = experiment.load("lora_sb", quick=True)[1]
    race = lora_sb._Race(config, Trial((0, 1, 2)))
    measured = quick_run("lora_sb").metrics
    for i in range(3):
        D, G = as_numpy(race.problem.shifts[i]), gradient(race, i, config.samples)
        U, _, Vt = np.linalg.svd(as_numpy(race.updates["sb"][i]))
        for M, name in ((D, "shift"), (G, "gradient")):
            share = np.sum((U[:, :12].T @ M @ Vt[:12].T) ** 2) / np.sum(M**2)
            assert measured[f"spaces.sb_12.{name}"].values[i] == pytest.approx(share, abs=1e-4)


def test_a_race_at_a_learning_rate_of_zero_shows_nothing():
    task, _ = experiment.load("lora_sb")
    _, config = experiment.load("lora_sb", quick=True, overrides=["lr=0", "lora_lr=0", "full_lr=0", "sgd_lr=0", "steps=10"])
    trial = Trial((0, 1))
    measured = next(part for part in task.parts if part.name == "methods").run(config, trial)
    assert measured.values["lora_6.loss"] == measured.values["full.loss"]
    assert min(np.subtract(measured.values["sb_6.loss"], measured.values["lora_6.loss"])) > -0.5
    measured = next(part for part in task.parts if part.name == "scaling").run(config, trial)
    assert max(measured.values["adamw.spread"]) < 1e-5


@pytest.mark.parametrize(
    "override", ["rank=49", "ranks=6,24", "scalings=0.3", "rates=[]", "gradient_samples=0", "shift_count=49", "rank=0"]
)
def test_settings_that_do_not_fit_are_refused(override):
    with pytest.raises(UsageError):
        experiment.load("lora_sb", overrides=[override])
