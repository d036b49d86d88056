"""The Muon optimiser in float32 and in batches of matrices of one shape.

Torch's own computes in bfloat16, which few CPUs have units for. Muon is momentum whose every update is
orthogonalised: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

# The quintic iteration of the reference implementation: five rounds bring all singular values near 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrices of shape (count, rows, columns), roughly.

    Singular values end between 0.7 and 1.2.
    """
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ROUNDS):
        square = x @ x.mT
        x = a * x + torch.baddbmm(square, square, square, beta=b, alpha=c) @ x
    return x if wide is matrices else x.mT


class Muon(torch.optim.Optimizer):
    """Muon for matrices; those of one shape are updated together.

    Args:
        parameters: Matrices, or groups of them; embeddings and heads are better left to AdamW.
        lr: Learning rate: about the spectral norm of an update.
        momentum: Of the Nesterov momentum.
        weight_decay: Decoupled, times the learning rate.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        """Group the matrices by shape."""
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            group["stacks"] = [(same, torch.zeros(len(same), *shape)) for shape, same in shapes.items()]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix from its gradient."""
        with torch.no_grad():
            for group in self.param_groups:
                for parameters, average in group["stacks"]:
                    self._update(group, parameters, average)

    @staticmethod
    def _update(group: dict[str, Any], parameters: list[torch.Tensor], average: torch.Tensor) -> None:
        gradient = torch.stack([parameter.grad for parameter in parameters if parameter.grad is not None])
        average.lerp_(gradient, 1 - group["momentum"])
        update = orthogonalise(gradient.lerp(average, group["momentum"]))
        rows, columns = update.shape[1:]
        scale = max(1.0, rows / columns) ** 0.5
        for parameter, change in zip(parameters, update, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(change, alpha=-group["lr"] * scale)
