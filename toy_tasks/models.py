"""Small models, and many of one kind computed together: one copy per seed."""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from .datasets import Split, draw_orthonormal

if TYPE_CHECKING:
    from .experiment import Trial

Params = dict[str, Tensor]


def make_linear(in_features: int, out_features: int, generator: torch.Generator, *, bias: bool = True) -> nn.Linear:
    """A linear layer, weight and bias uniform within 1/sqrt(in) as torch draws them, but from a `generator`."""
    with torch.random.fork_rng(devices=[]):  # nn.Linear draws by itself, from the global generator: leave that as it was
        layer = nn.Linear(in_features, out_features, bias=bias)
    bound = in_features**-0.5
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer


def make_mlp(sizes: Sequence[int], generator: torch.Generator) -> nn.Sequential:
    """Linear layers of the given sizes with ReLU between them; the layers are named "0", "2", "4", ..."""
    layers: list[nn.Module] = []
    for in_features, out_features in itertools.pairwise(sizes):
        layers += [make_linear(in_features, out_features, generator), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Stack:
    """Models of one architecture, one per seed, whose parameters are stacked along a first dimension and computed together.

    `trainable` holds the parameters that require a gradient, by name, each (models, ...); `frozen` the others and the
    buffers. Both lie on `device`. The forward is the module's own, mapped over the models with `torch.vmap`.
    """

    def __init__(self, models: Sequence[nn.Module], device: torch.device | str = "cpu") -> None:
        self._models = list(models)
        self._template = copy.deepcopy(self._models[0])
        params, buffers = stack_module_state(self._models)
        moved = {name: tensor.detach().to(device) for name, tensor in (params | buffers).items()}
        self.trainable: Params = {name: moved[name] for name, tensor in params.items() if tensor.requires_grad}
        self.frozen: Params = {name: tensor for name, tensor in moved.items() if name not in self.trainable}

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Outputs (models, ..., out) of all models with the trainable parameters `params`, for inputs `x` (models, ..., in)."""
        outputs: Tensor = torch.vmap(lambda own, x: functional_call(self._template, own, (x,)))(self.frozen | params, x)
        return outputs

    def num_trainable(self) -> int:
        """Trainable parameters of one model."""
        return sum(tensor[0].numel() for tensor in self.trainable.values())

    def models(self, params: Params) -> list[nn.Module]:
        """Copies of the models, on the CPU, with the trainable parameters `params`."""
        copies = copy.deepcopy(self._models)
        for i, model in enumerate(copies):
            model.load_state_dict({name: tensor[i] for name, tensor in params.items()}, strict=False)
        return copies


class Shift:
    """A layer activation(W x) per seed, whose weight W0 (out, in) must become W0 + D: the layers, data and loss.

    W0 has normal entries of variance 1 / in; D has the singular values `spectrum` and random directions.
    `draw_inputs(generator)` gives the samples (N, in) of a seed. `layers` hold W0; to train them, copy them. `shifts` hold D.
    """

    def __init__(
        self,
        trial: "Trial",
        *,
        out_features: int,
        in_features: int,
        spectrum: Sequence[float],
        draw_inputs: Callable[[torch.Generator], Tensor],
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.activation = activation or (lambda z: z)
        self.layers, self.shifts, inputs, targets = [], [], [], []
        for generator in trial.generators():
            layer = make_linear(in_features, out_features, generator, bias=False)
            nn.init.normal_(layer.weight, std=in_features**-0.5, generator=generator)
            U, V = (draw_orthonormal(features, len(spectrum), generator) for features in (out_features, in_features))
            x = draw_inputs(generator)
            self.layers.append(layer)
            inputs.append(x)
            self.shifts.append(U * torch.tensor(spectrum) @ V.T)
            targets.append(self.activation(x @ (layer.weight.detach() + self.shifts[-1]).T))
        self.x, self.y = torch.stack(inputs).to(trial.device), torch.stack(targets).to(trial.device)

    def loss(self, stack: Stack, params: Params) -> Tensor:
        """Squared error, summed over outputs and averaged over samples (seeds,)."""
        return self._error(stack(params, self.x), self.y)

    def gradient(self, i: int, W: Tensor, rows: Tensor) -> Tensor:
        """Gradient (out, in) of the i-th seed's loss on some of its samples, in the weight, at `W`; on the device of `W`."""
        x, y = self.x[i].to(W)[rows], self.y[i].to(W)[rows]
        W = W.detach().requires_grad_()
        # Not torch.func.grad, whose first call imports torch's compiler
        return torch.autograd.grad(self._error(x @ W.T, y), W)[0]

    def _error(self, z: Tensor, y: Tensor) -> Tensor:
        return (self.activation(z) - y).square().sum(dim=-1).mean(dim=-1)


class Digits:
    """Training and test digits of every seed, turned by `quarters` quarter turns, as vectors (seeds, n, 64)."""

    def __init__(self, splits: Sequence[Split], quarters: int, device: torch.device) -> None:
        def turn(images: list[Tensor]) -> Tensor:
            return torch.rot90(torch.stack(images), quarters, dims=(2, 3)).flatten(2).to(device)

        self.train_x, self.test_x = turn([s.train_images for s in splits]), turn([s.test_images for s in splits])
        self.train_y = torch.stack([s.train_labels for s in splits]).to(device)
        self.test_y = torch.stack([s.test_labels for s in splits]).to(device)

    def loss(self, stack: Stack, params: Params) -> Tensor:
        """Cross-entropy on the training digits (seeds,)."""
        logits = stack(params, self.train_x)
        return nn.functional.cross_entropy(logits.mT, self.train_y, reduction="none").mean(dim=1)

    def accuracy(self, stack: Stack, params: Params) -> Tensor:
        """Share of test digits recognised (seeds,)."""
        return (stack(params, self.test_x).argmax(dim=2) == self.test_y).double().mean(dim=1)
