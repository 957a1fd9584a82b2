"""The objective and the advantages, with numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from texforce_cli.core import advantages as adv
from texforce_cli.core.ppo import (
    Diagnostics,
    clipped_surrogate,
    mean_clip_range,
    reference_kl,
    steered_learning_rate,
)
from texforce_cli.core.seeds import derive
from texforce_cli.core.statistics import mean_interval, paired_interval


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, -2.0),
        (1.5, 2.0, -2.4),  # a gain beyond 1 + 0.2 is not rewarded
        (0.5, 2.0, -1.0),  # a loss is counted in full
        (0.5, -2.0, 1.6),  # min(-1.0, 0.8 * -2.0) = -1.6
        (1.5, -2.0, 3.0),
    ],
)
def test_the_clipped_surrogate_by_hand(ratio: float, advantage: float, expected: float) -> None:
    loss = clipped_surrogate(torch.tensor([math.log(ratio)]), torch.zeros(1), torch.tensor([advantage]), 0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_at_the_first_update_the_gradient_is_the_policy_gradient_of_eq_4() -> None:
    parameter = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def log_prob() -> torch.Tensor:
        return torch.sin(parameter) * 3 + parameter**2

    clipped_surrogate(log_prob(), log_prob().detach(), reward, 1e-4).sum().backward()
    assert parameter.grad is not None
    ours = parameter.grad.clone()
    parameter.grad = None
    (-(log_prob() * reward)).sum().backward()  # Eq. (4): E[grad log p R], as a loss
    assert torch.allclose(ours, parameter.grad, rtol=1e-12)


def test_beyond_the_clip_range_nothing_pulls_further() -> None:
    log_prob = torch.tensor([0.5, -0.5], requires_grad=True)
    clipped_surrogate(log_prob, torch.zeros(2), torch.tensor([1.0, -1.0]), 0.1).sum().backward()
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == [0.0, 0.0]


def test_the_diagnostics_by_hand() -> None:
    found = Diagnostics.of(torch.tensor([0.0, 0.2, -0.1]), clip_range=0.15)
    assert found.approx_kl == pytest.approx((0.04 + 0.01) / 6)
    assert found.clip_fraction == pytest.approx(1 / 3)
    assert found.ratio_error == pytest.approx(math.expm1(0.2), rel=1e-6)


def test_the_kl_of_two_steps_is_that_of_two_normals() -> None:
    mean, reference = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    normals = [torch.distributions.Normal(m, 0.7) for m in (mean, reference)]
    expected = torch.distributions.kl_divergence(normals[0], normals[1]).flatten(1).mean(1)
    assert torch.allclose(reference_kl(mean, reference, 0.7), expected, rtol=1e-5)


def test_the_papers_clip_range_is_a_joint_bound_of_1_64() -> None:
    assert mean_clip_range(1.6384, "joint", 16384) == pytest.approx(1e-4, rel=1e-3)
    assert mean_clip_range(1e-4, "mean", 16384) == 1e-4


def test_the_learning_rate_follows_the_square_root_of_the_kl() -> None:
    assert steered_learning_rate(1.0, 1e-7, 1.44e-7) == pytest.approx(1.2)
    assert steered_learning_rate(1.0, 1e-3, 1e-7) == pytest.approx(1 / 1.5)
    assert steered_learning_rate(1.0, 0.0, 1e-7) == pytest.approx(1.5)


def test_group_advantages_by_hand() -> None:
    # differences to the group means 2 and 10: -1, 1, -2, 2; their mean square 2.5
    found = adv.group_advantages(np.array([1.0, 3.0, 8.0, 12.0]), ["a", "a", "b", "b"])
    assert found == pytest.approx(np.array([-1, 1, -2, 2]) / math.sqrt(2.5), rel=1e-5)


def test_batch_advantages_have_mean_zero_and_unit_variance() -> None:
    found = adv.batch_advantages(np.array([1.0, 2.0, 3.0]))
    assert found == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)], rel=1e-5)


def test_the_tracker_uses_a_prompts_own_rewards_only_when_it_has_enough() -> None:
    tracker = adv.PromptTracker(buffer=4, minimum=3)
    first = tracker.advantages(np.array([0.0, 2.0, 10.0]), ["a", "a", "b"])
    everything = np.array([0.0, 2.0, 10.0])
    assert first == pytest.approx((everything - everything.mean()) / everything.std(), rel=1e-5)
    assert tracker.inert(["a", "b"]) == ["a", "b"]
    second = tracker.advantages(np.array([4.0, 10.0]), ["a", "b"])
    assert second[0] == pytest.approx((4 - 2) / np.std([0, 2, 4]), rel=1e-5)  # a: 0, 2, 4
    assert tracker.inert(["a", "b"]) == ["b"]
    again = adv.PromptTracker(buffer=4, minimum=3)
    again.load_state_dict(tracker.state_dict())
    assert again.state_dict() == {"a": [0.0, 2.0, 4.0], "b": [10.0, 10.0]}


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(-1000, 1000)), min_size=2, max_size=40),
    st.integers(-1000, 1000),
)
def test_group_advantages_sum_to_zero_and_ignore_a_shift_of_rewards(rows: list[tuple[str, int]], shift: int) -> None:
    prompts, rewards = [p for p, _ in rows], np.array([float(r) for _, r in rows])
    found = adv.group_advantages(rewards, prompts)
    assert np.isfinite(found).all()
    shifted = adv.group_advantages(rewards + np.array([shift * ord(p) for p in prompts]), prompts)
    assert shifted == pytest.approx(found, abs=1e-4)
    for prompt in set(prompts):
        mine = found[np.array(prompts) == prompt]
        assert abs(mine.sum()) < 1e-6 * max(1.0, np.abs(mine).sum()) + 1e-3


def test_rewards_that_do_not_vary_are_noticed_and_give_no_signal() -> None:
    same = np.full(8, 2.5)
    assert not adv.varies(same)
    assert adv.varies(np.array([2.5, 2.6]))
    assert np.abs(adv.batch_advantages(same)).max() == 0


def test_seeds_are_the_same_everywhere_and_differ_by_purpose() -> None:
    assert derive(0, "image", 3, 7) == 3470657463437559370
    seeds = {derive(s, "image", e, i) for s in range(3) for e in range(10) for i in range(100)}
    assert len(seeds) == 3000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_interval_of_four_values_by_hand() -> None:
    # mean 2.5, sd 1.291, t(3) = 3.182: half width 3.182446 * 1.291 / 2
    found = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.half_width == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, rel=1e-4)
    assert paired_interval([2.0, 3.0], [1.0, 2.0]).half_width == 0.0
    with pytest.raises(ValueError, match="no interval"):
        mean_interval([1.0])


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (10, 2.228), (20, 2.086), (63, 1.998), (1000, 1.962)])
def test_the_intervals_quantile_is_that_of_the_tables(degrees: int, quantile: float) -> None:
    values = np.random.default_rng(degrees).normal(size=degrees + 1)
    error = values.std(ddof=1) / np.sqrt(degrees + 1)
    assert mean_interval(values.tolist()).half_width / error == pytest.approx(quantile, abs=6e-4)
