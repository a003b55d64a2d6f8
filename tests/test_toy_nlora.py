"""NLoRA's experiment: its starts and numbers by another road, and claims that fail when they should."""

import numpy as np
import pytest

from loracle.toy_tasks import experiment
from loracle.toy_tasks.config import UsageError
from loracle.toy_tasks.experiment import Trial
from loracle.toy_tasks.tasks import nlora


@pytest.fixture(scope="module")
def config():
    return experiment.load("nlora", quick=True)[1]


@pytest.fixture(scope="module")
def task(config):
    return nlora._Classes(config, Trial((0, 1)))


def as_numpy(tensor):
    return tensor.detach().double().numpy()


def weights(task, i):
    return [as_numpy(task.models[i].get_submodule(name).weight) for name in ("0", "2")]


def changes(method, W):
    """What a method's start adds to a weight of the experiment at rank 8 (16 for N alone), by NumPy."""
    r = 16 if nlora.METHODS[method].core_only else 8
    return W[:, :r] @ W[:r, :r] @ W[:r] if method in ("published", "inttune") else 0 * W


def logits(task, i, W1, W2, x):
    model = task.models[i]
    b1, b2, W3, b3 = (as_numpy(t) for t in (model[0].bias, model[2].bias, model[4].weight, model[4].bias))
    return np.maximum(np.maximum(x @ W1.T + b1, 0) @ W2.T + b2, 0) @ W3.T + b3


@pytest.mark.parametrize("method", nlora.METHODS)
def test_where_every_method_starts(task, config, method):
    """Only the published starts leave the pretrained model, by the product of columns, block and rows."""
    start = nlora.METHODS[method]
    stack = task.stack(method, config.core_rank if start.core_only else config.rank, start.options)
    outputs = as_numpy(stack(stack.trainable, task.test_x))
    for i in (0, 1):
        moved = [W + changes(method, W) for W in weights(task, i)]
        expected = logits(task, i, *moved, as_numpy(task.test_x[i]))
        # The inverse of a random block is large: float32 cancels to fewer digits there
        np.testing.assert_allclose(outputs[i], expected, atol=2e-2 if method == "pinv" else 1e-4)


@pytest.mark.parametrize("method", nlora.METHODS)
def test_what_every_method_trains(task, config, method):
    start = nlora.METHODS[method]
    rank = config.core_rank if start.core_only else config.rank
    shapes = {"N": (rank, rank)}
    if not start.core_only:
        shapes = {"A": (rank, 64), "B": (64, rank)} | ({} if method in ("lora", "pissa") else shapes)
    wanted = {f"{layer}.{name}": (2, *shape) for layer in ("0", "2") for name, shape in shapes.items()}
    assert {name: tuple(tensor.shape) for name, tensor in task.stack(method, rank, start.options).trainable.items()} == wanted


def test_losses_and_accuracies_are_those_of_numpy(task, config):
    stack = task.stack("lora", config.rank, {})
    found = stack(stack.trainable, task.test_x)
    labels = task.labels.numpy()
    for i in (0, 1):
        z = as_numpy(found[i])
        own = -np.log(np.exp(z - z.max(axis=1, keepdims=True)) / np.exp(z - z.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
        assert nlora._losses(found, task.labels)[i].item() == pytest.approx(own[np.arange(len(z)), labels[i]].mean(), rel=1e-5)
        assert nlora._accuracies(found, task.labels)[i].item() == pytest.approx(np.mean(z.argmax(axis=1) == labels[i]))


def test_the_tasks_are_the_page_s(task):
    """Samples lie around their class's centre with unit noise; the new task has the changed inputs of the old one."""
    for i in (0, 1):
        x, labels, centres = as_numpy(task.old_x[i]), task.labels[i].numpy(), as_numpy(task.centres[i])
        assert (x - centres[labels]).std() == pytest.approx(1, abs=0.03)
        assert centres.std() == pytest.approx(0.55, abs=0.05)
        assert (as_numpy(task.change[i]) - np.eye(64)).std() == pytest.approx(0.125, abs=0.01)
        np.testing.assert_allclose(as_numpy(task.test_x[i]), x @ as_numpy(task.change[i]).T, atol=1e-4)


def test_larger_weights_start_at_he_s_size():
    _, config = experiment.load("nlora", quick=True, overrides=["pretrain_steps=0"])
    for gain, variance in ((1.0, 1 / 192), (config.gain, 2 / 64)):
        for W in weights(nlora._Classes(config, Trial((0,)), gain), 0):
            assert W.var() == pytest.approx(variance, rel=0.1)


def test_shares_moved_are_those_of_the_blocks(quick_run, config):
    task = nlora._Classes(config, Trial((0, 1, 2)))
    measured = quick_run("nlora").metrics
    for rank in (8, 32):
        for i in range(3):
            both = weights(task, i)
            moved = np.mean([np.linalg.norm(W[:, :rank] @ W[:rank, :rank] @ W[:rank]) / np.linalg.norm(W) for W in both])
            assert measured[f"start.block_{rank}.moved"].values[i] == pytest.approx(moved, rel=1e-4)
            predicted = np.mean([rank * np.mean(W**2) for W in both])
            assert measured[f"start.block_{rank}.predicted"].values[i] == pytest.approx(predicted, rel=1e-4)
    for core in ("block", "pinv"):
        assert max(measured[f"start.{core}_8_corrected.moved"].values) < 1e-3


def test_a_race_at_a_learning_rate_of_zero_shows_nothing():
    _, config = experiment.load("nlora", quick=True, overrides=["lr=0", "core_lr=0"])
    measured = nlora.run_race(config, Trial((0, 1)))
    for method in ("lora", "slora", "published", "pissa"):
        assert measured.values[f"{method}.loss"] == measured.values[f"{method}.first"]
    for method in ("slora", "corrected", "pissa", "xs"):
        np.testing.assert_allclose(measured.values[f"{method}.loss"], measured.values["lora.loss"], rtol=1e-3)


@pytest.mark.parametrize("override", ["rank=65", "rank=0", "start_ranks=4,16", "early=5", "early=300", "rates=[]", "core_rank=0"])
def test_settings_that_do_not_fit_are_refused(override):
    with pytest.raises(UsageError):
        experiment.load("nlora", overrides=[override])
