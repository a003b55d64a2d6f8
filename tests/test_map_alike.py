"""Many small calls that are alike, made as one: `map_alike` and `eigh_together`."""

import torch

from loracle.reference import _adapters, _linalg


def test_each_item_gets_its_own_result_however_many_are_stacked(monkeypatch):
    items = [(torch.full(shape, float(i)), factor) for i, (shape, factor) in enumerate([((2, 3), 1.0), ((3,), 1.0)] * 4 + [((2, 3), 5.0)])]
    for entries, calls in ((1, 9), (12, 4), (10**6, 3)):
        monkeypatch.setattr(_adapters, "ENTRIES_TOGETHER", entries)
        called = []

        def double(given, called=called):
            called.append(given["x"].shape)
            return {"y": 2 * given["factor"] * given["x"]}

        results = list(_adapters.map_alike(double, range(9), lambda i: {"x": items[i][0], "factor": items[i][1]}))
        assert sorted(i for i, _ in results) == list(range(9))
        for i, result in results:
            assert torch.equal(result["y"], 2 * items[i][1] * items[i][0])
        assert len(called) == calls


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
