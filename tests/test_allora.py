"""ALLoRA as people port it: code that forms the product is told so, and the layer works under torch's compiler."""

import pytest
import torch

from loracle.oracle_tests.running import check
from loracle.reference import allora


def dense_row_norms(A, B):
    return (B @ A).norm(dim=1)


def dense_row_scale(A, B, eta):
    return (dense_row_norms(A, B) + 1 / eta**2).rsqrt()


def test_a_port_that_forms_the_product_fails_that_law_alone():
    report = check({"row_norms": dense_row_norms, "row_scale": dense_row_scale}, paper="allora", profile="quick")
    assert [r.law for r in report.results if r.outcome == "fails"] == ["allora.L1d"]
    assert report.count("holds") >= 6


# torch makes an instance of an autograd function when it compiles one, and warns of that itself
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_layer_compiles_as_one_graph():
    layer = allora.ALLoRALinear(torch.nn.Linear(5, 4, dtype=torch.float64), rank=2, eta=3.0)
    torch.nn.init.normal_(layer.B)
    x, grad_y = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    torch.compiler.reset()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).backward(grad_y)
    want = allora.backward(grad_y, x, layer.base.weight, layer.A.detach(), layer.B.detach(), 3.0)
    torch.testing.assert_close(layer.A.grad, want.grad_A)
    torch.testing.assert_close(layer.B.grad, want.grad_B)
