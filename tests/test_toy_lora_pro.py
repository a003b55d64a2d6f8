"""LoRA-Pro's experiment: its gradient, start and numbers by another road, and claims that fail when they should."""

import numpy as np
import pytest
import torch

from loracle.toy_tasks import experiment
from loracle.toy_tasks.experiment import Trial
from loracle.toy_tasks.tasks import lora_pro


@pytest.fixture(scope="module")
def layers():
    return lora_pro._Layers(experiment.load("lora_pro")[1], Trial((0, 1)))


def as_numpy(tensor):
    return tensor.detach().double().numpy()


def loss(layers, i, W):
    """The loss of seed i at the weight W in float64, written out."""
    x, y = as_numpy(layers.problem.x[i]), as_numpy(layers.problem.y[i])
    return np.mean(np.sum((np.tanh(x @ W.T) - y) ** 2, axis=1))


def test_the_start_is_lora_s(layers):
    W0, A, B = layers.start
    assert layers.scaling == 2.0
    assert not B.any()
    assert A.abs().max() <= 48**-0.5
    assert torch.equal(layers.weight(W0, A, B), W0)
    for i, layer in enumerate(layers.problem.layers):
        assert torch.equal(W0[i], layer.weight)


def test_loss_and_gradient_by_differences(layers):
    W0 = layers.start[0]
    losses, G = layers.loss_and_gradient(W0)
    direction = np.random.default_rng(0).normal(size=W0[0].shape)
    for i in range(2):
        W = as_numpy(W0[i])
        assert losses[i].item() == pytest.approx(loss(layers, i, W), rel=1e-5)
        slope = (loss(layers, i, W + 1e-6 * direction) - loss(layers, i, W - 1e-6 * direction)) / 2e-6
        assert slope == pytest.approx(np.sum(as_numpy(G[i]) * direction), rel=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_full_fine_tuning_is_torch_s(layers, optimizer):
    run = lora_pro.train(layers, lora_pro._method("full", layers, optimizer, 0.01), 5, lambda: None)
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.Adam}
    for i, layer in enumerate(layers.problem.layers):
        W = torch.nn.Parameter(layer.weight.detach().clone())
        chosen = kinds[optimizer]([W], lr=0.01)
        for _ in range(5):
            chosen.zero_grad()
            (torch.tanh(layers.problem.x[i] @ W.T) - layers.problem.y[i]).square().sum(dim=1).mean().backward()
            chosen.step()
        assert run.losses[i, -1].item() == pytest.approx(loss(layers, i, as_numpy(W)), rel=1e-4)
    assert run.cosines.min() > 0.999


@pytest.mark.parametrize("method", ["lora", "lora_pro"])
def test_one_step_of_gradient_descent_by_the_page_s_formulas(layers, method):
    """The second step, in NumPy: from B = 0 the first step moves B alone, along G A' (LoRA) or G A+ / s (LoRA-Pro)."""
    lr, s = 0.01, layers.scaling
    moved, weights = lora_pro._method(method, layers, "sgd", lr), layers.start
    W0, A, _ = map(as_numpy, (part[0] for part in weights))
    _, G = layers.loss_and_gradient(layers.weight(*weights))
    weights = moved.move(weights, G, 1)
    want = -lr * (s * as_numpy(G[0]) @ A.T if method == "lora" else as_numpy(G[0]) @ np.linalg.pinv(A) / s)
    np.testing.assert_allclose(as_numpy(weights[2][0]), want, atol=1e-4 * np.abs(want).max())
    np.testing.assert_allclose(as_numpy(weights[1][0]), A, atol=1e-6)
    np.testing.assert_array_equal(as_numpy(weights[0][0]), W0)


def test_the_adjusted_direction_has_the_larger_cosine(layers):
    run = {name: lora_pro.train(layers, lora_pro._method(name, layers, "sgd", 0.02), 12, lambda: None) for name in ("lora", "lora_pro")}
    # The nearest direction among those that the factors have: no other has a larger cosine
    assert (run["lora_pro"].cosines[:, 5:] > run["lora"].cosines[:, 5:]).all()


def test_a_method_at_a_learning_rate_of_zero_shows_nothing():
    task, _ = experiment.load("lora_pro")
    _, config = experiment.load("lora_pro", quick=True, overrides=["sgd_lr=0"])
    measured = next(part for part in task.parts if part.name == "sgd").run(config, Trial((0, 1)))
    for name in lora_pro.THREE:
        assert measured.values[f"{name}.of_full"] == (1.0, 1.0)
        assert measured.values[f"{name}.early"] == measured.values[f"{name}.final"]


def test_a_rate_that_diverges_is_not_chosen():
    task, _ = experiment.load("lora_pro")
    _, config = experiment.load("lora_pro", quick=True, overrides=["sgd_rates=2,100000"])
    measured = next(part for part in task.parts if part.name == "rates").run(config, Trial((0, 1)))
    assert set(measured.values["full.lr"]) == {0.02}


@pytest.mark.parametrize("override", ["rank=33", "early=0", "last_cosine=4", "steps=10"])
def test_settings_that_make_no_sense(override):
    with pytest.raises(Exception, match="needed"):
        experiment.load("lora_pro", quick=True, overrides=[override])
