"""Linear algebra that several papers share."""

import torch
from jaxtyping import Float
from torch import Tensor


def working(tensor: Tensor) -> Tensor:
    """The tensor in the precision of the linear algebra: float32 for half precision, else its own."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def randomised_svd(
    M: Float[Tensor, "rows columns"], sketch: Float[Tensor, "columns q"], *, niter: int
) -> tuple[Float[Tensor, "rows q"], Float[Tensor, " q"], Float[Tensor, "q columns"]]:
    """Approximate leading singular triplets U (rows, q), S (q,) and V^T (q, columns) of M, by `niter` subspace iterations.

    Source: Halko, Martinsson and Tropp (arXiv 0909.4061), Algorithms 4.4 and 5.1. Cheapest for rows >= columns.
    """
    # M Q is written (Q^T M^T)^T: the same product in the column order of LAPACK, which saves a tenth of the time
    Q = torch.linalg.qr((sketch.to(M).mT @ M.mT).mT).Q
    for _ in range(niter):
        # Both half steps are orthonormalised: a plain power of M would lose the small directions to rounding
        Q = torch.linalg.qr((Q.mT @ M).mT).Q
        Q = torch.linalg.qr((Q.mT @ M.mT).mT).Q
    # M is close to Q (Q^T M), and the transposed second factor is the cheaper one to decompose
    V, S, Uh = torch.linalg.svd((Q.mT @ M).mT, full_matrices=False)
    return Q @ Uh.mT, S, V.mT


def eigh_together(matrices: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Eigenvalues, ascending, and eigenvectors of each symmetric matrix or batch: one call for all of equal shape, dtype and device."""
    alike: dict[object, list[int]] = {}
    for i, matrix in enumerate(matrices):
        alike.setdefault((matrix.shape, matrix.dtype, matrix.device), []).append(i)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for places in alike.values():
        values, vectors = torch.linalg.eigh(torch.stack([matrices[i] for i in places]))
        found |= zip(places, zip(values, vectors, strict=True), strict=True)
    return [found[i] for i in range(len(matrices))]
