"""LoRA in NumPy, written from the paper: a port as a user would write it, which the tests hold against the laws."""

import numpy as np

LORACLE = {"arrays": "numpy", "dtype": "float64"}


def scaling_factor(alpha, rank, rslora=False):
    return alpha / rank**0.5 if rslora else alpha / rank


def init(W0, rank, generator, distribution="kaiming"):
    out_features, in_features = W0.shape
    if distribution == "gaussian":
        A = generator.standard_normal((rank, in_features)) / rank
    else:
        A = generator.uniform(-1, 1, (rank, in_features)) / np.sqrt(in_features)
    return A.astype(W0.dtype), np.zeros((out_features, rank), W0.dtype)


def draw_mask(x, p, generator):
    return generator.random(x.shape) < 1 - p


def _kept(x, mask, p):
    return x if mask is None else np.where(mask, x / x.dtype.type(1 - p), x.dtype.type(0))


def forward(x, W0, A, B, scaling, bias=None, mask=None, p=0.0):
    y = x @ W0.T + scaling * (_kept(x, mask, p) @ A.T @ B.T)
    return y if bias is None else y + bias


def delta_weight(A, B, scaling):
    return scaling * B @ A


def merge(W0, A, B, scaling):
    return W0 + delta_weight(A, B, scaling)


def unmerge(W, A, B, scaling):
    return W - delta_weight(A, B, scaling)


def gradients(G, A, B, scaling):
    return scaling * B.T @ G, scaling * G @ A.T


def backward(grad_y, x, W0, A, B, scaling, mask=None, p=0.0):
    kept = _kept(x, mask, p)
    G = grad_y.reshape(-1, len(B)).T @ kept.reshape(-1, A.shape[1])
    grad_A, grad_B = gradients(G, A, B, scaling)
    return grad_y @ W0 + _kept(grad_y @ delta_weight(A, B, scaling), mask, p), grad_A, grad_B


def sgd_step(G, W0, A, B, scaling, lr, weight_decay=0.0):
    grad_A, grad_B = gradients(G, A, B, scaling)
    return W0, A - lr * (grad_A + weight_decay * A), B - lr * (grad_B + weight_decay * B)


def num_trainable(W0, rank):
    return rank * sum(W0.shape)
