"""Hugging Face PEFT against the oracle: what holds, what does not, and that it is for the reason that we state."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("peft")

from loracle.oracle_tests import conformance
from loracle.oracle_tests.diagnosis import diagnose, looked_at
from loracle.oracle_tests.law import laws_of
from loracle.oracle_tests.loading import load
from loracle.oracle_tests.running import check, collect_cases, replay

ADAPTERS = "loracle.oracle_tests.adapters"


@pytest.mark.parametrize("name", conformance.names())
def test_conformance_is_as_published(name):
    assert conformance.differences(conformance.published(name), conformance.measure(name)) == []


def test_a_difference_is_noticed():
    old = conformance.published("peft_lora")
    changed = {**old, "laws": {**old["laws"], "lora.L2a": {**old["laws"]["lora.L2a"], "outcome": "fails", "note": "off"}}}
    assert conformance.differences(old, changed) == ["lora.L2a fails, and the adapter gives no reason: off"]
    assert "version was '0.0'" in conformance.differences({**old, "version": "0.0"}, old)[0]


def test_lora_holds_every_law_of_what_peft_provides():
    report = check(f"{ADAPTERS}.peft_lora", paper="lora")
    by_outcome = {r.law: r.outcome for r in report.results}
    assert {law for law, outcome in by_outcome.items() if outcome != "holds"} == {"lora.L12c"}
    assert by_outcome["lora.L12c"] == "missing"  # PEFT draws its masks inside nn.Dropout


# LoRA-GA

# What the deviation must break: orthonormal factors, the first step's direction, the scale, independence of the gradient's size
BROKEN_BY_VALUES = ("lora_ga.L2a", "lora_ga.L3a", "lora_ga.L7a", "lora_ga.L10")


def in_direction(adapter, direction):
    """The adapter, every start of which takes this direction whatever the law asks for."""

    def init(G, scaling, *, rank, gamma=16.0, generator=None):
        return adapter.init(G, scaling, rank=rank, gamma=gamma, direction=direction, generator=generator)

    return SimpleNamespace(**{**vars(adapter), "init": init})


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_peft_departs_in_every_direction(direction):
    adapter = importlib.import_module(f"{ADAPTERS}.peft_lora_ga")
    impl = load(in_direction(adapter, direction), paper="lora_ga", dtype="float32")
    for law in laws_of("lora_ga"):
        if law.id in BROKEN_BY_VALUES:
            cases = [case for case in collect_cases(law, 20) if case.rank > 1]
            assert isinstance(replay(law, impl, cases), AssertionError), law.id


def test_the_diagnosis_names_what_peft_does():
    impl = load(f"{ADAPTERS}.peft_lora_ga", paper="lora_ga")
    for law in laws_of("lora_ga"):
        if law.id in (*BROKEN_BY_VALUES, "lora_ga.L5b"):
            assert [mistake.name for mistake in diagnose(impl, looked_at(law)).candidates] == ["start_of_peft"], law.id


def repaired(adapter):
    """PEFT's start with the singular values divided out and the scale on both factors; one random half for A, the other for B."""

    def unit_columns(B):
        """Columns of length 1; those of a singular value that is zero stay zero, and move nothing."""
        return B / B.norm(dim=0).clamp_min(1e-30)

    def half_starts(G, scaling, rank):
        """Unit vectors: right ones (2r, in) and left ones (out, 2r), from PEFT's two complementary directions."""
        first, second = (adapter.init(G, scaling, rank=rank, direction=d, scale="unit") for d in ("ArB2r", "A2rBr"))
        right, left = torch.cat([first[0], second[0]]), torch.cat([second[1], first[1]], dim=1)
        return right, unit_columns(left)

    def init(G, scaling, *, rank, gamma=16.0, direction="ArB2r", scale="stable", generator=None):
        c = {"stable": len(G) ** 0.25 / gamma**0.5, "unit": 1.0, "gd": 1 / scaling}[scale]
        if direction == "random":
            order = torch.randperm(2 * rank, generator=generator)
            right, left = half_starts(G, scaling, rank)
            return c * right[order[:rank]], c * left[:, order[rank:]]
        A, B = adapter.init(G, scaling, rank=rank, gamma=gamma, direction=direction, scale="unit")
        return c * A, c * unit_columns(B)

    return SimpleNamespace(init=init, first_order_update=adapter.first_order_update, scaling_factor=adapter.scaling_factor)


def test_with_the_singular_values_divided_out_it_holds():
    adapter = importlib.import_module(f"{ADAPTERS}.peft_lora_ga")
    report = check(repaired(adapter), paper="lora_ga", dtype="float32")
    outcomes = {r.law: r.outcome for r in report.results}
    assert report.count("fails") == 0, [r.message for r in report.results if r.outcome == "fails"]
    assert {outcomes[law] for law in adapter.DEVIATIONS} == {"holds"}


def test_the_random_direction_of_peft_uses_one_set():
    """By PEFT's tensors alone: in the frame of G's singular vectors, A and B of the random direction have the same support."""
    adapter = importlib.import_module(f"{ADAPTERS}.peft_lora_ga")
    values = np.array([8.0, 6.0, 4.0, 3.0, 2.0, 1.0])
    G = torch.zeros(7, 6)
    G[range(6), range(6)] = torch.tensor(values, dtype=torch.float32)
    for seed in range(5):
        A, B = adapter.init(G, 1.5, rank=2, direction="random", generator=torch.Generator().manual_seed(seed))
        assert (A.abs() > 0.5).any(dim=0).nonzero().tolist() == (B.abs() > 0.5).any(dim=1).nonzero().tolist()
