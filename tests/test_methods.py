"""The papers' methods put into models: every file of `toy_tasks/methods` at once."""

import pytest
import torch
from torch import nn

from loracle.toy_tasks import methods
from loracle.toy_tasks.config import UsageError
from loracle.toy_tasks.models import make_mlp


@pytest.fixture
def build():
    """A small model, its inputs, and a function that puts a method into a copy of it."""
    model, x = make_mlp([9, 12, 10, 8], torch.Generator().manual_seed(0)).double(), torch.randn(20, 9, dtype=torch.float64)

    def attach(slug, pattern="[02]", **changes):
        own = make_mlp([9, 12, 10, 8], torch.Generator().manual_seed(0)).double()

        def gradients(samples):
            copied = make_mlp([9, 12, 10, 8], torch.Generator().manual_seed(0)).double()
            copied(x[:samples]).square().sum(dim=-1).mean().backward()
            return {name: module.weight.grad for name, module in copied.named_modules() if isinstance(module, nn.Linear)}

        given = {"rank": 2, "alpha": 4.0, "lr": 1e-2, "generator": torch.Generator().manual_seed(0)}
        method = methods.make(slug)
        names = method.attach(own, methods.Setup(pattern, gradients=gradients, **(given | changes)))
        return method, own, names

    return model, x, attach


@pytest.mark.parametrize("slug", methods.names())
def test_method_trains_what_it_replaces_and_nothing_else(slug, build):
    _, x, attach = build
    method, adapted, names = attach(slug)
    assert names == ["0", "2"]
    assert [name for name in method.layers(adapted) if name in names] == names
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    optimizer = method.optimizer(adapted, lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = adapted(x).square().sum(dim=-1).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], "the loss does not fall"
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    moved = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == trained
    assert all(name.split(".")[0] in names for name in trained)
    if slug == "full":
        assert trained == {"0.weight", "2.weight"}


@pytest.mark.parametrize("slug", [slug for slug in methods.names() if methods.make(slug).obstacle() is None])
def test_change_is_what_training_added_to_the_pretrained_layer(slug, build):
    model, x, attach = build
    method, adapted, _ = attach(slug)
    start = {name: method.change(layer) for name, layer in method.layers(adapted).items()}
    optimizer = method.optimizer(adapted, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(x).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        for name, layer in method.layers(adapted).items():
            linear = model.get_submodule(name)
            own = torch.randn(7, linear.in_features, dtype=torch.float64)
            A, B = method.change(layer)
            W = linear.weight + B @ A
            if method.starts_inside:
                W = W - start[name].B @ start[name].A
            torch.testing.assert_close(layer(own), own @ W.T + linear.bias)
            assert (W - linear.weight).abs().max() > 1e-3, "nothing was learnt"


@pytest.mark.parametrize("slug", methods.names())
def test_method_gives_the_same_from_the_same_generator_and_leaves_the_global_one(slug, build):
    _, x, attach = build
    state = torch.get_rng_state()
    outputs = [attach(slug)[1](x) for _ in range(2)]
    assert torch.equal(*outputs)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("slug", methods.names())
def test_pattern_that_matches_nothing_names_what_exists(slug, build):
    _, _, attach = build
    with pytest.raises(ValueError, match=r"no nn.Linear is named like 'head'.*0, 2, 4"):
        attach(slug, pattern="head")


def test_unknown_methods_and_options_are_refused():
    with pytest.raises(UsageError, match="there is no method 'lora_gaa'; did you mean 'lora_ga'"):
        methods.make("lora_gaa")
    with pytest.raises(UsageError, match="lora_ga has no option 'gama'; did you mean 'gamma'"):
        methods.make("lora_ga", {"gama": 1.0})
    with pytest.raises(UsageError, match="option gamma of lora_ga is 'much'; needed a finite number"):
        methods.make("lora_ga", {"gamma": "much"})
