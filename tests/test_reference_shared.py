"""What all reference files stand on: their linear algebra, many small calls made as one, and the checks of arguments."""

import re

import pytest
import torch

from loracle.reference import _adapters, _checks, _linalg

# Linear algebra


@pytest.mark.parametrize(
    ("given", "used"), [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_half_precision_is_worked_on_in_float32_and_double_precision_is_kept(given, used):
    assert _linalg.working(torch.ones(2, dtype=given)).dtype == used


@pytest.mark.parametrize("shape", [(5, 4), (4, 5)], ids=["tall", "wide"])
def test_a_sketch_wide_enough_finds_the_singular_triplets_and_no_more_than_its_columns(shape):
    # Entries 3 and 2 in rows and columns of their own: these are the singular values
    M = torch.zeros(shape, dtype=torch.float64)
    M[3, 0], M[1, 2] = -2.0, 3.0
    sketch = torch.randn(shape[1], 3, generator=torch.Generator().manual_seed(0))
    U, S, Vh = _linalg.randomised_svd(M, sketch, niter=1)
    assert (U.shape, S.shape, Vh.shape) == ((shape[0], 3), (3,), (3, shape[1]))
    torch.testing.assert_close(S, torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(U * S @ Vh, M)
    for orthonormal in (U.mT @ U, Vh @ Vh.mT):
        torch.testing.assert_close(orthonormal, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("niter", [0, 1, 2])
def test_each_iteration_multiplies_a_narrow_sketch_by_the_matrix_and_its_transpose_once_more(niter):
    diagonal = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    U, S, Vh = _linalg.randomised_svd(diagonal.diag(), torch.ones(3, 1), niter=niter)
    seen = diagonal ** (2 * niter + 1)
    seen /= seen.norm()
    torch.testing.assert_close(U @ U.mT, torch.outer(seen, seen))
    torch.testing.assert_close(U * S @ Vh, torch.outer(seen, seen * diagonal))


def test_each_matrix_gets_its_own_eigenvectors_by_one_call_for_all_alike(monkeypatch):
    shapes = [(2, 2), (3, 3), (2, 2), (2, 3, 3), (2, 2), (2, 3, 3)]
    matrices = [torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    matrices = [matrix + matrix.mT for matrix in [*matrices, matrices[0].float()]]
    one_by_one, called = [torch.linalg.eigh(matrix) for matrix in matrices], []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda stacked: called.append(stacked.shape) or eigh(stacked))
    found = _linalg.eigh_together(matrices)
    assert called == [(3, 2, 2), (1, 3, 3), (2, 2, 3, 3), (1, 2, 2)]
    for got, want in zip(found, one_by_one, strict=True):
        assert torch.equal(got[0], want.eigenvalues)
        assert torch.equal(got[1], want.eigenvectors)
    assert _linalg.eigh_together([]) == []


# Many small calls made as one


def test_each_item_gets_its_own_result_however_many_are_stacked(monkeypatch):
    items = [(torch.full(shape, float(i)), factor) for i, (shape, factor) in enumerate([((2, 3), 1.0), ((3,), 1.0)] * 4 + [((2, 3), 5.0)])]
    for entries, calls in ((1, 9), (12, 4), (10**6, 3)):
        monkeypatch.setattr(_adapters, "ENTRIES_TOGETHER", entries)
        called = []

        def total(given, called=called):
            called.append(given["x"].shape)
            return {"y": given["factor"] * given["x"].sum()}

        results = list(_adapters.map_alike(total, range(9), lambda i: {"x": items[i][0], "factor": items[i][1]}))
        assert sorted(i for i, _ in results) == list(range(9))
        for i, result in results:
            assert result["y"] == items[i][1] * i * items[i][0].numel()
        assert len(called) == calls


def test_an_item_unlike_all_others_is_given_as_it_is():
    items, given = {"a": torch.ones(2), "b": torch.ones(3)}, []

    def noted(own):
        given.append(own["x"])
        return own

    assert [name for name, _ in _adapters.map_alike(noted, items, lambda name: {"x": items[name]})] == ["a", "b"]
    assert all(got is own for got, own in zip(given, items.values(), strict=True)), "copied"


# Checks of arguments: the message names what is wrong, what it was held against, and the way out


def says(*parts):
    """The pattern of a message that holds all parts."""
    return "".join(f"(?=.*{re.escape(part)})" for part in parts)


def test_dimensions_of_one_name_agree_and_any_number_of_them_may_lead():
    W0, bias = torch.ones(5, 4), None
    for lead in ((), (3,), (2, 3)):
        x, y = torch.ones(*lead, 4), torch.ones(*lead, 5)
        _checks.check_shapes(W0=(W0, "out in"), bias=(bias, "out"), x=(x, "... in"), y=(y, "... out"), loss=(torch.ones(lead), "..."))


SHAPES = {
    "another size": ({"W0": ((5, 4), "out in"), "A": ((2, 3), "rank in")}, ["A has shape (2, 3)", "in = 4, as in W0"]),
    "too few axes": ({"W0": ((5,), "out in")}, ["W0 has shape (5,)", "(out, in)"]),
    "too many axes": ({"W0": ((5, 4, 3), "out in")}, ["W0 has shape (5, 4, 3)", "(out, in)"]),
    "no axis after the leading ones": ({"x": ((), "... in")}, ["x has shape ()", "(..., in)"]),
    "other leading axes": ({"x": ((2, 3, 4), "... in"), "y": ((2, 6, 4), "... in")}, ["y has shape (2, 6, 4)", "... = (2, 3), as in x"]),
    "fewer leading axes": ({"x": ((2, 3, 4), "... in"), "y": ((2, 4), "... in")}, ["y has shape (2, 4)", "... = (2, 3), as in x"]),
}


@pytest.mark.parametrize("fault", SHAPES)
def test_a_wrong_shape_is_refused(fault):
    given, named = SHAPES[fault]
    with pytest.raises(ValueError, match=says(*named)):
        _checks.check_shapes(**{name: (torch.ones(shape), dims) for name, (shape, dims) in given.items()})


@pytest.mark.parametrize("other", [torch.ones(2, dtype=torch.float64), torch.ones(2, device="meta")], ids=["dtype", "device"])
def test_another_dtype_or_device_than_the_first_is_refused(other):
    with pytest.raises(ValueError, match=says(f"B is {other.dtype} on {other.device}", "A is torch.float32 on cpu", "B.to(A)")):
        _checks.check_shapes(A=(torch.ones(2), "n"), B=(other, "n"))


def test_integers_are_refused():
    with pytest.raises(ValueError, match=says("B has dtype torch.int32", "B.float()")):
        _checks.check_shapes(A=(torch.ones(2), "n"), B=(torch.ones(2, dtype=torch.int32), "n"))


@pytest.mark.parametrize("rank", [0, 4, -1, 2.0, True, None])
def test_a_rank_that_is_no_whole_number_up_to_the_smaller_side_is_refused(rank):
    for W0 in (torch.ones(3, 5), torch.ones(5, 3)):
        for right in (1, 3):
            _checks.check_rank(right, W0)
        with pytest.raises(ValueError, match=says(f"rank is {rank!r}", "1 to 3", f"W0 {tuple(W0.shape)}")):
            _checks.check_rank(rank, W0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_entries_that_are_not_finite_are_refused_and_counted(bad):
    good = torch.tensor([[1.0, -2.0, 0.0], [3.0, 4.0, -5.0]])
    _checks.check_finite(W0=good)
    with pytest.raises(ValueError, match=says("A has 2 of 6", "repair")):
        _checks.check_finite(W0=good, A=torch.tensor([[bad, 2.0, 0.0], [3.0, bad, 1.0]]))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_a_number_that_is_not_positive_and_finite_is_refused(bad):
    _checks.check_positive("lr", 1e-300)
    with pytest.raises(ValueError, match=says(f"lr is {bad!r}")):
        _checks.check_positive("lr", bad)


@pytest.mark.parametrize(("bad", "end"), [("adamv", "; did you mean 'adamw'?"), ("", "'adamw'"), (None, "'adamw'"), (3, "'adamw'")])
def test_an_option_that_is_no_choice_is_refused_with_the_nearest_name(bad, end):
    choices = ("sgd", "lion", "adamw")
    for right in choices:
        _checks.check_choice("optimizer", right, choices)
    with pytest.raises(ValueError, match=says(f"optimizer is {bad!r}", "'sgd', 'lion', 'adamw'") + ".*" + re.escape(end) + "$"):
        _checks.check_choice("optimizer", bad, choices)
