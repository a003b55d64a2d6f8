"""ALLoRA's experiment: its gradients, start and numbers by another road, and claims that fail when they should."""

import numpy as np
import pytest
import torch

from loracle.reference import allora as reference
from loracle.toy_tasks import experiment
from loracle.toy_tasks.config import UsageError
from loracle.toy_tasks.experiment import Trial
from loracle.toy_tasks.tasks import allora
from loracle.toy_tasks.tasks.allora import Rule
from loracle.toy_tasks.training import adam, sgd


@pytest.fixture(scope="module")
def config():
    return experiment.load("allora", overrides=["steps=10", "early=5"])[1]


@pytest.fixture(scope="module")
def problem(config):
    return allora._Problem(config, (0, 1), Trial((0, 1)))


def as_numpy(tensor):
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("i", [0, 1])
def test_the_layer_is_the_page_s(problem, i):
    """The rows of the needed change span a factor of ten, its rank is 4, and the best weight leaves the noise."""
    x, y, W0 = (as_numpy(part[i]) for part in (problem.x, problem.y, problem.W0))
    change = np.linalg.lstsq(x, y - x @ W0.T, rcond=None)[0].T
    lifted = change / np.logspace(-1, 0, 32)[:, None]
    values = np.linalg.svd(lifted * np.logspace(-1, 0, 32).mean())[1]
    assert values[3] > 5 * values[4]
    test, test_y = as_numpy(problem.test[i]), as_numpy(problem.test_y[i])
    loss = np.mean(np.sum((test @ (W0 + change).T - test_y) ** 2, axis=1))
    assert 0.32 <= loss < 0.45


def test_all_methods_start_at_the_pretrained_weight(problem, config):
    found = [allora.train(problem, rule, [0.0], sgd, lambda: None) for rule in (Rule("lora", 4), Rule("row", 8), Rule("itself", 8))]
    for i in range(2):
        test, y, W0 = (as_numpy(part[i]) for part in (problem.test, problem.test_y, problem.W0))
        start = np.mean(np.sum((test @ W0.T - y) ** 2, axis=1))
        for losses in found:
            assert losses.steps == [0, 5, 10]
            np.testing.assert_allclose(losses.values[0, i], start, rtol=1e-5)


@pytest.mark.parametrize(
    "rule", [Rule("lora", 2.0), Rule("lora", 2.0, 0.1), *(Rule(k, 8.0) for k in ("row", "matrix", "element", "output"))]
)
@pytest.mark.parametrize("make", [sgd, adam])
def test_training_is_that_of_torch(problem, config, rule, make):
    """Each seed and learning rate by itself, with torch's optimizer and the gradients by autograd or the reference's layer."""
    rates = [0.001, 0.01]
    losses = allora.train(problem, rule, rates, make, lambda: None)
    kinds = {sgd: torch.optim.SGD, adam: torch.optim.Adam}
    for j, lr in enumerate(rates):
        linear = torch.nn.Linear(48, 32, bias=False)
        linear.weight.data.copy_(problem.W0[1])
        layer = reference.ALLoRALinear(linear, rank=8, eta=rule.number, kind="none" if rule.kind == "lora" else rule.kind)
        layer.A.data.copy_(problem.A[1])
        s = rule.number if rule.kind == "lora" else 1.0
        optimizer = kinds[make]([layer.A, layer.B], lr=lr)
        for t in range(config.steps):
            x, y = (part[1][problem.which[1, t]] for part in (problem.x, problem.y))
            optimizer.zero_grad()
            if rule.kind == "lora":
                seen = x * problem.kept[1, t] / (1 - rule.p) if rule.p else x
                output = linear(x) + s * seen @ layer.A.T @ layer.B.T
            else:
                output = layer(x)
            (output - y).square().sum(dim=1).mean().backward()
            optimizer.step()
        W = problem.W0[1] + s * layer.B @ layer.A
        want = (problem.test[1] @ W.T - problem.test_y[1]).square().sum(dim=1).mean().item()
        assert losses.values[j, 1, -1].item() == pytest.approx(want, rel=1e-3)


def test_rows_of_each_parameter_once_is_what_the_optimizer_does(problem):
    """B's factor is eta for ever, A's one number per rank index."""
    params = {"A": problem.A, "B": problem.B}
    gradients = allora._gradients(Rule("itself", 8.0), params)
    grown = {"A": problem.A, "B": problem.B + 1.0}
    x, grad_y = problem.x[:, :5], problem.y[:, :5]
    found = gradients(grad_y, x, problem.W0, grown, None)
    for i in range(2):
        A, B, G = as_numpy(grown["A"][i]), as_numpy(grown["B"][i]), as_numpy(grad_y[i]).T @ as_numpy(x[i])
        own = 1 / np.sqrt(np.linalg.norm(A, axis=1, keepdims=True) + 1 / 64)
        np.testing.assert_allclose(found["A"][i], own * (B.T @ G), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found["B"][i], 8 * G @ A.T, rtol=1e-4, atol=1e-4)


def test_tuning_seeds_are_no_reported_seeds_and_every_family_gets_as_many_runs(quick_run):
    results = quick_run("allora")
    assert max(results.seeds) < allora.TUNING_SEEDS
    runs = {name: metric.values for name, metric in results.metrics.items() if name.endswith(".runs")}
    assert len(runs) == 2 * len(allora.FAMILIES)
    assert len(set(runs.values())) == 1
    # 2 numbers, 2 rates, 2 seeds
    assert next(iter(runs.values()))[0] == 8
    published = experiment.load("allora")[1]
    assert len(published.scalings) == len(published.etas)


def test_tuning_takes_what_is_best_on_other_seeds(config):
    """With a rate of zero and one that diverges beside a good one, the good one is taken."""
    found = experiment.load("allora", overrides=["steps=10", "early=5", "rates=30,3000000", "scalings=1", "etas=8", "tuning_seeds=2"])[1]
    measured = allora.run_tuned(sgd, found, Trial((0, 1)))
    assert measured.values["lora.late_lr"] == pytest.approx((0.003, 0.003))
    assert measured.values["row.late_number"] == (8.0, 8.0)


def test_the_law_is_followed_and_another_is_not(quick_run):
    metrics = quick_run("allora").metrics
    assert metrics["law.all.apart"].mean < 0.2
    lengths = [metrics[f"law.eta_{eta}.length"].mean for eta in (1, 4, 16)]
    assert lengths == sorted(lengths)


def test_a_race_at_a_learning_rate_of_zero_shows_nothing(config):
    found = experiment.load("allora", overrides=["steps=10", "early=5", "rates=0", "escape_lr=0", "tuning_seeds=1"])[1]
    trial = Trial((0, 1))
    measured = allora.run_escape(found, trial)
    assert set(measured.values["row_8.late_of_lora"]) == {1.0}
    tuned = allora.run_tuned(sgd, found, trial)
    assert set(tuned.values["row.late_of_lora"]) == set(tuned.values["dropout.late_of_lora"]) == {1.0}


@pytest.mark.parametrize(
    "override",
    [
        "rank=33",
        "rank=0",
        "shift=[]",
        "batch=0",
        "smallest_row=0",
        "dropout=1",
        "early=33",
        "every=7",
        "etas=2,8",
        "scalings=2,4,8",
        "rates=[]",
    ],
)
def test_settings_that_do_not_fit_are_refused(override):
    with pytest.raises(UsageError):
        experiment.load("allora", overrides=[override])
