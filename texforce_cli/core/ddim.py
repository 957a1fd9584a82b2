"""One denoising step as a Gaussian policy (Eq. 1): its mean, its noise and its log-probability, in fp32.

Every sampler and every loss of texforce takes its steps from here, so that what is trained is what was sampled.
Source of the step: DDIM (Song et al. 2021, Eq. 12); of the policy: DDPO (Black et al. 2024, sec. 4).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample"]

_MINIMAL_SIGMA = 1e-6
"""Below this a step is deterministic: it has no density, no log-probability and is not trained on."""


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Half precision widened to fp32; fp32 and fp64 as they are."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


@dataclass(frozen=True)
class Schedule:
    """The T denoising steps of a run, each `x_p = mean + sigma * noise` with `mean = a * x_t + b * output`.

    `timesteps`, `sample_scale` (a), `output_scale` (b) and `sigma` (s) have T entries, first step first; p is the
    timestep that follows t in the scheduler's own list, never `t - 1000 // T`. The mean of every DDIM step is linear
    in the sample and in the network's output, which is why two numbers a step hold all of Eq. (1).
    """

    timesteps: tuple[int, ...]
    sample_scale: tuple[float, ...]
    output_scale: tuple[float, ...]
    sigma: tuple[float, ...]

    @classmethod
    def ddim(
        cls,
        timesteps: Sequence[int],
        alphas_cumprod: Sequence[float],
        final_alpha_cumprod: float,
        *,
        eta: float,
        prediction: Prediction,
    ) -> Schedule:
        """The schedule of DDIM with noise `eta` (0 deterministic, 1 as DDPM).

        `alphas_cumprod[t]` is the paper's cumulative product, `final_alpha_cumprod` the one after the last step.
        """
        following = [*(alphas_cumprod[t] for t in timesteps[1:]), final_alpha_cumprod]
        steps = [_coefficients(alphas_cumprod[t], a_p, eta, prediction) for t, a_p in zip(timesteps, following)]
        a, b, s = zip(*steps)
        return cls(tuple(timesteps), a, b, s)

    def with_noise_at(self, steps: Collection[int], still: Schedule) -> Schedule:
        """This schedule at `steps`, and elsewhere `still`, the same without noise."""
        rows = [
            (one.sample_scale[i], one.output_scale[i], one.sigma[i])
            for i in range(len(self))
            for one in (self if i in steps else still,)
        ]
        return Schedule(self.timesteps, *zip(*rows))

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def stochastic(self) -> tuple[int, ...]:
        """The indices of the steps that draw noise, the only ones that have a log-probability."""
        return tuple(i for i, s in enumerate(self.sigma) if s > _MINIMAL_SIGMA)

    def sensitivity(self, index: int) -> float:
        """|d mean / d output| / sigma: nats of joint log-ratio, per unit change of the output. Infinite where s = 0."""
        s = self.sigma[index]
        return abs(self.output_scale[index]) / s if s > _MINIMAL_SIGMA else math.inf

    def mean(self, sample: Tensor, output: Tensor, index: int | Tensor) -> Tensor:
        """mu_theta(x_t, t) of Eq. (1). `sample` and `output` [N, ...]; `index` one step, or one step an image [N]."""
        a, b = (self._at(values, index, sample) for values in (self.sample_scale, self.output_scale))
        return a * at_least_fp32(sample) + b * at_least_fp32(output)

    def log_prob(self, following: Tensor, mean: Tensor, index: int | Tensor) -> Tensor:
        """log p(x_p | x_t) of the STORED next sample, averaged over its elements: [N, ...] -> [N].

        The mean over the D elements, not the sum: the sum of SD's 16384 terms overflows the ratio of Eq. (5). Times D
        it is the joint log-probability.
        """
        s = self.sigma_at(index, following)
        deviation = (at_least_fp32(following) - mean) / s
        return (-0.5 * deviation.square() - s.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)

    def sigma_at(self, index: int | Tensor, like: Tensor) -> Tensor:
        """s of one step or of one step an image, shaped to go with `like` [N, ...]."""
        return self._at(self.sigma, index, like)

    def timestep_at(self, index: int | Tensor, device: torch.device) -> Tensor:
        """The timestep of each step in `index`, on `device`."""
        return _table(self.timesteps, torch.int64, device)[index]

    def _at(self, values: tuple[float, ...], index: int | Tensor, like: Tensor) -> Tensor:
        return _table(values, at_least_fp32(like).dtype, like.device)[index].reshape(-1, *[1] * (like.dim() - 1))


@functools.lru_cache(maxsize=256)
def _table(values: tuple[int, ...] | tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers of all steps, made once: to bring them to a GPU is to wait for it."""
    return torch.tensor(values, dtype=dtype, device=device)


def _coefficients(a_t: float, a_p: float, eta: float, prediction: Prediction) -> tuple[float, float, float]:
    """`mean = a x_t + b output` and s of one step, in double precision.

    s^2 = eta^2 (1-a_p)/(1-a_t) (1-a_t/a_p);  mu = sqrt(a_p) x0 + sqrt(1-a_p-s^2) e, with
    epsilon: x0 = (x - sqrt(1-a_t) e) / sqrt(a_t);  v: x0 = sqrt(a_t) x - sqrt(1-a_t) v, e = sqrt(a_t) v + sqrt(1-a_t) x;
    sample: e = (x - sqrt(a_t) x0) / sqrt(1-a_t).
    """
    variance = eta**2 * (1 - a_p) / (1 - a_t) * max(0.0, 1 - a_t / a_p)
    to_x0, to_noise = math.sqrt(a_p), math.sqrt(max(0.0, 1 - a_p - variance))
    signal, noise = math.sqrt(a_t), math.sqrt(1 - a_t)
    if prediction == "v_prediction":
        a, b = to_x0 * signal + to_noise * noise, to_noise * signal - to_x0 * noise
    elif prediction == "epsilon":
        a, b = to_x0 / signal, to_noise - to_x0 * noise / signal
    else:
        a, b = to_noise / noise, to_x0 - to_noise * signal / noise
    return a, b, math.sqrt(variance)
