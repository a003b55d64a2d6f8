"""The hot functions of every reference file under torch.compile, vmap and jacrev, on inputs made from the contract."""

import pytest
import torch
from torch.func import jacrev, vmap

from loracle.oracle_tests.contract import contract, papers
from loracle.oracle_tests.loading import load

SIZES = {"out": 5, "in": 4, "rank": 2, "...": (3,), "blocks": 3, "block_rank": 2, "in_block": 4, "out_block": 5}
SIZES |= {"bases": 2, "small": 4, "large": 5, "shared_bases": 3, "shared_small": 6, "shared_large": 7}

# Set-up functions draw, count, or check values, as their description says; they run once per layer and need no transform
SET_UP = ("init", "draw", "fit", "merge", "unmerge", "num", "scaling")


def _is_hot(function):
    checks_values = "infinite" in function.doc
    arrays = all(
        (s.dims is not None and s.dtype in ("Float", "Int")) or s.dtype == "float" for s in function.parameters.values() if s.required
    )
    return function.name.split("_")[0] not in SET_UP and not checks_values and arrays


HOT = [(paper, name) for paper in papers() for name, function in contract(paper).items() if _is_hot(function)]


def _module(paper):
    return load(f"loracle.reference.{paper}", paper=paper).namespace


def _call(paper, name, *, options):
    """A function of its tensors alone, and these: required arguments from the contract's shapes, options only if asked for."""
    function, generator = contract(paper)[name], torch.Generator().manual_seed(1)
    tensors, numbers = {}, {}
    for parameter, shape in function.parameters.items():
        if not shape.required and not options:
            continue
        if shape.dims is not None and shape.dtype in ("Float", "Bool"):
            dims = [n for d in shape.dims.split() for n in (SIZES[d] if d == "..." else (SIZES[d],))]
            values = torch.randn(dims, generator=generator, dtype=torch.float64)
            tensors[parameter] = values > 0 if shape.dtype == "Bool" else values
        elif shape.dims is not None and shape.dtype == "Int" and shape.required:  # an index vector: no permutation that is its own inverse
            (dim,) = shape.dims.split()
            tensors[parameter] = torch.arange(SIZES[dim]).roll(1)
        elif shape.dtype == "float" and shape.required:
            numbers[parameter] = 0.75
    if "p" in function.parameters and options:
        numbers["p"] = 0.25
    names = list(tensors)
    code = getattr(_module(paper), name)
    return lambda *given: code(**dict(zip(names, given, strict=True)), **numbers), list(tensors.values())


def _parts(result):
    return result if isinstance(result, tuple) else (result,)


def _assert_same(got, want):
    for one, other in zip(_parts(got), _parts(want), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


each_hot_function = pytest.mark.parametrize(("paper", "name"), HOT, ids=[f"{paper}.{name}" for paper, name in HOT])
with_and_without_options = pytest.mark.parametrize("options", [False, True], ids=["plain", "options"])


# torch's compiler itself instantiates a torch.autograd.Function, and warns of that
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@each_hot_function
@with_and_without_options
def test_compiles_as_one_graph(paper, name, options):
    call, tensors = _call(paper, name, options=options)
    torch.compiler.reset()
    _assert_same(torch.compile(call, fullgraph=True, backend="eager")(*tensors), call(*tensors))


@each_hot_function
@with_and_without_options
def test_maps_over_all_tensors(paper, name, options):
    call, tensors = _call(paper, name, options=options)
    batch = [torch.stack([t, t.roll(1, 0), t.flip(-1)]) for t in tensors]
    one_by_one = [_parts(call(*slices)) for slices in zip(*batch, strict=True)]
    _assert_same(vmap(call)(*batch), tuple(torch.stack(part) for part in zip(*one_by_one, strict=True)))


@each_hot_function
def test_differentiates(paper, name):
    call, tensors = _call(paper, name, options=False)
    smooth = [i for i, t in enumerate(tensors) if t.is_floating_point()]
    step, direction = 1e-6, [torch.randn_like(tensors[i]) for i in smooth]

    def moved(by):
        moves = dict(zip(smooth, direction, strict=True))
        return _parts(call(*(t + by * moves[i] if i in moves else t for i, t in enumerate(tensors))))

    jacobians = jacrev(lambda *given: _parts(call(*given)), argnums=tuple(smooth))(*tensors)
    for jacobian, after, before in zip(jacobians, moved(step), moved(-step), strict=True):
        along = sum((j * d).sum(dim=tuple(range(j.ndim - d.ndim, j.ndim))) for j, d in zip(jacobian, direction, strict=True))
        torch.testing.assert_close(along, (after - before) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("paper", papers())
def test_every_paper_has_hot_functions(paper):
    assert any(slug == paper for slug, _ in HOT)


def test_the_tests_above_can_fail():
    """A value that is read in the middle breaks the graph, the map and nothing else."""

    def reads(x):
        return x * 2 if bool(x.sum() > 0) else x

    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(reads, fullgraph=True, backend="eager")(torch.ones(2))
    with pytest.raises(RuntimeError):
        vmap(reads)(torch.ones(2, 2))
