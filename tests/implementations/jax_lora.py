"""LoRA in JAX, written from the paper: a port as a user would write it, which the tests hold against the laws.

The backward pass is JAX's own derivative of the forward pass.
"""

import jax
import jax.numpy as jnp

LORACLE = {"arrays": "jax", "dtype": "float64"}


def scaling_factor(alpha, rank, rslora=False):
    return alpha / rank**0.5 if rslora else alpha / rank


def init(W0, rank, generator, distribution="kaiming"):
    out_features, in_features = W0.shape
    if distribution == "gaussian":
        A = jax.random.normal(generator, (rank, in_features), W0.dtype) / rank
    else:
        bound = in_features**-0.5
        A = jax.random.uniform(generator, (rank, in_features), W0.dtype, -bound, bound)
    return {"A": A, "B": jnp.zeros((out_features, rank), W0.dtype)}


def draw_mask(x, p, generator):
    return jax.random.bernoulli(generator, 1 - p, x.shape)


@jax.jit
def forward(x, W0, A, B, scaling, bias=None, mask=None, p=0.0):
    kept = x if mask is None else x * mask / (1 - p)
    y = x @ W0.T + scaling * (kept @ A.T) @ B.T
    return y if bias is None else y + bias


def delta_weight(A, B, scaling):
    return scaling * B @ A


def merge(W0, A, B, scaling):
    return W0 + scaling * B @ A


def unmerge(W, A, B, scaling):
    return W - scaling * B @ A


def gradients(G, A, B, scaling):
    grad_A, grad_B = jax.grad(lambda A, B: jnp.sum(G * delta_weight(A, B, scaling)), argnums=(0, 1))(A, B)
    return {"grad_A": grad_A, "grad_B": grad_B}


def backward(grad_y, x, W0, A, B, scaling, mask=None, p=0.0):
    _, pull = jax.vjp(lambda x, A, B: forward(x, W0, A, B, scaling, mask=mask, p=p), x, A, B)
    return pull(grad_y)


def sgd_step(G, W0, A, B, scaling, lr, weight_decay=0.0):
    grads = gradients(G, A, B, scaling)
    decay = 1 - lr * weight_decay
    return {"W0": W0, "A": decay * A - lr * grads["grad_A"], "B": decay * B - lr * grads["grad_B"]}


def num_trainable(W0, rank):
    return rank * sum(W0.shape)
