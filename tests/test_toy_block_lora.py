"""Block-LoRA's experiment: its data, layers and optimizers by another road, and claims that fail when they should."""

import copy

import numpy as np
import pytest
import torch

from loracle.reference import block_lora as reference
from loracle.toy_tasks import experiment
from loracle.toy_tasks.config import UsageError
from loracle.toy_tasks.experiment import Trial
from loracle.toy_tasks.tasks import block_lora


@pytest.fixture(scope="module")
def clip():
    return block_lora._Clip(experiment.load("block_lora", quick=True)[1], Trial((0, 1)))


def as_numpy(tensor):
    return tensor.detach().double().numpy()


def logits(tower, x, lower=0.0, upper=0.0):
    """Ten times the cosine of W2 relu(W1 x) with the prototypes, written out."""
    out = np.maximum(x @ (as_numpy(tower.lower.weight) + lower).T, 0) @ (as_numpy(tower.upper.weight) + upper).T
    prototypes = as_numpy(tower.prototypes)
    lengths = np.linalg.norm(out, axis=1)[:, None] * np.linalg.norm(prototypes, axis=1)
    return 10 * out @ prototypes.T / lengths


@pytest.mark.parametrize("i", [0, 1])
def test_accuracy_and_loss_are_those_of_the_page(clip, i):
    stack = clip.adapted(block_lora.lora(2))
    found = logits(clip.towers[i], as_numpy(clip.test[i]))
    y = np.repeat(np.arange(10), clip.config.test_samples)
    accuracy = 100 * np.mean(found.argmax(axis=1) == y)
    assert clip.accuracy(stack, clip.test, stack.trainable)[i].item() == pytest.approx(accuracy)
    loss = np.mean(np.log(np.exp(found).sum(axis=1)) - found[np.arange(len(y)), y])
    assert clip.loss(stack, clip.test, stack.trainable)[i].item() == pytest.approx(loss, rel=1e-4)


def test_pretraining_learns_the_source_and_not_the_target():
    _, config = experiment.load("block_lora", overrides=["source_samples=60"])
    clip = block_lora._Clip(config, Trial((0, 1)))
    stack = clip.adapted(block_lora.lora(1))
    source, target = (clip.accuracy(stack, x, stack.trainable).min().item() for x in (clip.source_test, clip.test))
    assert source > 85
    assert target < source - 20


def test_the_target_is_the_source_moved_by_a_matrix_of_rank_two(clip):
    """Class means of the target are those of the source times one matrix for all; what is added to the identity has rank 2."""
    _, config = experiment.load("block_lora", overrides=["test_samples=20000", "noise=0.1", "classes=40", "pretrain_steps=0"])
    big = block_lora._Clip(config, Trial((3,)))
    source, target, held_back = (as_numpy(x[0]).reshape(40, -1, 32).mean(axis=1) for x in (big.source_test, big.test, big.held_back))
    np.testing.assert_allclose(held_back, target, atol=0.02)
    assert not torch.equal(big.held_back, big.test)
    move = np.linalg.lstsq(source, target, rcond=None)[0].T - np.eye(32)
    values = np.linalg.svd(move, compute_uv=False)
    assert values[1] > 1
    assert values[2] < 0.05


@pytest.mark.parametrize("name", ["lora", "block", "features"])
def test_adapters_start_at_the_tower_and_train_what_is_counted(clip, name):
    make = {"lora": block_lora.lora(8), "block": block_lora.blocked(8, 4), "features": block_lora.along_features(8, 4)}[name]
    stack = clip.adapted(make)
    outputs = as_numpy(stack(stack.trainable, clip.x))
    for i in (0, 1):
        np.testing.assert_allclose(outputs[i], logits(clip.towers[i], as_numpy(clip.x[i])), atol=1e-4)
    # Both readings store as much: out * r + in * r / b for each layer
    counted = {"lora": 8 * (32 + 64) * 2, "block": 8 * (64 + 32) + 2 * (32 + 64), "features": 8 * (64 + 32) + 2 * (32 + 64)}
    assert stack.num_trainable() == counted[name]
    assert all(key.rsplit(".", 1)[1] in "AB" for key in stack.trainable)


def test_equal_draws_for_layers_of_equal_shape(clip):
    block, small = clip.adapted(block_lora.blocked(8, 4)), clip.adapted(block_lora.lora(2))
    for layer in ("lower", "upper"):
        assert torch.equal(block.trainable[f"{layer}.A"], small.trainable[f"{layer}.A"])


@pytest.mark.parametrize("key", ["sgd", "momentum", "adam", "adamw"])
def test_optimizers_are_torch_s(clip, key):
    config = clip.config
    make, lr, decay = block_lora.makers(config)[key]
    kinds = {
        "sgd": lambda p: torch.optim.SGD(p, lr=lr),
        "momentum": lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=lr),
        "adamw": lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=decay),
    }
    names = ("lower.A", "lower.B", "upper.B")
    start = {name: torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for name in names}

    def loss(params):
        return sum((i + 1) * (p**4).sum() for i, p in enumerate(params.values()))

    settings = reference.Settings(lr, lr, decay, decay)
    *_, last = block_lora.walk(loss, start, block_lora.per_factor(make, settings), 10)
    theirs = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    optimizer = kinds[key](list(theirs.values()))
    for _ in range(10):
        optimizer.zero_grad()
        loss(theirs).backward()
        optimizer.step()
    for name in names:
        torch.testing.assert_close(last[name], theirs[name].detach())


