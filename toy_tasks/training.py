"""Training of stacked models: gradient descent on every model's own loss at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .models import Params

State = dict[str, Any]


class Optimizer(NamedTuple):
    """An optimizer as two pure functions, `init_state(params)` and `step(params, grads, state)`; both keep their arguments."""

    init_state: Callable[[Params], State]
    step: Callable[[Params, Params, State], tuple[Params, State]]


def sgd(lr: float) -> Optimizer:
    """Plain gradient descent."""
    return Optimizer(lambda params: {}, lambda params, grads, state: ({k: p - lr * grads[k] for k, p in params.items()}, state))


def adam(lr: float, *, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0) -> Optimizer:
    """AdamW with torch's defaults, but no weight decay unless asked for.

    Elementwise, so that stacked models do not meet each other. (torch.optim would do the same sums; creating one of its
    optimizers imports torch's compiler, which takes longer than a quick run.)
    """

    def init_state(params: Params) -> State:
        return {"t": 0, "m": {k: torch.zeros_like(p) for k, p in params.items()}, "v": {k: torch.zeros_like(p) for k, p in params.items()}}

    def step(params: Params, grads: Params, state: State) -> tuple[Params, State]:
        t = state["t"] + 1
        m = {k: beta1 * state["m"][k] + (1 - beta1) * g for k, g in grads.items()}
        v = {k: beta2 * state["v"][k] + (1 - beta2) * g * g for k, g in grads.items()}
        updated = {}
        for k, p in params.items():
            m_hat, v_hat = m[k] / (1 - beta1**t), v[k] / (1 - beta2**t)
            updated[k] = (1 - lr * weight_decay) * p - lr * m_hat / (v_hat.sqrt() + eps)
        return updated, {"t": t, "m": m, "v": v}

    return Optimizer(init_state, step)


class Trained(NamedTuple):
    """Final parameters, and the losses (models, points) measured after `steps[i]` steps, the first before any."""

    params: Params
    steps: list[int]
    losses: Tensor


def train(
    loss: Callable[[Params], Tensor],
    params: Params,
    optimizer: Optimizer,
    *,
    steps: int,
    every: int = 1,
    tick: Callable[[], None] | None = None,
) -> Trained:
    """Train with the full batch for a fixed number of steps.

    `loss(params)` gives one loss per model (models,). Their sum is differentiated: a model's parameters occur in its own
    loss only, so each gets its own gradient. The loss is recorded at every `every`-th step and at the last.
    """
    params = {name: tensor.detach() for name, tensor in params.items()}
    state = optimizer.init_state(params)
    recorded_steps: list[int] = []
    losses: list[Tensor] = []
    for t in range(steps + 1):
        last = t == steps
        leaves = {name: tensor.requires_grad_(not last) for name, tensor in params.items()}
        value = loss(leaves)
        if last or t % every == 0:
            recorded_steps.append(t)
            losses.append(value.detach())
        if not last:
            grads = dict(zip(leaves, torch.autograd.grad(value.sum(), list(leaves.values())), strict=True))
            with torch.no_grad():
                params, state = optimizer.step(leaves, grads, state)
            if tick:
                tick()
    return Trained({name: tensor.detach() for name, tensor in params.items()}, recorded_steps, torch.stack(losses, dim=1).cpu())
