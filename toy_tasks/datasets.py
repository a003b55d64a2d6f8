"""Data of the experiments."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DIGITS = Path(__file__).parent / "data" / "digits.npz"


class Split(NamedTuple):
    """Disjoint training and test images (n, 8, 8), float32 within [0, 1], and labels (n,), int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(num_train: int, num_test: int, generator: torch.Generator) -> Split:
    """A random split of the 1,797 handwritten digits of data/DIGITS.txt.

    Raises:
        ValueError: there are fewer than `num_train` + `num_test` images.
    """
    with np.load(DIGITS) as file:
        images, labels = torch.from_numpy(file["images"]).float() / 16, torch.from_numpy(file["labels"]).long()
    if num_train + num_test > len(labels):
        raise ValueError(f"{num_train} + {num_test} images asked for; there are {len(labels)}")
    order = torch.randperm(len(labels), generator=generator)
    train, test = order[:num_train], order[num_train : num_train + num_test]
    return Split(images[train], labels[train], images[test], labels[test])


def draw_orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A random matrix (rows, columns) with orthonormal columns."""
    Q: Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q
    return Q


def draw_whitened(num_samples: int, features: int, generator: torch.Generator) -> Tensor:
    """Random inputs X (num_samples, features), made such that X^T X / num_samples = I."""
    return draw_orthonormal(num_samples, features, generator) * math.sqrt(num_samples)


def draw_uneven(num_samples: int, features: int, smallest: float, generator: torch.Generator) -> Tensor:
    """Normal inputs (num_samples, features) whose standard deviations fall evenly from 1 for the first to `smallest` for the last."""
    return torch.randn(num_samples, features, generator=generator) * torch.linspace(1, smallest, features)
