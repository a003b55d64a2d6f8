"""`map_alike`: many small calls that are alike, made as one."""

import torch

from loracle.reference import _adapters


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