def test_each_factor_has_its_own_settings():
    params = {name: torch.ones(2, dtype=torch.float64) for name in ("lower.A", "lower.B")}
    optimizer = block_lora.per_factor(block_lora.makers(experiment.load("block_lora")[1])["sgd"][0], reference.Settings(0.1, 0.3, 2.0, 0.5))
    (after,) = block_lora.walk(lambda p: sum(t.sum() for t in p.values()), params, optimizer, 1)
    torch.testing.assert_close(after["lower.A"], torch.full((2,), 1 - 0.1 * (1 + 2.0), dtype=torch.float64))
    torch.testing.assert_close(after["lower.B"], torch.full((2,), 1 - 0.3 * (1 + 0.5), dtype=torch.float64))


def test_the_distance_notices_a_wrong_learning_rate(clip, monkeypatch):
    assert block_lora.compare(clip, "adam", 5, lambda: None).max() < 1e-9
    assert block_lora.compare(clip, "adam", 5, lambda: None, compact=False).min() > 0.05
    monkeypatch.setattr(
        reference, "compact_settings", lambda lr, *, blocks, weight_decay: reference.Settings(lr, 1.01 * blocks * lr, 0.0, 0.0)
    )
    assert block_lora.compare(clip, "adam", 5, lambda: None).max() > 1e-3


def test_quick_metrics_agree_between_block_lora_and_the_smaller_lora(quick_run):
    measured = quick_run("block_lora").metrics
    same, block = (measured[f"fewshot.{name}_4.loss_gap"].values for name in ("same", "block"))
    np.testing.assert_allclose(same, block, atol=1e-3)


def test_models_of_one_stack_have_their_own_learning_rates(clip):
    """All rates at once are each rate alone."""
    stack = clip.adapted(block_lora.blocked(8, 4), copies=2)
    rates = torch.tensor([0.01, 0.01, 0.03, 0.03])
    together = block_lora.train(
        lambda p: clip.loss(stack, clip.x.repeat(2, 1, 1), p), stack.trainable, block_lora.adam_of_each(rates), steps=6
    )
    for i, rate in enumerate((0.01, 0.03)):
        alone = clip.adapted(block_lora.blocked(8, 4))
        run = block_lora.train(lambda p, alone=alone: clip.loss(alone, clip.x, p), alone.trainable, block_lora.adam(rate), steps=6)
        for name, tensor in run.params.items():
            torch.testing.assert_close(together.params[name][2 * i : 2 * i + 2], tensor, rtol=1e-3, atol=1e-5)


def test_multiplications_are_those_of_the_path(quick_run):
    measured = quick_run("block_lora").metrics
    assert measured["fewshot.lora_8.multiplications"].mean == 8 * (32 + 64) * 2
    assert measured["fewshot.block_4.multiplications"].mean == 2 * (32 + 64) * 2
    assert measured["fewshot.features_4.multiplications"].mean == 8 * (8 + 64) + 8 * (16 + 32)


def test_a_race_at_a_learning_rate_of_zero_shows_nothing():
    task, _ = experiment.load("block_lora")
    _, config = experiment.load("block_lora", quick=True, overrides=["lr=0", "steps=3"])
    measured = next(part for part in task.parts if part.name == "fewshot").run(config, Trial((0, 1)))
    assert len({measured.values[f"{name}.accuracy"] for name in ("lora_8", "block_2", "block_8", "features_4", "zero_shot")}) == 1


@pytest.mark.parametrize(
    "override",
    [
        "rank=0",
        "blocks=3,4",
        "blocks=2",
        "lora_ranks=8",
        "rates=[]",
        "shots=0",
        "lora_ranks=2,64",
        "cut=3",
        "training_blocks=4",
        "training_rank=40",
    ],
)
def test_settings_that_do_not_fit_are_refused(override):
    with pytest.raises(UsageError):
        experiment.load("block_lora", overrides=[override])


def test_rates_are_not_chosen_on_the_test_samples(clip, monkeypatch):
    """Where the accuracies on the test samples are turned round, the chosen rates are the same, and the reported numbers are not."""

    def turned_round(stack, x, params):
        found = clip.accuracy(stack, x, params)
        return 100 - found if torch.equal(x[:2], clip.test) else found

    other = copy.copy(clip)
    other.accuracy = turned_round
    found = []
    for given in (clip, other):
        monkeypatch.setattr(block_lora, "_clip", lambda *_, given=given: given)
        found.append(block_lora.run_rates(clip.config, Trial((0, 1))).values)
    for name in ("block", "lora", "large"):
        assert found[0][f"{name}.lr"] == found[1][f"{name}.lr"]
        np.testing.assert_allclose(found[0][f"{name}.accuracy"], 100 - np.array(found[1][f"{name}.accuracy"]))
