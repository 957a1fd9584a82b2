"""The denoising step, against numbers worked out by hand and against diffusers where both agree."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler

from texforce_cli.core.ddim import Schedule


def scheduler(**changes: object) -> DDIMScheduler:
    config = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**{**config, **changes})


def schedule(made: DDIMScheduler, steps: int, eta: float = 1.0) -> Schedule:
    made.set_timesteps(steps)
    return Schedule.ddim(
        made.timesteps.tolist(),
        made.alphas_cumprod.double().tolist(),
        float(made.final_alpha_cumprod),
        eta=eta,
        prediction=made.config.prediction_type,
    )


def test_one_step_by_hand() -> None:
    # a_t = 0.5, a_p = 0.8: s^2 = (0.2 / 0.5) (1 - 0.5 / 0.8) = 0.4 * 0.375 = 0.15
    # epsilon model, x = 1, e = 0: x0 = 1 / sqrt(0.5), mu = sqrt(0.8) / sqrt(0.5) = sqrt(1.6)
    # x = 0, e = 1: x0 = -1, mu = -sqrt(0.8) + sqrt(0.05)
    one = Schedule.ddim([1], [0.8, 0.5], 0.8, eta=1.0, prediction="epsilon")
    assert one.sigma[0] == pytest.approx(math.sqrt(0.15), abs=1e-12)
    assert one.sample_scale[0] == pytest.approx(math.sqrt(1.6), abs=1e-12)
    assert one.output_scale[0] == pytest.approx(-math.sqrt(0.8) + math.sqrt(0.05), abs=1e-12)


def test_one_v_step_by_hand() -> None:
    # v model: x0 = sqrt(.5) (x - v), e = sqrt(.5) (v + x)
    one = Schedule.ddim([1], [0.8, 0.5], 0.8, eta=1.0, prediction="v_prediction")
    assert one.sample_scale[0] == pytest.approx(math.sqrt(0.5) * (math.sqrt(0.8) + math.sqrt(0.05)), abs=1e-12)
    assert one.output_scale[0] == pytest.approx(math.sqrt(0.5) * (-math.sqrt(0.8) + math.sqrt(0.05)), abs=1e-12)
    assert one.sensitivity(0) == pytest.approx(abs(one.output_scale[0]) / math.sqrt(0.15))


def test_log_prob_is_the_mean_of_the_normal_density_over_elements() -> None:
    one = Schedule((1,), (1.0,), (0.0,), (0.5,))
    following = torch.tensor([[1.0, 0.0]])
    log_prob = one.log_prob(following, torch.zeros(1, 2), 0)
    # elements: -(1/.25)/2 - log .5 - log sqrt(2 pi), and the same with 0 in place of -2
    expected = -1.0 + math.log(2) - 0.5 * math.log(2 * math.pi)
    assert log_prob.item() == pytest.approx(expected, abs=1e-6)
    normal = torch.distributions.Normal(0.0, 0.5).log_prob(following).mean().item()
    assert log_prob.item() == pytest.approx(normal, abs=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_the_step_is_that_of_diffusers_where_the_grid_is_regular(prediction: str, spacing: str, steps: int) -> None:
    made = scheduler(prediction_type=prediction, timestep_spacing=spacing)
    ours = schedule(made, steps)
    generator = torch.Generator().manual_seed(0)
    sample, output, noise = torch.randn(3, 2, 4, 8, 8, generator=generator).unbind(0)
    for index, timestep in enumerate(made.timesteps.tolist()):
        theirs = made.step(output, timestep, sample, eta=1.0, variance_noise=noise).prev_sample
        mine = ours.mean(sample, output, index) + ours.sigma[index] * noise
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=2e-4), (index, timestep)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 3, 7, 10, 30, 50, 999])
def test_each_step_leads_to_the_next_of_the_list(spacing: str, steps: int) -> None:
    made = scheduler(timestep_spacing=spacing, prediction_type="v_prediction")
    ours = schedule(made, steps)
    alphas = made.alphas_cumprod.double()
    clean = torch.full((1, 1), 3.0, dtype=torch.float64)
    noise = torch.full((1, 1), -2.0, dtype=torch.float64)
    for index, timestep in enumerate(ours.timesteps):
        following = ours.timesteps[index + 1] if index + 1 < len(ours) else None
        a_t = alphas[timestep]
        a_p = alphas[following] if following is not None else float(made.final_alpha_cumprod)
        sample = a_t.sqrt() * clean + (1 - a_t).sqrt() * noise
        velocity = a_t.sqrt() * noise - (1 - a_t).sqrt() * clean
        mean = ours.mean(sample, velocity, index)
        rest = max(0.0, float(1 - a_p - ours.sigma[index] ** 2)) ** 0.5
        assert mean.item() == pytest.approx(float(a_p) ** 0.5 * 3.0 - 2.0 * rest, abs=1e-9)


def test_a_step_without_noise_is_never_trained_on() -> None:
    to_one = schedule(scheduler(set_alpha_to_one=True), 10)
    assert to_one.sigma[-1] == 0.0
    assert to_one.stochastic == tuple(range(9))
    assert to_one.sensitivity(9) == math.inf
    last_repeats = schedule(scheduler(timestep_spacing="linspace"), 10)
    assert 9 not in last_repeats.stochastic
    assert schedule(scheduler(), 10).stochastic == tuple(range(10))
    assert schedule(scheduler(), 10, eta=0.0).stochastic == ()


def test_an_index_for_each_image_gives_what_single_indices_give() -> None:
    ours = schedule(scheduler(), 10)
    generator = torch.Generator().manual_seed(1)
    sample, output, following = torch.randn(3, 3, 4, 8, 8, generator=generator).unbind(0)
    index = torch.tensor([0, 4, 9])
    mean = ours.mean(sample, output, index)
    log_prob = ours.log_prob(following, mean, index)
    for row, i in enumerate(index.tolist()):
        one = ours.mean(sample[row : row + 1], output[row : row + 1], i)
        assert torch.equal(mean[row : row + 1], one)
        assert torch.equal(log_prob[row : row + 1], ours.log_prob(following[row : row + 1], one, i))


def test_zero_terminal_snr_is_finite_for_v_prediction() -> None:
    made = scheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    ours = schedule(made, 10)
    assert all(math.isfinite(v) for v in (*ours.sigma, *ours.sample_scale, *ours.output_scale))


def test_noise_at_some_steps_alone() -> None:
    noisy, still = schedule(scheduler(), 5), schedule(scheduler(), 5, eta=0.0)
    mixed = noisy.with_noise_at((1, 2), still)
    assert mixed.stochastic == (1, 2)
    for index in range(5):
        one = noisy if index in (1, 2) else still
        assert (mixed.sample_scale[index], mixed.output_scale[index], mixed.sigma[index]) == (
            one.sample_scale[index],
            one.output_scale[index],
            one.sigma[index],
        )
    assert mixed.timesteps == noisy.timesteps
