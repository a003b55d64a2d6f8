"""LoRA's experiment: its numbers by another road, and claims that fail when they should."""

from pathlib import Path

import pytest
import torch

from loracle.toy_tasks import experiment
from loracle.toy_tasks.experiment import Trial
from loracle.toy_tasks.tasks import lora


def run(out: Path, *overrides: str) -> experiment.Results:
    task, config = experiment.load("lora", quick=True, overrides=overrides)
    return experiment.run(task, config, seeds=range(3), out=out, quick=True)


@pytest.fixture(scope="module")
def quick(quick_run):
    return quick_run("lora")


def verdicts(results):
    return {claim.id: claim.verdict for claim in results.claims}


def test_a_quick_run_reaches_the_tail_and_sees_the_scaling(quick):
    found = verdicts(quick)
    assert (found["lora.T1"], found["lora.T3"], found["lora.T4"]) == ("shown",) * 3
    assert quick.metrics["tail.rank_2.loss"].mean == pytest.approx(5.0, abs=0.05)
    assert quick.metrics["digits.rank_8.turned"].mean > quick.metrics["digits.frozen.turned"].mean + 0.4


def test_with_adaptation_switched_off_nothing_is_shown_but_the_collapse(tmp_path):
    off = run(tmp_path, "tail_lr=0", "rslora_lr=0", "digits_lr=0")
    assert {id for id, verdict in verdicts(off).items() if verdict == "shown"} <= {"lora.T3", "lora.T5", "lora.T9"}
    frozen, rank_8 = off.metrics["digits.frozen.turned"], off.metrics["digits.rank_8.turned"]
    assert frozen.values == rank_8.values  # B = 0: the adapted network is the frozen one
    assert off.metrics["digits.rank_8.forgetting"].values == (0.0, 0.0, 0.0)
    assert off.metrics["tail.rank_2.loss"].mean == pytest.approx(30.0, abs=1e-3)


def test_a_step_size_that_explodes_is_recorded_and_shows_nothing(tmp_path):
    wild = run(tmp_path, "rslora_lr=1e6")
    assert verdicts(wild)["lora.T4"] == "not shown"
    assert wild.metrics["rslora.rslora_16.loss"].mean is None
    lora.figure(wild)


def test_parameters_are_counted_by_layer(quick):
    layers = [(64, 64), (64, 64), (64, 10)]
    assert quick.metrics["digits.rank_8.parameters"].mean == sum(8 * (m + n) for n, m in layers)
    assert quick.metrics["digits.full.parameters"].mean == sum(n * m + m for n, m in layers)


def test_the_shift_has_the_loss_of_its_spectrum_and_the_page_s_start():
    _, config = experiment.load("lora")
    problem = lora.make_shift(config, Trial((0, 1)))
    gram = problem.x.mT @ problem.x / config.samples
    torch.testing.assert_close(gram, torch.eye(config.size).expand(2, -1, -1), atol=1e-5, rtol=0)
    stack = lora.add_adapters(problem, Trial((0, 1)), rank=4, alpha=4.0)
    torch.testing.assert_close(problem.loss(stack, stack.trainable), torch.full((2,), 30.0), rtol=1e-5, atol=0)


def test_turned_digits_are_the_same_images_turned_by_a_quarter():
    splits = [lora.load_digits(20, 10, torch.Generator().manual_seed(seed)) for seed in range(2)]
    upright, turned = (lora.Digits(splits, quarters, torch.device("cpu")) for quarters in (0, 1))
    image, other = upright.train_x[1, 3].reshape(8, 8), turned.train_x[1, 3].reshape(8, 8)
    assert all(other[7 - j, i] == image[i, j] for i in range(8) for j in range(8))
    assert torch.equal(upright.test_y, turned.test_y)
