"""The objective: clipped policy gradient over denoising steps, with its diagnostics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ClipConvention = Literal["mean", "joint"]


def clipped_surrogate(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """Clipped surrogate objective, Eq. (5), negated to be minimised: one value an image and step, [N] -> [N].

    `log_prob` with gradient, `old_log_prob` of the sampling policy, `advantage` A; `clip_range` is the paper's lambda.
    At the first update the ratio is 1 and the gradient is that of the plain policy gradient, Eq. (4).
    """
    ratio = (log_prob - old_log_prob).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)


def reference_kl(mean: Tensor, reference_mean: Tensor, sigma: Tensor | float) -> Tensor:
    """KL(p || p_reference) of two Gaussian steps of equal noise, averaged over elements: [N, ...] -> [N].

    (mu - mu_ref)^2 / (2 s^2), the KL term of DPOK and of RLHF for a denoising step.
    """
    return ((mean - reference_mean).square() / (2 * sigma**2)).flatten(1).mean(1)


def mean_clip_range(clip_range: float, convention: ClipConvention, elements: int) -> float:
    """The clip range on the mean over elements that `clip_range` stands for.

    `mean`: itself. `joint`: `clip_range` bounds the log-ratio of the whole latent of D `elements`; the paper's 1e-4 on
    the mean at D = 16384 is a joint bound of 1.64.
    """
    return clip_range if convention == "mean" else math.expm1(clip_range / elements)


@dataclass(frozen=True)
class Diagnostics:
    """What the ratios of one update look like. All are means over images and steps except `ratio_error`."""

    approx_kl: float
    """Half the mean squared log-ratio (mean-over-elements convention)."""
    clip_fraction: float
    """The share of ratios outside 1 +- clip_range."""
    ratio_error: float
    """max |ratio - 1|."""

    @classmethod
    def of(cls, log_ratio: Tensor, clip_range: float) -> Diagnostics:
        """From log-ratios of any shape."""
        log_ratio = log_ratio.detach().cpu().double()  # Apple's GPU has no fp64
        error = torch.expm1(log_ratio).abs()
        return cls(
            approx_kl=0.5 * log_ratio.square().mean().item(),
            clip_fraction=(error > clip_range).double().mean().item(),
            ratio_error=error.max().item(),
        )


def steered_learning_rate(learning_rate: float, approx_kl: float, target: float) -> float:
    """The next learning rate so that `approx_kl` approaches `target`: the change of log-ratio is linear in it.

    approx_kl grows with the square of the step, so the rate moves by the square root of the quotient, at most by 1.5 an
    epoch in either direction.
    """
    factor = math.sqrt(target / max(approx_kl, 1e-30))
    return learning_rate * min(1.5, max(1 / 1.5, factor))
