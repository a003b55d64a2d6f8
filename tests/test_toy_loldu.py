"""LoLDU's experiment: its networks, starts and numbers by another road, and claims that fail when they should."""

from functools import partial

import numpy as np
import pytest

from loracle.toy_tasks import experiment
from loracle.toy_tasks.config import UsageError
from loracle.toy_tasks.experiment import Trial
from loracle.toy_tasks.tasks import loldu


@pytest.fixture(scope="module")
def task():
    return loldu._Task(experiment.load("loldu", quick=True)[1], Trial((0, 1)))


def as_numpy(tensor):
    return tensor.detach().double().numpy()


def outputs(model, x):
    """A network of three layers without biases, written out."""
    W1, W2, W3 = (as_numpy(model[i].weight) for i in (0, 2, 4))
    return np.maximum(np.maximum(x @ W1.T, 0) @ W2.T, 0) @ W3.T


@pytest.mark.parametrize("i", [0, 1])
def test_loss_and_accuracy_are_those_of_the_network(task, i):
    x, classes = as_numpy(task.test[0][i]), task.test[1][i].numpy()
    z = outputs(task.models[i], x)
    frozen = task.stack(None)
    assert task.accuracy(frozen, task.test, frozen.trainable)[i].item() == pytest.approx(np.mean(z.argmax(axis=1) == classes))
    own = np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), classes]
    assert task.loss(frozen, task.test, frozen.trainable)[i].item() == pytest.approx(own.mean(), rel=1e-4)


@pytest.mark.parametrize("name", ["low", "ldu", "svd", "random", "long", "lora_1", "lora_8", "full"])
def test_every_method_starts_at_the_pretrained_network(task, name):
    stack = task.stack(loldu.variants(task.config)[name])
    got = as_numpy(stack(stack.trainable, task.test[0]))
    for i in (0, 1):
        np.testing.assert_allclose(got[i], outputs(task.models[i], as_numpy(task.test[0][i])), atol=1e-4)


def test_trained_numbers():
    config = experiment.load("loldu")[1]
    made = loldu._Task(config, Trial((0, 1)))
    counts = {name: made.stack(make).num_trainable() for name, make in loldu.variants(config).items()}
    assert counts == {"low": 42, "ldu": 138, "svd": 138, "random": 138, "long": 138, "lora_1": 330, "lora_8": 2640, "full": 8832}


def test_long_factors_are_as_long_as_those_of_the_weight(task):
    linear = task.models[0][0]
    made = loldu._long(linear, task.trial.generators()[0])
    own = loldu.loldu.ldu(linear.weight.detach())
    lengths = np.linalg.norm(as_numpy(own.L), axis=0) * np.linalg.norm(as_numpy(own.U), axis=1)
    found = np.linalg.norm(as_numpy(made.L), axis=0) * np.linalg.norm(as_numpy(made.U), axis=1)
    np.testing.assert_allclose(found, lengths, rtol=1e-4)


def test_deviation_of_zeros_at_full_rank_is_the_whole_weight(task):
    stack = task.stack(partial(loldu._ldu, rank=task.config.features, diagonal="zeros", preserve=False))
    np.testing.assert_allclose(loldu._deviations(stack), 1, atol=1e-4)
    stack = task.stack(partial(loldu._ldu, rank=task.config.features, diagonal="zeros"))
    assert loldu._deviations(stack) == [0, 0]


def test_a_run_at_a_learning_rate_of_zero_shows_nothing():
    file, config = experiment.load("loldu", quick=True, overrides=["start_lr=0", "rates=[0]", "steps=10"])
    trial = Trial((0, 1))
    measured = next(part for part in file.parts if part.name == "methods").run(config, trial)
    assert measured.values["ldu.accuracy"] == measured.values["none.accuracy"]
    assert measured.values["ldu.early"] == pytest.approx(measured.values["random.early"], rel=1e-4)
    measured = next(part for part in file.parts if part.name == "starts").run(config, trial)
    assert measured.values["ones_off.accuracy"] == measured.values["ones_off.start"]


@pytest.mark.parametrize("override", ["rank=65", "rank=0", "lora_ranks=[]", "rates=[]", "classes=65", "early=201"])
def test_settings_that_do_not_fit_are_refused(override):
    with pytest.raises(UsageError):
        experiment.load("loldu", overrides=[override])
