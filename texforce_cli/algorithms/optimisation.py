"""AdamW with warm-up, a schedule, gradient clipping and an optional average of the weights: one optimiser step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from texforce_cli.errors import Unsuited
from texforce_cli.team import Team

LRSchedule = Literal["constant", "cosine", "linear"]


@dataclass(frozen=True)
class OptimiserSettings:
    """`warmup` is a share of all `updates`; `ema` a decay, 0 for none.

    `loss_scale` keeps fp16 gradients from vanishing (Micikevicius et al. 2018); it is halved, and the update left out, when one
    overflows.
    """

    learning_rate: float
    updates: int
    schedule: LRSchedule = "constant"
    warmup: float = 0.0
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    ema: float = 0.0
    loss_scale: float = 1.0


def learning_rate_factor(step: int, updates: int, warmup: float, schedule: LRSchedule) -> float:
    """The factor on the learning rate of update `step` (0 first). The first one is never 0."""
    warm = math.ceil(warmup * updates)
    if step < warm:
        return (step + 1) / warm
    progress = min(1.0, (step - warm) / max(1, updates - warm))
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if schedule == "linear" else 1.0


MOST_LOST = 5
"""So many gradients that are not finite end a run, where two that are make up for one; one of a scaled loss counts half."""


_FUSED = ("cpu", "cuda")
"""Devices on which every torch that is supported updates all parameters in one kernel."""


class Optimisation:
    """The optimiser of a run over `parameters`; `step()` uses the gradients that `team` has gathered."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], settings: OptimiserSettings, team: Team | None = None
    ) -> None:
        self.parameters = list(parameters)
        self.settings = settings
        self.team = team or Team()
        self.base_rate = settings.learning_rate
        self.loss_scale = settings.loss_scale
        self.updates = 0
        self._lost = 0.0
        """Gradients that were not finite; two finite ones make up for one."""
        self._adam = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=(0.9, 0.999),
            weight_decay=settings.weight_decay,
            fused=all(p.device.type in _FUSED for p in self.parameters),
        )
        self._average = [p.detach().clone() for p in self.parameters] if settings.ema else []

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        s = self.settings
        return self.base_rate * learning_rate_factor(self.updates, s.updates, s.warmup, s.schedule)

    def backward(self, loss: Tensor) -> None:
        """Gather the gradient of a loss."""
        (loss * self.loss_scale).backward()

    def forget(self) -> None:
        """Drop the gradients that were gathered since the last step."""
        self._adam.zero_grad()

    def step(self) -> float:
        """Update the weights and forget the gradients; returns the norm of the gradient before clipping.

        A gradient that is not finite is passed over: the weights stay as they are and the norm is nan. After an overflow
        of fp16 the loss is scaled by half from then on.

        Raises:
            Unsuited: too many gradients were not finite; the weights are those of the last one that was.
        """
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.team.total(gradients)
        if self.loss_scale != 1:
            for gradient in gradients:
                gradient /= self.loss_scale
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm))
        if not math.isfinite(norm):
            self._adam.zero_grad()
            scaled = self.loss_scale > 1
            self.loss_scale /= 2 if scaled else 1
            self._lost += 0.5 if scaled else 1
            if self._lost >= MOST_LOST:
                raise Unsuited(
                    f"too many gradients were not finite: {MOST_LOST * (1 + scaled)} in a row, or more than "
                    f"{'half' if scaled else 'a third'} of the last ones",
                    "use --precision fp32 or bf16, or a lower --lr",
                )
            return math.nan
        self._lost = max(0.0, self._lost - 0.5)
        for group in self._adam.param_groups:
            group["lr"] = self.learning_rate
        self._adam.step()
        self._adam.zero_grad()
        self.updates += 1
        for average, parameter in zip(self._average, self.parameters):
            average.lerp_(parameter.detach(), 1 - self.settings.ema)
        return norm

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this block the parameters are their moving average, if there is one."""
        live = [parameter.detach().clone() for parameter in self.parameters] if self._average else []
        for parameter, average in zip(self.parameters, self._average):
            parameter.data.copy_(average)
        try:
            yield
        finally:
            for parameter, value in zip(self.parameters, live):
                parameter.data.copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """Moments and averages by name, for a safetensors file."""
        result = {}
        for index, parameter in enumerate(self.parameters):
            for key, value in self._adam.state.get(parameter, {}).items():
                result[f"adam.{index}.{key}"] = value.detach().cpu().clone()
        for index, average in enumerate(self._average):
            result[f"ema.{index}"] = average.detach().cpu().clone()
        return result

    def numbers(self) -> dict[str, Any]:
        """The rest of the state, plain JSON values."""
        return {
            "updates": self.updates,
            "base_rate": self.base_rate,
            "loss_scale": self.loss_scale,
            "lost": self._lost,
        }

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue from `tensors()` and `numbers()`."""
        self.updates, self.base_rate = int(numbers["updates"]), float(numbers["base_rate"])
        self.loss_scale = float(numbers["loss_scale"])
        self._lost = float(numbers.get("lost", 0))  # absent in checkpoints of before it was kept
        state = self._adam.state_dict()
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, number, key = name.split(".", 2)
                state["state"].setdefault(int(number), {})[key] = value.clone()
        self._adam.load_state_dict(state)
        for index, average in enumerate(self._average):
            average.copy_(tensors[f"ema.{index}"])
