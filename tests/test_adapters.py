"""Putting adapters into a model by name: what is replaced, what trains, and that the function is kept at the start."""

import pytest
import torch
from torch import nn

from loracle.reference._adapters import replace_linears
from loracle.reference.lora import LoRALinear


def make_model():
    torch.manual_seed(0)
    block = nn.ModuleDict({"q_proj": nn.Linear(5, 4), "k_proj": nn.Linear(5, 4), "norm": nn.LayerNorm(5)})
    return nn.ModuleDict({"block": block, "head": nn.Linear(4, 3)})


def adapter(linear):
    return LoRALinear(linear, rank=2, alpha=4)


def test_the_named_layers_are_replaced_and_only_their_factors_train():
    model, x = make_model(), torch.ones(2, 5)
    before = {name: model["block"][name](x) for name in ("q_proj", "k_proj")}
    assert replace_linears(model, r".*\.(q|k)_proj", adapter) == ["block.q_proj", "block.k_proj"]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"block.{layer}.{factor}" for layer in ("q_proj", "k_proj") for factor in "AB"}
    for name, y in before.items():
        assert torch.equal(model["block"][name](x), y)
    assert type(model["head"]) is nn.Linear


def test_a_pattern_has_to_match_the_whole_name():
    assert replace_linears(make_model(), "head", adapter) == ["head"]
    for pattern in ("q_proj", r"block\.q", "norm"):
        with pytest.raises(ValueError, match=r"the model has: block\.q_proj, block\.k_proj, head"):
            replace_linears(make_model(), pattern, adapter)


def test_a_model_that_is_itself_a_layer_has_no_name_to_be_replaced_by():
    for pattern in (".*", ""):
        with pytest.raises(ValueError, match="the model has: none"):
            replace_linears(nn.Linear(5, 4), pattern, adapter)


def test_an_adapted_layer_is_not_adapted_again():
    model = make_model()
    replace_linears(model, "head", adapter)
    with pytest.raises(ValueError, match=r"no nn\.Linear is named like 'head'"):
        replace_linears(model, "head", adapter)
