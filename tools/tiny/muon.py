"""Muon: momentum whose matrix updates are orthogonalised, so that no direction of a weight outgrows the others.

Under AdamW the U-Net of this world gets stuck: its 3x3 kernels end with spectral norms of 25 and half the effective
rank, and sprites stay blobs. Keller Jordan, "Muon", 2024; the scale that matches AdamW's rates is that of Liu et al.,
"Muon is Scalable for LLM Training", 2025 (arXiv 2502.16982). `torch.optim.Muon` takes matrices alone, not kernels, and
computes in bfloat16, which most CPUs emulate. The judges are trained with it too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, overload

import torch

_MOMENTUM = 0.95
_UPDATE = 0.2
"""Root mean square of an update at rate 1: what AdamW's is in practice."""


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Nearly U V^T of `matrix` = U S V^T (rows, columns), by five Newton-Schulz steps: singular values of 0.7 to 1.2."""
    x = matrix / (matrix.norm() + 1e-7)
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for weights (rows, columns) and (out, in, height, width); decoupled decay."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Any) -> float: ...
    @torch.no_grad()
    def step(self, closure: Any = None) -> float | None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["weight_decay"])
        return None

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, lr: float, decay: float) -> None:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
        direction = orthogonalised(torch.lerp(gradient, momentum, _MOMENTUM).flatten(1))
        parameter.mul_(1 - lr * decay)
        scale = _UPDATE * max(direction.shape) ** 0.5
        parameter.add_(direction.view(parameter.shape), alpha=-lr * scale)
